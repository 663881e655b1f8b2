"""What a flavour is made of, in numbers: parameters, bytes and shapes of its parts, from module trees without weights.

Building Chroma 1's three module trees on the meta device takes a fifth of a second, and is done once a process.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..files import read_json
from ..lora.adapters import features, linear_modules
from ..lora.settings import target_modules
from ..model.flavours import flavour
from ..model.precision import Precision, quantisable_linears
from ..model.text_encoder import T5Encoder
from ..model.transformer import ChromaTransformer
from ..model.vae import Autoencoder

T5_XXL: dict[str, Any] = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
"""google/t5-v1_1-xxl, the text encoder of every published flavour."""

FLUX_VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 32,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
"""The VAE of Flux 1, the one of every published flavour."""


@dataclass(frozen=True)
class Part:
    """A stretch of a model: all its parameters, and those of them that a quantised precision stores in fewer bits.

    largest_linear: parameters of the largest linear that is quantised; it is what has to be dequantised at once.
    """

    parameters: int
    quantisable: int = 0
    largest_linear: int = 0

    def bytes(self, chosen: Precision) -> int:
        """Bytes of the finished part."""
        small = self.quantisable if chosen.quantised else 0
        return round(small * chosen.bytes_per_weight + (self.parameters - small) * chosen.dtype.itemsize)


def together(parts: Iterable[Part]) -> Part:
    """Several parts as one."""
    parts = list(parts)
    return Part(
        sum(p.parameters for p in parts),
        sum(p.quantisable for p in parts),
        max((p.largest_linear for p in parts), default=0),
    )


@dataclass(frozen=True)
class LoraLayers:
    """The layers that a LoRA target trains, as the memory plan needs them.

    features: inputs + outputs of all of them, so that rank × features is the number of parameters. image, text, joint:
    how many see the image tokens, the text tokens, or both. Of the block kinds (`double image`, `double text`,
    `single`), `attention` holds those where the input of attention is kept for the LoRA's gradient, `mlp_in` and
    `mlp_out` the same for the MLP's two layers. last: the model's own output projection is trained.
    """

    features: int
    image: int
    text: int
    joint: int
    attention: frozenset[str]
    mlp_in: frozenset[str]
    mlp_out: frozenset[str]
    last: bool
    shapes: tuple[tuple[int, int], ...] = ()
    """Outputs and inputs of each layer."""


@dataclass(frozen=True)
class Transformer:
    """A transformer's numbers. Widths in channels; blocks in the order in which they run; `parts` by name, in all."""

    width: int
    head_dim: int
    parts: dict[str, Part]
    doubles: tuple[Part, ...]
    singles: tuple[Part, ...]

    @property
    def blocks(self) -> tuple[Part, ...]:
        """All blocks."""
        return self.doubles + self.singles

    @property
    def whole(self) -> Part:
        """The whole transformer."""
        return together(self.parts.values())

    @property
    def outside_blocks(self) -> Part:
        """What stays on the device when blocks are streamed."""
        return together(part for name, part in self.parts.items() if not name.endswith("blocks"))


@dataclass(frozen=True)
class TextEncoder:
    """T5's numbers. width: channels of its states or of its attention, whichever is more."""

    whole: Part
    blocks: tuple[Part, ...]
    width: int
    heads: int


@dataclass(frozen=True)
class Vae:
    """The VAE's numbers. channels: of its four stages, the one at full size first."""

    whole: Part
    channels: tuple[int, ...]


@dataclass(frozen=True)
class Anatomy:
    """A flavour's three models."""

    transformer: Transformer
    text_encoder: TextEncoder
    vae: Vae


@lru_cache(maxsize=8)
def anatomy(flavour_name: str) -> Anatomy:
    """The numbers of a flavour. Raises ConfigError for an unknown one."""
    text = _on_meta(lambda: T5Encoder(**_config(flavour_name, "text_encoder", T5_XXL)))
    vae = _on_meta(lambda: Autoencoder(**_config(flavour_name, "vae", FLUX_VAE)))
    return Anatomy(of_transformer(transformer_on_meta(flavour_name)), of_text_encoder(text), of_vae(vae))


def of_transformer(model: ChromaTransformer) -> Transformer:
    """The numbers of a transformer that is not quantised, on any device."""
    small = {name: linear.weight.numel() for name, linear in quantisable_linears(model)}
    doubles = _blocks(model, "transformer_blocks", small)
    singles = _blocks(model, "single_transformer_blocks", small)
    parts = {
        "approximator": Part(_count(model.distilled_guidance_layer)),
        "input projections": Part(_count(model.x_embedder) + _count(model.context_embedder)),
        "double blocks": together(doubles),
        "single blocks": together(singles),
        "output projection": Part(_count(model.proj_out)),
    }
    config: Any = model.config
    return Transformer(model.inner_dim, model.inner_dim // config.num_attention_heads, parts, doubles, singles)


def of_text_encoder(model: nn.Module) -> TextEncoder:
    """The numbers of a T5 encoder that is not quantised."""
    small = {name: linear.weight.numel() for name, linear in quantisable_linears(model)}
    config: Any = model.config
    width = max(config.d_model, config.num_heads * config.d_kv)
    whole = Part(_count(model), sum(small.values()), max(small.values()))
    return TextEncoder(whole, _blocks(model, "encoder.block", small), width, config.num_heads)


def of_vae(model: nn.Module) -> Vae:
    """The numbers of a VAE."""
    config: Any = model.config
    return Vae(Part(_count(model)), tuple(config.block_out_channels))


@lru_cache(maxsize=8)
def transformer_on_meta(flavour_name: str) -> ChromaTransformer:
    """The module tree of a flavour without memory: `tiny` from its folder, the published ones are all Chroma 1."""
    model = _on_meta(lambda: ChromaTransformer(**_config(flavour_name, "transformer", {})))
    assert isinstance(model, ChromaTransformer)
    return model


@lru_cache(maxsize=32)
def lora_layers(flavour_name: str, target: str | tuple[str, ...]) -> LoraLayers:
    """The layers of a LoRA target on a flavour. Raises ConfigError for a target that matches nothing."""
    return lora_layers_of(transformer_on_meta(flavour_name), target)


def lora_layers_of(model: nn.Module, target: str | tuple[str, ...]) -> LoraLayers:
    """The layers of a LoRA target on a transformer without adapters."""
    linears = linear_modules(model)
    names = target_modules(model, target)
    kinds = {name: _kind(name) for name in names}

    def among(*leaves: str) -> frozenset[str]:
        return frozenset(kind for name, kind in kinds.items() if name.endswith(leaves))

    counts = list(kinds.values())
    return LoraLayers(
        features=sum(sum(features(linears[name])) for name in names),
        image=counts.count("double image") + counts.count("outside"),
        text=counts.count("double text"),
        joint=counts.count("single"),
        # The MLP of a single block reads the same input as its attention, and its last layer both their results.
        attention=among(".to_q", ".to_k", ".to_v", ".add_q_proj", ".add_k_proj", ".add_v_proj", ".proj_mlp"),
        mlp_in=among(".net.0.proj"),
        mlp_out=among(".net.2", ".proj_out"),
        last="proj_out" in names,
        shapes=tuple(features(linears[name]) for name in names),
    )


def _kind(name: str) -> str:
    if name.startswith("single_transformer_blocks."):
        return "single"
    if not name.startswith("transformer_blocks."):
        return "outside"
    return "double text" if ".add_" in name or ".to_add_out" in name or ".ff_context." in name else "double image"


def _config(flavour_name: str, part: str, published: dict[str, Any]) -> dict[str, Any]:
    folder: Path | None = flavour(flavour_name).folder
    if folder is None:
        return published
    values = read_json(folder / part / "config.json")
    return {key: value for key, value in values.items() if not key.startswith("_")}


def _on_meta(build: Any) -> nn.Module:
    with torch.device("meta"):
        return build()


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _blocks(model: nn.Module, root: str, small: dict[str, int]) -> tuple[Part, ...]:
    found = []
    for i, block in enumerate(model.get_submodule(root)):  # type: ignore[arg-type]
        mine = [count for name, count in small.items() if name.startswith(f"{root}.{i}.")]
        found.append(Part(_count(block), sum(mine), max(mine)))
    return tuple(found)
