"""Answers that the embedding model did not write: those of another model, those of a file, and ablated ones.

eval.py --reasoner MODEL    the other model is run first, and its cached answers are read
eval.py --export FILE       writes the inputs, for any other reasoner (vLLM, an API, a person)
eval.py --reasoner FILE     reads the file with its answers filled in
eval.py --ablate trace      reads the model's own answers again, without and with another input's reasoning

The file has one line per distinct input of the chosen tasks:

    {"key": hash of the input's content, "text": its text, "images": [paths], "video": [paths of the frames],
     "prompt": the user's turn after the media, as UME-R1 reads it, "answer": null}

The answer is the complete assistant turn, <think>REASONING</think><answer>SUMMARY<gen_emb>. The generative embedding
is read at its last <gen_emb>. An answer without <gen_emb> counts as a generation without an embedding. Only key and
answer are read back, and unknown keys are ignored, so one file can hold the answers for all tasks.

Shapes: N inputs, S answers to each, D dimensions.
"""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from support.cache import EmbeddingCache, load_embedder
from support.distributed import processes
from support.files import scan_rows, stable_hash, write_rows
from support.formats import DISC, GEN, INSTRUCTION, check_text, without_marks
from support.images import white_image
from support.program import BadInput, MissingFile

# --------------------------------------------------------------------------------------------------------------
# The answers of a reasoner


class Answers(NamedTuple):
    reasoner: str
    greedy: list[list[str]]  # of each distinct input, one text
    sampled: list[list[str]] | None  # of each distinct query, --samples texts


def is_file_of_answers(reasoner):
    return reasoner.endswith(".jsonl") and not os.path.isdir(reasoner)


def check_reasoner(settings):
    """Raise BadInput if --reasoner or --export cannot be used. Spell --reasoner as --model if it is the same folder."""
    if settings.export:
        if settings.check:
            raise BadInput("--check and --export: give one of them")
        if Path(settings.export).suffix != ".jsonl":
            raise BadInput(f"--export {settings.export}: a file of lines is written; give NAME.jsonl")
        if Path(settings.export).exists():
            raise BadInput(f"--export {settings.export}: the file already exists and may hold answers; delete it or "
                           "give another name")  # fmt: skip
    for model in settings.model:
        if settings.reasoner and os.path.abspath(model) == os.path.abspath(settings.reasoner):
            settings.reasoner = model
    if is_file_of_answers(settings.reasoner):
        if not os.path.isfile(settings.reasoner):
            raise MissingFile(f"--reasoner {settings.reasoner}: no such file; its keys: python eval.py --export FILE")
        if settings.samples:
            raise BadInput("--samples: a file of answers has one answer per input; give --samples 0")
    elif os.path.isfile(settings.reasoner):
        raise BadInput(f"--reasoner {settings.reasoner}: not a file of lines; give NAME.jsonl or a model's folder")


def answers_of_reasoner(settings, inputs, name, device, group=None):
    """Return the Answers of the file, or of the model, on all ranks. The model writes those missing in its cache."""
    sampled = None
    if is_file_of_answers(settings.reasoner):
        greedy = [[answer] for answer in read_answers(settings.reasoner, inputs.keys, inputs.items)]
    else:
        reasoner = load_embedder(settings.reasoner, settings, device)
        cache = EmbeddingCache(reasoner, settings.reasoner, settings, name, group)
        greedy = cache.texts("greedy", inputs.keys, inputs.items)
        if settings.samples:
            sampled = cache.texts("samples", inputs.query_keys, inputs.query_items, settings.samples)
    without = sum(GEN not in answer for (answer,) in greedy)
    if without == len(greedy):
        raise BadInput(f"--reasoner {settings.reasoner}: none of its {without:,} answers has a {GEN}, at which the "
                       "embedding is read. Use a model that has learned to write it; in a file, end each answer with "
                       "it")  # fmt: skip
    if without and processes()[0] == 0:
        print(f"{name}: {without:,} of {len(greedy):,} answers have no {GEN}; they count as generations without an "
              "embedding", flush=True)  # fmt: skip
    return Answers(name, greedy, sampled)


def embed_answers(cache, keys, items, texts, everywhere=False):
    """Embed N inputs with S given answers each, and return the results as EmbeddingCache.embed does.

    Equal answers to one input are embedded once.
    """
    row_of = {}
    answered = []  # (input, answer) of each row
    rows = np.zeros((len(texts), len(texts[0])), int)  # [N, S]
    for n, answers in enumerate(texts):
        for s, answer in enumerate(answers):
            key = f"{keys[n]}-{stable_hash(answer):x}"
            if key not in row_of:
                row_of[key] = len(answered)
                answered.append((items[n], answer))
            rows[n, s] = row_of[key]
    answered_items, answers = zip(*answered)
    results = cache.embed("answers", list(row_of), answered_items, answers=answers, everywhere=everywhere)
    if results is None:
        return None
    first = rows[:, 0]
    return {
        "disc": results["disc"][first],  # [N, D], the same for all answers to an input
        "gen": results["gen"][rows, 0],  # [N, S, D]
        "valid": results["valid"][rows, 0],  # [N, S]
        "tokens": results["tokens"][rows, 0],  # [N, S]
        "seconds": results["seconds"][rows].sum(1),  # [N]
        "texts": texts,
        "problem": results["problem"][first],  # [N]
        "not_finite": results["not_finite"][rows].any(1),  # [N]
    }


# --------------------------------------------------------------------------------------------------------------
# The file of answers


def export_inputs(path, keys, items, blank_image):
    """Write the file with empty answers.

    blank_image: the model sees a blank image on inputs without media. Write it next to the file and name it in the
    rows of these inputs.
    """
    blank = Path(path).with_suffix(".blank.png")
    if blank_image:
        blank.parent.mkdir(parents=True, exist_ok=True)
        white_image().save(blank)
    rows = []
    for key, item in zip(keys, items):
        prompt = f"{without_marks(item).strip()}\n{DISC}\n{INSTRUCTION}"
        if blank_image and not (item["images"] or item["video"]):
            item = item | {"images": [str(blank)]}
        rows.append({"key": key} | item | {"prompt": prompt, "answer": None})
    write_rows(path, rows)
    print(f"{path}: {len(keys):,} inputs; fill in the answers, then give it as --reasoner instead of --export, with "
          "--samples 0")  # fmt: skip


def read_answers(path, keys, items):
    """Return the answers to N distinct inputs in their order. Raise BadInput if one is missing or not usable."""
    wanted = set(keys)
    answer_of = {}
    for i, (_, _, row) in enumerate(scan_rows(path)):
        name = f"{path}, row {i}"
        if not isinstance(row.get("key"), str) or "answer" not in row:
            raise BadInput(f"{name}: key or answer is missing; python eval.py --export FILE writes the keys")
        key, answer = row["key"], row["answer"]
        if key not in wanted or answer is None:
            continue
        check_text(answer, name)
        if answer_of.setdefault(key, answer) != answer:
            raise BadInput(f"{name}: another answer for the key {key}, which an earlier row has; remove one of them")
    missing = [n for n, key in enumerate(keys) if key not in answer_of]
    if missing:
        text = items[missing[0]]["text"][:60]
        raise BadInput(f"{path}: has no answer for {len(missing):,} of {len(keys):,} inputs, e.g. key "
                       f"{keys[missing[0]]} ({text!r}); --export with the same tasks writes the rows; if there is no "
                       'answer, give "": it counts as one without an embedding')  # fmt: skip
    return [answer_of[key] for key in keys]


# --------------------------------------------------------------------------------------------------------------
# Ablated answers: --ablate trace


def ablate_trace(texts):
    """Return {"removed": texts without reasoning, "swapped": texts with the next different reasoning of the list}."""
    parts = [parts_around_reasoning(text) for text in texts]
    reasonings = [part[1] for part in parts if part]
    n = len(reasonings)
    other = list(reasonings)  # the next different reasoning; the same one if all are equal
    for i in reversed(range(2 * n)):  # twice, because the list is a ring
        following = reasonings[(i + 1) % n]
        other[i % n] = other[(i + 1) % n] if following == reasonings[i % n] else following
    others = iter(other)
    ablated = {"removed": [], "swapped": []}
    for text, part in zip(texts, parts):
        before, _, after = part or (text, "", "")
        ablated["removed"].append(before + after)
        ablated["swapped"].append(before + (next(others) if part else "") + after)
    return ablated


def parts_around_reasoning(text):
    """Return (text up to <think>, reasoning, text from </think>), None if a tag is missing. A regular expression would
    take quadratic time on a text that repeats <think>."""
    start = text.find("<think>") + len("<think>")
    end = text.find("</think>", start)
    if "<think>" not in text or end < 0:
        return None
    return text[:start], text[start:end], text[end:]


def embed_ablated(cache, keys, items, greedy):
    """Return {kind: the greedy results with the gen embeddings of the ablated texts}.

    An ablated text without <gen_emb> is a miss.
    """
    some = np.flatnonzero(greedy["valid"][:, 0])
    if not len(some):
        if processes()[0] == 0:
            print(f"{cache.name}: --ablate trace: no input has a valid answer, so there is no reasoning to take out")
        return {}
    some_keys = [keys[n] for n in some]
    some_items = [items[n] for n in some]
    results = {}
    for kind, texts in ablate_trace([greedy["texts"][n][0] for n in some]).items():
        ablated = embed_answers(cache, some_keys, some_items, [[text] for text in texts], everywhere=True)
        results[kind] = greedy | {"gen": greedy["gen"].copy(), "valid": greedy["valid"].copy()}
        results[kind]["gen"][some] = ablated["gen"]
        results[kind]["valid"][some] = ablated["valid"]
    return results


def mean_cosine(greedy, ablated, rows):
    """Return the mean cosine of the ablated gen embeddings to the original ones; None if no row has one."""
    rows = rows[ablated["valid"][rows, 0]]
    cosines = (greedy["gen"][rows, 0] * ablated["gen"][rows, 0]).sum(-1)
    return float(cosines.mean()) if len(rows) else None
