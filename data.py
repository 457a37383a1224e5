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
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch.utils.data import Dataset

from support.backbones import FRAME_RATE, QWEN2_VL
from support.distributed import forked_loader, one_ahead
from support.files import Rows
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
from support.images import blank_picture, normalise, open_picture, patch_bytes, thinned
from support.program import BadInput, Skip, run_script
from support.settings import check_batch_size, check_bounds

# ---------------------------------------------------------------------------------------------------------------
# Images and videos to patches


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
