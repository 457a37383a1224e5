"""Answers of any other reasoner (vLLM, an API, a person) as a file: the inputs go out, the file comes back filled in.

A line per distinct input of the chosen tasks:

    {"key": hash of the input's content, "text": its text, "images": [paths], "video": [paths of the frames],
     "prompt": the user's turn after the media, as UME-R1 reads it, "answer": null}

The answer is the assistant's whole turn, <think>REASONING</think><answer>SUMMARY<gen_emb>; the generative embedding is
read at its last <gen_emb>, and one that has none counts as a generation without an embedding. Only key and answer are
read back. Rows with other keys are left alone, so that one file can hold the answers for all tasks.
"""

from pathlib import Path

from support.files import scan_rows, write_rows
from support.formats import DISC, INSTRUCTION, check_text, without_marks
from support.images import blank_picture
from support.program import BadInput


def check_export(path):
    if Path(path).suffix != ".jsonl":
        raise BadInput(f"--export {path}: the file is one of lines, NAME.jsonl")
    if Path(path).exists():
        raise BadInput(f"--export {path}: the file is there already and may hold answers; delete it or name another")


def export_inputs(path, keys, items, blank_image):
    """Write the file with empty answers. blank_image: inputs without media name the blank image, which is written next
    to the file, because the model reads it there too."""
    check_export(path)
    blank = Path(path).with_suffix(".blank.png")
    if blank_image:
        blank.parent.mkdir(parents=True, exist_ok=True)
        blank_picture().save(blank)
    rows = []
    for key, item in zip(keys, items):
        prompt = f"{without_marks(item).strip()}\n{DISC}\n{INSTRUCTION}"
        if blank_image and not (item["images"] or item["video"]):
            item = item | {"images": [str(blank)]}
        rows.append({"key": key} | item | {"prompt": prompt, "answer": None})
    write_rows(path, rows)
    print(f"{path}: {len(keys):,} inputs; fill in the answers, then give it as --reasoner in place of --export, with "
          "--samples 0")  # fmt: skip


def read_answers(path, keys, items):
    """-> N texts, the answers to the inputs in their order. Raises BadInput where one is missing or cannot be read.
    keys, items: of the N distinct inputs."""
    wanted = set(keys)
    answer_of = {}
    for i, (_, _, row) in enumerate(scan_rows(path)):
        name = f"{path}, row {i}"
        if not isinstance(row.get("key"), str) or "answer" not in row:
            raise BadInput(f"{name}: needs a key and an answer; python eval.py --export FILE writes the keys")
        key, answer = row["key"], row["answer"]
        if key not in wanted or answer is None:
            continue
        check_text(answer, name)
        if answer_of.setdefault(key, answer) != answer:
            raise BadInput(f"{name}: another answer for a key that was there before, {key}; leave one of them out")
    refuse_missing(path, keys, items, answer_of)
    return [answer_of[key] for key in keys]


def refuse_missing(path, keys, items, answer_of):
    missing = [n for n, key in enumerate(keys) if key not in answer_of]
    if missing:
        text = items[missing[0]]["text"][:60]
        raise BadInput(f"{path}: has no answer for {len(missing):,} of {len(keys):,} inputs, e.g. key "
                       f"{keys[missing[0]]} ({text!r}); --export with the same tasks writes the rows; where no answer "
                       'is to be had, give "": it counts as one without an embedding')  # fmt: skip
