"""LoRA files: one value in memory, read from any known dialect, written in the one that every runtime applies in full.

(Or, on demand, in the names of another program: see `writing`.)
That dialect, `universal`, is `transformer.<diffusers path>.lora_A.weight` [rank, in], `.lora_B.weight` [out, rank] and
`.alpha` (a number): ComfyUI and diffusers both load it with alpha honoured. A DoRA also has `.dora_scale` [out, 1], its
magnitudes; a LoKr has LyCORIS' `.lokr_w1`, `.lokr_w2` or `.lokr_w2_a` and `.lokr_w2_b` instead. In a file without alpha
the scale is 1, that is alpha = rank, as ComfyUI, diffusers and ai-toolkit have it, unless the header (diffusers) or the
`adapter_config.json` beside it (PEFT) declares another.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import LoraError
from ..files import write_json
from ..weights.safetensors_files import save_safetensors
from .assembly import PEFT_CONFIG, PEFT_WEIGHTS, assemble
from .dialects import foreign_kinds, looks_like_checkpoint, part_of
from .modules import LokrModule, LoraFile, LoraModule, quoted
from .writing import written

__all__ = [
    "LokrModule",
    "LoraFile",
    "LoraModule",
    "describe",
    "lora_of",
    "quoted",
    "read_lora",
    "read_metadata",
    "write_lora",
    "written_path",
]

LONGEST_FIELD = 2000
"""Characters of a header field that a description shows."""

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
    lines += [f"{key}: {_short(value)}" for key, value in sorted(lora.metadata.items()) if key != "format"]
    return "\n".join(lines)


def _short(value: str) -> str:
    """Some trainers write every tag of their data set into one field."""
    return value if len(value) <= LONGEST_FIELD else f"{value[:LONGEST_FIELD]}… ({len(value):,} characters)"


def _listed(values: list[Any]) -> str:
    return ", ".join(f"{v:g}" for v in values)


def write_lora(path: Path | str, lora: LoraFile, dialect: str = "universal") -> Path:
    """Write `lora` in a dialect of `writing`, its tensors in the dtype they have; atomic. Returns the file's path.

    PEFT's form is a folder: `path` without `.safetensors`, in which `adapter_model.safetensors` and
    `adapter_config.json` are made; that file's path is returned.
    Raises LoraError when there is nothing to write, when a number is not finite, or when the dialect cannot hold it.
    """
    if not lora.modules:
        raise LoraError(f"There is no LoRA to write to '{path}': it has no layers.")
    for name, module in lora.modules.items():
        if not all(tensor.isfinite().all() for tensor in module.factors().values()):
            raise LoraError(f"The LoRA for '{path}' is not written: '{name}' holds NaN or infinite numbers.")
    content = written(lora, dialect)
    for key, tensor in content.tensors.items():
        if not tensor.isfinite().all():
            raise LoraError(
                f"The LoRA for '{path}' is not written: with its alpha multiplied in, '{key}' has numbers too large "
                f"for {str(tensor.dtype)[6:]}. Convert it to bf16 or fp32."
            )
    path = written_path(path, dialect)
    if content.config is not None:
        # First the small file: weights without their configuration would be read with a wrong alpha.
        write_json(path.with_name(PEFT_CONFIG), content.config)
    save_safetensors(path, content.tensors, content.header)
    return path


def written_path(path: Path | str, dialect: str) -> Path:
    """The file that `write_lora` writes for `path`."""
    path = Path(path)
    if dialect != "peft" or path.name == PEFT_WEIGHTS:
        return path
    return (path.with_suffix("") if path.suffix == ".safetensors" else path) / PEFT_WEIGHTS


def read_lora(path: Path | str) -> LoraFile:
    """Read a LoRA in any of the dialects in `dialects`, also a folder of PEFT's.

    Its tensors are on the CPU, as stored (8-bit floats become fp32).
    Fused layers of the original layout (`qkv`, `linear1`) are split exactly: every part shares `down` and takes its own
    rows of `up` (of a block-diagonal one only the columns that are its own), of the magnitudes or of the Kronecker
    product. Keys that are no part of a Chroma LoRA are listed in `unmatched`.
    Raises LoraError, saying what was found, for an absent, damaged or pickled file, a whole model, another kind of
    adapter (LoHa, OFT, …), or a file none of whose keys is Chroma's.
    """
    path = Path(path)
    if (path / PEFT_WEIGHTS).is_file():
        path /= PEFT_WEIGHTS
    if not path.is_file():
        raise LoraError(_absent(path))
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


def read_metadata(path: Path | str) -> dict[str, str]:
    """The header of a LoRA file alone. Raises LoraError for a file that is absent or no safetensors."""
    path = Path(path)
    if (path / PEFT_WEIGHTS).is_file():
        path /= PEFT_WEIGHTS
    if not path.is_file():
        raise LoraError(_absent(path))
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise LoraError(_unreadable(path, error)) from error


def lora_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> LoraFile:
    """A LoRA from the tensors of a file, without the file. Raises LoraError as `read_lora` does."""
    name = Path("the LoRA")
    _refuse_foreign(name, list(tensors))
    with torch.inference_mode(False):
        held = {key: tensor.detach().cpu().clone() for key, tensor in tensors.items() if part_of(key) is not None}
        return assemble(name, list(tensors), held, dict(metadata or {}))


def _absent(path: Path) -> str:
    return f"There is no LoRA file '{path}'. Check the name, and the folder that it is looked up in."


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
