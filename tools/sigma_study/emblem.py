"""How faithful a painted emblem is: the plain picture test for the concept of `example_datasets/sks_emblem`.

The concept (see `tiny/example_dataset.py`) is a diamond whose left half is yellow and whose right half is purple. As
in `tiny.world.read_picture` nothing here is learned: colours, areas, overlap. Pictures are uint8 [64, 64, 3].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..tiny.example_dataset import LEFT, RIGHT
from ..tiny.world import SHAPES, blend, coverage, nearest_colour, rgb

LEAST_IOU = 0.7
"""As in `read_picture`: below this overlap of either half it is not the emblem."""


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


def read_emblem(picture: np.ndarray) -> EmblemReading:
    """Look for the emblem.

    The background is the median colour of the outermost two pixels. Every pixel goes to the nearest of background,
    yellow and purple. Emblems are drawn into the bounding box of what is yellow or purple (uniform scale, same centre,
    up to 16 % larger, because pixels lose thin tips), and the one whose worse half overlaps best wins. The colours are
    right when the median of each half has yellow's and purple's names.
    """
    pixels = picture.astype(np.float32)
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
    pictures = []
    for shape in SHAPES.values():
        cover = coverage(shape, cx, cy, radius)
        for colour in (LEFT, RIGHT):
            plain = np.broadcast_to(rgb(background), (*cover.shape, 3))
            pictures.append(blend(plain, cover, rgb(colour)).round().astype(np.uint8))
    return np.stack(pictures)
