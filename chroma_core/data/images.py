"""One usable image of a dataset, and opening image files the way a person sees them: upright, RGB, 8 bits."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from .buckets import choose_bucket
from .dataset import DatasetConfig

OTHER_EXTENSIONS = {
    ".arw", ".avif", ".cr2", ".cr3", ".dds", ".dng", ".exr", ".heic", ".heif", ".ico", ".j2k", ".jp2", ".jpe", ".jxl",
    ".nef", ".pcx", ".ppm", ".psd", ".qoi", ".svg", ".tga", ".xcf",
}  # fmt: skip
"""Images that are not read here, unless `image_extensions` has them; a dataset that has some says so."""

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
"""Pixels (Pillow's own threshold for a warning) above which an image is used at half its size: still far more than any
bucket, for a quarter of the memory. Twice that is refused."""
_STRIP = 1 << 23
"""Pixels that are converted at once, so that a large image is never there in several forms."""


@cache
def image_extensions() -> frozenset[str]:
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


def known_extensions() -> frozenset[str]:
    """How the names of images end, read here or not."""
    return image_extensions() | OTHER_EXTENSIONS


class UnreadableImage(Exception):
    """One file that cannot be decoded; callers skip, name and count it."""


@dataclass(frozen=True)
class ImageFacts:
    """What the header tells: size as displayed, more than one frame or page, an alpha channel, a false extension."""

    width: int
    height: int
    animated: bool = False
    transparent: bool = False
    misnamed: bool = False


def image_facts(path: Path) -> ImageFacts:
    """Read the header alone. Raises UnreadableImage."""
    try:
        if path.stat().st_size == 0:
            raise UnreadableImage("the file is empty")
        with Image.open(path) as image:
            _check_size(image)
            width, height = image.size
            # Without an EXIF chunk before the pixels Pillow would decode the whole PNG in search of a late one.
            late = image.format == "PNG" and "exif" not in image.info
            if not late and image.getexif().get(_ORIENTATION_TAG) in _SIDEWAYS:
                width, height = height, width
            expected = _FORMAT_OF.get(path.suffix.lower(), path.suffix[1:].upper())
            # An MPO is a JPEG with a second view of the scene, as many telephones write them.
            actual = "JPEG" if image.format == "MPO" else image.format
            animated = image.format != "MPO" and getattr(image, "is_animated", False)
            return ImageFacts(width, height, animated, image.has_transparency_data, actual != expected)
    except _UNREADABLE as error:
        raise UnreadableImage(reason(error)) from error


def load_image(path: Path, background: str = "white", least: int = 0) -> Image.Image:
    """Decode an image: upright by its EXIF, transparency laid over `background`, 16 bits reduced to 8, first frame.

    Colour profiles are not applied. One of more than 89 million pixels comes at half its size; with `least` above 0,
    which is for thumbnails, any JPEG at the eighth, quarter or half whose sides have so many pixels. Costs at most five
    bytes a pixel, and beside them ten for each of 8 million. Raises UnreadableImage.
    """
    try:
        with Image.open(path) as opened:
            _check_size(opened)
            if least:
                opened.draft(None, (least, least))
            elif opened.width * opened.height > _HUGE:
                opened.draft(None, (opened.width // 2, opened.height // 2))
            opened.load()
            scale = _scale(opened)
            return _upright(opened, "RGB", lambda strip: _flat(strip, background, scale))
    except _UNREADABLE as error:
        raise UnreadableImage(reason(error)) from error


def can_convert(path: Path) -> bool:
    """Whether Pillow knows what this file is, whatever its name says."""
    try:
        with Image.open(path) as image:
            _check_size(image)
            return True
    except _UNREADABLE:
        return False


def as_png(path: Path) -> bytes:
    """An image as `load_image` has it, with its transparency, as a PNG. Raises UnreadableImage."""
    image, alpha = load_image(path), load_alpha(path)
    if alpha is not None:
        image.putalpha(alpha)
    stream = BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def load_alpha(path: Path) -> Image.Image | None:
    """The alpha channel as displayed ("L", 255 where opaque), or None. Size and errors as `load_image`."""
    try:
        with Image.open(path) as opened:
            _check_size(opened)
            opened.load()
            if not opened.has_transparency_data:
                return None
            return _upright(opened, "L", lambda strip: strip.convert("RGBA").getchannel("A"))
    except _UNREADABLE as error:
        raise UnreadableImage(reason(error)) from error


def _check_size(opened: Image.Image) -> None:
    """Raise DecompressionBombError by what the header says: other programs switch Pillow's own limit off."""
    if opened.width * opened.height > 2 * _HUGE:
        raise Image.DecompressionBombError


def _upright(opened: Image.Image, mode: str, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """What `convert` makes of a decoded image, of `mode`, turned by its EXIF, and halved if it is huge."""
    width, height = opened.size
    factor = 2 if width * height > _HUGE else 1
    rows = max(2, _STRIP // width // 2 * 2)
    if factor == 1 and (rows >= height or (opened.mode == mode and not opened.has_transparency_data)):
        image = convert(opened)
    else:
        image = Image.new(mode, (-(-width // factor), -(-height // factor)))
        for top in range(0, height, rows):
            strip = convert(opened.crop((0, top, width, min(height, top + rows))))
            image.paste(strip.reduce(factor) if factor > 1 else strip, (0, top // factor))
    turned = opened.getexif().get(_ORIENTATION_TAG, 1)
    if turned == 1:
        return image
    image.getexif()[_ORIENTATION_TAG] = turned
    return ImageOps.exif_transpose(image)


def _scale(opened: Image.Image) -> float | None:
    """What the values of an image with more than 8 bits are divided by; None for all others."""
    if not (opened.mode.startswith("I") or opened.mode == "F"):
        return None
    highest = np.asarray(opened).max(initial=0)
    if opened.mode == "F" and highest <= 1:
        return 1 / 255
    # 16-bit files open as "I;16" or "I"; nothing in the file says which of 8 or 16 bits an "I" carries.
    return 257.0 if highest > 255 else 1.0


def _flat(image: Image.Image, background: str, scale: float | None) -> Image.Image:
    """RGB, of 8 bits, opaque."""
    if scale is not None:
        values = np.asarray(image, np.float32)
        image = Image.fromarray((values / scale).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, background), rgba)
    return image if image.mode == "RGB" else image.convert("RGB")


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
class DatasetImage(ImageFacts):
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
        crop: where its bucket lies on the overhang, from 0 (left or top) to 1, unless crops are drawn at random.
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
    crop: float = 0.5

    @property
    def masked(self) -> bool:
        """Whether it has a loss mask."""
        return bool(self.mask_sha256)


def bucket_of(image: DatasetImage, config: DatasetConfig, resolution: int) -> tuple[int, int]:
    """The bucket (width, height) of an image at one base resolution."""
    return choose_bucket(image.width, image.height, resolution, config.alignment, config.upscale)
