"""How much memory a run will need, and what to choose on this machine; shown before anything starts.

Weights come from module trees on the meta device (`anatomy`), working memory from measured formulas (`activations`),
peaks and the choice from `plan`, the machine from `machine`. Nothing here reads a weight or touches the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

from ..flavours import flavour
from ..loading.spec import Offload
from .activations import TEXT_TOKENS
from .anatomy import anatomy
from .machine import GIB, Machine, in_gib, machine
from .plan import CHOICES, Purpose, Recommendation, Settings, fits_on, peaks
from .plan import recommend as _recommend


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes, by what they are for, and the settings to choose on the machine at hand.

    text_encoder_bytes: T5's weights. lora_bytes, optimizer_bytes: what is trained (fp32) and the optimizer's state.
    activation_bytes: a training step's working memory. The peaks are of the device; host_peak_bytes is the computer's
    memory while loading and sampling, files that are only mapped not counted.
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
        target: the LoRA's target, see `lora.targets`.
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


def plan_table(
    flavour_name: str,
    precision_name: str | None = None,
    *,
    size: int | None = None,
    batch_size: int = 1,
    rank: int = 16,
    gradient_checkpointing: bool = True,
    text_precision: str = "bf16",
    offload: Offload = "none",
    resident_blocks: int = 2,
    offload_during_startup: bool = False,
    on: Machine | None = None,
) -> str:
    """For people: what every precision and offload mode needs on a machine (None: this one), and what to choose.

    The row of `precision_name` and `offload` is marked as chosen (None: no row is), the recommended ones as such; a
    recommended row may differ from the rest in T5's precision and in gradient checkpointing. Raises as `estimate`.
    """
    on = on or machine()
    chosen = Settings(
        flavour_name,
        precision_name or CHOICES[0],
        text_precision,
        offload,
        resident_blocks,
        offload_during_startup,
        size if size is not None else flavour(flavour_name).size,
        batch_size,
        rank,
        gradient_checkpointing=gradient_checkpointing,
    )
    sampling, training = _recommend(chosen, on, "sampling"), _recommend(chosen, on, "training")
    notes: dict[Settings, list[str]] = {}
    for name in dict.fromkeys((*CHOICES, chosen.precision)):
        for mode in get_args(Offload):
            row = replace(chosen, precision=name, offload=mode)
            notes[row] = ["chosen"] if precision_name and row == chosen else []
            for found in (sampling, training):
                if (found.precision, found.offload) == (name, mode):
                    notes.setdefault(found.applied_to(chosen), []).append(
                        f"recommended for {found.purpose}" if found.fits else f"needs least in {found.purpose}"
                    )
    unit, scale = ("MiB", 2**20) if peaks(chosen).sampling < GIB else ("GiB", GIB)
    header = ("precision", "T5", "offload", "sampling", "training", "computer", "fits")
    rows = [header, *(_row(settings, on, scale, marks) for settings, marks in notes.items())]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    about = (
        f"{unit} for {chosen.size} pixels, batch {batch_size}, LoRA rank {rank}. Sampling and training: peak on the "
        f"device (usable: {in_gib(on.device_budget)}); computer: peak of its memory (usable: {in_gib(on.host_budget)})."
    )
    return "\n".join([*lines, "", about, sampling.sentence, training.sentence])


def _row(settings: Settings, on: Machine, scale: int, marks: list[str]) -> tuple[str, ...]:
    found = peaks(settings, on.shared)
    purposes: tuple[Purpose, ...] = get_args(Purpose)
    fits = [purpose for purpose in purposes if fits_on(settings, on, purpose)]
    mode = settings.offload + (f" {settings.resident_blocks}" if settings.offload == "block" else "")
    host = max(found.host_sampling, found.host_training)
    marks = [*marks] if settings.gradient_checkpointing else [*marks, "no checkpointing"]
    return (
        settings.precision,
        settings.text_precision,
        mode,
        *(f"{value / scale:.1f}" for value in (found.sampling, found.training, host)),
        (", ".join(fits) or "-") + (f"   <- {', '.join(marks)}" if marks else ""),
    )
