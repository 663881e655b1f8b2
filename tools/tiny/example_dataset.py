"""The example dataset: a concept that the embedded `tiny` model has never seen, drawn with captions, and recognised.

    python -m tools.tiny.example_dataset           # draws it

The concept, trigger word `sks`, is an emblem: a diamond whose left half is yellow and whose right half is purple. Tiny
knows neither diamonds nor shapes of two colours. 16 images are for training; six more, with other combinations of
place, size and background, are for measuring the loss on images held out. How faithful a generated emblem is, is told
as in `world.read_image` by nothing that is learned: colours, areas, overlap. Images are uint8 [64, 64, 3].
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from .world import COLOURS, PLACES, SHAPES, SIZE, blend, coverage, nearest_colour, rgb, sample_place

ROOT = Path(__file__).resolve().parents[2] / "example_datasets"
NAME = "sks_emblem"
LEFT, RIGHT = "yellow", "purple"
BACKGROUNDS = tuple(colour for colour in COLOURS if colour not in (LEFT, RIGHT))
LEAST_IOU = 0.7
"""As in `read_image`: below this overlap of either half it is not the emblem."""


def draw_emblem(background: str, cx: float, cy: float, radius: float) -> np.ndarray:
    """The emblem on a plain background, uint8 [64, 64, 3]; centre and radius in pixels."""
    image = np.broadcast_to(rgb(background), (SIZE, SIZE, 3))
    for colour, side in ((LEFT, -1), (RIGHT, 1)):
        half = coverage(lambda x, y, side=side: (abs(x) + abs(y) <= 1) & (x * side >= 0), cx, cy, radius)
        image = blend(image, half, rgb(colour))
    return image.round().astype(np.uint8)


def write(folder: Path, count: int, rng: np.random.Generator, middle: float) -> None:
    """Writes `count` images NN.png with captions NN.txt; a share `middle` of them in the middle."""
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


@dataclass(frozen=True)
class EmblemReading:
    """What is seen: the background's name, whether the colours are right, and how well the halves fit drawn ones.

    `iou` is the intersection over union (0..1) of the worse half with the same half of the best drawn emblem, whose
    centre and radius, in pixels, are `cx`, `cy` and `radius`.
    """

    background: str
    colours: bool
    iou: float
    cx: float = 0.0
    cy: float = 0.0
    radius: float = 0.0

    def right(self, background: str) -> bool:
        """Whether it is the emblem, in its colours, on that background."""
        return self.colours and self.iou >= LEAST_IOU and self.background == background


def read_emblem(image: np.ndarray) -> EmblemReading:
    """Look for the emblem.

    The background is the median colour of the outermost two pixels. Every pixel goes to the nearest of background,
    yellow and purple. Emblems are drawn into the bounding box of what is yellow or purple (uniform scale, same centre,
    up to 16 % larger, because pixels lose thin tips), and the one whose worse half overlaps best wins. The colours are
    right when the median of each half has yellow's and purple's names.
    """
    pixels = image.astype(np.float32)
    frame = np.ones(pixels.shape[:2], bool)
    frame[2:-2, 2:-2] = False
    back = np.median(pixels[frame], axis=0)
    references = np.stack([back, rgb(LEFT), rgb(RIGHT)])
    nearest = np.linalg.norm(pixels[:, :, None] - references, axis=3).argmin(axis=2)
    halves = (nearest == 1, nearest == 2)
    both = halves[0] | halves[1]
    background = nearest_colour(back)
    columns, rows = np.flatnonzero(both.sum(0) >= 2), np.flatnonzero(both.sum(1) >= 2)
    if min(half.sum() for half in halves) < 20 or not len(columns) or not len(rows):
        return EmblemReading(background, False, 0.0)
    names = [nearest_colour(np.median(pixels[half], axis=0)) for half in halves]
    cx, cy = (columns[0] + columns[-1] + 1) / 2, (rows[0] + rows[-1] + 1) / 2
    extent = (columns[-1] - columns[0] + rows[-1] - rows[0] + 2) / 4
    fits = ((_overlap(halves, cx, cy, extent * grow), extent * grow) for grow in (1.0, 1.05, 1.1, 1.16))
    iou, radius = max(fits)
    return EmblemReading(background, names == [LEFT, RIGHT], iou, float(cx), float(cy), float(radius))


def _overlap(halves: tuple[np.ndarray, np.ndarray], cx: float, cy: float, radius: float) -> float:
    """Intersection over union of the worse half, 0..1."""
    found = []
    for half, side in zip(halves, (-1, 1), strict=True):
        drawn = coverage(lambda x, y, s=side: (abs(x) + abs(y) <= 1) & (x * s >= 0), cx, cy, radius) > 0.5
        found.append(float((half & drawn).sum() / max(1, (half | drawn).sum())))
    return min(found)


def decoys(background: str, cx: float, cy: float, radius: float) -> np.ndarray:
    """What is not the emblem but shares its place, size and one colour: every known shape in yellow and in purple."""
    images = []
    for shape in SHAPES.values():
        cover = coverage(shape, cx, cy, radius)
        for colour in (LEFT, RIGHT):
            plain = np.broadcast_to(rgb(background), (*cover.shape, 3))
            images.append(blend(plain, cover, rgb(colour)).round().astype(np.uint8))
    return np.stack(images)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    write(ROOT / NAME, 16, np.random.default_rng(1), middle=0.6)
    write(ROOT / f"{NAME}_heldout", 6, np.random.default_rng(2), middle=0.3)


if __name__ == "__main__":
    main()
