"""Living together with ComfyUI's own models on one device.

ComfyUI keeps a list of the models it has loaded, and unloads from it when it needs memory. Everything that nodes keep
loaded (`components`) is on that list as one entry, a patcher without weights of its own: it reports how many bytes our
components hold on the device, and when ComfyUI asks it to unload, they go. Registering it is ComfyUI's ordinary
`load_models_gpu`, which first frees as much of ComfyUI's own models as ours are going to need.

All of this belongs to the thread that runs prompts; a training job loads its own components and never comes here.
"""

from __future__ import annotations

import logging
from typing import Any

import comfy.model_management as management
import comfy.model_patcher
import torch
from comfy_execution.utils import get_executing_context
from server import PromptServer

from ...chroma_core.loading.component_cache import ComponentCache
from .messages import show_loading
from .queue import computing

log = logging.getLogger("chromakit")


def device() -> torch.device:
    """Where models run."""
    return management.get_torch_device()


def make_room(needed: int | None = None) -> None:
    """Before our components load: ComfyUI gives up what its own models hold beyond the free memory, and learns of us.

    needed: bytes about to be loaded on the device; None: unknown, all of ComfyUI's models go. On a CPU ComfyUI's
    models stay: there they are where they would be unloaded to.
    """
    if device().type != "cpu" and needed is None:
        management.free_memory(1e30, device(), keep_loaded=_our_entries())
    _stand_in().announce(needed or 0)


def stay_known() -> None:
    """After computing: be on ComfyUI's list again, should it have crossed us off for want of room meanwhile."""
    if _on_device() and not _our_entries():
        _stand_in().announce(0)


def free_models_soon() -> None:
    """Memory for a job, from the training thread: our cache goes at once, ComfyUI's models soon."""
    if device().type != "cpu":
        components.clear()
        PromptServer.instance.prompt_queue.set_flag("unload_models", True)


components = ComponentCache(make_room=make_room, on_part=show_loading)
"""What nodes keep loaded between prompts. Jobs load their own."""


def memory_report() -> dict[str, Any]:
    """For programs: the device, its memory in bytes, and what the components that nodes keep loaded hold where.

    `component_bytes` is by device; `known_to_host`: whether ComfyUI counts them among its loaded models.
    """
    total: Any = management.get_total_memory(device())
    free: Any = management.get_free_memory(device())
    return {
        "device": str(device()),
        "device_total_bytes": int(total),
        "device_free_bytes": int(free),
        "component_bytes": components.device_bytes(),
        "known_to_host": bool(_our_entries()),
    }


def _on_device() -> int:
    """Bytes that our components hold on ComfyUI's device."""
    where = device()
    return sum(
        size
        for name, size in components.device_bytes().items()
        if torch.device(name).type == where.type and torch.device(name).index in (None, where.index or 0)
    )


class ChromaKitComponents(torch.nn.Module):
    """What ComfyUI's log calls our components; it holds no weights."""


class _StandIn(comfy.model_patcher.ModelPatcher):
    """The entry for `components` in ComfyUI's list of loaded models."""

    _coming = 0
    _warned = False

    def announce(self, coming: int) -> None:
        """Register with ComfyUI, which first frees memory for `coming` more bytes and for computing."""
        self._coming = coming
        try:
            management.load_models_gpu([self])
        except (AttributeError, TypeError) as error:  # another version of ComfyUI, whose list works otherwise
            if not self._warned:
                log.warning(
                    "ChromaKit: this version of ComfyUI cannot count ChromaKit's models among its own (%s: %s). They "
                    "stay loaded until another Chroma model is chosen or a training job needs the memory.",
                    type(error).__name__,
                    error,
                )
            self._warned = True
            if device().type != "cpu":
                management.unload_all_models()
        finally:
            self._coming = 0

    def model_size(self) -> int:
        return _on_device() + self._coming

    def loaded_size(self) -> int:
        return _on_device()

    def current_loaded_device(self) -> torch.device:
        return self.load_device

    def partially_load(self, *_: Any, **__: Any) -> int:
        return 0  # `components` loads

    def partially_unload(self, *_: Any, **__: Any) -> int:
        return _give_back()

    def detach(self, unpatch_all: bool = True) -> torch.nn.Module:
        if unpatch_all:  # otherwise ComfyUI only renews the entry
            _give_back()
        return self.model


def _give_back() -> int:
    """Give the device's memory back and return how many bytes that were.

    While a node runs, another model needs the room: ours wait in RAM, as ComfyUI's own do. When none
    runs, the user asked for the memory (`/free`), or it has run out: everything goes. On a CPU, the
    computer's memory is the device. Nothing is taken from under one of our own nodes while it computes.
    """
    if computing():
        return 0
    held = _on_device()
    node_runs = get_executing_context() is not None
    keeps_models_off_device = getattr(management, "DISABLE_SMART_MEMORY", False)  # asks after every prompt
    if device().type != "cpu" and (node_runs or keeps_models_off_device):
        components.park()
    else:
        components.clear()
    return held - _on_device()


_patcher: _StandIn | None = None


def _stand_in() -> _StandIn:
    """The one entry. It lives as long as ComfyUI: ComfyUI's list refers to it weakly."""
    global _patcher
    if _patcher is None:
        _patcher = _StandIn(ChromaKitComponents(), device(), torch.device("cpu"))
    return _patcher


def _our_entries() -> list[Any]:
    entries = getattr(management, "current_loaded_models", [])
    return [entry for entry in entries if _patcher is not None and entry.model is _patcher]
