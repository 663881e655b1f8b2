"""How a data set is read, as one frozen value; and the base of all values that are parsed from what a user wrote."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from typing_extensions import Self

from ..errors import ConfigError
from ..options import Option

Resolution = Annotated[int, Field(ge=32, le=4096)]
CaptionSource = Literal["files", "metadata", "filenames", "fixed"]


class Settings(BaseModel):
    """A frozen value with no unknown fields, parsed from a node, a TOML file or JSON. `parse` is for a user's text."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def parse(cls, data: Any) -> Self:
        """`model_validate` with the errors as one paragraph. Raises ConfigError."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ConfigError(f"These settings cannot be used: {'; '.join(map(_line, error.errors()))}.") from error


def _line(error: Any) -> str:
    where = ".".join(map(str, error["loc"])) or "settings"
    if error["type"] == "extra_forbidden":
        return f"{where} is not a known option (check its spelling)"
    message = error["msg"].removeprefix("Value error, ")
    if isinstance(error["input"], dict | list) or error["type"] == "missing":
        return f"{where}: {message}"
    return f"{where}: {message} (found {error['input']!r})"


class DatasetConfig(Settings):
    """A folder of pictures, where their captions come from, and how both are used. Explained in docs/datasets.md.

    `resolution` (one number) is accepted in place of `resolutions`; 0 or nothing means the flavour's own size.
    Everything about captions is described in `captions`, about sizes in `buckets`, about variants in `views`.
    """

    folder: Annotated[str, Option("The folder with the images; sub-folders count. Relative to the job file.")]
    resolutions: Annotated[
        tuple[Resolution, ...],
        Option("Sizes to train every image at: sides of a square with as many pixels. Empty: the model's own size."),
    ] = ()
    alignment: Annotated[
        int,
        Field(ge=16, le=512, multiple_of=16),
        Option(
            "Sides are multiples of this; 32 crops less and makes more sizes.",
            unit="pixels",
            least=32,
            most=64,
            step=32,
            advanced=True,
        ),
    ] = 64
    repeats: Annotated[int, Field(ge=1), Option("Times each image counts in an epoch.", most=1000)] = 1
    repeat_folders: Annotated[
        bool, Option("Images in a sub-folder 3_dog count three times. Off: such a number means nothing.", advanced=True)
    ] = True
    weight: Annotated[
        float,
        Field(ge=0.001, le=1000),
        Option(
            "With several sets: how often an image of this one is used compared with one of another.",
            step=0.05,
            round=0.001,
            advanced=True,
        ),
    ] = 1.0
    trigger: Annotated[
        str,
        Option(
            "The word that will call the concept, e.g. sks. It replaces [trigger] in captions and previews, and is put "
            "before captions that do not have it."
        ),
    ] = ""
    caption_source: Annotated[
        CaptionSource,
        Option(
            "files: .txt beside the image, each line one caption. metadata: metadata.jsonl or .csv. filenames: the "
            "file's name. fixed: default_caption for all.",
            advanced=True,
        ),
    ] = "files"
    caption_extension: Annotated[str, Option("End of the caption files' names, e.g. .caption.", advanced=True)] = ".txt"
    caption_column: Annotated[
        str, Field(min_length=1), Option("The metadata's column that holds the caption.", advanced=True)
    ] = "text"
    caption_prefix: Annotated[str, Option("Put before every caption.", advanced=True)] = ""
    caption_suffix: Annotated[str, Option("Put after every caption.", advanced=True)] = ""
    caption_dropout: Annotated[
        float,
        Field(ge=0, le=1),
        Option("Share of steps that train without the caption, which keeps guidance working.", step=0.05),
    ] = 0.1
    tag_shuffles: Annotated[
        int,
        Field(ge=0, le=64),
        Option("Other orders of a caption's comma-separated tags to train with.", advanced=True),
    ] = 0
    keep_tags: Annotated[int, Field(ge=0), Option("First tags that stay in front.", most=64, advanced=True)] = 0
    default_caption: Annotated[str | None, Option("For images without a caption file. Empty: see missing_caption.")] = (
        None
    )
    missing_caption: Annotated[
        Literal["skip", "error", "empty"],
        Option(
            "An image without caption and default caption: skip and count it, stop with an error, or train it with an "
            "empty caption.",
            advanced=True,
        ),
    ] = "skip"
    flip: Annotated[bool, Option("Also train on mirrored images.", advanced=True)] = False
    upscale: Annotated[bool, Option("Enlarge images that are too small.", advanced=True)] = False
    crop: Annotated[
        Literal["centre", "random"],
        Option("What is cut away to fit the size: both ends, or as random_crops says.", advanced=True),
    ] = "centre"
    random_crops: Annotated[
        int, Field(ge=1, le=64), Option("Different crops of an image, with crop random.", advanced=True)
    ] = 4
    latents: Annotated[
        Literal["mean", "sample"],
        Option(
            "mean: the VAE's best guess, always the same. sample: one of posterior_samples random draws around it at "
            "each use.",
            advanced=True,
        ),
    ] = "mean"
    posterior_samples: Annotated[
        int, Field(ge=1, le=64), Option("Draws from the VAE for each image, with latents sample.", advanced=True)
    ] = 4
    background: Annotated[Literal["white", "black"], Option("What lies behind transparent images.", advanced=True)] = (
        "white"
    )
    masks: Annotated[
        Literal["none", "files", "alpha"],
        Option(
            "Train only where a mask is white: a -masklabel.png beside the image, or its transparency.", advanced=True
        ),
    ] = "none"
    mask_floor: Annotated[
        float,
        Field(ge=0, lt=1),
        Option(
            "What black counts in a mask. 0.1 keeps the background from going wild.",
            most=0.95,
            step=0.05,
            advanced=True,
        ),
    ] = 0.0
    regularisation: Annotated[
        bool,
        Option(
            "Images of what should stay as it is: the LoRA is trained to change nothing on them. Combine such a set "
            "with another one.",
            advanced=True,
        ),
    ] = False
    sigma_bias: Annotated[
        float,
        Field(ge=-1, le=1),
        Option(
            "Moves the noise levels of this set: towards -1 more on fine detail, towards 1 more on composition.",
            step=0.05,
            advanced=True,
        ),
    ] = 0.0

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
            raise ValueError("caption_source = 'fixed' gives every picture the default_caption, which is not set")
        return self

    def sizes(self, default: int) -> tuple[int, ...]:
        """The base resolutions in pixels, `default` when none was chosen."""
        return self.resolutions or (default,)

    def held_out(self, trigger: str) -> DatasetConfig:
        """The same folder for measuring: every picture once, the same every time; `trigger` when it has none."""
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
