"""Ranks: start and end, collectives, DDP and FSDP2, loader workers."""

import contextlib
import ctypes
import os
import queue
import signal
import sys
import threading
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
    """-> (rank, world, device). The same script runs alone and under torchrun, on CPU (gloo) and GPU (nccl)."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if fsdp and world == 1:
        raise SystemExit("--fsdp spreads the model over processes: start it with torchrun --nproc_per_node N")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    cudnn_attention_off()
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun killed with -9 leaves its processes running: they save and end
        signal_with_parent(signal.SIGTERM)
    if world > 1 and not dist.is_initialized():  # CPU tensors go over gloo on GPUs too: no wait for the GPU
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(minutes=30))
    return rank, world, device


def cudnn_attention_off():
    """cuDNN is torch's first choice for attention on an H100 and makes an execution plan for every shape that is
    new to it, 23 to 450 ms each. Here nearly every pass has another shape; flash and efficient attention need none."""
    torch.backends.cuda.enable_cudnn_sdp(False)


def processes():
    """-> (rank, world)"""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def barrier(group=None):
    if dist.is_initialized():
        dist.barrier(group)


def end_processes():
    """The last thing of a run with several processes.

    gloo's thread frees the tensors of the last collective and needs Python's lock for that; the group's destructor
    holds the lock and waits for the thread. Without a pause a finished run now and then never ends (torch 2.13).
    """
    if dist.is_initialized():
        time.sleep(1)
        dist.destroy_process_group()


def first_on_node(make):
    """make() in one process of every node, then in the others, which find its work on the disk."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    made = make() if first else None
    barrier()
    return made if first else make()


def gather(x):
    """All processes' x [n, ...] in the order of a step's rows (process r holds rows r, r + world, ...). No gradient."""
    if not dist.is_initialized():
        return x.detach()
    x = x.detach().contiguous()  # before empty_like: the receiving buffers must have its layout
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    return torch.stack(parts, dim=1).flatten(0, 1)


def gather_objects(x, group=None):
    """Return what every rank gave, in the order of the ranks. x: anything that can be pickled."""
    if not dist.is_initialized():
        return [x]
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, x, group)
    return gathered


def gather_list(items):
    """Return all ranks' items in the order of a step's rows. items: a list, equally long on every rank."""
    return [item for group in zip(*gather_objects(items)) for item in group]


def all_sum(x):
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def distribute(embedder, args, device):
    """-> what the loop calls: the embedder itself, its DDP replica or, with --fsdp, the embedder in shards. What is
    trained is marked by requires_grad; an optimiser must be made afterwards, of the shards."""
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
    """The embedder of the model that distribute() returns."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def no_gradient_sync(model, is_last):
    """DDP averages the gradients over the processes after the last micro-batch of a step only. FSDP does so after each
    one: it would have to keep the gradients of the whole model until then."""
    if isinstance(model, DistributedDataParallel) and not is_last:
        return model.no_sync()
    return contextlib.nullcontext()


def clip_gradients(optimizer, most):
    """Scales the gradients to a norm of at most `most` -> the norm before."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, most)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def shard(embedder, bf16, mesh=None):
    """FSDP2: parameters, gradients and AdamW's moments are spread over the processes in fp32; each decoder layer is put
    together in bf16 when it runs, embeddings, head and vision tower (one group) for the whole pass. A model that is
    still in the CPU's memory goes to the GPU group by group: no GPU ever holds all of it in fp32."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32)
    for layer in embedder.backbone.model.language_model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    # resharded after every pass: outside of one the parameters are always the shards, which is what gets saved
    fully_shard(embedder, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    embedder(None)  # an empty pass: FSDP sets itself up in the first one of the root, before any layer's


@contextlib.contextmanager
def unsharded(embedder):
    """A sharded model is put together for as long as it decodes (in bf16 the 7B takes 15 GB): every layer of every
    token would else be a collective, and the processes do not decode equally many tokens. FSDP's hooks are off
    meanwhile: of a decode step of small layers on a CPU they took a fifth."""
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


def local(x):
    """What this process holds of a tensor: its rows where FSDP has sharded it, else all."""
    return x.to_local() if isinstance(x, DTensor) else x


def signal_with_parent(number):
    """Linux sends this process the signal when the one that started it is gone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG


def tie_to_parent(parent, _worker=0):
    """For a loader's worker. A scheduler signals the whole process group: the workers must live until the training loop
    has saved, and not a moment longer than it (those of a killed one would wait for ever, each for the other, with full
    pipes)."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    signal_with_parent(signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the line above
        os._exit(1)


def forked_loader(dataset, workers, **settings):
    """A DataLoader whose workers are forks of this process and end with it; 0 workers: everything in here."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive a fork
    return DataLoader(
        dataset,
        num_workers=workers,
        generator=torch.Generator(),  # its own: the global one must not depend on the loader
        multiprocessing_context="fork" if workers else None,
        worker_init_fn=partial(tie_to_parent, os.getpid()),
        **settings,
    )


def one_ahead(items):
    """Yields what the iterator `items` gives; a thread fetches the next one while the caller works with the last.

    An error of `items` is raised here, in the place of its item. A thread that still waits for an item does not keep
    the process from ending. Loader workers must be running already: the kernel ends them with the thread that forked
    them (tie_to_parent).
    """
    fetched = queue.SimpleQueue()  # of (item, error), one at most

    def fetch():
        try:
            fetched.put((next(items), None))
        except BaseException as error:  # noqa: BLE001 (it belongs to the main thread)
            fetched.put((None, error))

    threading.Thread(target=fetch, daemon=True).start()
    while True:
        item, error = fetched.get()
        if isinstance(error, StopIteration):
            return
        if error is not None:
            raise error
        threading.Thread(target=fetch, daemon=True).start()
        yield item
