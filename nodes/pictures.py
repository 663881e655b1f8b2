"""IMAGE and MASK lists of the host as pictures of their own: copies, so that no tensor of a prompt enters training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image
from torch import Tensor

from ..chroma_core.errors import DataError

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def pictures_of(images: Sequence[Tensor | None]) -> list[Image.Image]:
    """Every picture of a list of IMAGEs [B, H, W, C] (or [H, W, C]) in 0..1, in order, in 8 bits.

    Sizes may differ from one IMAGE to the next; C is 1, 3 or 4 (alpha). Raises DataError for anything else.
    """
    found = []
    for image in images:
        if image is None:
            continue
        if image.ndim == 3:
            image = image[None]
        if image.ndim != 4 or image.shape[-1] not in _MODES or not image.numel():
            raise DataError(
                f"Picture {len(found) + 1} has the shape {list(image.shape)}; an IMAGE is [batch, height, width, "
                "channels] with 1, 3 or 4 channels. Link the pictures from a node that gives IMAGE."
            )
        for pixels in image:
            values = _bytes(pixels, f"Picture {len(found) + 1}")
            found.append(Image.fromarray(values if values.shape[-1] > 1 else values[..., 0], _MODES[values.shape[-1]]))
    return found


def masks_of(masks: Sequence[Tensor | None], pictures: Sequence[Image.Image]) -> list[Image.Image | None]:
    """A loss mask for each picture from a list of MASKs [B, H, W] (or [H, W]) in 0..1, where 1 is trained.

    A single mask is for all pictures. One that is black all over is no mask (None): the host's Load Image gives such a
    one, of 64 × 64, for a picture without transparency.

    Raises DataError for another number of masks than pictures, or a mask of another shape than its picture.
    """
    found: list[Image.Image | None] = []
    for mask in masks:
        if mask is None:
            continue
        if mask.ndim not in (2, 3) or not mask.numel():
            raise DataError(
                f"Mask {len(found) + 1} has the shape {list(mask.shape)}; a MASK is [batch, height, width]. Link it "
                "from a node that gives MASK."
            )
        for pixels in mask[None] if mask.ndim == 2 else mask:
            values = _bytes(pixels, f"Mask {len(found) + 1}")
            found.append(Image.fromarray(values, "L") if values.any() else None)
    if len(found) not in (0, 1, len(pictures)):
        raise DataError(
            f"There are {len(pictures)} pictures and {len(found)} masks. Give one mask for each picture, in the same "
            "order, or a single one for all."
        )
    found = found * len(pictures) if len(found) == 1 else found
    for number, (mask, picture) in enumerate(zip(found, pictures, strict=False), 1):
        if mask and abs(mask.width * picture.height / (mask.height * picture.width) - 1) > 0.02:
            raise DataError(
                f"Mask {number} is {mask.width}×{mask.height}, but its picture is {picture.width}×{picture.height}: "
                "another shape. Make the mask from the very picture, or crop both alike."
            )
    return found


def _bytes(values: Tensor, what: str) -> np.ndarray:
    """0..1 as 0..255; the nearest, so that what was a file of 8 bits comes back unchanged."""
    array = values.detach().float().cpu().numpy()
    if not np.isfinite(array).all():
        raise DataError(f"{what} holds values that are not numbers. Look at the node that made it.")
    return (array.clip(0, 1) * 255).round().astype(np.uint8)
