"""Writes the table of docs/models.md: which stored formats are read, kept quantised, and equal to whose numbers.

    python -m tools.docs.format_table

What it says was measured by tests/core/loading/test_quantised_checkpoints.py, which records it
(`CHROMAKIT_RECORD=1 python -m pytest tests/core/loading/test_quantised_checkpoints.py`).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ..pages import filled, keep_current, markdown_table

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "models.md"
RECORDED = ROOT / "tests" / "recorded" / "quant_formats.json"

COLUMNS = ("stored as", "read", "kept quantised by", "equal to", "difference in fp32")
EQUAL_TO = {
    "plain": "torch's own conversion",
    "scaled fp8": "weight × scale",
    "ComfyUI": "ComfyUI's own layers, in a file of its own saver",
    "GGUF": "the `gguf` package",
}


def page() -> str:
    """docs/models.md: its text as it stands, its table as it should be."""
    grouped: dict[tuple[str, ...], list[str]] = {}
    for each in json.loads(RECORDED.read_text(encoding="utf-8")):
        grouped.setdefault((each["kind"], *_cells(each)), []).append(f"`{each['format']}`")
    rows = [(f"{kind}: {', '.join(names)}", *cells) for (kind, *cells), names in grouped.items()]
    return filled(PAGE.read_text(encoding="utf-8"), "formats", markdown_table(rows, COLUMNS))


def _cells(each: dict[str, Any]) -> tuple[str, ...]:
    kept = f"the precision `{each['kept']}`" if each["kept"] else "–"
    difference = f"≤ {each['within']:.0e}" if each["within"] else "none, bit for bit"
    return "yes", kept, EQUAL_TO[each["kind"]], difference


if __name__ == "__main__":
    sys.exit(keep_current(PAGE, page, __doc__))
