"""Data sets: a folder of captioned pictures, looked at before anything is trained on it."""

from __future__ import annotations

from typing import Any, get_args

from comfy_api.latest import io, ui

from ..chroma_core.data.contact_sheet import contact_sheet, summary
from ..chroma_core.data.dataset import CaptionSource, DatasetConfig
from ..chroma_core.data.scan import scan
from ..chroma_core.errors import ConfigError
from . import host
from .sockets import ChromaDatasetType, schema, to_image

ADVANCED: dict[str, Any] = {"optional": True, "advanced": True}
SHOWN = 16
"""Pictures on the contact sheet."""
FALLBACK_SIZE = 1024
"""Pixels that the sheet's buckets are computed for when the size is left to the model."""


class ChromaDataset(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        names = host.dataset_names()
        return schema(
            node_id="ChromaDataset",
            display_name="Chroma Dataset",
            description="A folder of pictures with .txt captions beside them. Shows what will be trained on and what "
            "was skipped.",
            search_aliases=["training images", "load dataset", "captions", "train lora dataset"],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=names or [""],
                    default=names[0] if names else "",
                    tooltip="A folder in the host's input folder, in the pack's example_datasets, or under a place "
                    "listed in user/chromakit/config.toml. Press R to refresh the list.",
                ),
                io.String.Input(
                    "trigger",
                    default="",
                    tooltip="The word that will call the concept, e.g. sks. It replaces [trigger] in captions and "
                    "previews, and is put before captions that do not have it.",
                ),
                io.Int.Input(
                    "resolution",
                    default=0,
                    min=0,
                    max=4096,
                    step=32,
                    tooltip="Pixels a side of a square picture with as many pixels as those trained on. 0: the "
                    "model's own size.",
                ),
                io.Int.Input("repeats", default=1, min=1, max=1000, tooltip="Times each picture counts in an epoch."),
                io.Float.Input(
                    "caption_dropout",
                    default=0.1,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Share of steps that train without the caption, which keeps guidance working.",
                ),
                io.String.Input(
                    "default_caption",
                    default="",
                    tooltip="For pictures without a caption file. Empty: see missing_caption.",
                ),
                io.Combo.Input(
                    "missing_caption",
                    options=["skip", "error", "empty"],
                    default="skip",
                    tooltip="A picture without caption and default caption: skip and count it, stop with an error, "
                    "or train it with an empty caption.",
                    optional=True,
                    advanced=True,
                ),
                io.Boolean.Input(
                    "flip", default=False, tooltip="Also train on mirrored pictures.", optional=True, advanced=True
                ),
                io.Combo.Input(
                    "caption_source",
                    options=list(get_args(CaptionSource)),
                    default="files",
                    tooltip="files: .txt beside the picture, each line one caption. metadata: metadata.jsonl or .csv. "
                    "filenames: the file's name. fixed: default_caption for all.",
                    **ADVANCED,
                ),
                io.String.Input("caption_prefix", default="", tooltip="Put before every caption.", **ADVANCED),
                io.String.Input("caption_suffix", default="", tooltip="Put after every caption.", **ADVANCED),
                io.Int.Input(
                    "tag_shuffles",
                    default=0,
                    min=0,
                    max=64,
                    tooltip="Other orders of a caption's comma-separated tags to train with.",
                    **ADVANCED,
                ),
                io.Int.Input(
                    "keep_tags", default=0, min=0, max=64, tooltip="First tags that stay in front.", **ADVANCED
                ),
                io.String.Input(
                    "more_resolutions",
                    default="",
                    tooltip="Further sizes to train every picture at, e.g. 768, 1024.",
                    **ADVANCED,
                ),
                io.Int.Input(
                    "alignment",
                    default=64,
                    min=32,
                    max=64,
                    step=32,
                    tooltip="Sides are multiples of this; 32 crops less and makes more sizes.",
                    **ADVANCED,
                ),
                io.Boolean.Input("upscale", default=False, tooltip="Enlarge pictures that are too small.", **ADVANCED),
                io.Combo.Input(
                    "crop",
                    options=["centre", "random"],
                    default="centre",
                    tooltip="What is cut away to fit the size: both ends, or four random choices.",
                    **ADVANCED,
                ),
                io.Combo.Input(
                    "masks",
                    options=["none", "files", "alpha"],
                    default="none",
                    tooltip="Train only where a mask is white: a -masklabel.png beside it, or its transparency.",
                    **ADVANCED,
                ),
                io.Boolean.Input(
                    "regularisation",
                    default=False,
                    tooltip="Pictures of what should stay as it is: the LoRA is trained to change nothing on them.",
                    **ADVANCED,
                ),
            ],
            outputs=[
                ChromaDatasetType.Output("dataset", tooltip="For Chroma Train LoRA."),
                io.String.Output("summary", tooltip="Counts, sizes and warnings in words."),
            ],
        )

    @classmethod
    def validate_inputs(cls, folder) -> bool:
        """A folder that was added after the page was loaded is fine; a wrong one is explained when the node runs."""
        return True

    @classmethod
    def fingerprint_inputs(cls, folder=None, **_) -> str:
        """The files count, not only the folder's name."""
        return host.folder_state(host.dataset_folder(folder)) if folder in host.dataset_names() else str(folder)

    @classmethod
    def execute(cls, folder, resolution, default_caption, more_resolutions="", **options: Any) -> io.NodeOutput:
        sizes = [resolution, *_numbers(more_resolutions)]
        config = DatasetConfig.parse(
            {
                **options,
                "folder": str(host.dataset_folder(folder)),
                "resolutions": tuple(size for size in sizes if size),
                "default_caption": default_caption or None,
            }
        )
        found = scan(config)
        text = summary(found, FALLBACK_SIZE)
        sheet = contact_sheet(found.items[:SHOWN], found, FALLBACK_SIZE)
        preview = ui.PreviewImage(to_image([sheet]), cls=cls).as_dict()
        return io.NodeOutput(config, text, ui={**preview, "text": (text,)})


def _numbers(text: str) -> list[int]:
    """Whole numbers between commas or blanks. Raises ConfigError."""
    try:
        return [int(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise ConfigError(f"more_resolutions is “{text}”; it takes whole numbers of pixels, e.g. 768, 1024.") from None


NODES = [ChromaDataset]
