"""What a resumed run starts from, and which commands are refused because of what --out already has."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
from conftest import (
    act_at,
    changed_copy,
    die,
    flags,
    read_log,
    rl_flags,
    run_data,
    run_here,
    run_processes,
    same_weights,
    weights,
)
from test_eval import write_local_task

import eval as ev
import rl
import sft
import support.settings as settings_file
from support.checkpoint import list_checkpoints
from support.program import BadInput


def steps_saved(out):
    return [step for step, _ in list_checkpoints(out)]


@pytest.fixture(scope="module")
def three_steps(tiny_dir, world, tmp_path_factory):
    """A finished run of three steps with a checkpoint of each. Tests work on copies of it."""
    out = tmp_path_factory.mktemp("run") / "out"
    with pytest.MonkeyPatch.context() as patch:
        run_here(sft, flags(tiny_dir, world, out, steps=3, save_every=1, keep=3), patch)
    return out


def test_a_run_is_extended(tiny_dir, world, tmp_path, monkeypatch, capsys):
    """Bug story: a run shorter than --save_every could not be extended. Only --steps and --lr may change."""

    def argv(**more):
        return flags(tiny_dir, world, tmp_path, **more)

    def refuse(message, **more):
        with pytest.raises(SystemExit, match=message):
            run_here(sft, argv(lr=5e-4, **more), monkeypatch)

    run_here(sft, argv(), monkeypatch)
    assert steps_saved(tmp_path) == [2]
    run_here(sft, argv(steps=4, lr=5e-4), monkeypatch)
    assert "changed settings from here on: " in (out := capsys.readouterr().out) and "steps 2 -> 4" in out, out
    assert "lr 0.001 -> 0.0005" in out and [line["step"] for line in read_log(tmp_path)] == [1, 2, 3, 4]
    refuse("steps 4 -> 3", steps=3)
    refuse("tau 0.1 -> 0.3", steps=6, tau=0.3)
    (tmp_path / "args.json").unlink()  # as if killed before the end
    refuse("tau 0.1 -> 0.2", steps=4, tau=0.2)


def test_a_refused_command_changes_nothing(tiny_dir, world, three_steps, tmp_path, monkeypatch):
    """Bug story (noether#220): --resume none deleted the checkpoints before the command was found unusable."""
    out = shutil.copytree(three_steps, tmp_path / "out")
    (broken := shutil.copytree(tiny_dir, tmp_path / "broken") / "model.safetensors").write_bytes(b"x")

    def content():
        return {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != ".lock"}

    def refuse(error, message, **more):
        with pytest.raises(error, match=message):
            run_here(sft, flags(tiny_dir, world, out, **(dict(steps=3, save_every=1, keep=3) | more)), monkeypatch)
        assert content() == before

    before = content()
    refuse(BadInput, "fills a batch of 8", batch_size=8, resume="none")
    refuse(BadInput, "cannot be loaded", model=broken.parent, resume="none")
    refuse(BadInput, "gone.json", data=tmp_path / "gone.json", resume="none")
    refuse(SystemExit, "batch_size 4 -> 6", batch_size=6)
    refuse(SystemExit, "batch_size 4 -> 6", batch_size=6, resume=out / "checkpoints/step-1")
    run_processes(sft, flags(tiny_dir, world, out, batch_size=3, resume="none"), codes=1)
    refuse(BadInput, "no complete checkpoint", resume=tmp_path / "nothing")


@pytest.mark.parametrize("more, saved", [
    (dict(steps=2, resume="step-1"), [1, 2]), (dict(steps=1, resume="step-1"), [1]),
    (dict(steps=2, keep=2, tau=0.2, resume="none"), [1, 2]),
])  # fmt: skip
def test_going_back_forgets_what_came_after(tiny_dir, world, three_steps, tmp_path, monkeypatch, more, saved):
    """Bug story: --resume of an older checkpoint left the later ones, and the next --resume auto took them."""
    out = shutil.copytree(three_steps, tmp_path / "out")
    resume = out / "checkpoints/step-1" if more["resume"] == "step-1" else "none"
    run_here(sft, flags(tiny_dir, world, out, **(dict(save_every=1, keep=3) | more | dict(resume=resume))), monkeypatch)
    assert steps_saved(out) == saved and len(read_log(out)) == more["steps"]
    assert np.isfinite([line["loss"] for line in read_log(out)]).all()
    meta = json.loads((out / "checkpoints" / f"step-{saved[-1]}" / "meta.json").read_text())
    assert meta["settings"]["tau"] == more.get("tau", 0.1)


def test_what_is_ours_and_broken_is_made_again(tiny_dir, world, tmp_path, monkeypatch, capsys):
    """Bug stories: a crash left zeros in log.jsonl and the data's index. A kill cut a log line in two."""
    out, cache = tmp_path / "out", tmp_path / "cache"
    argv = flags(tiny_dir, world, out, steps=3, save_every=2, cache=cache)
    run_here(sft, argv, monkeypatch)
    want, log = weights(out), read_log(out)
    lines = (out / "log.jsonl").read_text().splitlines(keepends=True)
    (out / "model.safetensors").unlink()
    run_here(sft, argv, monkeypatch)
    assert same_weights(weights(out), want)
    for broken, said in (([lines[0], "\0" * 20 + "\n", *lines[1:]], "1 lines that are no log lines"),
                         ([*lines[:2], '{"step": 3, "lo'], "")):  # fmt: skip
        (out / "model.safetensors").unlink()
        shutil.rmtree(out / "checkpoints/step-3")
        (out / "log.jsonl").write_text("".join(broken))
        for path in cache.iterdir():
            path.write_bytes(b"\0" * 100)
        capsys.readouterr()
        run_here(sft, argv, monkeypatch)
        told = capsys.readouterr().err
        assert said in told and "Building it" in told
        assert read_log(out) == log and same_weights(weights(out), want)


def test_a_swapped_reference_is_refused(writer_dir, world, tmp_path, monkeypatch):
    """Bug story: with another model under the same name KL jumped from 0.007 to 2.19 on resume."""
    model = shutil.copytree(writer_dir, tmp_path / "model")
    argv = rl_flags(model, world, tmp_path / "out", steps=2, save_every=1)
    run_processes(rl, argv, 1, codes=-signal.SIGKILL, before=act_at(rl, "update", 2, die))
    before = settings_file.weights_digest(model)
    changed_copy(writer_dir, model, lambda tensors: tensors["model.norm.weight"].mul_(1.01))
    assert settings_file.weights_digest(model) != before
    with pytest.raises(SystemExit, match="content of --model"):
        run_here(rl, argv, monkeypatch)


def test_changed_data_is_refused(tiny_dir, world, tmp_path, monkeypatch):
    """One letter changed in the data, same size and name: neither a started nor a finished run continues with it."""
    data, original = tmp_path / "data.json", (world / "sft.json").read_bytes()
    changed = original.replace(b"thing 0", b"think 0")
    argv = flags(tiny_dir, world, tmp_path / "run", data=data, steps=2, save_every=1)
    for code, before in ((-signal.SIGKILL, act_at(sft, "sft_step", 2, die)), (0, lambda rank: None)):
        data.write_bytes(original)
        run_processes(sft, argv, 1, codes=code, before=before)
        data.write_bytes(changed)
        with pytest.raises(SystemExit, match="content of --data"):
            run_here(sft, argv, monkeypatch)


def test_nothing_of_the_users_is_overwritten(tiny_dir, world, three_steps, tmp_path, monkeypatch):
    """--out that is --model, eval.py into a stage's folder, data.py's commands onto files of others."""
    model = shutil.copytree(tiny_dir, tmp_path / "model")
    with pytest.raises(BadInput, match="is the same folder as --model"):
        run_here(sft, flags(model, world, model), monkeypatch)
    write_local_task(tmp_path)
    with pytest.raises(BadInput, match="is the folder of a run of sft.py"):
        run_here(ev, ["--model", model, "--root", tmp_path, "--out", three_steps, "--workers", 0], monkeypatch)
    rows, pairs = tmp_path / "rows.json", world / "rl.json"
    rows.write_text((world / "sft.json").read_text())
    assert "files of --pairs or --sft" in run_data("rl-subset", "--pairs", pairs, "--sft", rows, "--out", rows)
    with pytest.raises(BadInput, match="has not written"):
        run_data("annotate", "--pairs", pairs, "--teacher", model, "--out", rows)
    assert rows.read_text() == (world / "sft.json").read_text()


def test_folders_of_two_nodes(tiny_dir, world, tmp_path, capfd):
    """Bug story: if --out was not shared, a rank without the checkpoint started from scratch and the others waited."""
    (tmp_path / "0").mkdir()
    argv = flags(tiny_dir, world, "out", data=world / "sft.json", steps=2, save_every=1)
    own = lambda rank: (tmp_path / str(rank)).mkdir(exist_ok=True) or os.chdir(tmp_path / str(rank))  # noqa: E731
    before = act_at(sft, "sft_step", 2, die)
    run_processes(sft, argv, 1, codes=-signal.SIGKILL, before=lambda rank: own(rank) or before(rank))
    assert steps_saved(tmp_path / "0/out") == [1]
    run_processes(sft, argv, 2, codes=1, before=own)
    assert "found different steps [1, 0]" in capfd.readouterr().err
