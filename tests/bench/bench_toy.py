"""`bench.py toy` and `bench.py data`: findings on the toy world, and its tables about training data."""

import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from bench_common import ROOT, in_fresh_process

import rl
from data import PairData
from model import Embedder
from support.files import stable_hash
from support.formats import DISC
from support.report import model_names, paired_change
from support.toy import write_toy

DUME = ["--w_disc", "1", "--w_gen", "0", "--w_ce", "0"]  # the disc-only baseline: no reasoning
# RL runs: the toy preset, and the preset with the paper's constant in the denominator of the advantage
RECIPES = {"rl": [], "rl, floor 1e-4": ["--std_floor", "1e-4"]}
COLUMNS = ["disc", "gen", "fused", "oracle", "pass@1", "pass@2", "pass@8", "pass@16", "gen_disc", "disc_gen"]
EMPTY = "<think></think><answer><gen_emb>"  # an answer without reasoning and summary


class Result(NamedTuple):
    scores: dict  # scores.json of eval.py
    per_query: dict  # per_query.json of eval.py
    rewards: dict | None = None  # of held_out_reward


def read_result(folder):
    return Result(*(json.loads((folder / f"{name}.json").read_text()) for name in ("scores", "per_query")))


def world_of(args):
    """Return the folders of the toy world and of the results, and the tasks of a split. Write a missing world."""
    world = Path(args.data)
    if not (world / "sft.json").exists():
        write_toy(world, seed=0)
    names = [f"{args.split}/{path.stem}" for path in sorted((world / "tasks" / args.split).glob("*.json"))]
    return world, Path(args.out), names


def held_out_reward(model, file, root, batches=14, batch_size=24, seed=1234):
    """Return {part: [mean over both sides and G of each held-out pair]}, with the same random numbers for any model."""
    torch.set_num_threads(1)
    embedder = Embedder.from_pretrained(model)
    args = rl.Settings(**rl.PRESETS["toy"])
    data = PairData([file], embedder.tokenizer, kind="rl", batch_size=batch_size, seed=0, root=root, needs=[DISC])
    out = {name: [] for name in ("reward", "format", "share", "gap")}
    for step in range(batches):
        pairs = [data[i] for i in data.order[step]]
        rows = [p.query for p in pairs] + [p.target for p in pairs]
        seeds = [stable_hash(seed, step, n) for n in range(len(rows))]
        rewards, parts = rl.rewards_of(embedder, rl.rollout(embedder, rows, seeds, args), pairs, args)
        for name, values in out.items():
            x = rewards if name == "reward" else parts[name]
            values += x.mean((0, 2)).tolist()
    return out


def toy(args, run):
    """Train SFT, DUME and the RL recipes for each seed and score all on the same scenes. run starts a script.

    A model that is in its folder is not trained again."""
    world, out, tasks = world_of(args)

    def folder_of(seed, name):
        return out / f"seed{seed}" / name.replace(", ", "_").replace(" ", "_")

    def chain(seed, name):
        """Train and score one model."""
        folder = folder_of(seed, name)
        kind = "rl" if name in RECIPES else "sft"
        train = ["--seed", seed, "--out", folder, "--data", world / f"{kind}.json", "--media_root", world]
        if name == "dume":
            train += DUME
        elif name in RECIPES:
            train += ["--model", folder_of(seed, "sft"), *RECIPES[name]]
        if not (folder / "model.safetensors").exists():
            run(f"{kind}.py", *train)
        score = ["--root", world, "--tasks", *tasks, "--model", folder, "--out", folder / "eval"]
        if name == "dume":
            run("eval.py", *score, "--samples", 0, "--max_new_tokens", 1)
            return read_result(folder / "eval" / folder.name)
        run("eval.py", *score)
        given = [str(folder), str(world / f"rl_{args.split}.json"), str(world), *([1, 4] if args.tiny else [])]
        rewards = in_fresh_process("bench_toy", f"held_out_reward(*{given!r})", args.tiny)
        return read_result(folder / "eval" / folder.name)._replace(rewards=rewards)

    results = {}
    with ThreadPoolExecutor(1 if args.tiny else 2) as pool:  # runs at once, one thread each
        for wave in (["sft"], [args.recipes[0], "dume", *args.recipes[1:]]):
            jobs = {name: [pool.submit(chain, seed, name) for seed in range(args.seeds)] for name in wave}
            results |= {name: [job.result() for job in of_seeds] for name, of_seeds in jobs.items()}
    results = {name: results[name] for name in ("dume", "sft", *args.recipes)}
    reasoners = {f"sft, seed {seed}": folder_of(seed, "sft") for seed in range(min(2, args.seeds))}
    reasoners[f"{args.recipes[0]}, seed 0"] = folder_of(0, args.recipes[0])
    tables = [
        overall_table(results, f"{args.split} scenes, seeds 0..{args.seeds - 1}"),
        findings_table(results, args.recipes),
        tasks_table(results, tasks),
        reasoner_table(run, reasoners, tasks, world, out / "reasoners"),
    ]
    print_tables(tables, out)


def print_tables(tables, out):
    text = "\n\n".join("\n".join(lines) for lines in tables)
    print(text)
    (out / "table.md").write_text(text + "\n")


def markdown(head, rows):
    """Return the lines of a table."""
    head_line, *lines = (f"| {' | '.join(cells)} |" for cells in (head, *rows))
    return [head_line, "|" + "---|" * len(head), *lines]


def overall_table(results, title):
    """Return a table with one column per model. DUME has no reasoning, so only disc means something."""
    rows = []
    for column in COLUMNS:
        cells = [column]
        for name, of_seeds in results.items():
            values = [100 * r.scores["overall"][column] for r in of_seeds if name != "dume" or column == "disc"]
            cells.append(f"{np.mean(values):.1f} ({min(values):.0f}..{max(values):.0f})" if values else "")
        rows.append(cells)
    for part in ("reward", "share", "gap"):
        cells = [part]
        for of_seeds in results.values():
            means = [np.mean(result.rewards[part]) for result in of_seeds if result.rewards]
            cells.append(f"{np.mean(means):.3f}" if means else "")
        rows.append(cells)
    return markdown([title, *results], rows)


def findings_table(results, recipes):
    def change(first, last, column_first, column_last):
        """Pair over the same queries and average over the seeds: the error has the queries' noise only."""
        found = []
        for a, b in zip(results[first], results[last]):
            before = {task: columns[column_first] for task, columns in a.per_query.items()}
            after = {task: columns[column_last] for task, columns in b.per_query.items()}
            found.append(paired_change(before, after))
        gains, errors = zip(*found)
        error = math.sqrt(sum(x**2 for x in errors)) / len(errors)
        each = ", ".join(f"{100 * gain:+.1f}" for gain in gains)
        return f"{100 * np.mean(gains):+.1f} ± {100 * error:.1f} points (seeds: {each})"

    def reward_change(name):
        changes = [np.subtract(b.rewards["reward"], a.rewards["reward"]) for a, b in zip(results["sft"], results[name])]
        error = math.sqrt(sum(x.var(ddof=1) / len(x) for x in changes)) / len(changes)
        each = ", ".join(f"{x.mean():+.4f}" for x in changes)
        return f"{np.mean(changes):+.4f} ± {error:.4f} ({each})"

    rl = recipes[0]
    rows = [
        ("gen after RL - its own disc", change(rl, rl, "disc", "gen")),
        ("gen after RL - DUME", change("dume", rl, "disc", "gen")),
        ("oracle - gen, after RL", change(rl, rl, "gen", "oracle")),
        ("oracle - disc, after RL", change(rl, rl, "disc", "oracle")),
        ("oracle of disc and gen - oracle of two gen samples (pass@2)", change(rl, rl, "pass@2", "oracle")),
        ("pass@16 - pass@1 after SFT", change("sft", "sft", "pass@1", "pass@16")),
    ]
    rows += [(f"fused - gen, {name}", change(name, name, "gen", "fused")) for name in ("sft", rl)]
    for name in recipes:
        for mode in ("disc", "gen", "fused", "pass@1", "pass@16"):
            rows.append((f"{name}: {mode}, change from SFT", change("sft", name, mode, mode)))
        rows.append((f"{name}: held-out reward, change", reward_change(name)))
    return markdown(["finding", "value"], rows)


def tasks_table(results, tasks):
    shown = {"dume (disc)": ("dume", "disc"), "sft disc": ("sft", "disc")}
    shown |= {name: (name, "gen") for name in results if name != "dume"}
    rows = []
    for task in tasks:
        cells = [task]
        for name, mode in shown.values():
            values = [result.scores["tasks"][task][mode]["hit@1"] for result in results[name]]
            cells.append(f"{100 * np.mean(values):.0f}")
        rows.append(cells)
    return markdown(["gen by task", *shown], rows)


def reasoner_table(run, models, tasks, world, out):
    """Return a table of gen and fused hit@1: one model reasons (rows), another reads its text and embeds (columns).

    models: {label: folder}. The last row is a file of empty answers.
    """
    common = ["--root", world, "--tasks", *tasks, "--out", out]
    empty = out / "empty.jsonl"
    empty.unlink(missing_ok=True)
    run("eval.py", *common, "--export", empty)
    answers = [json.loads(line) | {"answer": EMPTY} for line in empty.read_text().splitlines()]
    empty.write_text("".join(json.dumps(row) + "\n" for row in answers))
    folders = list(models.values())
    name_of = dict(zip(models, model_names(folders))) | {"empty": "empty"}
    rows = []
    for reasoner, answers in (models | {"empty": empty}).items():
        run("eval.py", *common, "--samples", 0, "--model", *folders, "--reasoner", answers)
        cells = [reasoner]
        for embedder in models:
            overall = read_result(out / f"{name_of[embedder]}-reads-{name_of[reasoner]}").scores["overall"]
            cells.append(f"{100 * overall['gen']:.1f} / {100 * overall['fused']:.1f}")
        rows.append(cells)
    return markdown(["reasoner; gen / fused hit@1 in %", *(f"embedder {label}" for label in models)], rows)


def data(args, run):
    """Train on annotations of the toy SFT model and with --cross_weight; compare the scores with the SFT model's."""
    world, out, tasks = world_of(args)
    annotated = out / "annotated.json"
    folders = {"sft": Path(args.sft) if args.sft else out / "sft", "self": out / "self"}
    flags = {"sft": [], "self": ["--data", annotated]}
    for w in args.cross:
        folders[f"cross {w}"], flags[f"cross {w}"] = out / f"cross_{w}", ["--cross_weight", w]
    for name, folder in folders.items():
        if name == "self":
            command = ["annotate", "--pairs", world / "sft.json", "--media_root", world, "--teacher", folders["sft"],
                       "--out", annotated, "--batch_size", 64, "--max_new_tokens", 128]  # fmt: skip
            subprocess.run([sys.executable, ROOT / "data.py", *map(str, command)], cwd=ROOT, check=True)
        if not (folder / "model.safetensors").exists():  # finished ones are not trained again
            common = ["--data", world / "sft.json", "--media_root", world, "--seed", 0, "--out", folder]
            run("sft.py", *common, *flags[name])
    score = ["--root", world, "--tasks", *tasks, "--out", out / "eval", "--samples", 0]
    run("eval.py", *score, "--model", *folders.values())
    results = {name: read_result(out / "eval" / folder.name) for name, folder in folders.items()}
    models = {name: folders[name] for name in ("sft", "self")}
    tables = [comparison_table(results), reasoner_table(run, models, tasks, world, out / "reasoners")]
    print_tables(tables, out)


def comparison_table(results):
    """Return the scores of each model and their paired changes from SFT. The errors have the queries' noise only."""
    columns = [column for column in COLUMNS if not column.startswith("pass@")]
    rows = [[name, *(f"{100 * result.scores['overall'][column]:.1f}" for column in columns)]
            for name, result in results.items()]  # fmt: skip
    for name in list(results)[1:]:
        cells = [f"{name} - sft"]
        for column in columns:
            before, after = ({task: x[column] for task, x in results[n].per_query.items()} for n in ("sft", name))
            gain, error = paired_change(before, after)
            cells.append(f"{100 * gain:+.1f} ± {100 * error:.1f}")
        rows.append(cells)
    return markdown(["hit@1, %", *columns], rows)
