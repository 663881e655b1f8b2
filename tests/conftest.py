"""What every test shares: one thread, no network, and — started only when a test asks — one real ComfyUI server."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models are tens of times slower on oversubscribed threads
os.environ["HF_HUB_OFFLINE"] = "1"

from _host import Host, start_host  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """A real ComfyUI with this pack, on the CPU, in a base directory of its own; see `scripts/_host.py`."""
    with start_host(tmp_path_factory.mktemp("host")) as host:
        yield host
