"""Where a run stands, and `metrics.jsonl`: one JSON object a line, appended while training, cut back on resume."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SMOOTHING = 0.98
"""Weight of the past in the smoothed loss: about the last 50 steps."""


@dataclass
class Progress:
    """Where a run stands. Steps are counted as done; −1 means never."""

    step: int = 0
    validated_at: int = -1
    previewed_at: int = -1
    saved_at: int = -1
    loss_smooth: float | None = None
    loss_weight: float = 0.0
    heldout_loss_base: float | None = None
    heldout_loss: float | None = None
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    train_seconds: float = 0.0
    metrics_bytes: int = 0
    data: str = ""
    best_loss: float | None = None
    best_at: int = -1
    loss_fast: float | None = None
    loss_lowest: float | None = None
    diverged_at: int = -1

    def smooth(self, loss: float) -> None:
        """Take a step's loss into `loss_smooth`: the mean of past losses, each weighed `SMOOTHING` times the next.

        `loss_weight` makes it right from the first step on.
        """
        self.loss_weight = SMOOTHING * self.loss_weight + (1 - SMOOTHING)
        past = self.loss_smooth if self.loss_smooth is not None else 0.0
        self.loss_smooth = past + (1 - SMOOTHING) / self.loss_weight * (loss - past)


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
