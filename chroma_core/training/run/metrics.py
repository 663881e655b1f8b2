"""What a run writes down: its folders, where it stands, `metrics.jsonl`, and TensorBoard's event files.

`metrics.jsonl` is one JSON object a line, appended while training, cut back on resume. The event files repeat it and
the previews for those who watch in TensorBoard; nothing reads them back. They are written through tensorboardX, which
needs neither TensorBoard nor TensorFlow.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...errors import ConfigError

SMOOTHING = 0.98
"""Weight of the past in the smoothed loss: about the last 50 steps."""

CURVES = {
    "loss": "training/loss",
    "loss_smooth": "training/loss_smooth",
    "preserved": "training/preserved",
    "lr": "training/learning_rate",
    "grad_norm": "training/grad_norm",
    "seconds": "training/step_seconds",
    "heldout_loss": "heldout/loss",
    "heldout_loss_base": "heldout/loss_base",
}
"""Fields of a line of `metrics.jsonl` and the names of their curves."""


def cache_folder(root: Path) -> Path:
    """Where all jobs below `root` keep latents, text states, and what was read of images."""
    return root / "cache"


@dataclass(frozen=True)
class JobPaths:
    """The folders of one job. loras, models: where what it ends with goes, for whoever looks for it."""

    job: Path
    loras: Path
    cache: Path
    models: Path

    @classmethod
    def of(cls, root: Path, job_id: str, loras: Path, models: Path | None = None) -> JobPaths:
        """Those of a job below `root`; without `models` they lie in `diffusion_models` beside the LoRAs."""
        return cls(root / job_id, loras, cache_folder(root), models or loras.parent / "diffusion_models")

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

    @property
    def kept(self) -> Path:
        """LoRAs of earlier steps."""
        return self.job / "loras"


ROUNDING = 2
"""How a training step rounds, apart from what options say: 1 until LoRA was added to a layer's result in one product
(and in 16 bits, the gradient of turned queries and keys was rounded once)."""


@dataclass
class Progress:
    """Where a run stands. Steps are counted as done; −1 means never. rounding: see `ROUNDING`. compiled: whether the
    blocks are, where that is known."""

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
    rounding: int = ROUNDING
    worse_at: int = -1
    compiled: bool | None = None

    @property
    def taken(self) -> int:
        """Steps that changed the weights."""
        return self.step - self.skipped_steps

    def smooth(self, loss: float) -> None:
        """Take a step's loss into `loss_smooth`: the mean of past losses, each weighed `SMOOTHING` times the next.

        `loss_weight` makes it right from the first step on.
        """
        self.loss_weight = SMOOTHING * self.loss_weight + (1 - SMOOTHING)
        past = self.loss_smooth if self.loss_smooth is not None else 0.0
        self.loss_smooth = past + (1 - SMOOTHING) / self.loss_weight * (loss - past)


class MetricsLog:
    """The metrics file of one job. Without `writes`, for a rank that leaves writing to rank 0, it is only read."""

    def __init__(self, path: Path, writes: bool = True):
        self.path, self.writes = path, writes
        self.also: Callable[[dict[str, Any]], None] = lambda values: None
        """Called with every line that is added."""

        self._left: list[str] = []

    def append(self, **values: Any) -> None:
        """Add one line; visible to readers at once, durable from the next `sync` on.

        What cannot be written now (the disk is full) is kept for the next time; `settle` says so.
        """
        if not self.writes:
            return
        self._left.append(json.dumps(values) + "\n")
        with suppress(OSError):
            self.settle()
        self.also(values)

    def settle(self) -> None:
        """Write what could not be written before. Raises OSError; the file then ends with a whole line."""
        if not self._left:
            return
        with self.path.open("ab") as file:
            before = file.tell()
            try:
                file.write("".join(self._left).encode())
                file.flush()
            except OSError:
                os.truncate(self.path, before)
                raise
        self._left.clear()

    def sync(self) -> int:
        """Make what was appended durable; returns the file's length in bytes."""
        if not self.writes:
            return 0
        self.settle()
        with self.path.open("ab") as file:
            os.fsync(file.fileno())
            return file.tell()

    def truncate(self, length: int) -> None:
        """Forget everything after the first `length` bytes: steps that will be trained again."""
        self._left.clear()
        if self.writes and self.path.exists():
            os.truncate(self.path, min(length, self.path.stat().st_size))

    def read(self) -> list[dict[str, Any]]:
        """All complete lines; one that was cut off by a crash, or is damaged, is left out."""
        try:
            lines = self.path.read_bytes().splitlines()
        except FileNotFoundError:
            return []
        values = []
        for line in lines:
            try:
                values.append(json.loads(line))
            except ValueError:
                continue
        return values


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

    def images(self, step: int, paths: Iterable[Path]) -> None:
        """Preview images of a step, one series a prompt."""
        self._guarded(lambda: self._images(step, paths))

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

    def _images(self, step: int, paths: Iterable[Path]) -> None:
        for i, path in enumerate(paths):
            with Image.open(path) as image:
                self._writer.add_image(f"previews/{i}", np.asarray(image.convert("RGB")), step, dataformats="HWC")
