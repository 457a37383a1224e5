"""What eval.py writes and prints: the files of a model, its tables, the change between two models, and report.html.

All functions take plain values: the content of scores.json and per_query.json, and dicts of rankings.
"""

import base64
import hashlib
import io
import json
import math
import os
import re
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np

from support.files import read_json, write_file, write_json
from support.images import open_image
from support.mmeb import MMEB, leaderboard, paper_table
from support.program import Skip, text_table
from support.reasoner import is_file_of_answers

PLAIN = ("tokens", "seconds", "inputs/s")  # columns that are not printed in %


# --------------------------------------------------------------------------------------------------------------
# The files and tables of one model


class Result(NamedTuple):
    """The evaluation of one model."""

    scores: dict  # the content of scores.json
    per_query: dict  # the content of per_query.json
    rankings: dict  # {task: {mode: {query of the report: ranking_to_show()}}}
    rows: dict  # {task: {column: x}}: a row of the table for each task
    mean: dict  # {column: x}: their mean
    published: dict  # groups, modalities and overall of the tasks that belong to the 78


def write_scores(folder, result, backbone):
    """Write the files of a model and print its tables."""
    scores = result.scores
    tasks = scores["tasks"]
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "scores.json").exists():
        print_what_is_replaced(folder / "scores.json", scores)
    write_json(folder / "scores.json", scores)
    write_json(folder / "per_query.json", result.per_query)
    print(score_table(scores, result.rows, result.mean), flush=True)
    if tasks.keys() & MMEB.keys():
        name = result_name(scores["model"], scores["reasoner"])
        modes = modes_of(next(iter(tasks.values())), result.mean)
        width = backbone.config.text_config.hidden_size
        for mode in modes:
            about = {
                "model_name": name,
                "model_backbone": backbone.config.model_type,
                "model_size": f"{backbone.num_parameters() / 1e9:.2f}B",
                "embedding_dimension": 2 * width if mode == "fused" else width,
            }
            write_json(folder / f"leaderboard_{mode}.json", leaderboard(tasks, mode, about))
        published = result.published
        columns = published["groups"] | published["modalities"] | {"All": published["overall"]}
        print(paper_table(name, sorted(tasks.keys() & MMEB.keys()), columns, modes), flush=True)


def modes_of(entry, columns):
    """Return which columns are modes: those with all metrics in an entry of scores.json."""
    return [column for column in columns if isinstance(entry.get(column), dict)]


def print_what_is_replaced(path, scores):
    """Name the scores that this run overwrites.

    Two models share a folder of results if only their parent folders differ; so do two files of answers.
    """
    earlier = read_json(path)
    lost = sorted(earlier["tasks"].keys() - scores["tasks"].keys())
    others = sorted(sources(earlier) - sources(scores))
    if others:
        lost = [f"the scores of {' and '.join(others)}"]
    if lost:
        print(f"{path} no longer has {', '.join(lost)} (the cache has their embeddings). Another --out would keep both",
              flush=True)  # fmt: skip


def sources(scores):
    """Return the absolute paths of the model and of the reasoner, if any, that have these scores."""
    args = scores["args"]
    name_of = name_models(args["model"], args["reasoner"])
    names = (scores["model"], scores["reasoner"])
    return {os.path.abspath(path) for path, name in name_of.items() if name in names}


def score_table(scores, rows, mean):
    """Return a table with a row per task, group and modality and their mean, and remarks below it.

    scores: the content of scores.json; rows: {task: {column: x}}; mean: the row of their means.
    """
    tasks = scores["tasks"]
    table = {}
    for name, entry in tasks.items():
        table[name] = rows[name]
        if entry["modality"] == "visdoc":
            table[f"  {name} hit@1"] = {mode: entry[mode]["hit@1"] for mode in modes_of(entry, rows[name])}
    for kind in ("groups", "modalities"):
        if len(scores[kind]) > 1:
            table |= {f"= {name}": row for name, row in scores[kind].items()}
    table["= mean" if scores["overall"] else "= mean of these"] = mean

    if scores["reasoner"]:
        lines = [f"\n{scores['model']} reads the answers of {scores['reasoner']}: main metric and answers without "
                 "<gen_emb> in %, tokens read per input, seconds that one rank took for reading"]  # fmt: skip
    else:
        lines = [f"\n{scores['model']}: main metric and invalid generations in %, tokens generated per input, seconds "
                 "of one rank"]  # fmt: skip
    cells = [[name, *(cell(row, column) for column in mean)] for name, row in table.items()]
    lines.append(text_table([["task", *mean], *cells]))
    for name, entry in tasks.items():
        lines += remarks(name, entry)
    if "ablate" in next(iter(tasks.values())):
        lines += [ablation_line(kind, tasks, mean["gen"]) for kind in ("removed", "swapped")]
    return "\n".join(lines)


def cell(row, column):
    if column not in row:
        return ""
    scale = 1 if column in PLAIN else 100
    return f"{row[column] * scale:.1f}"


def remarks(name, entry):
    """Return sentences about ties, which the order of the list decides, and about a different published metric."""
    sentences = []
    counts = [f"{n} in {mode}" for mode, n in entry["tied"].items() if n]
    if counts:
        sentences.append(f"{name}: candidates tie for the first rank, so the order of the list decides, for "
                         f"{', '.join(counts)} of {entry['num_queries']} queries")  # fmt: skip
    if "published_ndcg" in entry:
        metric = entry["main_metric"]
        ours = entry["gen"][metric]
        published = entry["published_ndcg"]["gen"][metric]
        sentences.append(f"{name}, {metric} of gen: {100 * ours:.1f}, as in published tables {100 * published:.1f}")
    return sentences


def ablation_line(kind, tasks, mean_gen):
    changed = []
    cosines = []
    for entry in tasks.values():
        ablated = entry["ablate"][kind]
        changed.append(ablated["gen"][entry["main_metric"]])
        if ablated["cosine"] is not None:
            cosines.append(ablated["cosine"])
    return (f"reasoning {kind}: gen {100 * (fmean(changed) - mean_gen):+.1f}, "
            f"cosine to the original {fmean(cosines or [math.nan]):.3f}")  # fmt: skip


# --------------------------------------------------------------------------------------------------------------
# Names of results


def name_models(models, reasoner):
    """Return {model: its name}, the reasoner included. The name of a file of answers is its stem."""
    others = {}
    if is_file_of_answers(reasoner):
        others[reasoner] = Path(reasoner).stem
    elif reasoner and reasoner not in models:
        models = [*models, reasoner]
    return dict(zip(models, model_names(models))) | others


def model_names(models):
    """Return the names of the folders, with as many parent folders as distinguish them."""
    parts = [Path(os.path.abspath(model)).parts for model in models]
    if len(set(parts)) < len(parts):
        raise SystemExit(f"--model names a folder twice: {' '.join(models)}")
    depth = 1
    while len({p[-depth:] for p in parts}) < len(parts):
        depth += 1
    return ["-".join(p[-depth:]) for p in parts]


def result_name(model, reasoner):
    """Return the name of a model's results and of their folder. reasoner None: the model itself."""
    return f"{model}-reads-{reasoner}" if reasoner else model


# --------------------------------------------------------------------------------------------------------------
# Two models


def paired_change(first, last):
    """Return the mean over tasks of last - first, and its standard error. Both: {task: [x of each query]}.

    Queries are random, tasks are fixed. The variance is the sum over tasks of s^2 / n, divided by the squared number
    of tasks. s^2 is the unbiased variance of a task's paired differences (nan for a single query).
    """
    differences = [np.subtract(last[task], first[task]) for task in first]
    change = float(np.mean([d.mean() for d in differences]))
    variance = sum(d.var(ddof=1) / len(d) if len(d) > 1 else math.nan for d in differences)
    return change, math.sqrt(variance) / len(differences)


def change_table(names, first, last):
    """Return the table of the changes from the first to the last model.

    first, last: the content of per_query.json of two models, {task: {column: [x of each query]}}.
    """
    columns = [column for column in next(iter(first.values())) if column != "texts"]
    rows = [["task", *columns]]
    for name, tasks in [*((task, [task]) for task in first), ("= mean", list(first))]:
        cells = []
        for column in columns:
            before = {task: first[task][column] for task in tasks}
            after = {task: last[task][column] for task in tasks}
            change, error = paired_change(before, after)
            cells.append(f"{100 * change:+.1f}±{100 * error:.1f}")
        rows.append([name, *cells])
    return (f"\n{names[0]} -> {names[-1]}: change in points ± standard error of the paired difference "
            f"(noise of the queries only, not of training)\n{text_table(rows)}")  # fmt: skip


# --------------------------------------------------------------------------------------------------------------
# What a ranking shows of its query


def ranking_to_show(labels, keys, listed, scores, depth=5):
    """Return a query's first candidates with their similarities, the rank of its first right candidate, and the
    number of ranked candidates. The rank starts at 1; it is None if no right candidate is ranked."""
    order = np.argsort(-scores, kind="stable")
    ranked = [keys[i] for i in listed[order]]
    right_rank = next((rank for rank, key in enumerate(ranked, 1) if key in labels), None)
    top = list(zip(ranked[:depth], scores[order[:depth]].tolist()))
    return {"top": top, "right_rank": right_rank, "num_ranked": len(ranked)}


def order_decides(labels, keys, listed, scores):
    """Return whether right and wrong candidates share the best score, or all candidates do."""
    if len(listed) < 2:
        return False
    first = listed[scores == scores.max()]
    if len(first) < 2:
        return False
    rightness = {keys[i] in labels for i in first}
    return len(rightness) == 2 or len(first) == len(listed)


def write_comparison(settings, tasks, results, folder_of):
    """Print the change from the first to the last model, and write OUT/report.html.

    tasks: eval.py's Tasks; results: {name: Result}; folder_of: {name: the model's folder}.
    """
    names = list(results)
    if len(names) > 1:
        first = results[names[0]].per_query
        last = results[names[-1]].per_query
        print(change_table(names, first, last), flush=True)
    if settings.report_queries:
        models = {}
        for name, result in results.items():
            examples = {}  # task -> {query of the report: the model's answer and rankings}
            for task, of_modes in result.rankings.items():
                examples[task] = {}
                for q in of_modes["disc"]:
                    rankings = {mode: of_queries[q] for mode, of_queries in of_modes.items()}
                    examples[task][q] = {"answer": result.per_query[task]["texts"][q], "rankings": rankings}
            means = {"mean": result.mean} | result.scores["groups"] | result.scores["modalities"]
            models[name] = {"folder": folder_of[name], "rows": result.rows, "means": means, "examples": examples}
        write_report(Path(settings.out) / "report.html", [vars(task) for task in tasks], models)


# --------------------------------------------------------------------------------------------------------------
# report.html: support/report_page.html with all its data in one block of JSON

REPORT_BYTES = 18_000_000  # of the file; queries beyond it are left out, and the page reports their number
REPORT_QUERIES = 160  # of all tasks together
THUMBNAIL_SIDE = 112  # pixels of the longer side
MOST_IMAGES = {"query": 8, "candidate": 2}  # of one input
MOST_CHARACTERS = {"query": 1_500, "candidate": 300, "answer": 6_000}
MOST_LABELS = 3  # right candidates shown above the rankings
CURVE_POINTS = 120
NO_CURVE = ("step", "eta_s", "pairs_per_s", "tokens_per_s", "data_wait_s", "rollout_s", "peak_memory_gib")


def sampled_queries(num_queries, num_tasks, wanted):
    """Return the indices of a task's queries in the report: `wanted` ones, or its share of REPORT_QUERIES if fewer."""
    return spread(num_queries, min(wanted, max(1, REPORT_QUERIES // num_tasks)))


def spread(total, most):
    """Return at most `most` indices of a list, evenly spread, as it may be sorted by class or by time."""
    n = min(total, most)
    return [i * total // n for i in range(n)]


def write_report(path, tasks, models, max_bytes=REPORT_BYTES):
    """Write report.html.

    tasks: dicts with the fields of eval.py's Task. models: {name: {"folder", "rows", "means", "examples"}}, see
    write_comparison(); all models have the same sampled queries.

    A query is shown completely or not at all. The first queries of all tasks are added before the second ones, so
    that the size limit affects all tasks.
    """
    page = Path(__file__).with_name("report_page.html").read_text(encoding="utf-8")
    runs, run_indices = training_runs({name: model["folder"] for name, model in models.items()})
    scores = []
    for name, model in models.items():
        rows = {task: score_columns(row) for task, row in model["rows"].items()}
        means = {part: score_columns(row) for part, row in model["means"].items()}
        scores.append({"name": name, "rows": rows, "means": means, "runs": run_indices[name]})
    shown_tasks = []
    for task in tasks:
        fields = {key: task[key] for key in ("name", "group", "modality", "main_metric")}
        sizes = {"queries": len(task["queries"]), "candidates": len(task["candidates"])}
        shown_tasks.append(fields | sizes | {"left_out": 0})
    data = {"models": scores, "runs": runs, "tasks": shown_tasks, "examples": [], "images": {}}
    free = max_bytes - len(page.encode()) - len(embeddable_json(data))
    some_model = next(iter(models.values()))
    turns = []
    for index, task in enumerate(tasks):
        turns += [(turn, index, q) for turn, q in enumerate(some_model["examples"][task["name"]])]
    for _, index, q in sorted(turns):
        task = tasks[index]
        answers = [model["examples"][task["name"]][q] for model in models.values()]
        example, images = make_example(index, task, q, answers)
        new = {digest: jpeg for digest, jpeg in images.items() if digest not in data["images"]}
        size = len(embeddable_json([example, new]))
        if size > free:
            data["tasks"][index]["left_out"] += 1
            continue
        free -= size
        data["examples"].append(example)
        data["images"] |= new
    data["examples"].sort(key=lambda example: (example["task"], example["query"]))

    text = page.replace("REPORT_DATA", embeddable_json(data))
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    left_out = sum(task["left_out"] for task in data["tasks"])
    limit = f", {left_out} more would exceed {max_bytes / 1e6:.0f} MB" if left_out else ""
    print(f"{path}: {len(data['examples'])} queries of {len(tasks)} tasks{limit}; {len(text) / 1e6:.1f} MB", flush=True)


def embeddable_json(data):
    """Return JSON in ASCII for a script element. Without "<" no text ends the element or begins a comment."""
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def score_columns(row):
    """Return the modes, pass@k and the share of invalid answers of a row of the tables."""
    return {column: round(x, 5) for column, x in row.items() if column not in PLAIN}


def make_example(index, task, q, answers):
    """Return a query with its rankings by every model, and {digest: thumbnail} of its images.

    index: of the task. answers: per model {"answer", "rankings"}. Candidates are listed once, and the rankings hold
    indices into this list.
    """
    query = task["queries"][q]
    labels = list(dict.fromkeys(query["labels"]))
    known = [key for key in labels[:MOST_LABELS] if key in task["candidates"]]
    keys = list(known)
    for answer in answers:
        for ranking in answer["rankings"].values():
            keys += [key for key, _ in ranking["top"]]
    index_of = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    images = {}

    candidates = []
    for key in index_of:
        item = shown_input(task["candidates"][key], "candidate", images)
        candidates.append({"key": clip(str(key), "candidate")} | item)
    models = []
    for answer in answers:
        rankings = {}
        for mode, ranking in answer["rankings"].items():
            top = [[index_of[key], round(score, 6), key in labels] for key, score in ranking["top"]]
            rankings[mode] = ranking | {"top": top}
        models.append(parts_of_answer(answer["answer"]) | {"rankings": rankings, "verdict": verdict(rankings)})
    example = {
        "task": index,
        "query": q,
        "input": shown_input(query["input"], "query", images),
        "right": [index_of[key] for key in known],
        "more_right": len(labels) - len(known),  # not shown, or not among the candidates
        "candidates": candidates,
        "models": models,
    }
    return example, images


def verdict(rankings):
    """Return which of disc and gen rank a right candidate first."""
    disc = rankings["disc"]["right_rank"] == 1
    gen = rankings["gen"]["right_rank"] == 1
    if disc and gen:
        return "both-right"
    if gen:
        return "gen-right"
    return "disc-right" if disc else "both-wrong"


def parts_of_answer(text):
    """Return the parts of <think>REASONING</think><answer>SUMMARY<gen_emb>, or a text of another form unsplit."""
    head = re.match(r"\s*<think>(.*?)</think>\s*<answer>", text, re.DOTALL)
    if not head:
        return {"text": clip(text, "answer")}
    summary = text[head.end() :].rstrip().removesuffix("</answer>").removesuffix("<gen_emb>")
    return {"reasoning": clip(head[1].strip(), "answer"), "summary": clip(summary.strip(), "answer")}


def clip(text, kind):
    most = MOST_CHARACTERS[kind]
    return text if len(text) <= most else f"{text[:most]} … ({len(text) - most:,} more characters)"


def shown_input(item, kind, images):
    """Return what is shown of a query or candidate, and add its thumbnails to `images`."""
    paths = item["images"] + item["video"]
    shown = []
    for i in spread(len(paths), MOST_IMAGES[kind]):
        found = thumbnail(paths[i])
        if "problem" in found:
            shown.append(found)
        else:
            shown.append({"digest": found["digest"]})
            images[found["digest"]] = found["jpeg"]
    return {
        "text": clip(item["text"].strip(), kind),
        "images": shown,
        "num_images": len(item["images"]),
        "num_frames": len(item["video"]),
    }


@cache
def thumbnail(path):
    """Return {"digest", "jpeg" in base64} of an image file, or {"problem": why the image is unreadable}."""
    try:
        image = open_image(path)
    except Skip as error:
        return {"problem": clip(str(error), "candidate")}
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=72)
    jpeg = base64.b64encode(file.getvalue()).decode()
    return {"digest": hashlib.blake2b(file.getvalue(), digest_size=8).hexdigest(), "jpeg": jpeg}


# The curves of the training runs


def training_runs(folders):
    """Return the training runs of the models, each once, and {name of a model: indices of its runs, first stage first}.

    A run is {"name", "steps", "curves"}. folders: {name of a model: its folder}.
    """
    index_of = {}  # folder of a run -> its index in the list
    runs = []
    indices = {}
    for name, folder in folders.items():
        indices[name] = []
        for run in lineage(folder):
            if run.resolve() not in index_of:
                index_of[run.resolve()] = len(runs)
                runs.append({"name": str(run)} | read_curves(run / "log.jsonl"))
            indices[name].append(index_of[run.resolve()])
    return runs, indices


def lineage(folder):
    """Return the folders of the run that made a model and of the runs before it, the first run first.

    A hub id, or a folder that has moved, has no runs.
    """
    folders = []
    folder = Path(folder)
    while (folder / "log.jsonl").is_file() and folder not in folders:
        folders.append(folder)
        if (folder / "args.json").is_file():
            folder = Path(read_json(folder / "args.json")["settings"]["model"])
    return folders[::-1]


def read_curves(path):
    """Return {"steps": the last step, "curves": {name: [[step, x], ...]}} of a log.jsonl.

    A curve has at most CURVE_POINTS points. Each is the mean over the datasets of one stretch of steps.
    """
    points = {}
    last = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if not re.fullmatch(r'{"step": \d+[,}].*', line) or not line.endswith("}"):
            continue  # the last line of a running or killed run may be truncated
        row = json.loads(line)
        last = row["step"]
        for name, x in row.items():
            if name not in NO_CURVE and isinstance(x, (int, float)) and math.isfinite(x):
                points.setdefault(name, []).append((row["step"], x, row.get("dataset", "")))
    return {"steps": last, "curves": {name: mean_over_datasets(of_name) for name, of_name in points.items()}}


def mean_over_datasets(points):
    """Return [[step, x], ...] of the points [(step, x, dataset), ...]: a step has one dataset, and datasets differ more
    than a curve moves. A stretch has about three steps of each dataset. A dataset without a step in it keeps its last
    mean."""
    num_datasets = len({dataset for *_, dataset in points})
    most = len(points) if num_datasets == 1 else max(2, len(points) // (3 * num_datasets))
    latest = {}  # dataset -> mean of x
    curve = []
    for stretch in np.array_split(np.arange(len(points)), min(len(points), most, CURVE_POINTS)):
        steps, values, datasets = zip(*(points[i] for i in stretch))
        for name in set(datasets):
            latest[name] = fmean(x for x, dataset in zip(values, datasets) if dataset == name)
        curve.append([round(fmean(steps)), float(f"{fmean(latest.values()):.4g}")])
    return curve
