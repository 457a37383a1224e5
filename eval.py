"""Evaluation: MMEB-V1 and V2 (78 tasks) and your own tasks, in every mode (paper, experiments).

A model reads every distinct input of all tasks once, greedily, which gives two embeddings: disc, at <disc_emb> of the
prompt, and gen, at the last <gen_emb> of its own reasoning. With --samples k it reads the queries again, k times
at --temperature. Modes (a task's value is the mean over its queries):

    disc, gen           query and candidates both in this mode
    oracle              per query and metric the better of disc and gen: it looks at the labels, an upper bound
    gen_disc, disc_gen  gen queries against disc candidates and the reverse: together only after sft.py --cross_weight
    mean                normalised mean of a query's k sampled gen embeddings; greedy gen candidates
    pass@j              the chance that one of j sampled queries has a right candidate first; greedy gen candidates;
                        unbiased: 1 - C(k-c, j) / C(k, j) with c hits in k samples

oracle has two tries where gen has one; its fair comparison is pass@2, the oracle of two gen samples.

Departures from the official evaluation:
1. disc is read exactly at <disc_emb>; the official code reads the token behind it.
2. Greedy decoding; there the checkpoint's generation_config decides (Qwen2-VL's samples at low temperature).
3. A generation without <gen_emb> is a miss: such a query has 0 in every metric and such a candidate is left out of
   the ranking; so is an input with a picture that cannot be read, in all modes. The official code reads another token
   in its place, or drops the picture.
4. Scores are float64 dot products in a stable order (float32 and an unstable sort there): candidates with equal
   embeddings keep the order of the list, so a model that sees no difference ranks the first one first.
5. Grades stay with their labels; the official code re-orders one and not the other, which moves ndcg of 3 tasks:
   scores.json has that value beside ours, as "published_ndcg".
6. Inputs with equal content (text and bytes of the media), in any task, are embedded once.
7. Frames of at most 25,088 pixels, as in training; the official evaluation sets no bound (--video_max_pixels).
   MomentSeeker's clips of more than 8 saved frames are thinned out to 8.

Results wait in OUT/<model name>/cache, from where a killed run goes on. They are found again by a hash of weights,
tokenizer, configuration, settings, versions and the text of model.py and data.py, and by a hash of the input's text
and its media's bytes: none is ever stale. All media are read for it at every start, each by one process (an estimated
50 GB for MMEB-V2); size and time of a file would be quicker, but do not show every change.

Run (without arguments: the toy preset, on any device):
    python eval.py                                                            # 1 CPU: runs/toy/sft, runs/toy/rl
    python eval.py --check --root data/MMEB                                   # what is missing, and how to get it
    python eval.py --preset 2b --model runs/2b/rl --root data/MMEB            # 1 GPU
    torchrun --nproc_per_node 8 eval.py --preset 2b --model runs/2b/rl --root data/MMEB              # 8 GPUs
The result does not depend on the number of processes (they share the disk). Writes OUT/args.json and, per model,
OUT/<model name>/scores.json, per_query.json and leaderboard_<mode>.json; with several models it also prints the
change from the first to the last.

Shapes: N distinct inputs, Q queries and C candidates of a task, S samples, D dimensions.
"""

import hashlib
import json
import math
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Literal

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
import transformers
from huggingface_hub import metadata_load
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from data import (
    NUM_FRAMES,
    QWEN2_VL,
    Skip,
    check_input,
    check_keys,
    check_text,
    encode_input,
    forked_loader,
    open_picture,
    thinned,
)
from model import Embedder, Prompt, check_model
from support.rows import read_rows
from support.run import (
    BadInput,
    MissingFile,
    Progress,
    barrier,
    end_processes,
    hold,
    parse_args,
    processes,
    read_json,
    run_script,
    setting,
    stable_hash,
    start_processes,
    write_args,
    write_file,
    write_json,
)

KS = (1, 5, 10)
NAMES = ("hit", "ndcg_linear", "ndcg_exponential", "precision", "recall", "f1", "map", "mrr")
METRICS = [f"{name}@{k}" for name in NAMES for k in KS]
MODES = ("disc", "gen", "oracle", "gen_disc", "disc_gen", "mean")
ASSET = json.loads((Path(__file__).parent / "assets" / "mmeb_v2.json").read_text(encoding="utf-8"))
MMEB = {task["name"]: task for task in ASSET["tasks"]}  # the 78 tasks as data; the columns are the published tables'

# --------------------------------------------------------------------------------------------------------------
# Settings

PRESETS = {
    "toy": dict(model=["runs/toy/sft", "runs/toy/rl"], root="runs/toy/data", out="runs/toy/eval", samples=16,
                max_new_tokens=128, batch_size=64, workers=1),
    "2b": dict(model=["runs/2b/rl"], root="data/MMEB", out="runs/2b/eval", samples=0,
               max_new_tokens=8192, batch_size=8),  # 8,192: the official command, the paper gives none
    "7b": dict(model=["runs/7b/rl"], root="data/MMEB", out="runs/7b/eval", samples=0,
               max_new_tokens=8192, batch_size=4),  # copies 2b: unknown in the paper
}


@dataclass
class Settings:
    preset: Literal["toy", "2b", "7b"] = setting("toy", "read first, sets the defaults")
    model: list[str] = field(default_factory=list, metadata={"help": "model folders or hub ids, compared in order"})
    tasks: list[str] = field(default_factory=list, metadata={
        "help": "tasks, groups (I-QA) or modalities (image); none: ROOT/tasks/test and what is in ROOT/annotations"})
    root: str = setting("", "folder of the data: tasks/NAME.json or annotations/, and where media paths start")
    check: bool = setting(False, "only look whether the tasks' files are there, without a model")
    out: str = setting("", "results go to OUT/<model name>/")
    samples: int = setting(0, "samples per query for mean and pass@k; 0 leaves them out")
    temperature: float = setting(1.0, "of the samples (unknown in the paper; RL samples at 1)")
    max_new_tokens: int = setting(512, "longest reasoning; one cut off here counts as invalid")
    batch_size: int = setting(8, "generations at once in one process: speed and memory only")
    seed: int = setting(0, "of the samples")
    blank_image: bool = setting(True, "put a blank picture on inputs without media")
    video_max_pixels: int = setting(QWEN2_VL.video_pixels[1], "of a video's frame; the official code has no bound")
    vidore_instruction: bool = setting(True, "false: ViDoRe and OOD without instructions, as in tables before 2025-11")
    ablate: Literal["none", "trace"] = setting("none", "trace: embed again without, and with another input's reasoning")
    save_every: int = setting(256, "inputs per process that a killed run has to encode again")
    workers: int = setting(4, "background processes per process that read and resize pictures")


# --------------------------------------------------------------------------------------------------------------
# Tasks


@dataclass
class Task:
    name: str
    modality: str  # image, video or visdoc
    group: str  # the paper's column, e.g. I-CLS
    eval_type: str  # global: a query ranks all candidates; local: its own list
    main_metric: str
    queries: list[dict]  # {"input", "labels": [key], "grades": None | [number], "candidates": None | [key]}
    candidates: dict[str, dict]  # key -> input


def known_tasks(root):
    folder = Path(root) / "tasks"
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.json"))


def load_task(name, root, vidore_instruction=True) -> Task:
    """Reads ROOT/tasks/NAME.json or, for one of the 78, the published files; media paths come back joined to ROOT.

    Nothing else knows how a task is stored. A label that is not a candidate is allowed: it cannot be hit and stays in
    the denominators.
    """
    path = Path(root) / "tasks" / f"{name}.json"
    if name in MMEB and not path.is_file():
        return load_mmeb(MMEB[name], Path(root), vidore_instruction)
    if not path.is_file():
        known = ", ".join(known_tasks(root)) or "none (is --root right?)"
        raise MissingFile(f"no task {name!r}, {path} does not exist; known tasks: {known}")
    raw = read_json(path)

    def check(right, message):
        if not right:
            raise BadInput(f"{path}: {message}")

    def located(item, what):
        item = check_input(item, f"{path}, {what}")
        return item | {kind: [str(Path(root) / p) for p in item[kind]] for kind in ("images", "video")}

    fields = ("name", "modality", "group", "eval_type", "main_metric", "queries", "candidates")
    check_keys(raw, "a task", path, fields)
    check(all(key in raw for key in fields[1:]), f"lacks {[key for key in fields[1:] if key not in raw]}")
    check(all(isinstance(raw[key], str) for key in fields[1:3]), "modality and group must be strings")
    check(raw["eval_type"] in ("global", "local"), f"eval_type is {raw['eval_type']!r}, not global or local")
    check(raw["main_metric"] in METRICS, f"main_metric {raw['main_metric']!r} is none of {', '.join(METRICS)}")
    check(isinstance(raw["queries"], list) and isinstance(raw["candidates"], dict),
          "queries must be a list, candidates an object of key: input")  # fmt: skip
    check(raw["queries"] and raw["candidates"], "has no queries or no candidates")
    queries, pool, outside = [], raw["candidates"], []
    for i, query in enumerate(raw["queries"]):
        check_keys(query, "a query", f"{path}, query {i}", ("input", "labels", "grades", "candidates"))
        check("input" in query and "labels" in query, f"query {i} needs input and labels")
        labels, grades = keys_of(query["labels"]), query.get("grades")
        check(labels, f"query {i}: labels must be a key or a list of keys, not {query['labels']!r}")
        right = isinstance(grades, list) and len(grades) == len(labels) and all(map(is_grade, grades))
        check(grades is None or right, f"query {i} has not one grade, above 0 and up to 100, per label: {grades!r}")
        own = query.get("candidates")
        if raw["eval_type"] == "local":
            own = keys_of(own)
            check(own, f"query {i} of a local task has no candidates (a list of keys)")
            unknown = [key for key in own if key not in pool]
            check(not unknown, f"query {i} ranks keys that are no candidates of the task: {unknown[:3]}")
        else:
            check(own is None, f"query {i} has candidates, but a global task ranks all; make it local or take them out")
        outside += [(i, label) for label in labels if label not in (own or pool)]
        item = located(query["input"], f"query {i}")
        queries.append({"input": item, "labels": labels, "grades": grades, "candidates": own})
    if outside:
        n, all_labels = len(outside), sum(len(query["labels"]) for query in queries)
        where, label = outside[0]
        told = f"{n} of {all_labels} labels are no candidates and cannot be hit, e.g. {label!r} of query {where}"
        check(n < all_labels, f"{told}; labels are keys of candidates")
        print(f"warning: {path}: {told}", file=sys.stderr)
    candidates = {key: located(item, f"candidate {key!r}") for key, item in pool.items()}
    return Task(name, *(raw[key] for key in fields[1:5]), queries, candidates)


def as_labels(labels):
    return [labels] if isinstance(labels, (str, int)) else list(labels)


def keys_of(given):
    """A key or a list of keys, numbers written as strings, as JSON has them -> list; None where it is neither."""
    given = [given] if isinstance(given, (str, int)) else given
    if not isinstance(given, list) or not all(isinstance(key, (str, int)) and key is not True for key in given):
        return None
    return [str(key) for key in given]


def is_grade(x):
    """A key of grade 0 is no right one, and must not be listed as a label; 2 to the power of 1,024 is no float."""
    return isinstance(x, (int, float)) and not isinstance(x, bool) and 0 < x <= 100


# --------------------------------------------------------------------------------------------------------------
# The 78 tasks of MMEB: their published annotation files, and what the published parsers make of a row


def load_mmeb(about, root, vidore_instruction):
    """about: an entry of assets/mmeb_v2.json. The pool keeps the order in which keys are first seen, the rows' before
    the corpus', and a key's first content."""
    folder = root / "annotations" / about["repo"]
    media = next((root / m for m in about["media"] if (root / m).is_dir()), root / about["media"][0])
    if about["modality"] == "visdoc":
        parsed, corpus = visdoc_rows(about, folder, media, vidore_instruction)
    else:
        rows = [row | {"subset": config} for config in about["configs"]
                for path in annotation_files(folder, config, about["split"])
                for row in read_table(path, about["columns"])]  # fmt: skip
        parsed = (parse_row(about, row, media, root, f"{folder}, row {i} of {about['name']}")
                  for i, row in enumerate(rows[: about.get("first_rows")]))  # fmt: skip
        corpus = [(label, partial(mmeb_input, label)) for label in about.get("labels", [])]
    queries, pool = [], {}
    for item, candidates, labels, grades in parsed:
        for key, build in candidates:
            if key not in pool:
                pool[key] = build()
        # interned: a thousand names a query would else be a thousand new strings
        own = [sys.intern(key) for key, _ in candidates] if about["eval_type"] == "local" else None
        queries.append({"input": item, "labels": as_labels(labels), "grades": grades, "candidates": own})
    pool |= {key: build() for key, build in corpus if key not in pool}
    texts = [(f"query {i}", query["input"]["text"]) for i, query in enumerate(queries)]
    for what, text in [*texts, *((f"candidate {key!r}", item["text"]) for key, item in pool.items())]:
        check_text(text, f"{folder}, {what} of {about['name']}")  # now, not after hours
    if not queries:
        raise BadInput(f"{folder}: no rows for {about['name']}")
    fields = [about[key] for key in ("name", "modality", "group", "eval_type", "main_metric")]
    return Task(*fields, queries, pool)


def annotation_files(folder, config, split):
    """The files of one config and split: as the dataset card's configs say, else by their names."""
    card = metadata_load(folder / "README.md") if (folder / "README.md").is_file() else None
    configs = {entry.get("config_name"): entry.get("data_files") for entry in (card or {}).get("configs", [])}
    only = next(iter(configs.values())) if len(configs) == 1 and not config else None
    parts = [part for part in configs.get(config or "default", only) or [] if isinstance(part, dict)]
    patterns = [p for part in parts if part["split"] == split for p in as_labels(part["path"])]
    files = [file for pattern in patterns for file in sorted(folder.glob(pattern))]
    for path in [] if files else sorted(folder.rglob("*")):
        words, stem = path.relative_to(folder).parts, path.stem
        mine = config is None or config in words or stem.endswith(config)
        if mine and (split in stem or stem.endswith(str(config))) and path.suffix in (".parquet", ".json", ".jsonl"):
            files.append(path)
    if not files:
        raise MissingFile(f"{folder} has no files of config {config or 'default'}, split {split}; "
                                "how to get them: python eval.py --check --root ROOT")  # fmt: skip
    return files


def read_table(path, columns):
    """Rows of a parquet, json or jsonl file as dicts."""
    try:
        file = pq.ParquetFile(path) if path.suffix == ".parquet" else None
    except (OSError, ValueError) as error:  # what pyarrow raises of a torn file
        raise BadInput(f"{path}: cannot be read as parquet ({error}); copy it again") from error
    rows = [] if file else read_rows(path)
    there = set(file.schema_arrow.names) if file else set.intersection(*map(set, rows)) if rows else set(columns)
    if lacking := set(columns) - there:
        raise BadInput(f"{path} lacks the columns {', '.join(sorted(lacking))}; is it the right repository?")
    return file.read(columns).to_pylist() if file else rows


def mmeb_input(text, images=(), video=()):
    """UME-R1 gives the media first and the text stripped, without the published marks of their places."""
    text = re.sub(r"<\|(image_1|image_pad|video_pad)\|>", "", text)
    return {"text": text.strip(), "images": [str(path) for path in images], "video": list(video)}


def sample_frames(folder, n=NUM_FRAMES):
    """n frames, evenly spread, of a folder of frame files in natural order (2 before 10); all where there are fewer.

    A folder that is missing or empty stands for itself: it cannot be read as a picture, so the input is a miss.
    """
    names = os.listdir(folder) if os.path.isdir(folder) else []
    names = [name for name in names if name.lower().endswith((".jpg", ".jpeg", ".png"))]
    names.sort(key=lambda name: [int(x) if x.isdigit() else x.lower() for x in re.split(r"(\d+)", name)])
    return [os.path.join(folder, name) for name in (thinned(names, n) if n else names)] or [str(folder)]


def parse_row(about, row, media, root, name):
    """-> query, [(key, function that builds the candidate)], labels, grades; a candidate is built for a new key only:
    lists of a thousand repeat from row to row."""
    try:
        return image_row(about, row, media) if about["modality"] == "image" else video_row(about, row, media, root)
    except BadInput:
        raise
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise BadInput(f"{name}: not in the published form ({error!r})") from error


def image_row(about, row, media):
    kind, captions, paths = about["parser"], row["tgt_text"], row["tgt_img_path"]
    instruction, target = (row[key].replace("<|image_1|>", "") for key in ("qry_inst", "tgt_inst"))

    def tidy(text):  # as MMEB-V1 had it
        return text.replace(" \n", "\n")

    if kind == "image_t2i":
        query = mmeb_input(f"{instruction} {row['qry_text']}")
    else:
        instruction = instruction.strip() if kind in ("image_qa", "image_i2i_vg") else instruction
        text = instruction + (f" {row['qry_text']}" if row["qry_text"] else "")
        query = mmeb_input(tidy(text), [os.path.join(media, row["qry_img_path"])])
    if kind in ("image_t2i", "image_i2i_vg"):  # a first caption that is blank says that there are none
        def build(path, caption):
            return mmeb_input(tidy(f"{target} {caption}" if captions[0].strip() else target), [media / path])

        keys = [p if kind == "image_t2i" else f"{p}:" + caption.strip('"') for p, caption in zip(paths, captions)]
        candidates = [(key, partial(build, *side)) for key, *side in zip(keys, paths, captions)]
    else:
        candidates = [(caption, partial(mmeb_input, caption)) for caption in captions]
    return query, candidates, candidates[0][0], None  # the right one stands first


def video_row(about, row, media, root):
    kind, ask, target = about["parser"], about["query_instruction"], about["target_instruction"]

    def clip(folder, n=NUM_FRAMES):  # a candidate video; its key is the folder's path below the root
        return folder.relative_to(root).as_posix(), lambda: mmeb_input(target, video=sample_frames(folder, n))

    if kind in ("video_classification", "ssv2"):
        query = mmeb_input(ask, video=sample_frames(media / str(row["video_id"])))
        keys = as_labels(row[about["columns"][-1]])
        return query, [(key, partial(mmeb_input, key)) for key in keys], row["pos_text"], None
    if about["group"] == "V-QA":
        folder, text, options, label = video_question(kind, row)
        query = mmeb_input(f"{ask} {text}", video=sample_frames(media / str(folder)))
        return query, [(key, partial(mmeb_input, option)) for key, option in options], label, None
    if about["group"] == "V-RET":
        name, caption = (row[column] for column in about["columns"])
        name = Path(name).stem if kind == "didemo" else name  # a file name there, a name elsewhere
        query = mmeb_input(f"{ask} {as_labels(caption)[0]}")
        return query, [(name, clip(media / str(name))[1])], name, None
    if kind == "moment_retrieval":  # the folders beside "query" are the candidates
        folder = media / Path(row["video_path"]).stem
        if not folder.is_dir():
            raise MissingFile(f"{folder} does not exist; its sub-folders are the query and the candidates")
        others = sorted(path for path in folder.iterdir() if path.is_dir() and path.name != "query")
        right = [clip(path)[0] for path in others if path.name.startswith("positive")]
        if not right:
            raise MissingFile(f"{folder} has no sub-folder positive*")
        query = mmeb_input(f"{ask} {row['query']}", video=sample_frames(folder / "query"))
        return query, [clip(path) for path in others], right[-1:], None
    # MomentSeeker: the query has a video, a picture or only text; all saved frames are used
    given, frames = row["input_frames"], media / "video_frames"

    def saved(path):
        return frames / path.replace("/", "_").split(".mp4")[0]

    if given.endswith(".mp4"):
        query = mmeb_input(f"{ask['video']} {row['query']}", video=sample_frames(saved(given), None))
    elif given.endswith(".jpg"):
        query = mmeb_input(f"{ask['image']} {row['query']}", [media / f"query_{given}"])
    else:
        query = mmeb_input(f"{ask['text only']} {row['query']}")
    right, wrong = ([clip(saved(entry["output_path"]), None) for entry in row[f"{side}_frames"]]
                    for side in ("positive", "negative"))  # fmt: skip
    return query, right + wrong, [key for key, _ in right], None


def video_question(kind, row):
    """-> folder of the frames, text of the question, [(key, text) of the options], key of the right one."""
    if kind == "activitynetqa":
        text, options = f"{row['question']}? (A) yes; (B) no.", [(x, x) for x in ("yes", "no")]
        return f"v_{row['video_name']}", text, options, row["answer"]
    if kind in ("mvbench", "nextqa"):
        plain = row["candidates"] if kind == "mvbench" else [row[f"a{i}"] for i in range(5)]
        lettered = [f"({chr(65 + i)}) {option}" for i, option in enumerate(plain)]
        text = "\n".join([row["question"], "Options:", *lettered]).rstrip()
        if kind == "nextqa":
            return row["video"], text, [(x, x) for x in plain], plain[int(row["answer"])]
        at = max((i for i, option in enumerate(plain) if option == row["answer"]), default=-1)  # "(@) .." if nowhere
        return f"{row['subset']}/{row['video']}", text, [(x, x) for x in lettered], f"({chr(65 + at)}) {row['answer']}"
    options = row["options"] if kind == "videomme" else row["option"]
    bare = [(x, x[x.find(". ") :].strip(". ")) for x in options]  # "A. Apples." -> "Apples", published, right or wrong
    if kind == "videomme":
        return row["videoID"], "\n".join([row["question"], *options]), bare, options["ABCD".index(row["answer"])]
    return row["video_idx"], row["question"] + " ".join(options), bare, options[int(row["answer"])]


def visdoc_rows(about, folder, media, with_instruction):
    """-> rows as from the other parsers, and the corpus: every page is a candidate of every query.

    Pages lie as files in the media folder; those that do not are written there from the corpus table, which holds
    their bytes (as the official loader does).
    """
    ask, target = (about[f"{side}_instruction"] * (with_instruction or about["parser"] == "visrag")
                   for side in ("query", "target"))  # fmt: skip

    def table(config, *columns):
        return [row for path in annotation_files(folder, config, about["split"]) for row in read_table(path, columns)]

    def page(key):
        stem, ending = os.path.splitext(str(key))
        short = f"{stem[:50]}_{hashlib.md5(str(key).encode()).hexdigest()[:8]}{ending}"
        return media / (f"{key}.png" if about["parser"] == "vidore" else short)

    def candidate(key):
        return key, lambda: mmeb_input(target, [page(key)])

    corpus = [row["corpus-id"] for row in table("corpus", "corpus-id")]
    absent = {key: page(key) for key in corpus if not page(key).exists()}
    for file in annotation_files(folder, "corpus", about["split"]) if absent else []:
        for batch in pq.ParquetFile(file).iter_batches(16, columns=["corpus-id", "image"]):
            for row in batch.to_pylist():
                if path := absent.pop(row["corpus-id"], None):
                    if not row["image"] or not row["image"]["bytes"]:
                        raise BadInput(f"{file}: the page {row['corpus-id']} has no picture; download the file again")
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_file(path, lambda temporary, row=row: temporary.write_bytes(row["image"]["bytes"]))
    relevant = {}  # query -> {page: highest grade}, in order of first appearance
    for row in table("qrels", "query-id", "corpus-id", "score"):
        if row["score"] > 0:
            grades = relevant.setdefault(row["query-id"], {})
            grades[row["corpus-id"]] = max(row["score"], grades.get(row["corpus-id"], 0))
    rows = []
    for row in table("queries", "query-id", "query"):
        grades = relevant.get(row["query-id"])
        if not grades:
            raise BadInput(f"{about['repo']}: query {row['query-id']} has no relevant page in the qrels")
        query = mmeb_input(f"{ask} {row['query']}")
        rows.append((query, [candidate(key) for key in grades], list(grades), list(grades.values())))
    return rows, [candidate(key) for key in corpus]


# --------------------------------------------------------------------------------------------------------------
# Embedding, and the cache on disk


def media_of(item):
    return item["images"] + item["video"]


def inputs_of(task):
    return [query["input"] for query in task.queries] + list(task.candidates.values())


def hash_media(tasks, group=None):
    """{path: hash of the file's bytes}, "" where there is no such file; stops where most of a task's are not there.
    The processes share out the files, which all of them must see."""

    def digest(path):
        if not os.path.isfile(path):
            return ""
        try:
            with open(path, "rb") as file:
                return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        except OSError:  # open_picture will say why
            return ""

    paths = {task.name: {path for item in inputs_of(task) for path in media_of(item)} for task in tasks}
    every = sorted(set().union(*paths.values()))
    rank, world = processes()
    with ThreadPoolExecutor(16) as pool:
        found = dict(zip(every[rank::world], pool.map(digest, every[rank::world])))
    if world > 1:
        parts = [None] * world
        dist.all_gather_object(parts, found, group)
        found = {path: known for part in parts for path, known in part.items()}
    for name, mine in paths.items():  # before hours of work; single files that are missing count as misses
        absent = sorted(path for path in mine if not found[path])
        if len(absent) > len(mine) / 2:
            raise SystemExit(f"{name}: {len(absent)} of {len(mine)} media files do not exist, e.g. {absent[0]}; "
                             "what is missing and how to get it: python eval.py --check --root ROOT")  # fmt: skip
    return found


def input_key(item, digests):
    """What the model sees of an input. A file that is not there counts as its path, until it is there."""
    media = [[digests[path] or path for path in item[kind]] for kind in ("images", "video")]
    return hashlib.blake2b(json.dumps([item["text"].strip(), *media]).encode(), digest_size=16).hexdigest()


def hash_model(embedder):
    """Everything that decides an embedding, but for the input and the settings."""
    about = [embedder.backbone.config.to_json_string(), embedder.tokenizer.backend_tokenizer.to_str()]
    about += [Path(__file__).with_name(name).read_text() for name in ("model.py", "data.py")]
    about += [torch.__version__, transformers.__version__, embedder.device.type]
    found = hashlib.blake2b(repr(about).encode(), digest_size=16)
    for name, p in embedder.named_parameters():
        found.update(f"{name} {p.dtype}".encode())
        found.update(p.detach().cpu().contiguous().view(torch.uint8).numpy())
    return found.hexdigest()


def generated(embedder, inputs, keys, settings, samples):
    """Yields (key, problem, disc [D], gen [S, D], valid [S], tokens [S], texts) as the generations end.

    One stream of inputs: a finished generation leaves its place to the next input, whatever its task. The seed of an
    input is its own, so it does not matter what runs beside it.
    """

    def read(batch):  # in a background worker
        key, item = batch[0]
        name = f"the input {item['text'][:60]!r}"
        try:
            row = encode_input(embedder.tokenizer, item, blank_image=settings.blank_image, name=name,
                               family=embedder.family)  # fmt: skip
            return Prompt(key, row, stable_hash(settings.seed, key))
        except Skip as error:
            return Prompt(key, None, problem=str(error))

    workers = min(settings.workers, len(inputs))
    prompts = forked_loader(list(zip(keys, inputs)), workers, batch_size=1, collate_fn=read)
    S, D = max(1, samples), embedder.width
    for prompt, r in embedder.generate(prompts, G=S, temperature=settings.temperature if samples else 0.0,
                                       max_new_tokens=settings.max_new_tokens, slots=settings.batch_size):  # fmt: skip
        if r is None:  # a miss
            yield prompt.key, prompt.problem, np.zeros(D), np.zeros((S, D)), np.zeros(S, bool), [0] * S, [""] * S
            continue
        yield (prompt.key, "", r.disc.float().cpu().numpy(), r.gen.float().cpu().numpy(), r.valid.numpy(),
               [len(ids) for ids in r.ids], embedder.texts_of(r))  # fmt: skip


def reread(embedder, inputs, keys, settings, traces):
    """The same for assistant texts that are given: read, not generated."""
    for start in range(0, len(inputs), settings.batch_size):
        part = slice(start, start + settings.batch_size)
        out = embedder.embed(inputs[part], mode="both", traces=traces[part], batch_size=settings.batch_size,
                             blank_image=settings.blank_image)  # fmt: skip
        problems = [out.skipped.get(n, "") for n in range(len(out.texts))]
        rows = (out.disc.numpy(), out.gen.numpy(), out.valid.numpy(), out.num_tokens.tolist(), out.texts)
        yield from zip(keys[part], problems, *rows)


def shards(folder):
    """(rows as [key, problem, texts], open file) of every shard of a cache folder."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            file = safe_open(path, "np")
        except SafetensorError as error:  # a disk's fault: its inputs are embedded again
            print(f"{path}: not readable ({error}), left out", file=sys.stderr)
            continue
        with file:
            yield json.loads(file.metadata()["rows"]), file


def encode_missing(embedder, inputs, keys, folder, settings, *, samples=0, traces=None, group=None, title=""):
    """Embeds the inputs that the cache folder lacks, shared out over the processes; returns how many they were.

    samples 0: both embeddings, greedy; samples k: k gen embeddings of each. Each process writes shards of its own,
    early enough that no more than --save_every of its inputs are begun and not saved (but one batch).
    """
    rank, world = processes()
    folder.mkdir(parents=True, exist_ok=True)
    done = {key for rows, _ in shards(folder) for key, problem, _ in rows if not problem}  # those are tried again
    for path in folder.glob("*.tmp") if rank == 0 else []:  # of a killed run
        path.unlink()
    barrier(group)  # nobody writes before all have looked: all share out the same list

    def cost(n):  # frames, bytes of the pictures, text: long beside long, and what does not fit into memory shows first
        sizes = [os.path.getsize(path) for path in inputs[n]["images"] if os.path.exists(path)]
        return len(inputs[n]["video"]), sum(sizes), len(inputs[n]["text"])

    todo = sorted((n for n in range(len(inputs)) if keys[n] not in done), key=cost, reverse=True)
    mine = todo[rank::world]
    own, own_keys = [inputs[n] for n in mine], [keys[n] for n in mine]
    results = (reread(embedder, own, own_keys, settings, [traces[n] for n in mine]) if traces
               else generated(embedder, own, own_keys, settings, samples))  # fmt: skip
    waiting, last = [], time.time()

    def save():
        nonlocal waiting, last
        key, problem, disc, gen, valid, tokens, texts = zip(*waiting)
        seconds = np.full(len(waiting), (time.time() - last) / len(waiting))  # decoded together, they share the time
        arrays = {"disc": np.stack(disc).astype(np.float32), "gen": np.stack(gen).astype(np.float32),
                  "valid": np.stack(valid), "tokens": np.array(tokens), "seconds": seconds}  # fmt: skip
        rows = json.dumps(list(zip(key, problem, texts)))
        write_file(folder / f"{time.time_ns()}-{rank}.safetensors", lambda t: save_file(arrays, t, {"rows": rows}))
        waiting, last = [], time.time()

    for result in Progress(results, total=len(mine), desc=title, unit="input", disable=rank > 0 or not mine):
        waiting.append(result)
        if len(waiting) >= max(1, settings.save_every - settings.batch_size):
            save()
    if waiting:
        save()
    barrier(group)
    return len(todo)


def collect(folder, keys):
    """The cached results in the order of keys: disc [N, D], gen [N, S, D], valid [N, S], tokens [N, S], seconds [N],
    texts [N] lists, problem [N] ("": the input could be read), not_finite [N] (such a gen is not valid)."""
    at, out = {key: n for n, key in enumerate(keys)}, {}
    texts, problem, found = [None] * len(keys), [""] * len(keys), set()
    for rows, file in shards(folder):
        wanted = [(i, at[key]) for i, (key, *_) in enumerate(rows) if key in at]
        if not wanted:
            continue
        source, target = (list(x) for x in zip(*wanted))
        found.update(target)
        for name in file.keys():  # noqa: SIM118 (the file is no dict)
            array = file.get_tensor(name)
            out.setdefault(name, np.zeros((len(keys), *array.shape[1:]), array.dtype))[target] = array[source]
        for i, n in wanted:
            _, problem[n], texts[n] = rows[i]
    assert len(found) == len(keys), f"{folder} lacks {len(keys) - len(found)} inputs: was it changed during the run?"
    out |= {"texts": texts, "problem": np.array(problem)}
    disc_ok, valid = usable(out)
    not_finite = ((out["problem"] == "") & ~disc_ok) | (out["valid"] & ~valid).any(1)
    return out | {"valid": valid, "not_finite": not_finite}


def usable(arrays):
    """Which embeddings count, disc bool [N], gen bool [N, S]. NaN compares as neither better nor worse and would keep
    the list's order, which in published local tasks is the right one: what is not finite is a miss."""
    disc = (arrays["problem"] == "") & np.isfinite(arrays["disc"]).all(-1)
    return disc, arrays["valid"] & np.isfinite(arrays["gen"]).all(-1)


# --------------------------------------------------------------------------------------------------------------
# Ranking and metrics


def rank_candidates(queries, candidates, query_ok, candidate_ok, lists=None, depth=KS[-1]):
    """The best `depth` candidates of each query, as indices; none for a query that is not ok. Equal scores keep the
    order of the list. Arguments: see score_candidates."""
    scored = score_candidates(queries, candidates, query_ok, candidate_ok, lists)
    return [own[np.argsort(-scores, kind="stable")[:depth]].tolist() for own, scores in scored]


def score_candidates(queries, candidates, query_ok, candidate_ok, lists=None):
    """Yields per query (indices of the candidates it ranks, their scores in float64); none for a query that is not ok.

    queries [Q, D], candidates [C, D], bool [Q] and [C]; lists: the indices each query ranks (repeats stay), None:
    all. A candidate that is not ok is never listed, nor is one with a number that is not finite. Candidates with
    bit-equal embeddings are multiplied once, because a matrix product may round two equal columns differently.
    """
    query_ok, candidate_ok = query_ok & np.isfinite(queries).all(1), candidate_ok & np.isfinite(candidates).all(1)
    queries, candidates = (np.where(ok[:, None], x, 0) for ok, x in ((query_ok, queries), (candidate_ok, candidates)))
    seen = {}
    column = np.array([seen.setdefault(c.tobytes(), len(seen)) for c in candidates])  # [C]
    distinct = np.stack([np.frombuffer(c, candidates.dtype) for c in seen]).astype(np.float64)  # [U, D]
    everything = np.flatnonzero(candidate_ok)
    block = max(1, 20_000_000 // len(distinct))  # queries at once: 160 MB of scores
    for start in range(0, len(queries), block):
        scores = queries[start : start + block].astype(np.float64) @ distinct.T  # [block, U]
        for q, row in enumerate(scores, start):
            own = everything if lists is None else lists[q][candidate_ok[lists[q]]]
            own = own if query_ok[q] else own[:0]
            yield own, row[column[own]]


def ranking_metrics(ranked, labels, grades=None, ks=KS):
    """The metrics of ONE query as MMEB defines them: {"hit@1": x, "hit@5": x, ...}.

    ranked: keys, best first. labels: the right keys (a bare key is one label). grades: one per label, None: all 1.
    A label given twice counts once, with its higher grade. A key ranked twice counts once in hit, precision and
    recall, but each time in map and ndcg, as in the published scores. Precision divides by k, whatever is ranked.
    """
    labels = as_labels(labels)
    if grades is not None and len(grades) != len(labels):
        raise ValueError(f"{len(grades)} grades for {len(labels)} labels")
    grade = {}
    for label, g in zip(labels, [1] * len(labels) if grades is None else grades):
        grade[label] = max(g, grade.get(label, g))

    def dcg(grades, exponential):
        gains = [2.0**g - 1 if exponential else g for g in grades]
        return sum(gain / math.log2(place + 1) for place, gain in enumerate(gains, 1))

    out = {}
    for k in ks:
        top = ranked[:k]
        places = [place for place, key in enumerate(top, 1) if key in grade]  # of the right keys, from 1
        found = len(grade.keys() & set(top))
        ideal = sorted(grade.values(), reverse=True)[:k]
        out["hit", k] = float(found > 0)
        for name, exponential in (("ndcg_linear", False), ("ndcg_exponential", True)):
            best = dcg(ideal, exponential)
            out[name, k] = dcg([grade.get(key, 0) for key in top], exponential) / best if best > 0 else 0.0
        p = out["precision", k] = found / k
        r = out["recall", k] = found / len(grade) if grade else 1.0
        out["f1", k] = 2 * p * r / (p + r) if p + r > 0 else 0.0
        out["map", k] = sum(c / place for c, place in enumerate(places, 1)) / max(1, min(len(grade), k))
        out["mrr", k] = 1 / places[0] if places else 0.0
    return {f"{name}@{k}": out[name, k] for name in NAMES for k in ks}


def published_ndcg(ranked, labels, grades):
    """ndcg as in the published tables: there the labels go through a set and the grades do not, so that grades land
    on wrong labels. For integer keys the order of the set is always the same."""
    metrics = ranking_metrics(ranked, list(set(labels)), grades)
    return {name: x for name, x in metrics.items() if name.startswith("ndcg")}


def pass_at_k(n, c, k):
    """The chance that k of n samples, drawn without replacement, contain one of the c hits."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def mean_embedding(gen, valid):
    """[Q, S, D], bool [Q, S] -> [Q, D]: normalised mean of the valid samples, zeros where there are none."""
    total = np.where(valid[:, :, None], gen.astype(np.float64), 0).sum(1)
    return total / np.linalg.norm(total, axis=1, keepdims=True).clip(min=1e-12)


def score_task(task, queries, candidates, sampled=None):
    """Scores of all modes from the arrays of collect(), their rows in the order of the task.

    Returns ({mode: {metric: mean}}, "pass@k" among the modes and "tied": {mode: queries for which right and wrong
    candidates, or all, share the best score, so that the list's order decides}; and {column: main metric or pass@k of
    each query}).
    """
    keys, lists = list(task.candidates), None
    if task.eval_type == "local":
        index = {key: c for c, key in enumerate(keys)}
        lists = [np.array([index[key] for key in query["candidates"]]) for query in task.queries]
    q_disc, q_gen, c_disc, c_gen = queries["disc"], queries["gen"][:, 0], candidates["disc"], candidates["gen"][:, 0]
    (every_q, q_ok), (every_c, c_ok) = usable(queries), usable(candidates)
    q_ok, c_ok = q_ok[:, 0], c_ok[:, 0]
    graded = task.name in MMEB and any(len(set(query["grades"] or [])) > 1 for query in task.queries)
    quirk, tied = {}, {}  # per mode: what the published tables have; queries that the list's order decides

    def measure(q, c, q_ok, c_ok, mode):
        """Per query {metric: x}; all zero, recall of no labels too, where the query has no embedding."""
        ranked, tied[mode] = [], 0
        for query, (own, scores) in zip(task.queries, score_candidates(q, c, q_ok, c_ok, lists)):
            best = np.argsort(-scores, kind="stable")[: KS[-1]]
            ranked.append([keys[i] for i in own[best]])
            first = np.flatnonzero(scores == scores.max()) if len(own) > 1 else []
            right = {keys[i] in query["labels"] for i in own[first]} if len(first) > 1 else set()
            tied[mode] += len(right) == 2 or 1 < len(first) == len(own)
        if graded:
            x = [published_ndcg(best, q["labels"], q["grades"]) for best, q in zip(ranked, task.queries)]
            quirk[mode] = {m: fmean(row[m] for row in x) for m in x[0]}
        return [ranking_metrics(best, query["labels"], query["grades"]) if ok else dict.fromkeys(METRICS, 0.0)
                for best, query, ok in zip(ranked, task.queries, q_ok)]  # fmt: skip

    disc, gen = measure(q_disc, c_disc, every_q, every_c, "disc"), measure(q_gen, c_gen, q_ok, c_ok, "gen")
    modes = {
        "disc": disc,
        "gen": gen,
        "oracle": [{m: max(d[m], g[m]) for m in METRICS} for d, g in zip(disc, gen)],
        "gen_disc": measure(q_gen, c_disc, q_ok, every_c, "gen_disc"),
        "disc_gen": measure(q_disc, c_gen, every_q, c_ok, "disc_gen"),
    }
    if sampled:
        valid = sampled["valid"] & np.isfinite(sampled["gen"]).all(-1)
        modes["mean"] = measure(mean_embedding(sampled["gen"], valid), c_gen, valid.any(1), c_ok, "mean")
    entry = {mode: {m: fmean(x[m] for x in per_query) for m in METRICS} for mode, per_query in modes.items()}
    columns = {mode: [x[task.main_metric] for x in per_query] for mode, per_query in modes.items()}
    entry["tied"] = tied
    if graded:
        entry["published_ndcg"] = quirk
    if sampled:
        n = valid.shape[1]
        hits = np.zeros(len(valid), int)  # samples that put a label first
        for s in range(n):
            firsts = rank_candidates(sampled["gen"][:, s], c_gen, valid[:, s], c_ok, lists, depth=1)
            hits += [any(keys[i] in query["labels"] for i in first) for first, query in zip(firsts, task.queries)]
        curve = {str(2**e): [pass_at_k(n, int(c), 2**e) for c in hits] for e in range(n.bit_length())}
        entry["pass@k"] = {k: fmean(x) for k, x in curve.items()}
        columns |= {f"pass@{k}": x for k, x in curve.items()}
    return entry, columns


# --------------------------------------------------------------------------------------------------------------
# Means and report


def summary(entry):
    """A row of the report: the main metric in every mode, pass@k, share of invalid generations, and the cost."""
    row = {mode: entry[mode][entry["main_metric"]] for mode in MODES if mode in entry}
    row |= {f"pass@{k}": x for k, x in entry.get("pass@k", {}).items()}
    if "invalid" in entry:
        row["invalid"] = entry["invalid"] / (entry["num_queries"] + entry["num_candidates"])
        row["tokens"], row["seconds"] = entry["tokens_per_input"], entry["seconds"]
        row["inputs/s"] = (entry["num_queries"] + entry["num_candidates"]) / max(entry["seconds"], 1e-9)
    return row


def mean_summary(entries):
    rows = [summary(entry) for entry in entries]
    return {column: fmean(row[column] for row in rows) for column in rows[0]}


def aggregate(tasks):
    """Plain means over tasks of their summaries, in groups, in modalities and overall (the paper's "All").

    A part of the 78 has no overall: the number would look like the published ones and be another one.
    """

    def means_by(key):
        values = dict.fromkeys(entry[key] for entry in tasks.values())
        return {value: mean_summary(entry for entry in tasks.values() if entry[key] == value) for value in values}

    part = tasks.keys() & MMEB.keys() and MMEB.keys() - tasks.keys()
    overall = None if part else mean_summary(tasks.values())
    return {"groups": means_by("group"), "modalities": means_by("modality"), "overall": overall}


def paired_change(first, last):
    """Mean over tasks of last - first and its standard error, from {task: [x of each query]} of two models.

    Queries are the random part, tasks are fixed: the variance is sum over tasks of s^2 / n, divided by the squared
    number of tasks; s^2 is the unbiased variance of a task's paired differences (nan for a single query).
    """
    change = [np.subtract(last[task], first[task]) for task in first]
    variance = sum(d.var(ddof=1) / len(d) if len(d) > 1 else math.nan for d in change)
    return float(np.mean([d.mean() for d in change])), math.sqrt(variance) / len(change)


def text_table(rows):
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def score_table(scores):
    tasks, rows = scores["tasks"], {}
    for name, entry in tasks.items():
        rows[name] = summary(entry)
        if entry["modality"] == "visdoc":
            rows[f"  {name} hit@1"] = {mode: entry[mode]["hit@1"] for mode in MODES if mode in entry}
    for kind in ("groups", "modalities"):
        if len(scores[kind]) > 1:
            rows |= {f"= {name}": row for name, row in scores[kind].items()}
    rows["= mean" if scores["overall"] else "= mean of these"] = mean = mean_summary(tasks.values())
    rest = ("tokens", "seconds", "inputs/s")  # no shares
    cells = [[name, *(f"{row[c] * (1 if c in rest else 100):.1f}" if c in row else "" for c in mean)]
             for name, row in rows.items()]  # fmt: skip
    text = (f"\n{scores['model']}: main metric and invalid generations in %, tokens generated per input, "
            f"seconds of one process\n{text_table([['task', *mean], *cells])}")  # fmt: skip
    for name, entry in tasks.items():
        if found := {mode: n for mode, n in entry["tied"].items() if n}:
            counts = ", ".join(f"{n} in {mode}" for mode, n in found.items())
            text += f"\n{name}: candidates tie for the first place, so that the order of the list decides, for "
            text += f"{counts} of {entry['num_queries']} queries"
        if "published_ndcg" in entry:
            x, y = (part["gen"][entry["main_metric"]] for part in (entry, entry["published_ndcg"]))
            text += f"\n{name}, {entry['main_metric']} of gen: {100 * x:.1f}, as in published tables {100 * y:.1f}"
    if "pass@2" in mean:
        text += (f"\noracle of disc and gen {100 * mean['oracle']:.1f}, "
                 f"oracle of two gen samples (pass@2) {100 * mean['pass@2']:.1f}")  # fmt: skip
    if "ablate" in next(iter(tasks.values())):
        for kind in ("removed", "swapped"):
            changes = [entry["ablate"][kind]["gen"][entry["main_metric"]] for entry in tasks.values()]
            cosines = [x for entry in tasks.values() if (x := entry["ablate"][kind]["cosine"]) is not None]
            text += (f"\nreasoning {kind}: gen {100 * (fmean(changes) - mean['gen']):+.1f}, "
                     f"cosine to the original {fmean(cosines or [math.nan]):.3f}")  # fmt: skip
    return text


def paper_table(scores):
    """Our modes and the published rows in the columns of the paper's main table."""
    tasks, columns = scores["tasks"].keys() & MMEB.keys(), ASSET["columns"]
    whole = {c: {name for name, t in MMEB.items() if c in (t["group"], t["modality"], "All")} for c in columns}
    means = aggregate({name: scores["tasks"][name] for name in sorted(tasks)})
    means = means["groups"] | means["modalities"] | {"All": means["overall"]}
    rows = [["", *columns]]
    for mode in [mode for mode in MODES if mode in means[next(iter(means))]]:
        cells = [f"{100 * means[c][mode]:.1f}{'*' * (not whole[c] <= tasks)}" if means.get(c) else "-"
                 for c in columns]  # fmt: skip
        rows.append([f"{scores['model']} {mode}", *cells])
    rows += [[name, *(f"{x:.1f}" for x in row)] for name, row in ASSET["published"].items()]
    text = f"\nMMEB-V2 beside published results (hit@1 of image and video, ndcg@5 of visdoc, in %)\n{text_table(rows)}"
    if len(tasks) < len(MMEB):
        text += (f"\n{len(tasks)} of {len(MMEB)} tasks: no overall; * some of the group's tasks are missing, in all "
                 f"{', '.join(name for name in MMEB if name not in tasks)}")  # fmt: skip
    return text


def leaderboard(scores, mode, backbone):
    """The file that the MMEB leaderboard takes; fill in the dates and the url before you submit it.

    ndcg of the three graded tasks is the aligned one (departure 5).
    """
    S = {"image": {}, "video": {}, "visdoc": {}}
    for name, task in MMEB.items():
        entry, fixed = scores["tasks"].get(name), name in ("ViDoSeek-page", "MMLongBench-page")
        counts = {"num_pred": entry["num_queries"], "num_data": entry["num_queries"]} if entry else {}
        S[task["modality"]][name + "-fixed" * fixed] = entry[mode] | counts if entry else "FILE_N/A"
    now = datetime.now(UTC).isoformat(timespec="seconds")
    metadata = {"model_name": scores["model"], "model_backbone": backbone.config.model_type,
                "model_size": f"{backbone.num_parameters() / 1e9:.2f}B",
                "embedding_dimension": backbone.config.text_config.hidden_size, "max_length_tokens": None,
                "model_release_date": now[:10], "data_source": "Self-Reported", "url": "",
                "report_generated_date": now}  # fmt: skip
    return {"metadata": metadata, "metrics": S}


def change_table(names, first, last):
    """first, last: {task: {column: [x of each query]}} of two models."""
    columns = list(next(iter(first.values())))
    rows = [["task", *columns]]
    for name, tasks in [*((task, [task]) for task in first), ("= mean", list(first))]:
        cells = [paired_change(*({t: model[t][c] for t in tasks} for model in (first, last))) for c in columns]
        rows.append([name, *(f"{100 * change:+.1f}±{100 * error:.1f}" for change, error in cells)])
    return (f"\n{names[0]} -> {names[-1]}: change in points ± standard error of the paired difference "
            f"(noise of the queries only, not of training)\n{text_table(rows)}")  # fmt: skip


def model_names(models):
    """The folders' names, with as many of their parents as it takes to tell them apart."""
    parts = [Path(os.path.abspath(model)).parts for model in models]
    if len(set(parts)) < len(parts):
        raise SystemExit(f"--model names a folder twice: {' '.join(models)}")
    depth = 1
    while len({p[-depth:] for p in parts}) < len(parts):
        depth += 1
    return ["-".join(p[-depth:]) for p in parts]


# --------------------------------------------------------------------------------------------------------------
# Main


def choose_tasks(settings):
    """Names of the wanted tasks. Without --tasks: ROOT/tasks/test and those of the 78 that have annotations."""
    root = Path(settings.root)
    own = [name for name in known_tasks(root) if name.startswith("test/")]
    here = [name for name, task in MMEB.items() if settings.check or (root / "annotations" / task["repo"]).is_dir()]
    if not settings.tasks:
        return own + here if not (settings.check and own) else own
    names = []
    for wanted in settings.tasks:
        of_kind = [name for name, task in MMEB.items() if wanted in (task["group"], task["modality"])]
        names += [name for name in of_kind if name in here] or [wanted]
    return list(dict.fromkeys(names))


def check_files(names, settings):
    """Walks the tasks without a model: prints what is there, what is missing and how to get it. -> is all there"""
    rows, lacking = [["task", "queries", "known", "candidates", "files", "unusable", "first problem"]], {}

    def problem(path):  # every picture is decoded, as a run would
        try:
            open_picture(path)
        except Skip as error:
            return str(error)
        return ""

    for name in Progress(names, desc="check", unit="task"):
        about = MMEB.get(name, {"repo": "", "archive": "", "num_queries": ""})
        try:
            task = load_task(name, settings.root, settings.vidore_instruction)
            paths, need = sorted({path for item in inputs_of(task) for path in media_of(item)}), about["archive"]
            with ThreadPoolExecutor(16) as pool:
                wrong = [text for text in pool.map(problem, paths) if text]
            counts = [len(task.queries), about["num_queries"], len(task.candidates), len(paths), len(wrong)]
        except (OSError, ValueError) as error:
            wrong, need, counts = [str(error)], about["repo"], ["", about["num_queries"], "", "", ""]
        if wrong:
            lacking.setdefault(need, []).append(name)
        rows.append([name, *map(str, counts), (wrong or [""])[0]])
    whole, other = len(names) - sum(map(len, lacking.values())), sum(row[1] != row[2] != "" for row in rows[1:])
    print(text_table(rows))
    print(f"{whole} of {len(names)} tasks are complete; {other} have not the known number of queries")
    for what, tasks in lacking.items():
        hub = [f"hf download --repo-type dataset {what} --local-dir ROOT/annotations/{what}"] * bool(what)
        get = [line.replace("ROOT", settings.root) for line in ASSET["archives"].get(what, hub)]
        print(*[f"\nmissing for {', '.join(tasks)}:", *get], sep="\n    ")
    return not lacking


def ablate_trace(texts):
    """{kind: texts} with the reasoning removed, and with the reasoning of the next input that has another one."""
    parts = [re.fullmatch(r"(.*?<think>)(.*?)(</think>.*)", text, re.DOTALL) for text in texts]
    thoughts = [(n, part[2]) for n, part in enumerate(parts) if part]
    out, k = {"removed": [], "swapped": []}, 0
    for text, part in zip(texts, parts):
        k += bool(part)  # thoughts[k] is the next one
        other = next((x for _, x in thoughts[k:] + thoughts[:k] if part and x != part[2]), None)
        out["removed"].append(part[1] + part[3] if part else text)
        out["swapped"].append(text if other is None else part[1] + other + part[3])
    return out


def evaluate(embedder, tasks, digests, settings, name, group=None):
    """(content of scores.json, content of per_query.json) on process 0, None on the others."""
    where, inputs = {}, []  # key of the content -> row of inputs

    def rows_of(items):
        keys = [input_key(item, digests) for item in items]
        for key, item in zip(keys, items):
            if where.setdefault(key, len(inputs)) == len(inputs):
                inputs.append(item)
        return np.array([where[key] for key in keys])

    query_rows = [rows_of([query["input"] for query in task.queries]) for task in tasks]
    Q = len(inputs)  # queries come first
    candidate_rows = [rows_of(list(task.candidates.values())) for task in tasks]
    keys, how = list(where), [hash_model(embedder), settings.max_new_tokens, settings.blank_image,
                                          embedder.family.image_pixels, embedder.family.video_pixels]  # fmt: skip
    rank, encoded = processes()[0], {}

    def embed(kind, keys, inputs, *more, **kwargs):
        folder = hashlib.blake2b(repr([how, more]).encode(), digest_size=8).hexdigest()
        folder = Path(settings.out) / name / "cache" / f"{kind}-{folder}"
        title = f"{name} {kind}"
        encoded[kind] = encode_missing(embedder, inputs, keys, folder, settings, group=group, title=title, **kwargs)
        if rank == 0:
            print(f"{title}: {encoded[kind]:,} of {len(keys):,} inputs embedded, the others from {folder}", flush=True)
        return collect(folder, keys) if rank == 0 or settings.ablate == "trace" else None

    greedy, sampled, ablated = embed("greedy", keys, inputs), None, {}
    if settings.samples:
        sampled = embed("samples", keys[:Q], inputs[:Q], settings.samples, settings.temperature, settings.seed,
                        samples=settings.samples)  # fmt: skip
    if settings.ablate == "trace":
        some = np.flatnonzero(greedy["valid"][:, 0])
        if not len(some) and rank == 0:
            print(f"{name}: --ablate trace: no input has a valid answer, so there is no reasoning to take out")
        for kind, traces in ablate_trace([greedy["texts"][n][0] for n in some]).items() if len(some) else ():
            traced = [f"{keys[n]}-{stable_hash(trace):x}" for n, trace in zip(some, traces)]
            x = embed(kind, traced, [inputs[n] for n in some], traces=traces)
            ablated[kind] = greedy | {"gen": greedy["gen"].copy(), "valid": greedy["valid"].copy()}
            ablated[kind]["gen"][some], ablated[kind]["valid"][some] = x["gen"], x["valid"]  # no <gen_emb>: a miss
    if rank > 0:
        return None

    def take(arrays, rows):
        return arrays and {key: arrays[key][rows] for key in ("disc", "gen", "valid", "problem")}

    scores, per_query = {}, {}
    for task, q, c in zip(tasks, query_rows, candidate_rows):
        entry, columns = score_task(task, take(greedy, q), take(greedy, c), take(sampled, q))
        both = np.concatenate([q, c])
        scores[task.name] = {
            "modality": task.modality, "group": task.group, "main_metric": task.main_metric,
            "num_queries": len(q), "num_candidates": len(c), **entry,
            "invalid": int((~greedy["valid"][both]).sum()),  # greedy generations without <gen_emb>, or not finite
            "not_finite": int(greedy["not_finite"][both].sum()),  # an embedding of NaN or infinity: a miss
            "unreadable": int((greedy["problem"][both] != "").sum()),  # pictures: misses in every mode
            "tokens_per_input": float(greedy["tokens"][both].mean()),  # generated, greedy
            "seconds": float(greedy["seconds"][np.unique(both)].sum()),  # of one process, greedy, each input once
        }  # fmt: skip
        for kind, other in ablated.items():
            ok = both[other["valid"][both, 0]]
            cosine = (greedy["gen"][ok, 0] * other["gen"][ok, 0]).sum(-1)
            scores[task.name].setdefault("ablate", {})[kind] = {
                "gen": score_task(task, take(other, q), take(other, c))[0]["gen"],
                "cosine": float(cosine.mean()) if len(ok) else None}  # fmt: skip
        per_query[task.name] = columns | {"texts": [greedy["texts"][n][0] for n in q]}
    if n := int(greedy["not_finite"].sum()):
        print(f"{name}: {n} of {len(keys)} inputs have an embedding that is not finite (NaN or infinite) and count as "
              "misses; are the weights broken?", flush=True)  # fmt: skip
    problems = [problem for problem in greedy["problem"] if problem]
    if problems:
        print(f"{len(problems)} inputs cannot be read and count as misses; the first: {problems[0]}", flush=True)
    about = {"model": name, "args": asdict(settings)}
    return about | {"tasks": scores, **aggregate(scores), "encoded": encoded}, per_query


def main(argv=None):
    settings = parse_args(Settings, PRESETS, argv)
    if settings.video_max_pixels < (least := QWEN2_VL.video_pixels[0]):
        raise BadInput(f"--video_max_pixels {settings.video_max_pixels}: must be at least {least}")
    names = choose_tasks(settings)
    if not names:
        raise SystemExit(f"no task files in {settings.root}/tasks/test and no {settings.root}/annotations; the toy "
                         "world is made by: python data.py toy; MMEB: python eval.py --check --root ROOT")  # fmt: skip
    if settings.check:
        raise SystemExit(0 if check_files(names, settings) else 1)
    for model in settings.model:  # all of them before the first one is embedded
        check_model(model)
    model_dirs = model_names(settings.model)

    rank, world, device = start_processes()
    hold(settings.out)
    # A process that is done may wait hours for the slowest one.
    group = dist.new_group(backend="gloo", timeout=timedelta(days=7)) if world > 1 else None
    for turn in range(2):  # process 0 goes first: it may have to write pages
        if (rank > 0) == turn:
            tasks = [load_task(name, settings.root, settings.vidore_instruction) for name in names]
        barrier(group)
    digests = hash_media(tasks, group)
    if rank == 0:  # now, not after hours: a folder that cannot be written shows at once
        for name in model_dirs:
            (Path(settings.out) / name).mkdir(parents=True, exist_ok=True)
        write_args(settings.out, settings)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    every = []  # per model {task: {column: [x of each query]}}
    for model, name in zip(settings.model, model_dirs):
        embedder = Embedder.from_pretrained(model, device=device, dtype=dtype)
        least, _ = embedder.family.video_pixels
        embedder.family = replace(embedder.family, video_pixels=(least, settings.video_max_pixels))
        result = evaluate(embedder, tasks, digests, settings, name, group)
        if rank > 0:
            continue
        scores, per_query = result
        folder = Path(settings.out) / name
        write_json(folder / "scores.json", scores)
        write_json(folder / "per_query.json", per_query)
        print(score_table(scores), flush=True)
        if scores["tasks"].keys() & MMEB.keys():
            for mode in [mode for mode in MODES if mode != "mean" or settings.samples]:
                write_json(folder / f"leaderboard_{mode}.json", leaderboard(scores, mode, embedder.backbone))
            print(paper_table(scores), flush=True)
        every.append({task: {c: x for c, x in row.items() if c != "texts"} for task, row in per_query.items()})
    if len(every) > 1:
        print(change_table(model_dirs, every[0], every[-1]), flush=True)
    end_processes()


if __name__ == "__main__":
    run_script(main)
