"""TensorBoard event files of a job: its curves, its preview pictures and its configuration, for those who watch there.

They repeat `metrics.jsonl` and the samples; nothing reads them back. Written through tensorboardX, which needs neither
TensorBoard nor TensorFlow.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import ConfigError

CURVES = {
    "loss": "training/loss",
    "loss_smooth": "training/loss_smooth",
    "lr": "training/learning_rate",
    "grad_norm": "training/grad_norm",
    "seconds": "training/step_seconds",
    "heldout_loss": "heldout/loss",
    "heldout_loss_base": "heldout/loss_base",
}
"""Fields of a line of `metrics.jsonl` and the names of their curves."""


def check_event_files(wanted: bool) -> None:
    """Raises ConfigError when event files are wanted and tensorboardX is not installed."""
    if wanted and find_spec("tensorboardX") is None:
        raise ConfigError(
            "tensorboard = true needs the package tensorboardX, which is not installed. Install it (pip install "
            "tensorboardX), or leave the option off: metrics.jsonl in the job's folder holds the same numbers."
        )


class EventFiles:
    """The event files in one folder, going on after `step` steps.

    Points of later steps in older files are declared void (`purge_step`), so that a resumed job draws each step once.
    Where there are no files yet, `earlier`, the lines of `metrics.jsonl` so far, are written first.
    """

    def __init__(self, folder: Path, step: int, config: dict[str, Any], earlier: Iterable[dict[str, Any]] = ()):
        from tensorboardX import SummaryWriter

        files = len(list(folder.glob("events.out.tfevents.*"))) if folder.is_dir() else 0
        # Two files of the same second would otherwise have one name; TensorBoard reads them in the order of names.
        self._writer = SummaryWriter(
            str(folder), purge_step=step + 1 if files else None, filename_suffix=f".{files:04d}", flush_secs=10
        )
        self._writer.add_text("config", f"```json\n{json.dumps(config, indent=2)}\n```", step + 1 if files else 0)
        for line in () if files else earlier:
            self.add(line)

    def add(self, line: dict[str, Any]) -> None:
        """The numbers of one line of `metrics.jsonl` as points of their curves."""
        step = line["step"]
        for field, curve in CURVES.items():
            if line.get(field) is not None:
                self._writer.add_scalar(curve, line[field], step)
        for field, group in (("heldout_by_sigma", "heldout_by_sigma"), ("heldout_by_sigma_base", "heldout_base")):
            for i, loss in enumerate(line.get(field) or ()):
                self._writer.add_scalar(f"{group}/band_{i + 1:02d}", loss, step)
        if line.get("warning"):
            self._writer.add_text("warnings", line["warning"], step)

    def pictures(self, step: int, paths: Iterable[Path]) -> None:
        """Preview pictures of a step, one series a prompt."""
        for i, path in enumerate(paths):
            with Image.open(path) as picture:
                self._writer.add_image(f"previews/{i}", np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        """Write what is not yet written."""
        self._writer.close()
