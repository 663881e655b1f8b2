"""Exact peaks of live tensor memory on the CPU: what the memory plan is checked with.

Allocators, workspaces of libraries and caches are not seen: what is counted is what the program itself holds.
"""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Counts the storages that come to life inside the block; `peak` and `now` are bytes.

    What was there before does not count. A storage is seen as the result of an operation and forgotten when the last
    reference to it dies; views and results in place share their storage and count once. Backward passes count too (on
    the CPU they run in this thread).
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for value in tree_iter((args, kwargs)):
            self._see(value, count=False)  # was there before the block, e.g. a weight: never counted
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            self._see(value, count=True)
        return result

    def _see(self, value: object, count: bool) -> None:
        if not isinstance(value, torch.Tensor) or value.device.type == "meta":
            return
        storage = value.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if count else 0
        self._known[key] = size
        weakref.finalize(storage, self._forget, key)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int) -> None:
        self.now -= self._known.pop(key, 0)
