"""`bench.py plan`: a time plan of the full recipe on 8 H100, by arithmetic only, beside the published GPU-hours.

Each quantity is one function, units in its docstring; everything that is not public is a row of the second table,
marked as an estimate. N: parameters that a token is multiplied with, so that reading it takes 2 N FLOPs. Passes over a
token: forward 2 N, backward 4 N, recomputation under checkpointing 2 N, GradCache's first pass or the reference 2 N.
"""

from dataclasses import dataclass, field, fields

import torch
from bench_scale import SIZES, random_model

G = 8
FORWARD, TRAIN, RECOMPUTE = 1, 3, 1  # passes, in units of a forward pass: 2 N a token
HOUR = 3600

# published
SFT_STEPS, SFT_BATCH = 5000, 1024  # 5.12 M pairs: 3.5 epochs of 1,463,338
RL_STEPS, RL_BATCH = 345, 32  # 11 K pairs, one epoch
GENERATED = 403  # tokens of an answer of the 2B at inference
H20_HOURS = {"SFT": 2336, "RL": 1344}  # GPU-hours, 2B
H20_SECONDS = 9.023  # an input of the 2B on one H20, batch size not stated
QUERIES = 36_000 + 34_940 + 12_590  # of the 78 tasks: image, video, documents

# GPUs, dense bf16 and memory (public data sheets)
GPUS, H100_FLOPS, H100_BYTES, H20_FLOPS = 8, 989e12, 3.35e12, 148e12


def estimate(value, meaning):
    return field(default=value, metadata={"meaning": meaning})


@dataclass(frozen=True)
class Estimates:
    """What is not public."""

    train_share: float = estimate(0.18, "share of the peak FLOP/s in training and prefill: SFT of the 2B on one H100")
    decode_share: float = estimate(0.38, "share of the peak bandwidth in decoding: 64 slots of the 2B on one H100")
    host_ms: float = estimate(4.2, "least ms of a decode step and its sampling: 1 slot, 64 rows sampled, one H100")
    text: int = estimate(100, "text tokens of a prompt: instruction, template, question")
    visual: int = estimate(324, "visual tokens of a row; pairs: 40 % images (400 tokens), 48 % videos (at most 128), "
                                "12 % pages (3,010)")  # fmt: skip
    picture: int = estimate(1900, "visual tokens of the picture around an average visual token: the ViT's attention")
    answer: int = estimate(470, "tokens of an SFT answer: published 2,057 and 2,198 characters a side, at 4.5 a token")
    tail: float = estimate(2.9, "longest of 64 completions as a multiple of the mean: lognormal, sigma 0.5")
    rl_slots: int = estimate(64, "completions decoded at once in RL: the 8 prompts of a process x G")
    eval_slots: int = estimate(64, "completions decoded at once in evaluation; a free slot is filled again")
    candidates: int = estimate(230_000, "candidates of the 78 tasks; 44,015 are known, the other pools are guessed")


@dataclass(frozen=True)
class Counts:
    """Parameters of a model by their use, and its shape."""

    layers: float  # N of the language model's layers
    head: float  # N of the head
    vision: float  # N of the ViT, for each of the 4 patches of a visual token
    width: int  # of all query heads of a layer together
    depth: int
    vision_width: int
    vision_depth: int
    kv_bytes: int  # of a token's keys and values, bf16


def counts(size):
    """size: of bench_scale.SIZES -> Counts"""
    with torch.device("meta"):
        model = random_model(**SIZES[size])
    number = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    text, vision = model.config.text_config, model.config.vision_config
    head_dim = text.hidden_size // text.num_attention_heads
    return Counts(
        layers=number(model.model.language_model.layers),
        head=text.vocab_size * text.hidden_size,
        vision=number(model.model.visual),
        width=text.hidden_size,
        depth=text.num_hidden_layers,
        vision_width=vision.embed_dim,
        vision_depth=vision.depth,
        kv_bytes=2 * text.num_hidden_layers * text.num_key_value_heads * head_dim * 2,
    )


# ---- quantities ------------------------------------------------------------------------------------------------


def matmul_flops(parameters, tokens, passes=FORWARD):
    """FLOPs of tokens through matrices of so many parameters; passes in units of a forward pass."""
    return 2 * parameters * tokens * passes


def attention_flops(queries, keys, width, depth, passes=FORWARD):
    """FLOPs of scores and weighted sums of all layers: each of the queries sees `keys` keys on average."""
    return 4 * queries * keys * width * depth * passes


def row_flops(c, tokens, passes=FORWARD):
    """FLOPs of a causal row of so many tokens through the layers, without the head."""
    attention = attention_flops(tokens, tokens / 2, c.width, c.depth, passes)
    return matmul_flops(c.layers, tokens, passes) + attention


def vision_flops(c, visual, picture):
    """FLOPs of one forward pass of the ViT over so many visual tokens (4 patches each), in pictures of `picture`."""
    attention = attention_flops(4 * visual, 4 * picture, c.vision_width, c.vision_depth)
    return matmul_flops(c.vision, 4 * visual) + attention


def sft_row_flops(c, prompt, answer, visual, picture):
    """FLOPs of a row in an SFT step: GradCache's pass, forward and backward, recomputation; the head reads the answer
    only, forward and backward and once more because its chunks are computed again; the frozen ViT runs once."""
    layers = row_flops(c, prompt + answer, FORWARD + TRAIN + RECOMPUTE)
    return layers + matmul_flops(c.head, answer, TRAIN + RECOMPUTE) + vision_flops(c, visual, picture)


def update_flops(c, prompt, answer):
    """FLOPs of a prompt with its G completions in RL's update: the reference's pass, forward and backward,
    recomputation. One packed row under the tree mask: the kernel computes all L x L scores."""
    passes = FORWARD + TRAIN + RECOMPUTE
    L = prompt + G * answer
    layers = matmul_flops(c.layers, L, passes) + attention_flops(L, L, c.width, c.depth, passes)
    return layers + matmul_flops(c.head, G * answer, passes)


def prefill_flops(c, prompt, visual, picture):
    """FLOPs of reading a prompt and its pictures once."""
    return row_flops(c, prompt) + vision_flops(c, visual, picture)


def decode_flops(c, keys):
    """FLOPs of one generated token that sees so many keys."""
    return matmul_flops(c.layers + c.head, 1) + attention_flops(1, keys, c.width, c.depth)


def weight_bytes_per_token(c, slots):
    """Bytes of bf16 weights that a step reads, shared out over the tokens that it makes, one a slot."""
    return 2 * (c.layers + c.head) / slots


def decode_seconds(c, steps, live, keys, e, host=True):
    """Seconds on one GPU of decode steps with so many live completions and keys each, on average: the longest of
    reading weights, keys and values, of arithmetic, and (with host) of the launches."""
    moved = weight_bytes_per_token(c, 1) + live * keys * c.kv_bytes
    by_memory = moved / (H100_BYTES * e.decode_share)
    by_flops = live * decode_flops(c, keys) / (H100_FLOPS * e.decode_share)
    return steps * max(by_memory, by_flops, e.host_ms / 1000 * host)


def training_seconds(flops, e):
    """Seconds on all GPUs together."""
    return flops / (GPUS * H100_FLOPS * e.train_share)


# ---- the recipe ------------------------------------------------------------------------------------------------


def parts_of(c, e):
    """-> rows of the table: [stage, part, FLOPs, bytes moved by decoding, hours on 8 GPUs, at best] with hours at
    best: decoding bounded by bandwidth, not by the host."""
    prompt = e.text + e.visual
    rows = []

    def compute(stage, part, flops):
        hours = training_seconds(flops, e) / HOUR
        rows.append((stage, part, flops, 0.0, hours, hours))

    def decode(stage, prompts, completions, slots, tail):
        """tail: 1 where slots are filled again; else all of a step wait for the longest."""
        keys = prompt + GENERATED / 2
        tokens = completions * GENERATED
        steps = tokens * tail / slots / GPUS  # of each GPU
        live = slots / tail  # on average
        hours = [decode_seconds(c, steps, live, keys, e, host) / HOUR for host in (True, False)]
        moved = GPUS * steps * (weight_bytes_per_token(c, 1) + live * keys * c.kv_bytes)
        compute(stage, "prefill", prompts * prefill_flops(c, prompt, e.visual, e.picture))
        rows.append((stage, "decode", tokens * decode_flops(c, keys), moved, *hours))

    sft_rows, rl_prompts = 2 * SFT_STEPS * SFT_BATCH, 2 * RL_STEPS * RL_BATCH
    compute("SFT", "all passes", sft_rows * sft_row_flops(c, prompt, e.answer, e.visual, e.picture))
    decode("RL", rl_prompts, rl_prompts * G, e.rl_slots, e.tail)
    compute("RL", "update", rl_prompts * update_flops(c, prompt, GENERATED))
    decode("evaluation", QUERIES + e.candidates, QUERIES + e.candidates, e.eval_slots, 1)
    return rows


def table_lines(sizes, e):
    """Only the 2B's hours are published; the last column is what their FLOPs at peak are worth on an H100."""
    published = H20_HOURS | {"evaluation": (QUERIES + e.candidates) * H20_SECONDS / HOUR}
    columns = ["", "EFLOP", "PB moved", f"hours on {GPUS} H100", "without host time", "H100-hours",
               "published H20-hours", f"x {H20_FLOPS / 1e12:.0f} / {H100_FLOPS / 1e12:.0f}"]  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for size in sizes:
        rows = parts_of(counts(size), e)
        for stage, h20 in published.items():
            parts = [row for row in rows if row[0] == stage]
            for _, part, flops, moved, hours, best in parts:
                cells = [f"{size} {stage}: {part}", f"{flops / 1e18:,.2f}", f"{moved / 1e15:,.1f}" if moved else "",
                         f"{hours:,.2f}", f"{best:,.2f}", f"{GPUS * hours:,.1f}", "", ""]  # fmt: skip
                lines.append(f"| {' | '.join(cells)} |")
            hours, best = (sum(row[k] for row in parts) for k in (4, 5))
            beside = [f"{h20:,.0f}", f"{h20 * H20_FLOPS / H100_FLOPS:,.0f}"] if size == "2b" else ["", ""]
            cells = [f"**{size} {stage}**", "", "", f"**{hours:,.1f}**", f"{best:,.1f}", f"**{GPUS * hours:,.0f}**"]
            lines.append(f"| {' | '.join(cells + beside)} |")
    return lines


def plan():
    """Prints the plan and what it assumes."""
    e = Estimates()
    lines = table_lines(SIZES, e)
    facts = {
        "SFT": f"{SFT_STEPS:,} steps of {SFT_BATCH:,} pairs: 3.5 epochs of 1,463,338",
        "RL": f"{RL_STEPS} steps of {RL_BATCH} pairs, G = {G} on each side",
        "evaluation": f"{QUERIES:,} queries of 78 tasks; {GENERATED} tokens and {1000 * H20_SECONDS:,.0f} ms an input",
        "H100": f"{H100_FLOPS / 1e12:.0f} TFLOP/s in bf16, dense; {H100_BYTES / 1e12} TB/s",
        "H20": f"{H20_FLOPS / 1e12:.0f} TFLOP/s in bf16, dense",
    }
    lines += ["", "| published | |", "|---|---|", *(f"| {name} | {fact} |" for name, fact in facts.items())]
    lines += ["", "| ESTIMATE (ours, not published) | value |", "|---|---|"]
    lines += [f"| {x.metadata['meaning']} | {getattr(e, x.name):,} |" for x in fields(e)]
    print("\n".join(lines))
