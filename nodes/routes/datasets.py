"""HTTP for datasets: the folders, what the training room shows of one, and the changes that may be made.

Files come in through ComfyUI's own upload. Only a folder below ComfyUI's input is changed, and nothing is deleted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any
from weakref import WeakValueDictionary

from aiohttp import web
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr

from ...chroma_core.data import editing
from ...chroma_core.data.contact_sheet import bucket_counts
from ...chroma_core.data.dataset import DatasetConfig
from ...chroma_core.data.pictures import UnreadablePicture, load_picture, picture_extensions
from ...chroma_core.data.remembered import Remembered
from ...chroma_core.errors import DataError
from ...chroma_core.model.flavours import FLAVOURS
from ...chroma_core.sampling.text import TRIGGER
from ...chroma_core.training.run.metrics import cache_folder
from .. import host
from ..dataset_preview import FALLBACK_SIZE
from .common import Malformed, Unknown, add, answer, body_of, in_thread, refused, told, whole_number

READERS = 8
"""Folders that are read at once, by threads of their own: one on a drive that does not answer holds up nobody else."""
PAINTERS = 2
"""Thumbnails that are made at once."""
SIDES = (320, 32, 1024)
"""Pixels of a thumbnail's longer side: when nothing is said, at least, at most."""

SIZES = tuple(sorted({512, 768, *(flavour.size for flavour in FLAVOURS.values())}))

Name = Annotated[StrictStr, Field(min_length=1, max_length=1000)]

_readers = ThreadPoolExecutor(READERS, "chromakit-dataset")
_painters = ThreadPoolExecutor(PAINTERS, "chromakit-thumbnail")
_busy: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
"""A lock for each folder that is being looked at or changed: whoever asks twice for the same finds it remembered."""


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")

    folder: Name


class Look(_Body):
    """The body of `images`. `size` is pixels, 0 for a size that is not known yet."""

    trigger: Annotated[StrictStr, Field(max_length=1000)] = ""
    size: Annotated[StrictInt, Field(ge=0, le=4096)] = 0


class Captions(_Body):
    """The body of `captions`: texts by image, and what they are written over."""

    captions: dict[Name, StrictStr]
    seen: dict[Name, StrictStr] = {}


class Crops(_Body):
    """The body of `crops`: where images are cropped, from 0 (left or top) to 1."""

    crops: dict[Name, Annotated[float, Field(ge=0, le=1, strict=True)]]


class Names(_Body):
    """The body of `remove`."""

    names: list[Name]


class Batch(_Body):
    """The body of `restore`."""

    batch: Name


def register(routes: Any) -> None:
    """Add the routes to ComfyUI's table."""
    add(routes, "get", "/chromakit/datasets", _folders)
    add(routes, "post", "/chromakit/datasets/images", _images, otherwise=400)
    add(routes, "get", "/chromakit/datasets/thumbnail", _thumbnail, otherwise=404)
    add(routes, "post", "/chromakit/datasets/captions", _captions, otherwise=400)
    add(routes, "post", "/chromakit/datasets/crops", _crops, otherwise=400)
    add(routes, "post", "/chromakit/datasets/remove", _remove, otherwise=400)
    add(routes, "post", "/chromakit/datasets/restore", _restore, otherwise=400)


# --- what is there ----------------------------------------------------------------------------------------------------


async def _folders(request: web.Request) -> web.Response:
    """The datasets by name and whether each may be changed, the endings of images that are read, and usual sizes."""
    return await answer(_folder_list, _readers)


def _folder_list() -> dict[str, Any]:
    folders = [{"name": name, "own": host.is_own_dataset(host.dataset_folder(name))} for name in host.dataset_names()]
    return {"folders": folders, "endings": sorted(picture_extensions()), "sizes": list(SIZES)}


async def _images(request: web.Request) -> web.Response:
    """Every image of a folder with its crop, caption and warnings; an own folder need not be there yet."""
    body = await body_of(request, Look)
    async with _lock(body.folder):
        return await answer(lambda: _contents(body), _readers)


def _contents(body: Look) -> dict[str, Any]:
    folder = _folder(body.folder)
    own, size = host.is_own_dataset(folder), body.size or FALLBACK_SIZE
    about = {"folder": host.dataset_name(str(folder)), "own": own, "size": size, "images": [], "warnings": []}
    if not folder.is_dir():
        return {**about, "buckets": [], "removed": [], "check": editing.trigger_check({}, body.trigger)}
    host.check_links(folder)
    # Captions with [trigger] are read before there is a trigger word; what stands for it is not shown.
    fields = {"folder": str(folder), "trigger": body.trigger.strip() or TRIGGER, "resolution": body.size}
    known = Remembered(cache_folder(host.jobs_folder()))
    try:
        entries, found = editing.entries(DatasetConfig.parse(fields), size, known)
    finally:
        known.save()
    batches = editing.removed(folder) if own else {}
    return {
        **about,
        "images": [asdict(entry) for entry in entries],
        "warnings": found.warnings,
        "buckets": [{"width": w, "height": h, "count": n} for (w, h), n in bucket_counts(found, size)],
        "removed": [{"batch": batch, "names": names} for batch, names in batches.items()],
        "check": editing.trigger_of_folder(entries, folder, body.trigger.strip()),
    }


def _folder(name: str) -> Path:
    """A dataset folder that is there, or an own one that is still to be made. Raises DataError."""
    try:
        return host.dataset_folder(name)
    except DataError:
        return host.own_dataset_folder(name)


async def _thumbnail(request: web.Request) -> web.Response:
    """`?folder=…&name=…&side=320`: the whole image, small. With `&v=…`, whatever it is, the browser may keep it."""
    side = whole_number(request, "side", *SIDES) or SIDES[0]
    folder, name = (request.query.get(key, "") for key in ("folder", "name"))
    body = await in_thread(lambda: _small(folder, name, side), _painters)
    headers = {"Cache-Control": "private, max-age=86400, immutable" if "v" in request.query else "no-cache"}
    return web.Response(body=body, content_type="image/jpeg", headers=headers)


def _small(folder: str, name: str, side: int) -> bytes:
    where = host.dataset_folder(folder)
    path = editing.picture_path(where, name)
    host.check_link(where, path)
    try:
        image = load_picture(path, least=2 * side)
    except UnreadablePicture as error:
        raise Unknown(f"The image '{name}' cannot be read: {error}.") from error
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    stream = BytesIO()
    image.save(stream, "JPEG", quality=85)
    return stream.getvalue()


# --- changes ----------------------------------------------------------------------------------------------------------


async def _captions(request: web.Request) -> web.Response:
    body = await body_of(request, Captions)
    return await _change(body, lambda folder: editing.write_captions(folder, body.captions, body.seen))


async def _crops(request: web.Request) -> web.Response:
    body = await body_of(request, Crops)
    return await _change(body, lambda folder: editing.move_crops(folder, body.crops))


async def _remove(request: web.Request) -> web.Response:
    """Images go into a folder below `.removed`; the answer's `batch` brings them back."""
    body = await body_of(request, Names)
    return await _change(body, lambda folder: {"batch": editing.set_aside(folder, body.names)})


async def _restore(request: web.Request) -> web.Response:
    body = await body_of(request, Batch)
    return await _change(body, lambda folder: {"names": editing.bring_back(folder, body.batch)})


async def _change(body: _Body, change: Callable[[Path], dict[str, Any] | None]) -> web.Response:
    """`change` an own dataset folder that is there; nobody else changes or looks at it meanwhile."""

    def work() -> dict[str, Any]:
        folder = host.own_dataset_folder(body.folder)
        if not folder.is_dir():
            raise Malformed(f"There is no dataset '{body.folder}' in ComfyUI's input folder. Upload an image first.")
        return change(folder) or {}

    async with _lock(body.folder):
        try:
            return told(await in_thread(work, _readers))
        except OSError as error:
            return refused(507, f"The dataset could not be changed: {error.strerror or error}.")


def _lock(folder: str) -> asyncio.Lock:
    return _busy.setdefault(folder, asyncio.Lock())
