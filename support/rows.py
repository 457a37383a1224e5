"""Files of rows: streamed once, indexed, then read by byte range.

The published SFT file has 1.46 M rows in 8 GB: no process ever holds more of it than a block and a row.
"""

import codecs
import hashlib
import json
import os
import re
import sys
from array import array
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from support.run import BadInput, MissingFile, Progress, cure_of_bytes, keys_once, write_file

NO_PLAIN_TEXT = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # how such files begin
LIST_START = re.compile(r"\s*\[\s*(?P<end>\]?)")
BETWEEN_ROWS = re.compile(r"\s*(?:,\s*|(?P<end>\]))")
LONGEST_GAP = 4096  # characters: a comma and its white space up to here are not cut by the end of a block


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
        file.seek(0)
        if head.startswith(NO_PLAIN_TEXT) or b"\0" in head:
            raise BadInput(f"{path}: {cure_of_bytes(path)}")
        is_list = head.lstrip().startswith(b"[")
        found = scan_list(file, path, block) if is_list else scan_lines(file, path)
        try:
            for i, (start, end, row) in enumerate(found):
                check_is_row(row, f"{path}, row {i}")
                yield start, end, row
        except UnicodeDecodeError as error:
            raise BadInput(f"{path}: not valid UTF-8 text ({error}); save it as UTF-8") from error


def check_is_row(row, name):
    """Raises BadInput for what is no row of any file."""
    if not isinstance(row, dict):
        raise BadInput(f"{name}: expected an object, found {type(row).__name__}")
    if len(row) == 1:
        [(key, value)] = row.items()
        if isinstance(value, list):
            raise BadInput(f"{name}: the rows lie under {key!r}; save that list as a file of its own")


def scan_lines(file, path):
    """The rows of .jsonl lines, as scan_rows yields them; empty lines are passed over."""
    start = 0
    for number, line in enumerate(file, 1):
        end = start + len(line)
        if line.strip():
            yield start, end, parse_line(line, f"{path}, line {number}")
        start = end


def parse_line(line, name):
    try:
        return json.loads(line, object_pairs_hook=keys_once)
    except (json.JSONDecodeError, RecursionError) as error:
        what = getattr(error, "msg", error)
        raise BadInput(
            f"{name}: not valid JSON ({what}); a file is one list of rows, or lines of one whole row each"
        ) from error
    except UnicodeDecodeError:  # a ValueError too; scan_rows has the sentence for it
        raise
    except ValueError as error:  # a key that is there twice, a number of 5,000 digits
        raise BadInput(f"{name}: {error}") from error


def scan_list(file, path, block):
    """The rows of one .json list, as scan_rows yields them."""
    text = ListText(file, path, block)
    is_last = text.skip(LIST_START)
    while not is_last:
        yield text.take_row()
        is_last = text.skip(BETWEEN_ROWS)
    text.check_end()


class ListText:
    """The text of a file that holds one list, parsed from the front: only a block and a row of it are in memory."""

    def __init__(self, file, path, block):
        self.file = file  # binary
        self.path = path  # for messages
        self.block = block  # bytes
        self.utf8 = codecs.getincrementaldecoder("utf-8")()  # a character may be cut by the end of a block
        self.decode = json.JSONDecoder(object_pairs_hook=keys_once).raw_decode
        self.text = ""
        self.place = 0  # in text: the next character to parse
        self.byte = 0  # in the file: where that character begins
        self.line = 1  # in the file: the line in which text begins
        self.ended = False  # nothing of the file is left to read

    def refill(self):
        """Drops what is parsed and reads another block."""
        new = self.file.read(self.block)
        self.ended = not new
        self.line += self.text.count("\n", 0, self.place)
        self.text = self.text[self.place :] + self.utf8.decode(new, final=self.ended)
        self.place = 0

    def advance(self, end):
        """Passes the text before the character `end` -> its first byte in the file and its last one + 1."""
        start = self.byte
        self.byte += len(self.text[self.place : end].encode())
        self.place = end
        return start, self.byte

    def skip(self, pattern):
        """Passes what stands before a row -> whether the list ends there instead."""
        while not self.ended and len(self.text) - self.place < LONGEST_GAP:
            self.refill()
        found = pattern.match(self.text, self.place)
        if not found:
            what = "a row must be followed by a comma or the end of the list; is the file whole?"
            raise self.broken(what, self.place)
        self.advance(found.end())
        return bool(found["end"])

    def take_row(self):
        """-> (first byte, last byte + 1, value)."""
        while True:
            try:
                row, end = self.decode(self.text, self.place)
            except json.JSONDecodeError as error:
                if self.ended:
                    raise self.broken(error.msg, error.pos) from error
                self.refill()  # the row may go on in the next block
            except (ValueError, RecursionError) as error:
                raise self.broken(error, self.place) from error
            else:
                return *self.advance(end), row

    def check_end(self):
        """Raises BadInput where something follows the list."""
        while not self.ended and not self.text[self.place :].strip():
            self.refill()
        if self.text[self.place :].strip():
            raise self.broken("more text behind the list", self.place)

    def broken(self, what, place):
        line = self.line + self.text.count("\n", 0, place)
        return BadInput(f"{self.path}, line {line}: not valid JSON ({what})")


def index_rows(path, check=None, cache=None):
    """Checks every row of a file and notes where it stands -> dict of "spans" int64 [n, 2], first byte and last + 1;
    "dataset" int32 [n], an index into "names"; "digest" of the whole content.

    check: called with each row and its name for messages, raises BadInput; its repr says what it looks for.
    cache: a folder that keeps the result, by path, size and time of change; the first call streams the file, the next
    ones take no time. A half written index cannot be met: it is renamed when it is complete.
    """
    path = Path(path)
    if not cache or not path.is_file():
        return make_index(path, check)
    kept = index_file(path, check, cache)
    try:
        return dict(np.load(kept))
    except FileNotFoundError:
        pass
    except (OSError, ValueError, EOFError, BadZipFile) as error:  # a disk's fault: what is ours is made again
        print(f"{kept}: not readable ({error}), made again", file=sys.stderr)
    index = make_index(path, check)
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_file(kept, lambda temporary: save_index(temporary, index))
    return index


def index_file(path, check, cache):
    """Where the index of a file is kept: the name changes with all that the index depends on."""
    state = path.stat()
    about = (str(path.resolve()), state.st_size, state.st_mtime_ns, repr(check))
    digest = hashlib.sha256(repr(about).encode()).hexdigest()[:24]
    return Path(cache) / f"{path.stem}-{digest}.npz"


def make_index(path, check):
    spans = array("q")  # arrays: 8 and 4 bytes a number, a list has several times that
    dataset = array("i")
    names = {}  # name of a dataset: its number, in the order of their first rows
    size = path.stat().st_size if path.is_file() else 0
    is_small = size < 1 << 26  # bytes: it takes no time
    with Progress(total=size, unit="B", unit_scale=True, desc=f"index {path.name}", disable=is_small) as bar:
        for i, (start, end, row) in enumerate(scan_rows(path)):
            if check:
                check(row, f"{path}, row {i}")
            spans.extend((start, end))
            dataset.append(names.setdefault(dataset_of(row), len(names)))
            bar.update(end - bar.n)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "blake2b").hexdigest()[:32]
    return {
        "spans": np.array(spans, np.int64).reshape(-1, 2),
        "dataset": np.array(dataset, np.int32),
        "names": np.array(list(names), dtype=str),
        "digest": np.array(digest),
    }


def save_index(path, index):
    with open(path, "wb") as file:  # a file: to a path np.savez adds .npz
        np.savez(file, **index)
        os.fsync(file.fileno())  # before the rename, or a crash of the machine leaves zeros under the final name


class Rows:
    """The rows of several files, read from the disk one by one: rows[i] -> (name for messages, dict)."""

    def __init__(self, files, check=None, cache=None):
        self.files = files
        self.indexes = [index_rows(file, check, cache) for file in files]
        self.open = [open(file, "rb") for file in files]  # noqa: SIM115 (read from as long as this object lives)
        self.starts = np.cumsum([0] + [len(index["spans"]) for index in self.indexes])
        self.names = sorted({str(name) for index in self.indexes for name in index["names"]})
        numbers = [self.numbers_of(index) for index in self.indexes]
        self.dataset = np.concatenate(numbers) if len(self) else np.zeros(0, np.int32)  # [n] an index into names

    def numbers_of(self, index):
        """The datasets of one file's rows, as indices into the names of all files, int32 [rows]."""
        numbers = [self.names.index(name) for name in index["names"]]
        return np.array(numbers, np.int32)[index["dataset"]]

    def __len__(self):
        return int(self.starts[-1])

    def __getitem__(self, i):
        f = int(np.searchsorted(self.starts, i, side="right")) - 1  # which file
        j = int(i - self.starts[f])  # which row of it
        start, end = self.indexes[f]["spans"][j].tolist()
        # pread takes the position as an argument: forked workers share the open file
        text = os.pread(self.open[f].fileno(), end - start, start)
        return f"{self.files[f]}, row {j}", json.loads(text)


def dataset_of(row):
    """Published RL rows have both keys, with the finer name in dataset_name."""
    return str(row.get("dataset_name") or row.get("dataset") or "")


def one_or_more(value):
    """A string or number, or several of them -> list: published columns and labels have both forms."""
    return [value] if isinstance(value, (str, int)) else list(value)


def write_rows(path, rows):
    """A .json list or .jsonl lines, one row a line; atomic."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write = write_lines if str(path).endswith(".jsonl") else write_list
    write_file(path, lambda temporary: write(temporary, rows))


def write_lines(path, rows):
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")


def write_list(path, rows):
    with open(path, "w", encoding="utf-8") as file:
        file.write("[")
        for i, row in enumerate(rows):
            file.write(",\n" if i else "\n")
            file.write(json.dumps(row))
        file.write("\n]\n")
