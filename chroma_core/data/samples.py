"""What training iterates over: images at a bucket size, with all their latents and captions in the cache."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import torch

from ..errors import DataError
from ..model.vae import Autoencoder
from ..sampling.text import TextEncoder
from .cache import Between, LatentTextCache, decoded
from .captions import pick_caption
from .images import DatasetImage, UnreadableImage, bucket_of
from .order import integer
from .scan import DatasetScan
from .views import View, views_of
from .warnings import describe_skipped

AHEAD = 2
"""Images that are decoded, and latents that are written, while another is encoded."""

Progress = Callable[[str, int, int], None]
"""(what, done, of how many)"""


@dataclass(frozen=True)
class Use:
    """What one use of a sample trains on: entries of latents and, if any, of the loss mask; the caption."""

    latents: Path
    mask: Path | None
    caption: str


@dataclass(frozen=True)
class Sample:
    """An image at one bucket size (width, height in pixels).

    Args:
        captions: all that may be drawn, with trigger; the first is as written, and so is the first of `latents`.
        latents: the entries of all views, equally likely.
        masks: the loss masks of the same views, or nothing: then all of the image counts.
        regularisation, sigma_bias: of the set that the image is in; for the objective.
    """

    name: str
    bucket: tuple[int, int]
    captions: tuple[str, ...]
    caption_dropout: float
    latents: tuple[Path, ...]
    masks: tuple[Path, ...] = ()
    regularisation: bool = False
    sigma_bias: float = 0.0

    def use(self, random: torch.Generator) -> Use:
        """One use of the sample: a view and a caption are drawn."""
        view = integer(len(self.latents), random)
        caption = pick_caption(self.captions, self.caption_dropout, random)
        return Use(self.latents[view], self.masks[view] if self.masks else None, caption)


def cache_samples(
    scan: DatasetScan,
    cache: LatentTextCache,
    default_resolution: int,
    load_vae: Callable[[], AbstractContextManager[Autoencoder]],
    between: Between = lambda: None,
    progress: Progress = lambda *_: None,
) -> tuple[list[Sample], list[tuple[str, str]]]:
    """Make sure that all latents and masks of a dataset are cached; the VAE is loaded only if latents are missing.

    Returns:
        the samples (images × resolutions × repeats) and the images that could not be used, with the reason.
    Raises:
        DataError: no image could be used.
    """
    config = scan.config
    wanted = {  # a small image lands in one bucket at several resolutions
        (image.name, bucket_of(image, config, resolution)): image
        for resolution in config.sizes(default_resolution)
        for image in scan.items
    }
    planned = [
        (image, [(view, cache.latents_path(image, view)) for view in views_of(image, bucket, config)])
        for (_, bucket), image in wanted.items()
    ]
    unreadable: dict[str, str] = {}
    missing = list(_missing(planned, cache))
    if missing:
        between()
        with load_vae() as vae:
            unreadable = _cache_latents(missing, cache, vae, between, progress)
    if config.masks != "none":
        unreadable |= _cache_masks(planned, cache, config.mask_floor, unreadable.keys(), between, progress)
    samples = [
        (
            Sample(
                image.name,
                views[0][0].bucket,
                image.drawn,
                config.caption_dropout,
                tuple(path for _, path in views),
                tuple(cache.mask_path(image, view, config.mask_floor) for view, _ in views) if image.masked else (),
                config.regularisation,
                config.sigma_bias,
            ),
            image.repeats,
        )
        for image, views in planned
        if image.name not in unreadable
    ]
    if not samples:
        raise DataError(
            f"No image of the dataset '{Path(config.folder).name}' could be decoded: "
            f"{describe_skipped(unreadable.items())}. Save the files again in another program, or replace them."
        )
    rounds = range(max(repeats for _, repeats in samples))
    repeated = [sample for i in rounds for sample, repeats in samples if i < repeats]
    return repeated * config.repeats, list(unreadable.items())


Planned = Sequence[tuple[DatasetImage, list[tuple[View, Path]]]]
"""Images with their views at one bucket size and the entries of these."""


def _missing(planned: Planned, cache: LatentTextCache) -> Iterator[tuple[DatasetImage, list[View]]]:
    """Views without an entry, those that one encoding serves together."""
    whole: set[tuple[tuple[int, int], int]] = set()

    def there(view: View, path: Path) -> bool:
        try:
            entry = view.bucket, os.stat(path).st_size
        except OSError:
            return False
        if entry not in whole and cache.about(path) is not None:
            whole.add(entry)  # all latents of a bucket take the same number of bytes
        return entry in whole

    for image, views in planned:
        for _, group in groupby(views, lambda pair: (pair[0].flipped, pair[0].crop)):
            if absent := [view for view, path in group if not there(view, path)]:
                yield image, absent


def _cache_latents(
    missing: Sequence[tuple[DatasetImage, list[View]]],
    cache: LatentTextCache,
    vae: Autoencoder,
    between: Between,
    progress: Progress,
) -> dict[str, str]:
    """Encode and write. While the device has one image, the next are decoded and the last are written.

    Returns the images that cannot be decoded, with the reason.
    """
    refused: dict[str, str] = {}
    with ThreadPoolExecutor(AHEAD, "chromakit-decoding") as decoders, ThreadPoolExecutor(1) as writer:
        pixels = deque(decoders.submit(decoded, image, views[0]) for image, views in missing[:AHEAD])
        writes: deque[Future] = deque()
        for done, (image, views) in enumerate(missing):
            between()
            progress("latents", done, len(missing))
            now = pixels.popleft()
            if done + AHEAD < len(missing):
                later, its = missing[done + AHEAD]
                pixels.append(decoders.submit(decoded, later, its[0]))
            try:
                found = cache.encoded(image, views, now.result(), vae)
            except UnreadableImage as error:
                refused.setdefault(image.name, f"unreadable image: {error}")
                continue
            writes.append(writer.submit(cache.add_latents, found, views[0]))
            if len(writes) > AHEAD:
                writes.popleft().result()
        for write in writes:
            write.result()
    return refused


def _cache_masks(
    planned: Planned,
    cache: LatentTextCache,
    floor: float,
    left_out: Collection[str],
    between: Between,
    progress: Progress,
) -> dict[str, str]:
    """Make sure that the masks are cached. Returns the images whose mask cannot be used, with the reason."""
    missing = [
        (image, view)
        for image, views in planned
        if image.masked and image.name not in left_out
        for view in dict.fromkeys(replace(view, draw=views[0][0].draw) for view, _ in views)
        if cache.about(cache.mask_path(image, view, floor)) is None
    ]
    refused: dict[str, str] = {}
    for done, (image, view) in enumerate(missing):
        between()
        progress("masks", done, len(missing))
        if image.name in refused:
            continue
        try:
            cache.add_mask(image, view, floor)
        except UnreadableImage as error:
            refused[image.name] = str(error)
    return refused


def cache_texts(
    texts: Iterable[str],
    cache: LatentTextCache,
    load_text_encoder: Callable[[], AbstractContextManager[TextEncoder]],
    between: Between = lambda: None,
    progress: Progress = lambda *_: None,
) -> list[str]:
    """Make sure that all prompts are cached; T5 is loaded only if one is missing. Returns those that were cut."""
    found = {text: cache.about(cache.text_path(text)) for text in dict.fromkeys(texts)}
    missing = [text for text, about in found.items() if about is None]
    if missing:
        between()
        with load_text_encoder() as encoder:
            for done, text in enumerate(missing):
                between()
                progress("captions", done, len(missing))
                cache.add_text(text, encoder)
                found[text] = cache.about(cache.text_path(text))
    return [text for text, about in found.items() if about is not None and int(about["truncated"])]


def caption_texts(samples: Sequence[Sample]) -> list[str]:
    """Every caption that training may ask for, the empty one included where dropout can draw it."""
    texts = [caption for sample in samples for caption in sample.captions]
    if any(sample.caption_dropout > 0 for sample in samples):
        texts.append("")
    return list(dict.fromkeys(texts))


def fingerprint(samples: Sequence[Sample]) -> str:
    """A hash of everything in the samples that training can see: equal data, equal training."""
    digest = hashlib.sha256()
    for sample in samples:
        paths = [path.name for path in sample.latents]
        digest.update(repr((sample.bucket, sample.captions, sample.caption_dropout, paths)).encode())
        extras = ([path.name for path in sample.masks], sample.regularisation, sample.sigma_bias)
        if extras != ([], False, 0.0):  # plain samples keep the hash that older jobs have noted
            digest.update(repr(extras).encode())
    return digest.hexdigest()


def image_count(samples: Sequence[Sample]) -> int:
    """Different images behind the samples."""
    return len({sample.name for sample in samples})


def caption_count(samples: Sequence[Sample]) -> int:
    """Different captions of the images behind the samples, as they were written; an empty one counts too."""
    return len({sample.captions[0] for sample in samples})


_LONGEST = 20
_CLOSE = 0.01


@dataclass(frozen=True)
class SampleSet:
    """The cached samples of one dataset, repeats included, its name, and its weight (see `DatasetConfig.weight`)."""

    name: str
    samples: list[Sample]
    weight: float = 1.0


def combine(sets: Sequence[SampleSet]) -> list[Sample]:
    """The samples of an epoch over all sets; a set on its own is left as it is.

    Every set appears a whole number of times, so that no image is left out of an epoch: with weights 1 and 0.5 the
    first set twice and the second once. See `multiples`.
    """
    if len(sets) == 1:
        return sets[0].samples
    names = _different([one.name for one in sets])
    samples: list[Sample] = []
    for name, one, times in zip(names, sets, multiples([one.weight for one in sets]), strict=True):
        samples += [replace(sample, name=f"{name}/{sample.name}") for sample in one.samples] * times
    return samples


def multiples(weights: Sequence[float]) -> list[int]:
    """Whole numbers in (nearly) the proportion of the weights, at least 1 each.

    The smallest numbers that are all right to 1 %, or the best with the smallest number up to 20.
    """
    relative = [weight / min(weights) for weight in weights]

    def error(factor: int) -> float:
        return max(abs(round(factor * one) / (factor * one) - 1) for one in relative)

    factors = range(1, _LONGEST + 1)
    factor = next((factor for factor in factors if error(factor) < _CLOSE), min(factors, key=error))
    return [round(factor * one) for one in relative]


def _different(names: Sequence[str]) -> list[str]:
    """The names, numbered where one comes twice."""
    return [name if names.count(name) == 1 else f"{name} {names[:i].count(name) + 1}" for i, name in enumerate(names)]
