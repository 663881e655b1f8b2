"""Several data sets in one job."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ..chroma_core.data.dataset import DatasetConfig
from ..chroma_core.data.samples import multiples
from ..chroma_core.errors import ConfigError
from .sockets import ChromaDatasetType, schema

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
            io.Float.Input(
                f"weight_{i}",
                default=1.0,
                min=0.001,
                max=1000.0,
                step=0.05,
                round=0.001,
                tooltip=f"How often a picture of dataset_{i} is used compared with one of another set. Multiplies the "
                "set's own weight.",
                optional=i > 2,
            )
            for i in numbers
        ]
        return schema(
            node_id="ChromaCombineDatasets",
            display_name="Chroma Combine Datasets",
            description="Several data sets for one LoRA, e.g. the pictures to learn and others that should stay as "
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
            f"The main data set '{Path(sets[0].folder).name}' is a regularisation set, from which a LoRA learns to "
            "change nothing. Link the pictures that it should learn as dataset_1 of Chroma Combine Datasets, and the "
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
    lines = [f"{len(sets)} data sets in one job"]
    for i, (config, times) in enumerate(zip(sets, multiples([one.weight for one in sets]), strict=True), 1):
        uses = times * config.repeats
        facts = [f"weight {config.weight:g}", f"each picture {'once' if uses == 1 else f'{uses} times'} an epoch"]
        facts += ["main"] if i == 1 else []
        facts += [f"trigger word “{config.trigger}”"] if config.trigger else []
        facts += ["regularisation"] if config.regularisation else []
        lines.append(f"{i}. {Path(config.folder).name}: {', '.join(facts)}")
    return "\n".join(lines)


NODES = [ChromaCombineDatasets]
