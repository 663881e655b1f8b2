"""Gradient checkpointing: what the backward pass needs of a function is computed again there instead of being kept.

As in `torch.utils.checkpoint` without reentrance the graph is that of the plain function, whose saved tensors are
replaced by their numbers. The first that the backward pass asks for runs the function again, as far as the last that
was saved; each is let go when it is taken. Torch's own also restores random states and autocast and allows for graphs
in graphs and graphs used twice, at a price for every tensor: a third of what the Python of a training step cost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def recomputing(function: Callable[..., Any], *inputs: Any) -> Any:
    """function(*inputs), for one backward pass. It must draw no random numbers and do the same whenever it is called.

    The backward pass raises RuntimeError when it did not, or when it is a second one.
    """
    frame = _Frame(function, inputs)
    with saved_tensors_hooks(frame.count, frame.take):
        return function(*inputs)


class _Enough(BaseException):
    """All that was saved has been computed again."""


class _Frame:
    """One call: how many tensors it saved and, in the backward pass, those that were not yet taken."""

    def __init__(self, function: Callable[..., Any], inputs: tuple[Any, ...]):
        self.function, self.inputs = function, inputs
        self.saved = 0
        self.again: list[Tensor | None] = []

    def count(self, _: Tensor) -> int:
        """The number of a tensor in the forward pass."""
        self.saved += 1
        return self.saved - 1

    def take(self, number: int) -> Tensor:
        """The tensor of that number, in the backward pass."""
        if not self.again:
            self.again = [*self._computed_again()]
        tensor, self.again[number] = self.again[number], None
        if tensor is None:
            raise RuntimeError("Blocks that are computed again serve one backward pass; this is a second one.")
        return tensor

    def _computed_again(self) -> list[Tensor]:
        tensors: list[Tensor] = []

        def keep(tensor: Tensor) -> None:
            tensors.append(tensor.detach() if tensor.requires_grad else tensor)  # whose graph would hold itself
            if len(tensors) == self.saved:
                raise _Enough

        try:
            with saved_tensors_hooks(keep, _never), torch.enable_grad():
                self.function(*self.inputs)
        except _Enough:
            return tensors
        raise RuntimeError(f"A block that is computed again saved {len(tensors)} tensors instead of {self.saved}.")


def _never(_: None) -> Tensor:
    raise RuntimeError("There is no backward pass through what is computed again.")
