"""HTTP for datasets: the folders, what the training room shows of one, and the changes that may be made.

Files come in through ComfyUI's own upload. Only a folder below ComfyUI's input is changed, and nothing is deleted.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any
from weakref import WeakValueDictionary

from aiohttp import web
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr
from typing_extensions import TypedDict

from ...chroma_core.data import editing, history
from ...chroma_core.data.contact_sheet import bucket_counts
from ...chroma_core.data.dataset import DatasetConfig
from ...chroma_core.data.images import UnreadableImage, image_extensions, known_extensions, load_image
from ...chroma_core.data.remarks import Code, codes_of
from ...chroma_core.data.remembered import Remembered
from ...chroma_core.errors import DataError
from ...chroma_core.model.flavours import FLAVOURS
from ...chroma_core.sampling.text import TRIGGER
from ...chroma_core.training.run.metrics import cache_folder
from .. import host
from ..dataset_preview import FALLBACK_SIZE
from .common import (
    Malformed,
    Query,
    Route,
    Unknown,
    answer,
    body_of,
    in_thread,
    refused,
    small_answer,
    told,
    whole_number,
)

READERS = 8
"""Folders that are read at once, by threads of their own: one on a drive that does not answer holds up nobody else."""
THUMBNAIL = 320
QUERIES = (
    Query("folder", "The dataset.", {"type": "string"}),
    Query("name", "The image in it.", {"type": "string"}),
    SIDE := Query(
        "side", "Pixels of the longer side.", {"type": "integer", "minimum": 32, "maximum": 1024, "default": THUMBNAIL}
    ),
    Query("v", "Whatever it is, the browser may then keep the image.", {"type": "string"}),
)
SIZES = tuple(sorted({512, 768, *(flavour.size for flavour in FLAVOURS.values())}))

Name = Annotated[StrictStr, Field(min_length=1, max_length=1000)]

readers = ThreadPoolExecutor(READERS, "chromakit-dataset")
_busy: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
"""A lock for each folder that is being looked at or changed: whoever asks twice for the same finds it remembered."""


_hasher = ThreadPoolExecutor(1, "chromakit-hash")
_hashing: set[str] = set()
"""Folders whose large files are being read, by one thread, one after the other."""
AT_ONCE = 32 << 20
"""Bytes of image files that are read before a folder is shown; what is beyond is read afterwards."""


class OneFolder(BaseModel):
    """The body of `undo` and `redo`: a dataset."""

    model_config = ConfigDict(extra="forbid")

    folder: Name


class _Change(OneFolder):
    """What every change may say: what it is, in words, for whoever takes it back."""

    label: Annotated[StrictStr, Field(max_length=200)] = ""


class Look(OneFolder):
    """The body of `images`. `size` is pixels, 0 for a size that is not known yet."""

    trigger: Annotated[StrictStr, Field(max_length=1000)] = ""
    size: Annotated[StrictInt, Field(ge=0, le=4096)] = 0


class Captions(_Change):
    """The body of `captions`: texts by image, and what they are written over."""

    captions: dict[Name, StrictStr]
    seen: dict[Name, StrictStr] = {}


class Crops(_Change):
    """The body of `crops`: where images are cropped, from 0 (left or top) to 1."""

    crops: dict[Name, Annotated[float, Field(ge=0, le=1, strict=True)]]


class Names(_Change):
    """The body of `remove` and `convert`."""

    names: list[Name]


class Batch(_Change):
    """The body of `restore`."""

    batch: Name


class Mask(_Change):
    """The body of `mask`: an image, and the mask as a PNG in base 64; empty: none from now on."""

    name: Name
    mask: StrictStr


class FolderName(TypedDict):
    """A dataset, and whether it may be changed here."""

    name: str
    own: bool


class FolderList(TypedDict):
    """The datasets, the endings of images that are read and of any images, and usual training sizes in pixels."""

    folders: list[FolderName]
    endings: list[str]
    known: list[str]
    sizes: list[int]


class BucketCount(TypedDict):
    """A training size in pixels, and how many images have it."""

    width: int
    height: int
    count: int


class RemovedBatch(TypedDict):
    """Images that were taken out together."""

    batch: str
    names: list[str]


class FolderContents(TypedDict):
    """What a dataset holds, image by image. codes: of its warnings, notes and reasons, by their sentences. unread: how
    many images were not read yet, so that nothing is known of copies of them. done, undone: what can be taken back and
    done again, the last one last."""

    folder: str
    own: bool
    size: int
    images: list[editing.Entry]
    warnings: list[str]
    codes: dict[str, Code]
    buckets: list[BucketCount]
    removed: list[RemovedBatch]
    check: editing.TriggerCheck
    unread: int
    done: list[str]
    undone: list[str]


class Restored(TypedDict):
    """The images that are back."""

    names: list[str]


class Removed(TypedDict):
    """The number under which the images are kept."""

    batch: str


class Converted(TypedDict):
    """The images that were made."""

    names: list[str]


# --- what is there ----------------------------------------------------------------------------------------------------


async def _folders(request: web.Request) -> web.Response:
    """The datasets by name and whether each may be changed, the endings of images that are read, and usual sizes."""
    return await answer(_folder_list, readers)


def _folder_list() -> FolderList:
    folders: list[FolderName] = [
        {"name": name, "own": host.is_own_dataset(host.dataset_folder(name))} for name in host.dataset_names()
    ]
    return {
        "folders": folders,
        "endings": sorted(image_extensions()),
        "known": sorted(known_extensions()),
        "sizes": list(SIZES),
    }


async def _images(request: web.Request) -> web.Response:
    """Every image of a folder with its crop, caption and warnings; an own folder need not be there yet."""
    body = await body_of(request, Look)
    async with lock_of(body.folder):
        return await answer(lambda: contents(body), readers)


def contents(body: Look) -> FolderContents:
    folder, size, trigger = _folder(body.folder), body.size or FALLBACK_SIZE, body.trigger.strip()
    own = host.is_own_dataset(folder)
    shown: FolderContents = {
        "folder": host.dataset_name(str(folder)) or body.folder,
        "own": own,
        "size": size,
        "images": [],
        "warnings": [],
        "codes": {},
        "buckets": [],
        "removed": [],
        "check": editing.trigger_check({}, trigger),
        "unread": 0,
        "done": [],
        "undone": [],
    }
    if not folder.is_dir():
        return shown
    host.check_links(folder)
    # Captions with [trigger] are read before there is a trigger word; what stands for it is not shown.
    fields = {"folder": str(folder), "trigger": trigger or TRIGGER, "resolution": body.size}
    known = Remembered(cache_folder(host.jobs_folder()), 0 if str(folder) in _hashing else AT_ONCE)
    try:
        images, found = editing.entries(DatasetConfig.parse(fields), size, known)
    finally:
        known.save()
    _read_later(folder, known.unread)
    steps, unread = history.history_or_none(folder) if own else (None, [])
    batches = editing.removed(folder) if own else {}
    shown["images"], shown["warnings"] = images, unread + found.warnings
    said = [text for image in images for text in (image["skipped"], *image["notes"])]
    shown["codes"] = codes_of([*shown["warnings"], *said])
    shown["buckets"] = [{"width": w, "height": h, "count": n} for (w, h), n in bucket_counts(found, size)]
    shown["removed"] = [{"batch": batch, "names": names} for batch, names in batches.items()]
    shown["check"] = editing.trigger_of_folder(images, folder, trigger)
    shown["unread"] = len(set(known.unread))
    if steps is not None:
        shown["done"], shown["undone"] = (
            [step.get("label", "") for step in each] for each in (steps["done"], steps["undone"])
        )
    return shown


def _read_later(folder: Path, paths: Sequence[Path]) -> None:
    """Read these files, so that the next look knows them; what was read is kept every few seconds' worth of bytes."""
    if not paths or str(folder) in _hashing:
        return
    _hashing.add(str(folder))

    def work() -> None:
        try:
            for start in range(0, len(paths), 20):
                known = Remembered(cache_folder(host.jobs_folder()))
                for path in paths[start : start + 20]:
                    with suppress(OSError, UnreadableImage):  # which the next look says
                        known.facts(path)
                known.save()
        finally:
            _hashing.discard(str(folder))

    _hasher.submit(work)


def _folder(name: str) -> Path:
    """A dataset folder that is there, or an own one that is still to be made. Raises DataError."""
    try:
        return host.dataset_folder(name)
    except DataError:
        return host.own_dataset_folder(name)


async def _thumbnail(request: web.Request) -> web.Response:
    """The whole image, small. With `&v=…`, whatever it is, the browser may keep it."""
    side = whole_number(request, SIDE) or THUMBNAIL
    folder, name = (request.query.get(key, "") for key in ("folder", "name"))
    return await small_answer(request, lambda: _small(folder, name, side))


def _small(folder: str, name: str, side: int) -> bytes:
    where = host.dataset_folder(folder)
    path = editing.image_path(where, name)
    host.check_link(where, path)
    try:
        image = load_image(path, least=2 * side)
    except UnreadableImage as error:
        raise Unknown(f"The image '{name}' cannot be read: {error}.") from error
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    stream = BytesIO()
    image.save(stream, "JPEG", quality=85)
    return stream.getvalue()


# --- changes ----------------------------------------------------------------------------------------------------------


async def _captions(request: web.Request) -> web.Response:
    body = await body_of(request, Captions)
    return await _change(body, lambda folder: history.caption(folder, body.captions, body.seen, body.label))


async def _crops(request: web.Request) -> web.Response:
    body = await body_of(request, Crops)
    return await _change(body, lambda folder: history.crop(folder, body.crops, body.label))


async def _remove(request: web.Request) -> web.Response:
    """Images go into a folder below `.removed`; the answer's `batch` brings them back."""
    body = await body_of(request, Names)
    return await _change(body, lambda folder: {"batch": history.take_out(folder, body.names, body.label)})


async def _restore(request: web.Request) -> web.Response:
    body = await body_of(request, Batch)
    return await _change(body, lambda folder: {"names": history.bring_back(folder, body.batch, body.label)})


async def _convert(request: web.Request) -> web.Response:
    """The files that the PNGs are made of go where `remove` puts them."""
    body = await body_of(request, Names)
    return await _change(body, lambda folder: {"names": history.convert(folder, body.names, body.label)})


async def _mask(request: web.Request) -> web.Response:
    """White is trained. Any size of the image's shape; a mask that is there goes where `remove` puts images."""
    body = await body_of(request, Mask)
    try:
        content = base64.b64decode(body.mask, validate=True)
    except binascii.Error as error:
        raise Malformed(f"The mask is not base 64: {error}.") from error
    return await _change(body, lambda folder: history.mask(folder, body.name, content, body.label))


async def _undo(request: web.Request) -> web.Response:
    return await _change(await body_of(request, OneFolder), history.undo)


async def _redo(request: web.Request) -> web.Response:
    return await _change(await body_of(request, OneFolder), history.redo)


async def _change(body: OneFolder, change: Callable[[Path], dict[str, Any] | None]) -> web.Response:
    """`change` an own dataset folder that is there; nobody else changes or looks at it meanwhile."""

    def work() -> dict[str, Any]:
        folder = host.own_dataset_folder(body.folder)
        if not folder.is_dir():
            raise Malformed(f"There is no dataset '{body.folder}' in ComfyUI's input folder. Upload an image first.")
        return change(folder) or {}

    async with lock_of(body.folder):
        try:
            return told(await in_thread(work, readers))
        except OSError as error:
            return refused(507, f"The dataset could not be changed: {error.strerror or error}.")


def lock_of(folder: str) -> asyncio.Lock:
    return _busy.setdefault(folder, asyncio.Lock())


ROUTES = (
    Route("get", "/chromakit/datasets", _folders, "The datasets, and which may be changed.", FolderList),
    Route(
        "post",
        "/chromakit/datasets/images",
        _images,
        "Every image of a dataset with its crop, caption, warnings, and why it is skipped.",
        FolderContents,
        Look,
        otherwise=400,
    ),
    Route(
        "get",
        "/chromakit/datasets/thumbnail",
        _thumbnail,
        "An image of a dataset, whole and small.",
        "image/jpeg",
        queries=QUERIES,
        otherwise=404,
    ),
    Route(
        "post",
        "/chromakit/datasets/captions",
        _captions,
        "Writes captions, all or none, and none over what was not seen.",
        dict[str, Any],
        Captions,
        otherwise=400,
    ),
    Route(
        "post",
        "/chromakit/datasets/crops",
        _crops,
        "Says where images are cropped.",
        dict[str, Any],
        Crops,
        otherwise=400,
    ),
    Route(
        "post",
        "/chromakit/datasets/remove",
        _remove,
        "Takes images out of a dataset, with captions and masks; nothing is deleted.",
        Removed,
        Names,
        otherwise=400,
    ),
    Route(
        "post",
        "/chromakit/datasets/restore",
        _restore,
        "Brings back what was taken out.",
        Restored,
        Batch,
        otherwise=400,
    ),
    Route(
        "post",
        "/chromakit/datasets/convert",
        _convert,
        "Makes PNGs of images in formats that are not read; nothing is deleted.",
        Converted,
        Names,
        otherwise=400,
    ),
    Route(
        "post",
        "/chromakit/datasets/mask",
        _mask,
        "Gives an image a loss mask, or takes it away.",
        dict[str, Any],
        Mask,
        otherwise=400,
    ),
    Route(
        "post",
        "/chromakit/datasets/undo",
        _undo,
        "Takes the last change of a dataset back.",
        dict[str, Any],
        OneFolder,
    ),
    Route(
        "post",
        "/chromakit/datasets/redo",
        _redo,
        "Does again what was taken back last.",
        dict[str, Any],
        OneFolder,
    ),
)
