"""Model folders: the right weights or a message, the two tokens, every file in the digest, plain transformers."""

import json
import shutil
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ANSWERS, CLOSE, changed_copy, flags, inputs, read_log, rl_flags, run_here, transformers_forward
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

import rl
import sft
import support.settings as settings_file
from data import encode_input
from model import Embedder
from support.cache import hash_model
from support.formats import DISC, GEN
from support.program import BadInput
from support.settings import weights_digest


@pytest.mark.parametrize("file, change, message", [
    ("tokenizer.json", lambda content: content.replace(b"<|image_pad|>", b"<|picture_pad|>"),
     "its tokenizer is not the model's"),
    ("tokenizer.json", lambda _: None, "its tokenizer is not the model's|cannot be loaded"),
    ("model.safetensors", lambda content: content[:-100], "cannot be loaded"),
    ("adapter_model.safetensors", lambda _: b"", "holds an adapter.*merge_and_unload"),
])  # fmt: skip
def test_broken_model_folders(writer_dir, tmp_path, file, change, message):
    """Bug story: transformers makes an empty tokenizer for a missing one, so all texts were equal."""
    path = shutil.copytree(writer_dir, tmp_path / "m") / file
    content = change(path.read_bytes() if path.exists() else b"")
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(BadInput, match=message) as error:
        Embedder.from_pretrained(tmp_path / "m")
    assert str(tmp_path / "m") in str(error.value)


def test_keys_of_transformers_4(writer, writer_dir, tmp_path):
    """transformers 4 reads other names. Our folder has both, and loading and saving again changes nothing."""
    config, tokenizer, pictures = (json.loads((writer_dir / f"{name}.json").read_text())
                                   for name in ("config", "tokenizer_config", "preprocessor_config"))  # fmt: skip
    text = config["text_config"]
    assert text["rope_theta"] == text["rope_parameters"]["rope_theta"]
    assert text["rope_scaling"]["mrope_section"] == text["rope_parameters"]["mrope_section"]
    assert text["tie_word_embeddings"] is config["tie_word_embeddings"] is True
    assert "<|vision_start|>" in tokenizer["additional_special_tokens"] and "extra_special_tokens" not in tokenizer
    assert (pictures["min_pixels"], pictures["max_pixels"]) == (784, 2_359_296)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = Qwen2VLForConditionalGeneration.from_pretrained(writer_dir).eval()
        again = Embedder.from_pretrained(writer_dir)
        again.save_pretrained(tmp_path)
    ids = writer.tokenizer("<think>a red star</think><answer>star<gen_emb>", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, writer.backbone(input_ids=ids).logits)
    special = AutoTokenizer.from_pretrained(writer_dir).all_special_tokens
    assert special == writer.tokenizer.all_special_tokens and len(special) > 3
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json", "generation_config.json"):
        assert json.loads((tmp_path / name).read_text()) == json.loads((writer_dir / name).read_text()), name


@pytest.mark.parametrize("pad", ["<|im_end|>", "<|image_pad|>", "<gen_emb>", None])
def test_any_token_may_be_the_pad(writer, writer_dir, tmp_path, pad):
    """Bug story (transformers#27880): the pad token was banned, so with <|im_end|> as pad no answer could end."""
    path = changed_copy(writer_dir, tmp_path / "model", lambda c: c.update(pad_token=pad), "tokenizer_config.json")
    model = Embedder.from_pretrained(path)
    assert model.banned.tolist() == writer.banned.tolist() and model.end_id not in model.banned
    got, want = (m.embed(inputs(), max_new_tokens=24, samples=3, temperature=1.0) for m in (model, writer))
    assert got.texts == want.texts and got.valid.any()
    assert torch.equal(got.disc, want.disc) and torch.equal(got.gen, want.gen)


def test_dropout_of_a_config_is_off(writer_dir, tmp_path, world, monkeypatch):
    """Bug story (trl#3234): attention_dropout of config.json was live. The KL of RL's first step was 439."""
    with_dropout = lambda c: c["text_config"].update(attention_dropout=0.1)  # noqa: E731
    model = changed_copy(writer_dir, tmp_path / "model", with_dropout, "config.json")
    run_here(rl, rl_flags(model, world, tmp_path / "rl", steps=1), monkeypatch)
    assert read_log(tmp_path / "rl")[0]["kl"] == 0
    for start, out in ((model, "a"), (writer_dir, "b")):
        run_here(sft, flags(start, world, tmp_path / out, steps=1), monkeypatch)
    assert read_log(tmp_path / "a") == read_log(tmp_path / "b")
    assert json.loads((tmp_path / "a/config.json").read_text())["text_config"]["attention_dropout"] == 0


CONFIGS = [
    (lambda c: c.update(model_type="qwen2"), "family qwen2 is .* qwen2_vl, qwen2_5_vl, qwen3_vl. .*FAMILIES in"),
    (lambda c: c["vision_config"].update(spatial_merge_size=1), r"its patch sizes \(14, 2, 1\)"),
    (lambda c: c["vision_config"].update(depth=1), "does not have 12 tensors of the files: model.visual.blocks"),
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
]
LACKS = "m: 1 tensors .* missing or have another shape: .*"
TENSORS = [
    (lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.weight"), f"{LACKS}layers.0.mlp.up_proj.weight"),
    (lambda tensors: tensors.pop("visual.merger.ln_q.weight"), f"{LACKS}visual.merger.ln_q.weight"),
    (lambda tensors: tensors.update({"model.norm.weight": torch.ones(7)}), f"{LACKS}language_model.norm.weight"),
]
SPLITS = (lambda c: c.update(split_special_tokens=True), r"splits control tokens such as <\|image_pad\|>")


@pytest.mark.parametrize("file, change, message", [
    *[("config.json", *case) for case in CONFIGS], *[("model.safetensors", *case) for case in TENSORS],
    ("tokenizer_config.json", *SPLITS),
])  # fmt: skip
def test_a_model_that_cannot_be_computed(tiny_dir, tmp_path, file, change, message):
    """Bug stories: missing tensors were random numbers, sliding attention ran as full, all without a word."""
    path = changed_copy(tiny_dir, tmp_path / "m", change, file)
    with pytest.raises(BadInput, match=f"(?s){message}") as error:
        Embedder.from_pretrained(path)
    assert str(path) in str(error.value)


def test_what_does_no_harm_in_a_folder(tiny_dir, tmp_path):
    """A folder in the model's folder, and "return_dict": false. A folder without config.json is an error."""
    good = changed_copy(tiny_dir, tmp_path / "good", lambda c: c.update(return_dict=False), "config.json")
    (good / "tokenizer").mkdir()
    weights_digest(good)
    Embedder.from_pretrained(good).embed(["a"], mode="disc")
    with pytest.raises(FileNotFoundError, match="config.json"):
        Embedder.from_pretrained(tmp_path)


def test_nodes_with_other_commits_of_a_hub_id(world, tmp_path, monkeypatch):
    """The identity of a hub id is the commit that the node has cached."""
    for commit in ("aaa", "bbb"):
        config = f"/cache/snapshots/{commit}/config.json"
        monkeypatch.setattr(settings_file, "cached_file", lambda *_, config=config: config)
        assert weights_digest("org/model") == commit


@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json", "special_tokens_map.json", "vocab.json"])
def test_every_file_of_the_model_is_in_its_digest(tiny_dir, tmp_path, file):
    """Bug story (mindmeld#358): with another tokenizer_config.json the evaluation printed the old scores."""
    path = shutil.copytree(tiny_dir, tmp_path / "model")
    before = weights_digest(path), hash_model(path, torch.device("cpu"))
    (path / "log.jsonl").write_text("{}")  # no part of the model
    assert weights_digest(path) == before[0]
    (path / file).write_text(((path / file).read_text() if (path / file).exists() else "{}") + "\n")
    assert weights_digest(path) != before[0] and hash_model(path, torch.device("cpu")) != before[1]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("room", [True, False])
def test_token_rows(tiny_dir, tmp_path, tied, room):
    """<gen_emb>, <disc_emb> get the next two ids and copied rows, tied or not, with and without free rows."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_dir)
    old = len(tokenizer)
    assert GEN not in tokenizer.get_vocab() and DISC not in tokenizer.get_vocab()
    config = Qwen2VLConfig.from_pretrained(tiny_dir)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = tied
    config.text_config.vocab_size = old + 5 if room else old
    torch.manual_seed(0)
    base = Qwen2VLForConditionalGeneration(config)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = Embedder.from_pretrained(tmp_path / "base")
    assert (model.gen_id, model.disc_id) == (old, old + 1) and len(model.tokenizer) == old + 2
    end, start = tokenizer.convert_tokens_to_ids(["<|object_ref_end|>", "<|object_ref_start|>"])
    matrices = [(model.backbone.get_input_embeddings().weight, base.get_input_embeddings().weight),
                (model.backbone.lm_head.weight, base.lm_head.weight)]  # fmt: skip
    assert (matrices[0][0] is matrices[1][0]) == tied
    for new, before in matrices:
        assert torch.equal(new[[old, old + 1]], before[[end, start]]) and not torch.equal(before[end], before[start])
        assert torch.equal(new[:old], before[:old]) and len(new) == (old + 5 if room else old + 2)
    assert tied == torch.equal(matrices[0][0], matrices[1][0])
    model.save_pretrained(tmp_path / "saved")
    again = Embedder.from_pretrained(tmp_path / "saved")
    assert again.backbone.config.text_config.vocab_size == len(matrices[0][0])
    for (name, a), (other, b) in zip(model.state_dict().items(), again.state_dict().items()):
        assert name == other and torch.equal(a, b), name


def test_a_model_with_the_tokens_is_left_as_it_is(tiny_dir, tmp_path):
    """Bug story: a second initialisation would reset both trained rows. Each token is one ordinary token."""
    model = Embedder.from_pretrained(tiny_dir)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.01)
    model.save_pretrained(tmp_path)
    again = Embedder.from_pretrained(tmp_path)
    assert (len(again.tokenizer), again.gen_id, again.disc_id) == (len(model.tokenizer), model.gen_id, model.disc_id)
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values()):
        assert torch.equal(a, b), name
    ids = model.tokenizer(f"a{GEN}b{DISC}c").input_ids
    assert ids.count(model.gen_id) == 1 and ids.count(model.disc_id) == 1
    assert model.tokenizer.decode(ids, skip_special_tokens=True) == f"a{GEN}b{DISC}c"


@torch.no_grad()
def test_saved_model_in_plain_transformers(writer, writer_dir):
    """Plain transformers loads the folder with all its settings and gives the same embeddings."""
    backbone = AutoModelForImageTextToText.from_pretrained(writer_dir)
    tokenizer = AutoTokenizer.from_pretrained(writer_dir)
    plain = SimpleNamespace(backbone=backbone, tokenizer=tokenizer, family=writer.family)
    got = writer.embed(inputs(), traces=[ANSWERS[0]] * 5, blank_image=False)
    for n, item in enumerate(inputs()):
        row = encode_input(tokenizer, item, ANSWERS[0], blank_image=False, family=writer.family)
        hidden, _ = transformers_forward(plain, [row])[0]
        states, places = F.normalize(hidden, dim=-1), row.ids.tolist()
        at = len(places) - 1 - places[::-1].index(tokenizer.convert_tokens_to_ids(GEN))
        torch.testing.assert_close(states[at], got.gen[n, 0], **CLOSE)
        torch.testing.assert_close(states[places.index(tokenizer.convert_tokens_to_ids(DISC))], got.disc[n], **CLOSE)
    files = {path.name for path in writer_dir.iterdir()}
    assert files >= {"config.json", "model.safetensors", "preprocessor_config.json", "generation_config.json"}
    assert "chat_template" in "".join(files) or "chat_template" in (writer_dir / "tokenizer_config.json").read_text()
    turns = [{"role": "user", "content": "x"}]
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("x<|im_end|>\n<|im_start|>assistant\n")
    assert json.loads((writer_dir / "generation_config.json").read_text())["eos_token_id"] == writer.end_id
    size = AutoImageProcessor.from_pretrained(writer_dir, backend="pil").size
    assert (size["shortest_edge"], size["longest_edge"]) == writer.family.image_pixels
