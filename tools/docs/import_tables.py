"""Writes the tables of docs/import.md: what becomes of each option of another trainer.

    python -m tools.docs.import_tables

The text before them is written by hand.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chroma_core.import_config import ai_toolkit, kohya, onetrainer, simpletuner
from chroma_core.import_config.convert import Rule, Table

from ..pages import filled, markdown_table

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
    shared = "From {}, for every dataset that does not override it: {}.\n"
    parts = ["## SimpleTuner: config.json\n", unstated(simpletuner.UNSTATED), table(simpletuner.OPTIONS)]
    parts += ["## SimpleTuner: datasets\n", shared.format("config.json", names(simpletuner.FOR_ALL_SETS))]
    parts += [unstated(simpletuner.UNSTATED_SETS), table(simpletuner.SET_OPTIONS, "dataset.")]
    for section, options in ai_toolkit.SECTIONS.items():
        parts += [f"## ai-toolkit: {section or 'the process'}\n", unstated(ai_toolkit.UNSTATED.get(section, {}))]
        parts += [table(options)]
    parts += ["## ai-toolkit: datasets\n", unstated(ai_toolkit.UNSTATED["datasets"])]
    parts += [table(ai_toolkit.SET_OPTIONS, "dataset.")]
    for section, options in onetrainer.SECTIONS.items():
        parts += [f"## OneTrainer: {section or 'the configuration'}\n", unstated(onetrainer.UNSTATED[section])]
        parts += [table(options)]
    parts += ["## OneTrainer: concepts\n", shared.format("the configuration", names(onetrainer.FOR_ALL_SETS))]
    parts += [unstated(onetrainer.UNSTATED_SETS), table(onetrainer.SET_OPTIONS, "dataset.")]
    parts += ["## sd-scripts: the configuration\n", unstated(kohya.UNSTATED), table(kohya.OPTIONS)]
    parts += ["## sd-scripts: datasets\n", shared.format("the configuration", names(kohya.FOR_ALL_SETS))]
    parts += [unstated(kohya.UNSTATED_SETS), table(kohya.SET_OPTIONS, "dataset.")]
    parts = [part for part in parts if part]
    return filled(PAGE.read_text(encoding="utf-8"), "options", "\n".join(parts))


def unstated(values: Mapping[str, Any]) -> str:
    """What is written for options that a file does not state."""
    said = ", ".join(f"`{option}` {json.dumps(value)}" for option, value in values.items())
    return f"Not stated: {said}.\n" if said else ""


def table(options: Table, section: str = "") -> str:
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
    PAGE.write_text(page(), encoding="utf-8")
