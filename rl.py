"""Stage 2: reinforcement learning of the reasoning with GRPO (paper section 3.3).

For every prompt, queries and targets alike, the policy samples G completions <think>..</think><answer>..<gen_emb>.
Their embeddings and texts give the rewards (reward.py), a group's rewards give its advantages, and each token t of
completion i contributes

    l_t = -min(r_t A_i, clip(r_t, 1 - eps_low, 1 + eps_high) A_i) + beta * k3(ref_t - logp_t)
    r_t = exp(logp_t - old_t),   k3(x) = exp(x) - x - 1,   loss = mean_i sum_t l_t / norm

The reference is the SFT model. The embeddings carry no gradient: RL changes them only through what is written and
through the shared weights. A step is four blocks: rollout, reward, advantage, update.

Where this departs from the paper or the official code
 1. Pictures and videos are present in every forward pass; the official update and reference pass lose the videos.
 2. Sampling is at temperature 1 without top-k (the official run silently has top_k = 50), with a ban of tokens that
    cannot be written; the log-probabilities of the update have the same temperature and ban.
 3. Negatives are the rollouts of all other targets of the global batch (32 prompts: 31 x 8), not of one micro-step
    (15 x 8); pairs with the same target are not each other's negatives (--mask_same_target false: the paper).
 4. The vision tower is frozen, so its features are computed once per step; the official run trains it (--train_vision).
 5. A completion without <gen_emb> gets format 0 and no embedding reward; the official code embeds the prompt's own.
 6. A prompt and its G completions are one packed row with a tree mask: the prompt is computed once, not G times.
 7. Batches hold one dataset each, in shuffled order; bad rows are masked out and listed (data.py, 1. and 2.).
 8. Toy preset only: norm is 64 = max_new_tokens (2,048 in the paper), AdamW's second beta 0.98.
 9. Toy preset only, off in 2b and 7b: --w_anchor holds the rollouts' embeddings to those of the SFT model
    (1 - cosine at <disc_emb> and <gen_emb>). The policy gradient does not see the embeddings, and at the toy's large
    learning rate an optimiser step can blur their alignment.

Commands
    python rl.py                                                          # CPU: the toy world, after sft.py
    python rl.py --preset 2b --model runs/2b/sft --data UME-rl-train.json --media_root MMEB-train               # 1 GPU
    torchrun --nproc_per_node 8 rl.py --preset 2b --model runs/2b/sft --data UME-rl-train.json --media_root MMEB-train
    torchrun --nproc_per_node 8 rl.py --preset 7b --data UME-rl-train.json --media_root MMEB-train          # sharded
"""

import contextlib
import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from data import PairData, Row, RowCheck, step_loader
from model import Embedder, check_model, pad_rows, save_model
from reward import embedding_reward_parts, format_reward, group_advantages
from support.rows import index_rows
from support.run import (
    Guard,
    Progress,
    all_sum,
    barrier,
    begin_run,
    check_space,
    end_processes,
    first_on_node,
    gather,
    load_checkpoint,
    open_log,
    parallel,
    parse_args,
    processes,
    run_script,
    save_checkpoint,
    setting,
    shard,
    speed_figures,
    stable_hash,
    start_processes,
    whole,
    write_args,
)

# ---------------------------------------------------------------------------------------------------------------
# Settings. The defaults are the paper's (2b); "not in the paper" where they are not.


@dataclass
class Settings:
    preset: str = setting("toy", "toy, 2b or 7b: sets the defaults of the other flags")
    model: str = setting("runs/2b/sft", "folder of the SFT model: start and reference")
    data: list[str] = field(default_factory=list, metadata={"help": "RL files, .json or .jsonl"})
    media_root: str = setting(".", "folder that the media paths of --data start from")
    out: str = setting("runs/2b/rl", "output folder")
    steps: int = setting(345, "optimiser steps (11 K pairs, 1 epoch)")
    batch_size: int = setting(32, "pairs per step over all processes; each gives a query and a target prompt")
    micro_batch: int = setting(8, "prompts decoded at once; changes memory and time only")
    update_batch: int = setting(1, "groups per forward pass of the update; memory and time only")
    G: int = setting(8, "rollouts per prompt")
    inner_steps: int = setting(1, "optimiser steps per batch of rollouts")
    max_new_tokens: int = setting(2048, "longest completion; also the constant that normalises the loss (norm)")
    temperature: float = setting(1.0, "sampling temperature")
    eps_low: float = setting(0.2, "the ratio is clipped below at 1 - eps_low")
    eps_high: float = setting(0.28, "and above at 1 + eps_high (official code; the paper names 0.2 only)")
    beta: float = setting(0.04, "weight of the KL term")
    w_grpo: float = setting(1.0, "weight of the clipped objective; 0 is a control")
    w_anchor: float = setting(0.0, "weight of the embedding anchor; not in the paper")
    lr: float = setting(1e-6, "peak learning rate, linear to 0")
    beta2: float = setting(0.999, "AdamW's second beta")
    clip: float = setting(1.0, "gradient norm is clipped to this")
    mask_same_target: bool = setting(True, "equal targets are not each other's negatives; false is the paper")
    blank_image: bool = setting(True, "a side without media gets the blank picture")
    train_vision: bool = setting(False, "train the vision tower too, as the official code does")
    max_length: int = setting(12_288, "prompts longer than this are skipped and counted")
    bf16: bool = setting(torch.cuda.is_available(), "bf16 autocast over fp32 master weights")
    checkpointing: bool = setting(torch.cuda.is_available(), "gradient checkpointing of the language model")
    fsdp: bool = setting(False, "spread policy, reference and optimiser over the processes (FSDP2)")
    workers: int = setting(4, "background processes per process that read and resize pictures")
    seed: int = setting(0, "order of the batches and random numbers of the rollouts")
    save_every: int = setting(50, "steps between checkpoints")
    keep: int = setting(2, "checkpoints that are kept")
    max_skipped: float = setting(0.2, "share of unusable rows above which the run stops")
    skip_nonfinite: int = setting(0, "steps with a loss or gradient that is not finite that are left out, not an end")
    cache: str = setting("runs/cache", "folder for the indexes of the --data files")
    resume: str = setting("auto", "auto: newest checkpoint of --out; none: start anew; or a checkpoint folder")


PRESETS = {
    "2b": {},
    # the paper gives no values for 7B: these are the 2B ones
    "7b": {"model": "runs/7b/sft", "out": "runs/7b/rl", "fsdp": True},
    "toy": {
        "model": "runs/toy/sft", "data": ["runs/toy/data/rl.json"], "media_root": "runs/toy/data", "out": "runs/toy/rl",
        "steps": 400, "batch_size": 24, "micro_batch": 48, "update_batch": 8, "max_new_tokens": 64, "lr": 2e-4,
        "w_anchor": 20.0, "beta2": 0.98, "workers": 1, "max_length": 512, "checkpointing": False,
    },
}  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------
# The objective


def grpo_loss(logp, old_logp, ref_logp, advantages, mask, *, eps_low=0.2, eps_high=0.28, beta=0.04, norm=2048):
    """GRPO with a clipped ratio, a k3 KL to the reference and a constant length normalisation (Dr. GRPO).

    logp, old_logp, ref_logp [B, T] log-probabilities of the sampled tokens under the policy (with gradient), the policy
    that sampled them, and the reference; advantages [B]; mask [B, T], 1 on the completion's tokens (<|im_end|> too).
    Returns the loss, mean over B of sum over T / norm, and a dict of token means for the log.
    """
    mask = mask.bool()
    A = advantages[:, None]
    ratio = torch.exp(torch.where(mask, logp - old_logp, 0.0))  # where before exp: a masked inf must not become NaN
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
# The four blocks of a step


def rollout(embedder, rows, args, seeds, poll=lambda: False):
    """G completions for each of n prompts -> n Rollouts in the order of the rows, fewer where poll() was true."""
    order = sorted(range(len(rows)), key=lambda n: len(rows[n].ids))
    done = embedder.generate(
        [rows[n] for n in order],
        G=args.G,
        temperature=args.temperature,
        seeds=[seeds[n] for n in order],
        max_new_tokens=args.max_new_tokens,
        slots=args.micro_batch * args.G,
        poll=poll,
    )
    return [r for _, r in sorted(((order[i], r) for i, r in done), key=lambda pair: pair[0])]


def rewards_of(embedder, rollouts, pairs, args):
    """Rewards of this process's p pairs, measured against the rollouts of the global batch of P pairs.

    rollouts: 2p, queries first. Returns rewards [2, p, G] and the parts (format, share, gap), each [2, p, G].
    """
    p, device = len(pairs), embedder.device
    ok = torch.tensor([pair.ok for pair in pairs], device=device)
    gen = torch.stack([r.gen for r in rollouts]).view(2, p, args.G, -1)  # [2, p, G, D]
    valid = torch.stack([r.valid for r in rollouts]).view(2, p, args.G).to(device) & ok[:, None]
    gen, valid = (gather(x.transpose(0, 1)).transpose(0, 1) for x in (gen, valid))  # [2, P, G, ..]
    keys = gather(torch.tensor([pair.target_key for pair in pairs], device=device))
    same = keys[:, None] == keys[None, :] if args.mask_same_target else None
    mine = torch.arange(p, device=device) * (len(keys) // p) + processes()[0]
    parts = [embedding_reward_parts(gen[s], gen[1 - s], torch.stack([valid[s], valid[1 - s]]), same) for s in (0, 1)]
    share, gap = (torch.stack([part[k][mine] for part in parts]) for k in (0, 1))  # [2, p, G]
    texts = [embedder.tokenizer.decode(ids) for r in rollouts for ids in r.ids]
    form = format_reward(texts).to(device).view(2, p, args.G) * ok[:, None]
    return form + share * gap, {"format": form, "share": share, "gap": gap}


def pack_group(row, r):
    """A prompt and its G completions as one row [prompt | c1 | .. | cG]: every completion continues the prompt.

    Returns the Row, the segment of every token (0 prompt, g + 1 completion g) and the places to read: for each
    completion token the place that predicts it, and for each embedding its own place (disc, then each valid gen).
    """
    n, segments, positions = row.n_prompt, [np.zeros(row.n_prompt, int)], [row.positions[:, : row.n_prompt]]
    predict, read, start = [], [row.disc_at], n
    for g, ids in enumerate(r.ids):
        segments.append(np.full(len(ids), g + 1))
        positions.append(np.broadcast_to(row.next_position + np.arange(len(ids)), (3, len(ids))))
        predict += [n - 1, *range(start, start + len(ids) - 1)]  # the prompt's last token predicts the first of each
        if r.valid[g]:
            read.append(start + r.gen_at[g])
        start += len(ids)
    ids = np.concatenate([row.ids[:n], *r.ids])
    packed = Row(ids, np.concatenate(positions, 1), n, row.disc_at, -1, row.patches, row.grids, row.name, row.vit)
    return packed, np.concatenate(segments), predict, read


def tree_mask(segments, device):
    """bool [B, 1, L, L]: causal, and within the same completion or to the prompt; pads (-1) see prompt and pads."""
    L = max(map(len, segments))
    seg = torch.full((len(segments), L), -1)
    for b, s in enumerate(segments):
        seg[b, : len(s)] = torch.from_numpy(s)
    seg = seg.to(device)
    same = (seg[:, :, None] == seg[:, None, :]) | (seg[:, None, :] == 0)
    return (same & torch.ones(L, L, dtype=torch.bool, device=device).tril())[:, None]


def pack_groups(embedder, rows, rollouts):
    """n groups as a batch for Embedder.forward -> batch, predict, labels, read, group of each read, mask [n * G, T]."""
    device = embedder.device
    packed, segments, predict, read = zip(*(pack_group(row, r) for row, r in zip(rows, rollouts)))
    batch = pad_rows(packed, embedder.pad_id, device, mask=tree_mask(segments, device))
    L = batch["ids"].shape[1]
    flat = lambda places: torch.tensor([b * L + at for b, p in enumerate(places) for at in p], device=device)  # noqa: E731
    labels = torch.tensor([t for r in rollouts for ids in r.ids for t in ids], device=device)
    lengths = torch.tensor([len(ids) for r in rollouts for ids in r.ids], device=device)
    mask = torch.arange(int(lengths.max()), device=device) < lengths[:, None]  # [n * G, T]
    group = torch.tensor([b for b, p in enumerate(read) for _ in p], device=device)
    return batch, flat(predict), labels, flat(read), group, mask


def padded(flat, mask):
    """Values of the completion tokens [M] in the order of the mask -> [n * G, T] with zeros behind each completion."""
    return torch.zeros(mask.shape, device=flat.device).masked_scatter(mask, flat)


def update(model, reference, rows, rollouts, advantages, ok, args, cache, inner, poll=lambda: None):
    """Gradients of one inner step over this process's 2p groups -> figures for the log.

    advantages [2p, G]; ok bool [2p]: not a skipped pair; poll is called before each micro-batch.

    cache: the reference's and the sampling policy's values of each micro-batch, filled at the first inner step: no
    update has happened by then, so the policy's own log-probabilities are the old ones and the ratio is exactly 1.
    """
    embedder = model.module if isinstance(model, DistributedDataParallel) else model
    device, world = embedder.device, processes()[1]
    order = sorted(range(len(rows)), key=lambda n: len(rows[n].ids) + sum(map(len, rollouts[n].ids)))
    micro = [order[s : s + args.update_batch] for s in range(0, len(order), args.update_batch)]
    num_groups = all_sum(ok.sum().float()).clamp(min=1)  # of all processes, without the skipped ones
    names = ("loss", "anchor", "tokens", "kl", "clip_share", "ratio", "entropy", "logp_mismatch")
    total = torch.zeros(len(names), device=device)
    for k, numbers in enumerate(micro):
        poll()
        chosen = [rollouts[n] for n in numbers]
        batch, predict, labels, read, group, mask = pack_groups(embedder, [rows[n] for n in numbers], chosen)
        asked = (read, predict, labels, args.temperature, True)
        used = ok[numbers].float()  # [n], 0 for a skipped pair
        with contextlib.nullcontext() if k == len(micro) - 1 or model is embedder else model.no_sync():
            if inner == 0:  # the reference first, while no graph is in memory
                with torch.no_grad():  # a trained vision tower is not the reference's: it looks for itself
                    ref_embeddings, ref_logp, _ = reference(batch, *asked)
            embeddings, logp, entropy = model(batch, *asked)
            if inner == 0:
                cache[k] = logp.detach(), ref_logp, ref_embeddings
            old_logp, ref_logp, ref_embeddings = cache[k]
            weight = mask * used.repeat_interleave(args.G)[:, None]  # [n * G, T]
            loss, stats = grpo_loss(
                padded(logp, mask), padded(old_logp, mask), padded(ref_logp, mask),
                args.w_grpo * advantages[numbers].flatten(), weight,
                eps_low=args.eps_low, eps_high=args.eps_high, beta=args.beta, norm=args.max_new_tokens,
            )  # fmt: skip
            loss = loss * len(numbers) / num_groups  # the mean over the groups of all processes and both sides
            away = 1 - (embeddings * ref_embeddings).sum(-1)  # [reads]
            anchor = torch.stack([away[group == b].mean() for b in range(len(numbers))])
            anchor = (anchor * used).sum() / num_groups
            (world * (loss + args.w_anchor * anchor)).backward()
        tokens = weight.sum()
        sampled = torch.cat([torch.tensor(lp, device=device) for r in chosen for lp in r.logp])
        mismatch = (padded((sampled - old_logp).abs(), mask) * weight).sum()  # decode loop against update pass
        entropy = (padded(entropy, mask) * weight).sum()
        kl, clip, ratio = (stats[name] * tokens for name in ("kl", "clip_share", "ratio"))
        total += torch.stack([loss.detach(), anchor.detach(), tokens, kl, clip, ratio, entropy, mismatch])
    stats = dict(zip(names, all_sum(total).tolist()))
    tokens = max(1.0, stats.pop("tokens"))
    means = {name: stats[name] / tokens for name in names[3:]}
    return {"loss": stats["loss"] + args.w_anchor * stats["anchor"], "anchor": stats["anchor"], **means}


def summary(parts, rewards, advantages, rollouts, ok):
    """Figures of the log for one step, means over the global batch: rewards and parts per side, lengths, shares."""
    n_ok = all_sum(ok.sum().float()).clamp(min=1)
    mean = lambda x: all_sum((x.float().mean(-1) * ok).sum(-1)) / n_ok  # over pairs and G; x [2, p, G]  # noqa: E731
    out = {}
    for name, x in {"reward": rewards, **parts}.items():
        out |= {f"{name}_query": mean(x[0]), f"{name}_target": mean(x[1])}
    p = len(ok)
    length = torch.tensor([[len(ids) for ids in r.ids] for r in rollouts], device=ok.device).view(2, p, -1)
    valid = torch.stack([r.valid for r in rollouts]).view(2, p, -1).to(ok.device)
    out |= {"length_query": mean(length[0]), "length_target": mean(length[1])}
    flat = (advantages == 0).all(-1, keepdim=True)  # [2, p, 1] groups without spread
    out |= {"invalid_share": mean((~valid).float().mean(0)), "no_spread_share": mean(flat.float().mean(0))}
    return {"reward": float(out["reward_query"] + out["reward_target"]) / 2} | {k: float(v) for k, v in out.items()}


# ---------------------------------------------------------------------------------------------------------------


def main():
    args = parse_args(Settings, PRESETS)
    if not args.data:
        raise SystemExit("--data: name the RL file or files")
    check_model(args.model)
    rank, world, device = start_processes(args.fsdp)
    row_check = RowCheck("rl", ())
    digests = first_on_node(lambda: [str(index_rows(file, row_check, args.cache)["digest"]) for file in args.data])
    out, settings = Path(args.out), begin_run(args, rank, digests)
    if settings is None:
        return
    torch.manual_seed(args.seed)

    # policy and frozen reference
    load_on = "cpu" if args.fsdp else device  # from there shard() takes it to the GPUs
    embedder = Embedder.from_pretrained(args.model, device=load_on)
    embedder.backbone.model.visual.requires_grad_(args.train_vision)
    if args.checkpointing:
        embedder.backbone.activation_checkpointing_enable({"use_reentrant": False})
    embedder.train()
    model = parallel(embedder, args, device)
    reference = Embedder.from_pretrained(args.model, device=load_on).requires_grad_(False).eval()
    if args.fsdp:
        shard(reference, args.bf16)
    embedder.bf16 = reference.bf16 = args.bf16
    parameters = [p for p in embedder.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, args.beta2), weight_decay=0.0)
    start = load_checkpoint(args.resume, out, embedder, optimizer, settings)
    check_space(out, embedder, optimizer, args.keep)

    data = PairData(args.data, embedder.tokenizer, kind="rl", batch_size=args.batch_size, seed=args.seed, needs=(),
                    root=args.media_root, max_length=args.max_length, rank=rank, world=world,
                    blank_image=args.blank_image, cache=args.cache)  # fmt: skip
    loader = step_loader(data, range(start, args.steps), args.workers)
    if rank == 0:
        print(
            f"{len(data.rows):,} pairs, {sum(p.numel() for p in parameters):,} trained parameters, {world} process(es)"
        )
    log = open_log(out, start) if rank == 0 else None
    bar = Progress(range(start, args.steps), initial=start, total=args.steps, desc="rl", unit="step", disable=rank > 0)

    def save(step, alone=False):
        return save_checkpoint(out, embedder, optimizer, step, settings, args.keep, alone)

    loop_began = time.perf_counter()
    with Guard(args, out, save, len(data.rows)) as guard:
        for step in bar:
            guard.completed, began = step, time.perf_counter()
            pairs = guard.next_pairs(loader)
            waited = time.perf_counter() - began
            rows = [pair.query for pair in pairs] + [pair.target for pair in pairs]  # 2p prompts
            ok = torch.tensor([pair.ok for pair in pairs], device=device)
            if not args.train_vision:
                embedder.see_rows(rows, 2 * args.micro_batch, guard.poll)

            # rollout: a function of (seed, step, pair, side, g), whatever the number of processes
            seeds = [stable_hash(args.seed, step, j * world + rank, side) for side in (0, 1) for j in range(len(pairs))]
            with whole(embedder):
                rollouts = rollout(embedder, rows, args, seeds, lambda: guard.signal)
            guard.poll()  # the processes decode different numbers of tokens: they meet here
            # reward, advantage
            rewards, parts = rewards_of(embedder, rollouts, pairs, args)  # [2, p, G]
            reward_sum = float(all_sum(rewards.sum()))  # a NaN would give its group the advantage 0, without a word
            advantages = group_advantages(rewards.flatten(0, 1)).view_as(rewards)  # [2, p, G]
            rollout_seconds = time.perf_counter() - began
            about = summary(parts, rewards, advantages, rollouts, ok)
            tokens = int(all_sum(torch.tensor(sum(len(ids) for r in rollouts for ids in r.ids))))
            skipped = guard.skipped(step, pairs)
            # update
            lr, cache = args.lr * (1 - step / args.steps), {}
            for group in optimizer.param_groups:
                group["lr"] = lr
            history = []
            for inner in range(args.inner_steps):
                poll = guard.poll if inner == 0 else lambda: None  # once the weights have moved the step is finished
                stats = update(model, reference, rows, rollouts, advantages.flatten(0, 1), ok.repeat(2), args, cache,
                               inner, poll)  # fmt: skip
                norm = torch.nn.utils.clip_grad_norm_(parameters, args.clip)
                stats["grad_norm"] = float(norm.full_tensor() if args.fsdp else norm)
                figures = {"loss": stats["loss"], "gradient norm": stats["grad_norm"], "sum of rewards": reward_sum}
                if guard.finite(step, figures, pairs):
                    guard.completed = None  # until all inner steps are done and the log has its line
                    optimizer.step()
                    history.append(stats)
                optimizer.zero_grad(set_to_none=True)
            stats = {key: sum(h[key] for h in history) / len(history) for key in history[0]} if history else {}
            line = {"step": step + 1, **stats, **about, "lr": lr, "skipped": skipped}
            line |= {"nonfinite": guard.nonfinite, "rollout_s": rollout_seconds}
            done, total = step + 1 - start, args.steps - start
            line |= speed_figures((began, loop_began), waited, done, total, args.batch_size, tokens, device)
            if rank == 0:
                log.write(json.dumps(line) + "\n")
            guard.completed = step + 1
            if rank == 0:
                shown = ("reward", "kl", "length_query", "loss", "grad_norm", "pairs_per_s", "tokens_per_s",
                         "data_wait_s", "peak_memory_gib")  # fmt: skip
                bar.set_postfix({key: f"{line[key]:.3g}" for key in shown if key in line})
            if (step + 1) % args.save_every == 0 and step + 1 < args.steps:
                save(step + 1)
            guard.check_share()
        save_model(embedder, args.model, out)  # guarded too: what cannot be saved so is kept as a checkpoint
    if rank == 0:
        write_args(out, args, finished=True, resume=settings)
        print(f"saved {out}")
    barrier()
    end_processes()


if __name__ == "__main__":
    run_script(main)
