"""`metrics.jsonl`: one JSON object a line, appended while training and cut back to the checkpoint on resume."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


class MetricsLog:
    """The metrics file of one job."""

    def __init__(self, path: Path):
        self.path = path
        self.also: Callable[[dict[str, Any]], None] = lambda values: None
        """Called with every line that is added."""

    def append(self, **values: Any) -> None:
        """Add one line; visible to readers at once, durable from the next `sync` on."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
        self.also(values)

    def sync(self) -> int:
        """Make what was appended durable; returns the file's length in bytes."""
        with self.path.open("ab") as file:
            os.fsync(file.fileno())
            return file.tell()

    def truncate(self, length: int) -> None:
        """Forget everything after the first `length` bytes: steps that will be trained again."""
        if self.path.exists():
            os.truncate(self.path, min(length, self.path.stat().st_size))

    def read(self) -> list[dict[str, Any]]:
        """All complete lines; a line that was cut off by a crash is left out."""
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return []
        values = []
        for line in lines:
            try:
                values.append(json.loads(line))
            except ValueError:
                continue
        return values


class NoMetrics(MetricsLog):
    """In place of the file, for a process that leaves writing to another."""

    def append(self, **values: Any) -> None:
        """Nothing."""

    def sync(self) -> int:
        """Nothing; 0 bytes."""
        return 0

    def truncate(self, length: int) -> None:
        """Nothing."""
