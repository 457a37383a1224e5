"""One run on 1, 2, 4 and 8 ranks and on two nodes, replicated and sharded, has one result; kills of a rank, a torchrun
and a node.

A node is a torchrun with two ranks in a working folder of its own. Both torchruns are on this machine and meet on
loopback, started as docs/scale.md says. --out is one folder, as on a shared disk.

    python -m pytest tests/test_ranks.py -m slow
"""

import contextlib
import inspect
import json
import os
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, picture, read_log, run_processes
from test_eval import write_tasks
from test_faults import pids
from test_rl import flags as rl_flags
from test_scale import children, wait_for
from test_sft import flags, same_weights, weights

import eval as ev
import rl
import sft
from support.run import list_checkpoints

pytestmark = pytest.mark.slow
LAYOUTS = [(2, 1), (4, 1), (8, 1), (4, 2)]  # ranks, nodes
SHARDED = [(4, 1), (8, 1), (4, 2)]
TRAINING = [(ranks, nodes, False) for ranks, nodes in LAYOUTS] + [(ranks, nodes, True) for ranks, nodes in SHARDED]
LR = 1e-4

# ---- the runs --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def torchruns(script, argv, folder, nodes=2):
    """Yield one torchrun for each node, with two ranks each. Working folders and outputs are in `folder`, and so is
    --out. At the end kill what still runs, and print the outputs: a failed test shows them."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        meet = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{s.getsockname()[1]}"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", nodes, "--nproc_per_node", 2, *meet, script]
    started, outputs = [], []
    for node in range(nodes):
        (folder / f"node{node}").mkdir(parents=True, exist_ok=True)
        outputs.append(folder / f"node{node}/output.txt")
        with open(outputs[-1], "w") as output:
            started.append(subprocess.Popen(list(map(str, [*command, *argv])), cwd=folder / f"node{node}",
                                            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
                                            stdout=output, stderr=subprocess.STDOUT))  # fmt: skip
    try:
        yield started
    finally:
        for pid in pids(folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in started:
            process.wait()
        for path in outputs:
            print(f"---- {path.parent.name}\n{path.read_text()}")


def run_nodes(script, argv, folder, nodes=2):
    with torchruns(script, argv, folder, nodes) as started:
        assert [process.wait(timeout=300) for process in started] == [0] * nodes


def run(module, argv, folder, ranks, nodes=1):
    """Run a script on some ranks. On one node they are forks of this process. rl.py also records its tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    if nodes == 1:
        run_processes(module, argv, ranks, before=lambda rank: module is rl and record_tokens(rl, folder))
    elif module is rl:
        driver = folder / "rl.py"
        driver.write_text(f"import json, sys\nfrom pathlib import Path\nsys.path.insert(0, {str(ROOT)!r})\nimport rl\n"
                          f"{inspect.getsource(record_tokens)}\nrecord_tokens(rl, Path({str(folder)!r}))\n"
                          "from support.run import run_script\nrun_script(rl.main)\n")  # fmt: skip
        run_nodes(driver, argv, folder)
    else:
        run_nodes(ROOT / f"{module.__name__}.py", argv, folder)


def record_tokens(rl, folder):
    """Make rl.rollout write the tokens of a rank to folder/tokens-RANK-STEP.json: {side and row: G lists of ids}."""
    from support.run import processes

    real, calls = rl.rollout, []

    def rollout(embedder, rows, seeds, args):
        rollouts = real(embedder, rows, seeds, args)
        calls.append(1)
        sides = ["query"] * (len(rows) // 2) + ["target"] * (len(rows) // 2)
        tokens = {f"{side} of {row.name}": [list(map(int, ids)) for ids in r.ids]
                  for side, row, r in zip(sides, rows, rollouts)}  # fmt: skip
        (folder / f"tokens-{processes()[0]}-{len(calls)}.json").write_text(json.dumps(tokens))
        return rollouts

    rl.rollout = rollout


def recorded_tokens(folder, ranks, step=1):
    """The tokens of all ranks together; every side of every row is in one rank."""
    parts = [json.loads((folder / f"tokens-{rank}-{step}.json").read_text()) for rank in range(ranks)]
    together = {name: tokens for part in parts for name, tokens in part.items()}
    assert len(together) == sum(map(len, parts))
    return together


# ---- the data --------------------------------------------------------------------------------------------------


def copies(rows, n):
    """n rows of one dataset with different texts: the rows again and again, each time about other things."""
    texts = [json.dumps(rows[i % len(rows)] | {"dataset_name": "one"}) for i in range(n)]
    return [json.loads(text.replace("thing", f"thing {i // len(rows)} of")) for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def folder(world, tmp_path_factory):
    """32 SFT rows, 16 RL rows and two tasks. Two rows of each file name an image that is missing."""
    folder = tmp_path_factory.mktemp("ranks")
    rows = copies(json.loads((world / "sft.json").read_text()), 32)
    for i in (7, 13):
        rows[i]["qry"]["image"] = ["images/0.png", "images/gone.png"]
    (folder / "sft.json").write_text(json.dumps(rows))
    rows = copies(json.loads((world / "rl.json").read_text()), 16)
    rows[1]["qry_image"] = rows[8]["qry_image"] = "images/gone.png"
    (folder / "rl.json").write_text(json.dumps(rows))
    write_tasks(folder)
    (folder / "images").mkdir()
    picture(0).save(folder / "images/x.png")
    return folder


def sft_argv(tiny_dir, world, folder, out, **more):
    return flags(tiny_dir, world, out, **dict(data=folder / "sft.json", batch_size=16, lr=LR, steps=2) | more)


def rl_argv(writer_dir, world, folder, out, **more):
    """Two optimiser steps on the rollouts of one step: the KL of the second one is not 0."""
    given = dict(data=folder / "rl.json", batch_size=16, lr=LR, steps=1, inner_steps=2, w_anchor=1.0)
    return rl_flags(writer_dir, world, out, **given | more)


def eval_argv(writer_dir, folder, out):
    return ["--model", writer_dir, "--root", folder, "--out", out, "--samples", 2, "--max_new_tokens", 16,
            "--workers", 0]  # fmt: skip


@pytest.fixture(scope="module")
def alone(tiny_dir, writer_dir, world, folder):
    """The folder of the three runs on one rank: sft, rl and eval."""
    alone = folder / "alone"
    run(sft, sft_argv(tiny_dir, world, folder, alone / "sft/out"), alone / "sft", 1)
    run(rl, rl_argv(writer_dir, world, folder, alone / "rl/out"), alone / "rl", 1)
    run(ev, eval_argv(writer_dir, folder, alone / "eval/out"), alone / "eval", 1)
    return alone


def skipped(out):
    return [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]


def assert_close_weights(out, want, start):
    """Adam's first steps are lr * sign(gradient), and rounding noise has any sign: a few weights may be apart."""
    before, a, b = (torch.cat([x[name].flatten() for name in sorted(weights(start))])
                    for x in (weights(start), weights(want), weights(out)))  # fmt: skip
    assert float(((a - before).abs() > 0.1 * LR).float().mean()) > 0.5, "the weights have hardly moved"
    apart = (a - b).abs()
    assert float((apart > 0.1 * LR).float().mean()) < 0.001 and float(apart.max()) < 4.1 * LR


# ---- one result ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks, nodes, fsdp", TRAINING)
def test_sft(tiny_dir, world, folder, alone, tmp_path, ranks, nodes, fsdp):
    """Losses, gradient norms, final weights and the list of skipped rows are those of one rank."""
    run(sft, sft_argv(tiny_dir, world, folder, tmp_path / "out", fsdp=fsdp), tmp_path, ranks, nodes)
    got, want = read_log(tmp_path / "out"), read_log(alone / "sft/out")
    for a, b in zip(want, got, strict=True):
        tolerance = 1e-5 if a["step"] == 1 else 1e-4
        assert b == pytest.approx(a, abs=tolerance, rel=tolerance)
    assert skipped(tmp_path / "out") == skipped(alone / "sft/out")
    assert sorted(line["row"].split()[-1] for line in skipped(tmp_path / "out")) == ["13", "7"]
    assert_close_weights(tmp_path / "out", alone / "sft/out", tiny_dir)


@pytest.mark.parametrize("ranks, nodes, fsdp", TRAINING)
def test_rl(writer_dir, world, folder, alone, tmp_path, ranks, nodes, fsdp):
    """Every token of the rollouts is that of one rank. So are rewards, KL, loss, final weights and the list of skipped
    rows."""
    run(rl, rl_argv(writer_dir, world, folder, tmp_path / "out", fsdp=fsdp), tmp_path, ranks, nodes)
    got, want = recorded_tokens(tmp_path, ranks), recorded_tokens(alone / "rl", 1)
    assert got == want and len(want) == 2 * 16
    assert len({str(ids) for group in want.values() for ids in group}) > 32, "the rollouts hardly differ"
    (a,), (b,) = read_log(alone / "rl/out"), read_log(tmp_path / "out")
    assert b == pytest.approx(a, abs=1e-6, rel=1e-4) and a["kl"] > 1e-3 and a["reward"] > 0
    assert skipped(tmp_path / "out") == skipped(alone / "rl/out")
    assert sorted(line["row"].split()[-1] for line in skipped(tmp_path / "out")) == ["1", "8"]
    assert_close_weights(tmp_path / "out", alone / "rl/out", writer_dir)


@pytest.mark.parametrize("ranks, nodes", LAYOUTS)
def test_eval(writer_dir, folder, alone, tmp_path, ranks, nodes):
    """Scores and answers of every query are those of one rank to the last digit, embeddings to 1e-5. With 8 ranks each
    has one input, and half of them have nothing to sample."""
    run(ev, eval_argv(writer_dir, folder, tmp_path / "out"), tmp_path, ranks, nodes)
    got, want = tmp_path / "out" / writer_dir.name, alone / "eval/out" / writer_dir.name
    for name in ("scores.json", "per_query.json"):
        a, b = (without_times(json.loads((out / name).read_text())) for out in (want, got))
        assert a == b and a
    a, b = embedded(want), embedded(got)
    assert a.keys() == b.keys() and len(a) == 8 + 4  # greedy, samples
    assert len({str(texts) for texts, _ in a.values()}) > 6, "the answers hardly differ"
    for key, (texts, embeddings) in a.items():
        assert b[key][0] == texts and b[key][1] == pytest.approx(embeddings, abs=1e-5)


def without_times(x):
    if not isinstance(x, dict):
        return x
    return {key: without_times(value) for key, value in x.items() if key not in ("seconds", "inputs/s", "out")}


def embedded(out):
    """What all ranks have written to the cache: {kind and key of an input: (texts, disc and gen embeddings)}."""
    found = {}
    for folder in (out / "cache").iterdir():
        for rows, file in ev.shards(folder):
            arrays = zip(rows, file.get_tensor("disc"), file.get_tensor("gen"))
            for (key, _, texts), disc, gen in arrays:
                found[folder.name, key] = texts, np.concatenate([disc, gen.flatten()])
    return found


# ---- kills -----------------------------------------------------------------------------------------------------


VICTIMS = {
    "rank": lambda torchruns: [children(torchruns[0])[1]],
    "torchrun": lambda torchruns: [torchruns[0].pid],
    "node": lambda torchruns: [torchruns[1].pid, *children(torchruns[1])],
}


@pytest.mark.parametrize("victim, nodes, fsdp", [
    ("rank", 1, False), ("torchrun", 2, True), ("node", 2, True), ("node", 2, False),
])  # fmt: skip
def test_kill(tiny_dir, world, folder, tmp_path, victim, nodes, fsdp):
    """A rank, one of two torchruns, or a node with all its processes gets SIGKILL, and all processes of all nodes end.
    The same command resumes from the last checkpoint and ends with the log and the bits of a run that was left alone.
    Replicas on four ranks are equal to rounding only: DDP orders its buckets by the first step after a start, and the
    order decides how four numbers are added up."""
    cut, unbroken = tmp_path / "cut", tmp_path / "unbroken"
    argv, unbroken_argv = (sft_argv(tiny_dir, world, folder, out, steps=16, save_every=2, workers=1, fsdp=fsdp)
                           for out in (cut, unbroken))  # fmt: skip
    run(sft, unbroken_argv, tmp_path, 2 * nodes)
    with torchruns(ROOT / "sft.py", argv, tmp_path, nodes) as started:
        log = cut / "log.jsonl"
        wait_for(lambda: log.exists() and len(log.read_text().splitlines()) >= 3, seconds=300)
        assert len(pids(cut)) >= nodes + 2 * nodes + 2 * nodes  # torchruns, ranks, loader workers
        for pid in VICTIMS[victim](started):
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not pids(cut), seconds=60)
        assert all(process.wait() != 0 for process in started)
    saved = list_checkpoints(cut)[-1][0]
    assert 2 <= saved < 16 and not (cut / "model.safetensors").exists()
    run_nodes(ROOT / "sft.py", argv, tmp_path, nodes)
    printed = "".join(path.read_text() for path in tmp_path.glob("node*/output.txt"))
    assert f"resuming after step {saved} " in printed
    a, b = read_log(unbroken), read_log(cut)
    assert len(b) == 16 and skipped(cut) == skipped(unbroken)
    if fsdp or nodes == 1:
        assert a == b and same_weights(weights(unbroken), weights(cut))
    else:
        assert all(y == pytest.approx(x, abs=1e-4, rel=1e-4) for x, y in zip(a, b))
        assert_close_weights(cut, unbroken, tiny_dir)
