"""From a folder to a list of captioned images, with everything left out named and counted."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..errors import ConfigError, DataError, check_text, printable
from .captions import caption_from_name, prepared, read_captions, read_metadata
from .dataset import DatasetConfig
from .images import OTHER_EXTENSIONS, DatasetImage, ImageFacts, UnreadableImage, image_extensions, reason
from .remarks import Remark
from .remembered import Remembered
from .views import CENTRE, crops_or_centred, is_mask, mask_file, mask_owner
from .warnings import ENOUGH_TO_JUDGE, Findings, dataset_warnings, describe_skipped

_REPEAT_FOLDER = re.compile(r"([0-9]+)_")
LEAST_HELD_OUT = 2
"""Images held out at least: one alone says little of the others."""
MOST_REPEATS = 1000
"""As with the option `repeats`. A folder `20240115_trip` has a date in its name."""


@dataclass(frozen=True)
class DatasetScan:
    """What a folder holds: usable images, what was skipped and why, what to warn of, and images in formats that are
    not read."""

    config: DatasetConfig
    items: list[DatasetImage]
    skipped: list[tuple[str, str]]
    warnings: list[str]
    foreign: list[str] = field(default_factory=list)


def scan(
    config: DatasetConfig, default_resolution: int = 0, known: Remembered | None = None, unfinished: bool = False
) -> DatasetScan:
    """Read a dataset folder (and its sub-folders) in a fixed order.

    An image that cannot be opened, or has no caption, is skipped and named; see `missing_caption`. Pixels are not
    decoded here: a truncated file is found, skipped and named while latents are cached.

    Args:
        default_resolution: pixels, what small images are measured by when the dataset has no resolution; 0: nothing.
        known: what was read of the files before, which is taken, and to which what is read now is added.
        unfinished: the folder is still being filled: that it has no usable image yet is no error.
    Raises:
        DataError: the folder is missing or holds no usable image, a caption is missing under `error`, or captions are
            to come from metadata that is not there.
        PromptError: a caption contains `[trigger]` and the dataset has no trigger word.
    """
    folder, known = Path(config.folder), known or Remembered()
    try:
        there = folder.is_dir()
        files, texts, findings = _files(folder) if there else ({}, {}, Findings())
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
    if not files and not unfinished:
        other = f" Files like {findings.foreign[0]} are not read: save them as PNG or JPEG." if findings.foreign else ""
        raise DataError(
            f"The dataset folder '{folder.name}' holds no image. Put files ending in "
            f"{', '.join(sorted(image_extensions()))} there, each with a {config.caption_extension} caption of the "
            f"same name.{other}"
        )
    caption_of = _caption_source(config, folder, files, texts, findings)
    crops, unread = crops_or_centred(folder) if config.crop == "centre" else ({}, [])
    items: list[DatasetImage] = []
    skipped: list[tuple[str, str]] = []
    for path, name in files.items():
        repeats = _folder_repeats(name) if config.repeat_folders else 1
        if not repeats:
            skipped.append((name, Remark("zero_repeats")))
            continue
        try:
            facts, digest = known.facts(path)
            mask, mask_digest = _mask(path, facts, config, known)
        except (UnreadableImage, OSError) as error:
            why = reason(error) if isinstance(error, OSError) else error
            skipped.append((name, Remark("unreadable", why=str(why))))
            continue
        try:
            captions, source = caption_of(path, name)
            check_text(captions)
        except ConfigError:
            skipped.append((name, Remark("half_character")))
            continue
        except ValueError as error:
            text = isinstance(error, UnicodeDecodeError)
            skipped.append((name, Remark("caption_no_text") if text else Remark("caption_fault", why=str(error))))
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
                skipped.append((name, Remark("no_caption", source=source)))
                continue
        around = config.trigger, config.caption_prefix, config.caption_suffix
        drawn = prepared(captions, *around, config.tag_shuffles, config.keep_tags)
        items.append(
            DatasetImage(
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
                crop=crops.get(name, CENTRE),
            )
        )
    if not items and not unfinished:
        raise DataError(
            f"None of the {len(files)} images in '{folder.name}' can be used: {describe_skipped(skipped)}. Repair "
            "them, add captions, or set a default caption."
        )
    warnings = dataset_warnings(config, items, skipped, findings, default_resolution) if items else []
    return DatasetScan(config, items, skipped, unread + warnings, findings.foreign)


def hold_out(found: DatasetScan, share: float, most: int) -> tuple[DatasetScan, DatasetScan | None]:
    """A dataset without a share of its images, and these, to measure on; all of it and None where it is too small.

    Which ones is decided by their content: the same in every run, and copies of an image stay together. At least
    `LEAST_HELD_OUT`, and no more than `most`, which are as many as are measured.
    """
    digests = sorted({image.sha256 for image in found.items})
    if len(digests) < ENOUGH_TO_JUDGE:
        return found, None
    held = set(digests[: min(max(LEAST_HELD_OUT, round(share * len(digests))), most)])
    trained, apart = ([p for p in found.items if (p.sha256 in held) == chosen] for chosen in (False, True))
    return replace(found, items=trained), DatasetScan(found.config.held_out(found.config.trigger), apart, [], [])


def _files(folder: Path) -> tuple[dict[Path, str], dict[str, str], Findings]:
    """The images below a folder in order, with their names in it, without masks, and the paths of all other files by
    the names that one may look for; what else looks like an image is noted."""
    top, names = len(os.path.join(folder, "")), []
    for parent, folders, files in os.walk(folder, onerror=_unless_forbidden):
        folders[:] = [name for name in folders if not name.startswith(".")]
        names += [os.path.join(parent, name)[top:] for name in files if not name.startswith(".")]
    names.sort(key=lambda name: os.path.normcase(name).split(os.sep))
    kinds = {name: os.path.splitext(name)[1].lower() for name in names}
    # A link that leads nowhere, and what is no file, are kept, so that they are named.
    known = image_extensions()
    shown = {name: printable(name.replace(os.sep, "/")) for name in names}
    listed = {folder / name: shown[name] for name in names if kinds[name] in known}
    others = {name: shown[name] for name in names if kinds[name] not in known}
    texts = {_spelt(called): name for name, called in reversed(others.items())}
    texts |= {called: name for name, called in others.items()}
    candidates = [path for path in listed if is_mask(path)]
    owners = {path.with_suffix("") for path in listed if not is_mask(path)} if candidates else set()
    masks = {path for path in candidates if mask_owner(path) in owners}
    foreign = [called for name, called in others.items() if kinds[name] in OTHER_EXTENSIONS]
    images = {path: name for path, name in listed.items() if path not in masks}
    return images, texts, Findings(mask_files=len(masks), foreign=foreign)


def _spelt(name: str) -> str:
    """The name with its ending in small letters: cameras and Windows write `.TXT`."""
    stem, ending = os.path.splitext(name)
    return stem + ending.lower()


def _unless_forbidden(error: OSError) -> None:
    """A sub-folder that may not be read holds nothing for us; a drive that does not answer is an error."""
    if not isinstance(error, PermissionError):
        raise error


def is_hidden(path: Path, folder: Path) -> bool:
    """Whether a path below the folder, or a folder on the way to it, has a name that begins with a dot."""
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _caption_source(
    config: DatasetConfig, folder: Path, files: dict[Path, str], texts: dict[str, str], findings: Findings
) -> Callable[[Path, str], tuple[tuple[str, ...], str]]:
    """How an image (its path and its name) gets its captions: they, or none, and where they were looked for.

    What is returned raises ValueError for a text that cannot be decoded.
    """

    def from_file(path: Path, name: str) -> tuple[tuple[str, ...], str]:
        stem = os.path.splitext(name)[0]
        wanted = stem + config.caption_extension
        found = texts.get(wanted) or texts.get(_spelt(wanted))
        if found is None:
            others = (texts.get(other) for other in (f"{stem}.txt", f"{stem}.caption", f"{name}.txt"))
            findings.captions_elsewhere += [printable(other) for other in others if other][:1]
        try:
            captions = read_captions(folder / found, config.caption_lines) if found else ()
        except OSError:
            captions = ()
        return captions, printable(os.path.basename(found or wanted))

    if config.caption_source == "files":
        stems = Counter(os.path.splitext(name)[0] for name in files.values())
        findings.same_stem = [name for name in files.values() if stems[os.path.splitext(name)[0]] > 1]

    if config.caption_source == "metadata":
        captions, findings.metadata = read_metadata(folder, set(files.values()), config.caption_column)
        return lambda _, name: (captions.get(name, ()), "the metadata")
    if config.caption_source == "filenames":
        return lambda path, _: (tuple(filter(None, [caption_from_name(path.name)])), "its file name")
    if config.caption_source == "fixed":
        return lambda *_: ((config.default_caption or "",), "default_caption")
    return from_file


def _mask(path: Path, facts: ImageFacts, config: DatasetConfig, known: Remembered) -> tuple[Path | None, str]:
    """An image's mask and its hash, as `DatasetImage` has them. Raises OSError when the mask cannot be read."""
    if config.masks == "files" and mask_file(path).is_file():
        return mask_file(path), known.sha256(mask_file(path))
    return None, "alpha" if config.masks == "alpha" and facts.transparent else ""


def _folder_repeats(name: str) -> int:
    """The N of the innermost folder called `N_name` that an image lies in, otherwise 1; more is a date or a name."""
    for folder in reversed(name.split("/")[:-1]):
        match = _REPEAT_FOLDER.match(folder)
        if match and len(number := match[1].lstrip("0")) <= 4 and int(number or 0) <= MOST_REPEATS:
            return int(number or 0)
    return 1
