"""The host's `comfy` package in this process; the fixture `server` (a running host) is in tests/conftest.py."""

from __future__ import annotations

from types import ModuleType

import pytest

from comfy_package import import_comfy


@pytest.fixture(scope="session")
def comfy() -> ModuleType:
    """The host's `comfy` package, imported on the CPU."""
    return import_comfy()
