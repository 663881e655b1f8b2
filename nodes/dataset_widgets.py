"""The widgets that all sources of a dataset share, each a field of `DatasetConfig`, and what these nodes return."""

from __future__ import annotations

from copy import copy
from typing import Any

from comfy_api.latest import io, ui

from ..chroma_core.data.contact_sheet import summary
from ..chroma_core.data.dataset import DatasetConfig
from ..chroma_core.errors import ConfigError
from .dataset_preview import FALLBACK_SIZE, look, sheet_of
from .option_widgets import ADVANCED, widget
from .sockets import ChromaDatasetOptionsType, ChromaDatasetType, to_image

OWN = {
    "resolution": io.Int.Input(
        "resolution",
        default=0,
        min=0,
        max=4096,
        step=32,
        tooltip="Pixels a side of a square image with as many pixels as those trained on. 0: the model's own size.",
    ),
    "more_resolutions": io.String.Input(
        "more_resolutions",
        default="",
        tooltip="Further sizes to train every image at, e.g. 768, 1024.",
        **ADVANCED,
    ),
    "default_caption": widget(DatasetConfig, "default_caption", default=""),
}
"""Widgets that are no option with the same values; `config_from` and `widgets_of` say what they mean."""


FOLDED = (
    "missing_caption", "flip", "caption_source", "caption_prefix", "caption_suffix", "tag_shuffles", "keep_tags",
    "more_resolutions", "alignment", "upscale", "crop", "masks", "regularisation", "weight", "sigma_bias", "latents",
    "posterior_samples", "random_crops", "mask_floor", "background", "caption_extension", "caption_column",
    "repeat_folders", "caption_lines",
)  # fmt: skip
"""Widgets that few people set, in the order in which saved workflows hold them: new ones go to the end."""
OF_FILES = ("caption_source", "masks", "caption_extension", "caption_column", "repeat_folders", "caption_lines")
"""Those of them that images from other nodes have no use for."""
FIRST = (
    "missing_caption", "caption_prefix", "caption_suffix", "tag_shuffles", "keep_tags", "flip", "more_resolutions",
    "crop", "masks", "regularisation",
)  # fmt: skip
"""Those that Chroma Dataset Options shows."""


def options_input() -> Any:
    """Where Chroma Dataset Options is linked."""
    return ChromaDatasetOptionsType.Input(
        "options",
        optional=True,
        tooltip="From Chroma Dataset Options, in place of the advanced inputs. What both set in different ways is an "
        "error.",
    )


def widgets(*names: str) -> list[Any]:
    """Inputs of a node by the names of their options, in that order."""
    return [copy(OWN[name]) if name in OWN else widget(DatasetConfig, name) for name in names]


def outputs() -> list[Any]:
    """What every source of a dataset gives."""
    return [
        ChromaDatasetType.Output("dataset", tooltip="For Chroma Train LoRA and Chroma Combine Datasets."),
        io.String.Output("summary", tooltip="Counts, sizes and warnings in words."),
    ]


def config_from(
    folder: str, resolution: int, more_resolutions: str = "", default_caption: str = "", **fields: Any
) -> DatasetConfig:
    """A `DatasetConfig` from a node's widgets. Raises ConfigError."""
    sizes = [resolution, *_numbers(more_resolutions)]
    return DatasetConfig.parse(
        {
            **fields,
            "folder": folder,
            "resolutions": tuple(size for size in sizes if size),
            "default_caption": default_caption or None,
        }
    )


def widgets_of(config: DatasetConfig) -> dict[str, Any]:
    """The widgets that mean this dataset: the way back from `config_from`, without the folder."""
    values = config.model_dump(exclude={"folder", "resolutions"})
    first, *more = config.resolutions or (0,)
    return values | {
        "resolution": first,
        "more_resolutions": ", ".join(map(str, more)),
        "default_caption": config.default_caption or "",
    }


def shown(node: type[io.ComfyNode], config: DatasetConfig, remark: str = "") -> io.NodeOutput:
    """The outputs of a node for one dataset, looked at: contact sheet and summary, with `remark` as its last line."""
    found = look(config)
    text = "\n".join(filter(None, [summary(found, FALLBACK_SIZE), remark]))
    preview = ui.PreviewImage(to_image([sheet_of(found, FALLBACK_SIZE)]), cls=node).as_dict()
    return io.NodeOutput((config,), text, ui={**preview, "text": (text,)})


def _numbers(text: str) -> list[int]:
    """Whole numbers between commas or blanks. Raises ConfigError."""
    try:
        return [int(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise ConfigError(f"more_resolutions is “{text}”; it takes whole numbers of pixels, e.g. 768, 1024.") from None
