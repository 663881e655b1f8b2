"""LoRA files: one value in memory, read from any known dialect, written in the one that every runtime applies in full.

That dialect, `universal`, is `transformer.<diffusers path>.lora_A.weight` [rank, in], `.lora_B.weight` [out, rank] and
`.alpha` (a number): ComfyUI and diffusers both load it with alpha honoured. In a file without alpha the scale is 1,
that is alpha = rank, as ComfyUI, diffusers and ai-toolkit have it, unless the header (diffusers) or the
`adapter_config.json` beside it (PEFT) declares another.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import LoraError, ModelFileError
from ..files import save_safetensors
from .dialects import declared_alpha, foreign_kinds, is_dora, locate, looks_like_checkpoint, part_of

SHOWN = 4
"""Keys that an error message quotes."""


@dataclass(frozen=True, eq=False)
class LoraModule:
    """One layer's low-rank update ΔW = (alpha / rank) · up @ down, with down [rank, in] and up [out, rank]."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """Rows of `down`."""
        return self.down.shape[0]

    def delta(self) -> Tensor:
        """ΔW [out, in] in fp32."""
        return (self.up.float() @ self.down.float()) * (self.alpha / self.rank)


@dataclass(frozen=True, eq=False)
class LoraFile:
    """A LoRA: layers by diffusers name (`transformer_blocks.0.attn.to_q`), header texts, and where it came from.

    `unmatched` lists the file's keys that mean nothing to Chroma; `adapters.check_fits` refuses them unless told to
    apply a part.
    """

    modules: dict[str, LoraModule]
    metadata: dict[str, str] = field(default_factory=dict)
    dialect: str = "universal"
    unmatched: tuple[str, ...] = ()

    @property
    def ranks(self) -> list[int]:
        """The ranks that occur, ascending."""
        return sorted({module.rank for module in self.modules.values()})

    @property
    def alphas(self) -> list[float]:
        """The alphas that occur, ascending."""
        return sorted({module.alpha for module in self.modules.values()})

    @property
    def parameters(self) -> int:
        """Numbers in all the matrices."""
        return sum(module.down.numel() + module.up.numel() for module in self.modules.values())


def describe(lora: LoraFile) -> str:
    """What a LoRA holds, in a few lines for a person."""
    dtypes = sorted({str(m.down.dtype).removeprefix("torch.") for m in lora.modules.values()})
    lines = [
        f"{len(lora.modules)} layers, rank {_listed(lora.ranks)}, alpha {_listed(lora.alphas)}, "
        f"{lora.parameters:,} parameters in {', '.join(dtypes)} ({lora.dialect} dialect)",
    ]
    if lora.unmatched:
        lines.append(f"{len(lora.unmatched)} keys are not Chroma's: {quoted(lora.unmatched)}")
    lines += [f"{key}: {value}" for key, value in sorted(lora.metadata.items()) if key != "format"]
    return "\n".join(lines)


def _listed(values: list[Any]) -> str:
    return ", ".join(f"{v:g}" for v in values)


def quoted(names: Sequence[str]) -> str:
    """The first few names for a message, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(f"'{name}'" for name in names[:SHOWN]) + more


def write_lora(path: Path | str, lora: LoraFile) -> None:
    """Write `lora` in the universal dialect, its tensors in the dtype they have; atomic.

    Raises LoraError when there is nothing to write, or when a number is not finite.
    """
    if not lora.modules:
        raise LoraError(f"There is no LoRA to write to '{path}': it has no layers.")
    tensors: dict[str, Tensor] = {}
    for name, module in lora.modules.items():
        if not (module.down.isfinite().all() and module.up.isfinite().all()):
            raise LoraError(f"The LoRA for '{path}' is not written: '{name}' holds NaN or infinite numbers.")
        # Copies: layers split from a fused one share their down matrix, which the file format does not allow.
        tensors[f"transformer.{name}.lora_A.weight"] = module.down.detach().clone()
        tensors[f"transformer.{name}.lora_B.weight"] = module.up.detach().clone()
        tensors[f"transformer.{name}.alpha"] = torch.tensor(float(module.alpha))
    save_safetensors(path, tensors, {"format": "pt", **lora.metadata})


def read_lora(path: Path | str) -> LoraFile:
    """Read a LoRA in any of the dialects in `dialects`; tensors on the CPU, as stored (8-bit floats become fp32).

    Fused layers of the original layout (`qkv`, `linear1`) are split exactly: every part shares `down` and takes its own
    rows of `up`. Keys that are no part of a Chroma LoRA are listed in `unmatched`.
    Raises LoraError, saying what was found, for an absent, damaged or pickled file, a whole model, another kind of
    adapter (LoKr, DoRA, …), or a file none of whose keys is Chroma's.
    """
    path = Path(path)
    if not path.is_file():
        raise LoraError(f"There is no LoRA file '{path}'. Check the name, and the folder that it is looked up in.")
    try:
        with torch.inference_mode(False), safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            _refuse_foreign(path, keys)
            metadata = dict(file.metadata() or {})
            # A copy of each: views of the file would change or crash when the file is replaced.
            tensors = {key: file.get_tensor(key).clone() for key in keys if part_of(key) is not None}
    except (SafetensorError, OSError, ValueError) as error:
        raise LoraError(_unreadable(path, error)) from error
    return _assemble(path, keys, tensors, metadata)


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
    """Raise for files that hold no plain LoRA at all, before a tensor of them is loaded."""
    dora = [key for key in keys if is_dora(key)]
    if dora:
        raise LoraError(
            f"'{path}' is a DoRA (it has '{dora[0]}'), which runtimes apply differently from each other and which "
            "ChromaKit does not read. Train or export it as a plain LoRA."
        )
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
        "lora_down/lora_up matrices for Chroma."
    )


def _assemble(path: Path, keys: list[str], tensors: dict[str, Tensor], metadata: dict[str, str]) -> LoraFile:
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
    modules: dict[str, LoraModule] = {}
    dialects: list[str] = []
    declared = _declared(path, metadata)
    for name, parts in raw.items():
        found = locate(name)
        if found is None or not {"down", "up"} <= parts.keys():
            unmatched += parts.values()
            continue
        dialect, layers = found
        if dialect not in dialects:
            dialects.append(dialect)
        down, up = (_matrix(path, parts[kind], tensors) for kind in ("down", "up"))
        rank = down.shape[0]
        if up.shape[1] != rank:
            raise LoraError(
                f"'{path}' is damaged: the matrices of '{name}' are {list(down.shape)} and {list(up.shape)}, "
                "which do not multiply."
            )
        for layer in layers:
            if layer.name in modules:
                raise LoraError(f"'{path}' has the layer '{layer.name}' twice, in two dialects.")
            if "alpha" in parts:
                alpha = float(tensors[parts["alpha"]].float().item())
            else:
                alpha = declared_alpha(declared, layer.name, rank)
            try:
                modules[layer.name] = LoraModule(down, layer.take(up).clone(), alpha)
            except ModelFileError as error:
                raise LoraError(f"'{path}' does not fit Chroma. {error}") from error
    if not modules:
        kinds = foreign_kinds(unmatched)
        raise LoraError(
            f"None of the {len(keys)} keys in '{path}' belongs to Chroma: {quoted(unmatched)}"
            f"{f' ({kinds[0]})' if kinds else ''}. It was made for another model, or in an unknown dialect."
        )
    return LoraFile(modules, metadata, "+".join(dialects), tuple(unmatched))


def _matrix(path: Path, key: str, tensors: Mapping[str, Tensor]) -> Tensor:
    tensor = tensors[key]
    if tensor.ndim != 2 or not tensor.is_floating_point() or 0 in tensor.shape:
        raise LoraError(
            f"'{path}' has a tensor '{key}' of shape {list(tensor.shape)} in {tensor.dtype}; a LoRA matrix is a "
            "two-dimensional tensor of floating-point numbers."
        )
    if tensor.element_size() < 2:
        tensor = tensor.float()
    if not tensor.isfinite().all():
        raise LoraError(f"'{path}' is unusable: '{key}' holds NaN or infinite numbers.")
    return tensor


def _declared(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The PEFT configuration that diffusers puts into the header, or PEFT into a file beside; {} when there is none."""
    config: dict[str, Any] = {}
    beside = path.with_name("adapter_config.json")
    try:
        if "lora_adapter_metadata" in metadata:
            whole = json.loads(metadata["lora_adapter_metadata"])
            config = {k.removeprefix("transformer."): v for k, v in whole.items() if k.startswith("transformer.")}
        elif path.name == "adapter_model.safetensors" and beside.is_file():
            config = json.loads(beside.read_text(encoding="utf-8"))
    except (ValueError, AttributeError, OSError) as error:
        raise LoraError(
            f"The adapter configuration of '{path}' cannot be read ({error}), so its alpha is unknown. "
            "Copy the file again together with its adapter_config.json."
        ) from error
    if config.get("use_dora"):
        raise LoraError(f"'{path}' declares itself a DoRA, which ChromaKit does not read. Export it as a plain LoRA.")
    return config
