"""The part of a training job that trains weights of the model itself, without an adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ...data.settings import Settings
from ...errors import ConfigError

if TYPE_CHECKING:
    from .config import TrainingConfig

DEFAULT_RATE = 1e-5
"""The learning rate where none is given: a LoRA's is far too high for the weights themselves."""


class FullConfig(Settings):
    """Full-rank training: layers of blocks (see `fullrank.layers`), instead of an adapter.

    Weights and biases of the linear layers that `target` selects are trained, with `norms` also its query and key
    norms. `save_dtype` is that of the trained weights in the finished model; all others keep the type that they have
    in the base's files. `layouts`: `original` is one file as ComfyUI loads it, `diffusers` a folder. `ema_decay` as
    for adapters.
    """

    target: str | tuple[str, ...]
    norms: bool = False
    save_dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    layouts: tuple[Literal["original", "diffusers"], ...] = Field(default=("original", "diffusers"), min_length=1)
    ema_decay: float = Field(default=0.0, ge=0, lt=1)


def with_default_rate(data: Any) -> Any:
    """A job's values, with full-rank training's own learning rate where it names none."""
    if isinstance(data, dict) and data.get("full") and "learning_rate" not in data:
        return {**data, "learning_rate": DEFAULT_RATE}
    return data


def check_full(config: TrainingConfig) -> None:
    """Raise ConfigError for options that cannot go together with full-rank training."""
    if config.full is None:
        return
    adapter = [
        name for name, field in type(config.lora).model_fields.items() if getattr(config.lora, name) != field.default
    ]
    if adapter:
        raise ConfigError(
            f"A job trains either a LoRA or the model's own layers, but has both [full] and options of [lora]: "
            f"{', '.join(adapter)}. Leave one of the two out; an average of the weights is ema_decay in [full]."
        )
    if config.model.offload == "block":
        raise ConfigError(
            "Full-rank training cannot be combined with block streaming (offload 'block'): blocks that are trained "
            "change, and would have to travel back after every step. Choose offload 'none' or 'model', fewer blocks, "
            "or a quantised precision: the chosen layers are never quantised, the others are."
        )
    if any(dataset.regularisation for dataset in (config.dataset, *config.more_datasets)):
        raise ConfigError(
            "A regularisation set keeps the model as it is without its LoRA, which is asked for its prediction at "
            "every step. In full-rank training the weights themselves change and there is no such model any more. "
            "Leave the set out, or train its pictures as a set of their own."
        )
