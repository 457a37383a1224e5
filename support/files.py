"""Files: atomic writes, JSON, and files of rows that are streamed once, indexed and then read by byte range.

The published SFT file has 1.46 M rows in 8 GB, so a process holds at most one block and one row in memory.
"""

import codecs
import contextlib
import hashlib
import json
import os
import re
import sys
from array import array
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from support.program import BadInput, MissingFile, Progress


def write_file(path, write):
    """Call write(temporary path), then rename. Even after a kill, a reader sees the old or the new complete file."""
    temporary = Path(f"{path}.{os.uname().nodename}-{os.getpid()}.tmp")  # nodes may share process ids
    try:
        write(temporary)
        apply_umask(temporary)
    except BaseException:  # free the space on a full disk
        temporary.unlink(missing_ok=True)
        raise
    os.replace(temporary, path)


def apply_umask(path):
    """Give a file the mode that open() gives. safetensors creates files with 0600, which locks out the group."""
    mask = os.umask(0)
    os.umask(mask)
    with contextlib.suppress(OSError):  # some network disks have no file modes
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


def stable_hash(*parts):
    """Return a 63-bit seed of integers and strings. It is the same in every process and Python version."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


# ---- rows ------------------------------------------------------------------------------------------------------------


def read_rows(path):
    """Return the rows of a .json list or .jsonl lines as dicts. Raises ValueError that names file and row."""
    return [row for _, _, row in scan_rows(path)]


def scan_rows(path, block=1 << 17):
    """Yield (first byte, last byte + 1, dict) of every row of a .json list or .jsonl lines.

    The file is streamed, with one block and one row in memory at a time.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFile(f"{path}: no such file. Relative paths start from {os.getcwd()}")
    with open(path, "rb") as file:
        is_list = file.read(1024).lstrip()[:1] == b"["
        file.seek(0)
        try:
            for i, (start, end, row) in enumerate(scan_list(file, path, block) if is_list else scan_lines(file, path)):
                check_row(row, f"{path}, row {i}")
                yield start, end, row
        except UnicodeDecodeError as error:
            raise BadInput(f"{path}: not valid UTF-8 text ({error}); save it as UTF-8") from error


def check_row(row, name):
    if not isinstance(row, dict):
        raise BadInput(f"{name}: expected an object, found {type(row).__name__}")
    if len(row) == 1:
        ((key, value),) = row.items()
        if isinstance(value, list):
            raise BadInput(f"{name}: the rows are under the key {key!r}. Save that list as a separate file")


def scan_lines(file, path):
    """Yield (first byte, last byte + 1, row) of every line that is not empty."""
    start = 0
    for number, line in enumerate(file, 1):
        end = start + len(line)
        if line.strip():
            yield start, end, parse_line(line, f"{path}, line {number}")
        start = end


def parse_line(line, name):
    try:
        return json.loads(line.decode("utf-8"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise BadInput(f"{name}: not valid JSON ({getattr(error, 'msg', error)}). A file must be one list of rows, or "
                       "have one complete row per line") from error  # fmt: skip
    except UnicodeDecodeError:
        raise
    except ValueError as error:  # a number of 5,000 digits
        raise BadInput(f"{name}: {error}") from error


OPENING = re.compile(r"\s*\[\s*(\]?)")  # group 1: the end of the list
BETWEEN = re.compile(r"\s*(?:,\s*|(\]))")


def scan_list(file, path, block):
    """Yield (first byte, last byte + 1, row) of every element of a JSON list."""
    text = ListText(file, path, block)
    gap = OPENING
    while True:
        while not text.is_last and len(text.ahead) < 4096:  # keeps a comma and its space together
            text.read_on()
        found = gap.match(text.ahead)
        if not found:
            raise text.broken("a row must be followed by a comma or the end of the list. Is the file complete?", 0)
        text.drop(found.end())
        if found[1]:
            break
        gap = BETWEEN
        row, end = text.parse_row()
        start = text.byte
        text.drop(end)
        yield start, text.byte, row
    while not text.is_last and not text.ahead.strip():
        text.read_on()
    if text.ahead.strip():
        raise text.broken("more text after the list", 0)


class ListText:
    """The text of a JSON list, read block by block."""

    def __init__(self, file, path, block):
        self.file, self.path, self.block = file, path, block  # block: bytes
        self.utf8 = codecs.getincrementaldecoder("utf-8")()
        self.ahead = ""  # the text in memory that is not parsed yet
        self.byte, self.line = 0, 1  # its offset and line number in the file
        self.is_last = False  # the file has been read to its end

    def read_on(self):
        new = self.file.read(max(self.block, len(self.ahead)))  # doubles the text of a long row
        self.is_last = not new
        self.ahead += self.utf8.decode(new, self.is_last)

    def drop(self, n):
        self.byte += len(self.ahead[:n].encode())
        self.line += self.ahead.count("\n", 0, n)
        self.ahead = self.ahead[n:]

    def broken(self, what, at):
        line = self.line + self.ahead.count("\n", 0, at)
        return BadInput(f"{self.path}, line {line}: not valid JSON ({what})")

    def parse_row(self):
        """Return the row at the start of the text, and the index of its end."""
        while True:
            try:
                return json.JSONDecoder().raw_decode(self.ahead)
            except json.JSONDecodeError as error:
                if self.is_last:
                    raise self.broken(error.msg, error.pos) from error
                self.read_on()  # the row may continue in the next block
            except (ValueError, RecursionError) as error:
                raise self.broken(error, 0) from error


def index_rows(path, check=None, cache=None):
    """Check every row of a file and return its index, a dict: "spans" int64 [n, 2], first byte and last byte + 1;
    "dataset" int32 [n], an index into "names"; "digest" of the complete content.

    check: called with each row and its name for messages; raises BadInput. Its repr must tell different checks apart.
    cache: the folder of saved indexes, by path, size and modification time of the file. The first call streams the
    file. Later calls take no time.
    """
    path = Path(path)
    if not cache or not path.is_file():
        return make_index(path, check)
    about = (str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns, repr(check))
    digest = hashlib.sha256(repr(about).encode()).hexdigest()[:24]
    saved = Path(cache) / f"{path.stem}-{digest}.npz"
    try:
        return dict(np.load(saved))
    except FileNotFoundError:
        pass
    except (OSError, ValueError, EOFError, BadZipFile) as error:  # the cache is corrupt: rebuild it
        print(f"{saved}: not readable ({error}). Building it again", file=sys.stderr)
    index = make_index(path, check)
    saved.parent.mkdir(parents=True, exist_ok=True)

    def write(temporary):
        with open(temporary, "wb") as file:  # given a name, savez would add .npz to it
            np.savez(file, **index)
            os.fsync(file.fileno())

    write_file(saved, write)
    return index


def make_index(path, check):
    spans = array("q")
    dataset = array("i")
    names = {}  # name -> its index
    size = path.stat().st_size if path.is_file() else 0
    is_small = size < 1 << 26  # bytes; the file is read within a second
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


def version_of(file):
    """Return what changes if an open file is written to. Full seconds, as network disks round fractions differently."""
    about = os.fstat(file.fileno())
    return about.st_size, int(about.st_mtime)


class Rows:
    """The rows of several files, read from the disk one by one. rows[i] is (name for messages, dict)."""

    def __init__(self, files, check=None, cache=None):
        self.files = files
        self.indexes = [index_rows(file, check, cache) for file in files]
        self.open = [open(file, "rb") for file in files]  # noqa: SIM115 (open for the lifetime of this object)
        self.versions = [version_of(file) for file in self.open]
        sizes = [len(index["spans"]) for index in self.indexes]
        self.starts = np.cumsum([0, *sizes])
        names = set()
        for index in self.indexes:
            names.update(index["names"].tolist())
        self.names = sorted(names)
        parts = [np.zeros(0, np.int32)]
        for index in self.indexes:
            indices = [self.names.index(name) for name in index["names"]]
            parts.append(np.array(indices, np.int32)[index["dataset"]])
        self.dataset = np.concatenate(parts)  # [n], an index into names

    def __len__(self):
        return int(self.starts[-1])

    def __getitem__(self, i):
        f = int(np.searchsorted(self.starts, i, side="right")) - 1
        j = int(i - self.starts[f])
        start, end = self.indexes[f]["spans"][j].tolist()
        # pread takes the offset as an argument, because forked workers share the open file
        content = os.pread(self.open[f].fileno(), end - start, start)
        if version_of(self.open[f]) != self.versions[f]:
            raise BadInput(f"{self.files[f]} has changed since the run began. Restore the old file, or write the new "
                           "rows to a file with another name.")  # fmt: skip
        return f"{self.files[f]}, row {j}", json.loads(content)


def read_parquet(path, columns=None, batch_size=1024):
    """Yield the rows of a parquet file as dicts, with batch_size rows in memory. columns: names to read, None: all.
    Raises BadInput if the file is truncated or a column is missing."""
    import pyarrow.parquet  # here, because most runs read no parquet file

    if not Path(path).is_file():
        raise MissingFile(f"{path}: no such file")
    try:
        file = pyarrow.parquet.ParquetFile(path)
        check_columns(path, columns or (), set(file.schema_arrow.names))
        for batch in file.iter_batches(batch_size, columns=columns):
            yield from batch.to_pylist()
    except BadInput:
        raise
    except (OSError, ValueError) as error:  # pyarrow raises these for a truncated file
        raise BadInput(f"{path}: cannot be read as parquet ({error}). Copy it again") from error


def check_columns(path, wanted, present):
    missing = set(wanted) - present
    if missing:
        raise BadInput(f"{path} is missing the columns {', '.join(sorted(missing))}. Is it from the right repository?")


def dataset_of(row):
    """Return a row's dataset. Published RL rows have both keys; dataset_name has the finer name."""
    return str(row.get("dataset_name") or row.get("dataset") or "")


def one_or_more(value):
    """Return a value or a sequence of values as a list, because published columns and labels have both forms."""
    return [value] if isinstance(value, (str, int)) else list(value)


def write_rows(path, rows):
    """Write a .json list or .jsonl lines, with one row per line. The write is atomic."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    is_lines = str(path).endswith(".jsonl")
    start, separator, end = ("", "\n", "\n") if is_lines else ("[\n", ",\n", "\n]\n")

    def write(temporary):
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(start)
            for i, row in enumerate(rows):
                file.write(separator * (i > 0) + json.dumps(row))
            file.write(end)

    write_file(path, write)
