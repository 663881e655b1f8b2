"""A data set at a glance: thumbnails as they will be trained, with bucket and caption, and a summary in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from .buckets import resize_and_crop
from .picture_files import UnreadablePicture, load_picture
from .scan import DatasetScan, Picture, bucket_of

_BACKGROUND, _INK, _FAINT = (24, 24, 27), (228, 228, 231), (161, 161, 170)
_LINE = 14


def contact_sheet(
    pictures: Sequence[Picture], scan: DatasetScan, default_resolution: int, columns: int = 4, cell: int = 192
) -> Image.Image:
    """Thumbnails of `pictures`, cropped as in training.

    Args:
        pictures: what to show (the caller limits their number), at least one.
        scan: the data set they come from.
        default_resolution: pixels, for a data set without resolutions of its own.
        columns, cell: cells in a row, and the side of a thumbnail in pixels.
    """
    columns = max(1, min(columns, len(pictures)))
    rows = -(-len(pictures) // columns)
    height = cell + 3 * _LINE + 6
    sheet = Image.new("RGB", (columns * cell, rows * height), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(11)
    for i, picture in enumerate(pictures):
        x, y = i % columns * cell, i // columns * height
        bucket = bucket_of(picture, scan.config, scan.config.sizes(default_resolution)[0])
        try:
            thumbnail = resize_and_crop(load_picture(picture.path), bucket)
        except UnreadablePicture as error:
            draw.text((x + 6, y + 6), f"unreadable: {error}"[: cell // 6], _INK, font)
            continue
        scale = min((cell - 8) / bucket[0], (cell - 8) / bucket[1])
        size = max(1, round(bucket[0] * scale)), max(1, round(bucket[1] * scale))
        small = thumbnail.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST)
        sheet.paste(small, (x + (cell - size[0]) // 2, y + (cell - size[1]) // 2))
        draw.text((x + 6, y + cell), f"{picture.name}  {bucket[0]}x{bucket[1]}"[: cell // 6], _FAINT, font)
        for line, text in enumerate(_wrap(picture.captions[0], font, cell - 12, 2)):
            draw.text((x + 6, y + cell + (line + 1) * _LINE), text, _INK, font)
    return sheet


def summary(scan: DatasetScan, default_resolution: int) -> str:
    """Counts, buckets and warnings, one a line."""
    config = scan.config
    buckets = Counter(bucket_of(item, config, size) for size in config.sizes(default_resolution) for item in scan.items)
    sizes = ", ".join(f"{w}×{h}: {n}" for (w, h), n in sorted(buckets.items()))
    captions = {caption for item in scan.items for caption in item.captions}
    lines = [
        f"{len(scan.items)} pictures, {len(captions)} different captions"
        + (f", trigger word “{config.trigger}”" if config.trigger else "")
        + (f", {config.repeats} repeats" if config.repeats > 1 else ""),
        f"buckets: {sizes}",
        *(f"warning: {warning}" for warning in scan.warnings),
    ]
    return "\n".join(lines)


def _wrap(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int, limit: int) -> list[str]:
    """Break a text into at most `limit` lines of `width` pixels; what is left over ends in an ellipsis."""
    lines, line = [], ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if line and font.getlength(longer) > width:
            lines.append(line)
            line = word
        else:
            line = longer
    lines.append(line)
    if len(lines) > limit:
        lines = [*lines[: limit - 1], f"{lines[limit - 1]} …"]
    return lines
