"""The embedder: Qwen2-VL (or 2.5, or Qwen3-VL) with two embeddings, disc and gen.

    [media] TEXT <disc_emb> INSTRUCTION  |  <think>..</think><answer>..<gen_emb>         prompt  |  generated answer

disc is the state at <disc_emb> in the prompt, gen the state at the last <gen_emb> in the answer. A state is the output
of the last layer after the final norm, L2-normalised, without projection, as in the paper and the released weights.

Shapes: B rows, L tokens, D hidden size, V vocabulary, P prompts, G rollouts per prompt, A completions that are being
decoded, N and M any count.

Departures from the official code
 1. We call the vision tower, language model and head of the backbone ourselves, with our own rotary positions, so the
    position deltas that the module stores are never used. We replace three parts of each loaded model (never the
    classes of transformers) by faster ones with the same weights and results: the patch embedding, the RMSNorms and
    the addition of DeepStack states in Qwen3-VL.
 2. The head runs only on tokens whose log-probability is needed, in chunks that the backward pass computes again.
    Logits of all tokens x 152 k words (0.6 MB a token in fp32) never exist.
 3. Generation is our own loop and decode step (support/decode.py). It reads a prompt and its images once for G
    completions. Each completion has a slot, a row of the key-value cache. A new completion takes the slot of an ended
    one. The decode step that reads <gen_emb> returns the embedding, so no second pass is needed. The tokens of
    NEVER_WRITTEN are never sampled, and RL's log-probabilities exclude them too.
 4. A completion without <gen_emb> has no generative embedding. The official code reads the <gen_emb> of INSTRUCTION.
 5. <disc_emb> is read exactly at its position. The official evaluation reads the token after it.
"""

import contextlib
import warnings
from dataclasses import dataclass, field
from itertools import islice
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
from support.decode import Decoder, remove_ended
from support.distributed import cudnn_attention_off, is_sharded, processes
from support.files import apply_umask, stable_hash
from support.formats import DISC, GEN, check_arguments, check_input, check_text, list_of_inputs, list_of_traces
from support.head import TokenLogp, sampling_logits
from support.images import normalise
from support.loop import stop_if_asked
from support.passes import PASS_TOKENS, cut_into_passes, padded_length, same_number_on_all_ranks
from support.program import BadInput, Progress, Skip
from support.weights import add_embedding_tokens, add_keys_of_transformers_4, load_pretrained

AHEAD = 4  # completions that may wait for a slot after their prefill, so that one prefill reads several prompts
# Sampling bans these names and the media pads. tokenizer.pad_token is not used, because it may be <|im_end|>.
NEVER_WRITTEN = ("<|endoftext|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|im_start|>", DISC)


@dataclass
class Embeddings:
    """The result of embed() for N inputs."""

    disc: torch.Tensor | None  # float32 [N, D]
    gen: torch.Tensor | None  # float32 [N, samples, D], zeros if invalid
    texts: list | None  # N lists of `samples` assistant texts
    valid: torch.Tensor | None  # bool [N, samples]: the text has a <gen_emb>
    num_tokens: torch.Tensor | None = None  # int [N, samples], generated tokens
    skipped: dict = field(default_factory=dict)  # {n: reason} of inputs without embeddings: zeros, not valid

    @property
    def fused(self):
        """Return [disc, gen] / sqrt(2), float32 [N, samples, 2D], or None unless the mode is "both". The dot product is
        the mean of both cosines. Without a <gen_emb> the gen half is zeros: a query then ranks by disc alone, and a
        candidate scores half of its disc cosine."""
        if self.disc is None or self.gen is None:
            return None
        disc = self.disc[:, None].expand_as(self.gen)
        return torch.cat([disc, self.gen], dim=-1) / 2**0.5


@dataclass(eq=False)  # compare and hash by identity
class Prompt:
    """A prompt for generate()."""

    key: object  # identifies the prompt for the caller
    row: Row | None  # None: unreadable, `problem` has the reason
    seed: int = 0  # seed of its random numbers
    problem: str = ""


@dataclass
class Rollouts:
    """The G completions of one prompt, the result of generate()."""

    disc: torch.Tensor  # [D]
    gen: torch.Tensor  # [G, D], zeros if invalid
    valid: torch.Tensor  # bool [G]
    ids: list  # G lists of token ids, with <|im_end|> if it was reached
    logp: list  # G lists of log-probabilities at sampling time, at the sampling temperature
    gen_at: list  # index of the last <gen_emb> in each of the G lists, -1 if invalid

    @classmethod
    def collect(cls, completions):
        """Return the Rollouts of one prompt's G completions, in the given order."""
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
    """B right-padded rows. Causal attention then hides the pads from real tokens, so no mask is needed."""

    ids: torch.Tensor | None  # [B, L]; None if only vision states are needed
    positions: torch.Tensor | None  # [3, B, L]
    media_at: torch.Tensor | None  # [n / merge^2] flat indices of the pad tokens that merged states replace
    patches: torch.Tensor  # uint8 [n, patch_values]; n = 0 if no row has an image
    grids: np.ndarray  # [m, 3]; an array, because DDP and FSDP move tensors to the GPU but the CPU reads it
    vision_states: torch.Tensor | None = None  # of the patches, if computed earlier
    mask: torch.Tensor | None = None  # bool [B, 1, L, L]; None: causal


class Output(NamedTuple):
    """The result of forward(); fields that were not requested are None."""

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
        self.bf16 = False  # forward and generate run in bf16 autocast over the fp32 master weights
        names = [GEN, DISC, "<|im_end|>", self.family.image_pad, self.family.video_pad]
        self.gen_id, self.disc_id, self.end_id, *self.media_ids = tokenizer.convert_tokens_to_ids(names)
        vocabulary = tokenizer.get_vocab()
        never = {vocabulary[token] for token in NEVER_WRITTEN if token in vocabulary}
        never |= {*self.media_ids, *range(len(tokenizer), self.vocabulary)}  # rows beyond the tokenizer have no text
        self.register_buffer("banned", torch.tensor(sorted(never)), persistent=False)

    # ---- loading and saving -------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, name_or_path, *, device=None, dtype=torch.float32):
        """Load a folder or hub id in the Hugging Face layout. Add <gen_emb> and <disc_emb> if they are missing."""
        tokenizer, backbone = load_pretrained(name_or_path, dtype)
        add_embedding_tokens(backbone, tokenizer)
        if len(tokenizer) > (rows := backbone.get_input_embeddings().weight.shape[0]):
            raise BadInput(f"{name_or_path}: its tokenizer has {len(tokenizer)} tokens, the model only {rows} rows")
        return cls(backbone, tokenizer).to(device).eval()

    def save_pretrained(self, path, state=None):
        """Write weights, tokenizer, chat template, image processor and generation config, as transformers reads them.
        state: all parameters by name, if FSDP has sharded the module."""
        if state is not None:
            tied = {"backbone.lm_head.weight"} if self.backbone.config.tie_word_embeddings else set()
            state = {name.removeprefix("backbone."): x for name, x in state.items() if name not in tied}
        self.backbone.save_pretrained(path, state_dict=state)
        self.tokenizer.save_pretrained(path)
        family = self.family
        low, high = family.image_pixels
        processor = getattr(transformers, family.image_processor)(
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

    # ---- device, sizes, dtype -----------------------------------------------------------------------------------

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
        """True if vision tower and merger are frozen, as in RL."""
        return not any(p.requires_grad for p in self.backbone.model.visual.parameters())

    # ---- one pass, with gradients -------------------------------------------------------------------------------

    def forward(self, batch, embed_at=None, predict=None, labels=None, temperature=1.0, ban=False):
        """Return the embeddings at the flat indices `embed_at` and the log-probabilities of `labels` at `predict`.

        batch: from pad_rows; None is an empty pass that initialises FSDP. embed_at int [N] and predict int [M] index
        the flattened [B * L]; labels int [M]. Without embed_at and labels, the Output holds only the vision states.
        """
        if batch is None:
            return Output()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            states = self.vision_states_of(batch)
            if embed_at is None and labels is None:
                return Output(vision_states=states)
            x, deepstack = self.embed_tokens(batch, states)  # [B, L, D]
            hidden = self.run_language_model(x, deepstack, batch.positions, batch.mask).flatten(0, 1)  # [B * L, D]
            embeddings = logp = entropy = None
            if embed_at is not None:
                embeddings = F.normalize(hidden[embed_at].float(), dim=-1)
            if labels is not None:
                logp, entropy = self.token_logp(hidden[predict], labels, temperature, ban)
        return Output(embeddings, logp, entropy)

    def token_logp(self, hidden, labels, temperature=1.0, ban=False):
        """Return log softmax(head(hidden))[labels] and entropy, [M] each. Backward computes each chunk again."""
        banned = self.banned if ban else self.banned[:0]
        dtype = self.compute_dtype
        return TokenLogp.apply(hidden.to(dtype), self.backbone.lm_head.weight, dtype, labels, banned, temperature)

    def pad_rows(self, rows, mask=None):
        """Return B rows of any lengths as a Batch. mask: bool [B, 1, L, L], or None for causal attention."""
        L = padded_length(max(len(row.ids) for row in rows), self.device)
        tokens = np.zeros((4, len(rows), L), dtype=np.int64)
        tokens[0] = self.end_id  # any text token works as padding: nothing reads it
        for b, row in enumerate(rows):
            tokens[0, b, : len(row.ids)] = row.ids
            tokens[1:, b, : len(row.ids)] = row.positions
        media_at = np.flatnonzero(np.isin(tokens[0], self.media_ids))  # on the CPU: on a GPU this would synchronise
        tokens, media_at = to_device(self.device, torch.from_numpy(tokens), torch.from_numpy(media_at))
        ids, positions = tokens[0], tokens[1:]
        patches, grids = images_of(rows, self.device)
        known = [row.vision_states for row in rows if row.num_patches]
        vision_states = None
        if known and all(states is not None for states in known):
            vision_states = torch.cat(known).to(self.device)
        return Batch(ids, positions, media_at, patches, grids, vision_states, mask)

    def run_language_model(self, x, deepstack, positions, mask=None, cache=None):
        """Return the states of the last layer after the final norm, x [B, L, D] -> [B, L, D]. deepstack: from
        embed_tokens(); positions [3, B, L]; mask bool [B, 1, L, L], or None for causal; cache: stores the keys and
        values (SlotCache in support/decode.py)."""
        return self.backbone.model.language_model(
            inputs_embeds=x,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=cache is not None,
            **deepstack,
        ).last_hidden_state

    # ---- images -------------------------------------------------------------------------------------------------

    def encode_vision(self, patches, grids):
        """Return the vision states that all passes of a step can share. If the mergers are trained, these are the ViT's
        states before its mergers, [n, (1 + K) D_vit]. If they are frozen (as in RL), these are the merged visual tokens
        [n / merge^2, (1 + K) D]. K: number of DeepStack layers (Family). patches uint8 [n, patch_values], grids array
        [m, 3]. Without images the result is empty."""
        if not len(patches):
            return torch.zeros(0, device=self.device)
        tower = self.backbone.model.visual
        layout = self.family.vision_layout(tower, torch.from_numpy(grids), self.device)
        return self.family.vision_states(tower, normalise(patches, self.family), layout, merged=self.vision_frozen)

    def merge_states(self, states):
        """Apply each merger to its part of the states: [n, (1 + K) D_vit] -> [n / merge^2, (1 + K) D]"""
        mergers = self.family.mergers(self.backbone.model.visual)
        parts = states.chunk(len(mergers), dim=-1)
        return torch.cat([merger(part.contiguous()) for merger, part in zip(mergers, parts)], dim=-1)

    def vision_states_of(self, batch):
        """Return the vision states stored in the batch, or compute them from its patches."""
        if batch.vision_states is not None:
            return batch.vision_states
        return self.encode_vision(batch.patches, batch.grids)

    @torch.no_grad()
    def share_vision(self, rows, pass_tokens):
        """Run the frozen ViT once over the images of all rows; store the states in the rows.

        The merger makes one token of merge^2 patches, and a pass has at most pass_tokens of them.
        The states use CPU memory: a page of 2.4 M pixels has 12,040 x 1,280 values, 31 MB in bf16. A step of 128 pairs
        per rank uses up to 8 GB. The pixels are freed.
        """
        patches_of_token = self.family.merge**2
        lengths = [row.num_patches // patches_of_token for row in rows]
        for numbers in same_number_on_all_ranks(cut_into_passes(lengths, pass_tokens)):
            stop_if_asked()
            part = [rows[n] for n in numbers]
            batch = Batch(None, None, None, *images_of(part, self.device))  # images only, no tokens
            states = self(batch).vision_states.cpu()
            patches_per_state = patches_of_token if self.vision_frozen else 1
            num_states = [row.num_patches // patches_per_state for row in part]
            for row, own in zip(part, states.split(num_states)):
                row.vision_states = own  # empty for a row without images
                row.patches = np.zeros((0, self.family.patch_values), np.uint8)

    def embed_tokens(self, batch, vision_states):
        """Return the token embeddings [B, L, D], with merged vision states in the positions of the media pads, and the
        DeepStack arguments of the language model (states for its first K layers)."""
        x = self.backbone.get_input_embeddings()(batch.ids)
        if len(vision_states):
            merged = vision_states if self.vision_frozen else self.merge_states(vision_states)
            merged = merged.view(len(batch.media_at), merged.shape[-1])  # raises unless there is one state per pad
            first, *others = merged.split(self.width, dim=-1)
            x = x.flatten(0, 1).index_put((batch.media_at,), first.to(x.dtype)).view_as(x)  # see add_states
            deepstack = {}
            if others:
                deepstack = {"visual_pos_masks": batch.media_at, "deepstack_visual_embeds": others}
            return x, deepstack
        if torch.is_grad_enabled() and not self.vision_frozen:
            # no image in this micro-batch: the vision tower gets a zero gradient, otherwise DDP would wait for it
            merge = self.family.merge
            patches = torch.zeros(merge**2, self.family.patch_values, dtype=torch.uint8, device=x.device)
            stand_in = self.encode_vision(patches, np.array([[1, merge, merge]]))
            x = x + 0 * self.merge_states(stand_in).sum().to(x.dtype)
        return x, {}

    # ---- generation ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, prompts, *, G=1, temperature=1.0, max_new_tokens=512, slots=64, pass_tokens=PASS_TOKENS):
        """Read each prompt once and decode G completions of it. Yield (prompt, Rollouts) as they finish.

        prompts: iterable of Prompt; an unreadable prompt is yielded at once as (prompt, None). Rollout g of a prompt
        depends only on (prompt.seed, g) and the weights, not on the other completions. Rounding can still flip a close
        choice (often on a GPU, 1 of 200 in a trial on a CPU). slots: completions decoded at once. pass_tokens: most
        tokens of one pass over prompts (cut_into_passes). temperature 0 is greedy.

        Each live completion is a left-aligned row of one cache, with its own length. A decode step reads the first
        `slots` rows. Up to AHEAD prefilled rows after them wait for a slot. When a completion ends, the last row moves
        into its slot. If a slot then stays free, the next prompts are prefilled.
        """
        slots = max(slots, G)
        decoder = Decoder(self.backbone, slots, self.compute_dtype)
        prompts = iter(prompts)
        live = []  # completions, by row of the cache
        ended_of = {}  # prompt -> its ended completions, until all G have ended

        with evaluating(self):
            while True:
                # 1. if a slot is free, prefill the next prompts, with up to AHEAD completions more than slots
                admitted = []
                if len(live) < slots:
                    room = slots + min(slots // 2, AHEAD) - len(live)
                    admitted = list(islice(prompts, room // G))
                if not live and not admitted:
                    return
                results = [(prompt, None) for prompt in admitted if prompt.row is None]
                readable = [prompt for prompt in admitted if prompt.row is not None]
                for numbers in cut_into_passes([len(p.row.ids) for p in readable], pass_tokens, self.device):
                    part = [readable[n] for n in numbers]
                    last, disc = self.prefill([prompt.row for prompt in part], decoder, len(live), G)  # [P, D] both
                    new = []
                    for prompt, d in zip(part, disc):
                        ended_of[prompt] = []
                        new += [Completion.begin(prompt, g, d, temperature, max_new_tokens) for g in range(G)]
                    self.append_tokens(new, last.repeat_interleave(G, 0), decoder, temperature)
                    live += new

                # 2. free the slots of ended completions; yield the prompts of which all G completions have ended
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

                # 3. one decode step reads the last token of each of A completions
                decoded = live[:slots]
                hidden = self.decode_step(decoded, decoder)  # [A, D]

                # 4. the state at <gen_emb> is the generative embedding; a later <gen_emb> replaces it
                for slot, completion in enumerate(decoded):
                    if completion.ids[-1] == self.gen_id:
                        completion.gen = F.normalize(hidden[slot].float(), dim=-1)
                        completion.gen_at = len(completion.ids) - 1

                # 5. sample and append the next token of each
                self.append_tokens(decoded, hidden, decoder, temperature)

    def prefill(self, rows, decoder, first_slot, G):
        """Read P prompts in one right-padded pass and copy their keys and values into G slots each.
        Return the states at the last token [P, D] and the discriminative embeddings [P, D]."""
        batch = self.pad_rows(rows)
        cache = decoder.begin_prefill(first_slot, len(rows), G, length=batch.ids.shape[1])
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            x, deepstack = self.embed_tokens(batch, self.vision_states_of(batch))  # [P, L, D]
            hidden = self.run_language_model(x, deepstack, batch.positions, cache=cache)  # [P, L, D]
        p = torch.arange(len(rows), device=self.device)
        last = hidden[p, torch.tensor([row.n_prompt - 1 for row in rows], device=self.device)]
        disc = hidden[p, torch.tensor([row.disc_at for row in rows], device=self.device)]
        return last, F.normalize(disc.float(), dim=-1)

    def decode_step(self, completions, decoder):
        """Return the states [A, D] at the last token of the A completions in slots 0..A-1."""
        tokens = [c.ids[-1] for c in completions]
        n_read = [len(c.ids) - 1 for c in completions]  # generated tokens in the cache
        index = [c.prompt.row.n_prompt + n for c, n in zip(completions, n_read)]  # in the row of the cache
        positions = [c.prompt.row.next_position + n for c, n in zip(completions, n_read)]  # rotary; lower after images
        return decoder.step(tokens, index, positions)

    def append_tokens(self, completions, hidden, decoder, temperature):
        """Sample the next token of each completion from the states [A, D] at the last tokens, and append it."""
        logits = sampling_logits(decoder.head(hidden.to(decoder.dtype)), self.banned, temperature or 1.0)
        uniforms = [c.uniforms[len(c.ids)] for c in completions] if temperature else None
        for completion, (token, logp) in zip(completions, sample(logits, uniforms)):
            completion.append(int(token), logp, self.end_id)

    def texts_of(self, rollouts):
        """Return the G texts of a prompt's rollouts, without the final <|im_end|>."""
        bare = [ids[:-1] if ids[-1] == self.end_id else ids for ids in rollouts.ids]
        return self.tokenizer.batch_decode(bare)

    # ---- the public interface -----------------------------------------------------------------------------------

    @torch.no_grad()
    def embed(self, inputs, *, mode="both", samples=1, temperature=0.0, seed=0, max_new_tokens=512, traces=None,
              batch_size=8, blank_image=True, progress=False):  # fmt: skip
        """Return the Embeddings of any texts, images and videos, in the order of the inputs. One pass per input.

        inputs: iterable of N inputs, or one input. An input is {"text": str, "images": [path | PIL.Image], "video":
        [path | PIL.Image of each frame]} with optional keys, or a str (a text), or a Path or PIL.Image (an image).
        mode: "disc" only reads the prompt; "gen" and "both" generate. temperature 0 is greedy. A sample depends on
        (seed, content of the input, index of the sample), so equal inputs get equal samples. batch_size: completions
        decoded at once, for speed and memory. In fp32 it changes the result only by rounding, which in bf16 can flip a
        close choice between tokens. traces: N assistant texts to read instead of generating.

        An unusable input (an unreadable image, a wrong form, a control token) does not stop the other inputs. A warning
        and .skipped name it, its embeddings are zeros, and it is not valid. The same holds if its discriminative
        embedding is not finite. A non-finite generative embedding is not valid. Raises BadInput (a ValueError) if the
        arguments are wrong or no input has a valid form.
        """
        check_arguments(mode, temperature, seed, samples=samples, batch_size=batch_size, max_new_tokens=max_new_tokens)
        samples, batch_size, max_new_tokens = int(samples), int(batch_size), int(max_new_tokens)  # numpy ints overflow
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
                if N == 1 or (n == N - 1 and not checked):  # no usable input is left: raise
                    raise
                skip(n, str(error))

        prompts = self.prompts_of(checked, traces, blank_image, int(seed))  # a numpy int would hash differently
        if mode == "disc" or traces is not None:
            results = self.read_once(prompts, batch_size)
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
                          "infinite). It is set to zeros, not valid. Check the weights.", stacklevel=2)  # fmt: skip
        if mode == "disc":
            return Embeddings(disc, None, None, None, skipped=skipped)
        return Embeddings(None if mode == "gen" else disc, gen, texts, valid, num_tokens, skipped)

    def prompts_of(self, checked, traces, blank_image, seed):
        """Yield the prompts of embed(), the longest first: similar lengths share a batch, and an out-of-memory error
        shows at once. checked: {n: input}; traces: N assistant texts, or None."""
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
    def read_once(self, prompts, most, pass_tokens=PASS_TOKENS):
        """Yield (prompt, Rollouts) like generate(), but with one rollout each and without decoding. Each prompt's row
        already contains the assistant's text, or has none because only disc is wanted. most: prompts in memory."""
        prompts = iter(prompts)
        while taken := list(islice(prompts, most)):
            results = [(prompt, None) for prompt in taken if prompt.row is None]
            readable = [prompt for prompt in taken if prompt.row is not None]
            for numbers in cut_into_passes([len(p.row.ids) for p in readable], pass_tokens, self.device):
                part = [readable[n] for n in numbers]
                rows = [prompt.row for prompt in part]
                batch = self.pad_rows(rows)
                starts = batch.ids.shape[1] * torch.arange(len(rows))  # first flat position of each row
                in_row = torch.tensor([[row.disc_at, max(row.gen_at, 0)] for row in rows])
                embed_at = (starts[:, None] + in_row).flatten().to(self.device)
                with evaluating(self):
                    states = self(batch, embed_at=embed_at).embeddings.view(len(rows), 2, -1)
                for prompt, (disc, gen) in zip(part, states):
                    row = prompt.row
                    valid = torch.tensor([row.gen_at >= 0])
                    gen = torch.where(valid.to(gen.device), gen, 0.0)[None]
                    answer = row.ids[row.n_prompt :].tolist()
                    results.append((prompt, Rollouts(disc, gen, valid, [answer], [], [row.gen_at - row.n_prompt])))
            yield from results


# ---------------------------------------------------------------------------------------------------------------
# Parts of a forward pass


def images_of(rows, device):
    """Return patches uint8 [n, patch_values] on the device and grids [m, 3] of all images of the rows, as in Batch."""
    patches = torch.from_numpy(np.concatenate([row.patches for row in rows])).to(device)
    return patches, np.concatenate([row.grids for row in rows])


def int_tensors(device, *lists):
    """Return a tensor for each list of ints, in one transfer."""
    return to_device(device, *(torch.tensor(numbers, dtype=torch.long) for numbers in lists))


# ---------------------------------------------------------------------------------------------------------------
# Parts of the decode loop


@dataclass
class Completion:
    """Completion g of a prompt, while it is decoded."""

    prompt: Prompt
    g: int
    disc: torch.Tensor  # [D]
    uniforms: np.ndarray | None  # [limit + 1] random numbers, one per call of append(); None: greedy
    limit: int  # most tokens
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
            self.ended = True  # full; one more step has read its last token, which may be <gen_emb>
            return
        self.ids.append(token)
        self.logp.append(logp)
        self.ended = token == end_id


def sample(logits, uniforms):
    """Sample by the inverse CDF; return A pairs [token, log p] as floats, in one transfer, because each transfer
    synchronises. logits fp32 [A, V]; uniforms: A numbers in [0, 1), None is greedy."""
    logp = logits.log_softmax(-1)
    if uniforms is None:
        tokens = logits.argmax(-1)
    else:
        cdf = logp.double().exp_().cumsum_(-1)
        u = torch.tensor(uniforms, dtype=torch.float64, device=logits.device)[:, None] * cdf[:, -1:]
        tokens = torch.searchsorted(cdf, u, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    return torch.stack([tokens.double(), logp.gather(-1, tokens[:, None])[:, 0].double()], 1).tolist()


def row_uniforms(seed, g, n):
    """Return all random numbers of completion g, drawn at its start, so they do not depend on other completions."""
    return np.random.default_rng([seed, g]).random(n)


@contextlib.contextmanager
def evaluating(model):
    """Set every module to eval mode, and restore its own mode afterwards, even if the caller stops early. In train mode
    with gradient checkpointing, transformers drops the cache."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


# ---------------------------------------------------------------------------------------------------------------
# A check of the results of embed()


def drop_not_finite(disc, gen, valid):
    """Set non-finite embeddings to zeros and their completions to not valid, in place. NaN scores keep the order of the
    list, which may be the right one, so a broken model would score well.

    disc [N, D], gen [N, S, D], valid bool [N, S]. Return the indices of inputs without disc, and of inputs without gen.
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
    """Save the final model in the Hugging Face layout. All ranks call it; rank 0 writes."""
    refuse_not_finite(embedder)
    state = None
    if is_sharded(embedder):
        state = get_model_state_dict(embedder, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if processes()[0] == 0:
        embedder.save_pretrained(out, state)
