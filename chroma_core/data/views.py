"""The views of an image that are cached: mirrored or not, where it is cropped, which draw of the VAE's posterior; and
where in them the loss counts.

All views of an image at a bucket size are equally likely at every use. Crops and posterior draws are functions of the
image and the view's number, so that the cache holds the same entries after a restart and for every job.

Where an image is cropped is the centre, or what the dataset's file `chromakit-crops.json` says of it.

Loss masks: white counts in full, black not at all (or as little as the floor). A mask is a file `name-masklabel.png`
beside the image `name.*` (OneTrainer's convention), or the image's own alpha channel.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import DataError
from ..files import read_kept
from .buckets import Size, crop_box
from .dataset import DatasetConfig
from .images import DatasetImage, UnreadableImage, load_alpha, load_image
from .order import generator, uniform

CENTRE = 0.5
CROPS = "chromakit-crops.json"
CROPS_FORMAT = 1


@dataclass(frozen=True)
class View:
    """How an image is cut and encoded.

    Args:
        bucket: width and height in pixels.
        crop: where the bucket lies on the overhang, from 0 (left or top) to 1; 0.5 is the centre.
        draw: number of the posterior's draw, None for its mean.
        background: what lies behind a transparent image.
    """

    bucket: Size
    flipped: bool = False
    crop: float = CENTRE
    draw: int | None = None
    background: str = "white"

    def extras(self) -> dict[str, Any]:
        """What differs from the plain view: only this enters a cache key, so that plain entries keep their names."""
        values = {"crop": self.crop, "draw": self.draw, "background": self.background}
        plain = View(self.bucket)
        return {key: value for key, value in values.items() if value != getattr(plain, key)}


def views_of(image: DatasetImage, bucket: Size, config: DatasetConfig) -> list[View]:
    """All views of an image at one bucket, those that differ in the posterior's draw side by side."""
    size = image.width, image.height
    flips = (False, True) if config.flip else (False,)
    draws = range(config.posterior_samples) if config.latents == "sample" else (None,)
    random = config.crop == "random"
    crops = crop_positions(image.sha256, size, bucket, config.random_crops) if random else (image.crop,)
    background = config.background if image.transparent else "white"
    return [View(bucket, flipped, crop, draw, background) for crop in crops for flipped in flips for draw in draws]


def crop_positions(sha256: str, size: Size, bucket: Size, count: int) -> tuple[float, ...]:
    """`count` positions along the overhang, one at random in each of `count` equal parts, so that they cover it.

    An image that fits its bucket to within a pixel has one, the centre.
    """
    scale = min(size[0] / bucket[0], size[1] / bucket[1])
    overhang = max(size[0] - bucket[0] * scale, size[1] - bucket[1] * scale)
    if overhang < 1:
        return (CENTRE,)
    return tuple(round((i + uniform(generator(0, f"crop/{sha256}", *bucket, i))) / count, 4) for i in range(count))


def read_crops(folder: Path) -> dict[str, float]:
    """Where images of a dataset are cropped, by their names; those in the centre are left out.

    Raises DataError for a file that is damaged, or of a later version.
    """

    def parse(found: Any) -> dict[str, float]:
        return {str(name): round(min(1.0, max(0.0, float(at))), 4) for name, at in found["crops"].items()}

    return read_kept(folder / CROPS, f"'{CROPS}' in the dataset '{folder.name}'", CROPS_FORMAT, parse, DataError) or {}


def crops_or_centred(folder: Path) -> tuple[dict[str, float], list[str]]:
    """`read_crops`; of a file that cannot be read nothing, and what to warn of."""
    try:
        return read_crops(folder), []
    except DataError as error:
        return {}, [f"{error} Until then all images are cropped at the centre."]


def posterior_noise(sha256: str, view: View, shape: torch.Size) -> Tensor:
    """The standard normal numbers (fp32) of a view's draw."""
    key = f"posterior/{sha256}/{view.bucket}/{view.flipped}/{view.crop}"
    return torch.randn(shape, generator=generator(0, key, view.draw or 0))


SUFFIX = "-masklabel"


def mask_file(path: Path) -> Path:
    """Where an image's mask lies, if it has one."""
    return path.with_name(f"{path.stem}{SUFFIX}.png")


def is_mask(path: Path) -> bool:
    """Whether a file is a mask by its name."""
    return path.stem.endswith(SUFFIX)


def mask_owner(path: Path) -> Path:
    """The path, without extension, of the image that a mask belongs to."""
    return path.with_name(path.stem.removesuffix(SUFFIX))


def load_mask(image: Path, mask: Path | None) -> Image.Image | None:
    """An image's mask ("L") at the image's own size: the file, or for None the alpha channel if it has one.

    Raises:
        UnreadableImage: the file cannot be decoded, is black all over, or has another shape than the image.
    """
    if mask is None:
        found = load_alpha(image)
    else:
        try:
            found = load_image(mask, "black").convert("L")
        except UnreadableImage as error:
            raise UnreadableImage(f"its mask: {error}") from error
        width, height = load_image(image).size
        if abs(found.width * height / (found.height * width) - 1) > 0.02:
            raise UnreadableImage(
                f"its mask has another shape ({found.width}x{found.height}) than it ({width}x{height})"
            )
        if found.size != (width, height):
            found = found.resize((width, height), Image.Resampling.BILINEAR)
    if found is not None and found.getextrema()[1] == 0:
        raise UnreadableImage("its mask is black all over, so nothing of it would be trained")
    return found


def mask_tensor(mask: Image.Image, view: View, height: int, width: int, floor: float) -> Tensor:
    """The mask as the latents of a view see it: [1, height, width] (rows and columns of latents), floor..1, fp32.

    Each value is the mean over the pixels that its latent covers.
    """
    box = crop_box(*mask.size, view.bucket, view.crop)
    if view.flipped:
        box = (mask.width - box[2], box[1], mask.width - box[0], box[3])
        mask = ImageOps.mirror(mask)
    small = mask.convert("F").resize((width, height), Image.Resampling.BOX, box=box)
    values = torch.from_numpy(np.array(small, dtype=np.float32))[None] / 255
    return floor + (1 - floor) * values.clamp(0, 1)
