"""Contestants in turn: what else the machine does meets all of them alike."""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.comfyui_peer import CLOCKS

Turn = Callable[[], float | None]
"""Does the work once; in another process it returns the seconds that it took there."""


def take_turns(contestants: Mapping[str, Turn], rounds: int, clock: str = "wall", parts: int = 1) -> dict[str, Any]:
    """NAME_s, the median of each one's seconds (of one of `parts` equal parts of a turn), NAME_least_s, the turn
    that was disturbed least, NAME_spread, the largest over the smallest, and the machine's load. Everyone takes a turn
    to warm up; every second round goes backwards.
    """
    before, now = load(), CLOCKS[clock]
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        order = list(contestants.items())
        for name, turn in reversed(order) if number % 2 else order:
            started = now()
            elsewhere = turn()
            if number:
                times[name].append((now() - started if elsewhere is None else elsewhere) / parts)
    row: dict[str, Any] = {f"{name}_s": statistics.median(found) for name, found in times.items()}
    row |= {f"{name}_least_s": min(found) for name, found in times.items()}
    row |= {f"{name}_spread": max(found) / min(found) for name, found in times.items()}
    return row | {"clock": clock, "load_before": before, "load_after": load()}


def ratios(row: Mapping[str, Any], peers: Iterable[str], to: str, suffix: str = "") -> dict[str, float]:
    """How many times longer each peer takes than `to`: of the medians, and of the least disturbed turns."""
    found = {}
    for peer in peers:
        found[f"ratio_{peer}{suffix}"] = row[f"{peer}_s"] / row[f"{to}_s"]
        found[f"least_ratio_{peer}{suffix}"] = row[f"{peer}_least_s"] / row[f"{to}_least_s"]
    return found


def load() -> float | None:
    """Processes that want a core, over the last minute; None where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def add_options(parser: argparse.ArgumentParser, threads: int | None = None) -> None:
    """What every benchmark in turns is asked."""
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contestant (default: 3)")
    parser.add_argument("--threads", type=int, default=threads, help="PyTorch's threads on the CPU")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: CPU seconds, where others work too")


def keep(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Write numbers as JSON, one row a line."""
    short = [{k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in rows]
    path.write_text("[\n" + ",\n".join(map(json.dumps, short)) + "\n]\n", encoding="utf-8")


def show(row: Mapping[str, Any], as_json: bool) -> None:
    """Print a row, rounded: one JSON object, or a line a value."""
    row = {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}
    print(json.dumps(row) if as_json else "\n".join(f"{key:<26} {value}" for key, value in row.items()))
