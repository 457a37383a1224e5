"""Files of rows: streamed once, indexed, then read by byte range.

The published SFT file has 1.46 M rows in 8 GB: no process ever holds more of it than a block and a row.
"""

import codecs
import hashlib
import itertools
import json
import os
import re
import sys
from array import array
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from support.run import BadInput, MissingFile, Progress, cure_of_bytes, keys_once


def read_rows(path):
    """A .json list or .jsonl lines -> list of dicts. Raises ValueError that names file and row."""
    return [row for _, _, row in scan_rows(path)]


def scan_rows(path, block=1 << 24):
    """Streams a .json list or .jsonl lines: yields (first byte, last byte + 1, dict) of every row.

    Holds a block and a row at a time: the published SFT file has 1.46 M rows in 8 GB.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFile(f"{path}: no such file; give --data the SFT or RL file")
    with open(path, "rb") as file:
        head = file.read(1024)
        if head[:3] == codecs.BOM_UTF8 or head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or b"\0" in head:
            raise BadInput(f"{path}: {cure_of_bytes(path)}")
        one_list = head.lstrip()[:1] == b"["
        file.seek(0)
        try:
            for i, (start, end, row) in enumerate(scan_list(file, path, block) if one_list else scan_lines(file, path)):
                if not isinstance(row, dict):
                    raise BadInput(f"{path}, row {i}: expected an object, found {type(row).__name__}")
                if len(row) == 1 and isinstance(next(iter(row.values())), list):
                    raise BadInput(f"{path}, row {i}: the rows lie under {next(iter(row))!r}; save that list as a file "
                                   "of its own")  # fmt: skip
                yield start, end, row
        except UnicodeDecodeError as error:
            raise BadInput(f"{path}: not valid UTF-8 text ({error}); save it as UTF-8") from error


def scan_lines(file, path):
    at = 0
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                yield at, at + len(line), json.loads(line, object_pairs_hook=keys_once)
            except (json.JSONDecodeError, RecursionError) as error:
                raise BadInput(f"{path}, line {number}: not valid JSON ({getattr(error, 'msg', error)}); a file is one "
                               "list of rows, or lines of one whole row each") from error  # fmt: skip
            except UnicodeDecodeError:
                raise
            except ValueError as error:  # a key that is there twice, a number of 5,000 digits
                raise BadInput(f"{path}, line {number}: {error}") from error
        at += len(line)


def scan_list(file, path, block):
    utf8, decode = codecs.getincrementaldecoder("utf-8")(), json.JSONDecoder(object_pairs_hook=keys_once).raw_decode
    text, place, byte, line, last = "", 0, 0, 1, False  # text is what is being parsed, place the next character of it;
    # byte: place in the file; line: number of text's first line; last: nothing is left to read

    def refill():
        nonlocal text, place, line, last
        new = file.read(block)
        last, line = not new, line + text.count("\n", 0, place)
        text, place = text[place:] + utf8.decode(new, not new), 0

    def broken(what, at):
        return BadInput(f"{path}, line {line + text.count(chr(10), 0, at)}: not valid JSON ({what})")

    for gap in itertools.chain([r"\s*(\[)\s*(\]?)"], itertools.repeat(r"\s*(?:(,)\s*|(\]))")):
        while not last and len(text) - place < 4096:  # a comma and its white space are never cut in two
            refill()
        found = re.compile(gap).match(text, place)
        if not found:
            raise broken("a row must be followed by a comma or the end of the list; is the file whole?", place)
        byte, place = byte + len(text[place : found.end()].encode()), found.end()
        if found[2]:
            while not text[place:].strip() and not last:
                refill()
            if text[place:].strip():
                raise broken("more text behind the list", place)
            return
        while True:
            try:
                row, end = decode(text, place)
                break
            except json.JSONDecodeError as error:
                if last:
                    raise broken(error.msg, error.pos) from error
                refill()  # the row may go on in the next block
            except (ValueError, RecursionError) as error:
                raise broken(error, place) from error
        size = len(text[place:end].encode())
        yield byte, byte + size, row
        byte, place = byte + size, end


def index_rows(path, check=None, cache=None):
    """Checks every row of a file and notes where it stands -> dict of "spans" int64 [n, 2], first byte and last + 1;
    "dataset" int32 [n], an index into "names"; "digest" of the whole content.

    check: called with each row and its name for messages, raises BadInput; its repr says what it looks for.
    cache: a folder that keeps the result, by path, size and time of change; the first call streams the file, the next
    ones take no time. A half written index cannot be met: it is renamed when it is complete.
    """
    path, kept = Path(path), None
    if cache and path.is_file():
        about = (str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns, repr(check))
        kept = Path(cache) / f"{path.stem}-{hashlib.sha256(repr(about).encode()).hexdigest()[:24]}.npz"
        try:
            return dict(np.load(kept))
        except FileNotFoundError:
            pass
        except (OSError, ValueError, EOFError, BadZipFile) as error:  # a disk's fault: what is ours is made again
            print(f"{kept}: not readable ({error}), made again", file=sys.stderr)
    spans, dataset, names = array("q"), array("i"), {}
    size = path.stat().st_size if path.is_file() else 0
    with Progress(total=size, unit="B", unit_scale=True, desc=f"index {path.name}", disable=size < 1 << 26) as bar:
        for i, (start, end, row) in enumerate(scan_rows(path)):
            if check:
                check(row, f"{path}, row {i}")
            spans.extend((start, end))
            dataset.append(names.setdefault(dataset_of(row), len(names)))
            bar.update(end - bar.n)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "blake2b").hexdigest()[:32]
    index = {"spans": np.array(spans, np.int64).reshape(-1, 2), "dataset": np.array(dataset, np.int32),
             "names": np.array(list(names), dtype=str), "digest": np.array(digest)}  # fmt: skip
    if kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        temporary = kept.with_suffix(f".{os.uname().nodename}-{os.getpid()}.tmp")
        with open(temporary, "wb") as file:
            np.savez(file, **index)
            os.fsync(file.fileno())
        os.replace(temporary, kept)
    return index


class Rows:
    """The rows of several files, read from the disk one by one: rows[i] -> (name for messages, dict)."""

    def __init__(self, files, check=None, cache=None):
        self.files = files
        self.indexes = [index_rows(file, check, cache) for file in files]
        self.open = [open(file, "rb") for file in files]  # noqa: SIM115 (read from as long as this object lives)
        self.starts = np.cumsum([0] + [len(index["spans"]) for index in self.indexes])
        self.names = sorted({str(name) for index in self.indexes for name in index["names"]})
        codes = [np.array([self.names.index(n) for n in x["names"]], np.int32)[x["dataset"]] for x in self.indexes]
        self.dataset = np.concatenate(codes) if len(self) else np.zeros(0, np.int32)  # [n] an index into names

    def __len__(self):
        return int(self.starts[-1])

    def __getitem__(self, i):
        f = int(np.searchsorted(self.starts, i, side="right")) - 1
        j = int(i - self.starts[f])
        start, end = self.indexes[f]["spans"][j].tolist()
        # pread takes its place as an argument: forked workers share the open file
        return f"{self.files[f]}, row {j}", json.loads(os.pread(self.open[f].fileno(), end - start, start))


def dataset_of(row):
    """Published RL rows have both keys, with the finer name in dataset_name."""
    return str(row.get("dataset_name") or row.get("dataset") or "")


def one_or_more(value):
    """A string or number, or several of them -> list: published columns and labels have both forms."""
    return [value] if isinstance(value, (str, int)) else list(value)


def write_rows(path, rows):
    """A .json list or .jsonl lines, one row a line; atomic."""
    temporary, lines = Path(f"{path}.tmp"), str(path).endswith(".jsonl")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(temporary, "w", encoding="utf-8") as file:
        file.write("" if lines else "[")
        for i, row in enumerate(rows):
            file.write(("" if lines else ",\n" if i else "\n") + json.dumps(row) + ("\n" if lines else ""))
        file.write("" if lines else "\n]\n")
    os.replace(temporary, path)
