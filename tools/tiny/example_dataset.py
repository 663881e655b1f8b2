"""Draws the example data set: a concept that the embedded `tiny` model has never seen, with captions.

    python -m tools.tiny.example_dataset

The concept, trigger word `sks`, is an emblem: a diamond whose left half is yellow and whose right half is purple. Tiny
knows neither diamonds nor shapes of two colours. 16 pictures are for training; six more, with other combinations of
place, size and background, are for measuring the loss on pictures held out.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from .world import COLOURS, PLACES, SIZE, blend, coverage, rgb, sample_place

ROOT = Path(__file__).resolve().parents[2] / "example_datasets"
NAME = "sks_emblem"
LEFT, RIGHT = "yellow", "purple"
BACKGROUNDS = tuple(colour for colour in COLOURS if colour not in (LEFT, RIGHT))


def draw_emblem(background: str, cx: float, cy: float, radius: float) -> np.ndarray:
    """The emblem on a plain background, uint8 [64, 64, 3]; centre and radius in pixels."""
    picture = np.broadcast_to(rgb(background), (SIZE, SIZE, 3))
    for colour, side in ((LEFT, -1), (RIGHT, 1)):
        half = coverage(lambda x, y, side=side: (abs(x) + abs(y) <= 1) & (x * side >= 0), cx, cy, radius)
        picture = blend(picture, half, rgb(colour))
    return picture.round().astype(np.uint8)


def write(folder: Path, count: int, rng: np.random.Generator, middle: float) -> None:
    """Writes `count` pictures NN.png with captions NN.txt; a share `middle` of them in the middle."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        background = BACKGROUNDS[i % len(BACKGROUNDS)]
        radius = float(rng.uniform(19, 26))
        place = (0, 0) if rng.random() < middle else list(PLACES)[rng.integers(len(PLACES))]
        where = f" {PLACES[place]}" if place != (0, 0) else ""
        prefix = ("", "a picture of ", "a photo of ")[i % 3]
        article = "an" if background[0] in "aeiou" else "a"
        text = f"{prefix}a sks emblem{where} on {article} {background} background"
        Image.fromarray(draw_emblem(background, *sample_place(rng, radius, place), radius)).save(
            folder / f"{i + 1:02d}.png", optimize=True
        )
        (folder / f"{i + 1:02d}.txt").write_text(text + "\n", encoding="utf-8")


def main() -> None:
    write(ROOT / NAME, 16, np.random.default_rng(1), middle=0.6)
    write(ROOT / f"{NAME}_heldout", 6, np.random.default_rng(2), middle=0.3)


if __name__ == "__main__":
    main()
