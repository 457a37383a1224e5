"""Checkpoints: state, shapes, kills during a save, other files in the folder, and data.py export."""

import copy
import os
import random
import shutil
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import die_softly, flags, run_data, run_here, run_processes, same_weights, weights
from safetensors.torch import load_file

import sft
import support.checkpoint as checkpoint_file
from model import Embedder
from support.check import export_checkpoint
from support.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from support.loop import make_optimizer, trained
from support.program import BadInput


def test_shapes_are_tested_when_tensors_are_restored(tmp_path):
    """Bug story: a stored Linear(3, 4) was loaded into a Linear(3, 6) silently."""
    model, large = torch.nn.Linear(3, 4), torch.nn.Linear(3, 6)
    save_checkpoint(tmp_path, model, torch.optim.AdamW(model.parameters()), 1, {})
    with pytest.raises(BadInput, match=r"model/weight has shape \[4, 3\], the model \[6, 3\]"):
        load_checkpoint("auto", tmp_path, large, torch.optim.AdamW(large.parameters()), {})
    with pytest.raises(BadInput, match=r"model/0.weight has shape None, the model \[4, 3\]"):
        checkpoint_file.restore(tmp_path / "checkpoints/step-1", torch.nn.Sequential(model))


@pytest.mark.parametrize("file, content", [
    ("part-0.safetensors", b"\x10\0\0\0\0\0\0\0{"), ("meta.json", b"{"), ("meta.json", b"[]"),
    ("meta.json", b'{"step": 2}'), ("part-0.safetensors", None),
])  # fmt: skip
def test_a_broken_checkpoint_is_named_and_the_one_before_offered(tmp_path, file, content):
    """Broken by a disk, not by a kill. The message has the --resume that continues."""
    model = torch.nn.Linear(3, 4)
    for step in (1, 2):
        save_checkpoint(tmp_path, model, torch.optim.AdamW(model.parameters()), step, {})
    path = tmp_path / "checkpoints/step-2" / file
    path.unlink() if content is None else path.write_bytes(content)
    older = tmp_path / "checkpoints/step-1"
    with pytest.raises(BadInput, match=f"step-2: this checkpoint is broken .*--resume {older} for the one before"):
        load_checkpoint("auto", tmp_path, model, torch.optim.AdamW(model.parameters()), {})
    assert load_checkpoint(older, tmp_path, model, torch.optim.AdamW(model.parameters()), {}) == 1


@pytest.mark.parametrize("fsdp", [False, True])
def test_a_checkpoint_becomes_a_model_folder(tiny_dir, world, tmp_path, monkeypatch, capsys, fsdp):
    """data.py export writes the weights of a checkpoint, from shards too, and overwrites no model."""
    argv = flags(tiny_dir, world, tmp_path / "run", steps=3, save_every=2, fsdp=fsdp)
    run_processes(sft, argv, 2) if fsdp else run_here(sft, argv, monkeypatch)
    checkpoint = tmp_path / "run/checkpoints/step-2"
    with pytest.raises(BadInput, match="python data.py export"):
        Embedder.from_pretrained(checkpoint)
    assert run_data("export", checkpoint, "--out", tmp_path / "two") == 0
    assert "step 2" in capsys.readouterr().out
    parts = [load_file(part) for part in sorted(checkpoint.glob("part-*"))]
    for name, p in Embedder.from_pretrained(tmp_path / "two").named_parameters():
        assert torch.equal(p, torch.cat([part[f"model/{name}"] for part in parts])), name
    with pytest.raises(BadInput, match="holds a model already"):
        export_checkpoint(checkpoint, tmp_path / "two")
    with pytest.raises(BadInput, match="is a model folder, not a checkpoint"):
        export_checkpoint(tmp_path / "run", tmp_path / "b")
    for wrong in ("run/checkpoints/step-9", "run/checkpoints"):
        with pytest.raises(FileNotFoundError, match="Complete checkpoints near it: .*run/checkpoints/step-"):
            export_checkpoint(tmp_path / wrong, tmp_path / "b")
    export_checkpoint(tmp_path / "run/checkpoints/step-3", tmp_path / "last")
    assert same_weights(weights(tmp_path / "run"), weights(tmp_path / "last"))


def test_thirty_kills_around_the_save(tmp_path):
    """Every resume after a kill finds a checkpoint no older than before, with exactly the state of its step."""
    model, optimizer = small()
    want = {0: [p.clone() for p in model.parameters()]}
    for step in range(1, 500):
        train(model, optimizer, 1)
        want[step] = [p.clone() for p in model.parameters()]
    reached, torn, rng = 0, 0, random.Random(0)
    for _ in range(30):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            model, optimizer = small()
            for step in range(load_checkpoint("auto", tmp_path, model, optimizer, {"a": 1}) + 1, 500):
                train(model, optimizer, 1)
                os.write(writing, b".")  # a save begins
                save_checkpoint(tmp_path, model, optimizer, step, {"a": 1}, keep=2)
            os._exit(0)
        for _ in range(saves := rng.choice([1, 2, 3])):
            os.read(reading, 1)
        time.sleep(rng.uniform(0, 0.01))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)
        os.close(writing)
        torn += len(list(tmp_path.glob("checkpoints/*"))) > len(list_checkpoints(tmp_path))
        model, optimizer = small()
        step = load_checkpoint("auto", tmp_path, model, optimizer, {"a": 1})
        assert reached + saves - 1 <= step and len(list_checkpoints(tmp_path)) <= 3
        reached = step
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), want[step]))
    assert torn > 2  # the kills did hit savings


def test_which_folders_are_cleared_away(tmp_path, monkeypatch):
    """Bug story: notes.txt in checkpoints/ ended the save, and a copy named step-2-best was deleted."""
    (model, optimizer), folder = small(), tmp_path / "checkpoints"
    train(model, optimizer, 1)
    save_checkpoint(tmp_path, model, optimizer, 1, {})
    (folder / "notes.txt").write_text("mine")
    shutil.copytree(folder / "step-1", folder / "step-1-best")
    (folder / "step-best").mkdir()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint_file.shutil, "rmtree", die_softly)
        save_checkpoint(tmp_path, model, optimizer, 2, {}, keep=1)
    assert [n for n, _ in list_checkpoints(tmp_path)] == [2]
    with pytest.raises(FileNotFoundError, match="step-1.*no complete checkpoint"):
        load_checkpoint(folder / "step-1", tmp_path, *small(), {})
    (folder / "step-9").mkdir()  # as a kill leaves one
    save_checkpoint(tmp_path, model, optimizer, 3, {}, keep=5)
    assert [n for n, _ in list_checkpoints(tmp_path)] == [2, 3] and not (folder / "step-1").exists()
    save_checkpoint(tmp_path, model, optimizer, 4, {}, keep=1)
    assert {path.name for path in folder.iterdir()} == {"notes.txt", "step-1-best", "step-best", "step-4"}


def small(seed=0):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    model[1].weight.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    return model, optimizer


def train(model, optimizer, steps):
    for k in range(steps):
        model(torch.full((2, 3), k + 1.0)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_checkpoint_restores_model_and_optimizer(tmp_path):
    """A loaded checkpoint continues bit for bit, with frozen parameters. Only `keep` checkpoints stay."""
    model, optimizer = small()
    for step in (1, 2, 3, 10):
        train(model, optimizer, 1)
        save_checkpoint(tmp_path, model, optimizer, step, {"a": 1}, keep=2)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [3, 10]
    other, other_optimizer = small(1)
    assert load_checkpoint("auto", tmp_path, other, other_optimizer, {"a": 1}) == 10
    train(model, optimizer, 3)
    train(other, other_optimizer, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))
    assert load_checkpoint("none", tmp_path, *small(), {"a": 1}) == 0
    assert load_checkpoint(str(tmp_path / "checkpoints/step-3"), tmp_path, *small(), {"a": 1}) == 3
    with pytest.raises(SystemExit, match="a 1 -> 2"):
        load_checkpoint("auto", tmp_path, *small(), {"a": 2})


@pytest.mark.parametrize("fused", [False, True])
def test_checkpoint_of_the_other_optimizer(tmp_path, fused):
    """A checkpoint of AdamW's fused form, which GPUs run, goes on in the plain one and the reverse."""
    model, _ = small()
    optimizer = make_optimizer(model, SimpleNamespace(lr=0.1, beta2=0.999))
    assert optimizer.defaults["fused"] is False  # on the CPU
    forms = {False: optimizer, True: torch.optim.AdamW(trained(model), 0.1, weight_decay=0.0, fused=True)}
    train(model, forms[fused], 2)
    save_checkpoint(tmp_path, model, forms[fused], 2, {})
    assert load_checkpoint("auto", tmp_path, model, forms[not fused], {}) == 2
    other = copy.deepcopy(model)
    same = torch.optim.AdamW(trained(other), 0.1, weight_decay=0.0, fused=fused)
    load_checkpoint("auto", tmp_path, other, same, {})
    train(model, forms[not fused], 3)
    train(other, same, 3)
    for a, b in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(a, b)
    assert all(float(state["step"]) == 5 for state in forms[not fused].state.values())
