"""model.py against transformers' own forward pass, against itself without a cache, and the promises of embed().

    python -m pytest tests/test_model.py
"""

import json
import pickle
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    ANSWERS,
    answer_places,
    assert_same_gradients,
    encoded,
    generate_all,
    gradients,
    inputs,
    picture,
    processor_inputs,
    scripted,
    transformers_forward,
    with_answer,
)
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.utils import _to_kwargs
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

import model as model_file
import support.head as head_file
from data import encode_input, mrope_positions
from model import Embedder, row_uniforms, sample
from support.formats import DISC, GEN
from support.head import TokenLogp, sampling_logits

NEVER = ["<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "<|im_start|>",
         "<|endoftext|>", DISC]  # fmt: skip
CLOSE = dict(rtol=0, atol=1e-5)


def everything(model, rows):
    """Our forward at every real token: per row embeddings [L, D] and log p of the next tokens [L - 1]."""
    batch = model.pad_rows(rows)
    L = batch.ids.shape[1]
    read = torch.tensor([b * L + t for b, row in enumerate(rows) for t in range(len(row.ids))])
    predict = torch.tensor([b * L + t for b, row in enumerate(rows) for t in range(len(row.ids) - 1)])
    embeddings, logp, *_ = model(batch, read, predict, batch.ids.flatten()[predict + 1])
    sizes = [len(row.ids) for row in rows]
    return list(zip(embeddings.split(sizes), logp.split([n - 1 for n in sizes])))


def completion_twin(model, row, ids, temperature=1.0):
    """States [L, D] normalised and log p [len(ids)] of a completion: one pass of transformers without a cache, with
    the ban written out."""
    full = with_answer(row, ids)
    with torch.no_grad():
        hidden, logits = transformers_forward(model, [full])[0]
    banned = model.tokenizer.convert_tokens_to_ids(NEVER)
    logits[:, banned + list(range(len(model.tokenizer), logits.shape[1]))] = float("-inf")
    logp = (logits / temperature).log_softmax(-1)[row.n_prompt - 1 : -1]
    return F.normalize(hidden, dim=-1), logp


# ---- the forward pass ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [[0], [1], [2], [3], [4], [0, 1, 2, 3, 4]])
@pytest.mark.parametrize("left", [False, True])
@torch.no_grad()
def test_forward_equals_transformers(embedder, which, left):
    """Every state and every next-token log-probability of text, pictures, videos and mixed batches is that of
    transformers' own forward, whichever side it pads on."""
    rows = encoded(embedder, [inputs()[n] for n in which])
    for row, (embeddings, logp), (hidden, logits) in zip(
        rows, everything(embedder, rows), transformers_forward(embedder, rows, left)
    ):
        torch.testing.assert_close(embeddings, F.normalize(hidden, dim=-1), **CLOSE)
        want = logits.log_softmax(-1)[:-1].gather(1, torch.from_numpy(row.ids)[1:, None])[:, 0]
        torch.testing.assert_close(logp, want, **CLOSE)


@pytest.mark.parametrize("left", [False, True])
def test_positions_equal_get_rope_index(embedder, left):
    """The rotary positions, and the one that follows the row, are get_rope_index's for both paddings; a long film of
    one-token frames, an odd number of frames and pictures much wider than high are among the rows."""
    more = [
        {"text": "five", "video": [picture(i, 90, 50) for i in range(5)]},
        {"text": "", "video": [picture(i, 20, 20) for i in range(8)]},
        {"text": "w", "images": [picture(0, 1500, 9)]},
    ]
    rows = encoded(embedder, inputs() + more)
    batch, begin = processor_inputs(embedder, rows, left)
    want, delta = embedder.backbone.model.get_rope_index(
        batch["input_ids"], batch["mm_token_type_ids"], batch["image_grid_thw"], batch["video_grid_thw"],
        attention_mask=batch["attention_mask"],
    )  # fmt: skip
    for b, row in enumerate(rows):
        np.testing.assert_array_equal(row.positions, want[:, b, begin[b] : begin[b] + len(row.ids)])
        assert row.next_position == len(row.ids) + int(delta[b])


def test_norms_equal_transformers(writer_dir):
    """torch's RMSNorms in the place of transformers' give the same logits and gradients, under the same names."""
    plain = AutoModelForImageTextToText.from_pretrained(writer_dir)
    model = Embedder.from_pretrained(writer_dir)
    kinds = [type(module) for module in model.backbone.modules()]
    assert kinds.count(torch.nn.RMSNorm) == sum("RMSNorm" in type(module).__name__ for module in plain.modules()) > 6
    assert [name for name, _ in plain.named_parameters()] == [name for name, _ in model.backbone.named_parameters()]
    ids = torch.randint(10, 200, (2, 30), generator=torch.Generator().manual_seed(0))
    want, got = plain(input_ids=ids).logits, model.backbone(input_ids=ids).logits
    torch.testing.assert_close(got, want, **CLOSE)
    want.square().mean().backward()
    got.square().mean().backward()
    assert_same_gradients(gradients(model.backbone), gradients(plain))


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
def test_patch_embedding_equals_the_convolution(tiny_dir, tmp_path, monkeypatch, bias):
    """The vision tower's first layer gives what transformers' Conv3d gives, which is never called; its parameters have
    the names of transformers, with which a saved folder is read back."""
    torch.manual_seed(0)  # some random values differ by more than the tolerance
    model = Embedder.from_pretrained(tiny_dir)
    plain = AutoModelForImageTextToText.from_pretrained(tiny_dir)
    assert list(model.backbone.state_dict()) == list(plain.state_dict())
    layer = model.backbone.model.visual.patch_embed
    add_bias = bias and layer.proj.bias is None  # Qwen3-VL has one
    if add_bias:
        layer.proj.bias = torch.nn.Parameter(torch.randn(len(layer.proj.weight)))
    family = model.family
    x = torch.randn(12, family.patch_values)
    want = layer.proj(x.view(12, 3, family.depth, family.patch, family.patch)).flatten(1)
    monkeypatch.setattr(torch.nn.Conv3d, "forward", None)
    torch.testing.assert_close(layer(x), want, **CLOSE)
    assert Embedder(model.backbone, model.tokenizer).backbone.model.visual.patch_embed(x).equal(layer(x))
    monkeypatch.undo()
    if add_bias:
        layer.proj.bias = None
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).model.visual.patch_embed
    torch.testing.assert_close(again(x), layer(x), **CLOSE)


@torch.no_grad()
def test_the_vision_tower_reads_no_lengths_from_the_device(embedder):
    """The grids come as an array, which DDP and FSDP do not move; the lengths that every layer reads are on the CPU,
    wherever the pixels are, and the tower works nothing out of the grids by itself."""
    rows = encoded(embedder, inputs())
    batch = embedder.pad_rows(rows)
    ((moved,),), _ = _to_kwargs((batch,), {}, torch.device("meta"), False)  # what DDP and FSDP do to a batch on a GPU
    assert moved.ids.is_meta and moved.patches.is_meta and moved.grids is batch.grids
    tower, given = embedder.backbone.model.visual, []
    hook = tower.register_forward_pre_hook(lambda _, args, kwargs: given.append(kwargs), with_kwargs=True)
    states = embedder.encode_vision(batch.patches, batch.grids)
    hook.remove()
    layout = embedder.family.vision_layout(tower, torch.from_numpy(batch.grids), "meta")
    assert given[0].keys() == layout.keys()
    on_cpu = {name for name, x in layout.items() if not x.is_meta}
    assert on_cpu == {"grid_thw"} | {name for name in layout if "seqlens" in name}
    assert layout["position_ids"].shape == (len(states), 2) and layout["cu_seqlens"][-1] == len(states)


@torch.no_grad()
def test_precomputed_vision_states(embedder):
    """A batch with states from share_vision gives what the pictures give. Bug story: a text-only row in a micro-batch
    once made pad_rows drop the pictures of the others, since its own states were missing."""
    plain, seen = encoded(embedder, inputs()), encoded(embedder, inputs())
    embedder.share_vision(seen, 2)
    batch = embedder.pad_rows(seen)
    assert not len(batch.patches) and len(batch.vision_states) == sum(len(row.patches) for row in plain) > 0
    for (a, la), (b, lb) in zip(everything(embedder, seen), everything(embedder, plain)):
        torch.testing.assert_close(a, b, **CLOSE)
        torch.testing.assert_close(la, lb, **CLOSE)


def test_pictures_change_the_answer(embedder):
    """Another picture, another order of two pictures, another frame: each gives another embedding."""
    a, b = picture(7), picture(8)
    items = [{"images": [a, b]}, {"images": [b, a]}, {"images": [a, a]}, {"video": [a, b]}, {"video": [b, a]}]
    disc = embedder.embed(items, mode="disc").disc
    assert (torch.pdist(disc) > 1e-3).all()


def test_a_model_can_be_pickled(tiny_dir):
    """torch.save() and spawned processes do it. Story: a lambda in Qwen2-VL's record of data.py stood in the way. (A
    model of its own: where a test asked for all layers' states, transformers left a hook that cannot be pickled.)"""
    model = Embedder.from_pretrained(tiny_dir)
    expected = model.embed(inputs(), mode="disc").disc
    found = pickle.loads(pickle.dumps(model)).embed(inputs(), mode="disc").disc
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_text_only_micro_batch_gives_the_merger_a_gradient(embedder):
    """A micro-batch without pictures gives the mergers, DeepStack's too, zero gradients, not None: DDP would wait."""
    embedder.zero_grad()
    rows = encoded(embedder, inputs()[:1])
    out = embedder(embedder.pad_rows(rows), embed_at=torch.tensor([rows[0].disc_at]))[0]
    torch.testing.assert_close(out[0], everything(embedder, rows)[0][0][rows[0].disc_at], **CLOSE)
    out.sum().backward()
    for merger in embedder.family.mergers(embedder.backbone.model.visual):
        for p in merger.parameters():
            assert p.grad is not None and not p.grad.any()
    embedder.zero_grad()


@pytest.mark.parametrize("chunk", [1, 3, 10_000])
@pytest.mark.parametrize("ban", [False, True])
def test_chunked_head_equals_plain_log_softmax(embedder, monkeypatch, chunk, ban):
    """Log-probabilities, entropies and the gradients of states and head are those of one log_softmax, for any
    chunk."""
    monkeypatch.setattr(head_file, "HEAD_CHUNK", chunk)
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 128, generator=g, requires_grad=True)
    labels, weight = torch.randint(0, 200, (7,), generator=g), torch.randn(7, generator=g)
    head = embedder.backbone.lm_head.weight
    logits = hidden @ head.T
    if ban:
        columns = embedder.tokenizer.convert_tokens_to_ids(NEVER) + list(range(len(embedder.tokenizer), len(head)))
        allowed = torch.ones(len(head), dtype=torch.bool)
        allowed[columns] = False
        labels = allowed.nonzero()[labels, 0]
        logits = logits.masked_fill(~allowed, -1e30)
    want = (logits / 0.7).log_softmax(-1)
    entropy = -(want.exp() * want).sum(-1)
    want = want[torch.arange(7), labels]
    got, got_entropy = embedder.token_logp(hidden, labels, 0.7, ban)
    torch.testing.assert_close(got, want, **CLOSE)
    torch.testing.assert_close(got_entropy, entropy, **CLOSE)
    assert not got_entropy.requires_grad
    for a, b in zip(
        torch.autograd.grad((got * weight).sum(), (hidden, head)),
        torch.autograd.grad((want * weight).sum(), (hidden, head)),
    ):
        torch.testing.assert_close(a, b, **CLOSE)


def test_gradient_of_a_bf16_head_is_added_up_in_fp32():
    """Over 64 chunks the head's gradient is within 0.3 % of the one in fp64, and arrives in fp32 at the fp32 weight;
    summed in bf16 it was 0.8 % away."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(64 * head_file.HEAD_CHUNK, 64, generator=g).bfloat16()
    weight = (torch.randn(400, 64, generator=g) / 10).requires_grad_()
    labels, scale = torch.randint(0, 400, (len(hidden),), generator=g), torch.rand(len(hidden), generator=g)
    logp, _ = TokenLogp.apply(hidden, weight, torch.bfloat16, labels, labels[:0], 1.0)
    (got,) = torch.autograd.grad((logp * scale).sum(), weight)
    exact = weight.detach().bfloat16().double().requires_grad_()
    logp = (hidden.double() @ exact.T).log_softmax(-1).gather(1, labels[:, None])[:, 0]
    (want,) = torch.autograd.grad((logp * scale).sum(), exact)
    assert got.dtype == torch.float32 and float((got - want).norm() / want.norm()) < 0.003
    _, entropy = TokenLogp.apply(hidden, weight, torch.bfloat16, labels, labels[:0], 1.0)
    probabilities = (hidden.double() @ exact.detach().T).softmax(-1)
    exact_entropy = torch.special.entr(probabilities).sum(-1)
    assert entropy.dtype == torch.float32 and float((entropy - exact_entropy).abs().mean()) < 0.01


def test_logits_of_one_chunk_at_a_time(monkeypatch):
    """The forward pass holds one chunk's logits twice, the backward pass once beside the head's gradient. Bug story: a
    loop's variables live until the next chunk has its own, so it was one copy more; and a chunk's part of the head's
    gradient was a second matrix of its size."""
    monkeypatch.setattr(head_file, "HEAD_CHUNK", 64)
    vocabulary = 4000
    hidden = torch.randn(256, 200, requires_grad=True)
    weight = torch.randn(vocabulary, 200, requires_grad=True)
    labels = torch.arange(256)
    logits = 64 * vocabulary * 4  # bytes of a chunk's
    small = logits // 2  # more than all that has no vocabulary in it

    def peak(run):  # above the states and weights that are there
        with MemTracker() as tracker:
            result = run()
        return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"] - weight.nbytes, result

    forward, (logp, _) = peak(lambda: TokenLogp.apply(hidden, weight, torch.float32, labels, labels[:0], 1.0))
    assert 2 * logits <= forward < 2 * logits + small
    backward, _ = peak(lambda: torch.autograd.grad(logp.sum(), (hidden, weight)))
    assert logits + weight.nbytes <= backward < logits + weight.nbytes + small


def test_gradient_checkpointing_changes_nothing(tiny_dir):
    """With gradient checkpointing in train mode the embeddings, log-probabilities and all gradients stay the same."""
    model = Embedder.from_pretrained(tiny_dir).train()
    model.share_vision(rows := encoded(model, inputs()), 8)
    batch, found = model.pad_rows(rows), []
    at = answer_places(rows, batch.ids.shape[1])
    for checkpointing in (False, True):
        if checkpointing:
            model.backbone.activation_checkpointing_enable({"use_reentrant": False})
            assert model.backbone.model.language_model.layers[0].gradient_checkpointing
        model.zero_grad()
        embeddings, logp, *_ = model(batch, at, at, batch.ids.flatten()[at + 1])
        (embeddings[:, 0].sum() + logp.sum()).backward()
        found.append((embeddings.detach(), logp.detach(), gradients(model)))
    torch.testing.assert_close(found[0][:2], found[1][:2], **CLOSE)
    assert_same_gradients(found[0][2], found[1][2])


# ---- generation ------------------------------------------------------------------------------------------------


def generate_slowly(model, row, seed, g, max_new_tokens, temperature=1.0):
    """What Embedder.generate computes, without a cache: one row, a full forward pass for every token.
    Returns the token ids and the generative embedding [D], None without a <gen_emb>."""
    written, gen = [], None
    for u in row_uniforms(seed, g, max_new_tokens + 1):
        ids = np.concatenate([row.ids, np.array(written, row.ids.dtype)])
        positions = mrope_positions(ids, row.grids, model.media_ids, model.family)
        batch = model.pad_rows([replace(row, ids=ids, positions=positions)])
        x, deepstack = model.embed_tokens(batch, model.vision_states_of(batch))  # [1, L, D]
        hidden = model.run_language_model(x, deepstack, batch.positions)[0]  # [L, D]
        if written and written[-1] == model.gen_id:
            gen = F.normalize(hidden[-1], dim=-1)
        if model.end_id in written or len(written) == max_new_tokens:
            break
        logits = sampling_logits(model.backbone.lm_head(hidden[-1:]), model.banned, temperature)
        written.append(int(sample(logits, [u])[0][0]))
    return written, gen


@torch.no_grad()
def test_generate_equals_the_slow_loop(writer):
    """The tokens are the same, the embeddings to rounding, for prompts of every kind decoded side by side."""
    rows = encoded(writer, inputs(), answered=False)
    done = generate_all(writer, rows, G=2, max_new_tokens=20, slots=3)  # the seed of row n is n
    for n, row in enumerate(rows):
        for g in range(2):
            ids, gen = generate_slowly(writer, row, n, g, 20)
            assert done[n].ids[g] == ids and bool(done[n].valid[g]) == (gen is not None)
            torch.testing.assert_close(done[n].gen[g], torch.zeros(128) if gen is None else gen, **CLOSE)
    assert any(r.valid.any() for r in done.values())


def test_cached_decode_equals_full_forward(writer):
    """Log-probabilities and both embeddings that the decode loop reports are those of one pass of transformers over
    the whole sequence, at temperature 0.7 and with all kinds of media."""
    rows, seen = encoded(writer, inputs(), answered=False), set()
    done = generate_all(writer, rows, G=3, temperature=0.7, seeds=range(5), max_new_tokens=24, slots=6)
    for i, row in enumerate(rows):
        for g, ids in enumerate(done[i].ids):
            states, logp = completion_twin(writer, row, ids, 0.7)
            got = torch.tensor(done[i].logp[g])
            torch.testing.assert_close(got, logp[torch.arange(len(ids)), ids], **CLOSE)
            torch.testing.assert_close(done[i].disc, states[row.disc_at], **CLOSE)
            valid = writer.gen_id in ids
            assert bool(done[i].valid[g]) == valid
            at = max((t for t, token in enumerate(ids) if token == writer.gen_id), default=-1)
            assert done[i].gen_at[g] == at
            want = states[row.n_prompt + at] if valid else torch.zeros(128)
            torch.testing.assert_close(done[i].gen[g], want, **CLOSE)
            assert writer.end_id not in ids[:-1] and (ids[-1] == writer.end_id or len(ids) == 24)
            seen.add(valid)
    assert seen == {True, False}, "the case needs completions with and without <gen_emb>"


def test_greedy_takes_the_best_token(writer):
    """At temperature 0 every token is the argmax of a fresh full pass of transformers under the ban."""
    rows = encoded(writer, inputs(), answered=False)
    for i, r in generate_all(writer, rows, temperature=0.0, max_new_tokens=24, slots=2).items():
        _, logp = completion_twin(writer, rows[i], r.ids[0])
        assert logp.argmax(-1).tolist() == r.ids[0]


def test_rollouts_depend_on_seed_and_number_only(writer, monkeypatch):
    """Three rollouts of one prefill are three single runs with the same random numbers; the number of slots, the
    other prompts and their order change no token."""
    rows = encoded(writer, inputs(), answered=False)
    together = generate_all(writer, rows, G=3, max_new_tokens=20, slots=15)  # seeds 0, 1, 2, ..
    assert len({tuple(ids) for ids in together[0].ids + together[1].ids}) > 3
    for slots, order in ((3, [0, 1, 2, 3, 4]), (7, [4, 2, 0, 1, 3]), (64, [3, 1])):
        other = generate_all(writer, [rows[n] for n in order], G=3, seeds=order, max_new_tokens=20, slots=slots)
        assert len(other) == len(order)
        for k, n in enumerate(order):
            assert other[k].ids == together[n].ids
            torch.testing.assert_close(other[k].gen, together[n].gen, **CLOSE)
            torch.testing.assert_close(other[k].disc, together[n].disc, **CLOSE)
    draw = model_file.row_uniforms
    for g in range(3):
        monkeypatch.setattr(model_file, "row_uniforms", lambda seed, _, n, g=g: draw(seed, g, n))
        for i, row in enumerate(rows):
            single = generate_all(writer, [row], G=1, seeds=[i], max_new_tokens=20, slots=1)[0]
            assert single.ids[0] == together[i].ids[g]


def test_last_gen_emb_wins_and_none_is_invalid(embedder):
    """Of two <gen_emb> the last one's state is kept; a completion without one is invalid with zeros, although the
    prompt itself holds a <gen_emb>."""
    texts = ["<think>a<gen_emb> b</think><answer>blue ring<gen_emb>", "<think>none at all", "<gen_emb>", ""]
    script = [[embedder.tokenizer(t).input_ids for t in texts] for _ in range(2)]
    rows = encoded(embedder, inputs()[:2], answered=False)
    assert embedder.gen_id in rows[0].ids  # INSTRUCTION's
    done = generate_all(embedder, rows, G=4, script=script, slots=4)
    for i, row in enumerate(rows):
        assert done[i].valid.tolist() == [True, False, True, False]
        assert not done[i].gen[[1, 3]].any()
        for g in (0, 2):
            states, _ = completion_twin(embedder, row, script[i][g])
            at = len(script[i][g]) - 1
            assert done[i].gen_at[g] == at
            torch.testing.assert_close(done[i].gen[g], states[row.n_prompt + at], **CLOSE)


@pytest.mark.parametrize("limit", [1, 3])
def test_gen_emb_as_the_last_allowed_token(tiny_dir, limit):
    """A <gen_emb> that is sampled as the very last of max_new_tokens tokens is still read in, so its state is
    there."""
    model = Embedder.from_pretrained(tiny_dir)
    rows_of_table = len(model.backbone.lm_head.weight)
    model.banned = torch.tensor([n for n in range(rows_of_table) if n != model.gen_id])  # nothing else is left
    rows = encoded(model, inputs()[:2], answered=False)
    done = generate_all(model, rows, G=2, seeds=[0, 1], max_new_tokens=limit, slots=4)
    for i, row in enumerate(rows):
        assert done[i].ids == [[model.gen_id] * limit] * 2 and done[i].gen_at == [limit - 1] * 2
        states, _ = completion_twin(model, row, [model.gen_id] * limit)
        torch.testing.assert_close(done[i].gen, states[-1].expand(2, -1), **CLOSE)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 4.0])
def test_banned_tokens_are_never_sampled(tiny_dir, temperature):
    """A head that loves the vision tokens, pads, <|im_start|>, <disc_emb> and rows without text cannot make the model
    write one, and their log-probability in training is that of an impossible token without a NaN."""
    model = Embedder.from_pretrained(tiny_dir)
    names = model.tokenizer.convert_tokens_to_ids(NEVER)
    assert len(set(names)) == len(NEVER)
    loved = names + list(range(len(model.tokenizer), len(model.backbone.lm_head.weight)))
    table = model.backbone.lm_head.weight.detach().clone()  # not the embeddings' any more
    table[loved] = 20 * torch.randn(len(loved), 128, generator=torch.Generator().manual_seed(0))
    model.backbone.lm_head.weight = torch.nn.Parameter(table)
    rows = encoded(model, inputs()[:4], answered=False)
    done = generate_all(model, rows, G=4, temperature=temperature, seeds=range(4), max_new_tokens=20, slots=16)
    written = {token for r in done.values() for ids in r.ids for token in ids}
    assert len(written) > 3 and not written & set(loved)
    hidden = torch.randn(3, 128, generator=torch.Generator().manual_seed(1))
    best = (hidden @ table.T).argmax(-1)
    assert set(best.tolist()) <= set(loved)
    free, _ = model.token_logp(hidden, best, 1.0, False)
    assert (free > -5).all()  # without the ban these are the likely ones
    logp, entropy = model.token_logp(hidden, torch.tensor([*best[:2], 5]), 1.0, True)
    assert (logp[:2] < -1e6).all() and logp.isfinite().all() and entropy.isfinite().all() and logp[2] > -100


def test_sample_follows_the_distribution():
    """10,000 evenly spaced numbers in [0, 1) pick every token as often as its probability says, to one; forbidden
    tokens at both ends and in the middle are never picked."""
    logits = torch.tensor([-1e9, 0.3, 2.0, -1e9, -4.0, 1.0, -1e9])
    n = 10_000
    tokens, logp = torch.tensor(sample(logits.expand(n, -1), [k / n for k in range(n)])).T
    tokens, want = tokens.long(), logits.softmax(-1) * n
    assert (torch.bincount(tokens, minlength=7) - want).abs().max() <= 1
    torch.testing.assert_close(logp, logits.log_softmax(-1)[tokens], **CLOSE)
    assert sample(logits[None], None)[0][0] == 2
    assert sample(logits[None], [1 - 2**-53])[0][0] == 5


# ---- embed() ---------------------------------------------------------------------------------------------------


def test_embed_order_and_batch_size(writer):
    """The results come in the order of the inputs and do not depend on batch_size or on who else is embedded."""
    items = inputs()[::-1] + [{"text": "a much longer text " * 5}, {}]
    big = writer.embed(items, samples=2, temperature=1.0, seed=3, max_new_tokens=16, batch_size=64)
    small = writer.embed(items, samples=2, temperature=1.0, seed=3, max_new_tokens=16, batch_size=2)
    assert big.texts == small.texts and torch.equal(big.valid, small.valid)
    assert torch.equal(big.num_tokens, small.num_tokens)
    torch.testing.assert_close((big.disc, big.gen), (small.disc, small.gen), **CLOSE)
    assert big.disc.shape == (7, 128) and big.gen.shape == (7, 2, 128) and big.valid.shape == (7, 2)
    assert big.disc.dtype == big.gen.dtype == torch.float32
    assert big.valid.any() and (torch.pdist(big.disc) > 1e-4).all()
    for n, item in enumerate(items):
        alone = writer.embed([item], mode="disc")
        torch.testing.assert_close(alone.disc[0], big.disc[n], **CLOSE)
        assert alone.gen is None and alone.texts is None and alone.valid is None
    other = writer.embed(items, samples=2, temperature=1.0, seed=4, max_new_tokens=16)
    assert other.texts != big.texts


@pytest.mark.parametrize("given", ["traces", "script"])
def test_embed_does_not_depend_on_the_batch(writer, given):
    """Given traces and scripted tokens: the same embeddings for every batch size and order of the inputs, from static
    batches of one to refilled places, with completions of very different lengths."""
    items = [inputs()[n % 5] | {"text": f"number {n}"} for n in range(8)]
    texts = [f"<think>{'so ' * (n * 7 % 12)}</think><answer>{n}<gen_emb>"[:: -1 if n == 5 else 1] for n in range(8)]
    tokens = [[writer.tokenizer(text).input_ids] for text in texts]

    def embed(order, batch_size):
        some = [items[n] for n in order]
        if given == "traces":
            return writer.embed(some, traces=[texts[n] for n in order], batch_size=batch_size)
        with scripted(writer, [tokens[n] for n in order]):
            return writer.embed(some, batch_size=batch_size)

    want = embed(range(8), 1)
    assert want.valid[:, 0].tolist() == [n != 5 for n in range(8)]
    shuffled = np.random.default_rng(0).permutation(8).tolist()
    for order, batch_size in ((shuffled, 3), (shuffled[::-1], 16)):
        got = embed(order, batch_size)
        torch.testing.assert_close((got.disc, got.gen), (want.disc[order], want.gen[order]), **CLOSE)
        assert torch.equal(got.valid, want.valid[order])
        assert got.texts == [want.texts[n] for n in order] and want.texts[4] == [texts[4]]


@pytest.mark.parametrize("mode", ["both", "disc", "traces"])
def test_unreadable_picture_does_not_stop_the_others(writer, tmp_path, mode):
    """A picture that is gone or broken is named in a warning and in .skipped, with zeros; all others are what they are
    without it, sampled ones too. Bug story: one such picture ended an evaluation after hours."""
    (tmp_path / "broken.png").write_bytes(b"no picture")
    bad = [{"images": [str(tmp_path / "gone.png")]}, {"text": "x", "images": [str(tmp_path / "broken.png")]}]
    items = [inputs()[1], bad[0], inputs()[0], inputs()[3], bad[1]]
    more = {"mode": "disc"} if mode == "disc" else {"traces": [ANSWERS[0]] * 5} if mode == "traces" else {}
    more |= {"temperature": 1.0, "max_new_tokens": 12, "batch_size": 2}
    with pytest.warns(UserWarning, match="input 1 is left out.*gone.png"):
        got = writer.embed(items, **more)
    assert sorted(got.skipped) == [1, 4] and "broken.png" in got.skipped[4]
    assert not got.disc[[1, 4]].any() and got.disc[[0, 2, 3]].norm(dim=-1).min() > 0.99
    want = writer.embed([items[0], {}, items[2], items[3], {}], **more)
    torch.testing.assert_close(got.disc[[0, 2, 3]], want.disc[[0, 2, 3]], **CLOSE)
    assert want.skipped == {}
    if mode != "disc":
        assert not got.valid[[1, 4]].any() and not got.gen[[1, 4]].any() and not got.num_tokens[[1, 4]].any()
        assert [got.texts[n] for n in (0, 1, 2, 3)] == [want.texts[0], [""], want.texts[2], want.texts[3]]


@pytest.mark.parametrize("traces", [False, True])
def test_embed_reads_the_right_places(writer, traces):
    """disc is the state at <disc_emb> of the user's turn, gen that at the assistant's <gen_emb>, both from
    transformers; the blank picture stands in where asked for, and only there."""
    items = inputs()
    texts = [ANSWERS[n % 2] for n in range(5)] if traces else None
    for blank in (True, False):
        got = writer.embed(items, max_new_tokens=24, blank_image=blank, traces=texts, batch_size=3)
        assert got.valid.any()
        for n, item in enumerate(items):
            row = encode_input(writer.tokenizer, item, blank_image=blank, family=writer.family)
            assert len(row.grids) == len(item.get("images", [])) + ("video" in item) + (blank and n == 0)
            answer = writer.tokenizer(got.texts[n][0]).input_ids
            with torch.no_grad():
                states = F.normalize(transformers_forward(writer, [with_answer(row, answer)])[0][0], dim=-1)
            place = row.ids.tolist().index(writer.disc_id)
            torch.testing.assert_close(got.disc[n], states[place], **CLOSE)
            if got.valid[n, 0]:
                at = row.n_prompt + max(t for t, token in enumerate(answer) if token == writer.gen_id)
                torch.testing.assert_close(got.gen[n, 0], states[at], **CLOSE)
            else:
                assert not got.gen[n].any()


def test_traces_without_gen_emb_are_invalid(embedder):
    """A trace without <gen_emb> has no generative embedding; the others of its batch keep theirs."""
    got = embedder.embed(inputs()[:3], traces=[ANSWERS[0], "<think>oops</think><answer>x", ANSWERS[1]])
    assert got.valid.tolist() == [[True], [False], [True]]
    assert not got.gen[1].any() and got.gen[[0, 2]].norm(dim=-1).min() > 0.99
    assert got.disc.norm(dim=-1).min() > 0.99


def test_texts_can_be_read_back_as_traces(writer):
    """What embed() wrote can be given back as traces and yields the same embeddings: the way to score another model's
    reasoning, and its own again."""
    items = [x for n, x in enumerate(inputs()) if n != 2]
    first = writer.embed(items, max_new_tokens=24)
    again = writer.embed(items, traces=[texts[0] for texts in first.texts])
    assert first.valid.any() and torch.equal(first.valid, again.valid)
    torch.testing.assert_close((first.disc, first.gen), (again.disc, again.gen), **CLOSE)


def test_fused_is_one_dot_product_for_both_cosines(writer):
    """[disc, gen] / sqrt(2) of every sample: the dot product is the mean of the cosines; without <gen_emb> the gen half
    is zeros, and what is left orders the others as disc does. Other modes have no fused."""
    items = [{"text": text} for text in ("what", "a star", "a ring", "a moon")]
    traces = [ANSWERS[0], ANSWERS[1], "no embedding", ANSWERS[0]]
    got = writer.embed(items, traces=traces)
    fused = got.fused[:, 0]
    cosines = (got.disc @ got.disc.T + got.gen[:, 0] @ got.gen[:, 0].T) / 2
    torch.testing.assert_close(fused @ fused.T, cosines)
    assert fused.shape == (4, 2 * writer.width) and fused.dtype == torch.float32
    width = writer.width
    assert not fused[2, width:].any() and fused[2, :width].norm() == pytest.approx(0.5**0.5, abs=1e-6)
    assert (fused @ fused[2]).argsort().tolist() == (got.disc @ got.disc[2]).argsort().tolist()
    sampled = writer.embed(items, samples=3, temperature=1.0, max_new_tokens=12)
    assert sampled.fused.shape == (4, 3, 2 * width)
    torch.testing.assert_close(sampled.fused[:, 1, width:] * 2**0.5, sampled.gen[:, 1])
    assert writer.embed(items, mode="disc").fused is None
    assert writer.embed(items, mode="gen", max_new_tokens=4).fused is None


def test_embed_edges(embedder):
    """No inputs give empty tensors; absent, None and empty keys are the same; a wrong mode is refused by name."""
    none = embedder.embed([])
    assert none.disc.shape == (0, 128) and none.gen.shape == (0, 1, 128) and none.texts == []
    same = embedder.embed([{}, {"text": "", "images": [], "video": []}, {"text": None, "images": None}], mode="disc")
    assert torch.equal(same.disc[0], same.disc[1]) and torch.equal(same.disc[0], same.disc[2])
    with pytest.raises(ValueError, match="generative"):
        embedder.embed([], mode="generative")


@pytest.mark.parametrize("kind", ["autocast", "weights"])
def test_bf16_is_close(writer, writer_dir, kind):
    """bf16 autocast over fp32 weights (what GPUs run) and bf16 weights embed and generate within bf16's rounding.
    Bug story: under autocast the rotated keys are fp32 and the cache bf16, so the first decoded token was a dtype
    error."""
    want = writer.embed(inputs(), traces=[ANSWERS[0]] * 5)
    model = Embedder.from_pretrained(writer_dir, dtype=torch.bfloat16 if kind == "weights" else torch.float32)
    model.bf16 = kind == "autocast"
    got = model.embed(inputs(), traces=[ANSWERS[0]] * 5)
    assert got.disc.dtype == torch.float32
    assert not torch.equal(got.disc, want.disc)
    assert F.cosine_similarity(got.disc, want.disc).min() > 0.99
    assert F.cosine_similarity(got.gen[:, 0], want.gen[:, 0]).min() > 0.99
    decoded = model.embed(inputs(), max_new_tokens=24)
    again = model.embed(inputs(), traces=[texts[0] for texts in decoded.texts])  # without a cache
    assert decoded.valid.any() and torch.equal(decoded.valid, again.valid)
    both = decoded.valid[:, 0]
    assert F.cosine_similarity(decoded.disc, want.disc).min() > 0.99
    assert F.cosine_similarity(decoded.gen[both, 0], again.gen[both, 0]).min() > 0.99


# ---- tokens, loading and saving --------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("room", [True, False])
def test_token_rows(tiny_dir, tmp_path, tied, room):
    """<gen_emb>, <disc_emb> get the next two ids in this order and the rows of <|object_ref_end|> and
    <|object_ref_start|>, the head's too where it is its own matrix, with and without free rows in the base."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_dir)
    old = len(tokenizer)
    assert GEN not in tokenizer.get_vocab() and DISC not in tokenizer.get_vocab()
    config = Qwen2VLConfig.from_pretrained(tiny_dir)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = tied
    config.text_config.vocab_size = old + 5 if room else old
    torch.manual_seed(0)
    base = Qwen2VLForConditionalGeneration(config)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = Embedder.from_pretrained(tmp_path / "base")
    assert (model.gen_id, model.disc_id) == (old, old + 1) and len(model.tokenizer) == old + 2
    end, start = tokenizer.convert_tokens_to_ids(["<|object_ref_end|>", "<|object_ref_start|>"])
    matrices = [(model.backbone.get_input_embeddings().weight, base.get_input_embeddings().weight)]
    matrices += [(model.backbone.lm_head.weight, base.lm_head.weight)]
    assert (matrices[0][0] is matrices[1][0]) == tied
    for new, before in matrices:
        assert torch.equal(new[[old, old + 1]], before[[end, start]]) and not torch.equal(before[end], before[start])
        assert torch.equal(new[:old], before[:old])
        assert len(new) == (old + 5 if room else old + 2)
    assert tied == torch.equal(matrices[0][0], matrices[1][0])
    model.save_pretrained(tmp_path / "saved")
    again = Embedder.from_pretrained(tmp_path / "saved")
    assert again.backbone.config.text_config.vocab_size == len(matrices[0][0])
    for (name, a), (other, b) in zip(model.state_dict().items(), again.state_dict().items()):
        assert name == other and torch.equal(a, b), name


def test_tokens_are_ordinary(embedder):
    """The two tokens survive decoding without special tokens and are one token each inside a text."""
    ids = embedder.tokenizer(f"a{GEN}b{DISC}c").input_ids
    assert ids.count(embedder.gen_id) == 1 and ids.count(embedder.disc_id) == 1
    assert embedder.tokenizer.decode(ids, skip_special_tokens=True) == f"a{GEN}b{DISC}c"


def test_checkpoint_with_tokens_is_left_as_it_is(tiny_dir, tmp_path):
    """Loading a model that has the tokens changes no weight: bug story, a second initialisation would reset both
    trained rows at every stage."""
    model = Embedder.from_pretrained(tiny_dir)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.01)
    model.save_pretrained(tmp_path)
    again = Embedder.from_pretrained(tmp_path)
    assert len(again.tokenizer) == len(model.tokenizer) and (again.gen_id, again.disc_id) == (
        model.gen_id,
        model.disc_id,
    )
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values()):
        assert torch.equal(a, b), name


@torch.no_grad()
def test_saved_model_in_plain_transformers(writer, writer_dir):
    """Plain transformers loads the folder and gives the same embeddings; chat template, picture and generation
    settings are in it."""
    backbone = AutoModelForImageTextToText.from_pretrained(writer_dir)
    tokenizer = AutoTokenizer.from_pretrained(writer_dir)
    plain = SimpleNamespace(backbone=backbone, tokenizer=tokenizer,
                            family=writer.family)  # fmt: skip
    got = writer.embed(inputs(), traces=[ANSWERS[0]] * 5, blank_image=False)
    for n, item in enumerate(inputs()):
        row = encode_input(tokenizer, item, ANSWERS[0], blank_image=False, family=writer.family)
        hidden, _ = transformers_forward(plain, [row])[0]
        states, places = F.normalize(hidden, dim=-1), row.ids.tolist()
        at = len(places) - 1 - places[::-1].index(tokenizer.convert_tokens_to_ids(GEN))
        torch.testing.assert_close(states[at], got.gen[n, 0], **CLOSE)
        torch.testing.assert_close(states[places.index(tokenizer.convert_tokens_to_ids(DISC))], got.disc[n], **CLOSE)
    files = {path.name for path in writer_dir.iterdir()}
    assert files >= {"config.json", "model.safetensors", "preprocessor_config.json", "generation_config.json"}
    assert "chat_template" in "".join(files) or "chat_template" in (writer_dir / "tokenizer_config.json").read_text()
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt.endswith("x<|im_end|>\n<|im_start|>assistant\n")
    assert json.loads((writer_dir / "generation_config.json").read_text())["eos_token_id"] == writer.end_id
    size = AutoImageProcessor.from_pretrained(writer_dir, backend="pil").size
    assert (size["shortest_edge"], size["longest_edge"]) == writer.family.image_pixels


def test_folder_without_a_model(tmp_path):
    """A folder without config.json (a stage that was killed) says so instead of asking the hub for it."""
    with pytest.raises(FileNotFoundError, match="config.json"):
        Embedder.from_pretrained(tmp_path)
