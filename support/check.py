"""Before and after a run (commands of data.py): a data file looked over, a checkpoint made a model folder."""

from collections import Counter, namedtuple
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from data import DISC, GEN, PairData, RowCheck, Skip, content_key, is_blank, look_up, side_of
from model import Embedder, check_model, load_tokenizer
from support.rows import Rows, dataset_of
from support.run import BadInput, Progress, forked_loader, hold, open_checkpoint, restore, weights_digest

PROBLEMS = ("schema", "media", "too long", "left out")
Found = namedtuple("Found", "dataset problem message tokens pictures target", defaults=("", "", 0, 0, 0))


@dataclass
class Checked(Dataset):
    """What the loader makes of each row, as a Found; without a tokenizer only its form and whether the files exist."""

    data: PairData

    def __getitem__(self, i):
        (name, row), data = self.data.rows[i], self.data
        found = Found(dataset_of(row))
        try:
            RowCheck(data.kind, data.needs)(row, name)
            sides = [side_of(row, data.kind, side, name) for side in ("qry", "pos")]
            paths = [path for _, _, images, video, _ in sides for path in images + video]
            found = found._replace(pictures=len(paths), target=content_key(*sides[1][1:4]))
            if data.tokenizer is None:
                for path in paths:
                    if not is_blank(Path(data.root, path)):
                        look_up(path, data.root)
                return found
            pair = data[i]  # as in training
            if not pair.ok:
                raise Skip(pair.reason)
            return found._replace(tokens=max(len(pair.query.ids), len(pair.target.ids)))
        except Skip as error:
            kind = "too long" if "--max_length" in str(error) else "media"
            return found._replace(problem=kind, message=f"{name}: {str(error).removeprefix(f'{name}, ')}")
        except Exception as error:  # whatever would stop a run at this row
            message = str(error) if isinstance(error, ValueError) else f"{name}: {error!r}"
            return found._replace(problem="schema", message=message)


def check(args):
    """Prints what the loader makes of every row -> whether all is well."""
    tokenizer = None
    if args.model:
        tokenizer = load_tokenizer(args.model)
        tokenizer.add_tokens([token for token in (GEN, DISC) if token not in tokenizer.get_vocab()])
    rows = Rows([args.file])
    kind = "rl" if len(rows) and "qry_text" in rows[0][1] else "sft"
    data = PairData(rows, tokenizer, kind=kind, batch_size=1, seed=0, root=args.media_root, max_length=args.max_length)
    loader = forked_loader(Checked(data), args.workers, sampler=range(len(rows)), batch_size=64, collate_fn=list)
    found = []
    with Progress(total=len(rows), desc="check", unit="row") as bar:
        for part in loader:
            found += part
            bar.update(len(part))
    sizes = Counter(row.dataset for row in found)
    for i, row in enumerate(found):
        if sizes[row.dataset] < args.batch_size and not row.problem:  # BatchOrder leaves the whole dataset out
            message = f"{row.dataset} has {sizes[row.dataset]} rows, fewer than --batch_size {args.batch_size}"
            found[i] = row._replace(problem="left out", message=message)
    print(check_report(found, args))
    return not any(row.problem for row in found)


def check_report(found, args):
    of = {}
    for row in found:
        of.setdefault(row.dataset, []).append(row)
    head = ("rows", "share", "tokens", "longest", "pictures", "most", "same target", *PROBLEMS)
    lines = [f"{'dataset':24}" + "".join(f"{title:>12}" for title in head)]
    for name, rows in [*sorted(of.items()), ("all", found)]:
        tokens = [row.tokens for row in rows if not row.problem] or [0]
        pictures = [row.pictures for row in rows]
        targets = Counter(row.target for row in rows)
        same = sum(n for n in targets.values() if n > 1) / len(rows)
        cells = [f"{len(rows):,}", f"{len(rows) / len(found):.1%}", f"{np.mean(tokens):.0f}", f"{max(tokens):,}",
                 f"{np.mean(pictures):.2f}", f"{max(pictures)}", f"{same:.1%}"]  # fmt: skip
        cells += [f"{sum(row.problem == problem for row in rows):,}" for problem in PROBLEMS]
        lines.append(f"{name[:23]:24}" + "".join(f"{cell:>12}" for cell in cells))
    for problem in PROBLEMS:
        lines += list(dict.fromkeys(f"{problem}: {row.message}" for row in found if row.problem == problem))[:5]
    bad = Counter(row.problem for row in found)
    stop = f" and does not start before {bad['schema']:,} are mended" if bad["schema"] else ""
    settings = f"--max_length {args.max_length} --batch_size {args.batch_size}"
    skipped = bad["media"] + bad["too long"] + bad["left out"]
    lines.append(f"A run with {settings} skips {skipped:,} of {len(found):,} rows{stop}.")
    if not args.model:
        lines.append("Without --model: media only looked up, tokens not counted.")
    return "\n".join(lines)


def export_checkpoint(checkpoint, out):
    """A checkpoint of sft.py or rl.py as a model folder, so that a step in between can be evaluated."""
    meta, _ = open_checkpoint(checkpoint)
    base, digest = (meta["settings"].get(key) for key in ("model", "content of --model"))
    if Path(out).is_file() or (Path(out) / "config.json").exists():
        raise BadInput(f"--out {out} is a file or holds a model already; give another folder")
    check_model(base)  # it gives tokenizer and configuration
    if weights_digest(base) != digest:
        raise BadInput(f"{checkpoint} began with another model than what is in {base} now")
    hold(out)
    embedder = Embedder.from_pretrained(base)
    restore(checkpoint, embedder)
    embedder.save_pretrained(out)
    print(f"wrote {out}: step {meta['step']} of {checkpoint}")
