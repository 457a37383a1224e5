"""Evaluation: embed the inputs, rank the candidates of each query, score the rankings (the paper's experiments).

The tasks are the 78 of MMEB-V2, which include the 36 of MMEB-V1, and your own. A model reads every distinct input once
and writes one greedy answer, which gives two embeddings: disc at <disc_emb> of the prompt, gen at the last <gen_emb>
of the answer. With --samples S it also samples S answers to each query at --temperature. The value of a task is the
mean over its queries, in every mode:

    disc, gen           both queries and candidates in this mode
    fused               the mean of both cosines: one dot product of [disc, gen] / sqrt(2); not in the paper
    oracle              for each query and metric the better of disc and gen. It uses the labels, so it is an upper
                        bound for choosing one of the two. fused adds both cosines and can exceed it.
    gen_disc, disc_gen  gen queries against disc candidates and the reverse: aligned only after sft.py --cross_weight
    pass@k              the probability that at least one of k sampled answers to a query ranks a right candidate first.
                        Candidates: greedy gen. If c of S samples do, the unbiased estimate is 1 - C(S-c, k) / C(S, k).

oracle has two tries and gen has one, so compare oracle with pass@2. The difference between gen and pass@1 is the cost
of sampling at --temperature.

Departures from the official evaluation:
1. disc is read exactly at <disc_emb>. The official code reads the next token.
2. Decoding is greedy. In the official code the checkpoint's generation_config decides (Qwen2-VL's samples).
3. An answer without <gen_emb> is a miss in gen: its query has 0 in every metric, and its candidate is not ranked. In
   fused, the gen half is zero, so disc alone ranks such a query, and such a candidate ranks low. An input with an
   unreadable image is a miss in all modes. The official code reads another token, or drops the image.
4. Scores are float64 dot products, sorted by a stable sort (the official code: float32, unstable). Candidates with
   equal embeddings keep the order of the list, so a model that sees no difference ranks the first candidate first.
5. Grades stay with their labels. The official code reorders the labels only, which changes ndcg in 3 tasks;
   scores.json has its value too, as "published_ndcg".
6. Inputs with equal content (text and bytes of the media) are embedded once, also across tasks.
7. Video frames have at most 32 tokens (Qwen2-VL: 25,088 pixels), as in training. The official evaluation has no limit
   (--video_max_pixels). MomentSeeker's clips of more than 8 saved frames are reduced to 8.

With --reasoner the answers come from another model or from a file (support/reasoner.py). Embeddings are cached in
OUT/<model name>/cache (support/cache.py). All media are hashed at every start, each by one rank (an estimated 50 GB for
MMEB-V2), because size and time of a file do not show every change.

Run (without arguments: the toy preset, on any device):
    python eval.py                                                            # 1 CPU: runs/toy/sft, runs/toy/rl
    python eval.py --check --root data/MMEB                                   # which files are missing; how to get them
    torchrun --nproc_per_node 8 eval.py --preset 2b --model runs/2b/rl --root data/MMEB              # 8 GPUs
    python eval.py --model runs/toy/sft --reasoner runs/toy/rl                # rl writes, sft embeds
The result does not depend on the number of ranks (they share the disk). Writes OUT/args.json, OUT/report.html and, per
model, OUT/<model name>/scores.json, per_query.json and leaderboard_<mode>.json.

Shapes: N distinct inputs, Q queries and C candidates of a task, S samples, D dimensions.
"""

import math
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Literal, NamedTuple

import numpy as np
import torch.distributed as dist

from support import reasoner, report
from support.backbones import QWEN2_VL
from support.cache import (
    DistinctInputs,
    EmbeddingCache,
    check_video_pixels,
    generation_metrics,
    load_embedder,
    print_misses,
    take,
    usable_disc,
    usable_gen,
)
from support.distributed import end_processes, processes, start_processes
from support.files import one_or_more
from support.mmeb import GRADED, MMEB, check_files, load_mmeb, tasks_of_column
from support.passes import PASS_TOKENS
from support.program import BadInput, MissingFile, run_script
from support.settings import hold, parse_args, setting, write_args
from support.tasks import choose_tasks, known_tasks, load_on_all_ranks, load_own_task
from support.weights import check_model

KS = (1, 5, 10)
NAMES = ("hit", "ndcg_linear", "ndcg_exponential", "precision", "recall", "f1", "map", "mrr")
METRICS = [f"{name}@{k}" for name in NAMES for k in KS]
MODES = ("disc", "gen", "fused", "oracle", "gen_disc", "disc_gen")

# --------------------------------------------------------------------------------------------------------------
# Settings

PRESETS = {
    "toy": dict(model=["runs/toy/sft", "runs/toy/rl"], root="runs/toy/data", out="runs/toy/eval", samples=16,
                max_new_tokens=128, slots=64, workers=1),
    "2b": dict(model=["runs/2b/rl"], root="data/MMEB", out="runs/2b/eval", samples=0,
               max_new_tokens=8192, slots=64),  # 8,192: the official command; the paper gives no value
    "7b": dict(model=["runs/7b/rl"], root="data/MMEB", out="runs/7b/eval", samples=0,
               max_new_tokens=8192, slots=32),  # copies 2b: unknown in the paper
}


@dataclass
class Settings:
    preset: Literal["toy", "2b", "7b"] = setting("toy", "read first, sets the defaults")
    model: list[str] = field(default_factory=list, metadata={"help": "model folders or hub ids, compared in order"})
    tasks: list[str] = field(default_factory=list, metadata={
        "help": "tasks, groups (I-QA) or modalities (image); default: ROOT/tasks/test and what ROOT/annotations has"})
    root: str = setting("", "folder of the data: tasks/NAME.json or annotations/; media paths are relative to it")
    check: bool = setting(False, "only check whether the tasks' files exist, without a model")
    export: str = setting("", "only write the tasks' inputs to this .jsonl file, for --reasoner, without a model")
    reasoner: str = setting("", "whose answers the models read: a model or a .jsonl file; default: each its own")
    out: str = setting("", "results are written to OUT/<model name>/, or to OUT/<model name>-reads-<reasoner>/")
    samples: int = setting(0, "sampled answers per query, for pass@k; 0: no pass@k")
    temperature: float = setting(1.0, "of the samples (unknown in the paper; RL samples at 1)")
    max_new_tokens: int = setting(512, "longest answer in tokens; an answer cut before its <gen_emb> is invalid")
    slots: int = setting(8, "completions decoded at once by each rank; changes only memory and time")
    pass_tokens: int = setting(PASS_TOKENS, "most tokens of a pass, pads included; changes only memory and time")
    seed: int = setting(0, "of the samples")
    report_queries: int = setting(8, "queries of a task in OUT/report.html, fewer with many tasks; 0: no report")
    blank_image: bool = setting(True, "put a blank image on inputs without media")
    video_max_pixels: int = setting(0, "of a video frame; 0: 32 tokens, as in training; official: no limit")
    vidore_instruction: bool = setting(True, "false: ViDoRe and OOD without instructions, as in tables before 2025-11")
    ablate: Literal["none", "trace"] = setting("none", "trace: embed again without, and with another input's reasoning")
    save_every: int = setting(256, "inputs per rank that a killed run has to embed again")
    workers: int = setting(4, "background processes per rank that read and resize images")


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
    """Return the task of ROOT/tasks/NAME.json or, for one of the 78, of the published files.

    Media paths are joined to ROOT. A label that is no candidate cannot be hit and counts in the denominators.
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


# --------------------------------------------------------------------------------------------------------------
# 1. Embed: the distinct inputs of all tasks


def embed(cache, inputs, settings, answers=None):
    """Return three results of support/cache.py `collect`: greedy ones of all inputs, sampled ones of the queries (or
    None), and {kind: greedy ones with ablated reasoning}. Ranks other than 0 get None."""
    everywhere = settings.ablate == "trace"  # all ranks ablate the greedy answers
    sampled = None
    if answers:
        greedy = reasoner.embed_answers(cache, inputs.keys, inputs.items, answers.greedy, everywhere)
        if settings.samples:
            sampled = reasoner.embed_answers(cache, inputs.query_keys, inputs.query_items, answers.sampled)
    else:
        greedy = cache.embed("greedy", inputs.keys, inputs.items, everywhere=everywhere)
        if settings.samples:
            sampled = cache.embed("samples", inputs.query_keys, inputs.query_items, settings.samples)
    ablated = {}
    if settings.ablate == "trace":
        ablated = reasoner.embed_ablated(cache, inputs.keys, inputs.items, greedy)
    return greedy, sampled, ablated


# --------------------------------------------------------------------------------------------------------------
# 2. Rank


def score_candidates(queries, candidates, query_ok, candidate_ok, lists=None):
    """Yield per query the indices of the candidates that it ranks, and their scores in float64.

    queries [Q, D], candidates [C, D]; ok: bool [Q] and [C], which have an embedding. lists: the indices that each
    query ranks, repeats included; None: all. A query without a finite embedding ranks nothing, and such a candidate is
    never ranked. Bit-equal candidates are multiplied once: a matrix product may round two equal columns differently.
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


def best_first(listed, scores, depth=KS[-1]):
    """Return the best `depth` candidates. Equal scores keep the order of the list."""
    return listed[np.argsort(-scores, kind="stable")[:depth]]


def rank_candidates(queries, candidates, query_ok, candidate_ok, lists=None, depth=KS[-1]):
    """Return the best `depth` candidates of each query, as indices. Arguments: see score_candidates."""
    scored = score_candidates(queries, candidates, query_ok, candidate_ok, lists)
    return [best_first(listed, scores, depth).tolist() for listed, scores in scored]


# --------------------------------------------------------------------------------------------------------------
# 3. Score: the metrics of one query


def ranking_metrics(ranked, labels, grades=None, ks=KS):
    """Return the metrics of ONE query as MMEB defines them: {"hit@1": x, "hit@5": x, ...}.

    ranked: keys, best first. labels: the right keys (a bare key is one label). grades: one per label; None: all 1.
    A label given twice counts once, with its higher grade. A key ranked twice counts once in hit, precision and
    recall, but each time in map and ndcg, as in the published scores. Precision divides by k even if fewer are ranked.
    """
    grade_of = grades_by_label(one_or_more(labels), grades)
    best_grades = sorted(grade_of.values(), reverse=True)
    out = {}
    for k in ks:
        top = ranked[:k]
        hits = len(grade_of.keys() & set(top))
        ranks = [rank for rank, key in enumerate(top, 1) if key in grade_of]  # of the right keys, from 1
        top_grades = [grade_of.get(key, 0) for key in top]
        out["hit", k] = float(hits > 0)
        out["ndcg_linear", k] = ndcg(top_grades, best_grades[:k])
        out["ndcg_exponential", k] = ndcg(exponential(top_grades), exponential(best_grades[:k]))
        precision = hits / k
        recall = hits / len(grade_of) if grade_of else 1.0
        out["precision", k] = precision
        out["recall", k] = recall
        out["f1", k] = 2 * precision * recall / (precision + recall) if hits else 0.0
        precisions = [count / rank for count, rank in enumerate(ranks, 1)]
        out["map", k] = sum(precisions) / max(1, min(len(grade_of), k))
        out["mrr", k] = 1 / ranks[0] if ranks else 0.0
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


def ndcg(gains, ideal):
    """Return the dcg of gains in the order of the ranking, divided by that of the best possible order."""
    best = dcg(ideal)
    return dcg(gains) / best if best > 0 else 0.0


def dcg(gains):
    return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains, 1))


def exponential(grades):
    return [2.0**grade - 1 for grade in grades]


def pass_at_k(n, c, k):
    """Return the probability that k of n samples (S above), drawn without replacement, include one of the c hits."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


# --------------------------------------------------------------------------------------------------------------
# The modes of a task

GREEDY_MODES = {  # mode -> embedding of the queries, embedding of the candidates; oracle combines the first two
    "disc": ("disc", "disc"),
    "gen": ("gen", "gen"),
    "fused": ("fused", "fused"),
    "gen_disc": ("gen", "disc"),
    "disc_gen": ("disc", "gen"),
}


class Side(NamedTuple):
    """The queries or the candidates of a task in one kind of embedding."""

    embeddings: np.ndarray  # [N, D]
    ok: np.ndarray  # bool [N]: which rows have an embedding


class Ranking(NamedTuple):
    """A task in one mode."""

    best: list[list]  # per query the keys of its best candidates, best first
    ok: np.ndarray  # bool [Q]: the query has an embedding
    tied: int  # number of queries for which the order of the list decides
    shown: dict  # query of the report -> ranking_to_show()


def score_task(task, queries, candidates, sampled=None, shown=()):
    """Score all modes of a task. queries, candidates, sampled: its rows in the results of `embed`. Return
    - {mode: {metric: mean}}, with "pass@k" and "tied": {mode: number of queries that the order of the list decides},
    - {column: main metric or pass@k of each query},
    - {mode: {query of `shown`: its ranking}}; shown: indices of the queries in the report.
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
    if task.name in GRADED:
        entry["published_ndcg"] = {mode: published_ndcg(task, ranking) for mode, ranking in rankings.items()}
    if sampled:
        curve = pass_curve(task, sampled, candidate_sides["gen"], lists)
        entry["pass@k"] = {k: fmean(chances) for k, chances in curve.items()}
        columns |= {f"pass@{k}": chances for k, chances in curve.items()}
    return entry, columns, {mode: rankings[mode].shown for mode in ("disc", "gen", "fused")}


def candidate_lists(task):
    """Return per query of a local task the indices of the candidates it ranks; None: all."""
    if task.eval_type == "global":
        return None
    index = {key: c for c, key in enumerate(task.candidates)}
    return [np.array([index[key] for key in query["candidates"]]) for query in task.queries]


def greedy_sides(arrays):
    disc = Side(arrays["disc"], usable_disc(arrays))
    gen = Side(arrays["gen"][:, 0], usable_gen(arrays)[:, 0])
    return {"disc": disc, "gen": gen, "fused": fuse(disc, gen)}


def fuse(disc, gen):
    """Return [disc, gen] / sqrt(2), [N, 2D]: its dot product is the mean of both cosines. The half of a missing gen
    embedding is zero. An input without a disc embedding has no fused one."""
    gen_or_zero = np.where(gen.ok[:, None], gen.embeddings, 0)
    return Side(np.concatenate([disc.embeddings, gen_or_zero], axis=1) / math.sqrt(2), disc.ok)


def rank_task(task, queries, candidates, lists, shown=()):
    """Return the Ranking of a task. queries and candidates: Sides."""
    keys = list(task.candidates)
    best = []
    tied = 0
    to_show = {}
    scored = score_candidates(queries.embeddings, candidates.embeddings, queries.ok, candidates.ok, lists)
    for q, (query, (listed, scores)) in enumerate(zip(task.queries, scored)):
        best.append([keys[i] for i in best_first(listed, scores)])
        tied += report.order_decides(query["labels"], keys, listed, scores)
        if q in shown:
            to_show[q] = report.ranking_to_show(query["labels"], keys, listed, scores)
    return Ranking(best, queries.ok, tied, to_show)


def measure(task, ranking):
    """Return {metric: x} of each query. Without an embedding all are 0, even the recall of a query without labels."""
    measured = []
    for query, best, ok in zip(task.queries, ranking.best, ranking.ok):
        if ok:
            measured.append(ranking_metrics(best, query["labels"], query["grades"]))
        else:
            measured.append(dict.fromkeys(METRICS, 0.0))
    return measured


def oracle(disc, gen):
    """Return per query and metric the better of the two."""
    return [{m: max(d[m], g[m]) for m in METRICS} for d, g in zip(disc, gen)]


def published_ndcg(task, ranking):
    """Return the mean ndcg as published: labels pass through a set and grades do not, so grades land on wrong labels.
    (The order of a set of integer keys is always the same.)"""
    mixed = [query | {"labels": list(set(query["labels"]))} for query in task.queries]
    metrics = means(measure(replace(task, queries=mixed), ranking))
    return {name: x for name, x in metrics.items() if name.startswith("ndcg")}


def pass_curve(task, sampled, candidates, lists):
    """Return {k: pass@k of each query} for k = 1, 2, 4, ... up to S. A sample is a hit if it ranks a label first."""
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


# --------------------------------------------------------------------------------------------------------------
# Means


def means(measured):
    """[{metric: x}] -> {metric: mean}"""
    return {metric: fmean(metrics[metric] for metrics in measured) for metric in measured[0]}


def summary(entry):
    """Return a row of the printed table: the main metric in every mode, pass@k, share of invalid answers, cost."""
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
    """Return plain means over tasks of their summaries: by group, by modality and overall (the paper's "All").

    Some of the 78 have no overall, because it would look like a published value.
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
# Main


def evaluate(cache, tasks, inputs, settings, answers=None):
    """Embed the inputs of all tasks and score the tasks. Return a Result on rank 0, None on the others."""
    greedy, sampled, ablated = embed(cache, inputs, settings, answers)
    if processes()[0] > 0:
        return None

    scores = {}
    per_query = {}
    rankings = {}
    for task, q, c in zip(tasks, inputs.query_rows, inputs.candidate_rows):
        shown = report.sampled_queries(len(q), len(tasks), settings.report_queries)
        scored = score_task(task, take(greedy, q), take(greedy, c), take(sampled, q), shown)
        entry, columns, rankings[task.name] = scored
        rows = np.concatenate([q, c])
        about_task = {key: getattr(task, key) for key in ("modality", "group", "main_metric")}
        about_task |= {"num_queries": len(q), "num_candidates": len(c)}
        scores[task.name] = about_task | entry | generation_metrics(greedy, rows)
        for kind, arrays in ablated.items():
            entry, *_ = score_task(task, take(arrays, q), take(arrays, c))
            changed = {"gen": entry["gen"], "cosine": reasoner.mean_cosine(greedy, arrays, rows)}
            scores[task.name].setdefault("ablate", {})[kind] = changed
        per_query[task.name] = columns | {"texts": [greedy["texts"][n][0] for n in q]}
    print_misses(cache.name, greedy)
    about = {"model": cache.name, "reasoner": answers.reasoner if answers else None, "args": asdict(settings)}
    published = {name: scores[name] for name in sorted(scores.keys() & MMEB.keys())}
    return report.Result(
        scores=about | {"tasks": scores, **aggregate(scores), "encoded": cache.encoded},
        per_query=per_query,
        rankings=rankings,
        rows={name: summary(entry) for name, entry in scores.items()},
        mean=mean_summary(scores.values()),
        published=aggregate(published) if published else {},
    )


def main(argv=None):
    settings = parse_args(Settings, PRESETS, argv)
    check_video_pixels(settings.video_max_pixels, QWEN2_VL)  # the family with the smallest frames
    reasoner.check_reasoner(settings)
    names = choose_tasks(settings)
    load = partial(load_task, root=settings.root, vidore_instruction=settings.vidore_instruction)
    if settings.check:
        raise SystemExit(0 if check_files(names, load, settings.root) else 1)
    name_of = report.name_models(settings.model, settings.reasoner)
    rank, world, device = start_processes()
    if not settings.export:
        for model in name_of:  # all models, before the first one embeds
            if not reasoner.is_file_of_answers(model):
                check_model(model)
        hold(settings.out)
    # A rank that is done may wait hours for the slowest one.
    group = dist.new_group(backend="gloo", timeout=timedelta(days=7)) if world > 1 else None
    tasks = load_on_all_ranks(names, load, asdict(settings), group)
    inputs = DistinctInputs(tasks, group)
    if settings.export:
        if rank == 0:
            reasoner.export_inputs(settings.export, inputs.keys, inputs.items, settings.blank_image)
        end_processes()
        return

    if rank == 0:
        write_args(settings.out, settings)
    source = name_of.get(settings.reasoner)  # None: each model reads its own answers
    model_of = {report.result_name(name_of[model], source): model for model in settings.model}
    answers = None
    if source:
        answers = reasoner.answers_of_reasoner(settings, inputs, source, device, group)
    results = {}
    for name, model in model_of.items():
        embedder = load_embedder(model, settings, device)
        cache = EmbeddingCache(embedder, model, settings, name_of[model], group)
        results[name] = evaluate(cache, tasks, inputs, settings, answers)
        if rank == 0:
            report.write_scores(Path(settings.out) / name, results[name], embedder.backbone)
    if rank == 0:
        report.write_comparison(settings, tasks, results, model_of)
    end_processes()


if __name__ == "__main__":
    run_script(main)
