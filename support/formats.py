"""The published formats: the protocol's constants and texts, SFT and RL rows, and the checks of a row.

A query or target of any row is an item {"text", "images", "video"}. In an SFT row it also has an answer. Unknown keys
are errors, because a misspelt key would be dropped silently.
"""

import hashlib
import json
import numbers
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from support.program import BadInput

SYSTEM = "You are a helpful assistant."

INSTRUCTION = (
    "Represent the above input text, images, videos, or any combination of the three as embeddings. "
    "First output the thinking process in <think> </think> tags and then summarize the entire input in a word or "
    "sentence. Finally, use the <gen_emb> tag to represent the entire input."
)

GEN = "<gen_emb>"

DISC = "<disc_emb>"  # added to the tokenizer after GEN

IMAGE_MARK = "<image>"  # marks the position of an image in the human text of SFT files

VIDEO_MARK = "<video>"

CONTROL_TOKENS = ("<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>")


def check_text(text, name):
    """Raise BadInput if a text cannot be tokenised as intended."""
    if not isinstance(text, str):
        raise BadInput(f"{name}: the text must be a string, not {type(text).__name__}")
    for token in CONTROL_TOKENS:
        if token in text:
            raise BadInput(f"{name}: the text contains the control token {token}. Remove it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadInput(f"{name}: character {error.start} of the text is half a surrogate pair, which is not a "
                       "character. Remove it") from error  # fmt: skip


def media_marks(item, name):
    """Return the media marks of a text, in order. Raises BadInput if their numbers differ from the media."""
    marks = re.findall(f"{IMAGE_MARK}|{VIDEO_MARK}", item["text"])
    image_marks = marks.count(IMAGE_MARK)
    video_marks = marks.count(VIDEO_MARK)
    images = len(item["images"])
    videos = int(bool(item["video"]))
    if image_marks != images or video_marks != videos:
        raise BadInput(
            f"{name}: the text has {image_marks} {IMAGE_MARK} and {video_marks} {VIDEO_MARK} "
            f"marks for {images} images and {videos} videos. Make them equal"
        )
    return marks


def without_marks(item):
    """Return an input's text without media marks. RL rows may contain marks, but their media always come first.

    A mark is at the start of the text or alone on a line, and the text has at most as many marks as media. Everything
    else is the user's text, so the <video> of a question about HTML stays.
    """
    left = {IMAGE_MARK: len(item["images"]), VIDEO_MARK: int(bool(item["video"]))}

    def drop(mark):
        left[mark[0]] -= 1
        return "" if left[mark[0]] >= 0 else mark[0]

    any_mark = f"(?:{IMAGE_MARK}|{VIDEO_MARK})"
    runs = rf"\A\s*(?:{any_mark}\s*)+|^[ \t]*(?:{any_mark}[ \t]*)+$"
    return re.sub(runs, lambda run: re.sub(any_mark, drop, run[0]), item["text"], flags=re.MULTILINE)


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
    '{"text": str, "images": [path or PIL image], "video": [path or PIL image of each frame]} with any of these keys, '
    "or a str (a text), or a Path or PIL image (an image)"
)


def check_keys(given, kind, name, keys=None):
    """Raise BadInput if `given` is not a dict or has a key that its kind may not have."""
    keys = keys or KEYS[kind]
    if not isinstance(given, dict):
        raise BadInput(f"{name}: expected {kind} with {', '.join(keys)}, found {type(given).__name__}")
    unknown = [repr(key) for key in given if key not in keys]
    if unknown:
        raise BadInput(f"{name}: unknown key {', '.join(unknown)}. The keys of {kind} are {', '.join(keys)}")


def as_list(media, name="", kind="image"):
    """Return media as a list of paths or images. Raises BadInput for anything except the published forms: "no media"
    is a missing key, "", [""] or [], and one image is a string."""
    if media is None or isinstance(media, (str, Path, Image.Image)):
        media = [media] if media else []
    if not isinstance(media, (list, tuple)):
        raise BadInput(f"{name}: {kind} must be a path or a list of paths, not {type(media).__name__}")
    for m in media:
        if not isinstance(m, (str, Path, Image.Image)):
            raise BadInput(f"{name}: {kind} must be a flat list of paths, but it holds {type(m).__name__}")
        if str(m).startswith(("http://", "https://")):
            raise BadInput(f"{name}: {m} is a web address. Download it and give the file's path")
        if kind == "video" and str(m).lower().endswith(VIDEO_FILES):
            raise BadInput(f"{name}: {m} is a video file, but a video must be the list of its frames. Make them with: "
                           f"ffmpeg -i {m} -vf fps=2 FOLDER/%04d.jpg")  # fmt: skip
    if len(media) > 1 and all(m is media[0] for m in media) and getattr(media[0], "n_frames", 1) > 1:
        raise BadInput(f"{name}: {kind} is one object {len(media)} times, as ImageSequence.Iterator returns it, so all "
                       "frames would be equal. Copy the frames: [frame.copy() for frame in "
                       "ImageSequence.Iterator(image)]")  # fmt: skip
    return [m for m in media if m]


def check_input(item, name):
    """Return an input of RL, evaluation or embed with all of "text", "images" and "video". Raises BadInput."""
    if isinstance(item, str):
        if re.fullmatch(r"https?://\S+", item) or (len(item) < 256 and os.path.isfile(item)):
            raise BadInput(f'{name}: {item!r} could be a text or a file. Write {{"text": ...}} for a text or Path(...) '
                           "for an image (download an image from the web first)")  # fmt: skip
        item = {"text": item}
    elif isinstance(item, (Path, Image.Image)):
        item = {"images": [item]}
    elif not isinstance(item, dict):
        raise BadInput(f"{name}: an input must be {FORMS}, not {type(item).__name__}")
    check_keys(item, "an input", name)
    text = item.get("text")
    if text is None:
        text = ""
    check_text(text, name)
    images = as_list(item.get("images"), name, "images")
    video = as_list(item.get("video"), name, "video")
    return {"text": text, "images": images, "video": video}


def format_of(row):
    """Return the name of a row's format, or "" if the format is unknown."""
    if "qry_text" in row:
        return "an RL row"
    if "qry_image_path" in row:
        return "a row of MMEB-train"
    query = row.get("qry")
    if isinstance(query, dict) and "conversations" in query:
        return "an SFT row"
    return "a bare pair" if isinstance(query, dict) and query.keys() & {"text", "images"} else ""


def side_of(row, kind, side, name):
    """Return the item and answer of a row's query ("qry") or target ("pos"). kind: "sft" or "rl"; name: for errors."""
    wanted, command = {"sft": ("an SFT row", "annotate"), "rl": ("an RL row", "rl-subset")}[kind]
    found = format_of(row)
    if found not in (wanted, ""):
        raise BadInput(f"{name}: this is {found}, not {wanted}. python data.py {command} --pairs FILE makes such rows.")
    if kind == "rl":
        return rl_side(row, side, f"{name}, {side}"), None
    check_keys(row, "an SFT row", name)
    if side not in row:
        raise BadInput(f'{name}: an SFT row needs "qry" and "pos", but this row has {", ".join(row)}')
    return sft_side(row[side], f"{name}, {side}")


def sft_side(side, name):
    """Return the item of an SFT row's side, with the full human turn as text, and the assistant's answer or None."""
    check_keys(side, "a side of an SFT row", name)
    turns = side.get("conversations")
    if not isinstance(turns, list) or len(turns) != 2:
        found = f"{len(turns)} turns" if isinstance(turns, list) else type(turns).__name__
        raise BadInput(f'{name}: needs "conversations" with one human and one assistant turn, but found {found}')
    human = turn_text(turns[0], ("human", "user"), name)
    answer = turn_text(turns[1], ("gpt", "assistant"), name)
    if not isinstance(human, str) or not isinstance(answer, str | None):
        raise BadInput(f'{name}: needs "conversations" whose texts are strings')
    images = as_list(side.get("image"), name)
    video = as_list(side.get("video"), name, "video")
    if images and video:
        raise BadInput(f"{name}: has both an image and a video, but the format allows only one of them. Remove one")
    return {"text": human, "images": images, "video": video}, answer


def turn_text(turn, roles, name):
    """Return the text of a turn with the keys from/value or role/content. roles: the roles allowed for this turn."""
    check_keys(turn, "a turn", name)
    who = turn.get("from", turn.get("role", roles[0]))
    if who not in roles:
        raise BadInput(f'{name}: "conversations" has a turn of {who!r}, but this turn must be of {" or ".join(roles)}')
    if "value" not in turn and "content" not in turn:
        raise BadInput(f'{name}: a turn of "conversations" has no "value" and no "content". Add one of them')
    return turn["value"] if "value" in turn else turn["content"]


def rl_side(row, side, name):
    """Return the item of an RL row's query ("qry") or target ("pos")."""
    missing = [key for key in (f"{side}_text", f"{side}_image", f"{side}_video") if key not in row]
    if missing:
        raise BadInput(f"{name}: the row has no {', '.join(missing)}")
    check_keys(row, "an RL row", name)
    item = {"text": row[f"{side}_text"], "images": row[f"{side}_image"], "video": row[f"{side}_video"]}
    return check_input(item, name)


def sft_row(pair, answers):
    """Return the SFT row of a pair {"dataset_name", "qry": item, "pos": item}. answers: each (reasoning, summary)."""
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
    """Return the RL row of a pair. As published: no image is "", one is a string, several a list; no video is [""]."""
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
    """Raise BadInput for every fault of a row that shows without opening its images."""

    kind: str  # "sft" or "rl"
    needs: tuple = (DISC, GEN)  # required in an SFT row: embedding tokens; "answer": an assistant's text to learn

    def __call__(self, row, name):
        for side in ("qry", "pos"):
            item, answer = side_of(row, self.kind, side, name)
            if self.kind == "sft":  # side_of() has checked an RL row's texts; its marks need no check
                self.check_texts(item, answer, f"{name}, {side}")

    def check_texts(self, item, answer, name):
        for text in (item["text"], answer or ""):
            check_text(text, name)
        media_marks(item, name)  # also without media, because the media may have been lost
        if "answer" in self.needs and not answer:
            raise BadInput(f"{name}: no assistant text, so the next-token loss has nothing to learn. Add the text")
        for token, text, owner in ((DISC, item["text"], "user's"), (GEN, answer or "", "assistant's")):
            if token in self.needs and token not in text:
                raise BadInput(f"{name}: no {token} in the {owner} text, which this embedding needs. Add the token")


def content_key(text, images, video):
    """Return the identity of a query or target, an int64: a hash of the stripped text and the media paths. Paths are
    normalised, and the blank image is left out."""
    images = [os.path.normpath(m) for m in map(str, images) if not is_stand_in(m)]
    video = [os.path.normpath(str(m)) for m in video]
    content = [(text or "").strip(), images, video]
    digest = hashlib.blake2b(json.dumps(content).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def is_stand_in(path):
    """Return whether a path is the authors' blank image, which means "no image", in any folder above images/."""
    parts = Path(os.path.normpath(path)).parts
    return parts == ("blank.jpg",) or parts[-2:] == ("images", "blank.jpg")


def check_arguments(mode, temperature, seed, **counts):
    """Raise BadInput if an argument of embed() is unusable. numpy's numbers count as numbers, True does not."""
    if mode not in ("disc", "gen", "both"):
        raise BadInput(f'mode must be "disc", "gen" or "both", not {mode!r}')
    for name, value in {"seed": seed, **counts}.items():
        least = 0 if name == "seed" else 1
        if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
            raise BadInput(f"{name}={value!r}: must be an integer of at least {least}")
    is_number = isinstance(temperature, numbers.Real) and not isinstance(temperature, bool)
    if not is_number or not (temperature == 0 or 0.001 <= temperature <= 100):
        raise BadInput(f"temperature={temperature!r}: must be 0 (greedy) or from 0.001 to 100")


def list_of_inputs(given):
    """Return the inputs of embed() as a list. A single input becomes a list of one input."""
    if isinstance(given, (str, Path, Image.Image, dict)):
        return [given]
    if isinstance(given, (bytes, set, np.ndarray, torch.Tensor)) or not hasattr(given, "__iter__"):
        raise BadInput(f"inputs must be a list of inputs, each {FORMS}, not {type(given).__name__}")
    return list(given)


def list_of_traces(given, n):
    """Return the traces of embed() as a list of n texts, or None."""
    if given is None:
        return None
    traces = [given] if isinstance(given, str) else given
    if not isinstance(traces, (list, tuple)):
        raise BadInput(f"traces must be a list of one text for each input, not {type(traces).__name__}")
    if len(traces) != n:
        raise BadInput(f"{len(traces)} traces for {n} inputs. Give one text for each input")
    return traces
