"""How a dataset is read, as one frozen value; and the base of all values that are parsed from what a user wrote."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from typing_extensions import Self

from ..errors import ConfigError, check_text, did_you_mean, nearest
from ..options import Option

Resolution = Annotated[int, Field(ge=32, le=4096)]
CaptionSource = Literal["files", "metadata", "filenames", "fixed"]
CaptionLines = Literal["each", "joined", "first"]


def option(default: Any, sentence: str, **about: Any) -> Any:
    """A field of `Settings` that is an option: `rank: int = option(16, "Size of the LoRA.", ge=1, le=1024, most=512)`.

    Args:
        default: `...` for one that the user has to give.
        sentence, about: of `Option`; what that does not know is pydantic's, the range for one.
    """
    shown = {field.name: about.pop(field.name) for field in dataclasses.fields(Option) if field.name in about}
    extra: dict[str, Any] = {"option": Option(sentence, **shown)}
    return Field(default, json_schema_extra=extra, **about)


class Settings(BaseModel):
    """A frozen value with no unknown fields, parsed from a node, a TOML file or JSON. `parse` is for a user's text."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def parse(cls, data: Any) -> Self:
        """`model_validate` with the errors as one paragraph. Raises ConfigError, also for text that is none."""
        check_text(data, "These settings cannot be used: ")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            lines = (_line(each, cls) for each in error.errors())
            raise ConfigError(f"These settings cannot be used: {'; '.join(lines)}.") from error


def _line(error: Any, model: type[BaseModel]) -> str:
    where = ".".join(map(str, error["loc"])) or "settings"
    if error["type"] == "extra_forbidden":
        meant = field_meant(model, error["loc"])
        return f"{where} is not a known option ({f'did you mean {meant}?' if meant else 'check its spelling'})"
    message = error["msg"].removeprefix("Value error, ") + choice_meant(error)
    if isinstance(error["input"], dict | list) or error["type"] == "missing":
        return f"{where}: {message}"
    return f"{where}: {message} (found {error['input']!r})"


def choice_meant(error: Any) -> str:
    """`did_you_mean` for a pydantic error about a value that is none of a few texts; empty for all others."""
    if error["type"] != "literal_error":
        return ""
    meant = did_you_mean(error["input"], re.findall(r"'([^']+)'", error["ctx"]["expected"]))
    return f".{meant}" if meant else ""


def field_meant(model: type[BaseModel], place: Sequence[int | str]) -> str | None:
    """The option that an unknown one may be meant for: one of that name in another table, else one near by.

    place: where it was found, as pydantic says it: names, numbers in lists, names of a union's members.
    """
    name = str(place[-1])
    elsewhere = (path for path in _paths(model) if path.rpartition(".")[2] == name)
    return next(elsewhere, None) or nearest(name, _fields_of(model_at(model, place[:-1])))


def model_at(model: type, place: Sequence[int | str]) -> Any:
    """The model or dataclass that reads what stands at a place in `model`; see `field_meant`."""
    for part in place:
        model = _inside(_fields_of(model).get(str(part))) or model
    return model


def _fields_of(owner: type) -> Mapping[str, Any]:
    """The types of the fields of a pydantic model or a dataclass by name."""
    if dataclasses.is_dataclass(owner):
        return {field.name: field.type for field in dataclasses.fields(owner)}
    return {name: field.annotation for name, field in owner.model_fields.items()}  # pyright: ignore


def _inside(annotation: Any) -> type | None:
    """The model or dataclass that a field's type is, or has in it."""
    if inspect.isclass(annotation) and (issubclass(annotation, BaseModel) or dataclasses.is_dataclass(annotation)):
        return annotation
    return next(filter(None, map(_inside, get_args(annotation))), None)


def _paths(owner: type, before: str = "") -> Iterator[str]:
    """The dotted names of all fields, those of tables in tables too."""
    for name, annotation in _fields_of(owner).items():
        yield f"{before}{name}"
        if inner := _inside(annotation):
            yield from _paths(inner, f"{before}{name}.")


class DatasetConfig(Settings):
    """A folder of images, where their captions come from, and how both are used. Explained in docs/datasets.md.

    `resolution` (one number) is accepted in place of `resolutions`; 0 or nothing means the flavour's own size.
    Everything about captions is described in `captions`, about sizes in `buckets`, about variants in `views`.
    """

    folder: str = option(..., "The folder with the images; sub-folders count. Relative to the job file.")
    resolutions: tuple[Resolution, ...] = option(
        (), "Sizes to train every image at: sides of a square with as many pixels. Empty: the model's own size."
    )
    alignment: int = option(
        64,
        "Sides are multiples of this; 32 crops less and makes more sizes.",
        ge=16,
        le=512,
        multiple_of=16,
        unit="pixels",
        least=32,
        most=64,
        step=32,
        advanced=True,
    )
    repeats: int = option(1, "Times each image counts in an epoch.", ge=1, most=1000)
    repeat_folders: bool = option(
        True, "Images in a sub-folder 3_dog count three times. Off: such a number means nothing.", advanced=True
    )
    weight: float = option(
        1.0,
        "With several sets: how often an image of this one is used compared with one of another.",
        ge=0.001,
        le=1000,
        step=0.05,
        round=0.001,
        advanced=True,
    )
    trigger: str = option(
        "",
        "The word that will call the concept, e.g. sks. It replaces [trigger] in captions and previews, and is put "
        "before captions that do not have it.",
    )
    caption_source: CaptionSource = option(
        "files",
        "files: .txt beside the image, each line one caption. metadata: metadata.jsonl or .csv. filenames: the "
        "file's name. fixed: default_caption for all.",
        advanced=True,
    )
    caption_extension: str = option(".txt", "End of the caption files' names, e.g. .caption.", advanced=True)
    caption_column: str = option("text", "The metadata's column that holds the caption.", min_length=1, advanced=True)
    caption_prefix: str = option("", "Put before every caption.", advanced=True)
    caption_suffix: str = option("", "Put after every caption.", advanced=True)
    caption_dropout: float = option(
        0.1, "Share of steps that train without the caption, which keeps guidance working.", ge=0, le=1, step=0.05
    )
    tag_shuffles: int = option(
        0, "Other orders of a caption's comma-separated tags to train with.", ge=0, le=64, advanced=True
    )
    keep_tags: int = option(0, "First tags that stay in front.", ge=0, most=64, advanced=True)
    default_caption: str | None = option(None, "For images without a caption file. Empty: see missing_caption.")
    missing_caption: Literal["skip", "error", "empty"] = option(
        "skip",
        "An image without caption and default caption: skip and count it, stop with an error, or train it with an "
        "empty caption.",
        advanced=True,
    )
    flip: bool = option(False, "Also train on mirrored images.", advanced=True)
    upscale: bool = option(False, "Enlarge images that are too small.", advanced=True)
    crop: Literal["centre", "random"] = option(
        "centre", "What is cut away to fit the size: both ends, or as random_crops says.", advanced=True
    )
    random_crops: int = option(4, "Different crops of an image, with crop random.", ge=1, le=64, advanced=True)
    latents: Literal["mean", "sample"] = option(
        "mean",
        "mean: the VAE's best guess, always the same. sample: one of posterior_samples random draws around it at "
        "each use.",
        advanced=True,
    )
    posterior_samples: int = option(
        4, "Draws from the VAE for each image, with latents sample.", ge=1, le=64, advanced=True
    )
    background: Literal["white", "black"] = option("white", "What lies behind transparent images.", advanced=True)
    masks: Literal["none", "files", "alpha"] = option(
        "none",
        "Train only where a mask is white: a -masklabel.png beside the image, or its transparency.",
        advanced=True,
    )
    mask_floor: float = option(
        0.0,
        "What black counts in a mask. 0.1 keeps the background from going wild.",
        ge=0,
        lt=1,
        most=0.95,
        step=0.05,
        advanced=True,
    )
    regularisation: bool = option(
        False,
        "Images of what should stay as it is: the LoRA is trained to change nothing on them. Combine such a set "
        "with another one.",
        advanced=True,
    )
    sigma_bias: float = option(
        0.0,
        "Moves the noise levels of this set: towards -1 more on fine detail, towards 1 more on composition.",
        ge=-1,
        le=1,
        step=0.05,
        advanced=True,
    )
    caption_lines: CaptionLines = option(
        "each",
        "What the lines of a caption file are. each: a caption each. joined: one caption, as ai-toolkit has it. first: "
        "only the first counts, as in kohya's sd-scripts.",
        advanced=True,
        since="0.1",
    )

    @model_validator(mode="before")
    @classmethod
    def _one_resolution(cls, data: Any) -> Any:
        if isinstance(data, dict) and "resolution" in data:
            data = dict(data)
            resolution = data.pop("resolution")
            data["resolutions"] = (resolution,) if resolution else ()
        return data

    @field_validator("crop", mode="before")
    @classmethod
    def _spelling(cls, value: Any) -> Any:
        return "centre" if value == "center" else value

    @field_validator("caption_extension")
    @classmethod
    def _with_a_dot(cls, value: str) -> str:
        name = value.strip().removeprefix(".")
        if not name or set(name) & set("/\\"):
            raise ValueError("caption_extension is the end of the caption files' names, such as .txt or .caption")
        return f".{name}"

    @model_validator(mode="after")
    def _fixed_needs_a_sentence(self) -> Self:
        if self.caption_source == "fixed" and self.default_caption is None:
            raise ValueError("caption_source = 'fixed' gives every image the default_caption, which is not set")
        return self

    def sizes(self, default: int) -> tuple[int, ...]:
        """The base resolutions in pixels, `default` when none was chosen."""
        return self.resolutions or (default,)

    def held_out(self, trigger: str) -> DatasetConfig:
        """The same folder for measuring: every image once, the same every time; `trigger` when it has none."""
        return self.model_copy(
            update={
                "trigger": self.trigger or trigger,
                "repeats": 1,
                "repeat_folders": False,
                "weight": 1.0,
                "flip": False,
                "crop": "centre",
                "latents": "mean",
                "tag_shuffles": 0,
                "regularisation": False,
            }
        )
