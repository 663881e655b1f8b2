"""The host's `comfy` package in this process; the fixture `server` (a running host) is in tests/conftest.py."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from comfy_package import import_comfy


@pytest.fixture(scope="session")
def comfy() -> ModuleType:
    """The host's `comfy` package, imported on the CPU."""
    return import_comfy()


@pytest.fixture(scope="session")
def pack_host(comfy: ModuleType) -> ModuleType:
    """This pack's `nodes/host`, imported beside ComfyUI's `comfy` as ComfyUI imports it: as part of a package."""
    name, root = "chromakit_under_test", Path(__file__).resolve().parents[2]
    spec = importlib.util.spec_from_file_location(name, root / "__init__.py", submodule_search_locations=[str(root)])
    assert spec and spec.loader
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return importlib.import_module(f"{name}.nodes.host")
