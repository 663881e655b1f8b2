"""Datasets: a folder of captioned images, images from other nodes, several sets in one job."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ..chroma_core.data.dataset import DatasetConfig
from ..chroma_core.data.image_folder import bytes_in, store_images, stored
from ..chroma_core.data.samples import multiples
from ..chroma_core.errors import ConfigError, DataError
from . import host
from .dataset_widgets import FIRST, FOLDED, OF_FILES, config_from, options_input, outputs, shown, widgets
from .option_widgets import changed, defaults_of, unfolded, widget, with_options
from .sockets import ChromaDatasetOptionsType, ChromaDatasetType, images_of, masks_of, schema


class ChromaDataset(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        names = host.dataset_names()
        return schema(
            "dataset",
            node_id="ChromaDataset",
            display_name="Chroma Dataset",
            description="A folder of images with .txt captions beside them. Shows what will be trained on and what "
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
                    tooltip="A folder in ComfyUI's input folder, in the pack's example_datasets, or under a place "
                    "listed in user/chromakit/config.toml. Press R to refresh the list.",
                ),
                *widgets("trigger", "resolution", "repeats", "caption_dropout", "default_caption", *FOLDED),
                options_input(),
            ],
            outputs=outputs(),
        )

    @classmethod
    def validate_inputs(cls, folder) -> bool:
        """A folder that was added after the page was loaded is fine; a wrong one is explained when the node runs."""
        return True

    @classmethod
    def fingerprint_inputs(cls, folder=None, **_) -> str:
        """The files count, not only the folder's name; also those of a folder that the list does not offer."""
        try:
            return host.folder_state(host.dataset_folder(str(folder or "")))
        except (DataError, OSError):
            return str(folder)

    @classmethod
    def execute(cls, folder, options=None, **fields: Any) -> io.NodeOutput:
        fields = with_options("Chroma Dataset", fields, options, defaults_of(widgets(*FOLDED)))
        return shown(cls, config_from(str(host.dataset_folder(folder)), **fields))


_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


class _Kept:
    """The folders that were written since ComfyUI started. When one of them is changed or deleted, every such node
    runs once more, and writes its own again."""

    def __init__(self) -> None:
        self._states: dict[Path, str] = {}
        self._losses = 0

    def note(self, folder: Path) -> None:
        """Remember a folder as it was written."""
        self._states[folder] = host.folder_state(folder)

    def losses(self) -> int:
        """How often until now a folder was found other than it was written; each loss is counted once."""
        changed = [folder for folder, state in self._states.items() if host.folder_state(folder) != state]
        for folder in changed:
            del self._states[folder]
        self._losses += len(changed)
        return self._losses


_kept = _Kept()

_OF_IMAGES = tuple(name for name in FOLDED if name not in OF_FILES)


class ChromaDatasetFromImages(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "dataset",
            node_id="ChromaDatasetFromImages",
            display_name="Chroma Dataset from Images",
            description="Images and captions straight from other nodes. A copy is kept below "
            "output/chromakit/datasets, so that a job can go on with it after a restart.",
            search_aliases=[
                "images to dataset",
                "train on images",
                "training data",
                "caption list",
                "image list",
                "image batch dataset",
            ],
            is_output_node=True,
            is_input_list=True,
            inputs=[
                io.Image.Input("images", tooltip="A batch, or a list of images of any sizes."),
                io.String.Input(
                    "captions",
                    multiline=True,
                    default="",
                    tooltip="One line for all images, or one line for each in their order; or link a list of texts. "
                    "[trigger] stands for the trigger word.",
                ),
                io.Mask.Input(
                    "masks",
                    optional=True,
                    tooltip="Train only where it is white. One for each image, or one for all; a black one is none.",
                ),
                *widgets("trigger", "resolution", "repeats", "caption_dropout", *_OF_IMAGES),
                options_input(),
            ],
            outputs=outputs(),
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> int:
        """What other nodes give is watched by ComfyUI; here only whether what was stored is still there."""
        return _kept.losses()

    @classmethod
    def execute(cls, images, captions, masks=(), options=(None,), **lists: Any) -> io.NodeOutput:
        fields = {name: values[0] for name, values in lists.items()}
        fields = with_options("Chroma Dataset from Images", fields, options[0], defaults_of(widgets(*_OF_IMAGES)))
        separate = images_of(images)
        texts = [str(text) for text in captions if text is not None]
        _check_captions(texts, fields)
        masks = masks_of(masks or (), separate)
        root = host.images_folder()
        folder = store_images(root, separate, texts, masks, host.Progress(max(1, len(separate))).step)
        _kept.note(folder)
        used = "files" if any(masks) else "none"
        return shown(cls, config_from(str(folder), masks=used, **fields), _where(folder))


def _check_captions(texts: list[str], fields: dict[str, Any]) -> None:
    """Raises DataError when no image would have a caption, though it is not said that this is meant."""
    if not any(text.strip() for text in texts) and fields.get("missing_caption") != "empty":
        raise DataError(
            "There is no caption. Write what the images show into captions (one line for all, or one line for each), "
            "link a list of texts, or choose missing_caption = empty to train without."
        )


def _where(folder: Path) -> str:
    """Where the copy lies, how much all of them take, and what to do about it."""
    sets, total = stored(folder.parent)
    place, size = host.told(str(folder)), _size(bytes_in(folder))
    return (
        f"kept in {place} ({size}); {sets} such {'folder' if sets == 1 else 'folders'} take "
        f"{_size(total)}. Delete those that no unfinished job needs."
    )


def _size(number: int) -> str:
    value, unit = next((number / scale, unit) for scale, unit in _UNITS if number >= scale or unit == "kB")
    return f"{value:.1f} {unit}"


class ChromaDatasetOptions(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "dataset",
            node_id="ChromaDatasetOptions",
            display_name="Chroma Dataset Options",
            description="What few datasets need: other captions, sizes, crops, masks and weights. For Chroma Dataset "
            "and Chroma Dataset from Images.",
            search_aliases=["caption prefix", "shuffle tags", "flip images", "loss mask", "crop", "regularisation"],
            inputs=cls._inputs(),
            outputs=[ChromaDatasetOptionsType.Output("options", tooltip="For the options of Chroma Dataset.")],
        )

    @classmethod
    def _inputs(cls) -> list[Any]:
        return unfolded(widgets(*FIRST, *(name for name in FOLDED if name not in FIRST)))

    @classmethod
    def execute(cls, **fields: Any) -> io.NodeOutput:
        return io.NodeOutput(changed(fields, defaults_of(cls._inputs())))


SLOTS = 4
"""Sets that one node takes. They are fixed inputs and not growing ones, because each has a weight beside it."""


class ChromaCombineDatasets(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        numbers = range(1, SLOTS + 1)
        sets = [
            ChromaDatasetType.Input(
                f"dataset_{i}",
                optional=i > 2,
                tooltip="The main set: its trigger word is the LoRA's and the previews'. A combined one may be linked."
                if i == 1
                else "A further set, e.g. one for regularisation. It keeps its own trigger word and options.",
            )
            for i in numbers
        ]
        weights = [
            widget(
                DatasetConfig,
                "weight",
                f"weight_{i}",
                tooltip=f"How often an image of dataset_{i} is used compared with one of another set. Multiplies the "
                "set's own weight.",
                optional=i > 2,
                advanced=None,
            )
            for i in numbers
        ]
        return schema(
            "dataset",
            node_id="ChromaCombineDatasets",
            display_name="Chroma Combine Datasets",
            description="Several datasets for one LoRA, e.g. the images to learn and others that should stay as "
            "they are. Chain two of these for more than four.",
            search_aliases=[
                "merge datasets",
                "mix datasets",
                "regularisation images",
                "multiple concepts",
                "class images",
                "prior preservation",
            ],
            inputs=[*sets[:2], *weights[:2], *sets[2:], *weights[2:]],
            outputs=[
                ChromaDatasetType.Output("dataset", tooltip="For Chroma Train LoRA."),
                io.String.Output("summary", tooltip="How the sets are mixed, in words."),
            ],
        )

    @classmethod
    def execute(cls, **inputs: Any) -> io.NodeOutput:
        sets: list[DatasetConfig] = []
        for i in range(1, SLOTS + 1):
            weight = inputs.get(f"weight_{i}", 1.0)
            sets += [weighted(config, weight) for config in inputs.get(f"dataset_{i}") or ()]
        check_main(sets)
        return io.NodeOutput(tuple(sets), mixture(sets))


def weighted(config: DatasetConfig, factor: float) -> DatasetConfig:
    """The set with `factor` times its weight. Raises ConfigError when that is out of range."""
    return config if factor == 1 else DatasetConfig.parse(config.model_dump() | {"weight": config.weight * factor})


def check_main(sets: Sequence[DatasetConfig]) -> None:
    """Raises ConfigError when the set that the LoRA is about is one that must not change anything."""
    if sets[0].regularisation:
        raise ConfigError(
            f"The main dataset '{Path(sets[0].folder).name}' is a regularisation set, from which a LoRA learns to "
            "change nothing. Link the images that it should learn as dataset_1 of Chroma Combine Datasets, and the "
            "regularisation set as dataset_2; or switch regularisation off."
        )


def single(sets: Sequence[DatasetConfig] | None) -> DatasetConfig | None:
    """The one set of a validation input. Raises ConfigError for a combined one."""
    if sets is not None and len(sets) > 1:
        raise ConfigError(
            f"validation_dataset is a combination of {len(sets)} sets; the held-out loss is measured on one. Link a "
            "single Chroma Dataset."
        )
    return sets[0] if sets else None


def mixture(sets: Sequence[DatasetConfig]) -> str:
    """How several sets are used, one line a set."""
    lines = [f"{len(sets)} datasets in one job"]
    for i, (config, times) in enumerate(zip(sets, multiples([one.weight for one in sets]), strict=True), 1):
        uses = times * config.repeats
        facts = [f"weight {config.weight:g}", f"each image {'once' if uses == 1 else f'{uses} times'} an epoch"]
        facts += ["main"] if i == 1 else []
        facts += [f"trigger word “{config.trigger}”"] if config.trigger else []
        facts += ["regularisation"] if config.regularisation else []
        lines.append(f"{i}. {Path(config.folder).name}: {', '.join(facts)}")
    return "\n".join(lines)


NODES = [ChromaDataset, ChromaDatasetFromImages, ChromaDatasetOptions, ChromaCombineDatasets]
