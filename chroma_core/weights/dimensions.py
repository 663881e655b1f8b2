"""The configuration of each part, read off the shapes of its tensors.

Single files carry no config.json. All names here are diffusers' or Hugging Face's, in whatever layout the file is. A
dimension whose tensor is missing takes the real model's value, so that what is missing can still be counted.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ..errors import ModelFileError

Shapes = Mapping[str, tuple[int, ...]]

MAX_BLOCKS = 200
"""A block number beyond it is a damaged name, not a model."""

ROPE_AXES = {128: (16, 56, 56), 32: (8, 12, 12)}
"""How the published models share out a head's dimensions: Chroma 1, and the embedded `tiny`."""


def rope_axes(head_dim: int) -> tuple[int, int, int]:
    """How many of a head's dimensions encode index, row and column. No tensor shows it.

    Known models by table; otherwise as Chroma 1 does it, an eighth for the index (even, rounded up until the rest
    divides by four) and half of the rest each: 16 → (4, 6, 6).
    """
    if head_dim in ROPE_AXES:
        return ROPE_AXES[head_dim]
    for index in range(2 * math.ceil(head_dim / 16), head_dim, 2):
        if (head_dim - index) % 4 == 0:
            return index, (head_dim - index) // 2, (head_dim - index) // 2
    raise ModelFileError(
        f"An attention head of this transformer has {head_dim} dimensions, which cannot be shared between index, row "
        "and column of a position. The file is damaged or belongs to another model."
    )


def transformer_config(shapes: Shapes) -> dict[str, Any]:
    """The arguments of `ChromaTransformer`."""
    width = _agreed(
        shapes,
        {
            "x_embedder.weight": 0,
            "context_embedder.weight": 0,
            "distilled_guidance_layer.out_proj.weight": 0,
            "proj_out.weight": 1,
            **{name: 1 for name in shapes if name.endswith(".attn.to_q.weight")},
        },
        3072,
    )
    norms = (name for name in shapes if name.endswith((".attn.norm_q.weight", ".attn.norm_k.weight")))
    head_dim = _agreed(shapes, dict.fromkeys(norms, 0), 128)
    if width % head_dim:
        raise ModelFileError(
            f"The transformer is {width} wide, but its attention heads have {head_dim} dimensions, which does not "
            "divide it. The tensors do not belong together."
        )
    in_channels = _axis(shapes, "x_embedder.weight", 1, 64)
    out_channels = _axis(shapes, "proj_out.weight", 0, in_channels)
    return {
        "patch_size": 1,
        "in_channels": in_channels,
        "out_channels": None if out_channels == in_channels else out_channels,
        "num_layers": _blocks(shapes, "transformer_blocks", 19),
        "num_single_layers": _blocks(shapes, "single_transformer_blocks", 38),
        "attention_head_dim": head_dim,
        "num_attention_heads": width // head_dim,
        "joint_attention_dim": _axis(shapes, "context_embedder.weight", 1, 4096),
        "axes_dims_rope": rope_axes(head_dim),
        "approximator_num_channels": _axis(shapes, "distilled_guidance_layer.in_proj.weight", 1, 64),
        "approximator_hidden_dim": _axis(shapes, "distilled_guidance_layer.in_proj.weight", 0, 5120),
        "approximator_layers": _blocks(shapes, "distilled_guidance_layer.layers", 5),
    }


def text_encoder_config(shapes: Shapes) -> dict[str, Any]:
    """The arguments of `T5Encoder` for an encoder of version 1.1 (gated GELU).

    Not visible in tensors, and the same in every published T5: the reach of the relative positions and the norms' ε.
    """
    first = "encoder.block.0.layer."
    bias = f"{first}0.SelfAttention.relative_attention_bias.weight"
    heads = _axis(shapes, bias, 1, 64)
    inner = _axis(shapes, f"{first}0.SelfAttention.q.weight", 0, 64 * heads)
    if inner % heads:
        raise ModelFileError(
            f"The T5 encoder's attention is {inner} wide, which its {heads} heads do not divide. The tensors do not "
            "belong together."
        )
    norms = [name for name in shapes if name.endswith("layer_norm.weight")]
    return {
        "vocab_size": _axis(shapes, "shared.weight", 0, 32128),
        "d_model": _agreed(shapes, {"shared.weight": 1, **dict.fromkeys(norms, 0)}, 4096),
        "d_kv": inner // heads,
        "d_ff": _axis(shapes, f"{first}1.DenseReluDense.wi_0.weight", 0, 10240),
        "num_layers": _blocks(shapes, "encoder.block", 24),
        "num_heads": heads,
        "relative_attention_num_buckets": _axis(shapes, bias, 0, 32),
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": False,
        "use_cache": False,
    }


def vae_config(shapes: Shapes) -> dict[str, Any]:
    """The arguments of `Autoencoder`, with Flux's latent scale and shift.

    Not visible in tensors: the norms' groups, which are 32 unless that left fewer than two channels in a group.
    """
    levels = _blocks(shapes, "encoder.down_blocks", 4)
    real = (128, 256, 512, 512)
    widths = tuple(
        _axis(shapes, f"encoder.down_blocks.{i}.resnets.0.conv1.weight", 0, real[min(i, 3)]) for i in range(levels)
    )
    latent = _axis(shapes, "decoder.conv_in.weight", 1, 16)
    groups = math.gcd(*widths) // 2
    return {
        "in_channels": _axis(shapes, "encoder.conv_in.weight", 1, 3),
        "out_channels": _axis(shapes, "decoder.conv_out.weight", 0, 3),
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": widths,
        "layers_per_block": _blocks(shapes, "encoder.down_blocks.0.resnets", 2),
        "act_fn": "silu",
        "latent_channels": latent,
        "norm_num_groups": next((g for g in (32, 16, 8, 4, 2) if groups % g == 0), 1),
        "sample_size": 1024,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "force_upcast": True,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "mid_block_add_attention": any(".mid_block.attentions." in name for name in shapes),
    }


def _axis(shapes: Shapes, name: str, axis: int, default: int) -> int:
    """The size of one axis of a tensor; `default` where the tensor is missing."""
    if name not in shapes:
        return default
    shape = shapes[name]
    if len(shape) <= axis or shape[axis] < 1:
        raise ModelFileError(
            f"The tensor '{name}' has the shape {list(shape)}, but must have at least {axis + 1} axes, none of them "
            "empty. The file is damaged or belongs to another model."
        )
    return shape[axis]


def _agreed(shapes: Shapes, axes: Mapping[str, int], default: int) -> int:
    """The size on which most of these tensors' axes agree, so that the odd one out is the one found wrong."""
    sizes = Counter(_axis(shapes, name, axis, default) for name, axis in axes.items() if name in shapes)
    return sizes.most_common(1)[0][0] if sizes else default


def _blocks(shapes: Shapes, root: str, default: int) -> int:
    """How many numbered modules stand under `root`: the highest number plus one, so that gaps show as missing."""
    pattern = re.compile(rf"^{re.escape(root)}\.(\d{{1,6}})\.")
    numbers = {int(match[1]) for name in shapes if (match := pattern.match(name))}
    highest = max(numbers, default=default - 1)
    if highest >= MAX_BLOCKS:
        raise ModelFileError(
            f"A tensor names block {highest} of {root}, but only {len(numbers)} blocks are there. The file is damaged."
        )
    return highest + 1
