"""What all routes share: their table's rows, reading requests, JSON answers of work that reads files, errors as
`{"error": …}`.

400 for a request that makes no sense, 403 for one from another site's page, 404 for an unknown id or number, 409 for
what cannot be done now, 413 for a body that is too large, 415 for one that is not declared as JSON, 507 for a full
disk.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

from aiohttp import web
from comfy_api.latest import io
from PIL import Image
from pydantic import BaseModel, ValidationError

from ...chroma_core.data.editing import Changed
from ...chroma_core.errors import (
    ChromaKitError,
    ConfigError,
    DiskFull,
    JobError,
    LoraError,
    did_you_mean,
    first_line,
    shortened,
)
from ...chroma_core.settings import mistakes
from ...chroma_core.training.jobs.manager import Job
from .. import host, jobs
from ..inputs import chosen_of

Body = TypeVar("Body", bound=BaseModel)
Result = TypeVar("Result")


MOST_DIGITS = 20
"""Of a whole number in a query: more than any has, and few enough to read."""


PAINTERS = 2
"""Small images that are made at once."""
_painters = ThreadPoolExecutor(PAINTERS, "chromakit-thumbnail")

THUMBNAILS = 1024
"""Small images that are remembered: about 10 kB each."""

JSON = "application/json"
"""The type of every body that is taken."""

MAX_BYTES = 2 << 20
"""Of a request's body: more than any has, and little enough to hold."""

TOO_LARGE = f"The request cannot be used: it has more than {MAX_BYTES} bytes. Send it in parts."


class TooLarge(ChromaKitError):
    """A body that is no request."""


class Rebound(ChromaKitError):
    """A request under a name of the internet that leads to this machine: the page of another site may have sent it."""


class NotJson(ChromaKitError):
    """A body of another type than JSON: what a page of another site can send without asking this one first."""


class Malformed(ConfigError):
    """A query or a body that cannot be read."""


class Unknown(JobError):
    """Nothing of that id or number."""


STATUSES: dict[type[ChromaKitError], int] = {
    Rebound: 403,
    TooLarge: 413,
    NotJson: 415,
    Malformed: 400,
    Unknown: 404,
    Changed: 409,
    DiskFull: 507,
    JobError: 409,
}
"""Statuses of errors, the first that fits; all others have that of their route."""


# --- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Query:
    """A parameter of a query, and the JSON schema of its values; see `whole_number`."""

    name: str
    sentence: str
    schema: Mapping[str, Any]


SIDE = Query(
    "side",
    "Pixels of a thumbnail's longer side; a JPEG. Without it the image as it is, a PNG.",
    {"type": "integer", "minimum": 32, "maximum": 1024},
)


@dataclass(frozen=True, eq=False)
class Route:
    """One route: what ComfyUI's table and the OpenAPI document are both made from.

    summary: a sentence. answer: the type of the JSON that it answers, or the content type of a file. body: the model
    that reads the request's, or what gives the widgets that it may hold; None: an empty JSON object. queries: what its
    query may hold; a model or dataclass: the fields. parts: the schemas of the address's parts that are no texts.
    statuses: of success. otherwise: that of errors that are not in `STATUSES`.
    """

    method: str
    path: str
    handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    summary: str
    answer: Any
    body: Any = None
    queries: tuple[Query, ...] | type = ()
    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    statuses: tuple[int, ...] = (200,)
    otherwise: int = 409


_HOST = re.compile(r"(.+?)\.?(?::(\d+))?")
_PRIVATE = re.compile(r"[^.]*|.*[:\]].*|.*\.(\d+|localhost|local|lan|internal|test|home\.arpa)")
"""Names that no other site can have: without a dot, addresses, and what is kept for use at home."""


def is_rebound(named: str, port: int | None) -> bool:
    """Whether a request's Host, `name:port`, is what the page of another site sends that has its own name lead to this
    machine (DNS rebinding), and for whose browser this is its own server then.

    port: that of a ComfyUI that listens on this machine alone. Who speaks with it from here uses an address or a name
    of this machine, and what forwards to it listens on another port. None for one that others reach under any name.
    """
    found = _HOST.fullmatch(named.lower())
    return bool(found and (found[2] or "80") == str(port) and not _PRIVATE.fullmatch(found[1]))


def add(routes: Any, route: Route) -> None:
    """Add one route to ComfyUI's table; what the handler raises of ours is answered in words (see STATUSES).

    A request that is no GET must say that its body is JSON, even an empty one: for that type a browser asks the server
    first whether a page of another site may send it, and ComfyUI does not allow it. See also `is_rebound`.
    """

    async def in_words(request: web.Request) -> web.StreamResponse:
        try:
            if is_rebound(request.host, port := host.port_of_this_machine_alone()):
                raise Rebound(
                    f"ComfyUI listens on this machine alone, and was asked as '{shortened(request.host)}', which "
                    f"another site's page may have sent. Open it as http://127.0.0.1:{port}, or let what forwards to "
                    "it listen on another port."
                )
            if route.method != "get" and request.content_type != JSON:
                raise NotJson(f"The request's body is {request.content_type}. Send JSON: Content-Type: {JSON}.")
            if (request.content_length or 0) > MAX_BYTES:
                raise TooLarge(TOO_LARGE)
            return await route.handler(request)
        except ChromaKitError as error:
            status = next((status for kind, status in STATUSES.items() if isinstance(error, kind)), route.otherwise)
            return refused(status, error)
        except RecursionError:
            return refused(400, "The request cannot be used: it is nested too deeply.")

    getattr(routes, route.method)(route.path)(in_words)


# --- answers ----------------------------------------------------------------------------------------------------------


async def in_thread(work: Callable[[], Result], threads: Executor | None = None) -> Result:
    """What `work()` gives, which may read files and so runs in a thread: one of `threads`, else of the event loop's."""
    return await asyncio.get_running_loop().run_in_executor(threads, work)


async def answer(work: Callable[[], Any], threads: Executor | None = None) -> web.Response:
    """The JSON of `work()`, as `in_thread` runs it."""
    return told(await in_thread(work, threads))


async def image_answer(request: web.Request, find: Callable[[], Path]) -> web.StreamResponse:
    """An image file; with `?side=160` a small one. With `&v=…`, whatever it is, the browser may keep it."""
    side = whole_number(request, SIDE)
    path = await in_thread(find)
    if side is None:
        return web.FileResponse(path, headers=_kept(request))
    return await small_answer(request, lambda: _small(path, side))


async def small_answer(request: web.Request, paint: Callable[[], bytes]) -> web.Response:
    """The JPEG of `paint()`, made by threads of their own; not for a page that has scrolled past before its turn."""

    def work() -> bytes:
        gone = request.transport is None or request.transport.is_closing()
        return b"" if gone else paint()

    return web.Response(body=await in_thread(work, _painters), content_type="image/jpeg", headers=_kept(request))


def _kept(request: web.Request) -> dict[str, str]:
    return {"Cache-Control": "private, max-age=86400, immutable" if "v" in request.query else "no-cache"}


def _small(path: Path, side: int) -> bytes:
    try:
        return _thumbnail(path, path.stat().st_mtime_ns, side)
    except OSError as error:
        raise Unknown(f"The image '{path.name}' cannot be read: {error}.") from error


@lru_cache(maxsize=THUMBNAILS)
def _thumbnail(path: Path, version: int, side: int) -> bytes:
    """A small JPEG, remembered for as long as the file is the same. Raises OSError."""
    with Image.open(path) as image:
        small = image.convert("RGB")
    small.thumbnail((side, side))
    stream = BytesIO()
    small.save(stream, "JPEG", quality=88)
    return stream.getvalue()


def told(value: Any, status: int = 200) -> web.Response:
    """JSON that says nothing of where this machine's folders lie."""
    return web.json_response(host.told(value), status=status)


def refused(status: int, message: object) -> web.Response:
    """An error in words."""
    return told({"error": str(message)}, status)


# --- requests ---------------------------------------------------------------------------------------------------------


def job_of(request: web.Request) -> Job:
    """The job that the address names. Raises Unknown."""
    try:
        return jobs.manager().get(request.match_info["id"])
    except JobError as error:
        raise Unknown(str(error)) from error


def lora_name(path: str) -> str:
    """A name in ComfyUI's LoRA folders: as it stands, without its extension, or the id of a training job.

    Raises LoraError. Only what ComfyUI lists counts, so no path leads outside its folders.
    """
    known = {name.replace("\\", "/"): name for name in host.lora_names()}
    for candidate in (path, f"{path}.safetensors"):
        if candidate in known:
            return known[candidate]
    try:
        trained = jobs.manager().get(path).status().get("lora_name")
    except JobError:
        trained = None
    if trained and trained in known:
        return known[trained]
    listed = f"It knows {', '.join(list(known)[:8])}" if known else "There is none yet"
    raise LoraError(
        f"there is no LoRA '{path}' in ComfyUI's LoRA folders. {listed}{' and more' if len(known) > 8 else ''}. Give "
        f"one of their names, or the id of a training job that is completed.{did_you_mean(path, known)}"
    )


def whole_number(request: web.Request, query: Query) -> int | None:
    """A whole number of the query, the default of its schema when it is left out. Raises Malformed."""
    text, low, high = request.query.get(query.name), query.schema["minimum"], query.schema["maximum"]
    if text is None:
        return query.schema.get("default")
    if not (text.isdecimal() and len(text) <= MOST_DIGITS) or not low <= int(text) <= high:
        raise Malformed(f"{query.name} is '{text}'; it must be a whole number from {low} to {high}.")
    return int(text)


async def bytes_of(request: web.Request) -> bytes:
    """The request's body. Raises TooLarge, as soon as there is more than may be."""
    body = bytearray()
    async for part in request.content.iter_any():
        body += part
        if len(body) > MAX_BYTES:
            raise TooLarge(TOO_LARGE)
    return bytes(body)


async def json_of(request: web.Request) -> Any:
    """The request's JSON, whatever it is. Raises Malformed, TooLarge."""
    body = await bytes_of(request)
    try:
        return json.loads(body.decode(request.charset or "utf-8"))
    except (ValueError, LookupError, RecursionError) as error:  # no JSON, an unknown charset, bottomless nesting
        why = "it is nested too deeply" if isinstance(error, RecursionError) else first_line(error)
        raise Malformed(f"The request's body is not JSON: {why}.") from None


async def body_of(request: web.Request, model: type[Body]) -> Body:
    """The request's JSON object, read by a model. Raises Malformed."""
    values = await json_of(request)
    if not isinstance(values, dict):
        raise Malformed(f"The request's body must be a JSON object with nothing but: {', '.join(model.model_fields)}.")
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise Malformed(f"The request cannot be used: {'; '.join(mistakes(error, model))}.") from error


@lru_cache(maxsize=32)
def inputs_of(node: type[io.ComfyNode]) -> dict[str, Any]:
    """A node's widgets by name, as they were when first asked for: what a combo offered may have changed since."""
    return {each.id: each for each in node.define_schema().inputs if isinstance(each, io.WidgetInput)}


def read_widgets(inputs: Iterable[Any], values: object) -> dict[str, Any]:
    """A value for each of these inputs of a node: the page's, else the default.

    Raises Malformed for anything else than an object and for a name that is none of these, ConfigError for a value of
    another kind, out of the input's range, or not among its options.
    """
    known = {each.id: each for each in inputs}
    if not isinstance(values, dict):
        raise Malformed(f"The request's body must be a JSON object with nothing but: {', '.join(known)}.")
    foreign = [name for name in values if name not in known]
    if foreign:
        meant = did_you_mean(foreign[0], known)
        raise Malformed(f"The request has no field '{foreign[0]}'. It takes: {', '.join(known)}.{meant}")
    return {name: chosen_of(each, values[name]) if name in values else each.default for name, each in known.items()}
