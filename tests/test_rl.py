"""rl.py: the loss against loops, packed groups against plain rows of transformers, the update, processes, resume."""

import copy
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    CLOSE,
    assert_same_gradients,
    encoded,
    gradients,
    inputs,
    read_log,
    rl_flags,
    run_here,
    run_processes,
    same_weights,
    transformers_forward,
    weights,
    with_answer,
)
from torch.distributed._tools.mem_tracker import MemTracker

import model as model_file
import rl
import sft
from data import PairData, encode_input
from model import Embedder, padded_length
from reward import embedding_reward, format_reward
from rl import Group, Settings, grpo_loss, pack_groups, padded, rewards_of, rollout, tree_mask, update
from support.formats import DISC
from support.head import store_linear_in_bf16


def twin_grpo(logp, old, ref, advantages, mask, eps_low, eps_high, beta, norm):
    """One completion and one token at a time."""
    total, kl, clipped, ratios = 0.0, [], 0, []
    for i in range(len(logp)):
        for t in range(logp.shape[1]):
            if not mask[i, t]:
                continue
            r, A = torch.exp(logp[i, t] - old[i, t]), advantages[i]
            kl.append(torch.exp(ref[i, t] - logp[i, t]) - (ref[i, t] - logp[i, t]) - 1)
            if A >= 0 and r > 1 + eps_high:
                value, clipped = (1 + eps_high) * A, clipped + (A > 0)
            elif A < 0 and r < 1 - eps_low:
                value, clipped = (1 - eps_low) * A, clipped + 1
            else:
                value = r * A
            total = total + (-value + beta * kl[-1]) / norm / len(logp)
            ratios.append(r)
    n = max(1, len(kl))
    return total, {"kl": sum(kl) / n, "clip_share": float(clipped) / n, "ratio": sum(ratios) / n}


def draw(B=6, T=9, seed=0):
    g = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(B, T, generator=g, dtype=torch.float64)
    logp = (old + 0.5 * torch.randn(B, T, generator=g, dtype=torch.float64)).requires_grad_()
    ref = old + 0.5 * torch.randn(B, T, generator=g, dtype=torch.float64)
    advantages = torch.randn(B, generator=g, dtype=torch.float64)
    advantages[1] = 0.0
    mask = torch.arange(T) < torch.randint(1, T + 1, (B, 1), generator=g)
    mask[2] = False
    return logp, old, ref, advantages, mask


@pytest.mark.parametrize("settings", [(0.2, 0.28, 0.04, 2048), (0.1, 0.5, 1.0, 7), (0.2, 0.28, 0.0, 1)])
def test_grpo_loss_equals_the_loops(settings):
    """Loss, metrics and gradient are those of loops, beyond both clips and for an empty row."""
    eps_low, eps_high, beta, norm = settings
    for seed in range(3):
        logp, old, ref, A, mask = draw(seed=seed)
        ratio = torch.exp(logp - old)[mask]
        assert (ratio > 1 + eps_high).any() and (ratio < 1 - eps_low).any()
        given = dict(eps_low=eps_low, eps_high=eps_high, beta=beta, norm=norm)
        got, stats = grpo_loss(logp, old, ref, A, mask.float(), **given)
        want, want_stats = twin_grpo(logp, old, ref, A, mask, *settings)
        torch.testing.assert_close(got, want)
        want_stats = {k: float(torch.as_tensor(v).detach()) for k, v in want_stats.items()}
        assert {k: float(v) for k, v in stats.items()} == pytest.approx(want_stats)
        torch.testing.assert_close(*(torch.autograd.grad(x, logp)[0] for x in (got, want)))


@pytest.mark.parametrize("logp, A, want, slope", [
    (0.0, 2.0, -2.0, -2.0), (math.log(1.5), 1.0, -1.28, 0.0), (math.log(1.5), -1.0, 1.5, 1.5),
    (math.log(0.5), -1.0, 0.8, 0.0), (math.log(0.5), 1.0, -0.5, -0.5),
])  # fmt: skip
def test_grpo_defaults_and_signs(logp, A, want, slope):
    """By hand. A ratio of 1.5 is clipped at 1.28 and has no gradient, but not with a negative advantage."""
    zero, one = torch.zeros(1, 1), torch.ones(1, 1)
    x = torch.full((1, 1), logp, requires_grad=True)
    loss, stats = grpo_loss(x, zero, x.detach(), torch.tensor([A]), one)
    loss.backward()
    assert float(loss.detach()) * 2048 == pytest.approx(want) and float(x.grad) * 2048 == pytest.approx(slope)
    assert float(stats["kl"]) == 0
    if logp:  # KL is never negative
        assert float(grpo_loss(x.detach(), zero, zero, torch.zeros(1), one)[1]["kl"]) > 0


@pytest.mark.parametrize("poison", [float("-inf"), float("inf"), float("nan")])
def test_masked_places_do_not_leak(poison):
    """-inf, inf or NaN behind the end of a completion, in any input, changes neither loss nor gradient."""
    for which in range(3):
        logp, old, ref, A, mask = draw()
        want, _ = grpo_loss(logp, old, ref, A, mask)
        (want_gradient,) = torch.autograd.grad(want, logp)
        given = [x.detach().clone() for x in (logp, old, ref)]
        given[which][~mask] = poison
        given[0].requires_grad_()
        loss, stats = grpo_loss(*given, A, mask)
        (gradient,) = torch.autograd.grad(loss, given[0])
        assert torch.equal(loss, want) and torch.equal(gradient, want_gradient)
        assert all(x.isfinite() for x in stats.values())


def args(**more):
    base = dict(G=3, max_new_tokens=20, slots=12, pass_tokens=180, beta=0.04, temperature=1.0, bf16=False,
                checkpointing=False)  # fmt: skip
    return Settings(**(base | more))


def groups_of(rows, rollouts, advantages=None, ok=None):
    """advantages [n, G], ok: n truth values; by default zeros, and all are usable."""
    n = len(rows)
    advantages = torch.zeros(n, 3) if advantages is None else advantages
    return [Group(*group) for group in zip(rows, rollouts, advantages, ok or [True] * n)]


@pytest.fixture(scope="module")
def sampled(writer):
    """Prompts of every kind and three sampled completions of each."""
    rows = [encode_input(writer.tokenizer, x, blank_image=False, family=writer.family) for x in inputs()]
    rollouts = rollout(writer, rows, range(10, 15), args())  # the slots hold four of the five prompts
    valid = torch.stack([r.valid for r in rollouts])
    assert valid.any() and not valid.all() and len({len(ids) for r in rollouts for ids in r.ids}) > 2
    return rows, rollouts


def plain_group(model, row, r, temperature=1.0):
    """Return log p [T] of each completion, from transformers, row by row."""
    names = ["<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "<|im_start|>",
             "<|endoftext|>", DISC]  # fmt: skip
    V = model.backbone.lm_head.weight.shape[0]
    banned = torch.zeros(V, dtype=torch.bool)
    banned[model.tokenizer.convert_tokens_to_ids(names) + list(range(len(model.tokenizer), V))] = True
    logps = []
    for ids in r.ids:
        _, logits = transformers_forward(model, [with_answer(row, ids)])[0]
        logp = (logits.masked_fill(banned, -1e30) / temperature).log_softmax(-1)
        logps.append(logp[torch.arange(row.n_prompt - 1, row.n_prompt - 1 + len(ids)), ids])
    return logps


@pytest.mark.parametrize("which", [[0], [1], [2], [3], [4], [0, 1, 2, 3, 4], [3, 0]])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_packed_rows_equal_plain_rows(writer, sampled, which, temperature):
    """Log p and gradients of packed rows are transformers' on every prompt + completion alone."""
    rows, rollouts = [sampled[0][n] for n in which], [sampled[1][n] for n in which]
    packed = pack_groups(writer, groups_of(rows, rollouts))
    _, logp, entropy, _ = writer(packed.batch, None, packed.predict, packed.labels, temperature, True)
    want = torch.cat([x for row, r in zip(rows, rollouts) for x in plain_group(writer, row, r, temperature)])
    torch.testing.assert_close(logp, want, **CLOSE)
    assert entropy.isfinite().all() and (entropy > 0).all()
    lengths = [len(ids) for r in rollouts for ids in r.ids]
    assert packed.mask.sum(1).tolist() == lengths
    for line, part in zip(padded(logp, packed), want.split(lengths)):
        torch.testing.assert_close(line[: len(part)], part, **CLOSE)
        assert not line[len(part) :].any()
    weights_of_tokens = torch.randn(len(want), generator=torch.Generator().manual_seed(0))
    found = []
    for x in (logp, want):
        writer.zero_grad()
        (x * weights_of_tokens).sum().backward()
        found.append(gradients(writer))
    writer.zero_grad()
    assert_same_gradients(*found)


def test_tree_mask():
    """By hand, and on long rows the plain formula in the memory of two masks (0.3 GB each at 17,884 tokens)."""
    mask = tree_mask([np.array([0, 0, 1, 2, 2]), np.array([0, 1, 2])], "cpu")
    want = [["10000", "11000", "11100", "11010", "11011"], ["10000", "11000", "10100"]]  # who sees whom
    for b, lines in enumerate(want):
        assert ["".join(str(int(x)) for x in line) for line in mask[b, 0, : len(lines)]] == lines
    assert mask.any(-1).all()  # padding has no empty line
    segments = [np.repeat([0, 1, 2, 3], [100, 50, 200, 150]), np.repeat([0, 1], [60, 240])]
    with MemTracker() as tracker:
        mask = tree_mask(segments, "cpu")
    assert tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"] <= 2 * mask.numel()
    seg = torch.full((2, 500), -1)
    for b, s in enumerate(segments):
        seg[b, : len(s)] = torch.from_numpy(s)
    causal = torch.arange(500)[:, None] >= torch.arange(500)
    want = causal & ((seg[:, :, None] == seg[:, None, :]) | (seg[:, None, :] == 0))
    assert mask.dtype == torch.bool and torch.equal(mask[:, 0], want)


def test_longest_passes_come_first(writer, sampled, monkeypatch):
    """In rl.py and sft.py, so that the largest pass runs where no gradients take memory yet."""
    groups = groups_of(*sampled)
    parts = []
    monkeypatch.setattr(rl, "pack_groups", lambda model, part: parts.append(part) or pack_groups(model, part))
    update(writer, writer, groups, args(pass_tokens=1))
    lengths = [len(group.row.ids) + sum(map(len, group.rollouts.ids)) for (group,) in parts]
    assert lengths == sorted(lengths, reverse=True) and len(set(lengths)) > 1 and len(lengths) == len(groups)
    rows = [group.row for group in groups]
    pairs = [SimpleNamespace(query=row, target=rows[0], ok=True) for row in rows]
    local = sft.rows_of_step(pairs, 1, "cpu")
    longest = [max(len(local.rows[n].ids) for n in numbers) for numbers in local.micro_batches]
    assert longest == sorted(longest, reverse=True) and len(set(longest)) > 1


@torch.no_grad()
def test_rounded_lengths_change_no_number(writer, sampled, monkeypatch):
    """Rows that are padded to a multiple of 16, as on a GPU, give the same results everywhere."""
    assert [padded_length(n, torch.device("cuda", 0)) for n in (1, 16, 17)] == [16, 16, 32]
    assert [padded_length(n, "cpu") for n in (1, 16, 17)] == [1, 16, 17]

    def everything():
        packed = pack_groups(writer, groups_of(*sampled))
        found = [*writer(packed.batch, None, packed.predict, packed.labels, ban=True)[1:3]]
        rows = encoded(writer, inputs())
        local = sft.StepRows(rows, torch.tensor([0, 0, 0, 1, 1]), torch.ones(5), [[*range(5)]], (), 0)
        found += sft.embed_micro_batch(writer, local, [4, 0, 1, 2, 3], next_token=True)
        emb = writer.embed(inputs(), traces=["a<gen_emb>"] * 5, batch_size=5)
        return [*found, emb.disc, emb.gen], packed.batch.ids.shape[1], packed.batch.mask.shape[-1]

    plain, longest, _ = everything()
    monkeypatch.setattr(model_file, "padded_length", lambda n, _: padded_length(n, "cuda"))
    monkeypatch.setattr(rl, "padded_length", lambda n, _: padded_length(n, "cuda"))
    rounded, *lengths = everything()
    assert lengths == [-(-longest // 16) * 16] * 2 and lengths[0] > longest
    for a, b in zip(rounded, plain, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_rollout_and_update_see_the_same(writer, sampled):
    """The log-probabilities that the decode loop kept are those of the packed update pass."""
    rows, rollouts = sampled
    packed = pack_groups(writer, groups_of(rows, rollouts))
    with torch.no_grad():
        logp = writer(packed.batch, None, packed.predict, packed.labels, 1.0, True).logp
    torch.testing.assert_close(logp, torch.tensor([x for r in rollouts for lp in r.logp for x in lp]), **CLOSE)
    for row, r, seed in zip(rows, rollouts, range(10, 15)):  # rollouts have the order of the rows
        assert rollout(writer, [row], [seed], args(slots=1))[0].ids == r.ids


def test_pictures_are_looked_at_once(writer_dir, sampled):
    """With share_vision no pass runs the vision tower again. Completions, figures and gradients stay the same."""
    model, found, looks = Embedder.from_pretrained(writer_dir), [], []
    model.backbone.model.visual.requires_grad_(False)
    reference, A = frozen_copy(model, 0.02), torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    for m in (model, reference):
        m.backbone.model.visual.register_forward_hook(lambda *_: looks.append(1))
    for shared in (True, False):
        rows = [replace(row) for row in sampled[0]]
        if shared:
            model.share_vision(rows, 2)
            merged = model.family.merge**2  # patches in a token
            assert [len(row.vision_states) for row in rows] == [row.num_patches // merged for row in rows]
        looks.clear()
        rollouts = rollout(model, rows, range(10, 15), args())
        stats = update(model, reference, groups_of(rows, rollouts, A), args())
        assert bool(looks) != shared
        found.append((rollouts, stats, gradients(model)))
        model.zero_grad()
    (one, stats, grads), (two, plain_stats, plain_grads) = found
    assert [r.ids for r in one] == [r.ids for r in two] == [r.ids for r in sampled[1]]
    torch.testing.assert_close([r.gen for r in one], [r.gen for r in two], **CLOSE)
    assert stats == pytest.approx(plain_stats, abs=1e-5, rel=1e-4)
    assert_same_gradients(grads, plain_grads)


@pytest.fixture(scope="module")
def rl_pairs(writer, world):
    data = PairData([world / "rl.json"], writer.tokenizer, kind="rl", batch_size=4, seed=0, root=world, needs=[DISC],
                    family=writer.family)  # fmt: skip
    pairs = [data[i] for i in (0, 1, 2, 5)]  # 0 and 1 have the same target; 0 and 3 of the files have videos
    assert pairs[0].target_key == pairs[1].target_key != pairs[2].target_key
    rollouts = rollout(writer, [p.query for p in pairs] + [p.target for p in pairs], range(8), args(G=3))
    assert torch.stack([r.valid for r in rollouts]).any()
    return pairs, rollouts


@pytest.mark.parametrize("mask_same", [True, False])
def test_rewards_of_a_batch(writer, rl_pairs, mask_same):
    """Each reward is format plus embedding reward, in both directions, with equal targets masked or not."""
    pairs, rollouts = rl_pairs
    rewards, parts = rewards_of(writer, rollouts, pairs, args(mask_same_target=mask_same))
    gen, valid = torch.stack([r.gen for r in rollouts]), torch.stack([r.valid for r in rollouts])
    q, t, vq, vt = gen[:4], gen[4:], valid[:4], valid[4:]
    same = torch.zeros(4, 4, dtype=torch.bool)
    same[0, 1] = same[1, 0] = mask_same
    form = format_reward([writer.tokenizer.decode(ids) for r in rollouts for ids in r.ids]).view(2, 4, 3)
    torch.testing.assert_close(rewards[0], form[0] + embedding_reward(q, t, torch.stack([vq, vt]), same), **CLOSE)
    torch.testing.assert_close(rewards[1], form[1] + embedding_reward(t, q, torch.stack([vt, vq]), same), **CLOSE)
    torch.testing.assert_close(rewards, parts["format"] + parts["share"] * parts["gap"])


def test_skipped_pair_leaves_every_sum(writer, rl_pairs):
    """With an unusable pair all results are those of the batch without it, and its rewards are 0."""
    pairs, rollouts = rl_pairs
    keep, found = [0, 1, 3], []
    marked = [replace(p, ok=False) if k == 2 else p for k, p in enumerate(pairs)]
    chosen = [rollouts[k] for k in keep] + [rollouts[4 + k] for k in keep]
    all_rewards, _ = rewards_of(writer, rollouts, marked, args())
    few_rewards, _ = rewards_of(writer, chosen, [pairs[k] for k in keep], args())
    assert not all_rewards[:, 2].any()
    torch.testing.assert_close(all_rewards[:, keep], few_rewards)
    A = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    reference = frozen_copy(writer, 0.01)
    for batch, r, a in ((marked, rollouts, A), ([pairs[k] for k in keep], chosen, A[:, keep])):
        rows = [p.query for p in batch] + [p.target for p in batch]
        ok = [p.ok for p in batch] * 2
        writer.zero_grad()
        stats = update(writer, reference, groups_of(rows, r, a.flatten(0, 1), ok), args())
        stats.pop("padding")  # of other passes
        found.append((stats, gradients(writer)))
    writer.zero_grad()
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6, rel=1e-4)
    assert_same_gradients(found[0][1], found[1][1])


def frozen_copy(model, noise=0.0):
    other = copy.deepcopy(model).requires_grad_(False).eval()
    with torch.no_grad():
        g = torch.Generator().manual_seed(7)
        for p in other.backbone.model.language_model.parameters():
            p.add_(noise * torch.randn(p.shape, generator=g))
    return other


@pytest.mark.parametrize("pass_tokens, checkpointing", [(1, False), (180, True), (10_000, False)])
def test_update_equals_a_plain_pass(writer_dir, sampled, pass_tokens, checkpointing):
    """Loss and gradients of an update are those of loops over single completions of transformers."""
    rows, rollouts = sampled
    model = Embedder.from_pretrained(writer_dir)
    model.backbone.model.visual.requires_grad_(False)
    reference, A = frozen_copy(model, 0.02), torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    want, kls = 0.0, []
    for n, (row, r) in enumerate(zip(rows, rollouts)):
        logps = plain_group(model, row, r)
        with torch.no_grad():
            ref_logps = plain_group(reference, row, r)
        for g in range(3):
            logp, ref = logps[g], ref_logps[g]
            given = (logp[None], logp.detach()[None], ref[None], A[n, g : g + 1], torch.ones(1, len(logp)))
            part, stats = twin_grpo(*given, 0.2, 0.28, 0.04, 20)
            want = want + part / 15
            kls += [float(stats["kl"].detach())] * len(logp)
    want.backward()
    want_gradients = gradients(model)
    model.zero_grad()
    if checkpointing:
        model.backbone.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
    groups = groups_of(rows, rollouts, A)
    stats = update(model, reference, groups, args(pass_tokens=pass_tokens))
    assert stats["loss"] == pytest.approx(float(want.detach()), abs=1e-5)
    assert stats["kl"] == pytest.approx(sum(kls) / len(kls), abs=1e-5) and stats["kl"] > 1e-4
    assert stats["clip_share"] == 0 and stats["logp_mismatch"] < 1e-5
    assert_same_gradients(gradients(model), want_gradients)
    assert not any("visual" in name for name in gradients(model))


def test_every_step_is_on_policy(writer_dir, sampled, monkeypatch):
    """Each ratio is exactly 1. The KL is 0 until the first optimiser step, which does not change the reference."""
    rows, rollouts = [replace(row) for row in sampled[0]], sampled[1]
    model = Embedder.from_pretrained(writer_dir)
    model.backbone.model.visual.requires_grad_(False)
    model.share_vision(rows, 100)
    reference, seen = frozen_copy(model), []

    def spy(logp, old, ref, advantages, mask, **settings):
        m = mask.bool()
        seen.append((torch.exp(logp - old)[m].detach(), old[m].clone(), ref[m].clone()))
        return grpo_loss(logp, old, ref, advantages, mask, **settings)

    monkeypatch.setattr(rl, "grpo_loss", spy)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    A = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    stats = []
    for _ in range(2):
        stats.append(update(model, reference, groups_of(rows, rollouts, A), args()))
        optimizer.step()
        optimizer.zero_grad()
    first, second = seen[:3], seen[3:]
    assert all((ratio == 1).all() for ratio, *_ in seen)
    assert all(torch.equal(old, ref) for _, old, ref in first)
    for (*_, ref), (_, old2, ref2) in zip(first, second):
        assert torch.equal(ref, ref2) and not torch.equal(old2, ref2)
    assert stats[0]["kl"] == 0 and stats[0]["clip_share"] == 0 and stats[1]["kl"] > 0 and stats[1]["clip_share"] == 0


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_reference_in_bf16_has_the_same_numbers(writer_dir, sampled, tied):
    """Under autocast a reference with bf16 linear layers gives exactly the results of the fp32 one."""
    plain = Embedder.from_pretrained(writer_dir).eval()
    head = plain.backbone.lm_head
    head.weight = head.weight if tied else torch.nn.Parameter(torch.randn_like(head.weight) / 10)
    plain.bf16 = True
    halved = copy.deepcopy(plain)
    store_linear_in_bf16(halved)
    packed = pack_groups(plain, groups_of(*sampled))
    assert len(packed.batch.patches)
    asked = dict(embed_at=packed.predict, predict=packed.predict, labels=packed.labels, ban=True)
    for a, b in zip(plain(packed.batch, **asked)[:3], halved(packed.batch, **asked)[:3]):
        assert torch.equal(a, b)
    left = {name for name, p in halved.named_parameters() if p.dtype == torch.float32}
    assert all("norm" in name or "ln_q" in name or "embed" in name for name in left), left
    assert any("visual" in name and name.endswith("bias") for name in set(dict(halved.named_parameters())) - left)
    size = [sum(p.numel() * p.element_size() for p in model.parameters()) for model in (plain, halved)]
    assert size[1] < 0.75 * size[0]
    assert (halved.backbone.lm_head.weight is halved.backbone.get_input_embeddings().weight) == tied


def test_step_with_learning_rate_zero_keeps_the_rewards(writer_dir, rl_pairs):
    """After an optimiser step with learning rate 0 completions, rewards and embeddings are the same bits."""
    pairs, rollouts = rl_pairs
    rows = [p.query for p in pairs] + [p.target for p in pairs]
    model, found = Embedder.from_pretrained(writer_dir), []
    reference = frozen_copy(model)
    for lr in (None, 0.0, 1e-2):
        if lr is not None:
            A = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
            update(model, reference, groups_of(rows, rollouts, A), args())
            torch.optim.AdamW(model.parameters(), lr=lr).step()
            model.zero_grad()
        rollouts = rollout(model, rows, range(8), args())
        rewards, parts = rewards_of(model, rollouts, pairs, args())
        found.append((rewards, parts["share"], parts["gap"], torch.stack([r.gen for r in rollouts])))
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1]))
    assert not torch.equal(found[0][3], found[2][3])


def test_policy_gradient_raises_what_was_good(writer_dir, sampled):
    """Updates make a completion of advantage +1 likelier and one of -1 less likely."""
    rows, rollouts = sampled[0][:1], sampled[1][:1]
    assert rollouts[0].ids[0] != rollouts[0].ids[1]
    model = Embedder.from_pretrained(writer_dir)
    reference, A = frozen_copy(model), torch.tensor([[1.0, -1.0, 0.0]])
    before = [float(x.detach().sum()) for x in plain_group(model, rows[0], rollouts[0])]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(3):
        update(model, reference, groups_of(rows, rollouts, A), args())
        optimizer.step()
        optimizer.zero_grad()
    after = [float(x.detach().sum()) for x in plain_group(model, rows[0], rollouts[0])]
    assert after[0] - after[1] > before[0] - before[1] and after[0] > before[0]


def test_two_processes_equal_one(writer_dir, world, tmp_path, monkeypatch):
    """The first step's metrics on two ranks are one rank's, with skipped pairs and other batch sizes."""
    rows = json.loads((world / "rl.json").read_text())
    rows[1]["qry_image"] = rows[8]["qry_image"] = "images/gone.png"
    (world / "rl_gone.json").write_text(json.dumps(rows))
    more = dict(data=world / "rl_gone.json", batch_size=6, steps=2)
    run_here(rl, rl_flags(writer_dir, world, tmp_path / "one", **more), monkeypatch)
    run_processes(rl, rl_flags(writer_dir, world, tmp_path / "two", **more) + ["--pass_tokens", 1, "--slots", 6])
    one, two = read_log(tmp_path / "one"), read_log(tmp_path / "two")
    assert [line["skipped"] for line in one] == [line["skipped"] for line in two] == [1, 1]
    assert one[0]["reward"] > 0 and one[0]["grad_norm"] > 0 and 0 < one[0]["invalid_share"] < 1
    assert two[0] == pytest.approx(one[0], abs=1e-5, rel=1e-5)
    assert one[0]["kl"] == 0 and one[1]["kl"] > 0 and one[0]["logp_mismatch"] < 1e-5
    assert one[0]["share_query"] > 0 and one[0]["format_query"] > 0
    names = sorted(json.loads(line)["row"] for line in (tmp_path / "two/skipped.jsonl").read_text().splitlines())
    assert [name.rpartition(" ")[2] for name in names] == ["1", "8"]


def test_std_floor_reaches_the_run(writer_dir, world, tmp_path, monkeypatch):
    """A floor far above the rewards divides the first step's gradient by itself. The rewards stay the same."""
    lines = []
    for floor in (1e5, 1e6):
        out = tmp_path / f"{floor:g}"
        run_here(rl, rl_flags(writer_dir, world, out, std_floor=floor), monkeypatch)
        lines += read_log(out)
    assert lines[0]["reward"] == lines[1]["reward"] > 0
    assert lines[0]["grad_norm"] == pytest.approx(10 * lines[1]["grad_norm"], rel=1e-3)


def test_learning_rate_zero_changes_nothing(writer_dir, world, tmp_path, monkeypatch):
    """--lr 0 writes the model it has read. The vision tower changes with --train_vision only."""
    before, after = weights(writer_dir), {}
    for name, more in (("zero", dict(lr=0)), ("some", {}), ("vision", dict(steps=2, train_vision=True, save_every=1))):
        run_here(rl, rl_flags(writer_dir, world, tmp_path / name, **more), monkeypatch)
        after[name] = weights(tmp_path / name)
    assert same_weights(after["zero"], before)
    for name, new in after["some"].items():
        assert torch.equal(new, before[name]) == ("visual" in name), name
    assert any(not torch.equal(new, before[name]) for name, new in after["vision"].items() if "visual.blocks" in name)
    (zero,), (some,) = read_log(tmp_path / "zero"), read_log(tmp_path / "some")
    assert zero | {"lr": 0} == some | {"lr": 0}  # the first step's figures come before its optimiser step
    log = read_log(tmp_path / "vision")
    assert all(math.isfinite(x) for line in log for x in line.values()) and log[1]["kl"] > 0


def test_the_share_of_noise_in_the_advantages():
    """Two groups: rewards 0 and 1, and rewards that differ by 0.01. With the paper's floor, half of the squared
    advantages comes from the second group. With 0.1 hardly any does."""
    rewards = torch.tensor([[[0.0, 1.0]], [[0.50, 0.51]]])  # [2, p, G]
    rollouts = SimpleNamespace(ids=[[1], [1, 2]], valid=torch.ones(2, dtype=torch.bool))
    shares = []
    for floor in (1e-4, 0.1):
        advantages = rl.group_advantages(rewards.flatten(0, 1), floor)
        figures = rl.summary(rewards, {}, advantages, [rollouts, rollouts], torch.ones(1, dtype=torch.bool))
        shares.append(figures["small_spread_share"])
    assert shares[0] == pytest.approx(0.5, abs=0.01) and shares[1] < 0.01
