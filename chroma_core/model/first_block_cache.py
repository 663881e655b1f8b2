"""An approximation for sampling: while the first block adds nearly what it added before, so do all the others.

A pass computes the first block. Where what it adds to the image's tokens has changed by less than a threshold since the
last pass that was computed whole, the other blocks are left out, and what they added then is added again. It is the
caching of residuals by the first block's, known from ParaAttention and others; sampling with it is never exact.

Shapes: B images, L image tokens, M width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Rest = Callable[[Tensor | None], Tensor]
"""The image's tokens after all blocks: of these rows of the batch, or (None) of all."""


class FirstBlockCache:
    """What one sequence of passes remembers: one prompt or batch of prompts, at falling noise levels.

    Every image of a batch is decided on by itself, so that it is what it is alone. It keeps two tensors of the size of
    the image's tokens.

    threshold: mean |change| of what the first block adds, relative to its mean size; at 0 nothing is left out.
    """

    def __init__(self, threshold: float):
        self.threshold = threshold
        self.passes = self.left_out = 0
        """Images times passes so far, and those of them without the other blocks."""
        self.forget()

    def forget(self) -> None:
        """The next pass is computed whole, e.g. because the model has changed."""
        self._first: Tensor | None = None
        self._others: Tensor | None = None

    def through(self, before_BLM: Tensor, after_BLM: Tensor, rest: Rest) -> Tensor:
        """The image's tokens [B, L, M] after all blocks, from those before and after the first one."""
        added = after_BLM - before_BLM
        stale = self._stale(added)
        self.passes += len(stale)
        self.left_out += stale.count(False)
        if all(stale):
            result = rest(None)
            self._first, self._others = added, result - after_BLM
            return result
        assert self._first is not None and self._others is not None
        result = after_BLM + self._others
        if result.dtype == torch.float16:  # see `transformer.finite`
            result = result.clip(-65504, 65504)
        if any(stale):
            rows = torch.tensor([i for i, row in enumerate(stale) if row], device=added.device)
            fresh = rest(rows)
            result[rows] = fresh
            self._first[rows], self._others[rows] = added[rows], fresh - after_BLM[rows]
        return result

    def _stale(self, added_BLM: Tensor) -> list[bool]:
        """Whether each image has to be computed whole; waits for the device."""
        if self._first is None or self._first.shape != added_BLM.shape:
            return [True] * len(added_BLM)
        change = (added_BLM.float() - self._first.float()).abs().mean((1, 2)) / self._first.float().abs().mean((1, 2))
        return (~(change < self.threshold)).tolist()  # also where it is no number
