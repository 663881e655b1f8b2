"""A LoRA at a smaller rank: every layer's best approximation, and what each of them keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import LoraError, counted
from .lowrank import Truncated, Truncation, truncate_module
from .modules import KINDS, AdapterModule, FullModule, LoraFile


@dataclass(frozen=True)
class LayerKept:
    """One layer before and after: its ranks (None: a LoKr of whole factors), and the share of ‖ΔW‖² that is kept."""

    before: int | None
    after: int
    kept: float


@dataclass(frozen=True)
class Resized:
    """The smaller LoRA, with the header and key format of the first, and what became of each layer."""

    lora: LoraFile
    layers: Mapping[str, LayerKept]

    def summary(self) -> str:
        """One line for a person."""
        ranks = sorted({layer.after for layer in self.layers.values()})
        shown = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        name, least = min(self.layers.items(), key=lambda item: item[1].kept)
        mean = sum(layer.kept for layer in self.layers.values()) / len(self.layers)
        return (
            f"Rank {shown} in {counted(len(self.layers), 'layer')}: {mean:.2%} of ‖ΔW‖² is kept on average, least in "
            f"{name} ({least.kept:.2%})."
        )

    def table(self) -> str:
        """A line for each layer."""
        width = max(map(len, self.layers))
        lines = [f"{'layer':{width}}  before  after  kept of ‖ΔW‖²"]
        for name, layer in self.layers.items():
            before = "whole" if layer.before is None else layer.before
            lines.append(f"{name:{width}}  {before:>6}  {layer.after:>5}  {layer.kept:.3%}")
        return "\n".join(lines)


def resize(lora: LoraFile, how: Truncation) -> Resized:
    """Every layer at a smaller rank; one that is small enough already stays as it is, bit for bit.

    A LoKr becomes a plain LoRA; differences of norms and biases stay. Raises LoraError for an adapter of another kind.
    """
    made: dict[str, Truncated] = {}
    vectors: dict[str, AdapterModule] = {}
    for name, module in lora.modules.items():
        if isinstance(module, FullModule) and len(module.shape) == 1:
            vectors[name] = module
            continue
        if module.kind not in ("lora", "dora", "dora-columns", "lokr"):
            raise LoraError(f"'{name}' is a {KINDS[module.kind]}, which cannot be resized. Leave rank and energy out.")
        small = truncate_module(module, how)
        same = module.kind != "lokr" and module.rank is not None and small.module.rank >= module.rank
        made[name] = Truncated(module, 1.0) if same else small  # type: ignore[arg-type]
    layers = {n: LayerKept(lora.modules[n].rank, found.module.rank, found.kept) for n, found in made.items()}
    modules: dict[str, AdapterModule] = {name: found.module for name, found in made.items()}
    modules = {name: (modules | vectors)[name] for name in lora.modules}
    if not made:
        raise LoraError("There is nothing to resize: the LoRA changes norms and biases alone.")
    return Resized(LoraFile(modules, lora.metadata, lora.key_format, lora.unmatched, lora.alpha_source), layers)
