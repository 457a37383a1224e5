"""The toy world: scenes of coloured shapes, seven tasks, written in the published formats.

A scene is 3 x 3 cells of 28 x 28 pixels, one visual token each, read row by row: "" is an empty cell, "red star" an
object, "D" a glyph. Colours differ within a scene, shapes too (but for a doubled object).
"""

import json
import zlib
from collections import namedtuple
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data import blank_picture, rl_row, sft_row
from support.rows import write_rows

COLOURS = {"red": (215, 30, 30), "green": (30, 150, 40), "blue": (30, 60, 215), "yellow": (225, 200, 20),
           "purple": (140, 40, 160), "orange": (240, 130, 20), "cyan": (30, 195, 205), "black": (35, 35, 35)}
SHAPES = {  # below 0 is inside; all are about 1 in radius
    "circle": lambda x, y: np.hypot(x, y) - 1, "ring": lambda x, y: abs(np.hypot(x, y) - 0.9) - 0.18,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) - 0.85,
    "diamond": lambda x, y: 1.4 * abs(x) + abs(y) - 1.1, "bar": lambda x, y: np.maximum(abs(x) - 1.1, abs(y) - 0.35),
    "star": lambda x, y: np.hypot(x, y) * (1.6 - 0.8 * np.cos(5 * np.arctan2(x, -y))) - 0.9,
    "triangle": lambda x, y: np.maximum(y - 0.8, 0.9 * abs(x) - 0.45 * (y + 1.1)),
    "cross": lambda x, y: np.maximum(np.minimum(abs(x), abs(y)) - 0.35, np.maximum(abs(x), abs(y)) - 1)}
PLACES = ["xa", "xb", "xc", "ya", "yb", "yc", "za", "zb", "zc"]
STEPS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
TASKS = ("cls", "vqa", "i2t", "t2i", "ground", "video", "doc")
RL_TASKS = ("cls", "vqa", "ground", "video")  # what takes several steps of reasoning; the others only copy
Side = namedtuple("Side", "text think answer media", defaults=((),))  # media: 1 scene (picture) or 2 (video)


def draw(rng, split, low, high, repeat=0, size=9):
    """A scene of low to high objects, or for low 0 a page of two lines. Its content, not the seed, decides
    where it may appear: a hash sends one in ten to test, one to dev, the others to train."""
    while True:
        n = int(rng.integers(low, high + 1))
        looks = zip(rng.permutation(8)[:n], rng.permutation(8))
        names = [f"{list(COLOURS)[c]} {list(SHAPES)[s]}" for c, s in looks]
        cells = rng.permutation(names + names[:repeat] + [""] * (size - n - repeat)).tolist()
        if low == 0:
            keys, digits = rng.permutation(list("ABCDEFGHKMPT")), rng.permutation(10)
            cells = [str(g) for g in (keys[0], *digits[:2], keys[1], *digits[2:4])]
        if size < 9 or {0: "test", 1: "dev"}.get(zlib.crc32("|".join(cells).encode()) % 10, "train") == split:
            return cells


def draw_cell(rng, content):  # -> [28, 28, 3] of 0..255
    cell, (x, y) = np.full((28, 28, 3), rng.integers(232, 256, 3), float), 14 + rng.uniform(-2, 2, 2)
    if len(content) == 1:
        image = Image.fromarray(cell.astype(np.uint8))
        ImageDraw.Draw(image).text((x, y), content, (20, 20, 20), ImageFont.load_default(26), anchor="mm")
        return np.asarray(image, float)
    if content:
        (colour, shape), r, at = content.split(), rng.uniform(8, 11), np.arange(28) + 0.5
        ink = np.clip(COLOURS[colour] + rng.integers(-18, 19, 3), 0, 255)
        cover = np.clip(0.5 - r * SHAPES[shape]((at[None] - x) / r, (at[:, None] - y) / r), 0, 1)[..., None]
        cell += cover * (ink - cell)
    return cell


@cache
def drawings(content):  # twelve of every content of a cell
    rng = np.random.default_rng(zlib.crc32(content.encode()))
    return [draw_cell(rng, content) for _ in range(12)]


def render(rng, cells):  # contents, three to a row -> uint8 [28 * rows, 84, 3]
    drawn = [drawings(content)[rng.integers(12)] for content in cells]
    image = np.concatenate([np.concatenate(drawn[i : i + 3], 1) for i in range(0, len(cells), 3)])
    return np.clip(image + rng.normal(0, 6, image.shape), 0, 255).astype(np.uint8)


def named(cells):  # " red star blue ring": the objects in reading order
    return "".join(f" {c}" for c in cells if c)


def listed(cells):  # " xa red star yc blue ring"
    return "".join(f" {p} {c}" for p, c in zip(PLACES, cells) if c)


def row(cells, r, places=PLACES):  # " ya red star yb none yc none"
    return "".join(f" {places[i]} {cells[i] or 'none'}" for i in range(3 * r, 3 * r + 3)).replace("  ", " ")


def lines(cells):  # " D69 A71"
    return "".join(" " + "".join(cells[i : i + 3]) for i in range(0, len(cells), 3))


def beside(place, step):  # the place one step away, or -1
    r, c = place // 3 + STEPS[step][0], place % 3 + STEPS[step][1]
    return 3 * r + c if 0 <= r < 3 and 0 <= c < 3 else -1


def said(text):  # a text side "kind: what is said": nothing to think about
    return Side(text, " it is", text.partition(":")[2])


def example(task, rng, split):
    """One (query, target, hard negatives) of a task, as Sides."""
    if task == "doc":  # the page with these two lines
        cells = draw(rng, split, 0, 0)
        other, k = list(cells), int(rng.choice([1, 2, 4, 5]))
        other[k] = str((int(other[k]) + rng.integers(1, 10)) % 10)
        page, near = (Side("page", lines(c), lines(c), (c,)) for c in (cells, other))
        return Side(f"find the page with{lines(cells)}", lines(cells), lines(cells)), page, [near]
    if task in ("i2t", "t2i"):  # a picture and its caption; hard: two objects exchange their colours
        cells = draw(rng, split, 4, 5)
        i, j = rng.permutation([k for k in range(9) if cells[k]])[:2]
        (ci, si), (cj, sj), other = cells[i].split(), cells[j].split(), list(cells)
        other[i], other[j] = f"{cj} {si}", f"{ci} {sj}"
        (image, text), (near_image, near_text) = (
            (Side("image", listed(c), named(c), (c,)), said(f"photo of:{named(c)}")) for c in (cells, other))
        if task == "i2t":
            return image._replace(text="describe the image"), text, [near_text]
        return text._replace(text=f"find the {text.text}"), image, [near_image]
    if task == "cls":  # which object is there twice?
        cells = draw(rng, split, 4, 5, repeat=1)
        name = next(c for c in cells if c and cells.count(c) == 2)
        where = "".join(f" {p}" for p, c in zip(PLACES, cells) if c == name)
        query = Side("which object is there twice", f"{listed(cells)} so{where}", f" {name}", (cells,))
        return query, said(f"object: {name}"), []
    if task == "video":  # one of three objects moves one cell
        cells = draw(rng, split, 3, 3)
        moves = [(i, beside(i, s), s) for i in range(9) if cells[i] for s in STEPS if beside(i, s) >= 0]
        moves = [move for move in moves if not cells[move[1]]]
        i, j, step = moves[rng.integers(len(moves))]
        after = list(cells)
        after[i], after[j] = "", cells[i]
        think = f"{listed(cells)} then{listed(after)} so {PLACES[i]} {PLACES[j]}"
        near = [said(f"move: {c} {s}") for c in cells if c for s in STEPS if (c, s) != (cells[i], step)]
        query = Side("what moves", think, f" {cells[i]} {step}", (cells, after))
        return query, said(f"move: {cells[i]} {step}"), near
    while True:  # vqa and ground: walk some steps; name the object found there, or show its row
        cells = draw(rng, split, 5, 6)
        i = int(rng.integers(9))
        steps = rng.choice(list(STEPS), rng.integers(2, 4) if task == "vqa" else 2).tolist()
        ask, path = f"from {PLACES[i]} go {' '.join(steps)}", f" {PLACES[i]}"
        for step in steps:
            i = beside(i, step) if i >= 0 else i
            path += f" {step} {PLACES[i]}"
        if i < 0 or not cells[i] or PLACES[i] == path[1:3]:
            continue
        r = i // 3
        if task == "vqa":
            return Side(ask, f"{path} {cells[i]}", f" {cells[i]}", (cells,)), said(f"object: {cells[i]}"), []
        crops = [Side("image", listed(c), row(c, 0, [""] * 3), (c,)) for c in zip(*[iter(cells)] * 3)]
        query = Side(f"{ask} crop the row", f"{path} row{row(cells, r)}", crops[r].answer, (cells,))
        return query, crops[r], [c for k, c in enumerate(crops) if k != r and c.think]


def stored(out, name, rng, side):
    """Writes a side's pictures; returns it as an input of eval.py. Each picture of a video is two frames."""
    paths = [f"images/{name}{k}.jpg" for k in range(len(side.media))]
    for path, cells in zip(paths, side.media):
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(render(rng, cells)).save(out / path, quality=92, subsampling=0)
    video = [path for path in paths for _ in range(2)] if len(paths) == 2 else []
    return {"text": side.text, "images": [] if video else paths, "video": video}


def pair_rows(out, seed, task, name, split, count):
    """Rows of sft.json or of an RL file."""
    rng, rows = np.random.default_rng([seed, zlib.crc32(f"{name} {task}".encode())]), []
    for i in range(count):
        sides = dict(zip(("qry", "pos"), example(task, rng, split)))
        pair = {key: stored(out, f"{name}/{task}/{i}{key}", rng, side) for key, side in sides.items()}
        pair["dataset_name"] = task
        answers = {key: (side.think, side.answer) for key, side in sides.items()}
        rows.append(sft_row(pair, answers) if name == "sft" else rl_row(pair))
    return rows


def task_file(out, seed, task, split, queries, candidates):
    """A native task file. What a candidate says is its key, so no two candidates are the same thing."""
    rng, closed = np.random.default_rng([seed, 2, zlib.crc32(f"{split} {task}".encode())]), task in ("cls", "vqa")
    asked, targets, others = [], {}, {}
    if closed:  # every object is a candidate, and nothing else
        targets = {f" {c} {s}": said(f"object: {c} {s}") for c in COLOURS for s in SHAPES}
    while len(asked) < queries or (not closed and len(targets | others) < candidates):
        query, target, negatives = example(task, rng, split)
        if len(asked) < queries:
            files = stored(out, f"{split}/{task}/q{len(asked)}", rng, query)
            asked.append({"input": files, "labels": [target.answer.strip()], "grades": None, "candidates": None})
            targets.setdefault(target.answer, target)
        others |= {s.answer: s for s in [target, *negatives] if not closed}
    kept = list((targets | others | targets).items())[: max(candidates, len(targets))]
    pool = {key.strip(): stored(out, f"{split}/{task}/c{i}", rng, side) for i, (key, side) in enumerate(kept)}
    modality = {"video": "video", "doc": "visdoc"}.get(task, "image")
    return {"name": f"{split}/{task}", "modality": modality, "group": "toy", "eval_type": "global",
            "main_metric": "hit@1", "queries": asked, "candidates": pool}  # fmt: skip


def in_parallel(out, jobs):
    """Runs (function, arguments) on all cores; results in order."""
    (out / "images").mkdir(parents=True, exist_ok=True)
    blank_picture().save(out / "images/blank.jpg")
    with ProcessPoolExecutor(mp_context=get_context("fork")) as pool:
        waiting = [pool.submit(function, out, *rest) for function, *rest in jobs]
        try:
            return [job.result() for job in waiting]
        except BaseException:  # Ctrl-C: what has not begun is not waited for
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def write_toy(out, seed=0, pairs=2000, rl_pairs=2400, dev=60, test=120, candidates=200):
    """The toy world as files; sizes are per task. sft.json and rl.json are training scenes; rl_dev.json, rl_test.json,
    tasks/dev/*.json and tasks/test/*.json are held-out ones."""
    out = Path(out)
    kinds = {"sft": ("train", pairs, TASKS), "rl": ("train", rl_pairs, RL_TASKS), "rl_dev": ("dev", 48, TASKS),
             "rl_test": ("test", 48, TASKS)}  # fmt: skip
    jobs = [(pair_rows, seed, task, name, split, n) for name, (split, n, tasks) in kinds.items() for task in tasks]
    for split, n in (("dev", dev), ("test", test)):
        jobs += [(task_file, seed, task, split, n, candidates) for task in TASKS]
    done = iter(in_parallel(out, jobs))
    rows = {name: [row for _ in tasks for row in next(done)] for name, (_, _, tasks) in kinds.items()}
    for task in done:
        path = out / "tasks" / f"{task['name']}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(task))
    for name in reversed(rows):  # sft.json last: where it is, the world is complete
        write_rows(out / f"{name}.json", rows[name])
