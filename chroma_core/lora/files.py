"""LoRA files: one value in memory, read from any known key format, written in the one that every runtime applies
in full.

(Or, on demand, in the names of another program: see `key_formats`.)
That key format, `universal`, is `transformer.<diffusers path>.lora_A.weight` [rank, in], `.lora_B.weight` [out, rank]
and `.alpha` (a number): ComfyUI and diffusers both load it with alpha honoured. A DoRA also has `.dora_scale` [out, 1],
its magnitudes; a LoKr has LyCORIS' `.lokr_w1`, `.lokr_w2` or `.lokr_w2_a` and `.lokr_w2_b` instead; what else there is
(`modules.KINDS`) has the names that ComfyUI reads. In a file without
alpha the scale is 1, that is alpha = rank, as ComfyUI, diffusers and ai-toolkit have it, unless the header (diffusers)
or the `adapter_config.json` beside it (PEFT) declares another.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import LoraError, ModelFileError
from ..files import write_json
from ..model.device import broken
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
from .modules import (
    AdapterModule,
    FullModule,
    LohaModule,
    LokrModule,
    LoraFile,
    LoraModule,
    OftModule,
    quoted,
)


def write_lora(path: Path | str, lora: LoraFile, key_format: str = "universal") -> Path:
    """Write `lora` in one of KEY_FORMATS, its tensors in the dtype they have; atomic. Returns the file's path.

    PEFT's form is a folder: `path` without `.safetensors`, in which `adapter_model.safetensors` and
    `adapter_config.json` are made; that file's path is returned.
    Raises LoraError when there is nothing to write, when a number is not finite, or when the key format cannot hold it.
    """
    if not lora.modules:
        raise LoraError(f"There is no LoRA to write to '{path}': it has no layers.")
    for name, module in lora.modules.items():
        if any(map(broken, module.factors().values())):
            raise LoraError(f"The LoRA for '{path}' is not written: '{name}' holds NaN or infinite numbers.")
    content = written(lora, key_format)
    for key, tensor in content.tensors.items():
        if broken(tensor):
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
    rows of `up` (of a block-diagonal one only the columns that are its own), of magnitudes, differences, rotations, or
    the Kronecker or Hadamard product. Keys that are no part of a Chroma LoRA are listed in `unmatched`.
    Raises LoraError, saying what was found, for an absent, damaged or pickled file, a whole model, another kind of
    adapter (BOFT, GLoRA, …), or a file none of whose keys is Chroma's.
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
        "lora_down/lora_up matrices, LyCORIS' LoKr, LoHa and OFT, and differences (diff, diff_b), for Chroma."
    )


PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""The two files of a folder that PEFT saves."""

_LOKR_FACTORS = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")
_LOHA_FACTORS = ("w1_a", "w1_b", "w2_a", "w2_b")


@dataclass(frozen=True)
class _Source:
    """The file that is read, for messages; its readable tensors by key; PEFT's configuration, empty without one."""

    path: Path
    tensors: Mapping[str, Tensor]
    declared: Mapping[str, Any]

    def matrix(self, key: str) -> Tensor:
        """Raises LoraError for anything but a matrix of finite numbers."""
        return self.floats(key, (2,))

    def floats(self, key: str, dimensions: Sequence[int]) -> Tensor:
        """Raises LoraError for anything but finite numbers in one of so many dimensions."""
        tensor = self.tensors[key]
        if tensor.ndim not in dimensions or not tensor.is_floating_point() or 0 in tensor.shape:
            raise LoraError(
                f"'{self.path}' has a tensor '{key}' of shape {list(tensor.shape)} in {tensor.dtype}; of that "
                f"name are floating-point numbers in {' or '.join(map(str, dimensions))} dimensions."
            )
        return self._finite(key, tensor)

    def magnitude(self, parts: Mapping[str, str], shape: tuple[int, int], layer: Rows) -> Tensor | None:
        """A DoRA's magnitudes: [out] of the layer's rows (PEFT holds a vector, others one column), or [1, in]."""
        if "magnitude" not in parts:
            return None
        rows, columns = shape
        key = parts["magnitude"]
        tensor = self.tensors[key]
        if tensor.is_floating_point() and tuple(tensor.shape) in ((rows,), (rows, 1)):
            return layer.take(self._finite(key, tensor.flatten())).clone()
        if not tensor.is_floating_point() or tuple(tensor.shape) != (1, columns):
            raise LoraError(
                f"'{self.path}' is a DoRA whose '{key}' has the shape {list(tensor.shape)}; readable is one magnitude "
                f"for each of the {rows} output rows, or [1, {columns}] for the input columns."
            )
        if layer.of > 1:
            raise LoraError(
                f"'{self.path}' is a DoRA by input columns over a fused layer ('{key}'): its norms go over q, k and v "
                "together, which cannot be taken apart without the base. Train it on separate layers, or by output "
                "rows (LyCORIS: wd_on_output)."
            )
        return self._finite(key, tensor)

    def bias(self, parts: Mapping[str, str], scale: float, layer: Rows) -> Tensor | None:
        """The difference of the layer's bias [out], PEFT's with its factor; None for a part of a fused layer with 0."""
        key = parts.get("diff_b", parts.get("up_bias"))
        if key is None:
            return None
        bias = layer.take(self.floats(key, (1,)))
        if layer.of > 1 and not bias.any():
            return None
        return (bias * scale if "diff_b" not in parts else bias).clone()

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
        if broken(tensor):
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
            unchanged = columns is not None and not len(columns) and "magnitude" not in parts
            try:
                module = (_bias_alone if unchanged else build)(source, name, parts, layer)
            except ModelFileError as error:
                raise LoraError(f"'{path}' does not fit Chroma. {error}") from error
            if module is None:
                continue
            if isinstance(module, LoraModule) and columns is not None and len(columns):
                module = _columns(module, columns)
            modules[layer.name] = _joined(path, layer.name, modules.get(layer.name), module)
    if not modules:
        kinds = foreign_kinds(unmatched)
        raise LoraError(
            f"None of the {len(keys)} keys in '{path}' belongs to Chroma: {quoted(unmatched)}"
            f"{f' ({kinds[0]})' if kinds else ''}. It was made for another model, or in an unknown key format."
        )
    scaled = [parts for parts in raw.values() if not {"alpha", "diff", "diff_b", "oft_blocks"} >= parts.keys()]
    stated = ["alpha" in parts for parts in scaled if len(parts) > 1]
    stands = "tensors" if all(stated) else "configuration" if declared else "mixed" if any(stated) else "absent"
    return LoraFile(modules, metadata, "+".join(found_formats), tuple(unmatched), stands)


def _builder(parts: Mapping[str, str]) -> Any:
    """What makes a module of those parts (None of a part that is not changed); None when they are incomplete."""
    if {"down", "up"} <= parts.keys():
        return _low_rank
    if all(f"hada_{factor}" in parts for factor in _LOHA_FACTORS):
        return _loha
    if all(f"lokr_{side}" in parts or {f"lokr_{side}_a", f"lokr_{side}_b"} <= parts.keys() for side in ("w1", "w2")):
        return _lokr
    if "oft_blocks" in parts:
        return _oft
    return _full if "diff" in parts else _bias_alone if "diff_b" in parts else None


_FAMILIES = {"down": "a LoRA", "lokr": "a LoKr", "hada": "a LoHa", "oft": "an OFT", "diff": "a full difference"}


def _check_parts(path: Path, name: str, parts: Mapping[str, str]) -> None:
    found = dict.fromkeys(kind.partition("_")[0] for kind in parts if kind != "diff_b")
    families = [words for family, words in _FAMILIES.items() if family in found]
    if len(families) > 1:
        raise LoraError(f"'{path}' holds several adapters: '{name}' is both {' and '.join(families)}.")
    for kind in ("lokr_t2", "hada_t1", "hada_t2"):
        if kind in parts:
            raise LoraError(f"'{path}' is made for convolutions ('{parts[kind]}'), which Chroma does not have.")
    if "magnitude" in parts and not families[0].endswith(("LoRA", "LoKr", "LoHa")):
        raise LoraError(
            f"'{path}' is {families[0]} with DoRA ('{parts['magnitude']}'), which ChromaKit does not read. Export it "
            "without."
        )


def _joined(path: Path, name: str, before: AdapterModule | None, module: AdapterModule) -> AdapterModule:
    """Two entries of one layer as one: a bias may stand under another name than the rest. Raises LoraError."""
    if before is None:
        return module
    for whole, bias in ((before, module), (module, before)):
        if isinstance(bias, FullModule) and bias.diff is None and whole.bias is None:
            return dataclasses.replace(whole, bias=bias.bias)
    raise LoraError(f"'{path}' has the layer '{name}' twice, in two key formats.")


def _low_rank(source: _Source, name: str, parts: Mapping[str, str], layer: Rows) -> LoraModule:
    down, up = source.matrix(parts["down"]), source.matrix(parts["up"])
    rank = down.shape[0]
    if up.shape[1] != rank:
        raise source.mismatch(name, down, up)
    alpha = source.alpha(parts, layer.name, rank)
    magnitude = source.magnitude(parts, (up.shape[0], down.shape[1]), layer)
    bias = source.bias(parts, alpha / rank, layer)
    return LoraModule(down, layer.take(up).clone(), alpha, magnitude, bias=bias)


def _full(source: _Source, name: str, parts: Mapping[str, str], layer: Rows) -> FullModule:
    diff = source.floats(parts["diff"], (1, 2))
    return FullModule(layer.take(diff).clone(), bias=source.bias(parts, 1.0, layer))


def _bias_alone(source: _Source, name: str, parts: Mapping[str, str], layer: Rows) -> FullModule | None:
    bias = source.bias(parts, 1.0, layer)
    return None if bias is None else FullModule(bias=bias)


def _loha(source: _Source, name: str, parts: Mapping[str, str], layer: Rows) -> LohaModule:
    factors = {factor: source.matrix(parts[f"hada_{factor}"]) for factor in _LOHA_FACTORS}
    for side in ("w1", "w2"):
        if factors[f"{side}_a"].shape[1] != factors[f"{side}_b"].shape[0]:
            raise source.mismatch(name, factors[f"{side}_a"], factors[f"{side}_b"])
    whole = LohaModule(**factors, alpha=source.alpha(parts, layer.name, factors["w1_b"].shape[0]))
    if (factors["w2_a"].shape[0], factors["w2_b"].shape[1]) != whole.shape:
        raise source.mismatch(name, factors["w1_a"], factors["w2_a"])
    rows = {factor: layer.take(factors[factor]).clone() for factor in ("w1_a", "w2_a")}
    magnitude, bias = source.magnitude(parts, whole.shape, layer), source.bias(parts, 1.0, layer)
    return dataclasses.replace(whole, **rows, magnitude=magnitude, bias=bias)


def _oft(source: _Source, name: str, parts: Mapping[str, str], layer: Rows) -> OftModule:
    key = parts["oft_blocks"]
    blocks = source.floats(key, (3, 4))
    if blocks.ndim == 4:
        raise LoraError(f"'{source.path}' is a BOFT ('{key}' has four dimensions), which ChromaKit does not read.")
    count, size = blocks.shape[:2]
    if blocks.shape[2] != size:
        raise LoraError(f"'{source.path}' is damaged: the blocks of '{key}' are not square: {list(blocks.shape)}.")
    # LyCORIS' constraint on all the blocks together: its alpha, where it is more than 0.
    constraint = source.number(parts["alpha"]) if "alpha" in parts else 0.0
    length = float((blocks.double() - blocks.double().mT).norm()) + 1e-8
    if 0 < constraint < length:
        blocks = (blocks.double() * (constraint / length)).float()
    start, stop = layer.span(count * size)
    if start % size or stop % size:
        raise LoraError(
            f"'{source.path}' does not fit Chroma: the rotation '{key}' goes over blocks of {size} rows, which do not "
            f"part where '{layer.name}' begins and ends (rows {start} to {stop} of the fused layer). Train it on "
            "separate layers."
        )
    rescale = None
    if "rescale" in parts:
        given = source.floats(parts["rescale"], (1, 2))
        if given.numel() != count * size:
            raise source.mismatch(name, blocks, given)
        rescale = given.reshape(-1, 1)[start:stop].clone()
    own = blocks[start // size : stop // size].clone()
    return OftModule(own, rescale, bias=source.bias(parts, 1.0, layer))


def _columns(module: LoraModule, columns: Tensor) -> LoraModule:
    """The same update by those columns of `up` alone, the others being zero; the factor on it stays as it is."""
    alpha = module.alpha * len(columns) / module.rank
    down, up = module.down[columns], module.up[:, columns].contiguous()
    return dataclasses.replace(module, down=down, up=up, alpha=alpha)


def _lokr(source: _Source, name: str, parts: Mapping[str, str], layer: Rows) -> LokrModule:
    # A whole factor goes before a product, as in ComfyUI.
    given = {kind.removeprefix("lokr_") for kind in parts if kind.startswith("lokr_")}
    used = [f for f in _LOKR_FACTORS if f in given and not (len(f) > 2 and f[:2] in given)]
    factors = {factor: source.matrix(parts[f"lokr_{factor}"]) for factor in used}
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
    magnitude, bias = source.magnitude(parts, module.shape, layer), source.bias(parts, 1.0, layer)
    return dataclasses.replace(
        _rows_of(dataclasses.replace(module, alpha=alpha), layer), magnitude=magnitude, bias=bias
    )


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
