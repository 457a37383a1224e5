"""Before and after a run, two commands of data.py: `check` looks a data file over, `export` makes a model folder of a
checkpoint."""

from collections import Counter, namedtuple
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset
from transformers import AutoConfig

from data import DISC, FAMILIES, GEN, QWEN2_VL, PairData, RowCheck, Skip, content_key, is_blank, look_up, side_of
from model import Embedder, check_model, load_tokenizer
from support.rows import Rows, dataset_of
from support.run import BadInput, Progress, forked_loader, hold, open_checkpoint, restore, text_table, weights_digest

PROBLEMS = ("schema", "media", "too long", "left out")
FIGURES = ("rows", "share", "tokens", "longest", "pictures", "most", "same target")
SHOWN = 5  # messages of each problem in the report
# Of a row. tokens: of its longer side; pictures: files, with the frames of videos; target: identity of its content
Found = namedtuple("Found", "dataset problem message tokens pictures target", defaults=("", "", 0, 0, 0))


@dataclass
class Checked(Dataset):
    """What the loader makes of each row, as a Found; without a tokenizer only its form and whether the files exist."""

    data: PairData

    def __getitem__(self, i):
        name, row = self.data.rows[i]
        found = Found(dataset_of(row))
        try:
            RowCheck(self.data.kind, self.data.needs)(row, name)
            query = side_of(row, self.data.kind, "qry", name)
            target = side_of(row, self.data.kind, "pos", name)
            paths = media_of(query) + media_of(target)
            found = found._replace(pictures=len(paths), target=content_key(*target[1:4]))
            if self.data.tokenizer is None:
                self.look_up_all(paths)
            else:
                found = found._replace(tokens=self.count_tokens(i))
            return found
        except Skip as error:
            problem = "too long" if "--max_length" in str(error) else "media"
            reason = str(error).removeprefix(f"{name}, ")
            return found._replace(problem=problem, message=f"{name}: {reason}")
        except Exception as error:  # whatever would stop a run at this row
            message = str(error) if isinstance(error, ValueError) else f"{name}: {error!r}"
            return found._replace(problem="schema", message=message)

    def look_up_all(self, paths):
        """Raises Skip where one of the files does not exist."""
        for path in paths:
            if not is_blank(Path(self.data.root, path)):
                look_up(path, self.data.root)

    def count_tokens(self, i):
        """Tokens of the longer side of row i, encoded as in training. Raises Skip where a run would skip the row."""
        pair = self.data[i]
        if not pair.ok:
            raise Skip(pair.reason)
        return max(len(pair.query.ids), len(pair.target.ids))


def media_of(side):
    _, _, images, video, _ = side
    return images + video


def check(args):
    """Prints what the loader makes of every row -> whether all is well."""
    tokenizer, family = None, QWEN2_VL
    if args.model:
        tokenizer = load_tokenizer(args.model)
        missing = [token for token in (GEN, DISC) if token not in tokenizer.get_vocab()]
        tokenizer.add_tokens(missing)
        family = FAMILIES[AutoConfig.from_pretrained(args.model).model_type]
    rows = Rows([args.file])
    data = PairData(
        rows,
        tokenizer,
        kind="rl" if len(rows) and "qry_text" in rows[0][1] else "sft",
        batch_size=1,
        seed=0,
        root=args.media_root,
        max_length=args.max_length,
        family=family,
    )
    loader = forked_loader(Checked(data), args.workers, sampler=range(len(rows)), batch_size=64, collate_fn=list)
    found = []
    with Progress(total=len(rows), desc="check", unit="row") as bar:
        for part in loader:
            found += part
            bar.update(len(part))
    found = mark_left_out(found, args.batch_size)
    print(check_report(found, args))
    return not any(row.problem for row in found)


def mark_left_out(found, batch_size):
    """Gives good rows of a dataset that is smaller than a batch their problem: BatchOrder leaves the dataset out."""
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
    """A table of the datasets, the first messages of each problem, and what a run would do with the file."""
    of_dataset = {}
    for row in found:
        of_dataset.setdefault(row.dataset, []).append(row)
    table = [("dataset", *FIGURES, *PROBLEMS)]
    for name, rows in [*sorted(of_dataset.items()), ("all", found)]:
        table.append((name, *figures_of(rows, len(found))))
    lines = [text_table(table)]
    for problem in PROBLEMS:
        messages = [f"{problem}: {row.message}" for row in found if row.problem == problem]
        lines += list(dict.fromkeys(messages))[:SHOWN]  # each once: a whole dataset is left out with one message
    count = Counter(row.problem for row in found)
    skipped = count["media"] + count["too long"] + count["left out"]
    settings = f"--max_length {args.max_length} --batch_size {args.batch_size}"
    stop = f" and does not start before {count['schema']:,} are mended" if count["schema"] else ""
    lines.append(f"A run with {settings} skips {skipped:,} of {len(found):,} rows{stop}.")
    if not args.model:
        lines.append("Without --model: media only looked up, tokens not counted.")
    return "\n".join(lines)


def figures_of(rows, total):
    """The cells of one line of the report, in the order of FIGURES and PROBLEMS; total: rows of the whole file."""
    tokens = [row.tokens for row in rows if not row.problem] or [0]
    pictures = [row.pictures for row in rows]
    targets = Counter(row.target for row in rows)
    shared = sum(n for n in targets.values() if n > 1)  # rows whose target another row has too
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


def export_checkpoint(checkpoint, out):
    """A checkpoint of sft.py or rl.py as a model folder, so that a step in between can be evaluated."""
    meta, _ = open_checkpoint(checkpoint)
    base = meta["settings"].get("model")
    digest = meta["settings"].get("content of --model")
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
