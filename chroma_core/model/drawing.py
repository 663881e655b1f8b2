"""Images that we draw: text in one font, cut or broken to a width in pixels; named images in a grid."""

from __future__ import annotations

from functools import cache

from PIL import Image, ImageDraw, ImageFont

from ..errors import ConfigError

Font = ImageFont.FreeTypeFont

_BACKGROUND, _INK = (24, 24, 27), (228, 228, 231)

_ABSENT = str.maketrans({"×": "x", "–": "-", "—": "-", "\u00a0": " "})
"""Signs of our own texts that the font has no glyph for."""


@cache
def font_of(size: int) -> Font:
    """Pillow's own font, `size` pixels high."""
    font = ImageFont.load_default(size)
    assert isinstance(font, Font), "Pillow is built with FreeType wherever it comes as a wheel"
    return font


def fitting(text: str, font: Font, width: int, keep_end: bool = False) -> str:
    """The text, or what of its beginning (or end) fits into `width`, with an ellipsis."""
    text = text.translate(_ABSENT)
    if font.getlength(text) <= width:
        return text
    # From the short end: measuring takes time in proportion to the length, and a text may be a whole page.
    count = 0
    while count < len(text) and font.getlength(f"…{_end(text, count + 1, keep_end)}") <= width:
        count += 1
    kept = _end(text, count, keep_end)
    return f"…{kept}" if keep_end else f"{kept}…"


def _end(text: str, count: int, last: bool) -> str:
    return text[len(text) - count :] if last else text[:count]


def wrap(text: str, font: Font, width: int, limit: int) -> list[str]:
    """Break a text into at most `limit` lines of `width`, long words too; an ellipsis stands for what is left over."""
    lines, line = [], ""
    for word in text.translate(_ABSENT).split():
        longer = f"{line} {word}".strip()
        if font.getlength(longer) <= width:
            line = longer
            continue
        if line:
            lines.append(line)
        while font.getlength(word) > width and len(lines) <= limit:
            cut = 1
            while font.getlength(word[: cut + 1]) <= width:
                cut += 1
            lines.append(word[:cut])
            word = word[cut:]
        line = word
    lines.append(line)
    if len(lines) > limit:
        lines = [*lines[: limit - 1], fitting(f"{lines[limit - 1]} …", font, width)]
    return lines


def side_by_side(images: dict[str, Image.Image], columns: int = 4, cell: int = 256) -> Image.Image:
    """Named images in a grid, each fitted into a square of `cell` pixels. Raises ConfigError without any."""
    if not images:
        raise ConfigError("There is no image to show: nothing was sampled.")
    columns, line, gap = min(columns, len(images)), 34, 8
    font = font_of(12)
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (cell + gap) + gap, rows * (cell + line) + gap), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for i, (name, image) in enumerate(images.items()):
        x, y = gap + i % columns * (cell + gap), gap + i // columns * (cell + line)
        scale = cell / max(image.size)
        size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        small = image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
        sheet.paste(small, (x + (cell - size[0]) // 2, y + (cell - size[1]) // 2))
        draw.text((x, y + cell + 4), fitting(name, font, cell), _INK, font)
    return sheet
