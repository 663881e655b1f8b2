"""One usable picture of a data set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .buckets import choose_bucket
from .dataset import DatasetConfig


@dataclass(frozen=True)
class Picture:
    """A picture as a scan found it.

    Args:
        name: relative to the folder, with forward slashes.
        captions: as written, with trigger, prefix and suffix.
        width, height: in pixels, as displayed.
        sha256: of the file.
        drawn: `captions`, then their shuffled orders.
        repeats: from the folder's name.
        transparent: whether it has an alpha channel.
        mask, mask_sha256: its loss mask's file and that file's hash; None and "alpha" where its alpha channel is the
            mask; None and "" where all of it counts.
        captioned: whether it has a caption of its own, not the default one or an empty one.
    """

    path: Path
    name: str
    captions: tuple[str, ...]
    width: int
    height: int
    sha256: str
    drawn: tuple[str, ...]
    repeats: int = 1
    transparent: bool = False
    mask: Path | None = None
    mask_sha256: str = ""
    captioned: bool = True

    @property
    def masked(self) -> bool:
        """Whether it has a loss mask."""
        return bool(self.mask_sha256)


def bucket_of(picture: Picture, config: DatasetConfig, resolution: int) -> tuple[int, int]:
    """The bucket (width, height) of a picture at one base resolution."""
    return choose_bucket(picture.width, picture.height, resolution, config.alignment, config.upscale)
