"""HTTP for the settings of this host: what prompts do while a job trains."""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import web

from ...chroma_core.errors import ConfigError
from .. import while_training
from .answers import json_of, refused


def register(routes: Any) -> None:
    """Add the routes to the host's table."""
    routes.get("/chromakit/settings")(_get)
    routes.post("/chromakit/settings")(_post)


async def _get(request: web.Request) -> web.Response:
    return web.json_response(await asyncio.to_thread(while_training.settings))


async def _post(request: web.Request) -> web.Response:
    try:
        return web.json_response(await asyncio.to_thread(while_training.change, await json_of(request)))
    except ConfigError as error:
        return refused(400, error)
    except OSError as error:
        return refused(500, f"The settings could not be written, and stay as they were: {error}.")
