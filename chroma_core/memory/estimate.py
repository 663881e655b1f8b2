"""How much memory a run will need, and what to choose on this machine; shown before anything starts.

Weights come from module trees on the meta device (`anatomy`), working memory from measured formulas (`activations`),
peaks and the choice from `plan`, the machine from `machine`. Nothing here reads a weight or touches the device.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .anatomy import anatomy
from .machine import Machine, in_gib, machine
from .plan import Recommendation, Settings, peaks, recommend


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
