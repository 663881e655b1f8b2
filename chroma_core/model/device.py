"""The device that models run on when nobody names one, what its memory says, and numbers that are none: noticed where
they first appear, before they become a black image."""

from __future__ import annotations

import ctypes
import gc
import sys
import weakref
from collections.abc import Callable, Iterable
from functools import cache

import psutil
import torch
from torch import Tensor

from ..errors import ConfigError, NotFiniteError


def best_device(name: str | None = None) -> torch.device:
    """The named device, or the best there is: CUDA/ROCm, then MPS, then the CPU.

    Raises ConfigError for a name that torch does not know, and for a device that is not here.
    """
    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"'{name}' is not a device: use cuda, cuda:1, mps or cpu.") from error
    count = device_count(device.type)
    if count is not None and (device.index or 0) >= count:
        here = f"torch {torch.__version__} finds {count or 'none'} of that type"
        raise ConfigError(f"The device '{name}' is not here: {here}. Name another, or none to take the best there is.")
    return device


def device_count(kind: str) -> int | None:
    """How many devices of a type are here; None where that is no question (cpu, meta)."""
    if kind == "mps":
        return int(torch.backends.mps.is_available())
    module = getattr(torch, kind, None)
    if kind in ("cpu", "meta") or not hasattr(module, "is_available"):
        return None
    return module.device_count() if module.is_available() else 0  # pyright: ignore[reportOptionalMemberAccess]


def has_bf16(device: torch.device | str) -> bool:
    """Whether the device computes in bf16 itself.

    NVIDIA's GPUs before Ampere emulate it slowly, and have no fused attention for it: one layer's scores at 1024² then
    take 6.4 GiB instead of 0.2.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return True
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


@cache
def _plans_attention(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def flash_instead(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether torch would take an attention that makes a plan for each number of tokens, where flash attention can."""
    if query.shape[-1] % 8 or not _plans_attention(query.device):
        return False
    asked = torch.backends.cuda.SDPAParams(query, key, value, None, 0.0, False, False)
    return torch.backends.cuda.can_use_flash_attention(asked)


class OwnMemory:
    """What one user of a GPU takes of it, where others of the process come and go while that one waits.

    held: the bytes that are the user's own; asked once a stretch of work, at its beginning.
    """

    def __init__(self, device: torch.device | str, held: Callable[[], int]):
        self.device, self.held = torch.device(device), held
        self._stretch: int | None = None
        self._others = self._peak = 0

    def begin(self, stretch: int) -> None:
        """Work begins; another number than the last says that others may have been there meanwhile."""
        if self.device.type != "cuda" or stretch == self._stretch:
            return
        torch.cuda.reset_peak_memory_stats(self.device)
        self._stretch, self._others = stretch, torch.cuda.memory_allocated(self.device) - self.held()

    def read(self, stretch: int | None) -> dict[str, int]:
        """Bytes in use now: `process` in RAM; on a GPU `device`, and `device_peak`, the most so far.

        Not those of the device where the stretch is another one than `begin` was told.
        """
        found = {"process": psutil.Process().memory_info().rss}
        if self.device.type == "mps":
            found["device"] = torch.mps.current_allocated_memory()
        elif self.device.type == "cuda" and stretch == self._stretch:
            self._peak = max(self._peak, torch.cuda.max_memory_allocated(self.device) - self._others)
            found["device"] = torch.cuda.memory_allocated(self.device) - self._others
        if self._peak:
            found["device_peak"] = self._peak
        return found


def free_memory(device: torch.device | str) -> int | None:
    """Bytes of the device that nobody has, torch included; None where nobody can say.

    What torch keeps for later lies in pieces that may be too small: `release_memory` gives whole ones back.
    """
    return torch.cuda.mem_get_info(device)[0] if torch.device(device).type == "cuda" else None


OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "alloc_failed",  # CUBLAS_STATUS_ALLOC_FAILED, CUDNN_STATUS_ALLOC_FAILED, CUFFT_ALLOC_FAILED …
    "allocation_failed",  # CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED
    "cudaerrormemoryallocation",
    "bad allocation",
    "bad_alloc",
)
"""What an error says, in small letters, when a device, a library on it, or the RAM has no memory left."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a device, or the RAM, has no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in OUT_OF_MEMORY)


def release_memory(gone: Iterable[weakref.ref] = ()) -> None:
    """Return what is no longer referenced to the accelerator, and RAM that was freed in pieces to the system.

    gone: what nobody should refer to any more. Only if some of it is still there, because objects refer to one another
    in a circle, the collector looks through the whole process, which stands still for as long as that takes (0.4 s
    of CPU in one that has imported what training needs).
    """
    if any(reference() is not None for reference in gone):
        gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Callable[[int], int] | None:
    """glibc's `malloc_trim`; None with another C library. Of freed tensors glibc keeps what lies below others."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim.argtypes = [ctypes.c_size_t]
    return trim


def broken(tensor: Tensor) -> bool:
    """Whether a tensor holds NaN or infinite numbers; waits for its device.

    Its extremes tell: a CPU finds them in a sixth of the time that it takes to look at each number.
    """
    return tensor.numel() > 0 and not bool(torch.stack([tensor.amin(), tensor.amax()]).isfinite().all())


def check_finite(tensor: Tensor, what: str, remedy: str) -> Tensor:
    """The tensor. Raises NotFiniteError, which begins with `what` and ends with `remedy`, unless its numbers are."""
    if broken(tensor):
        raise NotFiniteError(f"{what} holds NaN or infinite numbers. {remedy}")
    return tensor
