"""Writes the tables of docs/import.md: what becomes of each option of another trainer.

    python -m tools.docs.import_tables

The text before them is written by hand.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from chroma_core.import_config.table import Rule
from chroma_core.import_config.trainers import AI_TOOLKIT, KOHYA, ONETRAINER, SIMPLETUNER, Tables

from ..pages import filled, keep_current, markdown_table

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "import.md"
TITLES = {
    "differs": "Different",
    "no counterpart": "No counterpart",
    "ignored": "Left out without a warning",
    "maps": "Checked",
}


def page() -> str:
    """docs/import.md: its text as it stands, its tables as they should be."""
    parts = [
        *chapter(SIMPLETUNER, "SimpleTuner: {}", "config.json", "datasets"),
        *chapter(AI_TOOLKIT, "ai-toolkit: {}", "the process", "datasets"),
        *chapter(ONETRAINER, "OneTrainer: {}", "the configuration", "concepts"),
        *chapter(KOHYA, "sd-scripts: {}", "the configuration", "datasets"),
    ]
    return filled(PAGE.read_text(encoding="utf-8"), "options", "\n".join(part for part in parts if part))


def chapter(tables: Tables, title: str, top: str, sets: str) -> Iterator[str]:
    """One trainer's tables; `top`, `sets`: what its topmost section and its datasets are called."""
    for section, options in tables.sections.items():
        yield f"## {title.format(section or top)}\n"
        yield unstated(tables.unstated[section])
        yield table(options)
    yield f"## {title.format(sets)}\n"
    if tables.for_all_sets:
        yield f"From {top}, for every dataset that does not override it: {names(tables.for_all_sets)}.\n"
    yield unstated(tables.unstated["datasets"])
    yield table(tables.sets, "dataset.")


def unstated(values: Mapping[str, Any]) -> str:
    """What is written for options that a file does not state."""
    said = ", ".join(f"`{option}` {json.dumps(value)}" for option, value in values.items())
    return f"Not stated: {said}.\n" if said else ""


def table(options: Mapping[str, Rule], section: str = "") -> str:
    """The options that become something, as a table; the others by their reason."""
    rows: list[tuple[str, ...]] = []
    grouped: dict[tuple[str, str], list[str]] = {}
    for option, rule in options.items():
        if rule.to or rule.reason.startswith("`"):
            rows.append((f"`{option}`", becomes(rule, section), remark(rule)))
        else:
            grouped.setdefault((rule.kind, rule.reason), []).append(option)
    lines = [markdown_table(rows, ("option", "becomes", ""))]
    for kind, title in TITLES.items():
        items = [f"- {names(found)}: {reason}." for (k, reason), found in grouped.items() if k == kind]
        lines += ["", f"{title}:", "", *items] if items else []
    return "\n".join(lines) + "\n"


def becomes(rule: Rule, section: str) -> str:
    paths = rule.to.replace(" or ", ", ").split(", ")
    return ", ".join(f"`{section}{path}`" for path in paths) if rule.to else "–"


def remark(rule: Rule) -> str:
    differs = rule.kind == "differs" and "differs" not in rule.reason
    return ("differs: " if differs else "") + rule.reason


def names(options: Sequence[str]) -> str:
    return ", ".join(f"`{option}`" for option in options)


if __name__ == "__main__":
    sys.exit(keep_current(PAGE, page, __doc__))
