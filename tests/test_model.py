"""model.py against transformers' own forward pass and against itself without a cache."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    CLOSE,
    answer_places,
    assert_same_gradients,
    encoded,
    generate_all,
    gradients,
    inputs,
    picture,
    processor_inputs,
    transformers_forward,
    with_answer,
)
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.utils import _to_kwargs
from transformers import AutoModelForImageTextToText

import model as model_file
import support.head as head_file
from data import mrope_positions
from model import Embedder, row_uniforms, sample
from support.formats import DISC
from support.head import TokenLogp, sampling_logits

NEVER = ["<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "<|im_start|>",
         "<|endoftext|>", DISC]  # fmt: skip


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
    """States [L, D] normalised and log p [len(ids)] of a completion, from one pass of transformers with the ban."""
    full = with_answer(row, ids)
    with torch.no_grad():
        hidden, logits = transformers_forward(model, [full])[0]
    banned = model.tokenizer.convert_tokens_to_ids(NEVER)
    logits[:, banned + list(range(len(model.tokenizer), logits.shape[1]))] = float("-inf")
    logp = (logits / temperature).log_softmax(-1)[row.n_prompt - 1 : -1]
    return F.normalize(hidden, dim=-1), logp


@pytest.mark.parametrize("which", [[0], [1], [2], [3], [4], [0, 1, 2, 3, 4]])
@pytest.mark.parametrize("left", [False, True])
@torch.no_grad()
def test_forward_equals_transformers(embedder, which, left):
    """Every state and next-token log-probability is that of transformers' own forward, for either side of padding."""
    rows = encoded(embedder, [inputs()[n] for n in which])
    theirs = transformers_forward(embedder, rows, left)
    for row, (embeddings, logp), (hidden, logits) in zip(rows, everything(embedder, rows), theirs):
        torch.testing.assert_close(embeddings, F.normalize(hidden, dim=-1), **CLOSE)
        want = logits.log_softmax(-1)[:-1].gather(1, torch.from_numpy(row.ids)[1:, None])[:, 0]
        torch.testing.assert_close(logp, want, **CLOSE)


@pytest.mark.parametrize("left", [False, True])
def test_positions_equal_get_rope_index(embedder, left):
    """The rotary positions are get_rope_index's, also for long videos and very wide images."""
    more = [{"text": "five", "video": [picture(i, 90, 50) for i in range(5)]},
            {"text": "", "video": [picture(i, 20, 20) for i in range(8)]},
            {"text": "w", "images": [picture(0, 1500, 9)]}]  # fmt: skip
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
    """torch's RMSNorms give the logits and gradients of transformers', under the same names."""
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
    """The vision tower's first layer equals Conv3d without calling it, and its folder is read back."""
    model = Embedder.from_pretrained(tiny_dir)
    plain = AutoModelForImageTextToText.from_pretrained(tiny_dir)
    assert list(model.backbone.state_dict()) == list(plain.state_dict())
    layer = model.backbone.model.visual.patch_embed
    add_bias = bias and layer.proj.bias is None  # Qwen3-VL has one
    torch.manual_seed(0)
    if add_bias:
        layer.proj.bias = torch.nn.Parameter(torch.randn(len(layer.proj.weight)))
    family = model.family
    x = torch.randn(12, family.patch_values, generator=torch.Generator().manual_seed(0)) / 4
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
    """The grids are an array, which DDP and FSDP do not move. The lengths that every layer reads are on the CPU."""
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
    """Bug story: a text-only row in a micro-batch made pad_rows drop the images of the other rows."""
    plain, seen = encoded(embedder, inputs()), encoded(embedder, inputs())
    embedder.share_vision(seen, 2)
    batch = embedder.pad_rows(seen)
    assert not len(batch.patches) and len(batch.vision_states) == sum(len(row.patches) for row in plain) > 0
    for (a, la), (b, lb) in zip(everything(embedder, seen), everything(embedder, plain)):
        torch.testing.assert_close(a, b, **CLOSE)
        torch.testing.assert_close(la, lb, **CLOSE)


def test_a_model_can_be_pickled(tiny_dir):
    """torch.save() and spawned processes do it. (A model of its own, because others have hooks of transformers.)"""
    model = Embedder.from_pretrained(tiny_dir)
    expected = model.embed(inputs(), mode="disc").disc
    found = pickle.loads(pickle.dumps(model)).embed(inputs(), mode="disc").disc
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_text_only_micro_batch_gives_the_merger_a_gradient(embedder):
    """Without images the mergers get zero gradients, not None, because DDP would wait for them."""
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
    """Log-probabilities, entropies and gradients are those of one log_softmax, for any chunk."""
    monkeypatch.setattr(head_file, "HEAD_CHUNK", chunk)
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 128, generator=g, requires_grad=True)
    labels, weight = torch.randint(0, 200, (7,), generator=g), torch.randn(7, generator=g)
    head = embedder.backbone.lm_head.weight
    logits = hidden @ head.T
    if ban:
        allowed = torch.arange(len(head)) < len(embedder.tokenizer)
        allowed[embedder.tokenizer.convert_tokens_to_ids(NEVER)] = False
        labels = allowed.nonzero()[labels, 0]
        logits = logits.masked_fill(~allowed, -1e30)
    want = (logits / 0.7).log_softmax(-1)
    entropy = -(want.exp() * want).sum(-1)
    want = want[torch.arange(7), labels]
    got, got_entropy = embedder.token_logp(hidden, labels, 0.7, ban)
    torch.testing.assert_close(got, want, **CLOSE)
    torch.testing.assert_close(got_entropy, entropy, **CLOSE)
    assert not got_entropy.requires_grad
    gradients_of = lambda x: torch.autograd.grad((x * weight).sum(), (hidden, head))  # noqa: E731
    torch.testing.assert_close(gradients_of(got), gradients_of(want), **CLOSE)


def test_gradient_of_a_bf16_head_is_added_up_in_fp32():
    """Over 64 chunks the gradient of the head is within 0.3 % of fp64. Summed in bf16 it was 0.8 % away."""
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
    """Bug story: a loop's variables live until the next chunk has its own, so there was one copy of the logits more."""
    monkeypatch.setattr(head_file, "HEAD_CHUNK", 64)
    hidden, labels = torch.randn(256, 200, requires_grad=True), torch.arange(256)
    weight = torch.randn(4000, 200, requires_grad=True)
    logits = 64 * len(weight) * 4  # bytes of a chunk's
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


def generate_slowly(model, row, seed, g, max_new_tokens, temperature=1.0):
    """What Embedder.generate computes, without a cache: a full pass for every token. Return the token ids and the
    generative embedding [D], or None without a <gen_emb>."""
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
    """Tokens, log p and both embeddings of the decode loop are those of one pass of transformers."""
    rows, seen = encoded(writer, inputs(), answered=False), set()
    done = generate_all(writer, rows, G=3, temperature=0.7, seeds=range(5), max_new_tokens=24, slots=6)
    for i, row in enumerate(rows):
        for g, ids in enumerate(done[i].ids):
            states, logp = completion_twin(writer, row, ids, 0.7)
            assert [int(token) for token, _ in sample(logp, row_uniforms(i, g, len(ids)))] == ids
            got = torch.tensor(done[i].logp[g])
            torch.testing.assert_close(got, logp[torch.arange(len(ids)), ids], **CLOSE)
            torch.testing.assert_close(done[i].disc, states[row.disc_at], **CLOSE)
            valid = writer.gen_id in ids
            at = max((t for t, token in enumerate(ids) if token == writer.gen_id), default=-1)
            assert bool(done[i].valid[g]) == valid and done[i].gen_at[g] == at
            want = states[row.n_prompt + at] if valid else torch.zeros(128)
            torch.testing.assert_close(done[i].gen[g], want, **CLOSE)
            assert writer.end_id not in ids[:-1] and (ids[-1] == writer.end_id or len(ids) == 24)
            seen.add(valid)
    assert seen == {True, False}, "the case needs completions with and without <gen_emb>"
    for i, r in generate_all(writer, rows, temperature=0.0, max_new_tokens=24, slots=2).items():
        _, logp = completion_twin(writer, rows[i], r.ids[0])
        assert logp.argmax(-1).tolist() == r.ids[0]


def test_rollouts_depend_on_seed_and_number_only(writer, monkeypatch):
    """Other slots, prompts, orders and groups change no token of a rollout."""
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
    """Of two <gen_emb> the last one counts. Without one it is invalid with zeros, though the prompt has one."""
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
    """A <gen_emb> that is the very last of max_new_tokens is still read in, so its state exists."""
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
    """A head that prefers banned tokens cannot write one. In training they are impossible, without NaN."""
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
    assert (model.token_logp(hidden, best, 1.0, False)[0] > -5).all()  # without the ban these are the likely ones
    logp, entropy = model.token_logp(hidden, torch.tensor([*best[:2], 5]), 1.0, True)
    assert (logp[:2] < -1e6).all() and logp.isfinite().all() and entropy.isfinite().all() and logp[2] > -100


def test_sample_follows_the_distribution():
    """10,000 evenly spaced numbers pick every token as often as its probability says, and never a forbidden one."""
    logits = torch.tensor([-1e9, 0.3, 2.0, -1e9, -4.0, 1.0, -1e9])
    n = 10_000
    tokens, logp = torch.tensor(sample(logits.expand(n, -1), [k / n for k in range(n)])).T
    tokens, want = tokens.long(), logits.softmax(-1) * n
    assert (torch.bincount(tokens, minlength=7) - want).abs().max() <= 1
    torch.testing.assert_close(logp, logits.log_softmax(-1)[tokens], **CLOSE)
    assert sample(logits[None], None)[0][0] == 2
    assert sample(logits[None], [1 - 2**-53])[0][0] == 5
