"""The embedder: Qwen2-VL (or 2.5, or Qwen3-VL) with two embeddings, `disc` read at <disc_emb>, `gen` at the last
<gen_emb>.

Both are the last layer's state (after the final norm) at the token's own position, L2-normalised, no projection (the
paper's model; so are the released weights).

Shapes: B rows, L tokens, D hidden size, V vocabulary, P prompts, G rollouts per prompt, A completions that are being
decoded, N and M any count.

Where this departs from the official code
 1. No monkey patches: we call the backbone's vision tower, language model and head ourselves, with our own rotary
    positions, so the module's remembered position deltas are never used. Of a loaded model (not of transformers'
    classes) three things are exchanged for faster ones with the same weights and results: the patch embedding, the
    RMSNorms and how Qwen3-VL adds the states of DeepStack.
 2. The head runs on the tokens whose log-probability is wanted, in chunks that are computed again in the backward
    pass. Logits of all tokens x 152 k words (0.6 MB a token in fp32) never exist.
 3. Generation is our own loop on a key-value cache: a prompt and its pictures are read once for its G rollouts, the
    state at <gen_emb> is stored in the decode step that reads it (no stack of all layers' states), a completion that
    ends gives its slot to a waiting prompt. The tokens of NEVER_WRITTEN cannot be sampled, and the same ban holds in
    the log-probabilities of RL. The decode step itself is ours too (support/decode.py).
 4. A completion without <gen_emb> has no generative embedding; the official code then reads the prompt's own one.
 5. <disc_emb> is read exactly at its position; the official evaluation reads the token after it.
"""

import contextlib
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from data import Row, encode_input
from support.backbones import PatchEmbed, add_states, family_of, fuse_norms, to_device
from support.checkpoint import refuse_not_finite
from support.decode import Decoder
from support.distributed import cudnn_attention_off, is_sharded, processes
from support.files import apply_umask, stable_hash
from support.formats import DISC, GEN, check_arguments, check_input, check_text, list_of_inputs, list_of_traces
from support.head import TokenLogp, sampling_logits
from support.images import normalise
from support.loop import stop_if_asked
from support.program import BadInput, Progress, Skip
from support.weights import add_embedding_tokens, add_keys_of_transformers_4, load_pretrained

PREFILL_TOKENS = 16_384  # of one pass over prompts, pads included: five pages of 2.4 M pixels
AHEAD = 4  # completions that may wait for a slot with their prompts read: so that one prefill reads several prompts
# Never sampled, and the media pads neither. By name: a tokenizer may declare any token as its pad, even <|im_end|>.
NEVER_WRITTEN = ("<|endoftext|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|im_start|>", DISC)


@dataclass
class Embeddings:
    """What embed() returns for N inputs."""

    disc: torch.Tensor | None  # float32 [N, D]
    gen: torch.Tensor | None  # float32 [N, samples, D], zeros where invalid
    texts: list | None  # N lists of `samples` assistant texts
    valid: torch.Tensor | None  # bool [N, samples]: a <gen_emb> was produced
    num_tokens: torch.Tensor | None = None  # int [N, samples], generated tokens
    skipped: dict = field(default_factory=dict)  # {n: reason} of the inputs without embeddings: zeros, not valid

    @property
    def fused(self):
        """float32 [N, samples, 2D]: [disc, gen] / sqrt(2), whose dot product is the mean of both cosines; None after
        another mode than "both". Without a <gen_emb> the gen half is zeros: as a query it ranks by disc alone, as a
        candidate it keeps half of its disc cosine."""
        if self.disc is None or self.gen is None:
            return None
        disc = self.disc[:, None].expand_as(self.gen)
        return torch.cat([disc, self.gen], dim=-1) / 2**0.5


@dataclass(eq=False)  # compared and hashed by identity
class Prompt:
    """What generate() reads: a prompt with everything that belongs to it."""

    key: object  # the caller's name for it
    row: Row | None  # None: it cannot be read, `problem` says why
    seed: int = 0  # of its random numbers
    problem: str = ""


@dataclass
class Rollouts:
    """What generate() gives back for one prompt: G completions."""

    disc: torch.Tensor  # [D]
    gen: torch.Tensor  # [G, D], zeros where invalid
    valid: torch.Tensor  # bool [G]
    ids: list  # G lists of token ids, <|im_end|> included where it was reached
    logp: list  # G lists of log-probabilities at sampling time, at the sampling temperature
    gen_at: list  # index of the last <gen_emb> in each of the G lists, -1 where invalid

    @classmethod
    def collect(cls, completions):
        """The G completions of one prompt, in their order."""
        zero = torch.zeros_like(completions[0].disc)
        return cls(
            disc=completions[0].disc,
            gen=torch.stack([zero if c.gen is None else c.gen for c in completions]),
            valid=torch.tensor([c.gen is not None for c in completions]),
            ids=[c.ids for c in completions],
            logp=[c.logp for c in completions],
            gen_at=[c.gen_at for c in completions],
        )


class Batch(NamedTuple):
    """B rows, right-padded. With right padding and causal attention no real token sees a pad, so no mask is needed."""

    ids: torch.Tensor | None  # [B, L]; None where vision states only are asked for
    positions: torch.Tensor | None  # [3, B, L]
    media_at: torch.Tensor | None  # [n / merge^2] flat indices of the pad tokens, which the merged states replace
    patches: torch.Tensor  # uint8 [n, patch_values], n = 0 where no row has a picture
    grids: np.ndarray  # [m, 3], no tensor: DDP and FSDP move tensors to the GPU, and its layout is needed on the CPU
    vision_states: torch.Tensor | None = None  # of the patches, where they are known already
    mask: torch.Tensor | None = None  # bool [B, 1, L, L]; None: causal


class Output(NamedTuple):
    """What forward() returns: what was asked for, None in the other places."""

    embeddings: torch.Tensor | None = None  # fp32 [N, D], normalised
    logp: torch.Tensor | None = None  # fp32 [M]
    entropy: torch.Tensor | None = None  # fp32 [M], without gradient
    vision_states: torch.Tensor | None = None


class Embedder(nn.Module):
    def __init__(self, backbone, tokenizer):
        super().__init__()
        cudnn_attention_off()
        tower = backbone.model.visual
        tower.patch_embed = PatchEmbed(tower.patch_embed.proj)
        fuse_norms(backbone)
        if hasattr(backbone.model.language_model, "_deepstack_process"):  # Qwen3-VL
            backbone.model.language_model._deepstack_process = add_states
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.family = family_of(backbone.config)
        self.bf16 = False  # run forward and generate in bf16 autocast over the fp32 master weights
        names = [GEN, DISC, "<|im_end|>", self.family.image_pad, self.family.video_pad]
        self.gen_id, self.disc_id, self.end_id, *self.media_ids = tokenizer.convert_tokens_to_ids(names)
        vocabulary = tokenizer.get_vocab()
        never = {vocabulary[token] for token in NEVER_WRITTEN if token in vocabulary}
        never |= {*self.media_ids, *range(len(tokenizer), self.vocabulary)}  # rows beyond the tokens have no text
        self.register_buffer("banned", torch.tensor(sorted(never)), persistent=False)

    # ---- loading and saving -------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, name_or_path, *, device=None, dtype=torch.float32):
        """A folder or hub id in the Hugging Face layout. Adds <gen_emb> and <disc_emb> where they are missing."""
        tokenizer, backbone = load_pretrained(name_or_path, dtype)
        add_embedding_tokens(backbone, tokenizer)
        if len(tokenizer) > (rows := backbone.get_input_embeddings().weight.shape[0]):
            raise BadInput(f"{name_or_path}: its tokenizer has {len(tokenizer)} tokens, the model {rows} rows for them")
        return cls(backbone, tokenizer).to(device).eval()

    def save_pretrained(self, path, state=None):
        """Write weights, tokenizer, chat template, image processor and generation config, as transformers reads them.
        state: all parameters by name, if FSDP has sharded those of the module."""
        if state is not None:
            tied = {"backbone.lm_head.weight"} if self.backbone.config.tie_word_embeddings else set()
            state = {name.removeprefix("backbone."): x for name, x in state.items() if name not in tied}
        self.backbone.save_pretrained(path, state_dict=state)
        self.tokenizer.save_pretrained(path)
        family = self.family
        low, high = family.image_pixels
        processor = getattr(transformers, family.picture_processor)(
            size={"shortest_edge": low, "longest_edge": high},
            patch_size=family.patch,
            temporal_patch_size=family.depth,
            merge_size=family.merge,
            image_mean=list(family.mean),
            image_std=list(family.std),
        )
        processor.save_pretrained(path)
        add_keys_of_transformers_4(path)
        for file in Path(path).glob("*.safetensors"):
            apply_umask(file)

    # ---- what is where ------------------------------------------------------------------------------------------

    @property
    def device(self):
        return self.banned.device

    @property
    def width(self):
        """D"""
        return self.backbone.config.text_config.hidden_size

    @property
    def vocabulary(self):
        """V"""
        return self.backbone.get_input_embeddings().weight.shape[0]

    @property
    def compute_dtype(self):
        return torch.bfloat16 if self.bf16 else self.backbone.lm_head.weight.dtype

    @property
    def vision_frozen(self):
        """The whole vision side, merger included, as in RL."""
        return not any(p.requires_grad for p in self.backbone.model.visual.parameters())

    # ---- pictures -----------------------------------------------------------------------------------------------

    def encode_vision(self, patches, grids):
        """What all passes can share: the ViT's states before its mergers [n, (1 + K) D_vit]; where these are frozen too
        (as in RL) the merged tokens [n / merge^2, (1 + K) D]. K: layers of the language model that get states of their
        own (Family). patches uint8 [n, patch_values], grids array [m, 3]; no pictures: empty."""
        if not len(patches):
            return torch.zeros(0, device=self.device)
        tower = self.backbone.model.visual
        layout = self.family.vision_layout(tower, torch.from_numpy(grids), self.device)
        return self.family.vision_states(tower, normalise(patches, self.family), layout, merged=self.vision_frozen)

    def merge_states(self, states):
        """Each merger reads its part: [n, (1 + K) D_vit] -> [n / merge^2, (1 + K) D]"""
        mergers = self.family.mergers(self.backbone.model.visual)
        merged = []
        for merger, part in zip(mergers, states.chunk(len(mergers), dim=-1)):
            merged.append(merger(part.contiguous()))
        return torch.cat(merged, dim=-1)

    def vision_states_of(self, batch):
        """Those that the batch brings along, else those of its patches."""
        if batch.vision_states is not None:
            return batch.vision_states
        return self.encode_vision(batch.patches, batch.grids)

    @torch.no_grad()
    def share_vision(self, rows, n):
        """Runs the frozen ViT once over the pictures of all rows, n rows at a time, and keeps the states with them.

        They wait in the CPU's memory: a page of 2.4 M pixels has 12,040 x 1,280 of them, 31 MB in bf16, and a step of
        128 pairs a process up to 8 GB. The pixels are let go.
        """
        for start in range(0, len(rows), n):
            stop_if_asked()
            part = rows[start : start + n]
            batch = Batch(None, None, None, *pictures_of(part, self.device))  # no tokens are read
            states = self(batch).vision_states.cpu()
            patches_per_state = self.family.merge**2 if self.vision_frozen else 1
            lengths = [row.num_patches // patches_per_state for row in part]
            for row, own in zip(part, states.split(lengths)):
                row.vision_states = own  # empty for a row without pictures
                row.patches = np.zeros((0, self.family.patch_values), np.uint8)

    def embed_tokens(self, batch, vision_states):
        """Token embeddings with the merged picture states instead of the pad tokens' -> [B, L, D], and what the
        language model takes besides: the states for its first K layers."""
        x = self.backbone.get_input_embeddings()(batch.ids)
        if len(vision_states):
            merged = vision_states if self.vision_frozen else self.merge_states(vision_states)
            merged = merged.view(len(batch.media_at), merged.shape[-1])  # an error unless they are as many as the pads
            first, *others = merged.split(self.width, dim=-1)
            x = x.flatten(0, 1).index_put((batch.media_at,), first.to(x.dtype)).view_as(x)  # see add_states
            deepstack = {}
            if others:
                deepstack = {"visual_pos_masks": batch.media_at, "deepstack_visual_embeds": others}
            return x, deepstack
        if torch.is_grad_enabled() and not self.vision_frozen:
            # no picture in this micro-batch: the vision side gets a gradient of zeros, or DDP would wait for it
            merge = self.family.merge
            patches = torch.zeros(merge**2, self.family.patch_values, dtype=torch.uint8, device=x.device)
            stand_in = self.encode_vision(patches, np.array([[1, merge, merge]]))
            x = x + 0 * self.merge_states(stand_in).sum().to(x.dtype)
        return x, {}

    # ---- one pass, with gradients -------------------------------------------------------------------------------

    def pad_rows(self, rows, mask=None):
        """B rows of any lengths -> Batch. mask: bool [B, 1, L, L], where causal attention is not what is wanted."""
        L = padded_length(max(len(row.ids) for row in rows), self.device)
        tokens = np.zeros((4, len(rows), L), dtype=np.int64)
        tokens[0] = self.end_id  # padding may be any text token: nothing reads it
        for b, row in enumerate(rows):
            tokens[0, b, : len(row.ids)] = row.ids
            tokens[1:, b, : len(row.ids)] = row.positions
        media_at = np.flatnonzero(np.isin(tokens[0], self.media_ids))  # here: a GPU would have to be waited for
        tokens, media_at = to_device(self.device, torch.from_numpy(tokens), torch.from_numpy(media_at))
        ids, positions = tokens[0], tokens[1:]
        patches, grids = pictures_of(rows, self.device)
        known = [row.vision_states for row in rows if row.num_patches]
        vision_states = None
        if known and all(states is not None for states in known):
            vision_states = torch.cat(known).to(self.device)
        return Batch(ids, positions, media_at, patches, grids, vision_states, mask)

    def run_language_model(self, x, deepstack, positions, mask=None, cache=None):
        """x [B, L, D] -> the last layer's states after the final norm, [B, L, D]. deepstack: from embed_tokens();
        positions [3, B, L]; mask bool [B, 1, L, L], None: causal; cache: takes the keys and values (PromptCache in
        support/decode.py)."""
        return self.backbone.model.language_model(
            inputs_embeds=x,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=cache is not None,
            **deepstack,
        ).last_hidden_state

    def forward(self, batch, read=None, predict=None, labels=None, temperature=1.0, ban=False):
        """Embeddings at the flat positions `read`, log-probabilities of `labels` at the flat positions `predict`.

        batch: from pad_rows; None is an empty pass, in which FSDP sets itself up. read int [N], predict int [M] index
        the flattened [B * L]; labels int [M]. Returns an Output; with nothing asked it holds the vision states.
        """
        if batch is None:
            return Output()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            states = self.vision_states_of(batch)
            if read is None and labels is None:
                return Output(vision_states=states)
            x, deepstack = self.embed_tokens(batch, states)  # [B, L, D]
            hidden = self.run_language_model(x, deepstack, batch.positions, batch.mask).flatten(0, 1)  # [B * L, D]
            embeddings = logp = entropy = None
            if read is not None:
                embeddings = F.normalize(hidden[read].float(), dim=-1)
            if labels is not None:
                logp, entropy = self.token_logp(hidden[predict], labels, temperature, ban)
        return Output(embeddings, logp, entropy)

    def token_logp(self, hidden, labels, temperature=1.0, ban=False):
        """log softmax(head(hidden))[labels] and entropy, [M] each, in chunks of tokens that backward computes again."""
        banned = self.banned if ban else self.banned[:0]
        dtype = self.compute_dtype
        return TokenLogp.apply(hidden.to(dtype), self.backbone.lm_head.weight, dtype, labels, banned, temperature)

    # ---- generation ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, prompts, *, G=1, temperature=1.0, max_new_tokens=512, slots=64,
                 prefill_tokens=PREFILL_TOKENS):  # fmt: skip
        """Reads each prompt once and decodes G completions of it. Yields (prompt, Rollouts) as they finish.

        prompts: iterable of Prompt; one that cannot be read comes back at once, as (prompt, None). Rollout g of a
        prompt is a function of (prompt.seed, g) and the weights only, whatever is decoded beside it, up to rounding,
        which can turn a close choice (often on a GPU, 1 of 200 in a trial on a CPU). slots: completions decoded at
        once. prefill_tokens: most tokens of one pass over prompts, which bounds its memory; a longer prompt has a pass
        of its own. temperature 0 is greedy.

        The live completions are rows of one cache, left-aligned, each with its own length. The first `slots` of them
        are decoded, those after them wait. The last row moves into the place of one that ends; when none waits any
        more and a slot is free, the next prompts are prefilled.
        """
        slots = max(slots, G)
        decoder = Decoder(self.backbone, slots, self.compute_dtype)
        waiting = Waiting(prompts, self.device)
        live = []  # completions, by slot
        ended_of = {}  # prompt -> those of its completions that have ended, until all have

        with evaluating(self):
            while True:
                # 1. where a slot is free, prefill the next prompts, a few more than there is room for (why: AHEAD)
                admitted = []
                if len(live) < slots:
                    room = slots + min(slots // 2, AHEAD) - len(live)
                    admitted = waiting.take(room // G, prefill_tokens)
                if not live and not admitted:
                    return
                results = [(prompt, None) for prompt in admitted if prompt.row is None]
                readable = [prompt for prompt in admitted if prompt.row is not None]
                if readable:
                    last, disc = self.prefill([prompt.row for prompt in readable], decoder, len(live), G)  # [P, D] both
                    new = []
                    for prompt, d in zip(readable, disc):
                        ended_of[prompt] = []
                        new += [Completion.begin(prompt, g, d, temperature, max_new_tokens) for g in range(G)]
                    self.append_tokens(new, last.repeat_interleave(G, 0), decoder, temperature)
                    live += new

                # 2. hand out the prompts whose G completions have all ended
                for completion in remove_ended(live, decoder.cache):
                    siblings = ended_of[completion.prompt]
                    siblings.append(completion)
                    if len(siblings) == G:
                        del ended_of[completion.prompt]
                        siblings.sort(key=lambda c: c.g)
                        results.append((completion.prompt, Rollouts.collect(siblings)))
                yield from results
                if not live:
                    continue

                # 3. one decode step: the last token of each of A completions is read
                decoded = live[:slots]
                hidden = self.decode_step(decoded, decoder)  # [A, D]

                # 4. the state at <gen_emb> is the generative embedding; the last one wins
                for slot, completion in enumerate(decoded):
                    if completion.ids[-1] == self.gen_id:
                        completion.gen = F.normalize(hidden[slot].float(), dim=-1)
                        completion.gen_at = len(completion.ids) - 1

                # 5. append the next token
                self.append_tokens(decoded, hidden, decoder, temperature)

    def prefill(self, rows, decoder, first_slot, G):
        """Reads P prompts in one right-padded pass and puts their keys and values into G slots each.
        Returns the states at the last token [P, D] and the discriminative embeddings [P, D]."""
        batch = self.pad_rows(rows)
        cache = decoder.prompt_cache(first_slot, len(rows), G, length=batch.ids.shape[1])
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            x, deepstack = self.embed_tokens(batch, self.vision_states_of(batch))  # [P, L, D]
            hidden = self.run_language_model(x, deepstack, batch.positions, cache=cache)  # [P, L, D]
        p = torch.arange(len(rows), device=self.device)
        last = hidden[p, torch.tensor([row.n_prompt - 1 for row in rows], device=self.device)]
        disc = hidden[p, torch.tensor([row.disc_at for row in rows], device=self.device)]
        return last, F.normalize(disc.float(), dim=-1)

    def decode_step(self, completions, decoder):
        """Reads the last token of the A completions in slots 0..A-1: its state, [A, D]."""
        tokens = [c.ids[-1] for c in completions]
        n_read = [len(c.ids) - 1 for c in completions]  # generated tokens of each that were read before
        index = [c.prompt.row.n_prompt + n for c, n in zip(completions, n_read)]
        positions = [c.prompt.row.next_position + n for c, n in zip(completions, n_read)]
        return decoder.step(tokens, index, positions)

    def append_tokens(self, completions, hidden, decoder, temperature):
        """Samples the next token of each completion, given the states [A, D] at their last tokens."""
        logits = sampling_logits(decoder.head(hidden.to(decoder.dtype)), self.banned, temperature or 1.0)
        uniforms = [c.uniforms[len(c.ids)] for c in completions] if temperature else None
        for completion, (token, logp) in zip(completions, sample(logits, uniforms)):
            completion.append(int(token), logp, self.end_id)

    def texts_of(self, rollouts):
        """The G texts of a prompt's rollouts, without the <|im_end|> that ends them."""
        bare = [ids[:-1] if ids[-1] == self.end_id else ids for ids in rollouts.ids]
        return self.tokenizer.batch_decode(bare)

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
        check_arguments(mode, temperature, seed, samples=samples, batch_size=batch_size, max_new_tokens=max_new_tokens)
        samples, batch_size, max_new_tokens = int(samples), int(batch_size), int(max_new_tokens)  # numpy's overflow
        temperature = float(temperature)
        inputs = list_of_inputs(inputs)
        traces = list_of_traces(traces, len(inputs))
        N = len(inputs)
        disc, gen = torch.zeros(N, self.width), torch.zeros(N, samples, self.width)
        valid = torch.zeros(N, samples, dtype=torch.bool)
        num_tokens = torch.zeros(N, samples, dtype=torch.long)
        texts = [[""] * samples for _ in range(N)]
        skipped = {}  # {n: reason}
        bar = Progress(total=N, desc=f"embed {mode}", unit="input", disable=not progress, smoothing=0.1)

        def skip(n, reason):
            skipped[n] = reason
            warnings.warn(f"input {n} is left out, its embeddings are zeros: {reason}", stacklevel=1)
            bar.update(1)

        checked = {}
        for n, item in enumerate(inputs):
            try:
                if traces is not None:
                    check_text(traces[n], f"trace {n}")
                checked[n] = check_input(item, f"input {n}")
            except BadInput as error:
                if N == 1 or (n == N - 1 and not checked):  # no other input is to be saved: the caller must hear it
                    raise
                skip(n, str(error))

        prompts = self.prompts_of(checked, traces, blank_image, int(seed))  # numpy's int would hash differently
        if mode == "disc" or traces is not None:
            results = self.read(prompts, batch_size)
        else:
            results = self.generate(
                prompts, G=samples, temperature=temperature, max_new_tokens=max_new_tokens, slots=batch_size
            )
        for prompt, r in results:
            n = prompt.key
            if r is None:
                skip(n, prompt.problem)
                continue
            disc[n], gen[n], valid[n] = r.disc.cpu(), r.gen.cpu(), r.valid
            num_tokens[n] = torch.tensor([len(ids) for ids in r.ids])
            if traces is not None:
                texts[n] = [traces[n]] * samples
            elif mode != "disc":
                texts[n] = self.texts_of(r)
            bar.update(1)
        bar.close()

        no_disc, no_gen = drop_not_finite(disc, gen, valid)
        for n in no_disc:
            skipped[n] = f"input {n}: its discriminative embedding is not finite"
        if no_disc or no_gen:
            warnings.warn(f"{len({*no_disc, *no_gen})} of {N} inputs have an embedding that is not finite (NaN or "
                          "infinite): zeros, not valid; are the weights broken?", stacklevel=2)  # fmt: skip
        if mode == "disc":
            return Embeddings(disc, None, None, None, skipped=skipped)
        return Embeddings(None if mode == "gen" else disc, gen, texts, valid, num_tokens, skipped)

    def prompts_of(self, checked, traces, blank_image, seed):
        """Yields the prompts of embed(): similar lengths side by side, the longest first (it shows at once whether it
        fits into memory). checked: {n: input}; traces: the N assistant texts that go with them, or None."""
        length = {n: len(x["text"]) + 1000 * len(x["images"] + x["video"]) for n, x in checked.items()}
        for n in sorted(checked, key=lambda n: -length[n]):
            answer = None if traces is None else traces[n]
            try:
                row = encode_input(self.tokenizer, checked[n], answer, blank_image=blank_image, name=f"input {n}",
                                   family=self.family)  # fmt: skip
                yield Prompt(n, row, stable_hash(seed, row.content))
            except (Skip, BadInput) as error:
                yield Prompt(n, None, problem=str(error))

    @torch.no_grad()
    def read(self, prompts, batch_size, prefill_tokens=PREFILL_TOKENS):
        """The same as generate() for prompts whose answers stand in their rows already (or that need none): one pass,
        one rollout each. Yields (prompt, Rollouts)."""
        waiting = Waiting(prompts, self.device)
        while part := waiting.take(batch_size, prefill_tokens):
            results = [(prompt, None) for prompt in part if prompt.row is None]
            readable = [prompt for prompt in part if prompt.row is not None]
            if readable:
                rows = [prompt.row for prompt in readable]
                batch = self.pad_rows(rows)
                starts = batch.ids.shape[1] * torch.arange(len(rows))  # first flat position of each row
                places = torch.tensor([[row.disc_at, max(row.gen_at, 0)] for row in rows])
                read = (starts[:, None] + places).flatten().to(self.device)
                with evaluating(self):
                    states = self(batch, read=read).embeddings.view(len(rows), 2, -1)
                for prompt, (disc, gen) in zip(readable, states):
                    row = prompt.row
                    valid = torch.tensor([row.gen_at >= 0])
                    gen = torch.where(valid.to(gen.device), gen, 0.0)[None]
                    answer = row.ids[row.n_prompt :].tolist()
                    results.append((prompt, Rollouts(disc, gen, valid, [answer], [], [row.gen_at - row.n_prompt])))
            yield from results


# ---------------------------------------------------------------------------------------------------------------
# Parts of a forward pass


def padded_length(n, device):
    """n tokens, on a GPU rounded up to a multiple of 64: a mask needs no copy to be aligned, and the allocator meets
    fewer sizes."""
    return -(-n // 64) * 64 if torch.device(device).type == "cuda" else n


def pictures_of(rows, device):
    """All pictures of the rows -> patches uint8 [n, patch_values] on the device, grids [m, 3] as in Batch."""
    patches = torch.from_numpy(np.concatenate([row.patches for row in rows])).to(device)
    return patches, np.concatenate([row.grids for row in rows])


def int_tensors(device, *lists):
    """Lists of ints -> a tensor of each, in one transfer."""
    return to_device(device, *(torch.tensor(numbers, dtype=torch.long) for numbers in lists))


# ---------------------------------------------------------------------------------------------------------------
# Parts of the decode loop


@dataclass
class Completion:
    """One completion that is being decoded: number g of its prompt."""

    prompt: Prompt
    g: int
    disc: torch.Tensor  # [D]
    uniforms: np.ndarray | None  # [limit + 1] its random numbers; None is greedy
    limit: int  # tokens at most
    ids: list = field(default_factory=list)
    logp: list = field(default_factory=list)
    gen: torch.Tensor | None = None  # [D]
    gen_at: int = -1
    ended: bool = False

    @classmethod
    def begin(cls, prompt, g, disc, temperature, max_new_tokens):
        uniforms = row_uniforms(prompt.seed, g, max_new_tokens + 1) if temperature else None
        return cls(prompt, g, disc, uniforms, max_new_tokens)

    def append(self, token, logp, end_id):
        if len(self.ids) == self.limit:
            self.ended = True  # full; its last token was still read, for the state of a last <gen_emb>
            return
        self.ids.append(token)
        self.logp.append(logp)
        self.ended = token == end_id


class Waiting:
    """Prompts in their order; where there is room for one more it is looked at before it is taken."""

    def __init__(self, prompts, device):
        self.prompts = iter(prompts)
        self.device = device
        self.next = None  # looked at and not taken

    def take(self, most, tokens):
        """Up to `most` prompts, which make at most `tokens` tokens as padded rows, but for a single one -> list, empty
        where none is left."""
        taken, longest = [], 0
        while len(taken) < most:
            prompt = self.next or next(self.prompts, None)
            self.next = None
            if prompt is None:
                break
            longest = max(longest, len(prompt.row.ids) if prompt.row is not None else 0)
            if taken and padded_length(longest, self.device) * (len(taken) + 1) > tokens:
                self.next = prompt
                break
            taken.append(prompt)
        return taken


def remove_ended(live, cache):
    """Takes the completions that have ended out of the slots and returns them; the last live one moves into each free
    slot, so that the live ones are always the first rows."""
    ended = []
    for slot in reversed(range(len(live))):
        completion = live[slot]
        if not completion.ended:
            continue
        ended.append(completion)
        last_live = live.pop()
        if last_live is not completion:
            cache.move(len(live), slot)
            live[slot] = last_live
    return ended


def sample(logits, uniforms):
    """Sample by the inverse CDF. logits fp32 [A, V]; uniforms: A numbers in [0, 1), None is greedy -> A pairs
    [token, log p], as floats: one transfer a step, on which the loop waits."""
    logp = logits.log_softmax(-1)
    if uniforms is None:
        tokens = logits.argmax(-1)
    else:
        cdf = logp.double().exp_().cumsum_(-1)
        u = torch.tensor(uniforms, dtype=torch.float64, device=logits.device)[:, None] * cdf[:, -1:]
        tokens = torch.searchsorted(cdf, u, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    return torch.stack([tokens.double(), logp.gather(-1, tokens[:, None])[:, 0].double()], 1).tolist()


def row_uniforms(seed, g, n):
    """The random numbers of completion g, all drawn when it starts: they depend on nothing that runs beside it."""
    return np.random.default_rng([seed, g]).random(n)


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


# ---------------------------------------------------------------------------------------------------------------
# What embed() is given, and what it gives


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


# ---------------------------------------------------------------------------------------------------------------
# Loading and saving


def save_model(embedder, out):
    """Save the final model in the Hugging Face layout. All ranks call it, rank 0 writes."""
    refuse_not_finite(embedder)
    state = None
    if is_sharded(embedder):
        state = get_model_state_dict(embedder, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if processes()[0] == 0:
        embedder.save_pretrained(out, state)
