"""Peak memory of one function, measured so that nothing before it can hide it; shared by the tables of bench.py."""

import ctypes
import gc
import importlib
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def status(key):
    """A figure of /proc/self/status in MiB: VmRSS now, RssFile of it from files, VmHWM the peak of VmRSS."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{key}:")[1].split()[0]) / 1024


def peak_above(function):
    """MiB that function() has at its peak above what is held when it starts -> (MiB, its result).

    What was freed before (a model's first weights, pictures that became rows) is still resident in malloc's arenas: the
    function would fill it again and the peak would not move. So it goes back to the system first. Code of libraries
    that is read for the first time is no memory of the function: the growth of what is mapped from files is taken off.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # glibc: the free pages of all arenas
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
    resident, mapped = status("VmRSS"), status("RssFile")
    result = function()
    return status("VmHWM") - resident - (status("RssFile") - mapped), result


def in_fresh_process(module, call, tiny=False):
    """Value of an expression like "peak('update', 1, False)" of a module of tests/, from a process of its own on one
    thread, through JSON. tiny: from this process, which saves the imports; nobody reads those figures."""
    if tiny:
        return eval(call, vars(importlib.import_module(module)))
    paths = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/bench")]
    code = f"import sys, json; sys.path[:0] = {paths!r}; import torch, {module}; torch.set_num_threads(1); "
    code += f"print(json.dumps({module}.{call}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{module}.{call} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])
