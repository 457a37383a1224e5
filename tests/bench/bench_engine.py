"""Compare speed and memory of RL with the official recipe on a CPU: `bench.py rollout` and `bench.py rl`.

The official recipe is written here from its description, in plain transformers. generate() reads every prompt and image
G times. All logits of prompt and completion exist. The graphs of query and target are alive at once. The embeddings, so
the rewards, come from the policy's pass, and the reference reads the images again. Both sides have the same random
Qwen2-VL (text 8 x 512, vision 4 x 320, frozen), the same prompts and the same completions: a logits processor forces
them on generate(), a script on ours. Both compute the head and the sampling for every token.

Time: CPU seconds of the process on one thread, median of 3, the two sides in turn. Memory: peak of a fresh process
above the loaded model. A vocabulary of 10,240 gives the head its share of the work in the real 2B.
"""

import copy
import statistics
import time
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from bench_common import in_fresh_process, peak_above
from bench_scale import random_model, toy_tokenizer
from conftest import picture, processor_inputs, scripted
from transformers import LogitsProcessor

import rl
from data import encode_input
from model import Embedder
from reward import embedding_reward, format_reward, group_advantages

G = 8
SIDE = {300: 448, 1350: 1008, 120: 84}  # tokens of a prompt: side of its image, with 256, 1,296 and 9 visual tokens


@dataclass(frozen=True)
class Size:
    """Of the compared model, its prompts and its completions."""

    heads: int = 8  # of 64 dimensions
    layers: int = 8
    vision_heads: int = 4  # of 80 dimensions
    vision_layers: int = 4
    vocabulary: int = 10_240
    short: int = 300  # tokens of a prompt
    long: int = 1350
    longest: int = 128  # tokens of a completion
    median: int = 55


FULL = Size()
TINY = Size(heads=2, layers=2, vision_heads=1, vision_layers=1, vocabulary=2048, short=120, long=120, longest=8,
            median=6)  # fmt: skip


def make_embedder(size):
    torch.manual_seed(0)
    backbone = random_model(
        64 * size.heads, tie=True, num_hidden_layers=size.layers, intermediate_size=256 * size.heads,
        num_attention_heads=size.heads, num_key_value_heads=size.heads // 4 or 1, vocab_size=size.vocabulary,
        depth=size.vision_layers, embed_dim=80 * size.vision_heads, heads=size.vision_heads,
    )  # fmt: skip
    embedder = Embedder(backbone, toy_tokenizer())
    embedder.banned = embedder.banned[embedder.banned < len(embedder.tokenizer)]  # a real table is nearly full
    backbone.config.image_token_id, backbone.config.video_token_id = embedder.media_ids
    backbone.model.visual.requires_grad_(False)
    return embedder


def prompts(embedder, n, tokens):
    """Return n prompts of exactly `tokens` tokens, with an image in each."""
    rows = []
    for i in range(n):
        item = {"images": [picture(i, SIDE[tokens], SIDE[tokens])]}
        short = len(encode_input(embedder.tokenizer, item).ids)
        rows.append(encode_input(embedder.tokenizer, item | {"text": "!" * (tokens - short)}, name=str(i)))
        assert len(rows[-1].ids) == tokens
    return rows


def completions(embedder, n, size):
    """Return n lists of G completions: random tokens, then <gen_emb>. One of each group has the largest length."""
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(np.log(size.median), 0.5, (n, G)).clip(4, size.longest).astype(int)
    lengths[:, 0] = size.longest
    words = np.setdiff1d(np.arange(len(embedder.tokenizer)), [*embedder.banned.tolist(), embedder.end_id])
    return [[[*rng.choice(words, length - 1).tolist(), embedder.gen_id] for length in group] for group in lengths]


class Forced(LogitsProcessor):
    """Let generate() compute and sample as usual, with one certain token per row."""

    def __init__(self, completions, prompt_length):
        longest = max(map(len, completions))
        self.tokens = torch.tensor([c + c[-1:] * (longest - len(c)) for c in completions])
        self.prompt_length = prompt_length

    def __call__(self, ids, scores):
        return scores.scatter_(1, self.tokens[:, ids.shape[1] - self.prompt_length, None], 1e5)


def official_inputs(embedder, rows):
    """Return every prompt and its images G times, padded on the left, as the trainer's sampler and processor do."""
    return processor_inputs(embedder, [row for row in rows for _ in range(G)], left=True)[0]


def official_rollout(embedder, inputs, script):
    """Return ids [n * G, prompt + longest completion]."""
    embedder.backbone.model.rope_deltas = None
    flat = [c + [embedder.end_id] for group in script for c in group]
    with torch.no_grad():
        return embedder.backbone.generate(
            **inputs, do_sample=True, temperature=1.0, top_k=50, max_new_tokens=512, eos_token_id=embedder.end_id,
            pad_token_id=embedder.tokenizer.pad_token_id, logits_processor=[Forced(flat, inputs["input_ids"].shape[1])],
        )  # fmt: skip


def official_pass(embedder, inputs, ids, states=False):
    """Return log p of the completion tokens [B, T], their mask, and the normalised states of all tokens [B, L, D]."""
    n = inputs["input_ids"].shape[1]
    written = ids[:, n:]
    mask = written != embedder.tokenizer.pad_token_id
    kinds = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(written)], 1)
    attention = torch.cat([inputs["attention_mask"], mask.long()], 1)
    embedder.backbone.model.rope_deltas = None
    out = embedder.backbone(
        **inputs | {"input_ids": ids, "attention_mask": attention, "mm_token_type_ids": kinds},
        output_hidden_states=states, use_cache=False,
    )  # fmt: skip
    logits = out.logits[:, :-1]  # all positions, then row by row
    logp = torch.stack([row.log_softmax(-1).gather(1, y[:, None])[:, 0] for row, y in zip(logits, ids[:, 1:])])
    return logp[:, n - 1 :], mask, F.normalize(out.hidden_states[-1], dim=-1) if states else None


def official_embedding(embedder, ids, states):
    """Return the state at the last <gen_emb> of each completion, [n, G, D]."""
    at = [int((row == embedder.gen_id).nonzero()[-1]) for row in ids]
    return states[torch.arange(len(ids)), at].view(len(ids) // G, G, -1)


def official_loss(embedder, sides, ref_logps):
    """The policy's pass, which gives rewards and loss. The graphs of both sides live until the one backward."""
    done = [official_pass(embedder, inputs, ids, states=True) for inputs, ids in sides]
    q, t = (official_embedding(embedder, ids, states.detach()) for (_, ids), (_, _, states) in zip(sides, done))
    texts = [embedder.tokenizer.decode(row) for _, ids in sides for row in ids]
    rewards = torch.cat([embedding_reward(q, t), embedding_reward(t, q)]) + format_reward(texts).view(-1, G)
    loss = 0
    for (logp, mask, _), ref, advantages in zip(done, ref_logps, group_advantages(rewards).chunk(2)):
        loss = loss + rl.grpo_loss(logp, logp.detach(), ref, advantages.flatten(), mask)[0]
    loss.backward()


def official_step(embedder, reference, optimizer, inputs, script):
    n = len(script) // 2
    sides = [(x, official_rollout(embedder, x, s)) for x, s in zip(inputs, (script[:n], script[n:]))]
    with torch.no_grad():
        ref_logps = [official_pass(reference, *side)[0] for side in sides]
    official_loss(embedder, sides, ref_logps)
    apply_gradients(embedder, optimizer)


def apply_gradients(embedder, optimizer):
    torch.nn.utils.clip_grad_norm_([p for p in embedder.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    optimizer.zero_grad()


def our_rollout(embedder, rows, script, args):
    """Return the rows with their vision states, and their rollouts."""
    rows = [replace(row) for row in rows]  # copies, because share_vision drops the pixels
    with scripted(embedder, script):
        embedder.share_vision(rows, args.pass_tokens)
        return rows, rl.rollout(embedder, rows, range(len(rows)), args)


def our_step(embedder, reference, optimizer, rows, script, args):
    """A step of rl.main on p pairs."""
    p = len(rows) // 2
    rows, rollouts = our_rollout(embedder, rows, script, args)
    gen = torch.stack([r.gen for r in rollouts]).view(2, p, G, -1)
    texts = [embedder.tokenizer.decode(ids) for r in rollouts for ids in r.ids]
    rewards = torch.cat([embedding_reward(gen[0], gen[1]), embedding_reward(gen[1], gen[0])])
    advantages = group_advantages(rewards + format_reward(texts).view(2 * p, G))
    groups = [rl.Group(*group, True) for group in zip(rows, rollouts, advantages)]
    rl.update(embedder, reference, groups, args)
    apply_gradients(embedder, optimizer)


def rollout_case(size, n, tokens):
    embedder, args = make_embedder(size), rl.Settings(slots=n * G, max_new_tokens=512, bf16=False)
    rows, script = prompts(embedder, n, tokens), completions(embedder, n, size)
    inputs = official_inputs(embedder, rows)
    return lambda: official_rollout(embedder, inputs, script), lambda: our_rollout(embedder, rows, script, args)


def step_case(size):
    """One pair: rollout, reference, rewards, update, optimiser."""
    embedder, args = make_embedder(size), rl.Settings(slots=2 * G, max_new_tokens=512, bf16=False)
    reference = copy.deepcopy(embedder).requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in embedder.parameters() if p.requires_grad], lr=1e-6)
    rows, script = prompts(embedder, 2, size.short), completions(embedder, 2, size)
    inputs = [official_inputs(embedder, rows[:1]), official_inputs(embedder, rows[1:])]
    return (
        lambda: official_step(embedder, reference, optimizer, inputs, script),
        lambda: our_step(embedder, reference, optimizer, rows, script, args),
    )


CASES = {  # command: [(what it is, the two functions of a size)]
    "rollout": [
        ("rollout, 2 prompts of {short:,} tokens", lambda size: rollout_case(size, 2, size.short)),
        ("rollout, 1 prompt of {long:,} tokens", lambda size: rollout_case(size, 1, size.long)),
    ],
    "rl": [("RL step of a pair, prompts of {short:,} tokens", step_case)],
}


def peak(command, k, side, tiny):
    """Return the peak MiB of one side above the loaded model. Call it in a fresh process."""
    return peak_above(CASES[command][k][1](TINY if tiny else FULL)[side])[0]


def compare(args, _run):
    torch.set_num_threads(1)
    command, tiny = args.command, args.tiny
    size = TINY if tiny else FULL
    print("| | official s | ours s | faster | official MB | ours MB | less |\n|---|---|---|---|---|---|---|")
    for k, (label, case) in enumerate(CASES[command]):
        sides = case(size)
        times = ([], [])
        for _ in range(1 if tiny else 3):
            for side, found in zip(sides, times):
                began = time.process_time()
                side()
                found.append(time.process_time() - began)
        a, b = map(statistics.median, times)
        x, y = (in_fresh_process("bench_engine", f"peak({command!r}, {k}, {side}, {tiny})", tiny) for side in (0, 1))
        cells = [f"{a:.2f}", f"{b:.2f}", f"**{a / b:.1f}x**", f"{x:.0f}", f"{y:.0f}", f"**{x / y:.1f}x**"]
        print(f"| {label.format(**vars(size))} | {' | '.join(cells)} |", flush=True)
