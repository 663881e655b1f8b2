"""What the inputs of a node take: checked before a node runs, and for the widgets that a panel sends.

ComfyUI checks the widgets of a prompt, but neither what comes over a link nor what stands where a link belongs, and it
leaves NaN and half characters in.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
from comfy_api.latest import io
from torch import Tensor

from ..chroma_core.data.dataset import DatasetConfig
from ..chroma_core.errors import ChromaKitError, ConfigError, check_choice, check_text, shortened
from ..chroma_core.loading.spec import ModelHandle, ModelSpec
from . import host
from .option_widgets import Options
from .sockets import (
    ChromaDatasetOptionsType,
    ChromaDatasetType,
    ChromaJob,
    ChromaModel,
    ChromaSamplerOptionsType,
    ChromaTextEncoder,
    ChromaTrainingType,
    TrainingPart,
)

Node = TypeVar("Node", bound=type[io.ComfyNode])


def _conditioning(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(row, list | tuple) and len(row) == 2 and isinstance(row[0], Tensor) and isinstance(row[1], dict)
        for row in value
    )


LINKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    ChromaModel.io_type: (lambda value: isinstance(value, ModelHandle), "Chroma Load Model"),
    ChromaTextEncoder.io_type: (lambda value: isinstance(value, ModelSpec), "Chroma Load Model"),
    ChromaDatasetType.io_type: (
        lambda value: (
            isinstance(value, tuple) and len(value) > 0 and all(isinstance(one, DatasetConfig) for one in value)
        ),
        "Chroma Dataset",
    ),
    ChromaDatasetOptionsType.io_type: (lambda value: isinstance(value, Options), "Chroma Dataset Options"),
    ChromaSamplerOptionsType.io_type: (lambda value: isinstance(value, Options), "Chroma Sampler Options"),
    ChromaTrainingType.io_type: (lambda value: isinstance(value, TrainingPart), "Chroma Training Settings"),
    ChromaJob.io_type: (lambda value: isinstance(value, str), "Chroma Train LoRA"),
    io.Conditioning.io_type: (_conditioning, "Chroma Text Encode"),
    io.Latent.io_type: (
        lambda value: isinstance(value, dict) and isinstance(value.get("samples"), Tensor),
        "Chroma Empty Latent",
    ),
    io.Image.io_type: (lambda value: isinstance(value, Tensor), "Load Image"),
    io.Mask.io_type: (lambda value: isinstance(value, Tensor), "Load Image"),
    io.LoraModel.io_type: (
        lambda value: isinstance(value, dict) and all(isinstance(each, Tensor) for each in value.values()),
        "Chroma Wait for Training",
    ),
    io.Model.io_type: (host.is_model, "Load Diffusion Model"),
    io.Clip.io_type: (host.is_clip, "Load CLIP"),
    io.Vae.io_type: (host.is_vae, "Load VAE"),
}
"""What an input of a type that is no widget may be given, and a node that gives it."""


def value_of(widget: Any, value: Any) -> Any:
    """The value that an input takes, as the input's own type; a combo's is only looked at for its kind.

    Raises ConfigError for a value of another kind, out of the input's range, or that no file can hold.
    """
    name, shown = widget.id, shortened(repr(value))
    if widget.io_type in LINKS:
        accepts, source = LINKS[widget.io_type]
        if not accepts(value):
            raise ConfigError(f"{name} is {shown}; it takes nothing but a link, e.g. from {source}.")
        return value
    if isinstance(widget, io.Combo.Input):
        if not isinstance(value, str):
            raise ConfigError(f"{name} is {shown}; it must be one of the texts that the list offers.")
        if value in (widget.options or ()):  # of files too whose names are no UTF-8
            return value
    elif isinstance(widget, io.Int.Input | io.Float.Input):
        whole = isinstance(widget, io.Int.Input)
        number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
        number = number and abs(value) < math.inf
        if not number or (whole and value != int(value)):
            raise ConfigError(f"{name} is {shown}; it must be a {'whole ' if whole else ''}number.")
        low, high = widget.min, widget.max
        if (low is not None and value < low) or (high is not None and value > high):  # before any float is made of it
            raise ConfigError(f"{name} is {shown}; it must be between {low} and {high}.")
        return int(value) if whole else float(value)
    elif isinstance(widget, io.Boolean.Input):
        if not isinstance(value, bool | np.bool_):
            raise ConfigError(f"{name} is {shown}; it must be true or false.")
        return bool(value)
    elif not isinstance(value, str):
        raise ConfigError(f"{name} is {shown}; it must be a text.")
    check_text(value, f"{name}: ")
    return value


def chosen_of(widget: Any, value: Any) -> Any:
    """`value_of`, and a combo's value is among its options. Raises ConfigError."""
    if isinstance(widget, io.Combo.Input):
        check_choice(widget.id, value, map(str, widget.options or ()))
    return value_of(widget, value)


@contextmanager
def _without_places() -> Iterator[None]:
    """An error of ours that passes is told without this machine's places: ComfyUI keeps it in the history."""
    try:
        yield
    except ChromaKitError as error:
        error.args = tuple(map(host.told, error.args))
        raise


def checked(node: Node) -> Node:
    """The node, whose `execute` is only called with values that its inputs take, and whose errors tell no places.

    A choice that was not offered when the node was made, e.g. a file that is new, is looked up in the list as it is
    now; where a node judges an input itself (`validate_inputs`), any text passes.
    """
    execute: Any = node.execute.__func__
    schema = node.define_schema()
    inputs = {each.id: each for each in schema.inputs}
    own = inspect.getfullargspec(node.validate_inputs).args

    def read(name: str, value: Any) -> Any:
        each = inputs[name]
        if value is None and (each.optional or each.lazy):
            return None
        if name in own:
            return value_of(each, value)
        if isinstance(each, io.Combo.Input) and value not in (each.options or ()):
            each = next(now for now in node.define_schema().inputs if now.id == name)
        return chosen_of(each, value)

    def values(given: dict[str, Any]) -> dict[str, Any]:
        if schema.is_input_list:
            return {name: [read(name, value) for value in each] for name, each in given.items()}
        return {name: read(name, value) for name, value in given.items()}

    async def later(cls: type, **given: Any) -> io.NodeOutput:
        with _without_places():
            return await execute(cls, **values(given))

    def at_once(cls: type, **given: Any) -> io.NodeOutput:
        with _without_places():
            return execute(cls, **values(given))

    run: Any = classmethod(later if inspect.iscoroutinefunction(execute) else at_once)
    node.execute = run
    return node
