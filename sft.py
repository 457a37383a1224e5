"""Stage 1, cold-start supervised fine-tuning: one model learns to reason and to embed.

For a pair (query q, target t) with annotated reasoning and summaries the loss is

    L = w_disc * InfoNCE(disc_q, disc_t) + w_gen * InfoNCE(gen_q, gen_t) + w_ce * (CE_q + CE_t)

disc and gen are the states at two special tokens (model.py). InfoNCE is symmetric, with temperature tau = 0.02. CE_q
and CE_t are next-token losses: means over all answer tokens of the global batch's queries and of its targets. With
--w_gen 0 --w_ce 0 this is DUME, the paper's discriminative baseline.

A row is the token sequence of a query or a target. Its answer is the assistant's part. Shapes: b pairs of this rank,
B pairs of the global batch, n rows of a micro-batch, M tokens of their answers, L of the longest row, D dimensions.

Departures from the paper or the official code
 1. The negatives are the complete global batch of an optimiser step (GradCache). The official code uses the 256 pairs
    of one of its 4 accumulation steps. The world size and --pass_tokens change memory and time, and the result only by
    rounding.
 2. Pairs with the same target (equal text and media) are not each other's negatives. The paper corresponds to
    --mask_same_target false.
 3. Each batch holds one dataset, in shuffled order (data.py, 1.). Bad rows are masked out and listed (data.py, 2.).
 4. The master weights are fp32, with bf16 autocast. The official run is bf16 with fp32 optimiser states under ZeRO-3.
 5. CE is the mean over the tokens of the global batch (official: of a micro-batch). The newline after <|im_end|> is not
    a label.
 6. Toy preset only: the temperature falls from tau_start = 0.2 to tau over tau_steps. At tau = 0.02, cosine noise
    dominates the loss of an untrained model, and small models collapse to one constant embedding. The loss then stays
    at ln B for hundreds of steps. CLIP starts at 0.07 for the same reason.
    Also, w_disc = w_gen = 0.3, which preserves more of the tiny base model's abilities. AdamW's second beta is 0.98.
    Warm-up, weight decay and the floor of the cosine have values for small models (0.05, 0.01, 0.05).
 7. --cross_weight (default 0, as in the paper) adds InfoNCE between gen and disc: one space for both embeddings.

Commands
    python sft.py                                                     # CPU: the toy world, written on the first run
    python sft.py --preset 2b --data UME-sft-train.json --media_root MMEB-train --out runs/2b/sft             # 1 GPU
    torchrun --nproc_per_node 8 sft.py --preset 2b --data UME-sft-train.json --media_root MMEB-train --out runs/2b/sft
    torchrun --nproc_per_node 8 sft.py --preset 7b --data UME-sft-train.json --media_root MMEB-train          # sharded
"""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from data import PairData, step_loader
from model import Embedder, int_tensors, save_model
from support.distributed import (
    all_sum,
    barrier,
    clip_gradients,
    distribute,
    gather,
    no_gradient_sync,
    processes,
    start_processes,
    without_ddp,
)
from support.files import index_rows
from support.formats import DISC, GEN, RowCheck
from support.loop import Loop, begin_run, end_run, make_optimizer, require_usable, resume, stop_if_asked
from support.passes import cut_into_passes, padding_share, same_number_on_all_ranks
from support.program import run_script
from support.settings import parse_args, setting
from support.toy import write_toy
from support.weights import check_model

# ---------------------------------------------------------------------------------------------------------------
# Settings. The class is the 2b preset. A command line without --preset takes toy, which replaces some defaults.


@dataclass
class Settings:
    preset: str = setting("2b", "toy, 2b or 7b: sets the defaults of the other flags; toy if not given")
    model: str = setting("Qwen/Qwen2-VL-2B-Instruct", "folder or hub id of the base model")
    data: list[str] = field(default_factory=list, metadata={"help": "SFT files, .json or .jsonl"})
    media_root: str = setting(".", "folder that the media paths of --data start from")
    out: str = setting("runs/2b/sft", "output folder")
    # values of the paper, unless the comment says otherwise
    steps: int = setting(5000, "optimiser steps")
    batch_size: int = setting(1024, "pairs per optimiser step over all ranks; they are each other's negatives")
    pass_tokens: int = setting(32_768, "most tokens of a pass, pads included; changes only memory and time")
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
    # not in the paper; see the departures above
    tau_start: float = setting(0.02, "temperature at the first step; not in the paper")
    tau_steps: int = setting(0, "steps of the geometric fall from tau_start to tau")
    mask_same_target: bool = setting(True, "equal targets are not each other's negatives; the paper: false")
    train_vision: bool = setting(False, "train the ViT blocks too (the paper trains its merger and the language model)")
    max_length: int = setting(12_288, "most tokens of a row; longer rows are skipped and counted, never cut")
    # settings of the machine and the run, which are no part of the method
    bf16: bool = setting(torch.cuda.is_available(), "bf16 autocast over fp32 master weights; true if CUDA is available")
    checkpointing: bool = setting(torch.cuda.is_available(), "gradient checkpointing; true if CUDA is available")
    fsdp: bool = setting(False, "shard parameters and optimiser over the ranks (FSDP2), if one GPU cannot hold them")
    workers: int = setting(8, "loader workers per rank that read and resize images")
    seed: int = setting(0, "order of the batches")
    save_every: int = setting(200, "steps between checkpoints")
    keep: int = setting(2, "number of checkpoints to retain")
    max_skipped: float = setting(0.2, "share of unusable rows above which the run stops")
    skip_nonfinite: int = setting(0, "non-finite steps that are left out before the run stops")
    cache: str = setting("runs/cache", "folder for the indexes of the --data files")
    resume: str = setting("auto", "auto: newest checkpoint of --out; none: start from scratch; or a checkpoint folder")


PRESETS = {
    "2b": {},
    # the paper gives no values for 7B, so these are the values of 2B
    "7b": {"model": "Qwen/Qwen2-VL-7B-Instruct", "out": "runs/7b/sft", "pass_tokens": 16_384, "fsdp": True},
    "toy": {
        "model": str(Path(__file__).parent / "assets/toy_base"), "data": ["runs/toy/data/sft.json"],
        "media_root": "runs/toy/data", "out": "runs/toy/sft", "steps": 600, "batch_size": 40,
        "lr": 1e-3, "lr_floor": 0.05, "warmup": 0.05, "beta2": 0.98, "weight_decay": 0.01, "w_disc": 0.3,
        "w_gen": 0.3, "tau_start": 0.2, "tau_steps": 300, "workers": 1, "bf16": False, "checkpointing": False,
        "max_length": 512,
    },
}  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------
# The losses


def info_nce(query, target, temperature=0.02, same_target=None):
    """Return the symmetric InfoNCE loss 1/2 [CE(Q T^t / tau) + CE(T Q^t / tau)], with the pairs on the diagonal.

    query, target [B, D], L2-normalised; same_target bool [B, B], true for pairs that are not each other's negatives.
    """
    logits = query @ target.T / temperature  # [B, B]
    if same_target is not None:
        others = same_target & ~torch.eye(len(logits), dtype=torch.bool, device=logits.device)
        logits = logits.masked_fill(others, float("-inf"))
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def tau_at(step, *, start, tau, steps):
    """Return the temperature of a step. It falls geometrically from start to tau; if steps is 0, it is always tau."""
    return start * (tau / start) ** min(1.0, step / steps) if steps else tau


def lr_at(step, *, steps, lr, warmup, floor=0.0):
    """Return the learning rate: linear warm-up over the share `warmup` of the steps, then a cosine to floor * lr."""
    n = max(1, round(warmup * steps))
    if step < n:
        return lr * (step + 1) / n
    x = (step - n) / max(1, steps - n)
    return lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * x)))


def uses_embeddings(args):
    """Return whether any contrastive term has a weight."""
    return bool(args.w_disc or args.w_gen or args.cross_weight)


def contrastive_loss(x, args, same_target=None):
    """Return (weighted sum, {name: term}) of the InfoNCE terms of B pairs.

    x [B, 4, D]: query disc, query gen, target disc, target gen; same_target bool [B, B] as in info_nce.
    """
    query_disc, query_gen, target_disc, target_gen = x.unbind(1)
    terms = {
        "disc": info_nce(query_disc, target_disc, args.tau, same_target),
        "gen": info_nce(query_gen, target_gen, args.tau, same_target),
    }
    loss = args.w_disc * terms["disc"] + args.w_gen * terms["gen"]
    if args.cross_weight:  # gen queries find disc targets, and disc queries find gen targets
        gen_to_disc = info_nce(query_gen, target_disc, args.tau, same_target)
        disc_to_gen = info_nce(query_disc, target_gen, args.tau, same_target)
        terms["cross"] = (gen_to_disc + disc_to_gen) / 2
        loss = loss + args.cross_weight * terms["cross"]
    return loss, terms


# ---------------------------------------------------------------------------------------------------------------
# One optimiser step's loss and gradients


def sft_step(model, pairs, args):
    """Add the gradients of one step to .grad; return the loss parts and the number of tokens of all ranks.

    The contrastive loss needs all embeddings of the global batch at once, but the memory holds the graph of only one
    micro-batch. Three passes solve this (GradCache, Gao et al. 2021). pairs: the b pairs of this rank.
    """
    embedder = without_ddp(model)
    step_rows = rows_of_step(pairs, args.pass_tokens, embedder.device)
    if not args.train_vision:
        embedder.share_vision(step_rows.rows, args.pass_tokens)

    # 1. embed all micro-batches, only the first with a graph: pass 3 reuses it, which saves one forward pass
    embeddings, first_result = embed_all(model, step_rows, args)  # [2b, 2, D]

    # 2. contrastive loss of the global batch, and its gradient for the embeddings of this rank
    loss, terms, gradient = contrast(embeddings, pairs, args)  # gradient [2b, 2, D]

    # 3. embed the other micro-batches again with graphs; backpropagate that gradient and the next-token loss
    ce = backward_all(model, step_rows, gradient, args, first_result)  # [2], this rank's part
    ce = all_sum(ce)
    parts = {"loss": loss + args.w_ce * ce.sum(), **terms, "ce_query": ce[0], "ce_target": ce[1]}
    values = torch.stack([*parts.values()]).tolist()
    parts = dict(zip(parts, values)) | {"padding": step_rows.padding}
    num_tokens = sum(len(row.ids) for row in step_rows.rows)
    return parts, int(all_sum(torch.tensor(num_tokens)))


@dataclass
class StepRows:
    """The rows of one step on this rank."""

    rows: list  # 2b Rows: b queries, then b targets
    side: torch.Tensor  # int [2b]: 0 query, 1 target
    ce_weight: torch.Tensor  # [2b], weight of each answer token of a row; 0 for a skipped pair
    micro_batches: list  # lists of row indices, one for each forward pass
    row_indices: list  # the same lists as tensors on the device
    padding: float  # share of pads in the micro-batches of all ranks


def rows_of_step(pairs, pass_tokens, device):
    """Return the StepRows of b pairs."""
    b = len(pairs)
    rows = [pair.query for pair in pairs] + [pair.target for pair in pairs]
    side = torch.arange(2 * b) // b
    row_ok = torch.tensor([pair.ok for pair in pairs]).repeat(2)

    # the CE of queries (or targets) is the mean over all their answer tokens in the global batch
    answer_length = torch.tensor([len(row.ids) - row.n_prompt for row in rows]) * row_ok
    side_tokens = torch.stack([answer_length[side == s].sum() for s in (0, 1)])
    ce_weight = row_ok / all_sum(side_tokens).clamp(min=1)[side]

    lengths = [len(row.ids) for row in rows]
    micro_batches = same_number_on_all_ranks(cut_into_passes(lengths, pass_tokens, device))
    padding = padding_share(lengths, micro_batches, device)
    row_indices = int_tensors(device, *micro_batches)
    return StepRows(rows, side.to(device), ce_weight.to(device), micro_batches, row_indices, padding)


def embed_micro_batch(net, step_rows, micro_batch, next_token):
    """Return the embeddings [n, 2, D] (disc, gen) of one micro-batch and the CE [2] of queries and of targets.

    Without next_token the CE is None. net: the DDP model for a pass with a graph, otherwise the bare embedder.
    micro_batch: indices of the n rows. If a row has no <disc_emb> or <gen_emb>, its embedding is an arbitrary state
    that no loss reads. Flat indices refer to [n, L] flattened. The state at index i - 1 predicts the token at index i.
    """
    device = step_rows.side.device
    rows = [step_rows.rows[n] for n in micro_batch]
    batch = without_ddp(net).pad_rows(rows)
    L = batch.ids.shape[1]
    embed_at = [j * L + max(at, 0) for j, row in enumerate(rows) for at in (row.disc_at, row.gen_at)]  # [2n]
    if not next_token:
        (embed_at,) = int_tensors(device, embed_at)
        return net(batch, embed_at=embed_at).embeddings.view(len(rows), 2, -1), None
    answers = [j * L + t for j, row in enumerate(rows) for t in range(row.n_prompt, len(row.ids))]  # [M]
    row_of = [n for n, row in zip(micro_batch, rows) for _ in range(row.n_prompt, len(row.ids))]  # [M]
    embed_at, answers, row_of = int_tensors(device, embed_at, answers, row_of)
    out = net(batch, embed_at=embed_at, predict=answers - 1, labels=batch.ids.flatten()[answers])
    ce = torch.zeros(2, device=device).index_add(0, step_rows.side[row_of], -out.logp * step_rows.ce_weight[row_of])
    return out.embeddings.view(len(rows), 2, -1), ce


def embed_all(model, step_rows, args):
    """Run pass 1; return the embeddings [2b, 2, D] and (embeddings, CE) of the first micro-batch with their graph.
    That micro-batch is the largest. It runs last here and first in pass 3, so its graph is alone in memory."""
    embedder = without_ddp(model)
    embeddings = torch.zeros(len(step_rows.rows), 2, embedder.width, device=embedder.device)
    first, *others = zip(step_rows.micro_batches, step_rows.row_indices)
    if uses_embeddings(args):
        for micro_batch, indices in others:
            stop_if_asked()
            with torch.no_grad():
                embeddings[indices], _ = embed_micro_batch(embedder, step_rows, micro_batch, next_token=False)
    stop_if_asked()
    micro_batch, indices = first
    with no_gradient_sync(model, is_last=not others):  # DDP decides in the forward pass whether backward averages
        first_result = embed_micro_batch(model, step_rows, micro_batch, bool(args.w_ce))
    embeddings[indices] = first_result[0].detach()
    return embeddings, first_result


def contrast(embeddings, pairs, args):
    """Run pass 2 on embeddings [2b, 2, D]; return loss, {name: term} and gradient [2b, 2, D]."""
    rank, world = processes()
    device, b = embeddings.device, len(pairs)
    usable = require_usable(pairs).nonzero()[:, 0].to(device)  # indices of usable pairs in the global batch
    keys = gather(torch.tensor([pair.target_key for pair in pairs], device=device))  # [B]
    own_embeddings = torch.cat([embeddings[:b], embeddings[b:]], dim=1).requires_grad_()  # [b, 4, D]
    global_index = torch.arange(b, device=device) * world + rank  # [b], where gather() puts this rank's pairs
    # gather() passes no gradient, and none is needed. Every rank computes the same global loss and differentiates it
    # with respect to its own embeddings only. The weight gradients of all ranks then sum to that of one device.
    # DDP and FSDP average over the ranks instead of summing, and `loss * world` in backward_all undoes the division.
    gathered = gather(own_embeddings).index_put((global_index,), own_embeddings)  # [B, 4, D]
    same_target = None
    if args.mask_same_target:
        same_target = (keys[:, None] == keys[None, :])[usable][:, usable]
    loss, terms = contrastive_loss(gathered[usable], args, same_target)
    (gradient,) = torch.autograd.grad(loss, own_embeddings)
    terms = {name: term.detach() for name, term in terms.items()}
    return loss.detach(), terms, torch.cat([gradient[:, :2], gradient[:, 2:]])


def backward_all(model, step_rows, gradient, args, first_result):
    """Run pass 3; return this rank's part of the CE [2] of queries and of targets."""
    _, world = processes()
    total_ce = torch.zeros(2, device=gradient.device)
    for micro_batch, indices in zip(step_rows.micro_batches, step_rows.row_indices):
        stop_if_asked()
        with no_gradient_sync(model, is_last=micro_batch is step_rows.micro_batches[-1]):
            if micro_batch is step_rows.micro_batches[0]:
                embeddings, ce = first_result
            else:
                embeddings, ce = embed_micro_batch(model, step_rows, micro_batch, bool(args.w_ce))
            loss = (embeddings * gradient[indices]).sum()  # its gradient is dL/dE dE/dw (chain rule)
            if args.w_ce:
                loss = loss + args.w_ce * ce.sum()
                total_ce += ce.detach()
            (loss * world).backward()  # undoes the division by world, see contrast()
    return total_ce


# ---------------------------------------------------------------------------------------------------------------

SHOWN = ("loss", "disc", "gen", "cross", "ce_query", "ce_target", "lr", "grad_norm", "skipped", "nonfinite",
         "pairs_per_s", "tokens_per_s", "data_wait_s", "peak_memory_gib")  # fmt: skip


def check_settings(args):
    if not args.data:
        raise SystemExit("--data is empty. Give one or more SFT files.")
    if not uses_embeddings(args) and not args.w_ce:
        raise SystemExit("all weights of the loss are 0: there is nothing to train. Give --w_disc, --w_gen or --w_ce.")
    if uses_embeddings(args) and args.batch_size == 1:
        raise SystemExit("--batch_size 1: a pair needs other pairs as negatives. Give at least 2.")


def needs_of(args):
    """Return the fields that the loss weights require of every row."""
    needs = [token for token, weight in ((DISC, args.w_disc), (GEN, args.w_gen)) if weight or args.cross_weight]
    return (*needs, "answer") if args.w_ce else tuple(needs)


def main():
    args = parse_args(Settings, PRESETS)
    check_settings(args)
    rank, world, device = start_processes(args.fsdp)
    check_model(args.model)  # after the ranks have met: otherwise other nodes would wait for a failed rank
    if rank == 0 and args.data == PRESETS["toy"]["data"] and not Path(args.data[0]).exists():
        write_toy(Path(args.data[0]).parent, seed=0)
    barrier()  # rank 0 writes the toy world before the other ranks read it
    row_check = RowCheck("sft", needs_of(args))
    settings = begin_run(args, lambda file: str(index_rows(file, row_check, args.cache)["digest"]))
    if settings is None:
        return
    torch.manual_seed(args.seed)  # for backbones with dropout; Qwen's have none

    # model: the ViT blocks are frozen; merger and language model are trained
    embedder = Embedder.from_pretrained(args.model, device="cpu" if args.fsdp else device)
    tower = embedder.backbone.model.visual
    tower.requires_grad_(args.train_vision)
    for merger in embedder.family.mergers(tower):
        merger.requires_grad_(True)
    if not args.w_ce and not embedder.backbone.config.tie_word_embeddings:
        embedder.backbone.lm_head.requires_grad_(False)  # an unused parameter would stall DDP
    model = distribute(embedder, args, device)
    optimizer = make_optimizer(embedder, args, args.weight_decay)

    # data
    answers = bool(args.w_gen or args.w_ce or args.cross_weight)
    data = PairData(args.data, embedder.tokenizer, kind="sft", batch_size=args.batch_size, seed=args.seed,
                    root=args.media_root, max_length=args.max_length, rank=rank, world=world, needs=row_check.needs,
                    answers=answers, cache=args.cache, family=embedder.family)  # fmt: skip
    start = resume(args, settings, embedder, optimizer)
    loader = step_loader(data, range(start, args.steps), args.workers)

    with Loop(args, settings, embedder, optimizer, start, len(data.rows), SHOWN) as loop:
        for step, pairs in loop.steps(loader):
            lr = lr_at(step, steps=args.steps, lr=args.lr, warmup=args.warmup, floor=args.lr_floor)
            tau = tau_at(step, start=args.tau_start, tau=args.tau, steps=args.tau_steps)
            parts, tokens = sft_step(model, pairs, replace(args, tau=tau))
            norm = clip_gradients(optimizer, args.clip)
            loop.apply_gradients(step, pairs, lr, {"loss": parts["loss"], "gradient norm": norm})
            loop.end_step(step, pairs, parts | {"lr": lr, "grad_norm": norm}, tokens)
        save_model(embedder, args.out)  # inside the loop: if this fails, the loop saves a checkpoint
    end_run(args, settings)


if __name__ == "__main__":
    run_script(main)
