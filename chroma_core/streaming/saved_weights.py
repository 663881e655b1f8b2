"""Keeps autograd from holding a streamed block's weights: it saves references, and asks for the weights again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


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
