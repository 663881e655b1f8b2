"""Pictures and captions that come from a program instead of a folder: written as a data set folder, once."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ..errors import DataError
from ..files import write_atomic


def store_pictures(root: Path, pictures: Sequence[Image.Image], captions: Sequence[str]) -> Path:
    """Write pictures with their captions into a folder below `root` that is named by their content.

    The same pictures and captions always give the same folder, so a job that is asked for again is the same job. What
    is there already is not written again, and an interrupted call is completed by the next.

    Args:
        pictures: any mode that PNG can hold.
        captions: one for each picture, or a single one for all; line breaks separate several captions of a picture, and
            an empty one is no caption.
    Raises:
        DataError: no picture, or another number of captions.
    """
    if not pictures:
        raise DataError("The data set has no pictures. Connect at least one.")
    if len(captions) not in (1, len(pictures)):
        raise DataError(
            f"There are {len(pictures)} pictures and {len(captions)} captions. Give one caption for each picture, in "
            "the same order, or a single one for all."
        )
    texts = list(captions) if len(captions) == len(pictures) else list(captions) * len(pictures)
    contents = [(_png(picture), text.encode()) for picture, text in zip(pictures, texts, strict=True)]
    digest = hashlib.sha256()
    for picture, text in contents:
        for part in (picture, text):
            digest.update(len(part).to_bytes(8, "big") + part)
    folder = root / digest.hexdigest()[:16]
    for i, (picture, text) in enumerate(contents):
        for path, content in ((folder / f"{i:05d}.png", picture), (folder / f"{i:05d}.txt", text)):
            if not path.is_file():
                write_atomic(path, content)
    return folder


def _png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return file.getvalue()
