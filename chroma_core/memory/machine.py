"""The machine that a plan is made for: its accelerator's memory and its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from ..errors import ConfigError
from ..model.device import best_device, has_bf16

GIB = 2**30

DEVICE_MARGIN, DEVICE_HOLES = GIB, 0.08
"""What a plan leaves free on the device: what the driver, its context (0.5 GiB) and the desktop take; and a share of
the rest, for holes in the allocator's memory and work areas of libraries. A job on a simulated card of 6 GB that left
no room for holes ran out of memory."""

HOST_MARGIN, HOST_MARGIN_SHARE = 4 * GIB, 0.15
"""The same for the computer's memory: the operating system, Python with torch, ComfyUI, a browser."""

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True)
class Machine:
    """One accelerator and the memory of the computer around it, in bytes.

    device_type: `cuda` (NVIDIA, and AMD through ROCm), `mps` or `cpu`. bf16: whether it computes in bf16 itself.
    margin: bytes of the device that are not the plan's.
    """

    name: str
    device_bytes: int
    host_bytes: int
    device_type: str = "cuda"
    bf16: bool = True
    margin: int = DEVICE_MARGIN

    @property
    def shared(self) -> bool:
        """Whether device and computer share one memory, so that moving something away from the device frees nothing."""
        return self.device_type in ("cpu", "mps")

    @property
    def device_budget(self) -> int:
        """Bytes on the device that a plan may use."""
        if self.device_type == "cpu":
            return self.host_budget
        return max(0, round((1 - DEVICE_HOLES) * (self.device_bytes - self.margin)))

    @property
    def host_budget(self) -> int:
        """Bytes of the computer's memory that a plan may use."""
        return max(0, self.host_bytes - round(max(HOST_MARGIN, HOST_MARGIN_SHARE * self.host_bytes)))

    def with_memory(self, device_gib: float | None, host_gib: float | None, margin_gib: float | None = None) -> Machine:
        """This machine with another card, other amounts of memory or another margin (in GiB; None: as it is).

        A number for the card means one with memory of its own, whatever this machine has. Raises ConfigError.
        """
        for what, value in (("card", device_gib), ("computer", host_gib)):
            if value is not None and not 0.5 <= value <= 2**20:
                raise ConfigError(f"The memory of the {what} is {value} GiB; give a number of GiB of at least 0.5.")
        if margin_gib is not None and not 0 <= margin_gib <= 2**20:
            raise ConfigError(f"The margin is {margin_gib} GiB; give a number of GiB of at least 0.")
        host = self.host_bytes if host_gib is None else round(host_gib * GIB)
        margin = self.margin if margin_gib is None else round(margin_gib * GIB)
        if device_gib is not None:
            return Machine("a card", round(device_gib * GIB), host, "cuda", margin=margin)
        return replace(
            self, margin=margin, host_bytes=host, device_bytes=host if self.device_type == "cpu" else self.device_bytes
        )


def machine(device: torch.device | str | None = None) -> Machine:
    """The device that models run on (by default the best there is) with all its memory, used at the moment or not."""
    chosen = best_device(None if device is None else str(device))
    host = _host_bytes()
    if chosen.type == "cuda":
        properties = torch.cuda.get_device_properties(chosen)
        return Machine(properties.name, properties.total_memory, host, "cuda", has_bf16(chosen))
    if chosen.type == "mps":
        # What Metal advises for one process; the rest of the shared memory is the system's.
        return Machine("Apple GPU", torch.mps.recommended_max_memory(), host, "mps")
    return Machine("CPU", host, host, "cpu")


def in_gib(value: float) -> str:
    """Bytes for people: GiB, below one MiB."""
    return f"{value / GIB:.2f} GiB" if value >= GIB else f"{value / 2**20:.1f} MiB"


def _host_bytes() -> int:
    """The computer's memory, or what a container may use of it."""
    total = psutil.virtual_memory().total
    for path in _CGROUP_LIMITS:
        try:
            limit = int(Path(path).read_text().strip())
        except (OSError, ValueError):  # not Linux, or "max": no limit
            continue
        return min(total, limit)
    return total
