"""How a training step's time grows with the tokens of the image, the LoRA's rank and the number of blocks.

    python -m benchmarks growth --rounds 3 --threads 1 --clock cpu --write

Width 768, bf16, gradient checkpointing of every block; one of the three changes at a time, from 256², rank 16 and 4+8
blocks. The peer in the same turns is diffusers with PEFT on text as long as ours. `--write` draws
docs/images/growth.png and keeps the numbers in docs/data/growth.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import training_step
from benchmarks.real_model import ROOT, job, transformer
from benchmarks.turns import Turn, add_options, keep, take_turns
from tools.charts import INK, Axes, Sheet, round_ticks

HEADS, TEXT = 6, 40
AXES: dict[str, tuple[str, Sequence[int]]] = {
    "size": ("image tokens", (128, 256, 384, 512)),
    "rank": ("rank", (4, 16, 64, 256)),
    "layers": ("blocks", (3, 6, 12, 24)),
}
"""What changes: its name on the chart, and its values (pixels a side, the rank, double and single blocks together)."""
BASE = {"size": 256, "rank": 16, "layers": 12}
COLOURS = {"ours": (34, 102, 204), "peft_trimmed": (214, 106, 36)}
DATA, CHART = ROOT / "docs" / "data" / "growth.json", ROOT / "docs" / "images" / "growth.png"


def point(size: int, rank: int, layers: int, rounds: int, clock: str) -> dict[str, Any]:
    """Medians of both at one place."""
    model = transformer("bf16", (layers // 3, layers - layers // 3), "cpu", heads=HEADS)
    made = job(model, "bf16", size, TEXT, rank=rank)

    def ours() -> None:
        made.step()

    turns: dict[str, Turn] = {"ours": ours}
    turns["peft_trimmed"] = training_step.peft_steps(model, size, TEXT, "all", rank)["trimmed"]
    return {"size": size, "rank": rank, "layers": layers} | take_turns(turns, rounds, clock)


def chart(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Three panels on one scale of seconds."""
    sheet = Sheet(1080, 340)
    top = round_ticks(0, max(row[f"{name}_s"] for row in rows for name in COLOURS))
    for i, (axis, (label, values)) in enumerate(AXES.items()):
        mine = [row for row in rows if all(row[key] == BASE[key] for key in BASE if key != axis)]
        mine.sort(key=lambda row: row[axis])
        xs = [(row[axis] // 16) ** 2 if axis == "size" else row[axis] for row in mine]
        left = 60 + 350 * i
        axes = Axes(
            sheet, (left, 50, left + 280, 280), (0, max(xs)), (0, top[-1]), "seconds per step" if i == 0 else ""
        )
        axes.grid(xs[1:] if values[0] * 8 < values[-1] else xs, top, label)
        for name, colour in COLOURS.items():
            ys = [row[f"{name}_s"] for row in mine]
            axes.curve(xs, ys, colour)
            for x, y in zip(xs, ys, strict=True):
                sheet.dot(*axes.at(x, y), colour)
    for i, (name, colour) in enumerate(COLOURS.items()):
        sheet.line([(420 + 150 * i, 20), (444 + 150 * i, 20)], colour, 2)
        sheet.text(450 + 150 * i, 20, {"ours": "ours", "peft_trimmed": "PEFT, trimmed text"}[name], colour=INK)
    sheet.save(path, 64)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--write", action="store_true", help=f"write {DATA.relative_to(ROOT)} and draw the chart")
    parser.add_argument("--draw", action="store_true", help="draw the chart of the numbers that are kept")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.draw:
        chart(json.loads(DATA.read_text(encoding="utf-8")), CHART)
        return 0
    places = [{**BASE, axis: value} for axis, (_, values) in AXES.items() for value in values]
    rows = []
    for place in [place for i, place in enumerate(places) if place not in places[:i]]:
        rows.append(point(**place, rounds=options.rounds, clock=options.clock))
        print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in rows[-1].items()}), flush=True)
    if options.write:
        keep(rows, DATA)
        chart(rows, CHART)
    return 0


if __name__ == "__main__":
    sys.exit(main())
