"""The widgets that all sources of a data set share, each a field of `DatasetConfig`, and what these nodes return."""

from __future__ import annotations

from typing import Any, get_args

from comfy_api.latest import io, ui

from ..chroma_core.data.contact_sheet import summary
from ..chroma_core.data.dataset import CaptionSource, DatasetConfig
from ..chroma_core.data.scan import scan
from ..chroma_core.errors import ConfigError
from .dataset_preview import FALLBACK_SIZE, sheet_of
from .sockets import ChromaDatasetType, to_image

_ADVANCED: dict[str, Any] = {"optional": True, "advanced": True}

_WIDGETS: dict[str, tuple[Any, dict[str, Any]]] = {
    "trigger": (
        io.String,
        {
            "default": "",
            "tooltip": "The word that will call the concept, e.g. sks. It replaces [trigger] in captions and previews, "
            "and is put before captions that do not have it.",
        },
    ),
    "resolution": (
        io.Int,
        {
            "default": 0,
            "min": 0,
            "max": 4096,
            "step": 32,
            "tooltip": "Pixels a side of a square picture with as many pixels as those trained on. 0: the model's own "
            "size.",
        },
    ),
    "repeats": (
        io.Int,
        {"default": 1, "min": 1, "max": 1000, "tooltip": "Times each picture counts in an epoch."},
    ),
    "caption_dropout": (
        io.Float,
        {
            "default": 0.1,
            "min": 0.0,
            "max": 1.0,
            "step": 0.05,
            "tooltip": "Share of steps that train without the caption, which keeps guidance working.",
        },
    ),
    "default_caption": (
        io.String,
        {"default": "", "tooltip": "For pictures without a caption file. Empty: see missing_caption."},
    ),
    "missing_caption": (
        io.Combo,
        {
            "options": ["skip", "error", "empty"],
            "default": "skip",
            "tooltip": "A picture without caption and default caption: skip and count it, stop with an error, or train "
            "it with an empty caption.",
            **_ADVANCED,
        },
    ),
    "flip": (io.Boolean, {"default": False, "tooltip": "Also train on mirrored pictures.", **_ADVANCED}),
    "caption_source": (
        io.Combo,
        {
            "options": list(get_args(CaptionSource)),
            "default": "files",
            "tooltip": "files: .txt beside the picture, each line one caption. metadata: metadata.jsonl or .csv. "
            "filenames: the file's name. fixed: default_caption for all.",
            **_ADVANCED,
        },
    ),
    "caption_prefix": (io.String, {"default": "", "tooltip": "Put before every caption.", **_ADVANCED}),
    "caption_suffix": (io.String, {"default": "", "tooltip": "Put after every caption.", **_ADVANCED}),
    "tag_shuffles": (
        io.Int,
        {
            "default": 0,
            "min": 0,
            "max": 64,
            "tooltip": "Other orders of a caption's comma-separated tags to train with.",
            **_ADVANCED,
        },
    ),
    "keep_tags": (
        io.Int,
        {"default": 0, "min": 0, "max": 64, "tooltip": "First tags that stay in front.", **_ADVANCED},
    ),
    "more_resolutions": (
        io.String,
        {"default": "", "tooltip": "Further sizes to train every picture at, e.g. 768, 1024.", **_ADVANCED},
    ),
    "alignment": (
        io.Int,
        {
            "default": 64,
            "min": 32,
            "max": 64,
            "step": 32,
            "tooltip": "Sides are multiples of this; 32 crops less and makes more sizes.",
            **_ADVANCED,
        },
    ),
    "upscale": (io.Boolean, {"default": False, "tooltip": "Enlarge pictures that are too small.", **_ADVANCED}),
    "crop": (
        io.Combo,
        {
            "options": ["centre", "random"],
            "default": "centre",
            "tooltip": "What is cut away to fit the size: both ends, or as random_crops says.",
            **_ADVANCED,
        },
    ),
    "masks": (
        io.Combo,
        {
            "options": ["none", "files", "alpha"],
            "default": "none",
            "tooltip": "Train only where a mask is white: a -masklabel.png beside it, or its transparency.",
            **_ADVANCED,
        },
    ),
    "regularisation": (
        io.Boolean,
        {
            "default": False,
            "tooltip": "Pictures of what should stay as it is: the LoRA is trained to change nothing on them. Combine "
            "such a set with another one.",
            **_ADVANCED,
        },
    ),
    "weight": (
        io.Float,
        {
            "default": 1.0,
            "min": 0.001,
            "max": 1000.0,
            "step": 0.05,
            "round": 0.001,
            "tooltip": "With several sets: how often a picture of this one is used compared with one of another.",
            **_ADVANCED,
        },
    ),
    "sigma_bias": (
        io.Float,
        {
            "default": 0.0,
            "min": -1.0,
            "max": 1.0,
            "step": 0.05,
            "tooltip": "Moves the noise levels of this set: towards -1 more on fine detail, towards 1 more on "
            "composition.",
            **_ADVANCED,
        },
    ),
    "latents": (
        io.Combo,
        {
            "options": ["mean", "sample"],
            "default": "mean",
            "tooltip": "mean: the VAE's best guess, always the same. sample: one of posterior_samples random draws "
            "around it at each use.",
            **_ADVANCED,
        },
    ),
    "posterior_samples": (
        io.Int,
        {"default": 4, "min": 1, "max": 64, "tooltip": "Draws a picture, with latents sample.", **_ADVANCED},
    ),
    "random_crops": (
        io.Int,
        {"default": 4, "min": 1, "max": 64, "tooltip": "Different cuts of a picture, with crop random.", **_ADVANCED},
    ),
    "mask_floor": (
        io.Float,
        {
            "default": 0.0,
            "min": 0.0,
            "max": 0.95,
            "step": 0.05,
            "tooltip": "What black counts in a mask. 0.1 keeps the background from going wild.",
            **_ADVANCED,
        },
    ),
    "background": (
        io.Combo,
        {
            "options": ["white", "black"],
            "default": "white",
            "tooltip": "What lies behind transparent pictures.",
            **_ADVANCED,
        },
    ),
    "caption_extension": (
        io.String,
        {"default": ".txt", "tooltip": "End of the caption files' names, e.g. .caption.", **_ADVANCED},
    ),
    "caption_column": (
        io.String,
        {"default": "text", "tooltip": "The metadata's column that holds the caption.", **_ADVANCED},
    ),
    "repeat_folders": (
        io.Boolean,
        {
            "default": True,
            "tooltip": "Pictures in a sub-folder 3_dog count three times. Off: such a number means nothing.",
            **_ADVANCED,
        },
    ),
}


def widgets(*names: str) -> list[Any]:
    """Inputs of a node by the names of their fields, in that order."""
    return [kind.Input(name, **options) for name, (kind, options) in ((name, _WIDGETS[name]) for name in names)]


def outputs() -> list[Any]:
    """What every source of a data set gives."""
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


def shown(node: type[io.ComfyNode], config: DatasetConfig, remark: str = "") -> io.NodeOutput:
    """The outputs of a node for one data set, looked at: contact sheet and summary, with `remark` as its last line."""
    found = scan(config)
    text = "\n".join(filter(None, [summary(found, FALLBACK_SIZE), remark]))
    preview = ui.PreviewImage(to_image([sheet_of(found, FALLBACK_SIZE)]), cls=node).as_dict()
    return io.NodeOutput((config,), text, ui={**preview, "text": (text,)})


def _numbers(text: str) -> list[int]:
    """Whole numbers between commas or blanks. Raises ConfigError."""
    try:
        return [int(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise ConfigError(f"more_resolutions is “{text}”; it takes whole numbers of pixels, e.g. 768, 1024.") from None
