"""What to load: plain values that travel over node links, into job files and into LoRA headers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from ..errors import ConfigError, check_choice, did_you_mean, shortened
from ..lora.strengths import layer_strengths, parse_blocks, parse_schedule
from ..model import eight_bits
from ..model.eight_bits import Compute
from ..model.flavours import FLAVOURS, flavour
from ..model.precision import PRECISIONS, precision
from ..options import Option

Offload = Literal["none", "model", "block"]
"""`none` keeps every loaded component on the device. `model` lets T5, transformer and VAE take turns there and keeps
the others in the computer's memory. `block` does the same and holds only a few of the transformer's blocks on the
device at a time (see `streaming`)."""

PLACEMENT = ("offload", "resident_blocks", "quantised_folder")
"""Fields of a `ModelSpec` that decide where weights rest, not what is computed."""

LoraMode = Literal["live", "merged"]


@dataclass(frozen=True)
class ModelSpec:
    """Which weights, and how to hold them in memory.

    transformer, text_encoder, vae, tokenizer go before `folder`, and that before the flavour's published weights.
    precision, text_precision: see `precision`. resident_blocks: at least 2, the block at work and the next one.
    """

    flavour: Annotated[
        str,
        Option(
            "base: trained at 512 pixels; for long training. hd: trained at 1024 pixels; for images, and the start for "
            "a quick LoRA. flash: few steps, no guidance. tiny: a miniature that ships with the pack and generates "
            "coloured shapes at 64 pixels, to try everything with.",
            choices=tuple(FLAVOURS),
        ),
    ] = "base"
    folder: Annotated[
        str | None,
        Option("A whole model in diffusers layout instead of the flavour's published weights.", advanced=True),
    ] = None
    precision: Annotated[
        str,
        Option(
            "How the transformer's weights are held. int8 and fp8 take half the memory of bf16, int4 and nf4 a "
            "quarter. A name with a dash needs the library it ends in. See docs/precision.md.",
            choices=tuple(PRECISIONS),
        ),
    ] = "bf16"
    text_precision: Annotated[
        str, Option("The same choice for the T5 text encoder.", choices=tuple(PRECISIONS), advanced=True)
    ] = "bf16"
    offload: Annotated[
        Offload,
        Option(
            "none: every loaded part stays on the GPU. model: text encoder, transformer and VAE take turns there. "
            "block: the same, and only a few of the transformer's blocks are on the GPU at a time; slower, for the "
            "smallest GPUs. The image is the same.",
            advanced=True,
        ),
    ] = "none"
    transformer: Annotated[
        str | None,
        Option(
            "The transformer from a file or a component folder; text encoder and VAE too, if they are in the same file."
        ),
    ] = None
    text_encoder: Annotated[str | None, Option("The T5 text encoder from a file or a component folder.")] = None
    tokenizer: Annotated[str | None, Option("The tokenizer from a component folder.")] = None
    vae: Annotated[str | None, Option("The VAE from a file or a component folder.")] = None
    revision: Annotated[str | None, Option("A commit or branch on the Hub. Unset: the pinned one.")] = None
    resident_blocks: Annotated[
        int,
        Option(
            "With offload block: how many of the transformer's blocks are on the GPU at a time. More is faster; the "
            "real model has 57.",
            least=2,
            most=64,
            advanced=True,
        ),
    ] = 2
    offload_during_startup: Annotated[
        bool,
        Option(
            "Cast and quantise in RAM, so that only finished weights reach the GPU. Slower to load; for when loading "
            "itself runs out of GPU memory.",
            advanced=True,
        ),
    ] = False
    quantised_folder: Annotated[
        str | None, Option("A folder that keeps quantised weights for a faster next start.", advanced=True)
    ] = None
    compute: Annotated[
        Compute,
        Option(
            "How the transformer's int8 or fp8 weights are multiplied. weights: exactly, with the dequantised weight. "
            "w8a8: activations are quantised to 8 bits, too, for the 8-bit units of newer GPUs; less exact. It has not "
            "been faster on a measured GPU yet: see docs/precision.md.",
            advanced=True,
            since="0.1",
        ),
    ] = "weights"

    def __post_init__(self) -> None:
        flavour(self.flavour)
        precision(self.precision)
        precision(self.text_precision)
        check_choice("The offload mode", self.offload, get_args(Offload))
        check_choice("The compute mode", self.compute, get_args(Compute))
        if self.compute == "w8a8" and self.precision not in eight_bits.LARGEST:
            raise ConfigError(
                f"The compute mode w8a8 multiplies 8-bit weights, but the precision is {self.precision}. Choose the "
                f"precision {' or '.join(eight_bits.LARGEST)}, or the compute mode weights."
            )
        if self.resident_blocks < 2:
            raise ConfigError(
                f"resident_blocks is {self.resident_blocks}; at least 2 blocks must fit on the device: the one that "
                "computes and the next one."
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelSpec:
        """The inverse of `to_dict`. Raises ConfigError for unknown fields, and for values of another type."""
        known = [f.name for f in fields(cls)]
        unknown = sorted(map(str, values.keys() - known))
        if unknown:
            meant = did_you_mean(unknown[0], known)
            raise ConfigError(f"The model specification has unknown fields: {', '.join(unknown)}.{meant}")
        for f in fields(cls):
            value, wanted = values.get(f.name, f.default), str if f.default is None else type(f.default)
            if type(value) is not wanted and value is not f.default:
                kind = {int: "a whole number", bool: "true or false"}.get(wanted, "a text")
                raise ConfigError(f"The model's {f.name} is {shortened(repr(value))}; it must be {kind}.")
        return cls(**values)

    @property
    def own_file(self) -> str:
        """The name (not the place) of the transformer's own file or folder; empty for the published one."""
        own = self.transformer or self.folder
        return Path(own).name if own else ""


@dataclass(frozen=True)
class LoraUse:
    """One LoRA applied to a model: `live` beside the weights (strength free), `merged` into them before quantising.

    blocks, schedule: factors on the strength by block and over the steps, see `lora.strengths`.
    """

    path: str
    strength: Annotated[float, Option("1: as trained. 0: no effect.", least=-4, most=4, step=0.05)] = 1.0
    mode: Annotated[
        LoraMode,
        Option(
            "live: beside the weights; changing the strength costs nothing. merged: into the weights before they are "
            "quantised; a little faster, and reloads the model when changed.",
            advanced=True,
        ),
    ] = "live"
    allow_partial: Annotated[
        bool,
        Option("Apply what fits when some of the file's modules do not belong to this model.", advanced=True),
    ] = False
    blocks: Annotated[
        str,
        Option(
            "Factors on the strength by block or layer, e.g. double_blocks.0-5:0.5, single_blocks.*:0. The first "
            "pattern that fits counts. Empty: 1 everywhere.",
            advanced=True,
        ),
    ] = ""
    schedule: Annotated[
        str,
        Option(
            "Factors on the strength over the steps, 0 the first and 1 the last, with straight lines between: "
            "0:0.2, 0.5:0.8, 1:1. Needs the mode live. Empty: 1 at every step.",
            advanced=True,
        ),
    ] = ""

    def __post_init__(self) -> None:
        check_choice("The LoRA mode", self.mode, get_args(LoraMode))
        parse_blocks(self.blocks)
        if parse_schedule(self.schedule) and self.mode == "merged":
            raise ConfigError(
                f"The LoRA '{Path(self.path).name}' has a strength over the steps ({self.schedule}), but is merged: "
                "its strength is then fixed. Apply it live, or leave the schedule out."
            )

    def strengths(self, layers: Iterable[str]) -> dict[str, float]:
        """The strength of each of these layers. Raises LoraError for a pattern that selects none of them."""
        return layer_strengths(layers, self.strength, self.blocks)


@dataclass(frozen=True)
class ModelHandle:
    """What a CHROMA_MODEL link carries: a description, never weights, so that evicting it loses nothing."""

    spec: ModelSpec
    loras: tuple[LoraUse, ...] = ()

    def with_lora(self, lora: LoraUse) -> ModelHandle:
        """The same model with one more LoRA on top."""
        return replace(self, loras=(*self.loras, lora))
