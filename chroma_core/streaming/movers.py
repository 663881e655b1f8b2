"""How tensors get from host memory to a device: at once on the CPU and MPS, on a stream of its own on CUDA and ROCm;
and how autograd is kept from holding them there.

Weights may be wrapped tensors of a quantising library; they are copied part by part and put together again in the same
form, so that no library repacks or dequantises them on the way.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

log = logging.getLogger("chromakit")

MIN_PINNED_BYTES = 64 << 10
"""Smaller tensors are not page-locked: the driver copies them through its own buffer without waiting for the device."""

_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every context of the process


def mapped(tensor: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """`tensor` with `function` applied to the plain tensors that it is made of; a plain tensor is its own only part."""
    if not is_traceable_wrapper_subclass(tensor):
        return function(tensor)
    names, context = tensor.__tensor_flatten__()
    parts = {name: mapped(getattr(tensor, name), function) for name in names}
    wrapper: Any = type(tensor)
    return wrapper.__tensor_unflatten__(parts, context, tensor.size(), tensor.stride())


def plain_parts(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that `tensor` is made of, always in the same order."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in plain_parts(getattr(tensor, name))]


def is_whole(tensor: Tensor) -> bool:
    """Whether the weight is all in the tensor; other libraries' kinds may keep parts of it elsewhere."""
    return type(tensor) in (Tensor, Parameter) or is_traceable_wrapper_subclass(tensor)


def frozen_like(tensor: Tensor, copy: Tensor) -> Tensor:
    """`copy` as what `tensor` is: a parameter that is not trained, or a buffer."""
    return Parameter(copy, requires_grad=False) if isinstance(tensor, Parameter) else copy


class Mover:
    """Copies at once, in the order of the device's work: CPU (where the copies are separate tensors) and MPS."""

    warning: str | None = None

    def __init__(self, device: torch.device):
        self.device = device

    def pin(self, tensors: Iterable[Tensor]) -> None:
        """Prepare host tensors for fast copies; what cannot be prepared is told in `warning`."""

    def unpin(self) -> None:
        """Undo `pin`."""

    def copy(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Any]:
        """Start copying; returns the copies and what `wait` needs before they may be used."""
        return [mapped(tensor.detach(), lambda part: part.to(self.device, copy=True)) for tensor in tensors], None

    def wait(self, ready: Any) -> None:
        """Let the device's work from now on start after that copy."""

    def catch_up(self) -> None:
        """Let copies from now on start after the device's work so far. To be called before copies are dropped."""


class CudaMover(Mover):
    """Copies on a second stream while the device computes, from page-locked memory (CUDA, ROCm).

    The copies' memory belongs to the second stream, so the allocator gives what was dropped to the next copies without
    waiting. That is safe because `catch_up` comes before every drop: the second stream then stands behind the last work
    that read them. (`record_stream` would be safe too, but gives the memory back only when the device gets there; the
    host runs far ahead, and all blocks would pile up on the device.)
    """

    def __init__(self, device: torch.device):
        super().__init__(device)
        self._stream = torch.cuda.Stream(device)
        # Registered memory must stay allocated until it is unregistered, also when nobody calls `unpin`.
        self._pinned: list[torch.UntypedStorage] = []
        self._finalizer = weakref.finalize(self, _unregister, device, self._pinned)
        self._finalizer.atexit = False  # the process gives its memory back by itself

    def copy(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Any]:
        with torch.cuda.stream(self._stream):
            copies = [mapped(t.detach(), lambda part: part.to(self.device, non_blocking=True)) for t in tensors]
            return copies, self._stream.record_event()

    def wait(self, ready: Any) -> None:
        torch.cuda.current_stream(self.device).wait_event(ready)

    def catch_up(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self.device))

    def pin(self, tensors: Iterable[Tensor]) -> None:
        # Registering locks the memory where it is. torch's own `pin_memory` would copy it into buffers whose sizes are
        # powers of two: up to twice the model.
        total = failed = error = 0
        with torch.cuda.device(self.device):
            for part in (part for tensor in tensors for part in plain_parts(tensor)):
                storage = part.untyped_storage()
                size = storage.nbytes()
                if size < MIN_PINNED_BYTES or part.is_pinned():
                    continue
                total += size
                code = int(_cudart().cudaHostRegister(storage.data_ptr(), size, _PORTABLE))
                if code == 0:
                    self._pinned.append(storage)
                else:
                    failed, error = failed + size, code
                    with suppress(RuntimeError):  # the error stays behind: the next kernel launch would raise it
                        torch.zeros(1, device=self.device)
        if failed:
            self.warning = (
                f"{failed / 2**30:.1f} of {total / 2**30:.1f} GiB of the streamed blocks could not be page-locked in "
                f"host memory (CUDA error {error}). They are streamed all the same, but copying them hardly overlaps "
                "with the device's work, so every step takes longer. Free host memory, raise the limit on locked "
                "memory (`ulimit -l`), or choose a precision with fewer bits."
            )
            log.warning(self.warning)

    def unpin(self) -> None:
        _unregister(self.device, self._pinned)
        self.warning = None


def mover(device: torch.device) -> Mover:
    """The mover for a device."""
    return CudaMover(device) if device.type == "cuda" else Mover(device)


def _cudart() -> Any:
    return torch.cuda.cudart()


def _unregister(device: torch.device, storages: list[torch.UntypedStorage]) -> None:
    if storages:
        torch.cuda.synchronize(device)  # a copy may still be reading
    while storages:
        _cudart().cudaHostUnregister(storages[-1].data_ptr())
        storages.pop()  # and only then may it be freed


class _Reference(NamedTuple):
    """A view of part `part` of a block's weights, without the weights."""

    part: int
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Wrapped(NamedTuple):
    """A wrapped tensor of a quantising library, part by part."""

    type: Any
    parts: dict[str, Any]
    context: Any
    size: torch.Size
    stride: tuple[int, ...]


class saving_references(torch.autograd.graph.saved_tensors_hooks):  # noqa: N801, a context manager like its base
    """Inside this block of a forward pass, autograd saves views of `parts` as references and everything else as it is.

    Args:
        parts: the plain tensors that make up a block's weights on the device.
        fetch: gives part i (on the device, as it was) when the backward pass needs it.
    """

    def __init__(self, parts: Sequence[Tensor], fetch: Callable[[int], Tensor]):
        # Addresses, not tensors: this object lives as long as the graph.
        index = {part.untyped_storage().data_ptr(): i for i, part in enumerate(parts)}

        def pack(tensor: Tensor) -> Any:
            if is_traceable_wrapper_subclass(tensor):
                names, context = tensor.__tensor_flatten__()
                inner = {name: pack(getattr(tensor, name)) for name in names}
                return _Wrapped(type(tensor), inner, context, tensor.size(), tensor.stride())
            part = index.get(tensor.untyped_storage().data_ptr())
            if part is None:
                return tensor
            return _Reference(part, tensor.dtype, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

        def unpack(saved: Any) -> Tensor:
            if isinstance(saved, _Wrapped):
                inner = {name: unpack(part) for name, part in saved.parts.items()}
                return saved.type.__tensor_unflatten__(inner, saved.context, saved.size, saved.stride)
            if not isinstance(saved, _Reference):
                return saved
            part = fetch(saved.part)
            # A part is a whole storage, and a library may save it as a view of another dtype.
            view = torch.empty(0, dtype=saved.dtype, device=part.device)
            return view.set_(part.untyped_storage(), saved.offset, saved.size, saved.stride)

        super().__init__(pack, unpack)
