"""CoT annotation by a teacher, its filters, the RL subset and the check of a file."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, changed_copy, on_call, picture, read_log, run_data, run_here, run_processes
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers import PreTrainedTokenizerFast as Fast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import data
import sft
import support.annotate as annotate_file
import support.formats as formats_file
from model import Embedder
from support.annotate import judge, read_pairs, repeated_share, split_answer
from support.files import read_rows, write_rows
from support.formats import DISC, GEN, INSTRUCTION
from support.images import hash_media
from support.program import BadInput, Skip
from support.reasoner import ablate_trace
from support.report import parts_of_answer


def rows_of(path):
    return json.loads(Path(path).read_text())


def as_minimal(pair):
    return {"dataset_name": pair["dataset_name"]} | {
        side: {key: value for key, value in pair[side].items() if value} for side in ("qry", "pos")
    }


def test_four_formats_hold_the_same_pairs(world, tmp_path):
    """SFT, RL, MMEB-train and our own form of the same pairs are read as the same pairs, marks and stand-ins gone. An
    annotated file can be annotated anew: nothing of the old answer or of the prompt's frame is left."""
    pairs = read_pairs([world / "rl.json"])
    assert pairs[1] == {"dataset_name": "one", "qry": {"text": "what 1", "images": ["images/1.png"], "video": []},
                        "pos": {"text": "thing 0", "images": [], "video": []}}  # fmt: skip
    assert pairs[0]["qry"]["video"] == ["images/1.png", "images/2.png"]
    answers = {"qry": ("so", "x"), "pos": ("so", "x")}
    write_rows(tmp_path / "own.jsonl", map(as_minimal, pairs))
    write_rows(tmp_path / "sft.json", (formats_file.sft_row(pair, answers) for pair in pairs))
    write_rows(tmp_path / "rl.jsonl", map(formats_file.rl_row, pairs))
    for name in ("own.jsonl", "sft.json", "rl.jsonl"):
        assert read_pairs([tmp_path / name]) == pairs
    pictures = [pair | {"dataset_name": "OneTask"} for pair in pairs if not pair["qry"]["video"]]
    table = {"qry": [f"<|image_1|>\n{pair['qry']['text']}\n" for pair in pictures],
             "qry_image_path": [pair["qry"]["images"][0] for pair in pictures],
             "pos_text": [pair["pos"]["text"] for pair in pictures], "pos_image_path": [""] * len(pictures),
             "neg_text": [[]] * len(pictures)}  # fmt: skip
    (tmp_path / "OneTask").mkdir()
    pq.write_table(pa.table(table), tmp_path / "OneTask/original.parquet")
    assert read_pairs([tmp_path / "OneTask/original.parquet"]) == pictures
    pairs, rows = read_pairs([world / "sft.json"]), rows_of(world / "sft.json")
    assert len(pairs) == len(rows) == 12
    assert pairs[0]["qry"] == {"text": "what is it", "images": ["images/0.png"], "video": []}
    assert pairs[2]["qry"]["video"] == ["images/2.png", "images/3.png", "images/4.png"]
    assert pairs[0]["pos"] == {"text": "thing 0", "images": [], "video": []}, "blank.jpg stands for no picture"
    assert not re.search(f"<image>|{DISC}|{GEN}|think|summarize", json.dumps(pairs))


@pytest.mark.parametrize("side, message", [
    ({}, "no text and no media"), ({"text": " <image>\n", "images": ["images/blank.jpg"]}, "no text and no media"),
    ({"images": ["a.png"], "video": ["b.png"]}, "both an image and a video"),
    ({"text": "a <|im_end|> b"}, "control token <|im_end|>"), (None, "has no qry_text"),
])  # fmt: skip
def test_a_pair_that_cannot_be_used_is_named_before_the_teacher_starts(side, message, tmp_path):
    """All rows are read before the hours of a teacher. The message names file, row and side."""
    write_rows(tmp_path / "p.json", [{"qry": {"text": "x"}, "pos": {"text": "y"}}, {"qry": side, "pos": {}}])
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_pairs([tmp_path / "p.json"])
    assert "p.json, row 1, qry" in str(error.value)


@pytest.mark.parametrize("text, parts", [
    ("<think>a b</think><answer>c<gen_emb>", ("a b", "c")),  # ours
    ("<think> a</think><answer> c<gen_emb>", (" a", " c")),  # the toy's words begin with a space
    ("<think>\na\nb\n</think>\n\n<answer>c</answer>\n", ("a\nb", "c")),
    ("a</think>c", ("a", "c")),  # the prompt ended in <think>, no answer tag
    ("<think>a</think><answer><|begin_of_box|>c<|end_of_box|></answer>", ("a", "c")),  # GLM-4.1V
    ("<think>a</think>\n<|begin_of_box|>c<|end_of_box|>", ("a", "c")),  # GLM-4.5V
    ("<think>a</think><answer></answer>", ("a", "")), ("<think>a</think>", ("a", "")),
    ("a red star", None), ("<think>a<answer>c</answer>", None), ("<think> \n</think><answer>c</answer>", None),
    ("", None),
])  # fmt: skip
def test_answers_of_several_families_are_read(text, parts):
    assert split_answer(text) == parts


ESSAY = (
    "The picture shows a narrow street in an old town, taken from a low angle on a rainy evening. On the left "
    "there is a bakery whose window is lit, with three loaves and a small handwritten sign. A woman in a green "
    "coat is walking towards us and holds a red umbrella; behind her a child is pulling at her sleeve. The "
    "question asks what the sign says, so I need to look at the window more closely. The letters are partly "
    "hidden by the reflection of a lamp, but the first word seems to be fresh and the second one begins with a b. "
    "Since it stands beside the loaves, bread is the most likely reading. The sign therefore says fresh bread, "
    "and the summary should name it together with the bakery."
)


def test_repetition_is_told_from_prose():
    """Prose and the toy world's lists are low. A loop is high at the end, in the middle and in Chinese."""
    scene = " xa red star yc blue ring zb green cross then xa red star yc blue ring za green cross so zb za"
    assert repeated_share(ESSAY) < 0.05
    assert repeated_share(scene) < 0.2, "says its list twice: a first form of the filter rejected 15 % of such answers"
    loop = "Wait, let me look at the sign again. "
    assert repeated_share(ESSAY + loop * 12) > 0.5 and repeated_share(loop * 12 + ESSAY) > 0.5
    rng = np.random.default_rng(0)
    long = " ".join(f"word{n}" for n in rng.integers(0, 100_000, 4000))
    assert repeated_share(long) < 0.05 < 0.5 < repeated_share(f"{long} {loop * 25} {long}"), "a loop of 3 % of the text"
    assert repeated_share("这是一张图片" * 10) > 0.5 and repeated_share("a" * 5000) > 0.5
    assert repeated_share("red star red star") < 0.1, "too short to tell"
    assert repeated_share("red " * 40) > 0.5 and repeated_share("") == 0


@pytest.mark.parametrize("change, reason", [
    ({}, ""), ({"tokens": 201}, "too long"), ({"ended": False}, "too long"), ({"text": "no form"}, "malformed"),
    ({"text": "<think>a <|image_pad|> b</think>c"}, "stray token"),
    ({"text": "<think>a <gen_emb> b</think>c"}, "stray token"), ({"text": "<think>a</think>b</s>"}, "stray token"),
    ({"text": "<think>a</think><answer>b</think></answer>"}, "stray token"),
    ({"text": "<think>a</think><answer> </answer>"}, "empty summary"),
    ({"text": f"<think>{'so it is red. ' * 20}</think>c"}, "repetition"), ({"error": "a.png: no such file"}, "media"),
])  # fmt: skip
def test_each_filter_has_its_reason(change, reason):
    answer = {"text": f"<think>{ESSAY}</think><answer>fresh bread</answer>", "tokens": 150, "ended": True}
    got, parts = judge(answer | change, max_tokens=200, max_repeat=0.3)
    assert got == reason and (reason or parts == (ESSAY, "fresh bread"))


def annotate_argv(world, out, teacher, *flags, pairs="rl.json"):
    return ["annotate", "--pairs", world / pairs, "--media_root", world, "--teacher", teacher, "--out", out,
            "--batch_size", 2, "--max_new_tokens", 40, *flags]  # fmt: skip


def annotate(*given, **more):
    return run_data(*annotate_argv(*given, **more))


@pytest.fixture(scope="module")
def annotated(world, writer_dir, tmp_path_factory):
    """The RL pairs, annotated in one go by the tiny model that learned to write answers."""
    out = tmp_path_factory.mktemp("annotated") / "sft.json"
    assert annotate(world, out, writer_dir) == 0
    return out


def raw_answers(out):
    files = sorted(Path(f"{out}.answers").glob("answers-*"))
    return {line["key"]: line for path in files for line in read_rows(path)}


def test_an_own_teacher_annotates_each_side_apart(annotated, world, writer):
    """The SFT file has what the model writes for that side alone, in the form that training reads."""
    rows, pairs = rows_of(annotated), read_pairs([world / "rl.json"])
    rejected = read_rows(f"{annotated}.answers/rejected.jsonl")
    assert len(rows) + len(rejected) == len(pairs) and len(rows) >= 6
    lost = {line["row"] for line in rejected}
    good = [pair for i, pair in enumerate(pairs) if i not in lost]
    for row, pair in zip(rows, good):
        for side in ("qry", "pos"):
            human, answer = (turn["value"] for turn in row[side]["conversations"])
            assert human.endswith(f"{pair[side]['text']}\n{DISC}\n{INSTRUCTION}")
            media = {kind: [world / path for path in pair[side][kind]] for kind in ("images", "video")}
            (text,) = writer.embed([{"text": pair[side]["text"]} | media], mode="gen", max_new_tokens=40).texts[0]
            assert answer == text.removesuffix(GEN) + GEN
    report = Path(f"{annotated}.answers/report.txt").read_text()
    assert re.search(r"all +12 +" + re.escape(f"{len(rows) / 12:.1%}"), report) and "tokens of the kept" in report
    paths = {path for pair in pairs for s in ("qry", "pos") for kind in ("images", "video") for path in pair[s][kind]}
    digests = hash_media(paths, world)
    sides = {annotate_file.side_key(s, p[s], digests) for p in pairs for s in ("qry", "pos")}
    assert len(raw_answers(annotated)) == len(sides) == 18


def test_sft_trains_on_what_annotate_writes(annotated, world, tiny_dir, tmp_path, monkeypatch):
    """check finds nothing, the loader skips nothing, and a step has finite losses."""
    assert run_data("check", annotated, "--media_root", world, "--model", tiny_dir, "--workers", 0) == 0
    run_here(sft, ["--model", tiny_dir, "--data", annotated, "--media_root", world, "--steps", 2, "--batch_size", 2,
                   "--workers", 0, "--out", tmp_path / "out"], monkeypatch)  # fmt: skip
    log = read_log(tmp_path / "out")
    assert len(log) == 2 and all(np.isfinite(line["loss"]) and line["skipped"] == 0 for line in log)


@pytest.mark.parametrize("kill", [1, 2, 3])
def test_killed_anywhere_and_resumed_the_output_is_the_same(kill, annotated, world, writer_dir, tmp_path, monkeypatch):
    """Killed in the kill-th call, with a truncated last line: only missing answers are asked again, and the file is
    that of the unbroken run, byte for byte."""
    out, asked, real = tmp_path / "sft.json", [], Embedder.generate

    def counted(self, prompts, **settings):
        asked.append(len(prompts))
        if len(asked) == kill:
            raise KeyboardInterrupt
        return real(self, prompts, **settings)

    monkeypatch.setattr(annotate_file, "OWN_CALL", 2)
    monkeypatch.setattr(Embedder, "generate", counted)
    with pytest.raises(KeyboardInterrupt):
        annotate(world, out, writer_dir)
    assert not out.exists()
    (torn,) = Path(f"{out}.answers").glob("answers-*.jsonl")
    torn.write_bytes(torn.read_bytes()[:-7])
    n_calls, done = 5, max(0, kill - 2)  # 18 sides: 5 kinds of them in calls of 4; a torn line costs its call
    del asked[:]
    kill = None
    assert annotate(world, out, writer_dir) == 0
    assert len(asked) == n_calls - done, asked
    assert out.read_bytes() == annotated.read_bytes()
    for name in ("rejected.jsonl", "report.txt"):
        assert Path(f"{out}.answers", name).read_bytes() == Path(f"{annotated}.answers", name).read_bytes()


def test_two_processes_write_the_same_file(annotated, world, writer_dir, tmp_path):
    out = tmp_path / "sft.json"
    run_processes(data, annotate_argv(world, out, writer_dir))
    assert len(list(Path(f"{out}.answers").glob("answers-*.jsonl"))) == 2, "both have asked"
    assert out.read_bytes() == annotated.read_bytes()
    assert raw_answers(out) == raw_answers(annotated)


def test_filters_run_again_without_the_teacher(annotated, world, writer_dir, tmp_path, monkeypatch):
    """If all answers exist, another filter bound asks nobody, and other questions to the teacher are refused. Bug
    stories: another teacher in the same folder continued the old one's work. An empty file divided by zero."""
    out = tmp_path / "sft.json"
    shutil.copytree(f"{annotated}.answers", f"{out}.answers")
    monkeypatch.setattr(Embedder, "from_pretrained", None)  # would fail if it were loaded
    assert annotate(world, out, writer_dir, "--max_tokens", 3) == 0
    report = Path(f"{out}.answers/report.txt").read_text()
    assert rows_of(out) == [] and re.search(r"all +12 +0.0% +0.0% +100.0%", report)
    refused = annotate(world, out, writer_dir, "--temperature", 1)
    assert "temperature 0.0 -> 1.0" in refused and "another --out" in refused
    changed_copy(writer_dir, tmp_path / "teacher", lambda tensors: tensors["model.norm.weight"].mul_(2))
    settings = Path(f"{out}.answers/settings.json")
    settings.write_text(settings.read_text().replace(str(writer_dir), str(tmp_path / "teacher")))
    assert "content of --teacher" in annotate(world, out, tmp_path / "teacher")
    assert "is one of the files of --pairs" in annotate(world, world / "rl.json", writer_dir)
    (tmp_path / "none.jsonl").write_text("")
    assert "none.jsonl: no rows" in annotate(tmp_path, tmp_path / "none.json", writer_dir, pairs="none.jsonl")


def test_an_unreadable_picture_costs_its_pair_only(world, writer_dir, tmp_path, monkeypatch):
    """A missing image, or one 225 times as wide as high, counts as "media", and the run continues. Bug story: an image
    that could not be read for a moment was "media" for ever."""
    (tmp_path / "images").symlink_to(world / "images")
    picture(0, 900, 4).save(tmp_path / "thin.png")
    paths = ("images/0.png", "no.png", "thin.png")
    pairs = [{"qry": {"text": "what", "images": [path]}, "pos": {"text": "thing"}} for path in paths]
    write_rows(tmp_path / "pairs.json", pairs)
    out = tmp_path / "sft.json"
    assert annotate(tmp_path, out, writer_dir, pairs="pairs.json") == 0
    rejected = read_rows(f"{out}.answers/rejected.jsonl")
    assert [(line["row"], line["reasons"]["qry"]) for line in rejected] == [(1, "media"), (2, "media")]
    assert "no such file" in json.dumps(raw_answers(out)) and len(rows_of(out)) == 1
    out = tmp_path / "disk.json"

    def failing(_, path, *__, **___):
        raise Skip(f"{path}: Input/output error")

    with monkeypatch.context() as patch:
        on_call(annotate_file, "open_image", 1, failing, patch.setattr)
        assert annotate(world, out, writer_dir) == 0
    assert ["error" in answer for answer in raw_answers(out).values()].count(True) == 1
    assert annotate(world, out, writer_dir) == 0
    assert not any("error" in answer for answer in raw_answers(out).values())
    monkeypatch.setattr(Embedder, "from_pretrained", None)  # all is answered: the teacher is not loaded
    assert annotate(world, out, writer_dir) == 0


def test_a_plain_qwen2_vl_is_asked_for_the_form(world, tiny_dir, tmp_path, monkeypatch):
    """A Qwen2-VL that has never seen <gen_emb> gets our question behind the pair's text, once per role."""
    asked, real = [], Embedder.generate

    def spied(self, prompts, **settings):
        asked.extend(self.tokenizer.decode(prompt.row.ids) for prompt in prompts)
        return real(self, prompts, **settings)

    monkeypatch.setattr(Embedder, "generate", spied)
    assert annotate(world, tmp_path / "sft.json", tiny_dir, "--max_new_tokens", 4) == 0
    query = next(prompt for prompt in asked if "what 1\n" in prompt)
    assert "<|image_pad|><|vision_end|>what 1\n\nThis is the query of a search" in query
    assert any("thing 0\n\nThis is the candidate of a search" in prompt for prompt in asked)
    assert not any(GEN in prompt or DISC in prompt for prompt in asked)


GLM = "<think>\nIt glows.\n</think>\n<answer><|begin_of_box|>red<|end_of_box|></answer>"


@pytest.fixture(scope="module")
def llava_dir(tmp_path_factory):
    """A tiny LLaVA, model, processor and picture code from transformers, that learned to answer in GLM-4.1V's form."""
    torch.manual_seed(0)
    plain = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    plain.pre_tokenizer, plain.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = Fast(tokenizer_object=plain, eos_token="</s>", pad_token="<pad>", extra_special_tokens=["<image>"])
    tokenizer.add_tokens(["<think>", "</think>", "<answer>", "</answer>", "<|begin_of_box|>", "<|end_of_box|>"])
    asked = [annotate_file.ASK.format(role=role, what=what) for role, what in annotate_file.ROLES.values()]
    tokenizer.add_tokens([part for text in asked for part in text.split("<think>")])
    template = ("{% for m in messages %}USER: {% for c in m.content %}{{ '<image>' if c.type == 'image' else c.text }}"
                "{% endfor %}{% endfor %}ASSISTANT:")  # fmt: skip
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = LlavaProcessor(pictures, tokenizer, patch_size=14, vision_feature_select_strategy="default",
                               num_additional_image_tokens=1, chat_template=template)  # fmt: skip
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**small, image_size=28, patch_size=14)
    text = LlamaConfig(**small, vocab_size=len(tokenizer), num_key_value_heads=2, bos_token_id=None,
                       eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)  # fmt: skip
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=image_id))
    answer = tokenizer(GLM + "</s>", return_tensors="pt").input_ids[0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(80):
        text = "what is it both of 12 thing 3"[-1 - 7 * step % 29 :]
        question = annotate_file.question({"text": text}, ("qry", "pos")[step % 2])
        ids = tokenizer(f"USER: {question}ASSISTANT:", return_tensors="pt").input_ids[0]
        labels = torch.cat([torch.full_like(ids, -100), answer])[None]
        model(input_ids=torch.cat([ids, answer])[None], labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    path = tmp_path_factory.mktemp("llava")
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def test_another_family_by_its_own_processor(world, llava_dir, tmp_path):
    """AutoProcessor and generate() with images, videos as images and plain text, in batches of any size. The answers
    get our form. --temperature: the same seed gives the same answers, another seed gives others."""
    one, four = tmp_path / "one.json", tmp_path / "four.json"
    for out, size in ((one, 1), (four, 4)):
        assert annotate(world, out, llava_dir, "--batch_size", size, pairs="sft.json") == 0
    assert one.read_bytes() == four.read_bytes()
    rows = rows_of(four)
    assert len(rows) >= 6
    assert {len(row["qry"].get("image", [])) for row in rows} >= {1, 2}
    answers = {row[side]["conversations"][1]["value"] for row in rows for side in ("qry", "pos")}
    assert answers == {f"<think>It glows.</think><answer>red{GEN}"}
    assert any(answer["text"] == GLM for answer in raw_answers(four).values()), "the side file has the raw text"
    raw = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        annotate(world, tmp_path / name, llava_dir, "--temperature", 2, "--seed", seed, "--max_new_tokens", 8)
        raw.append(raw_answers(tmp_path / name))
    assert raw[0] == raw[1] != raw[2]


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is installed")
def test_a_processor_that_needs_torchvision_says_so(writer_dir):
    args = Namespace(teacher=str(writer_dir), temperature=0)
    with pytest.raises(SystemExit, match="pip install torchvision"):
        annotate_file.foreign_teacher(args, torch.device("cpu"))


def test_rl_subset_is_balanced_disjoint_and_seeded(world, tmp_path):
    """One third each of images, videos and documents as far as they reach, with even datasets within, seeded, and
    without the pairs of SFT in any form of file."""
    sizes = {"many": 60, "few": 5, "clips": 40, "vidore_x": 3, "toy doc": 30}
    pairs = []
    for name, n in sizes.items():
        for i in range(n):
            media = {"video": ["a.png", "b.png"]} if name == "clips" else {"images": [f"{name}{i}.png"]}
            pairs.append({"dataset_name": name, "qry": {"text": f"q {name} {i}", **media}, "pos": {"text": f"t {i}"}})
    write_rows(tmp_path / "pairs.json", pairs + pairs[:3])
    answers = {"qry": ("so", "x"), "pos": ("so", "x")}
    first = read_pairs([tmp_path / "pairs.json"])[:30]
    write_rows(tmp_path / "sft.json", (formats_file.sft_row(pair, answers) for pair in first))
    flags = ["--pairs", tmp_path / "pairs.json", "--sft", tmp_path / "sft.json", "--size", 45]
    for out, seed in (("a.json", 0), ("b.json", 0), ("c.json", 1)):
        assert run_data("rl-subset", *flags, "--out", tmp_path / out, "--seed", seed) == 0
    chosen = read_pairs([tmp_path / "a.json"])
    counts = {name: sum(pair["dataset_name"] == name for pair in chosen) for name in sizes}
    assert counts == {"many": 10, "few": 5, "clips": 15, "vidore_x": 3, "toy doc": 12}
    texts = [pair["qry"]["text"] for pair in chosen]
    assert len(set(texts)) == 45 and not set(texts) & {pair["qry"]["text"] for pair in first}
    a, b, c = ((tmp_path / name).read_text() for name in ("a.json", "b.json", "c.json"))
    assert a == b != c
    assert run_data("rl-subset", *flags[:-1], 1000, "--out", tmp_path / "all.json") == 0
    assert len(rows_of(tmp_path / "all.json")) == sum(sizes.values()) - 30, "all that is left, none twice"


def test_check_passes_a_good_file_and_counts_what_is_bad(world, tiny_dir, tmp_path, capsys):
    """Every fault has its name, file and row, with and without workers."""
    rows = rows_of(world / "sft.json")
    good = ["--media_root", world, "--workers", 0]
    for file in ("sft.json", "sft.jsonl", "rl.json"):
        for more in ([], ["--model", tiny_dir]):
            assert run_data("check", world / file, *good, *more) == 0
    table = capsys.readouterr().out
    assert re.search(r"one +6 +50.0% +\d+ +\d+ +2.\d+ +\d +100.0% +0 +0 +0 +0\n", table), table
    assert "skips 0 of 12 rows." in table
    assert run_data("check", world / "rl.json", *good, "--batch_size", 7) == 1
    assert "left out: one has 6 rows, fewer than --batch_size 7\n" in capsys.readouterr().out
    bad = json.loads(json.dumps(rows))
    bad[0]["qry"]["image"] = "images/missing.png"
    (tmp_path / "broken.png").write_bytes((world / "images/0.png").read_bytes()[:300])
    bad[1]["qry"]["image"] = [str(tmp_path / "broken.png"), "images/0.png"]
    bad[3]["qry"]["conversations"][0]["value"] += " word" * 400
    bad[4]["pos"]["conversations"][1]["value"] = "<think>no token</think>"
    bad[10]["qry"]["image"] = "images/0.png"  # its text has two marks
    del bad[6]["pos"]
    bad[7]["qry"]["conversations"][1]["value"] = 7
    write_rows(tmp_path / "bad.json", bad)
    (tmp_path / "images").symlink_to(world / "images")
    flags = ["check", tmp_path / "bad.json", "--media_root", tmp_path, "--model", tiny_dir, "--max_length", 400]
    assert run_data(*flags, "--workers", 0) == 1
    table = capsys.readouterr().out
    assert re.search(r"all +12 .* 4 +2 +1 +0\n", table), table
    assert "skips 3 of 12 rows and does not start before 4 are fixed." in table
    for text in (f"row 0: {tmp_path}/images/missing.png: no such file", f"row 1: {tmp_path}/broken.png: cannot be read",
                 "row 4, pos: no <gen_emb>", "tokens, above --max_length 400", "row 10, qry: the text has 2 <image>",
                 "row 6: an SFT row needs", "row 7, qry: needs"):  # fmt: skip
        assert text in table, (text, table)
    assert run_data(*flags, "--workers", 2) == 1
    assert capsys.readouterr().out == table
    assert run_data("check", tmp_path / "bad.json", "--media_root", tmp_path, "--workers", 0) == 1  # no tokenizer
    assert re.search(r"all +12 .* 4 +1 +0 +0\n", capsys.readouterr().out), "a broken picture is not opened there"


@pytest.mark.slow
def test_the_chain_on_real_pictures(writer_dir, real, tmp_path):
    """The chain of docs/data.md on bare pairs of real images: annotate, filters, check, sft.py. SIGKILL in annotate
    (twice), in check and in sft.py, and a new start each time: same rows, same report, same weights."""
    (block,) = [part for part in (ROOT / "docs/data.md").read_text().split("```")[1::2] if "TEACHER=" in part]
    first, *commands = block.strip().splitlines()
    assert re.fullmatch("PAIRS=.* MEDIA=.* TEACHER=.* OUT=.*", first) and len(commands) == 3, block
    commands[0] = commands[0].replace("--max_new_tokens 128", "--max_new_tokens 50 --batch_size 1")
    commands[2] += f" --steps 6 --batch_size 4 --save_every 2 --cache {tmp_path}"
    write_rows(tmp_path / "pairs.json", map(as_minimal, read_pairs([real / "sft.json"])[::3]))

    def start(out, due=None):
        """Run the chain and return (exit code, what it printed). due: whether it is time to kill the chain."""
        names = f"PAIRS={tmp_path}/pairs.json MEDIA={real} TEACHER={writer_dir} OUT={out}"
        script = "\n".join([names, *commands]).replace("python ", f"{sys.executable} ")
        with open(log, "w") as file:
            to_log = dict(stdout=file, stderr=subprocess.STDOUT)
            child = subprocess.Popen(["bash", "-c", script], cwd=ROOT, start_new_session=True, **to_log)
            while child.poll() is None:
                if due and due():
                    os.killpg(child.pid, signal.SIGKILL)
                time.sleep(0.02)
        return child.returncode, log.read_text()

    whole, killed, log = tmp_path / "whole", tmp_path / "killed", tmp_path / "log"
    code, text = start(whole)
    kept = len(rows_of(whole / "sft.json")) if code == 0 else 0
    assert kept >= 8 and f"skips 0 of {kept} rows" in text, text

    def written(n):  # n runs have left answers
        return len([path for path in killed.glob("sft.json.answers/answers-*") if path.stat().st_size]) >= n

    moments = [lambda: written(1), lambda: written(2), lambda: "check:" in log.read_text(),
               (killed / "sft/checkpoints/step-2/meta.json").exists]  # fmt: skip
    for n, due in enumerate(moments):
        code, text = start(killed, due)
        assert code == -signal.SIGKILL and (killed / "sft.json").exists() == (n > 1), (n, text)
    code, text = start(killed)
    assert code == 0 and "resuming after step" in text, text
    for name in ("sft.json", "sft.json.answers/rejected.jsonl", "sft.json.answers/report.txt", "sft/model.safetensors"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    assert all(np.isfinite(line["loss"]) and not line["skipped"] for line in read_log(whole / "sft"))


def test_answers_belong_to_the_bytes_of_the_media(world, writer_dir, tmp_path, monkeypatch):
    """Bug story (refinebio#2583): with a wrong --media_root every answer was an error, which stayed with the right
    root. Other images under the same names got the answers of the old ones."""
    root, out = tmp_path / "root", tmp_path / "sft.json"
    with monkeypatch.context() as patch:
        patch.setattr(Embedder, "from_pretrained", None)  # the teacher must not be loaded
        with pytest.raises(BadInput, match="4 of 4 media files do not exist.*The teacher was not asked"):
            annotate(world, out, writer_dir, "--media_root", tmp_path / "wrong")
    shutil.copytree(world / "images", root / "images")
    assert annotate(world, out, writer_dir, "--media_root", root) == 0
    first = raw_answers(out)
    assert len(first) == 18 and not any("error" in answer for answer in first.values())
    (root / "images/4.png").rename(tmp_path / "4.png")  # one is missing: an error, then asked
    picture(99).save(root / "images/5.png")  # another image under the same name
    assert annotate(world, out, writer_dir, "--media_root", root) == 0
    second = raw_answers(out)
    assert sum("error" in answer for answer in second.values()) >= 1 and len(second) > len(first)
    (tmp_path / "4.png").rename(root / "images/4.png")
    assert annotate(world, out, writer_dir, "--media_root", root) == 0
    assert raw_answers(out) == second, "the old answers about this image are still there"
    rejected = read_rows(f"{out}.answers/rejected.jsonl")
    assert all(line["reasons"].get("qry") != "media" for line in rejected)


def test_rejected_rows_have_their_answers(tmp_path):
    """Bug story: rejected.jsonl said "malformed" without the answer, so that nobody could see why."""
    pair = {"dataset_name": "m"} | {side: {"text": side, "images": [], "video": []} for side in ("qry", "pos")}
    texts = {"qry": "no form at all", "pos": "<think>so</think><answer>b"}
    lines = [{"key": annotate_file.side_key(side, pair[side], {}), "text": text, "tokens": 4, "ended": True}
             for side, text in texts.items()]  # fmt: skip
    write_rows(tmp_path / "answers-0.jsonl", lines)
    args = Namespace(out=tmp_path / "sft.json", max_tokens=100, max_repeat=0.3)
    annotate_file.filter_answers([pair], tmp_path, {}, args)
    assert read_rows(args.out) == []
    (line,) = read_rows(tmp_path / "rejected.jsonl")
    assert line["reasons"] == {"qry": "malformed"} and line["answers"]["qry"] == lines[0]


PIECES = ("<think>", "</think>", "<answer>", "</answer>", "<gen_emb>", "<|begin_of_box|>", " ", "\n", "\t", "\x1c",
          "\u2003", "a", "b", "<", ">")  # fmt: skip


def ablate_trace_before(texts):
    parts = [re.fullmatch(r"(.*?<think>)(.*?)(</think>.*)", text, re.DOTALL) for text in texts]
    reasonings = [part[2] for part in parts if part]
    ablated = {"removed": texts[:], "swapped": texts[:]}
    following = 0
    for n, part in enumerate(parts):
        if part:
            following += 1
            others = (x for x in reasonings[following:] + reasonings[:following] if x != part[2])
            ablated["removed"][n] = part[1] + part[3]
            ablated["swapped"][n] = part[1] + next(others, part[2]) + part[3]
    return ablated


def test_the_filters_give_what_they_gave():
    """The regular expressions from before give equal results on 20,000 strings made of their parts."""
    split = re.compile(r"(?:<think>)?(.*?)</think>\s*(?:<answer>)?(.*?)(?:<gen_emb>|</answer>|\s)*", re.DOTALL)
    form = re.compile(r"\s*<think>(.*?)</think>\s*<answer>(.*?)(<gen_emb>)?(</answer>)?\s*", re.DOTALL)
    rng = random.Random(0)
    found = 0
    for _ in range(20_000):
        text = "".join(rng.choices(PIECES, k=rng.randrange(10)))
        if rng.random() < 0.5:
            text = f"<think>{text}</think>{rng.choice(PIECES)}<answer>{''.join(rng.choices(PIECES, k=5))}"
        match = split.fullmatch(re.sub(r"<\|(begin|end)_of_box\|>", "", text).strip())
        split_before = match and match[1].strip() and tuple(part.strip("\n") for part in match.groups())
        assert split_answer(text) == (split_before or None), text
        parts = form.fullmatch(text)
        before = {"reasoning": parts[1].strip(), "summary": parts[2].strip()} if parts else {"text": text}
        assert parts_of_answer(text) == before, text
        found += split_answer(text) is not None
    assert found > 3_000
    for _ in range(2_000):
        texts = ["".join(rng.choices(PIECES[:2] + ("a", "b"), k=rng.randrange(6))) for _ in range(rng.randrange(7))]
        assert ablate_trace(texts) == ablate_trace_before(texts), texts


@pytest.mark.parametrize("text", ["<think>a</think><answer>b{}c", "<think>a</think>{}c", "{}c", "<think>{}",
                                  "a{}</think>b"])  # fmt: skip
def test_the_filters_take_linear_time(text):
    """Bug stories: an answer with 32,000 newlines held the filter for 61 seconds, and each of 200,000 equal answers
    looked through all others. With quadratic time, this test takes an hour."""
    for repeated in ("\n", "<think>", "<gen_emb>", "</think>", "</think>\n<think>"):
        for function in (split_answer, parts_of_answer, lambda text: ablate_trace([text])):
            function(text.format(repeated * 200_000))
    got = ablate_trace(["<think>a</think>"] * 200_000 + ["<think>b</think>"])
    assert got["swapped"][:2] == ["<think>b</think>"] * 2 and got["swapped"][-1] == "<think>a</think>"


BLANK = "images/blank.jpg"


def pair(path, target=BLANK):
    return {"dataset_name": "d", "qry": {"text": "what", "images": [path]},
            "pos": {"text": "thing what", "images": [target] if target else []}}  # fmt: skip


@pytest.mark.parametrize("path, target", [
    ("./images/{}.png", BLANK), ("images//{}.png", BLANK), ("images/../images/{}.png", BLANK),
    ("images/{}.png", "MMEB-train/images/blank.jpg"), ("images/{}.png", "./blank.jpg"), ("images/{}.png", ""),
])  # fmt: skip
def test_the_rl_subset_knows_a_path_in_any_spelling(tmp_path, path, target):
    """Bug story: with ./ before the paths, or another folder before images/blank.jpg, all pairs of the SFT file were
    drawn again for RL. The five pairs that are not in it are left. Only the authors' blank image is removed."""
    for name, form, n in (("sft", pair("images/{}.png"), 20), ("pairs", pair(path, target), 25)):
        write_rows(tmp_path / f"{name}.json", [json.loads(json.dumps(form).replace("{}", str(i))) for i in range(n)])
    assert run_data("rl-subset", "--pairs", tmp_path / "pairs.json", "--sft", tmp_path / "sft.json", "--out",
                    tmp_path / "rl.json", "--size", 100) == 0  # fmt: skip
    drawn = read_rows(tmp_path / "rl.json")
    assert sorted(re.search(r"(\d+)\.png", row["qry_image"])[1] for row in drawn) == [str(i) for i in range(20, 25)]
    assert all(row["pos_image"] == "" for row in drawn)
    write_rows(tmp_path / "p.json", [pair("photos/blank.jpg")])
    (got,) = read_pairs([tmp_path / "p.json"])
    assert got["qry"]["images"] == ["photos/blank.jpg"] and got["pos"]["images"] == []
