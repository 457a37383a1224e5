"""The families of backbones: one record holds all that differs between Qwen2-VL, Qwen2.5-VL and Qwen3-VL.

Outside of the records are the protocol's chat form (Qwen2-VL's, with its system turn) and the control tokens, which the
families share; what Embedder exchanges in a loaded model (model.py, 1.); the decode step, written for the layers of
Qwen2 and Qwen3 (support/decode.py).
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

FRAME_RATE = 2  # frames a second, whatever they were: lists of frames do not tell; qwen-vl-utils assumes 2, too


@dataclass(frozen=True)
class Family:
    """One family of backbones. To add one, write its entry of FAMILIES below, with its functions beside it.

    A patch is `patch` x `patch` pixels of `depth` frames; `merge` x `merge` patches become one token of the language
    model. grid: (t, h, w) of a picture or video, in patches. A video has a step of time for each `depth` frames. K: the
    first layers of the language model that get vision states of their own (DeepStack); 0 in most families.
    """

    model_class: str  # the class in transformers
    picture_processor: str  # the class in transformers; its settings are saved beside the weights, for other tools
    patch: int  # pixels
    depth: int  # frames
    merge: int  # patches
    mean: tuple  # of the three channels, in 0..1
    std: tuple
    image_pixels: tuple  # fewest and most pixels of a picture
    video_pixels: tuple  # of one frame of a video
    image_pad: str  # the token in whose places a picture's states go
    video_pad: str
    time_step: int  # rotary positions from one step of a video to the next
    timestamps: bool  # each step of a video stands alone in the text, after its time; else all are one run of pads
    vision_layout: Callable  # (vision tower, grids, device) -> those of its arguments that depend on the grids only
    vision_states: Callable  # (tower, pixels, layout, merged) -> [n, (1 + K) D_vit]; merged: [n / merge^2, (1 + K) D]
    mergers: Callable  # (tower) -> its 1 + K mergers, which the paper trains in SFT

    @property
    def token_side(self):
        """Pixels of a visual token's side: pictures are resized to multiples of it."""
        return self.patch * self.merge

    @property
    def patch_values(self):
        """Numbers in a patch: 3 channels x depth frames x patch x patch pixels."""
        return 3 * self.depth * self.patch**2

    def in_tokens(self, grid):
        """A grid in patches -> in tokens of the language model."""
        t, h, w = (int(n) for n in grid)
        return t, h // self.merge, w // self.merge


def plain_layout(tower, grids, device, **more):
    """What transformers' vision towers work out of the grids, as the keywords that they take it by. Here it is done on
    the CPU: they would do it on the GPU, where every layer waits to read the lengths. more: for the device too."""
    more = {"position_ids": get_vision_position_ids(grids, tower.spatial_merge_size), **more}  # [n, 2]
    return {
        "grid_thw": grids,  # [m, 3]
        "cu_seqlens": get_vision_cu_seqlens(grids),  # where each frame's patches begin; stays, attention reads it here
        **dict(zip(more, to_device(device, *more.values()))),
    }


def to_device(device, *tensors):
    """The tensors on the device, by one transfer of their bytes: for each one the host waits until the GPU is done.
    Those of the widest numbers come first: a number must begin at a multiple of its size."""
    flat = torch.cat([x.flatten().view(torch.uint8) for x in tensors]).to(device)
    parts = flat.split([x.nbytes for x in tensors])
    return [part.view(x.dtype).view(x.shape) for x, part in zip(tensors, parts)]


def window_layout(tower, grids, device):
    """Qwen2.5-VL: most layers look at windows of 8 x 8 patches, and the tower sorts the tokens by window."""
    index, cu_window_seqlens = get_vision_window_index(
        grids, tower.spatial_merge_size, tower.window_size, tower.patch_size
    )
    layout = plain_layout(tower, grids, device, window_index=index)
    return layout | {"cu_window_seqlens": cu_window_seqlens}


def interpolated_layout(tower, grids, device):
    """Qwen3-VL: besides rotary ones there are learned positions, a table that is stretched over each picture."""
    index, weights = get_vision_interpolation_indices_and_weights(
        grids, tower.num_grid_per_side, tower.interpolation_mode, tower.interpolation_align_corners,
        tower.spatial_merge_size,
    )  # fmt: skip
    return plain_layout(tower, grids, device, interp_indices=index, interp_weights=weights)


def last_states(tower, pixels, layout, merged):
    """Qwen2-VL: the last layer's states, after the merger or before it."""
    out = tower(pixels, **layout)
    return out.pooler_output if merged else out.last_hidden_state


def plain_mergers(tower):
    return [tower.merger]


def window_states(tower, pixels, layout, merged):
    """Qwen2.5-VL: the same; before the merger they come sorted by window, and are put back into the order of the
    patches."""
    states = last_states(tower, pixels, layout, merged)
    if merged:
        return states
    of_token = states.unflatten(0, (-1, tower.spatial_merge_unit))  # [n / merge^2, merge^2, D_vit]
    return of_token[layout["window_index"].argsort()].flatten(0, 1)


def deepstack_states(tower, pixels, layout, merged):
    """Qwen3-VL: beside the last layer's states those of K earlier ones, which have mergers of their own and go to the
    first K layers of the language model. The tower does not give them before their mergers: they are caught there."""
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
    picture_processor="Qwen2VLImageProcessorPil",
    patch=14,
    depth=2,
    merge=2,
    mean=(0.48145466, 0.4578275, 0.40821073),  # CLIP's
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
    time_step=2,  # the released models'; family_of() takes it from config.json
    vision_layout=window_layout,
    vision_states=window_states,
)

QWEN3_VL = replace(
    QWEN2_VL,
    model_class="Qwen3VLForConditionalGeneration",
    patch=16,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    image_pixels=(1_024, 3_081_528),  # as many tokens as Qwen2-VL's: 1 to 3,009
    video_pixels=(4_096, 32_768),  # 4 to 32
    timestamps=True,
    vision_layout=interpolated_layout,
    vision_states=deepstack_states,
    mergers=deepstack_mergers,
)

FAMILIES = {"qwen2_vl": QWEN2_VL, "qwen2_5_vl": QWEN2_5_VL, "qwen3_vl": QWEN3_VL}  # by the model_type of config.json


def family_of(config):
    """The record of a model, by its config.json, where one number of Qwen2.5-VL's stands: how fast time counts."""
    family = FAMILIES[config.model_type]
    positions_a_second = getattr(config.vision_config, "tokens_per_second", None)
    if positions_a_second is None:
        return family
    return replace(family, time_step=int(positions_a_second * family.depth / FRAME_RATE))


class PatchEmbed(nn.Module):
    """The vision tower's first layer as the matrix product that it is: every patch is one place of its convolution, and
    on GPUs Conv3d is many times slower at that. It holds the convolution, so that its weights keep their names."""

    def __init__(self, proj):
        super().__init__()
        self.proj = proj

    def forward(self, pixels):
        """[n, patch_values] -> [n, D_vit]"""
        weight = self.proj.weight  # [D_vit, 3, frames, height, width]
        return F.linear(pixels.to(weight.dtype), weight.flatten(1), self.proj.bias)


def fuse_norms(backbone):
    """transformers' RMSNorms as torch's, one kernel for six; the same weights under the same names. Passes of a few
    thousand tokens are bound by the starting of kernels: an SFT step of a 2B has 15 % fewer of them. Under CUDA's
    autocast the result is fp32, with --fsdp too, whose parameters are bf16."""
    for parent in list(backbone.modules()):
        for name, norm in list(parent.named_children()):
            if hasattr(norm, "variance_epsilon"):  # only transformers' have it
                fused = nn.RMSNorm(norm.weight.shape, norm.variance_epsilon, device="meta")
                fused.weight = norm.weight
                setattr(parent, name, fused)


def add_states(hidden, media_at, states):
    """Qwen3-VL's DeepStack: vision states [m, D] are added after an early layer. hidden [B, L, D]; media_at [m] flat
    indices. In the place of a method of transformers, which indexes with a mask: in every such layer, forward and
    backward, the host then waits for the GPU. Other callers of the backbone still give a mask [B, L]."""
    if media_at.dtype == torch.bool:
        media_at = media_at.flatten().nonzero()[:, 0]
    states = states.to(hidden.dtype)
    # not index_add, nor index_copy in embed_tokens: they would keep the states, in fp32, until the backward
    return hidden.flatten(0, 1).index_put((media_at,), states, accumulate=True).view_as(hidden)
