"""Several ranks on a CPU: gradients, shards, kills and resumes, nodes that differ, torchrun."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    act_at,
    assert_same_gradients,
    changed_copy,
    die,
    flags,
    gradients,
    read_log,
    rl_flags,
    run_here,
    run_processes,
    same_weights,
    start_script,
    terminate,
    weights,
    with_a_missing_image,
)
from safetensors.torch import load_file
from test_sft import plain_step, some_pairs, trainable

import data
import rl
import sft
import support.distributed as distributed_file
from model import Embedder
from support.checkpoint import list_checkpoints


@pytest.mark.parametrize("pass_tokens, checkpointing", [(1, False), (220, True), (10_000, False), (10_000, True)])
def test_gradients_of_two_processes(writer_dir, world, tmp_path, pass_tokens, checkpointing):
    """Loss and all gradients of two ranks, with a skipped pair, are those of one plain pass to 1e-5."""
    model = trainable(writer_dir)
    pairs = some_pairs(model, world, skip=True)
    pairs.insert(1, pairs.pop(3))  # the skipped one is in process 1
    want = plain_step(model, pairs, 0.1, (1.0, 0.5, 2.0), True)
    want_gradients = gradients(model)

    def main():
        rank, _, _ = distributed_file.start_processes()
        model = trainable(writer_dir)
        if checkpointing:
            model.backbone.activation_checkpointing_enable({"use_reentrant": False})
        replica = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        args = sft.Settings(pass_tokens=pass_tokens, tau=0.1, w_gen=0.5, w_ce=2.0)
        parts, _ = sft.sft_step(replica, pairs[rank::2], args)
        torch.save((parts, gradients(model)), tmp_path / f"{rank}.pt")

    run_processes(SimpleNamespace(__name__="step", main=main), [])
    for rank in (0, 1):
        parts, got = torch.load(tmp_path / f"{rank}.pt")
        parts.pop("padding")
        assert parts == pytest.approx(want, abs=1e-5, rel=1e-5)
        assert_same_gradients(got, want_gradients, rtol=1e-5)


def test_cudnn_attention_is_off(tiny_dir):
    """Wherever a process starts or an Embedder is loaded: its plan for every new shape takes longer than a pass."""
    for start in (distributed_file.start_processes, lambda: Embedder.from_pretrained(tiny_dir)):
        torch.backends.cuda.enable_cudnn_sdp(True)
        start()
        assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("more", [dict(pass_tokens=1, checkpointing=True), dict(pass_tokens=330, train_vision=True)])
def test_fsdp_equals_ddp(tiny_dir, world, tmp_path, more):
    """Two sharded ranks have the results of two replicas, and the final model is a plain folder."""
    more = dict(data=with_a_missing_image(world), batch_size=6, lr=1e-4, steps=2) | more
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


@pytest.mark.parametrize("more", [{}, pytest.param(dict(train_vision=True), marks=pytest.mark.slow)])
def test_rl_in_shards_equals_replicas(writer_dir, world, tmp_path, more):
    """The same for rl.py. One step only, because afterwards rounding may change a sampled token."""
    shards_equal_replicas(rl, rl_flags, writer_dir, world, tmp_path, dict(steps=1, lr=1e-4) | more)


@pytest.mark.parametrize("module, given", [(sft, flags), (rl, rl_flags)])
def test_shards_need_several_processes(module, given, tiny_dir, world, tmp_path, monkeypatch):
    """Bug story: the model was loaded before the command was refused, and --resume none had deleted the checkpoints."""
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(SystemExit, match="--fsdp shards .* torchrun"):
        run_here(module, given(tiny_dir, world, tmp_path, fsdp=True, resume="none"), monkeypatch)
    assert (tmp_path / "checkpoints").exists()


def test_shards_in_bf16(tiny_dir, writer_dir, world, tmp_path):
    """FSDP's bf16 and DDP's autocast round differently. rl.py decodes with the weights of the update pass."""
    for name, fsdp in (("ddp", False), ("fsdp", True)):
        run_processes(sft, flags(tiny_dir, world, tmp_path / name, fsdp=fsdp, steps=1, bf16=True))
    (a,), (b,) = read_log(tmp_path / "ddp"), read_log(tmp_path / "fsdp")
    assert b == pytest.approx(a, rel=1e-2) and b["loss"] == pytest.approx(a["loss"], rel=1e-3)
    argv = rl_flags(writer_dir, world, tmp_path / "rl", fsdp=True, steps=2, bf16=True)
    run_processes(rl, argv)
    lines = read_log(tmp_path / "rl")
    assert all(0 < line["logp_mismatch"] < 0.01 and line["grad_norm"] > 0 for line in lines)
    assert lines[1]["kl"] > 0.02, "the update is too small to show a decode with old weights"


def test_six_steps_on_one_and_two_processes(tiny_dir, world, tmp_path, monkeypatch):
    """The losses of 6 steps at learning rate 1e-5 are the same to 1e-3 on one and two ranks."""
    more = dict(batch_size=6, steps=6, lr=1e-5)
    run_here(sft, flags(tiny_dir, world, tmp_path / "one", pass_tokens=10_000, **more), monkeypatch)
    run_processes(sft, flags(tiny_dir, world, tmp_path / "two", pass_tokens=220, **more))
    one, two = ([line["loss"] for line in read_log(tmp_path / name)] for name in ("one", "two"))
    assert len(one) == 6 and one[0] != one[-1]
    assert two[0] == pytest.approx(one[0], rel=1e-5) and two == pytest.approx(one, rel=1e-3)


@pytest.mark.parametrize("stage, processes, more", [
    ("sft", 2, {}), ("rl", 1, {}), ("rl", 2, {"fsdp": True}),
    pytest.param("sft", 2, {"fsdp": True}, marks=pytest.mark.slow), pytest.param("rl", 2, {}, marks=pytest.mark.slow),
])  # fmt: skip
def test_four_steps_in_three_pieces(tiny_dir, writer_dir, world, tmp_path, stage, processes, more):
    """A kill -9, a SIGTERM to one rank, and the rest give the same bits. The signal saves the last step."""
    module, step, given, model = (sft, "sft_step", flags, tiny_dir)
    if stage == "rl":
        module, step, given, model = (rl, "update", rl_flags, writer_dir)
        more = dict(beta=1.0, max_new_tokens=10, pass_tokens=1) | more  # one pass for each prompt
    argv = [given(model, world, tmp_path / name, steps=4, save_every=2, **more) for name in ("whole", "cut")]
    run_processes(module, argv[0], processes)
    cut = tmp_path / "cut"
    run_processes(module, argv[1], processes, codes=-signal.SIGKILL, before=act_at(module, step, 4, die))
    assert [n for n, _ in list_checkpoints(cut)] == [2] and len(read_log(cut)) == 3
    in_fourth = (Embedder, "share_vision", 2) if stage == "sft" else (rl, "pack_groups", {1: 10, 2: 6}[processes])
    before = act_at(*in_fourth, terminate, ranks=[processes - 1])
    run_processes(module, argv[1], processes, codes=128 + signal.SIGTERM, before=before)
    assert [n for n, _ in list_checkpoints(cut)] == [2, 3] and not (cut / "model.safetensors").exists()
    run_processes(module, argv[1], processes)
    assert same_weights(weights(tmp_path / "whole"), weights(cut))
    log = read_log(cut)
    assert read_log(tmp_path / "whole") == log and [line["step"] for line in log] == [1, 2, 3, 4]
    if stage == "rl":
        assert [line["lr"] for line in log] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4]) and log[3]["kl"] > 0


@pytest.mark.parametrize("fsdp", [pytest.param(False, marks=pytest.mark.slow), True])
def test_signal_while_decoding(writer_dir, world, tmp_path, fsdp):
    """A signal in the rollouts ends the decoding at once, on both ranks. The next start completes the run."""
    argv = [rl_flags(writer_dir, world, tmp_path / name, steps=2, fsdp=fsdp, max_new_tokens=10)
            for name in ("whole", "cut")]  # fmt: skip
    run_processes(rl, argv[0])
    signalled = tmp_path / "signalled"

    def before(rank):
        real, calls = Embedder.decode_step, []

        def decode_step(*given):
            calls.append(1)
            if len(calls) == 15 and rank == 1:
                signalled.write_text("")
                terminate()  # the decoding ends here, not at the next token
            assert len(calls) <= 15 or rank == 0, "decoded on after the signal"
            return real(*given)

        Embedder.decode_step = decode_step

    run_processes(rl, argv[1], codes=128 + signal.SIGTERM, before=before)
    assert signalled.exists() and not (tmp_path / "cut/model.safetensors").exists()
    run_processes(rl, argv[1])
    assert same_weights(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_sharded_checkpoint_on_other_numbers_of_processes(tiny_dir, world, tmp_path, monkeypatch):
    """One plain rank reads what two sharded ranks have saved, and the reverse: parameters and AdamW's moments."""
    more = dict(steps=3, save_every=2, lr=1e-4)
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


def wait_for(condition, seconds=60, process=None):
    """Wait until the condition is true. Fail if the process ends before."""
    began = time.time()
    while not condition():
        assert time.time() - began < seconds
        assert process is None or process.poll() is None, process.stdout.read().decode()[-3000:]
        time.sleep(0.05)


def log_lines(out):
    log = Path(out) / "log.jsonl"
    return log.read_text().splitlines() if log.exists() else []


def children(process):
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_kills_of_the_whole_program(tiny_dir, world, tmp_path, processes):
    """Bug story: torchrun alone killed with -9 left its ranks training, into the folder of the next start."""
    cut = tmp_path / "cut"
    argv = flags(tiny_dir, world, cut, steps=40, save_every=1, workers=1)
    rng = random.Random(processes)
    for k in range(3):
        process = start_script(world, "sft.py", processes, *argv)
        wait_for(lambda k=k: len(log_lines(cut)) >= 7 * k + 3, 300, process)
        time.sleep(rng.uniform(0, 0.3))
        started = children(process) if processes > 1 else []  # torchrun gives each a group of its own
        for pid in [process.pid, *(started if k else [])]:
            os.kill(pid, signal.SIGKILL)
        process.communicate()  # returns when nobody holds its output any more
        for pid in started:  # gone, or a zombie that nobody has asked for yet
            stat = Path(f"/proc/{pid}/stat")
            wait_for(lambda stat=stat: not stat.exists() or ") Z" in stat.read_text())
        if processes > 1 and k == 0:
            assert list_checkpoints(cut)[-1][0] == json.loads(log_lines(cut)[-1])["step"]
    process = start_script(world, "sft.py", processes, *argv)
    wait_for(lambda: len(log_lines(cut)) >= 30, 300, process)
    began = time.time()
    os.kill(process.pid, signal.SIGTERM)  # torchrun hands it on
    printed = process.communicate()[0].decode()
    assert process.returncode != 0 and time.time() - began < 30 and "SIGTERM" in printed, printed[-3000:]
    saved = list_checkpoints(cut)[-1][0]
    assert f"saved after step {saved}" in printed and saved >= 30
    for name in ("cut", "whole"):
        process = start_script(world, "sft.py", processes, *argv, "--out", tmp_path / name)
        printed = process.communicate()[0].decode()
        assert process.returncode == 0, printed[-3000:]
    assert same_weights(load_file(cut / "model.safetensors"), load_file(tmp_path / "whole/model.safetensors"))
    assert read_log(cut) == read_log(tmp_path / "whole")


@pytest.mark.parametrize("differs, told", [
    ("pairs", "content of --pairs"), ("data", "content of --data"), ("model", "content of --model"),
    ("flag", "lr 0.001 -> 0.5"),
])  # fmt: skip
def test_nodes_must_have_the_same(writer_dir, world, tmp_path, capfd, differs, told):
    """Bug story (Megatron-LM#907): a node with other rows or weights trained on, and annotate ended in a KeyError."""
    rows = json.loads((world / "rl.json").read_text())
    other_rows = {"pairs": rows[1:], "data": rows[::-1]}.get(differs, rows)
    for rank, own_rows in enumerate((rows, other_rows)):
        shutil.copytree(writer_dir, tmp_path / f"{rank}/model")
        (tmp_path / f"{rank}/rl.json").write_text(json.dumps(own_rows))
    if differs == "model":
        changed_copy(writer_dir, tmp_path / "1/model", lambda tensors: tensors["model.norm.weight"].mul_(1.5))

    def before(rank):  # each rank is a node with a folder of its own
        os.environ["LOCAL_RANK"] = "0"
        os.chdir(tmp_path / str(rank))
        if rank and differs == "flag":
            real = rl.parse_args
            rl.parse_args = lambda *given: real(*given, [*map(str, argv), "--lr", "0.5"])

    module, argv = rl, rl_flags("model", world, tmp_path / "out", data="rl.json", steps=1)
    if differs == "pairs":
        module, argv = data, ["annotate", "--pairs", "rl.json", "--media_root", world, "--teacher", "model", "--out",
                              tmp_path / "sft.json"]  # fmt: skip
    run_processes(module, argv, codes=1, before=before)
    printed = capfd.readouterr().err
    assert f"rank 1 on {os.uname().nodename} differs from rank 0" in printed and told in printed
    assert not (tmp_path / "out/args.json").exists()


def test_all_ranks_wait_for_the_toy_world(tiny_dir, world, tmp_path):
    """Bug story: at the toy's first start on two nodes the second one did not wait and found no sft.json."""
    out = tmp_path / "toy/sft.json"

    def write(folder, seed):
        time.sleep(1)
        folder.mkdir()
        shutil.copy(world / "sft.json", out)

    def before(rank):
        os.environ["LOCAL_RANK"] = "0"
        sft.PRESETS["toy"]["data"] = [str(out)]
        sft.write_toy = write

    run_processes(sft, flags(tiny_dir, world, tmp_path / "out", data=out, steps=1), before=before)
    assert len(read_log(tmp_path / "out")) == 1
