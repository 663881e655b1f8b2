"""Modules between the device and host memory, streamed or not."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..streaming import streamed


def to_host(module: nn.Module) -> None:
    """Take a module off its device. A streamed one gives up what it holds there; the rest is copied."""
    streamer = streamed(module)
    with torch.inference_mode(False):
        streamer.park() if streamer is not None else module.to("cpu")


def to_device(module: nn.Module, device: torch.device) -> None:
    """The way back from `to_host`."""
    streamer = streamed(module)
    with torch.inference_mode(False):
        streamer.unpark() if streamer is not None else module.to(device)


@contextmanager
def away(module: nn.Module, device: torch.device) -> Iterator[None]:
    """The module off its device, inside a `with` block."""
    to_host(module)
    release_memory()
    try:
        yield
    finally:
        to_device(module, device)


def module_bytes(module: nn.Module) -> dict[str, int]:
    """Bytes of a module's parameters and buffers, by device name; shared ones once. A streamed one's visitors count."""
    total: dict[str, int] = {}
    for tensor in {id(t): t for t in (*module.parameters(), *module.buffers())}.values():
        name = str(tensor.device)
        total[name] = total.get(name, 0) + tensor.numel() * tensor.element_size()
    streamer = streamed(module)
    if streamer is not None and streamer.device.type != "cpu":
        total[str(streamer.device)] = streamer.device_bytes()
    return total


def release_memory() -> None:
    """Return what is no longer referenced to the accelerator."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()
