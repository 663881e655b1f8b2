"""A trained model as files: a transformer folder as diffusers reads it, and a single file in the original layout.

Both are written one tensor at a time: trained weights from the model in training, all others from the files that it was
loaded from. So quantising it for training leaves no trace, and no second model is held.
"""

from __future__ import annotations

import importlib.metadata
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelFileError
from ..files import atomic_folder, remove, replace, sync_folder, write_json
from ..loading.build import OnPart
from ..loading.matching import Component, describe_part
from ..names.transformer import to_original_key
from ..weights.opening import Weights, open_weights
from ..weights.safetensors_files import write_safetensors

STEM = "diffusion_pytorch_model"
SHARD_BYTES = 10_000_000_000
"""Above this a folder's weights come in several files; diffusers' own limit."""

_KEPT = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float32}
"""Stored types that untrained weights keep. All others (fp8, scaled fp8, GGUF) become bf16: such a file's type is one
for all of it, and ComfyUI would round the trained weights to it."""


@dataclass(frozen=True)
class TrainedModel:
    """The base's files and what was trained, or changed otherwise.

    trained: weights by diffusers' full names, on any device; looked up when they are written, and once more to check.
    dtype: in which they are written; None: each as its base is stored. rest: the same for all others.
    """

    weights: Weights
    component: Component
    trained: Mapping[str, Tensor]
    dtype: torch.dtype | None
    rest: torch.dtype | None = None

    def dtype_of(self, name: str) -> torch.dtype:
        """In which a tensor is written."""
        chosen = self.dtype if name in self.trained else self.rest
        return chosen or _KEPT.get(self.weights.storage[self.component.sources[name].name], torch.bfloat16)

    def read_base(self, name: str, dtype: torch.dtype) -> Tensor:
        """A tensor of the base, as a new one on the CPU. Raises ModelFileError when its file was changed or lost."""
        return self.component.sources[name].read(self.weights, dtype)

    def read(self, name: str) -> Tensor:
        """A tensor as it is written, on the CPU."""
        if name in self.trained:
            return self.trained[name].detach().to("cpu", self.dtype_of(name))
        return self.read_base(name, self.dtype_of(name))

    def outline(self) -> dict[str, Tensor]:
        """Names, dtypes and shapes in diffusers' layout, without values."""
        sources = self.component.sources
        return {n: torch.empty(s.shape, dtype=self.dtype_of(n), device="meta") for n, s in sources.items()}

    def original(self) -> dict[str, list[str]]:
        """Every name of the original layout, and the names of the parts whose rows it holds, from the top down."""
        parts: dict[str, list[tuple[int, str]]] = {}
        for name in self.component.sources:
            found = to_original_key(name)
            assert found is not None, name  # the component was recognised by these names
            parts.setdefault(found.name, []).append((found.start, name))
        return {fused: [name for _, name in sorted(held)] for fused, held in parts.items()}

    def bytes(self) -> int:
        """Bytes of one copy."""
        return _bytes(self.outline())


def _silent(done: int, total: int, what: str) -> None:
    """No progress."""


def write_single_file(path: Path, model: TrainedModel, metadata: Mapping[str, str], on_part: OnPart = _silent) -> None:
    """Write the original layout, atomically, and read back what was trained.

    Raises ModelFileError, OSError, and what `on_part` raises to cancel: nothing is left then.
    """
    _remove_leftovers(path)
    outline, original = model.outline(), model.original()
    # Rows of one tensor have one type: the wider one, where only some of them were trained.
    dtypes = {
        fused: reduce(torch.promote_types, (outline[name].dtype for name in names)) for fused, names in original.items()
    }

    def shape(names: list[str]) -> tuple[int, ...]:
        return sum(outline[name].shape[0] for name in names), *outline[names[0]].shape[1:]

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for i, (fused, names) in enumerate(original.items()):
            on_part(i, len(original), fused)
            parts = [model.read(name).to(dtypes[fused]) for name in names]
            yield fused, parts[0] if len(parts) == 1 else torch.cat(parts)

    layout = [(f, torch.empty(shape(names), dtype=dtypes[f], device="meta")) for f, names in original.items()]
    write_safetensors(path, layout, tensors(), metadata)
    _check(path, model)
    on_part(len(original), len(original), "")


def write_folder(
    path: Path,
    model: TrainedModel,
    metadata: Mapping[str, str],
    shard_bytes: int = SHARD_BYTES,
    on_part: OnPart = _silent,
) -> None:
    """Write diffusers' layout: config.json and weights, in shards of at most `shard_bytes` (one tensor at least).

    An earlier folder is replaced when the new one is whole. Raises as `write_single_file` does.
    """
    _remove_leftovers(path)
    outline = model.outline()
    number = {name: i for i, name in enumerate(outline)}

    def read(name: str) -> Tensor:
        on_part(number[name], len(number), name)
        return model.read(name)

    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in outline.items():
        if shards[-1] and _bytes(shards[-1]) + tensor.numel() * tensor.element_size() > shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    count = len(shards)
    files = [f"{STEM}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    files = files if count > 1 else [f"{STEM}.safetensors"]
    fresh = path.with_name(f".{path.name}.fresh.tmp")
    with atomic_folder(fresh) as folder:
        for file, shard in zip(files, shards, strict=True):
            values = ((name, read(name)) for name in shard)
            write_safetensors(folder / file, shard.items(), values, {"format": "pt", **metadata})
        if count > 1:
            listed = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
            total = {"metadata": {"total_size": _bytes(outline)}, "weight_map": dict(sorted(listed.items()))}
            write_json(folder / f"{STEM}.safetensors.index.json", total)
        write_json(folder / "config.json", _config(model.component.config))
        _check(folder, model)
    if path.exists():
        old = path.with_name(f".{path.name}.old.tmp")
        replace(path, old)
        shutil.rmtree(old, ignore_errors=True)
    replace(fresh, path)
    sync_folder(path.parent)
    on_part(len(number), len(number), "")


def _config(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "_class_name": "ChromaTransformer2DModel",
        "_diffusers_version": importlib.metadata.version("diffusers"),
        **arguments,
    }


def _check(path: Path, model: TrainedModel) -> None:
    """Open what was written as a loader does: every tensor is there, and the trained ones hold what was trained."""
    weights = open_weights(path)
    again = TrainedModel(weights, describe_part(weights, "transformer", model.component.config), {}, model.dtype)
    for name in model.trained:
        if not torch.equal(again.read_base(name, model.dtype_of(name)), model.read(name)):
            raise ModelFileError(
                f"'{path}' was written, but its tensor '{name}' does not read back as it was: the disk or the memory "
                "may be faulty. Write it again: resume the job, whose newest checkpoint is kept, or repeat the command."
            )


def _remove_leftovers(path: Path) -> None:
    """What a killed process left of this very file or folder: as large as a model."""
    own = re.compile(rf"\.{{1,2}}{re.escape(path.name)}\.(fresh\.tmp|old\.tmp|(fresh\.tmp\.)?\d+-\d+\.tmp)")
    for leftover in path.parent.glob(".*.tmp"):
        if own.fullmatch(leftover.name):
            remove(leftover)


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())
