"""A dataset folder being made: what is in it, image by image; captions written, crops moved, files exchanged.

Nothing is deleted: what is taken out goes into a numbered folder below `.removed`, which a scan does not look into, and
comes back from there. A caption is written only over the text that its writer saw. What was done is kept by `history`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from pathlib import Path

from typing_extensions import TypedDict

from ..errors import DataError, check_text, first_few
from ..files import replace, write_atomic, write_json
from .buckets import choose_bucket, crop_box
from .captions import contains_trigger, read_captions
from .dataset import DatasetConfig
from .images import ImageFacts, UnreadableImage, can_convert, image_extensions, known_extensions
from .remarks import Remark
from .remembered import Remembered
from .scan import DatasetScan, scan
from .views import CENTRE, CROPS, CROPS_FORMAT, crops_or_centred, is_mask, mask_file, read_crops
from .warnings import image_warnings

REMOVED = ".removed"
SWAPPED = ".swapped"
CAPTION = ".txt"
PLUGINS = {".heic": "pillow-heif", ".heif": "pillow-heif", ".jxl": "pillow-jxl-plugin"}
"""What makes Pillow read a format."""


class Changed(DataError):
    """What was to be written over is not what was seen, or something else stands there by now."""


class Entry(TypedDict):
    """One image of a folder.

    name: relative to the folder, with forward slashes. size: width and height in pixels as displayed; None when it
    cannot be read. bucket: width and height in pixels that it is trained at. frame: what of it is trained: left, top,
    right, bottom, as shares of its width and height. crop: where the frame lies on the overhang, 0..1. caption: the
    text of its caption file, "" without one; None when that cannot be read. skipped: why it is not trained on; empty
    when it is. notes: what to warn of. twin: the name of the first image with the same content, if that is another
    one. version: changes when the file does. mask: the same of its loss mask; empty without one. convertible: it is in
    a format that is not read, and can be made a PNG.
    """

    name: str
    size: tuple[int, int] | None
    bucket: tuple[int, int] | None
    frame: tuple[float, float, float, float] | None
    crop: float
    caption: str | None
    skipped: str
    notes: list[str]
    twin: str
    version: str
    mask: str
    convertible: bool


class StandIn(TypedDict):
    """A word that stands for the trigger word in the captions of these images."""

    word: str
    names: list[str]


class TriggerCheck(TypedDict):
    """Which of how many captioned images lack the trigger word in a caption, and what stands there in its place."""

    trigger: str
    of: int
    lacking: list[str]
    stands_as: list[StandIn]


def entries(config: DatasetConfig, size: int, known: Remembered) -> tuple[list[Entry], DatasetScan]:
    """Every image of a folder, also those that are skipped, in the order of a scan; and what the scan says.

    Args:
        size: pixels, the model's, for a dataset without a resolution of its own.
    Raises:
        DataError: the folder cannot be read.
    """
    found = scan(config, size, known, unfinished=True)
    folder = Path(config.folder)
    crops, _ = crops_or_centred(folder)  # of which the scan warns
    skipped, warned = dict(found.skipped), image_warnings(config, found.items, size)
    used = {item.name: item for item in found.items}
    firsts: dict[str, str] = {}
    made: list[Entry] = []
    for name in sorted([*used, *skipped], key=lambda name: os.path.normcase(name).split("/")):
        path, facts, digest = folder / name, None, ""
        try:
            facts, digest = known.facts(path)
        except (OSError, UnreadableImage):
            pass  # which is why it is skipped
        first = firsts.setdefault(digest, name) if digest else name
        crop = crops.get(name, CENTRE)
        bucket, frame = _frame(facts, config, config.sizes(size)[0], crop) if facts else (None, None)
        made.append(
            Entry(
                name=name,
                size=(facts.width, facts.height) if facts else None,
                bucket=bucket,
                frame=frame,
                crop=crop,
                caption=caption_text(path),
                skipped=skipped.get(name, ""),
                notes=warned.get(name, []),
                twin=first if first != name else "",
                version=_version(path),
                mask=_version(mask_file(path)),
                convertible=False,
            )
        )
    made += [_foreign(folder / name, name) for name in found.foreign]
    return sorted(made, key=lambda entry: os.path.normcase(entry["name"]).split("/")), found


def _foreign(path: Path, name: str) -> Entry:
    """An image in a format that is not read."""
    convertible, plugin = can_convert(path), PLUGINS.get(path.suffix.lower(), "")
    code = ("convert" if convertible else "save") + ("_or_install" if plugin else "")
    return Entry(
        name=name,
        size=None,
        bucket=None,
        frame=None,
        crop=CENTRE,
        caption=caption_text(path),
        skipped=Remark(code, ending=path.suffix, plugin=plugin),
        notes=[],
        twin="",
        version=_version(path),
        mask="",
        convertible=convertible,
    )


def _frame(
    facts: ImageFacts, config: DatasetConfig, resolution: int, crop: float
) -> tuple[tuple[int, int], tuple[float, float, float, float]]:
    width, height = facts.width, facts.height
    bucket = choose_bucket(width, height, resolution, config.alignment, config.upscale)
    left, top, right, bottom = crop_box(width, height, bucket, crop)
    return bucket, (left / width, top / height, right / width, bottom / height)


def _version(path: Path) -> str:
    try:
        found = path.stat()
    except OSError:
        return ""
    return f"{found.st_size}-{found.st_mtime_ns}"


# --- names ------------------------------------------------------------------------------------------------------------


def image_path(folder: Path, name: str, foreign: bool = False) -> Path:
    """The image of that name in a dataset folder; with `foreign` also one in a format that is not read. Raises
    DataError for any other file, and for one that a link to another place leads to."""
    parts = name.split("/")
    try:
        path = folder.joinpath(*parts)
        ours = (
            not any(part.startswith(".") or not part or "\\" in part for part in parts)
            and path.suffix.lower() in (known_extensions() if foreign else image_extensions())
            and path.is_file()
            and path.parent.resolve().is_relative_to(folder.resolve())
        )
    except (OSError, ValueError):  # too long for a name, or with a zero byte in it
        ours = False
    if not ours:
        raise DataError(f"There is no image '{name[:200]}' in the dataset '{folder.name}'. Refresh the list.")
    return path


def caption_path(image: Path) -> Path:
    """Where an image's caption stands, or would: `.txt`, however its ending is spelt. Raises DataError for a link."""
    spelt = [image.with_suffix(ending) for ending in (CAPTION, CAPTION.upper(), CAPTION.title())]
    path = next(filter(Path.exists, spelt), spelt[0])
    if path.is_symlink():
        raise DataError(f"The caption '{path.name}' is a link to another file. Copy that file into the dataset.")
    return path


def _literal(text: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", text)


def caption_text(image: Path) -> str | None:
    """The text of an image's caption file with plain line ends, "" without one; None when it cannot be read."""
    try:
        text = caption_path(image).read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError, DataError):
        return None
    return plain(text)


def plain(text: str) -> str:
    """A caption as its file holds it."""
    return text.replace("\r\n", "\n").replace("\r", "\n").strip("\n")


# --- changes ----------------------------------------------------------------------------------------------------------


def write_captions(folder: Path, texts: Mapping[str, str], seen: Mapping[str, str]) -> None:
    """Write captions by the images' names, all of them or, where one cannot be, none.

    Args:
        seen: the texts that these are written over, as `caption_text` gave them; a name that is left out is not asked.
    Raises:
        DataError: no such image, or a caption file that is a link.
        Changed: another text stands there by now.
        ConfigError: a text that no file can hold.
    """
    check_text(dict(texts))
    files = {name: caption_path(image_path(folder, name, foreign=True)) for name in texts}
    other = [name for name in texts if name in seen and caption_text(folder / name) != seen[name]]
    if other:
        raise Changed(
            f"The captions of {first_few(other)} were changed elsewhere meanwhile; nothing was written. Refresh, and "
            "edit them again."
        )
    for name, path in files.items():
        write_atomic(path, plain(texts[name]) + "\n" if texts[name].strip() else "")


def move_crops(folder: Path, crops: Mapping[str, float]) -> None:
    """Say where images are cropped, from 0 (left or top) to 1.

    Raises DataError for a name that is no image, and when what was said before cannot be read.
    """
    for name in crops:
        image_path(folder, name)
    now = {**read_crops(folder), **{name: round(min(1.0, max(0.0, at)), 4) for name, at in crops.items()}}
    path = folder / CROPS
    if path.is_symlink():
        raise DataError(f"'{CROPS}' in the dataset '{folder.name}' is a link to another file. Remove the link.")
    write_json(path, {"format": CROPS_FORMAT, "crops": {name: at for name, at in now.items() if at != CENTRE}})


def files_of(folder: Path, names: Sequence[str]) -> list[str]:
    """Images with their captions and masks, as names in the folder. Raises DataError for a name that is none.

    A caption that an image of another format shares stays with that one.
    """
    images = [image_path(folder, name, foreign=True) for name in dict.fromkeys(names)]
    leaving, files = set(images), list(images)
    for path in images:
        others = path.parent.glob(f"{_literal(path.stem)}.*")
        if not any(other.suffix.lower() in image_extensions() and other not in leaving for other in others):
            files += [each for each in (caption_path(path), mask_file(path)) if each.is_file() and not is_mask(path)]
    return [path.relative_to(folder).as_posix() for path in dict.fromkeys(files)]


def files_aside(folder: Path, batch: str) -> list[str]:
    """What lies in a numbered folder below `.removed`, as names in the dataset. Raises DataError when nothing does."""
    root = removed_folder(folder) / batch
    files = sorted(path for path in root.rglob("*") if path.is_file()) if batch.isdecimal() and root.is_dir() else []
    if not files:
        raise DataError(f"There is nothing removed under the number '{batch[:20]}' in the dataset '{folder.name}'.")
    return [path.relative_to(root).as_posix() for path in files]


def exchange(folder: Path, batch: str, leaving: Sequence[str], coming: Sequence[str]) -> None:
    """Move files out of the dataset into a numbered folder below `.removed`, and others from there to their places.

    A name may be both: the two files change places. Raises Changed, and moves nothing, when a file is gone, or another
    one stands where one is to come.
    """
    root = removed_folder(folder) / batch
    if taken := [name for name in coming if name not in leaving and (folder / name).exists()]:
        raise Changed(
            f"There is a file of that name in the dataset again: {first_few(taken)}. Rename or remove it first."
        )
    places = [(folder, name) for name in leaving] + [(root, name) for name in coming]
    if gone := [name for place, name in places if not (place / name).is_file()]:
        raise Changed(f"A file is no longer where it was: {first_few(gone)}. Refresh.")
    both = set(leaving) & set(coming)
    for name in leaving:
        _move(folder / name, folder, f"{REMOVED}/{batch}/{name}{SWAPPED if name in both else ''}")
    for name in coming:
        _move(root / name, folder, name)
    for name in both:
        replace(root / f"{name}{SWAPPED}", root / name)
    for where in sorted((path for path in (root, *root.rglob("*")) if path.is_dir()), reverse=True):
        if not any(where.iterdir()):
            where.rmdir()


def removed(folder: Path) -> dict[str, list[str]]:
    """The images that are set aside, by their batch, the last first."""
    root = folder / REMOVED
    batches = sorted((each for each in root.glob("*") if each.name.isdecimal()), key=lambda each: -int(each.name))
    found = {
        batch.name: sorted(path.relative_to(batch).as_posix() for path in batch.rglob("*") if is_image(path))
        for batch in batches
    }
    return {batch: names for batch, names in found.items() if names}


def is_image(path: Path) -> bool:
    """Whether a file is an image by its name, read here or not, and no mask."""
    return path.suffix.lower() in known_extensions() and not is_mask(path)


def removed_folder(folder: Path) -> Path:
    """Where what is taken out of a dataset lies. Raises DataError when it is a link."""
    root = folder / REMOVED
    if root.is_symlink():
        raise DataError(f"'{REMOVED}' in the dataset '{folder.name}' is a link to another place. Remove the link.")
    return root


def _move(source: Path, folder: Path, name: str) -> None:
    target = folder / name
    if not all(end.parent.resolve().is_relative_to(folder.resolve()) for end in (source, target)):
        raise DataError(f"'{name}' in the dataset '{folder.name}' leads to another place. Remove the link on the way.")
    target.parent.mkdir(parents=True, exist_ok=True)
    replace(source, target)


# --- the trigger word -------------------------------------------------------------------------------------------------

USUAL = ("sks", "ohwx", "zwx", "tok", "<s1>", "[trigger]")
"""Words that other guides and trainers have for the trigger word."""
ALIKE = 0.66
"""Share of letters from which on a word may be the trigger misspelt."""


def trigger_check(captions: Mapping[str, Sequence[str]], trigger: str) -> TriggerCheck:
    """Which captions lack the trigger word, and what stands there in its place.

    A word stands for the trigger if no caption with the trigger has it, and it is one that others use, or the trigger
    with a letter wrong, or stands between the same two words as the trigger does in another caption.

    Args:
        captions: by the images' names; images without one are not counted.
    """
    words = {name: [_words(text) for text in texts] for name, texts in captions.items() if texts}
    has = {name: all(contains_trigger(text, trigger) for text in captions[name]) for name in words}
    lacking = [name for name, there in has.items() if not there] if trigger else []
    with_it = [line for name in words if has[name] for line in words[name]]
    ordinary = {word for line in with_it for word in line}
    own = _words(trigger)
    places = {around for line in with_it for at, around in _around(line) if [at] == own}
    found: dict[str, list[str]] = {}
    for name in lacking:
        for line in words[name]:
            for word, around in _around(line):
                alike = len(own) == 1 and len(word) > 1 and SequenceMatcher(None, word, own[0]).ratio() >= ALIKE
                if word in ordinary or [word] == own or not (word in USUAL or alike or around in places):
                    continue
                if name not in found.setdefault(word, []):
                    found[word].append(name)
    ranked = sorted(found.items(), key=lambda each: (-len(each[1]), each[0]))
    stands_as: list[StandIn] = [{"word": word, "names": names} for word, names in ranked]
    return {"trigger": trigger, "of": len(words), "lacking": lacking, "stands_as": stands_as}


def _words(text: str) -> list[str]:
    return re.findall(r"\[trigger\]|<\w+>|\w+", text.lower())


def _around(line: Sequence[str]) -> list[tuple[str, tuple[str, str]]]:
    """Each word with the one before and the one after it; the ends of the line count as words."""
    padded = ["", *line, ""]
    return [(padded[i], (padded[i - 1], padded[i + 1])) for i in range(1, len(padded) - 1)]


def trigger_of_folder(found: Sequence[Entry], folder: Path, trigger: str) -> TriggerCheck:
    """`trigger_check` of the captions that files beside the images hold."""
    captions: dict[str, Sequence[str]] = {}
    for entry in found:
        if entry["caption"]:
            captions[entry["name"]] = read_captions(caption_path(folder / entry["name"]))
    return trigger_check(captions, trigger)
