"""HTTP under /chromakit, one file a resource."""

from __future__ import annotations

from typing import Any

from . import job_files, jobs, looks, requests, settings


def register(routes: Any) -> None:
    """Add every route to the host's table."""
    for resource in (jobs, job_files, requests, looks, settings):
        resource.register(routes)
