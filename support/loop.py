"""The frame of a training run: begin, resume, signals, log, checkpoints, end."""

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
    """Lock --out; return the settings that a resumed run must share, or None if the run in --out is finished. Nothing
    else in --out changes before the first step is complete (Loop.take_over), because the command may still fail.

    digest_of: a --data file -> digest of its content; a run never continues with changed data under the same name.
    """
    rank, world = processes()
    check_batch_size(args.batch_size, world)
    digests = first_on_node(lambda: [digest_of(file) for file in args.data])
    # settings that do not affect the weights: memory, time, housekeeping, and when a run stops
    free = ("resume", "save_every", "keep", "workers", "slots", "pass_tokens", "out", "cache", "fsdp",
            "max_skipped", "skip_nonfinite")  # fmt: skip
    out, settings = Path(args.out), {key: value for key, value in asdict(args).items() if key not in free}
    if Path(args.model).resolve() == out.resolve():
        raise BadInput(f"--out {out} is the same folder as --model, which would be overwritten. Give another --out.")
    settings["content of --data"] = digests
    settings["content of --model"] = first_on_node(lambda: weights_digest(args.model))
    of_node = ("data", "media_root", "model", "out", "cache", "workers")  # paths may differ between nodes
    same_on_all_ranks({key: value for key, value in (asdict(args) | settings).items() if key not in of_node})
    hold(out)
    path = out / "args.json"
    before = read_json(path) if args.resume == "auto" and path.exists() else {}
    if before.get("finished") and any(out.glob("*.safetensors")):  # otherwise the model was removed
        before = before.get("resume", before["settings"])
        can_go_on = bool(list_checkpoints(out))
        if args.steps <= before["steps"] or not can_go_on:  # otherwise extend it from its last checkpoint
            why = "" if can_go_on else ", and it has no checkpoint to resume from"
            refuse_changed(before, settings, out, may_change=(), why=why)
            if rank == 0:
                print(f"{out} is finished ({args.steps} steps). Give --resume none to train it again.")
            end_processes()
            return None
    return settings


def resume(args, settings, embedder, optimizer):
    """Fill model and optimizer from the checkpoint that --resume names; return the step to continue with."""
    if processes()[0] == 0:
        check_space(args.out, embedder, optimizer, args.keep)
    return load_checkpoint(args.resume, args.out, embedder, optimizer, settings)


def end_run(args, settings):
    """End a stage after its model is saved."""
    if processes()[0] == 0:
        write_args(args.out, args, finished=True, resume=settings)
        print(f"saved {args.out}")
    barrier()
    end_processes()


def trained(module):
    return [p for p in module.parameters() if p.requires_grad]


def make_optimizer(embedder, args, weight_decay=0.0):
    """Return AdamW for the trained parameters. On a GPU it is fused, because torch's default there, foreach, needs a
    copy as large as the second moments (computed: 5.8 GiB for the 2B)."""
    parameters = trained(embedder)
    fused = all(p.device.type == "cuda" for p in parameters)
    return torch.optim.AdamW(parameters, args.lr, betas=(0.9, args.beta2), weight_decay=weight_decay, fused=fused)


RUNNING = []  # the running Loop


def stop_if_asked():
    """Raise Stopped on all ranks if any rank has received a signal. Call it often in a long step, at points that all
    ranks reach: schedulers, torchrun among them, kill a process that has not ended after 30 seconds."""
    if RUNNING:
        RUNNING[-1].stop_if_asked()


def require_usable(pairs):
    """Return which pairs of the global batch are usable, bool [B], on all ranks. Raise Stopped if no pair is usable: a
    step without data would still move the weights by AdamW's momentum."""
    ok = gather(torch.tensor([pair.ok for pair in pairs]))
    if not ok.any():
        raise Stopped(f"no pair of this batch can be used; the first one: {pairs[0].reason}")
    return ok


class Loop:
    """The frame of the steps: fetch pairs, stop, update, log, write checkpoints, end cleanly.

        with Loop(...) as loop:
            for step, pairs in loop.steps(loader):
                figures = ...                                     # losses and gradients
                loop.apply_gradients(step, pairs, lr, figures)    # if all figures are finite
                loop.end_step(step, pairs, figures, tokens)

    It saves and ends a run on a signal, on non-finite metrics, on too many unusable rows and on any error. The weights
    change only at the end of a step, so during a step they are those of the last complete step, and an interrupted
    step leaves no trace. `completed` is the number of complete steps. It is None while the weights change, because
    then nothing can be saved.
    """

    def __init__(self, args, settings, embedder, optimizer, start, num_rows, shown=()):
        """settings: from begin_run(); start: the step to continue with; shown: metrics next to the bar."""
        self.args, self.settings, self.embedder, self.optimizer = args, settings, embedder, optimizer
        self.out, self.start, self.num_rows, self.shown = Path(args.out), start, num_rows, shown
        self.signal, self.may_break_off, self.completed = 0, False, None
        self.nonfinite, self.zero_gradients, self.seen, self.unusable = 0, 0, 0, 0

    # ---- signals and errors

    def __enter__(self):
        # a signal that is ignored at the start stays ignored: nohup relies on it
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
        """Raise Stopped on all ranks if any rank has received a signal. Call it at points that all ranks reach. If
        the weights have changed, the step is finished first."""
        if self.completed is None:
            return
        number = torch.tensor(self.signal)
        if dist.is_initialized():
            dist.all_reduce(number, dist.ReduceOp.MAX)
        if number:
            raise Stopped(signal.Signals(int(number)).name, 128 + int(number))

    def breakable(self, work):
        """Return work(), which may be slow and has no collectives (a disk that does not answer, a rollout). A signal
        interrupts it at once. Then the ranks meet."""
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
                self.say(f"\n{why}")  # print the reason first: the next lines may fail
                self.try_to_save()
                end_processes()
                raise SystemExit(why.code)
            if isinstance(why, Exception) and processes()[0] == 0:
                # the other ranks may have no error or may have died, so rank 0 saves its replica alone. Of a sharded
                # model it has only a part.
                self.say("\nan error ends this run")
                self.try_to_save(alone=True)  # then the error propagates
        finally:  # restored last: a second signal must not interrupt saving
            for number, handler in self.before.items():
                signal.signal(number, handler)

    def save(self, step, alone=False):
        settings, keep = self.settings, self.args.keep
        return save_checkpoint(self.out, self.embedder, self.optimizer, step, settings, keep, alone)

    def try_to_save(self, alone=False):
        """Save before the run ends; report an error here, so that it does not hide the reason of the end."""
        saved = False
        try:
            saved = bool(self.completed) and self.save(self.completed, alone)
        except Exception as error:  # noqa: BLE001
            self.say(f"saving failed: {sentence_of(error) or repr(error)}")
        if saved:
            self.say(f"saved after step {self.completed}; the same command resumes from there")
        else:
            self.say("nothing new was saved")

    def say(self, text):
        if processes()[0] == 0:
            print(text, file=sys.stderr, flush=True)

    # ---- the steps

    def steps(self, loader):
        """Yield (step, the pairs of this rank)."""
        rank, world = processes()
        first, name = rank == 0, Path(sys.argv[0]).stem
        if first:
            n_trained = sum(p.numel() for group in self.optimizer.param_groups for p in group["params"])
            device = self.embedder.device.type
            print(f"{self.num_rows:,} pairs, {n_trained:,} trained parameters, {world} rank(s) on {device}")
        steps = range(self.start, self.args.steps)
        self.bar = Progress(steps, initial=self.start, total=self.args.steps, desc=name, unit="step", disable=not first)
        self.loop_began = time.perf_counter()
        for step in self.bar:
            self.completed = step
            self.step_began = time.perf_counter()
            pairs = self.breakable(lambda: next(loader))
            self.waited = self.seconds()
            yield step, pairs
        if first and not steps:  # the checkpoint is already that of the last step
            self.take_over()

    def seconds(self):
        """Return the seconds since the step began."""
        return time.perf_counter() - self.step_began

    def apply_gradients(self, step, pairs, lr, figures):
        """Run optimizer.step() and zero_grad(). If one of the figures {name: float} is not finite, leave the weights
        unchanged; after more than --skip_nonfinite such steps, raise Stopped."""
        if figures["gradient norm"] == 0:
            self.zero_gradients += 1
            if self.zero_gradients in (1, 10, 100):
                self.say(f"step {step + 1}: the gradient is exactly 0 ({self.zero_gradients} such steps so far), so "
                         "nothing is learned. Check if all targets of a batch, or all rewards of a group, are equal.")
        if all_sum(torch.tensor(sum(not math.isfinite(x) for x in figures.values()))):
            self.nonfinite += 1
            values = ", ".join(f"{name} {x}" for name, x in figures.items())
            rows = ", ".join(gather_list([pair.name for pair in pairs]))
            message = f"step {step + 1}: {values}: not finite, nothing was updated; rows {rows}"
            if self.nonfinite > self.args.skip_nonfinite:
                raise Stopped(f"{message}\nGive --skip_nonfinite N to leave out N such steps instead of stopping.")
            self.say(message)
        else:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.completed = None  # nothing can be saved from here until the log line is written
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def end_step(self, step, pairs, figures, tokens):
        """Log the step, update the bar, and save a checkpoint if one is due. tokens: count over all ranks."""
        if step == self.start and processes()[0] == 0:
            self.take_over()
        line = {"step": step + 1, "dataset": pairs[0].dataset, **figures}
        line |= {"skipped": self.list_skipped(step, pairs), "nonfinite": self.nonfinite}
        line |= self.speed_figures(step, tokens)
        if processes()[0] == 0:
            self.log.write(json.dumps(line) + "\n")
        self.completed = step + 1
        if processes()[0] == 0:
            shown = {key: f"{line[key]:.3g}" for key in self.shown if key in line}
            self.bar.set_postfix({key: value for key, value in shown.items() if value != "0"})
        if (step + 1) % self.args.save_every == 0 or step + 1 == self.args.steps:
            self.save(step + 1)
        # a small dataset within the bound never stops, even if its bad rows come first
        if self.unusable > self.args.max_skipped * max(self.seen, min(self.num_rows, 1000)):
            raise Stopped(
                f"{self.unusable} of {self.seen} rows could not be used, above --max_skipped {self.args.max_skipped}; "
                f"{self.out / 'skipped.jsonl'} lists them; the last one: {self.last_reason}"
            )

    def take_over(self):
        """Make --out the folder of this run: write args.json, open the log, and remove checkpoints after this run's
        start. They belong to another run and would count as newer."""
        for step, later in reversed(list_checkpoints(self.out)):  # newest first: a kill leaves the older ones complete
            if step > self.start:
                remove_checkpoint(later)
        write_args(self.out, self.args)
        self.log = open_log(self.out, self.start)

    def speed_figures(self, step, tokens):
        """Return the speed and memory metrics of a step."""
        seconds, elapsed = self.seconds(), time.perf_counter() - self.loop_began
        done = step + 1 - self.start
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        peak = peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"pairs_per_s": self.args.batch_size / seconds, "tokens_per_s": tokens / seconds,
                "data_wait_s": self.waited, "peak_memory_gib": peak / 2**30,
                "eta_s": elapsed / done * (self.args.steps - step - 1)}  # fmt: skip

    def list_skipped(self, step, pairs):
        """Append the unusable rows of all ranks to skipped.jsonl; return their number."""
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


def open_log(out, start):
    """Open log.jsonl for appending, one line per step; drop the lines after the last checkpoint."""
    for name in ("log.jsonl", "skipped.jsonl"):
        path = Path(out) / name
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        complete = [line for line in lines if line.endswith("\n")]  # a kill may truncate the last line
        steps = [re.match(r'{"step": (\d+)[,}]', line) for line in complete]  # None: zeros after a crash of the machine
        if None in steps:
            print(f"{path}: {steps.count(None)} lines that are no log lines are left out", file=sys.stderr)
        kept = "".join(line for line, step in zip(complete, steps) if step and int(step[1]) <= start)
        write_file(path, lambda temporary, kept=kept: temporary.write_text(kept))
    return open(Path(out) / "log.jsonl", "a", buffering=1)
