"""Before and after a run (commands of data.py): a data file looked over, a checkpoint made a model folder."""

import os
import sys
from collections import Counter, namedtuple
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from data import PairData
from model import Embedder
from support.backbones import QWEN2_VL
from support.checkpoint import open_checkpoint, restore
from support.distributed import forked_loader
from support.files import Rows, dataset_of
from support.formats import DISC, GEN, RowCheck, content_key, side_of
from support.images import find_picture
from support.program import BadInput, Progress, Skip, text_table
from support.settings import Command, hold, weights_digest
from support.weights import check_model, load_family, load_tokenizer

PROBLEMS = ("schema", "media", "too long", "left out")
SHOWN = 5  # messages of each problem
Found = namedtuple("Found", "dataset problem message tokens pictures target", defaults=("", "", 0, 0, 0))


@dataclass
class CheckedRows(Dataset):
    """What the loader makes of each row, as a Found; without a tokenizer only its form and whether the files exist."""

    data: PairData

    def __getitem__(self, i):
        name, row = self.data.rows[i]
        found = Found(dataset_of(row))
        try:
            RowCheck(self.data.kind, self.data.needs)(row, name)
            query, _ = side_of(row, self.data.kind, "qry", name)
            target, _ = side_of(row, self.data.kind, "pos", name)
            paths = query["images"] + query["video"] + target["images"] + target["video"]
            found = found._replace(pictures=len(paths), target=content_key(**target))
            if self.data.tokenizer is None:
                for path in paths:
                    find_picture(path, self.data.root)
                return found
            return found._replace(tokens=self.longest_side(i))
        except Skip as error:
            problem = "too long" if "--max_length" in str(error) else "media"
            return found._replace(problem=problem, message=f"{name}: {str(error).removeprefix(f'{name}, ')}")
        except Exception as error:  # whatever would stop a run at this row
            message = str(error) if isinstance(error, ValueError) else f"{name}: {error!r}"
            return found._replace(problem="schema", message=message)

    def longest_side(self, i):
        """Tokens of a pair's longer side, encoded as in training."""
        pair = self.data[i]
        if not pair.ok:
            raise Skip(pair.reason)
        return max(len(pair.query.ids), len(pair.target.ids))


def check(args):
    """Prints what the loader makes of every row -> whether all is well."""
    tokenizer, family = None, QWEN2_VL
    if args.model:
        tokenizer = load_tokenizer(args.model)  # says so where the family is not known
        family = load_family(args.model)
        tokenizer.add_tokens([token for token in (GEN, DISC) if token not in tokenizer.get_vocab()])
    rows = Rows([args.file])
    kind = "rl" if len(rows) and "qry_text" in rows[0][1] else "sft"
    data = PairData(rows, tokenizer, kind=kind, batch_size=1, seed=0, root=args.media_root,
                    max_length=args.max_length, family=family)  # fmt: skip
    loader = forked_loader(CheckedRows(data), args.workers, sampler=range(len(rows)), batch_size=64, collate_fn=list)
    found = []
    with Progress(total=len(rows), desc="check", unit="row") as bar:
        for part in loader:
            found += part
            bar.update(len(part))
    found = mark_left_out(found, args.batch_size)
    print(check_report(found, args))
    return not any(row.problem for row in found)


def mark_left_out(found, batch_size):
    """BatchOrder leaves out a dataset that is smaller than a batch: its good rows have this problem."""
    sizes = Counter(row.dataset for row in found)
    marked = []
    for row in found:
        size = sizes[row.dataset]
        if size < batch_size and not row.problem:
            message = f"{row.dataset} has {size} rows, fewer than --batch_size {batch_size}"
            row = row._replace(problem="left out", message=message)
        marked.append(row)
    return marked


def check_report(found, args):
    """The table of datasets, the first messages of each problem, and what a run makes of it, as text."""
    rows_of = {}
    for row in found:
        rows_of.setdefault(row.dataset, []).append(row)
    heads = ("rows", "share", "tokens", "longest", "pictures", "most", "same target", *PROBLEMS)
    table = [["dataset", *heads]]
    for name, rows in [*sorted(rows_of.items()), ("all", found)]:
        table.append([name, *dataset_cells(rows, len(found))])
    lines = [text_table(table)]
    for problem in PROBLEMS:
        messages = dict.fromkeys(row.message for row in found if row.problem == problem)
        lines += [f"{problem}: {message}" for message in list(messages)[:SHOWN]]
    lines.append(verdict(found, args))
    if not args.model:
        lines.append("Without --model: media only looked up, tokens not counted.")
    return "\n".join(lines)


def dataset_cells(rows, total):
    """The line of the table for some of the total rows."""
    tokens = [row.tokens for row in rows if not row.problem] or [0]
    pictures = [row.pictures for row in rows]
    targets = Counter(row.target for row in rows)
    shared = sum(n for n in targets.values() if n > 1)  # rows whose target is another row's too
    problems = Counter(row.problem for row in rows)
    return [
        f"{len(rows):,}",
        f"{len(rows) / total:.1%}",
        f"{np.mean(tokens):.0f}",
        f"{max(tokens):,}",
        f"{np.mean(pictures):.2f}",
        f"{max(pictures)}",
        f"{shared / len(rows):.1%}",
        *[f"{problems[problem]:,}" for problem in PROBLEMS],
    ]


def verdict(found, args):
    count = Counter(row.problem for row in found)
    skipped = count["media"] + count["too long"] + count["left out"]
    settings = f"--max_length {args.max_length} --batch_size {args.batch_size}"
    stop = ""
    if count["schema"]:
        stop = f" and does not start before {count['schema']:,} are mended"
    return f"A run with {settings} skips {skipped:,} of {len(found):,} rows{stop}."


def export_checkpoint(checkpoint, out):
    """A checkpoint of sft.py or rl.py as a model folder, so that a step in between can be evaluated."""
    meta, _ = open_checkpoint(checkpoint)
    base = meta["settings"].get("model")
    if Path(out).is_file() or (Path(out) / "config.json").exists():
        raise BadInput(f"--out {out} is a file or holds a model already; give another folder")
    check_model(base)  # it gives tokenizer and configuration
    if weights_digest(base) != meta["settings"].get("content of --model"):
        raise BadInput(f"{checkpoint} began with another model than what is in {base} now")
    hold(out)
    embedder = Embedder.from_pretrained(base)
    restore(checkpoint, embedder)
    embedder.save_pretrained(out)
    print(f"wrote {out}: step {meta['step']} of {checkpoint}")


# ---------------------------------------------------------------------------------------------------------------
# Command line


def check_flags(p):
    p.add_argument("file", help="SFT or RL file")
    p.add_argument("--media_root", default=".", help="folder that the media paths start from")
    p.add_argument("--model", help="whose tokenizer counts the tokens; without one media are looked up, not opened")
    p.add_argument("--max_length", type=int, default=12_288, help="longer rows are skipped in training")
    p.add_argument("--batch_size", type=int, default=1, help="a dataset with fewer rows is left out in training")
    p.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")


def export_flags(p):
    p.add_argument("checkpoint", help="OUT/checkpoints/step-N")
    p.add_argument("--out", required=True, help="model folder")


def run_check(args):
    sys.exit(0 if check(args) else 1)


def run_export(args):
    export_checkpoint(args.checkpoint, args.out)


CHECK = Command("check", "an SFT or RL file before a run; exit code 1 if a row cannot be used", check_flags, run_check)
EXPORT = Command("export", "a checkpoint of sft.py or rl.py -> a model folder, for eval.py and others", export_flags,
                 run_export)  # fmt: skip
