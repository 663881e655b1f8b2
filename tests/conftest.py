"""What every test shares: one thread, no network, and — started only when a test asks — one real ComfyUI server."""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from xdist.scheduler import LoadScopeScheduling

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models are tens of times slower on oversubscribed threads
os.environ["HF_HUB_OFFLINE"] = "1"

from _host import Host  # noqa: E402
from watching import watched_host  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


class FilesTogether(LoadScopeScheduling):
    """Deals out whole files, so that what a file's tests share is made once, and imports of ComfyUI to one process.

    Browser tests share the page alone, which each process has: one by one, no process is idle while another works.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return nodeid if "/browser/" in file else group_of(Path(file))


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> LoadScopeScheduling:
    """xdist's own `loadgroup` does not see groups under pytest 9.2."""
    return FilesTogether(config, log)


GROUPS = {
    "native": r"^import native|\b(comfy|pack_host)\b[,:)]",
    "forks": r"^import forked|^from .*\b(killed|hub_cases)\b",
}
"""What files share that is dear to begin: ComfyUI's own modules, here or in forks; processes that are forked."""


@cache
def group_of(file: Path) -> str:
    """The group whose files go to one process, or else the file."""
    text = (ROOT / file).read_text(encoding="utf-8")
    found = (name for name, words in GROUPS.items() if re.search(words, text, re.MULTILINE))
    return next(found, file.as_posix())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes long, tests and then files: no process is to end long after another."""
    long = {item.path for item in items if item.get_closest_marker("slow")}
    browser = {item.path for item in items if "browser" in item.path.parts}

    def rank(item: pytest.Item) -> tuple[bool, bool]:
        return item.path not in long, item.path in browser and item.get_closest_marker("slow") is None

    items.sort(key=rank)


def pytest_collection_finish() -> None:
    """What was imported stays, and each of the many collections that freeing models asks for is short; fewer others."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 20)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """A real ComfyUI with this pack, on the CPU, in a base directory of its own, and watched; see `watching.strays`."""
    with watched_host(tmp_path_factory.mktemp("host")) as host:
        yield host
