"""`bench.py kills`: runs that are killed at random moments, again and again, against one that never was.

Each start is killed at a random moment by SIGKILL or a scheduler's signal, to one process or to all of them with their
loader workers; half of the times the next start does not wait for the old processes to end. A finished run must have
the weights and the log of the run that was left alone, bit by bit; a process that lives 60 s after its signal hangs.
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

ROOT = Path(__file__).resolve().parent.parent.parent
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
TIMING = ("pairs_per_s", "tokens_per_s", "data_wait_s", "rollout_s", "peak_memory_gib", "eta_s")


def start(module, argv, processes, output):
    """-> pids of the stage's processes, each the head of a process group: forks, so that torch is imported once."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    pids = []
    for rank in range(processes):
        pid = os.fork()
        if pid == 0:
            from support.program import run_script

            os.setpgid(0, 0)
            os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
            os.dup2(1, 2)
            if processes > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            sys.argv = [f"{module.__name__}.py", *map(str, argv)]
            run_script(module.main)
            os._exit(0)
        pids.append(pid)
    return pids


def ended(pids, seconds):
    """Waits for them -> exit codes, None for one that still lives; those are killed."""
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


def result(out):
    """Weights' bytes and the log without wall-clock figures."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    lines = [{key: value for key, value in line.items() if key not in TIMING} for line in lines]
    return (out / "model.safetensors").read_bytes(), lines


def killed_runs(module, argv, processes, kills, folder, rng):
    """-> {figure: count} of one stage."""
    whole = folder / "whole"
    began = time.time()
    assert ended(start(module, [*argv, "--out", whole], processes, folder / "whole.txt"), 300) == [0] * processes
    duration, want = time.time() - began, result(whole)
    found = dict(kills=0, runs=0, refused=0, hangs=0, wrong_weights=0, wrong_logs=0)
    while found["kills"] < kills:
        out, old = folder / f"cut{found['runs']}", []
        argv_out = [*argv, "--out", out]
        while not (out / "args.json").exists() or not json.loads((out / "args.json").read_text()).get("finished"):
            pids = start(module, argv_out, processes, folder / "cut.txt")
            alone = not old
            time.sleep(rng.uniform(0.2, 0.8) * duration)
            if alone:  # the others are only there to be refused, or to take over
                number, all_of_them = rng.choice(SIGNALS), rng.random() < 0.5
                for pid in pids if all_of_them else [rng.choice(pids)]:
                    try:
                        os.killpg(pid, number) if all_of_them else os.kill(pid, number)
                    except ProcessLookupError:  # it had finished
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
        got = result(out)
        found["runs"] += 1
        found["wrong_weights"] += got[0] != want[0]
        found["wrong_logs"] += got[1] != want[1]
    return found


def kills(count, seed=0):
    """Prints the table. count: kills in all, shared out over the four kinds of runs."""
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/bench")]
    import torch
    from toy_base import toy_model

    import rl
    import sft
    from support.toy import write_toy

    torch.set_num_threads(1)
    folder, rng, total = Path(tempfile.mkdtemp()), random.Random(seed), {}
    toy_model(folder / "tiny", seed=1)
    write_toy(folder / "toy", pairs=8, rl_pairs=8, dev=2, test=2, candidates=4)
    common = ["--model", folder / "tiny", "--media_root", folder / "toy", "--cache", folder / "cache",
              "--batch_size", 8, "--workers", 1, "--save_every", 3]  # fmt: skip
    sft_argv = [*common, "--data", folder / "toy/sft.json", "--steps", 12, "--micro_batch", 4]
    rl_argv = [*common, "--data", folder / "toy/rl.json", "--steps", 6, "--max_new_tokens", 8, "--G", 2]
    cases = {"sft": (sft, sft_argv), "rl": (rl, rl_argv)}
    print("| stage, processes | kills | runs | refused starts | hangs | wrong weights | wrong logs |")
    print("|---|---|---|---|---|---|---|")
    for stage, (module, argv) in cases.items():
        for processes in (1, 2):
            place = folder / f"{stage}{processes}"
            place.mkdir()
            found = killed_runs(module, argv, processes, -(-count // 4), place, rng)
            total = {key: total.get(key, 0) + n for key, n in found.items()}
            print(f"| {stage}, {processes} |", " | ".join(str(n) for n in found.values()), "|", flush=True)
    print("| all |", " | ".join(str(n) for n in total.values()), "|")
    return int(any(total[key] for key in ("hangs", "wrong_weights", "wrong_logs")))
