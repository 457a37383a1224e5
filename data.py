"""Data: conversations, pictures and videos to patches, the rows of SFT and RL files, batches.

What a row becomes (the paper's training format for both embeddings): one string in Qwen2-VL's chat format,

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
from support.run import BadInput, Stopped, check_bounds, forked_loader, run_script

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
ANY_MARK = f"(?:{IMAGE_MARK}|{VIDEO_MARK})"  # regular expression
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
        """(t, h, w) in patches -> in tokens of the language model."""
        t, h, w = map(int, grid)
        return t, h // self.merge, w // self.merge


def run_of_pads(pad, grid):
    """One pad token for every visual token, between the marks of vision."""
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
    """uint8 patches [n, patch_values] -> float32 of the same shape, on the device they are on.

    It comes late: until then a page of 2.4 M pixels is 14 MB, not 57.
    """
    table = byte_to_float(family.mean, family.std).to(patches.device)
    channels = patches.int().chunk(3, dim=1)
    values = [table[:, c][channel] for c, channel in enumerate(channels)]
    return torch.cat(values, dim=1)


@cache
def byte_to_float(mean, std):
    """The normalised value of every possible byte, [256, 3], in the order of transformers' float32 arithmetic."""
    values = np.arange(256)[:, None]
    scaled = (values * (1 / 255)).astype(np.float32)
    return torch.from_numpy((scaled - np.float32(mean)) / np.float32(std))


def patch_bytes(frames, min_pixels, max_pixels, family=QWEN2_VL):
    """The patches before they are normalised: numpy uint8 [n, patch_values], grid [3]. Otherwise as patchify."""
    frames = [open_picture(frame) for frame in frames]
    width, height = frames[0].size
    H, W = smart_resize(height, width, family.token_side, min_pixels, max_pixels)
    pixels = []
    for frame in frames:
        resized = frame.resize((W, H), Image.Resampling.BICUBIC)
        pixels.append(np.asarray(resized))
    lacking = -len(pixels) % family.depth
    pixels += pixels[-1:] * lacking
    return cut_into_patches(np.stack(pixels), family)


def cut_into_patches(pixels, family):
    """uint8 [frames, H, W, 3], multiples of depth and token_side -> [n, patch_values], grid [3].

    The patches of one token follow each other. Inside a patch the order is channel, frame, y, x.
    """
    patch = family.patch
    merge = family.merge
    num_frames, H, W, _ = pixels.shape
    t = num_frames // family.depth
    h = H // patch
    w = W // patch
    x = pixels.reshape(t, family.depth, h // merge, merge, patch, w // merge, merge, patch, 3)
    x = x.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
    patches = np.ascontiguousarray(x).reshape(t * h * w, family.patch_values)
    return patches, np.array([t, h, w])


def to_rgb(picture):
    """8-bit RGB with transparent places white, as in transformers; convert() alone shows what colour lies beneath.

    Raises ValueError for pixels of 32 bits, whose range is unknown.
    """
    straight_alpha = {"La": "LA", "RGBa": "RGBA"}.get(picture.mode)
    if straight_alpha:  # from premultiplied alpha convert() knows this one way only
        picture = picture.convert(straight_alpha)
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PPM"):  # Pillow's PPM: 0..65535
        picture = grey_of_8_bits(picture)
    if picture.mode in ("I", "F"):
        raise ValueError(f"its 32-bit pixels (mode {picture.mode}) have no known range; save it with 8 or 16 bits")
    if "A" in picture.getbands() or picture.info.get("transparency") is not None:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def grey_of_8_bits(picture):
    """Grey of 16 bits, scaled by its range; convert() cuts it off at 255, so that nearly all of it is white."""
    tags = getattr(picture, "tag_v2", {})  # of a TIFF: 258 is the bits per sample, 262 is 0 where 0 is white
    bits = tags.get(258, (16,))[0]
    top = 2**bits - 1
    grey = np.asarray(picture).clip(0, top) * (255 / top)
    grey = np.rint(grey).astype(np.uint8)
    if tags.get(262) == 0:
        grey = 255 - grey
    return Image.fromarray(grey)


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
            path = media_path(source, root)
            if is_blank(path):
                return blank_picture()
            look_up(source, root)
            picture = Image.open(path)
        check_size(picture, path)
        picture.load()  # Image.open reads the header only: a truncated file shows here
        return to_rgb(picture)
    except (Skip, MemoryError, KeyboardInterrupt, SystemExit, Stopped):
        raise
    except BaseException as error:  # noqa: BLE001 (a decoder's panic is no Exception)
        raise Skip(f"{path}: cannot be read as a picture ({str(error) or type(error).__name__})") from error


def media_path(source, root=None):
    return Path(root, source) if root else Path(source)


def check_size(picture, path):
    """Raises Skip for a picture that is too large to decode, or that smart_resize refuses."""
    width, height = picture.size
    size = f"{width} x {height} pixels"
    if width * height > MAX_DECODED:
        raise Skip(f"{path}: {size} is above the bound of {MAX_DECODED:,}")
    if min(width, height) == 0 or max(width, height) > 200 * min(width, height):
        raise Skip(f"{path}: {size}: empty, or one side is more than 200 times the other")


def look_up(source, root=None):
    """Raises Skip where a path is no file below root.

    A link that lies there may point anywhere. A pipe is no file: opening it would wait for ever.
    """
    path = media_path(source, root)
    top = os.path.abspath(root or path)
    if not Path(os.path.abspath(path)).is_relative_to(top):
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
    chosen = np.linspace(0, len(frames) - 1, min(len(frames), n)).astype(int)
    return [frames[i] for i in chosen]


def blank_picture():
    """The white picture (one token) that stands on sides without media."""
    return Image.new("RGB", BLANK_SIZE, "white")


# ---------------------------------------------------------------------------------------------------------------
# One side of a pair as arrays: the conversation in tokens, their positions, the patches


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
        digest = hashlib.blake2b(digest_size=16)
        for array in (self.ids, self.grids, self.patches):
            digest.update(array.tobytes())
        return digest.hexdigest()

    @property
    def next_position(self):
        """Rotary position (all three axes) of the token after the last one."""
        return int(self.positions.max()) + 1


def mrope_positions(ids, grids, media_ids, family=QWEN2_VL):
    """The rotary positions: text counts up on all three axes, a picture spans (t, h, w) from where it starts.

    ids [L], grids [m, 3] in patches, media_ids: the pad tokens of pictures and videos. Returns [3, L].
    After a picture the count goes on at its largest index + 1, so position = index + delta for text after media.
    """
    blocks = []
    index = 0  # of the block's first token
    position = 0  # of the block's first token
    grids = iter(grids)
    is_media = np.isin(ids, media_ids)
    while index < len(ids):
        if is_media[index]:
            block, span = family.media_positions(family.in_tokens(next(grids)))
        else:
            rest = is_media[index:]
            span = int(np.argmax(rest)) if rest.any() else len(rest)
            block = np.broadcast_to(np.arange(span), (3, span))
        blocks.append(block + position)
        position += span
        index += block.shape[1]
    return np.concatenate(blocks, axis=1)


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
    marks = re.findall(ANY_MARK, human)
    image_marks = marks.count(IMAGE_MARK)
    video_marks = marks.count(VIDEO_MARK)
    if image_marks != len(images) or video_marks != bool(video):
        raise BadInput(
            f"{name}: the text has {image_marks} {IMAGE_MARK} and {video_marks} {VIDEO_MARK} "
            f"marks for {len(images)} pictures and {int(bool(video))} videos; make them equal"
        )
    return marks


def without_marks(text, images, video):
    """A text without the marks of its media, which RL rows may carry; the media come first in any case.

    A mark stands at the start of the text or alone on a line, and there are no more of them than media. Anything else
    is the user's text: the <video> of a question about HTML stays.
    """
    left = {IMAGE_MARK: len(images), VIDEO_MARK: int(bool(video))}

    def drop_mark(found):
        mark = found[0]
        left[mark] -= 1
        return "" if left[mark] >= 0 else mark

    def drop_marks(found):
        return re.sub(ANY_MARK, drop_mark, found[0])

    at_start = rf"\A\s*(?:{ANY_MARK}\s*)+"
    on_a_line = rf"^[ \t]*(?:{ANY_MARK}[ \t]*)+$"
    return re.sub(f"{at_start}|{on_a_line}", drop_marks, text, flags=re.MULTILINE)


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
    human, patches, grids = read_media(human, marks, images, video, root, family)
    ids, n_prompt = token_ids(tokenizer, human, answer)
    names = [GEN, DISC, family.image_pad, family.video_pad]
    gen_id, disc_id, *media_ids = tokenizer.convert_tokens_to_ids(names)
    return Row(
        ids=ids,
        positions=mrope_positions(ids, grids, media_ids, family),
        n_prompt=n_prompt,
        disc_at=last_index(ids, disc_id, 0, n_prompt),
        gen_at=last_index(ids, gen_id, n_prompt, len(ids)),  # not the <gen_emb> of INSTRUCTION
        patches=patches,
        grids=grids,
        name=name,
    )


def read_media(human, marks, images, video, root, family):
    """-> the text with visual tokens in the places of its marks, patches uint8 [n, patch_values], grids [m, 3]."""
    patches = [np.zeros((0, family.patch_values), np.uint8)]
    grids = []
    images = iter(images)
    for mark in marks:
        if mark == IMAGE_MARK:
            frames = [open_picture(next(images), root)]
            low, high = family.image_pixels
            pad = family.image_pad
        else:
            frames = [open_picture(frame, root) for frame in thinned(video)]
            low, high = family.video_pixels
            pad = family.video_pad
        of_one, grid = patch_bytes(frames, low, high, family)
        patches.append(of_one)
        grids.append(grid)
        visual_tokens = family.media_text(pad, family.in_tokens(grid))
        human = human.replace(mark, visual_tokens, 1)
    return human, np.concatenate(patches), np.array(grids, dtype=np.int64).reshape(-1, 3)


def token_ids(tokenizer, human, answer):
    """-> ids [L] of the conversation and the length of its prompt."""
    prompt = tokenizer(chat_prompt(human), add_special_tokens=False).input_ids
    if answer is None:
        return np.array(prompt), len(prompt)
    # tokenised apart from the prompt, as it will be generated
    answer = tokenizer(answer + "<|im_end|>", add_special_tokens=False).input_ids
    return np.array(prompt + answer), len(prompt)


def last_index(ids, token, start, end):
    """Index of the last such token in ids[start:end], -1 if there is none."""
    found = np.flatnonzero(ids[start:end] == token)
    return start + int(found[-1]) if len(found) else -1


def encode_input(tokenizer, item, answer=None, *, blank_image=True, root=None, name="", family=QWEN2_VL):
    """The form of RL and evaluation: media, then the stripped text, <disc_emb> and INSTRUCTION. -> Row

    item: {"text", "images", "video"}, keys optional. Without media the blank picture stands in, as the authors do.
    Raises as encode does.
    """
    item = check_input(item, name)
    images = item["images"]
    video = item["video"]
    text = without_marks(item["text"], images, video).strip()
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
MEDIUM = (str, Path, Image.Image)  # a path or a picture
VIDEO_FILES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".gif")
FORMS = (
    '{"text": str, "images": [path or PIL picture], "video": [path or PIL picture of each frame]}, any of these keys, '
    "or a str (a text), or a Path or PIL picture (a picture)"
)


def check_keys(given, kind, name, keys=None):
    """Raises BadInput where `given` is no dict or has a key that its kind may not have.

    keys: the keys allowed, where KEYS has no entry for the kind.
    """
    keys = keys or KEYS[kind]
    if not isinstance(given, dict):
        raise BadInput(f"{name}: expected {kind} with {', '.join(keys)}, found {type(given).__name__}")
    unknown = [repr(key) for key in given if key not in keys]
    if unknown:
        raise BadInput(f"{name}: unknown key {', '.join(unknown)}; {kind} may have {', '.join(keys)}")


def as_list(media, name="", kind="image"):
    """Media of a row -> list of paths or pictures. Raises BadInput where they are anything else.

    The published files write "no media" as absent, "", [""] or []; one picture as a string.
    """
    if media is None or isinstance(media, MEDIUM):
        media = [media] if media else []
    if not isinstance(media, (list, tuple)):
        raise BadInput(f"{name}: {kind} must be a path or a list of paths, not {type(media).__name__}")
    for medium in media:
        check_medium(medium, name, kind)
    return [medium for medium in media if medium]


def check_medium(medium, name, kind):
    if not isinstance(medium, MEDIUM):
        raise BadInput(f"{name}: {kind} must be a flat list of paths, it holds {type(medium).__name__}")
    path = str(medium)
    if path.startswith(("http://", "https://")):
        raise BadInput(f"{name}: {path} is a web address; download it and give the file's path")
    if kind == "video" and path.lower().endswith(VIDEO_FILES):
        raise BadInput(
            f"{name}: {path} is a video file; a video is the list of its frames, which this makes: "
            f"ffmpeg -i {path} -vf fps=2 FOLDER/%04d.jpg"
        )


def check_input(item, name):
    """An input of RL, evaluation or embed -> {"text", "images", "video"}, all there. Raises BadInput."""
    if isinstance(item, str):
        check_is_text(item, name)
        item = {"text": item}
    elif isinstance(item, (Path, Image.Image)):
        item = {"images": [item]}
    elif not isinstance(item, dict):
        raise BadInput(f"{name}: an input is {FORMS}; not {type(item).__name__}")
    check_keys(item, "an input", name)
    text = item.get("text")
    if text is None:
        text = ""
    check_text(text, name)
    return {
        "text": text,
        "images": as_list(item.get("images"), name, "images"),
        "video": as_list(item.get("video"), name, "video"),
    }


def check_is_text(given, name):
    """Raises BadInput where a bare string could be meant as a file."""
    is_address = re.fullmatch(r"https?://\S+", given)
    if is_address or (len(given) < 256 and os.path.isfile(given)):
        raise BadInput(
            f'{name}: {given!r} could be a text or a file: {{"text": ...}} says text, Path(...) a '
            "picture (one on the web has to be downloaded)"
        )


# ---------------------------------------------------------------------------------------------------------------
# The rows of SFT and RL files


def sft_side(side, name):
    """One side of an SFT row, in either key style -> (human text, images, video, answer). Raises BadInput."""
    check_keys(side, "a side of an SFT row", name)
    turns = side.get("conversations")
    if not isinstance(turns, list) or len(turns) != 2:
        found = f"{len(turns)} turns" if isinstance(turns, list) else type(turns).__name__
        raise BadInput(f'{name}: needs "conversations" with one human and one assistant turn, found {found}')
    human = turn_text(turns[0], ("human", "user"), name)
    answer = turn_text(turns[1], ("gpt", "assistant"), name)
    if not isinstance(human, str) or not isinstance(answer, str | None):
        raise BadInput(f'{name}: needs "conversations" whose texts are strings')
    images = as_list(side.get("image"), name)
    video = as_list(side.get("video"), name, "video")
    if images and video:
        raise BadInput(f"{name}: has both an image and a video; the format allows one of them")
    return human, images, video, answer


def turn_text(turn, roles, name):
    """What a turn of "conversations" says; roles: the names that its speaker may have."""
    check_keys(turn, "a turn", name)
    speaker = turn.get("from", turn.get("role", roles[0]))
    if speaker not in roles:
        raise BadInput(f'{name}: "conversations" has a turn of {speaker!r} where {" or ".join(roles)} must be')
    if "value" in turn:
        return turn["value"]
    if "content" in turn:
        return turn["content"]
    raise BadInput(f'{name}: a turn of "conversations" has neither "value" nor "content"')


def rl_side(row, side, name):
    """One side ("qry" or "pos") of an RL row -> input dict. Raises BadInput."""
    keys = (f"{side}_text", f"{side}_image", f"{side}_video")
    missing = [key for key in keys if key not in row]
    if missing:
        raise BadInput(f"{name}: the row lacks {', '.join(missing)}")
    check_keys(row, "an RL row", name)
    text, images, video = (row[key] for key in keys)
    return check_input({"text": text, "images": images, "video": video}, name)


def sft_row(pair, answers):
    """The SFT row of a pair; answers: (reasoning, summary) of each side."""
    row = {"dataset_name": pair["dataset_name"]}
    for side, (reasoning, summary) in answers.items():
        item = pair[side]
        if item["video"]:
            media = {"video": item["video"]}
            marks = VIDEO_MARK
        else:
            images = item["images"] or ["images/blank.jpg"]
            media = {"image": images}
            marks = IMAGE_MARK * len(images)
        human = f"{marks}{item['text']}\n{DISC}\n{INSTRUCTION}"
        answer = f"<think>{reasoning}</think><answer>{summary}{GEN}"
        turns = [
            {"from": "human", "value": human},
            {"from": "gpt", "value": answer},
        ]
        row[side] = media | {"conversations": turns}
    return row


def rl_row(pair):
    """The RL row of a pair: one picture is a string, none is "", no video is [""], as in the published file."""
    name = pair["dataset_name"]
    row = {"dataset": name, "dataset_name": name, "solution": "<embedding>"}
    for side in ("qry", "pos"):
        item = pair[side]
        images = item["images"]
        row[f"{side}_text"] = item["text"]
        row[f"{side}_image"] = images[0] if len(images) == 1 else images or ""
        row[f"{side}_video"] = item["video"] or [""]
    return row


def side_of(row, kind, side, name):
    """One side of a row of either kind of file -> (name, human text, images, video, answer). Raises BadInput."""
    where = f"{name}, {side}"
    if kind == "rl":
        item = rl_side(row, side, where)
        return where, item["text"], item["images"], item["video"], None
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
            if self.kind == "sft":  # the texts of an RL row have been checked, its marks do not count
                for text in (human, answer or ""):
                    check_text(text, where)
                media_marks(human, images, video, where)  # also without media: they may have been lost
                self.check_needs(human, answer or "", where)

    def check_needs(self, human, answer, where):
        if "answer" in self.needs and not answer:
            raise BadInput(f"{where}: no assistant text, from which the next-token loss learns; mend the row")
        for token, text, speaker in ((DISC, human, "user's"), (GEN, answer, "assistant's")):
            if token in self.needs and token not in text:
                raise BadInput(f"{where}: no {token} in the {speaker} text, so it has no such embedding; mend it")


def content_key(text, images, video):
    """Identity of a side, an int64: equal stripped text and equal media paths."""
    text = (text or "").strip()
    content = [text, list(map(str, images)), list(map(str, video))]
    digest = hashlib.blake2b(json.dumps(content).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


# ---------------------------------------------------------------------------------------------------------------
# Pairs, the order of their batches, the loader


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
    prompts of an SFT file only (DUME). cache: a folder that keeps the files' indexes. rank, world: this process and
    the number of them.
    """

    def __init__(self, files, tokenizer, *, kind, batch_size, seed, root=None, max_length=12_288, rank=0, world=1,
                 blank_image=True, needs=(DISC, GEN), answers=True, cache=None, family=QWEN2_VL):  # fmt: skip
        self.rows = files if isinstance(files, Rows) else Rows(files, RowCheck(kind, needs), cache)
        if not len(self.rows):
            raise BadInput(f"{', '.join(map(str, self.rows.files))}: no rows")
        self.tokenizer = tokenizer
        self.family = family
        self.kind = kind
        self.needs = needs
        self.answers = answers
        self.root = root
        self.max_length = max_length
        self.blank_image = blank_image
        self.rank = rank
        self.world = world
        if batch_size % world:
            raise BadInput(f"--batch_size {batch_size} must be a multiple of the {world} processes")
        self.order = BatchOrder(self.rows.dataset, batch_size, seed, self.rows.names)
        if rank == 0 and self.order.left_out:
            print(f"left out, smaller than a batch of {batch_size}: {self.order.left_out}")

    def __getitem__(self, i):
        name, row = self.rows[i]
        try:
            query, _ = self.side(row, "qry", name)
            target, target_key = self.side(row, "pos", name)
        except Skip as error:
            return Pair(self.stand_in(name), self.stand_in(name), 0, False, str(error), name)
        return Pair(query, target, target_key, True, "", name)

    def side(self, row, side, name):
        """-> Row and the identity of its content. Raises Skip."""
        name, human, images, video, answer = side_of(row, self.kind, side, name)
        common = {"root": self.root, "name": name, "family": self.family}
        if self.kind == "sft":
            answer = answer if self.answers else None
            encoded = encode(self.tokenizer, human, images, video, answer, **common)
        else:
            item = {"text": human, "images": images, "video": video}
            encoded = encode_input(self.tokenizer, item, blank_image=self.blank_image, **common)
        if len(encoded.ids) > self.max_length:
            raise Skip(f"{name}: {len(encoded.ids)} tokens, above --max_length {self.max_length}")
        return encoded, content_key(human, images, video)

    def stand_in(self, name):
        """A short text-only sequence in the place of a skipped side, so that shapes and collectives stay the same."""
        has_answer = self.kind == "sft" and self.answers
        answer = f"<think></think><answer>{GEN}" if has_answer else None
        return encode(self.tokenizer, f"\n{DISC}\n", [], [], answer, name=name, family=self.family)


class BatchOrder:
    """order[step] -> row numbers of the global batch of that step: one dataset each, shuffled, a function of the seed.

    Every dataset is an endless sequence of permutations of its rows, one per epoch, cut into batches. A tail shorter
    than a batch goes into the first batch of the next epoch, whose permutation puts these rows last, so that no batch
    holds a row twice. A dataset smaller than a batch is left out. An epoch's batches over all datasets are shuffled
    together.
    """

    def __init__(self, dataset, batch_size, seed, names=None):
        """dataset: name of every row, or its index into names. Raises BadInput where no dataset fills a batch."""
        self.batch_size = batch_size
        self.seed = seed
        self.members = []  # row numbers of each dataset that fills a batch
        left_out = []
        found, dataset = np.unique(dataset, return_inverse=True)
        for d, name in enumerate(found.tolist()):
            if names is not None:
                name = names[name]
            rows = np.flatnonzero(dataset == d)
            if len(rows) < batch_size:
                left_out.append(f"{name or 'unnamed'} {len(rows)}")
            else:
                self.members.append(rows)
        self.left_out = ", ".join(left_out)  # names and sizes
        if not self.members:
            raise BadInput(f"no dataset fills a batch of {batch_size} (rows: {self.left_out}); lower --batch_size")
        self.permutation = cache(self.permutation)  # each one asks for the one before
        self.starts = [0]  # first step of every epoch
        self.epochs = []  # batches of every epoch, built when first asked for

    def __getitem__(self, step):
        while step >= self.starts[-1]:
            batches = self.build(len(self.epochs))
            self.epochs.append(batches)
            self.starts.append(self.starts[-1] + len(batches))
        epoch = int(np.searchsorted(self.starts, step, side="right")) - 1
        return self.epochs[epoch][step - self.starts[epoch]]

    def build(self, epoch):
        """The batches that end in this epoch, in the order of its steps."""
        batches = []
        for d, rows in enumerate(self.members):
            first = epoch * len(rows) // self.batch_size
            end = (epoch + 1) * len(rows) // self.batch_size
            batches += [self.batch(d, k) for k in range(first, end)]
        shuffled = np.random.default_rng([self.seed, 1 << 20, epoch]).permutation(len(batches))
        return [batches[i] for i in shuffled]

    def batch(self, d, k):
        """Row numbers of batch k of dataset d's endless sequence."""
        rows = self.members[d]
        chosen = []
        for index in range(k * self.batch_size, (k + 1) * self.batch_size):
            epoch, at = divmod(index, len(rows))
            chosen.append(self.permutation(d, epoch)[at])
        return rows[chosen]

    def permutation(self, d, epoch):
        """The order of dataset d's rows in an epoch."""
        n = len(self.members[d])
        order = np.random.default_rng([self.seed, d, epoch]).permutation(n)
        carried = (epoch * n) % self.batch_size  # rows of the last epoch still waiting for their batch
        if carried:
            waiting = self.permutation(d, epoch - 1)[n - carried :]
            late = np.isin(order, waiting)
            order = np.concatenate([order[~late], order[late]])
        return order


def step_loader(data, steps, workers):
    """Yields this process's pairs of each of the given steps, prepared ahead by background workers (0: in here).

    The rows of a step are a pure function of (seed, step); each process takes its share of them, so the global batch
    does not depend on their number. A worker's item is one pair: a step of 1,024 pairs is gigabytes of patches.
    """
    share = data.order.batch_size // data.world
    one_step_ahead = max(2, -(-share // workers)) if workers else None
    loader = forked_loader(
        data,
        workers,
        batch_size=None,
        sampler=local_rows(data, steps),
        prefetch_factor=one_step_ahead,
    )
    pairs = iter(loader)
    for _ in steps:
        yield [next(pairs) for _ in range(share)]


def local_rows(data, steps):
    """Row numbers of this process's pairs, step after step."""
    for step in steps:
        for i in data.order[step][data.rank :: data.world]:
            yield int(i)


# ---------------------------------------------------------------------------------------------------------------
# Command line


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    add_annotate(commands)
    add_rl_subset(commands)
    add_check(commands)
    add_toy(commands)
    add_export(commands)
    args = parser.parse_args()
    check_bounds(vars(args), temperature=(0, True, 100))
    refuse_to_overwrite(args)
    args.run(args)


def refuse_to_overwrite(args):
    inputs = [*getattr(args, "pairs", []), *getattr(args, "sft", [])]
    for file in inputs:
        if Path(file).resolve() == Path(args.out).resolve():
            raise SystemExit(f"--out {args.out} is one of the files of --pairs or --sft; give another name")


def add_command(commands, name, run, help):
    """A parser for the flags of one command; run: called with the arguments."""
    p = commands.add_parser(name, help=help, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.set_defaults(run=run)
    return p


# The commands' code is imported when it runs: it imports this file.


def add_annotate(commands):
    def run(args):
        from support.annotate import annotate

        annotate(args)

    p = add_command(commands, "annotate", run, "bare pairs and a teacher -> SFT rows")
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


def add_rl_subset(commands):
    def run(args):
        from support.annotate import rl_subset

        rl_subset(args)

    p = add_command(commands, "rl-subset", run, "a balanced RL file out of pairs that SFT does not see")
    p.add_argument("--pairs", nargs="+", required=True, help="files of pairs, as for annotate")
    p.add_argument("--sft", nargs="*", default=[], help="SFT files whose pairs are left out")
    p.add_argument("--out", required=True, help="RL file")
    p.add_argument("--size", type=int, default=11_000, help="pairs (the paper has about 11,000)")
    p.add_argument(
        "--visdoc",
        default=r"colpali|visrag|vidore|visdoc|\bdoc\b",
        help="datasets of visual documents; nothing in a row tells them from pictures",
    )
    p.add_argument("--seed", type=int, default=0, help="of the draw")


def add_check(commands):
    def run(args):
        from support.check import check

        sys.exit(0 if check(args) else 1)

    p = add_command(commands, "check", run, "an SFT or RL file before a run; exit code 1 where a row cannot be used")
    p.add_argument("file")
    p.add_argument("--media_root", default=".", help="folder that the media paths start from")
    p.add_argument("--model", help="whose tokenizer counts the tokens; without one media are looked up, not opened")
    p.add_argument("--max_length", type=int, default=12_288, help="longer rows are skipped in training")
    p.add_argument("--batch_size", type=int, default=1, help="a dataset with fewer rows is left out in training")
    p.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")


def add_toy(commands):
    def run(args):
        from support.toy import write_toy

        write_toy(args.out, args.seed)

    p = add_command(commands, "toy", run, "write the toy world")
    p.add_argument("--out", default="runs/toy/data", help="folder")
    p.add_argument("--seed", type=int, default=0, help="of the scenes and their pictures")


def add_export(commands):
    def run(args):
        from support.check import export_checkpoint

        export_checkpoint(args.checkpoint, args.out)

    help = "a checkpoint of sft.py or rl.py -> a model folder, for eval.py and others"
    p = add_command(commands, "export", run, help)
    p.add_argument("checkpoint", help="OUT/checkpoints/step-N")
    p.add_argument("--out", required=True, help="model folder")


if __name__ == "__main__":
    run_script(main)
