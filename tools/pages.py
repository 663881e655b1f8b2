"""Made parts of pages that are written by hand: Markdown tables, and the places that they fill.

A place is what stands between the lines `<!-- begin NAME -->` and `<!-- end NAME -->`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path


def markdown_table(rows: Iterable[Sequence[object]], columns: Sequence[object]) -> str:
    """Rows below the titles of their columns; a row that is too short ends in empty cells."""

    def line(cells: Sequence[object]) -> str:
        texts = [str(cell).replace("|", "\\|") for cell in cells] + [""] * (len(columns) - len(cells))
        return "|" + "".join(f" {text} |" if text else " |" for text in texts)

    return "\n".join([line(columns), "|" + "---|" * len(columns), *map(line, rows)])


def filled(page: str, name: str, text: str) -> str:
    """The page with `text` in the place of that name. Raises SystemExit unless there is exactly one."""
    pattern = re.compile(rf"(<!-- begin {re.escape(name)} -->\n).*?(<!-- end {re.escape(name)} -->)", re.DOTALL)
    page, count = pattern.subn(lambda found: f"{found[1]}{text}\n{found[2]}", page)
    if count != 1:
        raise SystemExit(f"The page has {count} places '<!-- begin {name} -->'; expected one.")
    return page


def keep_current(path: Path, page: Callable[[], str], description: str | None) -> int:
    """The command of a page's maker: writes `page()`, or with `--check` only compares; the exit status."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether the page is current")
    if parser.parse_args().check:
        current = path.read_text(encoding="utf-8") == page()
        print(f"{path.name} is {'current' if current else 'out of date'}")
        return 0 if current else 1
    path.write_text(page(), encoding="utf-8")
    return 0


def fill(path: Path, name: str, text: str) -> None:
    """`filled` for a file."""
    path.write_text(filled(path.read_text(encoding="utf-8"), name, text), encoding="utf-8")
