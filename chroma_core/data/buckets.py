"""Aspect buckets: sizes of (nearly) constant area, so that images are trained in their own shape.

Sizes are (width, height) in pixels.
"""

from __future__ import annotations

import math
from functools import cache, lru_cache

from PIL import Image

Size = tuple[int, int]
"""Width and height in pixels."""

MAX_ASPECT = 4.0
"""The longest side over the shortest that a bucket may have."""


@cache
def bucket_table(resolution: int, alignment: int = 64) -> tuple[Size, ...]:
    """All bucket sizes whose area is at most resolution², sides multiples of `alignment`, aspect at most 4.

    For each width the tallest height that fits, and the mirror image of each; sorted by width.
    """
    area = max(resolution, alignment) ** 2
    sizes = set()
    for width in range(alignment, area // alignment + 1, alignment):
        height = area // width // alignment * alignment
        if height >= alignment and max(width, height) <= MAX_ASPECT * min(width, height):
            sizes |= {(width, height), (height, width)}
    return tuple(sorted(sizes))


@lru_cache(maxsize=10_000)
def choose_bucket(width: int, height: int, resolution: int, alignment: int = 64, upscale: bool = False) -> Size:
    """The bucket of an image: nearest aspect ratio, then the larger area.

    Args:
        resolution: side in pixels of the square whose area buckets have.
        upscale: whether an image with less area than that is enlarged; otherwise its bucket has its own area (but
            never less than one `alignment` square).
    """
    if not upscale:
        resolution = min(resolution, max(alignment, math.isqrt(width * height)))
    aspect = math.log(width / height)

    def misfit(size: Size) -> tuple[float, int, int]:
        return round(abs(math.log(size[0] / size[1]) - aspect), 6), -size[0] * size[1], size[0]

    return min(bucket_table(resolution, alignment), key=misfit)


def crop_box(width: int, height: int, bucket: Size, position: float = 0.5) -> tuple[float, float, float, float]:
    """The largest box of the bucket's aspect (left, top, right, bottom) in the image's pixels.

    Args:
        position: where it lies along the overhang, from 0 (left or top) to 1 (right or bottom); 0.5 is the centre.
    """
    scale = min(width / bucket[0], height / bucket[1])
    w, h = bucket[0] * scale, bucket[1] * scale
    left, top = max(0.0, (width - w) * position), max(0.0, (height - h) * position)
    # Rounding must not put an edge outside of the image, which Pillow refuses.
    return left, top, min(left + w, width), min(top + h, height)


def resize_and_crop(image: Image.Image, bucket: Size, position: float = 0.5) -> Image.Image:
    """Scale an image to cover the bucket (Lanczos) and cut the overhang: evenly, or as `crop_box` says."""
    if image.size == bucket:
        return image
    box = crop_box(*image.size, bucket, position)
    return image.resize(bucket, Image.Resampling.LANCZOS, box=box)
