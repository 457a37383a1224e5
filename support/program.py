"""The frame of a program: errors that a user can fix, exit codes, progress bars and tables."""

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
    """An error that the user can fix. Its message names the file, the row and the fix; no traceback is printed."""


class MissingFile(BadInput, FileNotFoundError):
    """A BadInput that is also a FileNotFoundError."""


class Skip(ValueError):
    """An unusable row (unreadable image, too long); it is masked out of its batch and counted."""


class Stopped(BaseException):
    """The end of a run. All ranks raise it together, so that they can save together. It is not an Exception: code that
    catches errors of a decoder or a library must not catch it."""

    def __init__(self, reason, code=1):
        super().__init__(reason)
        self.code = code


STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)  # signals of schedulers and terminals


class Unbreakable:
    """stdout or stderr that may break (`| tee` killed, terminal closed, disk full). Failed writes are dropped, and the
    run continues."""

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
    """Run main() and always end, with exit code 0, 1 after an error, or 128 + n after signal n.

    An error that the user can fix prints its message, any other error a traceback. A failed process ends with
    os._exit, because threads of gloo and nccl, or a live worker, would hold the process and its GPU forever.
    """
    for name in ("stdout", "stderr"):  # None if the shell has closed it
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115
        stream.reconfigure(errors="backslashreplace")  # an ASCII terminal must show lines that contain a ±
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
        print("\ninterrupted; the same command resumes from the last checkpoint, if there is one", file=sys.stderr)
    except BaseException as error:  # noqa: BLE001 (the process must end after any error)
        print(sentence_of(error) or traceback.format_exc(), file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    kill_workers(daemons_only=False)
    os._exit(code)


def sentence_of(error):
    """Return the message to print instead of a traceback, or None if the traceback is more useful."""
    text = str(error)
    if isinstance(error, BadInput):
        return text.rpartition("BadInput: ")[2]  # from a loader worker, the worker's traceback precedes it
    if isinstance(error, SafetensorError) and "No space left" in text:
        return f"the disk is full ({text}). The previous checkpoint is intact. Free some space and start again."
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, RuntimeError) and re.search(r"DataLoader worker \(pid.*(killed|exited)", text):
        return (f"a loader worker has died ({text.splitlines()[0]}). Most often the system ran out of memory. Give "
                "fewer --workers.")  # fmt: skip
    if isinstance(error, RuntimeError) and "peer" in text and dist.is_initialized():
        return f"rank {dist.get_rank()}: another rank of this run has ended. Its message has the reason ({text[:200]})."
    return None


def kill_workers(daemons_only=True):
    """Kill the loader workers with SIGKILL. They ignore SIGTERM, which multiprocessing sends at exit, so it would wait
    forever."""
    for child in multiprocessing.active_children():
        if child.daemon or not daemons_only:
            child.kill()


atexit.register(kill_workers)  # registered after multiprocessing's: runs first


class Progress(tqdm):
    """A progress bar on a terminal, or one plain line a minute in a log file."""

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
    """Return rows of strings as lines of aligned columns. The first row is the header."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
