"""What eval.py prints: its tables and the change between two models. Takes the dicts that stand in its files."""

import math
from statistics import fmean

import numpy as np

from support.run import text_table

PLAIN = ("tokens", "seconds", "inputs/s")  # columns that are no shares


def score_table(scores, rows, mean):
    """A row per task, group and modality, their mean, the oracle's gap, and remarks.

    scores: the content of scores.json; rows: {task: {column: x}}; mean: the row of their means.
    """
    tasks = scores["tasks"]
    table = {}
    for name, entry in tasks.items():
        table[name] = rows[name]
        if entry["modality"] == "visdoc":
            modes = [column for column in rows[name] if isinstance(entry.get(column), dict)]
            table[f"  {name} hit@1"] = {mode: entry[mode]["hit@1"] for mode in modes}
    for kind in ("groups", "modalities"):
        if len(scores[kind]) > 1:
            table |= {f"= {name}": row for name, row in scores[kind].items()}
    table["= mean" if scores["overall"] else "= mean of these"] = mean

    lines = [heading(scores)]
    cells = [[name, *(cell(row, column) for column in mean)] for name, row in table.items()]
    lines.append(text_table([["task", *mean], *cells]))
    for name, entry in tasks.items():
        lines += remarks(name, entry)
    if "ablate" in next(iter(tasks.values())):
        lines += [ablation_line(kind, tasks, mean["gen"]) for kind in ("removed", "swapped")]
    return "\n".join(lines)


def heading(scores):
    if not scores["reasoner"]:
        return (f"\n{scores['model']}: main metric and invalid generations in %, tokens generated per input, seconds "
                "of one process")  # fmt: skip
    return (f"\n{scores['model']} reads the answers of {scores['reasoner']}: main metric and answers without <gen_emb> "
            "in %, tokens read per input, seconds that one process took for reading")  # fmt: skip


def cell(row, column):
    if column not in row:
        return ""
    scale = 1 if column in PLAIN else 100
    return f"{row[column] * scale:.1f}"


def remarks(name, entry):
    """Sentences about a task where the list's order decides, or where the published metric has another value."""
    sentences = []
    counts = [f"{n} in {mode}" for mode, n in entry["tied"].items() if n]
    if counts:
        sentences.append(f"{name}: candidates tie for the first place, so that the order of the list decides, for "
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


def gap_table(gaps):
    """gaps: {row of the table: what eval.py's oracle_gap() returns}."""
    columns = list(next(iter(gaps.values()))["closed"])
    rows = [["task", "better", "points to the oracle", *columns]]
    for name, gap in gaps.items():
        shares = [gap["closed"][column] for column in columns]
        cells = ["" if share is None else f"{100 * share:.0f}" for share in shares]
        rows.append([name, gap["better"], f"{100 * gap['gap']:.1f}", *cells])
    heading = ("distance from the better of disc and gen to their oracle, which looks at the labels, in points, and "
               "the share of it that other modes cover, in % (negative: below the better one)")  # fmt: skip
    return f"\n{heading}\n{text_table(rows)}"


# --------------------------------------------------------------------------------------------------------------
# Two models


def paired_change(first, last):
    """Mean over tasks of last - first and its standard error, from {task: [x of each query]} of two models.

    Queries are the random part, tasks are fixed: the variance is sum over tasks of s^2 / n, divided by the squared
    number of tasks; s^2 is the unbiased variance of a task's paired differences (nan for a single query).
    """
    differences = [np.subtract(last[task], first[task]) for task in first]
    change = float(np.mean([d.mean() for d in differences]))
    variance = sum(d.var(ddof=1) / len(d) if len(d) > 1 else math.nan for d in differences)
    return change, math.sqrt(variance) / len(differences)


def change_table(names, first, last):
    """first, last: {task: {column: [x of each query]}} of two models."""
    columns = list(next(iter(first.values())))
    rows = [["task", *columns]]
    for task in first:
        rows.append([task, *change_cells(first, last, [task], columns)])
    rows.append(["= mean", *change_cells(first, last, list(first), columns)])
    return (f"\n{names[0]} -> {names[-1]}: change in points ± standard error of the paired difference "
            f"(noise of the queries only, not of training)\n{text_table(rows)}")  # fmt: skip


def change_cells(first, last, tasks, columns):
    cells = []
    for column in columns:
        before = {task: first[task][column] for task in tasks}
        after = {task: last[task][column] for task in tasks}
        change, error = paired_change(before, after)
        cells.append(f"{100 * change:+.1f}±{100 * error:.1f}")
    return cells
