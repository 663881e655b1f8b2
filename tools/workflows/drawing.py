"""Drawn images of example workflows: what a workflow does, where an image of `tiny` would not say it.

Every one is 320 × 320 on a colour that tells its kind: green trains, violet generates, blue is about files and nodes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from PIL import Image

from ..charts import SCALE, Sheet
from .presets import CARDS

SIDE = 320  # pixels
TRAINS, GENERATES, TOOLS = "#1f4e46", "#3b3561", "#24405e"
PAPER, SHADE, YELLOW, PURPLE, RED, BLUE = "#f4f1ea", "#c9c4b8", "#f2c318", "#8a3ea8", "#e0483e", "#3f7fd0"
DIM = (255, 255, 255, 90)
BLOCKS = 8
"""Blocks in a row, where each is a gigabyte."""

Point = tuple[float, float]


def _box(sheet: Sheet, x: float, y: float, width: float, height: float, colour, radius: float = 8, edge=None) -> None:
    box = [each * SCALE for each in (x, y, x + width, y + height)]
    sheet.draw.rounded_rectangle(box, radius * SCALE, colour, edge, 2 * SCALE if edge else 1)


def _turned(corners: int, x: float, y: float, outer: float, inner: float) -> list[Point]:
    """A star's corners, clockwise from the top."""
    turns = [(math.pi * i / corners, outer if i % 2 == 0 else inner) for i in range(2 * corners)]
    return [(x + radius * math.sin(turn), y - radius * math.cos(turn)) for turn, radius in turns]


def _photo(sheet: Sheet, x: float, y: float, side: float) -> None:
    """The sign for any image: a framed hill under a sun."""
    _box(sheet, x, y, side, side, PAPER, side / 12)
    edge = side / 10
    left, top, right, bottom = x + edge, y + edge, x + side - edge, y + side - edge
    _box(sheet, left, top, right - left, bottom - top, BLUE, side / 24)
    sheet.dot(right - side * 0.2, top + side * 0.2, YELLOW, side / 11)
    sheet.area([(left, bottom), (left + side * 0.28, top + side * 0.32), (left + side * 0.56, bottom)], "#2f8f5b")
    sheet.area([(left + side * 0.3, bottom), (right - side * 0.22, top + side * 0.45), (right, bottom)], "#3fae70")


def _photos(sheet: Sheet, x: float, y: float, side: float) -> None:
    for step in (2, 1, 0):
        _photo(sheet, x + 12 * step, y - 12 * step, side)


def _emblem(sheet: Sheet, x: float, y: float, radius: float) -> None:
    """The concept of the bundled dataset."""
    top, bottom = (x, y - radius), (x, y + radius)
    sheet.area([top, bottom, (x - radius, y)], YELLOW)
    sheet.area([top, bottom, (x + radius, y)], PURPLE)


def _star(sheet: Sheet, x: float, y: float, radius: float) -> None:
    sheet.area(_turned(5, x, y, radius, radius * 0.42), RED)


def _tile(sheet: Sheet, x: float, y: float, side: float, colour: str = PAPER) -> Point:
    """A square to draw on, and its middle."""
    _box(sheet, x, y, side, side, colour)
    return x + side / 2, y + side / 2


def _lora(sheet: Sheet, x: float, y: float, size: int = 22) -> None:
    """A file that is a LoRA, around a point."""
    width, height = size * 3.4, size * 2.2
    _box(sheet, x - width / 2, y - height / 2, width, height, YELLOW, 10)
    sheet.text(x, y, "LoRA", "mm", size, "#3a2c00")


def _arrow(sheet: Sheet, start: Point, end: Point, width: float = 6) -> None:
    turn = math.atan2(end[1] - start[1], end[0] - start[0])
    back = [(end[0] - 16 * math.cos(turn + side), end[1] - 16 * math.sin(turn + side)) for side in (-0.5, 0.5)]
    sheet.line([start, (end[0] - 10 * math.cos(turn), end[1] - 10 * math.sin(turn))], "white", width)
    sheet.area([end, *back], "white")


def _words(sheet: Sheet, words: str, y: float = 288, size: int = 22) -> None:
    sheet.text(SIDE / 2, y, words, "mm", size, "white")


def _node(sheet: Sheet, x: float, y: float, width: float, height: float, title: str) -> None:
    _box(sheet, x, y, width, height, "#35383f", 10, "#7d828c")
    sheet.text(x + 14, y + 20, title, "lm", 17, "white")


def _noodle(sheet: Sheet, start: Point, end: Point, colour: str) -> None:
    bend = (end[0] - start[0]) / 2
    ease = [(1 - math.cos(math.pi * i / 24)) / 2 for i in range(25)]
    sheet.line([(start[0] + 2 * bend * i / 24, start[1] + (end[1] - start[1]) * ease[i]) for i in range(25)], colour, 5)
    for x, y in (start, end):
        sheet.dot(x, y, colour, 7)


def _page(sheet: Sheet, x: float, y: float, words: str) -> None:
    """A file with a folded corner."""
    sheet.area([(x, y), (x + 56, y), (x + 78, y + 22), (x + 78, y + 104), (x, y + 104)], PAPER)
    sheet.area([(x + 56, y), (x + 78, y + 22), (x + 56, y + 22)], SHADE)
    sheet.text(x + 39, y + 64, words, "mm", 17, "#24405e")


def _curve(sheet: Sheet, points: Sequence[Point], colour, width: float, dots: float = 0) -> None:
    sheet.line(points, colour, width)
    for x, y in points if dots else ():
        sheet.dot(x, y, colour, dots)


def _memory(sheet: Sheet, gigabytes: int) -> None:
    """The GPU's size in words and as blocks of a gigabyte."""
    sheet.text(SIDE / 2, 208, f"{gigabytes} GB", "mm", 54, "white")
    columns = min(gigabytes, BLOCKS)
    left = SIDE / 2 - columns * 13
    for block in range(gigabytes):
        row, column = divmod(block, BLOCKS)
        _box(sheet, left + 26 * column, 248 + 18 * row, 22, 13, YELLOW, 3)


def _trains(sheet: Sheet) -> None:
    _photos(sheet, 34, 66, 84)
    _arrow(sheet, (156, 100), (200, 100))
    _lora(sheet, 254, 100, 26)


def _generates(sheet: Sheet) -> None:
    _lora(sheet, 66, 100, 26)
    _arrow(sheet, (122, 100), (166, 100))
    _photo(sheet, 180, 42, 112)


def _on(gigabytes: int, what: Callable[[Sheet], None]) -> Callable[[Sheet], None]:
    """Draws `what`, and below it the GPU."""

    def draw(sheet: Sheet) -> None:
        what(sheet)
        _memory(sheet, gigabytes)

    return draw


def _background(sheet: Sheet) -> None:
    for i in range(3):
        _photo(sheet, 26 + 92 * i, 42, 82)
    _box(sheet, 26, 176, 190, 26, DIM, 13)
    _box(sheet, 26, 176, 128, 26, YELLOW, 13)
    _lora(sheet, 262, 189, 22)
    _words(sheet, "trains while you generate", 262)


def _resume(sheet: Sheet) -> None:
    def loss(x: float) -> Point:
        return x, 60 + 150 * (1 - math.exp(-(x - 34) / 90)) + 5 * math.sin(x / 5)

    _curve(sheet, [loss(x) for x in range(34, 150, 3)], "white", 6)
    _curve(sheet, [loss(x) for x in range(178, 290, 3)], YELLOW, 6)
    sheet.line([(34, 232), (290, 232)], DIM, 3)
    for x in (156, 168):
        _box(sheet, x - 3, 96, 7, 40, "white", 2)
    _words(sheet, "goes on where it stopped", 270)


def _regularised(sheet: Sheet) -> None:
    for x, words, shape in ((24, "learn this", _emblem), (168, "keep this", _star)):
        shape(sheet, *_tile(sheet, x, 60, 128), 46)
        sheet.text(x + 64, 216, words, "mm", 22, "white")
    _words(sheet, "two datasets", 268)


def _from_nodes(sheet: Sheet) -> None:
    _node(sheet, 18, 50, 118, 92, "Image")
    _photo(sheet, 52, 84, 48)
    _node(sheet, 18, 160, 118, 92, "Image")
    _photo(sheet, 52, 194, 48)
    _node(sheet, 186, 96, 118, 108, "Dataset")
    _lora(sheet, 245, 160, 20)
    for y, end in ((96, 130), (206, 172)):
        _noodle(sheet, (136, y), (186, end), BLUE)
    _words(sheet, "train on any node's images")


def _inpainted(sheet: Sheet) -> None:
    x, y = _tile(sheet, 18, 84, 122, BLUE)
    _star(sheet, x, y, 46)
    _arrow(sheet, (145, 145), (175, 145))
    x, y = _tile(sheet, 180, 84, 122, BLUE)
    sheet.dot(x, y, YELLOW, 38)
    sheet.dot(x, y, BLUE, 21)
    for left in (33, 195):
        for i in range(0, 92, 16):
            for start, end in (
                ((left + i, 99), (left + i + 9, 99)),
                ((left + i, 191), (left + i + 9, 191)),
                ((left, 99 + i), (left, 108 + i)),
                ((left + 92, 99 + i), (left + 92, 108 + i)),
            ):
                sheet.line([start, end], "white", 3)
    _words(sheet, "a part changes, the rest stays", 258)


def _host_nodes(sheet: Sheet) -> None:
    _node(sheet, 18, 60, 112, 96, "Apply LoRA")
    _lora(sheet, 74, 118, 18)
    _node(sheet, 184, 96, 118, 118, "KSampler")
    _photo(sheet, 212, 134, 64)
    _noodle(sheet, (130, 108), (184, 150), "#b39ddb")
    _words(sheet, "in ComfyUI's own nodes", 268)


def _tail(sheet: Sheet) -> None:
    from chroma_core.sampling.schedule import sampling_sigmas

    for bias, colour, width in ((0.0, DIM, 3), (0.9, YELLOW, 4)):
        sigmas = sampling_sigmas(12, 1024, tail_bias=bias).tolist()
        points = [(34 + 252 * i / 12, 236 - 190 * sigma) for i, sigma in enumerate(sigmas)]
        _curve(sheet, points, colour, width, width + 2)
    sheet.line([(34, 40), (34, 240), (290, 240)], DIM, 3)
    _words(sheet, "more steps at both ends", 276)


def _files(sheet: Sheet) -> None:
    for i, words in enumerate(("GGUF", "fp8", "bf16")):
        _page(sheet, 26 + 96 * i, 60, words)
    _box(sheet, 26, 196, 268, 26, DIM, 13)
    _box(sheet, 26, 196, 176, 26, YELLOW, 13)
    _words(sheet, "your files, what fits", 262)


def _converted(sheet: Sheet) -> None:
    _page(sheet, 34, 78, "LoRA")
    _arrow(sheet, (126, 130), (196, 130))
    _page(sheet, 208, 78, "kohya")
    sheet.draw.ellipse([each * SCALE for each in (52, 150, 108, 206)], None, YELLOW, 6 * SCALE)
    sheet.line([(100, 198), (128, 226)], YELLOW, 9)
    _words(sheet, "look inside, convert", 268)


DRAWINGS: dict[str, tuple[str, Callable[[Sheet], None]]] = {
    **{f"chroma_4_real_{card:02d}gb": (TRAINS, _on(card, _trains)) for card in CARDS},
    **{f"chroma_4_real_{card:02d}gb_use": (GENERATES, _on(card, _generates)) for card in CARDS},
    "chroma_train_lora": (TRAINS, _background),
    "chroma_resume_training": (TRAINS, _resume),
    "chroma_train_with_regularisation": (TRAINS, _regularised),
    "chroma_train_from_images": (TRAINS, _from_nodes),
    "chroma_inpaint": (GENERATES, _inpainted),
    "chroma_lora_in_host_nodes": (TOOLS, _host_nodes),
    "chroma_tail_sigmas": (TOOLS, _tail),
    "chroma_your_files": (TOOLS, _files),
    "chroma_convert_lora": (TOOLS, _converted),
}
"""By the workflow's name: the kind's colour, and what is drawn on it."""


def drawn(name: str) -> Image.Image:
    """The image of a workflow that is in `DRAWINGS`."""
    colour, draw = DRAWINGS[name]
    sheet = Sheet(SIDE, SIDE, colour)
    draw(sheet)
    return sheet.finished()
