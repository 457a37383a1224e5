"""The two seams, a family of backbones and a reward, and the direction of the imports."""

import ast
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import CLOSE, ROOT, encoded, inputs, read_log, rl_flags, run_here, transformers_forward
from test_model import everything
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

import reward
import rl
from data import encode_input, patchify
from model import Embedder
from support.backbones import QWEN2_VL
from support.images import white_image
from support.program import BadInput


@pytest.fixture(scope="module")
def other(embedder):
    """A Qwen2-VL with other patches, merges and means, which the Embedder knows only from its record."""
    config = Qwen2VLConfig.from_dict(embedder.backbone.config.to_dict())
    config.vision_config.patch_size = 12
    config.vision_config.spatial_merge_size = 3
    torch.manual_seed(0)
    model = Embedder(Qwen2VLForConditionalGeneration(config).eval(), embedder.tokenizer)
    model.family = replace(QWEN2_VL, patch=12, merge=3, mean=(0.5, 0.5, 0.5), std=(0.4, 0.5, 0.6),
                           image_pixels=(1_296, 200_000), video_pixels=(5_184, 40_000))  # fmt: skip
    return model


@torch.no_grad()
def test_everything_that_differs_stands_in_the_record(other):
    """States of such a model are those of transformers: no number of Qwen2-VL is used outside its record."""
    rows = encoded(other, inputs())
    assert rows[1].patches.shape[1] == 3 * 2 * 12 * 12
    want = [F.normalize(hidden, dim=-1) for hidden, _ in transformers_forward(other, rows)]
    for (embeddings, _), states in zip(everything(other, rows), want):
        torch.testing.assert_close(embeddings, states, **CLOSE)
    other.share_vision(rows, 2)
    torch.testing.assert_close(everything(other, rows)[1][0], want[1], **CLOSE)
    emb = other.embed(inputs(), mode="both", max_new_tokens=3, batch_size=2)
    assert emb.disc.isfinite().all() and not emb.skipped


def test_the_blank_picture_of_another_family(other):
    """It has the family's size: one token. Without it DDP would wait for the vision gradient of a text-only pass."""
    rows = encoded(other, inputs()[:1])
    everything(other, rows)[0][0].sum().backward()
    assert not any(p.grad is None for p in other.backbone.model.visual.merger.parameters())
    other.zero_grad()
    for family in (QWEN2_VL, other.family):
        low, high = family.image_pixels
        _, grid = patchify([white_image()], min_pixels=low, max_pixels=high, family=family)
        assert grid.tolist() == [1, family.merge, family.merge]
        row = encode_input(other.tokenizer, {"text": "a"}, family=family)
        assert (row.ids == other.media_ids[0]).sum() == 1


def test_no_number_of_the_vision_side_outside_of_the_record():
    """14, 28, 392 and 1176 stand in the record (and in words) only."""
    numbers = {14, 28, 392, 1176}
    for path in [*ROOT.glob("*.py"), *ROOT.glob("support/*.py")]:
        if path.name == "backbones.py":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and type(n.value) is int} & numbers
        if path.name == "images.py":  # BLANK_SIZE, of the published files
            found -= {28}
        assert not found, (path.name, found)


def test_total_is_the_weighted_sum(monkeypatch):
    """A reward of weight 0 is not added, not even as NaN. Bug story: one of shape [P] was broadcast silently."""
    g = torch.Generator().manual_seed(0)
    own, other = torch.randn(2, 3, 4, generator=g), torch.randn(2, 3, 4, generator=g)
    texts = [["<think></think><answer><gen_emb>", "", "x"], ["", "<think></think><answer>a<gen_emb>", "y"]]
    weights = {"format": 2.0, "embedding": 0.5, "share": 0.0, "gap": 0.0}
    total, parts = reward.total_reward(weights, texts, own, other)
    form = torch.tensor([[1.0, 0, 0], [0, 1, 0]])
    torch.testing.assert_close(parts["format"], form)
    torch.testing.assert_close(parts["embedding"], reward.embedding_reward(own, other))
    torch.testing.assert_close(parts["embedding"], parts["share"] * parts["gap"])
    torch.testing.assert_close(total, 2 * form + 0.5 * reward.embedding_reward(own, other))
    monkeypatch.setitem(reward.REWARDS, "broken", lambda texts, own, *_: torch.full(own.shape[:2], float("nan")))
    assert torch.equal(reward.total_reward(weights | {"broken": 0.0}, texts, own, other)[0], total)
    monkeypatch.setitem(reward.REWARDS, "flat", lambda texts, own, *_: torch.ones(len(own)))
    with pytest.raises(ValueError, match="the reward flat has shape"):
        reward.total_reward({"flat": 1.0}, [["", ""]] * 2, torch.ones(2, 2, 3), torch.ones(2, 2, 3))


def test_a_new_reward_is_one_function_and_one_line(writer_dir, world, tmp_path, monkeypatch):
    """rl.py trains with it by its name; the log has it for each side, and the total counts it."""
    brevity = lambda texts, *_: torch.tensor([[-len(text) / 100 for text in group] for group in texts])  # noqa: E731
    monkeypatch.setitem(reward.REWARDS, "brevity", brevity)
    argv = rl_flags(writer_dir, world, tmp_path, steps=2)
    run_here(rl, [*argv, "--reward_weights", "embedding=0", "brevity=2"], monkeypatch)
    for line in read_log(tmp_path):
        assert line["brevity_query"] < 0 and "embedding_query" in line
        for side in ("query", "target"):
            want = line[f"format_{side}"] + 2 * line[f"brevity_{side}"]
            assert line[f"reward_{side}"] == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("given, says", [
    (["fromat=1"], "format, embedding"), (["format"], "no number"), (["format=x"], "no number"),
    (["format=nan"], "finite"), (["format=1", "format=2"], "once"), (["format=0", "embedding=0"], "all weights are 0"),
])  # fmt: skip
def test_reward_weights_that_make_no_sense(given, says):
    with pytest.raises(BadInput, match=re.escape(says)):
        rl.parse_weights(given)


RUNNING = ("program", "files", "distributed", "settings", "checkpoint", "loop")  # each may import those before it
BELOW = {name: set(RUNNING[:n]) for n, name in enumerate(RUNNING)} | {
    "reward": set(), "decode": set(), "backbones": set(), "formats": {*RUNNING},
    "images": {*RUNNING, "backbones"}, "data": {*RUNNING, "backbones", "images", "formats"},
    "head": set(), "passes": {*RUNNING}, "weights": {*RUNNING, "backbones", "formats"},
    "model": {*RUNNING, "backbones", "images", "formats", "weights", "data", "decode", "head", "passes"},
}  # fmt: skip
EVALUATION = ("mmeb", "tasks", "cache", "reasoner", "report")  # each may import those before it
STAGES = {"sft", "rl", "eval"}


def imported(path):
    """Our own modules that a file imports: {name: whether at its top}."""
    names = {p.stem for p in [*ROOT.glob("*.py"), *ROOT.glob("support/*.py")]}
    tree, found = ast.parse(path.read_text(encoding="utf-8")), {}
    for node in ast.walk(tree):
        name = (getattr(node, "module", None) or "").removeprefix("support.")
        if isinstance(node, ast.ImportFrom) and name in names:
            found[name] = node in tree.body
        if isinstance(node, ast.Import):
            ours = [alias.name for alias in node.names if alias.name in names or alias.name.startswith("support.")]
            assert not ours, f"{path}: write from X import Y"
    return found


def test_imports_run_one_way():
    """Imports run from the stages down to running and reward. Only data.py's commands import upwards."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("support/*.py")]:
        found = imported(path)
        top = {name for name, at_top in found.items() if at_top}
        assert not found.keys() & STAGES, f"{path.name} imports a stage"
        if path.stem in BELOW:
            assert top <= BELOW[path.stem], path.name
        elif path.stem not in STAGES:
            carriers = set(EVALUATION[: EVALUATION.index(path.stem)]) if path.stem in EVALUATION else set()
            assert top <= {"model", *BELOW["model"], *carriers} - {"decode"}, path.name
        if path.stem != "data":
            assert top == found.keys(), f"{path.name} hides an import in a function"
