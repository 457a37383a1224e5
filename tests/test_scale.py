"""Full scale, as far as a CPU can show it: sharding, processes, kills, guards, files of millions of rows.

    python -m pytest tests/test_scale.py
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_same_gradients, gradients, read_log, run_here, run_processes
from safetensors.torch import load_file
from test_rl import flags as rl_flags
from test_sft import flags, plain_step, same_weights, small, some_pairs, train, trainable, weights

import rl
import sft
import support.checkpoint as checkpoint_file
import support.distributed as distributed_file
import support.files as files_file
import support.program as program_file
from data import BatchOrder
from model import Embedder
from support.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from support.files import Rows, index_rows, read_rows, scan_rows
from support.formats import RowCheck

# ---- processes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch, checkpointing", [(1, False), (2, True), (3, False), (3, True)])
def test_gradients_of_two_processes(writer_dir, world, tmp_path, micro_batch, checkpointing):
    """Loss and all gradients of two processes, in micro-batches of one pair, of two and of a process's whole share, are
    those of one plain pass over the whole batch to 1e-5; one pair is skipped."""
    model = trainable(writer_dir)
    pairs = some_pairs(model, world, skip=True)
    pairs = [pairs[i] for i in (0, 3, 1, 2, 4, 5)]  # the skipped one is in process 1
    want = plain_step(model, pairs, 0.1, (1.0, 0.5, 2.0), True)
    want_gradients = gradients(model)

    def main():
        rank, _, _ = distributed_file.start_processes()
        model = trainable(writer_dir)
        if checkpointing:
            model.backbone.activation_checkpointing_enable({"use_reentrant": False})
        replica = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        args = sft.Settings(micro_batch=micro_batch, tau=0.1, w_gen=0.5, w_ce=2.0)
        parts, _ = sft.sft_step(replica, pairs[rank::2], args)
        torch.save((parts, gradients(model)), tmp_path / f"{rank}.pt")

    run_processes(SimpleNamespace(__name__="step", main=main), [])
    for rank in (0, 1):
        parts, got = torch.load(tmp_path / f"{rank}.pt")
        assert parts == pytest.approx(want, abs=1e-5, rel=1e-5)
        assert_same_gradients(got, want_gradients, rtol=1e-5)


def test_cudnn_attention_is_off(tiny_dir):
    """Wherever a process starts or an Embedder is loaded: its plan for every new shape takes longer than a pass."""
    for start in (distributed_file.start_processes, lambda: Embedder.from_pretrained(tiny_dir)):
        torch.backends.cuda.enable_cudnn_sdp(True)
        start()
        assert not torch.backends.cuda.cudnn_sdp_enabled()


# ---- sharding --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [dict(micro_batch=1, checkpointing=True), dict(micro_batch=3, train_vision=True)])
def test_fsdp_equals_ddp(tiny_dir, world, tmp_path, more):
    """Two sharded processes have the losses, gradient norms and final weights of two replicated ones; texts without
    pictures, skipped pairs and a trained vision tower included. The final model is a plain folder."""
    rows = json.loads((world / "sft.json").read_text())
    rows[7]["qry"] = rows[7]["qry"] | {"image": ["images/0.png", "images/gone.png"]}
    (world / "sft_gone.json").write_text(json.dumps(rows))
    more = dict(data=world / "sft_gone.json", batch_size=6, lr=1e-4, steps=3) | more
    shards_equal_replicas(sft, flags, tiny_dir, world, tmp_path, more)
    Embedder.from_pretrained(tmp_path / "fsdp")


def shards_equal_replicas(module, given, start, world, out, more):
    for name, fsdp in (("ddp", False), ("fsdp", True)):
        run_processes(module, given(start, world, out / name, fsdp=fsdp, **more))
    for a, b in zip(read_log(out / "ddp"), read_log(out / "fsdp"), strict=True):
        assert b == pytest.approx(a, abs=1e-4, rel=1e-5 if a["step"] == 1 else 1e-3)
    a, b = weights(out / "ddp"), weights(out / "fsdp")
    assert a.keys() == b.keys() and not same_weights(a, weights(start))
    away = torch.cat([(a[name] - b[name]).abs().flatten() for name in a])
    assert float((away > 1e-5).float().mean()) < 0.01 and float(away.max()) < 7e-4  # Adam: lr * sign of rounding noise


@pytest.mark.parametrize("more", [{}, dict(train_vision=True)])
def test_rl_in_shards_equals_replicas(writer_dir, world, tmp_path, more):
    """The same for rl.py: the sharded policy is put together to decode, the processes write different numbers of
    tokens; rollouts, rewards, losses and weights are those of two replicas. One step: behind it a token may be sampled
    differently where rounding differs."""
    shards_equal_replicas(rl, rl_flags, writer_dir, world, tmp_path, dict(steps=1, lr=1e-4, w_anchor=1.0) | more)


@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_shards_need_several_processes(stage, tiny_dir, world, tmp_path, monkeypatch):
    """Refused at once: when the model was looked at first, --resume none had already deleted the checkpoints."""
    (tmp_path / "checkpoints").mkdir()
    module, given = (sft, flags) if stage == "sft" else (rl, rl_flags)
    with pytest.raises(SystemExit, match="--fsdp shards .* torchrun"):
        run_here(module, given(tiny_dir, world, tmp_path, fsdp=True, resume="none"), monkeypatch)
    assert (tmp_path / "checkpoints").exists()


def test_shards_in_bf16(tiny_dir, writer_dir, world, tmp_path):
    """FSDP's bf16 parameters and DDP's autocast round differently: sft's first losses agree to 1e-3, and what rl.py
    decodes with the whole bf16 copy has the log-probabilities of the sharded update pass, also after an update."""
    more = dict(steps=1, bf16=True)
    for name, fsdp in (("ddp", False), ("fsdp", True)):
        run_processes(sft, flags(tiny_dir, world, tmp_path / name, fsdp=fsdp, **more))
    (a,), (b,) = read_log(tmp_path / "ddp"), read_log(tmp_path / "fsdp")
    assert b == pytest.approx(a, rel=1e-2) and b["loss"] == pytest.approx(a["loss"], rel=1e-3)
    run_processes(rl, rl_flags(writer_dir, world, tmp_path / "rl", fsdp=True, **more | dict(steps=2)))
    lines = read_log(tmp_path / "rl")
    assert all(0 < line["logp_mismatch"] < 0.01 and line["grad_norm"] > 0 for line in lines)
    assert lines[1]["kl"] > 0.02, "the update is too small to show a decode with old weights"


def test_twenty_steps_on_one_and_two_processes(tiny_dir, world, tmp_path, monkeypatch):
    """The whole curve of 20 steps at learning rate 1e-5 is the same to 1e-3, whatever the number of processes."""
    more = dict(batch_size=6, steps=20, lr=1e-5)
    run_here(sft, flags(tiny_dir, world, tmp_path / "one", micro_batch=6, **more), monkeypatch)
    run_processes(sft, flags(tiny_dir, world, tmp_path / "two", micro_batch=2, **more))
    one, two = ([line["loss"] for line in read_log(tmp_path / name)] for name in ("one", "two"))
    assert len(one) == 20 and one[0] != one[-1]
    assert two[0] == pytest.approx(one[0], rel=1e-5) and two == pytest.approx(one, rel=1e-3)


# ---- kills and resumes -----------------------------------------------------------------------------------------


def act_at(module, function, call, action, ranks=(0, 1)):
    """-> before(rank) for run_processes: action() as the module's function is called for the call-th time."""

    def before(rank):
        calls, real = [], getattr(module, function)

        def acting(*given, **more):
            calls.append(1)
            if len(calls) == call:
                action()
            return real(*given, **more)

        if rank in ranks:
            setattr(module, function, acting)

    return before


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("stage, processes, more", [
    ("sft", 1, {}), ("sft", 2, {}), ("sft", 2, {"fsdp": True}), ("rl", 1, {}), ("rl", 2, {}),
    ("rl", 2, {"fsdp": True}),
])  # fmt: skip
def test_six_steps_in_three_pieces(tiny_dir, writer_dir, world, tmp_path, stage, processes, more):
    """Six steps are three steps and a kill -9 in the fifth, one step and a SIGTERM to one process in the midst of the
    next, and the rest: the same bits and the same log. The signal's state is that of the last complete step."""
    module, step = (sft, "sft_step") if stage == "sft" else (rl, "update")
    given = flags if stage == "sft" else rl_flags
    argv = [given(tiny_dir if stage == "sft" else writer_dir, world, tmp_path / name, steps=6, save_every=3, **more)
            for name in ("whole", "cut")]  # fmt: skip
    run_processes(module, argv[0], processes)
    cut = tmp_path / "cut"
    run_processes(module, argv[1], processes, codes=-signal.SIGKILL, before=act_at(module, step, 5, die))
    assert [n for n, _ in list_checkpoints(cut)] == [3]
    in_fifth = (Embedder, "share_vision", 2) if stage == "sft" else (rl, "pack_groups", {1: 6, 2: 3}[processes])
    before = act_at(*in_fifth, terminate, ranks=[processes - 1])
    run_processes(module, argv[1], processes, codes=128 + signal.SIGTERM, before=before)
    assert [n for n, _ in list_checkpoints(cut)] == [3, 4] and not (cut / "model.safetensors").exists()
    run_processes(module, argv[1], processes)
    assert same_weights(weights(tmp_path / "whole"), weights(cut))
    assert read_log(tmp_path / "whole") == read_log(cut) and len(read_log(cut)) == 6


@pytest.mark.parametrize("fsdp", [False, True])
def test_signal_while_decoding(writer_dir, world, tmp_path, fsdp):
    """A signal in the rollouts ends the decoding at once, in both processes, and the next start ends as if nothing had
    been."""
    argv = [rl_flags(writer_dir, world, tmp_path / name, steps=2, fsdp=fsdp) for name in ("whole", "cut")]
    run_processes(rl, argv[0])
    tokens = tmp_path / "tokens"

    def before(rank):
        real, calls = Embedder.decode_step, []

        def decode_step(*given):
            calls.append(1)
            if len(calls) == 25 and rank == 1:
                tokens.write_text("signalled")
                terminate()  # the decoding ends here, not at the next token
            assert len(calls) <= 25 or rank == 0, "decoded on after the signal"
            return real(*given)

        Embedder.decode_step = decode_step

    run_processes(rl, argv[1], codes=128 + signal.SIGTERM, before=before)
    assert tokens.exists() and not (tmp_path / "cut/model.safetensors").exists()
    run_processes(rl, argv[1])
    assert same_weights(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_signals_reach_the_loader_too(tiny_dir, world, tmp_path):
    """Bug story: schedulers signal the whole process group; torch's loader then raised because its workers had died,
    and nothing was saved."""

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


def test_sharded_checkpoint_on_other_numbers_of_processes(tiny_dir, world, tmp_path, monkeypatch):
    """What two sharded processes have saved one plain process reads, and the other way round: parameters and AdamW's
    moments arrive whole."""
    more = dict(steps=4, save_every=2, lr=1e-4)
    run_here(sft, flags(tiny_dir, world, tmp_path / "plain", **more), monkeypatch)
    run_processes(sft, flags(tiny_dir, world, tmp_path / "sharded", fsdp=True, **more))
    assert len(list((tmp_path / "sharded/checkpoints/step-2").glob("part-*"))) == 2
    for first, fsdp in (("sharded", False), ("plain", True)):
        argv = flags(tiny_dir, world, tmp_path / f"from_{first}", fsdp=fsdp, **more)
        argv += ["--resume", tmp_path / first / "checkpoints/step-2"]
        run_processes(sft, argv, 2 if fsdp else 1)
        assert read_log(tmp_path / f"from_{first}")[-1] == pytest.approx(read_log(tmp_path / "plain")[-1], rel=1e-4)
        a, b = weights(tmp_path / "plain"), weights(tmp_path / f"from_{first}")
        assert max(float((a[name] - b[name]).abs().max()) for name in a) < 3e-4


def test_fifty_kills_around_the_save(tmp_path):
    """A child trains and saves without a pause and is killed 50 times, in the middle of writing, of renaming and of
    deleting. Every resume finds a checkpoint no older than before, with exactly the state of its step."""
    model, optimizer = small()
    want = {0: [p.clone() for p in model.parameters()]}
    for step in range(1, 500):
        train(model, optimizer, 1)
        want[step] = [p.clone() for p in model.parameters()]
    reached, torn, rng = 0, 0, random.Random(0)
    for _ in range(50):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            model, optimizer = small()
            for step in range(load_checkpoint("auto", tmp_path, model, optimizer, {"a": 1}) + 1, 500):
                train(model, optimizer, 1)
                os.write(writing, b".")  # a save begins
                save_checkpoint(tmp_path, model, optimizer, step, {"a": 1}, keep=2)
            os._exit(0)
        saves = rng.choice([1, 2, 3])
        for _ in range(saves):
            os.read(reading, 1)
        time.sleep(rng.uniform(0, 0.01))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)
        os.close(writing)
        left = list(tmp_path.glob("checkpoints/*"))
        torn += len(left) > len(list_checkpoints(tmp_path))
        model, optimizer = small()
        step = load_checkpoint("auto", tmp_path, model, optimizer, {"a": 1})
        assert reached + saves - 1 <= step and len(list_checkpoints(tmp_path)) <= 3
        reached = step
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), want[step]))
    assert torn > 5  # the kills did hit savings


def test_half_deleted_checkpoint_is_none(tmp_path, monkeypatch):
    """A kill while an old checkpoint is being deleted leaves a folder that resume does not take for good, and the next
    save clears it away."""
    model, optimizer = small()
    train(model, optimizer, 1)
    save_checkpoint(tmp_path, model, optimizer, 1, {})
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_file.shutil, "rmtree", lambda path: die_softly())
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, model, optimizer, 2, {}, keep=1)
    assert [n for n, _ in list_checkpoints(tmp_path)] == [2]
    with pytest.raises(FileNotFoundError, match="step-1.*no complete checkpoint"):
        load_checkpoint(tmp_path / "checkpoints/step-1", tmp_path, *small(), {})
    save_checkpoint(tmp_path, model, optimizer, 3, {}, keep=5)
    assert sorted(path.name for path in tmp_path.glob("checkpoints/*")) == ["step-2", "step-3"]


def die_softly():
    raise KeyboardInterrupt


def test_going_back_forgets_what_came_after(tiny_dir, world, tmp_path, monkeypatch):
    """Bug story: --resume of an older checkpoint of the same folder left the later ones, which the next --resume auto
    took, and --keep deleted the new ones as the oldest."""
    run_here(sft, flags(tiny_dir, world, tmp_path, steps=3, save_every=1, keep=3), monkeypatch)
    again = flags(tiny_dir, world, tmp_path, steps=2, save_every=1, keep=3, resume=tmp_path / "checkpoints/step-1")
    run_here(sft, again, monkeypatch)
    assert [n for n, _ in list_checkpoints(tmp_path)] == [1, 2]


def test_folders_of_two_nodes(tiny_dir, world, tmp_path, capfd):
    """Bug story: where --out is not one shared folder, a process without the checkpoint started anew and the others
    waited for it for ever."""
    (tmp_path / "0").mkdir()
    argv = flags(tiny_dir, world, "out", data=world / "sft.json", steps=2, save_every=1)
    own = lambda rank: (tmp_path / str(rank)).mkdir(exist_ok=True) or os.chdir(tmp_path / str(rank))  # noqa: E731
    before = act_at(sft, "sft_step", 2, die)
    run_processes(sft, argv, 1, codes=-signal.SIGKILL, before=lambda rank: own(rank) or before(rank))
    assert [n for n, _ in list_checkpoints(tmp_path / "0/out")] == [1]
    run_processes(sft, argv, 2, codes=1, before=own)
    assert "found different steps [1, 0]" in capfd.readouterr().err


def test_random_state_is_restored(tmp_path):
    """The global generator goes on where the checkpoint was made."""
    model, optimizer = small()
    save_checkpoint(tmp_path, model, optimizer, 1, {})
    want = torch.rand(3)
    torch.manual_seed(5)
    load_checkpoint("auto", tmp_path, *small(), {})
    assert torch.equal(torch.rand(3), want)


def test_cut_log_line(tiny_dir, world, tmp_path, monkeypatch):
    """Bug story: a line of log.jsonl that the kill had cut in two ended the resume with a JSON error."""
    argv = flags(tiny_dir, world, tmp_path, steps=2, save_every=1)
    run_processes(sft, argv, 1, codes=-signal.SIGKILL, before=act_at(sft, "sft_step", 2, die))
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    run_here(sft, argv, monkeypatch)
    assert [line["step"] for line in read_log(tmp_path)] == [1, 2]


def test_changed_data_is_refused(tiny_dir, world, tmp_path, monkeypatch):
    """One letter changed in the data, same size and name: neither a started nor a finished run goes on with it."""
    data = tmp_path / "data.json"
    data.write_bytes((world / "sft.json").read_bytes())
    argv = flags(tiny_dir, world, tmp_path / "run", data=data, steps=3, save_every=1)
    run_processes(sft, argv, 1, codes=-signal.SIGKILL, before=act_at(sft, "sft_step", 3, die))
    original = data.read_bytes()
    data.write_bytes(original.replace(b"thing 0", b"think 0"))
    with pytest.raises(SystemExit, match="content of --data"):
        run_here(sft, argv, monkeypatch)
    data.write_bytes(original)
    run_here(sft, argv, monkeypatch)
    data.write_bytes(original.replace(b"thing 0", b"think 0"))
    with pytest.raises(SystemExit, match="content of --data"):
        run_here(sft, argv, monkeypatch)


# ---- guards ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2])
def test_not_finite_stops_before_the_update(tiny_dir, world, tmp_path, capfd, processes):
    """A gradient that is not finite ends the run in all processes with all the batch's rows in the message; what is
    saved is the state before it. --skip_nonfinite goes on without that step, and counts it."""

    def before(rank):
        real, calls = sft.contrastive_loss, []

        def poisoned(*given):
            calls.append(1)
            loss, *parts = real(*given)
            return loss * (float("inf") if len(calls) == 2 and rank == processes - 1 else 1.0), *parts

        sft.contrastive_loss = poisoned

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


def test_reward_that_is_not_finite_stops(writer_dir, world, tmp_path, monkeypatch, capsys):
    """A NaN among the rewards has no spread to compare, so its group got the advantage 0 and learnt nothing, unseen."""
    real = rl.rewards_of

    def poisoned(*given):
        rewards, parts = real(*given)
        return rewards.index_fill(1, torch.tensor([0]), float("nan")), parts

    monkeypatch.setattr(rl, "rewards_of", poisoned)
    with pytest.raises(SystemExit):
        run_here(rl, rl_flags(writer_dir, world, tmp_path, steps=1), monkeypatch)
    printed = capsys.readouterr().err
    assert "sum of rewards nan: not finite" in printed and "rl.json, row" in printed


def test_share_of_skipped_rows(tiny_dir, world, tmp_path, monkeypatch, capsys):
    """Half of the pictures gone: the run stops past --max_skipped with a reason and the list, and keeps its state; a
    higher bound goes on."""
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
    log = read_log(tmp_path / "run")
    assert [line["skipped"] for line in log] == [3, 3, 3, 3]
    assert len((tmp_path / "run/skipped.jsonl").read_text().splitlines()) == 12


# ---- files of millions of rows ---------------------------------------------------------------------------------

ODD_ROWS = [{"a": "ünï 日本 \u2028 😀", "b": [1, {"c": "]},{["}]}, {}, {"long": "x" * 300, "q": '\\"[{'}] * 5


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 24])
@pytest.mark.parametrize("style", [{}, {"indent": 2}, {"ensure_ascii": False}, {"separators": (" ,\n\n ", ":")}])
def test_streamed_rows_are_those_of_json(tmp_path, block, style):
    """Whatever the size of the blocks and the layout of the list, the rows are json's, and their byte ranges hold
    them."""
    path = tmp_path / "a.json"
    path.write_text(" \n" + json.dumps(ODD_ROWS, **style) + "\n ", encoding="utf-8")
    found = list(scan_rows(path, block))
    content = path.read_bytes()
    assert [row for _, _, row in found] == ODD_ROWS == [json.loads(content[a:b]) for a, b, _ in found]
    path.write_text("[ ]")
    assert list(scan_rows(path, block)) == []


@pytest.mark.parametrize("block", [1, 5, 1 << 24])
@pytest.mark.parametrize("text, message", [
    ('[{"a": 1},\n{"b": 2},\n', "line 3.*not valid JSON"), ('[{"a": 1},\n{"b": 2}\n', "line 2.*Is the file complete"),
    ('[{"a": 1},\n{"b": "2', "line 2.*not valid JSON"), ('[{"a": 1}\n{"b": 2}]', "line 1.*comma"),
    ('[{"a": 1}]\n[{"b": 2}]', "line 1.*more text after"), ('[{"a": 1},\n]', "line 2.*not valid JSON"),
    ('[{"a": 1}, 7]', "row 1: expected an object, found int"),
])  # fmt: skip
def test_broken_lists(tmp_path, text, message, block):
    """A download that was cut short, lists run together, missing commas: the error names the file and the line."""
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=f"a.json, {message}"):
        list(scan_rows(tmp_path / "a.json", block))


def test_index_is_made_once(world, tmp_path, monkeypatch):
    """The second start does not read the file; a changed file is indexed again; a kill before the end leaves nothing;
    rows come from their place."""
    path, cache = tmp_path / "sft.json", tmp_path / "cache"
    path.write_bytes((world / "sft.json").read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(program_file.os, "replace", lambda *_: die_softly())
        with pytest.raises(KeyboardInterrupt):
            index_rows(path, RowCheck("sft"), cache)
    first = index_rows(path, RowCheck("sft"), cache)
    with monkeypatch.context() as patch:
        patch.setattr(files_file, "scan_rows", lambda *_: pytest.fail("read again"))
        again = index_rows(path, RowCheck("sft"), cache)
        rows = Rows([path, path], RowCheck("sft"), cache)
    assert all(np.array_equal(first[key], again[key]) for key in first)
    want = read_rows(path)
    assert len(rows) == 24 and rows.names == ["one", "two"]
    assert [rows[i] for i in (0, 11, 12, 23)] == [(f"{path}, row {i}", want[i]) for i in (0, 11, 0, 11)]
    path.write_text(json.dumps(want[:5]))
    assert len(index_rows(path, RowCheck("sft"), cache)["spans"]) == 5


def test_errors_of_rows_show_before_the_first_step(tiny_dir, world, tmp_path, monkeypatch):
    """Bug story: a row whose marks do not fit its media ended the run when its turn came, after days perhaps."""
    rows = json.loads((world / "sft.json").read_text())
    rows[11]["pos"]["image"] = ["images/0.png", "images/1.png"]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    monkeypatch.setattr(sft, "sft_step", lambda *_: pytest.fail("no step before the check"))
    with pytest.raises(ValueError, match="data.json, row 11, pos.*marks"):
        run_here(sft, flags(tiny_dir, world, tmp_path / "run", data=tmp_path / "data.json"), monkeypatch)


# ---- as a user starts it ---------------------------------------------------------------------------------------


def start(world, script, processes, *argv):
    """The script in a process group of its own, under torchrun where there are several processes."""
    run = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen([sys.executable, *run, str(ROOT / script), *map(str, argv)], env=env, cwd=world,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip


def wait_for(condition, seconds=60):
    began = time.time()
    while not condition():
        assert time.time() - began < seconds
        time.sleep(0.05)


def has_ended(pid):
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or ") Z" in stat.read_text()  # a zombie that nobody has asked for yet


def wait_for_steps(out, n, process):
    began = time.time()
    while not (Path(out) / "log.jsonl").exists() or len((Path(out) / "log.jsonl").read_text().splitlines()) < n:
        assert process.poll() is None and time.time() - began < 300, process.stdout.read().decode()[-3000:]
        time.sleep(0.05)


def children(process):
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_kills_of_the_whole_program(tiny_dir, world, tmp_path, processes):
    """Alone or under torchrun, killed with -9 in the middle three times, then stopped by SIGTERM, then ended: the bits
    of a run in one piece. Bug story: torchrun alone killed with -9 left its processes training on, into the folder of
    the next start; now they save and end."""
    cut = tmp_path / "cut"
    argv = flags(tiny_dir, world, cut, steps=40, save_every=1, workers=1)
    rng = random.Random(processes)
    for k in range(3):
        process = start(world, "sft.py", processes, *argv)
        wait_for_steps(cut, 7 * k + 3, process)
        time.sleep(rng.uniform(0, 0.3))
        started = children(process) if processes > 1 else []  # torchrun gives each a group of its own
        for pid in [process.pid, *(started if k else [])]:
            os.kill(pid, signal.SIGKILL)
        process.communicate()  # returns when nobody holds its output any more
        for pid in started:
            wait_for(lambda pid=pid: has_ended(pid))
        if processes > 1 and k == 0:
            assert list_checkpoints(cut)[-1][0] == json.loads((cut / "log.jsonl").read_text().splitlines()[-1])["step"]
    process = start(world, "sft.py", processes, *argv)
    wait_for_steps(cut, 30, process)
    began = time.time()
    os.kill(process.pid, signal.SIGTERM)  # torchrun hands it on
    printed = process.communicate()[0].decode()
    assert process.returncode != 0 and time.time() - began < 30 and "SIGTERM" in printed, printed[-3000:]
    saved = list_checkpoints(cut)[-1][0]
    assert f"saved after step {saved}" in printed and saved >= 30
    for name in ("cut", "whole"):
        process = start(world, "sft.py", processes, *argv, "--out", tmp_path / name)
        printed = process.communicate()[0].decode()
        assert process.returncode == 0, printed[-3000:]
    assert same_weights(load_file(cut / "model.safetensors"), load_file(tmp_path / "whole/model.safetensors"))
    assert read_log(cut) == read_log(tmp_path / "whole")
