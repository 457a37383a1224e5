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

import contextlib
import itertools
import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, DynamicCache, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from data import DISC, FORMS, GEN, PIXELS, Row, Skip, check_input, check_text, encode_input, normalise
from support.run import (
    BadInput,
    MissingFile,
    Progress,
    is_sharded,
    processes,
    read_json,
    refuse_not_finite,
    stable_hash,
)

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
    skipped: dict = field(default_factory=dict)  # {n: reason} of the inputs without embeddings: zeros, not valid


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
        tokenizer, backbone = load_pretrained(name_or_path, dtype)
        add_embedding_tokens(backbone, tokenizer)
        if len(tokenizer) > (rows := backbone.get_input_embeddings().weight.shape[0]):
            raise BadInput(f"{name_or_path}: its tokenizer has {len(tokenizer)} tokens, the model {rows} rows for them")
        return cls(backbone, tokenizer).to(device).eval()

    def save_pretrained(self, path):
        """Weights, tokenizer, chat template, preprocessor and generation config, as plain transformers reads them."""
        self.backbone.save_pretrained(path)
        self.tokenizer.save_pretrained(path)
        low, high = PIXELS["image"]
        Qwen2VLImageProcessorPil(size={"shortest_edge": low, "longest_edge": high}).save_pretrained(path)
        add_keys_of_transformers_4(path)

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
        with evaluating(self), torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
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

        inputs: list (or any iterable) of N inputs, each {"text": str, "images": [path | PIL.Image], "video": [path |
        PIL.Image of each frame]}, keys optional, or a str (a text), or a Path or PIL.Image (a picture); one alone is a
        list of one. mode: "disc" reads the prompt only; "gen" and "both" generate. temperature 0 is greedy; a sample is
        a function of (seed, content of the input, number of the sample), so that equal inputs get equal samples.
        batch_size: completions decoded at once: speed and memory; in fp32 the result is the same up to rounding, in
        bf16 rounding can turn a close choice between tokens. traces: N assistant texts to read instead of generating,
        from any other reasoner. Returns Embeddings in the order of the inputs.

        An input that cannot be read (a broken picture, a wrong form, a control token) does not stop the others: it is
        named in a warning and in .skipped, has zeros for both embeddings and is not valid. So does one whose
        discriminative embedding is not finite; a generative one that is not finite is not valid. Raises BadInput (a
        ValueError) where the arguments are wrong or no input has a form that can be read.
        """
        if mode not in ("disc", "gen", "both"):
            raise BadInput(f'mode is "disc", "gen" or "both", not {mode!r}')
        for name, value in dict(samples=samples, batch_size=batch_size, max_new_tokens=max_new_tokens).items():
            if not isinstance(value, (int, np.integer)) or value < 1:
                raise BadInput(f"{name}={value}: must be at least 1, a whole number")
        if not isinstance(temperature, (int, float)) or not (temperature == 0 or 0.001 <= temperature <= 100):
            raise BadInput(f"temperature={temperature}: must be 0 (greedy) or from 0.001 to 100")
        inputs = list_of_inputs(inputs)
        if traces is not None:
            traces = [traces] if isinstance(traces, str) else traces
            if not isinstance(traces, (list, tuple)):
                raise BadInput(f"traces: a list of one text for each input, not {type(traces).__name__}")
            if len(traces) != len(inputs):
                raise BadInput(f"{len(traces)} traces for {len(inputs)} inputs: give one text for each")
        N, width = len(inputs), self.backbone.config.text_config.hidden_size
        disc, texts = torch.zeros(N, width), [[""] * samples for _ in range(N)]
        gen, valid = torch.zeros(N, samples, width), torch.zeros(N, samples, dtype=torch.bool)
        num_tokens = torch.zeros(N, samples, dtype=torch.long)
        bar = Progress(total=N, desc=f"embed {mode}", unit="input", disable=not progress, smoothing=0.1)
        kept, seeds, skipped = [], [], {}  # input number and seed of each row, in the order of reading; {n: reason}

        def skip(n, error):
            skipped[n] = str(error)
            warnings.warn(f"input {n} is left out, its embeddings are zeros: {error}", stacklevel=1)
            bar.update(1)

        checked = {}
        for n, item in enumerate(inputs):
            try:
                checked[n] = check_input(item, f"input {n}")
                if traces is not None:
                    check_text(traces[n], f"trace {n}")
            except BadInput as error:
                checked.pop(n, None)
                if N == 1 or (n == N - 1 and not checked):  # no other input is to be saved: the caller must hear it
                    raise
                skip(n, error)
        # similar lengths side by side, the longest first (it shows at once whether it fits into memory)
        length = {n: len(x["text"]) + 1000 * len(x["images"] + x["video"]) for n, x in checked.items()}
        order = sorted(checked, key=lambda n: -length[n])

        def encoded():
            for n in order:
                try:
                    trace = None if traces is None else traces[n]
                    row = encode_input(self.tokenizer, checked[n], trace, blank_image=blank_image, name=f"input {n}")
                except (Skip, BadInput) as error:
                    skip(n, error)
                    continue
                kept.append(n)
                seeds.append(stable_hash(seed, row.content))
                yield row

        if mode == "disc" or traces is not None:
            waiting = encoded()
            while rows := list(itertools.islice(waiting, batch_size)):
                where = torch.tensor(kept[-len(rows) :])
                batch = pad_rows(rows, self.pad_id, self.device)
                read = batch["ids"].shape[1] * torch.arange(len(rows))[:, None]  # first flat position of each row
                read = read + torch.tensor([[row.disc_at, max(row.gen_at, 0)] for row in rows])
                out = self(batch, read=read.flatten().to(self.device))[0].view(len(rows), 2, width).cpu()
                disc[where] = out[:, 0]
                if traces is not None:
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
        if mode == "disc":
            valid[:] = False
        no_disc, no_gen = drop_not_finite(disc, gen, valid)
        for n in no_disc:
            skipped[n] = f"input {n}: its discriminative embedding is not finite"
        if no_disc or no_gen:
            warnings.warn(f"{len({*no_disc, *no_gen})} of {N} inputs have an embedding that is not finite (NaN or "
                          "infinite): zeros, not valid; are the weights broken?", stacklevel=2)  # fmt: skip
        return Embeddings(
            disc=None if mode == "gen" else disc,
            gen=None if mode == "disc" else gen,
            texts=None if mode == "disc" else texts,
            valid=None if mode == "disc" else valid,
            num_tokens=None if mode == "disc" else num_tokens,
            skipped=skipped,
        )


@contextlib.contextmanager
def evaluating(model):
    """Every module in eval mode (in train mode with gradient checkpointing transformers drops the cache), and back in
    its own afterwards, also where the caller takes no more results."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


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


def add_keys_of_transformers_4(path):
    """Some keys of a saved folder also under the names that transformers 4 reads (tested by hand with 4.57.6), for
    engines that are still on it; transformers 5 takes no notice. Without them 4 falls back to its defaults: another
    rotary base, untied heads, other sizes of pictures."""
    files = [Path(path, f"{name}.json") for name in ("config", "tokenizer_config", "preprocessor_config")]
    config, tokenizer, pictures = (read_json(file) for file in files)
    text = config["text_config"]
    rope = dict(text["rope_parameters"])
    text |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    text["tie_word_embeddings"] = config["tie_word_embeddings"]
    if "extra_special_tokens" in tokenizer:
        tokenizer["additional_special_tokens"] = tokenizer.pop("extra_special_tokens")
    pictures |= {"min_pixels": pictures["size"]["shortest_edge"], "max_pixels": pictures["size"]["longest_edge"]}
    for file, content in zip(files, (config, tokenizer, pictures)):
        file.write_text(json.dumps(content, indent=2) + "\n")


def list_of_inputs(given):
    """What embed() was given -> list; one input alone is a list of one."""
    if isinstance(given, (str, Path, Image.Image, dict)):
        return [given]
    if isinstance(given, (bytes, set, np.ndarray, torch.Tensor)) or not hasattr(given, "__iter__"):
        raise BadInput(f"inputs: a list, each {FORMS}; not {type(given).__name__}")
    return list(given)


def drop_not_finite(disc, gen, valid):
    """NaN compares as neither better nor worse, so that a broken model would keep the list's order, which may be the
    right one. In place: an embedding that is not finite becomes zeros and its completion not valid.

    disc [N, D], gen [N, S, D], valid bool [N, S] -> numbers of the inputs without disc (nor gen then), without a gen.
    """
    no_disc = ~disc.isfinite().all(1)  # [N]
    no_gen = ~gen.isfinite().all(2)  # [N, S]
    disc[no_disc] = 0
    gen[no_gen | no_disc[:, None]] = 0
    valid &= ~no_gen & ~no_disc[:, None]
    return no_disc.nonzero()[:, 0].tolist(), no_gen.any(1).nonzero()[:, 0].tolist()


def check_model(name_or_path):
    """Raises BadInput where a path is no model folder: transformers would look it up as a hub id."""
    path = Path(name_or_path)
    if not path.is_dir() and (str(path).count("/") != 1 or path.parent.is_dir()):
        raise MissingFile(f"no model folder {path}; sft.py writes the one that rl.py reads, both those of eval.py")
    if not path.is_dir():
        return
    if (path / "meta.json").exists():
        raise BadInput(f"{path} is a checkpoint; to make a model folder of it: python data.py export {path} --out DIR")
    if adapters := sorted(file.name for file in path.glob("adapter_*")):
        raise BadInput(f"{path} holds an adapter ({', '.join(adapters)}), which is not read here; write it into the "
                       "weights first, with peft's merge_and_unload() and save_pretrained()")  # fmt: skip
    if not (path / "config.json").exists():
        raise MissingFile(f"{path}: no config.json; is it the output folder of a finished stage?")


def load_tokenizer(name_or_path):
    """The tokenizer of a model, complete: without its files transformers makes an empty one, without a word."""
    check_model(name_or_path)
    try:
        config, tokenizer = AutoConfig.from_pretrained(name_or_path), AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError, KeyError) as error:  # what transformers says of broken files
        raise BadInput(f"{name_or_path}: cannot be loaded ({str(error).splitlines()[0]})") from error
    if config.model_type != "qwen2_vl":
        raise BadInput(f"{name_or_path}: a model of the family {config.model_type}; this code reads qwen2_vl")
    pads = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
    if pads != [config.image_token_id, config.video_token_id]:
        raise BadInput(f"{name_or_path}: its tokenizer is not the model's (other picture tokens than in config.json); "
                       "are tokenizer.json and tokenizer_config.json there, and whole?")  # fmt: skip
    return tokenizer


def load_pretrained(name_or_path, dtype):
    """-> tokenizer, backbone, complete or not at all: transformers fills a tensor that the files lack, or have in
    another shape, with random numbers, and leaves out what the model has no place for. Only a head that is tied to the
    token embeddings may be missing."""
    tokenizer = load_tokenizer(name_or_path)
    try:
        backbone, found = Qwen2VLForConditionalGeneration.from_pretrained(
            name_or_path, dtype=dtype, attn_implementation="sdpa", output_loading_info=True,
            ignore_mismatched_sizes=True,
        )  # fmt: skip
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise BadInput(f"{name_or_path}: cannot be loaded ({str(error).splitlines()[0]})") from error
    tied = {"lm_head.weight"} if backbone.config.tie_word_embeddings else set()
    wrong = [*(set(found["missing_keys"]) - tied), *(str(key[0]) for key in found["mismatched_keys"])]
    if wrong:
        raise BadInput(f"{name_or_path}: {len(wrong)} tensors of the model are missing or have another shape: "
                       f"{', '.join(sorted(wrong)[:5])}{', ..' * (len(wrong) > 5)}; copy the folder again")  # fmt: skip
    if extra := sorted(found["unexpected_keys"]):
        raise BadInput(f"{name_or_path}: the model of config.json has no room for {len(extra)} tensors of the files: "
                       f"{', '.join(extra[:5])}{', ..' * (len(extra) > 5)}; is it another model's?")  # fmt: skip
    return tokenizer, backbone


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


def row_uniforms(seed, g, n):
    """The random numbers of completion g, all drawn when it starts: they depend on nothing that runs beside it."""
    return np.random.default_rng([seed, g]).random(n)


def save_model(embedder, base, out):
    """The final model in the Hugging Face layout. All processes call it, rank 0 writes; what FSDP has sharded is put
    together in a plain copy of the base model."""
    rank, _ = processes()
    refuse_not_finite(embedder)
    if is_sharded(embedder):
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
