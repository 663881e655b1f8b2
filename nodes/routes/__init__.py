"""HTTP under /chromakit, one file a resource."""

from __future__ import annotations

from typing import Any

from . import jobs, panels, requests


def register(routes: Any) -> None:
    """Add every route to ComfyUI's table."""
    for resource in (jobs, requests, panels):
        resource.register(routes)
