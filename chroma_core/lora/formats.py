"""LoRA files: one value in memory, read from any known dialect, written in the one that every runtime applies in full.

That dialect, `universal`, is `transformer.<diffusers path>.lora_A.weight` [rank, in], `.lora_B.weight` [out, rank] and
`.alpha` (a number): ComfyUI and diffusers both load it with alpha honoured. A DoRA also has `.dora_scale` [out, 1], its
magnitudes; a LoKr has LyCORIS' `.lokr_w1`, `.lokr_w2` or `.lokr_w2_a` and `.lokr_w2_b` instead. In a file without alpha
the scale is 1, that is alpha = rank, as ComfyUI, diffusers and ai-toolkit have it, unless the header (diffusers) or the
`adapter_config.json` beside it (PEFT) declares another.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import LoraError
from ..files import save_safetensors
from .assembly import assemble
from .dialects import foreign_kinds, looks_like_checkpoint, part_of
from .modules import AdapterModule, LokrModule, LoraFile, LoraModule, quoted

__all__ = ["LokrModule", "LoraFile", "LoraModule", "describe", "quoted", "read_lora", "write_lora"]

_KINDS = {"lora": "", "dora": "DoRA ", "lokr": "LoKr "}


def describe(lora: LoraFile) -> str:
    """What a LoRA holds, in a few lines for a person."""
    tensors = [tensor for module in lora.modules.values() for tensor in module.factors().values()]
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
    kinds = [module.kind for module in lora.modules.values()]
    counted = " and ".join(f"{kinds.count(kind)} {_KINDS[kind]}layers" for kind in _KINDS if kind in kinds)
    lines = [
        f"{counted}, {f'rank {_listed(lora.ranks)}' if lora.ranks else 'full rank'}, alpha {_listed(lora.alphas)}, "
        f"{lora.parameters:,} parameters in {', '.join(dtypes)} ({lora.dialect} dialect)",
    ]
    if lora.unmatched:
        lines.append(f"{len(lora.unmatched)} keys are not Chroma's: {quoted(lora.unmatched)}")
    lines += [f"{key}: {value}" for key, value in sorted(lora.metadata.items()) if key != "format"]
    return "\n".join(lines)


def _listed(values: list[Any]) -> str:
    return ", ".join(f"{v:g}" for v in values)


def write_lora(path: Path | str, lora: LoraFile) -> None:
    """Write `lora` in the universal dialect, its tensors in the dtype they have; atomic.

    Raises LoraError when there is nothing to write, or when a number is not finite.
    """
    if not lora.modules:
        raise LoraError(f"There is no LoRA to write to '{path}': it has no layers.")
    tensors: dict[str, Tensor] = {}
    for name, module in lora.modules.items():
        if not all(tensor.isfinite().all() for tensor in module.factors().values()):
            raise LoraError(f"The LoRA for '{path}' is not written: '{name}' holds NaN or infinite numbers.")
        # Copies: layers split from a fused one share their down matrix, which the file format does not allow.
        for leaf, tensor in _leaves(path, name, module).items():
            tensors[f"transformer.{name}.{leaf}"] = tensor.detach().clone()
        tensors[f"transformer.{name}.alpha"] = torch.tensor(float(module.alpha))
    save_safetensors(path, tensors, {"format": "pt", **lora.metadata})


def _leaves(path: Path | str, name: str, module: AdapterModule) -> dict[str, Tensor]:
    """How a module's tensors are called in a file."""
    if isinstance(module, LoraModule):
        leaves = {"lora_A.weight": module.down, "lora_B.weight": module.up}
        # One column: ComfyUI multiplies the weight [out, in] by it.
        return leaves if module.magnitude is None else {**leaves, "dora_scale": module.magnitude[:, None]}
    if module.rows is not None:
        raise LoraError(
            f"The LoKr for '{path}' is not written: '{name}' is a part of a fused layer that is no Kronecker product "
            "by itself. Use the file that it was read from."
        )
    return {f"lokr_{factor}": tensor.contiguous() for factor, tensor in module.factors().items()}


def read_lora(path: Path | str) -> LoraFile:
    """Read a LoRA in any of the dialects in `dialects`; tensors on the CPU, as stored (8-bit floats become fp32).

    Fused layers of the original layout (`qkv`, `linear1`) are split exactly: every part shares `down` and takes its own
    rows of `up`, of the magnitudes or of the Kronecker product. Keys that are no part of a Chroma LoRA are listed in
    `unmatched`.
    Raises LoraError, saying what was found, for an absent, damaged or pickled file, a whole model, another kind of
    adapter (LoHa, OFT, …), or a file none of whose keys is Chroma's.
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
    return assemble(path, keys, tensors, metadata)


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
