"""What to load: plain values that travel over node links, into job files and into LoRA headers."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from ..errors import ConfigError
from ..flavours import flavour
from ..precision import precision

Offload = Literal["none", "model"]
"""`none` keeps every loaded component on the device; `model` lets T5, transformer and VAE take turns."""

LoraMode = Literal["live", "merged"]


@dataclass(frozen=True)
class ModelSpec:
    """A flavour (or a diffusers folder of the user's own) and the precision to hold it in."""

    flavour: str = "base"
    folder: str | None = None
    precision: str = "bf16"
    text_precision: str = "bf16"
    offload: Offload = "none"

    def __post_init__(self) -> None:
        flavour(self.flavour)
        precision(self.precision)
        precision(self.text_precision)
        if self.offload not in get_args(Offload):
            raise ConfigError(f"The offload mode is {self.offload!r}; choose one of: {', '.join(get_args(Offload))}.")

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
