"""What to load: plain values that travel over node links, into job files and into LoRA headers."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from ..errors import ConfigError
from ..model.flavours import flavour
from ..model.precision import precision

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

    flavour: published weights, and the defaults of size, steps and guidance.
    folder: a whole model in diffusers layout instead of the published one.
    transformer, text_encoder, vae, tokenizer: one part from a file or a component folder; goes before `folder`.
    revision: a commit or branch on the Hub instead of the flavour's pinned one.
    precision, text_precision: of the transformer and of T5; see `precision`.
    resident_blocks: with offload `block`, how many blocks are on the device at a time, at least 2: the one at work and
        the next.
    offload_during_startup: cast and quantise in the computer's memory, so that only finished weights reach the device.
    quantised_folder: where the quantised weights are kept for a faster next start; None: nowhere.
    """

    flavour: str = "base"
    folder: str | None = None
    precision: str = "bf16"
    text_precision: str = "bf16"
    offload: Offload = "none"
    transformer: str | None = None
    text_encoder: str | None = None
    tokenizer: str | None = None
    vae: str | None = None
    revision: str | None = None
    resident_blocks: int = 2
    offload_during_startup: bool = False
    quantised_folder: str | None = None

    def __post_init__(self) -> None:
        flavour(self.flavour)
        precision(self.precision)
        precision(self.text_precision)
        if self.offload not in get_args(Offload):
            raise ConfigError(f"The offload mode is {self.offload!r}; choose one of: {', '.join(get_args(Offload))}.")
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
        """The inverse of `to_dict`; unknown fields are a ConfigError."""
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise ConfigError(f"The model specification has unknown fields: {', '.join(sorted(unknown))}.")
        return cls(**values)

    def key(self) -> str:
        """A stable text that is equal exactly when the same weights would be loaded in the same way."""
        return json.dumps(self.to_dict(), sort_keys=True)


@dataclass(frozen=True)
class LoraUse:
    """One LoRA applied to a model: `live` beside the weights (strength free), `merged` into them before quantising."""

    path: str
    strength: float = 1.0
    mode: LoraMode = "live"
    allow_partial: bool = False

    def __post_init__(self) -> None:
        if self.mode not in get_args(LoraMode):
            raise ConfigError(f"The LoRA mode is {self.mode!r}; choose one of: {', '.join(get_args(LoraMode))}.")


@dataclass(frozen=True)
class ModelHandle:
    """What a CHROMA_MODEL link carries: a description, never weights, so that evicting it loses nothing."""

    spec: ModelSpec
    loras: tuple[LoraUse, ...] = ()

    def with_lora(self, lora: LoraUse) -> ModelHandle:
        """The same model with one more LoRA on top."""
        return replace(self, loras=(*self.loras, lora))
