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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Say which files belong in one process, and begin with the long ones: no process is to end long after another."""
    groups: dict[str, list[pytest.Item]] = {}
    for item in items:
        groups.setdefault(shared_import(item) or item.nodeid.partition("::")[0], []).append(item)
    for name, group in groups.items():
        for item in group:
            item.add_marker(pytest.mark.xdist_group(name))
    items[:] = [item for group in sorted(groups.values(), key=is_short) for item in group]


def shared_import(item: pytest.Item) -> str | None:
    """native: the file asks ComfyUI's own modules in forks of a process that has imported them (support/forked.py)."""
    module = getattr(item, "module", None)
    return "native" if hasattr(module, "native") or hasattr(module, "native_sampling") else None


def is_short(group: list[pytest.Item]) -> bool:
    return not any(item.get_closest_marker("slow") for item in group)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """A real ComfyUI with this pack, on the CPU, in a base directory of its own; see `scripts/_host.py`."""
    with start_host(tmp_path_factory.mktemp("host")) as host:
        yield host
