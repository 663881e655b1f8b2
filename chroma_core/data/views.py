"""The views of a picture that are cached: mirrored or not, where it is cropped, which draw of the VAE's posterior.

All views of a picture at a bucket size are equally likely at every use. Crops and posterior draws are functions of the
picture and the view's number, so that the cache holds the same entries after a restart and for every job.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .buckets import Size
from .dataset import DatasetConfig
from .picture import Picture
from .randomness import generator, uniform


@dataclass(frozen=True)
class View:
    """How a picture is cut and encoded.

    Args:
        bucket: width and height in pixels.
        crop: where the bucket lies on the overhang, from 0 (left or top) to 1; 0.5 is the centre.
        draw: number of the posterior's draw, None for its mean.
        background: what lies behind a transparent picture.
    """

    bucket: Size
    flipped: bool = False
    crop: float = 0.5
    draw: int | None = None
    background: str = "white"

    def extras(self) -> dict[str, Any]:
        """What differs from the plain view: only this enters a cache key, so that plain entries keep their names."""
        values = {"crop": self.crop, "draw": self.draw, "background": self.background}
        plain = View(self.bucket)
        return {key: value for key, value in values.items() if value != getattr(plain, key)}


def views_of(picture: Picture, bucket: Size, config: DatasetConfig) -> list[View]:
    """All views of a picture at one bucket, those that differ in the posterior's draw side by side."""
    size = picture.width, picture.height
    flips = (False, True) if config.flip else (False,)
    draws = range(config.posterior_samples) if config.latents == "sample" else (None,)
    crops = crop_positions(picture.sha256, size, bucket, config.random_crops) if config.crop == "random" else (0.5,)
    background = config.background if picture.transparent else "white"
    return [View(bucket, flipped, crop, draw, background) for crop in crops for flipped in flips for draw in draws]


def crop_positions(sha256: str, size: Size, bucket: Size, count: int) -> tuple[float, ...]:
    """`count` positions along the overhang, one at random in each of `count` equal parts, so that they cover it.

    A picture that fits its bucket to within a pixel has one, the centre.
    """
    scale = min(size[0] / bucket[0], size[1] / bucket[1])
    overhang = max(size[0] - bucket[0] * scale, size[1] - bucket[1] * scale)
    if overhang < 1:
        return (0.5,)
    return tuple(round((i + uniform(generator(0, f"crop/{sha256}", *bucket, i))) / count, 4) for i in range(count))


def posterior_noise(sha256: str, view: View, shape: torch.Size) -> Tensor:
    """The standard normal numbers (fp32) of a view's draw."""
    key = f"posterior/{sha256}/{view.bucket}/{view.flipped}/{view.crop}"
    return torch.randn(shape, generator=generator(0, key, view.draw or 0))
