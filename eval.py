"""Evaluation: MMEB-V1 and V2 (78 tasks) and your own tasks, in every mode (paper, experiments).

A model reads every distinct input of all tasks once, greedily, which gives two embeddings: disc, at <disc_emb> of the
prompt, and gen, at the last <gen_emb> of its own reasoning. With --samples S it reads the queries again, S times
at --temperature. Modes (a task's value is the mean over its queries):

    disc, gen           query and candidates both in this mode
    fused               the mean of both cosines: one dot product of [disc, gen] / sqrt(2); not in the paper
    oracle              per query and metric the better of disc and gen: it looks at the labels, an upper bound of
                        choosing between the two (fused, which adds them, may be above it)
    gen_disc, disc_gen  gen queries against disc candidates and the reverse: together only after sft.py --cross_weight
    pass@k              the chance that one of k sampled queries has a right candidate first; greedy gen candidates;
                        unbiased: 1 - C(S-c, k) / C(S, k) with c hits in S samples

oracle has two tries where gen has one: compare it with pass@2, the oracle of two gen samples. (Samples are drawn at
--temperature, gen is greedy: pass@1 shows what that costs.)

Departures from the official evaluation:
1. disc is read exactly at <disc_emb>; the official code reads the token after it.
2. Greedy decoding; there the checkpoint's generation_config decides (Qwen2-VL's samples at low temperature).
3. A generation without <gen_emb> is a miss: such a query has 0 in every metric and such a candidate is left out of
   the ranking; so is an input with a picture that cannot be read, in all modes. The official code reads another token
   in its place, or drops the picture. In fused the half of a missing gen is zero: such a query is ranked by disc
   alone, such a candidate keeps half of its disc cosine and ranks low.
4. Scores are float64 dot products in a stable order (float32 and an unstable sort there): candidates with equal
   embeddings keep the order of the list, so a model that sees no difference ranks the first one first.
5. Grades stay with their labels; the official code re-orders one and not the other, which moves ndcg of 3 tasks:
   scores.json has that value beside ours, as "published_ndcg".
6. Inputs with equal content (text and bytes of the media), in any task, are embedded once.
7. Frames of at most 32 tokens (Qwen2-VL: 25,088 pixels), as in training; the official evaluation sets no bound
   (--video_max_pixels). MomentSeeker's clips of more than 8 saved frames are thinned out to 8.

With --reasoner the answers (reasoning and summary) come from elsewhere and the model only reads and embeds them: from
another model, which is run first, or from a file of lines {"key", "answer"} that anything else has filled in (--export
writes it: support/answers.py). The results then go to OUT/<model name>-reads-<reasoner>.

Results wait in OUT/<model name>/cache, from where a killed run goes on. They are found again by a hash of the model's
files (weights, tokenizer, configuration), settings and versions, and by a hash of the input's text and its media's
bytes: none is ever stale. All media are read for it at every start, each by
one process (an estimated 50 GB for MMEB-V2); size and time of a file would be quicker, but do not show every change.

Run (without arguments: the toy preset, on any device):
    python eval.py                                                            # 1 CPU: runs/toy/sft, runs/toy/rl
    python eval.py --check --root data/MMEB                                   # what is missing, and how to get it
    python eval.py --preset 2b --model runs/2b/rl --root data/MMEB            # 1 GPU
    torchrun --nproc_per_node 8 eval.py --preset 2b --model runs/2b/rl --root data/MMEB              # 8 GPUs
    python eval.py --model runs/toy/sft --reasoner runs/toy/rl                # rl thinks, sft embeds
The result does not depend on the number of processes (they share the disk). Writes OUT/args.json and, per model,
OUT/<model name>/scores.json, per_query.json and leaderboard_<mode>.json; with several models it also prints the
change from the first to the last. OUT/report.html shows all of it in a browser, with the answers and the best
candidates of a few queries of each task.

Shapes: N distinct inputs, Q queries and C candidates of a task, S samples, D dimensions.
"""

import hashlib
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from statistics import fmean
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from data import (
    GEN,
    QWEN2_VL,
    Skip,
    check_text,
    encode_input,
    hash_media,
    open_picture,
)
from model import PREFILL_TOKENS, Embedder, Prompt, check_model
from support.answers import check_export, export_inputs, read_answers
from support.mmeb import HOW_TO_GET, MMEB, check_files, leaderboard, load_mmeb, paper_table, tasks_of_column
from support.report import change_table, sampled_queries, score_table, write_report
from support.rows import one_or_more
from support.run import (
    BadInput,
    MissingFile,
    Progress,
    barrier,
    end_processes,
    forked_loader,
    hold,
    parse_args,
    processes,
    read_json,
    run_script,
    same_on_all_ranks,
    setting,
    stable_hash,
    start_processes,
    weights_digest,
    write_args,
    write_file,
    write_json,
)
from support.tasks import load_own_task

KS = (1, 5, 10)
NAMES = ("hit", "ndcg_linear", "ndcg_exponential", "precision", "recall", "f1", "map", "mrr")
METRICS = [f"{name}@{k}" for name in NAMES for k in KS]
MODES = ("disc", "gen", "fused", "oracle", "gen_disc", "disc_gen")

# --------------------------------------------------------------------------------------------------------------
# Settings

PRESETS = {
    "toy": dict(model=["runs/toy/sft", "runs/toy/rl"], root="runs/toy/data", out="runs/toy/eval", samples=16,
                max_new_tokens=128, batch_size=64, workers=1),
    "2b": dict(model=["runs/2b/rl"], root="data/MMEB", out="runs/2b/eval", samples=0,
               max_new_tokens=8192, batch_size=64),  # 8,192: the official command, the paper gives none
    "7b": dict(model=["runs/7b/rl"], root="data/MMEB", out="runs/7b/eval", samples=0,
               max_new_tokens=8192, batch_size=32),  # copies 2b: unknown in the paper
}


@dataclass
class Settings:
    preset: Literal["toy", "2b", "7b"] = setting("toy", "read first, sets the defaults")
    model: list[str] = field(default_factory=list, metadata={"help": "model folders or hub ids, compared in order"})
    tasks: list[str] = field(default_factory=list, metadata={
        "help": "tasks, groups (I-QA) or modalities (image); none: ROOT/tasks/test and what is in ROOT/annotations"})
    root: str = setting("", "folder of the data: tasks/NAME.json or annotations/, and where media paths start")
    check: bool = setting(False, "only look whether the tasks' files are there, without a model")
    export: str = setting("", "only write the tasks' inputs to this .jsonl file, for --reasoner, without a model")
    reasoner: str = setting("", "whose answers the models read: a model, or a .jsonl file; none: each its own")
    out: str = setting("", "results go to OUT/<model name>/, with --reasoner to OUT/<model name>-reads-<reasoner>/")
    samples: int = setting(0, "samples per query for pass@k; 0 leaves it out")
    temperature: float = setting(1.0, "of the samples (unknown in the paper; RL samples at 1)")
    max_new_tokens: int = setting(512, "longest answer in tokens; one cut off before its <gen_emb> is invalid")
    batch_size: int = setting(8, "generations at once in one process: speed and memory only")
    prefill_tokens: int = setting(PREFILL_TOKENS, "most tokens of one pass over prompts: speed and memory only")
    seed: int = setting(0, "of the samples")
    report_queries: int = setting(8, "queries of a task in OUT/report.html, fewer with many tasks; 0: no report")
    blank_image: bool = setting(True, "put a blank picture on inputs without media")
    video_max_pixels: int = setting(0, "of a frame of a video; 0: 32 tokens, as in training; official: no bound")
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


def load_task(name, root, vidore_instruction=True) -> Task:
    """Reads ROOT/tasks/NAME.json or, for one of the 78, the published files; media paths come back joined to ROOT.

    Nothing else knows how a task is stored. A label that is not a candidate is allowed: it cannot be hit and stays in
    the denominators.
    """
    path = Path(root) / "tasks" / f"{name}.json"
    if path.is_file():
        if name in MMEB or tasks_of_column(name):
            raise BadInput(f"{path}: {name} is a task or a group of MMEB, so the scores would be compared with the "
                           "published ones. Rename the file")  # fmt: skip
        return Task(**load_own_task(name, path, root, METRICS))
    if name in MMEB:
        return Task(**load_mmeb(name, Path(root), vidore_instruction))
    known = ", ".join(known_tasks(root)) or "none (is --root right?)"
    raise MissingFile(f"no task {name!r}, {path} does not exist; known tasks: {known}")


def known_tasks(root):
    folder = Path(root) / "tasks"
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.json"))


# --------------------------------------------------------------------------------------------------------------
# What the model reads: distinct inputs, and what decides their embeddings


def media_of(item):
    return item["images"] + item["video"]


def inputs_of(task):
    return [query["input"] for query in task.queries] + list(task.candidates.values())


def media_paths(task):
    return {path for item in inputs_of(task) for path in media_of(item)}


def digests_of_media(tasks, group=None):
    """{path: hash of its content} of all media. Raises SystemExit if most of a task's files do not exist."""
    paths_of = {task.name: media_paths(task) for task in tasks}
    digests = hash_media(set().union(*paths_of.values()), group=group)
    for name, needed in paths_of.items():  # before hours of work; single files that are missing count as misses
        absent = sorted(path for path in needed if not digests[path])
        if len(absent) > len(needed) / 2:
            raise SystemExit(f"{name}: {len(absent)} of {len(needed)} media files do not exist, e.g. {absent[0]}; "
                             "what is missing and how to get it: python eval.py --check --root ROOT")  # fmt: skip
    return digests


def input_key(item, digests):
    """What the model sees of an input. A file that is not there counts as its path, until it is there."""
    images = [digests[path] or path for path in item["images"]]
    video = [digests[path] or path for path in item["video"]]
    content = json.dumps([item["text"].strip(), images, video])
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


class DistinctInputs:
    """The inputs of all tasks, those of equal content once. The queries come first."""

    def __init__(self, tasks, digests):
        self.row_of = {}  # key of the content -> row of items
        self.items = []
        self.digests = digests
        self.query_rows = [self.add([query["input"] for query in task.queries]) for task in tasks]
        self.num_queries = len(self.items)  # distinct ones
        self.candidate_rows = [self.add(list(task.candidates.values())) for task in tasks]
        self.keys = list(self.row_of)

    def add(self, items):
        """-> the row of each item, [len(items)]"""
        rows = []
        for item in items:
            key = input_key(item, self.digests)
            if key not in self.row_of:
                self.row_of[key] = len(self.items)
                self.items.append(item)
            rows.append(self.row_of[key])
        return np.array(rows)


CACHE_VERSION = 1  # raise it when a change to the code changes embeddings


def hash_model(model, device):
    """Identity of everything that decides an embedding, except the input and the settings. model: folder or hub id."""
    about = [CACHE_VERSION, weights_digest(model), torch.__version__, transformers.__version__, device.type]
    return hashlib.blake2b(repr(about).encode(), digest_size=16).hexdigest()


# --------------------------------------------------------------------------------------------------------------
# The model reads, and generates or is given what follows


def embed_inputs(embedder, inputs, keys, settings, samples=0, answers=None):
    """Yields (key, problem, disc [D], gen [S, D], valid [S], tokens [S], texts) as the inputs are done.

    samples 0: one greedy generation of each; answers: N assistant texts to read instead. One stream of inputs: a
    finished generation leaves its slot to the next input, whatever its task. The seed of an input is its own, so it
    does not matter what runs beside it.
    """

    def read(batch):  # in a background worker
        key, item, answer = batch[0]
        name = f"the input {item['text'][:60]!r}"
        try:
            if answer is not None:
                check_text(answer, f"the answer to {name}")
            row = encode_input(embedder.tokenizer, item, answer, blank_image=settings.blank_image, name=name,
                               family=embedder.family)  # fmt: skip
            return Prompt(key, row, stable_hash(settings.seed, key))
        except (Skip, BadInput) as error:
            return Prompt(key, None, problem=str(error))

    answer_of = dict(zip(keys, answers or [None] * len(keys)))
    rows = [(key, item, answer_of[key]) for key, item in zip(keys, inputs)]
    prompts = forked_loader(rows, min(settings.workers, len(rows)), batch_size=1, collate_fn=read)
    S = max(1, samples)
    D = embedder.width
    if answers is not None:
        results = embedder.read(prompts, settings.batch_size, settings.prefill_tokens)
    else:
        results = embedder.generate(prompts, G=S, temperature=settings.temperature if samples else 0.0,
                                    max_new_tokens=settings.max_new_tokens, slots=settings.batch_size,
                                    prefill_tokens=settings.prefill_tokens)  # fmt: skip
    for prompt, r in results:
        if r is None:  # a miss
            yield prompt.key, prompt.problem, np.zeros(D), np.zeros((S, D)), np.zeros(S, bool), [0] * S, [""] * S
            continue
        texts = embedder.texts_of(r) if answers is None else [answer_of[prompt.key]]
        yield (prompt.key, "", r.disc.float().cpu().numpy(), r.gen.float().cpu().numpy(), r.valid.numpy(),
               [len(ids) for ids in r.ids], texts)  # fmt: skip


# --------------------------------------------------------------------------------------------------------------
# The cache: every embedding is made once and waits on the disk


class EmbeddingCache:
    """The embeddings of one model under OUT/<model name>/cache, a folder for each kind and everything that decides
    it. All processes call embed() together."""

    def __init__(self, embedder, model, settings, name, group=None):
        """model: the folder or hub id that the embedder comes from."""
        self.embedder = embedder
        self.settings = settings
        self.name = name
        self.group = group
        family = embedder.family
        digest = hash_model(model, embedder.device)
        same_on_all_ranks({f"content of {model}": digest})
        self.how = [digest, settings.max_new_tokens, settings.blank_image, family.image_pixels,
                    family.video_pixels]  # fmt: skip
        self.encoded = {}  # kind -> how many inputs this run has embedded

    def embed(self, kind, keys, inputs, samples=0, answers=None, everywhere=False):
        """The results of all inputs as collect() gives them; on the processes other than 0 None, unless `everywhere`.

        samples 0: both embeddings, greedy; samples k: k gen embeddings of each. answers: assistant texts to read
        instead of generating.
        """
        folder = self.fill(kind, keys, inputs, samples, answers)
        if processes()[0] > 0 and not everywhere:
            return None
        return collect(folder, keys)

    def texts(self, kind, keys, inputs, samples=0):
        """What the model writes of all inputs, N lists of texts, on all processes."""
        return collect_texts(self.fill(kind, keys, inputs, samples), keys)

    def fill(self, kind, keys, inputs, samples, answers=None):
        """Embeds the inputs that the folder lacks. Returns the folder."""
        folder = self.folder(kind, samples)
        rank, world = processes()
        todo = self.missing(folder, keys, inputs)
        local = todo[rank::world]
        local_inputs = [inputs[n] for n in local]
        local_keys = [keys[n] for n in local]
        local_answers = [answers[n] for n in local] if answers is not None else None
        results = embed_inputs(self.embedder, local_inputs, local_keys, self.settings, samples, local_answers)
        title = f"{self.name} {kind}"
        bar = Progress(results, total=len(local), desc=title, unit="input", disable=rank > 0 or not local)
        write_shards(bar, folder, self.settings)
        barrier(self.group)
        self.encoded[kind] = self.encoded.get(kind, 0) + len(todo)
        if rank == 0:
            others = f", the others from {folder}" if len(todo) < len(keys) else ""
            print(f"{title}: {len(todo):,} of {len(keys):,} inputs embedded{others}", flush=True)
        return folder

    def folder(self, kind, samples):
        draw = (samples, self.settings.temperature, self.settings.seed) if samples else ()
        digest = hashlib.blake2b(repr([self.how, draw]).encode(), digest_size=8).hexdigest()
        out = Path(self.settings.out)
        folder = out / self.name / "cache" / f"{kind}-{digest}"
        under_other_names = sorted(out.glob(f"*/cache/{kind}-{digest}"))  # "sft" may be "seed0-sft" beside "seed1-sft"
        return under_other_names[0] if under_other_names and not folder.exists() else folder

    def missing(self, folder, keys, inputs):
        """Which inputs the folder lacks, as indices; the same list in all processes."""
        folder.mkdir(parents=True, exist_ok=True)
        done = set()
        for rows, _ in shards(folder):
            done.update(key for key, problem, _ in rows if not problem)  # those with a problem are tried again
        if processes()[0] == 0:
            for path in folder.glob("*.tmp"):  # of a killed run
                path.unlink()
        barrier(self.group)  # nobody writes before all have looked
        todo = [n for n, key in enumerate(keys) if key not in done]
        return sorted(todo, key=lambda n: estimated_cost(inputs[n]), reverse=True)


def estimated_cost(item):
    """Frames, bytes of the pictures, text: long beside long, and what does not fit into memory shows first."""
    sizes = [os.path.getsize(path) for path in item["images"] if os.path.exists(path)]
    return len(item["video"]), sum(sizes), len(item["text"])


def write_shards(results, folder, settings):
    """Each process writes shards of its own, early enough that a kill costs --save_every inputs at most: those that
    wait here and the --batch_size that are being computed (which are more than a smaller --save_every)."""
    waiting = []
    last = time.time()
    for result in results:
        waiting.append(result)
        if len(waiting) >= max(1, settings.save_every - settings.batch_size):
            save_shard(folder, waiting, time.time() - last)
            waiting = []
            last = time.time()
    if waiting:
        save_shard(folder, waiting, time.time() - last)


def save_shard(folder, results, elapsed):
    key, problem, disc, gen, valid, tokens, texts = zip(*results)
    arrays = {
        "disc": np.stack(disc).astype(np.float32),
        "gen": np.stack(gen).astype(np.float32),
        "valid": np.stack(valid),
        "tokens": np.array(tokens),
        "seconds": np.full(len(results), elapsed / len(results)),  # decoded together, they share the time
    }
    rows = json.dumps(list(zip(key, problem, texts)))
    path = folder / f"{time.time_ns()}-{processes()[0]}.safetensors"
    write_file(path, lambda temporary: save_file(arrays, temporary, {"rows": rows}))


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


def collect(folder, keys):
    """The cached results in the order of keys: disc [N, D], gen [N, S, D], valid [N, S], tokens [N, S], seconds [N],
    texts [N] lists, problem [N] ("": the input could be read), not_finite [N] (such a gen is not valid)."""
    row_of = {key: n for n, key in enumerate(keys)}
    arrays = {}
    texts = [None] * len(keys)
    problems = [""] * len(keys)
    filled = set()
    for shard_rows, file in shards(folder):
        wanted = [(i, row_of[key]) for i, (key, *_) in enumerate(shard_rows) if key in row_of]
        if not wanted:
            continue
        source, target = (list(indices) for indices in zip(*wanted))
        filled.update(target)
        for name in file.keys():  # noqa: SIM118 (the file is no dict)
            part = file.get_tensor(name)
            if name not in arrays:
                arrays[name] = np.zeros((len(keys), *part.shape[1:]), part.dtype)
            arrays[name][target] = part[source]
        for i, n in wanted:
            _, problems[n], texts[n] = shard_rows[i]
    lacking = len(keys) - len(filled)
    assert not lacking, f"{folder} lacks {lacking} inputs: was it changed during the run?"

    arrays |= {"texts": texts, "problem": np.array(problems)}
    valid = usable_gen(arrays)
    disc_not_finite = (arrays["problem"] == "") & ~usable_disc(arrays)
    gen_not_finite = (arrays["valid"] & ~valid).any(1)
    return arrays | {"valid": valid, "not_finite": disc_not_finite | gen_not_finite}


def collect_texts(folder, keys):
    """The cached texts in the order of keys: N lists."""
    text_of = {}
    for shard_rows, _ in shards(folder):
        text_of.update((key, texts) for key, _, texts in shard_rows)
    return [text_of[key] for key in keys]


def usable_disc(arrays):
    """bool [N]: which disc embeddings count. NaN compares as neither better nor worse and would keep the list's order,
    which in published local tasks is the right one: an embedding that is not finite is a miss."""
    return (arrays["problem"] == "") & np.isfinite(arrays["disc"]).all(-1)


def usable_gen(arrays):
    """bool [N, S]: the same for gen."""
    return arrays["valid"] & np.isfinite(arrays["gen"]).all(-1)


# --------------------------------------------------------------------------------------------------------------
# Ranking and metrics


def rank_candidates(queries, candidates, query_ok, candidate_ok, lists=None, depth=KS[-1]):
    """The best `depth` candidates of each query, as indices; none for a query that is not ok. Equal scores keep the
    order of the list. Arguments: see score_candidates."""
    scored = score_candidates(queries, candidates, query_ok, candidate_ok, lists)
    return [best_first(listed, scores, depth).tolist() for listed, scores in scored]


def best_first(listed, scores, depth=KS[-1]):
    return listed[np.argsort(-scores, kind="stable")[:depth]]


def score_candidates(queries, candidates, query_ok, candidate_ok, lists=None):
    """Yields per query (indices of the candidates it ranks, their scores in float64); none for a query that is not ok.

    queries [Q, D], candidates [C, D], bool [Q] and [C]; lists: the indices each query ranks (repeats stay), None:
    all. A candidate that is not ok is never listed, nor is one with a number that is not finite. Candidates with
    bit-equal embeddings are multiplied once, because a matrix product may round two equal columns differently.
    """
    query_ok = query_ok & np.isfinite(queries).all(1)
    candidate_ok = candidate_ok & np.isfinite(candidates).all(1)
    queries = np.where(query_ok[:, None], queries, 0)
    candidates = np.where(candidate_ok[:, None], candidates, 0)

    column_of = {}  # bytes of an embedding -> its column among the U distinct ones
    column = np.array([column_of.setdefault(c.tobytes(), len(column_of)) for c in candidates])  # [C]
    distinct = np.stack([np.frombuffer(c, candidates.dtype) for c in column_of]).astype(np.float64)  # [U, D]

    all_ok = np.flatnonzero(candidate_ok)
    block = max(1, 20_000_000 // len(distinct))  # queries at once: 160 MB of scores
    for start in range(0, len(queries), block):
        scores = queries[start : start + block].astype(np.float64) @ distinct.T  # [block, U]
        for q, query_scores in enumerate(scores, start):
            listed = all_ok
            if lists is not None:
                listed = lists[q][candidate_ok[lists[q]]]
            if not query_ok[q]:
                listed = listed[:0]
            yield listed, query_scores[column[listed]]


def ranking_metrics(ranked, labels, grades=None, ks=KS):
    """The metrics of ONE query as MMEB defines them: {"hit@1": x, "hit@5": x, ...}.

    ranked: keys, best first. labels: the right keys (a bare key is one label). grades: one per label, None: all 1.
    A label given twice counts once, with its higher grade. A key ranked twice counts once in hit, precision and
    recall, but each time in map and ndcg, as in the published scores. Precision divides by k, whatever is ranked.
    """
    grade_of = grades_by_label(one_or_more(labels), grades)
    best_grades = sorted(grade_of.values(), reverse=True)
    out = {}
    for k in ks:
        top = ranked[:k]
        hits = len(grade_of.keys() & set(top))
        places = [place for place, key in enumerate(top, 1) if key in grade_of]  # of the right keys, from 1
        top_grades = [grade_of.get(key, 0) for key in top]
        out["hit", k] = float(hits > 0)
        out["ndcg_linear", k] = ndcg(top_grades, best_grades[:k], linear_gain)
        out["ndcg_exponential", k] = ndcg(top_grades, best_grades[:k], exponential_gain)
        precision = hits / k
        recall = hits / len(grade_of) if grade_of else 1.0
        out["precision", k] = precision
        out["recall", k] = recall
        out["f1", k] = 2 * precision * recall / (precision + recall) if hits else 0.0
        precisions = [count / place for count, place in enumerate(places, 1)]
        out["map", k] = sum(precisions) / max(1, min(len(grade_of), k))
        out["mrr", k] = 1 / places[0] if places else 0.0
    return {f"{name}@{k}": out[name, k] for name in NAMES for k in ks}


def grades_by_label(labels, grades):
    if grades is None:
        grades = [1] * len(labels)
    if len(grades) != len(labels):
        raise ValueError(f"{len(grades)} grades for {len(labels)} labels")
    grade_of = {}
    for label, grade in zip(labels, grades):
        grade_of[label] = max(grade, grade_of.get(label, grade))
    return grade_of


def ndcg(grades, ideal, gain):
    """Grades in the order of the ranking, against the best order that there is."""
    best = dcg(ideal, gain)
    return dcg(grades, gain) / best if best > 0 else 0.0


def dcg(grades, gain):
    return sum(gain(grade) / math.log2(place + 1) for place, grade in enumerate(grades, 1))


def linear_gain(grade):
    return grade


def exponential_gain(grade):
    return 2.0**grade - 1


def published_ndcg(ranked, labels, grades):
    """ndcg as in the published tables: there the labels go through a set and the grades do not, so that grades land
    on wrong labels. For integer keys the order of the set is always the same."""
    metrics = ranking_metrics(ranked, list(set(labels)), grades)
    return {name: x for name, x in metrics.items() if name.startswith("ndcg")}


def pass_at_k(n, c, k):
    """The chance that k of n (above: S) samples, drawn without replacement, contain one of the c hits."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


# --------------------------------------------------------------------------------------------------------------
# Modes

GREEDY_MODES = {  # mode -> embedding of the queries, embedding of the candidates; oracle is made of the first two
    "disc": ("disc", "disc"),
    "gen": ("gen", "gen"),
    "fused": ("fused", "fused"),
    "gen_disc": ("gen", "disc"),
    "disc_gen": ("disc", "gen"),
}
REPORT_MODES = ("disc", "gen", "fused")  # whose best candidates the report shows


class Side(NamedTuple):
    """The queries or the candidates of a task in one kind of embedding."""

    embeddings: np.ndarray  # [N, D]
    ok: np.ndarray  # bool [N]: there is an embedding


class Ranking(NamedTuple):
    """A task in one mode."""

    best: list[list]  # per query the keys of its best candidates, best first
    ok: np.ndarray  # bool [Q]: the query has an embedding
    tied: int  # queries for which the order of the list decides
    shown: dict  # query -> what ranking_to_show() returns, of the queries in the report


def score_task(task, queries, candidates, sampled=None, shown=()):
    """Scores of all modes from the arrays of collect(), their rows in the order of the task. shown: the queries, as
    indices, whose rankings the report shows.

    Returns ({mode: {metric: mean}}, "pass@k" among the modes and "tied": {mode: queries for which right and wrong
    candidates, or all, share the best score, so that the list's order decides}; {column: main metric or pass@k of each
    query}; and {mode: {query of `shown`: its ranking}}).
    """
    lists = candidate_lists(task)
    query_sides = greedy_sides(queries)
    candidate_sides = greedy_sides(candidates)

    rankings = {}
    for mode, (query_kind, candidate_kind) in GREEDY_MODES.items():
        rankings[mode] = rank_task(task, query_sides[query_kind], candidate_sides[candidate_kind], lists, shown)

    measured = {mode: measure(task, ranking) for mode, ranking in rankings.items()}
    measured["oracle"] = oracle(measured["disc"], measured["gen"])

    entry = {}
    columns = {}
    for mode in MODES:
        entry[mode] = means(measured[mode])
        columns[mode] = [metrics[task.main_metric] for metrics in measured[mode]]
    entry["tied"] = {mode: ranking.tied for mode, ranking in rankings.items()}
    if is_graded(task):
        entry["published_ndcg"] = {mode: published_means(task, ranking) for mode, ranking in rankings.items()}
    if sampled:
        curve = pass_curve(task, sampled, candidate_sides["gen"], lists)
        entry["pass@k"] = {k: fmean(chances) for k, chances in curve.items()}
        columns |= {f"pass@{k}": chances for k, chances in curve.items()}
    return entry, columns, {mode: rankings[mode].shown for mode in REPORT_MODES}


def candidate_lists(task):
    """Per query of a local task the indices of the candidates it ranks; None: all."""
    if task.eval_type == "global":
        return None
    index = {key: c for c, key in enumerate(task.candidates)}
    return [np.array([index[key] for key in query["candidates"]]) for query in task.queries]


def greedy_sides(arrays):
    disc = Side(arrays["disc"], usable_disc(arrays))
    gen = Side(arrays["gen"][:, 0], usable_gen(arrays)[:, 0])
    return {"disc": disc, "gen": gen, "fused": fuse(disc, gen)}


def fuse(disc, gen):
    """[disc, gen] / sqrt(2), [N, 2D]: its dot product is the mean of both cosines. Without a gen embedding that half is
    zero; without a disc embedding there is none."""
    gen_or_zero = np.where(gen.ok[:, None], gen.embeddings, 0)
    return Side(np.concatenate([disc.embeddings, gen_or_zero], axis=1) / math.sqrt(2), disc.ok)


def rank_task(task, queries, candidates, lists, shown=()):
    """-> Ranking. queries and candidates: Sides."""
    keys = list(task.candidates)
    best = []
    tied = 0
    to_show = {}
    scored = score_candidates(queries.embeddings, candidates.embeddings, queries.ok, candidates.ok, lists)
    for q, (query, (listed, scores)) in enumerate(zip(task.queries, scored)):
        best.append([keys[i] for i in best_first(listed, scores)])
        tied += order_decides(query["labels"], keys, listed, scores)
        if q in shown:
            to_show[q] = ranking_to_show(query["labels"], keys, listed, scores)
    return Ranking(best, queries.ok, tied, to_show)


def ranking_to_show(labels, keys, listed, scores, depth=5):
    """A query's first candidates with their similarities, the rank of its first right one (from 1; None: no right
    candidate is ranked), and how many are ranked."""
    order = np.argsort(-scores, kind="stable")
    ranked = [keys[i] for i in listed[order]]
    right_rank = next((rank for rank, key in enumerate(ranked, 1) if key in labels), None)
    top = list(zip(ranked[:depth], scores[order[:depth]].tolist()))
    return {"top": top, "right_rank": right_rank, "num_ranked": len(ranked)}


def order_decides(labels, keys, listed, scores):
    """Right and wrong candidates share the best score, or all candidates do."""
    if len(listed) < 2:
        return False
    first = listed[scores == scores.max()]
    if len(first) < 2:
        return False
    rightness = {keys[i] in labels for i in first}
    return len(rightness) == 2 or len(first) == len(listed)


def measure(task, ranking):
    """Per query {metric: x}; all zero, recall of no labels too, where the query has no embedding."""
    measured = []
    for query, best, ok in zip(task.queries, ranking.best, ranking.ok):
        if ok:
            measured.append(ranking_metrics(best, query["labels"], query["grades"]))
        else:
            measured.append(dict.fromkeys(METRICS, 0.0))
    return measured


def oracle(disc, gen):
    """Per query and metric the better of the two."""
    return [{m: max(d[m], g[m]) for m in METRICS} for d, g in zip(disc, gen)]


def pass_curve(task, sampled, candidates, lists):
    """{k: pass@k of each query} for k = 1, 2, 4, ... up to the number of samples; a hit puts a label first."""
    keys = list(task.candidates)
    valid = usable_gen(sampled)  # [Q, S]
    num_queries, num_samples = valid.shape
    hits = np.zeros(num_queries, int)
    for s in range(num_samples):
        queries = sampled["gen"][:, s]
        ranked = rank_candidates(queries, candidates.embeddings, valid[:, s], candidates.ok, lists, depth=1)
        for q, (query, first) in enumerate(zip(task.queries, ranked)):
            hits[q] += any(keys[i] in query["labels"] for i in first)
    ks = [2**e for e in range(num_samples.bit_length())]
    return {str(k): [pass_at_k(num_samples, int(c), k) for c in hits] for k in ks}


def is_graded(task):
    """One of the three published tasks where some labels are better than others (departure 5)."""
    return task.name in MMEB and any(len(set(query["grades"] or [])) > 1 for query in task.queries)


def published_means(task, ranking):
    pairs = zip(ranking.best, task.queries)
    return means([published_ndcg(best, query["labels"], query["grades"]) for best, query in pairs])


def means(measured):
    """[{metric: x}] -> {metric: mean}"""
    return {metric: fmean(metrics[metric] for metrics in measured) for metric in measured[0]}


# --------------------------------------------------------------------------------------------------------------
# Means


def summary(entry):
    """A row of the report: the main metric in every mode, pass@k, share of invalid generations, and the cost."""
    row = {mode: entry[mode][entry["main_metric"]] for mode in MODES if mode in entry}
    row |= {f"pass@{k}": x for k, x in entry.get("pass@k", {}).items()}
    if "invalid" in entry:
        num_inputs = entry["num_queries"] + entry["num_candidates"]
        row["invalid"] = entry["invalid"] / num_inputs
        row["tokens"] = entry["tokens_per_input"]
        row["seconds"] = entry["seconds"]
        row["inputs/s"] = num_inputs / max(entry["seconds"], 1e-9)
    return row


def mean_summary(entries):
    return means([summary(entry) for entry in entries])


def aggregate(tasks):
    """Plain means over tasks of their summaries, in groups, in modalities and overall (the paper's "All").

    A part of the 78 has no overall: the number would look like the published ones and be another one.
    """
    published = tasks.keys() & MMEB.keys()
    complete = not published or published == MMEB.keys()
    return {
        "groups": means_by("group", tasks),
        "modalities": means_by("modality", tasks),
        "overall": mean_summary(tasks.values()) if complete else None,
    }


def means_by(field, tasks):
    members = {}
    for entry in tasks.values():
        members.setdefault(entry[field], []).append(entry)
    return {value: mean_summary(entries) for value, entries in members.items()}


# --------------------------------------------------------------------------------------------------------------
# Another reasoner: --reasoner


class Answers(NamedTuple):
    """What a reasoner has written, for the models to read."""

    reasoner: str
    greedy: list[list[str]]  # of each distinct input, one text
    sampled: list[list[str]] | None  # of each distinct query, --samples of them


def is_file_of_answers(reasoner):
    return reasoner.endswith(".jsonl") and not os.path.isdir(reasoner)


def answers_of_reasoner(settings, inputs, name, device, group=None):
    """Those of the file; or of the model, which writes what its cache lacks. On all processes."""
    sampled = None
    if is_file_of_answers(settings.reasoner):
        greedy = [[answer] for answer in read_answers(settings.reasoner, inputs.keys, inputs.items)]
    else:
        reasoner = load_embedder(settings.reasoner, settings, device)
        cache = EmbeddingCache(reasoner, settings.reasoner, settings, name, group)
        greedy = cache.texts("greedy", inputs.keys, inputs.items)
        if settings.samples:
            n = inputs.num_queries
            sampled = cache.texts("samples", inputs.keys[:n], inputs.items[:n], settings.samples)
    without = sum(GEN not in answer for (answer,) in greedy)
    if without == len(greedy):
        raise BadInput(f"--reasoner {settings.reasoner}: none of its {without:,} answers has a {GEN}, where the "
                       "embedding is read; a model must have learned to write it, in a file end each answer with "
                       "it")  # fmt: skip
    if without and processes()[0] == 0:
        print(f"{name}: {without:,} of {len(greedy):,} answers have no {GEN}; they count as generations without an "
              "embedding", flush=True)  # fmt: skip
    return Answers(name, greedy, sampled)


def embed_answers(cache, keys, items, texts, everywhere=False):
    """The results of N inputs with S given answers each, as EmbeddingCache.embed() has them. Equal answers to an input
    are read once."""
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
# The reasoning taken out: --ablate trace


def ablate_trace(texts):
    """{kind: texts} with the reasoning removed, and with the reasoning of the next input that has another one."""
    parts = [parts_around_reasoning(text) for text in texts]
    reasonings = [part[1] for part in parts if part]
    n = len(reasonings)
    other = list(reasonings)  # the next reasoning that differs, or the same one if all are equal
    for i in reversed(range(2 * n)):  # twice round, because the list is a ring
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
    """(text up to <think>, reasoning, text from </think>), None if a tag is missing."""
    start = text.find("<think>") + len("<think>")
    end = text.find("</think>", start)
    if "<think>" not in text or end < 0:
        return None
    return text[:start], text[start:end], text[end:]


def embed_ablated(cache, keys, items, greedy):
    """{kind: the greedy results with the gen embeddings of the ablated texts}. A text that has lost its <gen_emb> is
    a miss."""
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


# --------------------------------------------------------------------------------------------------------------
# Main


def choose_tasks(settings):
    """Names of the wanted tasks. Without --tasks: ROOT/tasks/test and those of the 78 that have annotations; with
    --check all in ROOT/tasks, and all of the 78 unless there are only own tasks."""
    root = Path(settings.root)
    known = known_tasks(root)
    own = [name for name in known if settings.check or name.startswith("test/")]
    check_all = settings.check and (settings.tasks or not own or (root / "annotations").is_dir())
    published = [name for name, about in MMEB.items()
                 if check_all or (root / "annotations" / about["repo"]).is_dir()]  # fmt: skip
    if not settings.tasks:
        return own + published
    names = []
    for wanted in settings.tasks:
        members = tasks_of_column(wanted) if wanted not in known else []
        present = [name for name in published if name in members]
        if members and not present:
            raise MissingFile(f"--tasks {wanted}: {root}/annotations has none of its {len(members)} tasks{HOW_TO_GET}")
        names += present or [wanted]
    return list(dict.fromkeys(names))


def check_tasks(names, settings):
    """--check: -> whether all files are there"""

    def load(name):
        task = load_task(name, settings.root, settings.vidore_instruction)
        return len(task.queries), len(task.candidates), inputs_of(task)

    return check_files(names, load, settings.root)


def evaluate(embedder, model, tasks, inputs, settings, name, answers=None, group=None):
    """(content of scores.json, content of per_query.json, {task: {mode: {query of the report: its ranking}}}) on
    process 0, None on the others.

    model: the folder or hub id of the embedder; inputs: the DistinctInputs of the tasks; answers: of another reasoner.
    """
    cache = EmbeddingCache(embedder, model, settings, name, group)
    keys = inputs.keys
    items = inputs.items
    query_keys = keys[: inputs.num_queries]
    query_items = items[: inputs.num_queries]
    everywhere = settings.ablate == "trace"  # all processes look for what is to be ablated
    sampled = None
    if answers:
        greedy = embed_answers(cache, keys, items, answers.greedy, everywhere)
        if settings.samples:
            sampled = embed_answers(cache, query_keys, query_items, answers.sampled)
    else:
        greedy = cache.embed("greedy", keys, items, everywhere=everywhere)
        if settings.samples:
            sampled = cache.embed("samples", query_keys, query_items, settings.samples)
    ablated = {}
    if settings.ablate == "trace":
        ablated = embed_ablated(cache, keys, items, greedy)
    if processes()[0] > 0:
        return None

    scores = {}
    per_query = {}
    rankings = {}
    for task, q, c in zip(tasks, inputs.query_rows, inputs.candidate_rows):
        shown = sampled_queries(len(q), len(tasks), settings.report_queries)
        scored = score_task(task, take(greedy, q), take(greedy, c), take(sampled, q), shown)
        entry, columns, rankings[task.name] = scored
        scores[task.name] = describe_task(task) | entry | generation_figures(greedy, np.concatenate([q, c]))
        if ablated:
            scores[task.name]["ablate"] = {kind: ablation_entry(task, greedy, changed, q, c)
                                           for kind, changed in ablated.items()}  # fmt: skip
        per_query[task.name] = columns | {"texts": [greedy["texts"][n][0] for n in q]}
    print_misses(name, greedy)
    about = {"model": name, "reasoner": answers.reasoner if answers else None, "args": asdict(settings)}
    return about | {"tasks": scores, **aggregate(scores), "encoded": cache.encoded}, per_query, rankings


def take(arrays, rows):
    """The rows of a task out of the arrays of collect()."""
    if arrays is None:
        return None
    return {key: arrays[key][rows] for key in ("disc", "gen", "valid", "problem")}


def describe_task(task):
    return {
        "modality": task.modality,
        "group": task.group,
        "main_metric": task.main_metric,
        "num_queries": len(task.queries),
        "num_candidates": len(task.candidates),
    }


def generation_figures(greedy, rows):
    """rows: of all queries and candidates of a task."""
    return {
        "invalid": int((~greedy["valid"][rows]).sum()),  # greedy (or given) answers without <gen_emb>, or not finite
        "not_finite": int(greedy["not_finite"][rows].sum()),  # an embedding of NaN or infinity: a miss
        "unreadable": int((greedy["problem"][rows] != "").sum()),  # pictures: misses in every mode
        "tokens_per_input": float(greedy["tokens"][rows].mean()),  # of the answers
        "seconds": float(greedy["seconds"][np.unique(rows)].sum()),  # of one process, greedy, each input once
    }


def ablation_entry(task, greedy, ablated, query_rows, candidate_rows):
    entry, *_ = score_task(task, take(ablated, query_rows), take(ablated, candidate_rows))
    rows = np.concatenate([query_rows, candidate_rows])
    rows = rows[ablated["valid"][rows, 0]]
    cosines = (greedy["gen"][rows, 0] * ablated["gen"][rows, 0]).sum(-1)
    return {"gen": entry["gen"], "cosine": float(cosines.mean()) if len(rows) else None}


def print_misses(name, greedy):
    not_finite = int(greedy["not_finite"].sum())
    if not_finite:
        print(f"{name}: {not_finite} of {len(greedy['problem'])} inputs have an embedding that is not finite (NaN or "
              "infinite) and count as misses; are the weights broken?", flush=True)  # fmt: skip
    problems = [problem for problem in greedy["problem"] if problem]
    if problems:
        print(f"{len(problems)} inputs (or answers) cannot be read and count as misses; the first: {problems[0]}",
              flush=True)  # fmt: skip


def load_tasks(names, settings, group=None):
    """Process 0 goes first: it may have to write pages."""
    rank, _ = processes()
    for turn in range(2):
        if (rank > 0) == turn:
            tasks = [load_task(name, settings.root, settings.vidore_instruction) for name in names]
        barrier(group)
    return tasks


# --------------------------------------------------------------------------------------------------------------
# Report


def report(folder, scores, per_query, backbone):
    """Writes the files of a model and prints its tables."""
    tasks = scores["tasks"]
    if (folder / "scores.json").exists():
        tell_what_is_replaced(folder / "scores.json", scores)
    rows = {name: summary(entry) for name, entry in tasks.items()}
    mean = mean_summary(tasks.values())
    write_json(folder / "scores.json", scores)
    write_json(folder / "per_query.json", per_query)
    print(score_table(scores, rows, mean), flush=True)
    if tasks.keys() & MMEB.keys():
        name = result_name(scores["model"], scores["reasoner"])
        for mode in MODES:
            if mode in mean:
                about = about_model(name, backbone, mode)
                write_json(folder / f"leaderboard_{mode}.json", leaderboard(tasks, mode, about))
        print(published_comparison(scores), flush=True)


def tell_what_is_replaced(path, scores):
    """Two models have one folder of results where only their parents' names differ; so have two files of answers."""
    earlier = read_json(path)
    lost = sorted(earlier["tasks"].keys() - scores["tasks"].keys())
    others = sorted(sources(earlier) - sources(scores))
    if others:
        lost = [f"the scores of {' and '.join(others)}"]
    if lost:
        print(f"{path} no longer has {', '.join(lost)} (the cache has their embeddings): another --out would keep both",
              flush=True)  # fmt: skip


def sources(scores):
    """Absolute paths of the model, and of the reasoner if there is one, that have these scores."""
    args = scores["args"]
    name_of = name_models(args["model"], args.get("reasoner", ""))  # files older than --reasoner have none
    names = (scores["model"], scores.get("reasoner"))
    return {os.path.abspath(path) for path, name in name_of.items() if name in names}


def to_report(model, scores, per_query, rankings):
    """What report.html takes of a model: its folder, its scores, and answer and rankings of the queries it shows."""
    tasks = scores["tasks"]
    examples = {}
    for name, of_modes in rankings.items():
        examples[name] = {}
        for q in of_modes["disc"]:
            rankings_of_query = {mode: of_queries[q] for mode, of_queries in of_modes.items()}
            examples[name][q] = {"answer": per_query[name]["texts"][q], "rankings": rankings_of_query}
    rows = {name: summary(entry) for name, entry in tasks.items()}
    means = {"mean": mean_summary(tasks.values())} | scores["groups"] | scores["modalities"]
    return {"folder": model, "rows": rows, "means": means, "examples": examples}


def published_comparison(scores):
    """Our scores of the 78 tasks, or of a part of them, in the paper's main table."""
    tasks = {name: scores["tasks"][name] for name in sorted(scores["tasks"].keys() & MMEB.keys())}
    ours = aggregate(tasks)
    columns = ours["groups"] | ours["modalities"] | {"All": ours["overall"]}
    some_mean = next(iter(columns.values()))
    name = result_name(scores["model"], scores["reasoner"])
    return paper_table(name, tasks, columns, [mode for mode in MODES if mode in some_mean])


def about_model(name, backbone, mode):
    """What the leaderboard file says of the model."""
    width = backbone.config.text_config.hidden_size
    return {
        "model_name": name,
        "model_backbone": backbone.config.model_type,
        "model_size": f"{backbone.num_parameters() / 1e9:.2f}B",
        "embedding_dimension": 2 * width if mode == "fused" else width,
    }


def name_models(models, reasoner):
    """{model: its name}, for the reasoner too. A file of answers is named by its stem."""
    others = {}
    if is_file_of_answers(reasoner):
        others[reasoner] = Path(reasoner).stem
    elif reasoner and reasoner not in models:
        models = [*models, reasoner]
    return dict(zip(models, model_names(models))) | others


def model_names(models):
    """The folders' names, with as many of their parents as it takes to tell them apart."""
    parts = [Path(os.path.abspath(model)).parts for model in models]
    if len(set(parts)) < len(parts):
        raise SystemExit(f"--model names a folder twice: {' '.join(models)}")
    depth = 1
    while len({p[-depth:] for p in parts}) < len(parts):
        depth += 1
    return ["-".join(p[-depth:]) for p in parts]


def result_name(model, reasoner):
    """Of the model's results, and of their folder. Both are names; reasoner None: the model itself."""
    return f"{model}-reads-{reasoner}" if reasoner else model


def main(argv=None):
    settings = parse_args(Settings, PRESETS, argv)
    check_settings(settings)
    names = choose_tasks(settings)
    if not names:
        known = known_tasks(settings.root)
        own = f"; to run your own: --tasks {' '.join(known)}" if known else ""
        raise SystemExit(f"no task files in {settings.root}/tasks/test and no files of MMEB in {settings.root}/"
                         f"annotations{own}; the toy world is made by: python data.py toy; MMEB: python eval.py "
                         "--check --root ROOT --tasks image video visdoc")  # fmt: skip
    if settings.check:
        raise SystemExit(0 if check_tasks(names, settings) else 1)
    name_of = name_models(settings.model, settings.reasoner)
    if not settings.export:
        for model in name_of:  # all of them before the first one is embedded
            if not is_file_of_answers(model):
                check_model(model)

    rank, world, device = start_processes()
    if not settings.export:
        hold(settings.out)
    # A process that is done may wait hours for the slowest one.
    group = dist.new_group(backend="gloo", timeout=timedelta(days=7)) if world > 1 else None
    tasks = load_tasks(names, settings, group)
    same_on_all_ranks({f"content of {task.name}": stable_hash(vars(task)) for task in tasks} | asdict(settings))
    inputs = DistinctInputs(tasks, digests_of_media(tasks, group))
    if settings.export:
        if rank == 0:
            export_inputs(settings.export, inputs.keys, inputs.items, settings.blank_image)
        end_processes()
        return

    reasoner = name_of.get(settings.reasoner)
    model_of = {result_name(name_of[model], reasoner): model for model in settings.model}
    if rank == 0:  # now, not after hours: a folder that cannot be written shows at once
        for name in model_of:
            (Path(settings.out) / name).mkdir(parents=True, exist_ok=True)
        write_args(settings.out, settings)

    answers = None
    if settings.reasoner:
        answers = answers_of_reasoner(settings, inputs, reasoner, device, group)
    columns_of_models = []  # per model {task: {column: [x of each query]}}
    reported = {}  # name of a model's results -> what the report takes of it
    for name, model in model_of.items():
        embedder = load_embedder(model, settings, device)
        result = evaluate(embedder, model, tasks, inputs, settings, name_of[model], answers, group)
        if rank == 0:
            scores, per_query, rankings = result
            report(Path(settings.out) / name, scores, per_query, embedder.backbone)
            columns_of_models.append({task: without_texts(columns) for task, columns in per_query.items()})
            reported[name] = to_report(model, scores, per_query, rankings)
    if len(columns_of_models) > 1:
        print(change_table(list(model_of), columns_of_models[0], columns_of_models[-1]), flush=True)
    if rank == 0 and settings.report_queries:
        write_report(Path(settings.out) / "report.html", [vars(task) for task in tasks], reported, open_picture)
    end_processes()


def check_settings(settings):
    check_video_pixels(settings.video_max_pixels, QWEN2_VL)  # of all families the one with the smallest frames
    if settings.export:
        if settings.check:
            raise BadInput("--check and --export: give one of them")
        check_export(settings.export)
    for model in settings.model:
        if settings.reasoner and os.path.abspath(model) == os.path.abspath(settings.reasoner):
            settings.reasoner = model  # spelt another way
    if is_file_of_answers(settings.reasoner):
        if not os.path.isfile(settings.reasoner):
            raise MissingFile(f"--reasoner {settings.reasoner}: no such file; its keys: python eval.py --export FILE")
        if settings.samples:
            raise BadInput("--samples: a file of answers has one of each input; give --samples 0")
    elif os.path.isfile(settings.reasoner):
        raise BadInput(f"--reasoner {settings.reasoner}: neither a model's folder nor a file of lines, NAME.jsonl")


def check_video_pixels(most, family):
    least, _ = family.video_pixels
    if 0 < most < least:
        raise BadInput(f"--video_max_pixels {most}: must be at least {least}, four tokens of the model")


def load_embedder(model, settings, device):
    """In bf16 on a GPU, fp32 on the CPU, with the frame size of --video_max_pixels."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    embedder = Embedder.from_pretrained(model, device=device, dtype=dtype)
    if settings.video_max_pixels:
        check_video_pixels(settings.video_max_pixels, embedder.family)
        least, _ = embedder.family.video_pixels
        embedder.family = replace(embedder.family, video_pixels=(least, settings.video_max_pixels))
    return embedder


def without_texts(columns):
    return {column: x for column, x in columns.items() if column != "texts"}


if __name__ == "__main__":
    run_script(main)
