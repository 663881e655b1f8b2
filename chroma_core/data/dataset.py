"""How a data set is read, as one frozen value."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from .settings import Settings

Resolution = Annotated[int, Field(ge=32, le=4096)]
CaptionSource = Literal["files", "metadata", "filenames", "fixed"]


class DatasetConfig(Settings):
    """A folder of pictures, where their captions come from, and how both are used. Explained in docs/datasets.md.

    `resolution` (one number) is accepted in place of `resolutions`; 0 or nothing means the flavour's own size.
    Everything about captions is described in `captions`, about sizes in `buckets`, about variants in `views`.

    `repeat_folders`: pictures below a sub-folder `N_name` count N times (kohya's convention).
    `weight`: how often a picture of this set is used compared with one of another set; without effect on a single set.
    `regularisation`, `sigma_bias`: carried by every sample of the set; the objective says what they do.
    """

    folder: str
    resolutions: tuple[Resolution, ...] = ()
    alignment: int = Field(default=64, ge=16, le=512, multiple_of=16)
    repeats: int = Field(default=1, ge=1)
    repeat_folders: bool = True
    weight: float = Field(default=1.0, ge=0.001, le=1000)
    trigger: str = ""
    caption_source: CaptionSource = "files"
    caption_extension: str = ".txt"
    caption_column: str = Field(default="text", min_length=1)
    caption_prefix: str = ""
    caption_suffix: str = ""
    caption_dropout: float = Field(default=0.1, ge=0, le=1)
    tag_shuffles: int = Field(default=0, ge=0, le=64)
    keep_tags: int = Field(default=0, ge=0)
    default_caption: str | None = None
    missing_caption: Literal["skip", "error", "empty"] = "skip"
    flip: bool = False
    upscale: bool = False
    crop: Literal["centre", "random"] = "centre"
    random_crops: int = Field(default=4, ge=1, le=64)
    latents: Literal["mean", "sample"] = "mean"
    posterior_samples: int = Field(default=4, ge=1, le=64)
    background: Literal["white", "black"] = "white"
    masks: Literal["none", "files", "alpha"] = "none"
    mask_floor: float = Field(default=0.0, ge=0, lt=1)
    regularisation: bool = False
    sigma_bias: float = Field(default=0.0, ge=-1, le=1)

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
