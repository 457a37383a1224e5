"""The rows of SFT, RL and pair files: which ones are usable, and what the message says about the others."""

import json
import re

import pytest
from conftest import ANSWERS, RL_ROW, TAIL, picture, run_data, turn_pair

from data import encode_input
from support.annotate import ANNOTATE, RL_SUBSET, read_pairs
from support.files import index_rows
from support.formats import DISC, RowCheck, content_key, is_stand_in
from support.program import BadInput


def sft_row(human="<image>\nwhat", turns=None, roles=("human", "gpt"), answer=ANSWERS[0], row=None, **side):
    turns = turns or [{"from": roles[0], "value": human + TAIL}, {"from": roles[1], "value": answer}]
    pos = {"conversations": [{"from": "human", "value": f"a{TAIL}"}, {"from": "gpt", "value": ANSWERS[1]}]}
    return {"dataset_name": "d", "qry": {"conversations": turns, **side}, "pos": pos} | (row or {})


def with_turns(*turns):
    return sft_row("a", row={"pos": {"conversations": list(turns)}})


THREE = [{"from": who, "value": x} for who, x in (("human", "a" + TAIL), ("gpt", ANSWERS[0]), ("human", "more"))]
BLANK = "images/blank.jpg"


@pytest.mark.parametrize("kind, row, message", [
    ("sft", sft_row(images=["a.png"]), "qry: unknown key 'images'.*image, video, conversations"),
    ("sft", sft_row(row={"weight": 2}), "unknown key 'weight'.*dataset_name"),
    ("sft", sft_row(), "1 <image> and 0 <video> marks for 0 images"),
    ("sft", sft_row("the <video> element"), "0 <image> and 1 <video> marks for 0 images and 0 videos"),
    ("sft", sft_row("<image><image>", image=BLANK), "marks"),
    ("sft", sft_row("<image>", image=BLANK, video=[BLANK]), "both an image and a video"),
    ("sft", sft_row("a", turns=THREE), "found 3 turns"),
    ("sft", sft_row("a", roles=("gpt", "human")), "a turn of 'gpt', but this turn must be of human or user"),
    ("sft", sft_row("a", roles=("system", "gpt")), "a turn of 'system'"),
    ("sft", sft_row(image=[["a.png"]]), "flat list of paths, but it holds list"),
    ("sft", sft_row(image={"path": "a.png"}), "not dict"),
    ("sft", sft_row("<video>\nwhat", video="clip.mp4"), "clip.mp4 is a video file.*ffmpeg -i clip.mp4"),
    ("sft", sft_row("<video>\nwhat", video=["clip.gif"]), "clip.gif is a video file.*ffmpeg"),
    ("sft", sft_row(image="https://a.org/b.png"), "is a web address. Download it"),
    ("sft", sft_row("half \ud800 pair", image=""), "half a surrogate pair"),
    ("sft", {"qry": sft_row("a")["qry"]}, 'needs "qry" and "pos"'),
    ("sft", sft_row(row={"qry": {"image": "a.png"}}), "qry.*conversations"),
    ("sft", sft_row(row={"qry": None}), "qry.*conversations"),
    ("sft", with_turns(turn_pair("a", "b")[0]), "pos.*conversations"),
    ("sft", with_turns({"from": "human"}, {"from": "gpt"}), "pos.*conversations"),
    ("sft", sft_row("a", answer="<think>a</think><answer>b"), "qry.*<gen_emb>"),
    ("sft", with_turns(*turn_pair("no place", ANSWERS[0])), "pos.*<disc_emb>"),
    ("sft", sft_row("a", answer=None), "qry"),
    ("sft", with_turns({"value": None}, {"value": ANSWERS[0]}), "pos"),
    ("rl", RL_ROW | {"qry_images": ["a.png"]}, "unknown key 'qry_images'.*qry_image"),
    ("rl", RL_ROW | {"qry_text": 3}, "the text must be a string, not int"),
    ("rl", RL_ROW | {"qry_video": ["clip.MP4"]}, "clip.MP4 is a video file"),
    ("rl", RL_ROW | {"pos_image": 7}, "must be a path or a list of paths, not int"),
    *(("rl", {k: v for k, v in RL_ROW.items() if k != key}, f"has no {key}") for key in RL_ROW),
])  # fmt: skip
def test_rows_that_cannot_be_used(tmp_path, capsys, kind, row, message):
    """Bug story: a row with `images` instead of `image` trained to the end with a literal <image> and no image, and
    check exited 0. A run and check now name file, row, fault and what is allowed."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(BadInput, match=f"(?s)rows.jsonl, row 0.*{message}"):
        index_rows(path, RowCheck(kind))
    if kind == "sft" or "qry_text" in row:  # check recognises an RL row by its text
        assert run_data("check", path, "--workers", 0) == 1 and re.search(message, capsys.readouterr().out)


def test_rows_of_the_published_files_are_usable(tmp_path):
    """The keys and forms of the authors' files pass. A text that is null counts as no text."""
    sft_rows = [sft_row("<image>\na", image=BLANK, num_tokens=7, row={"num_tokens": 9}),
                sft_row("<video>\na", video=["0.jpg", "1.jpg"]), sft_row("a", image="", video=[""]),
                sft_row("a", turns=turn_pair("a" + TAIL, ANSWERS[0], 1))]  # fmt: skip
    rl_rows = [RL_ROW | {"dataset": "d", "dataset_name": "d", "solution": "<embedding>", "qry_text": None},
               RL_ROW | {"pos_text": None}]  # fmt: skip
    for kind, rows in (("sft", sft_rows), ("rl", rl_rows)):
        path = tmp_path / f"{kind}.json"
        path.write_text(json.dumps(rows))
        assert len(index_rows(path, RowCheck(kind))["spans"]) == len(rows)


@pytest.mark.parametrize("row, found", [
    ({"qry": {"text": "a", "images": ["x.png"]}, "pos": {"text": "b"}}, "a bare pair"),
    ({"qry": "a", "qry_image_path": "x", "pos_text": "b", "pos_image_path": ""}, "a row of MMEB-train"),
    (RL_ROW, "an RL row"), ({"qry": {"conversations": []}, "pos": {"conversations": []}}, "an SFT row"),
])  # fmt: skip
def test_rows_of_another_format_name_the_command(row, found):
    """Bug story: sft.py refused bare pairs key by key, without the command that makes usable rows of them."""
    for kind, wanted, command in (("sft", "an SFT row", ANNOTATE.name), ("rl", "an RL row", RL_SUBSET.name)):
        if found != wanted:
            with pytest.raises(BadInput, match=re.escape(f"f.json, row 0: this is {found}, not {wanted}.")) as error:
                RowCheck(kind)(row, "f.json, row 0")
            assert f"python data.py {command} --pairs" in str(error.value)


@pytest.mark.parametrize("text, images, video, want", [
    ("What does <video> do in HTML?", 0, 0, "What does <video> do in HTML?"),
    ("<image>\nWhat does the <image> tag of SVG do?", 1, 0, "What does the <image> tag of SVG do?"),
    ("<image><image>\nboth", 2, 0, "both"),
    ("first\n<image>\nthen", 1, 0, "first\n\nthen"),
    ("<video>\nIs <video> better than <image>?", 0, 1, "Is <video> better than <image>?"),
    ("<image> and no picture", 0, 0, "<image> and no picture"),
])  # fmt: skip
def test_marks_are_told_from_text(embedder, text, images, video, want):
    """Bug story: every <image> and <video> was deleted from RL and evaluation texts, so questions about HTML lost their
    word. A mark is at the start or alone on a line, and its image exists."""
    item = {"text": text, "images": [picture(0)] * images, "video": [picture(1)] * 2 * video}
    row = encode_input(embedder.tokenizer, item)
    said = embedder.tokenizer.decode(row.ids).split("<|vision_end|>")[-1].split(f"\n{DISC}")[0]
    assert said == want and len(row.grids) == max(1, images + video)


def test_unknown_keys_of_pairs(tmp_path):
    """A misspelt key of a pair would be lost."""
    for query, more in (({"text": "a", "image": "a.png"}, {}), ({"text": "a"}, {"image": "a.png"})):
        (tmp_path / "pairs.jsonl").write_text(json.dumps({"qry": query, "pos": {"text": "b"}} | more))
        with pytest.raises(BadInput, match="pairs.jsonl, row 0.*unknown key 'image'"):
            read_pairs([tmp_path / "pairs.jsonl"])


def test_content_keys_and_stand_ins():
    """Equal targets are no negatives of each other. They are equal if stripped text and normalised paths are, without
    the stand-in images/blank.jpg. Another image of the name blank.jpg is an image."""
    key = content_key("a", ["x/b.png"], ["f/0.png"])
    assert key == content_key(" a\n", ["./x/b.png", "images/blank.jpg"], ["f//0.png"])
    others = [("a.", ["x/b.png"], ["f/0.png"]), ("a", [], ["x/b.png"]), ("a", ["b.png"], ["f/0.png"]),
              ("a", ["x/b.png"], ["0.png"]), ("a", [], [])]  # fmt: skip
    assert key not in {content_key(*other) for other in others} and -(2**63) <= key < 2**63
    given = ("blank.jpg", "./blank.jpg", "images/blank.jpg", "/data/MMEB-train/images/blank.jpg")
    assert all(map(is_stand_in, given))
    assert not any(map(is_stand_in, ("photos/blank.jpg", "images/blank.jpg/a.png", "images/blank.png", "")))
