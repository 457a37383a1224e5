"""Full scale, as far as a CPU can show it: sharding, processes, kills, guards, files of millions of rows."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, read_log, run_here, run_processes
from safetensors.torch import load_file
from test_rl import flags as rl_flags
from test_sft import flags, same_weights, small, train, weights

import data as data_file
import model as model_file
import rl
import sft
from data import PairData, Rows, index_rows, read_rows, scan_rows
from model import Embedder, list_checkpoints, load_checkpoint, save_checkpoint

# ---- sharding --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [dict(micro_batch=1, checkpointing=True), dict(micro_batch=3, train_vision=True)])
def test_fsdp_equals_ddp(tiny_dir, world, tmp_path, more):
    """Two sharded processes have the losses, gradient norms and final weights of two replicated ones; texts without
    pictures, skipped pairs and a trained vision tower included. The final model is a plain folder."""
    rows = json.loads((world / "sft.json").read_text())
    rows[7]["qry"] = rows[7]["qry"] | {"image": ["images/0.png", "images/gone.png"]}
    (world / "sft_gone.json").write_text(json.dumps(rows))
    more = dict(data=world / "sft_gone.json", batch_size=6, lr=1e-4, steps=3) | more
    run_processes(sft, flags(tiny_dir, world, tmp_path / "ddp", **more))
    run_processes(sft, flags(tiny_dir, world, tmp_path / "fsdp", fsdp=True, **more))
    for a, b in zip(read_log(tmp_path / "ddp"), read_log(tmp_path / "fsdp"), strict=True):
        assert b == pytest.approx(a, abs=1e-4, rel=1e-5 if a["step"] == 1 else 1e-3)
    a, b = weights(tmp_path / "ddp"), weights(tmp_path / "fsdp")
    assert a.keys() == b.keys() and not same_weights(a, weights(tiny_dir))
    away = torch.cat([(a[name] - b[name]).abs().flatten() for name in a])
    assert float((away > 1e-5).float().mean()) < 0.01 and float(away.max()) < 7e-4  # Adam: lr * sign of rounding noise
    Embedder.from_pretrained(tmp_path / "fsdp")
