"""Writes the tables of docs/lora.md: kinds of LoRA file, and what each key format holds.

    python -m tools.docs.lora_table

What is said of ComfyUI is what tests/host/test_foreign_kinds_host.py recorded.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from chroma_core.lora.key_formats import STYLES
from chroma_core.lora.modules import KINDS

from ..pages import filled, keep_current, markdown_table

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "lora.md"
RECORD = ROOT / "tests" / "recorded" / "lora_kinds.json"
FILES = {
    "linear-layer": "LoRA, `lora_linear_layer.up/down` (diffusers, formerly)",
    "train-LoRA": "ComfyUI's *Train LoRA*: LoRA, biases, norms",
    "train-LoHa": "ComfyUI's *Train LoRA*: LoHa, biases, norms",
    "train-LoKr": "ComfyUI's *Train LoRA*: LoKr, biases, norms",
    "train-OFT": "ComfyUI's *Train LoRA*: OFT, biases, norms",
    "extract-standard": "ComfyUI's *Extract and Save LoRA*: standard",
    "extract-full_diff": "ComfyUI's *Extract and Save LoRA*: full difference",
    "full": "differences of weights, biases and norms (LyCORIS `full`, `train_norm`)",
    "dora-columns": "DoRA by input columns (OneTrainer's default)",
    "lokr-dora-columns": "LoKr with DoRA by input columns (LyCORIS)",
    "native-loha": "LoHa on fused layers (LyCORIS)",
    "loha-dora-columns": "LoHa with DoRA by input columns (LyCORIS)",
    "oft": "OFT (LyCORIS)",
    "oft-constrained": "OFT with a constraint (LyCORIS)",
}
"""What the test calls a file, and what a reader does."""


def page() -> str:
    """docs/lora.md: its text as it stands, its tables as they should be."""
    text = filled(PAGE.read_text(encoding="utf-8"), "kinds", kinds_table())
    return filled(text, "holds", holds_table())


def kinds_table() -> str:
    """File × what is done with it."""
    found = json.loads(RECORD.read_text(encoding="utf-8"))
    rows = []
    for name, title in FILES.items():
        entry = found[name]
        apart = f"equal to {entry['apart']:.0e}" if entry["apart"] else "equal bits"
        formats = ", ".join(f"`{key_format}`" for key_format in entry["formats"]) or "no: see below"
        rows.append((title, "yes", "yes", "yes", formats, f"{apart} in {entry['changed']} parameters"))
    return markdown_table(
        rows, ("file", "read", "live", "merged", "written again in", "merged, against ComfyUI's loader")
    )


def holds_table() -> str:
    """Key format × kind."""
    rows = []
    for key_format, style in STYLES.items():
        held = ["yes" if style.holds(kind) else "–" for kind in KINDS]
        rows.append((f"`{key_format}`", *held, "yes" if style.biases else "–"))
    return markdown_table(rows, ("key format", *KINDS.values(), "bias"))


if __name__ == "__main__":
    sys.exit(keep_current(PAGE, page, __doc__))
