"""Writes the tables of docs/import.md: what becomes of each option of another trainer.

    python -m tools.docs.import_tables

The text before the mark is written by hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from chroma_core.import_config import ai_toolkit, simpletuner
from chroma_core.import_config.convert import Rule, Table

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "import.md"
MARK = "<!-- From here on written by tools/docs/import_tables.py. -->\n"
TITLES = {
    "differs": "Different",
    "no counterpart": "No counterpart",
    "ignored": "Left out without a warning",
    "maps": "Checked",
}


def page() -> str:
    """docs/import.md: its text as it stands, its tables as they should be."""
    shared = f"From config.json, for every dataset that does not override it: {names(simpletuner.FOR_ALL_SETS)}.\n"
    parts = [PAGE.read_text(encoding="utf-8").partition(MARK)[0] + MARK]
    parts += ["## SimpleTuner: config.json\n", table(simpletuner.OPTIONS)]
    parts += ["## SimpleTuner: datasets\n", shared, table(simpletuner.SET_OPTIONS, "dataset.")]
    for section, options in ai_toolkit.SECTIONS.items():
        parts += [f"## ai-toolkit: {section or 'the process'}\n", table(options)]
    parts += ["## ai-toolkit: datasets\n", table(ai_toolkit.SET_OPTIONS, "dataset.")]
    return "\n".join(parts)


def table(options: Table, section: str = "") -> str:
    """The options that become something, as a table; the others by their reason."""
    rows = ["| option | becomes | |", "|---|---|---|"]
    grouped: dict[tuple[str, str], list[str]] = {}
    for option, rule in options.items():
        if rule.to or rule.reason.startswith("`"):
            rows.append(f"| `{option}` | {becomes(rule, section)} | {remark(rule)} |")
        else:
            grouped.setdefault((rule.kind, rule.reason), []).append(option)
    for kind, title in TITLES.items():
        items = [f"- {names(found)}: {reason}." for (k, reason), found in grouped.items() if k == kind]
        rows += ["", f"{title}:", "", *items] if items else []
    return "\n".join(rows) + "\n"


def becomes(rule: Rule, section: str) -> str:
    paths = rule.to.replace(" or ", ", ").split(", ")
    return ", ".join(f"`{section}{path}`" for path in paths) if rule.to else "–"


def remark(rule: Rule) -> str:
    differs = rule.kind == "differs" and "differs" not in rule.reason
    return (("differs: " if differs else "") + rule.reason).replace("|", "\\|")


def names(options: Sequence[str]) -> str:
    return ", ".join(f"`{option}`" for option in options)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
