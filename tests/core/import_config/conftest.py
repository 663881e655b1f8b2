"""Where the tests of imported configurations put their files."""

import json
from pathlib import Path

import pytest


@pytest.fixture
def put(tmp_path, monkeypatch):
    """Writes a file (JSON unless text) into a fresh present folder."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, content) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return write
