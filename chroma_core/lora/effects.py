"""What each block of a LoRA does to an image: the image is sampled with one group of blocks left out at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image
from torch import Tensor, nn

from ..errors import ConfigError
from ..model.drawing import side_by_side
from .adapters import adapted_layers, set_strength

_BLOCK = re.compile(r"^(single_)?transformer_blocks\.(\d+)\.")
_NAMES = {False: "double", True: "single"}

WITH, WITHOUT, REST = "with the LoRA", "without it", "the rest"


def block_groups(layers: Iterable[str], count: int) -> dict[str, list[str]]:
    """The layers of a LoRA in at most about `count` groups of neighbouring blocks, double and single ones apart.

    Names are `double 0-4`, `single 12`; layers outside of blocks are a group of their own, `the rest`.
    Raises ConfigError for a count below 1.
    """
    if count < 1:
        raise ConfigError(f"The number of block groups is {count}; it must be at least 1.")
    blocks: dict[tuple[bool, int], list[str]] = {}
    rest = []
    for layer in layers:
        match = _BLOCK.match(layer)
        if match is None:
            rest.append(layer)
        else:
            blocks.setdefault((bool(match[1]), int(match[2])), []).append(layer)
    found: dict[str, list[str]] = {}
    for single, name in _NAMES.items():
        own = sorted(number for kind, number in blocks if kind is single)
        for part in np.array_split(own, max(1, round(count * len(own) / len(blocks)))) if own else ():
            numbers = part.tolist()
            if not numbers:  # more groups were asked for than there are blocks
                continue
            label = f"{name} {numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else f"{name} {numbers[0]}"
            found[label] = [layer for number in numbers for layer in blocks[single, number]]
    return found | ({REST: rest} if rest else {})


def effects_of(transformer: nn.Module, name: str, count: int, generate: Callable[[], Tensor]) -> dict[str, Tensor]:
    """What `generate` gives with a live LoRA, without all of it, and without each of about `count` groups of blocks.

    The LoRA has its strengths again afterwards, also after an error.
    """
    branches = {path: layer.branch(name) for path, layer in adapted_layers(transformer)}
    strengths = {path: branch.strength for path, branch in branches.items() if branch is not None}
    groups = block_groups(strengths, count)
    found = {}
    try:
        for label, off in {WITH: (), WITHOUT: strengths, **groups}.items():
            set_strength(transformer, name, {**strengths, **dict.fromkeys(off, 0.0)})
            found[label] = generate()
        return found
    finally:
        set_strength(transformer, name, strengths)


@dataclass(frozen=True)
class Effects:
    """Images by label, WITH and WITHOUT first."""

    images: Mapping[str, Image.Image]

    @property
    def differences(self) -> dict[str, float]:
        """The mean difference of every other image to the one with the whole LoRA, of 255 levels."""
        return {label: float(np.abs(self._distance(label)).mean()) for label in self.images if label != WITH}

    def report(self) -> str:
        """A line for each group, the largest difference first."""
        found = self.differences
        whole = found.pop(WITHOUT)
        lines = [f"Without the LoRA the image differs by {whole:.2f} of 255 on average; without a part of it:"]
        lines += [f"{label}: {value:.2f}" for label, value in sorted(found.items(), key=lambda item: -item[1])]
        return "\n".join(lines)

    def sheet(self) -> Image.Image:
        """Every image, and beside each its difference to the first, all brightened alike."""
        differences = self.differences
        largest = max([np.abs(self._distance(label)).max() for label in differences], default=0) or 1
        cells = {WITH: self.images[WITH], f"differences: × {255 / largest:.3g}": Image.new("RGB", (64, 64))}
        for label, value in differences.items():
            cells[label if label == WITHOUT else f"without {label}"] = self.images[label]
            grey = (np.abs(self._distance(label)) * (255 / largest)).clip(0, 255).astype(np.uint8)
            cells[f"{label}: differs by {value:.2f}"] = Image.fromarray(grey)
        return side_by_side(cells)

    def _distance(self, label: str) -> np.ndarray:
        first, other = (np.asarray(self.images[name].convert("RGB"), np.float32) for name in (WITH, label))
        return other - first
