"""From a file's names and shapes to everything that a loader needs: the part's configuration, and for each of our
parameters the tensor, and the rows of it, that hold its weights.

The file is compared tensor by tensor with the module tree that the configuration describes (built on the meta device:
no memory, no random numbers drawn), so that whatever is missing, left over or of another shape is known before the
first byte of weights is read.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelFileError
from ..model.device import is_out_of_memory
from ..model.text_encoder import T5Encoder
from ..model.transformer import ChromaTransformer
from ..model.vae import Autoencoder
from ..names import encoders
from ..names import transformer as keys
from ..names.transformer import Rows
from ..weights import dimensions
from ..weights.identify import (
    FEW,
    TITLES,
    Identity,
    Part,
    find_part,
    identify,
    ignored,
    incomplete,
    misshapen,
    refuse,
    surplus,
)
from ..weights.opening import Weights

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Source:
    """Where one parameter comes from.

    name: the tensor in the file, with its prefix. rows: its share of a fused tensor's rows; None for the whole tensor.
    shape: of the parameter; reshape to it after reading (a 1×1 convolution may become a linear layer). Two parameters
    with equal sources are one shared weight (T5's embeddings): read it once.
    """

    name: str
    rows: Rows | None
    shape: Shape

    def read(self, weights: Weights, dtype: torch.dtype) -> Tensor:
        """The parameter as a new tensor on the CPU. Raises ModelFileError when its file was changed or lost."""
        return weights.read(self.name, dtype, self._rows(weights)).reshape(self.shape)

    def codes(self, weights: Weights) -> tuple[Tensor, Tensor]:
        """The codes and scales of a parameter in `weights.schemes`, which see. Raises ModelFileError as `read` does."""
        return weights.codes(self.name, self._rows(weights))

    def _rows(self, weights: Weights) -> tuple[int, int] | None:
        return None if self.rows is None else self.rows.span(weights.shapes[self.name][0])


@dataclass(frozen=True)
class Component:
    """A part of Chroma in a file.

    config: arguments of its class. sources: for every name of its `state_dict`. notes: what the user should know of
    how the file is read, each a sentence.
    """

    identity: Identity
    config: dict[str, Any]
    sources: dict[str, Source]
    notes: tuple[str, ...] = ()


def describe_part(weights: Weights, part: Part, config: Mapping[str, Any] | None = None) -> Component:
    """How to load `part` from a file or folder.

    Args:
        weights: only names and shapes are asked, no numbers; other parts of a full checkpoint are passed over.
        config: the folder's config.json; None: inferred from the shapes.
    Raises:
        ModelFileError: another model (which one, and where it belongs), missing tensors, more than a few surplus
            ones, shapes that contradict each other or the config.
    """
    identity = find_part(weights.shapes, part)
    if identity is None:
        raise refuse(weights.path, identify(weights.shapes, weights.metadata), part)
    layout = _Layout(identity, weights.shapes)
    found, unknown = _sources(weights, part, layout)
    shapes = {name: source.shape for name, source in found.items()}
    if config is None:
        try:
            origin, arguments = "its other tensors ask", _INFERRED[part](shapes)
        except ModelFileError as error:
            raise ModelFileError(f"'{weights.path}' cannot be used: {error}") from error
    else:
        origin, arguments = "its config.json asks", check_config(config, part, str(weights.path))
    expected = _expected(part, arguments, f"The configuration of '{weights.path}' does not describe {TITLES[part]}")

    missing = dict.fromkeys(identity.prefix + layout.to_file(name) for name in expected if name not in found)
    if missing:
        raise incomplete(weights.path, identity, list(missing), len(dict.fromkeys(layout.to_file(n) for n in expected)))
    extra = [*unknown, *dict.fromkeys(found[name].name for name in found if name not in expected)]
    if len(extra) > FEW:
        raise surplus(weights.path, identity, extra, by_config=config is not None)
    wrong = {
        found[name].name: (tuple(weights.shapes[found[name].name]), _whole(expected[name], found[name]))
        for name in expected
        if found[name].shape != expected[name]
    }
    if wrong:
        raise misshapen(weights.path, identity, wrong, origin)
    notes = (ignored(weights.path, identity, extra),) if extra else ()
    return Component(identity, arguments, {name: found[name] for name in expected}, notes)


class _Layout:
    """The name maps of one part in one layout, on names without the file's prefix."""

    def __init__(self, identity: Identity, shapes: Mapping[str, Shape]) -> None:
        self.part, self.layout, self.prefix = identity.part, identity.layout, identity.prefix
        self.levels = 4
        if self.part == "vae":
            own = (name for name in shapes if name.startswith(self.prefix))
            self.levels = encoders.count_levels(name.removeprefix(self.prefix) for name in own)
        # Released files call the weight of a norm `scale`, ComfyUI's `weight`: the messages follow the file.
        self.norm_leaf = "scale" if any(name.endswith("_norm.scale") for name in shapes) else "weight"

    def to_ours(self, name: str) -> tuple[Rows, ...] | None:
        """The parameters that a tensor of the file holds; None for a name that this part does not have."""
        if self.layout == "original":
            return keys.to_diffusers_keys(name)
        if self.part == "transformer":
            return (Rows(name),) if keys.to_original_key(name) is not None else None
        if self.part == "vae":
            ours = encoders.to_diffusers_key(name, self.levels) if self.layout == "ldm" else name
            return (Rows(ours),) if ours and encoders.to_ldm_key(ours, self.levels) is not None else None
        ours = encoders.to_hugging_face_key(name) if self.layout == "llama.cpp" else name
        if ours in encoders.EMBEDDINGS:
            return tuple(Rows(shared) for shared in encoders.EMBEDDINGS)
        return (Rows(ours),) if ours and encoders.is_encoder_key(ours) else None

    def to_file(self, name: str) -> str:
        """The tensor of the file that holds, or should hold, our parameter; the whole one where it is fused."""
        found = None
        if self.layout == "original":
            rows = keys.to_original_key(name, self.norm_leaf)
            found = None if rows is None else rows.name
        elif self.layout == "ldm":
            found = encoders.to_ldm_key(name, self.levels)
        elif self.layout == "llama.cpp":
            found = encoders.to_llama_cpp_key(name)
        elif name in encoders.EMBEDDINGS:
            found = encoders.EMBEDDINGS[0]
        return found or name


_HARMLESS: dict[Part, tuple[str, ...]] = {
    "transformer": ("time_text_embed.mod_proj",),
    "text_encoder": ("decoder.", "lm_head.", "dec.", "output.weight", "spiece_model", "logit_scale"),
    "vae": ("loss.", "model_ema."),
}
"""How tensors begin that a complete part may carry besides, and that nothing here needs.

A whole T5 has a decoder and its output layer, and ComfyUI keeps a tokenizer beside some; a VAE in training has a loss;
a transformer's table of time embeddings is computed, wherever it comes from."""

_OTHER_PARTS = (
    "model.diffusion_model.",
    "text_encoders.",
    "cond_stage_model.",
    "conditioner.",
    "first_stage_model.",
    "vae.",
)


def _sources(weights: Weights, part: Part, layout: _Layout) -> tuple[dict[str, Source], list[str]]:
    """Our parameters that the file holds, and the names under the part's prefix that say nothing to us."""
    found: dict[str, Source] = {}
    unknown: list[str] = []
    for full, shape in weights.shapes.items():
        if not full.startswith(layout.prefix) or (not layout.prefix and full.startswith(_OTHER_PARTS)):
            continue
        name = full.removeprefix(layout.prefix)
        held = layout.to_ours(name)
        if held is None and not name.startswith(_HARMLESS[part]):
            unknown.append(full)
        for ours in held or ():
            source = _source(weights.path, full, tuple(shape), ours)
            before = found.setdefault(ours.name, source)
            if before.name != full and not (ours.name in encoders.EMBEDDINGS and before.shape == source.shape):
                raise ModelFileError(
                    f"'{weights.path}' holds the same weight twice, as '{before.name}' and as '{full}'. It was put "
                    "together from several files; use one of those."
                )
            # Where both embeddings are there, `shared` is the one that T5 reads.
            if full.endswith(encoders.EMBEDDINGS[0]):
                found[ours.name] = source
    return found, unknown


def _source(path: Any, full: str, shape: Shape, part: Rows) -> Source:
    if part.of > 1:
        if not shape or shape[0] % part.of:
            raise ModelFileError(
                f"'{full}' in '{path}' has the shape {list(shape)}, but it holds {part.of} equal shares of rows, one "
                "above the other. The file is damaged or belongs to another architecture."
            )
        start, stop = part.span(shape[0])
        return Source(full, part, (stop - start, *shape[1:]))
    if ".attentions." in part.name and len(shape) == 4 and shape[2:] == (1, 1):
        shape = shape[:2]
    return Source(full, None, shape)


def _whole(expected: Shape, source: Source) -> Shape:
    """The shape that the file's tensor should have, for a parameter of shape `expected`."""
    if source.rows is None:
        return expected
    return (expected[0] * source.rows.of // (source.rows.stop - source.rows.start), *expected[1:])


_CLASSES: dict[Part, type[nn.Module]] = {
    "transformer": ChromaTransformer,
    "text_encoder": T5Encoder,
    "vae": Autoencoder,
}
_CLASS_NAMES: dict[Part, tuple[str, ...]] = {
    "transformer": ("ChromaTransformer2DModel", "ChromaTransformer"),
    "text_encoder": ("T5EncoderModel", "T5ForConditionalGeneration", "T5Model"),
    "vae": ("AutoencoderKL",),
}
_INFERRED: dict[Part, Callable[[Mapping[str, Shape]], dict[str, Any]]] = {
    "transformer": dimensions.transformer_config,
    "text_encoder": dimensions.text_encoder_config,
    "vae": dimensions.vae_config,
}


def build_part(part: Part, config: Mapping[str, Any]) -> nn.Module:
    """The module of a part on the meta device, from the arguments in `Component.config`."""
    with torch.device("meta"):
        return _CLASSES[part](**config)


def check_config(config: Mapping[str, Any], part: Part, where: str) -> dict[str, Any]:
    """A config.json as arguments of the part's class: without the entries that describe the file itself.

    Raises:
        ModelFileError: it describes another class, an option that ours does not have, or another model's latents.
    """
    named = config.get("_class_name") or next(iter(config.get("architectures") or ()), None)
    if named is not None and named not in _CLASS_NAMES[part]:
        raise ModelFileError(
            f"The config.json of '{where}' describes a {named}; expected {TITLES[part]} ({_CLASS_NAMES[part][0]})."
        )
    arguments = {name: value for name, value in config.items() if not name.startswith("_")}
    if part == "text_encoder":
        return arguments
    known = inspect.signature(_CLASSES[part].__init__).parameters
    # An option that is off changes nothing, so a config of a newer library may name it.
    foreign = [name for name, value in arguments.items() if name not in known and value not in (None, False)]
    if foreign:
        raise ModelFileError(
            f"The config.json of '{where}' has options that {TITLES[part]} does not have: {', '.join(sorted(foreign))}."
        )
    if part == "vae" and arguments.get("scaling_factor") == 1.5305:
        raise ModelFileError(
            f"'{where}' is Stable Diffusion 3's VAE (latent scale 1.5305). It has the shape of Flux's VAE but other "
            "latents. Chroma needs Flux's VAE (ae.safetensors)."
        )
    return {name: value for name, value in arguments.items() if name in known}


def _expected(part: Part, config: Mapping[str, Any], complaint: str) -> Mapping[str, Shape]:
    for name, value in config.items():
        limit = dimensions.MAX_BLOCKS if "layers" in name else 10**7
        if isinstance(value, int) and abs(value) > limit:
            raise ModelFileError(f"{complaint}: {name} is {value}, and no model has more than {limit}.")
    try:
        return _shapes(part, json.dumps(config, sort_keys=True))
    except Exception as error:  # torch raises almost any type for values that it cannot use
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelFileError(f"{complaint}: {reason.rstrip('.')}.") from error


@lru_cache(maxsize=8)
def _shapes(part: Part, config: str) -> Mapping[str, Shape]:
    """Of a part with the arguments `config` (JSON). A VAE is loaded for each preview, and always the same one."""
    state = build_part(part, json.loads(config)).state_dict()
    return MappingProxyType({name: tuple(tensor.shape) for name, tensor in state.items()})
