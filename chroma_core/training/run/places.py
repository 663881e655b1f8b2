"""Where a job keeps its files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Places:
    """The folders of one job. loras, models: where what it ends with goes, for whoever looks for it."""

    job: Path
    loras: Path
    cache: Path
    models: Path

    @classmethod
    def of(cls, root: Path, job_id: str, loras: Path, models: Path | None = None) -> Places:
        """Those of a job below `root`; without `models` they lie in `diffusion_models` beside the LoRAs."""
        return cls(root / job_id, loras, root / "cache", models or loras.parent / "diffusion_models")

    @property
    def diffusers(self) -> Path:
        """Trained models as folders. Not below `models`: ComfyUI would list their files, and load them as a Flux."""
        return self.models.parent / "diffusers"

    @property
    def samples(self) -> Path:
        return self.job / "samples"

    @property
    def checkpoints(self) -> Path:
        return self.job / "checkpoints"
