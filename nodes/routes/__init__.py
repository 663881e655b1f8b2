"""HTTP under /chromakit, one file a resource: each has a table of its routes."""

from __future__ import annotations

from typing import Any

from . import captioning, choosing, datasets, docs, jobs, openapi, panels, requests
from .common import add

# `choosing` before `jobs`, where any word may stand after an id.
ROUTES = openapi.described(
    *choosing.ROUTES, *jobs.ROUTES, *requests.ROUTES, *captioning.ROUTES, *datasets.ROUTES, *panels.ROUTES, *docs.ROUTES
)


def register(routes: Any) -> None:
    """Add every route to ComfyUI's table."""
    for route in ROUTES:
        add(routes, route)
