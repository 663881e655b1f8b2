"""The parts of a model as modules on a device, from whatever files `ModelSpec` names."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import LoraError, ModelFileError
from ..files import read_json
from ..lora.files import read_lora
from ..lora.modules import LoraFile
from ..model.flavours import flavour
from ..model.precision import Precision, computed_on, precision, quantisable_linears, require, slow_here
from ..model.quantised import compute_by
from ..model.text_encoder import T5Encoder
from ..model.transformer import ChromaTransformer
from ..model.vae import Autoencoder
from ..sampling.text import TextEncoder
from ..streaming import stream_blocks
from ..weights.identify import TITLES, Identity, Part
from ..weights.opening import Weights, open_weights
from .build import Device, OnPart, Placement, assemble, is_block, is_kept
from .hub import OnDownload
from .matching import Component, build_part, describe_part
from .model_files import file_state, locate
from .quantised_files import is_quantised_file, kept_file, load_quantised, quantised_config, save_quantised
from .spec import LoraUse, ModelSpec

log = logging.getLogger("chromakit")


def _silent(done: int, total: int, what: str) -> None:
    """No progress wanted."""


PLAIN = ("fp64", "fp32", "fp16", "bf16")
"""Names of stored types that are not quantised."""

INVISIBLE = ("axes_dims_rope", "norm_num_groups", "scaling_factor", "shift_factor")
"""What no tensor's shape tells. A single file takes it from its flavour when it is that flavour's model otherwise."""


def load_transformer(
    spec: ModelSpec, device: Device, merged_loras: Sequence[LoraUse] = (), on_part: OnPart = _silent
) -> ChromaTransformer:
    """The transformer of `spec` on `device`, in eval mode, frozen; `merged_loras` go in before quantising.

    With offload `block` it is streamed (see `streaming`): its blocks rest in host memory.
    """
    streamed = spec.offload == "block"
    loras = [(use, read_lora(use.path)) for use in merged_loras]
    with torch.inference_mode(False):
        placement = Placement.on(device, in_host_memory=spec.offload_during_startup, streamed=streamed)
        model = _load(spec, "transformer", placement, loras, on_part)
        assert isinstance(model, ChromaTransformer)
        if warning := compute_by(model, spec.compute, device):
            log.warning("ChromaKit: %s", warning)
        if streamed:
            stream_blocks(model, torch.device(device), spec.resident_blocks)
        return model


def load_text_encoder(spec: ModelSpec, device: Device, on_part: OnPart = _silent) -> TextEncoder:
    """The T5 encoder and tokenizer of `spec`."""
    import transformers  # takes seconds

    # transformers 5 writes a list under this name where 4 expects a dictionary; the tokens are in the vocabulary.
    extra = {"extra_special_tokens": {}} if transformers.__version__.startswith("4.") else {}
    folder = locate(spec, "tokenizer")
    with torch.inference_mode(False):
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, **extra)
        except Exception as error:  # whatever a tokenizer library raises for a damaged file
            raise ModelFileError(f"The tokenizer in '{folder}' cannot be read: {error}") from error
        placement = Placement.on(device, in_host_memory=spec.offload_during_startup)
        model = _load(spec, "text_encoder", placement, (), on_part)
        assert isinstance(model, T5Encoder)
        return TextEncoder(model, tokenizer)


def load_vae(spec: ModelSpec, device: Device) -> Autoencoder:
    """The VAE of `spec`, in fp32: bf16 shows in flat colours, and it is small."""
    with torch.inference_mode(False):
        model = _load(spec, "vae", Placement.on(device), (), _silent)
        assert isinstance(model, Autoencoder)
        return model


def _load(
    spec: ModelSpec, part: Part, placement: Placement, loras: Sequence[tuple[LoraUse, LoraFile]], on_part: OnPart
) -> nn.Module:
    chosen = _precision(spec, part)
    if part == "transformer":
        chosen = computed_on(chosen, placement.rest)
        if warning := slow_here(chosen.name, placement.rest):
            log.warning("ChromaKit: %s", warning)
    require(chosen, placement.rest)
    path = locate(spec, part)
    if is_quantised_file(path):
        if loras:
            raise LoraError(
                f"A LoRA cannot be merged into '{path.name}': its weights are quantised already, and merging comes "
                "before quantising. Apply the LoRA live, or choose the unquantised file."
            )
        return load_quantised(path, part, chosen, placement, on_part)
    kept = None
    if chosen.quantised and spec.quantised_folder and not loras:
        kept = kept_file(Path(spec.quantised_folder), part, chosen, path)
        if kept.is_file():
            try:
                return load_quantised(kept, part, chosen, placement, on_part)
            except ModelFileError as error:
                log.warning("ChromaKit: the kept copy '%s' is not used and made anew: %s", kept.name, error)
    weights, component = _described(spec, part, path)
    _tell(weights, component, chosen)
    module = assemble(part, weights, component, chosen, placement, loras, on_part)
    if kept is not None:
        save_quantised(kept, module, part, chosen, component.config)
    return module


def write_quantised(path: Path, spec: ModelSpec, part: Part, device: Device, on_part: OnPart = _silent) -> None:
    """Quantise a part on `device` and write it to `path`; nothing of it stays loaded.

    The blocks wait in host memory for the file to be written, so the device holds one of them at a time.
    """
    chosen = _precision(spec, part)
    require(chosen, torch.device(device))
    with torch.inference_mode(False):
        weights, component = _described(spec, part, locate(spec, part))
        _tell(weights, component, chosen)
        module = assemble(part, weights, component, chosen, Placement.on(device, streamed=True), (), on_part)
        save_quantised(path, module, part, chosen, component.config)


def describe(spec: ModelSpec, part: Part, on_progress: OnDownload | None = None) -> Component:
    """What the file of a part is and holds, from its header alone. A quantised file has no sources.

    Raises ModelFileError when it is something else, or quantised to another precision than `spec` asks for.
    """
    path = locate(spec, part, on_progress)
    if is_quantised_file(path):
        return Component(
            Identity(part, "chromakit", TITLES[part]), quantised_config(path, part, _precision(spec, part)), {}
        )
    weights, component = _described(spec, part, path)
    return replace(component, notes=(*component.notes, *_format_note(weights, component, _precision(spec, part))))


def transformer_identity(spec: ModelSpec) -> tuple[str, ...] | None:
    """Equal for specs whose loaded transformers have the same weights in the same form, all on the device; None for
    one that is streamed."""
    if spec.offload == "block":
        return None
    return spec.flavour, spec.precision, spec.compute, file_state(locate(spec, "transformer"))


COMPUTING_BYTES = 2 << 30
"""Of a device, beside the weights of a component: room to encode one image or text, or to sample."""


def device_size(spec: ModelSpec, part: Part) -> int:
    """Bytes that the loaded part will take on its device: its weights in its precision, without activations."""
    chosen = _precision(spec, part)
    module = build_part(part, describe(spec, part).config)
    linears = dict(quantisable_linears(module)) if chosen.quantised else {}
    small = sum(layer.weight.numel() for layer in linears.values())
    total = sum(parameter.numel() for parameter in module.parameters())
    size = int(small * chosen.bytes_per_weight + (total - small) * chosen.dtype.itemsize)
    if part == "transformer" and spec.offload == "block" and isinstance(module, ChromaTransformer):
        blocks = len(module.transformer_blocks) + len(module.single_transformer_blocks)
        size = size * min(spec.resident_blocks, blocks) // blocks
    return size


def _precision(spec: ModelSpec, part: Part) -> Precision:
    return precision({"transformer": spec.precision, "text_encoder": spec.text_precision, "vae": "fp32"}[part])


def _described(spec: ModelSpec, part: Part, path: Path) -> tuple[Weights, Component]:
    weights = open_weights(path)
    config_file = path / "config.json"
    if config_file.is_file():
        return weights, describe_part(weights, part, read_config(config_file))
    component = describe_part(weights, part)
    beside = path.with_name("config.json")
    if beside.is_file():  # a component folder's weights, chosen as a file
        try:
            return weights, describe_part(weights, part, read_config(beside))
        except ModelFileError as error:
            log.warning("ChromaKit: '%s' is not read with the config.json beside it: %s", path.name, error)
    return weights, _with_what_tensors_hide(component, spec, part, weights)


def _tell(weights: Weights, component: Component, chosen: Precision) -> None:
    """Log what `describe` notes."""
    for note in (*component.notes, *_format_note(weights, component, chosen)):
        log.warning("ChromaKit: %s", note)


def _format_note(weights: Weights, component: Component, chosen: Precision) -> tuple[str, ...]:
    """What becomes of weights that a file holds quantised, in a sentence; none where they are kept as they are."""
    held = [
        (name, source.name)
        for name, source in component.sources.items()
        if is_block(name) and name.endswith(".weight") and len(source.shape) == 2
    ]
    changed = [
        file_name
        for name, file_name in held
        if weights.storage[file_name] not in PLAIN and not is_kept(weights, component, name, chosen)
    ]
    if not changed:
        return ()
    stored = " and ".join(sorted({weights.storage[name] for name in changed}))
    becomes = (
        f"dequantised and quantised anew to {chosen.name}, which rounds them a second time"
        if chosen.quantised
        else f"dequantised to {chosen.name}"
    )
    schemes = {weights.schemes.get(name) for name in changed}
    keep = schemes.pop() if len(schemes) == 1 else None
    advice = f" The precision {keep} keeps them as they are." if keep else ""
    return (
        f"'{weights.path.name}' holds weights of its layers as {stored}: {len(changed)} of {len(held)} are {becomes}."
        f"{advice}",
    )


def _with_what_tensors_hide(component: Component, spec: ModelSpec, part: Part, weights: Weights) -> Component:
    folder = flavour(spec.flavour).folder
    if folder is None:
        return component
    published = {k: v for k, v in read_config(folder / part / "config.json").items() if not k.startswith("_")}
    inferred = component.config
    if all(inferred[k] == _plain(published[k]) for k in inferred if k in published and k not in INVISIBLE):
        return describe_part(weights, part, {**inferred, **{k: published[k] for k in INVISIBLE if k in published}})
    return component


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def read_config(path: Path) -> dict[str, Any]:
    """A config.json. Raises ModelFileError."""
    value = read_json(path, ModelFileError)
    if not isinstance(value, dict):
        raise ModelFileError(f"'{path}' should hold a JSON object, but holds a {type(value).__name__}.")
    return value


def transformer_outline(spec: ModelSpec) -> ChromaTransformer:
    """The module tree of the transformer of `spec`, on the meta device: names and shapes only."""
    module = build_part("transformer", describe(spec, "transformer").config)
    assert isinstance(module, ChromaTransformer)
    return module


def transformer_source(spec: ModelSpec) -> tuple[Weights, Component]:
    """The transformer's files, and where in them each of its weights lies.

    Raises ModelFileError for a file of ours whose weights are quantised: what they were before is lost.
    """
    path = locate(spec, "transformer")
    if is_quantised_file(path):
        raise ModelFileError(
            f"'{path.name}' holds weights that are quantised already, and a model cannot be trained or written from "
            "them. Choose the unquantised file; its other layers can be quantised while it is loaded."
        )
    return _described(spec, "transformer", path)
