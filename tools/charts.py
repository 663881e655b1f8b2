"""Charts for the documentation, drawn with Pillow alone: axes, lines with bands, histograms, points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

INK, GRID, FAINT = (30, 30, 34), (226, 226, 230), (208, 214, 224)
SCALE = 2  # drawn larger and reduced: Pillow's lines have no smooth edges


class Sheet:
    """An image of `width` × `height` pixels; coordinates everywhere are those of the finished image."""

    def __init__(self, width: int, height: int, background: str = "white"):
        self.size = (width, height)
        self.image = Image.new("RGB", (width * SCALE, height * SCALE), background)
        self.draw = ImageDraw.Draw(self.image, "RGBA")

    def text(self, x: float, y: float, words: str, anchor: str = "lm", size: int = 13, colour=INK) -> None:
        font = ImageFont.load_default(size * SCALE)
        self.draw.text((x * SCALE, y * SCALE), words, colour, font, anchor=anchor)

    def line(self, points: Sequence[tuple[float, float]], colour, width: float = 1.0) -> None:
        self.draw.line([(x * SCALE, y * SCALE) for x, y in points], colour, round(width * SCALE), joint="curve")

    def area(self, points: Sequence[tuple[float, float]], colour) -> None:
        self.draw.polygon([(x * SCALE, y * SCALE) for x, y in points], colour)

    def dot(self, x: float, y: float, colour, radius: float = 3.5) -> None:
        box = ((x - radius) * SCALE, (y - radius) * SCALE, (x + radius) * SCALE, (y + radius) * SCALE)
        self.draw.ellipse(box, colour)

    def finished(self) -> Image.Image:
        """The image at its own size."""
        return self.image.resize(self.size, Image.Resampling.LANCZOS)

    def save(self, path: Path, colours: int = 0) -> None:
        """Write the finished image; `colours` above 0 makes a smaller file of so many."""
        path.parent.mkdir(parents=True, exist_ok=True)
        image = self.finished()
        (image.quantize(colours) if colours else image).save(path, optimize=True)


class Axes:
    """A rectangle (left, top, right, bottom) of a sheet with scales for x and y."""

    def __init__(
        self,
        sheet: Sheet,
        box: tuple[int, int, int, int],
        x: tuple[float, float],
        y: tuple[float, float],
        title: str = "",
    ):
        self.sheet, self.box, self.x, self.y = sheet, box, x, y
        if title:
            sheet.text(box[0], box[1] - 14, title, size=14)

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a point of the chart lies on the sheet; what is outside the scale is put on its edge."""
        left, top, right, bottom = self.box
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (min(max(y, self.y[0]), self.y[1]) - self.y[0]) / (self.y[1] - self.y[0])
        return left + across * (right - left), bottom - up * (bottom - top)

    def grid(self, xs: Sequence[float], ys: Sequence[float], x_label: str = "", percent: bool = False) -> None:
        left, top, right, bottom = self.box
        for value in ys:
            height = self.at(self.x[0], value)[1]
            self.sheet.line([(left, height), (right, height)], INK if value == 0 else GRID)
            words = f"{100 * value:+.0f} %" if percent else f"{value:g}"
            self.sheet.text(left - 6, height, words.replace("+0 %", "0 %"), "rm", 12)
        for value in xs:
            across = self.at(value, self.y[0])[0]
            self.sheet.line([(across, bottom), (across, bottom + 4)], INK)
            self.sheet.text(across, bottom + 14, f"{value:g}", "mm", 12)
        if x_label:
            self.sheet.text((left + right) / 2, bottom + 32, x_label, "mm", 13)

    def curve(self, xs: Sequence[float], ys: Sequence[float], colour, width: float = 2.0) -> None:
        self.sheet.line([self.at(x, y) for x, y in zip(xs, ys, strict=True)], colour, width)

    def band(self, xs: Sequence[float], low: Sequence[float], high: Sequence[float], colour) -> None:
        there = [self.at(x, y) for x, y in zip(xs, high, strict=True)]
        back = [self.at(x, y) for x, y in zip(xs, low, strict=True)][::-1]
        self.sheet.area(there + back, (*colour, 48))

    def bars(self, edges: Sequence[float], heights: Sequence[float], colour=FAINT) -> None:
        for low, high, height in zip(edges[:-1], edges[1:], heights, strict=True):
            if height > 0:
                (a, top), (b, bottom) = self.at(low, height), self.at(high, self.y[0])
                self.sheet.area([(a, top), (b, top), (b, bottom), (a, bottom)], colour)


def round_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers that enclose low..high: multiples of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10((high - low) / wanted))
    step = next(power * m for m in (1, 2, 5, 10) if (high - low) / (power * m) <= wanted)
    return [round(i * step, 10) for i in range(math.floor(low / step), math.ceil(high / step) + 1)]
