"""From a folder to a list of captioned pictures, with everything left out named and counted."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ..errors import DataError
from .buckets import choose_bucket
from .captions import read_captions, with_trigger
from .picture_files import PICTURE_EXTENSIONS, UnreadablePicture, picture_size
from .settings import Settings

Resolution = Annotated[int, Field(ge=32, le=4096)]


class DatasetConfig(Settings):
    """A folder of pictures with caption files beside them, and how to read it.

    `resolution` (one number) is accepted in place of `resolutions`; 0 or nothing means the flavour's own size.
    """

    folder: str
    resolutions: tuple[Resolution, ...] = ()
    alignment: int = Field(default=64, ge=16, le=512, multiple_of=16)
    repeats: int = Field(default=1, ge=1)
    trigger: str = ""
    caption_extension: str = ".txt"
    caption_dropout: float = Field(default=0.1, ge=0, le=1)
    default_caption: str | None = None
    missing_caption: Literal["skip", "error", "empty"] = "skip"
    flip: bool = False
    upscale: bool = False

    @model_validator(mode="before")
    @classmethod
    def _one_resolution(cls, data: Any) -> Any:
        if isinstance(data, dict) and "resolution" in data:
            data = dict(data)
            resolution = data.pop("resolution")
            data["resolutions"] = (resolution,) if resolution else ()
        return data

    def sizes(self, default: int) -> tuple[int, ...]:
        """The base resolutions in pixels, `default` when none was chosen."""
        return self.resolutions or (default,)


@dataclass(frozen=True)
class Picture:
    """One usable picture. `name` is relative to the folder; captions carry the trigger; sizes in pixels."""

    path: Path
    name: str
    captions: tuple[str, ...]
    width: int
    height: int
    sha256: str


@dataclass(frozen=True)
class DatasetScan:
    """What a folder holds: usable pictures, what was skipped and why, and what looks doubtful."""

    config: DatasetConfig
    items: list[Picture]
    skipped: list[tuple[str, str]]
    warnings: list[str]


def scan(config: DatasetConfig) -> DatasetScan:
    """Read a data set folder (and its sub-folders) in a fixed order.

    A picture that cannot be opened, or has no caption, is skipped and named; see `missing_caption`. Pixels are not
    decoded here: a truncated file is found, skipped and named while latents are cached.

    Raises:
        DataError: the folder is missing or holds no usable picture, or a caption is missing under `error`.
        PromptError: a caption contains `[trigger]` and the data set has no trigger word.
    """
    folder = Path(config.folder)
    if not folder.is_dir():
        raise DataError(
            f"The data set folder '{config.folder}' does not exist. Check the name, or put a folder with pictures and "
            f"{config.caption_extension} captions there."
        )
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in PICTURE_EXTENSIONS and path.is_file() and not path.name.startswith(".")
    )
    if not files:
        raise DataError(
            f"The data set folder '{folder.name}' holds no picture. Put files ending in "
            f"{', '.join(sorted(PICTURE_EXTENSIONS))} there, each with a {config.caption_extension} caption of the "
            "same name."
        )
    items: list[Picture] = []
    skipped: list[tuple[str, str]] = []
    without_caption = 0
    for path in files:
        name = path.relative_to(folder).as_posix()
        try:
            width, height = picture_size(path)
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
        except (UnreadablePicture, OSError) as error:
            skipped.append((name, f"unreadable picture: {error}"))
            continue
        try:
            captions = _captions(path, config)
        except ValueError:
            skipped.append((name, "its caption file is not UTF-8 text"))
            continue
        if not captions:
            without_caption += 1
            if config.default_caption is not None:
                captions = (config.default_caption,)
            elif config.missing_caption == "empty":
                captions = ("",)
            elif config.missing_caption == "error":
                raise DataError(
                    f"The picture '{name}' in '{folder.name}' has no caption: there is no text in "
                    f"{path.with_suffix(config.caption_extension).name}. Write one, set a default caption, or choose "
                    "to skip such pictures."
                )
            else:
                skipped.append((name, f"no caption in {path.with_suffix(config.caption_extension).name}"))
                continue
        captions = tuple(with_trigger(caption, config.trigger) for caption in captions)
        items.append(Picture(path, name, captions, width, height, digest))
    if not items:
        raise DataError(
            f"None of the {len(files)} pictures in '{folder.name}' can be used: {describe_skipped(skipped)}. Repair "
            "them, add captions, or set a default caption."
        )
    return DatasetScan(config, items, skipped, _warnings(config, items, skipped, without_caption))


def describe_skipped(skipped: list[tuple[str, str]], limit: int = 5) -> str:
    """The first few skipped files with their reasons, as one phrase."""
    named = [f"{name} ({why})" for name, why in skipped[:limit]]
    more = len(skipped) - limit
    return ", ".join(named) + (f" and {more} more" if more > 0 else "")


def _captions(path: Path, config: DatasetConfig) -> tuple[str, ...]:
    try:
        return read_captions(path.with_suffix(config.caption_extension))
    except OSError:
        return ()


def _warnings(
    config: DatasetConfig, items: list[Picture], skipped: list[tuple[str, str]], without_caption: int
) -> list[str]:
    warnings = []
    if skipped:
        pictures = "1 picture was" if len(skipped) == 1 else f"{len(skipped)} pictures were"
        warnings.append(f"{pictures} skipped: {describe_skipped(skipped)}.")
    if without_caption and config.default_caption is not None:
        warnings.append(f"{without_caption} without a caption use the default caption.")
    elif without_caption and config.missing_caption == "empty":
        warnings.append(f"{without_caption} without a caption are trained with an empty one.")
    twins = [names for names in _same_content(items) if len(names) > 1]
    if twins:
        warnings.append(f"Identical pictures: {'; '.join(' = '.join(names) for names in twins[:3])}.")
    captions = Counter(caption for item in items for caption in item.captions)
    if len(items) > 3 and len(captions) == 1:
        warnings.append("All captions are the same: the LoRA cannot tell the concept from the rest of the picture.")
    small = [item.name for item in items for size in config.resolutions[:1] if item.width * item.height < size**2]
    if small:
        fate = "are enlarged" if config.upscale else "are trained at their own, smaller size"
        warnings.append(f"{len(small)} smaller than the training resolution {fate}, e.g. {small[0]}.")
    cramped = [item.name for item in items if min(item.width, item.height) < config.alignment]
    if cramped:
        warnings.append(f"{len(cramped)} with a side below {config.alignment} pixels are enlarged, e.g. {cramped[0]}.")
    return warnings


def _same_content(items: list[Picture]) -> list[list[str]]:
    groups: dict[str, list[str]] = {}
    for item in items:
        groups.setdefault(item.sha256, []).append(item.name)
    return list(groups.values())


def bucket_of(picture: Picture, config: DatasetConfig, resolution: int) -> tuple[int, int]:
    """The bucket (width, height) of a picture at one base resolution."""
    return choose_bucket(picture.width, picture.height, resolution, config.alignment, config.upscale)
