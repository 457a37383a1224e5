"""Data: conversations, pictures and videos to patches, the rows of SFT and RL files, batches.

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
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from support.rows import Rows
from support.run import (
    BadInput,
    Stopped,
    check_bounds,
    forked_loader,
    run_script,
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
NUM_FRAMES = 8  # of a video
BLANK_SIZE = (28, 28)  # of the white picture that stands for "no picture": images/blank.jpg in the published files
CONTROL_TOKENS = ("<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>")
MAX_DECODED = 200_000_000  # pixels; a larger picture is refused before it is decoded (decompression bombs)


class Skip(ValueError):
    """A row that cannot be used as it is (unreadable picture, too long): masked out of its batch and counted."""


# ---------------------------------------------------------------------------------------------------------------
# Families of backbones. What Qwen's families share, the chat form and its control tokens, stands outside.


@dataclass(frozen=True)
class Family:
    """One family of backbones. To add one, write its entry of FAMILIES below, with its functions beside it.

    A patch is `patch` x `patch` pixels of `depth` frames; `merge` x `merge` patches become one token of the language
    model. grid: (t, h, w) of a picture or video, in patches.
    """

    model_class: str  # the class in transformers
    picture_processor: str  # the class in transformers; its settings are saved beside the weights, for other tools
    patch: int  # pixels
    depth: int  # frames
    merge: int  # patches
    mean: tuple  # of the three channels, in 0..1
    std: tuple
    image_pixels: tuple  # fewest and most pixels of a picture
    video_pixels: tuple  # of one frame of a video
    image_pad: str  # the token in whose places a picture's states go
    video_pad: str
    media_text: Callable  # (pad token, grid in tokens) -> how a picture or video stands in the text
    media_positions: Callable  # (grid in tokens) -> rotary positions of its tokens [3, n], and where the text goes on
    vision_states: Callable  # (vision tower, pixels, grids, merged) -> its states [n, D_vit]; merged: [n / merge^2, D]
    merge_states: Callable  # (vision tower, states [n, D_vit]) -> what the language model reads, [n / merge^2, D]
    mergers: Callable  # (vision tower) -> its modules that the paper trains in SFT

    @property
    def token_side(self):
        """Pixels of a visual token's side: pictures are resized to multiples of it."""
        return self.patch * self.merge

    @property
    def patch_values(self):
        """Numbers in a patch: 3 channels x depth frames x patch x patch pixels."""
        return 3 * self.depth * self.patch**2

    def in_tokens(self, grid):
        t, h, w = (int(n) for n in grid)
        return t, h // self.merge, w // self.merge


def run_of_pads(pad, grid):
    t, h, w = grid
    return f"<|vision_start|>{pad * (t * h * w)}<|vision_end|>"


def grid_positions(grid):
    """Time, height and width each count up by one; the text goes on after the larger side of the picture, as in
    transformers: time does not count there."""
    t, h, w = grid
    return np.indices(grid).reshape(3, -1), max(h, w)


def last_states(tower, pixels, grids, merged):
    out = tower(pixels, grid_thw=grids)
    return out.pooler_output if merged else out.last_hidden_state


QWEN2_VL = Family(
    model_class="Qwen2VLForConditionalGeneration",
    picture_processor="Qwen2VLImageProcessorPil",
    patch=14,
    depth=2,
    merge=2,
    mean=(0.48145466, 0.4578275, 0.40821073),  # CLIP's
    std=(0.26862954, 0.26130258, 0.27577711),
    image_pixels=(784, 2_359_296),
    video_pixels=(3_136, 25_088),
    image_pad="<|image_pad|>",
    video_pad="<|video_pad|>",
    media_text=run_of_pads,
    media_positions=grid_positions,
    vision_states=last_states,
    merge_states=lambda tower, states: tower.merger(states),
    mergers=lambda tower: [tower.merger],
)
FAMILIES = {"qwen2_vl": QWEN2_VL}  # by the model_type of config.json


# ---------------------------------------------------------------------------------------------------------------
# Pictures and videos to patches


def patchify(frames, *, min_pixels, max_pixels, family=QWEN2_VL):
    """A picture (one frame) or a video (several) as the model's patches.

    frames: list of PIL pictures, any mode. Returns float32 patches [n, 1176] (for Qwen2-VL: 3 channels x 2 frames x
    14 x 14 pixels, CLIP-normalised; four consecutive patches merge into one token) and grid_thw [3] (t, h, w in
    patches, n = t*h*w). min_pixels, max_pixels: area of one frame after the resize. The first frame sets the size of
    all; an odd number of frames repeats the last one, which also makes a picture the two equal frames that the model
    expects. Raises Skip as open_picture does. Same numbers as transformers' Qwen2VLImageProcessorPil, but for 16-bit
    pictures, which become black or white there.
    """
    patches, grid = patch_bytes(frames, min_pixels, max_pixels, family)
    return normalise(torch.from_numpy(patches), family), torch.from_numpy(grid)


def normalise(patches, family=QWEN2_VL):
    """uint8 [n, 1176] -> float32, on the device they are on: until then a page of 2.4 M pixels is 14 MB, not 57."""
    table = byte_to_float(family.mean, family.std).to(patches.device)
    channels = patches.int().chunk(3, dim=1)
    return torch.cat([table[:, c][x] for c, x in enumerate(channels)], dim=1)


@cache
def byte_to_float(mean, std):
    """The normalised value of every possible byte, [256, 3], in the order of transformers' float32 arithmetic."""
    scaled = (np.arange(256)[:, None] * (1 / 255)).astype(np.float32)
    return torch.from_numpy((scaled - np.float32(mean)) / np.float32(std))


def patch_bytes(frames, min_pixels, max_pixels, family=QWEN2_VL):
    """The patches before they are normalised: numpy uint8 [n, patch_values], grid [3]."""
    frames = [open_picture(frame) for frame in frames]
    width, height = frames[0].size
    H, W = smart_resize(height, width, family.token_side, min_pixels, max_pixels)
    pixels = [np.asarray(frame.resize((W, H), Image.Resampling.BICUBIC)) for frame in frames]
    pixels += pixels[-1:] * (-len(pixels) % family.depth)
    patch, depth, merge = family.patch, family.depth, family.merge
    t, h, w = len(pixels) // depth, H // patch, W // patch
    x = np.stack(pixels).reshape(t, depth, h // merge, merge, patch, w // merge, merge, patch, 3)
    x = x.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)  # the patches of a token follow each other; in one: channel, frame, y, x
    return np.ascontiguousarray(x).reshape(t * h * w, family.patch_values), np.array([t, h, w])


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
    except (Skip, MemoryError, KeyboardInterrupt, SystemExit, Stopped):
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
    """The white picture (one token) that stands on sides without media."""
    return Image.new("RGB", BLANK_SIZE, "white")


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
    patches: np.ndarray  # uint8 [n, patch_values] of all media in the order of the text
    grids: np.ndarray  # [m, 3]
    name: str  # file, row and side, for messages
    vision_states: torch.Tensor | None = None  # what the frozen vision tower made of the patches, which are then let go

    @property
    def num_patches(self):
        return int(self.grids.prod(axis=1).sum())

    @property
    def content(self):
        """Identity of what the model reads, whatever its name or place in a list."""
        arrays = (self.ids, self.grids, self.patches)
        return hashlib.blake2b(b"".join(x.tobytes() for x in arrays), digest_size=16).hexdigest()

    @property
    def next_position(self):
        """Rotary position (all three axes) of the token after the last one."""
        return int(self.positions.max()) + 1


def mrope_positions(ids, grids, media_ids, family=QWEN2_VL):
    """The rotary positions: text counts up on all three axes, a picture spans (t, h, w) from where it starts.

    ids [L], grids [m, 3] in patches, media_ids: the pad tokens of pictures and videos. Returns [3, L].
    After a picture the count goes on at its largest index + 1, so position = index + delta for text after media.
    """
    positions, start, i, grids = [], 0, 0, iter(grids)
    is_media = np.isin(ids, media_ids)
    while i < len(ids):
        if is_media[i]:
            block, following = family.media_positions(family.in_tokens(next(grids)))
            positions.append(block + start)
            start += following
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
    for token in CONTROL_TOKENS:
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


def encode(tokenizer, human, images, video, answer=None, *, marks=None, root=None, name="", family=QWEN2_VL):
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
            frames = [open_picture(next(images), root)]
            (low, high), pad = family.image_pixels, family.image_pad
        else:
            frames = [open_picture(frame, root) for frame in thinned(video)]
            (low, high), pad = family.video_pixels, family.video_pad
        x, grid = patch_bytes(frames, low, high, family)
        human = human.replace(mark, family.media_text(pad, family.in_tokens(grid)), 1)
        patches.append(x)
        grids.append(grid)
    ids = tokenizer(chat_prompt(human), add_special_tokens=False).input_ids
    n_prompt = len(ids)
    if answer is not None:  # tokenised apart from the prompt, as it will be generated
        ids = ids + tokenizer(answer + "<|im_end|>", add_special_tokens=False).input_ids
    ids, grids = np.array(ids), np.array(grids, dtype=np.int64).reshape(-1, 3)
    names = [GEN, DISC, family.image_pad, family.video_pad]
    gen_id, disc_id, *media_ids = tokenizer.convert_tokens_to_ids(names)

    def last(token, start, end):
        return max((start + int(i) for i in np.flatnonzero(ids[start:end] == token)), default=-1)

    return Row(
        ids=ids,
        positions=mrope_positions(ids, grids, media_ids, family),
        n_prompt=n_prompt,
        disc_at=last(disc_id, 0, n_prompt),
        gen_at=last(gen_id, n_prompt, len(ids)),  # INSTRUCTION holds a <gen_emb> too: only the assistant's part counts
        patches=np.concatenate([np.zeros((0, family.patch_values), np.uint8), *patches]),
        grids=grids,
        name=name,
    )


def encode_input(tokenizer, item, answer=None, *, blank_image=True, root=None, name="", family=QWEN2_VL):
    """The form of RL and evaluation: media, then the stripped text, <disc_emb> and INSTRUCTION. -> Row

    item: {"text", "images", "video"}, keys optional. Without media the blank picture stands in, as the authors do.
    """
    text, images, video = check_input(item, name).values()
    text = without_marks(text, images, video).strip()
    if blank_image and not images and not video:
        images = [blank_picture()]
    marks = [IMAGE_MARK] * len(images) + [VIDEO_MARK] * bool(video)
    human = f"{''.join(marks)}{text}\n{DISC}\n{INSTRUCTION}"
    return encode(tokenizer, human, images, video, answer, marks=marks, root=root, name=name, family=family)


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


def rl_row(pair):
    row = {"dataset": pair["dataset_name"], "dataset_name": pair["dataset_name"], "solution": "<embedding>"}
    for side in ("qry", "pos"):
        text, images, video = pair[side].values()
        row |= {f"{side}_text": text, f"{side}_image": images[0] if len(images) == 1 else images or "",
                f"{side}_video": video or [""]}  # fmt: skip
    return row


def side_of(row, kind, side, name):
    """One side of a row -> (name, human text, images, video, answer) of either kind of file."""
    where = f"{name}, {side}"
    if kind == "rl":
        return where, *rl_side(row, side, where).values(), None
    check_keys(row, "an SFT row", name)
    if side not in row:
        raise BadInput(f'{name}: an SFT row needs "qry" and "pos", this one has {", ".join(row)}')
    return where, *sft_side(row[side], where)


@dataclass(frozen=True)
class RowCheck:
    """Raises BadInput for whatever is wrong with a row and shows without its pictures."""

    kind: str  # "sft" or "rl"
    needs: tuple = (DISC, GEN)  # what an SFT row must have: embedding tokens; "answer": an assistant's text to learn

    def __call__(self, row, name):
        for side in ("qry", "pos"):
            where, human, images, video, answer = side_of(row, self.kind, side, name)
            if self.kind == "rl":  # its texts have been checked, its marks do not count
                continue
            for text in (human, answer or ""):
                check_text(text, where)
            media_marks(human, images, video, where)  # also without media: they may have been lost
            if "answer" in self.needs and not answer:
                raise BadInput(f"{where}: no assistant text, from which the next-token loss learns; mend the row")
            for token, text, place in ((DISC, human, "user's"), (GEN, answer or "", "assistant's")):
                if token in self.needs and token not in text:
                    raise BadInput(f"{where}: no {token} in the {place} text, so it has no such embedding; mend it")


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
                 blank_image=True, needs=(DISC, GEN), answers=True, cache=None, family=QWEN2_VL):  # fmt: skip
        self.rows = files if isinstance(files, Rows) else Rows(files, RowCheck(kind, needs), cache)
        if not len(self.rows):
            raise BadInput(f"{', '.join(map(str, self.rows.files))}: no rows")
        self.tokenizer, self.family = tokenizer, family
        self.kind, self.needs, self.answers = kind, needs, answers
        self.root, self.max_length, self.blank_image = root, max_length, blank_image
        self.rank, self.world = rank, world
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
            answer = answer if self.answers else None
            encoded = encode(self.tokenizer, human, images, video, answer, root=self.root, name=name,
                             family=self.family)  # fmt: skip
        else:
            item = {"text": human, "images": images, "video": video}
            encoded = encode_input(self.tokenizer, item, blank_image=self.blank_image, root=self.root, name=name,
                                   family=self.family)  # fmt: skip
        if len(encoded.ids) > self.max_length:
            raise Skip(f"{name}: {len(encoded.ids)} tokens, above --max_length {self.max_length}")
        return encoded, content_key(human, images, video)

    def stand_in(self, name):
        """A short text-only sequence in the place of a skipped side, so that shapes and collectives stay the same."""
        answer = f"<think></think><answer>{GEN}" if self.kind == "sft" and self.answers else None
        return encode(self.tokenizer, f"\n{DISC}\n", [], [], answer, name=name, family=self.family)


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
    if args.command == "toy":
        from support.toy import write_toy

        write_toy(args.out, args.seed)
    elif args.command == "annotate":
        from support.annotate import annotate

        annotate(args)
    elif args.command == "rl-subset":
        from support.annotate import rl_subset

        rl_subset(args)
    elif args.command == "check":
        from support.check import check

        sys.exit(0 if check(args) else 1)
    else:
        from support.check import export_checkpoint

        export_checkpoint(args.checkpoint, args.out)


if __name__ == "__main__":
    run_script(main)
