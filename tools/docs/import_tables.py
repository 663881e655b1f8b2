"""Writes the tables of docs/import.md: what becomes of each option of another trainer.

    python -m tools.docs.import_tables

The text before them is written by hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from chroma_core.import_config import ai_toolkit, simpletuner
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
    shared = f"From config.json, for every dataset that does not override it: {names(simpletuner.FOR_ALL_SETS)}.\n"
    parts = ["## SimpleTuner: config.json\n", table(simpletuner.OPTIONS)]
    parts += ["## SimpleTuner: datasets\n", shared, table(simpletuner.SET_OPTIONS, "dataset.")]
    for section, options in ai_toolkit.SECTIONS.items():
        parts += [f"## ai-toolkit: {section or 'the process'}\n", table(options)]
    parts += ["## ai-toolkit: datasets\n", table(ai_toolkit.SET_OPTIONS, "dataset.")]
    return filled(PAGE.read_text(encoding="utf-8"), "options", "\n".join(parts))


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
