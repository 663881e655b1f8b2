"""What must not change unnoticed, kept in tests/recorded.

A change that is meant is recorded by `CHROMAKIT_RECORD=1 pytest -k promises`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "recorded"
WRITE = os.environ.get("CHROMAKIT_RECORD") == "1"


def recorded(name: str, now: Any) -> Any:
    """The recorded value of that name; with CHROMAKIT_RECORD=1 `now` takes its place first."""
    path = FOLDER / f"{name}.json"
    if WRITE:
        FOLDER.mkdir(exist_ok=True)
        path.write_text(json.dumps(now, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


def plain(value: Any) -> Any:
    """The value as JSON gives it back: lists for tuples, text for keys."""
    return json.loads(json.dumps(value))


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Every place where two JSON values differ, one line each: a long value's change is readable."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = [f"{where}/{key}: gone" for key in old if key not in new]
        found += [f"{where}/{key}: new" for key in new if key not in old]
        if not found and list(old) != list(new):
            found = [f"{where}: another order: {list(new)}"]
        return found + [line for key in old if key in new for line in differences(old[key], new[key], f"{where}/{key}")]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [
            line for i, (a, b) in enumerate(zip(old, new, strict=True)) for line in differences(a, b, f"{where}[{i}]")
        ]
    return [] if old == new and type(old) is type(new) else [f"{where}: was {old!r}, is {new!r}"]


def hold(name: str, now: Any) -> None:
    """Fail, with every difference, unless `now` is what was recorded under that name."""
    now = plain(now)
    changed = differences(recorded(name, now), now)
    assert not changed, "\n".join([f"not as recorded in tests/recorded/{name}.json:", *changed])
