"""The components that a host keeps loaded between prompts: at most one transformer, one text encoder, one VAE."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import AutoencoderKL

from ..lora.adapters import attach, detach
from ..lora.formats import read_lora
from ..pictures import preview_matrix
from ..text import TextEncoder
from ..transformer import ChromaTransformer
from .components import Device, load_text_encoder, load_transformer, load_vae
from .spec import ModelHandle, ModelSpec


class ComponentCache:
    """Loads on demand, keeps the last of each kind, never holds two transformers.

    `make_room` is called before anything is loaded, e.g. to ask the host to free its own models.
    One user at a time: every method takes the same lock, and `transformer` holds it until its block ends.
    """

    def __init__(self, make_room: Callable[[], None] = lambda: None):
        self._lock = threading.RLock()
        self._make_room = make_room
        self._held: dict[str, tuple[str, Any]] = {}

    @contextmanager
    def transformer(self, handle: ModelHandle, device: Device) -> Iterator[ChromaTransformer]:
        """The transformer with the handle's LoRAs on it: merged ones loaded in, live ones attached for this block."""
        merged = tuple(use for use in handle.loras if use.mode == "merged")
        live = [use for use in handle.loras if use.mode == "live"]
        with self._lock:
            model: ChromaTransformer = self._get(
                "transformer",
                handle.spec,
                device,
                lambda: load_transformer(handle.spec, device, merged),
                extra=repr([(use, _file_version(use.path)) for use in merged]),
            )
            attached: list[str] = []
            try:
                with torch.inference_mode(False):
                    for i, use in enumerate(live):
                        name = f"live_{i}"
                        attach(model, read_lora(use.path), use.strength, name=name, allow_partial=use.allow_partial)
                        attached.append(name)
                yield model
            finally:
                for name in attached:
                    detach(model, name)

    def text_encoder(self, spec: ModelSpec, device: Device) -> TextEncoder:
        """The text encoder of `spec`."""
        with self._lock:
            return self._get("text_encoder", spec, device, lambda: load_text_encoder(spec, device))

    def vae(self, spec: ModelSpec, device: Device) -> AutoencoderKL:
        """The VAE of `spec`."""
        with self._lock:
            return self._get("vae", spec, device, lambda: load_vae(spec, device))

    def preview_matrix(self, spec: ModelSpec, device: Device) -> torch.Tensor:
        """The latent → RGB map for live previews of `spec` (see `pictures.preview_matrix`)."""
        with self._lock:
            return self._get("preview_matrix", spec, device, lambda: preview_matrix(self.vae(spec, device)))

    def clear(self) -> None:
        """Forget every component and return the accelerator's memory."""
        with self._lock:
            self._held.clear()
            _release_memory()

    def _get(self, kind: str, spec: ModelSpec, device: Device, load: Callable[[], Any], extra: str = "") -> Any:
        key = f"{kind} {spec.key()} {device} {extra}"
        held = self._held.get(kind)
        if held is not None and held[0] == key:
            return held[1]
        self._held.pop(kind, None)
        if spec.offload == "model" and kind != "preview_matrix":
            for other in ("transformer", "text_encoder", "vae"):
                self._held.pop(other, None)
        del held
        _release_memory()
        self._make_room()
        value = load()
        self._held[kind] = (key, value)
        return value


def _file_version(path: str) -> tuple[int, int] | None:
    """Size and time of a file, so that a LoRA trained again under its old name is merged again."""
    try:
        stat = os.stat(path)
    except OSError:
        return None  # reading it raises the readable error
    return stat.st_size, stat.st_mtime_ns


def _release_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()
