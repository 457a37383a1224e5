"""The figures in assets/ are well-formed, safe and readable. On made-up logs, curves have the values of the logs. The
RL figure names functions of the code. Run: pytest tests/test_figures.py"""

import json
import re
import xml.etree.ElementTree as ET

import figures
import numpy as np
import pytest
import svg
from conftest import ROOT, picture

import model
import reward
import rl
from eval import load_task
from support.cache import DistinctInputs, save_shard
from support.program import BadInput, MissingFile

NAME = "{http://www.w3.org/2000/svg}"
HOSTILE = "]]> & \"<script>alert('x')</script> \x00\x1b <!-- </text> &amp;"
COMMITTED = sorted((ROOT / "assets").glob("*.svg"))


def texts(source):
    return ["".join(node.itertext()) for node in ET.fromstring(source).iter(f"{NAME}text")]


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_figures(path):
    """GitHub can show them and a screen reader can read them: no script, no external file, text as text."""
    source = path.read_text(encoding="utf-8")
    assert len(source.encode()) < 200_000
    root = ET.fromstring(source)
    allowed = {"svg", "title", "desc", "style", "rect", "text", "tspan", "polyline", "polygon", "image"}
    assert {node.tag.removeprefix(NAME) for node in root.iter()} <= allowed
    for node in root.iter():
        for name, value in node.attrib.items():
            assert not name.startswith("on")
            assert "href" not in name or value.startswith("data:image/png;base64,")
    style = root.findtext(f"{NAME}style")
    assert "@media (prefers-color-scheme: dark)" in style
    assert not re.search(r"url\(|@import|@font-face", style)
    assert source.count("://") == 1  # of the namespace
    assert root.get("role") == "img" and root.get("aria-labelledby") == "title desc"
    assert len(root.findtext(f"{NAME}title")) > 20 and len(root.findtext(f"{NAME}desc")) > 100


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_no_text_is_cut_off(path):
    """No text is cut off in a wide font: a letter of DejaVu Sans Mono is 0.6 of the font size wide."""
    for node in ET.parse(path).iter(f"{NAME}text"):
        kinds = node.get("class").split()
        size = 12.5 if "small" in kinds or "code" in kinds else 14
        width = 0.6 * size * len("".join(node.itertext()))
        x = float(node.get("x")) - {"start": 0, "middle": width / 2, "end": width}[node.get("text-anchor")]
        assert x >= 0 and x + width <= svg.WIDTH, "".join(node.itertext())


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize("ink", ["ink", "dim", "a", "b", "c"])
@pytest.mark.parametrize("ground", ["paper", "panel"])
def test_contrast(theme, ink, ground):
    """The contrast of text is at least 4.5, as WCAG requires."""
    low, high = sorted(luminance(svg.COLOURS[name][theme]) for name in (ink, ground))
    assert (high + 0.05) / (low + 0.05) >= 4.5


def luminance(colour):
    parts = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_text_is_escaped():
    source = svg.document(HOSTILE, HOSTILE, 10, [svg.text(0, 0, HOSTILE), svg.text(0, 0, "go <gen_emb>")])
    shown = HOSTILE.replace("\x00", "").replace("\x1b", "")
    root = ET.fromstring(source)
    assert root.findtext(f"{NAME}title") == root.findtext(f"{NAME}desc") == shown
    assert texts(source) == [shown, "go <gen_emb>"]
    assert root.find(f".//{NAME}script") is None


def test_rl_step_names_existing_functions():
    """Every name like rl.rollout is a function of that module."""
    assert [path.stem for path in COMMITTED] == ["curves", "query", "rl_step"]
    source = (ROOT / "assets/rl_step.svg").read_text(encoding="utf-8")
    names = re.findall(r"\b(rl|reward|model)\.(\w+(?:\.\w+)*)", "\n".join(texts(source)))
    assert len(names) >= 12
    for module, name in names:
        found = {"rl": rl, "reward": reward, "model": model}[module]
        for part in name.split("."):
            found = getattr(found, part)
        assert callable(found), name


def made_up_runs(folder, seeds=3, steps=100):
    """Write a folder as bench.py does: the loss falls by 1 % a step, the reward rises by 0.001. Steps alternate between
    dataset 0 and dataset 1, whose reward is 0.5 higher."""
    for s in range(seeds):
        for stage, chances in {"sft": (0.5, 0.75), "rl": (0.625, 0.875)}.items():
            run = folder / f"seed{s}" / stage
            (run / "eval" / stage).mkdir(parents=True)
            rows = [
                {"step": n, "dataset": n % 2, "loss": 8 * 0.99**n, "reward": 1 + s / 10 + n / 1000 + n % 2 / 2}
                for n in range(1, steps + 1)
            ]
            (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            (run / "args.json").write_text(json.dumps({"settings": {"tau_steps": 50, "tau": 0.02}}))
            overall = {"gen": 0.5, "pass@1": chances[0] + s / 100, "pass@2": chances[1] + s / 100}
            (run / "eval" / stage / "scores.json").write_text(json.dumps({"overall": overall}))
    return folder


def test_curves_have_the_numbers_of_the_logs(tmp_path):
    source = figures.curves_figure(figures.read_runs(made_up_runs(tmp_path)))
    root = ET.fromstring(source)
    shown = texts(source)
    assert {"51.0", "63.5", "76.0", "88.5", "seed 2", "tau = 0.02"} <= set(shown)  # means over 0, 1 and 2 points more
    described = root.findtext(f"{NAME}desc")
    assert "at first 1.25, 1.35, 1.45, at the end 1.35, 1.45, 1.55" in described  # near step 1 and step 100
    assert "after SFT 51.0 at k = 1, 76.0 at k = 2; after RL 63.5 at k = 1, 88.5 at k = 2" in described


def test_scales():
    """Means over a window, and the places of values in a panel."""
    log = [{"step": n, "x": n} for n in range(1, 11)]
    assert figures.running_mean(log, "x", 5) == [(n, n - 2) for n in range(5, 11)]
    assert figures.running_mean(log, "x", 10) == [(10, 5.5)]
    panel = figures.Panel(0, "", (0, 1), (10, 100), (False, True))
    left, top, right, bottom = panel.left, panel.top, panel.left + panel.width, panel.top + panel.height
    assert panel.at(0, 1) == (left, bottom) and panel.at(10, 100) == (right, top)
    assert panel.at(5, 10) == pytest.approx(((left + right) / 2, (top + bottom) / 2))
    panel.curve([(0, 1), (10, 100)], "a")
    assert f'points="{left:.1f},{bottom:.1f} {right:.1f},{top:.1f}" class="line-a"' in panel.parts[-1]
    assert figures.rounded_range([1.28, 1.41], 0.05) == [1.25, 1.3, 1.35, 1.4, 1.45]


def test_errors_name_the_missing_file_and_its_command(tmp_path):
    with pytest.raises(BadInput, match="no query"):
        figures.find_query(*made_up_answers(tmp_path, [(1.0, 1.0, 1.0), (0.0, 1.0, 0.0)]))
    with pytest.raises(MissingFile, match="bench.py toy"):
        figures.read_runs(tmp_path)
    made_up_runs(tmp_path)
    gone = tmp_path / "seed1/rl/log.jsonl"
    gone.unlink()
    with pytest.raises(MissingFile, match=f"{gone} does not exist.*bench.py toy"):
        figures.read_runs(tmp_path)


def made_up_answers(folder, outcomes):
    """Write a task of two queries and three candidates, the second one right for both, and eval.py's results."""
    data, results = folder / "data", folder / "rl/eval/rl"
    for name in ("q0", "q1", "c0", "c1", "c2"):
        data.mkdir(exist_ok=True)
        picture(int(name[1]) + 3 * (name[0] == "q"), 84, 84 if name[0] == "q" else 28).save(data / f"{name}.png")
    asked = [{"input": {"text": f"{HOSTILE} {q}", "images": [f"q{q}.png"]}, "labels": ["right"]} for q in range(2)]
    candidates = {key: {"text": "", "images": [f"c{i}.png"]} for i, key in enumerate(["near", "right", "far"])}
    kind = {"modality": "image", "group": "toy", "eval_type": "global", "main_metric": "hit@1"}
    path = data / "tasks" / f"{figures.TASK}.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({**kind, "queries": asked, "candidates": candidates}))
    inputs = DistinctInputs([load_task(figures.TASK, data)])
    unit = np.eye(3)
    disc = [unit[0], unit[0], unit[0], 0.8 * unit[0], unit[1]]  # queries, then candidates: the first is nearest
    gen = [unit[0], unit[0], 0.5 * unit[0], unit[0], unit[1]]  # here the second
    rows = []
    for n, key in enumerate(inputs.keys):
        written = f"<think> {n} {HOSTILE}</think><answer> it<gen_emb>"
        rows.append((key, "", disc[n], gen[n][None], np.ones(1, bool), [3], [written]))
    (results / "cache/greedy-0").mkdir(parents=True)
    save_shard(results / "cache/greedy-0", rows, 1.0)
    columns = dict(zip(("disc", "gen", "fused"), zip(*outcomes)))
    (results / "per_query.json").write_text(json.dumps({figures.TASK: columns}))
    return folder / "rl", data


def test_query_is_the_first_that_only_reasoning_finds(tmp_path):
    """Similarities, ranks and texts are those of the query. Its text cannot break the figure."""
    example = figures.find_query(*made_up_answers(tmp_path, [(1.0, 1.0, 1.0), (0.0, 1.0, 1.0)]))
    assert example.file.endswith("q1.png") and example.text.endswith(" 1") and "<think> 1" in example.written
    similarities = {mode: [round(c.similarity, 3) for c in ranked] for mode, ranked in example.ranked.items()}
    assert similarities == {"disc": [1, 0.8, 0], "gen": [1, 0.5, 0], "fused": [0.9, 0.75, 0]}
    right = {mode: figures.index_of_right(ranked) for mode, ranked in example.ranked.items()}
    assert right == {"disc": 1, "gen": 0, "fused": 0}
    source = figures.query_figure(example)
    shown = texts(source)
    assert {"0.800", "0.900", "right first in 50 % of 2 queries"} <= set(shown)
    assert shown.count("✓ right") == 3
    assert len(ET.fromstring(source).findall(f".//{NAME}image")) == 10
    assert "<script>" not in source
