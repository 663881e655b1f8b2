"""A job's place on the device: the one component that it keeps there, and its stepping aside for the host's prompts.

While a prompt runs the device belongs to it: the job's component waits in host memory, so that two transformers never
share a device, and comes back when the prompt is done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..model.device import release_memory
from ..streaming import to_device, to_host


class Seat:
    """Who of a job's components is on the device.

    Args:
        device: the job's device.
        make_room: called before a component comes (back) to the device, e.g. to ask the host to free its own models.
    """

    def __init__(self, device: torch.device | str, make_room: Callable[[], None] = lambda: None):
        self.device = torch.device(device)
        self.make_room = make_room
        self.away = False
        self._module: nn.Module | None = None

    @contextmanager
    def taken_by(self, module: nn.Module) -> Iterator[None]:
        """`module` (on the device now) is the one to move, inside a `with` block."""
        self.take(module)
        try:
            yield
        finally:
            self.leave()

    def take(self, module: nn.Module) -> None:
        """From now on `module`, which is on the device, is the one to move."""
        self._module, self.away = module, False

    def leave(self) -> None:
        """Nothing of the job is on the device any more."""
        self._module, self.away = None, False

    def step_aside(self) -> None:
        """Leave the device to the host. Called again, it does nothing."""
        if self._module is not None and not self.away:
            to_host(self._module)
            release_memory()
            self.away = True

    def come_back(self) -> None:
        """Take the device again, if it was left."""
        if self._module is not None and self.away:
            self.make_room()
            to_device(self._module, self.device)
            self.away = False
