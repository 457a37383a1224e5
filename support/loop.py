"""The frame of a training run: begin, resume, signals, the log, saving, end."""

import json
import math
import re
import resource
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from support.checkpoint import check_space, list_checkpoints, load_checkpoint, remove_checkpoint, save_checkpoint
from support.distributed import all_sum, barrier, end_processes, first_on_node, gather, gather_list, processes
from support.files import read_json, write_file
from support.program import STOPPING, BadInput, Progress, Stopped, sentence_of
from support.settings import check_batch_size, hold, refuse_changed, same_on_all_ranks, weights_digest, write_args


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


def resume(args, settings, embedder, optimizer):
    """Fills both from the checkpoint that --resume says -> the step to go on with."""
    if processes()[0] == 0:
        check_space(args.out, embedder, optimizer, args.keep)
    return load_checkpoint(args.resume, args.out, embedder, optimizer, settings)


def end_run(args, settings):
    """The last thing of a stage, after its model is saved."""
    if processes()[0] == 0:
        write_args(args.out, args, finished=True, resume=settings)
        print(f"saved {args.out}")
    barrier()
    end_processes()


def trained(module):
    return [p for p in module.parameters() if p.requires_grad]


def make_optimizer(embedder, args, weight_decay=0.0):
    """AdamW on what is trained. On a GPU fused: foreach, torch's default there, holds a copy as large as the second
    moments, 5.8 GiB for the 2B by arithmetic."""
    parameters = trained(embedder)
    fused = all(p.device.type == "cuda" for p in parameters)
    return torch.optim.AdamW(parameters, args.lr, betas=(0.9, args.beta2), weight_decay=weight_decay, fused=fused)

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
        if first and not steps:  # the checkpoint is of the last step already
            self.take_over()

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
        for step, later in reversed(list_checkpoints(self.out)):  # the newest first: a kill leaves the older ones whole
            if step > self.start:
                remove_checkpoint(later)
        write_args(self.out, self.args)
        self.log = open_log(self.out, self.start)

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
