"""How much memory a run will need, and what to choose on this machine; shown before anything starts.

Weights come from module trees on the meta device (`anatomy`), working memory from measured formulas (`activations`),
peaks and the choice from `plan`, the machine from `machine`. Nothing here reads a weight or touches the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..loading.spec import Offload
from ..model.flavours import flavour
from .activations import TEXT_TOKENS
from .anatomy import anatomy
from .machine import Machine, in_gib, machine
from .plan import Purpose, Recommendation, Settings, peaks
from .plan import recommend as _recommend


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes, by what they are for, and the settings to choose on the machine at hand.

    text_encoder_bytes: T5's weights. lora_bytes, optimizer_bytes: what is trained (fp32) and the optimizer's state.
    activation_bytes: a training step's working memory. The peaks are of the device; host_peak_bytes is RAM
    while loading and sampling. Files are read tensor by tensor, never mapped; the system's file cache is not counted.
    """

    transformer_parameters: int
    weights_bytes: int
    text_encoder_bytes: int
    lora_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    sampling_peak_bytes: int
    training_peak_bytes: int
    host_peak_bytes: int
    recommendation: Recommendation
    training_recommendation: Recommendation

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def table(self) -> str:
        """Two columns for people: what, and GiB (MiB below one)."""
        rows = [
            (name.removesuffix("_bytes").replace("_", " "), in_gib(value))
            for name, value in self.to_dict().items()
            if name.endswith("_bytes")
        ]
        return "\n".join(f"{name:<18} {value:>11}" for name, value in rows)


def estimate(
    flavour_name: str,
    precision_name: str,
    *,
    size: int | None = None,
    batch_size: int = 1,
    rank: int = 16,
    gradient_checkpointing: bool = True,
    text_precision: str = "bf16",
    offload: Offload = "none",
    resident_blocks: int = 2,
    offload_during_startup: bool = False,
    optimizer: str = "adamw",
    target: str | Sequence[str] = "all",
    adapter: str = "lora",
    lokr_factor: int = -1,
    ema: bool = False,
    text_tokens: int = TEXT_TOKENS,
    trained_parameters: int = 0,
    on: Machine | None = None,
) -> MemoryEstimate:
    """Estimate sampling and LoRA training at `size` × `size` pixels (None: the flavour's default).

    Args:
        resident_blocks: with offload `block`, blocks on the device.
        optimizer: a name from `trained.OPTIMIZERS`.
        adapter, lokr_factor, ema, text_tokens, trained_parameters: see `plan.Settings`.
        target: the LoRA's target, see `lora.settings`.
        on: the machine to recommend settings for; None: this one.
    Raises:
        ConfigError, PrecisionError: an unknown name or an impossible number.
    """
    settings = Settings(
        flavour_name,
        precision_name,
        text_precision,
        offload,
        resident_blocks,
        offload_during_startup,
        size if size is not None else flavour(flavour_name).size,
        batch_size,
        rank,
        target if isinstance(target, str) else tuple(target),
        optimizer,
        gradient_checkpointing,
        adapter,
        lokr_factor,
        ema,
        text_tokens,
        trained_parameters,
    )
    on = on or machine()
    found = peaks(settings, on.shared)
    return MemoryEstimate(
        transformer_parameters=anatomy(flavour_name).transformer.whole.parameters,
        weights_bytes=found.weights,
        text_encoder_bytes=found.text_encoder,
        lora_bytes=found.lora,
        optimizer_bytes=found.optimizer,
        activation_bytes=found.activations,
        sampling_peak_bytes=found.sampling,
        training_peak_bytes=found.training,
        host_peak_bytes=found.host_sampling,
        recommendation=_recommend(settings, on, "sampling"),
        training_recommendation=_recommend(settings, on, "training"),
    )


def recommend(
    flavour_name: str,
    size: int | None = None,
    on: Machine | None = None,
    purpose: Purpose = "sampling",
    *,
    batch_size: int = 1,
    rank: int = 16,
    target: str | Sequence[str] = "all",
) -> Recommendation:
    """The settings to choose for a flavour at `size` pixels (None: its default) on a machine (None: this one).

    See `plan.recommend` for the order of preference. Raises as `estimate`.
    """
    settings = Settings(
        flavour_name,
        size=size if size is not None else flavour(flavour_name).size,
        batch_size=batch_size,
        rank=rank,
        target=target if isinstance(target, str) else tuple(target),
    )
    return _recommend(settings, on or machine(), purpose)
