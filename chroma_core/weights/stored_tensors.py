"""One tensor in a file: where its bytes lie, and how they become numbers.

Bytes are read, never mapped. The pages of a map count as the process's own memory, so a model read through one looks
as if it were held twice; a mapped file cannot be replaced on Windows; and one that is cut while it is mapped (a
download that starts anew, a disk that fills up) kills the whole process instead of raising an error.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import FileIO
from math import prod
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import ModelFileError

CHUNK = 1 << 18
"""Numbers that are converted at a time: beside its result, reading a tensor needs memory for these only. Small enough
for a processor's cache, in which unpacking GGUF blocks is about twice as fast as outside it."""

Scheme = Literal["int8", "fp8"]
"""Of `model.quantised`, those whose codes files hold as well: rows of int8 or e4m3 numbers with a scale each."""

DOWNLOAD_AGAIN = "Download it again, or choose another file."


def damaged(path: Path, found: str) -> ModelFileError:
    """The error for a file of the right kind whose content is broken: what was found, and what to do."""
    return ModelFileError(f"The file '{path}' is damaged or was not downloaded completely: {found}. {DOWNLOAD_AGAIN}")


def unreadable(path: Path, error: OSError) -> ModelFileError:
    """The error for a file or folder that the operating system does not let us read."""
    return ModelFileError(
        f"'{path}' cannot be read: {error.strerror or error}. Check the disk, the permissions, and that no other "
        "program keeps it locked."
    )


@dataclass(frozen=True)
class WeightFile:
    """A file as it was when its header was read. It is open only while `open` is entered."""

    path: Path
    size: int
    modified_ns: int

    @classmethod
    def of(cls, path: Path) -> WeightFile:
        """Raises ModelFileError if the file cannot be asked for its size."""
        try:
            state = path.stat()
        except OSError as error:
            raise unreadable(path, error) from error
        return cls(path, state.st_size, state.st_mtime_ns)

    @contextmanager
    def open(self) -> Iterator[Opened]:
        """The open file; ModelFileError if it is no longer the one whose header was read."""
        try:
            with self.path.open("rb", buffering=0) as file:
                state = os.fstat(file.fileno())
                if (state.st_size, state.st_mtime_ns) != (self.size, self.modified_ns):
                    raise ModelFileError(
                        f"The file '{self.path}' was replaced or changed after loading had begun: it had {self.size:,} "
                        f"bytes and now has {state.st_size:,}. Wait until it is complete, then load the model again."
                    )
                yield Opened(self.path, file)
        except OSError as error:
            raise unreadable(self.path, error) from error


@dataclass(frozen=True)
class Opened:
    """An open weight file."""

    path: Path
    file: FileIO

    def fill(self, buffer: Tensor, offset: int) -> None:
        """Read as many bytes as the one-dimensional, contiguous `buffer` holds, from byte `offset` on."""
        rest = memoryview(buffer.view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]
        self.file.seek(offset)
        while len(rest):
            count = self.file.readinto(rest)  # at most 2 GiB come at once
            if not count:
                raise damaged(self.path, f"it ends {len(rest):,} bytes too early")
            rest = rest[count:]

    def bytes_at(self, offset: int, count: int) -> bytes:
        """`count` bytes from byte `offset` on."""
        buffer = torch.empty(count, dtype=torch.uint8, device="cpu")
        self.fill(buffer, offset)
        return buffer.numpy().tobytes()


@dataclass(frozen=True)
class Stored:
    """A tensor that has not been read yet.

    offset: of its first byte in the file. shape: in torch's order, rows first.
    label: the storage type for people, e.g. `bf16`, `scaled fp8`, `Q4_K`.
    dtype: the torch type of the stored numbers; None where torch has none.
    block, block_bytes: numbers that are stored together, and the bytes that they take.
    decode: unpacks whole blocks, bytes → fp32 numbers, where `dtype` is None.
    scale: multiplies the numbers, in fp32: [1 or rows, groups], each for an equal share of a row; or what reads it,
    where there are too many to keep.
    finish: what becomes of the scaled rows [n, columns] in the end: a rotation undone, columns scaled.
    """

    file: WeightFile
    offset: int
    shape: tuple[int, ...]
    label: str
    dtype: torch.dtype | None
    block: int
    block_bytes: int
    decode: Callable[[np.ndarray], np.ndarray] | None = None
    scale: Tensor | Callable[[], Tensor] | None = None
    finish: Callable[[Tensor], Tensor] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that the tensor takes in the file."""
        return prod(self.shape) * self.block_bytes // self.block

    @property
    def rows(self) -> int:
        """Length of the first dimension; a number without dimensions is one row."""
        return self.shape[0] if self.shape else 1

    @property
    def scheme(self) -> Scheme | None:
        """The scheme of our quantised layers in which the numbers are stored already; None for any other form."""
        if self.finish is not None or len(self.shape) != 2 or not (self.scale is None or torch.is_tensor(self.scale)):
            return None
        if self.dtype is torch.int8 and self.scale is not None:
            return "int8"
        return "fp8" if self.dtype is torch.float8_e4m3fn else None

    def codes(self, rows: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
        """The numbers of a tensor that has a `scheme`, as they are stored, and their scales, fp32 [rows, 1].

        Raises ModelFileError for e4m3 numbers that are NaN.
        """
        assert self.dtype is not None and not callable(self.scale)  # so it is where there is a scheme
        start, stop = rows or (0, self.rows)
        scale = torch.ones(1, 1) if self.scale is None else self.scale
        codes = replace(self, scale=None).read(self.dtype, rows)
        if self.dtype.is_floating_point and bool((codes.view(torch.uint8) & 127 == 127).any()):
            raise damaged(self.file.path, "it holds weights that are not finite (NaN)")
        return codes, scale.expand(self.rows, 1)[start:stop].contiguous()

    def read(self, dtype: torch.dtype, rows: tuple[int, int] | None = None) -> Tensor:
        """A new CPU tensor [stop − start, …] of `dtype`: fp32(stored) × scale, finished, rounded once.

        rows: first and one-past-last row to read; None: all. The caller has checked that they exist.
        Raises ModelFileError if the stored type is none that weights come in (integers without a scale are read as
        themselves only), or a scale is not finite.
        """
        start, stop = rows or (0, self.rows)
        shape = (stop - start, *self.shape[1:]) if self.shape else ()
        out = torch.empty(shape, dtype=dtype, device="cpu")
        is_number = self.dtype is not None and (self.dtype.is_floating_point or self.scale is not None)
        with self.file.open() as file:
            if self.dtype is dtype and self.scale is None:
                file.fill(out.view(-1), self.offset + start * prod(self.shape[1:]) * dtype.itemsize)
            elif self.decode is None and not is_number:
                raise ModelFileError(
                    f"The file '{self.file.path}' stores weights as {self.label}, which is not read. Use a release in "
                    "bf16, fp16, fp32, fp8, one of ComfyUI's quantised formats or GGUF."
                )
            else:
                self._convert(file, out.view(-1), start, stop)
        return out

    def _convert(self, file: Opened, out: Tensor, start: int, stop: int) -> None:
        row = prod(self.shape[1:])  # numbers in one
        step = max(1, CHUNK // max(1, row))
        scales = self.scale() if callable(self.scale) else self.scale
        for first in range(start, stop, step):
            last = min(first + step, stop)
            values = self._values(file, first * row, last * row)
            if scales is not None:
                scale = scales if len(scales) == 1 else scales[first:last]
                groups = values.float().view(last - first, scale.shape[1], -1)
                values = groups.mul_(scale[..., None]).view(last - first, row)
                values = (values if self.finish is None else self.finish(values)).view(-1)
            out[(first - start) * row : (last - start) * row].copy_(values)

    def _values(self, file: Opened, first: int, last: int) -> Tensor:
        """Numbers `first` to `last`, unscaled. Blocks that stretch beyond either end are read whole and trimmed."""
        begin, end = first // self.block, -(-last // self.block)
        buffer = torch.empty((end - begin) * self.block_bytes, dtype=torch.uint8, device="cpu")
        file.fill(buffer, self.offset + begin * self.block_bytes)
        if self.dtype is not None:
            values = buffer.view(self.dtype)
        else:
            assert self.decode is not None  # `read` has refused tensors that have neither a dtype nor a decoder
            values = torch.from_numpy(self.decode(buffer.numpy()))
        return values[first - begin * self.block : last - begin * self.block]


def check_places(source: WeightFile, tensors: Mapping[str, Stored], begin: int, gaps: bool) -> None:
    """Raise ModelFileError unless tensors lie one after the other, from `begin` to the file's end.

    gaps: bytes between and after them are allowed.
    """
    position = begin
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset < position:
            raise damaged(source.path, f"the tensor '{name}' overlaps the one before it")
        if tensor.offset > position and not gaps:
            raise damaged(source.path, f"the tensor '{name}' leaves a gap before it")
        position = tensor.offset + tensor.nbytes
    if position > source.size:
        raise damaged(source.path, f"it has {source.size:,} bytes of {position:,}")
    if position < source.size and not gaps:
        raise damaged(source.path, f"{source.size - position:,} bytes follow after its last tensor")
