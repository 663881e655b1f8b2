"""Loss masks: where in a picture the loss counts. White counts in full, black not at all (or as little as the floor).

A mask is a file `name-masklabel.png` beside the picture `name.*` (OneTrainer's convention), or the picture's own alpha
channel.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .buckets import crop_box
from .picture_files import UnreadablePicture, load_alpha, load_picture
from .views import View

SUFFIX = "-masklabel"


def mask_file(path: Path) -> Path:
    """Where a picture's mask lies, if it has one."""
    return path.with_name(f"{path.stem}{SUFFIX}.png")


def is_mask(path: Path) -> bool:
    """Whether a file is a mask by its name."""
    return path.stem.endswith(SUFFIX)


def mask_owner(path: Path) -> Path:
    """The path, without extension, of the picture that a mask belongs to."""
    return path.with_name(path.stem.removesuffix(SUFFIX))


def load_mask(picture: Path, mask: Path | None) -> Image.Image | None:
    """A picture's mask ("L") at the picture's own size: the file, or for None the alpha channel if it has one.

    Raises:
        UnreadablePicture: the file cannot be decoded, is black all over, or has another shape than the picture.
    """
    if mask is None:
        found = load_alpha(picture)
    else:
        try:
            found = load_picture(mask, "black").convert("L")
        except UnreadablePicture as error:
            raise UnreadablePicture(f"its mask: {error}") from error
        width, height = load_picture(picture).size
        if abs(found.width * height / (found.height * width) - 1) > 0.02:
            raise UnreadablePicture(
                f"its mask has another shape ({found.width}x{found.height}) than it ({width}x{height})"
            )
        if found.size != (width, height):
            found = found.resize((width, height), Image.Resampling.BILINEAR)
    if found is not None and found.getextrema()[1] == 0:
        raise UnreadablePicture("its mask is black all over, so nothing of it would be trained")
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
