"""Opening picture files the way a person sees them: upright, RGB, 8 bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

PICTURE_EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
_ORIENTATION_TAG, _SIDEWAYS = 0x0112, (5, 6, 7, 8)
_UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


class UnreadablePicture(Exception):
    """One file that cannot be decoded; callers skip, name and count it."""


def picture_size(path: Path) -> tuple[int, int]:
    """(width, height) as displayed, from the header alone. Raises UnreadablePicture."""
    try:
        with Image.open(path) as picture:
            width, height = picture.size
            if picture.format == "PNG" and "exif" not in picture.info:
                return width, height  # Pillow would decode the whole file in search of a late EXIF chunk
            return (height, width) if picture.getexif().get(_ORIENTATION_TAG) in _SIDEWAYS else (width, height)
    except _UNREADABLE as error:
        raise UnreadablePicture(reason(error)) from error


def load_picture(path: Path) -> Image.Image:
    """Decode a picture: EXIF orientation applied, transparency laid over white, 16 bits reduced to 8, first frame.

    Raises UnreadablePicture.
    """
    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened)
            if picture.mode.startswith("I") or picture.mode == "F":
                values = np.asarray(picture, np.float32)
                # 16-bit files open as "I;16" or "I"; nothing in the file says which of 8 or 16 bits an "I" carries.
                scale = 257.0 if values.max(initial=0) > 255 else 1.0
                picture = Image.fromarray((values / scale).clip(0, 255).astype(np.uint8))
            if picture.has_transparency_data:
                rgba = picture.convert("RGBA")
                white = Image.new("RGBA", rgba.size, "white")
                picture = Image.alpha_composite(white, rgba)
            return picture.convert("RGB")
    except _UNREADABLE as error:
        raise UnreadablePicture(reason(error)) from error


def reason(error: Exception) -> str:
    """A short cause without the machine's paths."""
    if isinstance(error, Image.DecompressionBombError):
        return "more pixels than Pillow's safety limit"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not a picture"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error) or type(error).__name__
