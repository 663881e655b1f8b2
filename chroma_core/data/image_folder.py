"""Images and captions that come from a program instead of a folder: written as a dataset folder, once."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from ..errors import DataError, counted
from ..files import write_atomic
from .views import SUFFIX


def captions_for(texts: Sequence[str], count: int) -> list[str]:
    """One text an image, in the form of a caption file: line breaks separate several captions of an image.

    Args:
        texts: one for each image; or a single one, which is for all images if it has one line, and otherwise has a
            line for each image (empty lines do not count). All lines of a single text belong to a single image.
        count: images.
    Raises:
        DataError: another number of texts or lines.
    """
    if len(texts) == count:
        return list(texts)
    if len(texts) != 1:
        raise DataError(
            f"There are {counted(count, 'image')} and {counted(len(texts), 'caption')}. Give one caption for each "
            "image, in the same order, or a single one for all."
        )
    lines = [line for line in texts[0].splitlines() if line.strip()] or [""]
    if len(lines) not in (1, count):
        raise DataError(
            f"There are {counted(count, 'image')}, but the caption text has {len(lines)} lines. Write one line for "
            "each image, in the same order, or a single line for all."
        )
    return lines if len(lines) == count else lines * count


def store_images(
    root: Path,
    images: Sequence[Image.Image],
    captions: Sequence[str],
    masks: Sequence[Image.Image | None] = (),
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Path:
    """Write images with their captions into a folder below `root` that is named by their content.

    The same images, captions and masks always give the same folder, so a job that is asked for again is the same job.
    What is there already and whole is not written again; a file that is missing or was changed is restored.

    Args:
        images: any mode that PNG can hold.
        captions: as `captions_for` takes them; an empty one is no caption.
        masks: nothing, or for each image its loss mask (any size of the same shape; None: all of it counts).
        progress: called with (done, of how many) before every image; may raise to stop.
    Raises:
        DataError: no image, or another number of captions or masks.
    """
    if not images:
        raise DataError("The dataset has no images. Connect at least one.")
    texts = captions_for(captions, len(images))
    if masks and len(masks) != len(images):
        raise DataError(
            f"There are {counted(len(images), 'image')} and {counted(len(masks), 'mask')}. Give one mask for each "
            "image, in the same order, or none at all."
        )
    files: list[tuple[str, bytes]] = []
    digest = hashlib.sha256()
    for i, (image, text) in enumerate(zip(images, texts, strict=True)):
        progress(i, len(images))
        own = [(".png", _png(image)), (".txt", text.encode())]
        if masks and (mask := masks[i]) is not None:
            own.append((f"{SUFFIX}.png", _png(mask)))
        for ending, content in own:
            digest.update(b"mask" if ending.startswith(SUFFIX) else b"")
            digest.update(len(content).to_bytes(8, "big") + content)
            files.append((f"{i:05d}{ending}", content))
    folder = root / f"images-{digest.hexdigest()[:16]}"
    for name, content in files:
        path = folder / name
        if not path.is_file() or path.read_bytes() != content:
            write_atomic(path, content)
    return folder


def stored(root: Path) -> tuple[int, int]:
    """How many such folders lie below `root`, and their size in bytes."""
    folders = [path for path in root.glob("*/") if path.is_dir()]
    return len(folders), sum(bytes_in(folder) for folder in folders)


def bytes_in(folder: Path) -> int:
    """The size of a folder's files. One that disappears meanwhile counts nothing."""
    total = 0
    for path in folder.glob("*"):
        try:
            total += path.stat().st_size
        except OSError:
            continue
    return total


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()
