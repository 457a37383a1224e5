"""Commands of data.py before and after a run: check a data file, export a checkpoint as a model folder."""

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
from support.images import find_image
from support.program import BadInput, Progress, Skip, text_table
from support.settings import Command, hold, weights_digest
from support.weights import check_model, load_family, load_tokenizer

PROBLEMS = ("schema", "media", "too long", "left out")
SHOWN = 5  # messages of each problem
Found = namedtuple("Found", "dataset problem message tokens images target", defaults=("", "", 0, 0, 0))


@dataclass
class CheckedRows(Dataset):
    """The loader's result for each row, as a Found. Without a tokenizer it checks only the form and missing files."""

    data: PairData

    def __getitem__(self, i):
        name, row = self.data.rows[i]
        found = Found(dataset_of(row))
        try:
            RowCheck(self.data.kind, self.data.needs)(row, name)
            query, _ = side_of(row, self.data.kind, "qry", name)
            target, _ = side_of(row, self.data.kind, "pos", name)
            paths = query["images"] + query["video"] + target["images"] + target["video"]
            found = found._replace(images=len(paths), target=content_key(**target))
            if self.data.tokenizer is None:
                for path in paths:
                    find_image(path, self.data.root)
                return found
            return found._replace(tokens=self.longest_side(i))
        except Skip as error:
            problem = "too long" if "--max_length" in str(error) else "media"
            return found._replace(problem=problem, message=f"{name}: {str(error).removeprefix(f'{name}, ')}")
        except Exception as error:  # every error that would stop a run at this row
            message = str(error) if isinstance(error, ValueError) else f"{name}: {error!r}"
            return found._replace(problem="schema", message=message)

    def longest_side(self, i):
        """Return the tokens of the longer of query and target, encoded as in training."""
        pair = self.data[i]
        if not pair.ok:
            raise Skip(pair.reason)
        return max(len(pair.query.ids), len(pair.target.ids))


def check(args):
    """Print the loader's results for all rows. Exit with code 1 if a row is unusable."""
    tokenizer, family = None, QWEN2_VL
    if args.model:
        tokenizer = load_tokenizer(args.model)  # raises if the family is unknown
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
    sizes = Counter(row.dataset for row in found)
    for i, row in enumerate(found):
        if sizes[row.dataset] < args.batch_size and not row.problem:  # BatchOrder leaves such a dataset out
            message = f"{row.dataset} has {sizes[row.dataset]} rows, fewer than --batch_size {args.batch_size}"
            found[i] = row._replace(problem="left out", message=message)
    print(check_report(found, args))
    sys.exit(any(row.problem for row in found))


def check_report(found, args):
    """Return the table of datasets, the first messages of each problem and the verdict as text."""
    rows_of = {}
    for row in found:
        rows_of.setdefault(row.dataset, []).append(row)
    heads = ("rows", "share", "tokens", "longest", "images", "most", "same target", *PROBLEMS)
    table = [["dataset", *heads]]
    for name, rows in [*sorted(rows_of.items()), ("all", found)]:
        tokens = [row.tokens for row in rows if not row.problem] or [0]
        images = [row.images for row in rows]
        shared = sum(n for n in Counter(row.target for row in rows).values() if n > 1)  # rows with another row's target
        problems = Counter(row.problem for row in rows)
        shares = (f"{len(rows):,}", f"{len(rows) / len(found):.1%}")
        sizes = (f"{np.mean(tokens):.0f}", f"{max(tokens):,}", f"{np.mean(images):.2f}", f"{max(images)}")
        counts = [f"{problems[problem]:,}" for problem in PROBLEMS]
        table.append([name, *shares, *sizes, f"{shared / len(rows):.1%}", *counts])
    lines = [text_table(table)]
    for problem in PROBLEMS:
        messages = dict.fromkeys(row.message for row in found if row.problem == problem)
        lines += [f"{problem}: {message}" for message in list(messages)[:SHOWN]]
    count = Counter(row.problem for row in found)
    skipped = count["media"] + count["too long"] + count["left out"]
    stop = f" and does not start before {count['schema']:,} are fixed" if count["schema"] else ""
    lines.append(f"A run with --max_length {args.max_length} --batch_size {args.batch_size} skips {skipped:,} of "
                 f"{len(found):,} rows{stop}.")  # fmt: skip
    if not args.model:
        lines.append("Without --model, media are looked up but not opened, and tokens are not counted.")
    return "\n".join(lines)


def export_checkpoint(checkpoint, out):
    """Write a checkpoint of sft.py or rl.py as a model folder, so an intermediate step can be evaluated."""
    meta, _ = open_checkpoint(checkpoint)
    base = meta["settings"].get("model")
    if Path(out).is_file() or (Path(out) / "config.json").exists():
        raise BadInput(f"--out {out} is a file or holds a model already. Give another folder")
    check_model(base)  # the base model provides the tokenizer and the configuration
    if weights_digest(base) != meta["settings"].get("content of --model"):
        raise BadInput(f"{checkpoint} began with another model than {base} has now. Restore the old model")
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
    p.add_argument("--model", help="model of the tokenizer that counts tokens; without it, media are not opened")
    p.add_argument("--max_length", type=int, default=12_288, help="longer rows are skipped in training")
    p.add_argument("--batch_size", type=int, default=1, help="a dataset with fewer rows is left out in training")
    p.add_argument("--workers", type=int, default=os.cpu_count(), help="number of loader processes")


def export_flags(p):
    p.add_argument("checkpoint", help="OUT/checkpoints/step-N")
    p.add_argument("--out", required=True, help="model folder")


CHECK = Command("check", "check an SFT or RL file before a run; exit code 1 if a row is bad", check_flags, check)
EXPORT = Command("export", "write a checkpoint of sft.py or rl.py as a model folder, for eval.py", export_flags,
                 lambda args: export_checkpoint(args.checkpoint, args.out))  # fmt: skip
