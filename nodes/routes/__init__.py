"""HTTP under /chromakit, one file a resource."""

from __future__ import annotations

from typing import Any

from . import choosing, jobs, panels, requests


def register(routes: Any) -> None:
    """Add every route to ComfyUI's table. `choosing` before `jobs`, where any word may stand after an id."""
    for resource in (choosing, jobs, requests, panels):
        resource.register(routes)
