"""Errors, signals and full disks: a run ends, says why, and saves its last complete step."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    act_at,
    flags,
    on_call,
    pids,
    read_log,
    rl_flags,
    run_here,
    run_processes,
    same_weights,
    start,
    terminate,
    weights,
)
from test_eval import write_local_task

import data as data_file
import rl
import sft
import support.checkpoint as checkpoint_file
import support.loop as loop_file
import support.program as program_file
import support.settings as settings_file
from data import BatchOrder
from model import Embedder
from support.cache import save_shard
from support.checkpoint import list_checkpoints
from support.files import read_rows
from support.program import BadInput


def failing(function, rank, action):
    """Lines for start(): in the third call of a function of the stage, this rank acts first."""
    return f"""
calls, real = [], s.{function}
def failing(*given, **more):
    calls.append(1)
    if len(calls) == 3 and os.environ.get("RANK", "{rank}") == "{rank}":
        {action}
    return real(*given, **more)
s.{function} = failing
"""


BROKEN_WORKER = "from data import PairData\nPairData.__getitem__ = lambda self, i: 1 / 0"
ENDED, ZERO = "another rank of this run has ended", "ZeroDivisionError"
STOP = "os.kill(os.getpid(), signal.{})"
KILLED_WORKER = "import multiprocessing; os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)"


@pytest.mark.parametrize("stage, patch, more, codes, told, saved", [
    ("sft", failing("sft_step", 0, "1 / 0"), {}, [1], ZERO, [2]),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in [
        ("sft", failing("sft_step", 0, "1 / 0"), dict(script=False), [1], ZERO, [2]),
        ("sft", BROKEN_WORKER, {}, [1], ZERO, []),
        ("sft", failing("sft_step", 1, "1 / 0"), dict(processes=2), [1, 1], ENDED, [2]),
        ("sft", failing("sft_step", 0, STOP.format("SIGINT")), {}, [130], "SIGINT", [2]),
        ("sft", failing("sft_step", 0, STOP.format("SIGHUP")), {}, [129], "SIGHUP", [2]),
        ("sft", failing("sft_step", 0, STOP.format("SIGUSR1")), {}, [138], "SIGUSR1", [2]),
        ("sft", failing("sft_step", 0, KILLED_WORKER), {}, [1], "fewer --workers", [2, 3]),  # heard a step later
        ("rl", failing("rewards_of", 0, "1 / 0"), {}, [1], ZERO, [2]),
        ("rl", failing("rewards_of", 1, "1 / 0"), dict(processes=2), [1, 1], ENDED, [2]),
    ]),
])  # fmt: skip
def test_a_failed_run_ends_and_saves(tiny_dir, writer_dir, world, tmp_path, stage, patch, more, codes, told, saved):
    """Bug story: the exit handler waited for workers that ignore SIGTERM, so any error hung the run for ever."""
    given_flags, model = (flags, tiny_dir) if stage == "sft" else (rl_flags, writer_dir)
    argv = given_flags(model, world, tmp_path / "out", steps=5, save_every=50, workers=1)
    got, output, seconds = start(stage, argv, patch, **more)
    assert got == codes and told in output and seconds < 200, output
    assert "Traceback" not in output or told in (ZERO, ENDED), output
    steps = [n for n, _ in list_checkpoints(tmp_path / "out")]
    assert len(steps) == min(1, len(saved)) and set(steps) <= set(saved)
    assert not pids(tmp_path / "out"), "a process lives on"


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


@pytest.mark.slow
@pytest.mark.parametrize("patch, code, told", [(EVAL_WORKER, 1, "boom"), (EVAL_INTERRUPT, 130, "interrupted")])
def test_a_failed_evaluation_ends(tiny_dir, tmp_path, patch, code, told):
    """The same for eval.py: an error in a background worker, and Ctrl-C."""
    write_local_task(tmp_path)
    argv = ["--model", tiny_dir, "--root", tmp_path, "--out", tmp_path / "out", "--workers", 1, "--max_new_tokens", 8]
    codes, output, seconds = start("eval", argv, patch)
    assert codes == [code] and seconds < 200 and told in output


@pytest.mark.slow
@pytest.mark.parametrize("stage, argv", [
    ("sft", ["--data", "gone.json"]), ("sft", ["--model", "no/model/here", "--data", "{rows}"]),
    ("sft", ["--data", "{rows}", "--batch_size", "40"]), ("rl", ["--data", "{rows}", "--model", "{model}"]),
    ("sft", ["--data", "{rows}", "--out", "{rows}"]), ("eval", ["--root", "/gone"]),
    ("eval", ["--root", "{root}", "--tasks", "nothing", "--model", "{model}"]), ("sft", ["--stepz", "3"]),
    ("sft", ["--data", "{rows}", "--model", "{config}"]), ("rl", ["--model", "runs/nowhere"]),
])  # fmt: skip
def test_expected_errors_are_one_sentence(world, tiny_dir, tmp_path, stage, argv):
    """No traceback for what a user can fix, and exit code 1."""
    (tmp_path / "config").mkdir()
    (tmp_path / "config/config.json").write_text('{"model_type": "qwen2_vl"')
    names = {"{rows}": world / "sft.json", "{model}": tiny_dir, "{root}": world, "{config}": tmp_path / "config"}
    argv = ["--out", tmp_path / "out", *(names.get(x, x) for x in argv)]
    argv += ["--cache", tmp_path / "c", "--media_root", world] if stage != "eval" else []
    codes, output, _ = start(stage, argv)
    assert codes == [1] and "Traceback" not in output and 1 <= len(output.strip().splitlines()) <= 4, output


@pytest.mark.slow
@pytest.mark.parametrize("stream", ["stdout", "stderr", "full"])
def test_a_broken_stream_does_not_end_a_run(tiny_dir, world, tmp_path, stream):
    """`sft.py | tee log` and tee is killed, the terminal is closed, the disk of the log is full: the run completes."""
    argv = flags(tiny_dir, world, tmp_path / "out", steps=3)
    reading, writing = os.pipe()
    os.close(reading)
    where = open("/dev/full", "w") if stream == "full" else writing  # noqa: SIM115
    own = {"stdout": where, "stderr": where} if stream == "full" else {stream: where}
    run = subprocess.run([sys.executable, ROOT / "sft.py", *map(str, argv)], env=dict(os.environ, OMP_NUM_THREADS="1"),
                         timeout=60, **own)  # fmt: skip
    assert run.returncode == 0 and (tmp_path / "out/model.safetensors").exists()


def infinite_loss(real, *given):
    loss, *parts = real(*given)
    return loss * float("inf"), *parts


def test_a_full_disk_keeps_the_last_checkpoint(tiny_dir, world, tmp_path, monkeypatch, capsys):
    """The save of step 4 fails halfway: step 2 stays, and no half-written file. Bug story: after a loss that is not
    finite only the disk was named, not the step and its rows."""
    real, calls = checkpoint_file.save_file, []

    def full(tensors, path):
        calls.append(path)
        if len(calls) > 1:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device", path.name)
        real(tensors, path)

    monkeypatch.setattr(checkpoint_file, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        run_here(sft, flags(tiny_dir, world, tmp_path, steps=6, save_every=2), monkeypatch)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-2"] and len(calls) == 3
    on_call(sft, "contrastive_loss", 2, infinite_loss, monkeypatch.setattr)
    with pytest.raises(SystemExit) as end:
        run_here(sft, flags(tiny_dir, world, tmp_path / "other", steps=3, save_every=50), monkeypatch)
    printed = capsys.readouterr().err
    assert end.value.code == 1 and "step 2: loss inf" in printed and "--skip_nonfinite" in printed
    assert "saving failed: part-0.safetensors: No space left" in printed and "nothing new was saved" in printed


def test_an_error_in_the_final_save_keeps_the_last_step(tiny_dir, world, tmp_path, monkeypatch):
    """The model cannot be written: the last step is a checkpoint. Bug story: with --fsdp the last steps were lost."""
    argv = flags(tiny_dir, world, tmp_path, steps=3, save_every=50)
    sharded = [*argv, "--out", tmp_path / "sharded", "--fsdp", True]
    with monkeypatch.context() as patch:
        patch.setattr(Embedder, "save_pretrained", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_here(sft, argv, patch)
        patch.setattr(sft, "save_model", lambda *_: 1 / 0)
        run_processes(sft, sharded, 2, codes=1)
    for out in (tmp_path, tmp_path / "sharded"):
        assert [n for n, _ in list_checkpoints(out)] == [3]
    monkeypatch.setattr(sft, "sft_step", lambda *_: pytest.fail("all steps are done"))
    run_here(sft, argv, monkeypatch)
    assert (tmp_path / "model.safetensors").exists() and len(read_log(tmp_path)) == 3


@pytest.mark.parametrize("processes, workers", [(1, 0), (2, 0), (1, 1), pytest.param(2, 1, marks=pytest.mark.slow)])
def test_a_signal_ends_the_waiting_for_data(tiny_dir, world, tmp_path, processes, workers):
    """Bug story: with a disk that does not answer, here or in a worker, nothing acted on SIGTERM any more."""
    real, calls = data_file.PairData.__getitem__, []

    def getitem(self, i):
        calls.append(1)
        if len(calls) > 8 // processes:  # two steps
            time.sleep(300)
        return real(self, i)

    def signal_later():
        signal.signal(signal.SIGALRM, lambda *_: terminate())
        signal.setitimer(signal.ITIMER_REAL, 1)

    def before(rank):
        data_file.PairData.__getitem__ = getitem
        act_at(sft, "sft_step", 2, signal_later)(rank)

    began = time.time()
    argv = flags(tiny_dir, world, tmp_path, steps=5, workers=workers)
    run_processes(sft, argv, processes, codes=128 + signal.SIGTERM, before=before)
    assert [n for n, _ in list_checkpoints(tmp_path)] == [2] and time.time() - began < 60


def test_an_error_in_the_update_leaves_nothing_half_updated(tiny_dir, world, tmp_path, monkeypatch):
    """Out of memory inside the optimiser: its half updated weights are not saved, and the resumed run loses nothing."""
    more = dict(steps=4, save_every=2)
    run_here(sft, flags(tiny_dir, world, tmp_path / "whole", **more), monkeypatch)

    def half(_, self, *__):
        self.param_groups[0]["params"][0].data.add_(1)
        raise torch.OutOfMemoryError("half way")

    with monkeypatch.context() as patch:
        on_call(torch.optim.AdamW, "step", 4, half, patch.setattr)
        with pytest.raises(torch.OutOfMemoryError):
            run_here(sft, flags(tiny_dir, world, tmp_path / "cut", **more), patch)
    assert [n for n, _ in list_checkpoints(tmp_path / "cut")] == [2]
    run_here(sft, flags(tiny_dir, world, tmp_path / "cut", **more), monkeypatch)
    assert same_weights(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert read_log(tmp_path / "whole") == read_log(tmp_path / "cut")


def test_weights_that_are_not_finite_are_never_saved(tiny_dir, world, tmp_path, monkeypatch):
    """Bug story: a weight that became NaN was saved over the last good checkpoint and as the final model."""

    def broken(real, self, *given):
        real(self, *given)
        self.param_groups[0]["params"][0].data.flatten()[0] = float("nan")

    on_call(torch.optim.AdamW, "step", 3, broken, monkeypatch.setattr)
    with pytest.raises(BadInput, match="1 tensors are not finite .* not saved"):
        run_here(sft, flags(tiny_dir, world, tmp_path, steps=3, save_every=2), monkeypatch)
    assert [n for n, _ in list_checkpoints(tmp_path)] == [2] and not (tmp_path / "model.safetensors").exists()


def test_an_ascii_terminal_loses_no_line(tmp_path):
    """Bug story: a line with a ± was dropped if the encoding of stdout had none."""
    code = "from support.program import run_script; run_script(lambda: print('change 1.0±0.2'))"
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    assert b"change 1.0\\xb10.2" in subprocess.run([sys.executable, "-c", code], env=env, capture_output=True).stdout


def test_nohup_stays(monkeypatch):
    """A signal that is ignored from the start, as nohup does with SIGHUP, does not end the run."""
    monkeypatch.setattr(signal, "getsignal", lambda n: signal.SIG_IGN if n == signal.SIGHUP else signal.SIG_DFL)
    with loop_file.Loop(sft.Settings(), {}, None, None, 0, 0) as loop:
        assert set(loop.before) == set(program_file.STOPPING) - {signal.SIGHUP}


@pytest.mark.slow
def test_a_second_run_is_refused(tiny_dir, world, tmp_path):
    """Bug story: two runs in one --out mixed their logs. A killed holder leaves no lock."""
    argv = flags(tiny_dir, world, tmp_path, steps=2)
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
    codes, output, _ = start("sft", argv, env={"PATH": "/nowhere"})
    assert codes == [0] and json.loads((tmp_path / "args.json").read_text())["commit"] is None, output
    bars = [line for line in output.splitlines() if line.startswith("sft:")]
    assert len(bars) >= 2 and "2/2" in bars[-1] and not any("\r" in line for line in bars)


def test_errors_that_show_before_the_first_step(tiny_dir, world, tmp_path, monkeypatch):
    """A disk that cannot hold the checkpoints, and (bug story) a row whose marks do not fit its media."""
    monkeypatch.setattr(sft, "sft_step", lambda *_: pytest.fail("no step before the check"))
    rows = json.loads((world / "sft.json").read_text())
    rows[11]["pos"]["image"] = ["images/0.png", "images/1.png"]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="data.json, row 11, pos.*marks"):
        run_here(sft, flags(tiny_dir, world, tmp_path / "run", data=tmp_path / "data.json"), monkeypatch)
    usage = checkpoint_file.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint_file.shutil, "disk_usage", lambda _: usage._replace(free=10_000_000))
    with pytest.raises(BadInput, match="has 0.0 GB free, this run needs .* GB: up to 3 checkpoints"):
        run_here(sft, flags(tiny_dir, world, tmp_path), monkeypatch)


def test_rl_ends_where_nothing_can_be_learned(writer_dir, world, tmp_path, monkeypatch, capsys):
    """Bug stories: with a wrong --media_root momentum moved the weights. A NaN reward gave advantage 0."""

    def poisoned(real, *given):
        rewards, parts = real(*given)
        return rewards.index_fill(1, torch.tensor([0]), float("nan")), parts

    on_call(rl, "rewards_of", 1, poisoned, monkeypatch.setattr)
    for more, said in ((dict(steps=2, media_root=tmp_path), ["no pair of this batch can be used"]),
                       (dict(steps=1), ["sum of rewards nan: not finite", "rl.json, row"])):  # fmt: skip
        with pytest.raises(SystemExit) as end:
            run_here(rl, rl_flags(writer_dir, world, tmp_path / str(more["steps"]), **more), monkeypatch)
        printed = capsys.readouterr().err
        assert end.value.code == 1 and all(text in printed for text in said), printed
        assert not (tmp_path / f"{more['steps']}/model.safetensors").exists()


def test_files_have_the_mode_of_the_umask(tiny_dir, world, tmp_path, monkeypatch):
    """Bug story: safetensors creates files for their owner only, so a colleague found no model."""
    before = os.umask(0o027)
    try:
        run_here(sft, flags(tiny_dir, world, tmp_path, steps=1), monkeypatch)
        save_shard(tmp_path, [("k", "", np.zeros(2), np.zeros((1, 2)), np.ones(1, bool), [1], ["x"])], 1.0)
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(path.suffix == ".safetensors" for path in files) == 3
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o640}


def test_signals_reach_the_loader_too(tiny_dir, world, tmp_path):
    """Bug story: schedulers signal the whole process group. torch's loader raised, and nothing was saved."""

    def signal_all():
        from multiprocessing import active_children

        assert len(active_children()) == 2
        for child in active_children():
            os.kill(child.pid, signal.SIGTERM)
            os.kill(child.pid, signal.SIGINT)
        time.sleep(0.2)
        terminate()

    argv = flags(tiny_dir, world, tmp_path, steps=8, workers=2)
    run_processes(sft, argv, 1, codes=128 + signal.SIGTERM, before=act_at(sft, "sft_step", 3, signal_all))
    assert [n for n, _ in list_checkpoints(tmp_path)] == [2]


@pytest.mark.parametrize("processes", [1, 2])
def test_not_finite_stops_before_the_update(tiny_dir, world, tmp_path, capfd, processes):
    """A gradient that is not finite ends the run on all ranks and names the rows. --skip_nonfinite drops that step."""

    def before(rank):
        if rank == processes - 1:
            on_call(sft, "contrastive_loss", 2, infinite_loss)

    argv = flags(tiny_dir, world, tmp_path, steps=3)
    run_processes(sft, argv, processes, codes=1, before=before)
    printed = capfd.readouterr().err
    order = BatchOrder([row["dataset_name"] for row in read_rows(world / "sft.json")], 4, seed=0)
    names = [f"sft.json, row {i}" for i in order[1]]
    assert "step 2: loss" in printed and all(name in printed for name in names) and "--skip_nonfinite" in printed
    assert [n for n, _ in list_checkpoints(tmp_path)] == [1]
    run_processes(sft, argv + ["--resume", "none", "--skip_nonfinite", 1], processes, before=before)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["nonfinite"] for line in log] == [0, 1, 1] and np.isfinite(log[2]["loss"])
    assert all(torch.isfinite(x).all() for x in weights(tmp_path).values())


def test_share_of_skipped_rows(tiny_dir, world, tmp_path, monkeypatch, capsys):
    """Half of the images are missing: the run stops past --max_skipped with the list. A higher bound continues."""
    rows = json.loads((world / "sft.json").read_text())
    for row in rows[::2]:
        row["qry"]["image"] = "images/gone.png"
        row["qry"].pop("video", None)
        row["qry"]["conversations"][0] = {"from": "human", "value": "<image>\n<disc_emb>"}
        row["qry"]["conversations"][1] = {"from": "gpt", "value": "<think></think><answer>x<gen_emb>"}
    (tmp_path / "data.json").write_text(json.dumps(rows))
    argv = flags(tiny_dir, world, tmp_path / "run", data=tmp_path / "data.json", steps=4, batch_size=6)
    with pytest.raises(SystemExit):
        run_here(sft, argv + ["--max_skipped", 0.3], monkeypatch)
    printed = capsys.readouterr().err
    assert "6 of 12 rows" in printed and "gone.png" in printed and "--max_skipped" in printed
    assert [n for n, _ in list_checkpoints(tmp_path / "run")] == [2]
    run_here(sft, argv + ["--max_skipped", 0.6], monkeypatch)
    assert [line["skipped"] for line in read_log(tmp_path / "run")] == [3, 3, 3, 3]
    assert len((tmp_path / "run/skipped.jsonl").read_text().splitlines()) == 12
