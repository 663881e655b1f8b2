"""What an import did, for people and for programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .apply import Imported, Line
from .job_toml import describe, toml_value


def as_text(imported: Imported, path: Path) -> str:
    """What maps, what differs, what has no counterpart, what is unknown, what to do before training."""
    maps = [
        f"{line.option} = {line.value} → " + ", ".join(f"{to} = {toml_value(v)}" for to, v in line.values.items())
        for line in imported.of("maps")
    ]
    groups = [
        ("taken over", maps),
        ("different", [describe(line) for line in imported.of("differs")]),
        ("without counterpart", [describe(line) for line in imported.of("no counterpart")]),
        ("not known, left out", [describe(line) for line in imported.of("unknown")]),
        ("to do before training", list(imported.todo)),
    ]
    parts = [f"{title}:\n" + "\n".join(f"  {_plain(item)}" for item in items) for title, items in groups if items]
    left = len(imported.of("ignored"))
    counts = f"{len(maps)} taken over, {len(imported.remarks)} remarks, {left} that change nothing here"
    return "\n\n".join([*parts, f"{path}: imported from {imported.tool} ({counts})"])


def as_json(imported: Imported, path: Path) -> dict[str, Any]:
    """The same as plain values; every option of the foreign file is in one of the lists."""
    names = {
        "mapped": "maps", "differs": "differs", "no_counterpart": "no counterpart", "unknown": "unknown",
        "ignored": "ignored",
    }  # fmt: skip
    return {
        "tool": imported.tool,
        "sources": list(imported.sources),
        "job": str(path),
        **{name: [_line(line) for line in imported.lines if line.kind == kind] for name, kind in names.items()},
        "todo": list(imported.todo),
    }


def _line(line: Line) -> dict[str, Any]:
    return {"option": line.option, "value": line.value, "written": dict(line.values), "reason": line.reason}


def _plain(text: str) -> str:
    """No control characters of a foreign file reach the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
