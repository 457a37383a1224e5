"""Stage 1: cold-start supervised fine-tuning (paper section 3.2): one model learns to reason and to embed.

For a pair (query q, target t) with annotated reasoning and summaries the loss is

    L = w_disc * InfoNCE(disc_q, disc_t) + w_gen * InfoNCE(gen_q, gen_t) + w_ce * (CE_q + CE_t)

disc and gen: the two embeddings (model.py); InfoNCE: symmetric, temperature tau = 0.02; CE: next-token loss, the mean
over the assistant's tokens of all queries (targets) of the global batch. --w_gen 0 --w_ce 0 is the paper's
discriminative baseline DUME.

Where this departs from the paper or the official code
 1. Negatives: the whole global batch of an optimiser step (GradCache), where the official code has the 256 pairs of one
    of its 4 accumulation steps. The number of processes and --micro_batch change memory and time, not the result.
 2. Pairs with the same target (equal text and media) are not each other's negatives; --mask_same_target false is the
    paper.
 3. Batches hold one dataset each, in shuffled order (data.py, 1.); bad rows are masked out and listed (data.py, 2.).
 4. fp32 master weights with bf16 autocast; the official run is bf16 with fp32 optimiser states under ZeRO-3.
 5. CE is the mean over the global batch's tokens (official: over a micro-batch's); the newline behind <|im_end|> is no
    label.
 6. Toy preset only: the temperature falls from tau_start = 0.2 to tau over tau_steps. At tau = 0.02 the noise in the
    cosines of an untrained contrast costs more than a wrong ranking, and the first thing that a small model learns is
    to make all its embeddings equal (loss ln B for hundreds of steps; CLIP starts at 0.07 for the same reason).
    Also w_disc = w_gen = 0.3, which keeps more of what the tiny base model can, AdamW's second beta is 0.98, and
    warm-up, weight decay and the cosine's floor are those of small models (0.05, 0.01, 0.05).
 7. --cross_weight (default 0: the paper) adds InfoNCE between gen and disc, one space for both kinds of embedding.

Commands
    python sft.py                                                     # CPU: the toy world, written on the first run
    python sft.py --preset 2b --data UME-sft-train.json --media_root MMEB-train --out runs/2b/sft             # 1 GPU
    torchrun --nproc_per_node 8 sft.py --preset 2b --data UME-sft-train.json --media_root MMEB-train --out runs/2b/sft
    torchrun --nproc_per_node 8 sft.py --preset 7b --data UME-sft-train.json --media_root MMEB-train          # sharded
"""

import contextlib
import json
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from data import DISC, GEN, PairData, RowCheck, step_loader
from model import Embedder, check_model, pad_rows, save_model
from support.rows import index_rows
from support.run import (
    Guard,
    Progress,
    Stopped,
    all_sum,
    barrier,
    begin_run,
    check_space,
    end_processes,
    first_on_node,
    gather,
    load_checkpoint,
    lr_at,
    open_log,
    parallel,
    parse_args,
    processes,
    run_script,
    save_checkpoint,
    setting,
    speed_figures,
    start_processes,
    write_args,
)
from support.toy import write_toy

# ---------------------------------------------------------------------------------------------------------------
# Settings. The defaults are the paper's (2b); "not in the paper" where they are not.


@dataclass
class Settings:
    preset: str = setting("toy", "toy, 2b or 7b: sets the defaults of the other flags")
    model: str = setting("Qwen/Qwen2-VL-2B-Instruct", "folder or hub id of the base model")
    data: list[str] = field(default_factory=list, metadata={"help": "SFT files, .json or .jsonl"})
    media_root: str = setting(".", "folder that the media paths of --data start from")
    out: str = setting("runs/2b/sft", "output folder")
    steps: int = setting(5000, "optimiser steps")
    batch_size: int = setting(1024, "pairs per optimiser step over all processes, each other's negatives")
    micro_batch: int = setting(4, "pairs per forward pass; changes memory and time only")
    lr: float = setting(5e-5, "peak learning rate")
    warmup: float = setting(0.03, "share of the steps with rising learning rate")
    lr_floor: float = setting(0.0, "final learning rate as a share of the peak (cosine)")
    beta2: float = setting(0.999, "AdamW's second beta")
    weight_decay: float = setting(0.0, "AdamW's weight decay")
    clip: float = setting(1.0, "gradient norm is clipped to this")
    tau: float = setting(0.02, "InfoNCE temperature")
    w_disc: float = setting(1.0, "weight of the discriminative InfoNCE")
    w_gen: float = setting(1.0, "weight of the generative InfoNCE")
    w_ce: float = setting(1.0, "weight of the next-token loss of each side")
    cross_weight: float = setting(0.0, "weight of the InfoNCE between gen and disc embeddings; not in the paper")
    tau_start: float = setting(0.02, "temperature at the first step; not in the paper")
    tau_steps: int = setting(0, "steps over which it falls from there to tau, geometrically")
    mask_same_target: bool = setting(True, "equal targets are not each other's negatives; false is the paper")
    train_vision: bool = setting(False, "train the ViT blocks too (the paper trains its merger and the language model)")
    max_length: int = setting(12_288, "longer rows are skipped and counted, never cut")
    bf16: bool = setting(torch.cuda.is_available(), "bf16 autocast over fp32 master weights")
    checkpointing: bool = setting(torch.cuda.is_available(), "gradient checkpointing of the language model")
    fsdp: bool = setting(False, "spread parameters and optimiser over the processes (FSDP2), for what does not fit")
    workers: int = setting(8, "background processes per process that read and resize pictures")
    seed: int = setting(0, "order of the batches")
    save_every: int = setting(200, "steps between checkpoints; not in the paper")
    keep: int = setting(2, "checkpoints that are kept")
    max_skipped: float = setting(0.2, "share of unusable rows above which the run stops")
    skip_nonfinite: int = setting(0, "steps with a loss or gradient that is not finite that are left out, not an end")
    cache: str = setting("runs/cache", "folder for the indexes of the --data files")
    resume: str = setting("auto", "auto: newest checkpoint of --out; none: start anew; or a checkpoint folder")


PRESETS = {
    "2b": {},
    # the paper gives no values for 7B: these are the 2B ones
    "7b": {"model": "Qwen/Qwen2-VL-7B-Instruct", "out": "runs/7b/sft", "micro_batch": 2, "fsdp": True},
    "toy": {
        "model": str(Path(__file__).parent / "assets/toy_base"), "data": ["runs/toy/data/sft.json"],
        "media_root": "runs/toy/data", "out": "runs/toy/sft", "steps": 600, "batch_size": 40, "micro_batch": 40,
        "lr": 1e-3, "lr_floor": 0.05, "warmup": 0.05, "beta2": 0.98, "weight_decay": 0.01, "w_disc": 0.3,
        "w_gen": 0.3, "tau_start": 0.2, "tau_steps": 300, "workers": 1, "checkpointing": False, "max_length": 512,
    },
}  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------
# The losses


def info_nce(query, target, temperature=0.02, same_target=None):
    """Symmetric InfoNCE (paper section 3.2): 1/2 [CE(Q T^t / tau) + CE(T Q^t / tau)], the pairs on the diagonal.

    query, target [B, D], L2-normalised; same_target bool [B, B]: pairs that are not each other's negatives.
    """
    logits = query @ target.T / temperature  # [B, B]
    if same_target is not None:
        others = same_target & ~torch.eye(len(logits), dtype=torch.bool, device=logits.device)
        logits = logits.masked_fill(others, float("-inf"))
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def tau_at(step, *, start, tau, steps):
    """Temperature of a step: from start to tau over the first steps, geometrically; tau at once where steps is 0."""
    return start * (tau / start) ** min(1.0, step / steps) if steps else tau


def contrastive_loss(own, everyone, mine, ok, keys, w_disc, w_gen, tau, mask_same_target, w_cross=0.0):
    """The InfoNCE terms of the global batch, with the gradient for this process's own embeddings only.

    own [b, 4, D] (query disc, query gen, target disc, target gen), requires grad; everyone [B, 4, D] the gathered ones;
    mine: this process's rows of it; ok bool [B]: usable pairs; keys int64 [B]: targets' identities.
    """
    x = everyone.index_put((mine,), own)[ok]  # [B', 4, D]
    same = (keys[:, None] == keys[None, :])[ok][:, ok] if mask_same_target else None
    l_disc = info_nce(x[:, 0], x[:, 2], tau, same)
    l_gen = info_nce(x[:, 1], x[:, 3], tau, same)
    loss, l_cross = w_disc * l_disc + w_gen * l_gen, torch.zeros_like(l_disc)
    if w_cross:  # one space for both: gen queries find disc targets and the reverse
        l_cross = (info_nce(x[:, 1], x[:, 2], tau, same) + info_nce(x[:, 0], x[:, 3], tau, same)) / 2
        loss = loss + w_cross * l_cross
    return loss, l_disc.detach(), l_gen.detach(), l_cross.detach()


# ---------------------------------------------------------------------------------------------------------------
# One optimiser step's loss and gradients


def sft_step(model, pairs, args, poll=lambda: None):
    """Losses and gradients of one step over the global batch, in three passes (GradCache, Gao et al. 2021).

    pairs: this process's pairs; poll is called before every micro-batch, at the same points in all processes.
    Gradients are left in .grad. Returns the loss parts and the number of tokens.
    """
    embedder = model.module if isinstance(model, DistributedDataParallel) else model
    device, D = embedder.device, embedder.backbone.config.text_config.hidden_size
    (rank, world), w_disc, w_gen, w_ce = processes(), args.w_disc, args.w_gen, args.w_ce
    rows = [p.query for p in pairs] + [p.target for p in pairs]  # rows 0..b-1 queries, b..2b-1 targets
    b = len(pairs)
    ok = torch.tensor([p.ok for p in pairs], device=device)
    row_ok = ok.repeat(2)
    # similar lengths together: little padding. The order does not change any sum.
    order = sorted(range(2 * b), key=lambda n: len(rows[n].ids))
    micro = [order[s : s + 2 * args.micro_batch] for s in range(0, 2 * b, 2 * args.micro_batch)]
    if not args.train_vision:
        embedder.see_rows(rows, 2 * args.micro_batch, poll)

    answer_length = torch.tensor([len(row.ids) - row.n_prompt for row in rows], device=device) * row_ok
    side = torch.arange(2 * b, device=device) // b  # 0 query, 1 target
    side_tokens = all_sum(torch.stack([answer_length[side == s].sum() for s in (0, 1)])).clamp(min=1)  # [2]
    token_weight = row_ok / side_tokens[side]  # CE of a side = mean over all its tokens of the global batch

    def forward(net, numbers, next_token):
        """Embeddings [n, 2, D] (disc, gen) of n rows; next_token: the CE terms of each side too, [2], else None."""
        batch = pad_rows([rows[n] for n in numbers], embedder.pad_id, device)
        L = batch["ids"].shape[1]
        read = [j * L + max(at, 0) for j, n in enumerate(numbers) for at in (rows[n].disc_at, rows[n].gen_at)]
        read = torch.tensor(read, device=device)  # flat places; a row without the token has no use for that embedding
        if not next_token:
            return net(batch, read=read)[0].view(-1, 2, D), None
        places = [(j * L + t, n) for j, n in enumerate(numbers) for t in range(rows[n].n_prompt, len(rows[n].ids))]
        at, row_of = torch.tensor(places, device=device).T  # [M] each: a token of an answer, the row it belongs to
        embeddings, logp, _ = net(batch, read=read, predict=at - 1, labels=batch["ids"].flatten()[at])
        ce = torch.zeros(2, device=device).index_add(0, side[row_of], -logp * token_weight[row_of])
        return embeddings.view(-1, 2, D), ce

    # 1. embeddings of all micro-batches, no graph (if one micro-batch is all, its graph is kept and 3. reuses it)
    kept = [forward(model, micro[0], bool(w_ce))] if len(micro) == 1 else None
    embeddings = torch.zeros(2 * b, 2, D, device=device)
    if kept:
        embeddings[micro[0]] = kept[0][0].detach()
    elif w_disc or w_gen or args.cross_weight:
        with torch.no_grad():
            for numbers in micro:
                poll()
                embeddings[numbers] = forward(embedder, numbers, False)[0]

    # 2. the contrastive loss of the whole gathered batch, and its gradient for our embeddings
    ok_all, keys = gather(ok), gather(torch.tensor([p.target_key for p in pairs], device=device))
    if not ok_all.any():
        raise Stopped(f"no pair of this batch can be used; the first one: {pairs[0].reason}")
    own = torch.cat([embeddings[:b], embeddings[b:]], dim=1).requires_grad_()  # [b, 4, D]
    mine = torch.arange(b, device=device) * world + rank
    loss, l_disc, l_gen, l_cross = contrastive_loss(
        own, gather(own), mine, ok_all, keys, w_disc, w_gen, args.tau, args.mask_same_target, args.cross_weight
    )
    (grad,) = torch.autograd.grad(loss, own)
    grad = torch.cat([grad[:, :2], grad[:, 2:]])  # [2b, 2, D]

    # 3. every micro-batch again with its graph: embedding gradient and next-token loss. DDP and FSDP average over
    #    processes, hence the factor `world`. DDP reduces after the last micro-batch only; FSDP after each one, since it
    #    would have to keep the gradients of the whole model until then.
    ce = torch.zeros(2, device=device)
    for k, numbers in enumerate(micro):
        poll()
        with contextlib.nullcontext() if k == len(micro) - 1 or model is embedder else model.no_sync():
            embeddings, ce_part = kept[0] if kept else forward(model, numbers, bool(w_ce))
            loss = (embeddings * grad[numbers]).sum()
            if w_ce:
                loss = loss + w_ce * ce_part.sum()
                ce += ce_part.detach()
            (loss * world).backward()
    ce = all_sum(ce)
    total = w_disc * l_disc + w_gen * l_gen + args.cross_weight * l_cross + w_ce * ce.sum()
    parts = {"loss": total, "disc": l_disc, "gen": l_gen, "ce_query": ce[0], "ce_target": ce[1]}
    parts |= {"cross": l_cross} if args.cross_weight else {}
    tokens_read = all_sum(torch.tensor(sum(len(row.ids) for row in rows), device=device))
    return {key: float(value) for key, value in parts.items()}, int(tokens_read)


# ---------------------------------------------------------------------------------------------------------------


def main():
    args = parse_args(Settings, PRESETS)
    if not args.data:
        raise SystemExit("--data: name the SFT file or files")
    contrast = args.w_disc or args.w_gen or args.cross_weight
    if not contrast and not args.w_ce:
        raise SystemExit("all weights of the loss are 0: there is nothing to train")
    if contrast and args.batch_size == 1:
        raise SystemExit("--batch_size 1: a pair needs other pairs as its negatives; give 2 at least")
    check_model(args.model)
    rank, world, device = start_processes(args.fsdp)
    if rank == 0 and args.data == PRESETS["toy"]["data"] and not Path(args.data[0]).exists():
        write_toy(Path(args.data[0]).parent, seed=0)
    needs = [token for token, w in ((DISC, args.w_disc), (GEN, args.w_gen)) if w or args.cross_weight]
    needs += ["answer"] if args.w_ce else []
    row_check = RowCheck("sft", tuple(needs))
    digests = first_on_node(lambda: [str(index_rows(file, row_check, args.cache)["digest"]) for file in args.data])
    out, settings = Path(args.out), begin_run(args, rank, digests)
    if settings is None:
        return
    torch.manual_seed(args.seed)

    # model: ViT blocks frozen, merger and language model trained
    embedder = Embedder.from_pretrained(args.model, device="cpu" if args.fsdp else device)
    embedder.bf16 = args.bf16
    embedder.backbone.model.visual.requires_grad_(args.train_vision)
    embedder.backbone.model.visual.merger.requires_grad_(True)
    if not args.w_ce and not embedder.backbone.config.tie_word_embeddings:
        embedder.backbone.lm_head.requires_grad_(False)  # an unused parameter would stall DDP
    if args.checkpointing:
        embedder.backbone.activation_checkpointing_enable({"use_reentrant": False})
    embedder.train()
    model = parallel(embedder, args, device)
    parameters = [p for p in embedder.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, args.beta2), weight_decay=args.weight_decay)
    start = load_checkpoint(args.resume, out, embedder, optimizer, settings)
    check_space(out, embedder, optimizer, args.keep)

    # data
    data = PairData(args.data, embedder.tokenizer, kind="sft", batch_size=args.batch_size, seed=args.seed,
                    root=args.media_root, max_length=args.max_length, rank=rank, world=world, needs=row_check.needs,
                    answers=bool(args.w_gen or args.w_ce or args.cross_weight), cache=args.cache)  # fmt: skip
    loader = step_loader(data, range(start, args.steps), args.workers)
    n_params = sum(p.numel() for p in parameters)
    if rank == 0:
        print(f"{len(data.rows):,} pairs, {n_params:,} trained parameters, {world} process(es) on {device.type}")
    log = open_log(out, start) if rank == 0 else None
    bar = Progress(range(start, args.steps), initial=start, total=args.steps, desc="sft", unit="step", disable=rank > 0)

    def save(step, alone=False):
        return save_checkpoint(out, embedder, optimizer, step, settings, args.keep, alone)

    loop_began = time.perf_counter()
    with Guard(args, out, save, len(data.rows)) as guard:
        for step in bar:
            guard.completed, began = step, time.perf_counter()
            pairs = guard.next_pairs(loader)
            waited = time.perf_counter() - began
            lr = lr_at(step, steps=args.steps, lr=args.lr, warmup=args.warmup, floor=args.lr_floor)
            for group in optimizer.param_groups:
                group["lr"] = lr
            now = replace(args, tau=tau_at(step, start=args.tau_start, tau=args.tau, steps=args.tau_steps))
            parts, tokens = sft_step(model, pairs, now, guard.poll)
            norm = torch.nn.utils.clip_grad_norm_(parameters, args.clip)
            norm = float(norm.full_tensor() if args.fsdp else norm)
            finite = guard.finite(step, {"loss": parts["loss"], "gradient norm": norm}, pairs)
            line = {"step": step + 1, **parts, "lr": lr, "grad_norm": norm}
            line |= {"skipped": guard.skipped(step, pairs), "nonfinite": guard.nonfinite}
            guard.completed = None  # an error between here and the log's line leaves nothing that could be saved
            if finite:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            done, total = step + 1 - start, args.steps - start
            line |= speed_figures((began, loop_began), waited, done, total, args.batch_size, tokens, device)
            if rank == 0:
                log.write(json.dumps(line) + "\n")
            guard.completed = step + 1
            if rank == 0:
                shown = {key: f"{value:.3g}" for key, value in line.items() if key not in ("step", "eta_s")}
                bar.set_postfix({key: value for key, value in shown.items() if value != "0"})  # tqdm shows the ETA
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
