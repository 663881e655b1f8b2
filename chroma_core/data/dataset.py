"""How a dataset is read, as one frozen value."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from ..settings import Settings, option

Resolution = Annotated[int, Field(ge=32, le=4096)]
CaptionSource = Literal["files", "metadata", "filenames", "fixed"]
CaptionLines = Literal["each", "joined", "first"]


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
