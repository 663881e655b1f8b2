"""A LoRA file in the names of another program, and at a smaller rank, with its recipe and where it came from."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import LoraError
from ..files import free_name, sha256_file
from ..model.device import broken
from .files import PEFT_CONFIG, PEFT_WEIGHTS, read_lora, write_lora, written_path
from .key_formats import KeyFormat, folded, style_of
from .lowrank import Truncation
from .modules import AdapterModule, LoraFile, LoraModule, quoted
from .resize import Resized, resize

CONVERTED_KEY = "chromakit.converted_from"
JOB_KEY = "chromakit.job_id"
"""Says which job wrote a file, and may therefore replace it; a converted file is not that job's."""

DTYPES = {"keep": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Conversion:
    """A converted file, what it holds, and what happened on the way."""

    path: Path
    lora: LoraFile
    notes: tuple[str, ...]
    resized: Resized | None = None

    def report(self) -> str:
        """The notes as one paragraph."""
        return " ".join(self.notes)


def convert_lora(
    source: Path | str,
    key_format: KeyFormat | str,
    output: Path | str | None = None,
    dtype: str = "keep",
    shrink: Truncation | None = None,
) -> Conversion:
    """Read a LoRA of any key format and write it in another one; the source is not touched.

    Where this very conversion of the same content lies already, it stays and is returned.

    Args:
        output: the file to write (PEFT: a folder), or an existing folder to write into; default: beside the source.
            The default name is `<name>-<key format>` (or `<name>-r<rank>`, `<name>-e<percent>` when it is resized),
            with -2, -3 … when another file has it; a name that was given and is taken is an error.
        dtype: `keep`, `fp32`, `bf16` or `fp16`. Magnitudes of a DoRA are kept as they are.
        shrink: also write it at a smaller rank, see `resize`.
    Raises:
        LoraError: unreadable; a kind that the key format cannot hold; foreign keys, which would be lost; numbers too
            large for fp16; a file in the way.
    """
    source = Path(source)
    lora = read_lora(source)
    if lora.unmatched:
        raise LoraError(
            f"'{source.name}' is not converted: {len(lora.unmatched)} of its keys are not Chroma's and would be lost: "
            f"{quoted(lora.unmatched)}."
        )
    if dtype not in DTYPES:
        raise LoraError(f"'{dtype}' is no number format of a LoRA file. Choose one of: {', '.join(DTYPES)}.")
    style = style_of(key_format)
    file = source / PEFT_WEIGHTS if source.is_dir() else source
    origin = {
        "file": source.name,
        "sha256": sha256_file(file),
        "dialect": lora.key_format,
        "to": key_format,
        "dtype": dtype,
    }
    if JOB_KEY in lora.metadata:
        origin["job_id"] = lora.metadata[JOB_KEY]
    resized = None
    if shrink is not None:
        origin |= {name: value for name, value in vars(shrink).items() if value is not None}
        resized = resize(lora, shrink)
    path = _place(source, key_format if shrink is None else _mark(shrink), key_format, output, origin)
    fold = style.alpha == "folded"
    modules = {
        name: _cast(name, m, DTYPES[dtype], fold) for name, m in (resized.lora if resized else lora).modules.items()
    }
    header = {key: value for key, value in lora.metadata.items() if key != JOB_KEY}
    header[CONVERTED_KEY] = json.dumps(origin)
    converted = LoraFile(modules, header)
    if not path.exists():
        write_lora(path, converted, key_format)
    notes = _notes(source, lora, key_format, dtype, path)
    return Conversion(path, read_lora(path), (*notes, resized.summary()) if resized else notes, resized)


def _mark(shrink: Truncation) -> str:
    """What the name of a resized file ends in: r8, e95, r8-e95."""
    rank = [] if shrink.rank is None else [f"r{shrink.rank}"]
    return "-".join(rank + ([] if shrink.energy is None else [f"e{shrink.energy * 100:g}"]))


def _place(source: Path, mark: str, key_format: str, output: Path | str | None, origin: dict[str, Any]) -> Path:
    """Where to write: a name that is free, or where this very conversion lies already."""
    into = Path(output) if output is not None and Path(output).is_dir() else None
    if output is not None and into is None:
        path = written_path(Path(output), key_format)
        if path.suffix != ".safetensors":
            raise LoraError(f"'{output}' is no name for a LoRA: it must end in .safetensors.")
        if _taken(path, key_format) and not _is_that(path, origin):
            raise LoraError(f"'{path}' exists already and is another file. Choose another name, or remove it first.")
        return path
    stem = source.parent.name if source.name == PEFT_WEIGHTS else source.stem
    folder = into or (source.parent.parent if source.name == PEFT_WEIGHTS else source.parent)

    def of(name: str) -> Path:
        return written_path(folder / f"{name}.safetensors", key_format)

    def is_free(name: str) -> bool:
        return not _taken(of(name), key_format) or _is_that(of(name), origin)

    return of(free_name(f"{stem}-{mark}", is_free))


def _taken(path: Path, key_format: str) -> bool:
    """Whether writing there would replace a file; PEFT's form is two of them."""
    return path.exists() or (key_format == "peft" and path.with_name(PEFT_CONFIG).exists())


def _is_that(path: Path, origin: dict[str, Any]) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads((file.metadata() or {}).get(CONVERTED_KEY, "null")) == origin
    except (OSError, SafetensorError, ValueError):
        return False


def _cast(name: str, module: AdapterModule, dtype: torch.dtype | None, fold: bool) -> AdapterModule:
    """The module in that dtype (None: its own), with alpha / rank in `up` if asked for: rounded once for both."""
    cast = module
    if fold and isinstance(module, LoraModule):
        whole = folded(dataclasses.replace(module, up=module.up.float()))
        cast = dataclasses.replace(whole, up=whole.up.to(dtype or module.up.dtype))
    if dtype is not None:
        cast = cast.to(dtype)
    if any(map(broken, cast.factors().values())):
        what = str(dtype or module.up.dtype)[6:] if isinstance(module, LoraModule) else str(dtype)[6:]
        raise LoraError(f"'{name}' has numbers too large for {what}. Choose bf16 or fp32.")
    return cast


def _notes(source: Path, lora: LoraFile, key_format: str, dtype: str, path: Path) -> tuple[str, ...]:
    form = key_format if dtype == "keep" else f"{key_format}, {dtype}"
    made = f"{path.parent.name}/{path.name}" if key_format == "peft" else path.name
    notes = [f"{source.name} ({lora.key_format}, {len(lora.modules)} layers) → {made} ({form})."]
    style = style_of(key_format)
    scales = {module.scale for module in lora.modules.values() if isinstance(module, LoraModule)}
    if style.alpha == "folded" and scales != {1.0}:
        notes.append(
            "alpha / rank is multiplied into the matrices: this key format has no alpha, and its readers take 1."
        )
    if style.alpha == "config":
        notes.append("alpha stands in adapter_config.json: keep the two files together.")
    if style.fused:
        notes.append("q, k, v (and the single blocks' MLP input) are fused, exactly, as that layout has them.")
    if key_format == "peft":
        notes.append("ComfyUI does not read this key format.")
    if key_format == "kohya":
        notes.append("diffusers reads it only in part; use diffusers or universal there.")
    return tuple(notes)
