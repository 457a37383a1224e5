"""What a third hunt through strangers' bug reports found: models, nodes, resumed runs, annotation, files.

Each kind of fault has a test with its story.

    python -m pytest tests/test_faults2.py
"""

import json
import os
import re
import shutil
import stat
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, inputs, picture, read_log, run_here, run_processes
from safetensors.torch import load_file, save_file
from test_annotate import annotate, raw_answers
from test_rl import flags as rl_flags
from test_sft import flags, same_weights, weights

import data
import eval as ev
import rl
import sft
import support.annotate as annotate_file
import support.settings as settings_file
from data import encode, encode_input
from model import Embedder
from support.cache import hash_model, save_shard
from support.check import export_checkpoint
from support.checkpoint import list_checkpoints
from support.files import Rows, write_rows
from support.formats import RowCheck
from support.images import open_image, white_image
from support.program import BadInput, Skip
from support.settings import weights_digest


def edited(source, path, file, change):
    """A copy of a model folder, one of its JSON files changed."""
    shutil.copytree(source, path)
    content = json.loads((path / file).read_text())
    change(content)
    (path / file).write_text(json.dumps(content))
    return path


def scaled_weights(source, path, factor=1.5):
    """The same model with one tensor multiplied."""
    shutil.copytree(source, path, dirs_exist_ok=True)
    tensors = load_file(path / "model.safetensors")
    name = next(name for name in tensors if name.endswith("down_proj.weight"))
    tensors[name] = tensors[name] * factor
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


# ---- models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", ["<|im_end|>", "<|image_pad|>", "<gen_emb>", None])
def test_any_token_may_be_the_pad(writer, writer_dir, tmp_path, pad):
    """Bug story (transformers#27880): the declared pad token was banned from sampling. With <|im_end|> as pad no answer
    could end, and gen fell from 84 to 2 points. With <|image_pad|> padded batches failed. Without a pad token the model
    did not load."""
    path = edited(writer_dir, tmp_path / "model", "tokenizer_config.json", lambda c: c.update(pad_token=pad))
    model = Embedder.from_pretrained(path)
    assert model.banned.tolist() == writer.banned.tolist() and model.end_id not in model.banned
    got, want = (m.embed(inputs(), max_new_tokens=24, samples=3, temperature=1.0) for m in (model, writer))
    assert got.texts == want.texts and got.valid.any()
    assert torch.equal(got.disc, want.disc) and torch.equal(got.gen, want.gen)


def test_dropout_of_a_config_is_off(writer_dir, tmp_path, world, monkeypatch):
    """Bug story (trl#3234): attention_dropout 0.1 in config.json was live in training. The KL of RL's first step was
    439 instead of 0, and SFT's loss depended on --micro_batch."""
    dropout = {"attention_dropout": 0.1}
    model = edited(writer_dir, tmp_path / "model", "config.json", lambda c: c["text_config"].update(dropout))
    run_here(rl, rl_flags(model, world, tmp_path / "rl", steps=1), monkeypatch)
    assert read_log(tmp_path / "rl")[0]["kl"] == 0
    for start, out in ((model, "a"), (writer_dir, "b")):
        run_here(sft, flags(start, world, tmp_path / out), monkeypatch)
    assert read_log(tmp_path / "a") == read_log(tmp_path / "b")
    assert json.loads((tmp_path / "a/config.json").read_text())["text_config"]["attention_dropout"] == 0


@pytest.mark.parametrize("change, message", [
    (lambda c: c.update(quantization_config={"quant_method": "awq", "bits": 4}), r"quantised \(awq\)"),
    (lambda c: c.update(quantization_config={"quant_method": "gptq", "bits": 4}), r"quantised \(gptq\)"),
    (lambda c: c.update(quantization_config={"quant_method": "fp8"}), r"quantised \(fp8\)"),
    (lambda c: c.update(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}), "bitsandbytes"),
    (lambda c: c["text_config"].update(hidden_size="128"), "hidden_size.*expected int, got str"),
    (lambda c: c["text_config"].update(attention_dropout="0.1"), "attention_dropout"),
    (lambda c: c.update(dtype="nope"), "nope"),
    (lambda c: c["text_config"].update(layer_types=["sliding_attention"] * 4), "sliding attention"),
    (lambda c: c["text_config"].update(hidden_act="gelu"), "hidden_act gelu"),
    (lambda c: c["text_config"]["rope_parameters"].update(rope_type="dynamic", factor=2.0), "rope_type dynamic"),
    (lambda c: c["text_config"]["rope_parameters"].update(mrope_section=[6, 6]), r"mrope_section \[6, 6\]"),
])  # fmt: skip
def test_a_config_that_cannot_be_computed(tiny_dir, tmp_path, change, message):
    """Bug story: quantised folders and a number in quotes ended in a traceback; layers with sliding attention were
    decoded as full ones (cosine 0.8 to the plain pass) without a word, and so was another activation as silu."""
    path = edited(tiny_dir, tmp_path / "model", "config.json", change)
    with pytest.raises(BadInput, match=message) as error:
        Embedder.from_pretrained(path)
    assert str(path) in str(error.value)


def test_numbers_of_numpy_are_numbers(writer):
    """Bug story: temperature=np.float32(1) was refused, samples=True accepted, and seed=np.int64(3) drew other samples
    than seed=3."""
    def embed(seed, temperature):
        return writer.embed(["a", "b"], samples=2, seed=seed, temperature=temperature, max_new_tokens=12)

    assert embed(3, 1.0).texts == embed(np.int64(3), np.float32(1)).texts != embed(4, 1.0).texts
    many = {"samples": np.uint32(6), "batch_size": np.uint32(20), "max_new_tokens": np.uint8(12)}
    assert writer.embed(["a"] * 5, temperature=1.0, **many).valid.shape == (5, 6)  # uint32 minus 1 is 4 billion
    for wrong in ({"samples": True}, {"seed": 1.5}, {"seed": -1}, {"temperature": True}, {"max_new_tokens": "8"}):
        with pytest.raises(BadInput, match=next(iter(wrong))):
            writer.embed(["a"], **wrong)


def test_a_tokenizer_that_splits_control_tokens(tiny_dir, tmp_path):
    """Found on the way: "split_special_tokens" ended in a RuntimeError about shapes at the first image. A folder in the
    model's folder, and "return_dict": false, do no harm."""
    (edited(tiny_dir, tmp_path / "good", "config.json", lambda c: c.update(return_dict=False)) / "tokenizer").mkdir()
    weights_digest(tmp_path / "good")
    Embedder.from_pretrained(tmp_path / "good").embed(["a"], mode="disc")
    path = edited(tiny_dir, tmp_path / "model", "tokenizer_config.json", lambda c: c.update(split_special_tokens=True))
    with pytest.raises(BadInput, match="splits control tokens such as <|image_pad|>".replace("|", r"\|")):
        Embedder.from_pretrained(path)


# ---- nodes and ranks ---------------------------------------------------------------------------------------------


def nodes_of_their_own(tmp_path):
    """before(rank) for run_processes: rank 1 is the only one of a second node and works in a folder of its own."""

    def before(rank):
        os.environ["LOCAL_RANK"] = "0"
        (tmp_path / str(rank)).mkdir(exist_ok=True)
        os.chdir(tmp_path / str(rank))

    return before


def test_annotate_on_nodes_with_other_pairs(writer_dir, world, tmp_path, capfd):
    """The same for annotate: it ended in a KeyError, because each rank hashes its share of its own list of files."""
    own = nodes_of_their_own(tmp_path)

    def before(rank):
        own(rank)
        rows = json.loads((world / "rl.json").read_text())
        (tmp_path / f"{rank}/pairs.json").write_text(json.dumps(rows[rank:]))

    argv = ["annotate", "--pairs", "pairs.json", "--media_root", world, "--teacher", writer_dir, "--out",
            tmp_path / "sft.json"]  # fmt: skip
    run_processes(data, argv, codes=1, before=before)
    assert "differs from rank 0" in (told := capfd.readouterr().err) and "content of --pairs" in told


@pytest.mark.parametrize("differs", ["data", "model", "flag"])
def test_nodes_must_have_the_same(writer_dir, world, tmp_path, capfd, differs):
    """Bug story (Megatron-LM#907): a node with the same rows in another order, or with other weights, trained on: the
    loss was another, each node had its own reference, and with --fsdp the models were mixed."""
    for rank in (0, 1):
        shutil.copytree(writer_dir, tmp_path / f"{rank}/model")
        rows = json.loads((world / "rl.json").read_text())
        (tmp_path / f"{rank}/rl.json").write_text(json.dumps(rows[::-1] if rank and differs == "data" else rows))
    if differs == "model":
        scaled_weights(writer_dir, tmp_path / "1/model")
    own = nodes_of_their_own(tmp_path)

    def before(rank):
        own(rank)
        if rank and differs == "flag":
            real = rl.parse_args
            rl.parse_args = lambda *given: real(*given, [*argv_text, "--lr", "0.5"])

    argv = rl_flags("model", world, tmp_path / "out", data="rl.json", steps=1)
    argv_text = [str(x) for x in argv]
    run_processes(rl, argv, codes=1, before=before)
    told = capfd.readouterr().err
    wrong = {"data": "content of --data", "model": "content of --model", "flag": "lr 0.001 -> 0.5"}[differs]
    assert f"rank 1 on {os.uname().nodename} differs from rank 0" in told and wrong in told
    assert not (tmp_path / "out/args.json").exists()


def test_nodes_with_other_commits_of_a_hub_id(world, tmp_path, monkeypatch):
    """The same for a hub id: its identity is the commit that the node has cached."""
    digests = []
    for commit in ("aaa", "bbb"):
        config = f"/cache/snapshots/{commit}/config.json"
        monkeypatch.setattr(settings_file, "cached_file", lambda *_, config=config: config)
        digests.append(weights_digest("org/model"))
    assert digests == ["aaa", "bbb"]


def test_all_ranks_wait_for_the_toy_world(tiny_dir, world, tmp_path):
    """Bug story: at the toy's first start on two nodes the second one did not wait and found no sft.json."""
    out = tmp_path / "toy/sft.json"

    def write(folder, seed):
        time.sleep(1)
        folder.mkdir()
        shutil.copy(world / "sft.json", out)

    def before(rank):
        os.environ["LOCAL_RANK"] = "0"
        sft.PRESETS["toy"]["data"] = [str(out)]
        sft.write_toy = write

    run_processes(sft, flags(tiny_dir, world, tmp_path / "out", data=out, steps=1), before=before)
    assert len(read_log(tmp_path / "out")) == 1


# ---- a run's folder ----------------------------------------------------------------------------------------------


def test_a_refused_command_changes_nothing(tiny_dir, world, tmp_path, monkeypatch):
    """Bug story (noether#220): --resume none deleted the checkpoints before the command was found unusable, and the
    original command then trained again over the model; a refused resume left its own settings in args.json."""
    out = tmp_path / "out"
    run_here(sft, flags(tiny_dir, world, out, steps=2, save_every=1), monkeypatch)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != ".lock"}
    broken = shutil.copytree(tiny_dir, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"x")

    def refuse(error, **more):
        with pytest.raises(error):
            run_here(sft, flags(tiny_dir, world, out, steps=2, save_every=1, **more), monkeypatch)
        assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != ".lock"}

    refuse(BadInput, batch_size=8, resume="none")  # no dataset fills it
    refuse(BadInput, model=broken, resume="none")
    refuse(BadInput, data=tmp_path / "gone.json", resume="none")
    refuse(SystemExit, batch_size=6)
    refuse(SystemExit, batch_size=6, resume=out / "checkpoints/step-1")
    run_processes(sft, flags(tiny_dir, world, out, steps=2, batch_size=3, resume="none"), codes=1)
    refuse(BadInput, resume=tmp_path / "nothing")


def test_going_back_to_a_last_step(tiny_dir, world, tmp_path, monkeypatch):
    """Found by a reviewer: --resume of step 1 with --steps 1 has no step to do. It left the later checkpoints, from
    which the next command went on."""
    run_here(sft, flags(tiny_dir, world, tmp_path, steps=3, save_every=1, keep=3), monkeypatch)
    run_here(sft, flags(tiny_dir, world, tmp_path, steps=1, resume=tmp_path / "checkpoints/step-1"), monkeypatch)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [1] and len(read_log(tmp_path)) == 1


def test_the_last_step_is_a_checkpoint(tiny_dir, world, tmp_path, monkeypatch):
    """Bug story: a run shorter than --save_every left no checkpoint, so that it could not be extended or exported. Now
    it is extended, with the weights of a run of this length."""
    run_here(sft, flags(tiny_dir, world, tmp_path / "a", steps=2, lr=1e-4), monkeypatch)
    assert [step for step, _ in list_checkpoints(tmp_path / "a")] == [2]
    export_checkpoint(tmp_path / "a/checkpoints/step-2", tmp_path / "exported")
    settings_file.HELD.clear()
    assert same_weights(weights(tmp_path / "a"), weights(tmp_path / "exported"))
    with pytest.raises(BadInput, match="is a model folder, not a checkpoint"):
        export_checkpoint(tmp_path / "a", tmp_path / "b")
    for wrong in ("a/checkpoints/step-9", "a/checkpoints"):
        with pytest.raises(FileNotFoundError, match="Complete checkpoints near it: .*a/checkpoints/step-2"):
            export_checkpoint(tmp_path / wrong, tmp_path / "b")


def test_files_have_the_mode_of_the_umask(tiny_dir, world, tmp_path, monkeypatch):
    """Bug story: safetensors creates files that only their owner can read, whatever the umask. A colleague got "No such
    file" for a finished model."""
    before = os.umask(0o027)
    try:
        run_here(sft, flags(tiny_dir, world, tmp_path, steps=1), monkeypatch)
        save_shard(tmp_path, [("k", "", np.zeros(2), np.zeros((1, 2)), np.ones(1, bool), [1], ["x"])], 1.0)
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(path.suffix == ".safetensors" for path in files) == 3
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o640}


def test_a_run_that_learns_nothing_says_so(tiny_dir, world, tmp_path, monkeypatch, capsys):
    """Bug story: with equal targets and --w_ce 0 no pair has a negative: loss and gradient are exactly 0, and the run
    ended as "saved"."""
    rows = json.loads((world / "sft.json").read_text())
    for row in rows:
        row["pos"] = rows[0]["pos"]
    write_rows(tmp_path / "same.json", rows)
    argv = flags(tiny_dir, world, tmp_path / "out", data=tmp_path / "same.json", w_ce=0, steps=11)
    run_here(sft, argv, monkeypatch)
    told = capsys.readouterr().err
    assert "step 1: the gradient is exactly 0 (1 such steps" in told and "step 10: the gradient is exactly 0" in told
    assert told.count("the gradient is exactly 0") == 2
    run_here(sft, flags(tiny_dir, world, tmp_path / "good", steps=1), monkeypatch)
    assert "the gradient is exactly 0" not in capsys.readouterr().err


def test_a_data_file_that_changes_during_a_run(tmp_path):
    """Bug story: a file rewritten in place ended the run in a JSONDecodeError, or gave other rows without a word."""
    for new in ('[{"a": 1}, {"b": 9}]', "[]", '[{"a": 10}, {"b": 2}]'):
        (tmp_path / "rows.json").write_text('[{"a": 1}, {"b": 2}]')
        rows = Rows([tmp_path / "rows.json"])
        assert rows[1][1] == {"b": 2}
        (tmp_path / "rows.json").write_text(new)
        os.utime(tmp_path / "rows.json", (0, time.time() + 5))
        with pytest.raises(BadInput, match="rows.json has changed since the run began"):
            rows[1]


# ---- what an evaluation reads ------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json", "special_tokens_map.json", "vocab.json"])
def test_every_file_of_the_model_is_in_its_digest(tiny_dir, tmp_path, file):
    """Bug story (mindmeld#358): after tokenizer_config.json had changed, the evaluation embedded nothing and printed
    the old scores."""
    path = shutil.copytree(tiny_dir, tmp_path / "model")
    before = weights_digest(path), hash_model(path, torch.device("cpu"))
    (path / "log.jsonl").write_text("{}")  # no part of the model
    assert weights_digest(path) == before[0]
    (path / file).write_text(((path / file).read_text() if (path / file).exists() else "{}") + "\n")
    assert weights_digest(path) != before[0] and hash_model(path, torch.device("cpu")) != before[1]


def write_text_task(root):
    task = {"modality": "image", "group": "mine", "eval_type": "global", "main_metric": "hit@1",
            "queries": [{"input": {"text": "find red"}, "labels": ["red"]}],
            "candidates": {word: {"text": word} for word in ("red", "blue")}}  # fmt: skip
    (root / "tasks/test").mkdir(parents=True)
    (root / "tasks/test/mine.json").write_text(json.dumps(task))


def test_a_changed_tokenizer_config_is_embedded_again(writer_dir, tmp_path):
    """The same through eval.py: the second run embeds everything again, a third one nothing."""
    write_text_task(tmp_path)
    model = shutil.copytree(writer_dir, tmp_path / "model")

    def encoded():
        ev.main(["--model", str(model), "--root", str(tmp_path), "--out", str(tmp_path / "out"), "--workers", "0",
                 "--samples", "0", "--max_new_tokens", "8", "--report_queries", "0"])  # fmt: skip
        settings_file.HELD.clear()
        return json.loads((tmp_path / "out/model/scores.json").read_text())["encoded"]["greedy"]

    assert encoded() == 3 and encoded() == 0
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 4096}))
    assert encoded() == 3 and encoded() == 0


@pytest.mark.parametrize("blank", [True, False])
def test_an_exported_input_is_what_the_model_reads(writer, tmp_path, blank):
    """Bug story (vllm#33167): the exported text inputs had no image, but the model reads a blank one there: on a server
    28 points in place of 84. Media and prompt of the file give the ids and patches that the evaluation encodes."""
    write_text_task(tmp_path)
    file = tmp_path / "inputs.jsonl"
    ev.main(["--root", str(tmp_path), "--export", str(file), "--blank_image", str(blank)])
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["text"] for row in rows] == ["find red", "red", "blue"]
    for row in rows:
        user = {"text": "<image>" * len(row["images"]) + row["prompt"], "images": row["images"], "video": row["video"]}
        want = encode_input(writer.tokenizer, {"text": row["text"]}, blank_image=blank)
        assert encode(writer.tokenizer, user).content == want.content
    if blank:
        assert open_image(rows[0]["images"][0]).tobytes() == white_image().tobytes()


def test_the_search_snippet_follows_the_images(writer_dir, tmp_path, monkeypatch, capsys):
    """Bug story: docs/data.md's index kept the zero vector of a truncated image after its repair and the old vector of
    a replaced one, and did not tell how many images have no <gen_emb>."""
    page = (ROOT / "docs/data.md").read_text()
    code = next(block for block in page.split("```python\n")[1:] if "path_of" in block).split("```")[0]
    code = code.replace('"runs/2b/rl"', repr(str(writer_dir))).replace('device="cuda", dtype=torch.bfloat16', "")
    code = code.replace("=512", "=24")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()

    def search():
        exec(code, {})  # noqa: S102
        return capsys.readouterr().out

    for n in range(3):
        picture(n).save(tmp_path / f"pictures/{n}.png")
    whole = (tmp_path / "pictures/0.png").read_bytes()
    (tmp_path / "pictures/0.png").write_bytes(whole[:200])
    with pytest.warns(UserWarning, match="0.png"):
        first = search()
    valid = Embedder.from_pretrained(writer_dir).embed([picture(1), picture(2)], max_new_tokens=24).valid
    assert f"3 new images: 1 unreadable, {2 - int(valid.sum())} without <gen_emb>" in first
    (tmp_path / "pictures/0.png").write_bytes(whole)
    picture(7).save(tmp_path / "pictures/2.png")
    again = search()
    assert "2 new images: 0 unreadable" in again and "0.png" in again
    assert "0 new images" in search()


# ---- annotation --------------------------------------------------------------------------------------------------


def test_answers_belong_to_the_bytes_of_the_media(world, writer_dir, tmp_path, monkeypatch):
    """Bug story (refinebio#2583): with a wrong --media_root every answer was an error that the right root then kept,
    and other images under the same names got the answers of the old ones."""
    root, out = tmp_path / "root", tmp_path / "sft.json"
    with monkeypatch.context() as patch:
        patch.setattr(Embedder, "from_pretrained", None)  # the teacher must not be loaded
        with pytest.raises(BadInput, match="4 of 4 media files of --pairs are missing.*The teacher was not asked"):
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
    rejected = [json.loads(line) for line in (tmp_path / "sft.json.answers/rejected.jsonl").read_text().splitlines()]
    assert all(line["reasons"].get("qry") != "media" for line in rejected)


def test_an_error_of_the_disk_is_asked_again(world, writer_dir, tmp_path, monkeypatch):
    """An image that could not be read for a moment was "media" for ever. One that is broken is not asked again."""
    real, calls = annotate_file.open_image, []

    def flaky(path, *given, **more):
        calls.append(path)
        if len(calls) == 1:
            raise Skip(f"{path}: Input/output error")
        return real(path, *given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(annotate_file, "open_image", flaky)
        assert annotate(world, tmp_path / "sft.json", writer_dir) == 0
    errors = [key for key, answer in raw_answers(tmp_path / "sft.json").items() if "error" in answer]
    assert len(errors) == 1
    assert annotate(world, tmp_path / "sft.json", writer_dir) == 0
    assert not any("error" in answer for answer in raw_answers(tmp_path / "sft.json").values())
    monkeypatch.setattr(Embedder, "from_pretrained", None)  # all is answered: the teacher is not loaded
    assert annotate(world, tmp_path / "sft.json", writer_dir) == 0


def test_rejected_rows_have_their_answers(tmp_path):
    """Bug story: rejected.jsonl said "malformed" without the answer, so that nobody could see why."""
    pair = {"dataset_name": "m", "qry": {"text": "a", "images": [], "video": []},
            "pos": {"text": "b", "images": [], "video": []}}  # fmt: skip
    write_rows(tmp_path / "pairs.json", [pair])
    answers = {"qry": {"text": "no form at all", "tokens": 4, "ended": True},
               "pos": {"text": "<think>so</think><answer>b", "tokens": 4, "ended": True}}  # fmt: skip
    lines = [{"key": annotate_file.side_key(side, pair[side], {}), **answer} for side, answer in answers.items()]
    write_rows(tmp_path / "answers-0.jsonl", lines)
    passed = annotate_file.Filter(annotate_file.find_answers(tmp_path), {}, 100, 0.3)
    with open(tmp_path / "rejected.jsonl", "w") as file:
        assert list(passed.kept_rows([pair], file)) == []
    (line,) = (json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines())
    assert line["reasons"] == {"qry": "malformed"} and line["answers"]["qry"] == lines[0]


@pytest.mark.parametrize("row, found", [
    ({"qry": {"text": "a", "images": ["x.png"]}, "pos": {"text": "b"}}, "a bare pair"),
    ({"qry": "a", "qry_image_path": "x", "pos_text": "b", "pos_image_path": ""}, "a row of MMEB-train"),
    ({"qry_text": "a", "qry_image": "", "qry_video": [""], "pos_text": "b", "pos_image": "", "pos_video": [""]},
     "an RL row"),
    ({"qry": {"conversations": []}, "pos": {"conversations": []}}, "an SFT row"),
])  # fmt: skip
def test_rows_of_another_format_name_the_command(row, found):
    """Bug story: bare pairs given to sft.py were refused key by key; what makes usable rows of them was not said."""
    for kind, wanted, command in (("sft", "an SFT row", "annotate"), ("rl", "an RL row", "rl-subset")):
        if found != wanted:
            with pytest.raises(BadInput, match=re.escape(f"f.json, row 0: this is {found}, not {wanted}.")) as error:
                RowCheck(kind)(row, "f.json, row 0")
            assert f"python data.py {command} --pairs" in str(error.value)


def test_the_commands_of_the_message_exist():
    assert {annotate_file.ANNOTATE.name, annotate_file.RL_SUBSET.name} == {"annotate", "rl-subset"}
