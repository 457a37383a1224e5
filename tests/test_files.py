"""Files of rows: JSON and JSON lines, their index, and what a broken or changed file says."""

import json
import os
import time

import numpy as np
import pytest
from conftest import die_softly

import support.files as files_file
import support.program as program_file
from data import PairData
from support.files import Rows, index_rows, read_rows, scan_rows
from support.formats import RowCheck
from support.program import BadInput


def test_jsonl_with_unicode_line_separators(tmp_path):
    """Bug story: text of the web has U+2028, U+0085 and form feeds, at which str.splitlines() ends a line. Only the
    newline ends a line of .jsonl."""
    rows = [{"text": f"a{c}b"} for c in "\u2028\u2029\x85\x0b\x0c\x1c"] + [{}]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\r\n"
    (tmp_path / "a.jsonl").write_text(text, encoding="utf-8", newline="")
    assert read_rows(tmp_path / "a.jsonl") == rows


def test_missing_and_empty_files(embedder, tmp_path):
    """No file, a folder and a file without rows each say which one."""
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(FileNotFoundError, match=str(path)):
            read_rows(path)
    (tmp_path / "empty.json").write_text("[]")
    empty = [tmp_path / "empty.json"]
    for files in (empty, Rows(empty)):  # bug story: data.py check gives Rows, and its message named no file
        with pytest.raises(ValueError, match="empty.json.*no rows"):
            PairData(files, embedder.tokenizer, kind="sft", batch_size=1, seed=0)


@pytest.mark.parametrize("name, content, message", [
    ("a.json", b'[{"a": 1},\n {"b": }]', "a.json, line 2: not valid JSON"),
    ("a.jsonl", b'{"a": 1}\n\n{"b": 2}\n{"c": \n', "a.jsonl, line 4: not valid JSON"),
    ("a.jsonl", b"hello", "a.jsonl, line 1: not valid JSON"),
    ("a.json", b"[{}, 3]", "a.json, row 1: expected an object"),
    ("a.jsonl", b"{}\n[1]", "a.jsonl, row 1: expected an object"),
    ("a.json", b'\xef\xbb\xbf[{"a": 1}]', "a.json.*not valid JSON"),
    ("a.json", '[{"a": 1}]'.encode("utf-16"), "a.json.*not valid (JSON|UTF-8)"),
    ("a.json", b'{"data": [{"a": 1}]}', "a.json.*the rows are under the key 'data'. Save that list"),
    ("a.json", b'{\n "data": [\n  {"a": 1}]}', "a.json.*line 1: not valid JSON.*one list of rows"),
    ("a.json", b"\xff\xfa[", "a.json.*UTF-8"), ("a.json", b'[{"a": 1}', "a.json.*Is the file complete"),
    ("a.json", b"\x1f\x8b\x08\0\0", "a.json.*not valid UTF-8"), ("a.json", b"PAR1\0\0", "a.json.*not valid JSON"),
    ("a.json", b"[" * 9999, "a.json.*recursion"), ("a.json", b'{"a": ' + b"9" * 5000 + b"}", "a.json.*4300 digits"),
])  # fmt: skip
def test_files_that_are_no_rows(tmp_path, name, content, message):
    """The message names the file, the line or row, and the remedy."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=f"(?s){message}"):
        read_rows(tmp_path / name)


def test_a_data_file_that_changes_during_a_run(tmp_path):
    """Bug story: a file rewritten in place ended the run in a JSONDecodeError, or gave other rows without a word."""
    for new in ('[{"a": 1}, {"b": 9}]', "[]", '[{"a": 10}, {"b": 2}]'):
        (tmp_path / "rows.json").write_text('[{"a": 1}, {"b": 2}]')
        rows = Rows([tmp_path / "rows.json"])
        assert rows[1][1] == {"b": 2}
        (tmp_path / "rows.json").write_text(new)
        os.utime(tmp_path / "rows.json", (0, time.time() + 5))
        with pytest.raises(BadInput, match="rows.json has changed since the run began"):
            rows[1]


ODD_ROWS = [{"a": "ünï 日本 \u2028 😀", "b": [1, {"c": "]},{["}]}, {}, {"long": "x" * 300, "q": '\\"[{'}] * 5


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 24])
@pytest.mark.parametrize("style", [{}, {"indent": 2}, {"ensure_ascii": False}, {"separators": (" ,\n\n ", ":")}])
def test_streamed_rows_are_those_of_json(tmp_path, block, style):
    """The rows are those of json for any block size and layout of the list, and the byte ranges contain them."""
    path = tmp_path / "a.json"
    path.write_text(" \n" + json.dumps(ODD_ROWS, **style) + "\n ", encoding="utf-8")
    found = list(scan_rows(path, block))
    content = path.read_bytes()
    assert [row for _, _, row in found] == ODD_ROWS == [json.loads(content[a:b]) for a, b, _ in found]
    path.write_text("[ ]")
    assert list(scan_rows(path, block)) == []


@pytest.mark.parametrize("block", [1, 5, 1 << 24])
@pytest.mark.parametrize("text, message", [
    ('[{"a": 1},\n{"b": 2},\n', "line 3.*not valid JSON"), ('[{"a": 1},\n{"b": 2}\n', "line 2.*Is the file complete"),
    ('[{"a": 1},\n{"b": "2', "line 2.*not valid JSON"), ('[{"a": 1}\n{"b": 2}]', "line 1.*comma"),
    ('[{"a": 1}]\n[{"b": 2}]', "line 1.*more text after"), ('[{"a": 1},\n]', "line 2.*not valid JSON"),
    ('[{"a": 1}, 7]', "row 1: expected an object, found int"),
])  # fmt: skip
def test_broken_lists(tmp_path, text, message, block):
    """A download that was cut short, lists run together, missing commas: the error names the file and the line."""
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=f"a.json, {message}"):
        list(scan_rows(tmp_path / "a.json", block))


def test_index_is_made_once(world, tmp_path, monkeypatch):
    """The second start does not read the file; a changed file is indexed again; a kill before the end leaves nothing;
    rows come from their place."""
    path, cache = tmp_path / "sft.json", tmp_path / "cache"
    path.write_bytes((world / "sft.json").read_bytes())
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(program_file.os, "replace", lambda *_: die_softly())
        index_rows(path, RowCheck("sft"), cache)
    first = index_rows(path, RowCheck("sft"), cache)
    with monkeypatch.context() as patch:
        patch.setattr(files_file, "scan_rows", lambda *_: pytest.fail("read again"))
        again = index_rows(path, RowCheck("sft"), cache)
        rows = Rows([path, path], RowCheck("sft"), cache)
    assert all(np.array_equal(first[key], again[key]) for key in first)
    want = read_rows(path)
    assert len(rows) == 24 and rows.names == ["one", "two"]
    assert [rows[i] for i in (0, 11, 12, 23)] == [(f"{path}, row {i}", want[i]) for i in (0, 11, 0, 11)]
    path.write_text(json.dumps(want[:5]))
    assert len(index_rows(path, RowCheck("sft"), cache)["spans"]) == 5
