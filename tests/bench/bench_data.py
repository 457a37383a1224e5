"""Print the toy-world tables about the data: a teacher's annotations, another model's reasoning, --cross_weight."""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from support.formats import DISC, GEN, INSTRUCTION

ROOT = Path(__file__).resolve().parent.parent.parent
EMPTY = "<think></think><answer><gen_emb>"  # an empty trace


def data(run, args):
    """Train on annotations of the toy SFT model and with --cross_weight; compare the scores with the SFT model's.

    run: function that starts a script. args: of the command line. Without --sft the SFT model is trained first.
    """
    world, out = Path(args.data), Path(args.out)
    tasks = [f"{args.split}/{path.stem}" for path in sorted((world / "tasks" / args.split).glob("*.json"))]
    sft = Path(args.sft) if args.sft else out / "sft"
    annotated = out / "annotated.json"
    jobs = {sft: [], out / "self": ["--data", annotated]}
    jobs |= {out / f"cross_{w}": ["--cross_weight", w] for w in args.cross}
    for folder, flags in jobs.items():  # finished ones are not trained again
        if folder.name == "self":
            command = ["annotate", "--pairs", world / "sft.json", "--media_root", world, "--teacher", sft, "--out",
                       annotated, "--batch_size", 64, "--max_new_tokens", 128]  # fmt: skip
            subprocess.run([sys.executable, ROOT / "data.py", *map(str, command)], cwd=ROOT, check=True)
        if not (folder / "model.safetensors").exists():
            run("sft.py", "--data", world / "sft.json", "--media_root", world, "--seed", args.seed, "--out", folder,
                *flags)  # fmt: skip
    run("eval.py", "--root", world, "--tasks", *tasks, "--model", *jobs, "--out", out / "eval",
        "--samples", 0)  # fmt: skip
    names = ["sft", *(folder.name for folder in list(jobs)[1:])]
    read = {name: [json.loads((out / "eval" / folder.name / f"{file}.json").read_text())
                   for file in ("scores", "per_query")] for name, folder in zip(names, jobs)}  # fmt: skip
    models = {"sft": sft, "self": out / "self"}
    reasoners = reasoner_lines(run, models, tasks, world, out / "reasoners")
    text = "\n".join([*score_lines(names, read), "", *reasoners])
    (out / "table.md").write_text(text + "\n")
    print(text)


def score_lines(names, read):
    from support.report import paired_change

    columns = ["disc", "gen", "fused", "oracle", "gen_disc", "disc_gen"]
    lines = [f"| hit@1, % | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name in names:
        overall = read[name][0]["overall"]
        lines.append(f"| {name} | {' | '.join(f'{100 * overall[c]:.1f}' for c in columns)} |")
    for name in names[1:]:  # paired over the queries; the error holds the queries' noise only
        cells = []
        for column in columns:
            first, last = ({t: x[column] for t, x in read[n][1].items()} for n in ("sft", name))
            gain, error = paired_change(first, last)
            cells.append(f"{100 * gain:+.1f} ± {100 * error:.1f}")
        lines.append(f"| {name} - sft | {' | '.join(cells)} |")
    return lines


def reasoner_lines(run, models, tasks, world, out):
    """Return a table of gen and fused hit@1: one model reasons (rows), another reads its text and embeds (columns).

    run: function that starts a script. models: {label: folder}. The last row is a file of empty answers.
    """
    from support.report import model_names

    out = Path(out)
    common = ["--root", world, "--tasks", *tasks, "--out", out]
    nobody = out / "nobody.jsonl"
    nobody.unlink(missing_ok=True)
    run("eval.py", *common, "--export", nobody)
    rows = [json.loads(line) | {"answer": EMPTY} for line in nobody.read_text().splitlines()]
    nobody.write_text("".join(json.dumps(row) + "\n" for row in rows))

    folders = list(models.values())
    name_of = dict(zip(models, model_names(folders))) | {"nobody": "nobody"}
    lines = [f"| reasoner; gen / fused hit@1 in % | {' | '.join(f'embedder {label}' for label in models)} |"]
    lines.append("|---" * (len(models) + 1) + "|")
    for reasoner, answers in (models | {"nobody": nobody}).items():
        run("eval.py", *common, "--samples", 0, "--model", *folders, "--reasoner", answers)
        cells = []
        for embedder in models:
            folder = out / f"{name_of[embedder]}-reads-{name_of[reasoner]}"
            overall = json.loads((folder / "scores.json").read_text())["overall"]
            cells.append(f"{100 * overall['gen']:.1f} / {100 * overall['fused']:.1f}")
        lines.append(f"| {reasoner} | {' | '.join(cells)} |")
    return lines


def check(rows, out):
    """Print time and memory of data.py check, without opening images, on a file of the published size."""
    out, words = Path(out), ["the", "a", "picture", "shows", "red", "round", "table", "which", "stands", "left", "so"]
    (out / "images").mkdir(parents=True, exist_ok=True)
    for i in range(1000):
        (out / f"images/{i}.jpg").touch()
    rng, file = np.random.default_rng(0), out / "big.json"
    texts = [" ".join(rng.choice(words, int(n))) for n in rng.lognormal(5.95, 0.4, 997)]  # about 2 kB each
    with open(file, "w") as big:
        for i in range(rows):
            row = {"dataset_name": f"dataset {i % 20}"}
            for side, k in (("qry", i), ("pos", 7 * i + 1)):
                turns = [("human", f"<image>what is it? {k}\n{DISC}\n{INSTRUCTION}"),
                         ("gpt", f"<think>{texts[k % 997]}</think><answer>thing {k}{GEN}")]  # fmt: skip
                row[side] = {"image": [f"images/{k % 1000}.jpg"],
                             "conversations": [{"from": who, "value": text} for who, text in turns]}  # fmt: skip
            big.write(("," if i else "[") + "\n" + json.dumps(row))
        big.write("\n]\n")
    began = time.perf_counter()
    subprocess.run([sys.executable, ROOT / "data.py", "check", file, "--media_root", out], cwd=ROOT, check=True)
    seconds, used = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu, size = used.ru_utime + used.ru_stime, file.stat().st_size / 1e9
    print(f"| data.py check, {os.cpu_count()} cores | GB | s | CPU s | GiB of the largest process |\n"
          "|---|---|---|---|---|\n"
          f"| {rows:,} rows | {size:.2f} | {seconds:.0f} | {cpu:.0f} | {used.ru_maxrss / 2**20:.1f} |")  # fmt: skip
    file.unlink()
