"""HTTP for looking into a job: its curve, its log, its previews, and graphs made of it."""

from __future__ import annotations

import asyncio
from io import BytesIO
from pathlib import Path
from typing import Any

from aiohttp import web
from PIL import Image

from ...chroma_core.errors import ConfigError
from . import job_graphs
from .answers import Unknown, answer, job_of, refused, whole_number

GRAPHS = {"again": job_graphs.again, "use": job_graphs.use}

POINTS = (1500, 10, 100_000)
"""Steps of a curve: when nothing is said, at least, at most."""
LINES = (200, 1, 5000)
SIDES = (None, 32, 1024)
"""Pixels of a thumbnail's longer side; None: the preview as it is."""


def register(routes: Any) -> None:
    """Add the routes to the host's table."""
    routes.get("/chromakit/jobs/{id}/metrics")(_metrics)
    routes.get("/chromakit/jobs/{id}/curve")(_curve)
    routes.get("/chromakit/jobs/{id}/log")(_log)
    routes.get("/chromakit/jobs/{id}/samples/{number}")(_sample)
    routes.get("/chromakit/jobs/{id}/graph/{kind}")(_graph)


async def _metrics(request: web.Request) -> web.Response:
    return await answer(lambda: job_of(request).metrics())


async def _curve(request: web.Request) -> web.Response:
    """`?points=1500&after=<step>&token=<of the last answer>`; see `Curve.read`."""
    try:
        points = whole_number(request, "points", *POINTS)
        after = whole_number(request, "after", None, 0, 10**12)
    except ConfigError as error:
        return refused(400, error)
    token = request.query.get("token")
    return await answer(lambda: job_of(request).curve.read(points or POINTS[0], after, token))


async def _log(request: web.Request) -> web.Response:
    """`?lines=200`: the last lines, oldest first."""
    try:
        lines = whole_number(request, "lines", *LINES)
    except ConfigError as error:
        return refused(400, error)
    return await answer(lambda: job_of(request).log_lines(lines or LINES[0]))


async def _sample(request: web.Request) -> web.StreamResponse:
    """A preview by its number; `?side=160` for a small one. With `&v=…`, whatever it is, the browser may keep it."""
    try:
        side = whole_number(request, "side", *SIDES)
        path = await asyncio.to_thread(_sample_path, request)
        headers = {"Cache-Control": "private, max-age=86400, immutable" if "v" in request.query else "no-cache"}
        if side is None:
            return web.FileResponse(path, headers=headers)
        return web.Response(
            body=await asyncio.to_thread(_thumbnail, path, side), content_type="image/jpeg", headers=headers
        )
    except Unknown as error:
        return refused(404, error)
    except ConfigError as error:
        return refused(400, error)


def _sample_path(request: web.Request) -> Path:
    job = job_of(request)
    found, number = job.samples(), request.match_info["number"]
    if not number.isdecimal() or int(number) >= len(found):
        raise Unknown(f"The job has {len(found)} samples, numbered from 0; there is no sample '{number}'.")
    return found[int(number)]


def _thumbnail(path: Path, side: int) -> bytes:
    try:
        with Image.open(path) as picture:
            small = picture.convert("RGB")
    except OSError as error:
        raise Unknown(f"The preview '{path.name}' cannot be read: {error}.") from error
    small.thumbnail((side, side))
    stream = BytesIO()
    small.save(stream, "JPEG", quality=88)
    return stream.getvalue()


async def _graph(request: web.Request) -> web.Response:
    """`again`: what would start this job; `use`: what paints with its result. A prompt in API form."""
    make = GRAPHS.get(request.match_info["kind"])
    if make is None:
        return refused(404, f"There is no graph '{request.match_info['kind']}'; there are: {', '.join(GRAPHS)}.")
    return await answer(lambda: make(job_of(request)))
