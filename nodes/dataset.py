"""Data sets: a folder of captioned pictures, looked at before anything is trained on it."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..chroma_core.errors import DataError
from . import host
from .dataset_widgets import config_from, outputs, shown, widgets
from .sockets import schema


class ChromaDataset(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        names = host.dataset_names()
        return schema(
            node_id="ChromaDataset",
            display_name="Chroma Dataset",
            description="A folder of pictures with .txt captions beside them. Shows what will be trained on and what "
            "was skipped.",
            search_aliases=[
                "training images",
                "training data",
                "load dataset",
                "captions",
                "folder of images",
                "image folder",
                "train lora dataset",
            ],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=names or [""],
                    default=names[0] if names else "",
                    tooltip="A folder in the host's input folder, in the pack's example_datasets, or under a place "
                    "listed in user/chromakit/config.toml. Press R to refresh the list.",
                ),
                # Saved workflows hold values by position: new widgets go to the end.
                *widgets(
                    "trigger", "resolution", "repeats", "caption_dropout", "default_caption", "missing_caption", "flip",
                    "caption_source", "caption_prefix", "caption_suffix", "tag_shuffles", "keep_tags",
                    "more_resolutions", "alignment", "upscale", "crop", "masks", "regularisation", "weight",
                    "sigma_bias", "latents", "posterior_samples", "random_crops", "mask_floor", "background",
                    "caption_extension", "caption_column", "repeat_folders",
                ),
            ],
            outputs=outputs(),
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, folder) -> bool:
        """A folder that was added after the page was loaded is fine; a wrong one is explained when the node runs."""
        return True

    @classmethod
    def fingerprint_inputs(cls, folder=None, **_) -> str:
        """The files count, not only the folder's name; also those of a folder that the list does not offer."""
        try:
            return host.folder_state(host.dataset_folder(folder or ""))
        except (DataError, OSError):
            return str(folder)

    @classmethod
    def execute(cls, folder, **options: Any) -> io.NodeOutput:
        return shown(cls, config_from(str(host.dataset_folder(folder)), **options))


NODES = [ChromaDataset]
