"""LoRA files: one value in memory, read from any known key format, written in the one that every runtime applies
in full.

(Or, on demand, in the names of another program: see `key_formats`.)
That key format, `universal`, is `transformer.<diffusers path>.lora_A.weight` [rank, in], `.lora_B.weight` [out, rank]
and `.alpha` (a number): ComfyUI and diffusers both load it with alpha honoured. A DoRA also has `.dora_scale` [out, 1],
its magnitudes; a LoKr has LyCORIS' `.lokr_w1`, `.lokr_w2` or `.lokr_w2_a` and `.lokr_w2_b` instead. In a file without
alpha the scale is 1, that is alpha = rank, as ComfyUI, diffusers and ai-toolkit have it, unless the header (diffusers)
or the `adapter_config.json` beside it (PEFT) declares another.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import LoraError, ModelFileError
from ..files import write_json
from ..names.transformer import Rows
from ..weights.safetensors_files import save_safetensors
from .key_formats import (
    declared_alpha,
    declared_rank,
    foreign_kinds,
    locate,
    looks_like_checkpoint,
    own_columns,
    part_of,
    written,
)
from .modules import AdapterModule, LokrModule, LoraFile, LoraModule, quoted


def write_lora(path: Path | str, lora: LoraFile, key_format: str = "universal") -> Path:
    """Write `lora` in one of KEY_FORMATS, its tensors in the dtype they have; atomic. Returns the file's path.

    PEFT's form is a folder: `path` without `.safetensors`, in which `adapter_model.safetensors` and
    `adapter_config.json` are made; that file's path is returned.
    Raises LoraError when there is nothing to write, when a number is not finite, or when the key format cannot hold it.
    """
    if not lora.modules:
        raise LoraError(f"There is no LoRA to write to '{path}': it has no layers.")
    for name, module in lora.modules.items():
        if not all(tensor.isfinite().all() for tensor in module.factors().values()):
            raise LoraError(f"The LoRA for '{path}' is not written: '{name}' holds NaN or infinite numbers.")
    content = written(lora, key_format)
    for key, tensor in content.tensors.items():
        if not tensor.isfinite().all():
            raise LoraError(
                f"The LoRA for '{path}' is not written: with its alpha multiplied in, '{key}' has numbers too large "
                f"for {str(tensor.dtype)[6:]}. Convert it to bf16 or fp32."
            )
    path = written_path(path, key_format)
    if content.config is not None:
        # First the small file: weights without their configuration would be read with a wrong alpha.
        write_json(path.with_name(PEFT_CONFIG), content.config)
    save_safetensors(path, content.tensors, content.header)
    return path


def written_path(path: Path | str, key_format: str) -> Path:
    """The file that `write_lora` writes for `path`."""
    path = Path(path)
    if key_format != "peft" or path.name == PEFT_WEIGHTS:
        return path
    return (path.with_suffix("") if path.suffix == ".safetensors" else path) / PEFT_WEIGHTS


def read_lora(path: Path | str) -> LoraFile:
    """Read a LoRA in any key format (see `key_formats`), also a folder of PEFT's.

    Its tensors are on the CPU, as stored (8-bit floats become fp32).
    Fused layers of the original layout (`qkv`, `linear1`) are split exactly: every part shares `down` and takes its own
    rows of `up` (of a block-diagonal one only the columns that are its own), of the magnitudes or of the Kronecker
    product. Keys that are no part of a Chroma LoRA are listed in `unmatched`.
    Raises LoraError, saying what was found, for an absent, damaged or pickled file, a whole model, another kind of
    adapter (LoHa, OFT, …), or a file none of whose keys is Chroma's.
    """
    with _opened(path) as (path, file), torch.inference_mode(False):
        keys = list(file.keys())
        _refuse_foreign(path, keys)
        # A copy of each: views of the file would change or crash when the file is replaced.
        tensors = {key: file.get_tensor(key).clone() for key in keys if part_of(key) is not None}
        metadata = dict(file.metadata() or {})
    return assemble(path, keys, tensors, metadata)


def read_metadata(path: Path | str) -> dict[str, str]:
    """The header of a LoRA file alone. Raises LoraError for a file that is absent or no safetensors."""
    with _opened(path) as (_, file):
        return dict(file.metadata() or {})


@contextmanager
def _opened(path: Path | str) -> Iterator[tuple[Path, Any]]:
    """The file of a LoRA, in PEFT's folder too, and its content. Raises LoraError."""
    path = Path(path)
    if (path / PEFT_WEIGHTS).is_file():
        path /= PEFT_WEIGHTS
    if not path.is_file():
        raise LoraError(f"There is no LoRA file '{path}'. Check the name, and the folder that it is looked up in.")
    try:
        with safe_open(path, framework="pt") as file:
            yield path, file
    except (SafetensorError, OSError, ValueError) as error:
        raise LoraError(_unreadable(path, error)) from error


def lora_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> LoraFile:
    """A LoRA from the tensors of a file, without the file. Raises LoraError as `read_lora` does."""
    name = Path("the LoRA")
    _refuse_foreign(name, list(tensors))
    with torch.inference_mode(False):
        held = {key: tensor.detach().cpu().clone() for key, tensor in tensors.items() if part_of(key) is not None}
        return assemble(name, list(tensors), held, dict(metadata or {}))


def _unreadable(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        start = file.read(4)
    if start[:2] == b"PK" or start[:1] == b"\x80":
        return (
            f"'{path}' is a pickled file (.pt, .ckpt or .bin), which can run code when it is opened, so it is not "
            "read. Use the .safetensors version of this LoRA."
        )
    return (
        f"'{path}' is not a readable safetensors file ({error}). It may be cut off or damaged: download or copy it "
        "again."
    )


def _refuse_foreign(path: Path, keys: list[str]) -> None:
    """Raise for files that hold no LoRA at all, before a tensor of them is loaded."""
    parts = [part for part in map(part_of, keys) if part is not None and part.kind != "alpha"]
    if parts:
        return
    kinds = foreign_kinds(keys)
    if kinds:
        found = f"it holds {' and '.join(kinds)} (e.g. '{keys[0]}'), which ChromaKit does not read"
    elif looks_like_checkpoint(keys):
        found = f"it is a whole model ({len(keys)} tensors, e.g. '{keys[0]}'): load it as a model instead"
    else:
        found = f"it has no LoRA keys; its {len(keys)} tensors are {quoted(keys)}" if keys else "it is empty"
    raise LoraError(
        f"'{path}' is not a LoRA that can be applied: {found}. Readable are LoRA files with lora_A/lora_B or "
        "lora_down/lora_up matrices, and LoKr files with lokr_w1/lokr_w2, for Chroma."
    )


PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""The two files of a folder that PEFT saves."""

_LOKR_FACTORS = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")


@dataclass(frozen=True)
class _Source:
    """The file that is read, for messages; its readable tensors by key; PEFT's configuration, empty without one."""

    path: Path
    tensors: Mapping[str, Tensor]
    declared: Mapping[str, Any]

    def matrix(self, key: str) -> Tensor:
        """Raises LoraError for anything but a matrix of finite numbers."""
        tensor = self.tensors[key]
        if tensor.ndim != 2 or not tensor.is_floating_point() or 0 in tensor.shape:
            raise LoraError(
                f"'{self.path}' has a tensor '{key}' of shape {list(tensor.shape)} in {tensor.dtype}; a LoRA matrix is "
                "a two-dimensional tensor of floating-point numbers."
            )
        return self._finite(key, tensor)

    def magnitude(self, key: str, rows: int) -> Tensor:
        """A DoRA's magnitudes [out]: PEFT holds a vector, other trainers one column."""
        tensor = self.tensors[key]
        if tuple(tensor.shape) not in ((rows,), (rows, 1)) or not tensor.is_floating_point():
            raise LoraError(
                f"'{self.path}' is a DoRA whose '{key}' has the shape {list(tensor.shape)}; readable is one magnitude "
                f"for each of the {rows} output rows, as PEFT and LyCORIS (wd_on_output) write it. Export it as a "
                "plain LoRA."
            )
        return self._finite(key, tensor.flatten())

    def alpha(self, parts: Mapping[str, str], layer: str, rank: int) -> float:
        """What a tensor says, else the configuration, else the rank. Raises LoraError for what is no finite number."""
        stated = parts.get("alpha")
        if stated is None:
            alpha, where = declared_alpha(self.declared, layer, rank), "in the configuration"
        else:
            alpha, where = self.number(stated), f"'{stated}'"
        if not math.isfinite(alpha):
            raise LoraError(
                f"'{self.path}' is unusable: the alpha of '{layer}' ({where}) is {alpha}, not a finite number, so its "
                "strength is unknown. Export it again; or remove its alphas, if they equal the rank."
            )
        return alpha

    def number(self, key: str) -> float:
        """A tensor of one number; NaN for any other."""
        tensor = self.tensors[key]
        return float(tensor.float().item()) if tensor.numel() == 1 else math.nan

    def mismatch(self, name: str, first: Tensor, second: Tensor) -> LoraError:
        """The error for two matrices that do not multiply."""
        return LoraError(
            f"'{self.path}' is damaged: the matrices of '{name}' are {list(first.shape)} and {list(second.shape)}, "
            "which do not multiply."
        )

    def _finite(self, key: str, tensor: Tensor) -> Tensor:
        if tensor.element_size() < 2:
            tensor = tensor.float()
        if not tensor.isfinite().all():
            raise LoraError(f"'{self.path}' is unusable: '{key}' holds NaN or infinite numbers.")
        return tensor


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
    found_formats: list[str] = []
    declared = _declared(path, metadata, any("magnitude" in parts for parts in raw.values()))
    source = _Source(path, tensors, declared)
    for name, parts in raw.items():
        found = locate(name)
        build = _builder(parts)
        if found is None or build is None:
            unmatched += parts.values()
            continue
        key_format, layers = found
        if key_format not in found_formats:
            found_formats.append(key_format)
        _check_parts(path, name, parts)
        own = own_columns(tensors[parts["up"]], layers) if build is _low_rank else {}
        for layer in layers:
            columns = own.get(layer.name)
            if columns is not None and not len(columns):
                if "magnitude" not in parts:
                    continue  # a part that the LoRA does not change
                columns = None
            if layer.name in modules:
                raise LoraError(f"'{path}' has the layer '{layer.name}' twice, in two key formats.")
            try:
                module = build(source, name, parts, layer)
                modules[layer.name] = module if columns is None else _columns(module, columns)
            except ModelFileError as error:
                raise LoraError(f"'{path}' does not fit Chroma. {error}") from error
    if not modules:
        kinds = foreign_kinds(unmatched)
        raise LoraError(
            f"None of the {len(keys)} keys in '{path}' belongs to Chroma: {quoted(unmatched)}"
            f"{f' ({kinds[0]})' if kinds else ''}. It was made for another model, or in an unknown key format."
        )
    stated = [("alpha" in parts) for name, parts in raw.items() if len(parts) > 1]
    stands = "tensors" if all(stated) else "configuration" if declared else "mixed" if any(stated) else "absent"
    return LoraFile(modules, metadata, "+".join(found_formats), tuple(unmatched), stands)


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


def _low_rank(source: _Source, name: str, parts: Mapping[str, str], layer: Rows) -> LoraModule:
    down, up = source.matrix(parts["down"]), source.matrix(parts["up"])
    rank = down.shape[0]
    if up.shape[1] != rank:
        raise source.mismatch(name, down, up)
    magnitude = None
    if "magnitude" in parts:
        magnitude = layer.take(source.magnitude(parts["magnitude"], up.shape[0])).clone()
    return LoraModule(down, layer.take(up).clone(), source.alpha(parts, layer.name, rank), magnitude)


def _columns(module: LoraModule, columns: Tensor) -> LoraModule:
    """The same update by those columns of `up` alone, the others being zero; the factor on it stays as it is."""
    alpha = module.alpha * len(columns) / module.rank
    return LoraModule(module.down[columns], module.up[:, columns].contiguous(), alpha, module.magnitude)


def _lokr(source: _Source, name: str, parts: Mapping[str, str], layer: Rows) -> LokrModule:
    # A whole factor goes before a product, as in ComfyUI.
    used = [f for f in _LOKR_FACTORS if f in parts and not (len(f) > 2 and f[:2] in parts)]
    factors = {factor: source.matrix(parts[factor]) for factor in used}
    for side in ("w1", "w2"):
        if side not in factors and factors[f"{side}_a"].shape[1] != factors[f"{side}_b"].shape[0]:
            raise source.mismatch(name, factors[f"{side}_a"], factors[f"{side}_b"])
    module = LokrModule(1.0, **factors)  # type: ignore[arg-type]
    rank = module.rank
    if rank is None and "alpha" in parts:  # means nothing to whole factors; LyCORIS writes 1e10, fp16 makes inf of it
        stated = source.number(parts["alpha"])
        alpha = stated if math.isfinite(stated) else 1.0
    else:
        alpha = source.alpha(parts, layer.name, rank or 1)
        # PEFT also scales whole factors by alpha / rank; the rank stands in its configuration only.
        nominal = declared_rank(source.declared, layer.name) if rank is None else None
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
