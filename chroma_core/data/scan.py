"""From a folder to a list of captioned images, with everything left out named and counted."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ..errors import DataError
from ..files import sha256_file
from .captions import caption_from_name, prepared, read_captions, read_metadata
from .dataset import DatasetConfig
from .pictures import OTHER_EXTENSIONS, PICTURE_EXTENSIONS, Picture, PictureFacts, UnreadablePicture, picture_facts
from .views import is_mask, mask_file, mask_owner
from .warnings import Findings, dataset_warnings, describe_skipped

_REPEAT_FOLDER = re.compile(r"(\d+)_")
_SETTLED = 2.0
"""Seconds: a file that was written so recently could be written again with the very same time."""


@dataclass(frozen=True)
class DatasetScan:
    """What a folder holds: usable images, what was skipped and why, and what to warn of."""

    config: DatasetConfig
    items: list[Picture]
    skipped: list[tuple[str, str]]
    warnings: list[str]


def scan(config: DatasetConfig, default_resolution: int = 0) -> DatasetScan:
    """Read a dataset folder (and its sub-folders) in a fixed order.

    An image that cannot be opened, or has no caption, is skipped and named; see `missing_caption`. Pixels are not
    decoded here: a truncated file is found, skipped and named while latents are cached.

    Args:
        default_resolution: pixels, what small images are measured by when the dataset has no resolution; 0: nothing.
    Raises:
        DataError: the folder is missing or holds no usable image, a caption is missing under `error`, or captions are
            to come from metadata that is not there.
        PromptError: a caption contains `[trigger]` and the dataset has no trigger word.
    """
    folder = Path(config.folder)
    try:
        there = folder.is_dir()
        files, findings = _files(folder) if there else ([], Findings())
    except OSError as error:  # no permission, or a network drive that does not answer
        raise DataError(
            f"The dataset folder '{config.folder}' cannot be read: {error.strerror or error}. Check its permissions, "
            "or the drive that it is on."
        ) from error
    if not there:
        raise DataError(
            f"The dataset folder '{config.folder}' does not exist. Check the name, or put a folder with images and "
            f"{config.caption_extension} captions there."
        )
    if not files:
        other = f" Files like {findings.foreign[0]} are not read: save them as PNG or JPEG." if findings.foreign else ""
        raise DataError(
            f"The dataset folder '{folder.name}' holds no image. Put files ending in "
            f"{', '.join(sorted(PICTURE_EXTENSIONS))} there, each with a {config.caption_extension} caption of the "
            f"same name.{other}"
        )
    caption_of = _caption_source(config, folder, files, findings)
    items: list[Picture] = []
    skipped: list[tuple[str, str]] = []
    for path in files:
        name = path.relative_to(folder).as_posix()
        repeats = _folder_repeats(name) if config.repeat_folders else 1
        if not repeats:
            skipped.append((name, "its folder's name says 0 repeats"))
            continue
        try:
            facts = picture_facts(path)
            digest = _sha256(path)
            mask, mask_digest = _mask(path, facts, config)
        except (UnreadablePicture, OSError) as error:
            skipped.append((name, f"unreadable image: {error}"))
            continue
        try:
            captions, source = caption_of(path, name)
        except ValueError:
            skipped.append((name, "its caption file is not UTF-8 text"))
            continue
        captioned = bool(captions)
        if not captioned:
            findings.without_caption += 1
            if config.default_caption is not None:
                captions = (config.default_caption,)
            elif config.missing_caption == "empty":
                captions = ("",)
            elif config.missing_caption == "error":
                raise DataError(
                    f"The image '{name}' in '{folder.name}' has no caption: there is no text in {source}. Write "
                    "one, set a default caption, or choose to skip such images."
                )
            else:
                skipped.append((name, f"no caption in {source}"))
                continue
        around = config.trigger, config.caption_prefix, config.caption_suffix
        drawn = prepared(captions, *around, config.tag_shuffles, config.keep_tags)
        items.append(
            Picture(
                **vars(facts),
                path=path,
                name=name,
                captions=drawn[: len(captions)],
                drawn=drawn,
                captioned=captioned,
                sha256=digest,
                mask=mask,
                mask_sha256=mask_digest,
                repeats=repeats,
            )
        )
    if not items:
        raise DataError(
            f"None of the {len(files)} images in '{folder.name}' can be used: {describe_skipped(skipped)}. Repair "
            "them, add captions, or set a default caption."
        )
    return DatasetScan(config, items, skipped, dataset_warnings(config, items, skipped, findings, default_resolution))


def _files(folder: Path) -> tuple[list[Path], Findings]:
    """The images below a folder in order, without masks; what else looks like an image is noted."""
    # A link that leads nowhere is kept, so that it is named as missing.
    visible = sorted(p for p in folder.rglob("*") if not is_hidden(p, folder) and (p.is_file() or not p.exists()))
    pictures = [path for path in visible if path.suffix.lower() in PICTURE_EXTENSIONS]
    owners = {path.with_suffix("") for path in pictures if not is_mask(path)}
    masks = {path for path in pictures if is_mask(path) and mask_owner(path) in owners}
    foreign = [path.relative_to(folder).as_posix() for path in visible if path.suffix.lower() in OTHER_EXTENSIONS]
    return [path for path in pictures if path not in masks], Findings(mask_files=len(masks), foreign=foreign)


def is_hidden(path: Path, folder: Path) -> bool:
    """Whether a path below the folder, or a folder on the way to it, has a name that begins with a dot."""
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _caption_source(
    config: DatasetConfig, folder: Path, files: list[Path], findings: Findings
) -> Callable[[Path, str], tuple[tuple[str, ...], str]]:
    """How an image (its path and its name) gets its captions: they, or none, and where they were looked for.

    What is returned raises ValueError for a text that cannot be decoded.
    """

    def from_file(path: Path, _: str) -> tuple[tuple[str, ...], str]:
        text = path.with_suffix(config.caption_extension)
        try:
            return read_captions(text), text.name
        except OSError:
            return (), text.name

    if config.caption_source == "metadata":
        names = {path.relative_to(folder).as_posix() for path in files}
        captions, findings.metadata = read_metadata(folder, names, config.caption_column)
        return lambda _, name: (captions.get(name, ()), "the metadata")
    if config.caption_source == "filenames":
        return lambda _, name: (tuple(filter(None, [caption_from_name(name)])), "its file name")
    if config.caption_source == "fixed":
        return lambda *_: ((config.default_caption or "",), "default_caption")
    return from_file


def _mask(path: Path, facts: PictureFacts, config: DatasetConfig) -> tuple[Path | None, str]:
    """An image's mask and its hash, as `Picture` has them. Raises OSError when the mask cannot be read."""
    if config.masks == "files" and mask_file(path).is_file():
        return mask_file(path), _sha256(mask_file(path))
    return None, "alpha" if config.masks == "alpha" and facts.transparent else ""


def _folder_repeats(name: str) -> int:
    """The N of the innermost folder called `N_name` that an image lies in, otherwise 1."""
    for folder in reversed(name.split("/")[:-1]):
        if match := _REPEAT_FOLDER.match(folder):
            return int(match[1])
    return 1


def _sha256(path: Path) -> str:
    """The file's hash; remembered, since a set is looked at again and again while its options are chosen."""
    found = path.stat()
    if time.time() - max(found.st_mtime, found.st_ctime) < _SETTLED:
        return sha256_file(path)
    return _remembered(path, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@lru_cache(maxsize=100_000)
def _remembered(path: Path, *_state: int) -> str:
    return sha256_file(path)
