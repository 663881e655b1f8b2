"""From the tensors of a LoRA file to Chroma's layers: dialects resolved, fused layers split, shapes checked."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import LoraError, ModelFileError
from ..names.transformer import Rows
from .dialects import declared_alpha, declared_rank, foreign_kinds, locate, part_of
from .fusing import own_columns
from .modules import AdapterModule, LokrModule, LoraFile, LoraModule, quoted

PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""The two files of a folder that PEFT saves."""

_LOKR_FACTORS = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")


def assemble(path: Path, keys: list[str], tensors: dict[str, Tensor], metadata: dict[str, str]) -> LoraFile:
    """The LoRA in the file `path` of those keys, readable tensors and header. Raises LoraError as `read_lora` does."""
    raw: dict[str, dict[str, str]] = {}
    unmatched = []
    for key in keys:
        part = part_of(key)
        if part is None:
            unmatched.append(key)
        elif part.kind in raw.setdefault(part.module, {}):
            raise LoraError(f"'{path}' holds several adapters: '{part.module}' has two '{part.kind}' matrices.")
        else:
            raw[part.module][part.kind] = key
    modules: dict[str, AdapterModule] = {}
    dialects: list[str] = []
    declared = _declared(path, metadata, any("magnitude" in parts for parts in raw.values()))
    for name, parts in raw.items():
        found = locate(name)
        build = _builder(parts)
        if found is None or build is None:
            unmatched += parts.values()
            continue
        dialect, layers = found
        if dialect not in dialects:
            dialects.append(dialect)
        _check_parts(path, name, parts)
        own = own_columns(tensors[parts["up"]], layers) if build is _low_rank else {}
        for layer in layers:
            columns = own.get(layer.name)
            if columns is not None and not len(columns):
                if "magnitude" not in parts:
                    continue  # a part that the LoRA does not change
                columns = None
            if layer.name in modules:
                raise LoraError(f"'{path}' has the layer '{layer.name}' twice, in two dialects.")
            try:
                module = build(path, name, parts, tensors, declared, layer)
                modules[layer.name] = module if columns is None else _columns(module, columns)
            except ModelFileError as error:
                raise LoraError(f"'{path}' does not fit Chroma. {error}") from error
    if not modules:
        kinds = foreign_kinds(unmatched)
        raise LoraError(
            f"None of the {len(keys)} keys in '{path}' belongs to Chroma: {quoted(unmatched)}"
            f"{f' ({kinds[0]})' if kinds else ''}. It was made for another model, or in an unknown dialect."
        )
    stated = [("alpha" in parts) for name, parts in raw.items() if len(parts) > 1]
    source = "tensors" if all(stated) else "configuration" if declared else "mixed" if any(stated) else "absent"
    return LoraFile(modules, metadata, "+".join(dialects), tuple(unmatched), source)


def _builder(parts: Mapping[str, str]) -> Any:
    """What makes a module of those parts; None when they are incomplete."""
    if {"down", "up"} <= parts.keys():
        return _low_rank
    whole = all(side in parts or {f"{side}_a", f"{side}_b"} <= parts.keys() for side in ("w1", "w2"))
    return _lokr if whole else None


def _check_parts(path: Path, name: str, parts: Mapping[str, str]) -> None:
    low_rank, lokr = "down" in parts, any(factor in parts for factor in _LOKR_FACTORS)
    if low_rank and lokr:
        raise LoraError(f"'{path}' holds several adapters: '{name}' is both a LoRA and a LoKr.")
    if "t2" in parts:
        raise LoraError(f"'{path}' is made for convolutions ('{parts['t2']}'), which Chroma does not have.")
    if lokr and "magnitude" in parts:
        raise LoraError(
            f"'{path}' is a LoKr with DoRA ('{parts['magnitude']}'), which ChromaKit does not read. Export it without."
        )


def _low_rank(
    path: Path,
    name: str,
    parts: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    declared: Mapping[str, Any],
    layer: Rows,
) -> LoraModule:
    down, up = (_matrix(path, parts[kind], tensors) for kind in ("down", "up"))
    rank = down.shape[0]
    if up.shape[1] != rank:
        raise _mismatch(path, name, down, up)
    magnitude = None
    if "magnitude" in parts:
        magnitude = layer.take(_magnitude(path, parts["magnitude"], tensors, up.shape[0])).clone()
    return LoraModule(down, layer.take(up).clone(), _alpha(parts, tensors, declared, layer.name, rank), magnitude)


def _columns(module: LoraModule, columns: Tensor) -> LoraModule:
    """The same update by those columns of `up` alone, the others being zero; the factor on it stays as it is."""
    alpha = module.alpha * len(columns) / module.rank
    return LoraModule(module.down[columns], module.up[:, columns].contiguous(), alpha, module.magnitude)


def _lokr(
    path: Path,
    name: str,
    parts: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    declared: Mapping[str, Any],
    layer: Rows,
) -> LokrModule:
    # A whole factor goes before a product, as in ComfyUI.
    used = [f for f in _LOKR_FACTORS if f in parts and not (len(f) > 2 and f[:2] in parts)]
    factors = {factor: _matrix(path, parts[factor], tensors) for factor in used}
    for side in ("w1", "w2"):
        if side not in factors and factors[f"{side}_a"].shape[1] != factors[f"{side}_b"].shape[0]:
            raise _mismatch(path, name, factors[f"{side}_a"], factors[f"{side}_b"])
    module = LokrModule(1.0, **factors)  # type: ignore[arg-type]
    rank = module.rank
    alpha = _alpha(parts, tensors, declared, layer.name, rank or 1)
    if rank is None and "alpha" not in parts:
        # PEFT also scales whole factors by alpha / rank; the rank stands in its configuration only.
        nominal = declared_rank(declared, layer.name)
        if nominal is not None and module.w1 is not None:
            module = dataclasses.replace(module, w1=module.w1 * (alpha / nominal))
    return _rows_of(dataclasses.replace(module, alpha=alpha), layer)


def _rows_of(module: LokrModule, layer: Rows) -> LokrModule:
    """The part of a fused layer's product that is `layer`'s: again a product when it begins and ends with blocks."""
    if layer.of == 1:
        return module
    start, stop = layer.span(module.shape[0])
    height = module.blocks[1][0]
    if start % height or stop % height:
        return dataclasses.replace(module, rows=(start, stop))
    rows = slice(start // height, stop // height)
    if module.w1 is not None:
        return dataclasses.replace(module, w1=module.w1[rows].clone())
    assert module.w1_a is not None
    return dataclasses.replace(module, w1_a=module.w1_a[rows].clone())


def _alpha(
    parts: Mapping[str, str], tensors: Mapping[str, Tensor], declared: Mapping[str, Any], layer: str, rank: int
) -> float:
    if "alpha" in parts:
        return float(tensors[parts["alpha"]].float().item())
    return declared_alpha(declared, layer, rank)


def _matrix(path: Path, key: str, tensors: Mapping[str, Tensor]) -> Tensor:
    tensor = tensors[key]
    if tensor.ndim != 2 or not tensor.is_floating_point() or 0 in tensor.shape:
        raise LoraError(
            f"'{path}' has a tensor '{key}' of shape {list(tensor.shape)} in {tensor.dtype}; a LoRA matrix is a "
            "two-dimensional tensor of floating-point numbers."
        )
    return _finite(path, key, tensor)


def _magnitude(path: Path, key: str, tensors: Mapping[str, Tensor], rows: int) -> Tensor:
    """A DoRA's magnitudes [out]: PEFT holds a vector, other trainers one column."""
    tensor = tensors[key]
    if tuple(tensor.shape) not in ((rows,), (rows, 1)) or not tensor.is_floating_point():
        raise LoraError(
            f"'{path}' is a DoRA whose '{key}' has the shape {list(tensor.shape)}; readable is one magnitude for each "
            f"of the {rows} output rows, as PEFT and LyCORIS (wd_on_output) write it. Export it as a plain LoRA."
        )
    return _finite(path, key, tensor.flatten())


def _finite(path: Path, key: str, tensor: Tensor) -> Tensor:
    if tensor.element_size() < 2:
        tensor = tensor.float()
    if not tensor.isfinite().all():
        raise LoraError(f"'{path}' is unusable: '{key}' holds NaN or infinite numbers.")
    return tensor


def _mismatch(path: Path, name: str, first: Tensor, second: Tensor) -> LoraError:
    return LoraError(
        f"'{path}' is damaged: the matrices of '{name}' are {list(first.shape)} and {list(second.shape)}, "
        "which do not multiply."
    )


def _declared(path: Path, metadata: Mapping[str, str], has_magnitudes: bool) -> dict[str, Any]:
    """The PEFT configuration that diffusers puts into the header, or PEFT into a file beside; {} when there is none."""
    config: dict[str, Any] = {}
    beside = path.with_name(PEFT_CONFIG)
    try:
        if "lora_adapter_metadata" in metadata:
            whole = json.loads(metadata["lora_adapter_metadata"])
            config = {k.removeprefix("transformer."): v for k, v in whole.items() if k.startswith("transformer.")}
        elif path.name == PEFT_WEIGHTS and beside.is_file():
            config = json.loads(beside.read_text(encoding="utf-8"))
    except (ValueError, AttributeError, OSError) as error:
        raise LoraError(
            f"The adapter configuration of '{path}' cannot be read ({error}), so its alpha is unknown. "
            "Copy the file again together with its adapter_config.json."
        ) from error
    if config.get("use_dora") and not has_magnitudes:
        raise LoraError(
            f"'{path}' declares itself a DoRA, but holds no magnitudes (dora_scale or lora_magnitude_vector), without "
            "which it cannot be applied rightly. Export it again, complete."
        )
    return config
