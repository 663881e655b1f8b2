"""Where a job keeps its files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Places:
    """The folders of one job."""

    job: Path
    loras: Path
    cache: Path

    @property
    def samples(self) -> Path:
        return self.job / "samples"

    @property
    def checkpoints(self) -> Path:
        return self.job / "checkpoints"
