"""The one way to wait in a test: for what is to come, and no longer."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

Found = TypeVar("Found")
PATIENCE = 240.0
"""Seconds: much more than anything takes on a machine with five times as much to do as it has cores."""


def until(
    condition: Callable[[], Found],
    what: str = "",
    seconds: float = PATIENCE,
    pause: Callable[[float], Any] = time.sleep,
    interval: float = 0.02,
    report: Callable[[], object] | None = None,
) -> Found:
    """What `condition()` returns as soon as that is true; fails, naming `what` and with `report()`, after `seconds`.

    pause: how to let `interval` seconds pass; a test of the page gives the page's own, so that its events are heard.
    """
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            details = f"\n{report()}" if report else ""
            raise AssertionError(f"waited {seconds:.0f} s in vain for {what or condition.__name__}{details}")
        pause(interval)
    return found


def settled(look: Callable[[], Found], pause: Callable[[float], Any] = time.sleep, times: int = 5) -> Found:
    """What `look()` returns once it has returned the same so many times in a row, a tenth of a second apart."""
    seen: list[Found] = []

    def same() -> bool:
        seen.append(look())
        return len(seen) >= times and all(each == seen[-1] for each in seen[-times:])

    until(same, "something that stays", pause=pause, interval=0.1)
    return seen[-1]


def stays(condition: Callable[[], object], what: str, seconds: float = 0.3) -> None:
    """Fails as soon as `condition()` is no longer true; looks for that many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert condition(), f"no longer: {what}"
        time.sleep(0.01)
