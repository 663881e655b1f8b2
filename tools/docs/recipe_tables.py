"""Writes the tables of docs/recipes.md from the recipes and their sources.

python -m tools.docs.recipe_tables            # a second
python -m tools.docs.recipe_tables --check    # exit status 1 if the page is old
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from chroma_core.training.config.recipes import MEASURED, RECIPE_TABLE, SOURCES, Recipe
from chroma_core.training.config.template import as_toml
from tools.pages import filled, keep_current, markdown_table

PAGE = Path(__file__).resolve().parents[2] / "docs" / "recipes.md"


def page() -> str:
    """docs/recipes.md: its text as it stands, its tables as they should be."""
    text = PAGE.read_text(encoding="utf-8")
    for name, each in RECIPE_TABLE.items():
        text = filled(text, name, _table(each))
    rows = [(f"{name}", f"[{words}]({address})") for name, (words, address) in SOURCES.items()]
    return filled(filled(text, "sources", markdown_table(rows, ("from", "what it is"))), "measured", MEASURED)


def _table(each: Recipe) -> str:
    least, most = each.images
    rows: list[Sequence[object]] = [("images", f"{least} to {most}", ", ".join(each.images_from))]
    for path, (value, names) in each.options.items():
        shown = "<br>".join(f"`{one}`" for one in value) if isinstance(value, tuple) else f"`{as_toml(value)}`"
        rows.append((f"`{path}`", shown, ", ".join(names)))
    rows.append(("captions", each.captions, ", ".join(each.captions_from)))
    return f"For {each.title}.\n\n{markdown_table(rows, ('', '', 'from'))}"


if __name__ == "__main__":
    sys.exit(keep_current(PAGE, page, __doc__))
