"""What all routes share: JSON answers of work that reads files, errors as `{"error": …}`, and JSON bodies.

404 for an unknown id or number, 409 for what cannot be done now, 400 for a request that makes no sense.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from aiohttp import web

from ...chroma_core.errors import ChromaKitError, ConfigError, JobError
from ...chroma_core.training.jobs.manager import Job
from .. import jobs


class Unknown(JobError):
    """Nothing of that id or number."""


def job_of(request: web.Request) -> Job:
    """The job that the address names. Raises Unknown."""
    try:
        return jobs.manager().get(request.match_info["id"])
    except JobError as error:
        raise Unknown(str(error)) from error


async def answer(work: Callable[[], Any]) -> web.Response:
    """The JSON of `work()`, which may read files and so runs in a thread; errors with 404 or 409."""
    try:
        return web.json_response(await asyncio.to_thread(work))
    except Unknown as error:
        return refused(404, error)
    except ChromaKitError as error:
        return refused(409, error)


def refused(status: int, message: object) -> web.Response:
    """An error in words."""
    return web.json_response({"error": str(message)}, status=status)


async def json_of(request: web.Request) -> Any:
    """The request's JSON, whatever it is. Raises ConfigError."""
    try:
        return await request.json()
    except ValueError as error:
        raise ConfigError(f"The request's body is not JSON: {error}.") from None


async def body_of(request: web.Request, kinds: dict[str, type]) -> dict[str, Any]:
    """The request's JSON object with no other fields than these. Raises ConfigError."""
    values = await json_of(request)
    if not (isinstance(values, dict) and all(type(v) is kinds.get(name) for name, v in values.items())):
        wanted = ", ".join(f"{name} ({kind.__name__})" for name, kind in kinds.items())
        raise ConfigError(f"The request's body must be a JSON object with nothing but: {wanted}.")
    return values


def whole_number(request: web.Request, name: str, default: int | None, low: int, high: int) -> int | None:
    """A whole number of the query, `default` when it is left out. Raises ConfigError."""
    text = request.query.get(name)
    if text is None:
        return default
    if not text.isdecimal() or not low <= int(text) <= high:
        raise ConfigError(f"{name} is '{text}'; it must be a whole number from {low} to {high}.")
    return int(text)
