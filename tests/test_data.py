"""data.py: prompts and labels against the chat template, rows of files, batches, and unreadable input."""

import json
import os
import struct
import threading
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TAIL, picture, turn_pair

import support.images as images_file
from data import BatchOrder, PairData, encode, encode_input, patchify, step_loader
from support import toy
from support.files import read_rows
from support.formats import DISC, GEN, as_list
from support.images import normalise
from support.program import BadInput

# Qwen2-VL-Instruct's published chat template
TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}"
    "<|im_end|>\n{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in "
    "content or "
    "'image_url' in content %}{% set image_count.value = image_count.value + 1 %}{% if add_vision_id %}Picture "
    "{{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>{% elif content['type'] == 'video' "
    "or 'video' in content %}{% set video_count.value = video_count.value + 1 %}{% if add_vision_id %}Video "
    "{{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content %}"
    "{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "<|im_start|>assistant\n{% endif %}"
)

ANSWER = f"<think>why</think><answer>a star{GEN}"


@pytest.fixture(scope="module")
def tokenizer(embedder):
    return embedder.tokenizer


def as_item(text, images=(), video=()):
    return {"text": text, "images": list(images), "video": list(video)}


@pytest.mark.parametrize("template", ["saved", "published"])
def test_prompt_equals_the_chat_template(tokenizer, template):
    """The tokens are those of apply_chat_template with each pad repeated, for the saved and the published template."""
    chat = None if template == "saved" else TEMPLATE
    for item in ({"text": " a star\n"}, {"text": "x", "images": [picture(0), picture(1, 30, 90)]},
                 {"video": [picture(2)] * 3}):  # fmt: skip
        n_images, n_video = len(item.get("images", [])), int("video" in item)
        parts = [{"type": "image"}] * n_images + [{"type": "video"}] * n_video
        parts += [{"type": "text", "text": item.get("text", "").strip() + TAIL}]
        turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": ANSWER}]
        as_text = dict(tokenize=False, chat_template=chat)
        prompt = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, **as_text)
        whole = tokenizer.apply_chat_template(turns, **as_text).removesuffix("\n")
        assert whole.startswith(prompt)
        row = encode_input(tokenizer, item, ANSWER, blank_image=False)
        for pad in ("<|image_pad|>", "<|video_pad|>"):
            for grid in row.grids if pad in whole else []:
                whole = whole.replace(pad, "<pad>" * (int(grid.prod()) // 4), 1)
            whole = whole.replace("<pad>", pad)
        assert tokenizer.decode(row.ids) == whole
        assert row.ids.tolist() == tokenizer(whole).input_ids
        assert tokenizer.decode(row.ids[row.n_prompt :]) == ANSWER + "<|im_end|>"
        assert encode_input(tokenizer, item, blank_image=False).ids.tolist() == row.ids[: row.n_prompt].tolist()


def test_the_form_of_the_files_is_kept(tokenizer):
    """An SFT row's human text stays unchanged. Eval and RL texts are stripped, and their marks are removed."""
    pictures = [picture(0, 28, 28), picture(1, 56, 28)]
    row = encode(tokenizer, as_item(f"<image>\nfirst <image> last {TAIL}", pictures), ANSWER, name="x")
    one = "<|vision_start|><|image_pad|><|vision_end|>"
    want = f"{one}\nfirst {one.replace('<|image_pad|>', '<|image_pad|>' * 2)} last {TAIL}"
    assert tokenizer.decode(row.ids).split("<|im_start|>user\n")[1].split("<|im_end|>")[0] == want
    row = encode_input(tokenizer, {"text": "<image>\n a star \n", "images": [picture(0, 28, 28)]})
    want = f"{one}a star{TAIL}<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(row.ids).split("<|im_start|>user\n")[1] == want


def test_label_split(tokenizer):
    """By hand: labels begin after "assistant\\n" and have <|im_end|>. Only their <gen_emb> counts, and the last one."""
    t = tokenizer.convert_tokens_to_ids
    for answer, count in ((ANSWER, 1), (f"{GEN}<think>b{GEN}</think><answer>c{GEN} d", 3)):
        row = encode(tokenizer, as_item(f"a red star{TAIL}"), answer, name="x")
        prompt, labels = row.ids[: row.n_prompt].tolist(), row.ids[row.n_prompt :].tolist()
        assert tokenizer.decode(prompt[-3:]) == "<|im_start|>assistant\n"
        assert tokenizer.decode(labels) == answer + "<|im_end|>" and labels[-1] == t("<|im_end|>")
        assert labels.count(t(GEN)) == count and prompt.count(t(GEN)) == 1
        assert prompt.count(t(DISC)) == 1 and row.disc_at == prompt.index(t(DISC))
        assert row.gen_at == row.n_prompt + len(labels) - 1 - labels[::-1].index(t(GEN))
    bare = encode(tokenizer, as_item(f"a{TAIL}"), "no tag", name="x")
    assert bare.gen_at == -1  # the prompt's <gen_emb> does not count
    assert encode(tokenizer, as_item("a"), GEN, name="x").disc_at == -1


@pytest.mark.parametrize("human, images, video", [
    ("<image>", 0, 1), ("<image><image>", 1, 0), ("none", 1, 0), ("<video><video>", 0, 1), ("<image><video>", 1, 0),
])  # fmt: skip
def test_marks_must_equal_media(tokenizer, human, images, video):
    """Text and media that do not fit together name the row and both counts."""
    with pytest.raises(BadInput, match="f.json, row 7, qry.*marks for"):
        encode(tokenizer, as_item(human, [picture()] * images, [picture()] * video), name="f.json, row 7, qry")
    row = encode(tokenizer, as_item("the <image> element"), name="x")  # without any media it is text
    assert "the <image> element" in tokenizer.decode(row.ids) and len(row.grids) == 0


@pytest.mark.parametrize("token", ["<|im_end|>", "<|im_start|>", "<|image_pad|>", "<|vision_start|>"])
def test_control_tokens_in_the_text_are_refused(tokenizer, token):
    """A control token in a text would forge turns or images. The message names row and token."""
    for human, answer in ((f"a{token}b", ANSWER), ("a", f"<think>{token}{GEN}")):
        with pytest.raises(ValueError, match="row 3.*im|row 3.*vision"):
            encode(tokenizer, as_item(human), answer, name="f.json, row 3")


def pairs_of(path, tokenizer, kind="sft", **more):
    rows = read_rows(path)
    one = PairData([path], tokenizer, kind=kind, batch_size=1, seed=0, root=path.parent, **more)
    return [one[i] for i in range(len(rows))]


def write(path, rows):
    path.write_text(json.dumps(rows))
    return path


def sft_row(human="x", media=None, answer=ANSWER, style=0, name="a"):
    side = {**(media or {}), "conversations": turn_pair(human + TAIL, answer, style)}
    return {"dataset_name": name, "qry": side, "pos": {"conversations": turn_pair("y" + TAIL, ANSWER, style)}}


def test_every_variant_of_an_sft_side(tokenizer, tmp_path):
    """Image string, lists, videos, blank.jpg, no media, both key styles: the right images and tokens."""
    for k in range(3):
        picture(k, 56, 56).save(tmp_path / f"{k}.png")
    (tmp_path / "there").mkdir()
    picture(5, 84, 84).save(tmp_path / "there/blank.jpg")
    cases = [
        ("<image>\nx", {"image": "0.png"}, [[1, 4, 4]]),
        ("<image>\nx", {"image": ["1.png"]}, [[1, 4, 4]]),
        ("<image><image><image>\nx", {"image": ["0.png", "1.png", "2.png"]}, [[1, 4, 4]] * 3),
        ("<video>\nx", {"video": ["0.png", "1.png", "2.png"]}, [[2, 4, 4]]),
        ("<video>\nx", {"video": "2.png"}, [[1, 4, 4]]),
        ("<image>\nx", {"image": "images/blank.jpg"}, [[1, 2, 2]]),
        ("<image>\nx", {"image": "there/blank.jpg"}, [[1, 6, 6]]),
        ("x", {}, []), ("x", {"image": ""}, []), ("x", {"image": [], "video": None}, []), ("x", {"image": [""]}, []),
    ]  # fmt: skip
    rows = [sft_row(human, media, style=style) for human, media, _ in cases for style in (0, 1)]
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows) + "\n")
    a, b = pairs_of(write(tmp_path / "a.json", rows), tokenizer), pairs_of(tmp_path / "a.jsonl", tokenizer)
    for n, (x, y) in enumerate(zip(a, b)):
        assert x.ok and y.ok, x.reason + y.reason
        assert x.query.grids.tolist() == cases[n // 2][2] and len(x.target.grids) == 0
        n_pads = np.isin(x.query.ids, tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])).sum()
        assert n_pads == x.query.grids.prod(1).sum() // 4
        assert x.query.ids.tolist() == y.query.ids.tolist() and np.array_equal(x.query.patches, y.query.patches)
        assert x.query.gen_at > x.query.n_prompt > x.query.disc_at > 0
    assert len({pair.target_key for pair in a}) == 1
    first = normalise(torch.from_numpy(a[4].query.patches)).view(3, 16, 1176)
    for k in range(3):  # several pictures keep their order
        assert torch.equal(first[k], patchify([picture(k, 56, 56)], min_pixels=784, max_pixels=10**6)[0])


def test_every_variant_of_an_rl_side(tokenizer, tmp_path):
    """Empty strings and lists, None, a path, a list: the published spellings, with the blank image or without it."""
    picture(0, 56, 56).save(tmp_path / "0.png")
    empty = {"text": " t ", "image": "", "video": [""]}
    sides = [
        (empty, []), (empty | {"image": [""], "video": ""}, []), (empty | {"image": None, "video": None}, []),
        (empty | {"image": [], "video": []}, []), (empty | {"image": "0.png"}, [[1, 4, 4]]),
        (empty | {"image": ["0.png", "0.png"]}, [[1, 4, 4]] * 2), (empty | {"video": ["0.png"] * 3}, [[2, 4, 4]]),
        (empty | {"text": "<image>\nt", "image": "0.png"}, [[1, 4, 4]]), (empty | {"text": ""}, []),
    ]  # fmt: skip
    rows = [{"dataset": "d", "dataset_name": "a", "solution": "<embedding>"}
            | {f"{s}_{k}": v for s in ("qry", "pos") for k, v in side.items()} for side, _ in sides]  # fmt: skip
    path = write(tmp_path / "rl.json", rows)
    for blank in (True, False):
        for pair, (side, grids) in zip(pairs_of(path, tokenizer, "rl", needs=[DISC], blank_image=blank), sides):
            assert pair.ok, pair.reason
            for row in (pair.query, pair.target):
                assert row.grids.tolist() == (grids or ([[1, 2, 2]] if blank else []))
                assert row.n_prompt == len(row.ids) and row.gen_at == -1
                user = tokenizer.decode(row.ids).split("<|im_start|>user\n")[1].split("<|im_end|>")[0]
                assert user.rpartition("<|vision_end|>")[2] == side["text"].replace("<image>", "").strip() + TAIL
    assert as_list("") == as_list([""]) == as_list(None) == [] and as_list("a") == ["a"]


@pytest.mark.parametrize("kind, length", [("sft", 192), ("rl", 96)])
def test_real_files_load(tokenizer, real, kind, length):
    """Every row of the small real files is a usable pair. .json and .jsonl have the same rows."""
    assert read_rows(real / "sft.jsonl") == read_rows(real / "sft.json")
    pairs = pairs_of(real / f"{kind}.json", tokenizer, kind, needs=[DISC, GEN] if kind == "sft" else [DISC])
    assert len(pairs) == length
    for pair in pairs:
        assert pair.ok, pair.reason
        for row in (pair.query, pair.target):
            assert row.disc_at > 0 and (row.gen_at > 0) == (kind == "sft")
            assert len(row.patches) == row.grids.prod(1).sum() and row.positions.shape == (3, len(row.ids))


NAMES = ["a"] * 23 + ["b"] * 9 + ["c"] * 3 + ["a"] * 4  # a 27, b 9, c 3


def test_batches_hold_one_dataset_and_no_row_twice():
    """Bug story: a small dataset filled a batch with the same rows again, as each other's negatives."""
    order = BatchOrder(NAMES, 4, seed=1)
    assert order.left_out == "c 3"
    for step in range(200):
        batch = order[step].tolist()
        assert len(set(batch)) == 4 and len({NAMES[i] for i in batch}) == 1 and NAMES[batch[0]] != "c"
    with pytest.raises(ValueError, match="batch of 28.*a 27.*b 9"):  # an endless search once
        BatchOrder(NAMES, 28, 0)


@pytest.mark.parametrize("batch_size", [2, 4, 5, 9])
def test_an_epoch_sees_every_row_at_most_once(batch_size):
    """Each dataset gives as many batches as it fills. Other rows are left over in another epoch."""
    order = BatchOrder(NAMES, batch_size, seed=0)
    left = []
    for epoch in range(6):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        batches = [order[step].tolist() for step in steps]
        seen = Counter(i for batch in batches for i in batch)
        assert set(seen.values()) == {1} and all(len(batch) == batch_size for batch in batches)
        per_dataset = Counter(NAMES[batch[0]] for batch in batches)
        assert per_dataset == {name: n // batch_size for name, n in (("a", 27), ("b", 9), ("c", 3)) if n >= batch_size}
        left.append({i for i, name in enumerate(NAMES) if name == "a"} - seen.keys())
    assert all(len(rows) == 27 % batch_size for rows in left)
    if 27 % batch_size:
        assert len(set(map(frozenset, left))) > 1


def test_order_is_a_function_of_the_seed():
    """The same seed gives the same batches in any order of asking. Another seed and another epoch give others."""

    def batches(seed, steps):
        order = BatchOrder(NAMES, 4, seed)
        return [order[step].tolist() for step in steps]

    first, late = batches(0, range(38)), (37, 5, 0, 36)
    assert batches(0, late) == [first[step] for step in late]
    assert first[:9] != batches(1, range(9)) and first[:9] != first[9:18]
    datasets = [NAMES[batch[0]] for batch in first[:30]]
    assert datasets != sorted(datasets)  # the datasets are mixed


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_do_not_depend_on_the_number_of_processes(world, tokenizer, workers):
    """Rank r of w gets rows r, r + w, .. of the one global batch, with background workers too."""
    args = dict(kind="sft", batch_size=4, seed=0, root=world)
    alone = PairData([world / "sft.json"], tokenizer, **args)
    for w in (1,) if workers else (1, 2, 4):
        parts = [PairData([world / "sft.json"], tokenizer, rank=r, world=w, **args) for r in range(w)]
        loaders = [iter(step_loader(part, range(2, 4), workers)) for part in parts]
        for step in (2, 3):
            shares = [next(loader) for loader in loaders]
            together = [shares[j % w][j // w] for j in range(4)]
            for pair, i in zip(together, alone.order[step]):
                want = alone[i]
                assert pair.name == want.name and pair.target_key == want.target_key
                assert np.array_equal(pair.query.ids, want.query.ids)
                assert np.array_equal(pair.query.patches, want.query.patches)
    with pytest.raises(ValueError, match="batch_size 4.*world size 3"):
        PairData([world / "sft.json"], tokenizer, world=3, **args)


def test_workers_are_forked_by_the_main_thread(world, tokenizer, monkeypatch):
    """Linux ends a worker with the thread that forked it, and a fetching thread lives for one step."""
    data, forks = PairData([world / "sft.json"], tokenizer, kind="sft", batch_size=4, seed=0, root=world), []
    monkeypatch.setattr(os, "fork", lambda fork=os.fork: (forks.append(threading.current_thread()), fork())[1])
    loader = step_loader(data, range(6), 2)
    names = [[pair.name for pair in pairs] for pairs in loader]
    assert forks == [threading.main_thread()] * 2
    assert names == [[pair.name for pair in pairs] for pairs in step_loader(data, range(6), 0)]


def one_pair(tmp_path, tokenizer, row, **more):
    return pairs_of(write(tmp_path / "bad.json", [row]), tokenizer, **more)[0]


def test_unreadable_pictures_are_skipped(tokenizer, tmp_path, monkeypatch):
    """The pair is skipped with a reason and the path, and its stand-in rows are short and complete."""
    root = tmp_path / "media"
    root.mkdir()
    picture(0, 200, 200).save(tmp_path / "outside.png")
    picture(0, 200, 200).save(root / "big.png")
    for kind in ("png", "jpg"):
        picture(0, 90, 90).save(root / f"whole.{kind}")
        content = (root / f"whole.{kind}").read_bytes()
        (root / f"cut.{kind}").write_bytes(content[: len(content) // 2])
    (root / "text.png").write_text("no picture")
    (root / "empty.png").write_text("")
    monkeypatch.setattr(images_file, "MAX_DECODED", 20_000)
    cases = [("gone.png", "no such file"), ("cut.png", "cannot be read"), ("cut.jpg", "cannot be read"),
             ("text.png", "cannot be read"), ("empty.png", "cannot be read"), (".", "cannot be read"),
             ("big.png", "200 x 200"), ("../outside.png", "leaves --media_root"),
             (str(tmp_path / "outside.png"), "leaves --media_root")]  # fmt: skip
    for name, reason in cases:
        rows = [sft_row("<image>", {"image": image}) for image in (name, "whole.png")]
        bad, good = pairs_of(write(root / "bad.json", rows), tokenizer)
        assert not bad.ok and good.ok, name
        assert reason in bad.reason and Path(root, name).name in bad.reason and "bad.json, row 0" in bad.name
        for row in (bad.query, bad.target):
            assert len(row.ids) < 40 and row.disc_at > 0 and row.gen_at > row.n_prompt and len(row.patches) == 0


def test_decompression_bomb_is_a_skip(tokenizer, tmp_path):
    """Bug story: PIL raises its own DecompressionBombError before our bound, so one header ended the run."""

    def chunk(tag, body):
        return struct.pack(">I", len(body)) + tag + body + struct.pack(">I", zlib.crc32(tag + body))

    for side in (14_000, 20_000, 60_000):  # 196 million pixels (PIL's limit), 400 million, 3.6 billion
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
        body = chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
        (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + body)
        pair = one_pair(tmp_path, tokenizer, sft_row("<image>", {"image": "bomb.png"}))
        assert not pair.ok and "bomb.png" in pair.reason


def test_long_rows_are_skipped_not_cut(tokenizer, tmp_path):
    """A row above --max_length is skipped, because cutting it would drop <gen_emb>."""
    row = sft_row("word " * 50)
    length = len(one_pair(tmp_path, tokenizer, row).query.ids)
    assert one_pair(tmp_path, tokenizer, row, max_length=length).ok
    pair = one_pair(tmp_path, tokenizer, row, max_length=length - 1)
    assert not pair.ok and f"{length} tokens" in pair.reason and "bad.json, row 0" in pair.reason


def test_the_toys_video_is_one_move():
    """Two scenes differ by one object that moves to an empty cell next to it. No negative is right."""
    rng = np.random.default_rng(0)
    for _ in range(100):
        query, target, negatives = toy.video_example(rng, "train")
        before, after = query.media
        (start,) = [i for i in range(9) if before[i] and not after[i]]
        (end,) = [i for i in range(9) if after[i] and not before[i]]
        assert before[start] == after[end] and end in [toy.beside(start, step) for step in toy.STEPS]
        assert query.answer == target.answer == f" {before[start]} {toy.PLACES[end]}"
        assert query.think.endswith(f" so{query.answer}") and query.think.count(" none") == 2
        words = query.think.split()
        assert sum(place in words for place in toy.PLACES) == 4
        texts = {negative.text for negative in negatives}
        assert len(texts) == 17 and target.text not in texts
