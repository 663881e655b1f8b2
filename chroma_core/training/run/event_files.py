"""TensorBoard event files of a job: its curves, its preview pictures and its configuration, for those who watch there.

They repeat `metrics.jsonl` and the samples; nothing reads them back. Written through tensorboardX, which needs neither
TensorBoard nor TensorFlow.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...errors import ConfigError

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

    They must never end a job: from the first failure on (a full disk, say) nothing more is written, and `on_failure`
    is called with what to tell the user.
    """

    def __init__(
        self,
        folder: Path,
        step: int,
        config: dict[str, Any],
        earlier: Iterable[dict[str, Any]] = (),
        on_failure: Callable[[str], None] = lambda message: None,
    ):
        self._on_failure = on_failure
        self._writer: Any = None
        self._guarded(lambda: self._open(folder, step, config, earlier), opened=False)

    def _open(self, folder: Path, step: int, config: dict[str, Any], earlier: Iterable[dict[str, Any]]) -> None:
        from tensorboardX import SummaryWriter

        files = len(list(folder.glob("events.out.tfevents.*"))) if folder.is_dir() else 0
        # Two files of the same second would otherwise have one name; TensorBoard reads them in the order of names.
        self._writer = SummaryWriter(
            str(folder),
            purge_step=step + 1 if files else None,
            filename_suffix=f".{files:04d}",
            flush_secs=10,
            max_queue=0,  # no limit: its thread ends at an error, and whoever adds to a full queue then waits for ever
        )
        self._writer.add_text("config", f"```json\n{json.dumps(config, indent=2)}\n```", step + 1 if files else 0)
        for line in () if files else earlier:
            self._add(line)

    def add(self, line: dict[str, Any]) -> None:
        """The numbers of one line of `metrics.jsonl` as points of their curves."""
        self._guarded(lambda: self._add(line))

    def pictures(self, step: int, paths: Iterable[Path]) -> None:
        """Preview pictures of a step, one series a prompt."""
        self._guarded(lambda: self._pictures(step, paths))

    def close(self) -> None:
        """Write what is not yet written."""
        self._guarded(lambda: self._writer.close())

    def _guarded(self, write: Callable[[], None], opened: bool = True) -> None:
        if opened and self._writer is None:
            return
        try:
            if opened and not self._thread_lives():
                raise OSError("their writer ended; perhaps the disk is full")
            write()
        except Exception as error:
            self._abandon()
            self._on_failure(
                f"The TensorBoard event files end here ({type(error).__name__}: {error}). Training goes on; "
                "metrics.jsonl has all numbers, and the job's next start goes on with the files."
            )

    def _thread_lives(self) -> bool:
        worker = getattr(getattr(self._writer.file_writer, "event_writer", None), "_worker", None)
        return worker is None or worker.is_alive()

    def _abandon(self) -> None:
        writer, self._writer = self._writer, None
        with suppress(AttributeError):  # else the process, when it ends, waits for what nobody will write
            writer.file_writer.event_writer._event_queue.cancel_join_thread()

    def _add(self, line: dict[str, Any]) -> None:
        step = line["step"]
        for field, curve in CURVES.items():
            if line.get(field) is not None:
                self._writer.add_scalar(curve, line[field], step)
        for field, group in (("heldout_by_sigma", "heldout_by_sigma"), ("heldout_by_sigma_base", "heldout_base")):
            for i, loss in enumerate(line.get(field) or ()):
                self._writer.add_scalar(f"{group}/band_{i + 1:02d}", loss, step)
        if line.get("warning"):
            self._writer.add_text("warnings", line["warning"], step)

    def _pictures(self, step: int, paths: Iterable[Path]) -> None:
        for i, path in enumerate(paths):
            with Image.open(path) as picture:
                self._writer.add_image(f"previews/{i}", np.asarray(picture.convert("RGB")), step, dataformats="HWC")
