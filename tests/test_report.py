"""report.html of eval.py: its rankings are right, hostile text stays text, its size is limited, unreadable images are
reported, and the page works in a browser. Run: pytest tests/test_report.py"""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conftest import picture
from PIL import Image
from test_eval import arrays, generate_by_text, two_models, unit

import eval as ev
from model import Embedder
from support.report import REPORT_BYTES, parts_of_answer, read_curves, sampled_queries, training_runs, write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = ("</script><script>document.title = 'hostile'</script><!--<script>"
           "<img src=x onerror=\"document.title = 'hostile'\"> &lt;b&gt; \u2028")  # fmt: skip


def data_of(path):
    """Return the data of a report. The page has two script elements, as a parser of HTML finds them."""
    found, parser = [], HTMLParser()
    parser.handle_starttag = lambda tag, _: found.append("") if tag == "script" else None
    parser.handle_data = lambda text: found.append(found.pop() + text) if parser.cdata_elem == "script" else None
    parser.feed(path.read_text(encoding="utf-8"))
    block, _code = found
    return json.loads(block)


def task_of(name="t", queries=4, candidates=6, images=(), text="query"):
    """Return the fields of a task. The only right candidate of query i is candidate i."""
    item = {"text": text, "images": list(images), "video": []}
    rows = [{"input": item | {"text": f"{text} {i}"}, "labels": [f"c{i}"], "grades": None, "candidates": None}
            for i in range(queries)]  # fmt: skip
    pool = {f"c{i}": {"text": f"candidate {i}", "images": [], "video": []} for i in range(candidates)}
    return {"name": name, "modality": "image", "group": "G", "eval_type": "global", "main_metric": "hit@1",
            "queries": rows, "candidates": pool}  # fmt: skip


def ranking(keys, right):
    rank = keys.index(right) + 1 if right in keys else None
    return {"top": [(key, 0.9 - i / 10) for i, key in enumerate(keys)], "right_rank": rank, "num_ranked": 6}


def model_of(tasks, disc=lambda q: q, gen=lambda q: q, answer="<think>because</think><answer>so<gen_emb>", folder=""):
    """What a model's part of the report is made of. disc, gen: number of a query -> of the candidate ranked first."""
    row = {"disc": 0.5, "gen": 0.75, "pass@1": 0.5, "pass@2": 0.8, "invalid": 0.0, "tokens": 9.0}
    examples = {}
    for task in tasks:
        examples[task["name"]] = {}
        for q in sampled_queries(len(task["queries"]), len(tasks), 8):
            keys = list(task["candidates"])
            first = {"disc": disc(q), "gen": gen(q), "fused": q}
            rankings = {mode: ranking([keys[n], *(key for key in keys if key != keys[n])][:5], keys[q])
                        for mode, n in first.items()}  # fmt: skip
            examples[task["name"]][q] = {"answer": answer, "rankings": rankings}
    return {"folder": folder, "rows": {task["name"]: row for task in tasks}, "means": {"mean": row},
            "examples": examples}  # fmt: skip


def test_similarities_are_the_dot_products(tmp_path):
    """The top five of disc, gen and fused are in the order of the dot products, which are the similarities.
    The right candidate is marked. Its rank is given even if it is not among the five."""
    rng = np.random.default_rng(0)
    fields = task_of(queries=5, candidates=9)
    fields["queries"][3]["labels"] = ["no candidate"]
    queries, candidates = (
        arrays(unit(rng.standard_normal((n, 1, 8))), disc=unit(rng.standard_normal((n, 8)))) for n in (5, 9)
    )
    _, _, rankings = ev.score_task(ev.Task(**fields), queries, candidates, shown=[0, 2, 3])
    examples = {q: {"answer": "", "rankings": {mode: shown[q] for mode, shown in rankings.items()}} for q in (0, 2, 3)}
    model = {"folder": "", "rows": {"t": {"disc": 0.0}}, "means": {"mean": {"disc": 0.0}}, "examples": {"t": examples}}
    write_report(tmp_path / "report.html", [fields], {"m": model})
    disc = queries["disc"] @ candidates["disc"].T
    gen = queries["gen"][:, 0] @ candidates["gen"][:, 0].T
    shown = data_of(tmp_path / "report.html")["examples"]
    assert [example["query"] for example in shown] == [0, 2, 3]
    beyond = 0
    for example in shown:
        q = example["query"]
        for mode, scores in {"disc": disc[q], "gen": gen[q], "fused": (disc[q] + gen[q]) / 2}.items():
            got = example["models"][0]["rankings"][mode]
            order = np.argsort(-scores)
            assert [example["candidates"][n]["key"] for n, _, _ in got["top"]] == [f"c{i}" for i in order[:5]]
            assert [x for _, x, _ in got["top"]] == pytest.approx(scores[order[:5]], abs=1e-5)
            rank = None if q == 3 else order.tolist().index(q) + 1
            assert (got["right_rank"], got["num_ranked"]) == (rank, 9)
            assert [right for _, _, right in got["top"]] == [n + 1 == rank for n in range(5)]
            beyond += rank is not None and rank > 5
    assert beyond and shown[2]["right"] == [] and shown[2]["more_right"] == 1


def test_verdicts(tmp_path):
    """The page filters by whether disc and gen rank a right candidate first, for each model."""
    tasks = [task_of()]
    partly = model_of(tasks, disc=lambda q: q if q in (0, 1) else 5, gen=lambda q: q if q in (0, 2) else 5)
    models = {"a": partly, "b": model_of(tasks)}
    write_report(tmp_path / "report.html", tasks, models)
    data = data_of(tmp_path / "report.html")
    assert [x["models"][0]["verdict"] for x in data["examples"]] == [
        "both-right", "disc-right", "gen-right", "both-wrong"]  # fmt: skip
    assert {x["models"][1]["verdict"] for x in data["examples"]} == {"both-right"}
    assert data["models"][0]["rows"]["t"] == {"disc": 0.5, "gen": 0.75, "pass@1": 0.5, "pass@2": 0.8, "invalid": 0.0}


def test_answers_are_split():
    assert parts_of_answer("<think> a\nb</think>\n<answer>c <gen_emb>") == {"reasoning": "a\nb", "summary": "c"}
    assert parts_of_answer("<think></think><answer>c</answer>") == {"reasoning": "", "summary": "c"}
    assert parts_of_answer("c<gen_emb>") == {"text": "c<gen_emb>"}
    assert parts_of_answer("x" * 7000)["text"].endswith("x … (1,000 more characters)")


@pytest.mark.parametrize("queries, tasks, wanted, want", [
    (120, 7, 8, [0, 15, 30, 45, 60, 75, 90, 105]), (5, 1, 8, [0, 1, 2, 3, 4]), (1000, 78, 8, [0, 500]),
    (1000, 500, 8, [0]), (10, 1, 0, []),
])  # fmt: skip
def test_sampled_queries(queries, tasks, wanted, want):
    """The sample is the same in every run and for every model."""
    assert sampled_queries(queries, tasks, wanted) == want


def test_complete_run(tmp_path, tiny_dir, monkeypatch, capsys):
    """eval.py writes the report for all models, equal byte for byte from the cache alone. A query without <gen_emb>
    ("moon") ranks nothing in gen. --report_queries 0 writes no report."""
    monkeypatch.setattr(Embedder, "generate", generate_by_text)
    run, out = two_models(tmp_path, tiny_dir), tmp_path / "out"
    (tmp_path / "rl/log.jsonl").write_text('{"step": 1, "reward": 0.5}\n')
    ev.main(run)
    assert f"{out}/report.html: 7 queries of 2 tasks" in capsys.readouterr().out
    data = data_of(out / "report.html")
    assert [model["name"] for model in data["models"]] == ["sft", "rl"] and len(data["images"]) == 1
    assert data["runs"][0]["curves"] == {"reward": [[1, 0.5]]} and data["models"][1]["runs"] == [0]
    moon = data["examples"][2]
    assert moon["input"]["text"] == "find green moon" and moon["models"][0]["rankings"]["gen"]["num_ranked"] == 0
    assert moon["models"][0]["rankings"]["fused"]["right_rank"] == 1
    scores = json.loads((out / "rl/scores.json").read_text())
    assert data["models"][1]["means"]["mean"]["gen"] == pytest.approx(scores["overall"]["gen"], abs=1e-5)
    before = (out / "report.html").read_bytes()
    ev.main(run)
    assert (out / "report.html").read_bytes() == before and not list(out.glob("*.tmp"))
    (out / "report.html").unlink()
    ev.main([*run, "--report_queries", "0"])
    assert not (out / "report.html").exists()


def test_curves(tmp_path):
    """Points are means over neighbouring steps, without NaN and a truncated line. The runs of rl include its sft run. A
    run that two models share is listed once."""
    sft, rl = tmp_path / "sft", tmp_path / "rl"
    for folder, before in ((sft, "base"), (rl, str(sft))):
        folder.mkdir()
        (folder / "args.json").write_text(json.dumps({"settings": {"model": before}}))
        rows = [json.dumps({"step": step, "loss": step * 1.0, "eta_s": 1.0}) for step in range(1, 241)]
        (folder / "log.jsonl").write_text("\n".join([*rows, '{"step": 241, "loss": NaN}', '{"step": 242, "lo']))
    got = read_curves(sft / "log.jsonl")
    assert got["steps"] == 241 and list(got["curves"]) == ["loss"]
    assert got["curves"]["loss"][:2] == [[2, 1.5], [4, 3.5]] and len(got["curves"]["loss"]) == 120
    # datasets of other levels, in no order: the curve is their mean, which rises, and not the level of a step's dataset
    datasets = np.random.default_rng(0).permutation(["easy", "hard"] * 120).tolist()
    lines = [{"step": step, "dataset": name, "reward": 5 * (name == "hard") + step / 240}
             for step, name in enumerate(datasets, 1)]  # fmt: skip
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    curve = read_curves(tmp_path / "log.jsonl")["curves"]["reward"]
    assert len(curve) == 40 and all(abs(x - 2.5 - step / 240) < 0.03 for step, x in curve)
    runs, indices = training_runs({"sft": str(sft), "rl": str(rl), "hub": "org/name"})
    assert [run["name"] for run in runs] == [str(sft), str(rl)]
    assert indices == {"sft": [0], "rl": [0, 1], "hub": []}


def hostile_report(folder):
    """Write a report with hostile scripts as names, query, candidate, answer, file name and log."""
    run = folder / "run"
    run.mkdir()
    (run / "log.jsonl").write_text(json.dumps({"step": 1, HOSTILE: 1.0}) + "\n")
    tasks = [task_of(f"{HOSTILE} 0", images=[f"/{HOSTILE}.png"], text=HOSTILE), task_of("plain")]
    for task in tasks:
        task["group"] = HOSTILE
        task["candidates"]["c0"]["text"] = HOSTILE
        task["candidates"] = {key + HOSTILE: item for key, item in task["candidates"].items()}
        for query in task["queries"]:
            query["labels"] = [key + HOSTILE for key in query["labels"]]
    models = {
        HOSTILE: model_of(tasks, disc=lambda q: q if q != 1 else 5, answer=HOSTILE, folder=run),
        "b": model_of(tasks, answer=f"<think>{HOSTILE}</think><answer>{HOSTILE}<gen_emb>"),
    }
    write_report(folder / "report.html", tasks, models)
    return folder / "report.html"


def test_hostile_text_stays_in_the_data(tmp_path):
    """The page has two script elements, as any report. The texts in its data are unchanged."""
    data = data_of(hostile_report(tmp_path))
    assert data["models"][0]["name"] == HOSTILE and data["examples"][0]["models"][0]["text"] == HOSTILE
    assert data["examples"][0]["models"][1]["reasoning"] == HOSTILE.strip()


def test_unreadable_images_are_reported(tmp_path):
    """A missing file, a text file and a truncated image: the report shows the problem instead of an image."""
    picture(0, 300, 200).save(tmp_path / "good.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "good.jpg").read_bytes()[:900])
    (tmp_path / "text.png").write_text("no image")
    paths = [str(tmp_path / name) for name in ("good.jpg", "missing.jpg", "cut.jpg", "text.png")]
    tasks = [task_of(queries=1, images=paths)]
    write_report(tmp_path / "report.html", tasks, {"m": model_of(tasks)})
    data = data_of(tmp_path / "report.html")
    good, *bad = data["examples"][0]["input"]["images"]
    assert list(data["images"]) == [good["digest"]]
    assert all(path in one["problem"] for path, one in zip(paths[1:], bad))


def test_size_is_bounded(tmp_path, capsys, monkeypatch):
    """78 tasks and two models fit, and each distinct image is stored once. With a lower limit every task still has a
    query. The page and the command line report how many queries are left out."""
    world = []
    for t in range(78):
        task = task_of(f"task {t}", queries=100, candidates=120, images=[f"{t}-1"])
        for n, item in enumerate(task["candidates"].values()):
            item["images"] = [f"{t}-2-{n}"]
        world.append(task)
    long = "<think>" + "word < " * 6_000  # an answer of 8,192 tokens
    models = {"a": model_of(world, answer=long), "b": model_of(world, disc=lambda q: q + 9, answer=long)}
    path = tmp_path / "report.html"

    def noise(path):  # makes the largest JPEG; another for every path
        seed = int(re.sub(r"\D", "", path))
        return Image.frombytes("RGB", (112, 112), np.random.default_rng(seed).bytes(112 * 112 * 3))

    monkeypatch.setattr(ev.report, "open_image", noise)
    write_report(path, world, models)
    data = data_of(path)
    assert path.stat().st_size < REPORT_BYTES and len(data["examples"]) == 2 * 78
    assert len(set(data["images"].values())) == len(data["images"])
    limit = path.stat().st_size * 8 // 10
    capsys.readouterr()
    write_report(path, world, models, max_bytes=limit)
    data = data_of(path)
    left_out = sum(task["left_out"] for task in data["tasks"])
    assert path.stat().st_size < limit and left_out + len(data["examples"]) == 2 * 78 and left_out > 0
    assert {example["task"] for example in data["examples"]} == set(range(78))
    assert f"{left_out} more would exceed" in capsys.readouterr().out


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on this machine: apt-get install chromium")
    return hostile_report(tmp_path_factory.mktemp("hostile"))


def browse(path, choice=""):
    """Return the DOM after the page's script has run with a choice in the address. The console must be empty."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom",
               f"--user-data-dir={path.parent}/profile", f"{path.as_uri()}#{choice}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    messages = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not messages, messages
    return done.stdout


def test_errors_on_the_console_are_seen(hostile_page, tmp_path):
    """Check `browse` itself: an error of the page's script reaches it."""
    broken = tmp_path / "broken.html"
    broken.write_text(hostile_page.read_text().replace('"use strict";', '"use strict"; nowhere();'))
    with pytest.raises(AssertionError, match="nowhere is not defined"):
        browse(broken)


@pytest.mark.parametrize("choice, want", [
    ("", 8), ("task=plain", 4), ("task=plain&show=gen-right", 1), ("show=gen-right", 2), ("show=disc-right", 0),
    ("show=gen-right&model=b", 0), ("show=both-right&model=b", 8), ("task=unknown&show=unknown", 8),
])  # fmt: skip
def test_filters(hostile_page, choice, want):
    """The address selects task, model and result. An unknown value counts as no choice. No hostile script has run."""
    dom = browse(hostile_page, choice)
    shown = re.findall(r"<h3>(?:.*?)(\w+|0), query (\d)</h3>", dom)
    assert len(shown) == want
    assert f">{want} of 8 queries</output>" in dom
    assert "<title>Evaluation report</title>" in dom
    if "task=plain" in choice:
        assert {name for name, _ in shown} == {"plain"}
    if "gen-right" in choice:
        assert {q for _, q in shown} <= {"1"}


def test_page_is_complete(hostile_page):
    """The first query is open, with both models and three rankings each. The page has bars, curves and the problem of
    the unreadable image. Headings skip no level, every select has a label, every image has a text."""
    dom = browse(hostile_page)
    body = re.sub(r"<script.*?</script>", "", dom, flags=re.DOTALL)
    assert body.count('class="ranking"') == body.count("✓ right") == 2 * 3
    assert '<html lang="en">' in dom and "no image</strong>" in body and 'class="fill"' in body
    assert body.count("<polyline") > 1
    levels = [int(level) for level in re.findall(r"<h([1-6])", body)]
    assert levels[0] == 1 and max(b - a for a, b in zip(levels, levels[1:])) == 1
    assert len(re.findall(r"<label>\w[\w ]* <select", body)) == len(re.findall("<select", body)) == 3
    assert all(" alt=" in tag for tag in re.findall(r"<img [^>]*>", body))


def test_the_report_shows_invalid_answers(tmp_path):
    """Bug story: a model with 100 % invalid answers showed zeros and no reason. Their share is a row, and every row is
    explained."""
    tasks = [task_of("t")]
    model = model_of(tasks, answer="rambling")
    row = {"disc": 0.5, "gen": 0.0, "oracle": 0.5, "pass@1": 0.0, "pass@2": 0.0, "invalid": 1.0, "tokens": 9.0}
    model |= {"rows": {"t": row}, "means": {"mean": row}}
    write_report(tmp_path / "report.html", tasks, {"m": model})
    assert data_of(tmp_path / "report.html")["models"][0]["means"]["mean"]["invalid"] == 1.0
    if CHROMIUM is None:
        pytest.skip("no browser: apt-get install chromium")
    dom = re.sub(r"<script.*?</script>", "", browse(tmp_path / "report.html"), flags=re.DOTALL)
    assert re.search(r'<th scope="row" class="no">invalid</th>.*?100\.0', dom)
    assert re.findall(r"<dt>(.*?)</dt><dd>\w", dom)[:5] == ["disc", "gen", "oracle", "pass@k", "invalid"]


def test_every_mode_is_explained():
    """A new mode must not be forgotten in the page."""
    page = (Path(ev.__file__).parent / "support/report_page.html").read_text()
    meaning = page.split("const MEANING")[1].split("};")[0]
    explained = re.findall(r'^  "?([\w@]+)"?: "', meaning, flags=re.MULTILINE)
    assert explained == [*ev.MODES, "pass@k", "invalid"]
