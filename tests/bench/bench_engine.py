"""Speed and memory of RL and embed() next to the official recipe: bench.py rollout | rl | embed print the tables.

The official recipe is written here from its description, in plain transformers: every prompt and picture is read G
times by generate(), all logits of prompt and completion exist, query and target graph are alive at once, the embeddings
(so the rewards) come out of the policy's pass, the reference looks at the pictures again. Both sides have the same
random Qwen2-VL (text 8 x 512, vision 4 x 320, frozen), the same prompts and the same completions, forced on
generate() by a logits processor and on ours by a script; both do the head and the sampling for every token.

Time: CPU seconds of the process on one thread, median of 3, the two sides in turn. Memory: peak of a fresh process
above that of the loaded model (bench_peak.py). A vocabulary of 10,240 gives the head the share of the work that it
has in the real 2B; the real vocabulary, 151,936, is the honest one for memory.
"""

import copy
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/bench")]

from bench_peak import in_fresh_process, peak_above  # noqa: E402
from conftest import picture, processor_inputs, scripted, transformers_read  # noqa: E402
from toy_base import SPECIAL, toy_model, toy_tokenizer  # noqa: E402
from transformers import LogitsProcessor, Qwen2VLConfig, Qwen2VLForConditionalGeneration  # noqa: E402

import rl  # noqa: E402
from data import encode_input  # noqa: E402
from model import Embedder, Output, Rollouts  # noqa: E402
from reward import embedding_reward, format_reward, group_advantages  # noqa: E402
from support.decode import Decoder  # noqa: E402
from support.weights import add_embedding_tokens  # noqa: E402

G = 8
SIDE = {300: 448, 1350: 1008, 120: 84}  # tokens of a prompt: side of its picture, with 256, 1,296 and 9 visual tokens


@dataclass(frozen=True)
class Size:
    """Of the compared model, its prompts and its completions."""

    heads: int = 8  # of 64 dimensions
    layers: int = 8
    vision_heads: int = 4  # of 80 dimensions
    vision_layers: int = 4
    small: int = 10_240  # vocabularies
    real: int = 151_936
    short: int = 300  # tokens of a prompt
    long: int = 1350
    longest: int = 128  # tokens of a completion
    median: int = 55


FULL = Size()
TINY = Size(heads=2, layers=2, vision_heads=1, vision_layers=1, small=2048, real=2048, short=120, long=120, longest=8,
            median=6)  # fmt: skip


def random_model(size, vocab):
    torch.manual_seed(0)
    tokenizer = toy_tokenizer()
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(SPECIAL)))
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}
    width = 64 * size.heads
    text = {"vocab_size": vocab, "hidden_size": width, "intermediate_size": 4 * width,
            "num_hidden_layers": size.layers, "num_attention_heads": size.heads,
            "num_key_value_heads": size.heads // 4 or 1, "rope_parameters": rope, "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"]}  # fmt: skip
    vision = {"depth": size.vision_layers, "embed_dim": 80 * size.vision_heads, "hidden_size": width,
              "num_heads": size.vision_heads}  # fmt: skip
    config = Qwen2VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True,
        **{f"{name}_token_id": ids[f"<|{name}|>"] for name in ("vision_start", "vision_end")},
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"])  # fmt: skip
    backbone = Qwen2VLForConditionalGeneration(config)
    add_embedding_tokens(backbone, tokenizer)
    embedder = Embedder(backbone, tokenizer)
    embedder.banned = embedder.banned[embedder.banned < len(tokenizer)]  # the real table has next to no unused rows
    backbone.model.visual.requires_grad_(False)
    return embedder


def prompts(embedder, n, tokens):
    """n prompts of exactly `tokens` tokens, a picture in each."""
    rows = []
    for i in range(n):
        item = {"images": [picture(i, SIDE[tokens], SIDE[tokens])]}
        short = len(encode_input(embedder.tokenizer, item).ids)
        rows.append(encode_input(embedder.tokenizer, item | {"text": "!" * (tokens - short)}, name=str(i)))
        assert len(rows[-1].ids) == tokens
    return rows


def completions(embedder, n, size, seed=0):
    """n lists of G completions: any tokens, then <gen_emb>; lognormal lengths with one of the longest in each group."""
    rng = np.random.default_rng(seed)
    lengths = rng.lognormal(np.log(size.median), 0.5, (n, G)).clip(4, size.longest).astype(int)
    lengths[:, 0] = size.longest
    words = np.setdiff1d(np.arange(len(embedder.tokenizer)), [*embedder.banned.tolist(), embedder.end_id])
    return [[[*rng.choice(words, length - 1).tolist(), embedder.gen_id] for length in group] for group in lengths]


# ---- the official recipe ---------------------------------------------------------------------------------------


class Forced(LogitsProcessor):
    """Lets generate() compute and sample as always, with one token per row that is certain."""

    def __init__(self, completions, prompt_length):
        longest = max(map(len, completions))
        self.tokens = torch.tensor([c + c[-1:] * (longest - len(c)) for c in completions])
        self.prompt_length = prompt_length

    def __call__(self, ids, scores):
        return scores.scatter_(1, self.tokens[:, ids.shape[1] - self.prompt_length, None], 1e5)


def official_inputs(embedder, rows):
    """Every prompt and its pictures G times, padded on the left, as the trainer's sampler and processor give them."""
    return processor_inputs(embedder, [row for row in rows for _ in range(G)], left=True)[0]


def official_rollout(embedder, inputs, script):
    """-> ids [n * G, prompt + longest completion]"""
    embedder.backbone.model.rope_deltas = None
    flat = [c + [embedder.end_id] for group in script for c in group]
    with torch.no_grad():
        return embedder.backbone.generate(
            **inputs, do_sample=True, temperature=1.0, top_k=50, max_new_tokens=512, eos_token_id=embedder.end_id,
            pad_token_id=embedder.tokenizer.pad_token_id, logits_processor=[Forced(flat, inputs["input_ids"].shape[1])],
        )  # fmt: skip


def official_pass(embedder, inputs, ids, states=False):
    """log p of the completion tokens [B, T], their mask, and the normalised states of the whole rows [B, L, D]."""
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


def official_embedding(embedder, ids, n, states):
    """The state at the last <gen_emb> of each completion, [n, G, D]."""
    at = [int((row == embedder.gen_id).nonzero()[-1]) for row in ids]
    return states[torch.arange(len(ids)), at].view(n, G, -1)


def official_loss(embedder, sides, ref_logps, advantages):
    """The policy's pass: the graphs of both sides live until the one backward. advantages: None asks for rewards."""
    done = [official_pass(embedder, inputs, ids, states=True) for inputs, ids in sides]
    if advantages is None:
        n = len(sides[0][1]) // G
        q, t = (official_embedding(embedder, ids, n, d[2].detach()) for (_, ids), d in zip(sides, done))
        texts = [embedder.tokenizer.decode(row) for _, ids in sides for row in ids]
        rewards = torch.cat([embedding_reward(q, t), embedding_reward(t, q)]) + format_reward(texts).view(2 * n, G)
        advantages = group_advantages(rewards)
    loss = 0
    for (logp, mask, _), ref, a in zip(done, ref_logps, advantages.chunk(2)):
        loss = loss + rl.grpo_loss(logp, logp.detach(), ref, a.flatten(), mask)[0]
    loss.backward()


def official_reference(reference, sides):
    with torch.no_grad():
        return [official_pass(reference, inputs, ids)[0] for inputs, ids in sides]


def official_step(embedder, reference, optimizer, inputs, script):
    n = len(script) // 2
    sides = [(x, official_rollout(embedder, x, s)) for x, s in zip(inputs, (script[:n], script[n:]))]
    official_loss(embedder, sides, official_reference(reference, sides), None)
    torch.nn.utils.clip_grad_norm_([p for p in embedder.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    optimizer.zero_grad()


# ---- ours ------------------------------------------------------------------------------------------------------


def our_rollout(embedder, rows, script, args):
    """-> the rows with their vision states, their rollouts."""
    rows = [replace(row) for row in rows]  # copies: share_vision lets the pixels go
    with scripted(embedder, script):
        embedder.share_vision(rows, len(rows))
        return rows, rl.rollout(embedder, rows, range(len(rows)), args)


def groups_of(rows, rollouts, advantages):
    return [rl.Group(*group, True) for group in zip(rows, rollouts, advantages)]


def our_reference(reference, rows, rollouts, args):
    """The reference's part of rl.update."""
    with torch.no_grad():
        for group in groups_of(rows, rollouts, torch.zeros(len(rows), G)):
            packed = rl.pack_groups(reference, [group])
            reference(packed.batch, packed.embed_at, packed.predict, packed.labels, args.temperature, True)


def our_step(embedder, reference, optimizer, rows, script, args):
    """A step of rl.main on p pairs."""
    p = len(rows) // 2
    rows, rollouts = our_rollout(embedder, rows, script, args)
    gen = torch.stack([r.gen for r in rollouts]).view(2, p, G, -1)
    texts = [embedder.tokenizer.decode(ids) for r in rollouts for ids in r.ids]
    rewards = torch.cat([embedding_reward(gen[0], gen[1]), embedding_reward(gen[1], gen[0])])
    advantages = group_advantages(rewards + format_reward(texts).view(2 * p, G))
    batches = rl.micro_batches(groups_of(rows, rollouts, advantages), args.update_batch)
    rl.update(embedder, reference, batches, args)
    torch.nn.utils.clip_grad_norm_([p for p in embedder.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    optimizer.zero_grad()


# ---- the cases: name -> (official, ours), each a function without arguments ---------------------------------------


def rollout_case(size, n, tokens):
    embedder, args = random_model(size, size.small), rl.Settings(micro_batch=n, max_new_tokens=512, bf16=False)
    rows, script = prompts(embedder, n, tokens), completions(embedder, n, size)
    inputs = official_inputs(embedder, rows)
    return lambda: official_rollout(embedder, inputs, script), lambda: our_rollout(embedder, rows, script, args)


def update_case(size, part):
    """One pair: a query and a target prompt of 300 tokens, 8 completions each. part: "update" or "reference".

    Of the update, the time of the rows' features is not counted on our side: the rollout has paid for them.
    """
    embedder, args = random_model(size, size.real), rl.Settings(max_new_tokens=512, bf16=False)
    embedder.train()
    rows, script = prompts(embedder, 2, size.short), completions(embedder, 2, size)
    script.sort(key=lambda group: -sum(map(len, group)))  # the order in which rl.update takes them
    inputs = [official_inputs(embedder, [row]) for row in rows]  # now: share_vision lets the pixels go
    embedder.share_vision(rows, 2)  # the rollout did it
    rollouts = []
    for group in script:
        ids = [c + [embedder.end_id] for c in group]
        zeros = torch.zeros(embedder.width), torch.zeros(G, embedder.width), torch.ones(G, dtype=torch.bool)
        rollouts.append(Rollouts(*zeros, ids, [[0.0] * len(c) for c in ids], [len(c) - 2 for c in ids]))
    sides = []
    for x, r in zip(inputs, rollouts):
        longest = max(map(len, r.ids))
        tail = torch.tensor([c + [embedder.tokenizer.pad_token_id] * (longest - len(c)) for c in r.ids])
        sides.append((x, torch.cat([x["input_ids"], tail], 1)))
    if part == "reference":
        return lambda: official_reference(embedder, sides), lambda: our_reference(embedder, rows, rollouts, args)
    A = torch.randn(2, G, generator=torch.Generator().manual_seed(0))
    # the reference's values are given to both (any will do): the policy's pass is what is compared
    refs = [torch.full_like(ids[:, x["input_ids"].shape[1] :], -10.0, dtype=torch.float32) for x, ids in sides]
    batches = rl.micro_batches(groups_of(rows, rollouts, A), 1)

    def reference(_batch, read, labels, **_):
        return Output(torch.zeros(len(read), embedder.width), torch.full((len(labels),), -10.0))

    def official():
        official_loss(embedder, sides, refs, A)
        embedder.zero_grad()

    def ours():
        rl.update(embedder, reference, batches, args)
        embedder.zero_grad()

    return official, ours


def step_case(size):
    """One pair, 300 tokens each side: rollout, reference, rewards, update, optimiser."""
    embedder, args = random_model(size, size.small), rl.Settings(micro_batch=2, max_new_tokens=512, bf16=False)
    reference = copy.deepcopy(embedder).requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in embedder.parameters() if p.requires_grad], lr=1e-6)
    rows, script = prompts(embedder, 2, size.short), completions(embedder, 2, size)
    inputs = [official_inputs(embedder, rows[:1]), official_inputs(embedder, rows[1:])]
    return (
        lambda: official_step(embedder, reference, optimizer, inputs, script),
        lambda: our_step(embedder, reference, optimizer, rows, script, args),
    )


CASES = {  # name: what it is, and the two functions of a size
    "rollout short": ("rollout, 2 prompts of {short:,} tokens, V = {small:,}", lambda x: rollout_case(x, 2, x.short)),
    "rollout long": ("rollout, 1 prompt of {long:,} tokens, V = {small:,}", lambda x: rollout_case(x, 1, x.long)),
    "update": ("update pass of a pair, {short:,}-token prompts, V = {real:,}", lambda x: update_case(x, "update")),
    "reference": ("reference pass of the same pair, V = {real:,}", lambda x: update_case(x, "reference")),
    "step": ("whole RL step of a pair, {short:,}-token prompts, V = {small:,}", step_case),
}  # fmt: skip


def seconds(function):
    began = time.process_time()
    function()
    return time.process_time() - began


def peak(name, which, tiny):
    """Peak MiB of one side above the loaded model; for a fresh process."""
    sides = CASES[name][1](TINY if tiny else FULL)
    return peak_above(sides[which])[0]


def compare(names, repeats=3, tiny=False):
    torch.set_num_threads(1)
    size = TINY if tiny else FULL
    print("| | official s | ours s | faster | official MB | ours MB | less |\n|---|---|---|---|---|---|---|")
    for name in names:
        label, case = CASES[name]
        both = case(size)
        times = [[seconds(f) for f in both] for _ in range(repeats)]
        a, b = (statistics.median(t[k] for t in times) for k in (0, 1))
        x, y = (in_fresh_process("bench_engine", f"peak({name!r}, {k}, {tiny})", tiny) for k in (0, 1))
        cells = [f"{a:.2f}", f"{b:.2f}", f"**{a / b:.1f}x**", f"{x:.0f}", f"{y:.0f}", f"**{x / y:.1f}x**"]
        print(f"| {label.format(**vars(size))} | {' | '.join(cells)} |", flush=True)


@torch.no_grad()
def decode(repeats=7, steps=40):
    """A decode step of the toy base model beside transformers' own on the same slots; in turns, the best of each."""
    torch.set_num_threads(1)
    backbone = Embedder.from_pretrained(ROOT / "assets/toy_base").backbone

    def milliseconds(rows, read):
        decoder = Decoder(backbone, rows, torch.float32)
        if read:
            decoder.run = lambda *given: read(decoder, *given)
        decoder.make_room(128)
        for step in range(steps + 5):
            if step == 5:
                began = time.process_time()
            decoder.step([11 + (step + n) % 50 for n in range(rows)], [50 + step] * rows, [40 + step] * rows)
        return 1000 * (time.process_time() - began) / steps

    print("| CPU ms of a decode step of the toy model, about 70 keys | transformers | own | ratio |\n|---|---|---|---|")
    for rows in (1, 8, 48, 192):
        times = [[milliseconds(rows, read) for read in (transformers_read(backbone), None)] for _ in range(repeats)]
        theirs, own = (min(column) for column in zip(*times))
        print(f"| {rows} rows | {theirs:.2f} | {own:.2f} | **{theirs / own:.2f}x** |", flush=True)


def embed(n=1000, slots=16):
    """Decode steps of embed() on lengths as they come, beside static batches of the same inputs (toy architecture).

    n is the number of queries of an MMEB task: with few inputs, the last ones that run alone weigh more.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        toy_model(folder)
        embedder = Embedder.from_pretrained(folder)
    lengths = np.random.default_rng(0).lognormal(np.log(180), 0.5, n).astype(int)
    words = np.setdiff1d(np.arange(len(embedder.tokenizer)), [*embedder.banned.tolist(), embedder.end_id])
    script = [[[*np.resize(words, length - 1).tolist(), embedder.gen_id]] for length in lengths]
    inputs, steps, real = [{"text": f"{i:04}"} for i in range(n)], [0], embedder.decode_step

    def counted(live, cache):
        steps[-1] += 1
        return real(live, cache)

    embedder.decode_step, found = counted, []
    for size in (n, slots):  # all at once; then one call for each static batch
        began = time.process_time()
        for start in range(0, n, size):
            with scripted(embedder, script[start : start + size]):
                out = embedder.embed(inputs[start : start + size], batch_size=slots)
            assert out.valid.all()
        found.append((steps[-1], time.process_time() - began))
        steps.append(0)
    (ours, t), (static, s) = found
    print(f"| {n} inputs, lengths lognormal (180, 0.5), {slots} slots | decode steps | CPU s |\n|---|---|---|")
    print(f"| static batches | {static:,} | {s:.1f} |\n| embed() | {ours:,} | {t:.1f} |")
    print(f"| fewer, faster | **{static / ours:.2f}x** | {s / t:.2f}x |")


def trl(steps=3):
    """A whole step of TRL's GRPOTrainer beside ours: text prompts of 300 tokens (its processor would need torchvision),
    the same completions. TRL is no dependency: run this in an environment that has it."""
    try:
        from datasets import Dataset
        from transformers import TrainerCallback
        from trl import GRPOConfig, GRPOTrainer
    except ImportError as error:
        print(f"TRL's GRPOTrainer was not run: {error}")
        return
    embedder = random_model(FULL, FULL.small)
    texts, script = ["!" * 400 + str(i) for i in range(2)], completions(embedder, 2, FULL)
    texts = [embedder.tokenizer.decode(embedder.tokenizer(t).input_ids[:300]) for t in texts]
    rows = [encode_input(embedder.tokenizer, {"text": t}, blank_image=False, name=str(i)) for i, t in enumerate(texts)]
    flat, times = [c + [embedder.end_id] for group in script for c in group], []

    class Timer(TrainerCallback):
        def on_step_begin(self, *_args, **_more):
            self.began = time.process_time()

        def on_step_end(self, *_args, **_more):
            times.append(time.process_time() - self.began)

    with tempfile.TemporaryDirectory() as folder:
        embedder.save_pretrained(folder)
        backbone = Qwen2VLForConditionalGeneration.from_pretrained(folder)
        backbone.model.visual.requires_grad_(False)
        generate = backbone.generate
        backbone.generate = lambda **given: generate(
            **given, logits_processor=[Forced(flat, given["input_ids"].shape[1])]
        )
        config = GRPOConfig(
            folder, per_device_train_batch_size=2 * G, num_generations=G, max_completion_length=512, beta=0.04,
            max_steps=steps, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
            save_strategy="no", shuffle_dataset=False, disable_tqdm=True, learning_rate=1e-6,
        )  # fmt: skip
        trainer = GRPOTrainer(
            backbone, reward_funcs=lambda completions, **_: [float(len(c) % 7) for c in completions], args=config,
            train_dataset=Dataset.from_dict({"prompt": texts}), processing_class=embedder.tokenizer,
            callbacks=[Timer()],
        )  # fmt: skip
        trainer.train()
    args = rl.Settings(micro_batch=2, max_new_tokens=512, bf16=False)
    reference = copy.deepcopy(embedder).requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in embedder.parameters() if p.requires_grad], lr=1e-6)
    ours = [seconds(lambda: our_step(embedder, reference, optimizer, rows, script, args)) for _ in range(steps)]
    a, b = statistics.median(times), statistics.median(ours)
    print(f"| TRL's GRPOTrainer, text prompts of 300 tokens, V = {FULL.small:,} | {a:.2f} | {b:.2f} | {a / b:.1f}x |")
