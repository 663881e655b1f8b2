"""Two names for one weight of T5's encoder: Hugging Face's (`encoder.block.0.layer.0.SelfAttention.q.weight`) and
llama.cpp's (`enc.blk.0.attn_q.weight`), in which GGUF files of T5-XXL are written.

The llama.cpp names are those of the `gguf` package's tensor map for the architecture `t5encoder`. Pure maps.
"""

from __future__ import annotations

import re

EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight")
"""One table of token embeddings under two names: a file may hold either or both."""

_BLOCK = {
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
_FROM_BLOCK = {short: name for name, short in _BLOCK.items()}
_HUGGING_FACE_BLOCK = re.compile(r"^encoder\.block\.(\d+)\.(.+)\.weight$")
_LLAMA_CPP_BLOCK = re.compile(r"^enc\.blk\.(\d+)\.(\w+)\.weight$")


def is_encoder_key(key: str) -> bool:
    """Whether this is a Hugging Face name of a weight of T5's (version 1.1) encoder."""
    return to_llama_cpp_key(key) is not None


def to_llama_cpp_key(key: str) -> str | None:
    """Hugging Face's parameter name → llama.cpp's; None for a name that is not of a T5 v1.1 encoder."""
    if key in EMBEDDINGS:
        return "token_embd.weight"
    if key == "encoder.final_layer_norm.weight":
        return "enc.output_norm.weight"
    match = _HUGGING_FACE_BLOCK.match(key)
    short = _BLOCK.get(match[2]) if match else None
    return f"enc.blk.{match[1]}.{short}.weight" if match and short else None


def to_hugging_face_key(key: str) -> str | None:
    """llama.cpp's parameter name → Hugging Face's (`shared.weight` for the embeddings); None for an unknown name."""
    if key == "token_embd.weight":
        return EMBEDDINGS[0]
    if key == "enc.output_norm.weight":
        return "encoder.final_layer_norm.weight"
    match = _LLAMA_CPP_BLOCK.match(key)
    name = _FROM_BLOCK.get(match[2]) if match else None
    return f"encoder.block.{match[1]}.{name}.weight" if match and name else None
