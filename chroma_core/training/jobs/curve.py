"""The loss curve of a job for whoever draws it, and drawn: `metrics.jsonl` read on from where it was read last.

What is read is thinned to what a screen can show; the drawing uses Pillow alone.
"""

from __future__ import annotations

import json
import math
import threading
import uuid
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from PIL import Image, ImageDraw
from typing_extensions import TypedDict

from ...model.drawing import font_of, wrap
from ..run.verdict import Record, verdict
from ..step.objective import HELDOUT_SIGMAS

COLUMNS = ("step", "loss", "loss_smooth", "lr", "grad_norm", "sigma", "seconds")
"""What a trained step has; numbers that are not finite or missing are None."""

_TAIL = 256
"""Bytes before the place read last that are compared: a resume cuts the file and writes its steps again."""


class HeldOutLoss(TypedDict):
    """The validation loss, and that at each of the sigmas."""

    loss: float
    by_sigma: list[float] | None


class HeldOutAt(HeldOutLoss):
    """The validation loss at a step."""

    step: int


class CurveData(TypedDict):
    """See `Curve.read`."""

    token: str
    continued: bool
    total: int
    step: list[int]
    loss: list[float | None]
    loss_smooth: list[float | None]
    lr: list[float | None]
    grad_norm: list[float | None]
    sigma: list[float | None]
    seconds: list[float | None]
    sigmas: list[float]
    base: HeldOutLoss | None
    heldout: list[HeldOutAt]
    verdict: dict[str, Any] | None
    notes: list[dict[str, Any]]


class Curve:
    """The growing curve of one job.

    Of the file only what was added is read; the verdict looks at every step (7 ms for 10⁵). Each reading of the file
    from its beginning has a new `token`: who holds an older one must ask for everything again, because steps were taken
    back. Safe from several threads.
    """

    def __init__(self, path: Path):
        """path: `metrics.jsonl` in the job's folder, whose name is the job's id."""
        self.path = path
        self._lock = threading.Lock()
        self._start_over()

    def _start_over(self) -> None:
        self.token = uuid.uuid4().hex[:12]
        self._columns: dict[str, array[float]] = {name: array("d") for name in COLUMNS}
        self._heldout: list[dict[str, Any]] = []
        self._base: dict[str, Any] | None = None
        self._notes: list[dict[str, Any]] = []
        self._record = Record()
        self._offset, self._tail = 0, b""

    def read(self, points: int = 1500, after: int | None = None, token: str | None = None) -> CurveData:
        """The curve as JSON values.

        Args:
            points: at most about so many steps; of each stretch the steps with the lowest and the highest loss are
                kept, so that a spike is never thinned away.
            after: only what is later than this step, for one who has the rest under `token`; with another token, all.
        Returns:
            `token`; `total`, the steps there are in all; for each of `COLUMNS` a list; `heldout`: `{step, loss,
            by_sigma}` at `sigmas`; `base`: the same of the untrained model, or None; `verdict`: see `run.verdict`;
            `notes`: `{step, warning}`, `{step, skipped}` and `{step, changes}`. With `after`, lists hold what is new (a
            held-out loss may belong to step `after` itself, so those from there on are sent again).
        """
        with self._lock:
            self._refresh()
            steps = self._columns["step"]
            since = after if token == self.token else None  # None: everything
            first = 0 if since is None else bisect_right(steps, since)
            told = verdict(self._record)
            rows = list(_thinned(self._columns["loss"], first, points))
            curve = {
                "token": self.token,
                "continued": since is not None,
                "total": len(steps),
                **{name: [_number(column[row]) for row in rows] for name, column in self._columns.items()},
                "sigmas": list(HELDOUT_SIGMAS),
                "base": self._base,
                "heldout": [entry for entry in self._heldout if since is None or entry["step"] >= since],
                "verdict": told and told.to_dict(self.path.parent.name),
                "notes": [note for note in self._notes if since is None or note["step"] >= since],
            }
            return cast(CurveData, curve)

    def _refresh(self) -> None:
        try:
            with self.path.open("rb") as file:
                start = max(0, self._offset - _TAIL)
                file.seek(start)
                if file.read(self._offset - start) != self._tail:
                    self._start_over()
                    file.seek(0)
                added = file.read()
        except FileNotFoundError:
            if self._offset:
                self._start_over()
            return
        whole = added[: added.rfind(b"\n") + 1]  # a line that is being written is read the next time
        for line in whole.splitlines():
            try:
                self._take(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # cut off by a crash
        self._offset += len(whole)
        self._tail = (self._tail + whole)[-_TAIL:]

    def _take(self, line: dict[str, Any]) -> None:
        self._record.take(line)
        if "heldout_loss_base" in line:
            self._base = {"loss": line["heldout_loss_base"], "by_sigma": line.get("heldout_by_sigma_base")}
        elif "heldout_loss" in line:
            entry = {"step": line["step"], "loss": line["heldout_loss"], "by_sigma": line.get("heldout_by_sigma")}
            self._heldout.append(entry)
        elif "loss" in line:
            values = [float(line["step"]), *(_float(line.get(name)) for name in COLUMNS[1:])]
            for column, value in zip(self._columns.values(), values, strict=True):
                column.append(value)
        elif "images" not in line:
            self._notes.append({"step": int(line["step"]), **line})


def _float(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _number(value: float) -> float | None:
    """For JSON, which has no NaN: significant digits that a plot can show, whole numbers as they are."""
    if not math.isfinite(value):
        return None
    return int(value) if value == int(value) else float(f"{value:.6g}")


def _thinned(loss: Sequence[float], first: int, points: int) -> Iterator[int]:
    """Indices from `first` on, in order: all, or of each stretch those of its lowest and highest loss, and the last."""
    last = len(loss) - 1
    if last - first < points:
        yield from range(first, last + 1)
        return
    stretch = math.ceil((last + 1 - first) / max(1, points // 2))
    for start in range(first, last + 1, stretch):
        rows = range(start, min(start + stretch, last + 1))
        low, high = min(rows, key=loss.__getitem__), max(rows, key=loss.__getitem__)
        kept = {low, high} | ({last} if rows[-1] == last else set())
        yield from sorted(kept)


_BACKGROUND, _GRID, _INK = (24, 24, 27), (52, 52, 58), (212, 212, 216)
_RAW, _SMOOTH, _HELDOUT = (62, 84, 120), (96, 165, 250), (250, 204, 21)
_SCALE = 2  # drawn larger and reduced: Pillow's lines have no smooth edges

Point = tuple[float, float]


def plot_losses(
    metrics: Sequence[dict[str, Any]],
    width: int = 768,
    height: int = 432,
    instead: str = "no step has been logged yet",
) -> Image.Image:
    """Loss over steps: raw faint, smoothed bold, held-out as points joined by a line, axes labelled.

    Args:
        metrics: the lines of `metrics.jsonl` (`Job.metrics()`); may be empty.
        width, height: size of the image in pixels.
        instead: what stands there as long as there is nothing to plot.
    """
    raw = _series(metrics, "loss")
    smooth = _series(metrics, "loss_smooth")
    heldout = _series(metrics, "heldout_loss")
    image = Image.new("RGB", (width * _SCALE, height * _SCALE), _BACKGROUND)
    draw = ImageDraw.Draw(image)
    font = font_of(13 * _SCALE)
    left, top, right, bottom = 64 * _SCALE, 36 * _SCALE, (width - 20) * _SCALE, (height - 44) * _SCALE
    points = raw + heldout
    if not points:
        rows = [row for line in instead.split("\n") for row in wrap(line, font, right - left, 4)]
        draw.text((left, top), "\n".join(rows), _INK, font, spacing=6 * _SCALE)
        return image.resize((width, height), Image.Resampling.LANCZOS)

    last_step = max(1.0, max(x for x, _ in points))
    # A few wild steps must not flatten the curve: the raw loss may be cut off above its 98th percentile.
    ordered = sorted(y for _, y in raw) or [0.0]
    highest = max([ordered[int(0.98 * (len(ordered) - 1))], *(y for _, y in smooth + heldout)])
    lowest = min([ordered[int(0.02 * (len(ordered) - 1))], *(y for _, y in smooth + heldout)])
    ticks = _ticks(lowest, highest)
    low, high = ticks[0], ticks[-1]

    def place(point: Point) -> Point:
        x = left + (right - left) * point[0] / last_step
        y = bottom - (bottom - top) * (min(max(point[1], low), high) - low) / (high - low)
        return x, y

    decimals = max(0, -math.floor(math.log10(ticks[1] - ticks[0])))
    for value in ticks:
        y = place((0, value))[1]
        draw.line((left, y, right, y), _GRID, _SCALE)
        draw.text((left - 8 * _SCALE, y), f"{value:.{decimals}f}", _INK, font, anchor="rm")
    for value in _ticks(0, last_step):
        if value <= last_step and value == int(value):
            x = place((value, 0))[0]
            draw.line((x, bottom, x, bottom + 5 * _SCALE), _INK, _SCALE)
            draw.text((x, bottom + 9 * _SCALE), f"{int(value)}", _INK, font, anchor="mt")
    draw.text((right, bottom + 26 * _SCALE), "step", _INK, font, anchor="rt")
    for series, colour, line in ((raw, _RAW, 1), (smooth, _SMOOTH, 3), (heldout, _HELDOUT, 2)):
        if len(series) > 1:
            draw.line([place(p) for p in series], colour, line * _SCALE, joint="curve")
    radius = 4 * _SCALE
    for x, y in map(place, heldout):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), _HELDOUT)
    x = left
    for label, colour, series in (("loss", _RAW, raw), ("smoothed", _SMOOTH, smooth), ("held out", _HELDOUT, heldout)):
        if series:
            draw.rectangle((x, 16 * _SCALE, x + 14 * _SCALE, 20 * _SCALE), colour)
            draw.text((x + 20 * _SCALE, 18 * _SCALE), f"{label} {series[-1][1]:.4f}", _INK, font, anchor="lm")
            x += 150 * _SCALE
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _series(metrics: Sequence[dict[str, Any]], key: str) -> list[Point]:
    return [
        (float(line["step"]), float(line[key]))
        for line in metrics
        if isinstance(line.get(key), int | float) and math.isfinite(line[key])
    ]


def _ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers that enclose low..high: multiples of 1, 2 or 5 times a power of ten."""
    span = max(high - low, 1e-6 * max(1.0, abs(high)), 1e-9)
    power = 10.0 ** math.floor(math.log10(span / wanted))
    step = next(power * m for m in (1, 2, 5, 10) if span / (power * m) <= wanted)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [i * step for i in range(first, max(last, first + 1) + 1)]
