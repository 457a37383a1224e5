"""The families of backbones: one record holds all differences between Qwen2-VL, Qwen2.5-VL and Qwen3-VL.

Three things are outside the records. The families share the protocol's chat form (Qwen2-VL's, with its system turn) and
the control tokens. Embedder replaces parts of a loaded model (model.py, 1.). The decode step is written for the layers
of Qwen2 and Qwen3 (support/decode.py).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

FRAME_RATE = 2  # assumed frames per second, as in qwen-vl-utils; a list of frames carries no timing


@dataclass(frozen=True)
class Family:
    """One family of backbones. To add a family, write its functions and its entry of FAMILIES below.

    A patch is `patch` x `patch` pixels of `depth` frames; `merge` x `merge` patches become one token of the language
    model. grid: (t, h, w) of an image or video, in patches. A video has one time step per `depth` frames. K: the number
    of first layers of the language model that get extra vision states (DeepStack); 0 in most families.
    """

    model_class: str  # the class in transformers
    image_processor: str  # the class in transformers; its settings are saved with the weights, for other tools
    patch: int  # pixels
    depth: int  # frames
    merge: int  # patches
    mean: tuple  # of the three channels, in 0..1
    std: tuple
    image_pixels: tuple  # minimum and maximum pixels of an image
    video_pixels: tuple  # the same for one frame of a video
    image_pad: str  # the token whose embeddings are replaced by an image's states
    video_pad: str
    time_step: int  # rotary positions from one time step of a video to the next
    timestamps: bool  # if True, each time step has its own run of pads, after its time; if False, one run
    vision_layout: Callable  # (vision tower, grids, device) -> the tower's arguments that depend only on the grids
    vision_states: Callable  # (tower, pixels, layout, merged) -> [n, (1 + K) D_vit]; merged: [n / merge^2, (1 + K) D]
    mergers: Callable  # (tower) -> its 1 + K mergers, which the paper trains in SFT

    @property
    def token_side(self):
        """Return the side of a visual token in pixels. Images are resized to multiples of it."""
        return self.patch * self.merge

    @property
    def patch_values(self):
        """Return the number of values in a patch: 3 channels x depth frames x patch x patch pixels."""
        return 3 * self.depth * self.patch**2

    def in_tokens(self, grid):
        """Convert a grid in patches to tokens of the language model."""
        t, h, w = (int(n) for n in grid)
        return t, h // self.merge, w // self.merge


def plain_layout(tower, grids, device, **more):
    """Return the layout that transformers' vision towers otherwise derive from the grids, as their keyword arguments.
    We compute it on the CPU. On the GPU, every layer would wait to read the lengths. more: also sent to the device."""
    more = {"position_ids": get_vision_position_ids(grids, tower.spatial_merge_size), **more}  # [n, 2]
    return {
        "grid_thw": grids,  # [m, 3]
        "cu_seqlens": get_vision_cu_seqlens(grids),  # each frame's first patch; on the CPU, where attention reads it
        **dict(zip(more, to_device(device, *more.values()))),
    }


def to_device(device, *tensors):
    """Move the tensors to the device in one transfer of their bytes, because every transfer synchronises.
    Pass tensors with wide dtypes first, because a value must begin at a multiple of its size."""
    flat = torch.cat([x.flatten().view(torch.uint8) for x in tensors]).to(device)
    parts = flat.split([x.nbytes for x in tensors])
    return [part.view(x.dtype).view(x.shape) for x, part in zip(tensors, parts)]


def window_layout(tower, grids, device):
    """Return Qwen2.5-VL's layout: most layers attend to windows of 8 x 8 patches, and tokens are sorted by window."""
    index, cu_window_seqlens = get_vision_window_index(
        grids, tower.spatial_merge_size, tower.window_size, tower.patch_size
    )
    layout = plain_layout(tower, grids, device, window_index=index)
    return layout | {"cu_window_seqlens": cu_window_seqlens}


def interpolated_layout(tower, grids, device):
    """Return Qwen3-VL's layout: next to rotary positions it has a learned table, interpolated over each image."""
    index, weights = get_vision_interpolation_indices_and_weights(
        grids, tower.num_grid_per_side, tower.interpolation_mode, tower.interpolation_align_corners,
        tower.spatial_merge_size,
    )  # fmt: skip
    return plain_layout(tower, grids, device, interp_indices=index, interp_weights=weights)


def last_states(tower, pixels, layout, merged):
    """Return Qwen2-VL's states of the last layer, after or before the merger."""
    out = tower(pixels, **layout)
    return out.pooler_output if merged else out.last_hidden_state


def plain_mergers(tower):
    return [tower.merger]


def window_states(tower, pixels, layout, merged):
    """Return Qwen2.5-VL's states of the last layer. Before the merger, the tower returns them sorted by window, so this
    function restores the order of the patches."""
    states = last_states(tower, pixels, layout, merged)
    if merged:
        return states
    of_token = states.unflatten(0, (-1, tower.spatial_merge_unit))  # [n / merge^2, merge^2, D_vit]
    return of_token[layout["window_index"].argsort()].flatten(0, 1)


def deepstack_states(tower, pixels, layout, merged):
    """Return Qwen3-VL's states of the last layer and of K earlier layers. The earlier layers have separate mergers and
    feed the first K layers of the language model. The tower returns only merged states, so hooks catch their inputs."""
    if merged:
        out = tower(pixels, **layout)
        return torch.cat([out.pooler_output, *out.deepstack_features], dim=-1)
    inputs = {}  # of each merger
    hooks = []
    for merger in deepstack_mergers(tower):
        hooks.append(merger.register_forward_pre_hook(lambda module, args: inputs.update({module: args[0]})))
    try:
        tower(pixels, **layout)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat([inputs[merger] for merger in deepstack_mergers(tower)], dim=-1)


def deepstack_mergers(tower):
    return [tower.merger, *tower.deepstack_merger_list]


QWEN2_VL = Family(
    model_class="Qwen2VLForConditionalGeneration",
    image_processor="Qwen2VLImageProcessorPil",
    patch=14,
    depth=2,
    merge=2,
    mean=(0.48145466, 0.4578275, 0.40821073),  # of CLIP
    std=(0.26862954, 0.26130258, 0.27577711),
    image_pixels=(784, 2_359_296),
    video_pixels=(3_136, 25_088),
    image_pad="<|image_pad|>",
    video_pad="<|video_pad|>",
    time_step=1,
    timestamps=False,
    vision_layout=plain_layout,
    vision_states=last_states,
    mergers=plain_mergers,
)

QWEN2_5_VL = replace(
    QWEN2_VL,
    model_class="Qwen2_5_VLForConditionalGeneration",
    time_step=2,  # of the released models; family_of() reads it from config.json
    vision_layout=window_layout,
    vision_states=window_states,
)

QWEN3_VL = replace(
    QWEN2_VL,
    model_class="Qwen3VLForConditionalGeneration",
    patch=16,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    image_pixels=(1_024, 3_081_528),  # 1 to 3,009 tokens, as in Qwen2-VL
    video_pixels=(4_096, 32_768),  # 4 to 32 tokens
    timestamps=True,
    vision_layout=interpolated_layout,
    vision_states=deepstack_states,
    mergers=deepstack_mergers,
)

FAMILIES = {"qwen2_vl": QWEN2_VL, "qwen2_5_vl": QWEN2_5_VL, "qwen3_vl": QWEN3_VL}  # by the model_type of config.json


def family_of(config):
    """Return the record of a model. For Qwen2.5-VL, its config.json sets the rotary positions per second."""
    family = FAMILIES[config.model_type]
    positions_a_second = getattr(config.vision_config, "tokens_per_second", None)
    if positions_a_second is None:
        return family
    return replace(family, time_step=int(positions_a_second * family.depth / FRAME_RATE))


class PatchEmbed(nn.Module):
    """The vision tower's first layer as a matrix product. Every patch is one position of the convolution, and Conv3d is
    many times slower at that on GPUs. The module holds the convolution, so the weights' names stay the same."""

    def __init__(self, proj):
        super().__init__()
        self.proj = proj

    def forward(self, pixels):
        """Return the states [n, D_vit] of the patches [n, patch_values]."""
        weight = self.proj.weight  # [D_vit, 3, frames, height, width]
        return F.linear(pixels.to(weight.dtype), weight.flatten(1), self.proj.bias)


def fuse_norms(backbone):
    """Replace transformers' RMSNorms by torch's, with the same weights and names, but one kernel instead of six. Kernel
    launches limit passes of a few thousand tokens; an SFT step of a 2B has 15 % fewer of them. Under CUDA's autocast
    the result is fp32, also with the bf16 parameters of --fsdp."""
    for parent in list(backbone.modules()):
        for name, norm in list(parent.named_children()):
            if hasattr(norm, "variance_epsilon"):  # only transformers' norms have it
                fused = nn.RMSNorm(norm.weight.shape, norm.variance_epsilon, device="meta")
                fused.weight = norm.weight
                setattr(parent, name, fused)


def add_states(hidden, media_at, states):
    """Add vision states [m, D] after an early layer (Qwen3-VL's DeepStack). hidden [B, L, D]; media_at: flat [m].
    This replaces a method of transformers that indexes with a mask, so the host waits for the GPU in every such layer,
    forward and backward. Other callers of the backbone still pass a mask [B, L]."""
    if media_at.dtype == torch.bool:
        media_at = media_at.flatten().nonzero()[:, 0]
    states = states.to(hidden.dtype)
    # index_add (and index_copy in embed_tokens) would hold the states in fp32 until the backward pass
    return hidden.flatten(0, 1).index_put((media_at,), states, accumulate=True).view_as(hidden)
