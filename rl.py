"""Stage 2: reinforcement learning of the reasoning with GRPO.

For every prompt (query or target) the policy samples a group of G completions <think>..</think><answer>..<gen_emb>,
also called rollouts. Their embeddings and texts give the rewards (reward.py), and the rewards of a group give its
advantages A_i. Token t of completion i has the loss

    l_it = -min(r_it A_i, clip(r_it, 1 - eps_low, 1 + eps_high) A_i) + beta * k3(ref_it - logp_it)
    r_it = exp(logp_it - old_it),   k3(x) = exp(x) - x - 1,   loss = mean_i sum_t l_it / norm

logp, old and ref are the token's log-probabilities under the policy, the policy that sampled it and the SFT model. The
mean is over all completions of the global batch, and norm = --max_new_tokens. The embeddings carry no gradient, so RL
changes them only through the sampled text and the shared weights. A step has four blocks (`main`).

Shapes: p pairs of this rank, P pairs of the global batch, G rollouts per prompt, n groups of a forward pass, T tokens
of their longest completion, M tokens of all their completions, D dimensions.

Departures from the paper or the official code
 1. Every forward pass sees the images and videos. The official update and reference pass lose the videos.
 2. Sampling is at temperature 1 without top-k (the official run silently has top_k = 50). Tokens that never occur in
    an answer are banned. The log-probabilities of the update use the same temperature and ban.
 3. Negatives are the rollouts of all other targets of the global batch (32 pairs: 31 x 8). The official code uses one
    micro-step (15 x 8). Pairs with the same target are not negatives (the paper: --mask_same_target false).
 4. The vision tower is frozen, so its features are computed once per step. The official run trains it (--train_vision).
 5. A completion without <gen_emb> gets format 0 and embedding reward 0. The official code reads the prompt's <gen_emb>.
 6. A prompt and its G completions are one packed row with a tree mask: the prompt is computed once, not G times.
 7. Each batch holds one dataset, in shuffled order. Bad rows are masked out and listed (data.py, 1. and 2.).
 8. Toy preset only: norm is 64 = max_new_tokens (2,048 in the paper). The learning rate is 5e-5 (paper: 1e-6).
    AdamW's second beta is 0.98.
 9. Toy preset only: --std_floor is 0.1 (1e-4 in the paper). If all rollouts of a group are right, or all are wrong,
    their rewards differ by thousandths. Divided by so small a deviation, this noise would push the policy as hard as
    the difference between a right and a wrong rollout. The log's small_spread_share measures it.

Commands
    python rl.py                                                          # CPU: the toy world, after sft.py
    python rl.py --preset 2b --model runs/2b/sft --data UME-rl-train.json --media_root MMEB-train               # 1 GPU
    torchrun --nproc_per_node 8 rl.py --preset 2b --model runs/2b/sft --data UME-rl-train.json --media_root MMEB-train
    torchrun --nproc_per_node 8 rl.py --preset 7b --data UME-rl-train.json --media_root MMEB-train          # sharded
"""

import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from data import PairData, Row, step_loader
from model import Batch, Embedder, Prompt, Rollouts, int_tensors, save_model
from reward import REWARDS, group_advantages, total_reward
from support.distributed import (
    all_sum,
    clip_gradients,
    distribute,
    gather,
    gather_list,
    no_gradient_sync,
    processes,
    shard,
    start_processes,
    unsharded,
    without_ddp,
)
from support.files import index_rows, stable_hash
from support.formats import RowCheck
from support.head import store_linear_in_bf16
from support.loop import Loop, begin_run, end_run, make_optimizer, require_usable, resume, stop_if_asked
from support.passes import PASS_TOKENS, cut_into_passes, padded_length, padding_share, same_number_on_all_ranks
from support.program import BadInput, run_script
from support.settings import parse_args, setting
from support.weights import check_model

# ---------------------------------------------------------------------------------------------------------------
# Settings. The class is the 2b preset. A command line without --preset takes toy, which replaces some defaults.


WEIGHTS = {"format": 1.0, "embedding": 1.0, "share": 0.0, "gap": 0.0}  # of rewards; weight 0: only logged


@dataclass
class Settings:
    preset: str = setting("2b", "toy, 2b or 7b: sets the defaults of the other flags; toy if not given")
    model: str = setting("runs/2b/sft", "folder of the SFT model: start and reference")
    data: list[str] = field(default_factory=list, metadata={"help": "RL files, .json or .jsonl"})
    media_root: str = setting(".", "folder that the media paths of --data start from")
    out: str = setting("runs/2b/rl", "output folder")
    # values of the paper, unless the comment says otherwise
    steps: int = setting(345, "optimiser steps (345 in 2b: one epoch of 11 K pairs)")
    batch_size: int = setting(32, "pairs per step over all ranks; each gives a query prompt and a target prompt")
    slots: int = setting(64, "completions decoded at once; changes only memory and time")
    pass_tokens: int = setting(PASS_TOKENS, "most tokens of a pass, pads included; changes only memory and time")
    G: int = setting(8, "rollouts per prompt")
    max_new_tokens: int = setting(2048, "most tokens of a completion; also the constant norm of the loss")
    temperature: float = setting(1.0, "sampling temperature")
    eps_low: float = setting(0.2, "lower clip of the ratio: 1 - eps_low")
    eps_high: float = setting(0.28, "upper clip of the ratio: 1 + eps_high (official code; the paper names only 0.2)")
    beta: float = setting(0.04, "weight of the KL term")
    reward_weights: list[str] = field(default_factory=list, metadata={
        "help": "NAME=WEIGHT of rewards in reward.py; default: format=1 embedding=1 share=0 gap=0; 0: only logged"})
    std_floor: float = setting(1e-4, "added to the standard deviation of a group's rewards")
    lr: float = setting(1e-6, "peak learning rate, linear to 0")
    beta2: float = setting(0.999, "AdamW's second beta")
    clip: float = setting(1.0, "gradient norm is clipped to this")
    # not in the paper; see the departures above
    mask_same_target: bool = setting(True, "equal targets are not each other's negatives; the paper: false")
    blank_image: bool = setting(True, "a query or target without media gets the blank image")
    train_vision: bool = setting(False, "train the vision tower too, as the official code does")
    max_length: int = setting(12_288, "most tokens of a prompt; longer ones are skipped and counted")
    # settings of the machine and the run, which are no part of the method
    bf16: bool = setting(torch.cuda.is_available(), "bf16 autocast over fp32 master weights; true if CUDA is available")
    checkpointing: bool = setting(torch.cuda.is_available(), "gradient checkpointing; true if CUDA is available")
    fsdp: bool = setting(False, "shard policy, reference and optimiser over the ranks (FSDP2)")
    workers: int = setting(4, "loader workers per rank that read and resize images")
    seed: int = setting(0, "order of the batches and random numbers of the rollouts")
    save_every: int = setting(50, "steps between checkpoints")
    keep: int = setting(2, "number of checkpoints to retain")
    max_skipped: float = setting(0.2, "share of unusable rows above which the run stops")
    skip_nonfinite: int = setting(0, "non-finite steps that are left out before the run stops")
    cache: str = setting("runs/cache", "folder for the indexes of the --data files")
    resume: str = setting("auto", "auto: newest checkpoint of --out; none: start from scratch; or a checkpoint folder")


PRESETS = {
    "2b": {},
    # the paper gives no values for 7B, so these are the values of 2B
    "7b": {"model": "runs/7b/sft", "out": "runs/7b/rl", "fsdp": True},
    "toy": {
        "model": "runs/toy/sft", "data": ["runs/toy/data/rl.json"], "media_root": "runs/toy/data", "out": "runs/toy/rl",
        "steps": 400, "batch_size": 24, "slots": 384, "max_new_tokens": 64,
        "std_floor": 0.1, "lr": 5e-5, "beta2": 0.98, "workers": 1, "max_length": 512, "bf16": False,
        "checkpointing": False,
    },
}  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------
# The objective


def grpo_loss(logp, old_logp, ref_logp, advantages, mask, *, eps_low=0.2, eps_high=0.28, beta=0.04, norm=2048):
    """Return the GRPO loss (mean over B of sum over T / norm) and a dict of token means for the log.

    The loss has a clipped ratio, a k3 KL to the reference and a constant length normalisation (Dr. GRPO). The clip acts
    only if several optimiser steps use one batch of rollouts; rl.py takes one step, as the paper does.
    B: completions of a pass. logp, old_logp, ref_logp [B, T]: log-probabilities of the sampled tokens under the policy
    (with gradient), the policy that sampled them, and the reference. advantages [B]. mask [B, T] is 1 on the tokens of
    the completion, <|im_end|> included.
    """
    mask = mask.bool()
    A = advantages[:, None]
    ratio = torch.exp(torch.where(mask, logp - old_logp, 0.0))  # mask before exp: a masked inf must not become NaN
    clipped = ratio.clamp(1 - eps_low, 1 + eps_high)
    x = torch.where(mask, ref_logp - logp, 0.0)
    kl = torch.exp(x) - x - 1  # k3: unbiased, never negative
    per_token = -torch.minimum(ratio * A, clipped * A) + beta * kl  # [B, T]
    loss = (per_token * mask).sum(1).div(norm).mean()
    tokens = mask.sum().clamp(min=1)
    clip = ((ratio * A > clipped * A) & mask).sum() / tokens
    return loss, {
        "kl": (kl.detach() * mask).sum() / tokens,
        "clip_share": clip,
        "ratio": (ratio.detach() * mask).sum() / tokens,
    }


# ---------------------------------------------------------------------------------------------------------------
# The four blocks of a step: rollout, reward, advantage (reward.py), update


def rollout(embedder, rows, seeds, args):
    """Sample G completions for each of n prompts; return n Rollouts in the order of the rows."""
    by_length = sorted(range(len(rows)), key=lambda n: len(rows[n].ids))  # similar lengths: few pads in a prefill
    prompts = [Prompt(n, rows[n], seeds[n]) for n in by_length]
    done = {}
    for prompt, rollouts in embedder.generate(
        prompts,
        G=args.G,
        temperature=args.temperature,
        max_new_tokens=args.max_new_tokens,
        slots=args.slots,
        pass_tokens=args.pass_tokens,
    ):
        done[prompt.key] = rollouts
    return [done[n] for n in range(len(rows))]


def parse_weights(given):
    """Return {reward: weight} for --reward_weights; unnamed rewards have their weight in WEIGHTS.
    ["brevity=0.1"] -> {"format": 1.0, "embedding": 1.0, "share": 0.0, "gap": 0.0, "brevity": 0.1}"""
    weights = {}
    for item in given:
        name, _, number = item.partition("=")
        if name not in REWARDS or name in weights:
            raise BadInput(f"--reward_weights {item}: give NAME=WEIGHT, once for each of {', '.join(REWARDS)}")
        try:
            weights[name] = float(number)
        except ValueError:
            raise BadInput(f"--reward_weights {item}: {number!r} is no number. Give NAME=WEIGHT.") from None
        if not math.isfinite(weights[name]):
            raise BadInput(f"--reward_weights {item}: the weight must be finite")
    weights = {**WEIGHTS, **weights}
    if not any(weights.values()):
        raise BadInput("--reward_weights: all weights are 0: there is nothing to learn from. Give one above 0.")
    return weights


def rewards_of(embedder, rollouts, pairs, args):
    """Return the weighted sum of the rewards [2, p, G] of this rank's p pairs, and each reward by name, [2, p, G].

    The rewards compare with the rollouts of the global batch of P pairs. rollouts: 2p, queries first.
    """
    p, device = len(pairs), embedder.device
    rank, world = processes()
    ok = torch.tensor([pair.ok for pair in pairs], device=device)  # [p]
    gen = torch.stack([r.gen for r in rollouts]).view(2, p, args.G, -1)  # [2, p, G, D]
    valid = torch.stack([r.valid for r in rollouts]).view(2, p, args.G).to(device) & ok[:, None]  # [2, p, G]
    texts = [embedder.texts_of(r) for r in rollouts]  # 2p lists of G

    # every reward may read the rollouts of all ranks
    gen = gather(gen.transpose(0, 1)).transpose(0, 1)  # [2, P, G, D]
    valid = gather(valid.transpose(0, 1)).transpose(0, 1)  # [2, P, G]
    texts = [gather_list(texts[:p]), gather_list(texts[p:])]  # [2][P][G]
    keys = gather(torch.tensor([pair.target_key for pair in pairs], device=device))  # [P]
    same_target = keys[:, None] == keys[None, :] if args.mask_same_target else None

    weights = parse_weights(args.reward_weights)
    query, query_parts = total_reward(weights, texts[0], gen[0], gen[1], valid, same_target)  # [P, G] each
    target, target_parts = total_reward(weights, texts[1], gen[1], gen[0], valid.flip(0), same_target)

    def of_this_rank(query, target):
        """Return this rank's rows of queries and targets, [P, G] x2 -> [2, p, G]; 0 for a skipped pair."""
        global_index = torch.arange(p, device=device) * world + rank  # of this rank's pairs in the global batch
        return torch.stack([query, target])[:, global_index].masked_fill(~ok[:, None], 0.0)

    parts = {name: of_this_rank(query_parts[name], target_parts[name]) for name in weights}
    return of_this_rank(query, target), parts


@dataclass
class Group:
    """A prompt with its G completions and their advantages, for the update."""

    row: Row
    rollouts: Rollouts
    advantages: torch.Tensor  # [G]
    ok: bool  # false: the pair is skipped


@dataclass
class PackedGroup:
    """A prompt and its G completions as one row [prompt | c1 | .. | cG]. Positions start again after the prompt."""

    row: Row
    segments: np.ndarray  # [L] 0 prompt, g + 1 completion g
    predict: list  # for each completion token, the index that predicts it


def pack_group(row, rollouts):
    """Return the PackedGroup of a prompt's Row and its Rollouts. Under tree_mask, each completion has the same rotary
    positions and keys as in a row of its own, so its states are equal too."""
    n = row.n_prompt
    segments = [np.zeros(n, int)]
    positions = [row.positions[:, :n]]
    predict = []
    start = n  # index of the next completion
    for g, ids in enumerate(rollouts.ids):
        segments.append(np.full(len(ids), g + 1))
        positions.append(np.broadcast_to(row.next_position + np.arange(len(ids)), (3, len(ids))))
        predict += [n - 1, *range(start, start + len(ids) - 1)]  # n - 1: the prompt's last token
        start += len(ids)
    ids = np.concatenate([row.ids[:n], *rollouts.ids])
    packed = replace(row, ids=ids, positions=np.concatenate(positions, axis=1), gen_at=-1)
    return PackedGroup(packed, np.concatenate(segments), predict)


def tree_mask(segments, device):
    """Return the attention mask, bool [B, 1, L, L]. A token attends to the prompt and its own completion up to itself.

           p1 p2 a1 a2 b1 b2        Prompt p, completions a and b.
        p2  1  1  .  .  .  .        Each row is an attention query, each column a key.
        a1  1  1  1  .  .  .        Completions do not see each other.
        a2  1  1  1  1  .  .
        b1  1  1  .  .  1  .        Pads (segment -1) see the prompt and pads.
        b2  1  1  .  .  1  1
    """
    L = padded_length(max(map(len, segments)), device)
    seg = torch.full((len(segments), L), -1)
    for b, s in enumerate(segments):
        seg[b, : len(s)] = torch.from_numpy(s)
    seg = seg.to(device)
    mask = seg[:, :, None] == seg[:, None, :]  # the next operations are in place: at 17,884 tokens one mask has 0.32 GB
    mask |= seg[:, None, :] == 0
    return mask.tril_()[:, None]


class Packed(NamedTuple):
    """n groups as a batch for Embedder.forward; M completion tokens, T tokens of the longest completion."""

    batch: Batch
    predict: torch.Tensor  # [M] flat indices
    labels: torch.Tensor  # [M] token ids
    mask_at: torch.Tensor  # [M] flat indices of the tokens in `mask`
    mask: torch.Tensor  # bool [n * G, T], true on the completions' tokens


def pack_groups(embedder, groups):
    """Return n Groups as one Packed batch."""
    device = embedder.device
    packed = [pack_group(group.row, group.rollouts) for group in groups]
    completions = [ids for group in groups for ids in group.rollouts.ids]  # n * G
    attention = tree_mask([p.segments for p in packed], device)
    batch = embedder.pad_rows([p.row for p in packed], attention)
    L = batch.ids.shape[1]
    T = max(map(len, completions))
    predict, labels, mask_at = int_tensors(
        device,
        [b * L + index for b, p in enumerate(packed) for index in p.predict],
        [token for ids in completions for token in ids],
        [i * T + t for i, ids in enumerate(completions) for t in range(len(ids))],
    )
    mask = torch.zeros(len(completions) * T, dtype=torch.bool, device=device).index_fill_(0, mask_at, True)
    return Packed(batch, predict, labels, mask_at, mask.view(-1, T))


def padded(flat, packed):
    """Return the values of the completion tokens [M] as [n * G, T], with zeros after each completion."""
    mask = packed.mask
    return torch.zeros(mask.numel(), device=flat.device).index_copy(0, packed.mask_at, flat).view(mask.shape)


class StepMetrics:
    """The metrics of a step, added up over micro-batches and ranks."""

    def __init__(self):
        self.sums = {}

    def add(self, **values):
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()

    def totals(self, token_means):
        """Return {name: sum}; the metrics named in token_means are means over the tokens."""
        totals = all_sum(torch.stack(list(self.sums.values()))).tolist()
        totals = dict(zip(self.sums, totals))
        tokens = max(1.0, totals.pop("tokens"))
        return {name: x / tokens if name in token_means else x for name, x in totals.items()}


def update(model, reference, groups, args):
    """Add the gradients of this rank's 2p Groups to .grad; return the metrics.

    Each batch of rollouts serves one optimiser step, so the current policy is the one that sampled it. The ratio is 1,
    and its gradient equals the gradient of the log-probability. logp.detach() of this pass serves as the old
    log-probabilities, because those of the decode loop differ by rounding.
    """
    embedder = without_ddp(model)
    device = embedder.device
    _, world = processes()
    num_ok = sum(float(group.ok) for group in groups)
    num_groups = all_sum(torch.tensor(num_ok, device=device)).clamp(min=1)  # of all ranks, queries and targets
    lengths = [len(group.row.ids) + sum(map(len, group.rollouts.ids)) for group in groups]
    passes = same_number_on_all_ranks(cut_into_passes(lengths, args.pass_tokens, device))
    metrics = StepMetrics()
    for numbers in passes:
        stop_if_asked()
        part = [groups[n] for n in numbers]
        packed = pack_groups(embedder, part)
        request = dict(predict=packed.predict, labels=packed.labels)
        request |= dict(temperature=args.temperature, ban=True)  # as in sampling
        ok = torch.tensor([float(group.ok) for group in part], device=device)  # [n]
        mask = packed.mask * ok.repeat_interleave(args.G)[:, None]  # [n * G, T], 0 for skipped pairs
        advantages = torch.cat([group.advantages for group in part])  # [n * G]

        with torch.no_grad():  # the reference runs first: no graph is in memory yet
            ref = reference(packed.batch, **request)
        with no_gradient_sync(model, is_last=numbers is passes[-1]):
            out = model(packed.batch, **request)
            logp = padded(out.logp, packed)  # [n * G, T]
            loss, stats = grpo_loss(
                logp, logp.detach(), padded(ref.logp, packed), advantages, mask,
                eps_low=args.eps_low, eps_high=args.eps_high, beta=args.beta, norm=args.max_new_tokens,
            )  # fmt: skip
            # grpo_loss is the mean over this pass; weight it to get the mean over the groups of all ranks
            loss = loss * len(part) / num_groups
            (world * loss).backward()  # undoes the division by world, see sft.contrast

        sampled = [x for group in part for logp in group.rollouts.logp for x in logp]
        mismatch = (torch.tensor(sampled, device=device) - out.logp.detach()).abs()  # of decode loop and update
        tokens = mask.sum()
        metrics.add(
            loss=loss,
            tokens=tokens,
            entropy=(padded(out.entropy, packed) * mask).sum(),
            logp_mismatch=(padded(mismatch, packed) * mask).sum(),
            **{name: mean * tokens for name, mean in stats.items()},
        )
    totals = metrics.totals(token_means=("kl", "clip_share", "ratio", "entropy", "logp_mismatch"))
    return totals | {"padding": padding_share(lengths, passes, device)}


SMALL_SPREAD = 0.05  # rewards of a group that differ by less: all rollouts have the same rank, only the gap differs


def summary(rewards, parts, advantages, rollouts, ok):
    """Return the metrics of one step: means over the global batch of rewards, lengths and shares. small_spread_share is
    the share of the squared advantages that comes from groups with a small spread of rewards.

    rewards and each of parts [2, p, G]; advantages [2p, G]; rollouts: 2p, queries first; ok bool [p]."""
    p = len(ok)
    num_ok = all_sum(ok.sum().float()).clamp(min=1)

    def mean(x):
        """Return the mean of x, [p, G] or [p, 1], over all usable pairs and G."""
        return all_sum((x.float().mean(-1) * ok).sum(-1)) / num_ok

    lengths = [[len(ids) for ids in r.ids] for r in rollouts]
    lengths = torch.tensor(lengths, device=ok.device).view(2, p, -1)
    invalid = ~torch.stack([r.valid for r in rollouts]).view(2, p, -1).to(ok.device)
    no_spread = (advantages == 0).all(-1).view(2, p, 1)  # groups without a learning signal
    out = {}
    for name, x in {"reward": rewards, **parts, "length": lengths}.items():
        out[f"{name}_query"] = mean(x[0])
        out[f"{name}_target"] = mean(x[1])
    out["invalid_share"] = mean(invalid.float().mean(0))
    out["no_spread_share"] = mean(no_spread.float().mean(0))
    squares = advantages.square().sum(-1).view(2, p)
    close = rewards.amax(-1) - rewards.amin(-1) < SMALL_SPREAD  # [2, p]
    of_close, of_all = all_sum(torch.stack([(squares * close).sum(), squares.sum()]))
    out["small_spread_share"] = of_close / of_all.clamp(min=1e-9)
    out = {"reward": (out["reward_query"] + out["reward_target"]) / 2, **out}
    return {name: float(x) for name, x in out.items()}


# ---------------------------------------------------------------------------------------------------------------

SHOWN = ("reward", "kl", "length_query", "loss", "grad_norm", "skipped", "nonfinite", "pairs_per_s", "tokens_per_s",
         "data_wait_s", "peak_memory_gib")  # fmt: skip


def main():
    args = parse_args(Settings, PRESETS)
    if not args.data:
        raise SystemExit("--data is empty. Give one or more RL files.")
    parse_weights(args.reward_weights)  # fail now, not after the first rollout
    rank, world, device = start_processes(args.fsdp)
    check_model(args.model)  # after the ranks have met: otherwise other nodes would wait for a failed rank
    row_check = RowCheck("rl", ())
    settings = begin_run(args, lambda file: str(index_rows(file, row_check, args.cache)["digest"]))
    if settings is None:
        return
    torch.manual_seed(args.seed)  # for backbones with dropout; Qwen's have none

    # policy and frozen reference
    load_on = "cpu" if args.fsdp else device  # shard() moves it to the GPUs
    embedder = Embedder.from_pretrained(args.model, device=load_on)
    embedder.backbone.model.visual.requires_grad_(args.train_vision)
    model = distribute(embedder, args, device)
    optimizer = make_optimizer(embedder, args)
    reference = Embedder.from_pretrained(args.model, device=load_on).requires_grad_(False).eval()
    reference.bf16 = args.bf16
    if args.fsdp:
        shard(reference, args.bf16)
    elif args.bf16:
        store_linear_in_bf16(reference)

    # data
    data = PairData(args.data, embedder.tokenizer, kind="rl", batch_size=args.batch_size, seed=args.seed, needs=(),
                    root=args.media_root, max_length=args.max_length, rank=rank, world=world,
                    blank_image=args.blank_image, cache=args.cache, family=embedder.family)  # fmt: skip
    start = resume(args, settings, embedder, optimizer)
    loader = step_loader(data, range(start, args.steps), args.workers)

    with Loop(args, settings, embedder, optimizer, start, len(data.rows), SHOWN) as loop:
        for step, pairs in loop.steps(loader):
            rows = [pair.query for pair in pairs] + [pair.target for pair in pairs]  # 2p prompts
            ok = torch.tensor([pair.ok for pair in pairs], device=device)  # [p]
            require_usable(pairs)  # raises if no pair of the global batch is usable
            if not args.train_vision:
                embedder.share_vision(rows, args.pass_tokens)

            # rollout: its random numbers depend on (seed, step, pair, query or target, g), not on the world size. Its
            # tokens can differ between world sizes if rounding decides a close choice.
            global_index = [j * world + rank for j in range(len(pairs))]  # of the pairs in the global batch
            seeds = [stable_hash(args.seed, step, i, side) for side in (0, 1) for i in global_index]
            with unsharded(embedder):
                rollouts = loop.breakable(partial(rollout, embedder, rows, seeds, args))

            # reward and advantage
            rewards, parts = rewards_of(embedder, rollouts, pairs, args)  # [2, p, G]
            advantages = group_advantages(rewards.flatten(0, 1), args.std_floor)  # [2p, G]
            reward_sum = float(all_sum(rewards.sum()))  # checked below, because group_advantages turns NaN into 0
            metrics = summary(rewards, parts, advantages, rollouts, ok)
            metrics["rollout_s"] = loop.seconds()
            tokens = int(all_sum(torch.tensor(sum(len(ids) for r in rollouts for ids in r.ids))))

            # update
            lr = args.lr * (1 - step / args.steps)
            groups = [Group(*group) for group in zip(rows, rollouts, advantages, ok.repeat(2).tolist())]
            stats = update(model, reference, groups, args)
            norm = clip_gradients(optimizer, args.clip)
            checked = {"loss": stats["loss"], "gradient norm": norm, "sum of rewards": reward_sum}
            loop.apply_gradients(step, pairs, lr, checked)
            loop.end_step(step, pairs, {**metrics, **stats, "grad_norm": norm, "lr": lr}, tokens)
        save_model(embedder, args.out)  # inside the loop: if this fails, the loop saves a checkpoint
    end_run(args, settings)


if __name__ == "__main__":
    run_script(main)
