"""What to warn of in a dataset: of the whole, with counts and examples, and of each single image; see `remarks`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import mean

from ..errors import first_few, shortened
from .dataset import DatasetConfig
from .images import DatasetImage
from .remarks import Remark

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
        code = "one_skipped" if len(skipped) == 1 else "skipped"
        found.append(Remark(code, count=len(skipped), files=describe_skipped(skipped)))
    found += _about_captions(config, items, findings)
    found += _about_files(config, items, findings)
    found += _about_sizes(config, items, default_resolution)
    return found


def _about_captions(config: DatasetConfig, items: Sequence[DatasetImage], findings: Findings) -> list[str]:
    found = list(findings.metadata)
    if without := findings.without_caption:
        if config.default_caption is not None:
            found.append(Remark("default_captions", count=without))
        elif config.missing_caption == "empty":
            found.append(Remark("empty_captions", count=without))
        else:
            found.append(Remark("left_out", count=without))
    if elsewhere := findings.captions_elsewhere:
        where = {"name": elsewhere[0], "extension": config.caption_extension}
        found.append(Remark("captions_elsewhere", count=len(elsewhere), **where))
    if same := findings.same_stem:
        found.append(Remark("same_stem", files=_several(same)))
    captions = Counter(caption for item in items for caption in item.captions)
    if len(items) > 3 and len(captions) == 1:
        found.append(Remark("all_the_same"))
        return found
    most, times = max(captions.items(), key=lambda entry: entry[1])
    if len(items) > 3 and times > 1:
        found.append(Remark("often_the_same", count=times, caption=shortened(most)))
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
    return [Remark("low_variety", different=different, images=len(captions), words=f"{own_words:.1f}")]


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
        found.append(Remark("twins", count=copies, files=f"{named}{more}"))
    over = sum(item.transparent for item in items)
    if over:
        found.append(Remark("transparent", count=over, background=config.background))
    if animated := [item.name for item in items if item.animated]:
        found.append(Remark("animated", files=_several(animated)))
    if misnamed := [item.name for item in items if item.misnamed]:
        found.append(Remark("misnamed", files=_several(misnamed)))
    if findings.foreign:
        found.append(Remark("not_read", files=_several(findings.foreign)))
    if many_repeats := [item.name for item in items if item.repeats >= MANY_REPEATS]:
        found.append(Remark("many_repeats", files=_several(many_repeats), repeats=MANY_REPEATS))
    masked = sum(item.masked for item in items)
    if config.masks == "none" and findings.mask_files:
        found.append(Remark("masks_unused", count=findings.mask_files))
    elif config.masks != "none" and masked < len(items):
        found.append(Remark("masks_missing", count=len(items) - masked))
    return found


def _about_sizes(config: DatasetConfig, items: Sequence[DatasetImage], default_resolution: int) -> list[str]:
    found = []
    resolution = config.sizes(default_resolution)[0]
    small = [item.name for item in items if item.width * item.height < resolution**2]
    if small:
        found.append(Remark("below_enlarged" if config.upscale else "below", count=len(small), name=small[0]))
    tiny = [item.name for item in items if item.width * item.height < (resolution / 2) ** 2]
    if tiny:
        found.append(Remark("far_below", count=len(tiny), name=tiny[0]))
    cramped = [item.name for item in items if min(item.width, item.height) < config.alignment]
    if cramped:
        found.append(Remark("cramped", count=len(cramped), pixels=config.alignment, name=cramped[0]))
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
            own.append(Remark("twin_of", name=original) if original != item.name else Remark("twin_first"))
        own += _sizes(config, item, resolution)
        if not item.captioned:
            own.append(Remark("captionless" if config.default_caption is None else "default_used"))
        elif len(items) >= ENOUGH_TO_COMPARE and config.caption_source != "fixed":
            times = max(captions[caption] for caption in item.captions)
            if times > 1:
                own.append(Remark("shared_caption", count=times))
        if masks_expected and not item.masked:
            own.append(Remark("maskless"))
        if item.repeats >= MANY_REPEATS:
            own.append(Remark("folder_repeats", count=item.repeats))
        if own:
            found[item.name] = own
    return found


def _sizes(config: DatasetConfig, item: DatasetImage, resolution: int) -> list[str]:
    area, size = item.width * item.height, f"{item.width}×{item.height}"
    if min(item.width, item.height) < config.alignment:
        return [Remark("tiny_enlarged", size=size)]
    if area >= resolution**2:
        return []
    code = "tiny" if area < (resolution / 2) ** 2 else "small"
    return [Remark(f"{code}_enlarged" if config.upscale else code, size=size)]
