"""Data: conversations, images and videos as patches, the rows of SFT and RL files, batches.

A row of a file holds a pair, a query and its target. Each of the two becomes a Row, one string in the chat format of
Qwen2-VL, Qwen2.5-VL and Qwen3-VL:

    <|im_start|>system .. user [media] TEXT\\n<disc_emb>\\nINSTRUCTION <|im_end|> assistant <think>..<gen_emb><|im_end|>

INSTRUCTION names <gen_emb>, but only the answer's <gen_emb> is an embedding. The model reads token ids, their
three-axis rotary positions and the image patches. Loader workers encode Rows on the CPU as numpy arrays, because a
torch tensor costs a file descriptor when it leaves a worker. Only normalise() and the functions of a Family run later,
on the model's device.

Departures from the official code
 1. Each batch holds one dataset. The order is a pure function of (seed, epoch, step), so the world size and a resume
    do not change it. The official order is the order of the file in every epoch.
 2. A row with an unreadable image or too many tokens stays in the batch, but every loss masks it out. It is counted
    and listed in skipped.jsonl. The official loader silently takes the next row instead of an unreadable one. It
    truncates long rows, which can cut off <gen_emb>.
 3. Token ids are looked up by name and are never hard-coded.
 4. A text without any image works. The official text-only branch raises a TypeError.

Commands
    torchrun --nproc_per_node 8 data.py annotate --pairs PAIRS --media_root DIR --teacher MODEL --out sft.json
    python data.py rl-subset --pairs PAIRS --sft sft.json --out rl.json      # a balanced sample of unused pairs
    python data.py check sft.json --media_root DIR --model MODEL             # before a run
    python data.py toy [--out runs/toy/data] [--seed 0]     # writes the toy world, in the published formats
    python data.py export runs/2b/sft/checkpoints/step-1000 --out runs/2b/sft-1000     # a model folder for eval.py
"""

import argparse
import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch.utils.data import Dataset

from support.backbones import FRAME_RATE, QWEN2_VL
from support.distributed import forked_loader
from support.files import Rows, dataset_of
from support.formats import (
    DISC,
    GEN,
    IMAGE_MARK,
    INSTRUCTION,
    SYSTEM,
    VIDEO_MARK,
    RowCheck,
    check_input,
    check_text,
    content_key,
    media_marks,
    side_of,
    without_marks,
)
from support.images import normalise, open_image, patch_bytes, thinned, white_image
from support.program import BadInput, Skip, run_script
from support.settings import check_batch_size, check_bounds

# ---------------------------------------------------------------------------------------------------------------
# Images and videos to patches


def patchify(frames, *, min_pixels, max_pixels, family=QWEN2_VL):
    """Convert an image (one frame) or a video (several frames) to the model's patches.

    frames: list of PIL images of any mode. Returns float32 patches [n, 1176] (for Qwen2-VL: 3 channels x 2 frames x
    14 x 14 pixels, CLIP-normalised; four consecutive patches merge into one token) and grid_thw [3] (t, h, w in
    patches, n = t*h*w). min_pixels, max_pixels: area of one frame after the resize. The first frame sets the size of
    all frames. An odd number of frames repeats the last frame, so an image becomes the two equal frames that the model
    expects. Raises Skip as open_image does. The values equal those of transformers' Qwen2VLImageProcessorPil, except
    for 16-bit images, which become black or white in transformers.
    """
    patches, grid = patch_bytes(frames, min_pixels, max_pixels, family)
    return normalise(torch.from_numpy(patches), family), torch.from_numpy(grid)


# ---------------------------------------------------------------------------------------------------------------
# One side of a pair as arrays


@dataclass
class Row:
    """One encoded sequence of L tokens. The first n_prompt tokens are the prompt, which has no loss."""

    ids: np.ndarray  # [L]
    positions: np.ndarray  # [3, L] rotary positions: time, height, width
    n_prompt: int
    disc_at: int  # index of <disc_emb> in the user's turn, -1 if missing
    gen_at: int  # index of the last <gen_emb> in the assistant's turn, -1 if missing
    patches: np.ndarray  # uint8 [n, patch_values] of all media, in the order of the text
    grids: np.ndarray  # [m, 3]
    name: str  # file, row and side, for messages
    vision_states: torch.Tensor | None = None  # of the frozen vision tower; the patches are then freed

    @property
    def num_patches(self):
        return int(self.grids.prod(axis=1).sum())

    @property
    def content(self):
        """Return the hash of everything that the model reads. It does not depend on the name or the index."""
        digest = hashlib.blake2b(digest_size=16)
        for array in (self.ids, self.grids, self.patches):
            digest.update(array.tobytes())
        return digest.hexdigest()

    @property
    def next_position(self):
        """Return the rotary position (on all three axes) of a token after the last one, which is text."""
        return int(self.positions[0, -1]) + 1


def mrope_positions(ids, grids, media_ids, family=QWEN2_VL):
    """Return the rotary positions [3, L]: text counts up on all three axes, an image spans (t, h, w) from its start.

    ids [L], grids [m, 3] in patches, media_ids: the pad tokens of images and videos.
    After an image or video the text continues at start + max(h, w), as in transformers 5. In transformers 4, and when
    the models were trained, it continued at start + max(T, h, w). T is the span of the time positions, for example 7
    for 4 steps of Qwen2.5-VL.
    """
    runs = iter([run for grid in grids for run in runs_of_pads(family.in_tokens(grid), family)])
    is_media = np.isin(ids, media_ids)
    positions = []
    start = 0  # position of the next token
    i = 0
    while i < len(ids):
        if is_media[i]:
            t, h, w = next(runs)
            block = np.indices((t, h, w)).reshape(3, -1)
            block[0] *= family.time_step
            advance = max(h, w)
        else:
            advance = int(np.argmax(is_media[i:])) if is_media[i:].any() else len(ids) - i  # to the next image
            block = np.broadcast_to(np.arange(advance), (3, advance))
        positions.append(block + start)
        start += advance
        i += block.shape[1]
    return np.concatenate(positions, axis=1)


def runs_of_pads(grid, family):
    """Return the grids (in tokens) of the runs of pads that an image or video becomes in the text."""
    t, h, w = grid
    return [(1, h, w)] * t if family.timestamps else [grid]


def media_text(pad, grid, num_frames, family):
    """Return the text of an image or video: one pad token for every visual token of its grid (in tokens). If the family
    has timestamps, the time of each video step (the mean of its frames' times) comes before the step."""
    runs = [f"<|vision_start|>{pad * math.prod(run)}<|vision_end|>" for run in runs_of_pads(grid, family)]
    if pad != family.video_pad or not family.timestamps:
        return "".join(runs)
    frames = np.arange(len(runs) * family.depth).clip(max=num_frames - 1)  # the last frame may be repeated
    times = frames.reshape(len(runs), family.depth)[:, [0, -1]].mean(axis=1) / FRAME_RATE
    return "".join(f"<{time:.1f} seconds>{run}" for time, run in zip(times, runs))


def chat_prompt(user):
    """Return the conversation up to the start of the assistant's turn, as the Qwen2-VL chat template writes it."""
    return f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"


def encode(tokenizer, item, answer=None, *, marks=None, root=None, name="", family=QWEN2_VL):
    """Encode a complete user text (as in SFT files), its media and the optional answer as a Row.

    item: {"text", "images", "video"}: the user's text with an <image> or <video> mark for each of the media, paths or
    PIL images, and a list of frames (thinned out evenly to NUM_FRAMES). answer: the assistant's text or None.
    marks: the media marks at the start of the text; later marks are literal text. If marks is None, every <image> and
    <video> is a mark, unless the item has no media: then all are literal text.
    Raises Skip for unusable media. Raises BadInput if text and media do not match.
    """
    for text in (item["text"], answer or ""):
        check_text(text, name)
    if marks is None:
        has_media = item["images"] or item["video"]
        marks = media_marks(item, name) if has_media else []
    user, patches, grids = place_media(item, marks, root, family)
    ids = tokenizer(chat_prompt(user), add_special_tokens=False).input_ids
    n_prompt = len(ids)
    if answer is not None:  # tokenised separately from the prompt, as in generation
        ids = ids + tokenizer(answer + "<|im_end|>", add_special_tokens=False).input_ids
    ids = np.array(ids)
    names = [GEN, DISC, family.image_pad, family.video_pad]
    gen_id, disc_id, *media_ids = tokenizer.convert_tokens_to_ids(names)
    return Row(
        ids=ids,
        positions=mrope_positions(ids, grids, media_ids, family),
        n_prompt=n_prompt,
        disc_at=last_index(ids, disc_id, 0, n_prompt),
        gen_at=last_index(ids, gen_id, n_prompt, len(ids)),  # skips the <gen_emb> of INSTRUCTION in the user's turn
        patches=patches,
        grids=grids,
        name=name,
    )


def place_media(item, marks, root, family):
    """Replace each mark by the pad tokens of its image or video.

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
        frames = [open_image(source, root, is_frame) for source in sources]
        x, grid = patch_bytes(frames, *bounds, family)
        text = text.replace(mark, media_text(pad, family.in_tokens(grid), len(frames), family), 1)
        patches.append(x)
        grids.append(grid)
    return text, np.concatenate(patches), np.array(grids, dtype=np.int64).reshape(-1, 3)


def last_index(ids, token, start, end):
    """Return the last index (from 0 in ids) of the token within ids[start:end], or -1 if it is missing."""
    found = np.flatnonzero(ids[start:end] == token)
    return start + int(found[-1]) if len(found) else -1


def encode_input(tokenizer, item, answer=None, *, blank_image=True, root=None, name="", family=QWEN2_VL):
    """Encode an input of RL or evaluation as a Row. Build its user text: media, stripped text, <disc_emb>, INSTRUCTION.

    item: {"text", "images", "video"}, keys optional. Without media the blank image is added, as the authors do.
    """
    item = check_input(item, name)
    text = without_marks(item).strip()
    if blank_image and not item["images"] and not item["video"]:
        item["images"] = [white_image()]
    marks = [IMAGE_MARK] * len(item["images"]) + [VIDEO_MARK] * bool(item["video"])
    item["text"] = f"{''.join(marks)}{text}\n{DISC}\n{INSTRUCTION}"
    return encode(tokenizer, item, answer, marks=marks, root=root, name=name, family=family)


# ---------------------------------------------------------------------------------------------------------------
# Pairs, the order of batches, the loader


@dataclass
class Pair:
    """An encoded pair. If its query or target was skipped, ok is False and no loss reads its stand-in Rows."""

    query: Row
    target: Row
    target_key: int  # content_key of the target; pairs with equal keys are not each other's negatives
    ok: bool
    reason: str  # reason of the skip
    name: str
    dataset: str


class PairData(Dataset):
    """Encoded pairs of one or more files. Item i is the pair of row i; `order` defines the rows of each step.

    kind: the files' format, "sft" or "rl". needs: what is required in an SFT row (RowCheck). answers=False reads only
    the prompts of an SFT file (DUME).
    """

    def __init__(self, files, tokenizer, *, kind, batch_size, seed, root=None, max_length=12_288, rank=0, world=1,
                 blank_image=True, needs=(DISC, GEN), answers=True, cache=None, family=QWEN2_VL):  # fmt: skip
        self.rows = files if isinstance(files, Rows) else Rows(files, RowCheck(kind, needs), cache)
        if not len(self.rows):
            raise BadInput(f"{', '.join(map(str, self.rows.files))}: no rows. Give a file with at least one row")
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
            print(f"datasets left out, because they are smaller than a batch of {batch_size}: {self.order.left_out}")

    def __getitem__(self, i):
        name, row = self.rows[i]
        about = {"name": name, "dataset": dataset_of(row)}
        try:
            query, _ = self.encode_side(row, "qry", name)
            target, key = self.encode_side(row, "pos", name)
        except Skip as error:
            return Pair(self.stand_in(name), self.stand_in(name), 0, ok=False, reason=str(error), **about)
        return Pair(query, target, key, ok=True, reason="", **about)

    def encode_side(self, row, side, name):
        """Return the Row and the identity of its content."""
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
        """Return a short text-only sequence for a skipped query or target, so shapes and collectives stay the same."""
        item = {"text": f"\n{DISC}\n", "images": [], "video": []}
        answer = None
        if self.kind == "sft" and self.answers:
            answer = f"<think></think><answer>{GEN}"
        return encode(self.tokenizer, item, answer, name=name, family=self.family)


class BatchOrder:
    """order[step] holds the row indices of the global batch of that step. It depends only on the data and the seed.

    Every epoch shuffles the rows of each dataset, cuts them into batches of one dataset and drops the incomplete last
    batch. Then it shuffles the batches of all datasets together. A dataset smaller than a batch is left out.
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
            raise BadInput(f"no dataset fills a batch of {batch_size} (rows: {self.left_out}). Lower --batch_size")
        self.steps_per_epoch = sum(len(rows) // batch_size for rows in self.members)
        self.batches = lru_cache(maxsize=1)(self.batches)

    def batches(self, epoch):
        """Return the batches of an epoch, in order: a list of row indices [batch_size]."""
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
    """Yield this rank's pairs of each given step. Background workers prepare them ahead (0 workers: in this process).

    The rows of a step are a pure function of (seed, step) and are divided among the ranks, so the global batch does not
    depend on the world size. A worker's item is one pair, because a step of 1,024 pairs is gigabytes of patches. With a
    GPU, the DataLoader's pinning thread empties the workers' pipes (56 ms for a page of 14 MB) during a step.
    """
    share = data.order.batch_size // data.world
    ahead = None
    if workers:
        ahead = max(2, math.ceil(share / workers))  # pairs per worker; together the workers prepare one step
    own_rows = (int(i) for step in steps for i in data.order[step][data.rank :: data.world])
    pin = bool(workers) and torch.cuda.is_available()
    loader = forked_loader(data, workers, batch_size=None, sampler=own_rows, prefetch_factor=ahead, pin_memory=pin)
    pairs = iter(loader)
    for _ in steps:
        yield [next(pairs) for _ in range(share)]


# ---------------------------------------------------------------------------------------------------------------
# Command line


def main():
    from support import annotate, check, toy  # here, because they import this file

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (annotate.ANNOTATE, annotate.RL_SUBSET, check.CHECK, toy.TOY, check.EXPORT):
        flags = commands.add_parser(command.name, help=command.help,
                                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
        command.add_flags(flags)
        flags.set_defaults(run=command.run)
    args = parser.parse_args()
    check_bounds(vars(args), temperature=(0, True, 100))
    args.run(args)


if __name__ == "__main__":
    run_script(main)
