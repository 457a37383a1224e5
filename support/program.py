"""A program and its end: errors that a user can fix, exit codes, progress bars and tables."""

import atexit
import contextlib
import multiprocessing
import os
import re
import signal
import sys
import traceback

import torch.distributed as dist
from safetensors import SafetensorError
from tqdm import tqdm


class BadInput(ValueError):
    """Something that the user can mend: a sentence with the file, the place in it and the cure. No traceback."""


class MissingFile(BadInput, FileNotFoundError):
    """A BadInput that is also what Python raises for such a file."""


class Skip(ValueError):
    """A row that cannot be used as it is (unreadable picture, too long): masked out of its batch and counted."""


class Stopped(BaseException):
    """The run ends here; all processes raise it together, so that they can save together. No Exception: whoever
    catches what a decoder or a library raises must not catch this."""

    def __init__(self, reason, code=1):
        super().__init__(reason)
        self.code = code

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
