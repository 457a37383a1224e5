"""Tables of docs/. Nothing here decides a test; every number comes with the command that printed it.

python tests/bench/bench.py toy --seeds 3     # findings on the toy world: SFT, DUME and RL; --recipes adds RL controls
python tests/bench/bench.py data              # toy world: own annotations, another model's reasoning, --cross_weight
python tests/bench/bench.py check             # data.py check on 1.46 million rows
python tests/bench/bench.py rollout           # speed and memory beside the official recipe: rollouts
python tests/bench/bench.py rl                # update pass, reference pass and a whole RL step
python tests/bench/bench.py decode            # a decode step beside transformers' own
python tests/bench/bench.py embed             # decode steps of continuous batching
python tests/bench/bench.py sft               # SFT step: memory and time
python tests/bench/bench.py eval              # encoding for evaluation
python tests/bench/bench.py memory            # memory plan of the real sizes on 8 GPUs, by fake tensors
python tests/bench/bench.py plan              # time plan of the full recipe on 8 H100, beside the published hours
python tests/bench/bench.py gpu               # one GPU, the real 2B's sizes: measured beside what was expected
python tests/bench/bench.py kills             # runs killed at random moments against one that never was

Every command takes --tiny: smallest sizes, whose figures mean nothing, to see that it still runs.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/bench")]

# the disc-only baseline: no reasoning, contrastive loss at full weight; its learning rate was chosen on the dev scenes
DUME = ["--w_disc", "1", "--w_gen", "0", "--w_ce", "0"]
# RL recipes that are compared; the first is the toy preset
RECIPES = {
    "rl": [],
    "rl plain (paper)": ["--w_anchor", "0"],
}


def run(script, *flags, threads=1):
    """One of the six scripts as a user would start it; its output goes to a file beside --out."""
    out = Path(flags[flags.index("--out") + 1])
    out.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "TQDM_MININTERVAL": "30"}
    with open(out / f"{Path(script).stem}.out", "w") as file:
        command = [sys.executable, str(ROOT / script), *map(str, flags)]
        done = subprocess.run(command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{(out / f'{Path(script).stem}.out').read_text()[-2000:]}")


def held_out_reward(model, file, root, batches=14, batch_size=24, seed=1234):
    """Reward and its parts on held-out groups: the same pairs and the same random numbers for every model.

    Returns {part: [mean over both sides and G of each pair]}.
    """
    import torch

    import rl
    from data import PairData
    from model import Embedder
    from support.files import stable_hash
    from support.formats import DISC

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
        for name, x in {"reward": rewards, **{name: parts[name] for name in ("format", "share", "gap")}}.items():
            out[name] += x.mean((0, 2)).tolist()
    return out


def toy(args, run):
    """SFT, DUME and the RL recipes for each seed, all scored on the same scenes of --split. args: of the command line;
    run: what starts a script."""
    from support.toy import write_toy

    seeds, split, recipes = args.seeds, args.split, args.recipes
    out, data = Path(args.out), Path(args.data)
    if not (data / "sft.json").exists():
        write_toy(data, seed=0)
    tasks = [f"{split}/{path.stem}" for path in sorted((data / "tasks" / split).glob("*.json"))]
    names = ["sft", *recipes]
    place = lambda s, name: out / f"seed{s}" / name.replace(" ", "_").replace("(", "").replace(")", "")  # noqa: E731

    def train(kind):  # the same world that the scores are measured on
        return "--data", data / f"{kind}.json", "--media_root", data

    def evaluate(s, name, *flags):
        run(
            "eval.py",
            "--root",
            data,
            "--tasks",
            *tasks,
            "--model",
            place(s, name),
            "--out",
            place(s, name) / "eval",
            *flags,
        )
        folder = place(s, name) / "eval" / place(s, name).name
        return json.loads((folder / "scores.json").read_text()), json.loads((folder / "per_query.json").read_text())

    def chain(s, name):
        if name == "dume":  # its best learning rate was chosen on the dev scenes
            run("sft.py", "--seed", s, "--out", place(s, name), *train("sft"), *DUME)
            return evaluate(s, name, "--samples", 0, "--max_new_tokens", 1)
        if name == "sft":
            run("sft.py", "--seed", s, "--out", place(s, name), *train("sft"))
        else:
            run("rl.py", "--seed", s, "--model", place(s, "sft"), "--out", place(s, name), *train("rl"), *RECIPES[name])
        scores, per_query = evaluate(s, name)
        file = place(s, name) / "reward.json"
        code = f"import sys, json; sys.path.insert(0, {str(ROOT / 'tests/bench')!r}); import bench; "
        given = [str(place(s, name)), str(data / f"rl_{split}.json"), str(data), *([1, 4] if args.tiny else [])]
        code += f"r = bench.held_out_reward(*{given!r}); "
        subprocess.run([sys.executable, "-c", code + f"json.dump(r, open({str(file)!r}, 'w'))"], check=True)
        return scores, per_query, json.loads(file.read_text())

    results = {}
    with ThreadPoolExecutor(args.jobs) as pool:
        for wave in (["sft"], [recipes[0], "dume", *recipes[1:]]):
            started = {(s, name): pool.submit(chain, s, name) for name in wave for s in range(seeds)}
            results |= {key: job.result() for key, job in started.items()}

    def mean(s, name, column):
        return results[s, name][0]["overall"][column]

    columns = ["disc", "gen", "fused", "oracle", "pass@1", "pass@2", "pass@8", "pass@16"]
    columns += ["gen_disc", "disc_gen"]
    lines = [f"| {split} scenes, seeds 0..{seeds - 1} | {' | '.join(columns)} | reward | share | gap |"]
    lines.append("|" + "---|" * (len(columns) + 4))
    for name in ["dume", *names]:
        cells = []
        for column in columns:
            values = [100 * mean(s, name, column) for s in range(seeds) if column in results[s, name][0]["overall"]]
            hidden = name == "dume" and column != "disc"
            cells.append(
                "" if hidden or not values else f"{np.mean(values):.1f} ({min(values):.0f}..{max(values):.0f})"
            )
        for part in ("reward", "share", "gap"):
            cells.append(
                "" if name == "dume" else f"{np.mean([np.mean(results[s, name][2][part]) for s in range(seeds)]):.3f}"
            )
        lines.append(f"| {name} | {' | '.join(cells)} |")

    from support.report import paired_change

    def change(first, last, column_first, column_last):
        """Paired over the same queries and averaged over seeds: the error holds the queries' noise only."""
        pairs = []
        for s in range(seeds):
            a, b = results[s, first][1], results[s, last][1]
            tasks_of = {t: (a[t][column_first], b[t][column_last]) for t in a}
            pairs.append(
                paired_change({t: x for t, (x, _) in tasks_of.items()}, {t: y for t, (_, y) in tasks_of.items()})
            )
        gain, error = np.mean([p[0] for p in pairs]), math.sqrt(sum(p[1] ** 2 for p in pairs)) / seeds
        each = ", ".join(f"{100 * p[0]:+.1f}" for p in pairs)
        return f"{100 * gain:+.1f} ± {100 * error:.1f} points (seeds: {each})"

    rl = names[1]
    lines += ["", "| finding | figure |", "|---|---|"]
    lines.append(f"| gen after RL - its own disc | {change(rl, rl, 'disc', 'gen')} |")
    lines.append(f"| gen after RL - DUME | {change('dume', rl, 'disc', 'gen')} |")
    lines.append(f"| oracle - gen, after RL | {change(rl, rl, 'gen', 'oracle')} |")
    lines.append(f"| oracle - disc, after RL | {change(rl, rl, 'disc', 'oracle')} |")
    lines.append(
        f"| oracle of disc and gen - oracle of two gen samples (pass@2) | {change(rl, rl, 'pass@2', 'oracle')} |"
    )
    lines.append(f"| pass@16 - pass@1 after SFT | {change('sft', 'sft', 'pass@1', 'pass@16')} |")
    for name in ("sft", rl):
        lines.append(f"| fused - gen, {name} | {change(name, name, 'gen', 'fused')} |")
    for name in recipes:
        lines.append(f"| {name}: gen, change from SFT | {change('sft', name, 'gen', 'gen')} |")
        lines.append(f"| {name}: fused, change from SFT | {change('sft', name, 'fused', 'fused')} |")
        before = [np.array(results[s, "sft"][2]["reward"]) for s in range(seeds)]
        d = [np.array(results[s, name][2]["reward"]) - before[s] for s in range(seeds)]
        error = math.sqrt(sum(x.var(ddof=1) / len(x) for x in d)) / seeds
        each = ", ".join(f"{x.mean():+.4f}" for x in d)
        lines.append(
            f"| {name}: held-out reward, change | {np.mean([x.mean() for x in d]):+.4f} ± {error:.4f} ({each}) |"
        )
    lines += [
        "",
        f"| gen by task | {' | '.join(['dume (disc)', 'sft disc', 'sft', *recipes])} |",
        "|---" * (len(names) + 3) + "|",
    ]
    for task in tasks:
        row = [("dume", "disc"), ("sft", "disc"), *((name, "gen") for name in names)]
        cells = [
            f"{100 * np.mean([results[s, n][0]['tasks'][task][m]['hit@1'] for s in range(seeds)]):.0f}" for n, m in row
        ]
        lines.append(f"| {task} | {' | '.join(cells)} |")

    import bench_data

    mixed = {f"sft, seed {s}": place(s, "sft") for s in range(min(2, seeds))} | {f"{rl}, seed 0": place(0, rl)}
    lines += ["", *bench_data.reasoner_lines(run, mixed, tasks, data, out / "reasoners")]
    text = "\n".join(lines)
    print(text)
    (out / "table.md").write_text(text + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("toy", help="findings on the toy world")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--out", default="runs/bench")
    p.add_argument("--data", default="runs/toy/data")
    p.add_argument("--split", choices=("dev", "test"), default="test", help="recipes are chosen on dev")
    p.add_argument("--jobs", type=int, default=2, help="runs at once, one thread each")
    p.add_argument("--recipes", nargs="*", choices=list(RECIPES), default=["rl"], help="RL runs; the first is judged")
    p = commands.add_parser("data", help="toy world: own annotations, another model's reasoning, --cross_weight")
    p.add_argument("--data", default="runs/toy/data", help="the toy world")
    p.add_argument("--sft", help="a toy SFT model; without one it is trained")
    p.add_argument("--out", default="runs/bench_data")
    p.add_argument("--split", choices=("dev", "test"), default="test")
    p.add_argument("--cross", nargs="*", default=["0.1", "0.3"], help="values of --cross_weight")
    p.add_argument("--seed", type=int, default=0)
    p = commands.add_parser("check", help="data.py check on a file as large as the published one")
    p.add_argument("--rows", type=int, default=1_463_338, help="5.2 kB each")
    p.add_argument("--out", default="runs/bench_check")
    for name in ("rollout", "rl"):
        p = commands.add_parser(name, help="beside the official recipe")
        p.add_argument("--repeats", type=int, default=3, help="timed runs of each side")
    p = commands.add_parser("eval", help="time and memory of encoding for evaluation")
    p.add_argument("--inputs", type=int, default=96)
    p = commands.add_parser("decode", help="a decode step beside transformers' own, on a CPU")
    p.add_argument("--repeats", type=int, default=7)
    p = commands.add_parser("embed", help="decode steps of Embedder.embed")
    p.add_argument("--inputs", type=int, default=1000)
    commands.add_parser("sft", help="SFT step beside the official recipe")
    p = commands.add_parser("memory", help="memory plan of the real sizes")
    p.add_argument("--family", choices=("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), default="qwen2_vl")
    commands.add_parser("plan", help="time plan of the full recipe on 8 H100, by arithmetic")
    commands.add_parser("gpu", help="what one GPU makes of the real 2B with random weights")
    p = commands.add_parser("kills", help="runs killed at random moments")
    p.add_argument("--count", type=int, default=64, help="kills in all")
    p.add_argument("--seed", type=int, default=0, help="of the moments and signals")
    for p in commands.choices.values():
        p.add_argument("--tiny", action="store_true", help="smallest size, in seconds: does the command still run?")
    args = parser.parse_args()
    os.chdir(ROOT)  # the stages run there too: one meaning of relative paths
    if not args.tiny:
        sys.exit(start(args, run))
    from bench_tiny import shrink

    with tempfile.TemporaryDirectory() as folder:
        sys.exit(start(args, shrink(args, Path(folder))))


def start(args, run):
    """One command. run: what starts a script -> exit code"""
    if args.command == "toy":
        toy(args, run)
    elif args.command in ("data", "check"):
        import bench_data

        if args.command == "check":
            bench_data.check(args.rows, args.out)
        else:
            bench_data.data(run, args)
    elif args.command == "gpu":
        from bench_gpu import gpu

        gpu(args.tiny)
    elif args.command == "kills":
        import bench_kills

        return bench_kills.kills(args.count, args.seed)
    elif args.command == "eval":
        from bench_eval import bench_eval

        bench_eval(args.inputs, args.tiny)
    elif args.command == "memory":
        import bench_scale

        bench_scale.memory(args.family, args.tiny)
    elif args.command == "sft":
        import bench_scale

        bench_scale.sft_table(args.tiny)
    elif args.command == "plan":
        import bench_plan

        bench_plan.plan()
    else:
        import bench_engine

        cases = {"rollout": ["rollout short", "rollout long"], "rl": ["update", "reference", "step"]}
        if args.command == "embed":
            bench_engine.embed(args.inputs)
        elif args.command == "decode":
            bench_engine.decode(args.repeats)
        else:
            bench_engine.compare(cases[args.command], args.repeats, args.tiny)
    return 0


if __name__ == "__main__":
    main()
