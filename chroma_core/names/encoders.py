"""Two names for one weight of the encoders beside the transformer: T5's and the VAE's, as pure maps of parameter names.

T5: Hugging Face's names (`encoder.block.0.layer.0.SelfAttention.q.weight`) and llama.cpp's (`enc.blk.0.attn_q.weight`),
in which GGUF files of T5-XXL are written: those of the `gguf` package's tensor map for the architecture `t5encoder`.

VAE: diffusers' `AutoencoderKL` and the original (ldm) layout of `ae.safetensors`. That counts the decoder's levels from
the last to the first, joins a level's residual blocks and its resampler under one number, and stores the attention's
four projections as 1×1 convolutions [C, C, 1, 1] where diffusers has linear layers [C, C]. `levels` is the number of
resolutions (4 in Flux's VAE).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight")
"""One table of token embeddings under two names: a file may hold either or both."""

_LLAMA_CPP_BLOCK = {
    "layer.0.SelfAttention.q": "attn_q",
    "layer.0.SelfAttention.k": "attn_k",
    "layer.0.SelfAttention.v": "attn_v",
    "layer.0.SelfAttention.o": "attn_o",
    "layer.0.SelfAttention.relative_attention_bias": "attn_rel_b",
    "layer.0.layer_norm": "attn_norm",
    "layer.1.DenseReluDense.wi_0": "ffn_gate",
    "layer.1.DenseReluDense.wi_1": "ffn_up",
    "layer.1.DenseReluDense.wo": "ffn_down",
    "layer.1.layer_norm": "ffn_norm",
}
_TO_LLAMA_CPP = {
    **{f"encoder.block.{{}}.{name}.weight": f"enc.blk.{{}}.{s}.weight" for name, s in _LLAMA_CPP_BLOCK.items()},
    "encoder.final_layer_norm.weight": "enc.output_norm.weight",
    EMBEDDINGS[1]: "token_embd.weight",
    EMBEDDINGS[0]: "token_embd.weight",  # the last, so that it is also the way back
}
_TO_HUGGING_FACE = {short: name for name, short in _TO_LLAMA_CPP.items()}
_NUMBER = re.compile(r"^(encoder\.block|enc\.blk)\.(\d+)(?=\.)")


def is_encoder_key(key: str) -> bool:
    """Whether this is a Hugging Face name of a weight of T5's (version 1.1) encoder."""
    return to_llama_cpp_key(key) is not None


def to_llama_cpp_key(key: str) -> str | None:
    """Hugging Face's parameter name → llama.cpp's; None for a name that is not of a T5 v1.1 encoder."""
    return _renamed(key, _TO_LLAMA_CPP)


def to_hugging_face_key(key: str) -> str | None:
    """llama.cpp's parameter name → Hugging Face's (`shared.weight` for the embeddings); None for an unknown name."""
    return _renamed(key, _TO_HUGGING_FACE)


def _renamed(key: str, table: dict[str, str]) -> str | None:
    """By a table of templates, in which {} stands for the block's number."""
    match = _NUMBER.match(key)
    found = table.get(f"{match[1]}.{{}}{key[match.end() :]}" if match else key)
    return found.format(match[2]) if match and found else found


_RESNET = {leaf: leaf for leaf in ("norm1", "conv1", "norm2", "conv2")} | {"conv_shortcut": "nin_shortcut"}
_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def _modules() -> dict[str, str]:
    """diffusers' module → original module, as templates with {level} and {block}."""
    table = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    places = {
        "encoder.down_blocks.{level}.resnets.{block}": ("encoder.down.{level}.block.{block}", _RESNET),
        "encoder.down_blocks.{level}.downsamplers.0": ("encoder.down.{level}.downsample", {"conv": "conv"}),
        "decoder.up_blocks.{level}.resnets.{block}": ("decoder.up.{level}.block.{block}", _RESNET),
        "decoder.up_blocks.{level}.upsamplers.0": ("decoder.up.{level}.upsample", {"conv": "conv"}),
    }
    for side in ("encoder", "decoder"):
        table |= {f"{side}.{conv}": f"{side}.{conv}" for conv in ("conv_in", "conv_out")}
        table[f"{side}.conv_norm_out"] = f"{side}.norm_out"
        places[f"{side}.mid_block.attentions.0"] = (f"{side}.mid.attn_1", _ATTENTION)
        for i in (0, 1):
            places[f"{side}.mid_block.resnets.{i}"] = (f"{side}.mid.block_{i + 1}", _RESNET)
    for place, (original, leaves) in places.items():
        table |= {f"{place}.{leaf}": f"{original}.{original_leaf}" for leaf, original_leaf in leaves.items()}
    return table


_TO_LDM = _modules()
_TO_DIFFUSERS = {original: name for name, original in _TO_LDM.items()}
_LEVEL = re.compile(r"^((?:encoder\.down|decoder\.up)(?:_blocks)?\.)(\d+)(\.(?:resnets\.|block\.)?)(\d+(?=\.))?")


def _convert(key: str, table: dict[str, str], levels: int) -> str | None:
    module, _, leaf = key.rpartition(".")
    level = block = ""
    if match := _LEVEL.match(module):
        numbered = match[3] != "."
        level, block = match[2], match[4] if numbered and match[4] else ""
        if int(level) >= levels:
            return None
        tail = module[match.end() if block else match.end(3) :]
        module = f"{match[1]}{{level}}{match[3]}{'{block}' if block else ''}{tail}"
        if match[1].startswith("decoder"):
            level = str(levels - 1 - int(level))
    found = table.get(module) if leaf in ("weight", "bias") else None
    return None if found is None else f"{found.format(level=level, block=block)}.{leaf}"


def to_ldm_key(key: str, levels: int) -> str | None:
    """`decoder.up_blocks.0.resnets.1.conv1.weight` → `decoder.up.3.block.1.conv1.weight` with 4 levels.

    None for a name that is not an `AutoencoderKL`'s, or a level beyond `levels`.
    """
    return _convert(key, _TO_LDM, levels)


def to_diffusers_key(key: str, levels: int) -> str | None:
    """The inverse of `to_ldm_key`."""
    return _convert(key, _TO_DIFFUSERS, levels)


def count_levels(keys: Iterable[str]) -> int:
    """How many resolutions a VAE of these names, in either layout, has: its highest level's number plus one."""
    return 1 + max((int(match[2]) for key in keys if (match := _LEVEL.match(key))), default=-1)
