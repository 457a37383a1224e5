"""Qwen2.5-VL and Qwen3-VL: the equality tests of the other files again, and times in the text, windows, DeepStack."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from conftest import encoded, picture, random_backbone, save_random_model, train_writer

# these take their models from the fixtures below
from test_embed import (  # noqa: F401
    test_bf16_is_close,
    test_embed_reads_the_right_places,
    test_pictures_change_the_answer,
)
from test_model import (  # noqa: F401
    test_a_model_can_be_pickled,
    test_cached_decode_equals_full_forward,
    test_forward_equals_transformers,
    test_gradient_checkpointing_changes_nothing,
    test_norms_equal_transformers,
    test_patch_embedding_equals_the_convolution,
    test_positions_equal_get_rope_index,
    test_precomputed_vision_states,
    test_text_only_micro_batch_gives_the_merger_a_gradient,
    test_the_vision_tower_reads_no_lengths_from_the_device,
)
from test_rl import (  # noqa: F401
    sampled,
    test_packed_rows_equal_plain_rows,
    test_pictures_are_looked_at_once,
    test_rollout_and_update_see_the_same,
    test_update_equals_a_plain_pass,
)
from test_scale import test_gradients_of_two_processes  # noqa: F401
from test_sft import (  # noqa: F401
    test_resume_is_bit_equal,
    test_step_equals_one_plain_pass,
    test_two_processes_equal_one,
)
from test_weights import test_saved_model_in_plain_transformers  # noqa: F401
from transformers import AutoImageProcessor
from transformers.video_utils import VideoMetadata

from data import encode_input, patchify
from model import Embedder
from support.backbones import FAMILIES, FRAME_RATE, add_states, family_of

STEPS = {"qwen2_5_vl": 10, "qwen3_vl": 7}  # of the writer's training: afterwards most answers hold <gen_emb>, not all


@pytest.fixture(scope="module", params=STEPS)
def tiny_dir(request, tmp_path_factory):
    return save_random_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def embedder(tiny_dir):
    return Embedder.from_pretrained(tiny_dir)


@pytest.fixture(scope="module")
def writer_dir(tiny_dir, tmp_path_factory):
    steps = STEPS[Embedder.from_pretrained(tiny_dir).backbone.config.model_type]
    return train_writer(tmp_path_factory.mktemp("writer"), tiny_dir, steps)


@pytest.fixture(scope="module")
def writer(writer_dir):
    return Embedder.from_pretrained(writer_dir)


@pytest.mark.parametrize("num_frames", [1, 2, 4, 5])
def test_text_of_a_video_is_that_of_the_processor(embedder, num_frames):
    """Qwen3-VL writes the mean time before each step of a video, Qwen2.5-VL none."""
    family = embedder.family
    name = family.model_class.replace("ForConditionalGeneration", "Processor")
    processor = object.__new__(getattr(transformers, name))  # to be made it needs torchvision
    processor.video_processor = SimpleNamespace(merge_size=family.merge, temporal_patch_size=family.depth)
    processor.video_token, processor.vision_start_token = "<|video_pad|>", "<|vision_start|>"
    processor.vision_end_token = "<|vision_end|>"
    frames = VideoMetadata(total_num_frames=num_frames, fps=FRAME_RATE, frames_indices=[*range(num_frames)])
    steps = -(-num_frames // family.depth)  # of one token each
    grids = np.array([[steps, family.merge, family.merge]])
    want = processor.replace_video_token({"video_grid_thw": grids, "video_metadata": [frames]}, 0)
    if not family.timestamps:  # it leaves the two tokens around the place of a video to the chat template
        want = f"<|vision_start|>{want}<|vision_end|>"
    item = {"text": "x", "video": [picture(i, 20, 20) for i in range(num_frames)]}
    row = encode_input(embedder.tokenizer, item, family=replace(family, video_pixels=(1, family.token_side**2)))
    text = embedder.tokenizer.decode(row.ids[: row.n_prompt])
    assert text.split("user\n")[1].startswith(f"{want}x\n")
    if family.timestamps and num_frames == 5:
        assert want.count("seconds") == 3 and "<0.2 seconds>" in want and "<2.0 seconds>" in want


@pytest.mark.parametrize("size", [(300, 200), (17, 400), (1, 1)])
def test_patches_of_a_picture_are_those_of_the_processor(writer, writer_dir, size):
    """The image processor of a saved folder makes the same patches and grids."""
    image, (low, high) = picture(3, *size), writer.family.image_pixels
    patches, grid = patchify([image], min_pixels=low, max_pixels=high, family=writer.family)
    processor = AutoImageProcessor.from_pretrained(writer_dir, backend="pil")
    want = processor(image, return_tensors="pt")
    assert torch.equal(patches, want["pixel_values"]) and torch.equal(grid, want["image_grid_thw"][0])


def test_numbers_of_the_families():
    """Every family has the same bounds in tokens. Qwen2.5-VL's positions a second are in config.json."""
    for family in FAMILIES.values():
        for bounds, tokens in ((family.image_pixels, (1, 3009)), (family.video_pixels, (4, 32))):
            assert tuple(pixels // family.token_side**2 for pixels in bounds) == tokens
    config = random_backbone("qwen2_5_vl").config
    assert family_of(config).time_step == 4
    config.vision_config.tokens_per_second = 2
    assert family_of(config) == FAMILIES["qwen2_5_vl"]
    assert family_of(random_backbone("qwen3_vl").config) is FAMILIES["qwen3_vl"]


def test_deepstack_states_are_added_as_by_transformers():
    """Story: with transformers' mask the host waited ten times in each micro-batch of an update on a GPU."""
    language_model = random_backbone("qwen3_vl").model.language_model
    hidden, states = torch.randn(2, 9, 5), torch.randn(4, 5)
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[0, 2:5] = mask[1, 7] = True
    weights, found = torch.randn(2, 9, 5), []
    theirs = language_model._deepstack_process
    for add, where in ((theirs, mask), (add_states, mask), (add_states, torch.tensor([2, 3, 4, 16]))):
        given = hidden.clone().requires_grad_(), states.clone().requires_grad_()
        out = add(given[0], where, given[1])
        found.append((out, *torch.autograd.grad((out * weights).sum(), given)))
    for ours in found[1:]:
        torch.testing.assert_close(ours, found[0], rtol=0, atol=0)


def test_placed_vision_states_are_not_kept(embedder):
    """Story: index_add and index_copy kept (1 + K) fp32 copies, 1.5 GiB of 16 pages in Qwen3-VL."""
    tower, kept = embedder.backbone.model.visual, []
    batch = embedder.pad_rows(encoded(embedder, [{"images": [picture(3)]}]))
    states = torch.randn(len(batch.media_at), len(embedder.family.mergers(tower)) * embedder.width, requires_grad=True)
    tower.requires_grad_(False)  # the states are merged ones, then
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        x, deepstack = embedder.embed_tokens(batch, states)
        for others in deepstack.get("deepstack_visual_embeds", []):
            x = add_states(x, deepstack["visual_pos_masks"], others)
    with pytest.raises(RuntimeError, match="invalid for input of size"):  # one state too many: no silent broadcast
        embedder.embed_tokens(batch, torch.cat([states, states[:1]]))
    tower.requires_grad_(True)
    x.sum().backward()
    assert kept and not any(x.is_floating_point() for x in kept)
    assert (states.grad == 1).all()
    embedder.zero_grad()
