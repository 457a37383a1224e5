"""`bench.py kills`: kill runs at random moments, again and again, and compare them with an unbroken run.

SIGKILL or a scheduler's signal hits one rank, or all ranks with their loader workers. Half of the times the next start
does not wait for the old processes to end. A finished run must have the weights and the log of the unbroken run, bit by
bit. A process that lives 60 s after its signal hangs.
"""

import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

import torch
from conftest import read_log
from toy_base import toy_model

import rl
import sft
from support.program import run_script
from support.toy import write_toy

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


def start(module, argv, ranks, output):
    """Return the pids of the ranks, each the leader of a process group. They are forks, so torch is imported once."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    pids = []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, 0)
            os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
            os.dup2(1, 2)
            if ranks > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            sys.argv = [f"{module.__name__}.py", *map(str, argv)]
            run_script(module.main)
            os._exit(0)
        pids.append(pid)
    return pids


def ended(pids, seconds):
    """Wait for the processes and return their exit codes, None for a process that still lives. Kill these."""
    codes, until = {}, time.time() + seconds
    while len(codes) < len(pids) and time.time() < until:
        for pid in set(pids) - codes.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    for pid in set(pids) - codes.keys():
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return [codes.get(pid) for pid in pids]


def killed_runs(module, argv, ranks, kills, folder, rng):
    """Return {column: count} of one stage."""
    unbroken = folder / "unbroken"
    began = time.time()
    assert ended(start(module, [*argv, "--out", unbroken], ranks, folder / "unbroken.txt"), 300) == [0] * ranks
    duration = time.time() - began
    found = dict(kills=0, runs=0, refused=0, hangs=0, wrong_weights=0, wrong_logs=0)
    while found["kills"] < kills:
        out, old = folder / f"cut{found['runs']}", []
        argv_out = [*argv, "--out", out]
        while not (out / "args.json").exists() or not json.loads((out / "args.json").read_text()).get("finished"):
            pids = start(module, argv_out, ranks, folder / "cut.txt")
            alone = not old
            time.sleep(rng.uniform(0.2, 0.8) * duration)
            if alone:  # otherwise it is refused, or it takes over
                number, all_of_them = rng.choice(SIGNALS), rng.random() < 0.5
                for pid in pids if all_of_them else [rng.choice(pids)]:
                    try:
                        os.killpg(pid, number) if all_of_them else os.kill(pid, number)
                    except ProcessLookupError:  # it has finished
                        continue
                found["kills"] += 1
            if alone and rng.random() < 0.5:
                old = pids  # the next start does not wait
                continue
            codes = ended(pids, 60 if alone else 300)
            found["hangs"] += None in codes + (ended(old, 60) if old else [])
            found["refused"] += not alone and 1 in codes
            old = []
        if old:
            found["hangs"] += None in ended(old, 60)
        found["runs"] += 1
        weights, want = ((folder / "model.safetensors").read_bytes() for folder in (out, unbroken))
        found["wrong_weights"] += weights != want
        found["wrong_logs"] += read_log(out) != read_log(unbroken)  # without wall-clock values
    return found


def kills(args, _run):
    """Print the table. args.count: kills in all, divided among the four kinds of runs."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    folder, rng, total = Path(tempfile.mkdtemp()), random.Random(args.seed), {}
    toy_model(folder / "tiny", seed=1)
    write_toy(folder / "toy", pairs=8, rl_pairs=8, dev=2, test=2, candidates=4)
    common = ["--model", folder / "tiny", "--media_root", folder / "toy", "--cache", folder / "cache",
              "--batch_size", 8, "--workers", 1, "--save_every", 3]  # fmt: skip
    sft_argv = [*common, "--data", folder / "toy/sft.json", "--steps", 12, "--pass_tokens", 500]
    rl_argv = [*common, "--data", folder / "toy/rl.json", "--steps", 6, "--max_new_tokens", 8, "--G", 2]
    print("| stage, ranks | kills | runs | refused starts | hangs | wrong weights | wrong logs |")
    print("|---|---|---|---|---|---|---|")
    for module, argv in ((sft, sft_argv), (rl, rl_argv)):
        for ranks in (1, 2):
            stage = module.__name__
            runs = folder / f"{stage}{ranks}"
            runs.mkdir()
            found = killed_runs(module, argv, ranks, -(-args.count // 4), runs, rng)
            total = {key: total.get(key, 0) + n for key, n in found.items()}
            print(f"| {stage}, {ranks} |", " | ".join(str(n) for n in found.values()), "|", flush=True)
    print("| all |", " | ".join(str(n) for n in total.values()), "|")
    return int(any(total[key] for key in ("hangs", "wrong_weights", "wrong_logs")))
