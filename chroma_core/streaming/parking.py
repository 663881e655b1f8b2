"""Taking modules off their device and bringing them back, streamed or not.

What is frozen does not change on the device, so its copy in RAM can be kept: it is made and page-locked when the module
leaves for the first time, and from then on leaving copies nothing, and coming back is as fast as the bus.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import psutil
import torch
from torch import Tensor, nn

from ..model.device import release_memory
from .movers import Mover, frozen_like, is_whole, mapped, mover
from .streamer import streamed

HOST_MEMORY_MARGIN = 4 << 30
"""Bytes of RAM that parking leaves free for everything else."""

_ATTRIBUTE = "kept_in_ram"


class _Kept(NamedTuple):
    """A tensor in RAM, and the one on the device that was copied from it and may not have changed since."""

    host: Tensor
    on_device: Tensor
    version: int

    def is_of(self, tensor: Tensor) -> bool:
        return tensor is self.on_device and tensor._version == self.version


class _Ram:
    """What of a module is kept in RAM while it is on the device."""

    def __init__(self, device: torch.device):
        self.mover: Mover = mover(device)
        self.pinned = False
        self.tensors: list[_Kept] = []


def to_host(module: nn.Module, keep: bool = False) -> None:
    """Take a module off its device. A streamed one gives up what it holds there; the rest is copied.

    keep: from now on hold a copy of what is frozen in RAM, as long as there is room for it.
    """
    streamer = streamed(module)
    with torch.inference_mode(False):
        if streamer is not None:
            streamer.park()
            return
        device = next((t.device for _, _, t in _frozen(module)), torch.device("cpu"))
        if device.type != "cpu" and (keep or _ATTRIBUTE in module.__dict__):
            _leave(module, module.__dict__.setdefault(_ATTRIBUTE, _Ram(device)))
        module.to("cpu")  # what is trained, too


def to_device(module: nn.Module, device: torch.device) -> None:
    """The way back from `to_host`."""
    streamer = streamed(module)
    with torch.inference_mode(False):
        if streamer is not None:
            streamer.unpark()
            return
        ram: _Ram | None = module.__dict__.get(_ATTRIBUTE)
        if ram is not None:
            _return(module, ram)
        module.to(device)


@contextmanager
def away(module: nn.Module, device: torch.device) -> Iterator[None]:
    """The module off its device, inside a `with` block."""
    to_host(module)
    release_memory()
    try:
        yield
    finally:
        to_device(module, device)


def _leave(module: nn.Module, ram: _Ram) -> None:
    """The frozen tensors' copies in RAM take their places; a copy is made of what has none, or changed."""
    known = {id(kept.on_device): kept for kept in ram.tensors}
    made: dict[int, Tensor] = {}
    ram.mover.catch_up()
    for table, name, tensor in _frozen(module):
        if id(tensor) not in made:
            kept = known.get(id(tensor))
            made[id(tensor)] = kept.host if kept and kept.is_of(tensor) else frozen_like(tensor, _copied(tensor))
        table[name] = made[id(tensor)]
    ram.tensors = []


def _copied(tensor: Tensor) -> Tensor:
    return mapped(tensor.detach(), lambda part: part.to("cpu"))


def _return(module: nn.Module, ram: _Ram) -> None:
    """Copies on the device take their places; those in RAM are kept if there is room."""
    places = list(_frozen(module))
    hosts = list({id(host): host for _, _, host in places}.values())
    keep = psutil.virtual_memory().available > HOST_MEMORY_MARGIN
    if keep and not ram.pinned:
        ram.mover.pin(hosts)
        ram.pinned = True
    copies, ready = ram.mover.copy(hosts)
    ram.mover.wait(ready)
    made = {id(host): frozen_like(host, copy) for host, copy in zip(hosts, copies, strict=True)}
    for table, name, host in places:
        table[name] = made[id(host)]
    if keep:
        ram.tensors = [_Kept(host, made[id(host)], made[id(host)]._version) for host in hosts]
    else:
        ram.mover.unpin()
        module.__dict__.pop(_ATTRIBUTE)


def _frozen(module: nn.Module) -> Iterator[tuple[dict, str, Tensor]]:
    """Where the tensors stand that are not trained: a module's dict of parameters or buffers, and the name in it.

    Without those of libraries that keep parts of a weight elsewhere, which only their own `to` moves.
    """
    for child in module.modules():
        for table in (child._parameters, child._buffers):
            for name, tensor in table.items():
                if tensor is not None and not tensor.requires_grad and is_whole(tensor):
                    yield table, name, tensor
