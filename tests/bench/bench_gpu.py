"""`bench.py gpu`: speed and memory of the real 2B with random weights on one GPU. Two minutes on a card of 80 GB.

The column `expected` was written before anything had run on a GPU.
"""

import statistics
import subprocess
import time

import numpy as np
import torch
import transformers
from bench_scale import SIZES, random_model, random_pairs, toy_tokenizer
from conftest import generate_all, transformers_read

import rl
import sft
from data import Row, mrope_positions
from model import Embedder, Prompt, sample
from support.decode import Decoder
from support.distributed import start_processes
from support.head import sampling_logits

TINY = dict(hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2, vocab_size=2000,
            num_hidden_layers=3, depth=2, tie=True)  # fmt: skip
GIB = 2**30
PEAK = 989e12  # dense bf16 FLOP/s of an H100 by its datasheet


def milliseconds(run, repeats=20):
    """Return the median of `repeats` runs, each timed on the GPU after a warm-up."""
    for _ in range(3):
        run()
    found = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end))
    return statistics.median(found)


def seconds(run):
    torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def peak_gib(run):
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / GIB


def print_row(what, measured, expected=""):
    print(f"| {what} | {measured} | {expected} |", flush=True)


def make_model(size, dtype=torch.float32):
    torch.manual_seed(0)
    with torch.device("cuda"):
        backbone = random_model(**size).to(dtype)
    model = Embedder(backbone, toy_tokenizer()).to("cuda")
    model.banned = torch.arange(300, 330, device="cuda")  # as many as with the real tokenizer
    backbone.config.image_token_id, backbone.config.video_token_id = model.media_ids
    backbone.model.visual.requires_grad_(False)
    return model


def page_prompt(model, side, name):
    """Return a prompt with an image of side x side visual tokens."""
    grid = np.array([[1, 2 * side, 2 * side]])
    pixels = np.random.default_rng(0).integers(0, 256, (4 * side * side, 1176), np.uint8)
    ids = np.concatenate([[11] * 5, [model.media_ids[0]] * side**2, [12] * 60, [model.disc_id], [13] * 40])
    positions = mrope_positions(ids, grid, model.media_ids)
    return Row(ids, positions, len(ids), 5 + side**2 + 60, -1, pixels, grid, name)


def text_prompt(model, n, name="text"):
    ids = np.random.default_rng(0).integers(10, 250, n)
    ids[n - 5] = model.disc_id
    positions = np.broadcast_to(np.arange(n), (3, n))
    empty = np.zeros((0, 1176), np.uint8), np.zeros((0, 3), int)
    return Row(ids, positions, n, n - 5, -1, *empty, name)


def ceilings():
    a = torch.randn(2**28, device="cuda")
    b = torch.empty_like(a)
    copy = milliseconds(lambda: b.copy_(a))
    x, y = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = milliseconds(lambda: x @ y)
    print_row("copy on the device, TB/s read and written", f"{2 * a.nbytes / copy / 1e9:.2f}", "3.0")
    print_row("8192 x 8192 x 8192 product in bf16, TFLOP/s", f"{2 * 8192**3 / product / 1e9:.0f}", "800")


@torch.no_grad()
def decode_step(model, slots, keys, expected):
    """Time a step of transformers, of ours, and of ours as a CUDA graph; expected: a cell of each."""
    decoder = Decoder(model.backbone, slots, torch.bfloat16)
    tokens, index, positions = [7] * slots, [keys - 2] * slots, [keys - 2] * slots
    inputs = torch.tensor([tokens, index, positions], device="cuda")
    decoder.make_room(keys)
    K = decoder.cache.capacity
    read = transformers_read(model.backbone, bf16=True)

    def measured(what, run, expected=""):
        print_row(f"decode step, {slots} slots, {keys:,} keys, ms: {what}", f"{milliseconds(run):.2f}", expected)

    with torch.autocast("cuda", torch.bfloat16):  # one autocast around all, so the weights are cast once
        measured("transformers", lambda: read(decoder, inputs, keys), expected[0])
    measured("own", lambda: decoder.run(inputs, K), expected[1])
    measured("own, as a graph", lambda: decoder.step(tokens, index, positions), expected[2])
    hidden = torch.randn(slots, model.width, device="cuda", dtype=torch.bfloat16)
    chances = [0.5] * slots
    logits = lambda: sampling_logits(decoder.head(hidden), model.banned, 1.0)  # noqa: E731
    measured("the head and the sampling after it", lambda: sample(logits(), chances))


def rollouts(model, n_prompt, n_tokens):
    """8 prompts x 8 completions, as a micro-batch of RL."""
    rows = [text_prompt(model, n_prompt) for _ in range(8)]

    def run(n):
        return list(model.generate([Prompt(k, row, seed=k) for k, row in enumerate(rows)], G=8, max_new_tokens=n))

    run(8)
    first = seconds(lambda: run(1))
    done = []
    total = seconds(lambda: done.extend(run(n_tokens)))
    steps = max(len(ids) for _, r in done for ids in r.ids)
    each = 1e3 * (total - first) / max(1, steps - 1)
    print_row(f"rollout, 64 completions of {n_prompt:,} + {steps}: prefill and set-up, s", f"{first:.2f}")
    print_row("the same: a token of all 64, sampling and graphs included, ms", f"{each:.2f}", "5 to 8")


def sft_steps(model, n, pass_tokens):
    model.train()
    pairs = random_pairs(n, model)
    args = sft.Settings(pass_tokens=pass_tokens)
    sft.sft_step(model, random_pairs(n, model), args)  # the first use loads the kernels
    took = seconds(lambda: sft.sft_step(model, pairs, args))
    pairs = random_pairs(n, model)
    peak = peak_gib(lambda: sft.sft_step(model, pairs, args))
    tokens = sum(len(row.ids) for pair in pairs for row in (pair.query, pair.target))
    layers = sum(p.numel() for p in model.backbone.model.language_model.layers.parameters())
    flops = (2 + 2 + 2 + 4) * layers * tokens  # pass 1; pass 3 forward, again for the backward, backward
    padding = sft.rows_of_step(pairs, pass_tokens, model.device).padding
    label = f"SFT step of {n} pairs ({tokens:,} tokens, {padding:.1%} pads), --pass_tokens {pass_tokens:,}"
    share = f"{flops / took / PEAK:.0%} of 989 TFLOP/s, layers only"
    print_row(f"{label}: tokens/s", f"{tokens / took:,.0f} ({share})", "> 35 %")
    print_row(f"{label}: peak, GiB, without the optimiser's 11.5", f"{peak:.1f}", "< 45")


def update_passes(model, prompt, length, n):
    """Run n groups in one pass, each a prompt and 8 completions, through reference and policy."""
    row = text_prompt(model, prompt)
    completions = [[7] * (length - 2) + [model.gen_id, model.end_id] for _ in range(8)]
    done = rl.Rollouts(
        disc=torch.zeros(model.width, device="cuda"), gen=torch.zeros(8, model.width, device="cuda"),
        valid=torch.ones(8, dtype=torch.bool), ids=completions, logp=[[0.0] * length] * 8, gen_at=[length - 2] * 8,
    )  # fmt: skip
    groups = [rl.Group(row, done, torch.linspace(-1, 1, 8, device="cuda"), True)] * n
    run = lambda: rl.update(model, model, groups, rl.Settings(pass_tokens=40_000))  # noqa: E731
    model.train()
    run()
    peak = peak_gib(run)
    took = seconds(run)
    tokens = n * (prompt + 8 * length)
    layers = sum(p.numel() for p in model.backbone.model.language_model.layers.parameters())
    share = (2 + 2 + 2 + 4) * layers * tokens / took / PEAK
    label = f"RL update of {n} group(s), {prompt:,} + 8 x {length:,} tokens each"
    print_row(f"{label}, s", f"{took:.2f} ({share:.0%} of 989 TFLOP/s, layers only)")
    print_row(f"{label}, peak, GiB", f"{peak:.1f}", "< 60")


def evaluation(model, inputs, side, tokens, slots):
    """Generate for evaluation in bf16: pages with `tokens` generated tokens each."""
    pages = [page_prompt(model, side, str(k)) for k in range(inputs)]

    def write(n_inputs, n_tokens):
        return generate_all(model, pages[:n_inputs], script=[[[7] * n_tokens]] * n_inputs, slots=slots)

    write(1, 4)
    took = seconds(lambda: write(inputs, tokens))
    peak = peak_gib(lambda: write(inputs, 4))
    print_row(f"embed: {inputs} pages of {side**2:,} visual tokens, {tokens} written, {slots} slots: ms an input",
              f"{1e3 * took / inputs:.0f}", "published: 9,023")  # fmt: skip
    print_row("the same: peak of the prefills, GiB", f"{peak:.1f}")


def gpu(args, _run):
    tiny = args.tiny
    start_processes()  # also switches cuDNN's attention off
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, transformers {transformers.__version__}, "
          f"commit {commit or 'unknown'}; random weights in the sizes of Qwen2-VL-2B\n")  # fmt: skip
    size = TINY if tiny else SIZES["2b"]
    print_row("", "measured", "expected")
    print_row("---", "---", "---")
    ceilings()
    model = make_model(size)
    model.bf16 = True
    for slots, *expected in ((64, "14 to 22", "5 to 8", "3 to 4.5"), (8, "", "", ""), (1, "", "", "")):
        decode_step(model, slots, 300 if tiny else 2200, expected)
    rollouts(model, 100 if tiny else 1500, 20 if tiny else 400)
    model.backbone.activation_checkpointing_enable({"use_reentrant": False})
    model.backbone.model.visual.merger.requires_grad_(True)
    for n, pass_tokens in ((4, 1000),) if tiny else ((128, 8192), (128, 16_384), (128, 32_768)):
        sft_steps(model, n, pass_tokens)
    model.backbone.model.visual.requires_grad_(False)
    for case in ((60, 30, 2),) if tiny else ((500, 400, 1), (500, 400, 2), (500, 400, 4), (1500, 2048, 1)):
        update_passes(model, *case)
    del model
    torch.cuda.empty_cache()
    model = make_model(size, torch.bfloat16).eval()
    evaluation(model, *((4, 6, 8, 2) if tiny else (128, 54, 400, 64)))
