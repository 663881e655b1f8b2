"""LoRAs merged into a checkpoint: a new file or folder of the whole transformer, written tensor by tensor.

W' = W + Σ strength · ΔW, and biases and norms alike, in fp32 from the base's own numbers (fp8, scaled fp8 and GGUF are
unpacked), in the order in which the LoRAs are given, rounded once to the type that is written. Everything that no LoRA
changes is copied. And, layer by layer of the same base, how large a LoRA's change is against its weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..errors import LoraError, ModelFileError, check_choice, counted
from ..files import require_room, sha256_file
from ..fullrank.export import TrainedModel, write_folder, write_single_file
from ..loading.build import OnPart
from ..loading.load import transformer_source
from ..loading.matching import Component, build_part
from ..loading.model_files import base_header, file_state
from ..loading.spec import LoraUse, ModelSpec
from ..lora.adapters import check_fits
from ..lora.convert import DTYPES
from ..lora.files import PEFT_WEIGHTS, read_lora
from ..lora.modules import AdapterModule, FullModule, LoraFile
from ..lora.report import Norms, update_norm, update_norms
from ..model.device import broken
from ..weights.opening import Weights, open_weights

Layout = Literal["original", "diffusers"]
"""One file for ComfyUI and most others, or a folder for diffusers."""

LAYOUTS: tuple[Layout, ...] = get_args(Layout)

MERGED_KEY = "chromakit.merged"
"""The header's word on what was merged: `loras`, each with file, sha256, strength and blocks if there were any, those
of earlier merges first; and `dtype`."""


@dataclass(frozen=True)
class Merged:
    """What was written: the file or folder, and what to say of it."""

    path: Path
    report: str


class _MergedWeights(Mapping[str, Tensor]):
    """Full parameter name → the merged weight in fp32, computed when it is asked for."""

    def __init__(self, weights: Weights, component: Component, loras: Sequence[tuple[LoraFile, Mapping[str, float]]]):
        self._weights, self._component, self._loras = weights, component, loras
        names = {
            f"{layer}.weight" for lora, _ in loras for layer, module in lora.modules.items() if _has_weight(module)
        }
        names |= {
            f"{layer}.bias" for lora, _ in loras for layer, module in lora.modules.items() if module.bias is not None
        }
        self._names = dict.fromkeys(name for name in component.sources if name in names)

    def __contains__(self, name: object) -> bool:
        return name in self._names  # `Mapping` would compute the weight to know

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        layer, _, leaf = name.rpartition(".")
        weight = self._component.sources[name].read(self._weights, torch.float32)
        for lora, strengths in self._loras:
            module = lora.modules.get(layer)
            if module is None:
                continue
            if leaf == "weight" and _has_weight(module):
                weight += module.delta(weight) * strengths[layer]
            if leaf == "bias" and module.bias is not None:
                weight += module.bias.float() * strengths[layer]
        return weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _has_weight(module: AdapterModule) -> bool:
    return not isinstance(module, FullModule) or module.diff is not None


@dataclass(frozen=True)
class _Checked(TrainedModel):
    """A model whose every written number is finite."""

    def read(self, name: str) -> Tensor:
        tensor = super().read(name)
        if broken(tensor):
            kind = str(tensor.dtype)[6:]
            raise LoraError(
                f"The merged model is not written: '{name}' would hold numbers that are not finite or too large for "
                f"{kind}. Choose bf16 or fp32, or lower strengths; if it stays so, the base's file is damaged."
            )
        return tensor


def merge_loras(
    spec: ModelSpec,
    uses: Sequence[LoraUse],
    output: Path | str,
    layout: Layout = "original",
    dtype: str = "keep",
    on_part: OnPart = lambda done, total, what: None,
) -> Merged:
    """Write the transformer of `spec` with LoRAs merged into it; one layer at a time is in memory.

    Args:
        uses: the LoRAs with their strengths; whether they are live or merged elsewhere does not matter here.
        output: the .safetensors file, or for the diffusers layout the folder. Where this very merge lies already, it
            stays; anything else there is an error.
        dtype: of every tensor: `bf16`, `fp16`, `fp32`, or `keep`: each in the base's own (fp8 and GGUF become bf16).
        on_part: progress; what it raises ends the work, and nothing is left of it.
    Raises:
        LoraError: no LoRA; one that does not fit, or has a strength over the steps; numbers too large.
        ModelFileError: the base cannot be used, the output exists, or the disk has no room; before anything is written.
    """
    output = Path(output)
    check_choice("The layout", layout, LAYOUTS)
    check_choice("The number format", dtype, DTYPES)
    if not uses:
        raise LoraError("There is nothing to merge: name at least one LoRA.")
    for use in uses:
        _check_use(use)
    _check_name(output, layout)
    weights, component = transformer_source(spec)
    outline = build_part("transformer", component.config)
    files = [read_lora(use.path) for use in uses]
    fits = [check_fits(outline, lora, use.allow_partial) for use, lora in zip(uses, files, strict=True)]
    loras = [(lora, use.strengths(lora.modules)) for use, lora in zip(uses, files, strict=True)]
    merged = _MergedWeights(weights, component, loras)
    model = _Checked(weights, component, merged, DTYPES[dtype], DTYPES[dtype])
    header = _header(spec, uses, weights.metadata, output.stem, dtype)
    if output.exists():
        if not _is_that(output, header):
            raise ModelFileError(f"'{output}' exists already and is another model. Choose another name, or remove it.")
    else:
        require_room(output.parent, model.bytes(), "the merged model", ModelFileError)
        if layout == "original":
            write_single_file(output, model, {**header, "modelspec.implementation": "comfyui"}, on_part)
        else:
            write_folder(output, model, {**header, "modelspec.implementation": "diffusers"}, on_part=on_part)
    said = "; ".join(f"{_name(use)} at {use.strength:g}: {fit.report()}" for use, fit in zip(uses, fits, strict=True))
    size = f"{model.bytes() / 1e9:.2f} GB"
    return Merged(
        output, f"{counted(len(uses), 'LoRA')} merged into {output.name} ({layout}, {dtype}, {size}). {said}."
    )


def _check_use(use: LoraUse) -> None:
    if use.schedule:
        raise LoraError(
            f"'{_name(use)}' has a strength over the steps ({use.schedule}), which a checkpoint cannot hold. Leave the "
            "schedule out, or apply the LoRA live instead of merging it."
        )
    if not math.isfinite(use.strength):
        raise LoraError(f"The strength of '{_name(use)}' is {use.strength}; it must be a finite number.")


def _check_name(output: Path, layout: Layout) -> None:
    if layout == "original" and output.suffix != ".safetensors":
        raise ModelFileError(f"'{output}' is no name for a model in the original layout: it must end in .safetensors.")
    if layout == "diffusers" and output.suffix == ".safetensors":
        raise ModelFileError(
            f"'{output}' is no name for the diffusers layout, which is a folder: leave out .safetensors."
        )


def _is_that(output: Path, header: Mapping[str, str]) -> bool:
    try:
        found = open_weights(output).metadata
    except ModelFileError:
        return False
    return all(found.get(key) == value for key, value in header.items())


def _header(
    spec: ModelSpec, uses: Sequence[LoraUse], before: Mapping[str, str], title: str, dtype: str
) -> dict[str, str]:
    """The header: what was merged, after what the base says was merged into it earlier."""
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "chroma",
        "modelspec.title": title,
        **base_header(spec),
        MERGED_KEY: json.dumps({"loras": [*_merged_before(before), *map(_record, uses)], "dtype": dtype}),
    }


def _merged_before(metadata: Mapping[str, str]) -> list[Any]:
    try:
        return list(json.loads(metadata.get(MERGED_KEY, "{}"))["loras"])
    except (ValueError, KeyError, TypeError):
        return []


def _record(use: LoraUse) -> dict[str, Any]:
    path = Path(use.path)
    file = path / PEFT_WEIGHTS if path.is_dir() else path
    record = {"file": _name(use), "sha256": sha256_file(file), "strength": use.strength}
    return record | ({"blocks": use.blocks} if use.blocks else {})


def _name(use: LoraUse) -> str:
    path = Path(use.path)
    return path.parent.name if path.name == PEFT_WEIGHTS else path.name


ALONE = ("lora", "lokr", "loha", "full")
"""Kinds whose ΔW does not depend on the weight."""

_known: dict[tuple[str, str], float] = {}
"""‖W‖ by the state of the model's file and the layer: a file is read once in a process."""


def norms_on(lora: LoraFile, spec: ModelSpec, on_part: OnPart = lambda done, total, what: None) -> Norms:
    """‖ΔW‖ and ‖W‖ of every layer of a LoRA; only those layers are read, one at a time.

    A DoRA's ΔW is the one for the model's weights. ‖ΔW‖ alone, from the LoRA's file, where the model cannot say: its
    weights are quantised in its file, or the LoRA does not fit it.
    """
    try:
        weights, component = transformer_source(spec)
        check_fits(build_part("transformer", component.config), lora)
    except (ModelFileError, LoraError):
        return update_norms(lora)
    state = file_state(weights.path)
    names = list(lora.modules)
    change: dict[str, float] = {}
    sizes: dict[str, float] = {}
    for i, name in enumerate(names):
        on_part(i, len(names), name)
        module = lora.modules[name]
        alone = module.kind in ALONE
        if alone and (state, name) in _known:
            change[name], sizes[name] = update_norm(module), _known[state, name]
            continue
        weight = component.sources[f"{name}.weight"].read(weights, torch.float32)
        sizes[name] = _known[state, name] = float(weight.double().norm())
        change[name] = update_norm(module) if alone else float(module.delta(weight).double().norm())
    on_part(len(names), len(names), "")
    return Norms(change, sizes)
