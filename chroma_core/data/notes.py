"""What is doubtful about each single picture, in a few words that fit below a thumbnail.

`remarks` says the same about the data set as a whole, with counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from .dataset import DatasetConfig
from .picture import Picture
from .remarks import MANY_REPEATS

ENOUGH_TO_COMPARE = 4
"""Pictures from which on equal captions are remarked on."""


def notes(config: DatasetConfig, items: Sequence[Picture], default_resolution: int = 0) -> dict[str, list[str]]:
    """Remarks by picture name, the gravest first; pictures without one are left out.

    Args:
        default_resolution: pixels, what sizes are measured by when the data set has no resolution; 0: nothing.
    """
    resolution = config.sizes(default_resolution)[0]
    captions = Counter(caption for item in items for caption in set(item.captions))
    first: dict[str, str] = {}
    twins = Counter(item.sha256 for item in items)
    masks_expected = config.masks != "none" and 2 * sum(item.masked for item in items) >= len(items)
    found: dict[str, list[str]] = {}
    for item in items:
        own: list[str] = []
        if twins[item.sha256] > 1:
            original = first.setdefault(item.sha256, item.name)
            own.append(f"same picture as {original}" if original != item.name else "more than once in this set")
        own += _sizes(config, item, resolution)
        if not item.captioned:
            own.append("no caption" + (": default used" if config.default_caption is not None else ""))
        elif len(items) >= ENOUGH_TO_COMPARE and config.caption_source != "fixed":
            times = max(captions[caption] for caption in item.captions)
            if times > 1:
                own.append(f"{times} pictures have this caption")
        if masks_expected and not item.masked:
            own.append("no mask: all of it is trained")
        if item.repeats >= MANY_REPEATS:
            own.append(f"{item.repeats} repeats by its folder's name")
        if own:
            found[item.name] = own
    return found


def _sizes(config: DatasetConfig, item: Picture, resolution: int) -> list[str]:
    area, size = item.width * item.height, f"{item.width}×{item.height}"
    if min(item.width, item.height) < config.alignment:
        return [f"tiny: {size}, enlarged"]
    if area < (resolution / 2) ** 2:
        return [f"tiny: {size}" + (", enlarged" if config.upscale else "")]
    if area < resolution**2:
        return [f"small: {size}" + (", enlarged" if config.upscale else "")]
    return []
