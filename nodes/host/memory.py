"""Living together with ComfyUI's own models on one device.

ComfyUI keeps a list of the models it has loaded, and unloads from it when it needs memory. Everything that nodes keep
loaded (`components`) is on that list as one entry, a patcher without weights of its own: it reports how many bytes our
components hold on the device, and when ComfyUI asks it to unload, they go. Registering it is ComfyUI's ordinary
`load_models_gpu`, which first frees as much of ComfyUI's own models as ours are going to need.

A training job has components of its own, on the same device. It is counted in that entry, leaves when the room is
wanted (`DeviceSlot`), and lends its base to a prompt that wants just that. It comes back when the thread that runs
prompts has made room for it.

All of this belongs to that thread, but for `room_for_job`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import comfy.model_management as management
import comfy.model_patcher
import execution
import torch
from comfy.cli_args import args
from comfy_execution.utils import get_executing_context
from server import PromptServer
from typing_extensions import TypedDict

from ...chroma_core.loading.component_cache import ComponentCache
from ...chroma_core.loading.load import COMPUTING_BYTES, transformer_identity
from ...chroma_core.loading.spec import ModelSpec
from ...chroma_core.memory.machine import GIB, Machine, machine
from ...chroma_core.training.control import DeviceSlot
from .messages import say, show_loading
from .queue import between_prompts, computing

log = logging.getLogger("chromakit")


def _no_job() -> DeviceSlot | None:
    return None


_job_slot: Callable[[], DeviceSlot | None] = _no_job


def device() -> torch.device:
    """Where models run."""
    return management.get_torch_device()


def here() -> Machine:
    """What memory plans are made for: ComfyUI's device, less what `--reserve-vram` leaves to others, if that is more
    than a plan leaves anyway."""
    found = machine(device())
    return replace(found, margin=max(found.margin, round((args.reserve_vram or 0) * GIB)))


def make_room(needed: int | None = None) -> None:
    """Before our components load: ComfyUI gives up what its own models hold beyond the free memory, and learns of us.

    needed: bytes about to be loaded on the device; None: unknown, all of ComfyUI's models go. On a CPU ComfyUI's
    models stay: there they are where they would be unloaded to.
    """
    if device().type != "cpu" and needed is None:
        management.free_memory(1e30, device(), keep_loaded=_our_entries())
    _stand_in().announce(needed or 0)
    if needed is None or (needed and _free() < needed + COMPUTING_BYTES):
        _job_leaves()


def stay_known() -> None:
    """After computing: be on ComfyUI's list again, should it have crossed us off for want of room meanwhile."""
    if _on_device() and not _our_entries():
        _stand_in().announce(0)


def share_device_with(job_slot: Callable[[], DeviceSlot | None]) -> None:
    """From now on the job at work, if there is one, has that place on the device."""
    global _job_slot
    _job_slot = job_slot


def before_prompt(prompt: dict[str, Any], check: Callable[[], None]) -> None:
    """See to it that a prompt finds the memory that it needs beside a training job.

    Our nodes and ComfyUI's own ask for memory when they need it. A node of another pack may just take it: for such a
    one the job leaves at once. `check` is called while it does, and raises when the prompt is not wanted any more.
    """
    kinds = {node.get("class_type") for node in prompt.values() if isinstance(node, dict)}
    ours = __name__.rpartition(".nodes.host.")[0].rpartition(".")[2]
    known: dict[Any, Any] = getattr(execution.nodes, "NODE_CLASS_MAPPINGS", {})
    origins = {getattr(known.get(kind), "RELATIVE_PYTHON_MODULE", "") for kind in kinds}
    if any(origin.startswith("custom_nodes.") and origin.rpartition(".")[2] != ours for origin in origins):
        _job_leaves(check)
    stay_known()


def room_for_job(needed: int) -> Callable[[], bool]:
    """Ask for `needed` bytes of the device for a job; the answer says whether ComfyUI has made room (any thread)."""
    if device().type == "cpu":
        return lambda: True
    asked = between_prompts(lambda: _clear(needed))
    if asked is None:  # another kind of queue: ComfyUI unloads everything as soon as it can
        PromptServer.instance.prompt_queue.set_flag("unload_models", True)
        return lambda: True
    return asked.done


def _cancelled() -> None:
    management.throw_exception_if_processing_interrupted()


def _clear(needed: int) -> None:
    components.park()
    management.free_memory(needed, device(), keep_loaded=_our_entries())
    management.soft_empty_cache()


def _job_leaves(check: Callable[[], None] = _cancelled) -> None:
    """Return when no training job is on the device, or cannot leave: the prompt then tries with what there is."""
    slot = _job_slot()
    if slot is None or slot.lent or device().type == "cpu" or slot.make_leave(check, seconds=0):
        return
    say("Waiting until the training job has left the GPU")
    if not slot.make_leave(check):
        log.warning("ChromaKit: the training job has not left the GPU; the prompt goes on beside it.")


def _borrow(spec: ModelSpec, where: torch.device) -> AbstractContextManager[Any]:
    slot = _job_slot()
    return nullcontext() if slot is None else slot.lend((transformer_identity(spec), where), _cancelled)


def _free() -> int:
    free: Any = management.get_free_memory(device())
    return int(free)


components = ComponentCache(make_room=make_room, on_part=show_loading, borrow=_borrow)
"""What nodes keep loaded between prompts. Jobs load their own."""


class MemoryReport(TypedDict):
    """For programs: the device, its memory in bytes, and what the components that nodes keep loaded hold where.

    component_bytes: by device. known_to_host: whether ComfyUI counts them among its loaded models.
    """

    device: str
    device_total_bytes: int
    device_free_bytes: int
    component_bytes: dict[str, int]
    known_to_host: bool


def memory_report() -> MemoryReport:
    """How it is now."""
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
    """Bytes that our components and the job hold on ComfyUI's device."""
    where, slot = device(), _job_slot()
    job = slot.device_bytes() if slot is not None and where.type != "cpu" else 0
    return job + sum(
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

    def partially_unload(self, _: Any, memory_to_free: int = 0, **__: Any) -> int:
        return _give_back(memory_to_free)

    def detach(self, unpatch_all: bool = True) -> torch.nn.Module:
        if unpatch_all:  # otherwise ComfyUI only renews the entry
            _give_back()
        return self.model


def _give_back(wanted: float = 1e30) -> int:
    """Give the device's memory back, `wanted` bytes at least, and return how many bytes that were.

    While a node runs, another model needs the room: ours wait in RAM, as ComfyUI's own do, and if that is not enough a
    training job leaves, too. When none runs, the user asked for the memory (`/free`), or it has run out: everything but
    the job goes. On a CPU, the computer's memory is the device. Nothing is taken from under one of our own nodes while
    it computes.
    """
    held, node_runs = _on_device(), get_executing_context() is not None
    keeps_models_off_device = getattr(management, "DISABLE_SMART_MEMORY", False)  # asks after every prompt
    if not computing():
        if device().type != "cpu" and (node_runs or keeps_models_off_device):
            components.park()
        else:
            components.clear()
    if node_runs and held - _on_device() < wanted:
        _job_leaves()
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
