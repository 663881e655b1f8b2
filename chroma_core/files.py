"""Files that are never half written: temporary name, fsync, rename, fsync of the folder.

`safetensors.save_file` writes through a temporary file of mode 0600 and does not sync; everything that the pack keeps
(LoRA, checkpoint, job, cache shard) goes through this module instead.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import threading
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor


def _temporary(path: Path) -> Path:
    """A sibling name that no other thread or process writes to at the same time."""
    return path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable. Windows has no handle for it and needs none."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_file(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def write_atomic(path: Path | str, content: bytes | str) -> None:
    """Replace `path` by `content`; after a crash the file is the old one or the new one, whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_json(path: Path | str, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def free_path(folder: Path, name: str) -> Path:
    """The first of name.png, name-2.png, … in `folder` that does not exist: earlier files are never overwritten."""
    path, count = folder / name, 1
    while path.exists():
        count += 1
        path = folder / f"{Path(name).stem}-{count}{Path(name).suffix}"
    return path


def save_safetensors(
    path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, atomically and with the user's umask."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomic(path, safetensors_bytes(contiguous, metadata=dict(metadata or {})))


_DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
"""torch's dtypes under the names that the safetensors format gives them."""


def write_safetensors(
    path: Path | str,
    layout: Iterable[tuple[str, Tensor]],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a large safetensors file atomically, one tensor at a time, instead of building it in memory.

    Args:
        layout: names, dtypes and shapes of all tensors (meta tensors will do).
        tensors: the same names in any order, with the data.
    Format: https://huggingface.co/docs/safetensors (8 bytes length, JSON header, data without gaps).
    """
    # By falling item size, so that every tensor is aligned: readers view the file's memory in the tensor's dtype.
    entries = sorted((-t.element_size(), name, _DTYPE_NAMES[t.dtype], list(t.shape), t.numel()) for name, t in layout)
    header: dict[str, Any] = {"__metadata__": dict(metadata or {})}
    offset = 0
    for size, name, dtype, shape, count in entries:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset - size * count]}
        offset -= size * count
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        with temporary.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            start = file.tell()
            file.truncate(start + offset)
            for name, tensor in tensors:
                file.seek(start + header[name]["data_offsets"][0])
                file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Fill a temporary folder; on success it is synced and renamed to `path`, on failure it vanishes.

    `path` must not exist yet: a finished folder is never replaced.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _sync_file(file)
        sync_folder(temporary)
        os.rename(temporary, path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove temporaries that a killed process left directly in `folder`."""
    for path in folder.glob(".*.tmp"):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def slug(text: str, fallback: str = "untitled") -> str:
    """A file name from free text: ASCII letters, digits, `-`, `_` and `.`, at most 80 characters, no leading dot."""
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", ascii_text).strip("-.")[:80] or fallback


def sha256_file(path: Path | str) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
