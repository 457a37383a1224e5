"""reward.py against loops over single rollouts, and the edge cases its docstring lists."""

import random
import re

import pytest
import torch

from reward import FORMAT_TAGS, embedding_reward, embedding_reward_parts, format_reward, group_advantages

OFFICIAL = r"<think>.*?</think>.*?\s*<answer>.*?\s*<gen_emb>"


def twin_parts(own, other, valid, same_target):
    """share and gap of every rollout, one rollout, one cosine at a time."""
    P, G, _ = own.shape
    share, gap = torch.zeros(P, G, dtype=own.dtype), torch.zeros(P, G, dtype=own.dtype)

    def cos(a, b):
        return float(a @ b / (a.norm() * b.norm()))

    for p in range(P):
        for i in range(G):
            if not valid[0, p, i]:
                continue
            pos = [cos(own[p, i], other[p, j]) for j in range(G) if valid[1, p, j]]
            neg = [cos(own[p, i], other[r, j]) for r in range(P) for j in range(G)
                   if r != p and not same_target[p, r] and valid[1, r, j]]
            if not pos:
                continue
            union = sorted([(-s, 0) for s in neg] + [(-s, 1) for s in pos])  # a negative first where equal
            share[p, i] = sum(kind for _, kind in union[:G]) / G
            gap[p, i] = sum(pos) / len(pos) - (sum(neg) / len(neg) if neg else 0.0)
    return share, gap


def draw(P, G, D, seed):
    g = torch.Generator().manual_seed(seed)
    centre = torch.randn(P, 1, D, generator=g, dtype=torch.float64)
    own, other = (centre + torch.randn(P, G, D, generator=g, dtype=torch.float64) for _ in range(2))
    valid = torch.rand(2, P, G, generator=g) < 0.8
    same = torch.rand(P, P, generator=g) < 0.3
    return own, other, valid, same | same.T


@pytest.mark.parametrize("P,G,D", [(1, 1, 4), (1, 4, 3), (2, 2, 3), (5, 3, 6), (6, 5, 16), (6, 1, 8), (2, 8, 4)])
def test_embedding_reward_equals_the_loops(P, G, D):
    """The vectorised reward and its two parts are the loops' with every combination of valid and same_target."""
    for seed in range(4):
        own, other, valid, same = draw(P, G, D, seed)
        every, none = torch.ones(2, P, G, dtype=torch.bool), torch.zeros(P, P, dtype=torch.bool)
        for v, s in [(None, None), (valid, None), (None, same), (valid, same)]:
            share, gap = embedding_reward_parts(own, other, v, s)
            want_share, want_gap = twin_parts(own, other, every if v is None else v, none if s is None else s)
            torch.testing.assert_close(share, want_share)
            torch.testing.assert_close(gap, want_gap)
            torch.testing.assert_close(embedding_reward(own, other, v, s), want_share * want_gap)


def test_worked_example():
    """The numbers of the module's docstring: S+ = {.9, .5}, S- = {.7, .1} give share 1/2, gap .3, reward .15."""
    cosines = torch.tensor([[0.9, 0.5], [0.7, 0.1]])  # of unit vectors to [1, 0]
    own, other = torch.tensor([[[1.0, 0.0]] * 2] * 2), torch.stack([cosines, (1 - cosines**2).sqrt()], -1)
    share, gap = embedding_reward_parts(own, other)
    for got, want in ((share, 0.5), (gap, 0.3), (embedding_reward(own, other), 0.15)):
        torch.testing.assert_close(got[0], torch.tensor([want, want]))


def test_invalid_rollouts():
    """Invalid own rollouts, or targets without a valid one, give 0 even if the rows are NaN. The divisor stays G."""
    own, other, _, _ = draw(3, 4, 8, 0)
    valid = torch.ones(2, 3, 4, dtype=torch.bool)
    valid[0, 0, 1] = valid[1, 1] = False  # one own rollout of pair 0, all targets of pair 1
    valid[1, 2, :3] = False  # one target of pair 2 is left
    own[0, 1], other[1], other[2, :3] = float("nan"), float("nan"), float("nan")
    share, gap = embedding_reward_parts(own, other, valid)
    reward = embedding_reward(own, other, valid)
    assert reward.isfinite().all()
    assert reward[0, 1] == 0 and (reward[1] == 0).all()
    assert share[2].max() <= 0.25  # at most 1 of G = 4
    torch.testing.assert_close((share, gap), twin_parts(own, other, valid, torch.zeros(3, 3, dtype=torch.bool)))


def test_no_negatives():
    """With one pair, or all pairs of the same target, the share is that of the valid positives and mean S- is 0."""
    own, other, _, _ = draw(3, 2, 8, 1)
    share, gap = embedding_reward_parts(own, other, None, torch.ones(3, 3, dtype=torch.bool))
    assert (share == 1).all()
    want = torch.nn.functional.cosine_similarity(own[:, :, None], other[:, None], dim=-1).mean(2)
    torch.testing.assert_close(gap, want)
    valid = torch.tensor([[[True, True]], [[True, False]]])
    assert embedding_reward_parts(own[:1], other[:1], valid)[0].tolist() == [[0.5, 0.5]]


def test_format_reward_equals_the_official_regex():
    """On 2,000 random soups of tags, text and white space the reward is what the official regular expression says."""
    rng = random.Random(0)
    pieces = [*FORMAT_TAGS, *FORMAT_TAGS, "</answer>", "a red star", "\n", "  ", "<think", "<gen_emb"]
    texts = ["".join(rng.choices(pieces, k=rng.randint(0, 12))) for _ in range(2000)]
    texts += ["", "<think>r</think><answer>s<gen_emb>", "<think>\nr\n</think>\n\n<answer>\ns\n<gen_emb></answer>"]
    want = [1.0 if re.search(OFFICIAL, text, re.DOTALL) else 0.0 for text in texts]
    assert 0 < sum(want) < len(want)
    assert format_reward(texts).tolist() == want
    assert format_reward([]).shape == (0,)


@pytest.mark.parametrize("floor", [1e-4, 0.1])
def test_group_advantages_equal_the_loops(floor):
    """(R - mean) / (unbiased std + floor), one group at a time. Equal rewards and G = 1 give exactly 0."""
    rewards = torch.rand(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert floor > 1e-4 or group_advantages(rewards).equal(group_advantages(rewards, floor))  # the paper's by default
    for row, got in zip(rewards.tolist(), group_advantages(rewards, floor).tolist()):
        mean = sum(row) / 8
        std = (sum((r - mean) ** 2 for r in row) / 7) ** 0.5
        assert got == pytest.approx([(r - mean) / (std + floor) for r in row])
    for equal in (torch.tensor([[0.1] * 8, [0.7] * 8, [1 / 3] * 8]), torch.rand(4, 1)):
        assert (group_advantages(equal) == 0).all()


def test_scale_dtype_size_and_ties():
    """Embeddings need no normalising, bfloat16 is raised to float32. Ties go to the negatives."""
    own, other, _, _ = draw(3, 4, 8, 2)
    torch.testing.assert_close(embedding_reward(own * 7, other * 0.1), embedding_reward(own, other))
    assert embedding_reward(own.bfloat16(), other.bfloat16()).dtype == torch.float32
    x = torch.randn(2, 128, 8, 64, generator=torch.Generator().manual_seed(0))
    reward = embedding_reward(x[0], x[1])
    assert reward.shape == (128, 8) and reward.abs().max() <= 2
    x = torch.tensor([3.0, 4.0]).expand(4, 2, 2)
    share, gap = embedding_reward_parts(x, x)
    assert (share == 0).all() and gap.abs().max() < 1e-6
