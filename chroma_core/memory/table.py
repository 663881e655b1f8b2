"""What settings will need, and every precision and offload mode on a machine: as values, and as tables for people.

Weights come from module trees on the meta device (`anatomy`), working memory from measured formulas (`activations`),
peaks and the choice from `plan`, the machine from `machine`. Nothing here reads a weight or touches the device.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

from ..loading.spec import Offload
from .anatomy import anatomy
from .machine import GIB, Machine, in_gib, machine
from .plan import CHOICES, CHOSEN, Purpose, Recommendation, Settings, fits_on, peaks, recommend


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


def estimate(settings: Settings, on: Machine | None = None) -> MemoryEstimate:
    """What sampling and training need, and what to choose on a machine (None: this one)."""
    on = on or machine()
    found = peaks(settings, on.shared)
    return MemoryEstimate(
        transformer_parameters=anatomy(settings.flavour).transformer.whole.parameters,
        weights_bytes=found.weights,
        text_encoder_bytes=found.text_encoder,
        lora_bytes=found.lora,
        optimizer_bytes=found.optimizer,
        activation_bytes=found.activations,
        sampling_peak_bytes=found.sampling,
        training_peak_bytes=found.training,
        host_peak_bytes=found.host_sampling,
        recommendation=recommend(settings, on, "sampling"),
        training_recommendation=recommend(settings, on, "training"),
    )


MARKS = {
    "chosen": "chosen",
    "recommended_sampling": "recommended for sampling",
    "recommended_training": "recommended for training",
    "least_sampling": "needs least in sampling",
    "least_training": "needs least in training",
    "no_checkpointing": "no checkpointing",
}
"""What is said of a row, by its code; the page has words of its own."""


@dataclass(frozen=True)
class PlanRow:
    """One choice of settings. Bytes are peaks: of the GPU in sampling and training, of RAM in either.

    fits: the purposes that leave the machine its margins. marks: codes, see `MARKS`.
    """

    settings: Settings
    sampling_bytes: int
    training_bytes: int
    host_bytes: int
    fits: tuple[Purpose, ...]
    marks: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: what a user chooses, and what it needs."""
        chosen = {name: getattr(self.settings, name) for name in CHOSEN}
        return {**chosen, **{name: value for name, value in asdict(self).items() if name != "settings"}}


@dataclass(frozen=True)
class MemoryPlan:
    """The rows of a table, the settings that they vary, the machine, and what to choose on it."""

    chosen: Settings
    on: Machine
    rows: tuple[PlanRow, ...]
    sampling: Recommendation
    training: Recommendation

    @property
    def text(self) -> str:
        """The table for people."""
        unit, scale = ("MiB", 2**20) if peaks(self.chosen).sampling < GIB else ("GiB", GIB)
        header = ("precision", "T5", "offload", "sampling", "training", "computer", "fits")
        rows = [header, *(_cells(row, scale) for row in self.rows)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        padded = [[f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)] for row in rows]
        lines = ["  ".join(row).rstrip() for row in padded]
        about = (
            f"{unit} for {self.chosen.pixels} pixels, batch {self.chosen.batch_size}, LoRA rank {self.chosen.rank}. "
            f"Sampling and training: peak on the device (usable: {in_gib(self.on.device_budget)}); computer: peak of "
            f"its memory (usable: {in_gib(self.on.host_budget)})."
        )
        return "\n".join([*lines, "", about, self.sampling.sentence, self.training.sentence])


def memory_plan(chosen: Settings, on: Machine | None = None) -> MemoryPlan:
    """What every precision and offload mode needs on a machine (None: this one), and what to choose.

    The row of what is chosen is marked, and the recommended ones, which may differ from the rest in T5's precision and
    in gradient checkpointing.
    """
    on = on or machine()
    sampling, training = recommend(chosen, on, "sampling"), recommend(chosen, on, "training")
    notes: dict[Settings, list[str]] = {}
    for name in dict.fromkeys((*CHOICES, chosen.precision)):
        for mode in get_args(Offload):
            row = replace(chosen, precision=name, offload=mode)
            notes[row] = ["chosen"] if row == chosen else []
            for found in (sampling, training):
                if (found.precision, found.offload) == (name, mode):
                    notes.setdefault(found.applied_to(chosen), []).append(
                        f"{'recommended' if found.fits else 'least'}_{found.purpose}"
                    )
    rows = tuple(_row(settings, on, marks) for settings, marks in notes.items())
    return MemoryPlan(chosen, on, rows, sampling, training)


def _row(settings: Settings, on: Machine, marks: list[str]) -> PlanRow:
    found = peaks(settings, on.shared)
    purposes: tuple[Purpose, ...] = get_args(Purpose)
    fits: tuple[Purpose, ...] = tuple(purpose for purpose in purposes if fits_on(settings, on, purpose))
    marks = marks if settings.gradient_checkpointing else [*marks, "no_checkpointing"]
    host = max(found.host_sampling, found.host_training)
    return PlanRow(settings, found.sampling, found.training, host, fits, tuple(marks))


def _cells(row: PlanRow, scale: int) -> tuple[str, ...]:
    settings = row.settings
    mode = settings.offload + (f" {settings.resident_blocks}" if settings.offload == "block" else "")
    return (
        settings.precision,
        settings.text_precision,
        mode,
        *(f"{value / scale:.1f}" for value in (row.sampling_bytes, row.training_bytes, row.host_bytes)),
        (", ".join(row.fits) or "-") + (f"   <- {', '.join(MARKS[mark] for mark in row.marks)}" if row.marks else ""),
    )
