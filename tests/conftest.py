"""Shared by the tests: a tiny random Qwen2-VL with a toy tokenizer, and pictures. No downloads."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(1)


def picture(seed=0, width=70, height=56, mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory):
    """A random Qwen2-VL folder (the toy architecture) without the two embedding tokens."""
    from data import toy_model

    path = tmp_path_factory.mktemp("tiny")
    toy_model(path, seed=1)
    return path


@pytest.fixture(scope="session")
def embedder(tiny_dir):
    from model import Embedder

    return Embedder.from_pretrained(tiny_dir)
