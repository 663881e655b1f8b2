"""One usable image of a dataset, and opening image files the way a person sees them: upright, RGB, 8 bits."""

from __future__ import annotations

import struct
import zlib
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from .buckets import choose_bucket
from .dataset import DatasetConfig

OTHER_EXTENSIONS = {
    ".arw", ".avif", ".cr2", ".cr3", ".dng", ".exr", ".heic", ".heif", ".jp2", ".jxl", ".nef", ".psd", ".svg", ".tga",
    ".xcf",
}  # fmt: skip
"""Images that are not read here, unless `picture_extensions` has them; a dataset that has some says so."""

_USUAL = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
_PLUGINS = {"pillow_heif": "register_heif_opener", "pillow_jxl": ""}
"""Packages that teach Pillow a format, and what is called for it (nothing: importing does it)."""

_FORMAT_OF = {
    ".jpg": "JPEG", ".jpeg": "JPEG", ".jfif": "JPEG", ".tif": "TIFF", ".tiff": "TIFF", ".heic": "HEIF", ".heif": "HEIF",
}  # fmt: skip
_ORIENTATION_TAG, _SIDEWAYS = 0x0112, (5, 6, 7, 8)
# Pillow's decoders let many kinds of errors out of damaged files; the list was completed by flipping bytes at random.
_UNREADABLE = (
    OSError, ValueError, SyntaxError, LookupError, TypeError, ArithmeticError, EOFError, MemoryError, struct.error,
    zlib.error, Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip
_HUGE = 89_478_485
"""Pixels (Pillow's own threshold for a warning) above which a JPEG is decoded at half its size: still far more than any
bucket, for a quarter of the memory. Twice that is refused."""


@cache
def picture_extensions() -> frozenset[str]:
    """How the names of images end that are read: always the usual ones, AVIF where Pillow has it, HEIC and JPEG XL
    where pillow-heif and pillow-jxl-plugin are installed."""
    for package, register in _PLUGINS.items():
        with suppress(ImportError):
            module = import_module(package)
            if register:
                getattr(module, register)()
    known = Image.registered_extensions()
    more = {ending for ending in (".avif", ".heic", ".heif", ".jxl") if known.get(ending) in Image.OPEN}
    return frozenset(_USUAL | more)


class UnreadablePicture(Exception):
    """One file that cannot be decoded; callers skip, name and count it."""


@dataclass(frozen=True)
class PictureFacts:
    """What the header tells: size as displayed, more than one frame or page, an alpha channel, a false extension."""

    width: int
    height: int
    animated: bool = False
    transparent: bool = False
    misnamed: bool = False


def picture_facts(path: Path) -> PictureFacts:
    """Read the header alone. Raises UnreadablePicture."""
    try:
        if path.stat().st_size == 0:
            raise UnreadablePicture("the file is empty")
        with Image.open(path) as picture:
            width, height = picture.size
            # Without an EXIF chunk before the pixels Pillow would decode the whole PNG in search of a late one.
            late = picture.format == "PNG" and "exif" not in picture.info
            if not late and picture.getexif().get(_ORIENTATION_TAG) in _SIDEWAYS:
                width, height = height, width
            expected = _FORMAT_OF.get(path.suffix.lower(), path.suffix[1:].upper())
            # An MPO is a JPEG with a second view of the scene, as many telephones write them.
            actual = "JPEG" if picture.format == "MPO" else picture.format
            animated = picture.format != "MPO" and getattr(picture, "is_animated", False)
            return PictureFacts(width, height, animated, picture.has_transparency_data, actual != expected)
    except _UNREADABLE as error:
        raise UnreadablePicture(reason(error)) from error


def load_picture(path: Path, background: str = "white", least: int = 0) -> Image.Image:
    """Decode an image: upright by its EXIF, transparency laid over `background`, 16 bits reduced to 8, first frame.

    Colour profiles are not applied. A JPEG of more than 89 million pixels comes at half its size; with `least` above 0,
    which is for thumbnails, any JPEG at the eighth, quarter or half whose sides have so many pixels. Raises
    UnreadablePicture.
    """
    try:
        with Image.open(path) as opened:
            if least:
                opened.draft(None, (least, least))
            elif opened.width * opened.height > _HUGE:
                opened.draft(None, (opened.width // 2, opened.height // 2))
            picture = ImageOps.exif_transpose(opened)
            if picture.mode.startswith("I") or picture.mode == "F":
                values = np.asarray(picture, np.float32)
                # 16-bit files open as "I;16" or "I"; nothing in the file says which of 8 or 16 bits an "I" carries.
                scale = 257.0 if values.max(initial=0) > 255 else 1.0
                if picture.mode == "F" and values.max(initial=0) <= 1:
                    scale = 1 / 255
                picture = Image.fromarray((values / scale).clip(0, 255).astype(np.uint8))
            if picture.has_transparency_data:
                rgba = picture.convert("RGBA")
                behind = Image.new("RGBA", rgba.size, background)
                picture = Image.alpha_composite(behind, rgba)
            return picture.convert("RGB")
    except _UNREADABLE as error:
        raise UnreadablePicture(reason(error)) from error


def load_alpha(path: Path) -> Image.Image | None:
    """The alpha channel as displayed ("L", 255 where opaque), or None. Raises UnreadablePicture."""
    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened)
            return picture.convert("RGBA").getchannel("A") if picture.has_transparency_data else None
    except _UNREADABLE as error:
        raise UnreadablePicture(reason(error)) from error


def reason(error: Exception) -> str:
    """A short cause without the machine's paths."""
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {2 * _HUGE // 10**6} million pixels, the safety limit; save it smaller"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error) or type(error).__name__


@dataclass(frozen=True, kw_only=True)
class Picture(PictureFacts):
    """An image as a scan found it.

    Args:
        name: relative to the folder, with forward slashes.
        captions: as written, with trigger, prefix and suffix.
        sha256: of the file.
        drawn: `captions`, then their shuffled orders.
        repeats: from the folder's name.
        mask, mask_sha256: its loss mask's file and that file's hash; None and "alpha" where its alpha channel is the
            mask; None and "" where all of it counts.
        captioned: whether it has a caption of its own, not the default one or an empty one.
    """

    path: Path
    name: str
    captions: tuple[str, ...]
    sha256: str
    drawn: tuple[str, ...]
    repeats: int = 1
    mask: Path | None = None
    mask_sha256: str = ""
    captioned: bool = True

    @property
    def masked(self) -> bool:
        """Whether it has a loss mask."""
        return bool(self.mask_sha256)


def bucket_of(picture: Picture, config: DatasetConfig, resolution: int) -> tuple[int, int]:
    """The bucket (width, height) of an image at one base resolution."""
    return choose_bucket(picture.width, picture.height, resolution, config.alignment, config.upscale)
