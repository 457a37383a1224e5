"""Data: conversations, pictures and videos to patches, the rows of SFT and RL files, batches.

What a row becomes (the paper's formulation of an embedding that reasons): one string in Qwen2-VL's chat format, which
Qwen2.5-VL and Qwen3-VL read too,

    <|im_start|>system .. user [media] TEXT\\n<disc_emb>\\nINSTRUCTION <|im_end|> assistant <think>..<gen_emb><|im_end|>

its token ids, their three-axis rotary positions and the picture patches. Rows are made on the CPU, in loader workers,
as numpy arrays (torch tensors would cost a file descriptor each on their way out of a worker); only normalise() and the
functions of a Family run later, on the model's device.

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
import math
import os
import re
import sys
import unicodedata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from support.distributed import forked_loader, gather_objects, one_ahead, processes
from support.files import Rows
from support.program import BadInput, Progress, Stopped, run_script
from support.settings import check_batch_size, check_bounds

# ---------------------------------------------------------------------------------------------------------------
# Protocol constants (must match the released models and data)

SYSTEM = "You are a helpful assistant."
INSTRUCTION = (
    "Represent the above input text, images, videos, or any combination of the three as embeddings. "
    "First output the thinking process in <think> </think> tags and then summarize the entire input in a word or "
    "sentence. Finally, use the <gen_emb> tag to represent the entire input."
)
GEN = "<gen_emb>"
DISC = "<disc_emb>"  # added to the tokenizer after GEN
IMAGE_MARK = "<image>"  # where media stand in the human text of SFT files
VIDEO_MARK = "<video>"
NUM_FRAMES = 8  # of a video
FRAME_RATE = 2  # frames a second, whatever they were: lists of frames do not tell; qwen-vl-utils assumes 2, too
BLANK_SIZE = (28, 28)  # of the white picture that stands for "no picture": images/blank.jpg in the published files
CONTROL_TOKENS = ("<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>")
MAX_DECODED = 200_000_000  # pixels; a larger picture is refused before it is decoded (decompression bombs)


class Skip(ValueError):
    """A row that cannot be used as it is (unreadable picture, too long): masked out of its batch and counted."""


# ---------------------------------------------------------------------------------------------------------------
# Families of backbones. What stands outside of the records: the protocol's chat form (Qwen2-VL's, with its system turn)
# and the control tokens, which Qwen's families share; what Embedder exchanges in a loaded model (model.py, 1.); the
# decode step, written for the layers of Qwen2 and Qwen3 (support/decode.py).


@dataclass(frozen=True)
class Family:
    """One family of backbones. To add one, write its entry of FAMILIES below, with its functions beside it.

    A patch is `patch` x `patch` pixels of `depth` frames; `merge` x `merge` patches become one token of the language
    model. grid: (t, h, w) of a picture or video, in patches. A video has a step of time for each `depth` frames. K: the
    first layers of the language model that get vision states of their own (DeepStack); 0 in most families.
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
    time_step: int  # rotary positions from one step of a video to the next
    timestamps: bool  # each step of a video stands alone in the text, after its time; else all are one run of pads
    vision_layout: Callable  # (vision tower, grids, device) -> those of its arguments that depend on the grids only
    vision_states: Callable  # (tower, pixels, layout, merged) -> [n, (1 + K) D_vit]; merged: [n / merge^2, (1 + K) D]
    mergers: Callable  # (tower) -> its 1 + K mergers, which the paper trains in SFT

    @property
    def token_side(self):
        """Pixels of a visual token's side: pictures are resized to multiples of it."""
        return self.patch * self.merge

    @property
    def patch_values(self):
        """Numbers in a patch: 3 channels x depth frames x patch x patch pixels."""
        return 3 * self.depth * self.patch**2

    def in_tokens(self, grid):
        """A grid in patches -> in tokens of the language model."""
        t, h, w = (int(n) for n in grid)
        return t, h // self.merge, w // self.merge


def plain_layout(tower, grids, device, **more):
    """What transformers' vision towers work out of the grids, as the keywords that they take it by. Here it is done on
    the CPU: they would do it on the GPU, where every layer waits to read the lengths. more: for the device too."""
    more = {"position_ids": get_vision_position_ids(grids, tower.spatial_merge_size), **more}  # [n, 2]
    return {
        "grid_thw": grids,  # [m, 3]
        "cu_seqlens": get_vision_cu_seqlens(grids),  # where each frame's patches begin; stays, attention reads it here
        **dict(zip(more, to_device(device, *more.values()))),
    }


def to_device(device, *tensors):
    """The tensors on the device, by one transfer of their bytes: for each one the host waits until the GPU is done.
    Those of the widest numbers come first: a number must begin at a multiple of its size."""
    flat = torch.cat([x.flatten().view(torch.uint8) for x in tensors]).to(device)
    parts = flat.split([x.nbytes for x in tensors])
    return [part.view(x.dtype).view(x.shape) for x, part in zip(tensors, parts)]


def window_layout(tower, grids, device):
    """Qwen2.5-VL: most layers look at windows of 8 x 8 patches, and the tower sorts the tokens by window."""
    index, cu_window_seqlens = get_vision_window_index(
        grids, tower.spatial_merge_size, tower.window_size, tower.patch_size
    )
    layout = plain_layout(tower, grids, device, window_index=index)
    return layout | {"cu_window_seqlens": cu_window_seqlens}


def interpolated_layout(tower, grids, device):
    """Qwen3-VL: besides rotary ones there are learned positions, a table that is stretched over each picture."""
    index, weights = get_vision_interpolation_indices_and_weights(
        grids, tower.num_grid_per_side, tower.interpolation_mode, tower.interpolation_align_corners,
        tower.spatial_merge_size,
    )  # fmt: skip
    return plain_layout(tower, grids, device, interp_indices=index, interp_weights=weights)


def last_states(tower, pixels, layout, merged):
    """Qwen2-VL: the last layer's states, after the merger or before it."""
    out = tower(pixels, **layout)
    return out.pooler_output if merged else out.last_hidden_state


def plain_mergers(tower):
    return [tower.merger]


def window_states(tower, pixels, layout, merged):
    """Qwen2.5-VL: the same; before the merger they come sorted by window, and are put back into the order of the
    patches."""
    states = last_states(tower, pixels, layout, merged)
    if merged:
        return states
    of_token = states.unflatten(0, (-1, tower.spatial_merge_unit))  # [n / merge^2, merge^2, D_vit]
    return of_token[layout["window_index"].argsort()].flatten(0, 1)


def deepstack_states(tower, pixels, layout, merged):
    """Qwen3-VL: beside the last layer's states those of K earlier ones, which have mergers of their own and go to the
    first K layers of the language model. The tower does not give them before their mergers: they are caught there."""
    if merged:
        out = tower(pixels, **layout)
        return torch.cat([out.pooler_output, *out.deepstack_features], dim=-1)
    inputs = {}  # of each merger
    hooks = []
    for merger in deepstack_mergers(tower):
        hooks.append(merger.register_forward_pre_hook(lambda module, args: inputs.update({module: args[0]})))
    try:
        tower(pixels, **layout)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat([inputs[merger] for merger in deepstack_mergers(tower)], dim=-1)


def deepstack_mergers(tower):
    return [tower.merger, *tower.deepstack_merger_list]


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
    time_step=1,
    timestamps=False,
    vision_layout=plain_layout,
    vision_states=last_states,
    mergers=plain_mergers,
)
QWEN2_5_VL = replace(
    QWEN2_VL,
    model_class="Qwen2_5_VLForConditionalGeneration",
    time_step=2,  # the released models'; family_of() takes it from config.json
    vision_layout=window_layout,
    vision_states=window_states,
)
QWEN3_VL = replace(
    QWEN2_VL,
    model_class="Qwen3VLForConditionalGeneration",
    patch=16,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    image_pixels=(1_024, 3_081_528),  # as many tokens as Qwen2-VL's: 1 to 3,009
    video_pixels=(4_096, 32_768),  # 4 to 32
    timestamps=True,
    vision_layout=interpolated_layout,
    vision_states=deepstack_states,
    mergers=deepstack_mergers,
)
FAMILIES = {"qwen2_vl": QWEN2_VL, "qwen2_5_vl": QWEN2_5_VL, "qwen3_vl": QWEN3_VL}  # by the model_type of config.json


def family_of(config):
    """The record of a model, by its config.json, where one number of Qwen2.5-VL's stands: how fast time counts."""
    family = FAMILIES[config.model_type]
    positions_a_second = getattr(config.vision_config, "tokens_per_second", None)
    if positions_a_second is None:
        return family
    return replace(family, time_step=int(positions_a_second * family.depth / FRAME_RATE))


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
    """uint8 [n, patch_values] -> float32, on the device they are on: until then a page of 2.4 M pixels is 14 MB, not
    57."""
    table = byte_to_float(family.mean, family.std, patches.device)
    channels = []
    for c, values in enumerate(patches.int().chunk(3, dim=1)):
        channels.append(table[:, c][values])
    return torch.cat(channels, dim=1)


@cache
def byte_to_float(mean, std, device):
    """The normalised value of every possible byte, [256, 3], in the order of transformers' float32 arithmetic."""
    scaled = (np.arange(256)[:, None] * (1 / 255)).astype(np.float32)
    return torch.from_numpy((scaled - np.float32(mean)) / np.float32(std)).to(device)


def patch_bytes(frames, min_pixels, max_pixels, family=QWEN2_VL):
    """The patches before they are normalised: numpy uint8 [n, patch_values], grid [3]."""
    frames = [open_picture(frame) for frame in frames]
    width, height = frames[0].size
    H, W = smart_resize(height, width, family.token_side, min_pixels, max_pixels)
    pixels = [np.asarray(frame.resize((W, H), Image.Resampling.BICUBIC)) for frame in frames]
    lacking = -len(pixels) % family.depth
    pixels += pixels[-1:] * lacking

    patch, depth, merge = family.patch, family.depth, family.merge
    t = len(pixels) // depth
    h = H // patch
    w = W // patch
    x = np.stack(pixels)  # [t * depth, H, W, 3]
    x = x.reshape(t, depth, h // merge, merge, patch, w // merge, merge, patch, 3)
    x = x.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)  # the patches of a token follow each other; in one: channel, frame, y, x
    x = x.reshape(t * h * w, family.patch_values)
    return np.ascontiguousarray(x), np.array([t, h, w])


def open_picture(source, root=None, is_frame=False):
    """A path (relative to root) or a PIL picture -> PIL picture, decoded, in RGB. Raises Skip with file and reason.

    The border for media: whatever a decoder raises on a broken file, and decoders raise anything, is a Skip. Memory
    errors and interrupts pass. The EXIF orientation is ignored, and an image with several frames or pages shows its
    first one, as in the official loader. is_frame: the source is one frame of a video and must hold one image only.
    """
    name = getattr(source, "filename", "") or "a picture given as an object"
    try:
        picture = source
        if not isinstance(source, Image.Image):
            name = Path(root or "", source)
            path = find_picture(source, root)
            if path is None:
                return blank_picture()
            picture = Image.open(path)
        check_size(picture, name)
        if is_frame and picture.format not in PREVIEWS and getattr(picture, "n_frames", 1) > 1:
            raise Skip(f"{name}: holds {picture.n_frames} images where one frame of a video must be. Save each of them "
                       "as a file and list these files")  # fmt: skip
        rescale_transparency(picture)
        picture.load()  # Image.open reads the header only: a truncated file shows here
        return to_rgb(picture)
    except (Skip, MemoryError, KeyboardInterrupt, SystemExit, Stopped):
        raise
    except BaseException as error:  # noqa: BLE001 (a decoder's panic is no Exception)
        reason = str(error) or type(error).__name__
        raise Skip(f"{name}: cannot be read as a picture ({reason})") from error


PREVIEWS = ("MPO", "PSD")  # the further images of these formats are previews or layers of the first one


def find_picture(source, root=None):
    """The path of a picture's file; None for the authors' stand-in for "no picture", which need not be there.

    Raises Skip where the path is no file below root. A link that lies there may point anywhere; a pipe is no file:
    opening it would wait for ever.
    """
    path = Path(root or "", source)
    try:
        exists = path.exists()
    except OSError as error:  # a name that is too long
        raise Skip(f"{path}: cannot be read as a picture ({error.strerror})") from error
    if path.name == "blank.jpg" and not exists:
        return None
    if not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(root or path)):
        raise Skip(f"{source}: the path leaves --media_root {root}")
    if not exists:
        raise Skip(f"{path}: no such file{hint_of_absent(path, root)}")
    if not path.is_file():
        raise Skip(f"{path}: cannot be read as a picture (it is no file)")
    return path


def hint_of_absent(path, root):
    """What may be wrong with a path that does not exist, as the end of a sentence."""
    for form in ("NFC", "NFD"):
        if os.path.exists(unicodedata.normalize(form, str(path))):
            return (f"; one that looks the same exists, its name is in Unicode form {form} and this one is not. Write "
                    f"the path in form {form}, or rename the file")  # fmt: skip
    return " (is --media_root right?)" if root else ""


def hash_media(paths, root=None, group=None):
    """Return {path: hash of the bytes of the file, or of the blank image in its place}, "" if there is no such file.
    The ranks share the files, which all of them must see; group: the process group that they meet in."""
    rank, world = processes()
    paths = sorted(paths, key=str)
    local_paths = paths[rank::world]
    bar = Progress(total=len(local_paths), desc="read media", unit="file", disable=rank > 0 or len(paths) < 10_000)
    digests = {}
    with ThreadPoolExecutor(16) as threads, bar:
        for path, digest in zip(local_paths, threads.map(partial(digest_of_file, root=root), local_paths)):
            digests[path] = digest
            bar.update(1)
    for part in gather_objects(digests, group):
        digests |= part
    return digests


def digest_of_file(path, root=None):
    try:
        found = find_picture(path, root)
        if found is None:
            return hashlib.blake2b(blank_picture().tobytes(), digest_size=16).hexdigest()
        with open(found, "rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except (Skip, OSError):  # open_picture will say why
        return ""


def check_size(picture, name):
    """Raises Skip for a picture that is too large to be decoded, empty, or too narrow for the model's resize."""
    width, height = picture.size
    size = f"{width} x {height} pixels"
    if width * height > MAX_DECODED:
        raise Skip(f"{name}: {size} is above the bound of {MAX_DECODED:,}")
    if min(width, height) == 0 or max(width, height) > 200 * min(width, height):
        raise Skip(f"{name}: {size}: empty, or one side is more than 200 times the other")


def to_rgb(picture):
    """8-bit RGB with transparent places white, as in transformers; convert() alone shows what colour lies beneath."""
    premultiplied = {"La": "LA", "RGBa": "RGBA"}
    if picture.mode in premultiplied:  # convert() knows this one way only
        picture = picture.convert(premultiplied[picture.mode])
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PPM"):  # Pillow's PPM: 0..65535
        picture = grey_of_8_bits(picture)
    if picture.mode in ("I", "F"):
        raise ValueError(f"its 32-bit pixels (mode {picture.mode}) have no known range; save it with 8 or 16 bits")
    if "A" in picture.getbands() or picture.info.get("transparency") is not None:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def rescale_transparency(picture):
    """Pillow reads PNGs of 2, 4 and 16 bits as 8 bits, and leaves the transparent colour as the file has it."""
    rawmode = picture.tile[0].args if picture.format == "PNG" and picture.tile else ""
    factor = {"L;2": 85, "L;4": 17, "RGB;16B": 1 / 256}.get(rawmode)
    colour = picture.info.get("transparency")
    if factor and colour is not None:
        scaled = tuple(int(value * factor) for value in np.atleast_1d(colour))
        picture.info["transparency"] = scaled if len(scaled) > 1 else scaled[0]


def grey_of_8_bits(picture):
    """Grey of 16 bits, scaled by its range; convert() cuts it off at 255, so that nearly all of it is white. So is
    what a PNG declares as transparent."""
    tags = getattr(picture, "tag_v2", {})  # of a TIFF: 258 bits per sample, 262 is 0 where white is
    bits = tags.get(258, (16,))[0]
    top = 2**bits - 1
    values = np.asarray(picture)
    grey = np.rint(values.clip(0, top) * (255 / top)).astype(np.uint8)
    if tags.get(262) == 0:
        grey = 255 - grey
    grey[values == picture.info.get("transparency", -1)] = 255
    return Image.fromarray(grey)


def thinned(frames, n=NUM_FRAMES):
    """At most n of the frames, evenly spread, first and last included."""
    places = np.linspace(0, len(frames) - 1, min(len(frames), n)).astype(int)
    return [frames[i] for i in places]


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
        digest = hashlib.blake2b(digest_size=16)
        for array in (self.ids, self.grids, self.patches):
            digest.update(array.tobytes())
        return digest.hexdigest()

    @property
    def next_position(self):
        """Rotary position (all three axes) of the token after the last one, which is text."""
        return int(self.positions[0, -1]) + 1


def mrope_positions(ids, grids, media_ids, family=QWEN2_VL):
    """The rotary positions: text counts up on all three axes, a picture spans (t, h, w) from where it starts.

    ids [L], grids [m, 3] in patches, media_ids: the pad tokens of pictures and videos. Returns [3, L].
    After a picture or video the text goes on at its larger side: time does not count there, as in transformers 5. (In
    4, and when the models were made, it did: another number where a video spans more positions of time, 7 for 4 steps
    of Qwen2.5-VL, than its frames have tokens on a side.)
    """
    runs = iter([run for grid in grids for run in runs_of_pads(family.in_tokens(grid), family)])
    is_media = np.isin(ids, media_ids)
    positions = []
    start = 0  # the position that the next token begins with
    i = 0
    while i < len(ids):
        if is_media[i]:
            t, h, w = next(runs)
            block = np.indices((t, h, w)).reshape(3, -1)
            block[0] *= family.time_step
            following = max(h, w)
        else:
            following = int(np.argmax(is_media[i:])) if is_media[i:].any() else len(ids) - i
            block = np.broadcast_to(np.arange(following), (3, following))
        positions.append(block + start)
        start += following
        i += block.shape[1]
    return np.concatenate(positions, axis=1)


def runs_of_pads(grid, family):
    """The grid (in tokens) of a picture or video -> the grids of its runs of pads in the text."""
    t, h, w = grid
    return [(1, h, w)] * t if family.timestamps else [grid]


def media_text(pad, grid, num_frames, family):
    """How a picture or video stands in the text: one pad token for every visual token of its grid (in tokens), with
    timestamps each step of a video after its time, the mean of its frames'."""
    runs = [f"<|vision_start|>{pad * math.prod(run)}<|vision_end|>" for run in runs_of_pads(grid, family)]
    if pad != family.video_pad or not family.timestamps:
        return "".join(runs)
    frames = np.arange(len(runs) * family.depth).clip(max=num_frames - 1)  # the last one may be there twice
    times = frames.reshape(len(runs), family.depth)[:, [0, -1]].mean(axis=1) / FRAME_RATE
    return "".join(f"<{time:.1f} seconds>{run}" for time, run in zip(times, runs))


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


def media_marks(item, name):
    """The media marks of a text, in its order. Raises BadInput where they do not fit the media."""
    marks = re.findall(f"{IMAGE_MARK}|{VIDEO_MARK}", item["text"])
    image_marks = marks.count(IMAGE_MARK)
    video_marks = marks.count(VIDEO_MARK)
    pictures = len(item["images"])
    videos = int(bool(item["video"]))
    if image_marks != pictures or video_marks != videos:
        raise BadInput(
            f"{name}: the text has {image_marks} {IMAGE_MARK} and {video_marks} {VIDEO_MARK} "
            f"marks for {pictures} pictures and {videos} videos; make them equal"
        )
    return marks


def without_marks(item):
    """An input's text without the marks of its media, which RL rows may carry; the media come first in any case.

    A mark stands at the start of the text or alone on a line, and there are no more of them than media. Anything else
    is the user's text: the <video> of a question about HTML stays.
    """
    left = {IMAGE_MARK: len(item["images"]), VIDEO_MARK: int(bool(item["video"]))}

    def drop(mark):
        left[mark[0]] -= 1
        return "" if left[mark[0]] >= 0 else mark[0]

    any_mark = f"(?:{IMAGE_MARK}|{VIDEO_MARK})"
    runs = rf"\A\s*(?:{any_mark}\s*)+|^[ \t]*(?:{any_mark}[ \t]*)+$"
    return re.sub(runs, lambda run: re.sub(any_mark, drop, run[0]), item["text"], flags=re.MULTILINE)


def encode(tokenizer, item, answer=None, *, marks=None, root=None, name="", family=QWEN2_VL):
    """One side of a pair -> Row.

    item: {"text", "images", "video"}: the user's text with <image> / <video> marks where the media stand, paths or PIL
    pictures, a list of frames (more than NUM_FRAMES are thinned out evenly). answer: the assistant's text or None.
    marks: the media marks at the start of the text, where later ones are literal text. None: every <image> and <video>
    is a mark, or none is where there are no media.
    Raises Skip for media that cannot be used, BadInput for text and media that do not fit together.
    """
    for text in (item["text"], answer or ""):
        check_text(text, name)
    if marks is None:
        has_media = item["images"] or item["video"]
        marks = media_marks(item, name) if has_media else []
    user, patches, grids = place_media(item, marks, root, family)
    ids = tokenizer(chat_prompt(user), add_special_tokens=False).input_ids
    n_prompt = len(ids)
    if answer is not None:  # tokenised apart from the prompt, as it will be generated
        ids = ids + tokenizer(answer + "<|im_end|>", add_special_tokens=False).input_ids
    ids = np.array(ids)
    names = [GEN, DISC, family.image_pad, family.video_pad]
    gen_id, disc_id, *media_ids = tokenizer.convert_tokens_to_ids(names)
    return Row(
        ids=ids,
        positions=mrope_positions(ids, grids, media_ids, family),
        n_prompt=n_prompt,
        disc_at=last_index(ids, disc_id, 0, n_prompt),
        gen_at=last_index(ids, gen_id, n_prompt, len(ids)),  # not the <gen_emb> of INSTRUCTION, in the user's turn
        patches=patches,
        grids=grids,
        name=name,
    )


def place_media(item, marks, root, family):
    """Puts the pad tokens of each picture and video in the place of its mark.

    Returns the text, uint8 patches [n, patch_values] of all media in the order of the marks, and their grids [m, 3].
    """
    text = item["text"]
    images = iter(item["images"])
    patches = [np.zeros((0, family.patch_values), np.uint8)]
    grids = []
    for mark in marks:
        is_frame = mark == VIDEO_MARK
        if not is_frame:
            sources = [next(images)]
            bounds = family.image_pixels
            pad = family.image_pad
        else:
            sources = thinned(item["video"])
            bounds = family.video_pixels
            pad = family.video_pad
        frames = [open_picture(source, root, is_frame) for source in sources]
        x, grid = patch_bytes(frames, *bounds, family)
        text = text.replace(mark, media_text(pad, family.in_tokens(grid), len(frames), family), 1)
        patches.append(x)
        grids.append(grid)
    return text, np.concatenate(patches), np.array(grids, dtype=np.int64).reshape(-1, 3)


def last_index(ids, token, start, end):
    """Where the token stands last among ids[start:end], counted from 0; -1 if it does not."""
    found = np.flatnonzero(ids[start:end] == token)
    return start + int(found[-1]) if len(found) else -1


def encode_input(tokenizer, item, answer=None, *, blank_image=True, root=None, name="", family=QWEN2_VL):
    """The form of RL and evaluation: media, then the stripped text, <disc_emb> and INSTRUCTION. -> Row

    item: {"text", "images", "video"}, keys optional. Without media the blank picture stands in, as the authors do.
    """
    item = check_input(item, name)
    text = without_marks(item).strip()
    if blank_image and not item["images"] and not item["video"]:
        item["images"] = [blank_picture()]
    marks = [IMAGE_MARK] * len(item["images"]) + [VIDEO_MARK] * bool(item["video"])
    item["text"] = f"{''.join(marks)}{text}\n{DISC}\n{INSTRUCTION}"
    return encode(tokenizer, item, answer, marks=marks, root=root, name=name, family=family)


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
    """Raises BadInput where something is no dict or has a key that its kind may not have."""
    keys = keys or KEYS[kind]
    if not isinstance(given, dict):
        raise BadInput(f"{name}: expected {kind} with {', '.join(keys)}, found {type(given).__name__}")
    unknown = [repr(key) for key in given if key not in keys]
    if unknown:
        raise BadInput(f"{name}: unknown key {', '.join(unknown)}; {kind} may have {', '.join(keys)}")


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
    if len(media) > 1 and all(m is media[0] for m in media) and getattr(media[0], "n_frames", 1) > 1:
        raise BadInput(f"{name}: {kind} is one object {len(media)} times, as ImageSequence.Iterator returns it, so all "
                       "frames would be equal. Take copies: [frame.copy() for frame in "
                       "ImageSequence.Iterator(picture)]")  # fmt: skip
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
    text = item.get("text")
    if text is None:
        text = ""
    check_text(text, name)
    images = as_list(item.get("images"), name, "images")
    video = as_list(item.get("video"), name, "video")
    return {"text": text, "images": images, "video": video}


# ---------------------------------------------------------------------------------------------------------------
# Rows of SFT and RL files. A side of either is an item {"text", "images", "video"}, of an SFT row also an answer.


def sft_side(side, name):
    """One side of an SFT row -> item, whose text is all that the human says, and the assistant's answer or None."""
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
    return {"text": human, "images": images, "video": video}, answer


def turn_text(turn, roles, name):
    """What one turn says, in the keys from/value or role/content. roles: who may speak here."""
    check_keys(turn, "a turn", name)
    who = turn.get("from", turn.get("role", roles[0]))
    if who not in roles:
        raise BadInput(f'{name}: "conversations" has a turn of {who!r} where {" or ".join(roles)} must be')
    if "value" not in turn and "content" not in turn:
        raise BadInput(f'{name}: a turn of "conversations" has neither "value" nor "content"')
    return turn["value"] if "value" in turn else turn["content"]


def rl_side(row, side, name):
    """One side ("qry" or "pos") of an RL row -> item."""
    missing = [key for key in (f"{side}_text", f"{side}_image", f"{side}_video") if key not in row]
    if missing:
        raise BadInput(f"{name}: the row lacks {', '.join(missing)}")
    check_keys(row, "an RL row", name)
    item = {"text": row[f"{side}_text"], "images": row[f"{side}_image"], "video": row[f"{side}_video"]}
    return check_input(item, name)


def format_of(row):
    """Return which of the known formats a row has, "" if none."""
    if "qry_text" in row:
        return "an RL row"
    if "qry_image_path" in row:
        return "a row of MMEB-train"
    query = row.get("qry")
    if isinstance(query, dict) and "conversations" in query:
        return "an SFT row"
    return "a bare pair" if isinstance(query, dict) and query.keys() & {"text", "images"} else ""


def side_of(row, kind, side, name):
    """One side ("qry" or "pos") of a row -> item and answer. kind: "sft" or "rl"; name: the row's, for messages."""
    wanted, command = {"sft": ("an SFT row", "annotate"), "rl": ("an RL row", "rl-subset")}[kind]
    found = format_of(row)
    if found not in (wanted, ""):
        raise BadInput(f"{name}: this is {found}, not {wanted}. python data.py {command} --pairs FILE makes such rows.")
    if kind == "rl":
        return rl_side(row, side, f"{name}, {side}"), None
    check_keys(row, "an SFT row", name)
    if side not in row:
        raise BadInput(f'{name}: an SFT row needs "qry" and "pos", this one has {", ".join(row)}')
    return sft_side(row[side], f"{name}, {side}")


def sft_row(pair, answers):
    """The SFT row of a pair {"dataset_name", "qry": item, "pos": item}; answers: (reasoning, summary) of each side."""
    row = {"dataset_name": pair["dataset_name"]}
    for side, (reasoning, summary) in answers.items():
        item = pair[side]
        if item["video"]:
            media = {"video": item["video"]}
            marks = VIDEO_MARK
        else:
            media = {"image": item["images"] or ["images/blank.jpg"]}
            marks = IMAGE_MARK * len(media["image"])
        human = f"{marks}{item['text']}\n{DISC}\n{INSTRUCTION}"
        answer = f"<think>{reasoning}</think><answer>{summary}{GEN}"
        row[side] = media | {"conversations": [{"from": "human", "value": human}, {"from": "gpt", "value": answer}]}
    return row


def rl_row(pair):
    """The RL row of a pair. No picture is "", one a string, several a list; no video is [""], as in published rows."""
    row = {"dataset": pair["dataset_name"], "dataset_name": pair["dataset_name"], "solution": "<embedding>"}
    for side in ("qry", "pos"):
        item = pair[side]
        images = item["images"]
        row[f"{side}_text"] = item["text"]
        row[f"{side}_image"] = images[0] if len(images) == 1 else images or ""
        row[f"{side}_video"] = item["video"] or [""]
    return row


@dataclass(frozen=True)
class RowCheck:
    """Raises BadInput for whatever is wrong with a row and shows without its pictures."""

    kind: str  # "sft" or "rl"
    needs: tuple = (DISC, GEN)  # what an SFT row must have: embedding tokens; "answer": an assistant's text to learn

    def __call__(self, row, name):
        for side in ("qry", "pos"):
            item, answer = side_of(row, self.kind, side, name)
            if self.kind == "sft":  # an RL row's texts have been checked, its marks do not count
                self.check_texts(item, answer, f"{name}, {side}")

    def check_texts(self, item, answer, name):
        for text in (item["text"], answer or ""):
            check_text(text, name)
        media_marks(item, name)  # also without media: they may have been lost
        if "answer" in self.needs and not answer:
            raise BadInput(f"{name}: no assistant text, from which the next-token loss learns; mend the row")
        for token, text, whose in ((DISC, item["text"], "user's"), (GEN, answer or "", "assistant's")):
            if token in self.needs and token not in text:
                raise BadInput(f"{name}: no {token} in the {whose} text, so it has no such embedding; mend it")


def is_stand_in(path):
    """Whether a path is the authors' blank picture, which says "no picture", whatever folder is before images/."""
    parts = Path(os.path.normpath(path)).parts
    return parts == ("blank.jpg",) or parts[-2:] == ("images", "blank.jpg")


def content_key(text, images, video):
    """Identity of a side, an int64: equal stripped text and equal media paths, in any spelling and without the blank
    picture."""
    images = [os.path.normpath(m) for m in map(str, images) if not is_stand_in(m)]
    video = [os.path.normpath(str(m)) for m in video]
    content = [(text or "").strip(), images, video]
    digest = hashlib.blake2b(json.dumps(content).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


# ---------------------------------------------------------------------------------------------------------------
# Pairs, the order of batches, the loader


@dataclass
class Pair:
    """An encoded pair. ok is False where a side was skipped: the rows are then stand-ins that no loss reads."""

    query: Row
    target: Row
    target_key: int  # content_key of the target: equal ones are not each other's negatives
    ok: bool
    reason: str  # why it was skipped
    name: str


class PairData(Dataset):
    """Encoded pairs of one or more files; item i is row i. `order` says which rows make a step.

    kind: the files' format, "sft" or "rl". needs: what an SFT row must have (RowCheck). answers=False reads
    the prompts of an SFT file only (DUME).
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
        check_batch_size(batch_size, world)
        self.order = BatchOrder(self.rows.dataset, batch_size, seed, self.rows.names)
        if rank == 0 and self.order.left_out:
            print(f"left out, smaller than a batch of {batch_size}: {self.order.left_out}")

    def __getitem__(self, i):
        name, row = self.rows[i]
        try:
            query, _ = self.encode_side(row, "qry", name)
            target, key = self.encode_side(row, "pos", name)
        except Skip as error:
            return Pair(self.stand_in(name), self.stand_in(name), 0, ok=False, reason=str(error), name=name)
        return Pair(query, target, key, ok=True, reason="", name=name)

    def encode_side(self, row, side, name):
        """-> Row and the identity of its content."""
        item, answer = side_of(row, self.kind, side, name)
        name = f"{name}, {side}"
        how = {"root": self.root, "name": name, "family": self.family}
        if self.kind == "sft":
            encoded = encode(self.tokenizer, item, answer if self.answers else None, **how)
        else:
            encoded = encode_input(self.tokenizer, item, blank_image=self.blank_image, **how)
        if len(encoded.ids) > self.max_length:
            raise Skip(f"{name}: {len(encoded.ids)} tokens, above --max_length {self.max_length}")
        return encoded, content_key(**item)

    def stand_in(self, name):
        """A short text-only sequence in the place of a skipped side, so that shapes and collectives stay the same."""
        item = {"text": f"\n{DISC}\n", "images": [], "video": []}
        answer = None
        if self.kind == "sft" and self.answers:
            answer = f"<think></think><answer>{GEN}"
        return encode(self.tokenizer, item, answer, name=name, family=self.family)


class BatchOrder:
    """order[step] -> row numbers of the global batch of that step: one dataset each, shuffled, a function of the seed.

    Every epoch shuffles the rows of each dataset, cuts them into batches and drops the tail that does not fill one. The
    batches of all datasets are then shuffled together. A dataset smaller than a batch is left out.
    """

    def __init__(self, dataset, batch_size, seed, names=None):
        """dataset: name of every row, or its index into names."""
        self.batch_size = batch_size
        self.seed = seed
        found, dataset = np.unique(dataset, return_inverse=True)
        self.members = []  # the rows of each dataset that fills a batch
        too_small = []
        for d, name in enumerate(found.tolist()):
            rows = np.flatnonzero(dataset == d)
            if len(rows) >= batch_size:
                self.members.append(rows)
            else:
                name = name if names is None else names[name]
                too_small.append(f"{name or 'unnamed'} {len(rows)}")
        self.left_out = ", ".join(too_small)  # names and sizes
        if not self.members:
            raise BadInput(f"no dataset fills a batch of {batch_size} (rows: {self.left_out}); lower --batch_size")
        self.steps_per_epoch = sum(len(rows) // batch_size for rows in self.members)
        self.batches = lru_cache(maxsize=1)(self.batches)

    def batches(self, epoch):
        """Return the batches of an epoch, in order: a list of row numbers [batch_size]."""
        batches = []
        for d, rows in enumerate(self.members):
            shuffled = rows[np.random.default_rng([self.seed, d, epoch]).permutation(len(rows))]
            full = len(rows) // self.batch_size * self.batch_size
            batches += np.split(shuffled[:full], full // self.batch_size)
        order = np.random.default_rng([self.seed, 1 << 20, epoch]).permutation(len(batches))
        return [batches[i] for i in order]

    def __getitem__(self, step):
        epoch, k = divmod(step, self.steps_per_epoch)
        return self.batches(epoch)[k]


def step_loader(data, steps, workers):
    """Yields this process's pairs of each of the given steps, prepared ahead by background workers (0: in here).

    The rows of a step are a pure function of (seed, step); each process takes its share of them, so the global batch
    does not depend on their number. A worker's item is one pair: a step of 1,024 pairs is gigabytes of patches. What
    the workers have prepared still has to come through their pipes, a page of 14 MB in 56 ms: a thread gets the next
    step while the caller computes this one.
    """
    share = data.order.batch_size // data.world
    ahead = None
    if workers:
        ahead = max(2, math.ceil(share / workers))  # pairs that each worker prepares: together one step
    sampler = local_row_numbers(data, steps)
    loader = forked_loader(data, workers, batch_size=None, sampler=sampler, prefetch_factor=ahead)
    pairs = iter(loader)  # here, in the main thread, the workers are forked
    pairs_of_steps = ([next(pairs) for _ in range(share)] for _ in steps)
    yield from one_ahead(pairs_of_steps) if workers else pairs_of_steps


def local_row_numbers(data, steps):
    """The numbers of this process's rows, step after step."""
    for step in steps:
        yield from data.order[step][data.rank :: data.world].tolist()


# ---------------------------------------------------------------------------------------------------------------
# Command line


def main():
    args = command_parser().parse_args()
    check_bounds(vars(args), temperature=(0, True, 100))
    inputs = [*getattr(args, "pairs", []), *getattr(args, "sft", [])]
    if any(Path(file).resolve() == Path(args.out).resolve() for file in inputs):
        raise SystemExit(f"--out {args.out} is one of the files of --pairs or --sft; give another name")
    run_command(args)


def run_command(args):
    if args.command == "annotate":
        from support.annotate import annotate

        annotate(args)
    elif args.command == "rl-subset":
        from support.annotate import rl_subset

        rl_subset(args)
    elif args.command == "check":
        from support.check import check

        sys.exit(0 if check(args) else 1)
    elif args.command == "toy":
        from support.toy import write_toy

        write_toy(args.out, args.seed)
    else:
        from support.check import export_checkpoint

        export_checkpoint(args.checkpoint, args.out)


def command_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, add_flags, help in (
        ("annotate", annotate_flags, "bare pairs and a teacher -> SFT rows"),
        ("rl-subset", rl_subset_flags, "a balanced RL file out of pairs that SFT does not see"),
        ("check", check_flags, "an SFT or RL file before a run; exit code 1 where a row cannot be used"),
        ("toy", toy_flags, "write the toy world"),
        ("export", export_flags, "a checkpoint of sft.py or rl.py -> a model folder, for eval.py and others"),
    ):
        add_flags(commands.add_parser(name, help=help, formatter_class=argparse.ArgumentDefaultsHelpFormatter))
    return parser


def annotate_flags(p):
    p.add_argument("--pairs", nargs="+", required=True, help="files of pairs: .json, .jsonl or .parquet (docs/data.md)")
    p.add_argument("--media_root", default=".", help="folder that the media paths start from")
    p.add_argument("--teacher", required=True, help="folder or hub id of an image-text-to-text model")
    p.add_argument("--out", required=True, help="SFT file; raw answers go to OUT.answers/")
    p.add_argument("--batch_size", type=int, default=16, help="answers written at once by each process")
    p.add_argument("--max_new_tokens", type=int, default=8192, help="an answer is cut off here")
    p.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    p.add_argument("--seed", type=int, default=0, help="of the samples, where --temperature is above 0")
    p.add_argument("--max_tokens", type=int, default=8192, help="filter: longer answers are rejected (paper: 8192)")
    p.add_argument("--max_repeat", type=float, default=0.3, help="filter: largest share of repeated 4-word sequences")


def rl_subset_flags(p):
    p.add_argument("--pairs", nargs="+", required=True, help="files of pairs, as for annotate")
    p.add_argument("--sft", nargs="*", default=[], help="SFT files whose pairs are left out")
    p.add_argument("--out", required=True, help="RL file")
    p.add_argument("--size", type=int, default=11_000, help="pairs (the paper has about 11,000)")
    p.add_argument("--visdoc", default=r"colpali|visrag|vidore|visdoc|\bdoc\b",
                   help="datasets of visual documents; nothing in a row tells them from pictures")  # fmt: skip
    p.add_argument("--seed", type=int, default=0, help="of the draw")


def check_flags(p):
    p.add_argument("file", help="SFT or RL file")
    p.add_argument("--media_root", default=".", help="folder that the media paths start from")
    p.add_argument("--model", help="whose tokenizer counts the tokens; without one media are looked up, not opened")
    p.add_argument("--max_length", type=int, default=12_288, help="longer rows are skipped in training")
    p.add_argument("--batch_size", type=int, default=1, help="a dataset with fewer rows is left out in training")
    p.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")


def toy_flags(p):
    p.add_argument("--out", default="runs/toy/data", help="folder")
    p.add_argument("--seed", type=int, default=0, help="of the scenes and their pictures")


def export_flags(p):
    p.add_argument("checkpoint", help="OUT/checkpoints/step-N")
    p.add_argument("--out", required=True, help="model folder")


if __name__ == "__main__":
    run_script(main)
