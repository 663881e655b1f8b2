"""A data set at a glance: thumbnails as they will be trained, with bucket and caption, warnings, a summary in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from .buckets import resize_and_crop
from .picture import Picture, bucket_of
from .picture_files import UnreadablePicture, load_picture
from .scan import DatasetScan

_BACKGROUND, _INK, _FAINT, _AMBER = (24, 24, 27), (228, 228, 231), (161, 161, 170), (251, 191, 36)
_LINE = 14
_PANEL_LINES = 24


def contact_sheet(
    pictures: Sequence[Picture], scan: DatasetScan, default_resolution: int, columns: int = 4, cell: int = 192
) -> Image.Image:
    """Thumbnails of `pictures`, cropped (to the centre) as in training, and below them a panel with the warnings.

    Under each: name and bucket, repeats and caption number where there is more than one, the caption as written.

    Args:
        pictures: what to show (the caller limits their number), at least one.
        scan: the data set they come from.
        default_resolution: pixels, for a data set without resolutions of its own.
        columns, cell: cells in a row, and the side of a thumbnail in pixels.
    """
    columns = max(1, min(columns, len(pictures)))
    rows = -(-len(pictures) // columns)
    height = cell + 3 * _LINE + 6
    font = ImageFont.load_default(11)
    panel = _panel(scan.warnings, font, columns * cell - 12)
    below = (len(panel) + 1) * _LINE if panel else 0
    sheet = Image.new("RGB", (columns * cell, rows * height + below), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for line, text in enumerate(panel):
        draw.text((6, rows * height + line * _LINE), text, _AMBER, font)
    for i, picture in enumerate(pictures):
        x, y = i % columns * cell, i // columns * height
        bucket = bucket_of(picture, scan.config, scan.config.sizes(default_resolution)[0])
        try:
            thumbnail = resize_and_crop(load_picture(picture.path, scan.config.background), bucket)
        except UnreadablePicture as error:
            draw.text((x + 6, y + 6), f"unreadable: {error}"[: cell // 6], _INK, font)
            continue
        scale = min((cell - 8) / bucket[0], (cell - 8) / bucket[1])
        size = max(1, round(bucket[0] * scale)), max(1, round(bucket[1] * scale))
        small = thumbnail.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST)
        sheet.paste(small, (x + (cell - size[0]) // 2, y + (cell - size[1]) // 2))
        count = len(picture.captions)
        label = f"{bucket[0]}x{bucket[1]}" + (f"  {picture.repeats}×" if picture.repeats > 1 else "")
        label += f"  {count} captions" if count > 1 else ""
        name = picture.name[: max(3, cell // 6 - len(label) - 2)]
        draw.text((x + 6, y + cell), f"{name}  {label}", _FAINT, font)
        for line, text in enumerate(_wrap(picture.captions[0], font, cell - 12, 2)):
            draw.text((x + 6, y + cell + (line + 1) * _LINE), text, _INK, font)
    return sheet


def summary(scan: DatasetScan, default_resolution: int) -> str:
    """Counts, buckets and warnings, one a line."""
    config = scan.config
    buckets = Counter(bucket_of(item, config, size) for size in config.sizes(default_resolution) for item in scan.items)
    sizes = ", ".join(f"{w}×{h}: {n}" for (w, h), n in sorted(buckets.items()))
    captions = {caption for item in scan.items for caption in item.captions}
    uses = sum(item.repeats for item in scan.items) * config.repeats
    lines = [
        f"{len(scan.items)} pictures, {len(captions)} different captions"
        + (f", trigger word “{config.trigger}”" if config.trigger else "")
        + (f", {config.repeats} repeats" if config.repeats > 1 else "")
        + (f", {uses} uses in an epoch" if uses != len(scan.items) * config.repeats else "")
        + (f", {sum(item.masked for item in scan.items)} with a mask" if config.masks != "none" else "")
        + (", for regularisation" if config.regularisation else ""),
        f"buckets: {sizes}",
        *(f"warning: {warning}" for warning in scan.warnings),
    ]
    return "\n".join(lines)


def _panel(warnings: Sequence[str], font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> list[str]:
    """The warnings as lines of `width` pixels, with a heading; those that do not fit are counted."""
    lines: list[str] = [f"{len(warnings)} warnings" if len(warnings) > 1 else "1 warning"] if warnings else []
    for i, warning in enumerate(warnings):
        wrapped = _wrap(f"- {warning}", font, width, 6)
        if len(lines) + len(wrapped) > _PANEL_LINES:
            return [*lines, f"… and {len(warnings) - i} more"]
        lines += wrapped
    return lines


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
