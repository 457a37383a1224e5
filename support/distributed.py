"""Ranks: start and end, collectives, DDP and FSDP2, loader workers."""

import contextlib
import ctypes
import os
import signal
import sys
import time
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from support.program import STOPPING


def start_processes(fsdp=False):
    """Return (rank, world size, device). A script runs with or without torchrun, on CPU (gloo) and GPU (nccl)."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if fsdp and world == 1:
        raise SystemExit("--fsdp shards the model over several ranks. Start it with torchrun --nproc_per_node N.")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    cudnn_attention_off()
    if "TORCHELASTIC_RUN_ID" in os.environ:  # if torchrun is killed with -9, the ranks save and end
        signal_with_parent(signal.SIGTERM)
    if world > 1 and not dist.is_initialized():  # CPU tensors use gloo on GPUs too, which saves a synchronisation
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(minutes=30))
    return rank, world, device


def cudnn_attention_off():
    """Turn off cuDNN attention, torch's first choice on an H100. It plans each new shape for 23 to 450 ms, and here
    nearly every pass has a new shape. Flash and efficient attention need no plan."""
    torch.backends.cuda.enable_cudnn_sdp(False)


def processes():
    """Return (rank, world size)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def barrier(group=None):
    if dist.is_initialized():
        dist.barrier(group)


def end_processes():
    """End the process group, as the last call of a run with several ranks.

    The thread of gloo needs Python's lock to free the tensors of the last collective. The destructor of the group holds
    that lock and waits for the thread. Without a pause, a finished run sometimes never ends (torch 2.13).
    """
    if dist.is_initialized():
        time.sleep(1)
        dist.destroy_process_group()


def first_on_node(make):
    """Return make(), run first by one rank per node, then by the other ranks, which find the result on disk."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    made = make() if first else None
    barrier()
    return made if first else make()


def gather(x):
    """Return x [n, ...] of all ranks in the row order of a step (rank r has rows r, r + world, ...). No gradient."""
    if not dist.is_initialized():
        return x.detach()
    x = x.detach().contiguous()  # before empty_like: the receiving buffers need the same layout
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    return torch.stack(parts, dim=1).flatten(0, 1)


def gather_objects(x, group=None):
    """Return the objects of all ranks, in the order of the ranks. x: any picklable object."""
    if not dist.is_initialized():
        return [x]
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, x, group)
    return gathered


def gather_list(items):
    """Return the items of all ranks in the row order of a step. items: a list of the same length on every rank."""
    return [item for group in zip(*gather_objects(items)) for item in group]


def all_sum(x):
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def distribute(embedder, args, device):
    """Return the model to train: the embedder, its DDP replica or, with --fsdp, the sharded embedder. requires_grad
    marks the trained parameters. Create the optimiser after this call, because sharding replaces the parameters."""
    if args.checkpointing:
        embedder.backbone.activation_checkpointing_enable({"use_reentrant": False})
    embedder.bf16 = args.bf16
    embedder.train()
    if args.fsdp:
        shard(embedder, args.bf16)
    if args.fsdp or processes()[1] == 1:
        return embedder
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(embedder, device_ids=ids, gradient_as_bucket_view=True)


def without_ddp(model):
    """Return the embedder of a model from distribute()."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def no_gradient_sync(model, is_last):
    """Return a context in which DDP averages the gradients over the ranks only after the last micro-batch of a step.
    FSDP averages after each micro-batch: otherwise it would hold the gradients of the complete model."""
    if isinstance(model, DistributedDataParallel) and not is_last:
        return model.no_sync()
    return contextlib.nullcontext()


def clip_gradients(optimizer, most):
    """Scale the gradients to a norm of at most `most`; return the norm before."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, most)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def shard(embedder, bf16, mesh=None):
    """Shard parameters, gradients and AdamW's moments over the ranks in fp32 (FSDP2). Each decoder layer is gathered in
    bf16 while it runs; embeddings, head and vision tower (one group) are gathered for the complete pass. A model in CPU
    memory moves to the GPU group by group, so no GPU ever holds all of it in fp32."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32)
    for layer in embedder.backbone.model.language_model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    # reshard after every pass: between passes the parameters are the shards, which checkpoints save
    fully_shard(embedder, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    embedder(None)  # an empty pass: FSDP must initialise in a pass of the root, before one of a layer


@contextlib.contextmanager
def unsharded(embedder):
    """Gather a sharded model while it decodes (15 GB for the 7B in bf16). Otherwise every layer would all-gather at
    every token, but the ranks decode different numbers of tokens. FSDP's hooks are off, because a prefill calls the
    layers and the hooks would shard each layer again after its pass. The decode step calls no module."""
    parts = [module for module in embedder.modules() if isinstance(module, FSDPModule)]
    hooks = [(part, part._forward_pre_hooks, part._forward_hooks) for part in parts]
    for part in parts:
        part.unshard()
        part._forward_pre_hooks, part._forward_hooks = {}, {}
    try:
        yield
    finally:
        for part, before, after in hooks:
            part._forward_pre_hooks, part._forward_hooks = before, after
            part.reshard()


def is_sharded(model):
    return any(isinstance(p, DTensor) for p in model.parameters())


def own_part(x):
    """Return this rank's part of a tensor: its rows if FSDP has sharded it, otherwise all of it."""
    return x.to_local() if isinstance(x, DTensor) else x


def signal_with_parent(number):
    """Let Linux send this process the signal `number` when its parent ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG


def tie_to_parent(parent, _worker=0):
    """Make a loader worker ignore signals and end with its parent. A scheduler signals the complete process group, but
    the workers must live until the training loop has saved. Without a parent they would wait forever with full
    pipes."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    signal_with_parent(signal.SIGKILL)
    if os.getppid() != parent:  # the parent ended before the line above
        os._exit(1)


def forked_loader(dataset, workers, **settings):
    """Return a DataLoader. Its workers are forks of this process and end with it; with 0, this process loads."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the threads of tokenizers do not survive a fork
    return DataLoader(
        dataset,
        num_workers=workers,
        generator=torch.Generator(),  # separate, so the loader does not change the global random state
        multiprocessing_context="fork" if workers else None,
        worker_init_fn=partial(tie_to_parent, os.getpid()),
        **settings,
    )
