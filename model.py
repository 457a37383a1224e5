"""The embedder: Qwen2-VL with two embeddings, `disc` read at <disc_emb> and `gen` read at the last <gen_emb>.

Both are the last layer's state (after the final norm) at the token's own position, L2-normalised, no projection (paper
section 3; released models). Shapes: B rows, L tokens, D hidden size, V vocabulary, G rollouts per prompt, N any count.

Where this departs from the official code
 1. No monkey patches: we call the backbone's vision tower, language model and head ourselves, with our own rotary
    positions, so the module's remembered position deltas are never used.
 2. The head runs on the tokens whose log-probability is wanted, in chunks that are computed again in the backward
    pass. Logits of all tokens x 152 k words (0.6 MB a token in fp32) never exist.
 3. Generation is our own loop on a key-value cache: a prompt and its pictures are read once for its G rollouts, the
    state at <gen_emb> is kept when that token is read in (no stack of all layers' states), a finished row leaves its
    place to a waiting one. Vision tokens, pad, <|im_start|> and <disc_emb> can never be sampled, and the same ban holds
    in the log-probabilities of RL.
 4. A completion without <gen_emb> has no generative embedding; the official code then reads the prompt's own one.
 5. <disc_emb> is read exactly at its position; the official evaluation reads the token after it.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import AutoTokenizer, DynamicCache, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from data import DISC, GEN, PIXELS, Row, Skip, encode_input, normalise, signal_with_parent

HEAD_CHUNK = 256  # tokens whose logits exist at once, in two copies: 2 x 256 x 152 k x 4 B = 0.3 GB
REFILL = 16  # waiting prompts are read in when one in 16 of the decoding places is free; rarer leaves more places idle
BANNED = -1e9  # logit of a token that cannot be sampled: its probability is exactly 0 and 0 * log p stays 0, not NaN


@dataclass
class Embeddings:
    """What embed() returns for N inputs."""

    disc: torch.Tensor | None  # float32 [N, D]
    gen: torch.Tensor | None  # float32 [N, samples, D], zeros where invalid
    texts: list | None  # N lists of `samples` assistant texts
    valid: torch.Tensor | None  # bool [N, samples]: a <gen_emb> was produced
    num_tokens: torch.Tensor | None = None  # int [N, samples], generated tokens
    skipped: dict = field(default_factory=dict)  # {n: reason} of the inputs that cannot be read: zeros, not valid


@dataclass
class Rollouts:
    """What generate() gives back for one prompt: G completions."""

    disc: torch.Tensor  # [D]
    gen: torch.Tensor  # [G, D], zeros where invalid
    valid: torch.Tensor  # bool [G]
    ids: list  # G lists of token ids, <|im_end|> included where it was reached
    logp: list  # G lists of log-probabilities at sampling time, at the sampling temperature
    gen_at: list  # place of the last <gen_emb> in each of the G lists, -1 where invalid

    @classmethod
    def collect(cls, completions):
        zero = torch.zeros_like(completions[0].disc)
        return cls(
            disc=completions[0].disc,
            gen=torch.stack([zero if c.gen is None else c.gen for c in completions]),
            valid=torch.tensor([c.gen is not None for c in completions]),
            ids=[c.ids for c in completions],
            logp=[c.logp for c in completions],
            gen_at=[c.gen_at for c in completions],
        )


class Embedder(nn.Module):
    def __init__(self, backbone, tokenizer):
        super().__init__()
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.bf16 = False  # run forward and generate in bf16 autocast over the fp32 master weights
        names = [GEN, DISC, "<|im_end|>", "<|image_pad|>", "<|video_pad|>"]
        self.gen_id, self.disc_id, self.end_id, *self.media_ids = tokenizer.convert_tokens_to_ids(names)
        self.pad_id = tokenizer.pad_token_id
        never = ["<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|im_start|>", DISC]
        banned = {*tokenizer.convert_tokens_to_ids(never), *self.media_ids, self.pad_id}
        rows = backbone.get_input_embeddings().weight.shape[0]  # more rows than tokens: they have no text
        self.register_buffer(
            "banned", torch.tensor(sorted(banned | set(range(len(tokenizer), rows)))), persistent=False
        )

    # ---- loading and saving -------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, name_or_path, *, device=None, dtype=torch.float32):
        """A folder or hub id in the Hugging Face layout. Adds <gen_emb> and <disc_emb> where they are missing."""
        check_model(name_or_path)
        if Path(name_or_path).is_dir() and not (Path(name_or_path) / "config.json").exists():
            raise FileNotFoundError(f"{name_or_path}: no config.json; is it the output folder of a finished stage?")
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
        backbone = Qwen2VLForConditionalGeneration.from_pretrained(
            name_or_path, dtype=dtype, attn_implementation="sdpa"
        )
        add_embedding_tokens(backbone, tokenizer)
        return cls(backbone, tokenizer).to(device)

    def save_pretrained(self, path):
        """Weights, tokenizer, chat template, preprocessor and generation config, as plain transformers reads them."""
        self.backbone.save_pretrained(path)
        self.tokenizer.save_pretrained(path)
        low, high = PIXELS["image"]
        Qwen2VLImageProcessorPil(size={"shortest_edge": low, "longest_edge": high}).save_pretrained(path)

    # ---- one pass with gradients --------------------------------------------------------------------------------

    @property
    def device(self):
        return self.banned.device

    @property
    def vision_frozen(self):
        return not any(p.requires_grad for p in self.backbone.model.visual.parameters())

    def see(self, patches, grids):
        """What all passes can share: the ViT's states before the merger [n, D_vit]; where the merger is frozen too (as
        in RL) the merged tokens [n / 4, D]."""
        weight = self.backbone.model.visual.patch_embed.proj.weight
        out = self.backbone.model.visual(patches.to(weight.dtype), grid_thw=grids)
        return out.pooler_output if self.vision_frozen else out.last_hidden_state

    @torch.no_grad()
    def see_rows(self, rows, n, poll=lambda: None):
        """Runs the frozen ViT once over the pictures of all rows, n rows at a time, and keeps the states with them.

        They wait in the CPU's memory: a page of 2.4 M pixels has 12,040 x 1,280 of them, 31 MB in bf16, and a step of
        128 pairs a process up to 8 GB. The pixels are let go. poll is called before each pass.
        """
        for start in range(0, len(rows), n):
            poll()
            part = rows[start : start + n]
            states = self(pad_rows(part, self.pad_id, self.device)).cpu()
            merged = 4 if self.vision_frozen else 1
            for row, vit in zip(part, states.split([len(row.patches) // merged for row in part])):
                row.vit = vit  # [0, ..] for a row without pictures
                row.patches = np.empty((len(row.patches), 0), np.uint8)

    def embed_tokens(self, ids, vit):
        """Token embeddings with the merged picture states in the places of the pad tokens. ids [B, L] -> [B, L, D]"""
        x = self.backbone.get_input_embeddings()(ids)
        merge = (lambda merged: merged) if self.vision_frozen else self.backbone.model.visual.merger
        if len(vit):
            is_media = (ids == self.media_ids[0]) | (ids == self.media_ids[1])
            return x.masked_scatter(is_media[..., None], merge(vit).to(x.dtype))
        if torch.is_grad_enabled() and not self.vision_frozen:
            # no picture on this rank: the vision side still gets a (zero) gradient, or DDP waits
            blank = self.see(torch.zeros(4, 1176, device=x.device), torch.tensor([[1, 2, 2]], device=x.device))
            x = x + 0 * merge(blank).sum().to(x.dtype)
        return x

    def forward(self, batch, read=None, predict=None, labels=None, temperature=1.0, ban=False):
        """Embeddings at the flat positions `read`, log-probabilities of `labels` at the flat positions `predict`.

        batch: from pad_rows(). read int [N], predict int [M] index the flattened [B * L]; labels int [M].
        Returns fp32 embeddings [N, D], normalised; logp [M]; entropy [M], without gradient; None where not asked for.
        With nothing asked: what see() makes of the pictures.
        """
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            vit = batch["vit"] if batch["vit"] is not None else self.see(batch["patches"], batch["grids"])
            if read is None and labels is None:
                return vit
            x = self.embed_tokens(batch["ids"], vit)  # [B, L, D]
            hidden = self.backbone.model.language_model(
                inputs_embeds=x,
                position_ids=batch["positions"],  # [3, B, L]
                attention_mask={"full_attention": batch["mask"]},  # a dict is taken as it is; None means causal
                use_cache=False,
            ).last_hidden_state.flatten(0, 1)  # [B * L, D]
            embeddings = None if read is None else F.normalize(hidden[read].float(), dim=-1)
            if labels is None:
                return embeddings, None, None
            logp, entropy = self.token_logp(hidden[predict], labels, temperature, ban)
        return embeddings, logp, entropy

    def token_logp(self, hidden, labels, temperature=1.0, ban=False):
        """log softmax(head(hidden))[labels] and entropy, [M] each, in chunks of tokens that backward computes again."""
        weight = self.backbone.lm_head.weight.to(self.compute_dtype)  # once, not once a chunk
        banned = self.banned if ban else self.banned[:0]
        return TokenLogp.apply(hidden.to(weight.dtype), weight, labels, banned, temperature)

    # ---- generation ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, rows, *, G=1, temperature=1.0, seeds=None, max_new_tokens=512, slots=64, script=None,
                 poll=lambda: False):  # fmt: skip
        """Reads each prompt once and decodes G completions of it. Yields (index of the row, Rollouts) as they finish.

        rows: iterable of Row (prompts). seeds: one int per row, or i for row i; rollout g of row i is a function of
        (seeds[i], g) and the weights only, whatever is decoded beside it. slots: completions decoded at once.
        temperature 0 is greedy.
        poll: asked before every token; true ends the decoding at once, with the rows that are done by then.
        script: for tests and benchmarks: script[i][g] is the list of token ids to write in place of the sampled ones.

        The live completions are rows 0..A-1 of one preallocated cache, left-aligned, each with its own length. The last
        of them moves into the place of one that ends; when enough places are free, waiting prompts are read in.
        """
        was_training = self.training
        self.eval()  # in train mode with gradient checkpointing transformers would drop the cache
        rows, slots, nothing_left = enumerate(rows), max(slots, G), False
        cache = SlotCache(self.backbone.config.text_config, slots, self.device, self.compute_dtype)
        live, finished = [], {}

        def begin(i, row, disc):
            """The G completions of prompt i, with all their random numbers."""
            for g in range(G):
                seed = i if seeds is None else seeds[i]
                uniforms = row_uniforms(seed, g, max_new_tokens + 1) if temperature else None
                forced = script[i][g] if script else None
                yield Completion(i, g, row, disc, uniforms, forced, len(forced) if script else max_new_tokens)

        def pick(hidden, completions):
            """Appends the next token of each completion, given the states [A, D] at their last tokens."""
            uniforms = [c.uniforms[len(c.ids)] for c in completions] if temperature else None
            forced = [(c.forced + [self.end_id])[len(c.ids)] for c in completions] if script else None
            logits = head(hidden, self.backbone.lm_head.weight, self.banned, temperature or 1.0)
            for c, (token, logp) in zip(completions, sample(logits, uniforms, forced)):
                if len(c.ids) == c.limit:
                    c.ended = True  # full; its last token was still read in, for the state of a last <gen_emb>
                else:
                    c.ids.append(int(token))
                    c.logp.append(logp)
                    c.ended = token == self.end_id

        # One autocast around the whole loop: it keeps its bf16 copies of trained fp32 weights until it is left. For the
        # 2B on 80 GB (35 GB of training state) these 4 GB are well spent: to cast anew would make every decode step,
        # which reads them once, read 9 GB and write 4 GB more. Whoever takes a result runs outside of it.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            while (live or not nothing_left) and not poll():
                # 1. read in waiting prompts, several at once, when enough places are free
                A, room, batch = len(live), (slots - len(live)) // G, []
                if room * G >= slots // REFILL or not live:
                    batch = list(itertools.islice(rows, room))
                    nothing_left = len(batch) < room
                if batch:
                    last, disc = self.prefill([row for _, row in batch], cache, A, G)  # [P, D] both
                    for (i, row), d in zip(batch, disc):
                        finished[i] = []
                        live += begin(i, row, d)
                    pick(last.repeat_interleave(G, 0), live[A:])
                # 2. ended completions leave; the last live one moves into the free place
                for s in reversed(range(len(live))):
                    if live[s].ended:
                        c, end = live[s], live.pop()
                        if c is not end:
                            cache.move(len(live), s)
                            live[s] = end
                        finished[c.i].append(c)
                        if len(finished[c.i]) == G:
                            with torch.autocast(self.device.type, enabled=False):
                                yield c.i, Rollouts.collect(sorted(finished.pop(c.i), key=lambda c: c.g))
                if not live:
                    continue
                # 3. one token for every live completion
                hidden = self.decode_step(live, cache)  # [A, D]
                for s, c in enumerate(live):
                    if c.ids[-1] == self.gen_id:
                        c.gen, c.gen_at = F.normalize(hidden[s].float(), dim=-1), len(c.ids) - 1  # the last one wins
                pick(hidden, live)
        self.train(was_training)

    @property
    def compute_dtype(self):
        return torch.bfloat16 if self.bf16 else self.backbone.lm_head.weight.dtype

    def prefill(self, rows, cache, first_slot, G):
        """Reads P prompts in one right-padded pass and copies their keys and values to G slots each.
        Returns the states at the last token [P, D] and the discriminative embeddings [P, D]."""
        batch = pad_rows(rows, self.pad_id, self.device)
        vit = batch["vit"] if batch["vit"] is not None else self.see(batch["patches"], batch["grids"])
        kv = DynamicCache(config=self.backbone.config.text_config)
        hidden = self.backbone.model.language_model(
            inputs_embeds=self.embed_tokens(batch["ids"], vit),
            position_ids=batch["positions"],
            attention_mask={"full_attention": None},  # right padding and causal: no real token sees a pad
            past_key_values=kv,
            use_cache=True,
        ).last_hidden_state  # [P, L, D]
        cache.fill(kv, first_slot, G)
        p = torch.arange(len(rows), device=self.device)
        last = hidden[p, torch.tensor([row.n_prompt - 1 for row in rows], device=self.device)]
        disc = hidden[p, torch.tensor([row.disc_at for row in rows], device=self.device)]
        return last, F.normalize(disc.float(), dim=-1)

    def decode_step(self, live, cache):
        """Reads in the last token of every live completion: its state, [A, D]."""
        token, at, position = torch.tensor(
            [[c.ids[-1], c.row.n_prompt + len(c.ids) - 1, c.row.next_position + len(c.ids) - 1] for c in live],
            device=self.device,
        ).T  # [A] each: the token, its place in the row, its rotary position (the same on all three axes)
        longest = max(c.row.n_prompt + len(c.ids) for c in live)
        cache.aim(at, longest)
        return self.backbone.model.language_model(
            inputs_embeds=self.backbone.get_input_embeddings()(token)[:, None],  # [A, 1, D]
            position_ids=position.expand(3, -1)[..., None],  # [3, A, 1]
            attention_mask={
                "full_attention": (torch.arange(longest, device=self.device) <= at[:, None])[:, None, None]
            },
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, 0]

    # ---- the public way in --------------------------------------------------------------------------------------

    @torch.no_grad()
    def embed(self, inputs, *, mode="both", samples=1, temperature=0.0, seed=0, max_new_tokens=512, traces=None,
              batch_size=8, blank_image=True, progress=False):  # fmt: skip
        """Both embeddings of any texts, pictures and videos, from one pass per input.

        inputs: list of N {"text": str, "images": [path | PIL.Image], "video": [frame path | PIL.Image]}, keys optional.
        mode: "disc" reads the prompt only; "gen" and "both" generate. temperature 0 is greedy. batch_size: completions
        decoded at once; it changes speed and memory, not the result. traces: N assistant texts to read instead of
        generating, from any other reasoner. Returns Embeddings in the order of the inputs. An input with a picture that
        cannot be read does not stop the others: it is named in a warning and in .skipped, has zeros for both embeddings
        and is not valid.
        """
        if mode not in ("disc", "gen", "both"):
            raise ValueError(f'mode is "disc", "gen" or "both", not {mode!r}')
        N, width = len(inputs), self.backbone.config.text_config.hidden_size
        disc, texts = torch.zeros(N, width), [[""] * samples for _ in range(N)]
        gen, valid = torch.zeros(N, samples, width), torch.zeros(N, samples, dtype=torch.bool)
        num_tokens = torch.zeros(N, samples, dtype=torch.long)
        # similar lengths side by side, the longest first (it shows at once whether it fits into memory)
        cost = [
            len(x.get("text") or "") + 1000 * len(x.get("images") or []) + 1000 * len(x.get("video") or [])
            for x in inputs
        ]
        order = sorted(range(N), key=lambda n: -cost[n])
        kept, seeds, skipped = [], [], {}  # input number and seed of each row, in the order of reading; {n: reason}

        def encoded():
            for n in order:
                try:
                    trace = traces[n] if traces else None
                    row = encode_input(self.tokenizer, inputs[n], trace, blank_image=blank_image, name=f"input {n}")
                except Skip as error:
                    skipped[n] = str(error)
                    warnings.warn(f"input {n} is left out, its embeddings are zeros: {error}", stacklevel=1)
                    bar.update(1)
                    continue
                kept.append(n)
                seeds.append(stable_hash(seed, n))
                yield row

        bar = tqdm(total=N, desc=f"embed {mode}", unit="input", disable=not progress, smoothing=0.1)
        if mode == "disc" or traces:
            waiting = encoded()
            while rows := list(itertools.islice(waiting, batch_size)):
                where = torch.tensor(kept[-len(rows) :])
                batch = pad_rows(rows, self.pad_id, self.device)
                read = batch["ids"].shape[1] * torch.arange(len(rows))[:, None]  # first flat position of each row
                read = read + torch.tensor([[row.disc_at, max(row.gen_at, 0)] for row in rows])
                out = self(batch, read=read.flatten().to(self.device))[0].view(len(rows), 2, width).cpu()
                disc[where] = out[:, 0]
                if traces:
                    valid[where] = torch.tensor([row.gen_at >= 0 for row in rows])[:, None]
                    gen[where] = (out[:, 1] * valid[where, :1])[:, None]
                    num_tokens[where] = torch.tensor([len(row.ids) - row.n_prompt for row in rows])[:, None]
                    for n in where.tolist():
                        texts[n] = [traces[n]] * samples
                bar.update(len(rows))
        else:
            for i, r in self.generate(encoded(), G=samples, temperature=temperature, seeds=seeds,
                                      max_new_tokens=max_new_tokens, slots=batch_size):  # fmt: skip
                n = kept[i]
                disc[n], gen[n], valid[n] = r.disc.cpu(), r.gen.cpu(), r.valid
                num_tokens[n] = torch.tensor([len(ids) for ids in r.ids])
                ended = [ids[-1] == self.end_id for ids in r.ids]
                texts[n] = self.tokenizer.batch_decode([ids[:-1] if end else ids for ids, end in zip(r.ids, ended)])
                bar.update(1)
        bar.close()
        return Embeddings(
            disc=None if mode == "gen" else disc,
            gen=None if mode == "disc" else gen,
            texts=None if mode == "disc" else texts,
            valid=None if mode == "disc" else valid,
            num_tokens=None if mode == "disc" else num_tokens,
            skipped=skipped,
        )


def head(hidden, weight, banned, temperature):
    """Logits [N, V] in fp32, without gradient."""
    logits = F.linear(hidden, weight).float().index_fill_(-1, banned, BANNED)
    return logits if temperature == 1 else logits.div_(temperature)


class TokenLogp(torch.autograd.Function):
    """log softmax(head(h))[y] and its entropy (no gradient), with one chunk's logits [c, V] in memory at a time.

    Backward computes a chunk's logits again: d logp / d logits = (1[y] - softmax) / temperature.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, banned, temperature):
        logp, entropy, norm = [], [], []
        for h, y in zip(hidden.split(HEAD_CHUNK), labels.split(HEAD_CHUNK)):
            x = head(h, weight, banned, temperature)  # [c, V]
            top = x.amax(-1, keepdim=True)
            e = (x - top).exp_()
            total = e.sum(-1)
            z = top[:, 0] + total.log()  # [c] log of the softmax's denominator
            logp.append(x.gather(-1, y[:, None])[:, 0] - z)
            entropy.append(z - torch.linalg.vecdot(e, x) / total)
            norm.append(z)
        logp, entropy, norm = map(torch.cat, (logp, entropy, norm))
        ctx.save_for_backward(hidden, weight, labels, banned, norm)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, labels, banned, norm = ctx.saved_tensors
        grad = grad / ctx.temperature
        d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        for h, y, z, g, d_h in zip(*(x.split(HEAD_CHUNK) for x in (hidden, labels, norm, grad, d_hidden))):
            x = head(h, weight, banned, ctx.temperature)
            d = x.sub_(z[:, None]).exp_().mul_(-g[:, None])  # [c, V]
            d = d.scatter_add_(-1, y[:, None], g[:, None]).to(weight.dtype)
            torch.mm(d, weight, out=d_h)
            d_weight.addmm_(d.T, h)
        return d_hidden, d_weight, None, None, None


def check_model(name_or_path):
    """Stops with a sentence where a path is no model folder: transformers would look it up as a hub id."""
    path = Path(name_or_path)
    if not path.is_dir() and (str(path).count("/") != 1 or path.parent.is_dir()):
        raise SystemExit(f"no model folder {path}; sft.py writes the one that rl.py reads, both those of eval.py")


def add_embedding_tokens(backbone, tokenizer):
    """<gen_emb>, then <disc_emb>, as ordinary tokens; their rows start as copies of two unused ones (official SFT)."""
    sources = {GEN: "<|object_ref_end|>", DISC: "<|object_ref_start|>"}
    missing = [token for token in (GEN, DISC) if token not in tokenizer.get_vocab()]
    if not missing:
        return
    tokenizer.add_tokens(missing)  # ordinary: they survive decoding with skip_special_tokens
    if len(tokenizer) > backbone.get_input_embeddings().weight.shape[0]:
        backbone.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        for token in missing:
            new, old = tokenizer.convert_tokens_to_ids([token, sources[token]])
            for weight in (backbone.get_input_embeddings().weight, backbone.lm_head.weight):  # the same tensor if tied
                weight[new] = weight[old]


def pad_rows(rows, pad_id, device, mask=None):
    """B rows of different lengths, right-padded. -> dict of ids [B, L], positions [3, B, L], patches, grids, vit, mask.

    With right padding and causal attention no real token sees a pad, so the default mask is None.
    """
    B, L = len(rows), max(len(row.ids) for row in rows)
    ids, positions = np.full((B, L), pad_id), np.zeros((3, B, L), dtype=np.int64)
    for b, row in enumerate(rows):
        ids[b, : len(row.ids)] = row.ids
        positions[:, b, : len(row.ids)] = row.positions
    to = lambda x: torch.from_numpy(x).to(device)  # noqa: E731
    batch = {"ids": to(ids), "positions": to(positions), "mask": mask, "vit": None, "patches": None, "grids": None}
    seen = [row for row in rows if len(row.patches)]
    if not seen:
        batch["vit"] = torch.zeros(0)  # text only
    elif all(row.vit is not None for row in seen):
        batch["vit"] = torch.cat([row.vit for row in seen]).to(device)
    else:
        batch["patches"] = normalise(to(np.concatenate([row.patches for row in seen])))
        batch["grids"] = to(np.concatenate([row.grids for row in seen]))
    return batch


# ---------------------------------------------------------------------------------------------------------------
# Parts of the decode loop


@dataclass
class Completion:
    """One completion that is being decoded: number g of prompt i."""

    i: int
    g: int
    row: Row
    disc: torch.Tensor  # [D]
    uniforms: np.ndarray | None  # [max_new_tokens + 1] its random numbers; None is greedy
    forced: list | None  # the tokens to write in place of the sampled ones
    limit: int  # tokens at most
    ids: list = field(default_factory=list)
    logp: list = field(default_factory=list)
    gen: torch.Tensor | None = None  # [D]
    gen_at: int = -1
    ended: bool = False


class SlotCache:
    """Keys and values of S left-aligned rows of different lengths, [layers][S, H_kv, capacity, D_head].

    Has the one method that transformers' attention calls, update(). Slots start as zeros, not as empty memory: what
    the mask hides is multiplied by 0, and 0 * NaN is NaN.
    """

    def __init__(self, config, slots, device, dtype):
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (slots, config.num_key_value_heads, 0, head_dim)
        self.kv = [[torch.zeros(shape, device=device, dtype=dtype)] * 2 for _ in range(config.num_hidden_layers)]

    def grow(self, length):
        """Room for `length` tokens, in steps of 256: a copy as rare as that costs nothing. Layer by layer, so that only
        one layer is there twice."""
        capacity = self.kv[0][0].shape[2]
        if length > capacity:
            extra = -(-length // 256) * 256 - capacity
            for layer in self.kv:
                layer[:] = [F.pad(x, (0, 0, 0, extra)) for x in layer]

    def fill(self, kv, first, G):
        """Copies P prompts' keys and values, each to G slots from `first` on."""
        P, _, L, _ = kv.layers[0].keys.shape
        self.grow(L)
        for mine, theirs in zip(self.kv, kv.layers):
            mine[0][first : first + P * G, :, :L] = theirs.keys.repeat_interleave(G, 0)
            mine[1][first : first + P * G, :, :L] = theirs.values.repeat_interleave(G, 0)

    def move(self, source, target):
        for k, v in self.kv:
            k[target], v[target] = k[source], v[source]

    def aim(self, at, longest):
        """The next update writes row s's token at index at[s] and shows the first `longest` ones."""
        self.grow(longest)
        self.at, self.longest = at, longest

    def update(self, k, v, layer, *_args, **_kwargs):
        """k, v [A, H_kv, 1, D_head] of the new token -> those of all tokens, [A, H_kv, longest, D_head]."""
        rows = torch.arange(len(k), device=k.device)
        out = []
        for mine, new in zip(self.kv[layer], (k, v)):
            mine[rows, :, self.at] = new[:, :, 0].to(mine.dtype)
            out.append(mine[: len(k), :, : self.longest])
        return out

    def get_seq_length(self, _layer=0):
        return self.longest - 1


def sample(logits, uniforms, forced=None):
    """Inverse-CDF sampling. logits fp32 [A, V]; uniforms: A numbers in [0, 1), None is greedy; forced: A tokens that
    are taken instead -> A pairs [token, log p], as floats: one transfer a step, on which the loop waits."""
    logp = logits.log_softmax(-1)
    if uniforms is None:
        tokens = logits.argmax(-1)
    else:
        cdf = logp.double().exp_().cumsum_(-1)
        u = torch.tensor(uniforms, dtype=torch.float64, device=logits.device)[:, None] * cdf[:, -1:]
        tokens = torch.searchsorted(cdf, u, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    if forced is not None:
        tokens = torch.tensor(forced, device=logits.device)
    return torch.stack([tokens.double(), logp.gather(-1, tokens[:, None])[:, 0].double()], 1).tolist()


def stable_hash(*parts):
    """A 63-bit seed out of integers and strings, the same in every process and Python."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def row_uniforms(seed, g, n):
    """The random numbers of completion g, all drawn when it starts: they depend on nothing that runs beside it."""
    return np.random.default_rng([seed, g]).random(n)


# ---------------------------------------------------------------------------------------------------------------
# Running: processes, checkpoints, logs (shared by the stages)


def start_processes(fsdp=False):
    """-> (rank, world, device). The same script runs alone and under torchrun, on CPU (gloo) and GPU (nccl)."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if fsdp and world == 1:
        raise SystemExit("--fsdp spreads the model over processes: start it with torchrun --nproc_per_node N")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun killed with -9 leaves its processes running: they save and end
        signal_with_parent(signal.SIGTERM)
    if world > 1 and not dist.is_initialized():  # CPU tensors go over gloo on GPUs too: no wait for the GPU
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(minutes=30))
    return rank, world, device


def processes():
    """-> (rank, world)"""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def barrier(group=None):
    if dist.is_initialized():
        dist.barrier(group)


def end_processes():
    """The last thing of a run with several processes.

    gloo's thread frees the tensors of the last collective and needs Python's lock for that; the group's destructor
    holds the lock and waits for the thread. Without a pause a finished run now and then never ends (torch 2.13).
    """
    if dist.is_initialized():
        time.sleep(1)
        dist.destroy_process_group()


def parallel(embedder, args, device):
    """What the training loop calls: the embedder itself, its DDP replica or, with --fsdp, the embedder in shards."""
    if args.fsdp:
        shard(embedder, args.bf16)
    if args.fsdp or processes()[1] == 1:
        return embedder
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(embedder, device_ids=ids, gradient_as_bucket_view=True)


def shard(embedder, bf16, mesh=None):
    """FSDP2: parameters, gradients and AdamW's moments are spread over the processes in fp32; each decoder layer is put
    together in bf16 when it runs, embeddings, head and vision tower (one group) for the whole pass. A model that is
    still in the CPU's memory goes to the GPU group by group: no GPU ever holds all of it in fp32."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32)
    for layer in embedder.backbone.model.language_model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    # resharded after every pass: outside of one the parameters are always the shards, which is what gets saved
    fully_shard(embedder, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    embedder({"vit": ()})  # an empty pass: FSDP sets itself up in the first one of the root, before any layer's


@contextlib.contextmanager
def whole(embedder):
    """A sharded model is put together for as long as it decodes (in bf16 the 7B takes 15 GB): every layer of every
    token would else be a collective, and the processes do not decode equally many tokens. FSDP's hooks are off
    meanwhile: of a decode step of small layers on a CPU they took a fifth."""
    parts = [module for module in embedder.modules() if isinstance(module, FSDPModule)]
    hooks = [(part, part._forward_pre_hooks, part._forward_hooks) for part in parts]
    for part in parts:
        part.unshard()
        part._forward_pre_hooks, part._forward_hooks = {}, {}
    try:
        yield
    finally:
        for part, before, behind in hooks:
            part._forward_pre_hooks, part._forward_hooks = before, behind
            part.reshard()


def first_on_node(make):
    """make() in one process of every node, then in the others, which find its work on the disk."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    made = make() if first else None
    barrier()
    return made if first else make()


def gather(x):
    """All processes' x [n, ...] in the order of a step's rows (process r holds rows r, r + world, ...). No gradient."""
    if not dist.is_initialized():
        return x.detach()
    x = x.detach().contiguous()  # before empty_like: the receiving buffers must have its layout
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    return torch.stack(parts, dim=1).flatten(0, 1)


def gather_list(items):
    """The same for a list of strings or tuples, equally long in every process."""
    if not dist.is_initialized():
        return items
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, items)
    return [item for group in zip(*parts) for item in group]


def all_sum(x):
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


class Stopped(RuntimeError):
    """The run ends here; all processes raise it together, so that they can save together."""

    def __init__(self, reason, code=1):
        super().__init__(reason)
        self.code = code


class Guard:
    """Ends a run in good order: on SIGTERM and SIGINT, on figures that are not finite, on too many unusable rows.

    Used around the training loop. The weights change only between steps, so at any moment of a step they are the state
    of the last complete one: a step that is broken off is simply forgotten. `completed` is the number of complete
    steps, None where the weights are between two of them and there is nothing to save.
    """

    def __init__(self, args, out, save, num_rows):
        self.args, self.out, self.save, self.num_rows = args, Path(out), save, num_rows
        self.signal, self.completed, self.nonfinite, self.seen, self.unusable = 0, None, 0, 0, 0

    def __enter__(self):
        self.before = {n: signal.signal(n, self.note) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def note(self, number, _frame):
        self.signal = number

    def __exit__(self, _kind, why, _trace):
        try:
            if isinstance(why, Stopped):
                if self.completed:
                    self.save(self.completed)
                if processes()[0] == 0:
                    saved = f"saved after step {self.completed}" if self.completed else "nothing new was saved"
                    print(f"\n{why}\n{saved}; the same command goes on from there", file=sys.stderr, flush=True)
                end_processes()
                raise SystemExit(why.code)
        finally:  # only now: a second signal must not end the saving
            for number, handler in self.before.items():
                signal.signal(number, handler)

    def poll(self):
        """At points that every process reaches: if any of them has been signalled, all stop."""
        number = torch.tensor(self.signal)
        if dist.is_initialized():
            dist.all_reduce(number, dist.ReduceOp.MAX)
        if number:
            raise Stopped(signal.Signals(int(number)).name, 128 + int(number))

    def finite(self, step, figures, pairs):
        """True where the update may be made. figures: name -> float."""
        if not all_sum(torch.tensor(sum(not math.isfinite(x) for x in figures.values()))):
            return True
        self.nonfinite += 1
        told = ", ".join(f"{name} {x}" for name, x in figures.items())
        rows = ", ".join(gather_list([pair.name for pair in pairs]))
        message = f"step {step + 1}: {told}: not finite, nothing was updated; rows {rows}"
        if self.nonfinite > self.args.skip_nonfinite:
            raise Stopped(f"{message}\n--skip_nonfinite N leaves out N such steps instead of stopping")
        if processes()[0] == 0:
            print(message, file=sys.stderr)
        return False

    def skipped(self, step, pairs):
        """Lists the unusable rows of all processes in skipped.jsonl -> their number."""
        ok = gather(torch.tensor([pair.ok for pair in pairs]))
        self.seen, self.unusable = self.seen + len(ok), self.unusable + int((~ok).sum())
        if ok.all():
            return 0
        found = gather_list([(pair.name, pair.reason) for pair in pairs])
        self.last_reason = [reason for _, reason in found if reason][-1]
        if processes()[0] == 0:
            with open(self.out / "skipped.jsonl", "a") as file:
                for (name, reason), good in zip(found, ok.tolist()):
                    if not good:
                        file.write(json.dumps({"step": step + 1, "row": name, "reason": reason}) + "\n")
        return int((~ok).sum())

    def check_share(self):
        """Ends the run where too large a share of the rows seen is unusable; a small dataset within the bound never
        stops, even where its bad rows come first."""
        if self.unusable > self.args.max_skipped * max(self.seen, min(self.num_rows, 1000)):
            raise Stopped(
                f"{self.unusable} of {self.seen} rows could not be used, above --max_skipped {self.args.max_skipped}; "
                f"{self.out / 'skipped.jsonl'} lists them; the last one: {self.last_reason}"
            )


def speed_figures(began, waited, done, steps, pairs, tokens, device):
    """The wall-clock figures of a step's log line. began: when the step and the loop did; done: steps of this loop."""
    seconds, elapsed = (time.perf_counter() - t for t in began)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    peak = peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"pairs_per_s": pairs / seconds, "tokens_per_s": tokens / seconds, "data_wait_s": waited,
            "peak_memory_gib": peak / 2**30, "eta_s": elapsed / done * (steps - done)}  # fmt: skip


def lr_at(step, *, steps, lr, warmup, floor=0.0):
    """Linear warm-up over the share `warmup` of the steps, then a cosine down to floor * lr."""
    n = max(1, round(warmup * steps))
    if step < n:
        return lr * (step + 1) / n
    x = (step - n) / max(1, steps - n)
    return lr * (floor + (1 - floor) * 0.5 * (1 + np.cos(np.pi * x)))


def local(x):
    """What this process holds of a tensor: its rows where FSDP has sharded it, else all."""
    return x.to_local() if isinstance(x, DTensor) else x


def is_complete(checkpoint):
    return (checkpoint / "meta.json").exists() and not checkpoint.suffix


def sync(path):
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def save_checkpoint(folder, model, optimizer, step, settings, keep=2):
    """checkpoints/step-N: written beside, fsynced, renamed; a kill at any moment leaves the old ones or the new one.

    All processes call it. Under FSDP each writes its own rows, else rank 0 writes everything; meta.json comes last.
    The learning rate, the batches and the rollouts are functions of (seed, step), and nothing draws from the global
    random state; it is stored all the same.
    """
    rank, world = processes()
    final = Path(folder) / "checkpoints" / f"step-{step}"
    temporary = final.with_suffix(".tmp")
    if is_complete(final):  # stopped right behind a regular save
        return
    if rank == 0:
        for path in final.parent.glob("*"):
            if not is_complete(path):
                shutil.rmtree(path)  # what killed runs have left
        temporary.mkdir(parents=True)
    barrier()
    sharded = any(isinstance(p, DTensor) for p in model.parameters())
    if rank == 0 or sharded:
        names = {p: n for n, p in model.named_parameters()}
        tensors = {f"model/{n}": p for p, n in names.items()}
        tensors |= {f"{key}/{names[p]}": x for p, state in optimizer.state.items() for key, x in state.items()}
        tensors["random/cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["random/cuda"] = torch.cuda.get_rng_state()
        part = temporary / f"part-{rank}.safetensors"
        save_file({name: local(x.detach()).contiguous() for name, x in tensors.items()}, part)
        sync(part)
    barrier()
    if rank == 0:
        meta = {"step": step, "parts": world if sharded else 1, "settings": settings}
        (temporary / "meta.json").write_text(json.dumps(meta, indent=1))
        sync(temporary / "meta.json")
        sync(temporary)
        os.replace(temporary, final)
        sync(final.parent)
        for _, old in list_checkpoints(folder)[:-keep]:
            remove_checkpoint(old)
    barrier()


def remove_checkpoint(path):
    (path / "meta.json").unlink()  # first: a kill in between must not leave a folder that looks complete
    shutil.rmtree(path)


def list_checkpoints(folder):
    """Complete checkpoints, oldest first, as (step, path)."""
    found = [path for path in Path(folder).glob("checkpoints/step-*") if is_complete(path)]
    return sorted((int(path.name.split("-")[1]), path) for path in found)


def load_checkpoint(resume, folder, model, optimizer, settings):
    """Restores model and optimizer in place -> the step to go on with (0: a fresh start).

    resume: "auto" takes the newest complete checkpoint of the folder, "none" starts anew, a path takes that one; later
    ones of the folder are then removed, or the next "auto" would take them. Any number of processes, sharded or not,
    can read what any other has written.
    """
    rank, world = processes()
    known = [path for _, path in list_checkpoints(folder)]
    path = Path(resume) if resume not in ("auto", "none") else known[-1] if known and resume == "auto" else None
    if path and not is_complete(path):
        raise FileNotFoundError(f"--resume {path}: no complete checkpoint there (meta.json is missing)")
    meta = json.loads((path / "meta.json").read_text()) if path else {"step": 0}
    steps = gather(torch.tensor([meta["step"]]))
    if (steps != meta["step"]).any():
        raise RuntimeError(f"the processes found different steps {steps.tolist()}: all need the same --out folder")
    if not path:
        return 0
    refuse_changed(meta["settings"], settings, path)
    parts = [safe_open(path / f"part-{i}.safetensors", "pt") for i in range(meta["parts"])]

    def restore(name, x):
        """Fills this process's rows of x; the parts hold the rows of a tensor one after the other."""
        size = -(-len(x) // world)  # rows a process, as FSDP cuts them
        low, high = (rank * size, rank * size + size) if isinstance(x, DTensor) else (0, len(x))
        first, own = 0, local(x)
        for part in parts:
            rows = part.get_slice(name)
            a, b = max(first, low), min(first + rows.get_shape()[0], high)
            if a < b:
                own[a - low : b - low] = rows[a - first : b - first].to(x.device)
            first += rows.get_shape()[0]
        return x

    stored = set(parts[0].keys())
    with torch.no_grad():
        for name, p in model.named_parameters():
            restore(f"model/{name}", p)
            if f"step/{name}" in stored:  # AdamW's step counter stays on the CPU, its moments live beside the parameter
                moments = {key: restore(f"{key}/{name}", torch.zeros_like(p)) for key in ("exp_avg", "exp_avg_sq")}
                optimizer.state[p] = {"step": parts[0].get_tensor(f"step/{name}"), **moments}
    torch.set_rng_state(parts[0].get_tensor("random/cpu"))
    if torch.cuda.is_available() and "random/cuda" in stored:
        torch.cuda.set_rng_state(parts[0].get_tensor("random/cuda"))
    barrier()  # nobody reads any more
    if rank == 0:
        print(f"resuming after step {meta['step']} from {path}", flush=True)
        for step, later in list_checkpoints(folder):
            if step > meta["step"]:
                remove_checkpoint(later)
    return meta["step"]


def save_model(embedder, base, out):
    """The final model in the Hugging Face layout. All processes call it, rank 0 writes; what FSDP has sharded is put
    together in a plain copy of the base model."""
    rank, _ = processes()
    if any(isinstance(p, DTensor) for p in embedder.parameters()):
        plain = Embedder.from_pretrained(base) if rank == 0 else None
        target = dict(plain.named_parameters()) if plain else {}
        with torch.no_grad():
            for name, p in embedder.named_parameters():
                whole = p.full_tensor()
                if plain:
                    target[name].copy_(whole)
        embedder = plain
    if rank == 0:
        embedder.save_pretrained(out)


def refuse_changed(before, now, path):
    changed = [f"{key} {before.get(key)} -> {now[key]}" for key in now if before.get(key) != now[key]]
    if changed:
        raise SystemExit(
            f"{path} was made with other settings ({'; '.join(changed)}). "
            "Give the same ones, or another --out, or --resume none to start anew."
        )


def begin_run(args, rank, digests):
    """Writes args.json -> what a resumed run must share, or None where the run in --out is finished.

    digests: of the contents of the data files; a run never goes on with other data under the same name.
    """
    free = ("resume", "save_every", "keep", "workers", "micro_batch", "update_batch", "out", "cache", "fsdp",
            "max_skipped", "skip_nonfinite")  # fmt: skip
    out, settings = Path(args.out), {key: value for key, value in asdict(args).items() if key not in free}
    settings["content of --data"] = digests
    path = out / "args.json"
    if args.resume == "auto" and path.exists() and (before := json.loads(path.read_text())).get("finished"):
        refuse_changed(before.get("resume", before["settings"]), settings, out)
        if rank == 0:
            print(f"{out} is finished ({args.steps} steps); --resume none trains it anew")
        return None
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        if args.resume == "none":  # another run's checkpoints would count as newer than this run's
            shutil.rmtree(out / "checkpoints", ignore_errors=True)
        write_args(out, args)
    return settings


def open_log(out, start):
    """log.jsonl, one line a step, open for more: what a killed run wrote beyond its last checkpoint goes."""
    for name in ("log.jsonl", "skipped.jsonl"):
        path = Path(out) / name
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]  # the last one may have been cut by the kill
        kept = "".join(line for line in whole if json.loads(line)["step"] <= start)
        write_file(path, lambda temporary, kept=kept: temporary.write_text(kept))
    return open(Path(out) / "log.jsonl", "a", buffering=1)


def write_file(path, write):
    """Calls write(temporary path), then renames: a reader sees the old file or the new one, whatever kills us."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    write(temporary)
    os.replace(temporary, path)


def write_json(path, data):
    write_file(path, lambda temporary: temporary.write_text(json.dumps(data, indent=1, default=str)))


def write_args(out, args, **more):
    """args.json: settings, command line, commit and versions that made the folder."""
    here = Path(__file__).parent
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=here)
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__}
    about = {"settings": asdict(args), "command": sys.argv, "commit": git.stdout.strip() or None, **versions, **more}
    write_json(Path(out) / "args.json", about)


def setting(default, help):
    """A field of a script's settings: its default and what --help says of it."""
    return field(default=default, metadata={"help": help})


def parse_args(settings, presets, argv=None):
    """Flags from a dataclass of settings; --preset is read first and sets the defaults of the others."""
    argv = sys.argv[1:] if argv is None else argv
    first = transformers.HfArgumentParser(settings, add_help=False)
    preset = first.parse_known_args([a for a in argv if a not in ("-h", "--help")])[0].preset
    if preset not in presets:
        raise SystemExit(f"--preset {preset}: choose one of {', '.join(presets)}")
    parser = transformers.HfArgumentParser(settings, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.set_defaults(**presets[preset])
    return parser.parse_args_into_dataclasses(argv, look_for_args_file=False)[0]
