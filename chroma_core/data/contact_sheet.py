"""A dataset at a glance: sizes, thumbnails as they will be trained, captions, warnings; and all that in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageEnhance

from ..model.drawing import Font, fitting, font_of, wrap
from .buckets import Size, crop_box, resize_and_crop
from .images import DatasetImage, UnreadableImage, bucket_of, load_image
from .scan import DatasetScan
from .views import load_mask
from .warnings import image_warnings

_PAGE, _TILE, _LINE_COLOUR = (24, 24, 27), (39, 39, 42), (63, 63, 70)
_INK, _FAINT, _AMBER = (244, 244, 245), (161, 161, 170), (251, 191, 36)
_PANEL_LINES, _BUCKET_ROWS, _CAPTION_LINES, _NOTES, _NOTE_LINES = 24, 2, 3, 3, 2
_UNTRAINED = 0.3
"""Brightness of what a loss mask leaves out."""


def bucket_counts(scan: DatasetScan, default_resolution: int) -> list[tuple[Size, int]]:
    """How many images are trained at each size, sorted by size; an image counts once at each of its sizes."""
    config = scan.config
    counts: Counter[Size] = Counter()
    for item in scan.items:
        counts.update({bucket_of(item, config, size) for size in config.sizes(default_resolution)})
    return sorted(counts.items())


def different_captions(scan: DatasetScan) -> int:
    """How many captions there are, each counted once."""
    return len({caption for item in scan.items for caption in item.captions})


def most_telling(scan: DatasetScan, limit: int) -> list[DatasetImage]:
    """At most `limit` images for a sheet, in the dataset's order; those with warnings if not all fit."""
    warned = image_warnings(scan.config, scan.items)
    ranked = sorted(scan.items, key=lambda item: item.name not in warned)[:limit]
    chosen = {item.name for item in ranked}
    return [item for item in scan.items if item.name in chosen]


def contact_sheet(
    images: Sequence[DatasetImage], scan: DatasetScan, default_resolution: int, columns: int = 4, cell: int = 192
) -> Image.Image:
    """A head with the buckets, thumbnails of `images` cropped (not at random) as in training, a panel of warnings.

    Under each thumbnail: name; bucket, repeats and caption number where there is more than one; the caption as it is
    trained; its warnings. What a loss mask leaves out is darkened.

    Args:
        images: what to show (the caller limits their number), at least one.
        scan: the dataset they come from.
        default_resolution: pixels, for a dataset without resolutions of its own.
        columns, cell: cells in a row, and the side of a thumbnail in pixels.
    """
    columns = max(1, min(columns, len(images)))
    font = font_of(max(10, cell // 16))
    width, pad = columns * cell, max(4, cell // 24)
    warned = image_warnings(scan.config, scan.items)
    blocks = [_head(scan, len(images), default_resolution, font, width, pad)]
    tiles = [_tile(item, scan, default_resolution, warned.get(item.name, []), font, cell, pad) for item in images]
    for start in range(0, len(tiles), columns):
        row = tiles[start : start + columns]
        block = Image.new("RGB", (width, max(tile.height for tile in row)), _PAGE)
        for i, tile in enumerate(row):
            block.paste(tile, (i * cell, 0))
        blocks.append(block)
    if scan.warnings:
        blocks.append(_panel(scan.warnings, font, width, pad))
    sheet = Image.new("RGB", (width, sum(block.height for block in blocks)), _PAGE)
    top = 0
    for block in blocks:
        sheet.paste(block, (0, top))
        top += block.height
    return sheet


def thumbnail(image: DatasetImage, scan: DatasetScan, default_resolution: int, side: int) -> Image.Image | None:
    """One image as a contact sheet shows it, at most `side` pixels wide and high; None when it cannot be decoded."""
    bucket = bucket_of(image, scan.config, scan.config.sizes(default_resolution)[0])
    try:
        return _thumbnail(image, scan, bucket, side)
    except UnreadableImage:
        return None


def summary(scan: DatasetScan, default_resolution: int) -> str:
    """Counts, buckets and warnings, one a line."""
    config = scan.config
    sizes = ", ".join(f"{w}×{h}: {n}" for (w, h), n in bucket_counts(scan, default_resolution))
    uses = sum(item.repeats for item in scan.items) * config.repeats
    lines = [
        f"{len(scan.items)} images, {different_captions(scan)} different captions"
        + (f", trigger word “{config.trigger}”" if config.trigger else "")
        + (f", {config.repeats} repeats" if config.repeats > 1 else "")
        + (f", {uses} uses in an epoch" if uses != len(scan.items) * config.repeats else "")
        + (f", {sum(item.masked for item in scan.items)} with a mask" if config.masks != "none" else "")
        + (", for regularisation" if config.regularisation else ""),
        f"buckets: {sizes}",
        *(f"warning: {warning}" for warning in scan.warnings),
    ]
    return "\n".join(lines)


def _head(scan: DatasetScan, shown: int, default_resolution: int, font: Font, width: int, pad: int) -> Image.Image:
    """Name, counts, and one chip a bucket: its shape, its size, how many images have it."""
    line, config = round(font.size * 1.35), scan.config
    large = font_of(round(font.size * 1.25))
    facts = [f"{len(scan.items)} images", f"{different_captions(scan)} different captions"]
    facts += [f"trigger “{config.trigger}”"] if config.trigger else []
    facts += [f"{config.repeats} repeats"] if config.repeats > 1 else []
    facts += ["regularisation"] if config.regularisation else []
    facts += [f"{shown} shown, those with warnings first"] if shown < len(scan.items) else []
    texts = wrap("  ·  ".join(facts), font, width - 2 * pad, 3)
    chips = sorted(bucket_counts(scan, default_resolution), key=lambda entry: -entry[1])
    icon, gap = round(font.size), pad
    spots: list[tuple[int, int, Size, str]] = []
    x, row, left_over = pad, 0, 0
    for i, (size, count) in enumerate(chips):
        text = f"{size[0]}x{size[1]}: {count}"
        wide = icon + gap + round(font.getlength(text)) + 3 * gap
        if x > pad and x + wide > width - pad:
            x, row = pad, row + 1
        if row >= _BUCKET_ROWS:
            left_over = len(chips) - i
            break
        spots.append((x, row, size, text))
        x += wide
    top = pad + round(large.size * 1.5) + len(texts) * line + pad // 2
    rows = (spots[-1][1] + 1 if spots else 0) + bool(left_over)
    block = Image.new("RGB", (width, top + rows * line + 2 * pad), _PAGE)
    draw = ImageDraw.Draw(block)
    draw.text((pad, pad), fitting(Path(config.folder).name, large, width - 2 * pad), _INK, large)
    for i, text in enumerate(texts):
        draw.text((pad, pad + round(large.size * 1.5) + i * line), text, _FAINT, font)
    for x, row, size, text in spots:
        y, longest = top + row * line, max(size)
        w, h = max(2, icon * size[0] // longest), max(2, icon * size[1] // longest)
        corner = x + (icon - w) // 2, y + (line - h) // 2
        draw.rectangle((*corner, corner[0] + w - 1, corner[1] + h - 1), outline=_FAINT)
        draw.text((x + icon + gap, y), text, _INK, font)
    if left_over:
        draw.text((pad, top + (rows - 1) * line), f"… and {left_over} more sizes", _FAINT, font)
    draw.line((pad, block.height - pad // 2 - 1, width - pad, block.height - pad // 2 - 1), _LINE_COLOUR)
    return block


def _tile(
    image: DatasetImage,
    scan: DatasetScan,
    default_resolution: int,
    warnings: list[str],
    font: Font,
    cell: int,
    pad: int,
) -> Image.Image:
    """One thumbnail with what there is to say about it."""
    bucket = bucket_of(image, scan.config, scan.config.sizes(default_resolution)[0])
    inner, line = cell - 2 * pad, round(font.size * 1.35)
    try:
        thumbnail = _thumbnail(image, scan, bucket, inner)
    except UnreadableImage as error:
        thumbnail, warnings = None, [f"cannot be used: {error}", *warnings]
    label = [f"{bucket[0]}×{bucket[1]}"]
    label += [f"{image.repeats} repeats"] if image.repeats > 1 else []
    label += [f"{len(image.captions)} captions"] if len(image.captions) > 1 else []
    text: list[tuple[str, tuple[int, int, int]]] = [
        (fitting(image.name, font, inner, keep_end=True), _FAINT),
        (fitting(" · ".join(label), font, inner), _FAINT),
    ]
    caption: str = next(iter(image.captions), "")
    if caption:
        text += [(part, _INK) for part in wrap(caption, font, inner, _CAPTION_LINES)]
    else:
        text.append(("(empty caption)", _FAINT))
    for warning in warnings[:_NOTES]:
        text += [(part, _AMBER) for part in wrap(f"! {warning}", font, inner, _NOTE_LINES)]
    if len(warnings) > _NOTES:
        text.append((f"! and {len(warnings) - _NOTES} more", _AMBER))
    tile = Image.new("RGB", (cell, pad + inner + pad // 2 + len(text) * line + pad), _PAGE)
    draw = ImageDraw.Draw(tile)
    frame = (pad, pad, pad + inner - 1, pad + inner - 1)
    draw.rectangle(frame, fill=_TILE)
    if thumbnail is not None:
        tile.paste(thumbnail, (pad + (inner - thumbnail.width) // 2, pad + (inner - thumbnail.height) // 2))
    if warnings:
        draw.rectangle(frame, outline=_AMBER, width=max(1, cell // 96))
    for i, (words, colour) in enumerate(text):
        draw.text((pad, pad + inner + pad // 2 + i * line), words, colour, font)
    return tile


def _thumbnail(image: DatasetImage, scan: DatasetScan, bucket: Size, side: int) -> Image.Image:
    """The image as it is cropped, with what its mask leaves out darkened. Raises UnreadableImage."""
    scale = min(side / bucket[0], side / bucket[1])
    size = max(1, round(bucket[0] * scale)), max(1, round(bucket[1] * scale))
    if scale < 1:
        whole = load_image(image.path, scan.config.background, 2 * side)
        small = whole.resize(size, Image.Resampling.LANCZOS, crop_box(*whole.size, bucket, image.crop))
    else:  # what is trained at so few pixels is shown with just those
        cropped = resize_and_crop(load_image(image.path, scan.config.background), bucket, image.crop)
        small = cropped.resize(size, Image.Resampling.NEAREST)
    if image.masked and (mask := load_mask(image.path, image.mask)) is not None:
        dark = ImageEnhance.Brightness(small).enhance(_UNTRAINED)
        trained = resize_and_crop(mask, bucket, image.crop).resize(size, Image.Resampling.BILINEAR)
        small = Image.composite(small, ImageChops.lighter(dark, Image.new("RGB", size, _PAGE)), trained)
    return small


def _panel(warnings: Sequence[str], font: Font, width: int, pad: int) -> Image.Image:
    """The warnings below a heading; those that do not fit are counted."""
    line = round(font.size * 1.35)
    lines: list[tuple[str, int]] = []
    for i, warning in enumerate(warnings):
        wrapped = wrap(warning, font, width - 4 * pad - round(font.size), 6)
        if len(lines) + len(wrapped) > _PANEL_LINES:
            lines.append((f"… and {len(warnings) - i} more", 0))
            break
        lines += [(text, not number) for number, text in enumerate(wrapped)]
    block = Image.new("RGB", (width, (len(lines) + 1) * line + 4 * pad), _PAGE)
    draw = ImageDraw.Draw(block)
    draw.rectangle((pad, pad, width - pad - 1, block.height - pad - 1), fill=_TILE)
    draw.rectangle((pad, pad, pad + max(2, pad // 3), block.height - pad - 1), fill=_AMBER)
    heading = f"{len(warnings)} warnings" if len(warnings) > 1 else "1 warning"
    draw.text((3 * pad, 2 * pad), heading, _AMBER, font)
    for i, (text, first) in enumerate(lines, 1):
        if first:
            dot = (3 * pad, 2 * pad + i * line + line // 3)
            draw.rectangle((*dot, dot[0] + font.size // 4, dot[1] + font.size // 4), fill=_AMBER)
        draw.text((3 * pad + font.size, 2 * pad + i * line), text, _INK, font)
    return block
