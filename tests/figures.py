"""Draw the figures of README and docs from the runs of the toy world into assets/.

    python tests/bench/bench.py toy --seeds 3 --recipes rl      # the runs; 51 minutes on 2 cores
    python tests/figures.py                               # assets/query.svg, rl_step.svg, curves.svg, in seconds

query.svg    one query: what it is, what the RL model of seed 0 writes, and the first candidates of disc, gen and fused
rl_step.svg  one RL step with its shapes and the names of the functions; drawn by hand, tests check the names
curves.svg   SFT loss, RL reward and pass@k over the seeds

The same runs give the same bytes. A figure is plain SVG without script and links, so GitHub shows it as <img>. Its
text stays text and its colours follow the reader's light or dark setting. It has its own background, because the page
may follow another setting. There is no plotting library: 880 units are the width of a README, and texts are positioned
by hand with spare room, because fonts differ in width (tests/svg.py).
"""

import argparse
import json
import math
import sys
import textwrap
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np
from svg import WIDTH, area, arrow, document, line, picture, rect, text

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from eval import best_first, greedy_sides, load_task, score_candidates  # noqa: E402
from support.cache import DistinctInputs, collect  # noqa: E402
from support.files import write_file  # noqa: E402
from support.program import BadInput, MissingFile, run_script  # noqa: E402

BENCH = "python tests/bench/bench.py toy --seeds 3 --recipes rl"
TASK = "test/ground"  # queries and candidates are images, and it takes some reasoning
SIDE = 24  # free at the borders

# ---------------------------------------------------------------------------------------------------------------
# A query


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


MODES = {  # mode: its colour, what it is
    "disc": ("a", "before any reasoning"),
    "gen": ("b", "after the reasoning"),
    "fused": ("c", "mean of both similarities"),
}


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
    notes = [
        "The walk, then what stands in the row where it ends, then the summary.",
        "The embedding disc is read at <disc_emb>, where the prompt ends, and",
        "gen at <gen_emb>, where the summary ends.",
    ]
    for i, row in enumerate(notes):
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
        f"The query is a picture of coloured shapes and the text: {example.text}. The model writes: {example.written}. "
        f"The right candidate is a row of the picture. {' '.join(found)}"
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


# ---------------------------------------------------------------------------------------------------------------
# One RL step


def rl_step_figure():
    parts = []
    y = SIDE
    for number, (name, height, draw) in enumerate(BLOCKS, 1):
        parts.append(rect(SIDE, y, WIDTH - 2 * SIDE, height))
        parts.append(text(SIDE + 16, y + 30, f"{number} {name}", "strong"))
        parts += draw(160, y)
        y += height
        if number < len(BLOCKS):
            parts.append(arrow(WIDTH / 2, y + 3, WIDTH / 2, y + 21))
            y += SIDE
    description = (
        "Rollout: the p pairs of a process are 2p prompts, and the model samples G completions of each: gen embeddings "
        "[2, p, G, D] and texts. Reward: measured against the rollouts of all P pairs of the global batch, format plus "
        "share times gap, [2, p, G]. Advantage: each reward against its own group, [2p, G]. Update: a prompt and its G "
        "completions are one packed row with a tree mask; policy and reference give log-probabilities [n*G, T], and "
        "these the loss."
    )
    return document("One step of reinforcement learning: rollout, reward, advantage, update", description,
                    y + SIDE, parts)  # fmt: skip


def box(x, y, w, *rows, kind="paper"):
    """Return a box with 22 units per row. The first row is strong, a row in `` is code."""
    parts = [rect(x, y, w, 14 + 22 * len(rows), kind)]
    for i, row in enumerate(rows):
        kind = "code" if row.startswith("`") else "small" if i else "strong"
        parts.append(text(x + w / 2, y + 22 + 22 * i, row.strip("`"), kind, "middle"))
    return parts


def draw_rollout(x, y):
    parts = [*box(x, y + 16, 150, "p pairs", "query and target"), arrow(x + 156, y + 45, x + 184, y + 45)]
    parts += [*box(x + 190, y + 16, 150, "2p prompts", "queries, targets")]
    for g in range(3):  # the completions of one prompt
        parts.append(line([(x + 346, y + 45), (x + 384, y + 27 + 18 * g)], "line-dim"))
        parts.append(rect(x + 390, y + 20 + 18 * g, 112, 13, "b", 3))
    parts.append(text(x + 514, y + 36, "G completions of each", "small"))
    parts.append(text(x + 514, y + 58, "<think>..<gen_emb>", "code"))
    parts.append(text(x, y + 106, "rl.rollout, model.Embedder.generate", "code dim"))
    parts.append(text(x + 390, y + 106, "gen [2, p, G, D] and their texts", "code"))
    return parts


def draw_reward(x, y):
    parts = [*box(x, y + 16, 190, "all processes", "`gen [2, P, G, D]", "`texts [2][P][G]")]
    parts.append(arrow(x + 196, y + 56, x + 224, y + 56))
    parts += box(x + 230, y + 16, 110, "format", "tags in order:", "0 or 1")
    parts.append(text(x + 353, y + 61, "+", "strong", "middle"))
    rows = ["share: its own pair's among the G nearest", "gap: mean cosine, own pair − the others"]
    parts += box(x + 366, y + 16, 316, "share × gap", *rows)
    parts.append(text(x, y + 126, "rl.rewards_of", "code dim"))
    parts.append(text(x + 230, y + 126, "reward.format_reward", "code dim"))
    parts.append(text(x + 682, y + 126, "reward.embedding_reward", "code dim", "end"))
    parts.append(text(x, y + 150, "reward.total_reward", "code dim"))
    parts.append(text(x + 390, y + 150, "rewards of its own pairs [2, p, G]", "code"))
    return parts


def draw_advantage(x, y):
    return [
        text(x, y + 30, "A = (R − mean R) / (std R + 0.0001)   over the G rollouts of one prompt"),
        text(x, y + 58, "reward.group_advantages", "code dim"),
        text(x + 390, y + 58, "advantages [2p, G]", "code"),
    ]


def draw_update(x, y):
    """Draw the packed row above its mask, then two models and the loss."""
    names = ["prompt", "c1", "c2", "cG"]
    widths = [64, 36, 36, 36]
    starts = [sum(widths[:i]) for i in range(4)]
    left, top = x + 34, y + 62
    parts = [text(x, y + 30, "each of n rows: a prompt with its G completions; coloured: what a token sees")]
    for name, start, w in zip(names, starts, widths):
        kind = "a" if name == "prompt" else "b"
        parts.append(text(left + start + w / 2, top - 8, name, f"small {kind}", "middle"))
        # a completion sees the prompt and, causally, itself
        if name != "prompt":
            parts.append(rect(left, top + start, widths[0], w - 2, "a", 0))
        x0, y0, end = left + start, top + start, w - 2
        parts.append(area([(x0, y0), (x0, y0 + end), (x0 + end, y0 + end)], kind))
    size = sum(widths)
    parts.append(line([(left, top), (left + size, top), (left + size, top + size), (left, top + size), (left, top)]))
    parts.append(text(x, top + size + 26, "rl.pack_groups, rl.tree_mask", "code dim"))
    parts.append(text(x, top + size + 50, "mask [n, 1, L, L]", "code"))

    middle = top + size / 2
    x += 262
    parts.append(arrow(x - 40, middle, x - 8, middle))
    parts += box(x, middle - 84, 176, "reference", "the frozen SFT model", "`ref_logp [n*G, T]")
    parts += box(x, middle + 4, 176, "policy", "with its gradient", "`logp [n*G, T]")
    parts.append(text(x, top + size + 26, "model.Embedder.forward", "code dim"))
    parts.append(text(x, top + size + 50, "rl.padded", "code dim"))
    parts.append(arrow(x + 184, middle, x + 216, middle))
    x += 224
    parts += box(x, middle - 84, 196, "loss", "−(clipped ratio × A)", "+ beta × KL")
    parts.append(text(x, middle + 26, "sum over the tokens / norm,", "small"))
    parts.append(text(x, middle + 46, "mean over all completions", "small"))
    parts.append(text(x, top + size + 26, "rl.grpo_loss, rl.update", "code dim"))
    return parts


BLOCKS = [("rollout", 124, draw_rollout), ("reward", 168, draw_reward), ("advantage", 76, draw_advantage),
          ("update", 308, draw_update)]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# Curves


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
    passes = {}
    for stage in ("sft", "rl"):
        passes[stage] = []
        for seed in seeds:
            overall = read_json(seed / stage / "eval" / stage / "scores.json")["overall"]
            named = {name: x for name, x in overall.items() if name.startswith("pass@")}
            passes[stage].append({int(name.removeprefix("pass@")): x for name, x in named.items()})
    settings = read_json(seeds[0] / "sft" / "args.json")["settings"]
    tau_end = settings["tau_steps"], settings["tau"]
    return Runs([read_log(seed / "sft") for seed in seeds], [read_log(seed / "rl") for seed in seeds], passes, tau_end)


def read_text(path):
    if not path.is_file():
        raise MissingFile(f"{path} does not exist: make the runs with  {BENCH}")
    return path.read_text()


def read_json(path):
    return json.loads(read_text(path))


def read_log(folder):
    return [json.loads(row) for row in read_text(folder / "log.jsonl").splitlines()]


def running_mean(log, name, window):
    """Return [(step, mean of the last `window` steps)], at every fifth of a window.

    Steps have one task each, and tasks differ more than the curve moves.
    """
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
        key = panel.left + 74 * s
        panel.parts.append(line([(key, 60), (key + 20, 60)], f"line-{colour}", dash))
        panel.parts.append(text(key + 25, 64, f"seed {s}", "small"))
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

    rewards = [running_mean(log, "reward", 50) for log in runs.rl]
    values = [y for curve in rewards for _, y in curve]
    rl = seeds_panel(SIDE + 288, "RL reward, mean of 50 steps", rewards, rounded_range(values, 0.05), False)
    passes = pass_panel(SIDE + 576, runs.passes)
    description = " ".join([
        f"SFT loss at the end, mean of 20 steps, by seed: {ends(losses, -1)}.",
        f"RL reward, mean of 50 steps, by seed: at first {ends(rewards, 0)}, at the end {ends(rewards, -1)}.",
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
        key = panel.left + 120 * i
        panel.parts.append(line([(key, 60), (key + 20, 60)], f"line-{colour}", dash))
        panel.parts.append(text(key + 25, 64, f"after {stage.upper()}", "small"))
        first, last = panel.at(ks[0], means[ks[0]]), panel.at(ks[-1], means[ks[-1]])
        down = (30, 30) if stage == "sft" else (-46, -12)  # of the two numbers, from the curve
        panel.parts.append(text(first[0] + 6, first[1] + down[0], f"{means[ks[0]]:.1f}", f"small strong {colour}"))
        panel.parts.append(text(last[0], last[1] + down[1], f"{means[ks[-1]]:.1f}", f"small strong {colour}", "end"))
    return panel


# ---------------------------------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/bench", help=f"folder of  {BENCH}")
    parser.add_argument("--data", type=Path, default=ROOT / "runs/toy/data", help="the toy world of these runs")
    parser.add_argument("--out", type=Path, default=ROOT / "assets")
    args = parser.parse_args()
    figures = {
        "curves": curves_figure(read_runs(args.runs)),
        "rl_step": rl_step_figure(),
        "query": query_figure(find_query(args.runs / "seed0" / "rl", args.data)),
    }
    for name, svg in figures.items():
        path = args.out / f"{name}.svg"
        write_file(path, lambda temporary, svg=svg: Path(temporary).write_text(svg, encoding="utf-8"))
        print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    run_script(main)
