"""What training iterates over: pictures at a bucket size, with all their latents and captions in the cache."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from ..errors import DataError
from ..text import TextEncoder
from .cache import Between, LatentTextCache
from .captions import pick_caption
from .picture_files import UnreadablePicture
from .randomness import integer
from .scan import DatasetScan, bucket_of, describe_skipped

Progress = Callable[[str, int, int], None]
"""(what, done, of how many)"""


@dataclass(frozen=True)
class Sample:
    """A picture at one bucket size (width, height in pixels). `latents` has the mirrored variant second, if any."""

    name: str
    bucket: tuple[int, int]
    captions: tuple[str, ...]
    caption_dropout: float
    latents: tuple[Path, ...]

    def pick(self, random: torch.Generator) -> tuple[Path, str]:
        """The latents' path and the caption of one use of the sample."""
        variant = integer(len(self.latents), random)
        return self.latents[variant], pick_caption(self.captions, self.caption_dropout, random)


def cache_samples(
    scan: DatasetScan,
    cache: LatentTextCache,
    default_resolution: int,
    load_vae: Callable[[], AbstractContextManager[AutoencoderKL]],
    between: Between = lambda: None,
    progress: Progress = lambda *_: None,
) -> tuple[list[Sample], list[tuple[str, str]]]:
    """Make sure that all latents of a data set are cached; the VAE is loaded only if one is missing.

    Returns:
        the samples (pictures × resolutions × repeats) and the pictures that could not be decoded, with the reason.
    Raises:
        DataError: no picture could be decoded.
    """
    config = scan.config
    flips = (False, True) if config.flip else (False,)
    wanted = [
        (picture, bucket_of(picture, config, resolution))
        for resolution in config.sizes(default_resolution)
        for picture in scan.items
    ]
    wanted = list(dict.fromkeys(wanted))  # a small picture lands in one bucket at several resolutions
    missing = [
        (picture, bucket, flipped)
        for picture, bucket in wanted
        for flipped in flips
        if not cache.usable(cache.latents_path(picture, bucket, flipped))
    ]
    unreadable: dict[str, str] = {}
    if missing:
        between()
        with load_vae() as vae:
            for done, (picture, bucket, flipped) in enumerate(missing):
                between()
                progress("latents", done, len(missing))
                if picture.name in unreadable:
                    continue
                try:
                    cache.add_latents(picture, bucket, flipped, vae)
                except UnreadablePicture as error:
                    unreadable[picture.name] = f"unreadable picture: {error}"
    samples = [
        Sample(
            picture.name,
            bucket,
            picture.captions,
            config.caption_dropout,
            tuple(cache.latents_path(picture, bucket, flipped) for flipped in flips),
        )
        for picture, bucket in wanted
        if picture.name not in unreadable
    ]
    if not samples:
        raise DataError(
            f"No picture of the data set '{Path(config.folder).name}' could be decoded: "
            f"{describe_skipped(list(unreadable.items()))}. Save the files again in another program, or replace them."
        )
    return samples * config.repeats, list(unreadable.items())


def cache_texts(
    texts: Iterable[str],
    cache: LatentTextCache,
    load_text_encoder: Callable[[], AbstractContextManager[TextEncoder]],
    between: Between = lambda: None,
    progress: Progress = lambda *_: None,
) -> list[str]:
    """Make sure that all prompts are cached; T5 is loaded only if one is missing. Returns those that were cut."""
    texts = list(dict.fromkeys(texts))
    missing = [text for text in texts if not cache.usable(cache.text_path(text))]
    if missing:
        between()
        with load_text_encoder() as encoder:
            for done, text in enumerate(missing):
                between()
                progress("captions", done, len(missing))
                cache.add_text(text, encoder)
    return [text for text in texts if cache.text(text).truncated]


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
    return digest.hexdigest()


def picture_count(samples: Sequence[Sample]) -> int:
    """Different pictures behind the samples."""
    return len({sample.name for sample in samples})
