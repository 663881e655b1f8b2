"""The header of a GGUF file (llama.cpp's and ComfyUI-GGUF's format): metadata, and where each tensor lies.

The format (ggml-org/ggml, docs/gguf.md): magic, version, counts, key-value pairs, tensor infos, then the tensors, each
at a multiple of the alignment. Sizes are little-endian and shapes are in reverse order. The `gguf` package supplies the
types and unpacks the blocks. Its reader is not used: it maps the file, takes any count in a damaged header at its
word, and makes arrays of every token of an embedded vocabulary.
"""

from __future__ import annotations

import struct
from functools import partial
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import ModelFileError
from .stored_tensors import Stored, WeightFile, check_places, damaged

GGUF_MAGIC = b"GGUF"

STRING_LIMIT = 16 << 20
"""Bytes; the longest real strings are chat templates, far below it."""

COUNT_LIMIT = 4 << 20
"""Entries of an array, keys or tensors; the longest real arrays are vocabularies of some 250,000 tokens."""

DIMENSIONS = 8
"""Of a tensor, at most; GGML itself stops at four."""

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""GGUF's value types → `struct` formats."""
STRING, ARRAY = 8, 9

ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
"""Key prefix under which ComfyUI-GGUF keeps the shape of a tensor that it had to reshape for quantising."""

PLAIN: dict[str, tuple[str, torch.dtype]] = {
    "F64": ("fp64", torch.float64),
    "F32": ("fp32", torch.float32),
    "F16": ("fp16", torch.float16),
    "BF16": ("bf16", torch.bfloat16),
    "I8": ("int8", torch.int8),
    "I16": ("int16", torch.int16),
    "I32": ("int32", torch.int32),
    "I64": ("int64", torch.int64),
}
"""GGML types that torch has too → our label and the torch type."""


class _Header:
    """Reads the header's parts in order; every length is checked against what is left of the file."""

    def __init__(self, path: Path, file: BufferedReader, size: int) -> None:
        self.path, self.file, self.size = path, file, size

    def take(self, count: int) -> bytes:
        self._check(count)
        return self.file.read(count)

    def skip(self, count: int) -> None:
        self._check(count)
        self.file.seek(count, 1)

    def _check(self, count: int) -> None:
        if count > self.size - self.file.tell():
            raise damaged(self.path, "its header goes on beyond the end of the file")

    def number(self, kind: str) -> Any:
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))[0]

    def count(self, what: str) -> int:
        count = self.number("Q")
        if count > COUNT_LIMIT:
            raise damaged(self.path, f"its header claims {count:,} {what}")
        return count

    def string(self) -> str:
        length = self.number("Q")
        if length > STRING_LIMIT:
            raise damaged(self.path, f"its header claims a text of {length:,} bytes")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise damaged(self.path, "a text in its header is not UTF-8") from error

    def value(self) -> Any:
        """A number, a text, or a short array of numbers; other arrays (vocabularies) are skipped and come out empty."""
        kind = self.number("I")
        if kind == ARRAY:
            return self._array(self.number("I"), self.count("entries in an array"))
        if kind == STRING:
            return self.string()
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        raise damaged(self.path, f"its header holds a value of the unknown type {kind}")

    def _array(self, kind: int, count: int) -> tuple[Any, ...]:
        if kind in SCALARS:
            form = f"<{count}{SCALARS[kind]}"
            if count <= DIMENSIONS:
                return struct.unpack(form, self.take(struct.calcsize(form)))
            self.skip(struct.calcsize(form))
        elif kind == STRING:
            for _ in range(count):
                self.skip(self.number("Q"))
        else:
            raise damaged(self.path, f"its header holds an array of the unknown type {kind}")
        return ()


def read_gguf(path: Path) -> tuple[dict[str, str], dict[str, Stored]]:
    """The scalar metadata as texts (`general.architecture`, …), and every tensor, shapes in torch's order.

    Raises ModelFileError if the `gguf` package is missing, for versions and types that it does not know, parts of a
    split model, and headers that are cut, absurd, or place a tensor outside the file or upon another.
    """
    source = WeightFile.of(path)
    with source.open(), path.open("rb") as file:
        header = _Header(path, file, source.size)
        values, infos, end = _contents(header)
    if values.get("split.count", 0) not in (0, 1):
        raise ModelFileError(
            f"The file '{path}' is one of {values['split.count']} parts of a split GGUF model. Join them first "
            "(llama.cpp: gguf-split --merge), or choose an unsplit release."
        )
    alignment = values.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise damaged(path, f"it aligns its tensors to {alignment}, which is no power of two")
    begin = -(-end // alignment) * alignment
    tensors: dict[str, Stored] = {}
    for name, reverse, kind, offset in infos:
        if name in tensors:
            raise damaged(path, f"the tensor '{name}' is listed twice")
        shape = _shape(path, name, tuple(reversed(reverse)), values.get(ORIGINAL_SHAPE + name))
        tensors[name] = _tensor(source, name, shape, reverse[0] if reverse else 1, kind, begin + offset)
    check_places(source, tensors, 0, gaps=True)
    return {key: str(value) for key, value in values.items() if not isinstance(value, tuple)}, tensors


_Info = tuple[str, tuple[int, ...], int, int]
"""A tensor's name, shape as stored (reversed), GGML type and offset."""


def _contents(header: _Header) -> tuple[dict[str, Any], list[_Info], int]:
    """Key-value pairs, tensor infos, and the position of the first byte after them."""
    header.take(len(GGUF_MAGIC))
    version = header.number("I")
    if version not in (2, 3):
        raise ModelFileError(
            f"The file '{header.path}' is GGUF of version {version & 0xFFFF or 'big-endian'}; versions 2 and 3, "
            "little-endian, are read. Convert it anew, or choose another release."
        )
    tensor_count, value_count = header.count("tensors"), header.count("metadata entries")
    values: dict[str, Any] = {}
    for _ in range(value_count):
        key = header.string()
        if key in values:
            raise damaged(header.path, f"the metadata entry '{key}' is listed twice")
        values[key] = header.value()
    infos: list[_Info] = []
    for _ in range(tensor_count):
        name, dimensions = header.string(), header.number("I")
        if dimensions > DIMENSIONS:
            raise damaged(header.path, f"the tensor '{name}' claims {dimensions:,} dimensions")
        infos.append(
            (name, tuple(header.number("Q") for _ in range(dimensions)), header.number("I"), header.number("Q"))
        )
    return values, infos, header.file.tell()


def _shape(path: Path, name: str, stored: tuple[int, ...], original: Any) -> tuple[int, ...]:
    """The shape in torch's order; the one that ComfyUI-GGUF noted, if it had to change it."""
    if original is None:
        return stored
    if not isinstance(original, tuple) or not all(type(n) is int and n >= 0 for n in original):
        raise damaged(path, f"the noted original shape of the tensor '{name}' is {original!r}")
    if prod(original) != prod(stored):
        raise damaged(path, f"the tensor '{name}' of shape {list(stored)} cannot have been {list(original)} before")
    return original


def _tensor(source: WeightFile, name: str, shape: tuple[int, ...], last: int, kind: int, offset: int) -> Stored:
    """`last`: length of the innermost dimension as stored, which whole blocks must fill. `kind`: its GGML type."""
    path = source.path
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError as error:
        raise ModelFileError(
            f"The file '{path}' is GGUF, which needs the package gguf. Install it with `pip install gguf` and start "
            "again, or choose a .safetensors file."
        ) from error
    try:
        quantisation = GGMLQuantizationType(kind)
        block, block_bytes = GGML_QUANT_SIZES[quantisation]
    except (ValueError, KeyError) as error:
        raise ModelFileError(
            f"The file '{path}' stores the tensor '{name}' in GGML type {kind}, which the installed gguf package does "
            "not know. Update it (pip install -U gguf), or choose another release."
        ) from error
    if quantisation.name in PLAIN:
        return Stored(source, offset, shape, *PLAIN[quantisation.name], 1, block_bytes)
    label = quantisation.name
    if last % block:
        raise damaged(path, f"the tensor '{name}' has rows of {last} numbers, not whole {label} blocks of {block}")
    return Stored(source, offset, shape, label, None, block, block_bytes, partial(_unpack, path, quantisation))


def _unpack(path: Path, quantisation: Any, packed: np.ndarray) -> np.ndarray:
    """Whole blocks as fp32 numbers, one after the other."""
    from gguf.quants import dequantize

    try:
        # As rows of one block group each: the package works through sixteen rows at a time.
        return dequantize(packed.reshape(1, -1), quantisation).reshape(-1)
    except NotImplementedError as error:
        raise ModelFileError(
            f"The file '{path}' stores weights as {quantisation.name}, which the installed gguf package cannot unpack. "
            "Choose a release in another quantisation, e.g. Q8_0 or Q4_K."
        ) from error
