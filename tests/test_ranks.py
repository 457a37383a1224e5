"""A run has the same result on 1 to 8 ranks and on two nodes, with DDP and FSDP, and after a kill. A node is a torchrun
with two ranks and a working folder of its own. The two torchruns of this machine meet on loopback by the flags of
docs/scale.md. --out is one folder, as on a shared disk. Run: pytest tests/test_ranks.py -m slow"""

import contextlib
import inspect
import json
import os
import signal
import socket
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, flags, picture, pids, read_log, rl_flags, run_processes, same_weights, weights
from test_eval import write_tasks
from test_scale import children, wait_for

import eval as ev
import rl
import sft
from support.cache import shards
from support.checkpoint import list_checkpoints

pytestmark = pytest.mark.slow
LAYOUTS = [(2, 1), (4, 1), (8, 1), (4, 2)]  # ranks, nodes
TRAINING = [(*layout, False) for layout in LAYOUTS] + [(*layout, True) for layout in LAYOUTS[1:]]  # FSDP
LR = 1e-4


@contextlib.contextmanager
def torchruns(script, argv, folder, nodes=2):
    """Yield the torchruns of the nodes, two ranks each, working in `folder`. At the end kill and print what is left."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        meet = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{s.getsockname()[1]}"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", nodes, "--nproc_per_node", 2, *meet]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    started = []
    try:
        for node in range(nodes):
            (folder / f"node{node}").mkdir(exist_ok=True)
            with open(folder / f"node{node}.txt", "w") as output:
                # HOST is the first node. torchrun cannot see that here, because both nodes have its address
                command = [*torchrun, "--rdzv_conf", f"is_host={int(node == 0)}", script, *argv]
                started.append(subprocess.Popen(list(map(str, command)), cwd=folder / f"node{node}", env=env,
                                                stdout=output, stderr=subprocess.STDOUT))  # fmt: skip
        yield started
    finally:
        for pid in pids(folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for node, process in enumerate(started):
            process.wait()
            print(f"---- node {node}\n{(folder / f'node{node}.txt').read_text()}")


def run_nodes(script, argv, folder, nodes=2):
    with torchruns(script, argv, folder, nodes) as started:
        assert [process.wait(timeout=300) for process in started] == [0] * nodes


def run(module, argv, folder, ranks, nodes=1):
    """Run a script on some ranks; on one node they are forks of this process. rl.py also records its tokens."""
    if nodes == 1:
        run_processes(module, argv, ranks, before=lambda rank: module is rl and record_tokens(rl, folder))
    elif module is rl:
        driver = folder / "rl.py"
        driver.write_text(f"import json, sys\nfrom pathlib import Path\nsys.path.insert(0, {str(ROOT)!r})\nimport rl\n"
                          f"{inspect.getsource(record_tokens)}\nrecord_tokens(rl, Path({str(folder)!r}))\n"
                          "from support.program import run_script\nrun_script(rl.main)\n")  # fmt: skip
        run_nodes(driver, argv, folder)
    else:
        run_nodes(ROOT / f"{module.__name__}.py", argv, folder)


def record_tokens(rl, folder):
    """Make rl.rollout write the tokens of its rank to folder/tokens-RANK.json: {side and row: G lists of ids}."""
    real = rl.rollout

    def rollout(embedder, rows, seeds, args):
        rollouts = real(embedder, rows, seeds, args)
        sides = ["query"] * (len(rows) // 2) + ["target"] * (len(rows) // 2)
        tokens = {f"{side} of {row.name}": [list(map(int, ids)) for ids in r.ids]
                  for side, row, r in zip(sides, rows, rollouts)}  # fmt: skip
        (folder / f"tokens-{rl.processes()[0]}.json").write_text(json.dumps(tokens))
        return rollouts

    rl.rollout = rollout


def recorded_tokens(folder, ranks):
    """The tokens of all ranks. No side of a row is on two ranks."""
    parts = [json.loads((folder / f"tokens-{rank}.json").read_text()) for rank in range(ranks)]
    gathered = {name: tokens for part in parts for name, tokens in part.items()}
    assert len(gathered) == sum(map(len, parts))
    return gathered


def copies(path, n, spoil):
    """Return n rows of one dataset: those of the file again and again, with other texts. Two have a missing image."""
    rows = json.loads(path.read_text())
    texts = [json.dumps(rows[i % len(rows)] | {"dataset_name": "one"}) for i in range(n)]
    rows = [json.loads(text.replace("thing", f"thing {i // len(rows)} of")) for i, text in enumerate(texts)]
    for i in (7, 13):
        spoil(rows[i])
    return json.dumps(rows)


@pytest.fixture(scope="module")
def argv_of(tiny_dir, writer_dir, world, tmp_path_factory):
    """Return argv_of(module, out, **flags) for 32 SFT rows, 16 RL rows or two tasks."""
    folder = tmp_path_factory.mktemp("data")
    gone = "images/gone.png"
    sft_rows = copies(world / "sft.json", 32, lambda row: row["qry"].update(image=["images/0.png", gone]))
    (folder / "sft.json").write_text(sft_rows)
    (folder / "rl.json").write_text(copies(world / "rl.json", 16, lambda row: row.update(qry_image=gone)))
    write_tasks(folder)
    (folder / "images").mkdir()
    picture(0).save(folder / "images/x.png")

    def argv_of(module, out, **more):
        if module is ev:
            return ["--model", writer_dir, "--root", folder, "--out", out, "--samples", 2, "--max_new_tokens", 16,
                    "--workers", 0]  # fmt: skip
        more |= dict(data=folder / f"{module.__name__}.json", batch_size=16, lr=LR)
        if module is sft:
            return flags(tiny_dir, world, out, **more)
        return rl_flags(writer_dir, world, out, steps=1, **more)

    return argv_of


@pytest.fixture(scope="module")
def alone(argv_of, tmp_path_factory):
    """Return the folder of the runs on one rank: sft, rl and eval."""
    folder = tmp_path_factory.mktemp("alone")
    for module in (sft, rl, ev):
        run(module, argv_of(module, folder / module.__name__), folder, 1)
    return folder


def assert_same_skipped(out, want):
    got, want = ((path / "skipped.jsonl").read_text() for path in (out, want))
    assert got == want and {json.loads(line)["row"].split()[-1] for line in got.splitlines()} == {"7", "13"}


def assert_close_weights(out, want, start):
    """Adam's first steps are lr * sign(gradient), and rounding noise has any sign: a few weights may be apart."""
    before, a, b = (torch.cat([x[name].flatten() for name in sorted(weights(start))])
                    for x in (weights(start), weights(want), weights(out)))  # fmt: skip
    assert float(((a - before).abs() > 0.1 * LR).float().mean()) > 0.5, "the weights have hardly moved"
    apart = (a - b).abs()
    assert float((apart > 0.1 * LR).float().mean()) < 0.001 and float(apart.max()) < 4.1 * LR


@pytest.mark.parametrize("ranks, nodes, fsdp", TRAINING)
def test_sft(tiny_dir, argv_of, alone, tmp_path, ranks, nodes, fsdp):
    """Losses, gradient norms, final weights and the list of skipped rows are those of one rank."""
    out, want = tmp_path / "out", alone / "sft"
    run(sft, argv_of(sft, out, fsdp=fsdp), tmp_path, ranks, nodes)
    for a, b in zip(read_log(want), read_log(out), strict=True):
        tolerance = 1e-5 if a["step"] == 1 else 1e-4
        assert b == pytest.approx(a, abs=tolerance, rel=tolerance)
    assert_same_skipped(out, want)
    assert_close_weights(out, want, tiny_dir)


@pytest.mark.parametrize("ranks, nodes, fsdp", TRAINING)
def test_rl(writer_dir, argv_of, alone, tmp_path, ranks, nodes, fsdp):
    """Tokens, rewards, KL, loss, final weights and the list of skipped rows are those of one rank."""
    out, want = tmp_path / "out", alone / "rl"
    run(rl, argv_of(rl, out, fsdp=fsdp), tmp_path, ranks, nodes)
    a, b = recorded_tokens(alone, 1), recorded_tokens(tmp_path, ranks)
    assert a == b and len(a) == 2 * 16
    assert len({str(ids) for group in a.values() for ids in group}) > 32, "the rollouts hardly differ"
    (a,), (b,) = read_log(want), read_log(out)
    assert b == pytest.approx(a, abs=1e-6, rel=1e-4) and a["kl"] == 0 and a["reward"] > 0
    assert_same_skipped(out, want)
    assert_close_weights(out, want, writer_dir)


@pytest.mark.parametrize("ranks, nodes", LAYOUTS)
def test_eval(writer_dir, argv_of, alone, tmp_path, ranks, nodes):
    """Scores and answers are those of one rank to the last digit, embeddings to 1e-5. Of 8 ranks half are idle."""
    run(ev, argv_of(ev, tmp_path / "out"), tmp_path, ranks, nodes)
    out, want = tmp_path / "out" / writer_dir.name, alone / "eval" / writer_dir.name
    for name in ("scores.json", "per_query.json"):
        a, b = (without_times(json.loads((path / name).read_text())) for path in (want, out))
        assert a == b and a
    a, b = embedded(want), embedded(out)
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
        for rows, file in shards(folder):
            for (key, _, texts), disc, gen in zip(rows, file.get_tensor("disc"), file.get_tensor("gen")):
                found[folder.name, key] = texts, [*disc, *gen.flatten()]
    return found


VICTIMS = {
    "rank": lambda torchruns: [children(torchruns[0])[1]],
    "torchrun": lambda torchruns: [torchruns[1].pid],
    "first node": lambda torchruns: [torchruns[0].pid, *children(torchruns[0])],
    "second node": lambda torchruns: [torchruns[1].pid, *children(torchruns[1])],
}


@pytest.mark.parametrize("victim, nodes, fsdp", [
    ("rank", 1, False), ("torchrun", 2, True), ("first node", 2, True), ("second node", 2, False),
])  # fmt: skip
def test_kill(tiny_dir, argv_of, tmp_path, victim, nodes, fsdp):
    """A rank, a torchrun or a node gets SIGKILL, and all nodes end. The same command resumes to the unbroken result."""
    cut, unbroken = tmp_path / "cut", tmp_path / "unbroken"
    argv, unbroken_argv = (argv_of(sft, out, steps=10, save_every=2, workers=1, fsdp=fsdp) for out in (cut, unbroken))
    run(sft, unbroken_argv, tmp_path, 2 * nodes)
    log = cut / "log.jsonl"
    with torchruns(ROOT / "sft.py", argv, tmp_path, nodes) as started:
        wait_for(lambda: log.exists() and len(log.read_text().splitlines()) >= 3, seconds=300)
        assert len(pids(cut)) >= 3 * nodes  # a torchrun and two ranks each, and loader workers
        for pid in VICTIMS[victim](started):
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not pids(cut), seconds=60)
        assert all(process.wait() != 0 for process in started)
    saved = list_checkpoints(cut)[-1][0]
    assert 2 <= saved < 10 and not (cut / "model.safetensors").exists()
    run_nodes(ROOT / "sft.py", argv, tmp_path, nodes)
    assert any(f"resuming after step {saved} " in path.read_text() for path in tmp_path.glob("node*.txt"))
    assert_same_skipped(cut, unbroken)
    a, b = read_log(unbroken), read_log(cut)
    assert len(a) == len(b) == 10
    if fsdp or nodes == 1:  # DDP on four ranks adds up the gradients of the first step in another order
        assert a == b and same_weights(weights(unbroken), weights(cut))
    else:
        assert all(y == pytest.approx(x, abs=1e-4, rel=1e-4) for x, y in zip(a, b))
        assert_close_weights(cut, unbroken, tiny_dir)
