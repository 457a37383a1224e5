"""The settings of a run: flags and bounds, args.json, the lock of --out, the changes that a resume allows."""

import argparse
import fcntl
import hashlib
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, field
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from transformers.utils import cached_file

from support.distributed import gather_list, gather_objects, processes
from support.files import read_json, write_json
from support.program import BadInput


def setting(default, help):
    """Return a field of a Settings class, with its default and its --help text."""
    return field(default=default, metadata={"help": help})


RENAMED = {"--micro_batch": "--pass_tokens (in rl.py --slots)", "--update_batch": "--pass_tokens",
           "--prefill_tokens": "--pass_tokens", "--batch_size": "--slots"}  # fmt: skip (earlier name -> flag of today)


def parse_args(settings, presets, argv=None):
    """Return the flags of a Settings dataclass. --preset is read first and sets the other defaults."""
    argv = sys.argv[1:] if argv is None else argv
    first = transformers.HfArgumentParser(settings, add_help=False)
    first.set_defaults(preset="toy")
    preset = first.parse_known_args([a for a in argv if a not in ("-h", "--help")])[0].preset
    if preset not in presets:
        raise SystemExit(f"--preset {preset} is unknown. Choose one of {', '.join(presets)}.")
    what_it_does = sys.modules[settings.__module__].__doc__.split("\n\n")[0]
    parser = transformers.HfArgumentParser(
        settings, description=what_it_does, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.set_defaults(preset=preset, **presets[preset])
    for action in parser._actions:  # HfArgumentParser adds --no_x with the same help to each true --x
        if any(flag.startswith("--no_") for flag in action.option_strings):
            action.help = argparse.SUPPRESS
    args, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    if unknown:
        given = [flag.partition("=")[0] for flag in unknown]
        hint = "".join(f" {flag} is now {RENAMED[flag]}." for flag in given if flag in RENAMED)
        raise SystemExit(f"unknown: {' '.join(unknown)}.{hint} See --help for the flags.")
    check_bounds(vars(args))
    return args


BOUNDS = (  # lowest value, whether the lowest value is allowed, highest value, settings
    (1, True, math.inf, "steps batch_size slots pass_tokens save_every keep"),
    (1, True, math.inf, "max_new_tokens max_length max_tokens size"),
    (2, True, math.inf, "G"),  # a group of one has advantage 0: nothing is learned
    (0, True, math.inf, "workers tau_steps skip_nonfinite samples report_queries beta eps_high video_max_pixels"),
    (0, True, 2**63 - 1, "seed"),
    (0, True, 10, "lr weight_decay"),
    (0, True, math.inf, "w_disc w_gen w_ce cross_weight"),
    (0, True, 1, "warmup lr_floor max_skipped max_repeat eps_low"),
    (0, True, 0.999999, "beta2"),
    (0, False, math.inf, "tau tau_start clip std_floor"),
    (0.001, True, 100, "temperature"),  # otherwise logits overflow or reach the ban's value
)


def check_bounds(given, **own):
    """Raise BadInput if a value of `given` {name: value} is out of bounds. own: more bounds {name: (lowest, whether the
    lowest value is allowed, highest)}."""
    bounds = {name: bound for *bound, names in BOUNDS for name in names.split()} | own
    for name, value in given.items():
        low, allowed, high = bounds.get(name, (0, True, math.inf))
        if name not in bounds or isinstance(value, bool) or value is None:
            continue
        if not (low <= value <= high and (allowed or value > low) and math.isfinite(value)):
            above = f"{'at least' if allowed else 'above'} {low}"
            raise BadInput(f"--{name} {value}: must be {above}{f' and at most {high}' * math.isfinite(high)}")


def check_batch_size(batch_size, world):
    """Raises BadInput if the ranks cannot share a batch equally."""
    if batch_size % world:
        raise BadInput(f"--batch_size {batch_size} must be a multiple of the world size {world}")


HELD = []  # open lock files of this process


def hold(folder):
    """Make this run the only writer of the folder, or raise BadInput with the name of the other run.

    All ranks call it; rank 0 holds the lock. The kernel releases the lock at any end of the process.
    """
    rank, _ = processes()
    path, made = Path(folder) / ".lock", Path(folder) / "args.json"
    if made.exists():
        scripts = [Path(command[0]).name for command in (read_json(made).get("command", [""]), sys.argv)]
        if scripts[0] != scripts[1] and "eval.py" in scripts and {*scripts} <= {"sft.py", "rl.py", "eval.py"}:
            raise BadInput(f"{folder} is the folder of a run of {scripts[0]}. Give another --out.")
    taken = ""
    if rank == 0:
        Path(folder).mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", errors="backslashreplace")  # noqa: SIM115 (open until this process ends)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a second start in this process is allowed
            file.truncate(0)
            file.write(f"process {os.getpid()} on {os.uname().nodename} since {datetime.now():%Y-%m-%d %H:%M:%S}: "
                       f"{' '.join(sys.argv)[:300]}")  # fmt: skip
            file.flush()
            HELD.append(file)
        except BlockingIOError:
            file.seek(0)
            taken = file.read()
        except OSError as error:  # some network disks have no locks
            print(f"warning: {path} cannot be locked ({error}). Let no other run write here.", file=sys.stderr)
    if taken := next((text for text in gather_list([taken]) if text), ""):
        raise BadInput(f"{folder} is in use by another run: {taken}. Wait for it, end it, or give another --out.")


def weights_digest(name_or_path, more=()):
    """Return the identity of a model: a hash of all bytes of weights, configuration and tokenizer, or the commit of a
    hub id. A sample of the bytes could miss a changed norm. Takes about 1 s per GB. more: patterns of other files."""
    folder = Path(name_or_path)
    if not folder.is_dir():
        try:
            return Path(cached_file(str(name_or_path), "config.json")).parent.name
        except OSError as error:
            raise BadInput(f"--model {name_or_path}: {str(error).splitlines()[0]}") from error
    digest = hashlib.blake2b(digest_size=16)
    names = more + ("*.safetensors", "*.bin", "*.index.json", "config.json", "tokenizer*", "vocab*", "merges.txt",
             "special_tokens_map.json", "added_tokens.json")  # fmt: skip
    for path in sorted({path for name in names for path in folder.glob(name) if path.is_file()}):
        with open(path, "rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()


def same_on_all_ranks(about, group=None):
    """Raise BadInput on every rank if one rank differs from rank 0. about: {name: value}; group: the process group of
    the ranks. Nodes may have their own copies of data and models, and different copies would go unnoticed."""
    first, *others = gather_objects((os.uname().nodename, about), group)
    for rank, (node, theirs) in enumerate(others, 1):
        if changed := changes(first[1], theirs):
            raise BadInput(f"rank {rank} on {node} differs from rank 0 on {first[0]}: {'; '.join(changed.values())}. "
                           "Start all nodes with the same flags, data and models.")  # fmt: skip


CHANGEABLE = ("steps", "lr")  # a resumed run may change these settings, to extend the run


def changes(before, now):
    """Return the differences between two dicts of settings, {key: text}."""
    return {key: f"{key} {before.get(key)} -> {now[key]}" for key in now if before.get(key) != now[key]}


def refuse_changed(before, now, path, step=0, may_change=CHANGEABLE, why=""):
    """Raise SystemExit if a resumed run has changed. step: the last complete step; why: a text after the changes.

    A setting that did not exist at the start of the run is only reported. Its default is the earlier behaviour.
    """
    changed = changes(before, now)
    refused = [text for key, text in changed.items() if key in before and key not in may_change]
    if refused:
        raise SystemExit(
            f"{path} was made with other settings ({'; '.join(refused)}){why}. "
            "Give the same settings, or another --out, or --resume none to start from scratch."
        )
    if now.get("steps", step) < step:
        raise SystemExit(f"{path} is after step {step}, beyond --steps {now['steps']}. Give --resume DIR for an "
                         "earlier checkpoint, or --resume none to start from scratch.")  # fmt: skip
    if changed and processes()[0] == 0:
        print(f"the resumed run has changed settings from here on: {'; '.join(changed.values())}", flush=True)


def write_args(out, args, **more):
    """Write args.json with the settings, command line, commit and versions of the run."""
    commit = None
    if shutil.which("git"):
        # no optional locks: otherwise a kill now could leave .git/index.lock in the user's repository
        command = ["git", "--no-optional-locks", "describe", "--always", "--dirty"]
        git = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
        commit = git.stdout.strip() or None
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__}
    about = {"settings": asdict(args), "command": sys.argv, "commit": commit, **versions, **more}
    write_json(Path(out) / "args.json", about)


class Command(NamedTuple):
    """A command of data.py."""

    name: str
    help: str
    add_flags: Callable  # (parser) -> None
    run: Callable  # (parsed flags) -> None
