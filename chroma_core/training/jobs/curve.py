"""`metrics.jsonl` for whoever draws it: read on from where it was read last, and thinned to what a screen can show."""

from __future__ import annotations

import json
import math
import threading
import uuid
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..step.objective import HELDOUT_SIGMAS

COLUMNS = ("step", "loss", "loss_smooth", "lr", "grad_norm", "sigma", "seconds")
"""What a trained step has; numbers that are not finite or missing are None."""

_TAIL = 256
"""Bytes before the place read last that are compared: a resume cuts the file and writes its steps again."""


class Curve:
    """The growing curve of one job.

    Reading it costs what was added since the last time. Each reading of the file from its beginning has a new `token`:
    who holds an older one must ask for everything again, because steps were taken back. Safe from several threads.
    """

    def __init__(self, path: Path):
        self.path = path
        self._lock = threading.Lock()
        self._start_over()

    def _start_over(self) -> None:
        self.token = uuid.uuid4().hex[:12]
        self._columns: dict[str, array[float]] = {name: array("d") for name in COLUMNS}
        self._heldout: list[dict[str, Any]] = []
        self._base: dict[str, Any] | None = None
        self._notes: list[dict[str, Any]] = []
        self._offset, self._tail = 0, b""

    def read(self, points: int = 1500, after: int | None = None, token: str | None = None) -> dict[str, Any]:
        """The curve as JSON values.

        Args:
            points: at most about so many steps; of each stretch the steps with the lowest and the highest loss are
                kept, so that a spike is never thinned away.
            after: only what is later than this step, for one who has the rest under `token`; with another token, all.
        Returns:
            `token`; `total`, the steps there are in all; for each of `COLUMNS` a list; `heldout`: `{step, loss,
            by_sigma}` at `sigmas`; `base`: the same of the untrained model, or None; `notes`: `{step, warning}`,
            `{step, skipped}` and `{step, changes}`. With `after`, lists hold what is new (a held-out loss may belong to
            step `after` itself, so those from there on are sent again).
        """
        with self._lock:
            self._refresh()
            steps = self._columns["step"]
            since = after if token == self.token else None  # None: everything
            first = 0 if since is None else bisect_right(steps, since)
            rows = list(_thinned(self._columns["loss"], first, points))
            return {
                "token": self.token,
                "continued": since is not None,
                "total": len(steps),
                **{name: [_number(column[row]) for row in rows] for name, column in self._columns.items()},
                "sigmas": list(HELDOUT_SIGMAS),
                "base": self._base,
                "heldout": [entry for entry in self._heldout if since is None or entry["step"] >= since],
                "notes": [note for note in self._notes if since is None or note["step"] >= since],
            }

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
        if "heldout_loss_base" in line:
            self._base = {"loss": line["heldout_loss_base"], "by_sigma": line.get("heldout_by_sigma_base")}
        elif "heldout_loss" in line:
            entry = {"step": line["step"], "loss": line["heldout_loss"], "by_sigma": line.get("heldout_by_sigma")}
            self._heldout.append(entry)
        elif "loss" in line:
            values = [float(line["step"]), *(_float(line.get(name)) for name in COLUMNS[1:])]
            for column, value in zip(self._columns.values(), values, strict=True):
                column.append(value)
        else:
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
