"""What the third hunt found in the evaluation, the report, images and pairs: missing shards, one rule for blank.jpg,
names of own tasks, invalid answers in the report, transparent and animated images, slow filters, spellings of paths.

    python -m pytest tests/test_faults3.py
"""

import json
import random
import re
import shutil
import struct
import tarfile
import time
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import picture
from PIL import Image, ImageSequence
from test_annotate import run as run_data
from test_report import CHROMIUM, browse, data_of, model_of, task_of

import eval as ev
from data import BadInput, encode_input
from support.annotate import opened, read_pairs, split_answer
from support.cache import input_key
from support.files import read_rows, write_rows
from support.formats import content_key, is_stand_in
from support.images import digest_of_file, open_image
from support.mmeb import annotation_files
from support.program import MissingFile, Skip
from support.reasoner import ablate_trace
from support.report import parts_of_answer, write_report

# ---- 5. shards ---------------------------------------------------------------------------------------------------


def shards(folder, *names, card=""):
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_text("{}")
    if card:
        data_files = json.dumps([{"split": "test", "path": card.split()}])  # JSON is YAML
        (folder / "README.md").write_text(f"---\nconfigs:\n- data_files: {data_files}\n---\n")
    return folder


@pytest.mark.parametrize("names, message", [
    ("test-00000-of-00002.parquet", "1 of 2 files test-.* missing, e.g. test-00001-of-00002.parquet"),
    ("test-00001-of-00002.parquet", "e.g. test-00000-of-00002.parquet"),
    ("test-00000-of-00003.jsonl test-00002-of-00003.jsonl", "1 of 3 .* test-00001-of-00003.jsonl"),
    ("test-00000-of-00002-0123456789abcdef.parquet", "e.g. test-00001-of-00002.parquet"),
    ("test-00001-of-00003.json test-00003-of-00003.json", "1 of 3 .* test-00002-of-00003.json"),
    ("test-00000-of-00001.json test-00000-of-00002.json test-00001-of-00002.json", "of 00001, 00002.*read twice"),
    ("test-00000-of-00001.json|test-00000-of-00001 (1).json", "read twice"),
    ("test-00000-of-00002.json test-00001-of-00002.json test-00005-of-00002.json", "read twice"),
    ("test-00000-of-00001-aaaa.json test-00000-of-00001-bbbb.json", "several downloads"),
])  # fmt: skip
def test_a_missing_shard_is_named(tmp_path, names, message):
    """Bug story (datasets#6979): with one of two files of a corpus missing, --check said complete, and with half of the
    candidates the score rose from 39.0 to 53.3. A file's own name, NAME-number-of-N as `datasets` writes it, says how
    many there must be; the files of two downloads side by side hold rows twice."""
    for card in ("", "test-*"):
        names_of_files = names.split("|") if "|" in names else names.split()
        folder = shards(tmp_path / f"repo{len(card)}", *names_of_files, card=card)
        with pytest.raises((BadInput, MissingFile), match=f"{folder}.*{message}"):
            annotation_files(folder, None, "test")


@pytest.mark.parametrize("names", ["test-00000-of-00002.json test-00001-of-00002.json",
                                   "test-00001-of-00002.json test-00002-of-00002.json",  # some tools count from 1
                                   "test-00000-of-00001.json other_test-00000-of-00001.json", "test.json",
                                   "test-00000-of-00002-aa.json test-00001-of-00002-bb.json"])  # fmt: skip
def test_complete_shards_pass(tmp_path, names):
    """The same number of files comes back as was written."""
    assert len(annotation_files(shards(tmp_path / "repo", *names.split()), None, "test")) == len(names.split())
    twice = shards(tmp_path / "twice", *names.split(), card="*test* *.json")  # a card may name a file twice
    assert len(annotation_files(twice, None, "test")) == len(names.split())


def test_a_pattern_of_the_card_without_a_file(tmp_path):
    """A card names two files and one of them is missing: the other one alone was the table."""
    folder = shards(tmp_path / "repo", "a.json", card="a.json b-*.json")
    with pytest.raises(MissingFile, match=r"no file b-\*.json, which its README.md names"):
        annotation_files(folder, None, "test")


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    with tarfile.open(Path(__file__).parent / "data/mini_mmeb_root.tar.gz") as tar:
        tar.extractall(tmp_path_factory.mktemp("mini"), filter="data")
        return tmp_path_factory.getbasetemp() / "mini0/mini_mmeb_root"


def check(root, *tasks):
    """eval.py --check -> its exit code"""
    with pytest.raises(SystemExit) as stop:
        ev.main(["--check", "--root", str(root), *(["--tasks", *tasks] if tasks else [])])
    return stop.value.code


def test_check_and_run_see_a_missing_shard(mini, tmp_path, capsys):
    """Both stop: the miniature's docvqa corpus has two files, of which one is deleted."""
    root = tmp_path / "root"
    repo = "annotations/vidore/docvqa_test_subsampled_beir"
    shutil.copytree(mini / repo, root / repo)
    shutil.copytree(mini / "visdoc-tasks/ViDoRe_docvqa", root / "visdoc-tasks/ViDoRe_docvqa", symlinks=False)
    assert check(root, "ViDoRe_docvqa") == 0
    (root / repo / "corpus/test-00001-of-00002.parquet").unlink()
    capsys.readouterr()
    assert check(root, "ViDoRe_docvqa") == 1
    printed = capsys.readouterr().out
    assert "1 of 2 files test-* are missing, e.g. test-00001-of-00002.parquet" in printed and "hf download" in printed
    with pytest.raises(MissingFile, match="test-00001-of-00002.parquet"):
        ev.load_task("ViDoRe_docvqa", root)


# ---- 11., 12., 15. own tasks -------------------------------------------------------------------------------------


def write_task(root, name="mine", image="", candidates=("a", "b"), **more):
    pool = {key: {"text": key, "images": [image] if image else []} for key in candidates}
    task = {"modality": "image", "group": "mine", "eval_type": "global", "main_metric": "hit@1",
            "queries": [{"input": {"text": "q"}, "labels": [candidates[0]]}], "candidates": pool} | more  # fmt: skip
    path = root / f"tasks/{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(task))
    return path


def test_a_missing_blank_image_is_one_rule(tiny_dir, tmp_path, capsys):
    """Bug story: the authors' stand-in images/blank.jpg need not exist. --check said complete, and the run said that
    most media files do not exist. A missing one is white in the key too, so that a black file written in its place is
    another input."""
    write_task(tmp_path, image="images/blank.jpg")
    assert check(tmp_path, "mine") == 0
    run = ["--root", str(tmp_path), "--model", str(tiny_dir), "--out", str(tmp_path / "out"), "--tasks", "mine",
           "--samples", "0", "--max_new_tokens", "2", "--workers", "0"]  # fmt: skip
    ev.main(run)
    scores = json.loads((tmp_path / "out" / tiny_dir.name / "scores.json").read_text())
    assert scores["tasks"]["mine"]["unreadable"] == 0 and scores["encoded"] == {"greedy": 3}
    ev.main(run)
    assert "0 of 3 inputs embedded, the others from" in capsys.readouterr().out
    (tmp_path / "images").mkdir()
    Image.new("RGB", (28, 28)).save(tmp_path / "images/blank.jpg")
    ev.main(run)
    assert "2 of 3 inputs embedded" in capsys.readouterr().out


def test_the_key_of_a_missing_blank_image(tmp_path):
    """The model sees the same white image wherever the path points, and the key says so; another missing file still
    counts as its path."""
    paths = [str(tmp_path / name) for name in ("a/blank.jpg", "b/blank.jpg", "a/gone.jpg", "b/gone.jpg")]
    digests = {path: digest_of_file(path) for path in paths}
    first, second, gone, other = (input_key({"text": "", "images": [path], "video": []}, digests) for path in paths)
    assert first == second and len({first, gone, other}) == 3
    assert digest_of_file(str(tmp_path / ("x" * 300) / "blank.jpg")) == ""  # a name that no disk can have


@pytest.mark.parametrize("name", ["GQA", "image", "I-QA"])
def test_own_tasks_may_not_have_a_published_name(tmp_path, name):
    """Bug story: tasks/GQA.json with four queries was written to the leaderboard's files and stood in the table of the
    paper. A group's name would hide the task as soon as there are annotations."""
    write_task(tmp_path, name)
    with pytest.raises(BadInput, match=f"tasks/{name}.json.*published.*Rename"):
        ev.load_task(name, tmp_path)
    assert check(tmp_path, name) == 1


def test_check_says_what_is_wrong_with_own_tasks(tmp_path, capsys):
    """Bug story: --check of an unknown task ended with "missing for nope:" and nothing below it, and without --tasks it
    did not look at tasks/mine.json."""
    write_task(tmp_path)
    assert check(tmp_path) == 0 and "1 of 1 tasks are complete" in capsys.readouterr().out
    write_task(tmp_path, "broken", main_metric="hits")
    assert check(tmp_path) == 1
    printed = capsys.readouterr().out
    assert "main_metric 'hits' is not one of" in printed and "1 of 2 tasks are complete" in printed
    assert check(tmp_path, "nope") == 1
    printed = capsys.readouterr().out
    assert "known tasks: broken, mine" in printed and "missing for" not in printed


def test_groups_without_annotations(tmp_path, capsys):
    """Bug story: --tasks image without annotations said that tasks/image.json does not exist, as if it were a task."""
    write_task(tmp_path)
    with pytest.raises(MissingFile, match="--tasks image: .*annotations has none of its 36 tasks.*--check"):
        ev.main(["--root", str(tmp_path), "--tasks", "image"])
    with pytest.raises(SystemExit, match=r"your own: --tasks mine\."):
        ev.main(["--root", str(tmp_path)])
    assert check(tmp_path, "I-VG") == 1 and "0 of 4 tasks are complete" in capsys.readouterr().out
    (tmp_path / "annotations").mkdir()
    assert check(tmp_path) == 1 and "1 of 79 tasks are complete" in capsys.readouterr().out


# ---- 17. the report ----------------------------------------------------------------------------------------------


def test_the_report_shows_invalid_answers(tmp_path):
    """Bug story: a model with 100 % invalid answers showed zeros and no reason. The share is a row of its own, and each
    row is explained."""
    tasks = [task_of("t")]
    model = model_of(tasks, answer="rambling")
    row = {"disc": 0.5, "gen": 0.0, "oracle": 0.5, "pass@1": 0.0, "pass@2": 0.0, "invalid": 1.0, "tokens": 9.0}
    model |= {"rows": {"t": row}, "means": {"mean": row}}
    write_report(tmp_path / "report.html", tasks, {"m": model}, open_image)
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


# ---- 20. images --------------------------------------------------------------------------------------------------


def png(path, bits, colour_type, samples, transparent):
    """Writes a PNG of two equal rows by its specification (chunks IHDR, tRNS, IDAT, IEND)."""
    width = len(samples)
    flat = np.array(samples).ravel()
    row = b"".join(int(x).to_bytes(2, "big") for x in flat) if bits == 16 else None
    if row is None:
        text = "".join(format(x, f"0{bits}b") for x in flat)
        row = int(text, 2).to_bytes(len(text) // 8, "big")
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, 2, bits, colour_type, 0, 0, 0)),
              (b"tRNS", b"".join(struct.pack(">H", x) for x in np.atleast_1d(transparent))),
              (b"IDAT", zlib.compress((b"\0" + row) * 2)), (b"IEND", b"")]  # fmt: skip
    parts = [struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
             for kind, data in chunks]  # fmt: skip
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return path


@pytest.mark.parametrize("bits, samples, transparent, want", [
    (1, [0, 0, 0, 0, 1, 1, 1, 1], 0, [255] * 8),
    (2, [0, 1, 2, 3], 1, [0, 255, 170, 255]),
    (4, [5, 6], 5, [255, 102]),
    (8, [5, 6], 5, [255, 6]),
    (16, [1000, 1001, 30000, 65535], 1000, [255, 4, 117, 255]),
    (16, [[0x1234, 0x2345, 0x3456], [0x3434, 0x4545, 0x5656]], [0x1234, 0x2345, 0x3456],
     [[255] * 3, [0x34, 0x45, 0x56]]),
])  # fmt: skip
def test_a_transparent_colour_of_any_depth_is_white(tmp_path, bits, samples, transparent, want):
    """Bug story: grey of 16 bits lost its transparency (4 in place of 255, white), and so did grey of 2 and 4 bits.
    With colours of 16 bits another colour was transparent. By the PNG specification tRNS has the file's depth."""
    path = png(tmp_path / "x.png", bits, 2 if np.ndim(samples[0]) else 0, samples, transparent)
    got = np.asarray(open_image(path))[0]
    assert got.tolist() == (np.array(want) if np.ndim(want[0]) else np.array(want)[:, None].repeat(3, 1)).tolist()


@pytest.mark.parametrize("ending", ["gif", "webp", "png", "tiff"])
def test_an_animated_file_is_no_frame(embedder, tmp_path, ending):
    """Bug story: an animated WebP, PNG or TIFF among the frames of a video gave its first frame without a word. As a
    frame it is a Skip; as an image it shows its first frame, which is what Pillow's open() shows."""
    pictures = [Image.new("RGB", (60, 60), colour) for colour in ("red", "green", "blue")]
    path = tmp_path / f"clip.{ending}"
    more = {"lossless": True} if ending == "webp" else {}
    pictures[0].save(path, save_all=True, append_images=pictures[1:], **more)
    animated = Image.open(path)
    with pytest.raises(Skip, match=rf"clip.{ending}: holds 3 images, but one frame of a video must be one"):
        encode_input(embedder.tokenizer, {"video": [picture(0), animated]})
    with pytest.raises(Skip, match="holds 3 images"):
        opened({"text": "", "images": [], "video": [str(path)]}, None)
    with Image.open(path) as first:
        assert np.array_equal(np.asarray(open_image(path)), np.asarray(first.convert("RGB")))
    copies = [frame.copy() for frame in ImageSequence.Iterator(Image.open(path))]
    assert len(encode_input(embedder.tokenizer, {"video": copies}).grids) == 1


def test_check_sees_an_animated_frame(tmp_path, capsys):
    """--check reads a file as the run does: as a frame where it is one."""
    pictures = [Image.new("RGB", (60, 60), colour) for colour in ("red", "green")]
    pictures[0].save(tmp_path / "clip.png", save_all=True, append_images=pictures[1:])
    query = {"input": {"video": ["clip.png", "clip.png"]}, "labels": ["a"]}
    write_task(tmp_path, "moving", queries=[query])
    write_task(tmp_path, "still", image="clip.png")
    assert check(tmp_path, "still") == 0
    assert check(tmp_path, "moving") == 1 and "holds 2 images" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["video", "images"])
def test_one_object_as_all_frames(embedder, tmp_path, kind):
    """Bug story: ImageSequence.Iterator yields one object again and again, so that a list of it holds one frame many
    times. A still image that is repeated on purpose is allowed."""
    pictures = [Image.new("RGB", (60, 60), colour) for colour in ("red", "green", "blue")]
    pictures[0].save(tmp_path / "clip.gif", save_all=True, append_images=pictures[1:])
    frames = list(ImageSequence.Iterator(Image.open(tmp_path / "clip.gif")))
    with pytest.raises(BadInput, match=rf"{kind} is one object 3 times.*frame.copy\(\)"):
        encode_input(embedder.tokenizer, {kind: frames})
    encode_input(embedder.tokenizer, {kind: [pictures[0]] * 3})


# ---- 21. filters in linear time ----------------------------------------------------------------------------------


def split_answer_before(text):
    text = re.sub(r"<\|(begin|end)_of_box\|>", "", text).strip()
    form = r"(?:<think>)?(.*?)</think>\s*(?:<answer>)?(.*?)(?:<gen_emb>|</answer>|\s)*"
    match = re.fullmatch(form, text, re.DOTALL)
    if not match or not match[1].strip():
        return None
    return tuple(part.strip("\n") for part in match.groups())


def parts_of_answer_before(text):
    parts = re.fullmatch(r"\s*<think>(.*?)</think>\s*<answer>(.*?)(<gen_emb>)?(</answer>)?\s*", text, re.DOTALL)
    return {"reasoning": parts[1].strip(), "summary": parts[2].strip()} if parts else {"text": text}


def ablate_trace_before(texts):
    parts = [re.fullmatch(r"(.*?<think>)(.*?)(</think>.*)", text, re.DOTALL) for text in texts]
    reasonings = [part[2] for part in parts if part]
    ablated = {"removed": [], "swapped": []}
    following = 0
    for text, part in zip(texts, parts):
        if not part:
            ablated["removed"].append(text)
            ablated["swapped"].append(text)
            continue
        following += 1
        others = (x for x in reasonings[following:] + reasonings[:following] if x != part[2])
        ablated["removed"].append(part[1] + part[3])
        ablated["swapped"].append(part[1] + next(others, part[2]) + part[3])
    return ablated


PIECES = ("<think>", "</think>", "<answer>", "</answer>", "<gen_emb>", "<|begin_of_box|>", " ", "\n", "\t", "\x1c",
          "\u2003", "a", "b", "<", ">")  # fmt: skip


def test_the_filters_give_what_they_gave():
    """The expressions from before are the source: equal results on 60,000 strings made of their parts."""
    rng = random.Random(0)
    found = 0
    for _ in range(60_000):
        text = "".join(rng.choices(PIECES, k=rng.randrange(10)))
        if rng.random() < 0.5:
            text = f"<think>{text}</think>{rng.choice(PIECES)}<answer>{''.join(rng.choices(PIECES, k=5))}"
        assert split_answer(text) == split_answer_before(text), text
        assert parts_of_answer(text) == parts_of_answer_before(text), text
        found += split_answer(text) is not None
    assert found > 10_000
    for _ in range(5_000):
        texts = ["".join(rng.choices(PIECES[:2] + ("a", "b"), k=rng.randrange(6))) for _ in range(rng.randrange(7))]
        assert ablate_trace(texts) == ablate_trace_before(texts), texts


@pytest.mark.parametrize("text", ["<think>a</think><answer>b{}c", "<think>a</think>{}c", "{}c", "<think>{}",
                                  "a{}</think>b"])  # fmt: skip
@pytest.mark.parametrize("run", ["\n", "<think>", "<gen_emb>", "</think>", "</think>\n<think>"])
def test_the_filters_take_linear_time(text, run):
    """Bug story: an answer with 32,000 newlines held the filter for 61 seconds. Ten times as many take less than 1."""
    text = text.format(run * 320_000)
    for function in (split_answer, parts_of_answer, lambda text: ablate_trace([text])):
        began = time.perf_counter()
        function(text)
        assert time.perf_counter() - began < 1


def test_swapped_reasonings_take_linear_time():
    """The same with the number of inputs: of 200,000 answers each looked through all others if they are equal."""
    began = time.perf_counter()
    got = ablate_trace(["<think>a</think>"] * 200_000 + ["<think>b</think>"])
    assert time.perf_counter() - began < 3
    assert got["swapped"][:2] == ["<think>b</think>"] * 2 and got["swapped"][-1] == "<think>a</think>"


# ---- 22. spellings of paths --------------------------------------------------------------------------------------


def pair(path, text="what", target="images/blank.jpg"):
    return {"dataset_name": "d", "qry": {"text": text, "images": [path]},
            "pos": {"text": f"thing {text}", "images": [target] if target else []}}  # fmt: skip


@pytest.mark.parametrize("sft, pairs", [
    (pair("images/{}.png"), pair("./images/{}.png")), (pair("images/{}.png"), pair("images//{}.png")),
    (pair("images/{}.png"), pair("images/../images/{}.png")),
    (pair("images/{}.png"), pair("images/{}.png", target="MMEB-train/images/blank.jpg")),
    (pair("images/{}.png"), pair("images/{}.png", target="./blank.jpg")),
    (pair("images/{}.png"), pair("images/{}.png", target="")),
])  # fmt: skip
def test_the_rl_subset_knows_a_path_in_any_spelling(tmp_path, sft, pairs):
    """Bug story: with ./ before the paths, or another folder before images/blank.jpg, 50 of 50 pairs of the SFT file
    were drawn again for RL. The five pairs that are not in it are left."""
    for name, form, numbers in (("sft", sft, range(20)), ("pairs", pairs, range(25))):
        rows = [json.loads(json.dumps(form).replace("{}", str(i))) for i in numbers]
        write_rows(tmp_path / f"{name}.json", rows)
    assert run_data("rl-subset", "--pairs", tmp_path / "pairs.json", "--sft", tmp_path / "sft.json", "--out",
                    tmp_path / "rl.json", "--size", 100) == 0  # fmt: skip
    drawn = read_rows(tmp_path / "rl.json")
    assert sorted(re.search(r"(\d+)\.png", row["qry_image"])[1] for row in drawn) == [str(i) for i in range(20, 25)]
    assert all(row["pos_image"] == "" for row in drawn)


def test_content_and_stand_ins():
    """Equal targets are no negatives of each other, in any spelling of the path; another image of the name blank.jpg,
    in a folder that is not images/, is an image."""
    key = content_key("a", ["x/b.png"], ["f/0.png"])
    assert key == content_key("a ", ["./x/b.png", "images/blank.jpg"], ["f//0.png"])
    assert key != content_key("a", ["b.png"], ["f/0.png"]) != content_key("a", ["x/b.png"], ["0.png"])
    given = ("blank.jpg", "./blank.jpg", "images/blank.jpg", "/data/MMEB-train/images/blank.jpg")
    assert all(map(is_stand_in, given))
    assert not any(map(is_stand_in, ("photos/blank.jpg", "images/blank.jpg/a.png", "images/blank.png", "")))


def test_an_image_called_blank_stays(tmp_path):
    """Only the authors' own path is taken out of a pair."""
    write_rows(tmp_path / "p.json", [pair("photos/blank.jpg")])
    (got,) = read_pairs([tmp_path / "p.json"])
    assert got["qry"]["images"] == ["photos/blank.jpg"] and got["pos"]["images"] == []


# ---- 24. words ---------------------------------------------------------------------------------------------------


def test_messages_name_no_flag_that_does_not_exist(tmp_path):
    """Bug story: embed and eval.py asked about --media_root, which they do not have, and annotate and check about
    --data."""
    with pytest.raises(Skip, match=r"gone.png: no such file$"):
        open_image(tmp_path / "gone.png")
    with pytest.raises(Skip, match=r"gone.png: no such file \(is --media_root right\?\)"):
        open_image("gone.png", tmp_path)
    with pytest.raises(MissingFile, match=f"gone.json: no such file. Relative paths start from {Path.cwd()}$"):
        read_rows("gone.json")


@pytest.mark.parametrize("on_disk, written", [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_in_two_unicode_forms(tmp_path, on_disk, written):
    """Bug story: é in one character (Linux) and in two (a Mac) look equal, and "no such file" was all that was said."""
    name = "caf\u00e9.png"
    picture(0).save(tmp_path / unicodedata.normalize(on_disk, name))
    with pytest.raises(Skip, match=f"no such file; a file with the same visible name.* Unicode form {on_disk}. Write"):
        open_image(unicodedata.normalize(written, name), tmp_path)
