"""Text on the images that we draw: one font, cut or broken to a width in pixels."""

from __future__ import annotations

from functools import cache

from PIL import ImageFont

Font = ImageFont.FreeTypeFont


_ABSENT = str.maketrans({"×": "x", "–": "-", "—": "-", "\u00a0": " "})
"""Signs of our own texts that the font has no picture for."""


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
