"""Text on a contact sheet: one font, cut or broken to a width in pixels."""

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
    while text and font.getlength(f"…{text}") > width:
        text = text[1:] if keep_end else text[:-1]
    return f"…{text}" if keep_end else f"{text}…"


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
            cut = next(n for n in range(len(word) - 1, 0, -1) if n == 1 or font.getlength(word[:n]) <= width)
            lines.append(word[:cut])
            word = word[cut:]
        line = word
    lines.append(line)
    if len(lines) > limit:
        lines = [*lines[: limit - 1], fitting(f"{lines[limit - 1]} …", font, width)]
    return lines
