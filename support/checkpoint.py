"""Checkpoints: a write is complete or leaves nothing, and any number of ranks can read the result."""

import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from support.distributed import barrier, gather, is_sharded, own_part, processes
from support.files import apply_umask
from support.program import BadInput, MissingFile
from support.settings import refuse_changed


def save_checkpoint(folder, model, optimizer, step, settings, keep=2, alone=False):
    """Write checkpoints/step-N to a temporary folder, fsync and rename it; return whether the checkpoint exists.

    A kill at any moment leaves the old checkpoints or the new one. All ranks call this function. Under FSDP each rank
    writes its own rows, otherwise rank 0 writes everything; meta.json comes last. The learning rate, the batches and
    the random numbers of the rollouts depend only on (seed, step), so no global random state is stored. On a CPU, a
    resumed run equals an unbroken run bit for bit, except with DDP on more than two ranks: in the first step after a
    start, DDP sums in another order. On a GPU it is equal up to rounding, because the backward pass of attention sums
    in no fixed order. alone: rank 0 calls this function without the other ranks.
    """
    rank, world = processes()
    sharded = is_sharded(model)
    if alone and sharded and world > 1:
        return False
    refuse_not_finite(model, optimizer)
    meet = (lambda: None) if alone else barrier
    final = Path(folder) / "checkpoints" / f"step-{step}"
    temporary = final.with_suffix(".tmp")
    if is_complete(final):  # the run stopped right after a regular save
        return True
    if rank == 0:
        for path in final.parent.glob("step-*"):
            if re.fullmatch(r"step-\d+(\.tmp)?", path.name) and not is_complete(path):
                shutil.rmtree(path)  # the rest of a killed run; other files belong to the user
        temporary.mkdir(parents=True)
    meet()
    try:
        if rank == 0 or sharded:
            names = {p: n for n, p in model.named_parameters()}
            tensors = {f"model/{n}": p for p, n in names.items()}
            tensors |= {f"{key}/{names[p]}": x for p, state in optimizer.state.items() for key, x in state.items()}
            part = temporary / f"part-{rank}.safetensors"
            save_file({name: own_part(x.detach()).contiguous() for name, x in tensors.items()}, part)
            apply_umask(part)
            sync(part)
        meet()
        if rank == 0:
            meta = {"step": step, "parts": world if sharded else 1, "settings": settings}
            (temporary / "meta.json").write_text(json.dumps(meta, indent=1))
            sync(temporary / "meta.json")
            sync(temporary)
            os.replace(temporary, final)
            sync(final.parent)
            for _, old in list_checkpoints(folder)[:-keep]:
                remove_checkpoint(old)
    except (OSError, SafetensorError):  # a full disk: free the space of the partial checkpoint
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    meet()
    return True


def refuse_not_finite(model, optimizer=None):
    """Raise BadInput if weights or moments are NaN or infinite. Once saved, they would replace good ones, and every
    later start would fail."""
    tensors = {name: p for name, p in model.named_parameters()}
    tensors |= {f"a moment of {name}": x for name, p in tensors.items() if optimizer
                for x in optimizer.state.get(p, {}).values()}  # fmt: skip
    broken = [name for name, x in tensors.items() if not torch.isfinite(own_part(x)).all()]
    if broken:
        raise BadInput(f"{len(broken)} tensors are not finite ({', '.join(broken[:3])}) and are not saved. The "
                       "previous checkpoint is intact. Start the same command again to resume from it.")  # fmt: skip


def list_checkpoints(folder):
    """Return the complete checkpoints as (step, path), oldest first."""
    found = [path for path in Path(folder).glob("checkpoints/step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted((int(path.name.split("-")[1]), path) for path in found if is_complete(path))


def is_complete(checkpoint):
    return (checkpoint / "meta.json").exists() and not checkpoint.suffix


def remove_checkpoint(path):
    (path / "meta.json").unlink()  # first: a kill in between must not leave a folder that looks complete
    shutil.rmtree(path)


def sync(path):
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def open_checkpoint(path):
    """Return the content of meta.json and the open parts. Raise BadInput if a file is truncated or missing."""
    path = Path(path)
    if (path / "config.json").exists():
        raise BadInput(f"{path} is a model folder, not a checkpoint. Give it as --model; it needs no export.")
    if not is_complete(path):
        found = [str(p) for folder in (path, path.parent, path.parent.parent) for _, p in list_checkpoints(folder)]
        why = "meta.json is missing" if path.exists() else "no such folder"
        raise MissingFile(f"{path}: no complete checkpoint ({why}). Complete checkpoints near it: "
                          f"{', '.join(found) or 'none'}")  # fmt: skip
    try:
        meta = json.loads((path / "meta.json").read_text())
        if not isinstance(meta["step"], int) or not isinstance(meta["settings"], dict):
            raise ValueError("meta.json has another form")
        return meta, [safe_open(path / f"part-{i}.safetensors", "pt") for i in range(meta["parts"])]
    except (SafetensorError, OSError, ValueError, LookupError, TypeError) as error:
        older = [str(p) for _, p in list_checkpoints(path.parent.parent) if p.resolve() != path.resolve()]
        cure = f"Give --resume {older[-1]} for the one before" if older else "Give --resume none to start again"
        raise BadInput(f"{path}: this checkpoint is broken ({error}). {cure}.") from error


def restore(path, model, optimizer=None):
    """Fill model and optimizer from a checkpoint; return its meta. The world size and sharding may differ from those
    of the run that wrote it. Raise BadInput if a tensor is missing or has another shape."""
    rank, world = processes()
    meta, parts = open_checkpoint(path)
    stored = set(parts[0].keys())

    def fill(name, x):
        """Fill this rank's rows of x; the parts hold consecutive rows of a tensor."""
        slices = [part.get_slice(name) for part in parts] if name in stored else []
        shapes = [s.get_shape() for s in slices]
        shape = [sum(s[0] for s in shapes), *shapes[0][1:]] if shapes else None
        if shape != list(x.shape) or any(s[1:] != shape[1:] for s in shapes):
            raise BadInput(f"{path}: {name} has shape {shape}, the model {list(x.shape)}. Give one of this model.")
        size = -(-len(x) // world)  # rows per rank, as FSDP splits them
        low, high = (rank * size, rank * size + size) if isinstance(x, DTensor) else (0, len(x))
        first, own = 0, own_part(x)
        for rows, (n, *_) in zip(slices, shapes):
            a, b = max(first, low), min(first + n, high)
            if a < b:
                own[a - low : b - low] = rows[a - first : b - first].to(x.device)
            first += n
        return x

    with torch.no_grad():
        for name, p in model.named_parameters():
            fill(f"model/{name}", p)
            if optimizer and f"step/{name}" in stored:
                moments = {key: fill(f"{key}/{name}", torch.zeros_like(p)) for key in ("exp_avg", "exp_avg_sq")}
                # AdamW stores its step count on the CPU, fused AdamW next to the moments
                counted_on = p.device if optimizer.defaults["fused"] else "cpu"
                step = parts[0].get_tensor(f"step/{name}").to(counted_on)
                optimizer.state[p] = {"step": step, **moments}
    return meta


def load_checkpoint(resume, folder, model, optimizer, settings):
    """Restore model and optimizer in place; return the step to continue with (0: a fresh start).

    resume: "auto" takes the newest complete checkpoint of the folder, "none" starts from scratch, a path takes that
    checkpoint.
    """
    rank, _ = processes()
    known = [path for _, path in list_checkpoints(folder)]
    path = Path(resume) if resume not in ("auto", "none") else known[-1] if known and resume == "auto" else None
    meta = open_checkpoint(path)[0] if path else {"step": 0}
    steps = gather(torch.tensor([meta["step"]]))
    if (steps != meta["step"]).any():
        raise BadInput(f"the ranks found different steps {steps.tolist()}. Give all ranks the same --out folder.")
    if not path:
        return 0
    refuse_changed(meta["settings"], settings, path, meta["step"])
    restore(path, model, optimizer)
    barrier()  # all ranks have read
    if rank == 0:
        print(f"resuming after step {meta['step']} from {path}", flush=True)
    return meta["step"]


def check_space(out, model, optimizer, keep):
    """Raise BadInput if the disk cannot hold the checkpoints and the final model."""
    trained = {p for group in optimizer.param_groups for p in group["params"]}
    weights = sum(4 * p.numel() for p in model.parameters())
    checkpoint = weights + sum(8 * p.numel() for p in trained)  # AdamW's two moments
    there = min(keep, len(list_checkpoints(out)))  # old checkpoints that the next ones replace
    need = (keep + 1 - there) * checkpoint + weights  # a new checkpoint is complete before the oldest is removed
    free = shutil.disk_usage(out).free
    if free < need:
        raise BadInput(f"{out} has {free / 1e9:.1f} GB free, this run needs {need / 1e9:.1f} GB: up to {keep + 1} "
                       f"checkpoints of {checkpoint / 1e9:.1f} GB and the final model. Free space, or give another "
                       "--out or a smaller --keep.")  # fmt: skip
