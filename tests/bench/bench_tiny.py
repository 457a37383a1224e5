"""`bench.py ... --tiny`: the smallest sizes, to see that a command still runs; its figures mean nothing."""

import os
import runpy
import sys
import traceback
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent

SIZES = dict(seeds=1, rows=2000, repeats=1, inputs=8, count=4, cross=[], jobs=1)
FLAGS = {
    "sft.py": ["--steps", 1, "--batch_size", 4, "--lr", 1e-6, "--workers", 0],
    "rl.py": ["--steps", 1, "--batch_size", 4, "--max_new_tokens", 24, "--workers", 0],
    "eval.py": ["--max_new_tokens", 24, "--workers", 0],
}


def shrink(args, folder):
    """Sets the arguments to the smallest size; what is written goes to the folder. -> what starts a script"""
    for name, value in {**SIZES, "out": str(folder / "out"), "data": str(folder / "world")}.items():
        if hasattr(args, name):
            setattr(args, name, value)
    if args.command in ("toy", "data"):
        from support.toy import write_toy

        write_toy(folder / "world", pairs=4, rl_pairs=4, dev=2, test=2, candidates=4)
        write_writer(folder / "writer")
    flags = FLAGS | {"sft.py": [*FLAGS["sft.py"], "--model", folder / "writer"]}

    def run(script, *given):
        run_forked(script, [*given, *flags[script]])

    return run


def write_writer(path):
    """A random model after a few steps on one answer: it writes <gen_emb>, without which nothing can be scored."""
    from conftest import ANSWERS
    from toy_base import toy_model

    from data import encode_input
    from model import Embedder

    toy_model(path, seed=1)
    model = Embedder.from_pretrained(path)
    rows = [encode_input(model.tokenizer, {"text": text}, ANSWERS[0]) for text in ("what", "a longer question")]
    batch = model.pad_rows(rows)
    L = batch.ids.shape[1]
    answers = [b * L + t for b, row in enumerate(rows) for t in range(row.n_prompt, len(row.ids))]
    answers = torch.tensor(answers)  # flat indices of their tokens
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(25):
        (-model(batch, predict=answers - 1, labels=batch.ids.flatten()[answers]).logp.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(path)


def run_forked(script, flags):
    """One of the six scripts in a fork of this process: torch and transformers are not imported again. Its output goes
    to a file beside --out."""
    import eval  # noqa: F401 (what the scripts import is here already)
    import rl  # noqa: F401
    import sft  # noqa: F401

    out = Path(flags[flags.index("--out") + 1])
    out.mkdir(parents=True, exist_ok=True)
    output = out / f"{Path(script).stem}.out"
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.chdir(ROOT)
            os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
            os.dup2(1, 2)
            torch.set_num_threads(1)
            sys.argv = [script, *map(str, flags)]
            runpy.run_path(str(ROOT / script), run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            print(end, file=sys.stderr)
        except BaseException:  # noqa: BLE001 (the child must never come back into the benchmark)
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        raise RuntimeError(f"{script} {' '.join(map(str, flags))} failed:\n{output.read_text()[-2000:]}")
