"""The commands of bench.py still run, and freed memory does not hide the peak that they measure."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from bench_common import in_fresh_process, peak_above, status
from conftest import ROOT


@pytest.mark.slow
@pytest.mark.parametrize("command", ["toy", "data", "rollout", "rl", "sft", "memory", "kills"])
def test_every_bench_runs(command):
    """A broken command could not print its table again."""
    done = subprocess.run([sys.executable, str(ROOT / "tests/bench/bench.py"), command, "--tiny"], cwd=ROOT,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    assert "\n|---|" in done.stdout, done.stdout


def after_freeing(blocks):
    """Return the peak MiB of a function that needs 100, after 200 MiB in `blocks` pieces were used and freed.

    The second value is the peak above the resident memory, measured without the care of peak_above.
    """
    def needs_100():
        return len([bytearray(b"x") * (2**20 // 4) for _ in range(400)])

    def fill():  # what it returns comes after the freed pieces, so that malloc cannot shrink its heap from the end
        parts = [bytearray(b"x") * (200 * 2**20 // blocks) for _ in range(blocks)]
        return len(parts), bytearray(300_000)

    bytearray(b"x") * (30 * 2**20)  # freed at once: from now on malloc puts blocks of up to 30 MiB into its heap
    kept = fill()
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    needs_100()
    careless = status("VmHWM") - before
    kept = fill(), kept
    return peak_above(needs_100)[0], careless


@pytest.mark.parametrize("blocks", [8, pytest.param(800, marks=pytest.mark.slow),
                                    pytest.param(20_000, marks=pytest.mark.slow)])  # fmt: skip
def test_freed_memory_hides_no_peak(blocks):
    """A function that only reuses pages that loading has freed still shows its peak. The careless value does not."""
    found, careless = in_fresh_process("test_bench", f"after_freeing({blocks})")
    assert 85 <= found <= 115, found
    assert careless < 50, careless
