"""The header of a safetensors file, what it holds and where; and writing such files.

The format (huggingface/safetensors, README "Format"): eight bytes give the header's length, little-endian; the header
is a JSON object, name → dtype, shape and byte range within the data that follow; `__metadata__` holds strings. Ranges
follow one another without gaps up to the file's end. The library itself is not used for reading because it maps the
file (see `stored_tensors`); everything that it refuses is refused here too, with what the user can do about it. Nor is
its `save_file` used: that writes through a temporary file of mode 0600 and does not sync.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from ..errors import ConfigError, check_text
from ..files import atomic_file, strict_json, write_atomic
from .stored_tensors import Opened, Stored, WeightFile, check_places, damaged

HEADER_LIMIT = 100_000_000
"""Bytes; the library's own limit. Real headers take a few hundred thousand."""

DIMENSIONS = 16
"""Real tensors have five at most."""

DTYPES: dict[str, tuple[str, torch.dtype | None, int]] = {
    "F64": ("fp64", torch.float64, 64),
    "F32": ("fp32", torch.float32, 32),
    "F16": ("fp16", torch.float16, 16),
    "BF16": ("bf16", torch.bfloat16, 16),
    "F8_E4M3": ("fp8", torch.float8_e4m3fn, 8),
    "F8_E5M2": ("fp8", torch.float8_e5m2, 8),
    "F8_E4M3FNUZ": ("fp8", torch.float8_e4m3fnuz, 8),
    "F8_E5M2FNUZ": ("fp8", torch.float8_e5m2fnuz, 8),
    "F8_E8M0": ("8-bit exponents", None, 8),
    "F6_E2M3": ("fp6", None, 6),
    "F6_E3M2": ("fp6", None, 6),
    "F4": ("fp4", None, 4),
    "BOOL": ("bool", torch.bool, 8),
    "U8": ("uint8", torch.uint8, 8),
    "I8": ("int8", torch.int8, 8),
    "I16": ("int16", torch.int16, 16),
    "U16": ("uint16", None, 16),
    "I32": ("int32", torch.int32, 32),
    "U32": ("uint32", None, 32),
    "I64": ("int64", torch.int64, 64),
    "U64": ("uint64", None, 64),
    "C64": ("complex64", None, 64),
}
"""The format's names → our label, the torch type (None: listed, but not read) and bits per number."""

_STORED_AS = {dtype: name for name, (_, dtype, _) in DTYPES.items() if dtype is not None}
"""torch's types under the format's names."""


def read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Stored]]:
    """The header's metadata, and every tensor in the file, whatever its type. No weights are read.

    Raises ModelFileError for a header that is cut, absurd or no JSON, an unknown dtype, and for tensors that do not
    fill the file from the header to the end without gaps or overlaps (a file that was cut, mostly).
    """
    source = WeightFile.of(path)
    with source.open() as file:
        header, begin = _header(file, source.size)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise damaged(path, "its metadata are not a table of texts")
    tensors = {name: _tensor(source, name, entry, begin) for name, entry in header.items()}
    check_places(source, tensors, begin, gaps=False)
    return metadata, tensors


def _header(file: Opened, size: int) -> tuple[dict[str, Any], int]:
    """The parsed header, and the position of the first byte after it."""
    if size < 8:
        raise damaged(file.path, f"it has only {size} bytes, too few for a safetensors file")
    length = int.from_bytes(file.bytes_at(0, 8), "little")
    if length > HEADER_LIMIT:
        raise damaged(file.path, f"its header claims {length:,} bytes, more than a safetensors file may have")
    if length > size - 8:
        raise damaged(file.path, f"its header claims {length:,} bytes, but the file has {size:,} in all")
    try:
        header = strict_json(file.bytes_at(8, length))
    except ValueError as error:
        raise damaged(file.path, f"its header is not the JSON that safetensors files begin with ({error})") from error
    if not isinstance(header, dict):
        raise damaged(file.path, "its header is not a table of tensors")
    try:
        check_text(header)
    except ConfigError as error:
        raise damaged(file.path, f"in its header {error}") from error
    return header, 8 + length


def _tensor(source: WeightFile, name: str, entry: Any, begin: int) -> Stored:
    try:
        kind, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
        whole = isinstance(kind, str) and isinstance(shape, list) and len(shape) <= DIMENSIONS
        whole = whole and all(type(number) is int and number >= 0 for number in (*shape, first, last))
    except (TypeError, KeyError, ValueError):
        whole, kind, shape, first, last = False, "", [], 0, 0
    if not whole:
        raise damaged(source.path, f"its header does not say where the tensor '{name}' lies")
    if kind not in DTYPES:
        raise damaged(source.path, f"the tensor '{name}' is stored as '{kind}', which is no known type")
    label, dtype, bits = DTYPES[kind]
    if (last - first) * 8 != prod(shape) * bits:
        raise damaged(
            source.path, f"the tensor '{name}' of shape {shape} in {kind} does not fit its {last - first:,} bytes"
        )
    block = 1 if bits >= 8 else 8
    return Stored(source, begin + first, tuple(shape), label, dtype, block, block * bits // 8)


def save_safetensors(
    path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, atomically and with the user's umask."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomic(path, safetensors_bytes(contiguous, metadata=dict(metadata or {})))


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
    entries = sorted((-t.element_size(), name, _STORED_AS[t.dtype], list(t.shape), t.numel()) for name, t in layout)
    header: dict[str, Any] = {"__metadata__": dict(metadata or {})}
    offset = 0
    for size, name, dtype, shape, count in entries:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset - size * count]}
        offset -= size * count
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        start = file.tell()
        file.truncate(start + offset)
        for name, tensor in tensors:
            file.seek(start + header[name]["data_offsets"][0])
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
