"""HTTP under /chromakit, one file a resource."""

from __future__ import annotations

from typing import Any

from . import datasets, jobs, panels, requests, server


def register(routes: Any) -> None:
    """Add every route to ComfyUI's table."""
    for resource in (jobs, requests, datasets, panels, server):
        resource.register(routes)
