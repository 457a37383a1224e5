"""The toy world: scenes of coloured shapes and seven tasks, written in the published formats.

A scene is 3 x 3 cells of one visual token each, in reading order: "" is an empty cell, "red star" an object, "D" a
glyph. Colours and shapes differ within a scene, except for a doubled object. A page is a scene of two rows of glyphs,
a strip (a crop) is one row, and a video is two scenes.
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

from support.backbones import QWEN2_VL
from support.files import write_rows
from support.formats import rl_row, sft_row
from support.images import white_image
from support.settings import Command

CELL = QWEN2_VL.token_side  # pixels: one cell is one visual token
DRAWINGS = 12  # number of drawings for every content of a cell
COLOURS = {
    "red": (215, 30, 30),
    "green": (30, 150, 40),
    "blue": (30, 60, 215),
    "yellow": (225, 200, 20),
    "purple": (140, 40, 160),
    "orange": (240, 130, 20),
    "cyan": (30, 195, 205),
    "black": (35, 35, 35),
}
SHAPES = {  # functions of x and y from the shape's centre: below 0 is inside; the radius is about 1
    "circle": lambda x, y: np.hypot(x, y) - 1,
    "ring": lambda x, y: abs(np.hypot(x, y) - 0.9) - 0.18,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) - 0.85,
    "diamond": lambda x, y: 1.4 * abs(x) + abs(y) - 1.1,
    "bar": lambda x, y: np.maximum(abs(x) - 1.1, abs(y) - 0.35),
    "star": lambda x, y: np.hypot(x, y) * (1.6 - 0.8 * np.cos(5 * np.arctan2(x, -y))) - 0.9,
    "triangle": lambda x, y: np.maximum(y - 0.8, 0.9 * abs(x) - 0.45 * (y + 1.1)),
    "cross": lambda x, y: np.maximum(np.minimum(abs(x), abs(y)) - 0.35, np.maximum(abs(x), abs(y)) - 1),
}
PLACES = ["xa", "xb", "xc", "ya", "yb", "yc", "za", "zb", "zc"]
STEPS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # (rows, columns)
CLOSED_TASKS = ("cls", "vqa")  # the candidates are exactly all objects
MODALITIES = {"video": "video", "doc": "visdoc"}  # modalities of tasks in eval.py; the other tasks have images
Side = namedtuple("Side", "text think answer media", defaults=((),))  # media: 0, 1 (image) or 2 (video) scenes


# ---------------------------------------------------------------------------------------------------------------
# Scenes and their images


def draw(rng, split, low, high, repeat=0, size=9):
    """Draw a scene of the split with low to high objects, the first `repeat` of them twice, or a page if low is 0.

    size: number of cells. Below 9 (the pretraining of tests/toy_base.py), every split has all scenes.
    """
    while True:
        cells = draw_objects(rng, low, high, repeat, size)
        if low == 0:  # the unused scene advances the generator, so the pages stay the same
            cells = draw_page(rng)
        if size < 9 or split_of(cells) == split:
            return cells


def draw_objects(rng, low, high, repeat, size):
    n = int(rng.integers(low, high + 1))
    colours = rng.permutation(len(COLOURS))[:n]
    shapes = rng.permutation(len(SHAPES))[:n]
    names = [f"{list(COLOURS)[c]} {list(SHAPES)[s]}" for c, s in zip(colours, shapes)]
    empty = [""] * (size - n - repeat)
    return rng.permutation(names + names[:repeat] + empty).tolist()


def draw_page(rng):
    """Draw a page of two lines, each with a letter and two digits: six cells."""
    letters = rng.permutation(list("ABCDEFGHKMPT"))
    digits = rng.permutation(10)
    glyphs = [letters[0], *digits[:2], letters[1], *digits[2:4]]
    return [str(glyph) for glyph in glyphs]


def split_of(cells):
    """Return a scene's split: one scene in ten is "test", one in ten "dev", the rest "train". It depends only on the
    content, so no scene of any seed is in two splits."""
    bucket = zlib.crc32("|".join(cells).encode()) % 10
    return {0: "test", 1: "dev"}.get(bucket, "train")


def draw_cell(rng, content):
    """Return the pixels of a cell, float [CELL, CELL, 3] in 0..255: a glyph, an object or nothing on paper."""
    paper = rng.integers(232, 256, 3)
    x, y = CELL // 2 + rng.uniform(-2, 2, 2)  # pixels: the centre of the drawing
    cell = np.full((CELL, CELL, 3), paper, float)
    if len(content) == 1:
        image = Image.fromarray(cell.astype(np.uint8))
        font = ImageFont.load_default(26)
        ImageDraw.Draw(image).text((x, y), content, (20, 20, 20), font, anchor="mm")
        return np.asarray(image, float)
    if content:
        colour, shape = content.split()
        radius = rng.uniform(8, 11)  # pixels
        ink = np.clip(COLOURS[colour] + rng.integers(-18, 19, 3), 0, 255)
        middles = np.arange(CELL) + 0.5  # centres of the pixels
        outside = SHAPES[shape]((middles[None] - x) / radius, (middles[:, None] - y) / radius)
        cover = np.clip(0.5 - radius * outside, 0, 1)[..., None]  # share of each pixel, for smooth edges
        cell += cover * (ink - cell)
    return cell


@cache
def drawings(content):
    """Return the drawings of a content. All scenes share them, so a process draws each content once."""
    rng = np.random.default_rng(zlib.crc32(content.encode()))
    return [draw_cell(rng, content) for _ in range(DRAWINGS)]


def render(rng, cells):
    """Return a noisy image of the cells, three per row: uint8 [CELL * rows, CELL * 3, 3]."""
    drawn = [drawings(content)[rng.integers(DRAWINGS)] for content in cells]
    strips = [np.concatenate(drawn[i : i + 3], axis=1) for i in range(0, len(cells), 3)]
    image = np.concatenate(strips)
    noise = rng.normal(0, 6, image.shape)
    return np.clip(image + noise, 0, 255).astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------------
# Texts about scenes


def named(cells):
    """Return the objects in reading order: " red star blue ring"."""
    return "".join(f" {content}" for content in cells if content)


def listed(cells):
    """Return the objects with their cells: " xa red star yc blue ring"."""
    return "".join(f" {cell} {content}" for cell, content in zip(PLACES, cells) if content)


def compared(before, after):
    """Return the contents of each cell in two scenes, without the cells that are empty in both:
    " xa red star none xc blue ring blue ring yb none red star"."""
    text = ""
    for cell, was, now in zip(PLACES, before, after):
        if was or now:
            text += f" {cell} {was or 'none'} {now or 'none'}"
    return text


def row_text(cells, r):
    """Return row r with the names of its cells: " ya red star yb none yc none"."""
    indices = range(3 * r, 3 * r + 3)
    return "".join(f" {PLACES[i]} {cells[i] or 'none'}" for i in indices)


def page_text(cells):
    """Return the lines of a page: " D69 A71"."""
    rows = [cells[i : i + 3] for i in range(0, len(cells), 3)]
    return "".join(" " + "".join(glyphs) for glyphs in rows)


def beside(cell, step):
    """Return the index of the cell one step away, or -1 if the step leaves the scene."""
    down, right = STEPS[step]
    r = cell // 3 + down
    c = cell % 3 + right
    return 3 * r + c if 0 <= r < 3 and 0 <= c < 3 else -1


def said(text):
    """Return the Side of a text "kind: answer". It only repeats the answer, without any reasoning."""
    _, _, answer = text.partition(":")
    return Side(text, " it is", answer)


# ---------------------------------------------------------------------------------------------------------------
# The tasks: each function draws one example, (query, target, hard negatives) as Sides


def cls_example(rng, split):
    """Ask for the object that occurs twice."""
    cells = draw(rng, split, 4, 5, repeat=1)
    double = next(content for content in cells if content and cells.count(content) == 2)
    found = "".join(f" {cell}" for cell, content in zip(PLACES, cells) if content == double)
    think = f"{listed(cells)} so{found}"
    query = Side("which object is there twice", think, f" {double}", (cells,))
    return query, said(f"object: {double}"), []


def vqa_example(rng, split):
    """Walk two or three steps and name the object in the last cell."""
    cells, end, ask, path = draw_walk(rng, split, 3)
    query = Side(ask, f"{path} {cells[end]}", f" {cells[end]}", (cells,))
    return query, said(f"object: {cells[end]}"), []


def ground_example(rng, split):
    """Walk two steps and find the row of the last cell. Hard negatives: the scene's other rows."""
    cells, end, ask, path = draw_walk(rng, split, 2)
    strips = [cells[i : i + 3] for i in range(0, 9, 3)]
    texts = ["".join(f" {content or 'none'}" for content in strip) for strip in strips]  # " red star none none"
    crops = [Side("image", listed(strip), text, (strip,)) for strip, text in zip(strips, texts)]
    r = end // 3
    target = crops.pop(r)
    think = f"{path} row{row_text(cells, r)}"
    query = Side(f"{ask} crop the row", think, target.answer, (cells,))
    return query, target, [crop for crop in crops if crop.think]  # a row without objects is not a negative


def draw_walk(rng, split, longest):
    """Draw a scene and a walk of two to `longest` steps, from any cell to an object in another cell.

    Returns the cells, the index of the last cell, the question and the path in words.
    """
    while True:
        cells = draw(rng, split, 5, 6)
        start = int(rng.integers(9))
        steps = rng.choice(list(STEPS), rng.integers(2, longest + 1)).tolist()
        end = start
        path = f" {PLACES[start]}"
        for step in steps:
            end = beside(end, step)
            if end < 0:
                break
            path += f" {step} {PLACES[end]}"
        if end >= 0 and end != start and cells[end]:
            return cells, end, f"from {PLACES[start]} go {' '.join(steps)}", path


def i2t_example(rng, split):
    """Find the caption of an image. Hard negative: two objects have exchanged their colours."""
    cells, near = draw_exchange(rng, split)
    return scene_image(cells, "describe the image"), caption(cells), [caption(near)]


def t2i_example(rng, split):
    """Find the image of a caption. Hard negative: two objects have exchanged their colours."""
    cells, near = draw_exchange(rng, split)
    text = caption(cells)
    return text._replace(text=f"find the {text.text}"), scene_image(cells), [scene_image(near)]


def draw_exchange(rng, split):
    """Draw a scene, and return it with a copy in which two objects have exchanged their colours."""
    cells = draw(rng, split, 4, 5)
    objects = [i for i, content in enumerate(cells) if content]
    first, second = rng.permutation(objects)[:2]
    first_colour, first_shape = cells[first].split()
    second_colour, second_shape = cells[second].split()
    near = list(cells)
    near[first] = f"{second_colour} {first_shape}"
    near[second] = f"{first_colour} {second_shape}"
    return cells, near


def scene_image(cells, text="image"):
    return Side(text, listed(cells), named(cells), (cells,))


def caption(cells):
    return said(f"photo of:{named(cells)}")


def video_example(rng, split):
    """Ask which of three objects moves to which cell. Hard negatives: all other objects and empty cells."""
    cells = draw(rng, split, 3, 3)
    moves = free_moves(cells)
    start, end = moves[rng.integers(len(moves))]
    mover = cells[start]
    after = list(cells)
    after[start] = ""
    after[end] = mover
    answer = f" {mover} {PLACES[end]}"
    think = f"{compared(cells, after)} so{answer}"
    query = Side("what moves where", think, answer, (cells, after))
    objects = [content for content in cells if content]
    empty = [cell for cell, content in zip(PLACES, cells) if not content]
    everything = [f" {content} {cell}" for content in objects for cell in empty]
    return query, said(f"move:{answer}"), [said(f"move:{move}") for move in everything if move != answer]


def free_moves(cells):
    """Return all pairs (index of an object, index of an empty cell next to it)."""
    moves = []
    for start, content in enumerate(cells):
        for step in STEPS:
            end = beside(start, step)
            if content and end >= 0 and not cells[end]:
                moves.append((start, end))
    return moves


def doc_example(rng, split):
    """Find the page with two given lines. Hard negative: one digit differs."""
    cells = draw(rng, split, 0, 0)
    k = int(rng.choice([1, 2, 4, 5]))  # cells of digits
    near = list(cells)
    near[k] = str((int(cells[k]) + rng.integers(1, 10)) % 10)
    text, near_text = page_text(cells), page_text(near)
    query = Side(f"find the page with{text}", text, text)
    return query, Side("page", text, text, (cells,)), [Side("page", near_text, near_text, (near,))]


EXAMPLES = {
    "cls": cls_example,
    "vqa": vqa_example,
    "i2t": i2t_example,
    "t2i": t2i_example,
    "ground": ground_example,
    "video": video_example,
    "doc": doc_example,
}
TASKS = tuple(EXAMPLES)


# ---------------------------------------------------------------------------------------------------------------
# Files


def stored(out, name, rng, side):
    """Write a Side's images below out/images, and return it as an input of eval.py.

    Each file of a video is listed twice, because the model reads frames in pairs.
    """
    paths = [f"images/{name}{k}.jpg" for k in range(len(side.media))]
    for path, cells in zip(paths, side.media):
        file = out / path
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(render(rng, cells)).save(file, quality=92, subsampling=0)
    if len(paths) < 2:
        return {"text": side.text, "images": paths, "video": []}
    first, last = paths
    return {"text": side.text, "images": [], "video": [first, first, last, last]}


def pair_rows(out, seed, task, name, split, count):
    """Return the rows of one task for NAME.json: SFT rows if the name is "sft", otherwise RL rows."""
    rng = np.random.default_rng([seed, zlib.crc32(f"{name} {task}".encode())])
    rows = []
    for i in range(count):
        query, target, _ = EXAMPLES[task](rng, split)
        pair = {
            "dataset_name": task,
            "qry": stored(out, f"{name}/{task}/{i}qry", rng, query),
            "pos": stored(out, f"{name}/{task}/{i}pos", rng, target),
        }
        if name == "sft":
            answers = {"qry": (query.think, query.answer), "pos": (target.think, target.answer)}
            rows.append(sft_row(pair, answers))
        else:
            rows.append(rl_row(pair))
    return rows


def task_file(out, seed, task, split, queries, candidates):
    """Return a native task file of eval.py as a dict. A candidate's key is its answer, so no candidate occurs twice."""
    rng = np.random.default_rng([seed, 2, zlib.crc32(f"{split} {task}".encode())])
    name = f"{split}/{task}"
    asked = []
    targets = {}
    if task in CLOSED_TASKS:  # all colours and shapes
        names = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
        targets = {f" {name}": said(f"object: {name}") for name in names}
        candidates = len(targets)
    others = {}  # of an open task: hard negatives, and targets of examples without a query
    while len(asked) < queries or len(targets | others) < candidates:
        query, target, negatives = EXAMPLES[task](rng, split)
        if len(asked) < queries:
            item = stored(out, f"{name}/q{len(asked)}", rng, query)
            labels = [target.answer.strip()]
            asked.append({"input": item, "labels": labels, "grades": None, "candidates": None})
            targets.setdefault(target.answer, target)
        if task not in CLOSED_TASKS:
            others |= {side.answer: side for side in [target, *negatives]}
    pool = {}
    rest = {key: side for key, side in others.items() if key not in targets}
    chosen = list((targets | rest).items())[: max(candidates, len(targets))]  # every query has its target
    for i, (key, side) in enumerate(chosen):
        pool[key.strip()] = stored(out, f"{name}/c{i}", rng, side)
    return {
        "name": name,
        "modality": MODALITIES.get(task, "image"),
        "group": "toy",
        "eval_type": "global",
        "main_metric": "hit@1",
        "queries": asked,
        "candidates": pool,
    }


def in_parallel(out, jobs):
    """Call function(out, *arguments) for all jobs (function, *arguments) on all cores. Return results in order."""
    (out / "images").mkdir(parents=True, exist_ok=True)
    white_image().save(out / "images/blank.jpg")
    with ProcessPoolExecutor(mp_context=get_context("fork")) as pool:
        waiting = [pool.submit(function, out, *arguments) for function, *arguments in jobs]
        try:
            return [job.result() for job in waiting]
        except BaseException:  # on Ctrl-C, do not wait for jobs that have not begun
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def write_toy(out, seed=0, pairs=2000, rl_pairs=1400, dev=60, test=120, candidates=200):
    """Write the toy world as files, with sizes per task. sft.json and rl.json have training scenes; rl_dev.json,
    rl_test.json, tasks/dev/*.json and tasks/test/*.json have held-out scenes."""
    out = Path(out)
    row_files = {  # name: split, rows of each task, tasks
        "sft": ("train", pairs, TASKS),
        "rl": ("train", rl_pairs, TASKS),
        "rl_dev": ("dev", 48, TASKS),
        "rl_test": ("test", 48, TASKS),
    }
    print(f"writing the toy world to {out}", flush=True)
    jobs = []
    for name, (split, count, tasks) in row_files.items():
        jobs += [(pair_rows, seed, task, name, split, count) for task in tasks]
    for split, count in (("dev", dev), ("test", test)):
        jobs += [(task_file, seed, task, split, count, candidates) for task in TASKS]
    done = iter(in_parallel(out, jobs))
    rows = {}
    for name, (_, _, tasks) in row_files.items():
        rows[name] = []
        for _ in tasks:
            rows[name] += next(done)
    for task in done:
        path = out / "tasks" / f"{task['name']}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(task))
    for name in reversed(row_files):  # sft.json last: if it exists, the world is complete
        write_rows(out / f"{name}.json", rows[name])


# ---------------------------------------------------------------------------------------------------------------
# Command line


def toy_flags(p):
    p.add_argument("--out", default="runs/toy/data", help="output folder")
    p.add_argument("--seed", type=int, default=0, help="random seed of the scenes and their images")


TOY = Command("toy", "write the toy world", toy_flags, lambda args: write_toy(args.out, args.seed))
