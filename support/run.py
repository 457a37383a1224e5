"""What carries a stage for days: processes, sharding, checkpoints, signals, logs and flags. Imports nothing of ours.

No reader of the paper has to open this file: the stages are in sft.py, rl.py and eval.py.
"""

import argparse
import atexit
import contextlib
import ctypes
import fcntl
import hashlib
import json
import math
import multiprocessing.util
import os
import queue
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import asdict, field
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers.utils import cached_file

# ---------------------------------------------------------------------------------------------------------------
# A program and its end


class BadInput(ValueError):
    """Something that the user can mend: a sentence with the file, the place in it and the cure. No traceback."""


class MissingFile(BadInput, FileNotFoundError):
    """A BadInput that is also what Python raises for such a file."""


STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)  # what schedulers and terminals send


class Unbreakable:
    """stdout or stderr that may go away (`| tee` killed, terminal closed, disk full): what it cannot take is lost, and
    the run goes on."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with contextlib.suppress(OSError, ValueError):  # ValueError: the stream is closed
            self.stream.write(text)
        return len(text)

    def flush(self):
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()


def run_script(main):
    """main() as a program that always ends: exit code 0, 1 for an error, 128 + n after signal n.

    What a user can mend is one sentence, everything else a traceback. A failed process leaves by os._exit: threads of
    gloo and nccl, or a worker that is still alive, would keep it, and its GPU, for ever.
    """
    for name in ("stdout", "stderr"):  # None where the shell has closed it
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115
        stream.reconfigure(errors="backslashreplace")  # an ASCII terminal must not lose the lines with a ±
        setattr(sys, name, Unbreakable(stream))
    code = 1
    try:
        main()
        return
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
        print("\ninterrupted; the same command goes on from what is saved", file=sys.stderr)
    except BaseException as error:  # noqa: BLE001 (whatever it is, the process must end)
        print(sentence_of(error) or traceback.format_exc(), file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    kill_workers(daemons_only=False)
    os._exit(code)


def sentence_of(error):
    """What to tell the user in place of a traceback, None where the traceback is what helps."""
    text = str(error)
    if isinstance(error, BadInput):
        return text.rpartition("BadInput: ")[2]  # one of a loader worker comes with the worker's traceback before it
    if isinstance(error, SafetensorError) and "No space left" in text:
        return f"the disk is full ({text}); the checkpoint before stands"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, RuntimeError) and re.search(r"DataLoader worker \(pid.*(killed|exited)", text):
        return (f"a background process that reads the data has died ({text.splitlines()[0]}): most often the system "
                "ran out of memory; give fewer --workers")  # fmt: skip
    if isinstance(error, RuntimeError) and "peer" in text and dist.is_initialized():
        return f"rank {dist.get_rank()}: another process of this run has ended, its message says why ({text[:200]})"
    return None


def kill_workers(daemons_only=True):
    """By SIGKILL: the loader's workers ignore SIGTERM, and multiprocessing, which sends it at exit, would wait for them
    for ever."""
    for child in multiprocessing.active_children():
        if child.daemon or not daemons_only:
            child.kill()


atexit.register(kill_workers)  # later than multiprocessing's own handler, which is imported above: so it runs first


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


def signal_with_parent(number):
    """Linux sends this process the signal when the one that started it is gone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG


# ---------------------------------------------------------------------------------------------------------------
# Processes


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


def gather_list(items):
    """The same for a list of strings or tuples, equally long in every process."""
    if not dist.is_initialized():
        return items
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, items)
    return [item for group in zip(*parts) for item in group]


def all_sum(x):
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


# ---------------------------------------------------------------------------------------------------------------
# The frame of a training loop


class Stopped(BaseException):
    """The run ends here; all processes raise it together, so that they can save together. No Exception: whoever
    catches what a decoder or a library raises must not catch this."""

    def __init__(self, reason, code=1):
        super().__init__(reason)
        self.code = code


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


def trained(module):
    return [p for p in module.parameters() if p.requires_grad]


def make_optimizer(embedder, args, weight_decay=0.0):
    """AdamW on what is trained. On a GPU fused: foreach, torch's default there, holds a copy as large as the second
    moments, 5.8 GiB for the 2B by arithmetic."""
    parameters = trained(embedder)
    fused = all(p.device.type == "cuda" for p in parameters)
    return torch.optim.AdamW(parameters, args.lr, betas=(0.9, args.beta2), weight_decay=weight_decay, fused=fused)


def resume(args, settings, embedder, optimizer):
    """Fills both from the checkpoint that --resume says -> the step to go on with."""
    if processes()[0] == 0:
        check_space(args.out, embedder, optimizer, args.keep)
    return load_checkpoint(args.resume, args.out, embedder, optimizer, settings)


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


RUNNING = []  # the Loop that runs


def stop_if_asked():
    """To be called often in a long step, at points that all processes reach: where any of them has been signalled, all
    raise Stopped. Schedulers, torchrun among them, kill what has not ended after 30 seconds."""
    if RUNNING:
        RUNNING[-1].stop_if_asked()


def usable(pairs):
    """Which pairs of the global batch can be used, bool [B], on all processes. Ends the run where none can: there is
    nothing to learn from, and AdamW's momentum would move the weights all the same."""
    ok = gather(torch.tensor([pair.ok for pair in pairs]))
    if not ok.any():
        raise Stopped(f"no pair of this batch can be used; the first one: {pairs[0].reason}")
    return ok


class Loop:
    """What surrounds the steps: the next pairs, stopping, the update, the log's line, checkpoints, a good end.

        with Loop(...) as loop:
            for step, pairs in loop.steps(loader):
                figures = ...                                     # losses and gradients
                loop.apply_gradients(step, pairs, lr, figures)    # where all figures are finite
                loop.end_step(step, pairs, figures, tokens)

    It ends a run in good order: on a signal, on figures that are not finite, on too many unusable rows, on any error.
    The weights change only between steps, so at any moment of a step they are the state of the last complete one: a
    step that is broken off is simply forgotten. `completed` is the number of complete steps, None where the weights are
    between two of them and there is nothing to save.
    """

    def __init__(self, args, settings, embedder, optimizer, start, num_rows, shown=()):
        """settings: from begin_run(); start: the step to go on with; shown: names of the figures beside the bar."""
        self.args, self.settings, self.embedder, self.optimizer = args, settings, embedder, optimizer
        self.out, self.start, self.num_rows, self.shown = Path(args.out), start, num_rows, shown
        self.signal, self.may_break_off, self.completed = 0, False, None
        self.nonfinite, self.zero_gradients, self.seen, self.unusable = 0, 0, 0, 0

    # ---- signals and errors

    def __enter__(self):
        # a signal that is ignored from the start stays so: that is what nohup is for
        heard = [number for number in STOPPING if signal.getsignal(number) != signal.SIG_IGN]
        self.before = {number: signal.signal(number, self.note) for number in heard}
        RUNNING.append(self)
        return self

    def note(self, number, _frame):
        self.signal = number
        if self.may_break_off:
            self.may_break_off = False
            raise Stopped(signal.Signals(number).name, 128 + number)

    def stop_if_asked(self):
        """At points that every process reaches: if any of them has been signalled, all stop. Once the weights have
        moved, the step is finished first."""
        if self.completed is None:
            return
        number = torch.tensor(self.signal)
        if dist.is_initialized():
            dist.all_reduce(number, dist.ReduceOp.MAX)
        if number:
            raise Stopped(signal.Signals(int(number)).name, 128 + int(number))

    def breakable(self, work):
        """work(), which may take long and does not speak to other processes (a disk that does not answer, a rollout):
        a signal breaks it off at once. Then the processes meet."""
        result = None
        try:
            self.may_break_off = True
            if not self.signal:
                result = work()
        except Stopped:
            pass
        finally:
            self.may_break_off = False
        self.stop_if_asked()
        return result

    def __exit__(self, _kind, why, _trace):
        RUNNING.remove(self)
        try:
            if isinstance(why, Stopped):
                self.say(f"\n{why}")  # first: what follows may fail
                self.try_to_save()
                end_processes()
                raise SystemExit(why.code)
            if isinstance(why, Exception) and processes()[0] == 0:
                # other processes may not have met this error or not have survived it: process 0 saves its replica,
                # without them. Of a sharded model it has only a part.
                self.say("\nan error ends this run")
                self.try_to_save(alone=True)  # then the error goes on its way
        finally:  # only now: a second signal must not end the saving
            for number, handler in self.before.items():
                signal.signal(number, handler)

    def save(self, step, alone=False):
        settings, keep = self.settings, self.args.keep
        return save_checkpoint(self.out, self.embedder, self.optimizer, step, settings, keep, alone)

    def try_to_save(self, alone=False):
        """On the way to the end of the run, whose reason must be heard whatever happens here."""
        saved = False
        try:
            saved = bool(self.completed) and self.save(self.completed, alone)
        except Exception as error:  # noqa: BLE001
            self.say(f"saving failed: {sentence_of(error) or repr(error)}")
        if saved:
            self.say(f"saved after step {self.completed}; the same command goes on from there")
        else:
            self.say("nothing new was saved")

    def say(self, text):
        if processes()[0] == 0:
            print(text, file=sys.stderr, flush=True)

    # ---- the steps

    def steps(self, loader):
        """Yields (step, this process's pairs of it)."""
        rank, world = processes()
        first, name = rank == 0, Path(sys.argv[0]).stem
        if first:
            n_trained = sum(p.numel() for group in self.optimizer.param_groups for p in group["params"])
            device = self.embedder.device.type
            print(f"{self.num_rows:,} pairs, {n_trained:,} trained parameters, {world} process(es) on {device}")
        steps = range(self.start, self.args.steps)
        self.bar = Progress(steps, initial=self.start, total=self.args.steps, desc=name, unit="step", disable=not first)
        self.loop_began = time.perf_counter()
        for step in self.bar:
            self.completed = step
            self.step_began = time.perf_counter()
            pairs = self.breakable(lambda: next(loader))
            self.waited = self.seconds()
            yield step, pairs

    def seconds(self):
        """Since the step began."""
        return time.perf_counter() - self.step_began

    def apply_gradients(self, step, pairs, lr, figures):
        """optimizer.step() and zero_grad(). Returns False, and leaves the weights as they are, where one of the figures
        (name -> float) is not finite; more than --skip_nonfinite such steps end the run."""
        finite = self.finite(step, figures, pairs)
        if figures["gradient norm"] == 0:
            self.zero_gradients += 1
            if self.zero_gradients in (1, 10, 100):
                self.say(f"step {step + 1}: the gradient is exactly 0 ({self.zero_gradients} such steps by now), so "
                         "nothing is learned. Are all targets of a batch equal, or all rewards of a group?")
        if finite:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.completed = None  # an error from here to the log's line leaves nothing that could be saved
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return finite

    def finite(self, step, figures, pairs):
        if not all_sum(torch.tensor(sum(not math.isfinite(x) for x in figures.values()))):
            return True
        self.nonfinite += 1
        told = ", ".join(f"{name} {x}" for name, x in figures.items())
        rows = ", ".join(gather_list([pair.name for pair in pairs]))
        message = f"step {step + 1}: {told}: not finite, nothing was updated; rows {rows}"
        if self.nonfinite > self.args.skip_nonfinite:
            raise Stopped(f"{message}\n--skip_nonfinite N leaves out N such steps instead of stopping")
        self.say(message)
        return False

    def end_step(self, step, pairs, figures, tokens):
        """The step's line in log.jsonl, the bar, and a checkpoint where one is due. tokens: read or written by all."""
        if step == self.start and processes()[0] == 0:
            self.take_over()
        line = {"step": step + 1, **figures, "skipped": self.list_skipped(step, pairs), "nonfinite": self.nonfinite}
        line |= self.speed_figures(step, tokens)
        if processes()[0] == 0:
            self.log.write(json.dumps(line) + "\n")
        self.completed = step + 1
        if processes()[0] == 0:
            shown = {key: f"{line[key]:.3g}" for key in self.shown if key in line}
            self.bar.set_postfix({key: value for key, value in shown.items() if value != "0"})
        if (step + 1) % self.args.save_every == 0 or step + 1 == self.args.steps:
            self.save(step + 1)
        self.check_share()

    def take_over(self):
        """Make --out the folder of this run: args.json and the log are its own, and the checkpoints after its start,
        which are another run's and would count as newer, are removed."""
        write_args(self.out, self.args)
        self.log = open_log(self.out, self.start)
        for step, later in list_checkpoints(self.out):
            if step > self.start:
                remove_checkpoint(later)

    def speed_figures(self, step, tokens):
        """The wall-clock figures of a step's log line."""
        seconds, elapsed = self.seconds(), time.perf_counter() - self.loop_began
        done = step + 1 - self.start
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        peak = peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"pairs_per_s": self.args.batch_size / seconds, "tokens_per_s": tokens / seconds,
                "data_wait_s": self.waited, "peak_memory_gib": peak / 2**30,
                "eta_s": elapsed / done * (self.args.steps - step - 1)}  # fmt: skip

    def list_skipped(self, step, pairs):
        """Lists the unusable rows of all processes in skipped.jsonl -> their number."""
        ok = gather(torch.tensor([pair.ok for pair in pairs]))
        self.seen += len(ok)
        self.unusable += int((~ok).sum())
        if ok.all():
            return 0
        gathered = gather_list([(pair.name, pair.reason) for pair in pairs])
        bad = [pair for pair, usable in zip(gathered, ok.tolist()) if not usable]
        self.last_reason = bad[-1][1]
        if processes()[0] == 0:
            with open(self.out / "skipped.jsonl", "a") as file:
                for name, reason in bad:
                    file.write(json.dumps({"step": step + 1, "row": name, "reason": reason}) + "\n")
        return len(bad)

    def check_share(self):
        """Ends the run where too large a share of the rows seen is unusable; a small dataset within the bound never
        stops, even where its bad rows come first."""
        if self.unusable > self.args.max_skipped * max(self.seen, min(self.num_rows, 1000)):
            raise Stopped(
                f"{self.unusable} of {self.seen} rows could not be used, above --max_skipped {self.args.max_skipped}; "
                f"{self.out / 'skipped.jsonl'} lists them; the last one: {self.last_reason}"
            )


class Progress(tqdm):
    """A bar on a terminal; in a log file one plain line a minute."""

    def __init__(self, *given, **more):
        self.on_terminal = sys.stderr.isatty()
        if not self.on_terminal:
            more |= {"mininterval": 60, "maxinterval": 60, "ncols": 160}
        super().__init__(*given, **more)

    def status_printer(self, file):
        if self.on_terminal:
            return tqdm.status_printer(file)
        return lambda text: print(text, file=file, flush=True) if text else None

    def set_postfix(self, figures):
        super().set_postfix(figures, refresh=self.on_terminal)


def text_table(rows):
    """Rows of strings, the first one the heads, as lines of aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


# ---------------------------------------------------------------------------------------------------------------
# Checkpoints


def local(x):
    """What this process holds of a tensor: its rows where FSDP has sharded it, else all."""
    return x.to_local() if isinstance(x, DTensor) else x


def is_complete(checkpoint):
    return (checkpoint / "meta.json").exists() and not checkpoint.suffix


def is_sharded(model):
    return any(isinstance(p, DTensor) for p in model.parameters())


def sync(path):
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def save_checkpoint(folder, model, optimizer, step, settings, keep=2, alone=False):
    """checkpoints/step-N: written beside, fsynced, renamed; a kill at any moment leaves the old ones or the new one.

    All processes call it. Under FSDP each writes its own rows, else rank 0 writes everything; meta.json comes last.
    Learning rate, batches and the random numbers of the rollouts are functions of (seed, step), and nothing draws from
    the global random state, so it is not stored. A resumed run equals an unbroken one bit for bit on the CPU, except
    with DDP on more than two ranks: DDP adds up in another order in the first step after a start. On a GPU it is equal
    up to rounding, because attention's backward pass adds up in no fixed order.
    alone: rank 0 calls it without the others. Returns whether the checkpoint is there.
    """
    rank, world = processes()
    sharded = is_sharded(model)
    if alone and sharded and world > 1:
        return False
    refuse_not_finite(model, optimizer)
    meet = (lambda: None) if alone else barrier
    final = Path(folder) / "checkpoints" / f"step-{step}"
    temporary = final.with_suffix(".tmp")
    if is_complete(final):  # stopped right after a regular save
        return True
    if rank == 0:
        for path in final.parent.glob("step-*"):
            if re.fullmatch(r"step-\d+(\.tmp)?", path.name) and not is_complete(path):
                shutil.rmtree(path)  # what killed runs have left; anything else is the user's
        temporary.mkdir(parents=True)
    meet()
    try:
        if rank == 0 or sharded:
            names = {p: n for n, p in model.named_parameters()}
            tensors = {f"model/{n}": p for p, n in names.items()}
            tensors |= {f"{key}/{names[p]}": x for p, state in optimizer.state.items() for key, x in state.items()}
            part = temporary / f"part-{rank}.safetensors"
            save_file({name: local(x.detach()).contiguous() for name, x in tensors.items()}, part)
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
    except (OSError, SafetensorError):  # a full disk: what is half written must not keep it full
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    meet()
    return True


def refuse_not_finite(model, optimizer=None):
    """Raises BadInput where weights or moments are NaN or infinite: saved, they would take the place of good ones, and
    every later start would fail."""
    tensors = {name: p for name, p in model.named_parameters()}
    tensors |= {f"a moment of {name}": x for name, p in tensors.items() if optimizer
                for x in optimizer.state.get(p, {}).values()}  # fmt: skip
    broken = [name for name, x in tensors.items() if not torch.isfinite(local(x)).all()]
    if broken:
        raise BadInput(f"{len(broken)} tensors are not finite ({', '.join(broken[:3])}) and are not saved; the "
                       "checkpoint before stands, and the same command goes on from it")  # fmt: skip


def remove_checkpoint(path):
    (path / "meta.json").unlink()  # first: a kill in between must not leave a folder that looks complete
    shutil.rmtree(path)


def list_checkpoints(folder):
    """Complete checkpoints, oldest first, as (step, path)."""
    found = [path for path in Path(folder).glob("checkpoints/step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted((int(path.name.split("-")[1]), path) for path in found if is_complete(path))


def open_checkpoint(path):
    """-> content of meta.json, the open parts. BadInput where a file of it is torn or lacking."""
    path = Path(path)
    if (path / "config.json").exists():
        raise BadInput(f"{path} is a model folder, not a checkpoint. Give it as --model; it needs no export.")
    if not is_complete(path):
        found = [str(p) for folder in (path, path.parent, path.parent.parent) for _, p in list_checkpoints(folder)]
        why = "meta.json is missing" if path.exists() else "no such folder"
        raise MissingFile(f"{path}: no complete checkpoint there ({why}); complete ones near it: "
                          f"{', '.join(found) or 'none'}")  # fmt: skip
    try:
        meta = json.loads((path / "meta.json").read_text())
        if not isinstance(meta["step"], int) or not isinstance(meta["settings"], dict):
            raise ValueError("meta.json has another form")
        return meta, [safe_open(path / f"part-{i}.safetensors", "pt") for i in range(meta["parts"])]
    except (SafetensorError, OSError, ValueError, LookupError, TypeError) as error:
        older = [str(p) for _, p in list_checkpoints(path.parent.parent) if p.resolve() != path.resolve()]
        cure = f"--resume {older[-1]} takes the one before" if older else "--resume none starts anew"
        raise BadInput(f"{path}: this checkpoint is broken ({error}); {cure}") from error


def restore(path, model, optimizer=None):
    """Fills model and optimizer from a checkpoint -> its meta. Any number of processes, sharded or not, can read what
    any other has written. BadInput where a tensor is lacking or has another shape."""
    rank, world = processes()
    meta, parts = open_checkpoint(path)
    stored = set(parts[0].keys())

    def fill(name, x):
        """Fills this process's rows of x; the parts hold the rows of a tensor one after the other."""
        slices = [part.get_slice(name) for part in parts] if name in stored else []
        shapes = [s.get_shape() for s in slices]
        shape = [sum(s[0] for s in shapes), *shapes[0][1:]] if shapes else None
        if shape != list(x.shape) or any(s[1:] != shape[1:] for s in shapes):
            raise BadInput(f"{path}: {name} has shape {shape}, the model {list(x.shape)}: it is of another model")
        size = -(-len(x) // world)  # rows a process, as FSDP cuts them
        low, high = (rank * size, rank * size + size) if isinstance(x, DTensor) else (0, len(x))
        first, own = 0, local(x)
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
                # AdamW counts its steps on the CPU, where fused beside the moments
                counted_on = p.device if optimizer.defaults["fused"] else "cpu"
                step = parts[0].get_tensor(f"step/{name}").to(counted_on)
                optimizer.state[p] = {"step": step, **moments}
    return meta


def load_checkpoint(resume, folder, model, optimizer, settings):
    """Restores model and optimizer in place -> the step to go on with (0: a fresh start).

    resume: "auto" takes the newest complete checkpoint of the folder, "none" starts anew, a path takes that one.
    """
    rank, _ = processes()
    known = [path for _, path in list_checkpoints(folder)]
    path = Path(resume) if resume not in ("auto", "none") else known[-1] if known and resume == "auto" else None
    meta = open_checkpoint(path)[0] if path else {"step": 0}
    steps = gather(torch.tensor([meta["step"]]))
    if (steps != meta["step"]).any():
        raise BadInput(f"the processes found different steps {steps.tolist()}: all need the same --out folder")
    if not path:
        return 0
    refuse_changed(meta["settings"], settings, path, meta["step"])
    restore(path, model, optimizer)
    barrier()  # nobody reads any more
    if rank == 0:
        print(f"resuming after step {meta['step']} from {path}", flush=True)
    return meta["step"]


def check_space(out, model, optimizer, keep):
    """Before the first step: stops where the disk cannot hold the checkpoints and the final model."""
    trained = {p for group in optimizer.param_groups for p in group["params"]}
    weights = sum(4 * p.numel() for p in model.parameters())
    checkpoint = weights + sum(8 * p.numel() for p in trained)  # AdamW's two moments
    there = min(keep, len(list_checkpoints(out)))  # they make room for the next ones
    need = (keep + 1 - there) * checkpoint + weights  # one is written before the oldest goes
    free = shutil.disk_usage(out).free
    if free < need:
        raise BadInput(f"{out} has {free / 1e9:.1f} GB free, this run needs {need / 1e9:.1f} GB: up to {keep + 1} "
                       f"checkpoints of {checkpoint / 1e9:.1f} GB and the final model; make room, choose another --out "
                       "or a smaller --keep")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# A run's folder: its lock, settings and log

CHANGEABLE = ("steps", "lr")  # a resumed run may have others: people extend runs


def changes(before, now):
    """What differs between two dicts of settings, {key: text}."""
    return {key: f"{key} {before.get(key)} -> {now[key]}" for key in now if before.get(key) != now[key]}


def refuse_changed(before, now, path, step=0, may_change=CHANGEABLE, why=""):
    """Stops where a resumed run is not the same one. step: the step that it goes on after; why: said with the changes.

    A setting that did not exist when the run began is said, not refused: its default is what the run did until then.
    """
    changed = changes(before, now)
    refused = [text for key, text in changed.items() if key in before and key not in may_change]
    if refused:
        raise SystemExit(
            f"{path} was made with other settings ({'; '.join(refused)}){why}. "
            "Give the same ones, or another --out, or --resume none to start anew."
        )
    if now.get("steps", step) < step:
        raise SystemExit(f"{path} is after step {step}, beyond --steps {now['steps']}; an earlier checkpoint can be "
                         "named by --resume DIR, --resume none starts anew")  # fmt: skip
    if changed and processes()[0] == 0:
        print(f"the resumed run has other settings from here on: {'; '.join(changed.values())}", flush=True)


HELD = []  # the open lock files of this process


def hold(folder):
    """Make this run the only one that writes to the folder, or raise BadInput with the name of the other run.

    All ranks call it, rank 0 holds the lock. The kernel releases it when the process ends, however it ends.
    """
    rank, _ = processes()
    path, made = Path(folder) / ".lock", Path(folder) / "args.json"
    if made.exists():
        scripts = [Path(command[0]).name for command in (read_json(made).get("command", [""]), sys.argv)]
        if scripts[0] != scripts[1] and "eval.py" in scripts and {*scripts} <= {"sft.py", "rl.py", "eval.py"}:
            raise BadInput(f"{folder} is the folder of a run of {scripts[0]}; give another --out")
    taken = ""
    if rank == 0:
        Path(folder).mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", errors="backslashreplace")  # noqa: SIM115 (held as long as this process lives)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {os.uname().nodename} since {datetime.now():%Y-%m-%d %H:%M:%S}: "
                       f"{' '.join(sys.argv)[:300]}")  # fmt: skip
            file.flush()
            HELD.append(file)
        except BlockingIOError:
            file.seek(0)
            taken = file.read()
        except OSError as error:  # some network disks have no locks
            print(f"warning: {path} cannot be locked ({error}); see that no other run writes here", file=sys.stderr)
    if taken := next((text for text in gather_list([taken]) if text), ""):
        raise BadInput(f"{folder} is in use by another run: {taken}. Wait for it, end it, or give another --out.")


def weights_digest(name_or_path):
    """Identity of a model: of all bytes of weights, configuration and tokenizer (a sample misses a changed norm), about
    a second a GB; of a hub id its commit."""
    folder = Path(name_or_path)
    if not folder.is_dir():
        try:
            return Path(cached_file(str(name_or_path), "config.json")).parent.name
        except OSError as error:
            raise BadInput(f"--model {name_or_path}: {str(error).splitlines()[0]}") from error
    digest = hashlib.blake2b(digest_size=16)
    names = ("*.safetensors", "*.bin", "*.index.json", "config.json", "tokenizer*", "vocab*", "merges.txt",
             "special_tokens_map.json", "added_tokens.json")  # fmt: skip
    for path in sorted(path for name in names for path in folder.glob(name)):
        with open(path, "rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()


def same_on_all_ranks(about):
    """Raises BadInput on every rank if one rank differs from rank 0. about: {name: value}, as JSON. Nodes may have
    their own copies of data and models, and a run over different ones would train on without a word."""
    first, *others = gather_list([(os.uname().nodename, about)])
    for rank, (node, theirs) in enumerate(others, 1):
        if changed := changes(first[1], theirs):
            raise BadInput(f"rank {rank} on {node} differs from rank 0 on {first[0]}: {'; '.join(changed.values())}. "
                           "Start all nodes with the same flags, data and models.")  # fmt: skip


def check_batch_size(batch_size, world):
    """Raises BadInput if the ranks cannot share a batch equally."""
    if batch_size % world:
        raise BadInput(f"--batch_size {batch_size} must be a multiple of the {world} processes")


def begin_run(args, digest_of):
    """Locks --out -> what a resumed run must share, or None if the run in --out is finished. Nothing else changes there
    before the first step is complete (Loop.take_over): the command may still turn out to be unusable.

    digest_of: a --data file -> digest of its content; a run never goes on with other data under the same name.
    """
    rank, world = processes()
    check_batch_size(args.batch_size, world)
    digests = first_on_node(lambda: [digest_of(file) for file in args.data])
    # what does not decide the weights: memory, time, upkeep, and when a run gives up
    free = ("resume", "save_every", "keep", "workers", "micro_batch", "update_batch", "prefill_tokens", "out", "cache",
            "fsdp", "max_skipped", "skip_nonfinite")  # fmt: skip
    out, settings = Path(args.out), {key: value for key, value in asdict(args).items() if key not in free}
    if Path(args.model).resolve() == out.resolve():
        raise BadInput(f"--out {out} is --model too, which would be overwritten; give another --out")
    settings["content of --data"] = digests
    settings["content of --model"] = first_on_node(lambda: weights_digest(args.model))
    of_node = ("data", "media_root", "model", "out", "cache", "workers")  # paths may have other names on another node
    same_on_all_ranks({key: value for key, value in (asdict(args) | settings).items() if key not in of_node})
    hold(out)
    path = out / "args.json"
    before = read_json(path) if args.resume == "auto" and path.exists() else {}
    if before.get("finished") and any(out.glob("*.safetensors")):  # else somebody has taken the model away
        before = before.get("resume", before["settings"])
        can_go_on = bool(list_checkpoints(out))
        if args.steps <= before["steps"] or not can_go_on:  # else it is extended, from its last checkpoint
            why = "" if can_go_on else ", and it has no checkpoint to go on from"
            refuse_changed(before, settings, out, may_change=(), why=why)
            if rank == 0:
                print(f"{out} is finished ({args.steps} steps); --resume none trains it anew")
            end_processes()
            return None
    return settings


def end_run(args, settings):
    """The last thing of a stage, after its model is saved."""
    if processes()[0] == 0:
        write_args(args.out, args, finished=True, resume=settings)
        print(f"saved {args.out}")
    barrier()
    end_processes()


def open_log(out, start):
    """log.jsonl, one line a step, open for more: what a killed run wrote beyond its last checkpoint goes."""
    for name in ("log.jsonl", "skipped.jsonl"):
        path = Path(out) / name
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        complete = [line for line in lines if line.endswith("\n")]  # the last one may have been cut by the kill
        steps = [re.match(r'{"step": (\d+)[,}]', line) for line in complete]  # None: a crash of the machine left zeros
        if None in steps:
            print(f"{path}: {steps.count(None)} lines that are no log lines are left out", file=sys.stderr)
        kept = "".join(line for line, step in zip(complete, steps) if step and int(step[1]) <= start)
        write_file(path, lambda temporary, kept=kept: temporary.write_text(kept))
    return open(Path(out) / "log.jsonl", "a", buffering=1)


def write_file(path, write):
    """Calls write(temporary path), then renames: a reader sees the old file or the new one, whatever kills us."""
    temporary = Path(f"{path}.{os.uname().nodename}-{os.getpid()}.tmp")  # nodes have the same numbers
    try:
        write(temporary)
        apply_umask(temporary)
    except BaseException:  # a full disk must not be kept full
        temporary.unlink(missing_ok=True)
        raise
    os.replace(temporary, path)


def apply_umask(path):
    """Give a file the mode that open() gives. safetensors creates 0600, which locks out the user's group."""
    mask = os.umask(0)
    os.umask(mask)
    with contextlib.suppress(OSError):  # some network disks have no modes
        os.chmod(path, 0o666 & ~mask)


def write_json(path, data):
    write_file(path, lambda temporary: temporary.write_text(json.dumps(data, indent=1, default=str)))


def read_json(path):
    """Return the content of a JSON file. Raises BadInput with the file and the reason if it is not JSON in UTF-8."""
    try:
        return json.loads(Path(path).read_bytes().decode("utf-8"))
    except FileNotFoundError as error:
        raise MissingFile(f"{path}: no such file") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not valid JSON in UTF-8 ({error}). Fix it, or copy the file again.") from error


def write_args(out, args, **more):
    """args.json: settings, command line, commit and versions that made the folder."""
    commit = None
    if shutil.which("git"):
        # no optional locks: a run that is killed at this moment would leave .git/index.lock in the user's repository
        command = ["git", "--no-optional-locks", "describe", "--always", "--dirty"]
        git = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
        commit = git.stdout.strip() or None
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__}
    about = {"settings": asdict(args), "command": sys.argv, "commit": commit, **versions, **more}
    write_json(Path(out) / "args.json", about)


# ---------------------------------------------------------------------------------------------------------------
# Flags

BOUNDS = (  # lowest value, whether it is allowed itself, highest value, settings
    (1, True, math.inf, "steps batch_size micro_batch update_batch prefill_tokens save_every keep"),
    (1, True, math.inf, "max_new_tokens max_length max_tokens size"),
    (2, True, math.inf, "G"),  # a group of one has no advantage: nothing would be learned
    (0, True, math.inf, "workers tau_steps skip_nonfinite samples report_queries beta eps_high video_max_pixels"),
    (0, True, 2**63 - 1, "seed"),
    (0, True, 10, "lr weight_decay"),
    (0, True, math.inf, "w_disc w_gen w_ce cross_weight w_anchor"),
    (0, True, 1, "warmup lr_floor max_skipped max_repeat eps_low"),
    (0, True, 0.999999, "beta2"),
    (0, False, math.inf, "tau tau_start clip"),
    (0.001, True, 100, "temperature"),  # beyond it logits leave their numbers' range, or reach the ban's
)


def check_bounds(given, **own):
    """Raises BadInput where one of the given settings, a dict, is out of its bounds. own: {name: (lowest, whether it is
    allowed itself, highest)}."""
    bounds = {name: bound for *bound, names in BOUNDS for name in names.split()} | own
    for name, value in given.items():
        low, allowed, high = bounds.get(name, (0, True, math.inf))
        if name not in bounds or isinstance(value, bool) or value is None:
            continue
        if not (low <= value <= high and (allowed or value > low) and math.isfinite(value)):
            above = f"{'at least' if allowed else 'above'} {low}"
            raise BadInput(f"--{name} {value}: must be {above}{f' and at most {high}' * math.isfinite(high)}")


def setting(default, help):
    """A field of a script's settings: its default and what --help says of it."""
    return field(default=default, metadata={"help": help})


def parse_args(settings, presets, argv=None):
    """Flags from a dataclass of settings; --preset is read first and sets the defaults of the others."""
    argv = sys.argv[1:] if argv is None else argv
    first = transformers.HfArgumentParser(settings, add_help=False)
    preset = first.parse_known_args([a for a in argv if a not in ("-h", "--help")])[0].preset
    if preset not in presets:
        raise SystemExit(f"--preset {preset}: choose one of {', '.join(presets)}")
    what_it_does = sys.modules[settings.__module__].__doc__.split("\n\n")[0]
    parser = transformers.HfArgumentParser(
        settings, description=what_it_does, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.set_defaults(**presets[preset])
    for action in parser._actions:  # HfArgumentParser adds --no_x to a true --x, with the help of the other
        if any(flag.startswith("--no_") for flag in action.option_strings):
            action.help = argparse.SUPPRESS
    args, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    if unknown:
        raise SystemExit(f"unknown: {' '.join(unknown)}; --help lists the flags")
    check_bounds(vars(args))
    return args


def stable_hash(*parts):
    """A 63-bit seed out of integers and strings, the same in every process and Python."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1
