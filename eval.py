"""Evaluation: embed the queries and candidates of every task, rank, score (paper, experiments).

A model reads every distinct input once, greedily, which gives two embeddings: disc, at <disc_emb> of the
prompt, and gen, at the last <gen_emb> of its own reasoning. With --samples k it reads the queries again, k times
at --temperature. Modes (a task's value is the mean over its queries):

    disc, gen           query and candidates both in this mode
    oracle              per query and metric the better of disc and gen: it looks at the labels, an upper bound
    gen_disc, disc_gen  gen queries against disc candidates and the reverse: two spaces never trained together
    mean                normalised mean of a query's k sampled gen embeddings; greedy gen candidates
    pass@j              the chance that one of j sampled queries has a right candidate first; greedy gen candidates;
                        unbiased: 1 - C(k-c, j) / C(k, j) with c hits in k samples

oracle has two tries where gen has one; its fair comparison is pass@2, the oracle of two gen samples.

Departures from the official evaluation:
1. disc is read exactly at <disc_emb>; the official code reads the token behind it.
2. Greedy decoding; there the checkpoint's generation_config decides (Qwen2-VL's samples at low temperature).
3. A generation without <gen_emb> is a miss: such a query has 0 in every metric and such a candidate is left out of
   the ranking. The official code reads another token in its place.
4. Scores are float64 dot products in a stable order (float32 and an unstable sort there): candidates with equal
   embeddings keep the order of the list, so a model that sees no difference ranks the first one first.
5. Grades stay with their labels; the official code re-orders one and not the other, which moves ndcg of 3 tasks.
6. Inputs with equal content, in any task, are embedded once.

Run (without arguments: the toy preset, on any device):
    python eval.py                                                            # 1 CPU: runs/toy/sft, runs/toy/rl
    python eval.py --preset 2b --model runs/2b/rl --root data/MMEB            # 1 GPU
    torchrun --nproc_per_node 8 eval.py --preset 2b --model runs/2b/rl --root data/MMEB              # 8 GPUs
The result does not depend on the number of processes. Writes OUT/args.json, OUT/<model name>/scores.json and
per_query.json; with several models it also prints the change from the first to the last.

Shapes: N distinct inputs, Q queries and C candidates of a task, S samples, D dimensions.
"""

import json
import math
import time
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from statistics import fmean
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from data import content_key
from model import Embedder, check_model, parse_args, setting, stable_hash, start_processes, write_args, write_json

KS = (1, 5, 10)
NAMES = ("hit", "ndcg_linear", "ndcg_exponential", "precision", "recall", "f1", "map", "mrr")
METRICS = [f"{name}@{k}" for name in NAMES for k in KS]
MODES = ("disc", "gen", "oracle", "gen_disc", "disc_gen", "mean")

# --------------------------------------------------------------------------------------------------------------
# Settings

PRESETS = {
    "toy": dict(model=["runs/toy/sft", "runs/toy/rl"], root="runs/toy/data", out="runs/toy/eval", samples=16,
                max_new_tokens=128, batch_size=64),
    "2b": dict(model=["runs/2b/rl"], root="data/MMEB", out="runs/2b/eval", samples=0,
               max_new_tokens=8192, batch_size=8),  # 8,192: the official command, the paper gives none
    "7b": dict(model=["runs/7b/rl"], root="data/MMEB", out="runs/7b/eval", samples=0,
               max_new_tokens=8192, batch_size=4),  # copies 2b: unknown in the paper
}


@dataclass
class Settings:
    preset: Literal["toy", "2b", "7b"] = setting("toy", "read first, sets the defaults")
    model: list[str] = field(default_factory=list, metadata={"help": "model folders or hub ids, compared in order"})
    tasks: list[str] = field(default_factory=list, metadata={"help": "task names; none: all of ROOT/tasks/test"})
    root: str = setting("", "folder of the data: tasks/NAME.json, and where media paths start")
    out: str = setting("", "results go to OUT/<model name>/")
    samples: int = setting(0, "samples per query for mean and pass@k; 0 leaves them out")
    temperature: float = setting(1.0, "of the samples (unknown in the paper; RL samples at 1)")
    max_new_tokens: int = setting(512, "longest reasoning; one cut off here counts as invalid")
    batch_size: int = setting(8, "generations at once in one process: speed and memory only")
    seed: int = setting(0, "of the samples")
    blank_image: bool = setting(True, "put a blank picture on inputs without media")


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


def load_task(name, root) -> Task:
    """Reads ROOT/tasks/NAME.json; media paths come back joined to ROOT. Nothing else knows how a task is stored.

    A label that is not a candidate is allowed: it cannot be hit and stays in the denominators.
    """
    path = Path(root) / "tasks" / f"{name}.json"
    if not path.is_file():
        known = ", ".join(known_tasks(root)) or "none (is --root right?)"
        raise FileNotFoundError(f"no task {name!r}, {path} does not exist; known tasks: {known}")
    raw = json.loads(path.read_text(encoding="utf-8"))

    def located(item):
        media = {kind: [str(Path(root) / p) for p in item.get(kind) or []] for kind in ("images", "video")}
        return {"text": item.get("text") or "", **media}

    def check(right, message):
        if not right:
            raise ValueError(f"{path}: {message}")

    fields = ("modality", "group", "eval_type", "main_metric", "queries", "candidates")
    check(all(key in raw for key in fields), f"lacks {[key for key in fields if key not in raw]}")
    check(raw["eval_type"] in ("global", "local"), f"eval_type is {raw['eval_type']!r}, not global or local")
    check(raw["main_metric"] in METRICS, f"main_metric {raw['main_metric']!r} is none of {', '.join(METRICS)}")
    check(raw["queries"] and raw["candidates"], "has no queries or no candidates")
    queries = []
    for i, query in enumerate(raw["queries"]):
        labels, grades, own = as_labels(query["labels"]), query.get("grades"), query.get("candidates")
        check(grades is None or len(grades) == len(labels), f"query {i} has not one grade per label")
        if raw["eval_type"] == "local":
            check(own, f"query {i} of a local task has no candidates")
            unknown = [key for key in own if key not in raw["candidates"]]
            check(not unknown, f"query {i} ranks keys that are no candidates of the task: {unknown[:3]}")
        queries.append({"input": located(query["input"]), "labels": labels, "grades": grades, "candidates": own})
    candidates = {key: located(item) for key, item in raw["candidates"].items()}
    return Task(name, raw["modality"], raw["group"], raw["eval_type"], raw["main_metric"], queries, candidates)


def as_labels(labels):
    return [labels] if isinstance(labels, (str, int)) else list(labels)


# --------------------------------------------------------------------------------------------------------------
# Embedding


def embed_all(embedder, inputs, settings, *, samples=0, results=None, title=""):
    """Embeds the inputs, shared out over the processes; returns arrays on process 0, None on the others.

    samples 0: both embeddings, greedy; samples k: k gen embeddings of each. What one call to embed() holds, and its
    seed, do not depend on the number of processes: process r makes the calls r, r + world, ...
    Arrays: disc [N, D] (greedy only), gen [N, S, D], valid [N, S], tokens [N, S], texts [N, S],
    seconds [N] of one process. results: the process group that brings them together.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mode = dict(mode="gen", samples=samples, temperature=settings.temperature) if samples else dict(mode="both")
    # Long inputs first: like beside like, and if memory runs out it does so at once.
    order = sorted(range(len(inputs)), key=lambda n: [-len(inputs[n][x]) for x in ("video", "images", "text")])
    size = max(1, 16 * settings.batch_size // max(1, samples))  # long enough to keep the decoding slots full
    calls = [order[start : start + size] for start in range(0, len(order), size)]
    parts = []
    bar = tqdm(total=len(inputs), desc=title, unit="input", disable=rank > 0)
    for c in range(rank, len(calls), world):
        start = time.time()
        out = embedder.embed([inputs[n] for n in calls[c]], **mode, seed=stable_hash(settings.seed, c),
                             max_new_tokens=settings.max_new_tokens, batch_size=settings.batch_size,
                             blank_image=settings.blank_image)  # fmt: skip
        part = {"gen": out.gen.cpu().numpy(), "valid": out.valid.cpu().numpy(),
                "tokens": out.num_tokens.cpu().numpy(), "texts": np.array(out.texts, dtype=object),
                "seconds": np.full(len(calls[c]), (time.time() - start) / len(calls[c]))}  # fmt: skip
        parts.append((calls[c], part if samples else part | {"disc": out.disc.cpu().numpy()}))
        bar.update(sum(len(rows) for rows in calls[c : c + world]))  # process 0 speaks for all
    bar.close()
    if world > 1:
        gathered = [None] * world if rank == 0 else None
        dist.gather_object(parts, gathered, dst=0, group=results)
        if rank > 0:
            return None
        parts = [part for of_process in gathered for part in of_process]
    rows = np.concatenate([rows for rows, _ in parts])
    assert sorted(rows) == list(range(len(inputs))), "inputs were lost or doubled between the processes"
    back = np.argsort(rows)
    return {name: np.concatenate([part[name] for _, part in parts])[back] for name in parts[0][1]}


# --------------------------------------------------------------------------------------------------------------
# Ranking and metrics


def rank_candidates(queries, candidates, query_ok, candidate_ok, lists=None, depth=KS[-1]):
    """The best `depth` candidates of each query, as indices; none for a query that is not ok.

    queries [Q, D], candidates [C, D], bool [Q] and [C]; lists: the indices each query ranks (repeats stay), None:
    all. A candidate that is not ok is never listed. Equal scores keep the order of the list. Candidates with
    bit-equal embeddings are multiplied once, because a matrix product may round two equal columns differently.
    """
    seen = {}
    column = np.array([seen.setdefault(c.tobytes(), len(seen)) for c in candidates])  # [C]
    distinct = np.stack([np.frombuffer(c, candidates.dtype) for c in seen]).astype(np.float64)  # [U, D]
    everything, ranked = np.flatnonzero(candidate_ok), []
    block = max(1, 20_000_000 // len(distinct))  # queries at once: 160 MB of scores
    for start in range(0, len(queries), block):
        scores = queries[start : start + block].astype(np.float64) @ distinct.T  # [block, U]
        for q, row in enumerate(scores, start):
            own = everything if lists is None else lists[q][candidate_ok[lists[q]]]
            best = np.argsort(-row[column[own]], kind="stable")[:depth]
            ranked.append(own[best].tolist() if query_ok[q] else [])
    return ranked


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


def pass_at_k(n, c, k):
    """The chance that k of n samples, drawn without replacement, contain one of the c hits."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def mean_embedding(gen, valid):
    """[Q, S, D], bool [Q, S] -> [Q, D]: normalised mean of the valid samples, zeros where there are none."""
    total = (gen.astype(np.float64) * valid[:, :, None]).sum(1)
    return total / np.linalg.norm(total, axis=1, keepdims=True).clip(min=1e-12)


def score_task(task, queries, candidates, sampled=None):
    """Scores of all modes from the arrays of embed_all(), their rows in the order of the task.

    Returns ({mode: {metric: mean}}, "pass@k" among the modes, and {column: main metric or pass@k of each query}).
    """
    keys, lists = list(task.candidates), None
    if task.eval_type == "local":
        index = {key: c for c, key in enumerate(keys)}
        lists = [np.array([index[key] for key in query["candidates"]]) for query in task.queries]
    q_disc, q_gen, q_ok = queries["disc"], queries["gen"][:, 0], queries["valid"][:, 0]
    c_disc, c_gen, c_ok = candidates["disc"], candidates["gen"][:, 0], candidates["valid"][:, 0]
    every_q, every_c = np.ones_like(q_ok), np.ones_like(c_ok)  # disc is always there

    def measure(q, c, q_ok, c_ok):
        """Per query {metric: x}; all zero, recall of no labels too, where the query has no embedding."""
        ranked = rank_candidates(q, c, q_ok, c_ok, lists)
        return [ranking_metrics([keys[i] for i in best], query["labels"], query["grades"]) if ok
                else dict.fromkeys(METRICS, 0.0)
                for best, query, ok in zip(ranked, task.queries, q_ok)]  # fmt: skip

    disc, gen = measure(q_disc, c_disc, every_q, every_c), measure(q_gen, c_gen, q_ok, c_ok)
    modes = {
        "disc": disc,
        "gen": gen,
        "oracle": [{m: max(d[m], g[m]) for m in METRICS} for d, g in zip(disc, gen)],
        "gen_disc": measure(q_gen, c_disc, q_ok, every_c),
        "disc_gen": measure(q_disc, c_gen, every_q, c_ok),
    }
    if sampled:
        valid = sampled["valid"]
        modes["mean"] = measure(mean_embedding(sampled["gen"], valid), c_gen, valid.any(1), c_ok)
    entry = {mode: {m: fmean(x[m] for x in per_query) for m in METRICS} for mode, per_query in modes.items()}
    columns = {mode: [x[task.main_metric] for x in per_query] for mode, per_query in modes.items()}
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
    """A row of the report: the main metric in every mode, pass@k, share of invalid generations, tokens per input."""
    row = {mode: entry[mode][entry["main_metric"]] for mode in MODES if mode in entry}
    row |= {f"pass@{k}": x for k, x in entry.get("pass@k", {}).items()}
    if "invalid" in entry:
        row["invalid"] = entry["invalid"] / (entry["num_queries"] + entry["num_candidates"])
        row["tokens"] = entry["tokens_per_input"]
    return row


def aggregate(tasks):
    """Plain means over tasks of their summaries, in groups, in modalities and overall (the paper's "All")."""

    def mean(entries):
        rows = [summary(entry) for entry in entries]
        return {column: fmean(row[column] for row in rows) for column in rows[0]}

    def means_by(key):
        values = dict.fromkeys(entry[key] for entry in tasks.values())
        return {value: mean([entry for entry in tasks.values() if entry[key] == value]) for value in values}

    return {"groups": means_by("group"), "modalities": means_by("modality"), "overall": mean(tasks.values())}


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
    rows = {name: summary(entry) for name, entry in scores["tasks"].items()}
    for kind in ("groups", "modalities"):
        if len(scores[kind]) > 1:
            rows |= {f"= {name}": row for name, row in scores[kind].items()}
    rows["= mean"] = mean = scores["overall"]
    cells = [[name, *(f"{row[c] * (1 if c == 'tokens' else 100):.1f}" for c in mean)] for name, row in rows.items()]
    text = f"\n{scores['model']}: main metric and invalid generations in %, tokens per input\n"
    text += text_table([["task", *mean], *cells])
    if "pass@2" in mean:
        text += (f"\noracle of disc and gen {100 * mean['oracle']:.1f}, "
                 f"oracle of two gen samples (pass@2) {100 * mean['pass@2']:.1f}")  # fmt: skip
    return text


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
    parts = [Path(model).absolute().parts for model in models]
    if len(set(parts)) < len(parts):
        raise SystemExit(f"--model names a folder twice: {' '.join(models)}")
    depth = 1
    while len({p[-depth:] for p in parts}) < len(parts):
        depth += 1
    return ["-".join(p[-depth:]) for p in parts]


# --------------------------------------------------------------------------------------------------------------
# Main


def evaluate(embedder, tasks, settings, name, results=None):
    """(content of scores.json, content of per_query.json) on process 0, None on the others."""
    where, inputs = {}, []  # content -> row of inputs

    def rows_of(items):
        for item in items:
            if where.setdefault(key(item), len(inputs)) == len(inputs):
                inputs.append(item)
        return np.array([where[key(item)] for item in items])

    def key(item):
        return content_key(item["text"], item["images"], item["video"])

    query_rows = [rows_of([query["input"] for query in task.queries]) for task in tasks]
    num_queries = len(inputs)  # queries come first
    candidate_rows = [rows_of(task.candidates.values()) for task in tasks]
    greedy = embed_all(embedder, inputs, settings, results=results, title=f"{name} greedy")
    sampled = None
    if settings.samples:
        sampled = embed_all(embedder, inputs[:num_queries], settings, samples=settings.samples, results=results,
                            title=f"{name} queries x {settings.samples}")  # fmt: skip
    if greedy is None:
        return None

    def take(arrays, rows):
        return arrays and {key: arrays[key][rows] for key in ("disc", "gen", "valid") if key in arrays}

    scores, per_query = {}, {}
    for task, q, c in zip(tasks, query_rows, candidate_rows):
        entry, columns = score_task(task, take(greedy, q), take(greedy, c), take(sampled, q))
        both = np.concatenate([q, c])
        scores[task.name] = {
            "modality": task.modality, "group": task.group, "main_metric": task.main_metric,
            "num_queries": len(q), "num_candidates": len(c), **entry,
            "invalid": int((~greedy["valid"][both]).sum()),  # greedy generations without <gen_emb>
            "tokens_per_input": float(greedy["tokens"][both].mean()),  # generated, greedy
            "seconds": float(greedy["seconds"][np.unique(both)].sum()),  # of one process, greedy, each input once
        }  # fmt: skip
        per_query[task.name] = columns | {"texts": greedy["texts"][q, 0].tolist()}
    return {"model": name, "args": asdict(settings), "tasks": scores, **aggregate(scores)}, per_query


def main(argv=None):
    settings = parse_args(Settings, PRESETS, argv)
    if settings.samples and settings.temperature <= 0:
        raise SystemExit("--samples needs a --temperature above 0")
    task_names = settings.tasks or [name for name in known_tasks(settings.root) if name.startswith("test/")]
    if not task_names:
        raise SystemExit(f"no task files in {settings.root}/tasks/test; the toy world is made by: python data.py toy")
    tasks = [load_task(name, settings.root) for name in dict.fromkeys(task_names)]
    for model in settings.model:  # all of them before the first one is embedded
        check_model(model)
    names = model_names(settings.model)

    rank, world, device = start_processes()
    # Results travel as main memory, over gloo; a process that is done may wait hours for the slowest one.
    results = dist.new_group(backend="gloo", timeout=timedelta(days=7)) if world > 1 else None
    if rank == 0:  # now, not after hours: a folder that cannot be written shows at once
        for name in names:
            (Path(settings.out) / name).mkdir(parents=True, exist_ok=True)
        write_args(settings.out, settings)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    every = []  # per model {task: {column: [x of each query]}}
    for model, name in zip(settings.model, names):
        embedder = Embedder.from_pretrained(model, device=device, dtype=dtype)
        result = evaluate(embedder, tasks, settings, name, results)
        if rank > 0:
            continue
        scores, per_query = result
        folder = Path(settings.out) / name
        write_json(folder / "scores.json", scores)
        write_json(folder / "per_query.json", per_query)
        print(score_table(scores), flush=True)
        every.append({task: {c: x for c, x in row.items() if c != "texts"} for task, row in per_query.items()})
    if len(every) > 1:
        print(change_table(names, every[0], every[-1]), flush=True)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
