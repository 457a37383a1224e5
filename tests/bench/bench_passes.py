"""`bench.py sft`: how --pass_tokens cuts an SFT step: padding, speed and memory with rows of different lengths.

published: lognormal with median 400, 5 % pages of 3,000 tokens. uneven: 100 to 6,000 tokens. equal: the same number of
tokens as uneven, in rows of one length. A small random model, gradient checkpointing as in the presets, one thread.
Memory: peak of a fresh process above the loaded model. Padding: as on a GPU, where lengths are rounded up.
"""

import time

import numpy as np
import torch
from bench_common import in_fresh_process, peak_above
from bench_engine import Size, make_embedder

import sft
from data import Pair, Row, mrope_positions
from support.passes import cut_into_passes, padding_share

SMALL = Size(heads=4, layers=4, vision_heads=1, vision_layers=1)


def lengths_of(kind, n):
    """Return the tokens of n rows."""
    rng = np.random.default_rng(0)
    uneven = np.geomspace(100, 6000, n).astype(int)
    published = np.where(rng.random(n) < 0.05, 3000, rng.lognormal(np.log(400), 0.6, n).astype(int))
    return {"published": published, "uneven": uneven, "equal": np.full(n, uneven.sum() // n)}[kind].tolist()


def text_pairs(embedder, lengths):
    """Return pairs of two text rows with these lengths."""
    rows = []
    for n in lengths:
        ids = np.full(n, 9)
        grids = np.zeros((0, 3), int)
        positions = mrope_positions(ids, grids, embedder.media_ids)
        rows.append(Row(ids, positions, n // 2, n // 2 - 1, n - 2, np.zeros((0, 1176), np.uint8), grids, "text"))
    return [Pair(q, t, k, True, "", "", "") for k, (q, t) in enumerate(zip(rows[::2], rows[1::2]))]


def step(kind, n, pass_tokens):
    """Return a function that runs one SFT step."""
    embedder = make_embedder(SMALL)
    embedder.backbone.activation_checkpointing_enable({"use_reentrant": False})
    embedder.train()
    pairs = text_pairs(embedder, lengths_of(kind, n))
    return lambda: sft.sft_step(embedder, pairs, sft.Settings(pass_tokens=pass_tokens))


def peak(kind, n, pass_tokens):
    run = step(kind, n, pass_tokens)
    embedder = make_embedder(SMALL)
    sft.sft_step(embedder, text_pairs(embedder, [8, 8]), sft.Settings())  # loads library code
    del embedder
    return peak_above(run)[0]


def passes(args, _run):
    torch.set_num_threads(1)
    head = ("rows", "tokens", "`--pass_tokens`", "passes", "padding", "tokens per CPU s", "MB")
    print(f"| {' | '.join(head)} |\n{'|---' * len(head)}|")
    n = 4 if args.tiny else 48
    for kind in ("published", "uneven", "equal"):
        lengths = lengths_of(kind, n)
        for pass_tokens in (8192, 16_384, 32_768):
            cut = cut_into_passes(lengths, pass_tokens, "cuda")
            padding = padding_share(lengths, cut, "cuda")
            began = time.process_time()
            step(kind, n, pass_tokens)()
            speed = sum(lengths) / (time.process_time() - began)
            mb = in_fresh_process("bench_passes", f"peak({kind!r}, {n}, {pass_tokens})", args.tiny)
            cells = [kind, f"{sum(lengths):,}", f"{pass_tokens:,}", len(cut), f"{padding:.1%}"]
            cells += [f"{speed:,.0f}", f"{mb:.0f}"]
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
