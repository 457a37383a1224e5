"""Draw two figures of the README from the runs of the toy world in runs/ into assets/.

    python tests/bench/bench.py toy --seeds 3 --recipes rl      # the runs; 51 minutes on 2 cores
    python tests/figures.py                                     # assets/query.svg and curves.svg, in seconds

query.svg    one query: its input, what the RL model of seed 0 writes, and the first candidates of disc, gen and fused
curves.svg   SFT loss, RL reward and pass@k over the seeds

The same runs give the same bytes. A figure is plain SVG without script and links, so GitHub shows it as <img>. Its
text stays text and its colours follow the reader's light or dark setting. Texts are positioned by hand with spare room,
because fonts differ in width. assets/rl_step.svg has the same style and is edited by hand.
"""

import json
import math
import sys
import textwrap
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np
from svg import WIDTH, area, document, line, picture, rect, text

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from eval import best_first, greedy_sides, load_task, score_candidates  # noqa: E402
from support.cache import DistinctInputs, collect  # noqa: E402
from support.files import write_file  # noqa: E402
from support.program import BadInput, MissingFile, run_script  # noqa: E402
from support.report import mean_over_datasets  # noqa: E402

BENCH = "python tests/bench/bench.py toy --seeds 3 --recipes rl"
TASK = "test/ground"  # queries and candidates are images, and it takes some reasoning
SIDE = 24  # free at the borders


class Candidate(NamedTuple):
    file: str  # its image
    similarity: float
    right: bool


class Example(NamedTuple):
    """A query, the model's answer and the rankings."""

    file: str  # its image
    text: str
    written: str  # by the model
    ranked: dict  # mode -> all Candidates, best first
    hits: dict  # mode -> 1 or 0 for each query of the task: its right candidate is first


def find_query(model_folder, data):
    """Return the first query of TASK that is right in gen and fused and wrong in disc, from eval.py's cache."""
    results = model_folder / "eval" / model_folder.name
    columns = read_json(results / "per_query.json")[TASK]
    outcomes = list(zip(columns["disc"], columns["gen"], columns["fused"]))
    if (0, 1, 1) not in outcomes:
        raise BadInput(f"{results / 'per_query.json'}: no query of {TASK} is right in gen and fused, wrong in disc")
    q = outcomes.index((0, 1, 1))
    task = load_task(TASK, data)
    inputs = DistinctInputs([task])
    caches = sorted((results / "cache").glob("greedy-*"), key=lambda folder: folder.stat().st_mtime)
    if not caches:
        raise MissingFile(f"{results / 'cache'} holds no greedy answers: make the runs with  {BENCH}")
    found = collect(caches[-1], inputs.keys)
    arrays = {name: x for name, x in found.items() if isinstance(x, np.ndarray)}
    query_row = inputs.query_rows[0][q : q + 1]
    queries = greedy_sides({name: x[query_row] for name, x in arrays.items()})
    candidates = greedy_sides({name: x[inputs.candidate_rows[0]] for name, x in arrays.items()})
    query = task.queries[q]
    keys = list(task.candidates)
    ranked = {}
    for mode in ("disc", "gen", "fused"):
        one, many = queries[mode], candidates[mode]
        [(listed, scores)] = score_candidates(one.embeddings, many.embeddings, one.ok, many.ok)
        score_of = dict(zip(listed, scores))
        ranked[mode] = []
        for i in best_first(listed, scores, depth=None):
            [file] = task.candidates[keys[i]]["images"]
            ranked[mode].append(Candidate(file, float(score_of[i]), keys[i] in query["labels"]))
    hits = {mode: columns[mode] for mode in ranked}
    [file] = query["input"]["images"]
    return Example(file, query["input"]["text"], found["texts"][query_row[0]][0], ranked, hits)


# mode: its colour, what it is
MODES = {"disc": ("a", "before any reasoning"), "gen": ("b", "after the reasoning"),
         "fused": ("c", "mean of both similarities")}  # fmt: skip


def query_figure(example):
    written = []
    for part in example.written.replace("<answer>", "\n<answer>").split("\n"):
        written += textwrap.wrap(part, 58)
    parts = [text(SIDE, 34, "The query", "strong")]
    for i in range(3):  # the cells are named by row and column: xa, xb, ..., zc
        parts.append(text(SIDE + 52 + 56 * i, 58, "abc"[i], "code dim", "middle"))
        parts.append(text(SIDE + 8, 96 + 56 * i, "xyz"[i], "code dim", "middle"))
    parts.append(picture(SIDE + 24, 64, 168, 168, example.file))
    for i, asked in enumerate(textwrap.wrap(f"{example.text} <disc_emb>", 34)):
        parts.append(text(SIDE, 258 + 20 * i, asked, "code"))
    x = 330
    parts.append(text(x, 34, "What the model writes", "strong"))
    parts.append(rect(x, 46, WIDTH - SIDE - x, 24 + 20 * len(written)))
    for i, row in enumerate(written):
        parts.append(text(x + 14, 72 + 20 * i, row, "code"))
    y = 100 + 20 * len(written)
    for i, row in enumerate(("The walk, then the cells of the row at its end, then the summary.",
                             "The embedding disc is read at <disc_emb>, at the end of the prompt, and",
                             "gen at <gen_emb>, at the end of the summary.")):  # fmt: skip
        parts.append(text(x, y + 22 * i, row, "small dim"))
    top = max(310, y + 70)
    parts.append(line([(SIDE, top - 10), (WIDTH - SIDE, top - 10)]))
    for i, (mode, (colour, meaning)) in enumerate(MODES.items()):
        parts += ranking(SIDE + 288 * i, top + 16, mode, colour, meaning, example)
    found = []
    for mode, ranked in example.ranked.items():
        index = index_of_right(ranked)
        similarity = f"{ranked[index].similarity:.3f}"
        found.append(f"In {mode} it is number {index + 1} of {len(ranked)}, with similarity {similarity}.")
    description = (
        f"The query is an image of coloured shapes and the text: {example.text}. The model writes: {example.written}. "
        f"The right candidate is a row of the image. {' '.join(found)}"
    )
    return document("One query of the toy world: without reasoning it is missed, with reasoning it is found",
                    description, top + 278, parts)  # fmt: skip


def index_of_right(ranked):
    return [candidate.right for candidate in ranked].index(True)


def ranking(x, y, mode, colour, meaning, example):
    """Return a column with the first three candidates of a mode."""
    parts = [text(x, y, mode, f"strong {colour}"), text(x + 54, y, meaning, "small dim")]
    hits = example.hits[mode]
    parts.append(text(x, y + 22, f"right first in {100 * fmean(hits):.0f} % of {len(hits)} queries", "small dim"))
    ranked = example.ranked[mode]
    for i, candidate in enumerate(ranked[:3]):
        top = y + 40 + 58 * i
        parts.append(text(x, top + 26, f"{i + 1}", "dim"))
        parts.append(picture(x + 20, top, 126, 42, candidate.file))
        parts.append(text(x + 160, top + 26, f"{candidate.similarity:.3f}", "code"))
        if candidate.right:
            parts.append(f'<rect x="{x + 17}" y="{top - 3}" width="132" height="48" rx="4" class="line-c"/>')
            parts.append(text(x + 206, top + 26, "✓ right", "small strong c"))
    index = index_of_right(ranked)
    if index > 2:
        note = f"the right one is number {index + 1} of {len(ranked)}, {ranked[index].similarity:.3f}"
        parts.append(text(x, y + 234, note, "small"))
    return parts


class Runs(NamedTuple):
    """The logs and scores of all seeds, in the order of the seeds."""

    sft: list  # lines of log.jsonl
    rl: list
    passes: dict  # "sft" and "rl" -> {k: pass@k} of each seed
    tau_end: tuple  # step at which the SFT temperature has fallen to its end, and this end; step 0: it does not fall


def read_runs(folder):
    seeds = sorted(folder.glob("seed*"))
    if not seeds:
        raise MissingFile(f"{folder} holds no seed0, seed1, ..: make the runs with  {BENCH}")
    passes = {"sft": [], "rl": []}
    for stage, of_seeds in passes.items():
        for seed in seeds:
            overall = read_json(seed / stage / "eval" / stage / "scores.json")["overall"]
            ks = {int(name.removeprefix("pass@")): name for name in overall if name.startswith("pass@")}
            of_seeds.append({k: overall[name] for k, name in ks.items()})
    settings = read_json(seeds[0] / "sft" / "args.json")["settings"]
    logs = {stage: [read_log(seed / stage) for seed in seeds] for stage in passes}
    return Runs(logs["sft"], logs["rl"], passes, (settings["tau_steps"], settings["tau"]))


def read_text(path):
    if not path.is_file():
        raise MissingFile(f"{path} does not exist: make the runs with  {BENCH}")
    return path.read_text()


def read_json(path):
    return json.loads(read_text(path))


def read_log(folder):
    return [json.loads(row) for row in read_text(folder / "log.jsonl").splitlines()]


def running_mean(log, name, window):
    """Return [(step, mean of the last `window` steps)], at every fifth of a window."""
    values = [row[name] for row in log]
    ends = range(window, len(values) + 1, max(1, window // 5))
    return [(log[end - 1]["step"], fmean(values[end - window : end])) for end in ends]


class Panel:
    """A coordinate system. low, high: the ends of both axes; log: which axes are logarithmic."""

    def __init__(self, x, title, low, high, log=(False, False)):
        self.left = x + 34
        self.top, self.width, self.height = 84, 220, 200
        self.log = log
        self.low = [self.scaled(v, axis) for axis, v in enumerate(low)]
        self.high = [self.scaled(v, axis) for axis, v in enumerate(high)]
        self.parts = [text(x, 36, title, "strong")]

    def scaled(self, value, axis):
        return math.log(value) if self.log[axis] else value

    def at(self, x, y):
        across = (self.scaled(x, 0) - self.low[0]) / (self.high[0] - self.low[0])
        up = (self.scaled(y, 1) - self.low[1]) / (self.high[1] - self.low[1])
        return self.left + across * self.width, self.top + (1 - up) * self.height

    def ticks(self, xs, ys, name):
        """Draw numbers at both axes and the name of the horizontal axis."""
        bottom = self.top + self.height
        for y in ys:
            _, height = self.at(xs[-1], y)
            self.parts.append(line([(self.left, height), (self.left + self.width, height)]))
            self.parts.append(text(self.left - 8, height + 4, f"{y:g}", "small dim", "end"))
        for x in xs:
            across, _ = self.at(x, ys[0])
            self.parts.append(text(across, bottom + 20, f"{x:g}", "small dim", "middle"))
        self.parts.append(text(self.left + self.width / 2, bottom + 40, name, "small dim", "middle"))

    def curve(self, points, colour, dash=""):
        self.parts.append(line([self.at(*point) for point in points], f"line-{colour}", dash))

    def key(self, across, name, colour, dash):
        x = self.left + across
        self.parts.append(line([(x, 60), (x + 20, 60)], f"line-{colour}", dash))
        self.parts.append(text(x + 25, 64, name, "small"))


SEED_LINES = [("a", ""), ("b", "7 3"), ("c", "2 3")]  # colour and dash of each seed, then again from the first


def rounded_range(values, step):
    """Return the multiples of step that enclose all values: [low, ..., high]."""
    low = math.floor(min(values) / step)
    high = max(low + 1, math.ceil(max(values) / step))
    return [round(n * step, 6) for n in range(low, high + 1)]


def seeds_panel(x, title, curves, ys, log):
    """Return a panel with one curve per seed and its key."""
    last = max(step for curve in curves for step, _ in curve)
    panel = Panel(x, title, (0, ys[0]), (last, ys[-1]), (False, log))
    panel.ticks([0, last / 2, last], ys, "step")
    for s, curve in enumerate(curves):
        colour, dash = SEED_LINES[s % 3]
        panel.curve(curve, colour, dash)
        panel.key(74 * s, f"seed {s}", colour, dash)
    return panel


def curves_figure(runs):
    losses = [running_mean(log, "loss", 20) for log in runs.sft]
    values = [y for curve in losses for _, y in curve]
    ys = [y for y in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if min(values) / 2.5 < y < max(values) * 2.5]
    sft = seeds_panel(SIDE, "SFT loss, mean of 20 steps", losses, ys, True)
    tau_step, tau = runs.tau_end
    if tau_step:
        x, _ = sft.at(tau_step, ys[0])
        sft.parts.append(line([(x, sft.top), (x, sft.top + sft.height)], "line-dim", "3 4"))
        sft.parts.append(text(x + 6, sft.top + 18, "from here on", "small dim"))
        sft.parts.append(text(x + 6, sft.top + 35, f"tau = {tau:g}", "small dim"))
    rewards = [mean_over_datasets([(row["step"], row["reward"], row["dataset"]) for row in log]) for log in runs.rl]
    values = [y for curve in rewards for _, y in curve]
    rl = seeds_panel(SIDE + 288, "RL reward, mean over tasks", rewards, rounded_range(values, 0.05), False)
    passes = pass_panel(SIDE + 576, runs.passes)
    description = " ".join([
        f"SFT loss at the end, mean of 20 steps, by seed: {ends(losses, -1)}.",
        f"RL reward, mean over the tasks, by seed: at first {ends(rewards, 0)}, at the end {ends(rewards, -1)}.",
        f"pass@k in per cent, mean over the seeds: after SFT {listed_passes(runs.passes['sft'])};",
        f"after RL {listed_passes(runs.passes['rl'])}.",
    ])  # fmt: skip
    return document("Training curves on the toy world", description, 344, [*sft.parts, *rl.parts, *passes.parts])


def ends(curves, index):
    """Return the values at one end of the curves as text."""
    return ", ".join(f"{curve[index][1]:.2f}" for curve in curves)


def listed_passes(of_seeds):
    return ", ".join(f"{100 * x:.1f} at k = {k}" for k, x in mean_over_seeds(of_seeds).items())


def mean_over_seeds(of_seeds):
    return {k: fmean(one[k] for one in of_seeds) for k in of_seeds[0]}


def pass_panel(x, passes):
    """Return a panel of pass@k in % after both stages: mean over the seeds as a line, range as an area."""
    ks = list(passes["sft"][0])
    values = [100 * one[k] for of_seeds in passes.values() for one in of_seeds for k in ks]
    ys = rounded_range(values, 10)
    panel = Panel(x, "pass@k in %, test scenes", (ks[0], ys[0]), (ks[-1], ys[-1]), (True, False))
    panel.ticks(ks, ys, "k samples; area: range of the seeds")
    for i, (stage, colour, dash) in enumerate([("sft", "b", "7 3"), ("rl", "a", "")]):
        highest = [panel.at(k, 100 * max(one[k] for one in passes[stage])) for k in ks]
        lowest = [panel.at(k, 100 * min(one[k] for one in passes[stage])) for k in ks]
        panel.parts.append(area([*highest, *reversed(lowest)], colour, opacity=0.18))
        means = {k: 100 * x for k, x in mean_over_seeds(passes[stage]).items()}
        panel.curve(list(means.items()), colour, dash)
        panel.key(120 * i, f"after {stage.upper()}", colour, dash)
        first, last = panel.at(ks[0], means[ks[0]]), panel.at(ks[-1], means[ks[-1]])
        down = (30, 30) if stage == "sft" else (-46, -12)  # of the two numbers, from the curve
        panel.parts.append(text(first[0] + 6, first[1] + down[0], f"{means[ks[0]]:.1f}", f"small strong {colour}"))
        panel.parts.append(text(last[0], last[1] + down[1], f"{means[ks[-1]]:.1f}", f"small strong {colour}", "end"))
    return panel


def main():
    runs = ROOT / "runs/bench"
    query = find_query(runs / "seed0/rl", ROOT / "runs/toy/data")
    for name, svg in {"curves": curves_figure(read_runs(runs)), "query": query_figure(query)}.items():
        path = ROOT / f"assets/{name}.svg"
        write_file(path, lambda temporary, svg=svg: Path(temporary).write_text(svg, encoding="utf-8"))
        print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    run_script(main)
