"""Data: conversations, pictures and videos to patches, datasets, batches; annotation, check; last the toy world.

What a row becomes (paper section 3): one string in Qwen2-VL's chat format,

    <|im_start|>system .. user [media] TEXT\\n<disc_emb>\\nINSTRUCTION <|im_end|> assistant <think>..<gen_emb><|im_end|>

its token ids, their three-axis rotary positions and the picture patches. Everything here runs on the CPU, in loader
workers, on numpy arrays (torch tensors would cost a file descriptor each on their way out of a worker).

Where this departs from the official code
 1. Batches hold one dataset each, in an order that is a pure function of (seed, epoch, step), so the number of
    processes and a resume do not change it; the official order is the file's, the same in every epoch.
 2. A picture that cannot be read, or a row that is too long, keeps its place in the batch and is masked out of every
    loss; it is counted and listed in skipped.jsonl. The official loader silently takes the next row instead, and
    cuts long rows, which can cut off <gen_emb>.
 3. Token ids are looked up by name, never written as numbers.
 4. A text that truly has no picture works; the official text-only branch raises a TypeError.

Commands
    torchrun --nproc_per_node 8 data.py annotate --pairs PAIRS --media_root DIR --teacher MODEL --out sft.json
    python data.py rl-subset --pairs PAIRS --sft sft.json --out rl.json      # a balanced draw of what SFT leaves over
    python data.py check sft.json --media_root DIR --model MODEL             # before a run
    python data.py toy [--out runs/toy/data] [--seed 0]     # writes the toy world, in the published formats
    python data.py export runs/2b/sft/checkpoints/step-1000 --out runs/2b/sft-1000     # a model folder for eval.py
"""

import argparse
import codecs
import contextlib
import hashlib
import itertools
import json
import os
import re
import sys
import time
import zlib
from array import array
from collections import Counter, deque, namedtuple
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import DataLoader, Dataset
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from support.run import (
    BadInput,
    MissingFile,
    Progress,
    check_bounds,
    cure_of_bytes,
    hold,
    keys_once,
    run_script,
    tie_to_parent,
)

# ---------------------------------------------------------------------------------------------------------------
# Protocol constants (must match the released models and data)

SYSTEM = "You are a helpful assistant."
INSTRUCTION = (
    "Represent the above input text, images, videos, or any combination of the three as embeddings. "
    "First output the thinking process in <think> </think> tags and then summarize the entire input in a word or "
    "sentence. Finally, use the <gen_emb> tag to represent the entire input."
)
GEN, DISC = "<gen_emb>", "<disc_emb>"  # in this order they are added to the tokenizer
IMAGE_MARK, VIDEO_MARK = "<image>", "<video>"  # where media stand in the human text of SFT files
PIXELS = {"image": (784, 2_359_296), "video": (3_136, 25_088)}  # min, max pixels of a picture, of one frame
NUM_FRAMES = 8
MAX_DECODED = 200_000_000  # pixels; a larger picture is refused before it is decoded (decompression bombs)


class Skip(ValueError):
    """A row that cannot be used as it is (unreadable picture, too long): masked out of its batch and counted."""


# ---------------------------------------------------------------------------------------------------------------
# Pictures and videos to patches

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# the normalised value of every possible byte, [256, 3], in the order of transformers' float32 arithmetic
BYTE_TO_FLOAT = (np.arange(256)[:, None] * (1 / 255)).astype(np.float32)
BYTE_TO_FLOAT = torch.from_numpy((BYTE_TO_FLOAT - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD))


def patchify(frames, *, min_pixels, max_pixels):
    """A picture (one frame) or a video (several) as Qwen2-VL's patches.

    frames: list of PIL pictures, any mode. Returns float32 patches [n, 1176] (3 channels x 2 frames x 14 x 14 pixels,
    CLIP-normalised; four consecutive patches merge into one token) and grid_thw [3] (t, h, w in patches, n = t*h*w).
    min_pixels, max_pixels: area of one frame after the resize. The first frame sets the size of all; an odd number of
    frames repeats the last one, which also makes a picture the two equal frames that the model expects.
    Raises Skip as open_picture does. Same numbers as transformers' Qwen2VLImageProcessorPil, but for 16-bit pictures,
    which become black or white there.
    """
    patches, grid = patch_bytes(frames, min_pixels, max_pixels)
    return normalise(torch.from_numpy(patches)), torch.from_numpy(grid)


def normalise(patches):
    """uint8 [n, 1176] -> float32, on the device they are on: until then a page of 2.4 M pixels is 14 MB, not 57."""
    table = BYTE_TO_FLOAT.to(patches.device)
    return torch.cat([table[:, c][x.int()] for c, x in enumerate(patches.split(392, dim=1))], dim=1)


def patch_bytes(frames, min_pixels, max_pixels):
    """The patches before they are normalised: numpy uint8 [n, 1176], grid [3]."""
    frames = [open_picture(frame) for frame in frames]
    width, height = frames[0].size
    H, W = smart_resize(height, width, 28, min_pixels, max_pixels)  # multiples of 28 = 2 x 2 patches = 1 token
    pixels = [np.asarray(frame.resize((W, H), Image.Resampling.BICUBIC)) for frame in frames]
    pixels = np.stack(pixels + pixels[-1:] * (len(pixels) % 2))  # [F, H, W, 3], F even
    t, h, w = len(pixels) // 2, H // 14, W // 14
    x = pixels.reshape(t, 2, h // 2, 2, 14, w // 2, 2, 14, 3).transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
    return np.ascontiguousarray(x).reshape(t * h * w, 1176), np.array([t, h, w])


def to_rgb(picture):
    """8-bit RGB with transparent places white, as in transformers; convert() alone shows what colour lies beneath.

    Grey of 16 bits is scaled by its range; convert() cuts it off at 255, so that nearly all of it is white.
    """
    mode = {"La": "LA", "RGBa": "RGBA"}.get(picture.mode)  # premultiplied: convert() knows this one way only
    if mode:
        picture = picture.convert(mode)
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PPM"):  # Pillow's PPM: 0..65535
        tags = getattr(picture, "tag_v2", {})  # of a TIFF: 258 bits per sample, 262 is 0 where white is
        top = 2 ** tags.get(258, (16,))[0] - 1
        grey = np.rint(np.asarray(picture).clip(0, top) * (255 / top)).astype(np.uint8)
        picture = Image.fromarray(255 - grey if tags.get(262) == 0 else grey)
    if picture.mode in ("I", "F"):
        raise ValueError(f"its 32-bit pixels (mode {picture.mode}) have no known range; save it with 8 or 16 bits")
    if "A" in picture.getbands() or picture.info.get("transparency") is not None:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def open_picture(source, root=None):
    """A path (relative to root) or a PIL picture -> PIL picture, decoded, in RGB. Raises Skip with file and reason.

    The border for media: whatever a decoder raises on a broken file, and decoders raise anything, is a Skip. Memory
    errors and interrupts pass. The EXIF orientation is ignored, as in the official loader.
    """
    path = getattr(source, "filename", "") or "a picture given as an object"
    try:
        if isinstance(source, Image.Image):
            picture = source
        else:
            path = Path(root, source) if root else Path(source)
            if is_blank(path):
                return blank_picture()
            look_up(source, root)
            picture = Image.open(path)
        (width, height), size = picture.size, "{} x {} pixels".format(*picture.size)
        if width * height > MAX_DECODED:
            raise Skip(f"{path}: {size} is above the bound of {MAX_DECODED:,}")
        if min(width, height) == 0 or max(width, height) > 200 * min(width, height):
            raise Skip(f"{path}: {size}: empty, or one side is more than 200 times the other")
        picture.load()  # Image.open reads the header only: a truncated file shows here
        return to_rgb(picture)
    except (Skip, MemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001 (a decoder's panic is no Exception)
        raise Skip(f"{path}: cannot be read as a picture ({str(error) or type(error).__name__})") from error


def look_up(source, root=None):
    """Raises Skip where a path is no file below root. A link that lies there may point anywhere; a pipe is no file:
    opening it would wait for ever."""
    path = Path(root, source) if root else Path(source)
    if not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(root or path)):
        raise Skip(f"{source}: the path leaves --media_root {root}")
    try:
        there = path.exists()
    except OSError as error:  # a name that is too long
        raise Skip(f"{path}: cannot be read as a picture ({error.strerror})") from error
    if not there:
        raise Skip(f"{path}: no such file (is --media_root right?)")
    if not path.is_file():
        raise Skip(f"{path}: cannot be read as a picture (it is no file)")


def is_blank(path):
    """The authors' stand-in for "no picture", which need not be there."""
    return path.name == "blank.jpg" and not path.exists()


def thinned(frames, n=NUM_FRAMES):
    """At most n of the frames, evenly spread, first and last included."""
    return [frames[i] for i in np.linspace(0, len(frames) - 1, min(len(frames), n)).astype(int)]


def blank_picture():
    """The white 28 x 28 picture (one token) that stands on sides without media."""
    return Image.new("RGB", (28, 28), "white")


# ---------------------------------------------------------------------------------------------------------------
# One side of a pair as arrays


@dataclass
class Row:
    """One encoded sequence. L tokens, the first n_prompt of them are the prompt (no loss there)."""

    ids: np.ndarray  # [L]
    positions: np.ndarray  # [3, L] rotary positions: time, height, width
    n_prompt: int
    disc_at: int  # index of <disc_emb> in the user's turn, -1 if it has none
    gen_at: int  # index of the last <gen_emb> of the assistant's turn, -1 if it has none
    patches: np.ndarray  # uint8 [n, 1176] of all media in the order of the text
    grids: np.ndarray  # [m, 3]
    name: str  # file, row and side, for messages
    vit: torch.Tensor | None = None  # what the frozen vision tower made of the patches (Embedder.see), once it has

    @property
    def content(self):
        """Identity of what the model reads, whatever its name or place in a list."""
        arrays = (self.ids, self.grids, self.patches)
        return hashlib.blake2b(b"".join(x.tobytes() for x in arrays), digest_size=16).hexdigest()

    @property
    def next_position(self):
        """Rotary position (all three axes) of the token after the last one."""
        return int(self.positions.max()) + 1


def mrope_positions(ids, grids, media_ids):
    """Qwen2-VL's rotary positions: text counts up on all three axes, a picture spans (t, h, w) from where it starts.

    ids [L], grids [m, 3] in patches, media_ids: the pad tokens of pictures and videos. Returns [3, L].
    After a picture the count goes on at its largest index + 1, so position = index + delta for text behind media.
    """
    positions, start, i, grids = [], 0, 0, iter(grids)
    is_media = np.isin(ids, media_ids)
    while i < len(ids):
        if is_media[i]:
            t, h, w = (int(n) for n in next(grids))
            block = np.indices((t, h // 2, w // 2)).reshape(3, -1)  # 2 x 2 patches are one token
            positions.append(block + start)
            start += max(h, w) // 2  # transformers counts height and width only
        else:
            n = int(np.argmax(is_media[i:])) if is_media[i:].any() else len(ids) - i
            block = np.broadcast_to(np.arange(n), (3, n))
            positions.append(block + start)
            start += n
        i += block.shape[1]
    return np.concatenate(positions, axis=1)


def chat_prompt(user):
    """The conversation up to the point where the assistant speaks, as the Qwen2-VL chat template writes it."""
    return f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"


def check_text(text, name):
    """Raises BadInput where a text cannot be tokenised as it is meant."""
    if not isinstance(text, str):
        raise BadInput(f"{name}: the text is no string but {type(text).__name__}")
    for token in ("<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>"):
        if token in text:
            raise BadInput(f"{name}: the text contains the control token {token}; remove it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadInput(f"{name}: character {error.start} of the text is half a surrogate pair, which is no character; "
                       "remove it") from error  # fmt: skip


def media_marks(human, images, video, name):
    """The media marks of a text, in its order. Raises BadInput where they do not fit the media."""
    marks = re.findall(f"{IMAGE_MARK}|{VIDEO_MARK}", human)
    if marks.count(IMAGE_MARK) != len(images) or marks.count(VIDEO_MARK) != bool(video):
        raise BadInput(
            f"{name}: the text has {marks.count(IMAGE_MARK)} {IMAGE_MARK} and {marks.count(VIDEO_MARK)} {VIDEO_MARK} "
            f"marks for {len(images)} pictures and {int(bool(video))} videos; make them equal"
        )
    return marks


def without_marks(text, images, video):
    """A text without the marks of its media, which RL rows may carry; the media come first in any case.

    A mark stands at the start of the text or alone on a line, and there are no more of them than media. Anything else
    is the user's text: the <video> of a question about HTML stays.
    """
    left = {IMAGE_MARK: len(images), VIDEO_MARK: int(bool(video))}

    def drop(mark):
        left[mark[0]] -= 1
        return "" if left[mark[0]] >= 0 else mark[0]

    any_mark = f"(?:{IMAGE_MARK}|{VIDEO_MARK})"
    runs = rf"\A\s*(?:{any_mark}\s*)+|^[ \t]*(?:{any_mark}[ \t]*)+$"
    return re.sub(runs, lambda run: re.sub(any_mark, drop, run[0]), text, flags=re.MULTILINE)


def encode(tokenizer, human, images, video, answer=None, *, marks=None, root=None, name=""):
    """One side of a pair -> Row.

    human: the user's text with <image> / <video> marks where the media stand; images: paths or PIL pictures;
    video: list of frames (more than NUM_FRAMES are thinned out evenly); answer: the assistant's text or None.
    marks: those that the text begins with, where later ones are literal text; None: all, or none where no media are.
    Raises Skip for media that cannot be used, BadInput for text and media that do not fit together.
    """
    for text in (human, answer or ""):
        check_text(text, name)
    if marks is None:
        marks = media_marks(human, images, video, name) if images or video else []
    patches, grids, images = [], [], iter(images)
    for mark in marks:
        if mark == IMAGE_MARK:
            frames, (low, high) = [open_picture(next(images), root)], PIXELS["image"]
        else:
            frames, (low, high) = [open_picture(frame, root) for frame in thinned(video)], PIXELS["video"]
        x, grid = patch_bytes(frames, low, high)
        pad = "<|image_pad|>" if mark == IMAGE_MARK else "<|video_pad|>"
        n_tokens = int(grid.prod()) // 4
        human = human.replace(mark, f"<|vision_start|>{pad * n_tokens}<|vision_end|>", 1)
        patches.append(x)
        grids.append(grid)
    ids = tokenizer(chat_prompt(human), add_special_tokens=False).input_ids
    n_prompt = len(ids)
    if answer is not None:  # tokenised apart from the prompt, as it will be generated
        ids = ids + tokenizer(answer + "<|im_end|>", add_special_tokens=False).input_ids
    ids, grids = np.array(ids), np.array(grids, dtype=np.int64).reshape(-1, 3)
    gen_id, disc_id, *media_ids = tokenizer.convert_tokens_to_ids([GEN, DISC, "<|image_pad|>", "<|video_pad|>"])

    def last(token, start, end):
        return max((start + int(i) for i in np.flatnonzero(ids[start:end] == token)), default=-1)

    return Row(
        ids=ids,
        positions=mrope_positions(ids, grids, media_ids),
        n_prompt=n_prompt,
        disc_at=last(disc_id, 0, n_prompt),
        gen_at=last(gen_id, n_prompt, len(ids)),  # INSTRUCTION holds a <gen_emb> too: only the assistant's part counts
        patches=np.concatenate(patches) if patches else np.zeros((0, 1176), np.uint8),
        grids=grids,
        name=name,
    )


def encode_input(tokenizer, item, answer=None, *, blank_image=True, root=None, name=""):
    """The form of RL and evaluation: media, then the stripped text, <disc_emb> and INSTRUCTION. -> Row

    item: {"text", "images", "video"}, keys optional. Without media the blank picture stands in, as the authors do.
    """
    text, images, video = check_input(item, name).values()
    text = without_marks(text, images, video).strip()
    if blank_image and not images and not video:
        images = [blank_picture()]
    marks = [IMAGE_MARK] * len(images) + [VIDEO_MARK] * bool(video)
    human = f"{''.join(marks)}{text}\n{DISC}\n{INSTRUCTION}"
    return encode(tokenizer, human, images, video, answer, marks=marks, root=root, name=name)


# ---------------------------------------------------------------------------------------------------------------
# What rows and inputs may hold: the keys of the published files and of common tools ("id", "num_tokens", "solution" are
# for people and other programs). Any other is refused: a misspelt one would be dropped without a word.

KEYS = {
    "an SFT row": ("dataset_name", "dataset", "id", "num_tokens", "qry", "pos"),
    "a side of an SFT row": ("image", "video", "conversations", "num_tokens"),
    "a turn": ("from", "value", "role", "content"),
    "an RL row": ("dataset_name", "dataset", "id", "num_tokens", "solution", "qry_text", "qry_image", "qry_video",
                  "pos_text", "pos_image", "pos_video"),
    "a pair": ("dataset_name", "dataset", "id", "num_tokens", "qry", "pos"),
    "a row of MMEB-train": ("dataset_name", "dataset", "id", "qry", "qry_image_path", "pos_text", "pos_image_path",
                            "neg_text", "neg_image_path"),
    "an input": ("text", "images", "video"),
}  # fmt: skip
VIDEO_FILES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".gif")
FORMS = (
    '{"text": str, "images": [path or PIL picture], "video": [path or PIL picture of each frame]}, any of these keys, '
    "or a str (a text), or a Path or PIL picture (a picture)"
)


def check_keys(given, kind, name, keys=None):
    keys = keys or KEYS[kind]
    if not isinstance(given, dict):
        raise BadInput(f"{name}: expected {kind} with {', '.join(keys)}, found {type(given).__name__}")
    if unknown := [key for key in given if key not in keys]:
        raise BadInput(f"{name}: unknown key {', '.join(map(repr, unknown))}; {kind} may have {', '.join(keys)}")


def as_list(media, name="", kind="image"):
    """The published files write "no media" as absent, "", [""] or []; one picture as a string. -> list of paths or
    pictures. Raises BadInput for anything else."""
    if media is None or isinstance(media, (str, Path, Image.Image)):
        media = [media] if media else []
    if not isinstance(media, (list, tuple)):
        raise BadInput(f"{name}: {kind} must be a path or a list of paths, not {type(media).__name__}")
    for m in media:
        if not isinstance(m, (str, Path, Image.Image)):
            raise BadInput(f"{name}: {kind} must be a flat list of paths, it holds {type(m).__name__}")
        if str(m).startswith(("http://", "https://")):
            raise BadInput(f"{name}: {m} is a web address; download it and give the file's path")
        if kind == "video" and str(m).lower().endswith(VIDEO_FILES):
            raise BadInput(f"{name}: {m} is a video file; a video is the list of its frames, which this makes: "
                           f"ffmpeg -i {m} -vf fps=2 FOLDER/%04d.jpg")  # fmt: skip
    return [m for m in media if m]


def check_input(item, name):
    """An input of RL, evaluation or embed -> {"text", "images", "video"}, all there. Raises BadInput."""
    if isinstance(item, str):
        if re.fullmatch(r"https?://\S+", item) or (len(item) < 256 and os.path.isfile(item)):
            raise BadInput(f'{name}: {item!r} could be a text or a file: {{"text": ...}} says text, Path(...) a '
                           "picture (one on the web has to be downloaded)")  # fmt: skip
        item = {"text": item}
    elif isinstance(item, (Path, Image.Image)):
        item = {"images": [item]}
    elif not isinstance(item, dict):
        raise BadInput(f"{name}: an input is {FORMS}; not {type(item).__name__}")
    check_keys(item, "an input", name)
    text = item.get("text") if item.get("text") is not None else ""
    check_text(text, name)
    return {"text": text, "images": as_list(item.get("images"), name, "images"),
            "video": as_list(item.get("video"), name, "video")}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# Files of pairs


def read_rows(path):
    """A .json list or .jsonl lines -> list of dicts. Raises ValueError that names file and row."""
    return [row for _, _, row in scan_rows(path)]


def scan_rows(path, block=1 << 24):
    """Streams a .json list or .jsonl lines: yields (first byte, last byte + 1, dict) of every row.

    Holds a block and a row at a time: the published SFT file has 1.46 M rows in 8 GB.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFile(f"{path}: no such file; give --data the SFT or RL file")
    with open(path, "rb") as file:
        head = file.read(1024)
        if head[:3] == codecs.BOM_UTF8 or head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or b"\0" in head:
            raise BadInput(f"{path}: {cure_of_bytes(path)}")
        one_list = head.lstrip()[:1] == b"["
        file.seek(0)
        try:
            for i, (start, end, row) in enumerate(scan_list(file, path, block) if one_list else scan_lines(file, path)):
                if not isinstance(row, dict):
                    raise BadInput(f"{path}, row {i}: expected an object, found {type(row).__name__}")
                if len(row) == 1 and isinstance(next(iter(row.values())), list):
                    raise BadInput(f"{path}, row {i}: the rows lie under {next(iter(row))!r}; save that list as a file "
                                   "of its own")  # fmt: skip
                yield start, end, row
        except UnicodeDecodeError as error:
            raise BadInput(f"{path}: not valid UTF-8 text ({error}); save it as UTF-8") from error


def scan_lines(file, path):
    at = 0
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                yield at, at + len(line), json.loads(line, object_pairs_hook=keys_once)
            except (json.JSONDecodeError, RecursionError) as error:
                raise BadInput(f"{path}, line {number}: not valid JSON ({getattr(error, 'msg', error)}); a file is one "
                               "list of rows, or lines of one whole row each") from error  # fmt: skip
            except UnicodeDecodeError:
                raise
            except ValueError as error:  # a key that is there twice, a number of 5,000 digits
                raise BadInput(f"{path}, line {number}: {error}") from error
        at += len(line)


def scan_list(file, path, block):
    utf8, decode = codecs.getincrementaldecoder("utf-8")(), json.JSONDecoder(object_pairs_hook=keys_once).raw_decode
    text, place, byte, line, last = "", 0, 0, 1, False  # text is what is being parsed, place the next character of it;
    # byte: place in the file; line: number of text's first line; last: nothing is left to read

    def refill():
        nonlocal text, place, line, last
        new = file.read(block)
        last, line = not new, line + text.count("\n", 0, place)
        text, place = text[place:] + utf8.decode(new, not new), 0

    def broken(what, at):
        return BadInput(f"{path}, line {line + text.count(chr(10), 0, at)}: not valid JSON ({what})")

    for gap in itertools.chain([r"\s*(\[)\s*(\]?)"], itertools.repeat(r"\s*(?:(,)\s*|(\]))")):
        while not last and len(text) - place < 4096:  # a comma and its white space are never cut in two
            refill()
        found = re.compile(gap).match(text, place)
        if not found:
            raise broken("a row must be followed by a comma or the end of the list; is the file whole?", place)
        byte, place = byte + len(text[place : found.end()].encode()), found.end()
        if found[2]:
            while not text[place:].strip() and not last:
                refill()
            if text[place:].strip():
                raise broken("more text behind the list", place)
            return
        while True:
            try:
                row, end = decode(text, place)
                break
            except json.JSONDecodeError as error:
                if last:
                    raise broken(error.msg, error.pos) from error
                refill()  # the row may go on in the next block
            except (ValueError, RecursionError) as error:
                raise broken(error, place) from error
        size = len(text[place:end].encode())
        yield byte, byte + size, row
        byte, place = byte + size, end


def index_rows(path, kind, needs=(DISC, GEN), cache=None):
    """Checks every row of a file and notes where it stands -> dict of "spans" int64 [n, 2], first byte and last + 1;
    "dataset" int32 [n], an index into "names"; "digest" of the whole content.

    cache: a folder that keeps the result, by path, size and time of change; the first call streams the file, the next
    ones take no time. A half written index cannot be met: it is renamed when it is complete.
    """
    path, kept = Path(path), None
    if cache and path.is_file():
        about = (str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns, kind, sorted(needs), "2")
        kept = Path(cache) / f"{path.stem}-{hashlib.sha256(repr(about).encode()).hexdigest()[:24]}.npz"
        try:
            return dict(np.load(kept))
        except FileNotFoundError:
            pass
        except (OSError, ValueError, EOFError, BadZipFile) as error:  # a disk's fault: what is ours is made again
            print(f"{kept}: not readable ({error}), made again", file=sys.stderr)
    spans, dataset, names = array("q"), array("i"), {}
    size = path.stat().st_size if path.is_file() else 0
    with Progress(total=size, unit="B", unit_scale=True, desc=f"index {path.name}", disable=size < 1 << 26) as bar:
        for i, (start, end, row) in enumerate(scan_rows(path)):
            if kind:
                check_row(row, kind, needs, f"{path}, row {i}")
            spans.extend((start, end))
            dataset.append(names.setdefault(dataset_of(row), len(names)))
            bar.update(end - bar.n)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "blake2b").hexdigest()[:32]
    index = {"spans": np.array(spans, np.int64).reshape(-1, 2), "dataset": np.array(dataset, np.int32),
             "names": np.array(list(names), dtype=str), "digest": np.array(digest)}  # fmt: skip
    if kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        temporary = kept.with_suffix(f".{os.uname().nodename}-{os.getpid()}.tmp")
        with open(temporary, "wb") as file:
            np.savez(file, **index)
            os.fsync(file.fileno())
        os.replace(temporary, kept)
    return index


class Rows:
    """The rows of several files, read from the disk one by one: rows[i] -> (name for messages, dict)."""

    def __init__(self, files, kind, needs=(DISC, GEN), cache=None):
        self.files, self.indexes = files, [index_rows(file, kind, needs, cache) for file in files]
        self.open = [open(file, "rb") for file in files]  # noqa: SIM115 (read from as long as this object lives)
        self.starts = np.cumsum([0] + [len(index["spans"]) for index in self.indexes])
        self.names = sorted({str(name) for index in self.indexes for name in index["names"]})
        codes = [np.array([self.names.index(n) for n in x["names"]], np.int32)[x["dataset"]] for x in self.indexes]
        self.dataset = np.concatenate(codes) if len(self) else np.zeros(0, np.int32)  # [n] an index into names

    def __len__(self):
        return int(self.starts[-1])

    def __getitem__(self, i):
        f = int(np.searchsorted(self.starts, i, side="right")) - 1
        j = int(i - self.starts[f])
        start, end = self.indexes[f]["spans"][j].tolist()
        # pread takes its place as an argument: forked workers share the open file
        return f"{self.files[f]}, row {j}", json.loads(os.pread(self.open[f].fileno(), end - start, start))


def dataset_of(row):
    """Published RL rows have both keys, with the finer name in dataset_name."""
    return str(row.get("dataset_name") or row.get("dataset") or "")


def sft_side(side, name):
    """One side of an SFT row -> (human text, images, video, answer); both key styles."""
    check_keys(side, "a side of an SFT row", name)
    turns = side.get("conversations")
    if not isinstance(turns, list) or len(turns) != 2:
        found = f"{len(turns)} turns" if isinstance(turns, list) else type(turns).__name__
        raise BadInput(f'{name}: needs "conversations" with one human and one assistant turn, found {found}')
    texts = []
    for turn, roles in zip(turns, (("human", "user"), ("gpt", "assistant"))):
        check_keys(turn, "a turn", name)
        who = turn.get("from", turn.get("role", roles[0]))
        if who not in roles:
            raise BadInput(f'{name}: "conversations" has a turn of {who!r} where {" or ".join(roles)} must be')
        if "value" not in turn and "content" not in turn:
            raise BadInput(f'{name}: a turn of "conversations" has neither "value" nor "content"')
        texts.append(turn["value"] if "value" in turn else turn["content"])
    human, answer = texts
    if not isinstance(human, str) or not isinstance(answer, str | None):
        raise BadInput(f'{name}: needs "conversations" whose texts are strings')
    images, video = as_list(side.get("image"), name), as_list(side.get("video"), name, "video")
    if images and video:
        raise BadInput(f"{name}: has both an image and a video; the format allows one of them")
    return human, images, video, answer


def rl_side(row, side, name):
    """One side ("qry" or "pos") of an RL row -> input dict."""
    missing = [key for key in (f"{side}_text", f"{side}_image", f"{side}_video") if key not in row]
    if missing:
        raise BadInput(f"{name}: the row lacks {', '.join(missing)}")
    check_keys(row, "an RL row", name)
    item = {"text": row[f"{side}_text"], "images": row[f"{side}_image"], "video": row[f"{side}_video"]}
    return check_input(item, name)


def side_of(row, kind, side, name):
    """One side of a row -> (name, human text, images, video, answer) of either kind of file."""
    where = f"{name}, {side}"
    if kind == "rl":
        return where, *rl_side(row, side, where).values(), None
    check_keys(row, "an SFT row", name)
    if side not in row:
        raise BadInput(f'{name}: an SFT row needs "qry" and "pos", this one has {", ".join(row)}')
    return where, *sft_side(row[side], where)


def check_row(row, kind, needs, name):
    """Everything about a row that shows without its pictures; needs: embedding tokens that an SFT row must have, and
    "answer" where its assistant's text is learned."""
    for side in ("qry", "pos"):
        where, human, images, video, answer = side_of(row, kind, side, name)
        if kind == "rl":  # its texts have been checked, its marks do not count
            continue
        for text in (human, answer or ""):
            check_text(text, where)
        media_marks(human, images, video, where)  # also without media: they may have been lost
        if "answer" in needs and not answer:
            raise BadInput(f"{where}: no assistant text, from which the next-token loss learns; mend the row")
        for token, text, place in ((DISC, human, "user's"), (GEN, answer or "", "assistant's")):
            if token in needs and token not in text:
                raise BadInput(f"{where}: no {token} in the {place} text, so it has no such embedding; mend the row")


def content_key(text, images, video):
    """Identity of a side, an int64: equal stripped text and equal media paths."""
    blob = json.dumps([(text or "").strip(), [str(m) for m in images], [str(m) for m in video]]).encode()
    return int.from_bytes(hashlib.blake2b(blob, digest_size=8).digest(), "big", signed=True)


@dataclass
class Pair:
    """An encoded pair. ok is False where a side was skipped: the rows are then stand-ins that no loss reads."""

    query: Row
    target: Row
    target_key: int
    ok: bool
    reason: str
    name: str


class PairData(Dataset):
    """Encoded pairs of one or more files; item i is row i. `order` says which rows make a step.

    kind: the files' format, "sft" or "rl". needs: the embedding tokens that a row must have. answers=False reads the
    prompts of an SFT file only (DUME).
    """

    def __init__(self, files, tokenizer, *, kind, batch_size, seed, root=None, max_length=12_288, rank=0, world=1,
                 blank_image=True, needs=(DISC, GEN), answers=True, cache=None):  # fmt: skip
        self.rows = files if isinstance(files, Rows) else Rows(files, kind, needs, cache)
        if not len(self.rows):
            raise BadInput(f"{', '.join(map(str, self.rows.files))}: no rows")
        self.tokenizer, self.kind, self.root, self.max_length = tokenizer, kind, root, max_length
        self.rank, self.world, self.blank_image, self.needs, self.answers = rank, world, blank_image, needs, answers
        if batch_size % world:
            raise BadInput(f"--batch_size {batch_size} must be a multiple of the {world} processes")
        self.order = BatchOrder(self.rows.dataset, batch_size, seed, self.rows.names)
        if rank == 0 and self.order.left_out:
            print(f"left out, smaller than a batch of {batch_size}: {self.order.left_out}")

    def __getitem__(self, i):
        name, row = self.rows[i]
        try:
            query, _ = self.side(row, "qry", name)
            target, key = self.side(row, "pos", name)
        except Skip as error:
            return Pair(self.stand_in(name), self.stand_in(name), 0, False, str(error), name)
        return Pair(query, target, key, True, "", name)

    def side(self, row, side, name):
        """-> Row and the identity of its content."""
        name, human, images, video, answer = side_of(row, self.kind, side, name)
        if self.kind == "sft":
            encoded = encode(self.tokenizer, human, images, video, answer if self.answers else None, root=self.root,
                             name=name)  # fmt: skip
        else:
            item = {"text": human, "images": images, "video": video}
            encoded = encode_input(self.tokenizer, item, blank_image=self.blank_image, root=self.root, name=name)
        if len(encoded.ids) > self.max_length:
            raise Skip(f"{name}: {len(encoded.ids)} tokens, above --max_length {self.max_length}")
        return encoded, content_key(human, images, video)

    def stand_in(self, name):
        """A short text-only sequence in the place of a skipped side, so that shapes and collectives stay the same."""
        answer = f"<think></think><answer>{GEN}" if self.kind == "sft" and self.answers else None
        return encode(self.tokenizer, f"\n{DISC}\n", [], [], answer, name=name)


class BatchOrder:
    """order[step] -> row numbers of the global batch of that step: one dataset each, shuffled, a function of the seed.

    Every dataset is an endless row of permutations, one per epoch, cut into batches; a tail shorter than a batch goes
    into the first batch of the next epoch, whose permutation puts these rows last, so that no batch holds a row
    twice; a dataset smaller than a batch is left out.
    An epoch's batches over all datasets are shuffled together.
    """

    def __init__(self, dataset, batch_size, seed, names=None):
        """dataset: name of every row, or its index into names."""
        self.batch_size, self.seed = batch_size, seed
        found, dataset = np.unique(dataset, return_inverse=True)
        found = found.tolist() if names is None else [names[i] for i in found]
        members = [np.flatnonzero(dataset == d) for d in range(len(found))]
        sizes = [f"{name or 'unnamed'} {len(m)}" for name, m in zip(found, members)]
        self.left_out = ", ".join(size for size, m in zip(sizes, members) if len(m) < batch_size)  # names and sizes
        self.members = [m for m in members if len(m) >= batch_size]
        if not self.members:
            raise BadInput(f"no dataset fills a batch of {batch_size} (rows: {self.left_out}); lower --batch_size")
        self.permutation = cache(self.permutation)
        self.starts, self.epochs = [0], []  # first step of every epoch; its batches, built when first asked for

    def permutation(self, d, epoch):
        n = len(self.members[d])
        order = np.random.default_rng([self.seed, d, epoch]).permutation(n)
        carried = (epoch * n) % self.batch_size  # rows of the last epoch still waiting for their batch
        if carried:
            waiting = self.permutation(d, epoch - 1)[n - carried :]
            late = np.isin(order, waiting)
            order = np.concatenate([order[~late], order[late]])
        return order

    def build(self, epoch):
        batches, B = [], self.batch_size
        for d, member in enumerate(self.members):
            n = len(member)
            for k in range(epoch * n // B, (epoch + 1) * n // B):
                at = np.arange(k * B, (k + 1) * B)  # place in the endless row
                batches.append(member[[self.permutation(d, p // n)[p % n] for p in at]])
        return [batches[i] for i in np.random.default_rng([self.seed, 1 << 20, epoch]).permutation(len(batches))]

    def __getitem__(self, step):
        while step >= self.starts[-1]:
            epoch = len(self.epochs)
            self.epochs.append(self.build(epoch))
            self.starts.append(self.starts[-1] + len(self.epochs[-1]))
        epoch = int(np.searchsorted(self.starts, step, side="right")) - 1
        return self.epochs[epoch][step - self.starts[epoch]]


def step_loader(data, steps, workers):
    """Yields this process's pairs of each of the given steps, prepared ahead by background workers (0: in here).

    The rows of a step are a pure function of (seed, step); each process takes its share of them, so the global batch
    does not depend on their number. A worker's item is one pair: a step of 1,024 pairs is gigabytes of patches.
    """
    share = data.order.batch_size // data.world
    loader = forked_loader(
        data,
        workers,
        batch_size=None,
        sampler=(int(i) for step in steps for i in data.order[step][data.rank :: data.world]),
        prefetch_factor=max(2, -(-share // workers)) if workers else None,  # one step ahead
    )
    pairs = iter(loader)
    for _ in steps:
        yield [next(pairs) for _ in range(share)]


def forked_loader(dataset, workers, **settings):
    """A DataLoader whose workers are forks of this process and end with it; 0 workers: everything in here."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive a fork
    return DataLoader(
        dataset,
        num_workers=workers,
        generator=torch.Generator(),  # its own: the global one must not depend on the loader
        multiprocessing_context="fork" if workers else None,
        worker_init_fn=partial(tie_to_parent, os.getpid()),
        **settings,
    )


# ---------------------------------------------------------------------------------------------------------------
# Annotation (the paper's cold-start data): bare pairs -> a teacher's reasoning and summaries -> filters -> SFT rows

ASK = (
    "This is the {role} of a search: {what}. Think it through first, between <think> and </think>: what it shows or "
    "says, which details matter, what it asks for and what follows from it, step by step. Then write one short summary "
    "between <answer> and </answer> that could be searched for in its place: the answer where there is a question, "
    "otherwise what it is about, with the names, numbers and actions that set it apart. If the {role} is a single word "
    "or phrase, the summary is exactly that word or phrase."
)
ROLES = {"qry": ("query", "what somebody looks for"), "pos": ("candidate", "one of the things that can be found")}
FRAME_SIDE = 448  # a foreign teacher sees a video as pictures no larger than this: 256 tokens each for most
OWN_CALL = 8  # batches in one call of our decode loop, which refills ended places
STRAY = re.compile(r"<\|[^<>|]*\|>|</?(?:think|answer|s|pad|eos|image|video)>|<(?:gen|disc)_emb>|\[/?INST\]")


def read_pairs(files):
    """Files of pairs -> list of {"dataset_name", "qry": input, "pos": input}, reasoning left out. Four formats:

    {"dataset_name", "qry": {"text", "images": [path], "video": [frame path]}, "pos": {...}} (all but one key of a side
    optional); RL rows; SFT rows; MMEB-train's parquet (its dataset is named by the folder).
    """
    pairs = []
    for file in files:
        if Path(file).suffix == ".parquet":
            import pyarrow.parquet

            if not Path(file).is_file():
                raise MissingFile(f"{file}: no such file")
            try:
                table = pyarrow.parquet.read_table(file)
            except (OSError, ValueError) as error:  # what pyarrow says of a file that is torn or not there
                raise BadInput(f"{file}: cannot be read as parquet ({error}); copy it again") from error
            batches = table.to_batches(max_chunksize=1024)
            name, rows = Path(file).resolve().parent.name, (row for batch in batches for row in batch.to_pylist())
        else:
            name, rows = "", (row for _, _, row in scan_rows(file))  # one by one: the reasoning left out has gigabytes
        for i, row in enumerate(rows):
            if isinstance(row.get("qry"), dict):
                check_keys(row, "a pair", f"{file}, row {i}")
            elif "qry_image_path" in row:
                check_keys(row, "a row of MMEB-train", f"{file}, row {i}")
            sides = {side: bare_side(row, side, f"{file}, row {i}, {side}") for side in ("qry", "pos")}
            pairs.append({"dataset_name": dataset_of(row) or name, **sides})
    return pairs


def bare_side(row, side, name):
    """One side of a pair in any of read_pairs' formats -> input dict: media paths, and the text without marks."""
    given, video = row.get(side), []
    if isinstance(given, dict) and "conversations" in given:
        text, images, video, _ = sft_side(given, name)
        media_marks(text, images, video, name)
        text = re.sub(f"{IMAGE_MARK}|{VIDEO_MARK}", "", text.split(DISC)[0])
    elif isinstance(given, dict):
        text, images, video = check_input(given, name).values()
    elif f"{side}_image_path" in row:  # MMEB-train calls the query's text "qry", the target's "pos_text"
        text = given if side == "qry" else row.get("pos_text")
        text, images, video = check_input({"text": text, "images": row[f"{side}_image_path"]}, name).values()
    else:
        text, images, video = rl_side(row, side, name).values()
    text = re.sub(r"<\|image_\d+\|>", "", without_marks(text, images, video)).strip()
    images = [path for path in images if str(path) not in ("blank.jpg", "images/blank.jpg")]  # they say "no picture"
    if not (text or images or video):
        raise BadInput(f"{name}: neither text nor media; fill the side or take the row out")
    if images and video:
        raise BadInput(f"{name}: has both an image and a video; SFT files allow one of them")
    check_text(text, name)
    return {"text": text, "images": images, "video": video}


def side_key(side, item):
    return f"{side} {content_key(**item)}"


def sft_row(pair, answers):
    """The SFT row of a pair; answers: (reasoning, summary) of each side."""
    row = {"dataset_name": pair["dataset_name"]}
    for side, (think, summary) in answers.items():
        item = pair[side]
        kind, media = ("video", item["video"]) if item["video"] else ("image", item["images"] or ["images/blank.jpg"])
        marks = VIDEO_MARK if item["video"] else IMAGE_MARK * len(media)
        turns = [("human", f"{marks}{item['text']}\n{DISC}\n{INSTRUCTION}"),
                 ("gpt", f"<think>{think}</think><answer>{summary}{GEN}")]  # fmt: skip
        row[side] = {kind: media, "conversations": [{"from": who, "value": text} for who, text in turns]}
    return row


def write_rows(path, rows):
    """A .json list or .jsonl lines, one row a line; atomic."""
    temporary, lines = Path(f"{path}.tmp"), str(path).endswith(".jsonl")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(temporary, "w", encoding="utf-8") as file:
        file.write("" if lines else "[")
        for i, row in enumerate(rows):
            file.write(("" if lines else ",\n" if i else "\n") + json.dumps(row) + ("\n" if lines else ""))
        file.write("" if lines else "\n]\n")
    os.replace(temporary, path)


# Teachers: functions (inputs with opened pictures, their keys) -> [{"text", "tokens", "ended"}] in this order


def own_teacher(args, device):
    """A Qwen2-VL, read by our decode loop: one with the embedding tokens speaks our format, others are asked for it."""
    from transformers import AutoTokenizer

    from model import Embedder
    from support.run import stable_hash

    ours = GEN in AutoTokenizer.from_pretrained(args.teacher).get_vocab()  # Embedder would add it
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    embedder = Embedder.from_pretrained(args.teacher, device=device, dtype=dtype)

    def encode_one(item, key):
        if ours:
            return encode_input(embedder.tokenizer, item, name=key)
        human = IMAGE_MARK * len(item["images"]) + VIDEO_MARK * bool(item["video"]) + question(item, key)
        return encode(embedder.tokenizer, human, item["images"], item["video"], name=key)

    def ask(items, keys):
        rows = [encode_one(item, key) for item, key in zip(items, keys)]
        seeds, answers = [stable_hash(args.seed, key) for key in keys], {}
        for i, out in embedder.generate(rows, temperature=args.temperature, seeds=seeds, slots=args.batch_size,
                                        max_new_tokens=args.max_new_tokens):  # fmt: skip
            ids, ended = out.ids[0], out.ids[0][-1] == embedder.end_id
            text = embedder.tokenizer.decode(ids[: len(ids) - ended])
            answers[i] = {"text": text, "tokens": len(ids), "ended": ended}
        return [answers[i] for i in range(len(rows))]

    return ask


def foreign_teacher(args, device):
    """Any other image-text-to-text model of transformers, by its own processor and generate(); videos as pictures."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from support.run import stable_hash

    try:
        processor = AutoProcessor.from_pretrained(args.teacher)
    except ImportError as error:  # of the video part of most processors
        cure = "pip install torchvision" if "orchvision" in str(error) else str(error).strip()
        raise SystemExit(f"--teacher {args.teacher}: its processor needs another package: {cure}") from error
    if not hasattr(processor, "image_processor") or not processor.chat_template:
        raise SystemExit(f"--teacher {args.teacher}: has no picture processor or no chat template")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = AutoModelForImageTextToText.from_pretrained(args.teacher, dtype=dtype).to(device).eval()
    tokenizer = processor.tokenizer
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or tokenizer.eos_token
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    ends = np.atleast_1d(model.generation_config.eos_token_id).tolist()
    how = {"temperature": args.temperature, "top_k": 0, "top_p": 1.0} if args.temperature else {}

    def ask(items, keys):
        torch.manual_seed(stable_hash(args.seed, *keys))  # samples do not depend on the calls before
        conversations = []
        for item, key in zip(items, keys):
            for frame in item["video"]:
                frame.thumbnail((FRAME_SIDE, FRAME_SIDE))
            content = [{"type": "image", "image": picture} for picture in item["images"] + item["video"]]
            frames = "The pictures are frames of one video, in order.\n" * bool(item["video"])
            content.append({"type": "text", "text": frames + question(item, key)})
            conversations.append([{"role": "user", "content": content}])
        inputs = processor.apply_chat_template(
            conversations, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(device, dtype=dtype)  # fmt: skip
        out = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=bool(how), **how)
        answers = []
        for ids in out[:, inputs["input_ids"].shape[1] :].tolist():
            n = next((i for i, t in enumerate(ids) if t in ends), len(ids))  # behind it is padding
            answers.append({"text": tokenizer.decode(ids[:n]), "tokens": n, "ended": n < len(ids)})
        return answers

    return ask


def question(item, key):
    """The text that a teacher is asked, below the side's media."""
    role, what = ROLES[key.split()[0]]
    return f"{item['text']}\n\n{ASK.format(role=role, what=what)}"


def opened(item, root):
    """The input with its pictures opened, a video thinned out. Raises Skip where one cannot be used."""
    if mark := re.search(f"{IMAGE_MARK}|{VIDEO_MARK}", item["text"]):
        raise Skip(f"the text holds a literal {mark[0]}, which an SFT row would take for the mark of a picture")
    images = [open_picture(path, root) for path in item["images"]]
    video = [open_picture(path, root) for path in thinned(item["video"])]
    return item | {"images": images, "video": video}


def teacher_calls(items, size):
    """Which inputs are asked together, as lists of numbers: same numbers of frames and pictures, long texts first.

    A function of the inputs only: whatever was killed in between and however many processes share the calls, every
    answer is computed beside the same others, so that rounding is the same too.
    """
    shape = [(len(item["video"]), len(item["images"]), len(item["text"])) for item in items]
    order = sorted(range(len(items)), key=lambda n: (*(-x for x in shape[n]), n))
    groups = [list(group) for _, group in itertools.groupby(order, key=lambda n: shape[n][:2])]
    return [group[start : start + size] for group in groups for start in range(0, len(group), size)]


def find_answers(folder):
    """key -> (side file, offset) of every complete line; a last line that a kill has torn is not there."""
    found = {}
    for path in sorted(Path(folder).glob("answers-*.jsonl")):
        with open(path, "rb") as file:
            start = 0
            for line in file:
                with contextlib.suppress(ValueError):  # torn by a kill, or the zeros of a crash
                    if line.endswith(b"\n"):
                        found[json.loads(line)["key"]] = path, start
                start += len(line)
    return found


# Filters: pure functions of one answer


def too_long(answer, bound):
    return not answer["ended"] or answer["tokens"] > bound  # not ended: cut off at --max_new_tokens


def split_answer(text):
    """(reasoning, summary), or None where the form is wrong. The opening <think> may stand in the teacher's prompt,
    <answer> may be missing or a box (GLM-4.1V and 4.5V), <gen_emb> or </answer> may close it."""
    text = re.sub(r"<\|(begin|end)_of_box\|>", "", text).strip()
    form = r"(?:<think>)?(.*?)</think>\s*(?:<answer>)?(.*?)(?:<gen_emb>|</answer>|\s)*"
    match = re.fullmatch(form, text, re.DOTALL)
    return (match[1].strip("\n"), match[2].strip("\n")) if match and match[1].strip() else None


def repeated_share(text, n=4, window=200):
    """Share of a text's n-word sequences that occurred before in it: the worst of the whole and of its windows.

    Ordinary reasoning is far below 0.2; a loop of a few sentences, anywhere in it, above 0.5. A short text may say a
    list twice: fewer than 50 sequences count as 50.
    """
    words = re.findall(r"[\u3040-\u30ff\u3400-\u9fff]|\w{1,20}|[^\w\s]", text.lower())  # Chinese by character
    grams = list(zip(*(words[k:] for k in range(n))))
    parts = [grams] + [grams[s : s + window] for s in range(0, len(grams) - window // 2, window // 2)]
    return max((len(part) - len(set(part))) / max(len(part), 50) for part in parts)


def judge(answer, max_tokens, max_repeat):
    """(reason to reject, None), or ("", (reasoning, summary)). The first reason counts."""
    if "error" in answer:
        return "media", None
    if too_long(answer, max_tokens):
        return "too long", None
    parts = split_answer(answer["text"])
    if parts is None:
        return "malformed", None
    if any(STRAY.search(part) for part in parts):
        return "stray token", None
    if not parts[1].strip():
        return "empty summary", None
    if max(repeated_share(part) for part in parts) > max_repeat:
        return "repetition", None
    return "", parts


REASONS = ("media", "too long", "malformed", "stray token", "empty summary", "repetition")


def filter_answers(pairs, folder, args):
    """Writes --out and, beside the raw answers, rejected.jsonl and report.txt."""
    found, counts, lengths = find_answers(folder), {}, {"qry": Counter(), "pos": Counter()}

    def answer(key):
        path, start = found[key]
        with open(path, "rb") as file:
            file.seek(start)
            return json.loads(file.readline())

    def kept(rejected):
        for i, pair in enumerate(Progress(pairs, desc="filter", unit="pair")):
            answers = {side: answer(side_key(side, pair[side])) for side in ("qry", "pos")}
            judged = {side: judge(a, args.max_tokens, args.max_repeat) for side, a in answers.items()}
            bad = {side: reason for side, (reason, _) in judged.items() if reason}
            count = counts.setdefault(pair["dataset_name"], Counter())
            count[next(iter(bad.values()), "kept")] += 1  # a pair counts once, the query's reason first
            if bad:
                line = {"row": i, "dataset_name": pair["dataset_name"], "reasons": bad}
                rejected.write(json.dumps(line) + "\n")
                continue
            for side, a in answers.items():
                lengths[side][a["tokens"].bit_length()] += 1
            yield sft_row(pair, {side: parts for side, (_, parts) in judged.items()})

    with open(folder / "rejected.jsonl", "w", encoding="utf-8") as rejected:
        write_rows(args.out, kept(rejected))
    report = filter_report(counts, lengths)
    (folder / "report.txt").write_text(report + "\n", encoding="utf-8")
    print(f"{report}\nwrote {args.out}; raw answers, rejected.jsonl and report.txt are in {folder}")


def filter_report(counts, lengths):
    """Kept share and reasons per dataset, and how long the good answers are, as text."""
    total = sum(counts.values(), Counter())
    lines = [f"{'dataset':24}{'pairs':>9}{'kept':>8}" + "".join(f"{reason:>15}" for reason in REASONS)]
    for name, count in [*sorted(counts.items()), ("all", total)]:
        n = sum(count.values())
        shares = "".join(f"{count[reason] / n:15.1%}" for reason in REASONS)
        lines.append(f"{name[:23]:24}{n:9,}{count['kept'] / n:8.1%}{shares}")
    for side, histogram in lengths.items():
        lines.append(f"\ntokens of the kept answers, {ROLES[side][0]}")
        for bits in range(min(histogram, default=0), max(histogram, default=-1) + 1):
            share = histogram[bits] / sum(histogram.values())
            lines.append(f"{f'below {1 << bits:,}':>14}{share:7.1%} {'#' * round(50 * share)}")
    return "\n".join(lines)


def annotate(args):
    """Asks the teacher for every distinct side, shared out over the processes, then filters. A killed run goes on
    where it was; with all answers there, only the filters run (again)."""
    from transformers import AutoConfig

    from model import check_model
    from support.run import barrier, end_processes, read_json, stable_hash, start_processes, write_json

    folder = Path(f"{args.out}.answers")
    if Path(args.out).exists() and not folder.is_dir():
        raise BadInput(f"--out {args.out} is a file that annotate has not made; give another name")
    pairs = read_pairs(args.pairs)
    if not pairs:
        raise SystemExit(f"{', '.join(args.pairs)}: no rows")
    check_model(args.teacher)
    rank, world, device = start_processes()
    hold(folder)
    group = dist.new_group(backend="gloo", timeout=timedelta(days=7)) if world > 1 else None  # waits for the slowest

    weights = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in Path(args.teacher).glob("*.safe*")]
    asked = {key: getattr(args, key) for key in ("teacher", "max_new_tokens", "temperature", "seed")}
    asked |= {"weights": stable_hash(*sorted(weights)), "ask": ASK}  # another model may come under the same name
    known = folder / "settings.json"
    before = read_json(known) if known.exists() else asked
    if changed := [f"{key} {before[key]} -> {asked[key]}" for key in asked if before[key] != asked[key]]:
        raise SystemExit(f"{folder} holds answers to other settings ({'; '.join(changed)}); give another --out")
    barrier(group)  # all have read it
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(known, asked)
    sides = {side_key(side, pair[side]): pair[side] for pair in pairs for side in ("qry", "pos")}
    try:
        own = AutoConfig.from_pretrained(args.teacher).model_type == "qwen2_vl"
    except (OSError, ValueError) as error:
        raise BadInput(f"--teacher {args.teacher}: cannot be loaded ({str(error).splitlines()[0]})") from error
    found, keys = find_answers(folder), list(sides)
    calls = teacher_calls([sides[key] for key in keys], args.batch_size * (OWN_CALL if own else 1))
    calls = [[keys[n] for n in call] for call in calls]
    todo = [call for call in calls if not all(key in found for key in call)]
    barrier(group)  # all have read the side files before one writes: they agree on what is left to do

    if mine := todo[rank::world]:
        ask = (own_teacher if own else foreign_teacher)(args, device)
        bar = Progress(total=len(sides), initial=len(sides) - sum(map(len, todo)), desc="annotate", unit="side",
                   disable=rank > 0, smoothing=0.1)  # fmt: skip
        with open(folder / f"answers-{time.time_ns()}-{rank}.jsonl", "x", encoding="utf-8") as file:
            for c, call in enumerate(mine):
                inputs, answers = {}, {}
                for key in call:
                    try:
                        inputs[key] = opened(sides[key], args.media_root)
                    except Skip as error:
                        answers[key] = {"error": str(error)}
                if inputs:
                    answers |= zip(inputs, ask(list(inputs.values()), list(inputs)))
                file.write("".join(json.dumps({"key": key, **answers[key]}) + "\n" for key in call))
                file.flush()
                bar.update(sum(map(len, todo[c * world : (c + 1) * world])))  # process 0 speaks for all
        bar.close()
    barrier(group)
    if rank == 0:
        filter_answers(pairs, folder, args)
    barrier(group)
    end_processes()


# ---------------------------------------------------------------------------------------------------------------
# The RL subset


def rl_subset(args):
    """A balanced draw from --pairs without what --sft holds: one pair of each modality in turn, in it one of each
    dataset in turn; where one runs out the others fill up."""
    try:
        re.compile(args.visdoc)
    except re.error as error:
        raise BadInput(f"--visdoc {args.visdoc}: no regular expression ({error})") from error
    pairs = read_pairs(args.pairs)

    def content(pair):
        return content_key(**pair["qry"]), content_key(**pair["pos"])

    def modality(pair):
        if re.search(args.visdoc, pair["dataset_name"], re.IGNORECASE):
            return "visdoc"
        return "video" if pair["qry"]["video"] or pair["pos"]["video"] else "image"

    seen = {content(pair) for pair in read_pairs(args.sft)}
    pools, n_sft = {"image": {}, "video": {}, "visdoc": {}}, len(seen)
    for i in np.random.default_rng(args.seed).permutation(len(pairs)):
        if content(pairs[i]) not in seen:
            seen.add(content(pairs[i]))
            pools[modality(pairs[i])].setdefault(pairs[i]["dataset_name"], []).append(pairs[i])
    turns, chosen = {kind: deque(pool[name] for name in sorted(pool)) for kind, pool in pools.items()}, []
    while len(chosen) < args.size and any(turns.values()):
        for queue in filter(None, turns.values()):
            chosen.append(queue[0].pop())
            queue.rotate(-1) if queue[0] else queue.popleft()
    chosen = chosen[: args.size]
    write_rows(args.out, (rl_row(pair) for pair in chosen))
    counts = Counter((modality(pair), pair["dataset_name"]) for pair in chosen)
    print("\n".join(f"{kind:8}{name:32}{n:7,}" for (kind, name), n in sorted(counts.items())))
    print(f"{len(chosen):,} of {len(pairs):,} pairs, none of the {n_sft:,} of --sft; wrote {args.out}")


def rl_row(pair):
    row = {"dataset": pair["dataset_name"], "dataset_name": pair["dataset_name"], "solution": "<embedding>"}
    for side in ("qry", "pos"):
        text, images, video = pair[side].values()
        row |= {f"{side}_text": text, f"{side}_image": images[0] if len(images) == 1 else images or "",
                f"{side}_video": video or [""]}  # fmt: skip
    return row


# ---------------------------------------------------------------------------------------------------------------
# Checking a file before a run

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
            check_row(row, data.kind, data.needs, name)
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
        from model import load_tokenizer

        tokenizer = load_tokenizer(args.model)
        tokenizer.add_tokens([token for token in (GEN, DISC) if token not in tokenizer.get_vocab()])
    rows = Rows([args.file], kind=None)
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


# ------------------------------------------------------------------------------------------- the toy world
# A scene is 3 x 3 cells of 28 x 28 pixels, one visual token each, read row by row: "" is an empty cell, "red
# star" an object, "D" a glyph. Colours differ within a scene, shapes too (but for a doubled object).
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, help):
        return commands.add_parser(name, help=help, formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    p = command("annotate", "bare pairs and a teacher -> SFT rows")
    p.add_argument("--pairs", nargs="+", required=True, help="files of pairs, see read_pairs: .json, .jsonl, .parquet")
    p.add_argument("--media_root", default=".", help="folder that the media paths start from")
    p.add_argument("--teacher", required=True, help="folder or hub id of an image-text-to-text model")
    p.add_argument("--out", required=True, help="SFT file; raw answers go to OUT.answers/")
    p.add_argument("--batch_size", type=int, default=16, help="answers written at once by each process")
    p.add_argument("--max_new_tokens", type=int, default=8192, help="an answer is cut off here")
    p.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    p.add_argument("--seed", type=int, default=0, help="of the samples, where --temperature is above 0")
    p.add_argument("--max_tokens", type=int, default=8192, help="filter: longer answers are rejected (paper: 8192)")
    p.add_argument("--max_repeat", type=float, default=0.3, help="filter: largest share of repeated 4-word sequences")
    p = command("rl-subset", "a balanced RL file out of pairs that SFT does not see")
    p.add_argument("--pairs", nargs="+", required=True, help="files of pairs, as for annotate")
    p.add_argument("--sft", nargs="*", default=[], help="SFT files whose pairs are left out")
    p.add_argument("--out", required=True, help="RL file")
    p.add_argument("--size", type=int, default=11_000, help="pairs (the paper has about 11,000)")
    p.add_argument("--visdoc", default=r"colpali|visrag|vidore|visdoc|\bdoc\b",
                   help="datasets of visual documents; nothing in a row tells them from pictures")  # fmt: skip
    p.add_argument("--seed", type=int, default=0, help="of the draw")
    p = command("check", "an SFT or RL file before a run; exit code 1 where a row cannot be used")
    p.add_argument("file")
    p.add_argument("--media_root", default=".", help="folder that the media paths start from")
    p.add_argument("--model", help="whose tokenizer counts the tokens; without one media are looked up, not opened")
    p.add_argument("--max_length", type=int, default=12_288, help="longer rows are skipped in training")
    p.add_argument("--batch_size", type=int, default=1, help="a dataset with fewer rows is left out in training")
    p.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    p = command("toy", "write the toy world")
    p.add_argument("--out", default="runs/toy/data", help="folder")
    p.add_argument("--seed", type=int, default=0, help="of the scenes and their pictures")
    p = command("export", "a checkpoint of sft.py or rl.py -> a model folder, for eval.py and others")
    p.add_argument("checkpoint", help="OUT/checkpoints/step-N")
    p.add_argument("--out", required=True, help="model folder")
    args = parser.parse_args()
    check_bounds(vars(args), temperature=(0, True, 100))
    given = [*getattr(args, "pairs", []), *getattr(args, "sft", [])]
    if any(Path(file).resolve() == Path(args.out).resolve() for file in given):
        raise SystemExit(f"--out {args.out} is one of the files of --pairs or --sft; give another name")
    if args.command == "annotate":
        annotate(args)
    elif args.command == "rl-subset":
        rl_subset(args)
    elif args.command == "check":
        sys.exit(0 if check(args) else 1)
    elif args.command == "export":
        from model import export_checkpoint

        export_checkpoint(args.checkpoint, args.out)
    else:
        write_toy(args.out, args.seed)


if __name__ == "__main__":
    run_script(main)
