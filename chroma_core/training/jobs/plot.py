"""The loss curve as a picture, drawn with Pillow alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

_BACKGROUND, _GRID, _INK = (24, 24, 27), (52, 52, 58), (212, 212, 216)
_RAW, _SMOOTH, _HELDOUT = (62, 84, 120), (96, 165, 250), (250, 204, 21)
_SCALE = 2  # drawn larger and reduced: Pillow's lines have no smooth edges

Point = tuple[float, float]


def plot_losses(metrics: Sequence[dict[str, Any]], width: int = 768, height: int = 432) -> Image.Image:
    """Loss over steps: raw faint, smoothed bold, held-out as points joined by a line, axes labelled.

    Args:
        metrics: the lines of `metrics.jsonl` (`Job.metrics()`); may be empty.
        width, height: size of the picture in pixels.
    """
    raw = _series(metrics, "loss")
    smooth = _series(metrics, "loss_smooth")
    heldout = _series(metrics, "heldout_loss")
    image = Image.new("RGB", (width * _SCALE, height * _SCALE), _BACKGROUND)
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(13 * _SCALE)
    left, top, right, bottom = 64 * _SCALE, 36 * _SCALE, (width - 20) * _SCALE, (height - 44) * _SCALE
    points = raw + heldout
    if not points:
        draw.text((left, top), "no step has been logged yet", _INK, font)
        return image.resize((width, height), Image.Resampling.LANCZOS)

    last_step = max(1.0, max(x for x, _ in points))
    # A few wild steps must not flatten the curve: the raw loss may be cut off above its 98th percentile.
    ordered = sorted(y for _, y in raw) or [0.0]
    highest = max([ordered[int(0.98 * (len(ordered) - 1))], *(y for _, y in smooth + heldout)])
    lowest = min([ordered[int(0.02 * (len(ordered) - 1))], *(y for _, y in smooth + heldout)])
    ticks = _ticks(lowest, highest)
    low, high = ticks[0], ticks[-1]

    def place(point: Point) -> Point:
        x = left + (right - left) * point[0] / last_step
        y = bottom - (bottom - top) * (min(max(point[1], low), high) - low) / (high - low)
        return x, y

    _axes(draw, font, place, ticks, last_step, (left, top, right, bottom))
    for series, colour, line in ((raw, _RAW, 1), (smooth, _SMOOTH, 3), (heldout, _HELDOUT, 2)):
        if len(series) > 1:
            draw.line([place(p) for p in series], colour, line * _SCALE, joint="curve")
    radius = 4 * _SCALE
    for x, y in map(place, heldout):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), _HELDOUT)
    x = left
    for label, colour, series in (("loss", _RAW, raw), ("smoothed", _SMOOTH, smooth), ("held out", _HELDOUT, heldout)):
        if series:
            draw.rectangle((x, 16 * _SCALE, x + 14 * _SCALE, 20 * _SCALE), colour)
            draw.text((x + 20 * _SCALE, 18 * _SCALE), f"{label} {series[-1][1]:.4f}", _INK, font, anchor="lm")
            x += 150 * _SCALE
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _series(metrics: Sequence[dict[str, Any]], key: str) -> list[Point]:
    return [
        (float(line["step"]), float(line[key]))
        for line in metrics
        if isinstance(line.get(key), int | float) and math.isfinite(line[key])
    ]


def _axes(
    draw: ImageDraw.ImageDraw,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
    place: Callable[[Point], Point],
    ticks: Sequence[float],
    last_step: float,
    box: tuple[int, int, int, int],
) -> None:
    left, _, right, bottom = box
    decimals = max(0, -math.floor(math.log10(ticks[1] - ticks[0])))
    for value in ticks:
        y = place((0, value))[1]
        draw.line((left, y, right, y), _GRID, _SCALE)
        draw.text((left - 8 * _SCALE, y), f"{value:.{decimals}f}", _INK, font, anchor="rm")
    for value in _ticks(0, last_step):
        if value <= last_step and value == int(value):
            x = place((value, 0))[0]
            draw.line((x, bottom, x, bottom + 5 * _SCALE), _INK, _SCALE)
            draw.text((x, bottom + 9 * _SCALE), f"{int(value)}", _INK, font, anchor="mt")
    draw.text((right, bottom + 26 * _SCALE), "step", _INK, font, anchor="rt")


def _ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers that enclose low..high: multiples of 1, 2 or 5 times a power of ten."""
    span = max(high - low, 1e-6 * max(1.0, abs(high)), 1e-9)
    power = 10.0 ** math.floor(math.log10(span / wanted))
    step = next(power * m for m in (1, 2, 5, 10) if span / (power * m) <= wanted)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [i * step for i in range(first, max(last, first + 1) + 1)]
