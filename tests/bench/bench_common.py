"""What the benches share: starting a script, a fresh process for one value, the peak memory of a function, --tiny."""

import ctypes
import gc
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PATHS = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/bench")]
sys.path[:0] = PATHS

TINY = dict(seeds=1, count=4, cross=[])
TINY_FLAGS = {
    "sft.py": ["--steps", 1, "--batch_size", 4, "--lr", 1e-6, "--workers", 0],
    "rl.py": ["--steps", 1, "--batch_size", 4, "--max_new_tokens", 24, "--workers", 0],
    "eval.py": ["--max_new_tokens", 24, "--workers", 0],
}


def run(script, *flags):
    """Start one of the six scripts on one thread, as a user would. Its output is written to a file in --out."""
    out = Path(flags[flags.index("--out") + 1])
    out.mkdir(parents=True, exist_ok=True)
    output = out / f"{Path(script).stem}.out"
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_MININTERVAL": "30"}
    with open(output, "w") as file:
        done = subprocess.run(command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{output.read_text()[-2000:]}")


def shrink(args, folder):
    """Set the arguments to the smallest size, with all output in the folder. Return a function like `run`."""
    for name, value in {**TINY, "out": str(folder / "out"), "data": str(folder / "world")}.items():
        if hasattr(args, name):
            setattr(args, name, value)
    if args.command not in ("toy", "data"):
        return run
    from conftest import run_processes, train_writer
    from toy_base import toy_model

    import eval  # noqa: F401 (the scripts run in forks, so every import happens here)
    import rl  # noqa: F401
    import sft  # noqa: F401
    from support.toy import write_toy
    write_toy(folder / "world", pairs=4, rl_pairs=4, dev=2, test=2, candidates=4)
    toy_model(folder / "random", seed=1)
    writer = train_writer(folder / "writer", folder / "random", steps=25)  # without <gen_emb> nothing has a score

    def run_forked(script, *flags):
        model = ["--model", writer] if script == "sft.py" else []
        module = sys.modules[Path(script).stem]
        run_processes(module, [*flags, *TINY_FLAGS[script], *model], processes=1)

    return run_forked


def in_fresh_process(module, call, tiny=False):
    """Return the value of an expression of a module, such as "peak('step', 1, False)", through JSON.

    A fresh process on one thread computes it. With tiny, this process does.
    """
    if tiny:
        return eval(call, vars(importlib.import_module(module)))
    code = f"import sys, json; sys.path[:0] = {PATHS!r}; import torch, {module}; torch.set_num_threads(1); "
    code += f"print(json.dumps({module}.{call}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{module}.{call} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def status(key):
    """Return a value of /proc/self/status in MiB: VmRSS now, RssFile of it from files, VmHWM the peak of VmRSS."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{key}:")[1].split()[0]) / 1024


def peak_above(function):
    """Return (peak MiB of function() above what is held when it starts, its result).

    Freed memory stays resident in malloc's arenas. The function would reuse it and the peak would not move, so it is
    returned to the system first. Library code that is read for the first time is no memory of the function, so the
    growth of mapped files is subtracted.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # glibc: the free pages of all arenas
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is resident now
    resident, mapped = status("VmRSS"), status("RssFile")
    result = function()
    return status("VmHWM") - resident - (status("RssFile") - mapped), result
