"""Qwen2.5-VL and Qwen3-VL: the equality tests of the other files again, on tiny random models of these families, and
what only they have: times in the text, windows, DeepStack. The stages on real pictures are marked slow."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, encoded, inputs, picture, save_random_model, train_writer

# these take their models from the fixtures below
from test_model import (  # noqa: F401
    test_bf16_is_close,
    test_cached_decode_equals_full_forward,
    test_embed_reads_the_right_places,
    test_forward_equals_transformers,
    test_gradient_checkpointing_changes_nothing,
    test_norms_equal_transformers,
    test_patch_embedding_equals_the_convolution,
    test_pictures_change_the_answer,
    test_positions_equal_get_rope_index,
    test_precomputed_vision_states,
    test_saved_model_in_plain_transformers,
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
from test_scale import test_fsdp_equals_ddp, test_gradients_of_two_processes, test_rl_in_shards_equals_replicas  # noqa: F401
from test_sft import test_step_equals_one_plain_pass, test_two_processes_equal_one  # noqa: F401
from transformers.video_utils import VideoMetadata

from data import FAMILIES, FRAME_RATE, patchify
from model import Embedder
from support.run import BadInput


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def tiny_dir(request, tmp_path_factory):
    return save_random_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def embedder(tiny_dir):
    return Embedder.from_pretrained(tiny_dir)


@pytest.fixture(scope="module")
def writer_dir(tiny_dir, tmp_path_factory):
    return train_writer(tmp_path_factory.mktemp("writer"), tiny_dir, steps=24)


@pytest.fixture(scope="module")
def writer(writer_dir):
    return Embedder.from_pretrained(writer_dir)
