"""Writes the tables of docs/options.md: every option of a job file, from its one definition.

python -m tools.docs.option_tables            # a second
python -m tools.docs.option_tables --check    # exit status 1 if the page is old
"""

from __future__ import annotations

import sys
from pathlib import Path

from chroma_core.options import Described, options_of
from chroma_core.training.config.template import SECTIONS, as_toml
from tools.pages import filled, keep_current, markdown_table

PAGE = Path(__file__).resolve().parents[2] / "docs" / "options.md"


def page() -> str:
    """docs/options.md: its text as it stands, its tables as they should be."""
    text = PAGE.read_text(encoding="utf-8")
    for section, owner in SECTIONS.items():
        rows = [_row(each) for name, each in options_of(owner).items() if section or name not in SECTIONS]
        text = filled(text, section or "job", markdown_table(rows, ("option", "default", "values", "")))
    return text


def _row(option: Described) -> tuple[str, str, str, str]:
    default = (
        "required"
        if option.required
        else "–"
        if option.default in (None, "", (), {})
        else f"`{as_toml(option.default)}`"
    )
    return f"`{option.name}`", default, option.range, option.sentence


if __name__ == "__main__":
    sys.exit(keep_current(PAGE, page, __doc__))
