"""A LoRA out of two checkpoints: what fine-tuning changed, layer by layer, at a rank that is chosen.

ΔW = W_tuned − W_base in fp32, from each file's own numbers, truncated by `lora.lowrank`. One layer is in memory at a
time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import LoraError, ModelFileError, check_choice
from ..loading.build import OnPart
from ..loading.load import Device, transformer_source
from ..loading.matching import Component, build_part
from ..loading.model_files import base_hash, base_header
from ..loading.spec import ModelSpec
from ..lora.adapters import linear_modules
from ..lora.convert import DTYPES
from ..lora.files import read_lora, write_lora
from ..lora.lowrank import Truncation, truncate_matrix
from ..lora.modules import LoraFile, LoraModule, quoted
from ..lora.resize import LayerKept, Resized
from ..model.device import broken
from ..weights.opening import Weights

EXTRACTED_KEY = "chromakit.extracted_from"
"""The header's word on where a LoRA was taken from: names and sha256 of both checkpoints, rank, energy."""


@dataclass(frozen=True)
class Extracted:
    """The file, what it holds and how much of each layer's change, and what could not go into it."""

    path: Path
    lora: LoraFile
    layers: Mapping[str, LayerKept]
    unchanged: int
    left_out: tuple[str, ...]

    def report(self) -> str:
        """A few sentences for a person."""
        if not self.layers:
            return f"{self.path.name} is there already: taken from the same two models in the same way."
        text = f"{self.path.name}: {Resized(self.lora, self.layers).summary()}"
        if self.unchanged:
            text += f" {self.unchanged} layers are the same in both and left out."
        if self.left_out:
            text += (
                f" WARNING: {len(self.left_out)} tensors differ that a LoRA has no place for, and are left out: "
                f"{quoted(self.left_out)}."
            )
        return text


def extract_lora(
    base: ModelSpec,
    tuned: ModelSpec,
    output: Path | str,
    how: Truncation,
    dtype: str = "fp32",
    exact: bool = False,
    device: Device = "cpu",
    on_part: OnPart = lambda done, total, what: None,
) -> Extracted:
    """Write what `tuned` has more than `base` as a LoRA in the universal key format.

    Args:
        output: the file; where this very extraction lies already, it stays and is returned.
        dtype: of the file's matrices: `fp32`, `bf16` or `fp16`.
        exact: decompose every layer exactly; see `lowrank.truncate_matrix`.
        device: where layers are decomposed.
        on_part: progress; what it raises ends the work, and nothing is written.
    Raises:
        ModelFileError: one of the checkpoints cannot be used, or they are of different shape.
        LoraError: nothing differs; another file is there; numbers that are not finite.
    """
    output = Path(output)
    if torch.device(device).type == "mps":
        device = "cpu"  # layers are decomposed in fp64, which Apple's GPUs do not have
    check_choice("The number format", dtype, [name for name in DTYPES if name != "keep"])
    if output.suffix != ".safetensors":
        raise LoraError(f"'{output}' is no name for a LoRA: it must end in .safetensors.")
    first, second = transformer_source(base), transformer_source(tuned)
    _check_alike(first, second)
    header = _header(base, tuned, how, output.stem, dtype, exact)
    if output.exists():
        return _already(output, header)
    linears = [f"{name}.weight" for name in linear_modules(build_part("transformer", first[1].config))]
    modules: dict[str, LoraModule] = {}
    layers: dict[str, LayerKept] = {}
    left_out = []
    names = list(first[1].sources)
    for i, name in enumerate(names):
        on_part(i, len(names), name)
        before, after = (component.sources[name].read(weights, torch.float32) for weights, component in (first, second))
        if torch.equal(before, after):
            continue
        if name not in linears:
            left_out.append(name)
            continue
        delta = after.sub_(before).to(device)
        if broken(delta):
            raise LoraError(f"'{name}' holds NaN or infinite numbers in one of the checkpoints, which is damaged.")
        layer = name.removesuffix(".weight")
        found = truncate_matrix(delta, how, exact, seed=i)
        modules[layer] = found.module.map(lambda tensor: tensor.cpu()).to(DTYPES[dtype])  # type: ignore[arg-type]
        layers[layer] = LayerKept(None, found.module.rank, found.kept)
    if not modules:
        differ = f" Only {quoted(left_out)} differ, which a LoRA has no place for." if left_out else ""
        raise LoraError(f"There is nothing to extract: every linear layer is the same in both checkpoints.{differ}")
    path = write_lora(output, LoraFile(modules, header))
    on_part(len(names), len(names), "")
    return Extracted(path, LoraFile(modules, header), layers, len(linears) - len(modules), tuple(left_out))


def _already(output: Path, header: Mapping[str, str]) -> Extracted:
    try:
        found = read_lora(output)
    except LoraError:
        found = None
    if found is None or found.metadata.get(EXTRACTED_KEY) != header[EXTRACTED_KEY]:
        raise LoraError(f"'{output}' exists already and is another file. Choose another name, or remove it first.")
    return Extracted(output, found, {}, 0, ())


def _check_alike(first: tuple[Weights, Component], second: tuple[Weights, Component]) -> None:
    shapes = [{name: source.shape for name, source in component.sources.items()} for _, component in (first, second)]
    if shapes[0] == shapes[1]:
        return
    paths = [weights.path for weights, _ in (first, second)]
    for name in shapes[0] | shapes[1]:
        found = [shape.get(name) for shape in shapes]
        if found[0] != found[1]:
            said = ["no such tensor" if shape is None else "×".join(map(str, shape)) for shape in found]
            raise ModelFileError(
                f"'{paths[1]}' cannot be compared with '{paths[0]}': '{name}' is {said[0]} in the base and {said[1]} "
                "in the tuned model. They are models of different sizes; take the base that it was tuned from."
            )


def _header(base: ModelSpec, tuned: ModelSpec, how: Truncation, title: str, dtype: str, exact: bool) -> dict[str, str]:
    facts = base_header(base)
    origin: dict[str, Any] = {"tuned": _called(tuned), "tuned_sha256": base_hash(tuned), "base": _called(base)}
    origin |= {"base_sha256": facts["chromakit.base_sha256"], "dtype": dtype} | ({"exact": True} if exact else {})
    origin |= {name: value for name, value in (("rank", how.rank), ("energy", how.energy)) if value is not None}
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "chroma/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
        **facts,
        EXTRACTED_KEY: json.dumps(origin),
    }


def _called(spec: ModelSpec) -> str:
    return spec.own_file or spec.flavour
