"""The reward of stage 2, reinforcement learning: pure functions, no model, no I/O.

Each of P pairs has a query p and its target; G rollouts are sampled for each side. For rollout i of query p

    S+      = { cos(q_pi, t_pj) : j = 1..G }                  all rollouts of its own target
    S-      = { cos(q_pi, t_rj) : r != p, j = 1..G }          all rollouts of all other targets
    R_emb   = |S+ ∩ top_G(S+ ∪ S-)| / G  *  (mean S+ - mean S-)   = share * gap
    R_form  = 1 if the text holds <think>..</think>..<answer>..<gen_emb> in this order, else 0
    R       = R_form + R_emb
    A       = (R - mean_G R) / (std_G R + floor)              std unbiased, over the G rollouts of one prompt

and the same with swapped roles for the rollouts of the target.

Worked example, G = 2 and P = 2: S+ = {.9, .5} and S- = {.7, .1}. The best two of the union are {.9, .7}, and one of
the two is a positive, so share = 1/2. gap = .7 - .4 = .3, and R_emb = .15. Why a product: the share measures the
ranking, and the gap separates rollouts that have the same share.

Edge cases (the paper does not define them; tests/test_reward.py fixes them):
- An invalid own rollout has R_emb 0. S+ and S- exclude invalid rollouts of the other side, but the divisor of the
  share stays G. Without a valid positive the reward is 0. Without a valid negative, mean S- counts as 0.
- Negatives win ties at the border of top_G, so a positive must be strictly better than a negative to displace it.
- If all rewards of a group are equal, or it has one rollout, A is exactly 0, not rounding noise divided by the floor.

Shapes: P pairs, G rollouts per side, D dimensions, N = P*G rollouts of one side.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

FORMAT_TAGS = ("<think>", "</think>", "<answer>", "<gen_emb>")  # no </answer>: in the published data <gen_emb> ends it


def format_reward(texts: list[str]) -> Tensor:
    """Return R_form, [len(texts)], 0 or 1.

    The result equals re.search(r"<think>.*?</think>.*?\\s*<answer>.*?\\s*<gen_emb>", text, re.DOTALL). This code
    finds each tag after the previous tag. The regex backtracks for seconds on texts that repeat their tags, and such
    texts occur during training.
    """
    return torch.tensor([float(_tags_in_order(text)) for text in texts])


def _tags_in_order(text: str) -> bool:
    at = 0
    for tag in FORMAT_TAGS:
        at = text.find(tag, at)
        if at < 0:
            return False
        at += len(tag)
    return True


def embedding_reward(own: Tensor, other: Tensor, valid=None, same_target=None) -> Tensor:
    """Return R_emb, [P, G], of the rollouts `own` against the rollouts `other`; arguments as in
    embedding_reward_parts."""
    share, gap = embedding_reward_parts(own, other, valid, same_target)
    return share * gap


def embedding_reward_parts(own: Tensor, other: Tensor, valid=None, same_target=None) -> tuple[Tensor, Tensor]:
    """Return the two factors of R_emb, (share [P, G], gap [P, G]); both are 0 if an edge case sets the reward to 0.

    own, other   embeddings [P, G, D], normalised or not
    valid        bool [2, P, G], for own and other: the rollout has an embedding; None: all have
    same_target  bool [P, P]: pairs p and r are not negatives of each other (equal targets); the diagonal is implied
    """
    P, G, _ = own.shape
    if valid is None:
        valid = torch.ones(2, P, G, dtype=torch.bool, device=own.device)
    excluded = torch.eye(P, dtype=torch.bool, device=own.device)  # a pair is not its own negative
    if same_target is not None:
        excluded = excluded | same_target

    cos = _unit(own, valid[0]) @ _unit(other, valid[1]).T  # [N, N]
    is_neg = (~excluded).repeat_interleave(G, 0)[:, :, None] & valid[1]  # [N, P, G]
    is_neg = is_neg.reshape(P * G, P * G)  # true on the S- of each row
    own_pair = torch.arange(P, device=own.device).repeat_interleave(G)
    positives = cos.view(P * G, P, G)[torch.arange(P * G, device=own.device), own_pair]  # [N, G], S+
    is_pos = valid[1].repeat_interleave(G, 0)  # [N, G]

    # Only the G best negatives can be in top_G. They come first, so the stable sort prefers them in a tie.
    inf = float("inf")
    best_neg = cos.masked_fill(~is_neg, -inf).topk(G, dim=1).values  # [N, G]
    union = torch.cat([best_neg, positives.masked_fill(~is_pos, -inf)], dim=1)  # [N, 2G]
    values, index = union.sort(dim=1, descending=True, stable=True)
    in_top = (index[:, :G] >= G) & (values[:, :G] > -inf)
    share = in_top.sum(1) / G  # [N]

    gap = _masked_mean(positives, is_pos) - _masked_mean(cos, is_neg)  # [N]
    rewarded = valid[0].reshape(-1) & is_pos.any(1)
    share, gap = share.to(gap.dtype).where(rewarded, 0.0), gap.where(rewarded, 0.0)
    return share.view(P, G), gap.view(P, G)


# The rewards by name, for rl.py --reward_weights. Each is a function of the global batch and returns [P, G]. Its
# arguments are P lists of G texts of `own`, then those of embedding_reward. A new reward needs a function and a line.
REWARDS = {
    "format": lambda texts, own, other, valid, same_target: torch.stack([format_reward(group) for group in texts]),
    "embedding": lambda texts, own, other, valid, same_target: embedding_reward(own, other, valid, same_target),
    # the two factors of the embedding reward, for the log
    "share": lambda texts, own, other, valid, same_target: embedding_reward_parts(own, other, valid, same_target)[0],
    "gap": lambda texts, own, other, valid, same_target: embedding_reward_parts(own, other, valid, same_target)[1],
}


def total_reward(weights: dict, texts, own, other, valid=None, same_target=None) -> tuple[Tensor, dict]:
    """Return R of the rollouts `own`, the weighted sum [P, G] of the rewards in `weights`, and {name: [P, G]}.

    weights {name: number}, a reward of weight 0 is only reported; texts: P lists of G texts of `own`; the other
    arguments as in embedding_reward_parts, for the complete global batch.
    """
    parts = {}
    total = torch.zeros(own.shape[:2], device=own.device)
    for name, weight in weights.items():
        reward = REWARDS[name](texts, own, other, valid, same_target).to(own.device)
        if reward.shape != total.shape:  # it would broadcast, perhaps over the wrong axis
            raise ValueError(f"the reward {name} has shape {list(reward.shape)}, not [P, G] = {list(total.shape)}")
        parts[name] = reward
        if weight:  # a NaN times 0 is NaN
            total = total + weight * reward
    return total, parts


def group_advantages(rewards: Tensor, floor=1e-4) -> Tensor:
    """Return A, [P, G] -> [P, G]: compare every rollout with the mean of its group.

    floor: added to the standard deviation. With the paper's 1e-4, rewards that differ by thousandths give advantages as
    large as rewards that differ by 1. With a larger floor, a group counts by how much its rewards differ.
    """
    if rewards.shape[1] == 1:  # the unbiased std of one value is undefined
        return torch.zeros_like(rewards)
    spread = rewards.amax(1, keepdim=True) - rewards.amin(1, keepdim=True)  # [P, 1]
    centred = rewards - rewards.mean(1, keepdim=True)
    return (centred / (rewards.std(1, keepdim=True) + floor)).where(spread > 0, 0.0)


def _unit(x: Tensor, valid: Tensor) -> Tensor:
    """Return rows of length 1, [P, G, D] -> [N, D], in float32 or wider (bfloat16 cosines tie); invalid rows are zero.

    Zeros are filled in: an invalid row may hold NaN, and NaN times 0 is NaN.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32)).masked_fill(~valid[:, :, None], 0.0)
    return F.normalize(x.flatten(0, 1), dim=-1)


def _masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over dim 1 of the entries under the mask, 0 if the mask is empty."""
    return x.where(mask, 0.0).sum(1) / mask.sum(1).clamp(min=1)
