"""Print the tables of docs/. Nothing here decides a test; every table in docs/ names its command and commit.

Every command takes --tiny: the smallest size, to see that the command still runs. Its values mean nothing.
"""

import argparse
import importlib
import os
import sys
import tempfile
from pathlib import Path

from bench_common import ROOT, run, shrink

FUNCTIONS = {"toy": "bench_toy.toy", "data": "bench_toy.data", "rollout": "bench_engine.compare",
             "rl": "bench_engine.compare", "sft": "bench_passes.passes", "memory": "bench_scale.memory",
             "gpu": "bench_gpu.gpu", "kills": "bench_kills.kills"}  # fmt: skip


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    toy = commands.add_parser("toy", help="toy world: SFT, DUME and RL for some seeds, scored in every mode")
    toy.add_argument("--seeds", type=int, default=3)
    toy.add_argument("--recipes", nargs="+", choices=("rl", "rl, floor 1e-4"), default=["rl"],
                     help="RL runs; the findings are about the first one")  # fmt: skip
    data = commands.add_parser("data", help="toy world: a model's own annotations, and --cross_weight")
    data.add_argument("--sft", help="a toy SFT model; without one it is trained")
    data.add_argument("--cross", nargs="*", default=["0.1", "0.3"], help="values of --cross_weight")
    for p, out in ((toy, "runs/bench"), (data, "runs/bench_data")):
        p.add_argument("--out", default=out)
        p.add_argument("--data", default="runs/toy/data", help="the toy world; it is written if it does not exist")
        p.add_argument("--split", choices=("dev", "test"), default="test", help="recipes are chosen on dev")
    commands.add_parser("rollout", help="generation on a CPU: speed and memory of rollouts and the official way")
    commands.add_parser("rl", help="training on a CPU: speed and memory of an RL step and the official way")
    commands.add_parser("sft", help="training on a CPU: padding, speed and memory of --pass_tokens")
    p = commands.add_parser("memory", help="memory plan of the real sizes on 8 GPUs, from fake tensors")
    p.add_argument("--family", choices=("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), default="qwen2_vl")
    commands.add_parser("gpu", help="speed and memory of the 2B with random weights on one GPU")
    p = commands.add_parser("kills", help="runs that are killed at random moments, compared with an unbroken run")
    p.add_argument("--count", type=int, default=64, help="kills in all")
    p.add_argument("--seed", type=int, default=0, help="of the moments and signals")
    for p in commands.choices.values():
        p.add_argument("--tiny", action="store_true", help="the smallest size, to see that the command runs")
    return parser.parse_args()


def main():
    args = parse()
    os.chdir(ROOT)  # the scripts run there too, so relative paths mean the same
    module, name = FUNCTIONS[args.command].split(".")
    command = getattr(importlib.import_module(module), name)  # the imports take seconds
    with tempfile.TemporaryDirectory() as folder:
        return command(args, shrink(args, Path(folder)) if args.tiny else run)


if __name__ == "__main__":
    sys.exit(main())
