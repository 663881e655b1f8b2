"""What to warn of in a dataset: of the whole, with counts and examples, and of each single image, in a few words that
fit below a thumbnail.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import mean

from ..errors import first_few, shortened
from .dataset import DatasetConfig
from .images import DatasetImage

MANY_REPEATS = 100
"""From here on the number in a folder's name may well be a year or a date."""
ENOUGH_TO_JUDGE = 8
"""Images from which on the variety of captions is judged."""


@dataclass
class Findings:
    """What a scan notes on its way and a list of images does not tell."""

    mask_files: int = 0
    foreign: list[str] = field(default_factory=list)
    metadata: list[str] = field(default_factory=list)
    without_caption: int = 0
    captions_elsewhere: list[str] = field(default_factory=list)
    same_stem: list[str] = field(default_factory=list)


def describe_skipped(skipped: Iterable[tuple[str, str]]) -> str:
    """The first few skipped files with their reasons, as one phrase."""
    return first_few((f"{name} ({why})" for name, why in skipped), 5)


def dataset_warnings(
    config: DatasetConfig,
    items: Sequence[DatasetImage],
    skipped: Sequence[tuple[str, str]],
    findings: Findings,
    default_resolution: int,
) -> list[str]:
    """All warnings about a dataset, one a line."""
    found = []
    if skipped:
        images = "1 image was" if len(skipped) == 1 else f"{len(skipped)} images were"
        found.append(f"{images} skipped: {describe_skipped(skipped)}.")
    found += _about_captions(config, items, findings)
    found += _about_files(config, items, findings)
    found += _about_sizes(config, items, default_resolution)
    return found


def _about_captions(config: DatasetConfig, items: Sequence[DatasetImage], findings: Findings) -> list[str]:
    found = list(findings.metadata)
    if without := findings.without_caption:
        if config.default_caption is not None:
            found.append(f"{without} without a caption use the default caption.")
        elif config.missing_caption == "empty":
            found.append(f"{without} without a caption are trained with an empty one.")
        else:
            found.append(f"{without} without a caption are left out.")
    if elsewhere := findings.captions_elsewhere:
        found.append(
            f"{len(elsewhere)} have text in a file that is not read, such as {elsewhere[0]}: rename these files, or "
            f"set caption_extension (now '{config.caption_extension}')."
        )
    if same := findings.same_stem:
        found.append(f"{_several(same)} share one caption file with an image of the same name in another format.")
    captions = Counter(caption for item in items for caption in item.captions)
    if len(items) > 3 and len(captions) == 1:
        found.append("All captions are the same: the LoRA cannot tell the concept from the rest of the image.")
        return found
    most, times = max(captions.items(), key=lambda entry: entry[1])
    if len(items) > 3 and times > 1:
        found.append(f"{times} times the same caption: “{shortened(most)}”.")
    return found + low_variety([item.captions for item in items], config.trigger)


def low_variety(captions: Sequence[Sequence[str]], trigger: str = "") -> list[str]:
    """A warning if the captions of at least 8 images say little about each image, otherwise nothing.

    Variety is low when there are fewer than half as many different captions as images, or when a caption on average
    has fewer than two words of its own: words, other than the trigger's, that are not in four fifths of the captions.
    Letter case, punctuation and the order of words do not count.
    """
    if len(captions) < ENOUGH_TO_JUDGE:
        return []
    ignored = _words(trigger)
    sets = [_words(caption) - ignored for own in captions for caption in own]
    different = len(set(sets))
    counts = Counter(word for words in sets for word in words)
    own_words = mean(sum(counts[word] < 0.8 * len(sets) for word in words) for words in sets)
    if different * 2 >= len(captions) and own_words >= 2:
        return []
    return [
        f"Prompt variety is low: {different} different captions for {len(captions)} images, on average "
        f"{own_words:.1f} words that are not in nearly all of them. Say in each what is special about the image "
        "(place, pose, light, colours), or everything that all have in common is learned as one."
    ]


def _about_files(config: DatasetConfig, items: Sequence[DatasetImage], findings: Findings) -> list[str]:
    found = []
    groups: dict[str, list[str]] = {}
    for item in items:
        groups.setdefault(item.sha256, []).append(item.name)
    twins = [names for digest, names in groups.items() if digest and len(names) > 1]
    if twins:
        copies = sum(map(len, twins)) - len(twins)
        more = f" and {len(twins) - 3} more" if len(twins) > 3 else ""
        named = "; ".join(" = ".join(names) for names in twins[:3])
        found.append(f"Identical images ({copies} too many): {named}{more}.")
    over = sum(item.transparent for item in items)
    if over:
        found.append(f"{over} with transparency are laid over {config.background}.")
    if animated := [item.name for item in items if item.animated]:
        found.append(f"Of {_several(animated)} with several frames or pages only the first is used.")
    if misnamed := [item.name for item in items if item.misnamed]:
        found.append(f"{_several(misnamed)} of another format than the name says; read all the same.")
    if findings.foreign:
        found.append(f"{_several(findings.foreign)} in a format that is not read; save as PNG or JPEG to use them.")
    if many_repeats := [item.name for item in items if item.repeats >= MANY_REPEATS]:
        found.append(
            f"{_several(many_repeats)} with {MANY_REPEATS} repeats or more from the folder's name; set "
            "repeat_folders to false if that number means something else."
        )
    masked = sum(item.masked for item in items)
    if config.masks == "none" and findings.mask_files:
        found.append(f"{findings.mask_files} mask files are not used; set masks to 'files' to use them.")
    elif config.masks != "none" and masked < len(items):
        found.append(f"{len(items) - masked} without a mask are trained as a whole.")
    return found


def _about_sizes(config: DatasetConfig, items: Sequence[DatasetImage], default_resolution: int) -> list[str]:
    found = []
    resolution = config.sizes(default_resolution)[0]
    small = [item.name for item in items if item.width * item.height < resolution**2]
    if small:
        fate = "are enlarged" if config.upscale else "are trained at their own, smaller size"
        found.append(f"{len(small)} smaller than the training resolution {fate}, e.g. {small[0]}.")
    tiny = [item.name for item in items if item.width * item.height < (resolution / 2) ** 2]
    if tiny:
        found.append(f"{len(tiny)} tiny (under a quarter of the training resolution's area), e.g. {tiny[0]}.")
    cramped = [item.name for item in items if min(item.width, item.height) < config.alignment]
    if cramped:
        found.append(f"{len(cramped)} with a side below {config.alignment} pixels are enlarged, e.g. {cramped[0]}.")
    return found


def _several(names: Sequence[str]) -> str:
    return f"{len(names)} ({names[0]}{', …' if len(names) > 1 else ''})"


def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text.lower()))


ENOUGH_TO_COMPARE = 4
"""Images from which on equal captions are warned of."""


def image_warnings(
    config: DatasetConfig, items: Sequence[DatasetImage], default_resolution: int = 0
) -> dict[str, list[str]]:
    """Warnings by the image's name, the gravest first; images without one are left out.

    Args:
        default_resolution: pixels, what sizes are measured by when the dataset has no resolution; 0: nothing.
    """
    resolution = config.sizes(default_resolution)[0]
    captions = Counter(caption for item in items for caption in set(item.captions))
    first: dict[str, str] = {}
    twins = Counter(item.sha256 for item in items if item.sha256)
    masks_expected = config.masks != "none" and 2 * sum(item.masked for item in items) >= len(items)
    found: dict[str, list[str]] = {}
    for item in items:
        own: list[str] = []
        if twins[item.sha256] > 1:
            original = first.setdefault(item.sha256, item.name)
            own.append(f"same image as {original}" if original != item.name else "more than once in this set")
        own += _sizes(config, item, resolution)
        if not item.captioned:
            own.append("no caption" + (": default used" if config.default_caption is not None else ""))
        elif len(items) >= ENOUGH_TO_COMPARE and config.caption_source != "fixed":
            times = max(captions[caption] for caption in item.captions)
            if times > 1:
                own.append(f"{times} images have this caption")
        if masks_expected and not item.masked:
            own.append("no mask: all of it is trained")
        if item.repeats >= MANY_REPEATS:
            own.append(f"{item.repeats} repeats by its folder's name")
        if own:
            found[item.name] = own
    return found


def _sizes(config: DatasetConfig, item: DatasetImage, resolution: int) -> list[str]:
    area, size = item.width * item.height, f"{item.width}×{item.height}"
    if min(item.width, item.height) < config.alignment:
        return [f"tiny: {size}, enlarged"]
    if area < (resolution / 2) ** 2:
        return [f"tiny: {size}" + (", enlarged" if config.upscale else "")]
    if area < resolution**2:
        return [f"small: {size}" + (", enlarged" if config.upscale else "")]
    return []
