"""The 78 tasks of MMEB-V2 on a miniature data root: what is read, what a kill costs, when the cache is used. tests/data
holds the root (made-up rows in the published layouts) and what the published parsers make of 27 tasks."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, check_tasks, run_processes

import eval as ev
import support.cache as cache_file
import support.reasoner as reasoner_file
from data import BadInput
from model import Embedder
from support.cache import EmbeddingCache, embed_inputs
from support.cache import shards as shards_of
from support.images import open_image
from support.mmeb import annotation_files, sample_frames
from support.program import MissingFile, Skip
from support.reasoner import ablate_trace, embed_answers

DATA = Path(__file__).parent / "data"
FEW = ["VOC2007", "HMDB51", "VisRAG_ArxivQA"]  # one task of each modality, for runs that must be short


@pytest.fixture
def own(mini, tmp_path):
    """A copy that the test may break."""
    return Path(shutil.copytree(mini, tmp_path / "root", symlinks=True))


def media(item):
    return item["images"] + item["video"]


def below(root, paths):
    return [os.path.relpath(path, root) for path in paths]


def as_read(task, root):
    """Return a task with paths relative to its root, to compare."""
    plain = lambda item: (item["text"], below(root, media(item)))  # noqa: E731
    queries = [(plain(q["input"]), q["labels"], q["grades"], q["candidates"]) for q in task.queries]
    return queries, [(key, *plain(item)) for key, item in task.candidates.items()]


def test_given_tasks_equal_the_published_parsers(mini):
    """27 tasks: stripped text without pads, media, lists, labels and grades of every row, candidates in order."""
    expected = json.loads((DATA / "expected_some_tasks.json").read_text())["tasks"]
    assert len(expected) == 27

    def text_of(published):
        return published.replace("<|image_pad|>", "").replace("<|video_pad|>", "").strip()

    for name, want in expected.items():
        task = ev.load_task(name, mini)
        assert (task.modality, task.eval_type) == (want["modality"], want["eval_type"])
        assert len(task.queries) == len(want["rows"])
        for got, row in zip(task.queries, want["rows"]):
            assert got["input"]["text"] == text_of(row["query_text"]), name
            assert below(mini, media(got["input"])) == row["query_media"], name
            assert (got["labels"], got["grades"]) == (row["labels"], row["rel_scores"]), name
            if name == "QVHighlight":  # in directory order there
                assert set(got["candidates"]) == set(row["candidates"])
            elif task.eval_type == "local":
                assert got["candidates"] == row["candidates"], name
        pool = [(key, item["text"], below(mini, media(item))) for key, item in task.candidates.items()]
        target = [(c["name"], text_of(c["text"]), c["media"]) for c in want["candidates"]]
        by_name = name == "QVHighlight"
        assert (sorted(pool) if by_name else pool) == (sorted(target) if by_name else target), name


def test_all_tasks_load(mini):
    """36 + 18 + 24 tasks in 12 groups: each has queries, and every file of every input is a readable image."""
    counts, groups, seen = {}, {}, set()
    for name in ev.MMEB:
        task = ev.load_task(name, mini)
        counts[task.modality] = counts.get(task.modality, 0) + 1
        groups[task.group] = groups.get(task.group, 0) + 1
        assert len(task.queries) >= 3
        assert task.main_metric == ("ndcg_linear@5" if task.modality == "visdoc" else "hit@1")
        for item in [*(q["input"] for q in task.queries), *task.candidates.values()]:
            assert "<|" not in item["text"] and item["text"] == item["text"].strip()
            seen.update(media(item))
    assert counts == {"image": 36, "video": 18, "visdoc": 24}
    assert list(groups.values()) == [10, 10, 12, 4, 5, 5, 5, 3, 10, 4, 6, 4]
    assert all(open_image(path).size for path in seen)


def test_rules_beyond_the_given_tasks(mini, own):
    """All classes of the list are candidates, and so are the clip folders next to "query". Pages are corrected. The
    published run cuts SmthSmthV2, and no other task, to 1,000 rows."""
    kinetics = ev.load_task("K700", mini)
    assert set(ev.MMEB["K700"]["labels"]) <= set(kinetics.candidates) and len(ev.MMEB["K700"]["labels"]) == 700
    clips = ev.load_task("Charades-STA", mini)
    folder = "video-tasks/frames/video_mret/Charades_STA/UP2ZY/"
    assert {folder + clip for clip in ("a_clip", "positive_clip_0", "queryish", "zz_clip")} <= set(clips.candidates)
    assert folder + "query" not in clips.candidates
    fixed = ev.load_task("ViDoSeek-page", mini)
    stale = pq.read_table(mini / "annotations/VLM2Vec/ViDoSeek-page/qrels/test-00000-of-00001.parquet").to_pylist()
    assert [q["labels"] for q in fixed.queries] != [[row["corpus-id"]] for row in stale[: len(fixed.queries)]]
    grades = [g for q in ev.load_task("ViDoSeek-doc", mini).queries for g in q["grades"]]
    assert set(grades) == {2, 3}
    bare = ev.load_task("ViDoRe_arxivqa", mini, vidore_instruction=False)  # as in tables before November 2025
    assert "Find a document" not in bare.queries[0]["input"]["text"] and bare.candidates[0]["text"] == ""
    always = ev.load_task("VisRAG_ArxivQA", mini, vidore_instruction=False)
    assert always.queries[0]["input"]["text"].startswith("Find a document image")
    file = own / "annotations/VLM2Vec/SmthSmthV2/data/test.jsonl"
    row = json.loads(file.read_text().splitlines()[0])
    file.write_text("".join(json.dumps(row | {"pos_text": f"row {i}"}) + "\n" for i in range(1005)))
    queries = ev.load_task("SmthSmthV2", own).queries
    assert [q["labels"] for q in queries][::999] == [["row 0"], ["row 999"]] and len(queries) == 1000


def test_frames(tmp_path):
    """Natural order, capitals, and files that are not images. An empty or missing folder is an unreadable image."""
    for name in ("f10.jpg", "f9.JPG", "f1.png", "notes.txt", "f2.jpg.bak"):
        (tmp_path / name).write_bytes(b"x")
    assert [Path(path).name for path in sample_frames(tmp_path)] == ["f1.png", "f9.JPG", "f10.jpg"]
    for i in range(11, 20):
        (tmp_path / f"f{i}.jpg").write_bytes(b"x")
    names = [Path(path).name for path in sample_frames(tmp_path)]
    assert names == ["f1.png", "f9.JPG", "f11.jpg", "f12.jpg", "f14.jpg", "f15.jpg", "f17.jpg", "f19.jpg"]
    assert len(sample_frames(tmp_path, None)) == 12
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "missing"):
        with pytest.raises(Skip):
            open_image(sample_frames(tmp_path / folder)[0])


def test_cards_and_links_are_not_needed(mini, own):
    """Without dataset cards the files are found by their names, without the links of the yaml file in the archives'
    folders. Without page archives the pages are written once from the corpus tables, as the official loader does."""
    for card in own.rglob("README.md"):
        card.unlink()
    for name in ev.MMEB:
        assert as_read(ev.load_task(name, own), own) == as_read(ev.load_task(name, mini), mini), name
    card = own / "annotations/VLM2Vec/MSVD/README.md"  # other forms of a card: a bare pattern, no config name
    for config in ('"*_test.json"', '["*.json"]', ""):
        card.write_text(f"---\nconfigs:\n- data_files: {config}\n---\n")
        assert as_read(ev.load_task("MSVD", own), own) == as_read(ev.load_task("MSVD", mini), mini)
    links = [path for path in own.rglob("*") if path.is_symlink() and path.parent.name != "images"]
    assert len(links) > 30
    for link in links:
        link.unlink()
    for name in ev.MMEB:
        task = ev.load_task(name, own)
        items = [*(q["input"] for q in task.queries), *task.candidates.values()]
        assert all(os.path.isfile(path) for item in items for path in media(item)), name
        assert len(task.queries) == len(ev.load_task(name, mini).queries)
    shutil.rmtree(own / "visdoc-tasks")
    for name in ("ViDoRe_docvqa", "VisRAG_SlideVQA"):  # the first one's corpus has two shards
        got, want = ev.load_task(name, own), ev.load_task(name, mini)
        assert as_read(got, own) == as_read(want, mini)
        for key in want.candidates:
            mine, theirs = (Path(task.candidates[key]["images"][0]) for task in (got, want))
            assert mine.read_bytes() == theirs.read_bytes()


def test_errors_name_the_file_and_the_remedy(own):
    """Errors for wrong columns, missing folders and queries without a page name the file and the problem."""
    with pytest.raises(FileNotFoundError, match="known tasks: none"):
        ev.load_task("CIFAR", own)
    file = own / "annotations/VLM2Vec/VATEX/vatex_test/test-00000-of-00001.parquet"
    pq.write_table(pq.read_table(file).rename_columns(["id", *pq.read_schema(file).names[1:]]), file)
    with pytest.raises(ValueError, match=r"VATEX.*is missing the columns videoID"):
        ev.load_task("VATEX", own)
    file = own / "annotations/VLM2Vec/Video-MME/videomme/test-00000-of-00001.parquet"
    rows = pq.read_table(file).to_pylist()
    rows[1]["answer"] = "E"
    pq.write_table(pa.Table.from_pylist(rows), file)
    with pytest.raises(ValueError, match=r"VLM2Vec/Video-MME, row 1 of Video-MME: not in the published form"):
        ev.load_task("Video-MME", own)
    shutil.rmtree(own / "annotations/VLM2Vec/MSVD")
    with pytest.raises(FileNotFoundError, match=r"VLM2Vec/MSVD has no files of config default, split test"):
        ev.load_task("MSVD", own)
    file = own / "annotations/vidore/tatdqa_test_beir/qrels/test-00000-of-00001.parquet"
    table = pq.read_table(file).to_pylist()
    pq.write_table(pa.Table.from_pylist([row for row in table if row["query-id"] != table[0]["query-id"]]), file)
    with pytest.raises(ValueError, match=f"query {table[0]['query-id']} has no relevant page"):
        ev.load_task("ViDoRe_tatdqa", own)
    shutil.rmtree(own / "video-tasks/frames/video_mret/QVHighlight/NUsG9BgSes0_210.0_360.0/positive")
    with pytest.raises(FileNotFoundError, match=r"NUsG9BgSes0_210.0_360.0 has no sub-folder positive"):
        ev.load_task("QVHighlight", own)


def test_check(own, capsys):
    """Complete files: exit 0. Missing or broken files: exit 1, with names and commands. Bug story: the table was 390
    columns wide, and each row advised this same command. With one of two files of a corpus missing, a run stops too."""
    tasks = ["I-VG", "CIRR", "MSVD", "VisRAG_PlotQA"]
    assert check_tasks(own, *tasks) == 0
    assert "7 of 7 tasks are complete; 7 do not have the known number" in capsys.readouterr().out
    (own / "image-tasks/CIRR/cand_3.png").unlink()
    broken = next((own / "image-tasks/RefCOCO").rglob("*.jpg"))
    broken.write_bytes(broken.read_bytes()[:200])
    shutil.rmtree(own / "annotations/VLM2Vec/MSVD")
    assert check_tasks(own, *tasks) == 1
    assert "4 of 7 tasks are complete" in (printed := capsys.readouterr().out)
    rows = {line.split()[0]: line for line in printed.splitlines() if line}
    assert "cand_3.png: no such file" in rows["CIRR"]
    assert rows["MSVD"].endswith("annotations/VLM2Vec/MSVD has no files of config default, split test")
    assert f"{broken.name}: cannot be read as an image" in rows["RefCOCO"]
    assert f"download --repo-type dataset VLM2Vec/MSVD --local-dir {own}/annotations/VLM2Vec/MSVD" in printed
    assert f"tar xzf {own}/download/image-tasks/mmeb_v1.tar.gz" in printed and "video_ret.tar.gz" not in printed
    assert check_tasks(own, "ViDoRe_docvqa") == 0
    (own / "annotations/vidore/docvqa_test_subsampled_beir/corpus/test-00001-of-00002.parquet").unlink()
    capsys.readouterr()
    assert check_tasks(own, "ViDoRe_docvqa") == 1
    printed = capsys.readouterr().out
    assert "1 of 2 files test-* are missing, e.g. test-00001-of-00002.parquet" in printed and "hf download" in printed
    with pytest.raises(MissingFile, match="test-00001-of-00002.parquet"):
        ev.load_task("ViDoRe_docvqa", own)


def run(root, model, out, *flags, tasks=FEW):
    """Run eval.py and return the content of scores.json, without the seconds."""
    ev.main([*run_argv(root, model, *flags, tasks=tasks), "--out", str(out)])
    return scores_of(out, Path(model).name)


def run_argv(root, model, *flags, tasks=FEW):
    argv = ["--root", root, "--model", model, "--tasks", *tasks, "--samples", 0, "--max_new_tokens", 20,
            "--slots", 4, "--workers", 0, *flags]  # fmt: skip
    return list(map(str, argv))


def scores_of(out, name):
    scores = json.loads((Path(out) / name / "scores.json").read_text())
    for entry in scores["tasks"].values():
        del entry["seconds"]
    return scores


def test_scores_that_are_replaced_are_named(mini, writer_dir, tmp_path, capsys):
    """Bug story: a run of one task replaced the scores of a complete evaluation without a message."""
    run(mini, writer_dir, tmp_path, tasks=["VOC2007", "HMDB51"])
    assert "no longer has" not in capsys.readouterr().out
    run(mini, writer_dir, tmp_path, tasks=["VOC2007"])
    assert "scores.json no longer has HMDB51 (the cache has their embeddings)" in capsys.readouterr().out
    other = tmp_path / "other" / writer_dir.name  # another model of this name
    shutil.copytree(writer_dir, other)
    run(mini, other, tmp_path, tasks=["VOC2007"])
    assert f"scores.json no longer has the scores of {writer_dir} (the cache has" in capsys.readouterr().out
    run(mini, other, tmp_path, tasks=["VOC2007"])
    assert "no longer has" not in capsys.readouterr().out


def test_a_part_of_the_tasks_has_no_overall(mini, writer_dir, tmp_path, capsys):
    """3 of 78 tasks: marked group means, no overall, published rows next to ours. The leaderboard files have its keys,
    its mark for missing tasks and the names of the corrected page sets."""
    scores = run(mini, writer_dir, tmp_path / "out", "--samples", 2, "--workers", 1)
    assert list(scores["tasks"]) == FEW and scores["overall"] is None
    printed = capsys.readouterr().out
    assert "3 of 78 tasks: no overall" in printed and "UME-R1 2B gen" in printed and "VisRAG_ArxivQA hit@1" in printed
    line = next(line for line in printed.splitlines() if f"{writer_dir.name} disc" in line)
    assert line.count("*") == 6 and line.split()[-1] == "-"  # three groups, three modalities, no overall
    board = json.loads((tmp_path / "out" / writer_dir.name / "leaderboard_gen.json").read_text())
    assert list(board["metadata"])[:3] == ["model_name", "model_backbone", "model_size"]
    assert {kind: len(tasks) for kind, tasks in board["metrics"].items()} == {"image": 36, "video": 18, "visdoc": 24}
    assert board["metrics"]["visdoc"]["ViDoSeek-page-fixed"] == "FILE_N/A" and "CIRR" in board["metrics"]["image"]
    got = board["metrics"]["image"]["VOC2007"]
    assert list(got) == [*ev.METRICS, "num_pred", "num_data"] and got["num_data"] == 5
    assert got["hit@1"] == scores["tasks"]["VOC2007"]["gen"]["hit@1"]
    assert {path.name for path in (tmp_path / "out" / writer_dir.name).glob("leaderboard_*")} == {
        f"leaderboard_{mode}.json" for mode in ev.MODES}  # fmt: skip
    assert set(scores["tasks"]["HMDB51"]["pass@k"]) == {"1", "2"}


def test_killed_run_resumes(mini, writer_dir, tmp_path, monkeypatch):
    """kill -9 after 45 of about 100 inputs, and again: the scores of an undisturbed run. A kill costs at most
    --save_every inputs, and the shards have every input once."""
    argv = run_argv(mini, writer_dir, "--save_every", 10)
    undisturbed = run(mini, writer_dir, tmp_path / "undisturbed", "--save_every", 10)
    N, log, real = undisturbed["encoded"]["greedy"], tmp_path / "log", Embedder.generate
    moments = [45, 60]
    assert N > 80

    def counted(prompts):
        for prompt in prompts:
            with open(log, "a") as file:
                file.write(prompt.row.name + "\n")
            if moments and len(log.read_text().splitlines()) == moments[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            yield prompt

    monkeypatch.setattr(Embedder, "generate", lambda self, prompts, **given: real(self, counted(prompts), **given))
    while moments:
        run_processes(ev, [*argv, "--out", tmp_path / "killed"], 1, codes=-signal.SIGKILL)
        del moments[0]
    again = run(mini, writer_dir, tmp_path / "killed", "--save_every", 10)
    assert N < len(log.read_text().splitlines()) <= N + 2 * 10
    assert 0 < again["encoded"]["greedy"] < N
    assert again["tasks"] == undisturbed["tasks"]
    (cache,) = (tmp_path / "killed" / writer_dir.name / "cache").iterdir()
    keys = [key for rows, _ in shards_of(cache) for key, *_ in rows]
    assert len(keys) == len(set(keys)) == N


def test_a_stale_result_is_never_used(own, writer_dir, tmp_path):
    """Changed bytes of an image of the same name, size and time, a weight, a setting: each embeds again. Moved data
    does not."""
    model = shutil.copytree(writer_dir, tmp_path / "model")
    encoded = lambda root, *flags: run(root, model, tmp_path / "out", *flags, tasks=["VOC2007"])["encoded"]  # noqa: E731
    first = encoded(own)["greedy"]
    assert first > 10 and encoded(own) == {"greedy": 0}
    moved = own.rename(tmp_path / "moved")
    assert encoded(moved) == {"greedy": 0}
    path = moved / "image-tasks/VOC2007/VOC2007_0.jpg"
    content, times = bytearray(path.read_bytes()), (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    content[-10] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=times)
    assert encoded(moved) == {"greedy": 1}
    assert encoded(moved, "--max_new_tokens", 11) == {"greedy": first}
    assert encoded(moved, "--blank_image", "false") == {"greedy": first}
    assert encoded(moved, "--samples", 2)["samples"] == encoded(moved, "--samples", 2, "--seed", 1)["samples"] > 0
    embedder = Embedder.from_pretrained(model)
    with torch.no_grad():
        embedder.backbone.lm_head.weight[5, 5] += 1e-3
    embedder.save_pretrained(model)
    assert encoded(moved) == {"greedy": first}


def test_unreadable_images_are_counted(own, writer_dir, tmp_path, capsys, monkeypatch):
    """A broken and a missing image are reported and miss in all modes. A task without its media is an error. A disk
    that fails once must not leave a miss in the cache: the bytes and the input's key stay the same."""
    real = cache_file.encode_input

    def failing(tokenizer, item, answer, **given):
        if "VOC2007_2" in "".join(item["images"]):
            raise Skip("the disk does not answer")
        return real(tokenizer, item, answer, **given)

    with monkeypatch.context() as patch:
        patch.setattr(cache_file, "encode_input", failing)
        assert run(own, writer_dir, tmp_path / "out", tasks=["VOC2007"])["tasks"]["VOC2007"]["unreadable"] == 1
    scores = run(own, writer_dir, tmp_path / "out", tasks=["VOC2007"])
    assert scores["tasks"]["VOC2007"]["unreadable"] == 0 and scores["encoded"] == {"greedy": 1}
    capsys.readouterr()
    (own / "image-tasks/VOC2007/VOC2007_0.jpg").unlink()
    next((own / "image-tasks/VOC2007").glob("VOC2007_1.*")).write_bytes(b"no image")
    scores = run(own, writer_dir, tmp_path / "out", tasks=["VOC2007"])
    assert scores["tasks"]["VOC2007"]["unreadable"] == 2
    per_query = json.loads((tmp_path / "out" / writer_dir.name / "per_query.json").read_text())["VOC2007"]
    assert per_query["disc"][:2] == per_query["oracle"][:2] == [0, 0] and per_query["texts"][0] == ""
    assert "2 inputs (or answers) cannot be read" in capsys.readouterr().out
    shutil.rmtree(own / "image-tasks/VOC2007")
    with pytest.raises(ValueError, match=r"VOC2007: 5 of 5 media files do not exist.*--check"):
        run(own, writer_dir, tmp_path / "out", tasks=["VOC2007"])


def test_slots_and_processes_do_not_change_scores(mini, writer_dir, tmp_path):
    """Two ranks share the inputs and write their own shards. The scores, samples included, are those of one rank."""
    flags = ["--samples", 2, "--save_every", 16]
    one = run(mini, writer_dir, tmp_path / "one", *flags, "--slots", 3)
    run_processes(ev, run_argv(mini, writer_dir, "--out", tmp_path / "two", "--workers", 1, *flags))
    two = scores_of(tmp_path / "two", writer_dir.name)
    assert two["tasks"] == one["tasks"] and two["encoded"] == one["encoded"]
    names = [path.stem for path in (tmp_path / "two").rglob("*.safetensors")]
    assert {name.split("-")[1] for name in names} == {"0", "1"}


def test_equal_inputs_are_embedded_once(mini, writer_dir, tmp_path):
    """The page and the document task of ViDoSeek rank the same pages from two folders."""
    page, doc = (ev.load_task(name, mini) for name in ("ViDoSeek-page", "ViDoSeek-doc"))
    texts = {q["input"]["text"] for task in (page, doc) for q in task.queries}
    assert len(page.candidates) == len(doc.candidates)
    scores = run(mini, writer_dir, tmp_path / "out", tasks=["ViDoSeek-page", "ViDoSeek-doc"])
    pages = {Path(item["images"][0]).read_bytes() for task in (page, doc) for item in task.candidates.values()}
    assert scores["encoded"]["greedy"] == len(texts) + len(pages) < len(page.candidates) + len(doc.candidates)
    assert ["published_ndcg" in entry for entry in scores["tasks"].values()] == [False, True]


def test_ablation_of_the_reasoning(mini, writer_dir, tmp_path, capsys, monkeypatch):
    """Removed and swapped reasoning change the embeddings. A second run takes everything from the cache. Bug story:
    after ablation an answer may have no <gen_emb>. Its zero vector was valid and tied with all candidates, the first of
    which is right: hit@1 of 100."""
    flags = ["--ablate", "trace", "--max_new_tokens", 24]
    scores = run(mini, writer_dir, tmp_path / "out", *flags, tasks=["VOC2007"])
    ablate = scores["tasks"]["VOC2007"]["ablate"]
    assert set(ablate) == {"removed", "swapped"} and list(ablate["removed"]["gen"]) == ev.METRICS
    assert 0 < ablate["removed"]["cosine"] < 0.9999
    assert "reasoning removed" in capsys.readouterr().out
    texts = ["<think>a</think><answer>1<gen_emb>", "no thought", "<think>a</think>2", "<think>b\nb</think>3"]
    got = ablate_trace(texts)  # a text without reasoning, or a single reasoning, is not swapped
    assert got["removed"] == ["<think></think><answer>1<gen_emb>", "no thought", "<think></think>2", "<think></think>3"]
    assert got["swapped"] == ["<think>b\nb</think><answer>1<gen_emb>", "no thought", "<think>b\nb</think>2",
                              "<think>a</think>3"]  # fmt: skip
    assert ablate_trace(["<think>a</think>"])["swapped"] == ["<think>a</think>"]
    again = run(mini, writer_dir, tmp_path / "out", *flags, tasks=["VOC2007"])
    assert again["tasks"] == scores["tasks"] and again["encoded"]["greedy"] == 0
    monkeypatch.setattr(reasoner_file, "ablate_trace", lambda texts: {
        kind: [text.replace("<gen_emb>", "") for text in texts] for kind in ("removed", "swapped")})  # fmt: skip
    scores = run(mini, writer_dir, tmp_path / "lost", *flags, tasks=["VOC2007"])
    for got in scores["tasks"]["VOC2007"]["ablate"].values():
        assert got["gen"]["hit@1"] == 0 and got["cosine"] is None


def test_rereading_an_unreadable_input(writer_dir):
    """An image that is missing when its trace is read is a problem, is not valid, and is tried again."""
    settings, trace = ev.Settings(slots=2, workers=0), "<think>a</think><answer>b<gen_emb>"
    items = [{"text": text, "images": ["gone.png"] * (text == "b"), "video": []} for text in "abc"]
    rows = embed_inputs(Embedder.from_pretrained(writer_dir), items, list("abc"), settings, answers=[trace] * 3)
    keys, problems, _, _, valid, *_ = zip(*sorted(rows, key=lambda row: row[0]))
    assert keys == ("a", "b", "c") and [bool(x) for x in valid] == [True, False, True]
    assert [bool(x) for x in problems] == [False, True, False] and "gone.png" in problems[1]


@pytest.fixture(scope="session")
def reader_dir(writer_dir, tmp_path_factory):
    """Return a model like the writer with other embeddings for the same text."""
    reader = Embedder.from_pretrained(writer_dir)
    norm = reader.backbone.model.language_model.norm.weight
    with torch.no_grad():
        norm *= torch.linspace(0.5, 1.5, len(norm))
    path = tmp_path_factory.mktemp("models") / "reader"
    reader.save_pretrained(path)
    return path


def reason_argv(root, model, reasoner, out, *flags, tasks=FEW):
    return run_argv(root, model, "--reasoner", reasoner, "--out", out, *flags, tasks=tasks)


def reason(root, model, reasoner, out, *flags, tasks=FEW):
    """Run eval.py --reasoner and return the content of scores.json."""
    ev.main(reason_argv(root, model, reasoner, out, *flags, tasks=tasks))
    return scores_of(out, f"{Path(model).name}-reads-{Path(reasoner).stem}")


def test_one_model_reasons_another_embeds(mini, writer_dir, reader_dir, tmp_path, monkeypatch, capsys):
    """Cached answers are not written again. Tables and files name both models. The answers decide gen and do not affect
    disc. A file with the same answers gives the same scores."""
    out = tmp_path / "out"
    own_scores = run(mini, writer_dir, out)
    alone = run(mini, reader_dir, out)
    with monkeypatch.context() as patch:
        patch.setattr(Embedder, "generate", lambda self, prompts, **given: [pytest.fail("written") for _ in prompts])
        scores = reason(mini, reader_dir, writer_dir, out)
    assert (scores["model"], scores["reasoner"]) == ("reader", writer_dir.name)
    printed = capsys.readouterr().out
    assert f"reader reads the answers of {writer_dir.name}: main metric" in printed
    assert f"reader-reads-{writer_dir.name} fused" in printed  # the paper's table
    folder = out / f"reader-reads-{writer_dir.name}"
    board = json.loads((folder / "leaderboard_fused.json").read_text())
    assert board["metadata"]["model_name"] == folder.name
    assert board["metadata"]["embedding_dimension"] == 2 * 128
    texts, own_texts = (
        {name: columns["texts"] for name, columns in json.loads((path / "per_query.json").read_text()).items()}
        for path in (folder, out / writer_dir.name)
    )
    assert texts == own_texts
    for name in FEW:
        entry = scores["tasks"][name]
        assert entry["disc"] == alone["tasks"][name]["disc"]
        assert entry["invalid"] == own_scores["tasks"][name]["invalid"]
    assert scores["tasks"]["VOC2007"]["invalid"] < 15
    file = tmp_path / "answers.jsonl"
    ev.main(["--root", str(mini), "--tasks", *FEW, "--export", str(file)])
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    given = [{key: row[key] for key in ("text", "images", "video")} for row in rows]
    written = Embedder.from_pretrained(writer_dir).embed(given, max_new_tokens=20).texts
    for row, (text,) in zip(rows, written):
        row["answer"] = text
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    from_file = reason(mini, reader_dir, file, out)
    assert from_file["tasks"] == scores["tasks"] and from_file["encoded"] == {"answers": 0}
    assert from_file["reasoner"] == "answers"


def test_answers_are_embedded_as_embed_does(mini, writer_dir, reader_dir, tmp_path):
    """The cache holds what Embedder.embed(traces=...) returns, samples too. Equal answers are read once."""
    reader = Embedder.from_pretrained(reader_dir)
    items = [{"text": "what", "images": [], "video": []}, {"text": "and", "images": [], "video": []}]
    texts = [["<think>a</think><answer>b<gen_emb>", "<think>a</think><answer>c<gen_emb>"], ["no embedding"] * 2]
    settings = ev.Settings(out=str(tmp_path), workers=0, slots=3)
    cache = EmbeddingCache(reader, reader_dir, settings, "reader")
    got = embed_answers(cache, ["x", "y"], items, texts)
    assert cache.encoded == {"answers": 3} and got["valid"].tolist() == [[True, True], [False, False]]
    for s in range(2):
        want = reader.embed(items, traces=[answers[s] for answers in texts])
        np.testing.assert_allclose(got["disc"], want.disc.numpy(), atol=2e-6)
        np.testing.assert_allclose(got["gen"][:, s], want.gen[:, 0].numpy(), atol=2e-6)
        assert got["tokens"][:, s].tolist() == want.num_tokens[:, 0].tolist()


def test_a_reasoners_samples_are_read(mini, writer_dir, reader_dir, tmp_path):
    """The reasoner writes k answers to each query and the embedder reads them all, on two ranks too. A second run
    embeds nothing."""
    flags = ["--samples", 2]
    one = reason(mini, reader_dir, writer_dir, tmp_path / "one", *flags, tasks=["VOC2007"])
    entry = one["tasks"]["VOC2007"]
    assert set(entry["pass@k"]) == {"1", "2"}
    again = reason(mini, reader_dir, writer_dir, tmp_path / "one", *flags, tasks=["VOC2007"])
    assert again["tasks"] == one["tasks"] and again["encoded"] == {"answers": 0}
    flags += ["--ablate", "trace"]
    run_processes(ev, reason_argv(mini, reader_dir, writer_dir, tmp_path / "two", *flags, tasks=["VOC2007"]))
    two = scores_of(tmp_path / "two", f"reader-reads-{writer_dir.name}")["tasks"]["VOC2007"]
    assert two.pop("ablate")["removed"]["gen"] and two == entry


def test_killed_reading_resumes(mini, writer_dir, reader_dir, tmp_path, monkeypatch):
    """kill -9 while the answers are read: the next start reads only the rest, and the scores are the same."""
    undisturbed = reason(mini, reader_dir, writer_dir, tmp_path / "undisturbed")
    real = Embedder.read_once

    def killed(self, prompts, *sizes):
        for n, result in enumerate(real(self, prompts, *sizes)):
            if n == 40:
                os.kill(os.getpid(), signal.SIGKILL)
            yield result

    argv = reason_argv(mini, reader_dir, writer_dir, tmp_path / "killed", "--save_every", 10)
    with monkeypatch.context() as patch:
        patch.setattr(Embedder, "read_once", killed)
        run_processes(ev, argv, 1, codes=-signal.SIGKILL)
    again = reason(mini, reader_dir, writer_dir, tmp_path / "killed")
    assert 0 < again["encoded"]["answers"] < undisturbed["encoded"]["answers"] - 20
    assert again["tasks"] == undisturbed["tasks"]


@pytest.mark.parametrize("change, message", [
    (lambda rows: rows[:-2], r"no answer for 2 of \d+ inputs.*--export"),
    (lambda rows: [rows[0] | {"answer": None}, *rows[1:]], r"no answer for 1 of \d+ inputs"),
    (lambda rows: [*rows, rows[0] | {"answer": "another <gen_emb>"}], "another answer for the key"),
    (lambda rows: [*rows[:3], rows[3] | {"answer": "<|im_end|>"}, *rows[4:]], "row 3: the text contains the control"),
    (lambda rows: [*rows[:3], rows[3] | {"answer": 7}, *rows[4:]], "row 3: the text must be a string, not int"),
    (lambda rows: [{"key": "x"}, *rows], "row 0: key or answer is missing"),
    (lambda rows: [row | {"answer": "a thing"} for row in rows], r"none of its \d+ answers has a <gen_emb>"),
])  # fmt: skip
def test_a_file_of_answers_that_cannot_be_used(mini, writer_dir, tmp_path, change, message):
    """The error has file, row and remedy, and comes before a model is loaded."""
    file = tmp_path / "answers.jsonl"
    ev.main(["--root", str(mini), "--tasks", "VOC2007", "--export", str(file)])
    rows = [json.loads(line) | {"answer": "a <gen_emb>"} for line in file.read_text().splitlines()]
    file.write_text("\n".join(json.dumps(row) for row in change(rows)))
    with pytest.raises(ValueError, match=message) as error:
        reason(mini, writer_dir, file, tmp_path / "out", tasks=["VOC2007"])
    assert str(file) in str(error.value)


def test_a_file_with_refusals(mini, writer_dir, tmp_path, capsys):
    """An empty answer of an API that refused is counted as an invalid generation. Rows of other tasks are ignored."""
    file = tmp_path / "answers.jsonl"
    ev.main(["--root", str(mini), "--tasks", *FEW, "--export", str(file)])
    answer = {"answer": "<think></think><answer>thing<gen_emb>"}
    rows = [json.loads(line) | answer for line in file.read_text().splitlines()]
    rows[0]["answer"] = ""
    rows.append({"key": "of another task", "answer": "<|im_end|>"})
    file.write_text("\n".join(json.dumps(row) for row in rows))
    scores = reason(mini, writer_dir, file, tmp_path / "out", tasks=["VOC2007"])
    assert scores["tasks"]["VOC2007"]["invalid"] == 1
    assert "answers: 1 of 15 answers have no <gen_emb>" in capsys.readouterr().out


def test_names_of_model_and_reasoner(mini, writer_dir, reader_dir, tmp_path, monkeypatch):
    """--reasoner may be the model itself, spelt another way. A model is called "writer" alone and "a-writer" next to
    "b/writer", and its results are found under both names. Bug stories: a name was cut at its last dot, so
    Qwen2.5-VL-7B replaced the results of -3B. An empty --reasoner became the working directory."""
    spelt = writer_dir.parent / "." / writer_dir.name
    scores = reason(mini, writer_dir, f"{spelt}/", tmp_path, tasks=["VOC2007"])
    assert (scores["model"], scores["reasoner"]) == (writer_dir.name, writer_dir.name)
    for name in ("Q2.5-3B", "Q2.5-7B"):
        shutil.copytree(writer_dir, tmp_path / name)
        ev.main(reason_argv(mini, reader_dir, tmp_path / name, tmp_path / "out", tasks=["VOC2007"]))
        assert (tmp_path / "out" / f"reader-reads-{name}" / "scores.json").exists()
    models = [shutil.copytree(writer_dir, tmp_path / folder / "writer") for folder in "ab"]
    assert run(mini, models[0], tmp_path / "ab", tasks=["VOC2007"])["encoded"]["greedy"] > 0
    ev.main(run_argv(mini, models[0], "--model", *models, "--out", tmp_path / "ab", tasks=["VOC2007"]))
    for name in ("a-writer", "b-writer"):
        assert json.loads((tmp_path / "ab" / name / "scores.json").read_text())["encoded"] == {"greedy": 0}
    monkeypatch.chdir(writer_dir)
    ev.main(run_argv(mini, ".", "--out", tmp_path, "--max_new_tokens", 2, tasks=["VOC2007"]))
    assert (tmp_path / writer_dir.name / "scores.json").exists()


def test_two_processes_export_one_file(mini, tmp_path):
    """Bug story: under torchrun every rank wrote the file, and the second rank failed because it existed."""
    argv = ["--root", mini, "--tasks", "VOC2007", "--export"]
    run_processes(ev, [*argv, tmp_path / "two.jsonl"])
    ev.main([*map(str, argv), str(tmp_path / "one.jsonl")])
    of_two = (tmp_path / "two.jsonl").read_text().replace("two.blank.png", "one.blank.png")
    assert of_two == (tmp_path / "one.jsonl").read_text() and (tmp_path / "two.blank.png").exists()


def test_reasoner_errors(mini, writer_dir, tiny_dir, tmp_path, monkeypatch):
    """Each error has a remedy. Bug story: a plain Qwen2-VL as --reasoner gave scores of 0 silently."""
    file, wrong, out = tmp_path / "answers.jsonl", tmp_path / "answers.json", tmp_path / "out"
    file.write_text("")
    wrong.write_text("[]")
    with pytest.raises(ValueError, match="none of its 15 answers has a <gen_emb>"):
        reason(mini, writer_dir, tiny_dir, tmp_path / "out", "--max_new_tokens", 2, tasks=["VOC2007"])
    monkeypatch.setattr(cache_file, "hash_media", None)  # before all media are read
    export = ["--root", mini, "--tasks", "VOC2007", "--export"]
    for error, message, argv in (
        (FileNotFoundError, "no such file.*--export", reason_argv(mini, writer_dir, tmp_path / "gone.jsonl", out)),
        (FileNotFoundError, "no model folder", reason_argv(mini, writer_dir, tmp_path / "nothing", out)),
        (ValueError, "give --samples 0", reason_argv(mini, writer_dir, file, out, "--samples", 4)),
        (ValueError, "not a file of lines; give NAME.jsonl or a model", reason_argv(mini, writer_dir, wrong, out)),
        (ValueError, "already exists and may hold answers", [*export, file]),
        (ValueError, "NAME.jsonl", [*export, tmp_path / "export.json"]),
    ):
        with pytest.raises(error, match=message):
            ev.main(list(map(str, argv)))


def test_model_in_the_layout_of_the_hub(mini, writer_dir, tmp_path):
    """A folder like UME-R1's, with the flat configuration of older versions and both tokens, has the same scores."""
    hub = Path(shutil.copytree(writer_dir, tmp_path / writer_dir.name))
    config = json.loads((hub / "config.json").read_text())
    text, vision = config.pop("text_config"), config["vision_config"]
    rope = text.pop("rope_parameters")
    flat = {key: value for key, value in text.items() if key not in ("dtype", "model_type", "layer_types")}
    flat["rope_theta"] = rope["rope_theta"]
    flat["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    config |= flat | {"torch_dtype": "float32", "transformers_version": "4.49.0", "model_type": "qwen2_vl"}
    config["vision_config"] = {key: value for key, value in vision.items() if key != "dtype"}
    (hub / "config.json").write_text(json.dumps(config))
    mine = run(mini, writer_dir, tmp_path / "mine", tasks=["VOC2007"])
    theirs = run(mini, hub, tmp_path / "theirs", tasks=["VOC2007"])
    assert theirs["tasks"] == mine["tasks"] and theirs["tasks"]["VOC2007"]["invalid"] < 15


@pytest.mark.slow
def test_all_78_tasks_in_one_command(mini, tmp_path, capsys):
    """All tasks are read, embedded with the toy model, ranked and averaged. Every group and the overall have values."""
    ev.main(["--root", str(mini), "--model", str(ROOT / "assets/toy_base"), "--out", str(tmp_path), "--samples", "2",
             "--max_new_tokens", "8"])  # fmt: skip
    scores = json.loads((tmp_path / "toy_base/scores.json").read_text())
    assert list(scores["tasks"]) == list(ev.MMEB) and scores["overall"]["disc"] > 0
    values = [entry["disc"][entry["main_metric"]] for entry in scores["tasks"].values()]
    assert scores["overall"]["disc"] == pytest.approx(np.mean(values))
    assert "no overall" not in capsys.readouterr().out
    graded = [name for name, entry in scores["tasks"].items() if "published_ndcg" in entry]
    assert graded == ["ViDoRe_esg_reports_human_labeled_v2", "ViDoSeek-doc", "MMLongBench-doc"]


def shards(folder, names, card=""):
    """Write a folder of empty tables, their names divided by "|", whose card has patterns for its test split."""
    folder.mkdir(parents=True)
    for name in names.split("|"):
        (folder / name).write_text("{}")
    if card:
        data_files = json.dumps([{"split": "test", "path": card.split()}])  # JSON is YAML
        (folder / "README.md").write_text(f"---\nconfigs:\n- data_files: {data_files}\n---\n")
    return folder


@pytest.mark.parametrize("names, message", [
    ("test-00000-of-00002.parquet", "1 of 2 files test-.* missing, e.g. test-00001-of-00002.parquet"),
    ("test-00001-of-00002.parquet", "e.g. test-00000-of-00002.parquet"),
    ("test-00000-of-00003.jsonl|test-00002-of-00003.jsonl", "1 of 3 .* test-00001-of-00003.jsonl"),
    ("test-00000-of-00002-0123456789abcdef.parquet", "e.g. test-00001-of-00002.parquet"),
    ("test-00001-of-00003.json|test-00003-of-00003.json", "1 of 3 .* test-00002-of-00003.json"),
    ("test-00000-of-00001.json|test-00000-of-00002.json|test-00001-of-00002.json", "of 00001, 00002.*read twice"),
    ("test-00000-of-00001.json|test-00000-of-00001 (1).json", "read twice"),
    ("test-00000-of-00002.json|test-00001-of-00002.json|test-00005-of-00002.json", "read twice"),
    ("test-00000-of-00001-aaaa.json|test-00000-of-00001-bbbb.json", "several downloads"),
])  # fmt: skip
def test_a_missing_shard_is_named(tmp_path, names, message):
    """Bug story (datasets#6979): with one of two files of a corpus missing, --check said complete, and the score rose
    from 39.0 to 53.3. The name, NAME-number-of-N, says how many there must be. Two downloads have the rows twice."""
    for card in ("", "test-*"):
        folder = shards(tmp_path / f"repo{len(card)}", names, card)
        with pytest.raises((BadInput, MissingFile), match=f"{folder}.*{message}"):
            annotation_files(folder, None, "test")


@pytest.mark.parametrize("names", [
    "test-00000-of-00002.json|test-00001-of-00002.json", "test.json",
    "test-00001-of-00002.json|test-00002-of-00002.json",  # some tools count from 1
    "test-00000-of-00001.json|other_test-00000-of-00001.json",
    "test-00000-of-00002-aa.json|test-00001-of-00002-bb.json"])  # fmt: skip
def test_complete_shards_pass(tmp_path, names):
    """All files are found once, even if a card names one twice. A pattern of the card without a file is an error: the
    other file alone was the table."""
    for name, card in (("repo", ""), ("twice", "*test* *.json")):
        folder = shards(tmp_path / name, names, card)
        assert len(annotation_files(folder, None, "test")) == len(names.split("|"))
    folder = shards(tmp_path / "more", "a.json", "a.json b-*.json")
    with pytest.raises(MissingFile, match=r"no file b-\*.json, which its README.md names"):
        annotation_files(folder, None, "test")
