"""A dataset before anything runs: what the page shows of it, and the contact sheet that nodes show too."""

from __future__ import annotations

import base64
import io
import secrets
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image
from typing_extensions import TypedDict

from ..chroma_core.data.contact_sheet import (
    bucket_counts,
    contact_sheet,
    different_captions,
    most_telling,
    summary,
    thumbnail,
)
from ..chroma_core.data.dataset import DatasetConfig
from ..chroma_core.data.images import DatasetImage
from ..chroma_core.data.remarks import Code, codes_of
from ..chroma_core.data.remembered import Remembered
from ..chroma_core.data.scan import DatasetScan, scan
from ..chroma_core.data.warnings import image_warnings
from ..chroma_core.training.run.metrics import cache_folder
from . import host

SHOWN = 16
"""Images on the contact sheet."""
CELL = 256
"""Pixels a side of its thumbnails: captions are legible when the sheet is opened at full size."""
FALLBACK_SIZE = 1024
"""Pixels that the sheet's buckets are computed for when the size is left to the model."""
THUMBNAILS, SIDE = 12, 112
"""What the page's small panel shows: so many images, of so many pixels a side."""
KEPT = 8
"""Previews that are remembered, each with its sheet once somebody opened it."""


def look(config: DatasetConfig, size: int = 0) -> DatasetScan:
    """`scan`, which opens no file that a job or an earlier look has seen as it is, nor one that a link leads out to.

    Raises what `scan` raises, and DataError for such links.
    """
    host.check_links(Path(config.folder))
    known = Remembered(cache_folder(host.jobs_folder()))
    try:
        return scan(config, size, known)
    finally:
        known.save()


def sheet_of(found: DatasetScan, size: int) -> Image.Image:
    """The contact sheet of a dataset, for buckets of `size` pixels where it has no resolution of its own."""
    return contact_sheet(most_telling(found, SHOWN), found, size, cell=CELL)


class Bucket(TypedDict):
    """Images of one size, in pixels."""

    width: int
    height: int
    count: int


class Shown(TypedDict):
    """One image; image: a data URL, None where it cannot be read."""

    name: str
    caption: str
    notes: list[str]
    image: str | None


class DatasetFacts(TypedDict):
    """A dataset in numbers and words."""

    summary: list[str]
    pictures: int
    captions: int
    skipped: int
    size: int
    buckets: list[Bucket]
    warnings: list[str]
    thumbnails: list[Shown]


class DatasetLook(DatasetFacts):
    """What the page shows of a dataset. size_from: what decides its size. sheet: the address of its contact sheet.
    codes: of warnings and notes, by their sentences."""

    size_from: Literal["widget", "model", "assumed"]
    sheet: str
    codes: dict[str, Code]


@dataclass
class _Preview:
    id: str
    found: DatasetScan
    size: int
    answer: DatasetLook
    sheet: bytes | None = None


class DatasetPreviews:
    """The last previews, so that asking again for the same folder and options costs no more than listing its files.

    Calls may come from several threads; no lock is held while a folder is read.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, str, int], _Preview] = OrderedDict()

    def of(self, config: DatasetConfig, model_size: int | None) -> DatasetLook:
        """What the page shows of a dataset. Raises what `scan` raises.

        Args:
            model_size: pixels, the size of the model that will be trained; None: not known.
        """
        key = (host.folder_state(Path(config.folder)), config.model_dump_json(), model_size or 0)
        with self._lock:
            found = self._kept.get(key)
        if found is None:
            seen = look(config, model_size or 0)
            size, name = model_size or FALLBACK_SIZE, secrets.token_urlsafe(16)
            known = facts(seen, size, judged_by=model_size or 0)
            notes = [note for shown in known["thumbnails"] for note in shown["notes"]]
            answer: DatasetLook = {
                **known,
                "codes": codes_of([*known["warnings"], *notes]),
                "size_from": "widget" if config.resolutions else "model" if model_size else "assumed",
                "sheet": f"datasets/sheets/{name}",
            }
            found = _Preview(name, seen, size, answer)
        with self._lock:
            self._kept[key] = found
            self._kept.move_to_end(key)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return found.answer

    def sheet(self, name: str) -> bytes | None:
        """A preview's contact sheet as a JPEG, made when it is asked for; None when the preview is forgotten."""
        with self._lock:
            found = next((each for each in self._kept.values() if each.id == name), None)
        if found is None:
            return None
        if found.sheet is None:
            found.sheet = _jpeg(sheet_of(found.found, found.size), 88)
        return found.sheet


def facts(found: DatasetScan, size: int, judged_by: int) -> DatasetFacts:
    """Counts, buckets, warnings in words and thumbnails of a dataset, as plain values for JSON.

    Without a resolution of its own, buckets are those of `size` pixels, and an image is small by `judged_by` (0: none
    is, for a size that was only assumed says nothing).
    """
    warned = image_warnings(found.config, found.items, judged_by)
    return {
        "summary": [line for line in summary(found, size).split("\n") if not line.startswith("warning: ")],
        "pictures": len(found.items),
        "captions": different_captions(found),
        "skipped": len(found.skipped),
        "size": found.config.sizes(size)[0],
        "buckets": [{"width": w, "height": h, "count": n} for (w, h), n in bucket_counts(found, size)],
        "warnings": list(found.warnings),
        "thumbnails": [
            _shown(item, found, size, warned.get(item.name, [])) for item in most_telling(found, THUMBNAILS)
        ],
    }


def _shown(item: DatasetImage, found: DatasetScan, size: int, warnings: list[str]) -> Shown:
    image = thumbnail(item, found, size, SIDE)
    caption = next(iter(item.captions), "")
    return {
        "name": item.name,
        "caption": caption,
        "notes": warnings,
        "image": image and "data:image/jpeg;base64," + base64.b64encode(_jpeg(image, 80)).decode(),
    }


def _jpeg(image: Image.Image, quality: int) -> bytes:
    body = io.BytesIO()
    image.save(body, "JPEG", quality=quality)
    return body.getvalue()
