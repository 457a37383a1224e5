"""What strangers' bug reports found: a test with its story for each kind of silent wrong number, hang and loss.

    python -m pytest tests/test_faults.py
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ANSWERS, ROOT, inputs, picture, read_log, run_here, run_processes, turn_pair
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from test_rl import flags as rl_flags
from test_scale import act_at, die, terminate
from test_sft import flags, same_weights, weights

import data as data_file
import eval as ev
import rl
import sft
import support.checkpoint as checkpoint_file
import support.loop as loop_file
import support.program as program_file
import support.settings as settings_file
from data import encode_input, patchify
from model import Embedder, Prompt
from support.annotate import read_pairs
from support.check import export_checkpoint
from support.checkpoint import list_checkpoints
from support.files import index_rows, read_rows
from support.formats import DISC, INSTRUCTION, RowCheck
from support.images import open_image
from support.program import BadInput, Skip

# ---- 1. a process that has failed ends ---------------------------------------------------------------------------


def start(stage, argv, patch="", processes=1, script=True, until=60, **more):
    """The stage as processes of their own, with the lines of `patch` run first -> (exit codes, output, seconds).

    script False: only main(), as in somebody's own program. One that does not end until `until` fails the test.
    """
    code = f"import sys, os, signal, time\nsys.argv = ['{stage}.py', *sys.argv[1:]]\nimport {stage} as s\n{patch}\n"
    code += "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # these tests may themselves run under nohup
    code += "from support.program import run_script\nrun_script(s.main)" if script else "s.main()"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more.pop("env", {})}
    if processes > 1:
        port = str(20_000 + os.getpid() % 20_000)
        env |= {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    began = time.time()
    children = []
    for rank in range(processes):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        children.append(subprocess.Popen([sys.executable, "-c", code, *map(str, argv)], env=env | own, text=True,
                                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **more))  # fmt: skip
    output = "".join(child.communicate(timeout=until)[0] for child in children)
    return [child.returncode for child in children], output, time.time() - began


RAISE = """
calls, real = [], s.{0}
def failing(*given, **more):
    calls.append(1)
    if len(calls) == 3 and os.environ.get("RANK", "{1}") == "{1}":
        {2}
    return real(*given, **more)
s.{0} = failing
"""
WORKER = """
from data import PairData
PairData.__getitem__ = lambda self, i: 1 / 0
"""
EVAL_WORKER = """
def failing(*given, **more):
    raise RuntimeError("boom")
import support.cache
support.cache.encode_input = failing
"""
EVAL_INTERRUPT = """
import support.cache
real = support.cache.embed_inputs
def once(*given):
    yield from real(*given)
    os.kill(os.getpid(), signal.SIGINT)
support.cache.embed_inputs = once
"""


@pytest.mark.parametrize("stage, patch, more, code, told, saved", [
    ("sft", RAISE.format("sft_step", 0, "1 / 0"), dict(workers=1), [1], "ZeroDivisionError", 2),
    pytest.param("sft", RAISE.format("sft_step", 0, "1 / 0"), dict(workers=1, script=False), [1], "ZeroDivisionError",
                 2, marks=pytest.mark.slow),
    pytest.param("sft", WORKER, dict(workers=1), [1], "ZeroDivisionError", None, marks=pytest.mark.slow),
    pytest.param("sft", RAISE.format("sft_step", 1, "1 / 0"), dict(workers=1, processes=2), [1, 1],
                 "another rank of this run has ended", 2, marks=pytest.mark.slow),
    pytest.param("sft", RAISE.format("sft_step", 0, "os.kill(os.getpid(), signal.SIGINT)"), dict(workers=1), [130],
                 "SIGINT", 2, marks=pytest.mark.slow),
    pytest.param("sft", RAISE.format("sft_step", 0, "os.kill(os.getpid(), signal.SIGHUP)"), dict(workers=1), [129],
                 "SIGHUP", 2, marks=pytest.mark.slow),
    pytest.param("sft", RAISE.format("sft_step", 0, "os.kill(os.getpid(), signal.SIGUSR1)"), dict(workers=1), [138],
                 "SIGUSR1", 2, marks=pytest.mark.slow),
    pytest.param("rl", RAISE.format("rewards_of", 0, "1 / 0"), dict(workers=1), [1], "ZeroDivisionError", 2,
                 marks=pytest.mark.slow),
    pytest.param("rl", RAISE.format("rewards_of", 1, "1 / 0"), dict(workers=1, processes=2), [1, 1],
                 "another rank of this run has ended", 2, marks=pytest.mark.slow),
])  # fmt: skip
def test_a_failed_run_ends_and_saves(tiny_dir, writer_dir, world, tmp_path, stage, patch, more, code, told, saved):
    """Bug story: the loader's workers ignore SIGTERM, multiprocessing's exit handler sends it and waits for them: any
    error while a worker lived kept the process, and its GPU, for ever. The last complete step was lost, too."""
    given = {name: more.pop(name) for name in ("processes", "script") if name in more}
    given_flags, model = (flags, tiny_dir) if stage == "sft" else (rl_flags, writer_dir)
    argv = given_flags(model, world, tmp_path / "out", steps=5, save_every=50, **more)
    got, output, seconds = start(stage, argv, patch, **given)
    assert got == code and told in output and seconds < 40, output
    assert [n for n, _ in list_checkpoints(tmp_path / "out")] == ([saved] if saved else [])
    assert not pids(tmp_path / "out"), "a process lives on"


@pytest.mark.slow
@pytest.mark.parametrize("signalled", [False, True])
def test_a_failed_evaluation_ends(tiny_dir, tmp_path, signalled):
    """The same for eval.py: an error in a background worker, and Ctrl-C."""
    write_local_task(tmp_path)
    argv = ["--model", tiny_dir, "--root", tmp_path, "--out", tmp_path / "out", "--workers", 1, "--max_new_tokens", 8]
    codes, output, seconds = start("eval", argv, EVAL_INTERRUPT if signalled else EVAL_WORKER)
    assert codes == [130 if signalled else 1] and seconds < 40
    assert ("interrupted" if signalled else "boom") in output


@pytest.mark.slow
def test_a_dead_worker_ends_the_run_with_a_sentence(tiny_dir, world, tmp_path):
    """A worker that the kernel has killed for memory: one sentence with the cure, the last complete step saved."""
    kill = "import multiprocessing; os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)"
    argv = flags(tiny_dir, world, tmp_path, steps=5, save_every=50, workers=1)
    codes, output, _ = start("sft", argv, RAISE.format("sft_step", 0, kill))
    assert codes == [1] and "fewer --workers" in output and "Traceback" not in output, output
    assert [n for n, _ in list_checkpoints(tmp_path)] in ([2], [3])  # the loader may hear of it a step later


def pids(marker):
    found = subprocess.run(["pgrep", "-f", str(marker)], capture_output=True, text=True).stdout.split()
    return [int(pid) for pid in found]


# ---- 2. a dead model does not score ------------------------------------------------------------------------------


def write_local_task(root, right_first=True):
    """A local task whose lists begin with the right candidate, as published ones do."""
    words = ["red", "blue", "green", "white"]
    queries = [{"input": {"text": f"find {w}"}, "labels": [w],
                "candidates": [w, *(x for x in words if x != w)]} for w in words]  # fmt: skip
    task = {"modality": "image", "group": "I-CLS", "eval_type": "local", "main_metric": "hit@1", "queries": queries,
            "candidates": {w: {"text": w} for w in words}}  # fmt: skip
    (root / "tasks/test").mkdir(parents=True)
    (root / "tasks/test/local.json").write_text(json.dumps(task))


def broken_model(source, path, value):
    """The model with its last norm filled with a number: NaN, or 0 for embeddings that are all equal."""
    model = Embedder.from_pretrained(source)
    with torch.no_grad():
        model.backbone.model.language_model.norm.weight.fill_(value)
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_a_dead_model_does_not_score(tiny_dir, tmp_path, capsys, value):
    """Bug story: NaN compares as neither better nor worse, so a model of NaN weights kept the lists' order, in which
    the right candidate stands first: hit@1 of 100.0. Now NaN is a miss, counted; equal embeddings keep the documented
    order of ties, and the table says for how many queries."""
    write_local_task(tmp_path)
    model = broken_model(tiny_dir, tmp_path / "dead", value)
    ev.main(["--model", str(model), "--root", str(tmp_path), "--out", str(tmp_path / "out"), "--workers", "0",
             "--max_new_tokens", "4", "--samples", "2"])  # fmt: skip
    settings_file.HELD.clear()
    entry = json.loads((tmp_path / "out/dead/scores.json").read_text())["tasks"]["test/local"]
    printed = capsys.readouterr().out
    if value == 0:
        assert entry["disc"]["hit@1"] == 1.0 and entry["tied"]["disc"] == 4 and entry["not_finite"] == 0
        assert "candidates tie for the first rank, so the order of the list decides, for 4 in disc" in printed
    else:
        assert entry["not_finite"] == 8 and "8 of 8 inputs have an embedding that is not finite" in printed
        assert all(entry[mode][metric] == 0 for mode in ev.MODES for metric in ev.METRICS)
        assert set(entry["pass@k"].values()) == {0.0}


def test_one_embedding_that_is_not_finite_is_a_miss():
    """The right values from an independent source, by hand: query 0 is NaN, candidate 1 is infinite, the rest rank as
    without them, in every mode."""
    c = np.eye(3)
    q = np.array([[1, 0, 0.1], [0, 1, 0.5], [0, 0.1, 1]])
    q[0], c[1] = np.nan, [0, np.inf, 0]
    ok = np.ones(3, bool)
    assert ev.rank_candidates(q, c, ok, ok) == [[], [2, 0], [2, 0]]
    assert ev.rank_candidates(q, c, ok, ok, [np.array([0, 1, 2])] * 3, depth=1) == [[], [2], [2]]


def test_ties_for_the_first_place_are_counted():
    """Bug story: a dead vision tower makes the pictures equal, and one text more in the list hid it: hit@1 100.0. A
    right and a wrong one that share the best score, or candidates that all tie, count; two right ones, or ties below
    the first place, do not."""
    same, best, low = [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]
    keys, c = ["right", "wrong", "also right", "low"], np.array([same, best, same, low])
    task = ev.Task("t", "image", "g", "local", "hit@1", [
        {"input": {}, "labels": ["right"], "grades": None, "candidates": ["right", "wrong", "low"]},
        {"input": {}, "labels": ["right", "also right"], "grades": None, "candidates": ["right", "also right", "low"]},
        {"input": {}, "labels": ["low"], "grades": None, "candidates": ["right", "wrong"]},
        {"input": {}, "labels": ["low"], "grades": None, "candidates": ["low", "right", "wrong"]},
    ], dict.fromkeys(keys, {}))  # fmt: skip

    def arrays(x):
        return {"disc": x, "gen": x[:, None], "valid": np.ones((len(x), 1), bool), "problem": np.array([""] * len(x))}

    entry, *_ = ev.score_task(task, arrays(np.array([best, best, best, low])), arrays(c))
    assert entry["tied"]["disc"] == 2


@pytest.mark.parametrize("mode", ["both", "disc", "gen", "traces"])
def test_embed_never_returns_nan(writer_dir, tmp_path, mode):
    """A NaN that reaches an index is found by every query or by none: zeros, not valid, a warning with the number."""
    model = Embedder.from_pretrained(broken_model(writer_dir, tmp_path / "dead", float("nan")))
    more = dict(traces=ANSWERS) if mode == "traces" else dict(mode=mode)
    with pytest.warns(UserWarning, match="2 of 2 inputs have an embedding that is not finite"):
        out = model.embed(["a", "b"], max_new_tokens=4, **more)
    for x in (out.disc, out.gen):
        assert x is None or not x.any()
    assert set(out.skipped) == {0, 1} and "not finite" in out.skipped[0] and (out.valid is None or not out.valid.any())


# ---- 3. nothing that a user wrote is dropped ---------------------------------------------------------------------

TAIL = f"\n{DISC}\n{INSTRUCTION}"


def sft_row(human="<image>\nwhat", turns=None, roles=("human", "gpt"), row=None, **side):
    turns = turns or [{"from": roles[0], "value": human + TAIL}, {"from": roles[1], "value": ANSWERS[0]}]
    pos = {"conversations": [{"from": "human", "value": f"a{TAIL}"}, {"from": "gpt", "value": ANSWERS[1]}]}
    return {"dataset_name": "d", "qry": {"conversations": turns, **side}, "pos": pos} | (row or {})


RL_ROW = {f"{s}_{k}": v for s in ("qry", "pos") for k, v in (("text", "t"), ("image", ""), ("video", [""]))}
THREE = [{"from": who, "value": x} for who, x in (("human", "a" + TAIL), ("gpt", ANSWERS[0]), ("human", "more"))]


@pytest.mark.parametrize("kind, row, message", [
    ("sft", sft_row(images=["a.png"]), "qry: unknown key 'images'.*image, video, conversations"),
    ("sft", sft_row(row={"weight": 2}), "unknown key 'weight'.*dataset_name"),
    ("sft", sft_row(), "1 <image> and 0 <video> marks for 0 images"),
    ("sft", sft_row("the <video> element"), "0 <image> and 1 <video> marks for 0 images and 0 videos"),
    ("sft", sft_row("a", turns=THREE), "found 3 turns"),
    ("sft", sft_row("a", roles=("gpt", "human")), "a turn of 'gpt', but this turn must be of human or user"),
    ("sft", sft_row("a", roles=("system", "gpt")), "a turn of 'system'"),
    ("sft", sft_row(image=[["a.png"]]), "flat list of paths, but it holds list"),
    ("sft", sft_row(image={"path": "a.png"}), "not dict"),
    ("sft", sft_row("<video>\nwhat", video="clip.mp4"), "clip.mp4 is a video file.*ffmpeg -i clip.mp4"),
    ("sft", sft_row("<video>\nwhat", video=["clip.gif"]), "clip.gif is a video file.*ffmpeg"),
    ("sft", sft_row(image="https://a.org/b.png"), "is a web address. Download it"),
    ("sft", sft_row("half \ud800 pair", image=""), "half a surrogate pair"),
    ("rl", RL_ROW | {"qry_images": ["a.png"]}, "unknown key 'qry_images'.*qry_image"),
    ("rl", RL_ROW | {"qry_text": 3}, "the text must be a string, not int"),
    ("rl", RL_ROW | {"qry_video": ["clip.MP4"]}, "clip.MP4 is a video file"),
    ("rl", RL_ROW | {"pos_image": 7}, "must be a path or a list of paths, not int"),
])  # fmt: skip
def test_what_would_be_lost_is_refused(tmp_path, tiny_dir, capsys, kind, row, message):
    """Bug story: `images` in an SFT side trained to the end with a literal <image> and no picture, and check exited 0.
    Everything that a row says is used, or the row is refused with file, row and what is allowed: by the start of a run
    and by check."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(BadInput, match=f"(?s)rows.jsonl, row 0.*{message}"):
        index_rows(path, RowCheck(kind))
    assert check(path) == 1 and re.search(message, capsys.readouterr().out)


def check(path, *more):
    old, sys.argv = sys.argv, ["data.py", "check", str(path), "--workers", "0", *map(str, more)]
    try:
        data_file.main()
    except SystemExit as end:
        return end.code
    finally:
        sys.argv = old


def test_what_published_files_hold_is_allowed(tmp_path):
    """The keys and forms of the authors' files pass."""
    sft_rows = [sft_row("<image>\na", image="images/blank.jpg", num_tokens=7, row={"num_tokens": 9}),
                sft_row("<video>\na", video=["0.jpg", "1.jpg"]), sft_row("a", image="", video=[""]),
                sft_row("a", turns=turn_pair("a" + TAIL, ANSWERS[0], 1))]  # fmt: skip
    rl_rows = [RL_ROW | {"dataset": "d", "dataset_name": "d", "solution": "<embedding>", "qry_text": None}]
    for kind, rows in (("sft", sft_rows), ("rl", rl_rows)):
        path = tmp_path / f"{kind}.json"
        path.write_text(json.dumps(rows))
        assert len(index_rows(path, RowCheck(kind))["spans"]) == len(rows)


@pytest.mark.parametrize("text, images, video, want", [
    ("What does <video> do in HTML?", 0, 0, "What does <video> do in HTML?"),
    ("<image>\nWhat does the <image> tag of SVG do?", 1, 0, "What does the <image> tag of SVG do?"),
    ("<image><image>\nboth", 2, 0, "both"),
    ("first\n<image>\nthen", 1, 0, "first\n\nthen"),
    ("<video>\nIs <video> better than <image>?", 0, 1, "Is <video> better than <image>?"),
    ("<image> and no picture", 0, 0, "<image> and no picture"),
])  # fmt: skip
def test_marks_are_told_from_text(tiny_dir, text, images, video, want):
    """Bug story: every <image> and <video> was deleted from RL and evaluation texts; questions about HTML lost their
    word. A mark stands at the start or alone on a line, for a picture that is there."""
    tokenizer = Embedder.from_pretrained(tiny_dir).tokenizer
    item = {"text": text, "images": [picture(0)] * images, "video": [picture(1)] * 2 * video}
    row = encode_input(tokenizer, item)
    said = tokenizer.decode(row.ids).split("<|vision_end|>")[-1].split(f"\n{DISC}")[0]
    assert said == want and len(row.grids) == max(1, images + video)


def test_unknown_keys_of_tasks_pairs_and_inputs(tmp_path, embedder):
    """`image` in an input, `images` beside an input of a query, a misspelt key of a pair: all would be lost."""
    for pair in ({"qry": {"text": "a", "image": "a.png"}, "pos": {"text": "b"}},
                 {"qry": {"text": "a"}, "pos": {"text": "b"}, "image": "a.png"}):  # fmt: skip
        (tmp_path / "pairs.jsonl").write_text(json.dumps(pair))
        with pytest.raises(BadInput, match="pairs.jsonl, row 0.*unknown key 'image'"):
            read_pairs([tmp_path / "pairs.jsonl"])
    with pytest.raises(BadInput, match="unknown key 'image'.*text, images, video"):
        embedder.embed([{"image": "a.png"}])


# ---- 4. and 5. pictures ------------------------------------------------------------------------------------------


class Failing(Image.Image):
    """A picture whose decoder raises what it is told to."""

    def load(self):
        raise self.error


class Panic(BaseException):
    """As decoders in Rust raise."""


@pytest.mark.parametrize("error", [RuntimeError("a"), NotImplementedError("b"), AttributeError("c"), KeyError("d"),
                                   Panic("e"), AssertionError(), ZeroDivisionError("f")])  # fmt: skip
def test_whatever_a_decoder_raises_is_a_skip(error):
    """Bug story: one byte changed in an AVIF gave a RuntimeError, which ended embed, eval --check and every start of a
    training run at this row."""
    broken = Failing()
    broken._mode, broken._size, broken.error, broken.filename = "RGB", (30, 30), error, "x.avif"
    with pytest.raises(Skip, match="x.avif: cannot be read as an image"):
        open_image(broken)
    for passes in (MemoryError, KeyboardInterrupt, SystemExit):
        broken.error = passes()
        with pytest.raises(passes):
            open_image(broken)


@pytest.mark.parametrize("kind", ["AVIF", "JPEG2000", "WEBP", "TIFF", "ICO", "PPM", "SGI", "TGA", "PCX", "DDS"])
def test_changed_bytes_in_many_formats(tmp_path, kind):
    """Real decoders, bytes changed anywhere: each file opens or is a Skip that names it."""
    path, rng = tmp_path / "x.img", np.random.default_rng(0)
    try:
        picture(0, 48, 48).save(path, kind)
    except (OSError, KeyError):
        pytest.skip(f"this Pillow cannot write {kind}")
    whole = path.read_bytes()
    for _ in range(40):
        content = bytearray(whole)
        content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        path.write_bytes(content)
        try:
            patchify([open_image(path)], min_pixels=784, max_pixels=10_000)
        except Skip as skip:
            assert "x.img" in str(skip)


@pytest.mark.parametrize("what", ["empty", "La", "RGBa", "pipe", "thin"])
def test_odd_pictures(tmp_path, what):
    """A picture of 0 pixels and a pipe are skips with the file's name; premultiplied colours are shown right."""
    if what in ("La", "RGBa"):
        alpha = picture(1, 40, 40, "L")
        straight = picture(0, 40, 40, "L" if what == "La" else "RGB")
        straight.putalpha(alpha)
        got = np.asarray(open_image(straight.convert(what))).astype(int)
        assert np.abs(got - np.asarray(open_image(straight))).max() <= 1  # premultiplied values are rounded
        return
    path = tmp_path / "odd.png"
    if what == "pipe":
        os.mkfifo(path)
    else:
        Image.new("RGB", (2010, 10)).save(path)
    source = Image.new("RGB", (0, 5)) if what == "empty" else path
    with pytest.raises(Skip, match="empty" if what == "empty" else f"{path}"):
        open_image(source)


@pytest.mark.parametrize("mode, ending", [("I;16", "png"), ("I;16", "tiff"), ("I;16B", "tiff"), ("I", "pgm"),
                                          ("I", "tiff"), ("F", "tiff")])  # fmt: skip
def test_sixteen_bits_keep_their_content(tmp_path, mode, ending):
    """Bug story (Pillow#2574): convert() cuts 16-bit grey off at 255, so that a scan is white and its negative too. A
    ramp is the same ramp in 8 bits, and its inverse the inverse; where the range is unknown the picture is a Skip."""
    ramp = np.linspace(0, 65535, 64).round().astype(np.uint16)[None].repeat(32, 0)
    eight = np.linspace(0, 255, 64).round().astype(int)
    for values, want in ((ramp, eight), (65535 - ramp, 255 - eight)):
        if mode == "F":
            image = Image.fromarray(values.astype(np.float32) / 65535)
        elif ending == "tiff" and mode == "I":
            image = Image.fromarray(values.astype(np.int32))
        else:
            image = Image.frombytes("I;16B", (64, 32), values.astype(">u2").tobytes()) if mode == "I;16B" else (
                Image.fromarray(values))  # fmt: skip
        path = tmp_path / f"ramp.{ending}"
        if ending == "pgm":
            path.write_bytes(b"P5 64 32 65535\n" + values.astype(">u2").tobytes())
        else:
            image.save(path)
        if ending == "tiff" and mode in "IF":
            with pytest.raises(Skip, match="ramp.tiff.*no known range"):
                open_image(path)
            continue
        assert Image.open(path).mode.startswith("I")
        got = np.asarray(open_image(path)).astype(int)
        assert np.abs(got - want[None, :, None]).max() <= 1


@pytest.mark.parametrize("bits, white_is_zero", [(12, False), (16, True)])
def test_odd_tiffs_keep_their_content(bits, white_is_zero):
    """12 bits were nearly black, a scan whose white is zero was its negative. (Pillow writes neither: the tags of a
    picture in memory stand for those of a file.)"""
    top = 2**bits - 1
    ramp = np.linspace(0, top, 64).round().astype(np.uint16)[None].repeat(32, 0)
    image = Image.fromarray(ramp)
    image.tag_v2 = {258: (bits,), 262: 0 if white_is_zero else 1}
    want = np.linspace(0, 255, 64)
    got = np.asarray(open_image(image)).astype(int)[0, :, 0]
    assert np.abs(got - (255 - want if white_is_zero else want)).max() <= 1


def test_orientation_is_left_to_the_user(tmp_path):
    """EXIF orientation is ignored, as in the official loader and in training; one line of Pillow makes it upright."""
    image, path = picture(0, 60, 30), tmp_path / "photo.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(path, exif=exif)
    assert open_image(path).size == (60, 30)
    assert open_image(ImageOps.exif_transpose(Image.open(path))).size == (30, 60)


# ---- 6. own tasks ------------------------------------------------------------------------------------------------


def own_task(**more):
    query = {"input": {"text": "q"}, "labels": ["1"]}
    return {"modality": "image", "group": "mine", "eval_type": "global", "main_metric": "hit@1", "queries": [query],
            "candidates": {"1": {"text": "a"}, "2": {"text": "b"}}} | more  # fmt: skip


def with_query(**more):
    return own_task(queries=[{"input": {"text": "q"}, "labels": ["1"]} | more])


def write_task(root, content, name="mine"):
    (root / "tasks").mkdir(exist_ok=True)
    path = root / f"tasks/{name}.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


@pytest.mark.parametrize("task, message", [
    (with_query(labels=[["1"]]), r"query 0: labels must be a key or a list of keys, not \[\['1'\]\]"),
    (with_query(labels=None), "query 0: labels must be"),
    (with_query(labels=[]), "query 0: labels must be"),
    (with_query(grades=["good"]), "query 0: grades must be one number per label"),
    (with_query(grades=[float("nan")]), "query 0: grades must be one number per label"),
    (with_query(grades=[-1]), "query 0: grades must be one number per label"),
    (with_query(grades=[0]), "query 0: grades must be one number per label, above 0"),
    (with_query(grades=[5000]), "query 0: grades must be one number per label"),
    (with_query(candidates=["1"]), "query 0: has candidates, but a global task ranks all"),
    (with_query(label="1"), "query 0: unknown key 'label'.*input, labels"),
    (with_query(input={"text": "q", "image": "a.png"}), "query 0: unknown key 'image'"),
    (with_query(input={"text": ["q"]}), "query 0: the text must be a string, not list"),
    (with_query(input={"text": "a <|im_end|> b"}), "query 0: the text contains the control token"),
    (with_query(input={"text": "\ud800"}), "query 0: .*half a surrogate pair"),
    (with_query(labels=["3"]), "1 of 1 labels are no candidates.*labels are keys"),
    (own_task(queries=[{"labels": ["1"]}]), "query 0: input or labels are missing"),
    (own_task(queries=["q"]), "query 0: expected a query"),
    (own_task(candidates=["a"]), "candidates an object"),
    (own_task(candidates={"1": None}), "candidate '1': an input must be"),
    (own_task(metric="hit@1"), "unknown key 'metric'"),
    (own_task(group=3), "must be strings"),
    ([own_task()], "expected a task"),
    (b"\xef\xbb\xbf{}", "not valid JSON in UTF-8.*BOM"),
    ("{}".encode("utf-16"), "not valid JSON in UTF-8"),
    (b'{"queries": [', "not valid JSON.*copy the file again"),
])  # fmt: skip
def test_own_tasks_are_validated_before_anything_is_embedded(tmp_path, capsys, task, message):
    """Bug story: a query's own mistake ended the run as a KeyError after hours, or was a wrong number. Each names the
    file, the query and the cure, and ends --check for no other task."""
    path = write_task(tmp_path, task)
    write_task(tmp_path, own_task(), "whole")
    with pytest.raises(BadInput, match=f"(?s)mine.json.*{message}"):
        ev.load_task("mine", tmp_path)
    with pytest.raises(SystemExit) as end:
        ev.main(["--root", str(tmp_path), "--tasks", "mine", "whole", "--check"])
    printed = capsys.readouterr().out
    assert end.value.code == 1 and str(path) in printed and "1 of 2 tasks are complete" in printed


def test_labels_that_are_numbers_or_outside_the_pool(tmp_path, capsys):
    """JSON's keys are strings, so the label 1 means the candidate "1"; a label outside the pool cannot be hit: a
    warning says how many there are."""
    queries = [{"input": {"text": "q"}, "labels": x} for x in (1, [1, 2], ["1", "gone"])]
    write_task(tmp_path, own_task(queries=queries))
    task = ev.load_task("mine", tmp_path)
    assert [query["labels"] for query in task.queries] == [["1"], ["1", "2"], ["1", "gone"]]
    assert "1 of 5 labels are no candidates and cannot be hit, e.g. 'gone' of query 2" in capsys.readouterr().err


# ---- 7. the arguments of embed -----------------------------------------------------------------------------------


@pytest.mark.parametrize("more, message", [
    (dict(batch_size=0), "batch_size=0: must be an integer of at least 1"), (dict(samples=0), "samples=0"),
    (dict(samples=-1), "samples=-1"), (dict(max_new_tokens=0), "max_new_tokens=0"),
    (dict(temperature=-1.0), "temperature=-1.0"), (dict(temperature=float("nan")), "temperature=nan"),
    (dict(traces=["a"]), "1 traces for 2 inputs"), (dict(traces=[]), "0 traces for 2 inputs"),
    (dict(traces={"a": 1, "b": 2}), "not dict"), (dict(samples=2.5), "integer"), (dict(batch_size="3"), "integer"),
    (dict(temperature=1e-40), "temperature=1e-40"), (dict(temperature=1e12), "temperature=1"),
])  # fmt: skip
def test_arguments_of_embed(embedder, more, message):
    """Bug story: batch_size=0 gave zeros for all inputs, without a word."""
    with pytest.raises(ValueError, match=message):
        embedder.embed(["a", "b"], **more)


def test_forms_of_inputs(embedder, tmp_path):
    """What has one sensible meaning is taken, alone or in any iterable; the same embeddings as in the long form."""
    picture(0).save(tmp_path / "p.png")
    path = tmp_path / "p.png"
    text, image = embedder.embed([{"text": "a"}, {"images": [str(path)]}], mode="disc").disc
    for given, want in [("a", text), (["a"], text), (("a",), text), ({"text": "a"}, text), (iter(["a"]), text),
                        (path, image), (picture(0), image), ([picture(0)], image), ({"images": str(path)}, image),
                        ({"images": path}, image), ({"images": picture(0)}, image)]:  # fmt: skip
        got = embedder.embed(given, mode="disc").disc
        torch.testing.assert_close(got[0], want, atol=1e-5, rtol=1e-5)
        assert len(got) == 1


@pytest.mark.parametrize("given, message", [
    (b"abc", "inputs must be a list of inputs, each .*not bytes"), (np.zeros((4, 4, 3)), "not ndarray"), (3, "not int"),
    (None, "not NoneType"), ([b"abc"], "an input must be .* not bytes"), ([np.zeros((4, 4, 3))], "not ndarray"),
    ([["a"]], "not list"), ([None], "not NoneType"), ([{"text": 3}], "the text must be a string, not int"),
    ({"video": "clip.mp4"}, "ffmpeg -i clip.mp4"), ({"video": ["clip.gif"]}, "ffmpeg"),
    ({"images": ["https://a.org/b.png"]}, "web address. Download"), ("https://a.org/b.png", "text or a file"),
    ([{"images": [["a.png"]]}], "flat list"), ([{"images": [b"x"]}], "holds bytes"),
    ([{"pictures": []}], "unknown key"), ([{"text": "a <|im_start|>"}], "control token"),
    ([{"text": "\ud83d"}], "surrogate"),
])  # fmt: skip
def test_forms_that_are_refused(embedder, given, message):
    """A sentence with the accepted forms, in place of a TypeError from the depths or of zeros."""
    with pytest.raises(ValueError, match=f"(?s){message}"):
        embedder.embed(given)


def test_a_name_of_a_file_is_not_taken_for_a_text(embedder, tmp_path, monkeypatch):
    """embed("photo.png") embedded these nine letters."""
    picture(0).save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="Path"):
        embedder.embed("photo.png")


@pytest.mark.parametrize("mode", ["both", "disc", "traces"])
def test_one_bad_input_does_not_discard_the_others(writer, mode):
    """A wrong form or a control token in the middle of a list: skipped with the reason, the others as without it."""
    good = ["a", {"text": "b", "images": [picture(0)]}]
    given = [good[0], {"text": "x <|im_end|>"}, good[1], 7, {"image": "a.png"}, {"images": ["gone.png"]}]
    more = dict(traces=[ANSWERS[0]] * 6) if mode == "traces" else dict(mode=mode, max_new_tokens=8)
    with pytest.warns(UserWarning, match="left out"):
        out = writer.embed(given, **more)
    want = writer.embed(good, **(more | dict(traces=more["traces"][:2]) if mode == "traces" else more))
    assert set(out.skipped) == {1, 3, 4, 5} and "control token" in out.skipped[1] and "gone.png" in out.skipped[5]
    torch.testing.assert_close(out.disc[[0, 2]], want.disc, atol=1e-5, rtol=1e-5)
    assert not out.disc[[1, 3, 4, 5]].any()


# ---- 8. the rest -------------------------------------------------------------------------------------------------


def test_ablation_where_nothing_is_valid(tiny_dir, tmp_path, capsys):
    """Bug story: --ablate trace of a model that never writes <gen_emb> ended in a KeyError after all the work; the
    README's command for the miniature of MMEB is such a one."""
    write_local_task(tmp_path)
    argv = ["--model", str(tiny_dir), "--root", str(tmp_path), "--out", str(tmp_path / "out"), "--workers", "0"]
    ev.main([*argv, "--max_new_tokens", "2", "--ablate", "trace"])
    settings_file.HELD.clear()
    assert "no input has a valid answer, so there is no reasoning to take out" in capsys.readouterr().out


def test_embed_leaves_the_modes_as_they_were(writer_dir):
    """Bug story: the Embedder was in train mode while its backbone was not, and embed() then put both in train mode."""
    model = Embedder.from_pretrained(writer_dir)
    assert not any(module.training for module in model.modules())
    model.backbone.model.language_model.train()
    before = {name: module.training for name, module in model.named_modules()}
    model.embed(["a"], max_new_tokens=2)
    prompts = [Prompt(0, encode_input(model.tokenizer, {"text": "a"}))]
    next(model.generate(prompts, max_new_tokens=2))  # the rest is not taken
    assert before == {name: module.training for name, module in model.named_modules()}


def test_a_sample_depends_on_the_content_not_on_the_place(writer):
    """Bug story: the seed was the input's place in the list, so that the same input, embedded in another list, was
    another sample."""
    sample = dict(samples=3, temperature=1.0, seed=5, max_new_tokens=12)
    items = inputs()
    texts = writer.embed(items, **sample).texts
    assert writer.embed(items[::-1], **sample).texts == texts[::-1]
    assert writer.embed([items[2]], **sample).texts == [texts[2]]
    assert len({tuple(x) for x in texts}) > 1 and writer.embed(items, **(sample | {"seed": 6})).texts != texts


@pytest.mark.parametrize("content, message", [
    (b'\xef\xbb\xbf[{"a": 1}]', "not valid JSON"),
    ('[{"a": 1}]'.encode("utf-16"), "not valid (JSON|UTF-8)"),
    (b'{"data": [{"a": 1}]}', "the rows are under the key 'data'. Save that list"),
    (b'{\n "data": [\n  {"a": 1}]}', "line 1: not valid JSON.*one list of rows"),
    (b"\xff\xfa[", "UTF-8"), (b'[{"a": 1}', "Is the file complete"), (b"\x1f\x8b\x08\0\0", "not valid UTF-8"),
    (b"PAR1\0\0", "not valid JSON"), (b"[" * 9999, "recursion"),
    (b'{"a": ' + b"9" * 5000 + b"}", "4300 digits"),
])  # fmt: skip
def test_files_in_other_clothes(tmp_path, content, message):
    """Each says which file it is and how to mend it."""
    path = tmp_path / "rows.json"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=f"(?s)rows.json.*{message}"):
        read_rows(path)


@pytest.mark.slow
@pytest.mark.parametrize("stage, argv", [
    ("sft", ["--data", "gone.json"]), ("sft", ["--model", "no/model/here", "--data", "{rows}"]),
    ("sft", ["--data", "{rows}", "--batch_size", "40"]), ("rl", ["--data", "{rows}", "--model", "{model}"]),
    ("sft", ["--data", "{rows}", "--out", "{rows}"]), ("eval", ["--root", "/gone"]),
    ("eval", ["--root", "{root}", "--tasks", "nothing", "--model", "{model}"]),
    ("sft", ["--data", "{rows}", "--model", "{config}"]), ("rl", ["--model", "runs/nowhere"]),
])  # fmt: skip
def test_expected_errors_are_one_sentence(world, tiny_dir, tmp_path, stage, argv):
    """No traceback for what a user can mend; exit code 1."""
    (tmp_path / "config").mkdir()
    (tmp_path / "config/config.json").write_text('{"model_type": "qwen2_vl"')
    names = {"{rows}": world / "sft.json", "{model}": tiny_dir, "{root}": world, "{config}": tmp_path / "config"}
    argv = ["--out", tmp_path / "out", *(names.get(x, x) for x in argv)]
    argv += ["--cache", tmp_path / "c", "--media_root", world] if stage != "eval" else []
    codes, output, _ = start(stage, argv)
    assert codes == [1] and "Traceback" not in output and 1 <= len(output.strip().splitlines()) <= 4, output


# ---- 9. saving on the way down -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("stream", ["stdout", "stderr", "full"])
def test_a_broken_stream_does_not_end_a_run(tiny_dir, world, tmp_path, stream):
    """`sft.py | tee log` and tee is killed, the terminal is closed, the log's disk is full: the run goes on to its
    end."""
    argv = flags(tiny_dir, world, tmp_path / "out", steps=3)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    reading, writing = os.pipe()
    os.close(reading)
    where = open("/dev/full", "w") if stream == "full" else writing  # noqa: SIM115
    own = {"stdout": where, "stderr": where} if stream == "full" else {stream: where}
    run = subprocess.run([sys.executable, ROOT / "sft.py", *map(str, argv)], env=env, timeout=60, **own)
    assert run.returncode == 0 and (tmp_path / "out/model.safetensors").exists()


def test_a_full_disk_keeps_the_last_checkpoint(tiny_dir, world, tmp_path, monkeypatch):
    """The save of step 4 fails halfway: the error is heard, step 2 stands, nothing half written fills the disk."""
    real, calls = checkpoint_file.save_file, []

    def full(tensors, path):
        calls.append(path)
        if len(calls) > 1:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device", str(path))
        real(tensors, path)

    monkeypatch.setattr(checkpoint_file, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        run_here(sft, flags(tiny_dir, world, tmp_path, steps=6, save_every=2), monkeypatch)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-2"] and len(calls) == 3


def test_an_error_in_the_final_save_keeps_the_last_step(tiny_dir, world, tmp_path, monkeypatch):
    """The model's folder cannot be written: the last step is kept as a checkpoint, and the same command ends from
    there."""
    argv = flags(tiny_dir, world, tmp_path, steps=3, save_every=50)
    with monkeypatch.context() as patch:
        patch.setattr(Embedder, "save_pretrained", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_here(sft, argv, patch)
    assert [n for n, _ in list_checkpoints(tmp_path)] == [3]
    monkeypatch.setattr(sft, "sft_step", lambda *_: pytest.fail("all steps are done"))
    run_here(sft, argv, monkeypatch)
    assert (tmp_path / "model.safetensors").exists() and len(read_log(tmp_path)) == 3


@pytest.mark.parametrize("processes, workers", [(1, 0), (2, 0), (1, 1), (2, 1)])
def test_a_signal_ends_the_waiting_for_data(tiny_dir, world, tmp_path, processes, workers):
    """A disk that does not answer: SIGTERM was heard and never acted on, since no step began any more. Here, or in a
    worker, for which a thread waits."""
    real, calls = data_file.PairData.__getitem__, []

    def getitem(self, i):
        calls.append(1)
        if len(calls) > 8 // processes:  # two steps
            time.sleep(300)
        return real(self, i)

    def signal_later():
        signal.signal(signal.SIGALRM, lambda *_: terminate())
        signal.setitimer(signal.ITIMER_REAL, 2)

    def before(rank):
        data_file.PairData.__getitem__ = getitem
        act_at(sft, "sft_step", 2, signal_later)(rank)

    began = time.time()
    argv = flags(tiny_dir, world, tmp_path, steps=5, workers=workers)
    run_processes(sft, argv, processes, codes=128 + signal.SIGTERM, before=before)
    assert [n for n, _ in list_checkpoints(tmp_path)] == [2] and time.time() - began < 60


def test_an_error_in_the_update_leaves_nothing_half_updated(tiny_dir, world, tmp_path, monkeypatch):
    """Out of memory inside the optimiser: its weights are between two steps and must not be saved; the resumed run is
    bit-equal to one that was never broken off, and so is its log."""
    more = dict(steps=4, save_every=2)
    run_here(sft, flags(tiny_dir, world, tmp_path / "whole", **more), monkeypatch)
    real, calls = torch.optim.AdamW.step, []

    def half(self, *given):
        calls.append(1)
        if len(calls) == 4:
            self.param_groups[0]["params"][0].data.add_(1)
            raise torch.OutOfMemoryError("half way")
        return real(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", half)
        with pytest.raises(torch.OutOfMemoryError):
            run_here(sft, flags(tiny_dir, world, tmp_path / "cut", **more), patch)
    assert [n for n, _ in list_checkpoints(tmp_path / "cut")] == [2]
    run_here(sft, flags(tiny_dir, world, tmp_path / "cut", **more), monkeypatch)
    assert same_weights(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert read_log(tmp_path / "whole") == read_log(tmp_path / "cut")


def test_weights_that_are_not_finite_are_never_saved(tiny_dir, world, tmp_path, monkeypatch):
    """Bug story: a weight that became NaN in an update, or in its moments, was saved over the last good checkpoint, and
    as the final model with exit code 0."""
    real, calls = torch.optim.AdamW.step, []

    def broken(self, *given):
        real(self, *given)
        calls.append(1)
        if len(calls) == 3:
            self.param_groups[0]["params"][0].data.flatten()[0] = float("nan")

    monkeypatch.setattr(torch.optim.AdamW, "step", broken)
    with pytest.raises(BadInput, match="1 tensors are not finite .* not saved"):
        run_here(sft, flags(tiny_dir, world, tmp_path, steps=3, save_every=2), monkeypatch)
    assert [n for n, _ in list_checkpoints(tmp_path)] == [2] and not (tmp_path / "model.safetensors").exists()


def test_an_ascii_terminal_loses_no_line(tmp_path):
    """Bug story: what stdout could not take was dropped, the whole line of a ± with it."""
    code = "from support.program import run_script; run_script(lambda: print('change 1.0±0.2'))"
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    assert b"change 1.0\\xb10.2" in subprocess.run([sys.executable, "-c", code], env=env, capture_output=True).stdout


def test_nohup_stays(monkeypatch):
    """A signal that is ignored from the start, as nohup does with SIGHUP, is not turned into an end of the run."""
    monkeypatch.setattr(signal, "getsignal", lambda n: signal.SIG_IGN if n == signal.SIGHUP else signal.SIG_DFL)
    with loop_file.Loop(sft.Settings(), {}, None, None, 0, 0) as loop:
        assert set(loop.before) == set(program_file.STOPPING) - {signal.SIGHUP}


# ---- 10. ranges of flags -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("module, flag, value", [
    (sft, "keep", -1), (sft, "keep", 0), (sft, "save_every", 0), (sft, "micro_batch", 0), (sft, "batch_size", 0),
    (sft, "steps", 0), (sft, "lr", -1), (sft, "lr", "nan"), (sft, "tau", 0), (sft, "warmup", 2),
    (sft, "max_skipped", -1), (sft, "workers", -1), (sft, "beta2", 1), (sft, "seed", -1), (rl, "G", 1),
    (rl, "temperature", 0), (rl, "keep", -1), (rl, "temperature", "inf"), (rl, "update_batch", 0),
    (rl, "G", 1), (rl, "max_new_tokens", 0), (rl, "eps_low", 1.5), (ev, "samples", -1),
    (ev, "batch_size", 0), (ev, "max_new_tokens", 0), (ev, "temperature", -1), (ev, "save_every", 0),
    (ev, "video_max_pixels", 10),
])  # fmt: skip
def test_flags_out_of_their_range(module, flag, value, tmp_path, monkeypatch):
    """Bug story: --keep -1 deleted every checkpoint, --G 1 trained without any reward, --temperature 0 ended as NaN: a
    sentence before anything starts."""
    more = ["--root", str(tmp_path), "--tasks", "x"] if module is ev else []
    monkeypatch.setattr(sys, "argv", ["x.py", f"--{flag}", str(value), "--out", str(tmp_path / "out"), *more])
    with pytest.raises(BadInput, match=f"--{flag} {value}[.0]*: must be (at least|above)"):
        module.main()
    assert not (tmp_path / "out").exists()


def test_every_number_has_its_range():
    """A new setting cannot be forgotten in the table."""
    bounded = {name for *_, names in settings_file.BOUNDS for name in names.split()}
    for module in (sft, rl, ev):
        for field in module.Settings.__dataclass_fields__.values():
            assert field.type not in ("int", "float", int, float) or field.name in bounded, field.name


# ---- 11. the right weights or none -------------------------------------------------------------------------------


def changed_model(source, path, change):
    model = Embedder.from_pretrained(source)
    model.save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def reshape(tensors):
    tensors["model.norm.weight"] = torch.ones(7)


@pytest.mark.parametrize("change, name", [
    (lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.weight"), "layers.0.mlp.up_proj.weight"),
    (lambda tensors: tensors.pop("visual.merger.ln_q.weight"), "visual.merger.ln_q.weight"),
    (reshape, "language_model.norm.weight"),
])  # fmt: skip
def test_missing_tensors_are_named(tiny_dir, tmp_path, change, name):
    """Bug story: transformers fills what a folder lacks with random numbers and logs a table; the run trained on."""
    path = changed_model(tiny_dir, tmp_path / "m", change)
    with pytest.raises(BadInput, match=f"(?s){path}: 1 tensors .* missing or have another shape: .*{name}"):
        Embedder.from_pretrained(path)


def test_models_that_are_none_of_ours(tiny_dir, tmp_path):
    """Another family, adapter files alone or beside weights, weights that are cut off, a tokenizer that is not there
    (transformers makes an empty one, all texts were equal) or another model's, a config.json of fewer layers (the
    others' weights were left out) or other patches (the states went to the wrong places): each a sentence."""
    Embedder.from_pretrained(tiny_dir).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "qwen2"}))
    with pytest.raises(BadInput, match="family qwen2 is .* qwen2_vl, qwen2_5_vl, qwen3_vl. .*FAMILIES in support"):
        Embedder.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    smaller = config["vision_config"] | {"spatial_merge_size": 1}
    (tmp_path / "config.json").write_text(json.dumps(config | {"vision_config": smaller}))
    with pytest.raises(BadInput, match=r"its patch sizes \(14, 2, 1\)"):
        Embedder.from_pretrained(tmp_path)
    fewer = config["vision_config"] | {"depth": config["vision_config"]["depth"] - 1}
    (tmp_path / "config.json").write_text(json.dumps(config | {"vision_config": fewer}))
    with pytest.raises(BadInput, match="does not have 12 tensors of the files: model.visual.blocks"):
        Embedder.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokenizer = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(tokenizer.replace("<|image_pad|>", "<|picture_pad|>"))
    with pytest.raises(BadInput, match="its tokenizer is not the model's"):
        Embedder.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(BadInput, match="its tokenizer is not the model's|cannot be loaded"):
        Embedder.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(tokenizer)
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(BadInput, match=f"{tmp_path}: cannot be loaded"):
        Embedder.from_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(BadInput, match="holds an adapter.*merge_and_unload"):
        Embedder.from_pretrained(tmp_path)


# ---- 12. what a resumed run starts from --------------------------------------------------------------------------


def test_a_swapped_reference_is_refused(writer_dir, world, tmp_path, monkeypatch):
    """Bug story: with another model under the same name the resumed RL run had another reference, and KL jumped from
    0.007 to 2.19."""
    model = tmp_path / "model"
    Embedder.from_pretrained(writer_dir).save_pretrained(model)
    argv = rl_flags(model, world, tmp_path / "out", steps=2, save_every=1)
    run_processes(rl, argv, 1, codes=-signal.SIGKILL, before=act_at(rl, "update", 2, die))
    before = settings_file.weights_digest(model)
    changed_model(writer_dir, model, lambda tensors: tensors["model.norm.weight"].mul_(1.01))
    assert settings_file.weights_digest(model) != before
    with pytest.raises(SystemExit, match="content of --model"):
        run_here(rl, argv, monkeypatch)


def test_shapes_are_tested_when_tensors_are_restored(tmp_path):
    """Bug story: a stored Linear(3, 4) was loaded into a Linear(3, 6) without a word."""
    small, large = torch.nn.Linear(3, 4), torch.nn.Linear(3, 6)
    optimizer = torch.optim.AdamW(small.parameters())
    checkpoint_file.save_checkpoint(tmp_path, small, optimizer, 1, {})
    with pytest.raises(BadInput, match=r"model/weight has shape \[4, 3\], the model \[6, 3\]"):
        checkpoint_file.load_checkpoint("auto", tmp_path, large, torch.optim.AdamW(large.parameters()), {})
    with pytest.raises(BadInput, match=r"model/0.weight has shape None, the model \[4, 3\]"):
        checkpoint_file.restore(tmp_path / "checkpoints/step-1", torch.nn.Sequential(torch.nn.Linear(3, 4)))


@pytest.mark.parametrize("file, content", [("part-0.safetensors", b"\x10\0\0\0\0\0\0\0{"), ("meta.json", b"{"),
                                           ("meta.json", b"[]"), ("meta.json", b'{"step": 2}'),
                                           ("part-0.safetensors", None)])  # fmt: skip
def test_a_broken_checkpoint_is_named_and_the_one_before_offered(tmp_path, file, content):
    """Torn by a disk, not by a kill: the message has the --resume that goes on."""
    model = torch.nn.Linear(3, 4)
    for step in (1, 2):
        checkpoint_file.save_checkpoint(tmp_path, model, torch.optim.AdamW(model.parameters()), step, {})
    path = tmp_path / "checkpoints/step-2" / file
    path.unlink() if content is None else path.write_bytes(content)
    older = tmp_path / "checkpoints/step-1"
    with pytest.raises(BadInput, match=f"step-2: this checkpoint is broken .*--resume {older} for the one before"):
        checkpoint_file.load_checkpoint("auto", tmp_path, model, torch.optim.AdamW(model.parameters()), {})
    assert checkpoint_file.load_checkpoint(older, tmp_path, model, torch.optim.AdamW(model.parameters()), {}) == 1


def test_a_run_is_extended(tiny_dir, world, tmp_path, monkeypatch, capsys):
    """Other --steps and --lr are allowed on resume and printed, also for a finished run that has a checkpoint; fewer
    steps than were made are refused, and so is every other change."""
    def argv(**more):
        return flags(tiny_dir, world, tmp_path, **(dict(steps=2, save_every=1) | more))

    run_here(sft, argv(), monkeypatch)
    run_here(sft, argv(steps=4, lr=5e-4), monkeypatch)
    assert "changed settings from here on: " in (out := capsys.readouterr().out) and "steps 2 -> 4" in out, out
    assert "lr 0.001 -> 0.0005" in out and [line["step"] for line in read_log(tmp_path)] == [1, 2, 3, 4]
    with pytest.raises(SystemExit, match="steps 4 -> 3"):
        run_here(sft, argv(steps=3, lr=5e-4), monkeypatch)
    with pytest.raises(SystemExit, match="tau 0.1 -> 0.3"):
        run_here(sft, argv(steps=6, lr=5e-4, tau=0.3), monkeypatch)


def test_what_is_ours_and_broken_is_made_again(tiny_dir, world, tmp_path, monkeypatch, capsys):
    """A machine that crashed leaves zeros: in log.jsonl, in the index of the data."""
    argv = flags(tiny_dir, world, tmp_path / "out", steps=3, save_every=2, cache=tmp_path / "cache")
    run_here(sft, argv, monkeypatch)
    want = read_log(tmp_path / "out")
    (tmp_path / "out/model.safetensors").unlink()
    shutil.rmtree(tmp_path / "out/checkpoints/step-3")
    log = tmp_path / "out/log.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join([lines[0], "\0" * 20 + "\n", *lines[1:]]))
    for path in (tmp_path / "cache").iterdir():
        path.write_bytes(b"\0" * 100)
    run_here(sft, argv, monkeypatch)
    told = capsys.readouterr().err
    assert "1 lines that are no log lines" in told and "Building it" in told and read_log(tmp_path / "out") == want


def test_only_our_own_files_are_cleared_away(tmp_path):
    """Bug story: notes.txt in checkpoints/ ended the save, a copy named step-2-best was deleted as the oldest."""
    model = torch.nn.Linear(3, 4)
    for step in (1, 2, 3):
        checkpoint_file.save_checkpoint(tmp_path, model, torch.optim.AdamW(model.parameters()), step, {}, keep=1)
        if step == 1:
            (tmp_path / "checkpoints/notes.txt").write_text("mine")
            shutil.copytree(tmp_path / "checkpoints/step-1", tmp_path / "checkpoints/step-1-best")
            (tmp_path / "checkpoints/step-best").mkdir()
            (tmp_path / "checkpoints/step-9").mkdir()  # as a kill leaves one
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["notes.txt", "step-1-best", "step-3", "step-best"]
    assert [n for n, _ in list_checkpoints(tmp_path)] == [3]


def test_nothing_of_the_users_is_overwritten(tiny_dir, world, tmp_path, monkeypatch, capsys):
    """--out that is --model; eval.py into a stage's folder, whose args.json says what made it; data.py's commands onto
    the files that they read or that somebody else has made."""
    model = tmp_path / "model"
    Embedder.from_pretrained(tiny_dir).save_pretrained(model)
    with pytest.raises(BadInput, match="is the same folder as --model"):
        run_here(sft, flags(model, world, model), monkeypatch)
    run_here(sft, flags(tiny_dir, world, tmp_path / "sft"), monkeypatch)
    write_local_task(tmp_path)
    with pytest.raises(BadInput, match="is the folder of a run of sft.py"):
        monkeypatch.setattr(sys, "argv", ["eval.py"])
        ev.main(["--model", str(model), "--root", str(tmp_path), "--out", str(tmp_path / "sft"), "--workers", "0"])
    rows = tmp_path / "rows.json"
    rows.write_text((world / "sft.json").read_text())
    for command in (["rl-subset", "--pairs", world / "rl.json", "--sft", rows, "--out", rows],
                    ["annotate", "--pairs", world / "rl.json", "--teacher", model, "--out", rows]):  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["data.py", *map(str, command)])
        with pytest.raises((SystemExit, BadInput), match="files of --pairs or --sft|has not written"):
            data_file.main()
    assert rows.read_text() == (world / "sft.json").read_text()


def test_a_finished_run_without_its_model_goes_on(tiny_dir, world, tmp_path, monkeypatch):
    """Bug story: "is finished", and there was no model: somebody had moved it away."""
    argv = flags(tiny_dir, world, tmp_path, steps=3, save_every=2)
    run_here(sft, argv, monkeypatch)
    want = weights(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    run_here(sft, argv, monkeypatch)
    assert same_weights(weights(tmp_path), want)


# ---- 13. one run per folder --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_second_run_is_refused(tiny_dir, world, tmp_path):
    """Bug story: two runs in one --out mixed their logs, and one of them died of the other's clean-up. The kernel holds
    the lock: a killed holder leaves none, a rank that is still dying does."""
    argv = flags(tiny_dir, world, tmp_path, steps=3)
    held, done = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        sys.argv = ["sft.py", "by hand"]
        settings_file.hold(tmp_path)
        os.write(held[1], b".")
        os.read(done[0], 1)
        os._exit(0)
    os.read(held[0], 1)
    codes, output, _ = start("sft", argv)
    assert codes == [1] and "is in use by another run" in output and f"process {child} on" in output, output
    assert "sft.py by hand" in output and "Traceback" not in output and not (tmp_path / "args.json").exists()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    codes, output, _ = start("sft", argv)
    assert codes == [0], output


# ---- 14. where it runs -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_no_git_no_terminal(tiny_dir, world, tmp_path):
    """Without a git binary the commit is null; in a log file progress is plain lines, without carriage returns."""
    argv = flags(tiny_dir, world, tmp_path, steps=2)
    codes, output, _ = start("sft", argv, env={"PATH": "/nowhere"})
    assert codes == [0] and json.loads((tmp_path / "args.json").read_text())["commit"] is None, output
    bars = [line for line in output.splitlines() if line.startswith("sft:")]
    assert len(bars) >= 2 and "2/2" in bars[-1] and not any("\r" in line for line in bars)


def test_the_disk_is_looked_at_before_the_first_step(tiny_dir, world, tmp_path, monkeypatch):
    """A checkpoint's size is known: a disk that cannot hold it stops the run at once, not after --save_every steps."""
    usage = checkpoint_file.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint_file.shutil, "disk_usage", lambda _: usage._replace(free=10_000_000))
    monkeypatch.setattr(sft, "sft_step", lambda *_: pytest.fail("no step before the check"))
    with pytest.raises(BadInput, match="has 0.0 GB free, this run needs .* GB: up to 3 checkpoints"):
        run_here(sft, flags(tiny_dir, world, tmp_path), monkeypatch)


@pytest.mark.parametrize("fsdp", [False, True])
def test_a_checkpoint_becomes_a_model_folder(tiny_dir, world, tmp_path, monkeypatch, capsys, fsdp):
    """data.py export of step 2 of 3 has the weights of a run of 2 steps' checkpoint; from shards too. eval.py's message
    for a checkpoint names the command; a folder that holds a model is not overwritten."""
    argv = flags(tiny_dir, world, tmp_path / "run", steps=3, save_every=2, fsdp=fsdp)
    run_processes(sft, argv, 2) if fsdp else run_here(sft, argv, monkeypatch)
    checkpoint = tmp_path / "run/checkpoints/step-2"
    with pytest.raises(BadInput, match="python data.py export"):
        Embedder.from_pretrained(checkpoint)
    monkeypatch.setattr(sys, "argv", ["data.py", "export", str(checkpoint), "--out", str(tmp_path / "two")])
    data_file.main()
    assert "step 2" in capsys.readouterr().out
    parts = [load_file(part) for part in sorted(checkpoint.glob("part-*"))]
    for name, p in Embedder.from_pretrained(tmp_path / "two").named_parameters():
        assert torch.equal(p, torch.cat([part[f"model/{name}"] for part in parts])), name
    with pytest.raises(BadInput, match="holds a model already"):
        export_checkpoint(checkpoint, tmp_path / "two")


# ---- 15. loads elsewhere -----------------------------------------------------------------------------------------


def test_keys_of_transformers_4(writer, writer_dir, tmp_path):
    """transformers 4 reads other names: with its defaults in their place its logits were others. Our folder has both
    and is read by transformers 5 as before; a folder that is loaded and saved again is the same. (That 4.57 gives
    identical logits is tried by hand: it needs an environment of its own.)"""
    from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

    config, tokenizer, pictures = (json.loads((writer_dir / f"{name}.json").read_text())
                                   for name in ("config", "tokenizer_config", "preprocessor_config"))  # fmt: skip
    text = config["text_config"]
    assert text["rope_theta"] == text["rope_parameters"]["rope_theta"]
    assert text["rope_scaling"]["mrope_section"] == text["rope_parameters"]["mrope_section"]
    assert text["tie_word_embeddings"] is config["tie_word_embeddings"] is True
    assert "<|vision_start|>" in tokenizer["additional_special_tokens"] and "extra_special_tokens" not in tokenizer
    assert (pictures["min_pixels"], pictures["max_pixels"]) == (784, 2_359_296)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = Qwen2VLForConditionalGeneration.from_pretrained(writer_dir).eval()
        again = Embedder.from_pretrained(writer_dir)
        again.save_pretrained(tmp_path)
    ids = writer.tokenizer("<think>a red star</think><answer>star<gen_emb>", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, writer.backbone(input_ids=ids).logits)
    special = AutoTokenizer.from_pretrained(writer_dir).all_special_tokens
    assert special == writer.tokenizer.all_special_tokens and len(special) > 3
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json", "generation_config.json"):
        assert json.loads((tmp_path / name).read_text()) == json.loads((writer_dir / name).read_text()), name


# ---- found by a fresh reading of the frame ---------------------------------------------------------------------


def test_the_reason_of_a_stop_is_heard_when_saving_fails(tiny_dir, world, tmp_path, monkeypatch, capsys):
    """Bug story: a loss that is not finite, then a full disk: only the disk was named, not the step and its rows."""
    real, calls = sft.contrastive_loss, []

    def broken(*given):
        calls.append(1)
        loss, terms = real(*given)
        return loss * (float("inf") if len(calls) == 2 else 1.0), terms

    def full(*_):
        raise OSError(28, "No space left on device", "part-0.safetensors")

    monkeypatch.setattr(sft, "contrastive_loss", broken)
    monkeypatch.setattr(checkpoint_file, "save_file", full)
    with pytest.raises(SystemExit) as end:
        run_here(sft, flags(tiny_dir, world, tmp_path, steps=3, save_every=50), monkeypatch)
    printed = capsys.readouterr().err
    assert end.value.code == 1 and "step 2: loss inf" in printed and "--skip_nonfinite" in printed
    assert "saving failed: part-0.safetensors: No space left" in printed and "nothing new was saved" in printed


def test_rl_ends_where_no_pair_can_be_used(writer_dir, world, tmp_path, monkeypatch, capsys):
    """Bug story: a wrong --media_root: nothing was learned, and AdamW's momentum moved the weights all the same."""
    argv = rl_flags(writer_dir, world, tmp_path / "out", steps=2, media_root=tmp_path)
    with pytest.raises(SystemExit) as end:
        run_here(rl, argv, monkeypatch)
    assert end.value.code == 1 and "no pair of this batch can be used" in capsys.readouterr().err
    assert not (tmp_path / "out/model.safetensors").exists()


def test_a_sharded_run_keeps_its_last_step(tiny_dir, world, tmp_path):
    """Bug story: the final model could not be written, and process 0 alone has only a part: all steps since the last
    regular checkpoint were lost."""
    def before(rank):
        sft.save_model = lambda *_: 1 / 0

    argv = flags(tiny_dir, world, tmp_path, steps=3, fsdp=True)
    run_processes(sft, argv, 2, codes=1, before=before)
    assert [n for n, _ in list_checkpoints(tmp_path)] == [3]


def test_a_signal_is_no_broken_picture(tmp_path, monkeypatch):
    """Bug story: whatever a decoder raises makes a Skip, also the end that a signal asks for: the step's other
    pictures were read before it was heard."""
    picture(0).save(tmp_path / "a.png")

    def load(_):
        raise program_file.Stopped("SIGTERM", 143)

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(program_file.Stopped):
        open_image(tmp_path / "a.png")


def test_a_run_from_before_a_setting_existed_goes_on(capsys):
    """A new flag must not make older runs unresumable: its default is what they did; the change is said."""
    settings_file.refuse_changed({"lr": 1.0, "G": 8}, {"lr": 1.0, "G": 8, "new": "x"}, "runs/old")
    assert "new None -> x" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="G 8 -> 4"):
        settings_file.refuse_changed({"G": 8}, {"G": 4, "new": "x"}, "runs/old")
