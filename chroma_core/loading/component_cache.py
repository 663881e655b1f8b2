"""The components that a host keeps loaded between prompts: at most one transformer, one text encoder, one VAE.

Each is in one of three states: in use on the device, resting there, or parked in host memory. With offload `model` or
`block` they take turns on the device; what has to leave is parked where host memory has room for it, else dropped and
read again from its file at its next turn.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from ..lora.adapters import attach, detach
from ..lora.files import read_lora
from ..lora.strengths import follow
from ..model.device import release_memory
from ..model.images import preview_matrix
from ..model.transformer import ChromaTransformer
from ..model.vae import Autoencoder
from ..sampling.text import TextEncoder
from ..streaming import HOST_MEMORY_MARGIN, module_bytes, to_device, to_host
from ..weights.identify import Part
from .build import OnPart
from .hub import COMMIT
from .load import Device, device_size, load_text_encoder, load_transformer, load_vae
from .model_files import ModelPart, file_state, locate
from .spec import ModelHandle, ModelSpec

Borrow = Callable[[ModelSpec, torch.device], AbstractContextManager[ChromaTransformer | None]]


@dataclass
class _Held:
    key: str
    value: Any
    module: nn.Module
    device: torch.device
    parked: bool = False
    users: int = 0


class ComponentCache:
    """Loads on demand, keeps the last of each kind, never holds two transformers.

    One user at a time: every method takes the same lock, and `transformer` holds it until its block ends.

    Args:
        make_room: called with the bytes that a component is about to take on the device, e.g. to ask the host to free
            that much of its own models.
        free_host_memory: bytes of host memory that are free now.
        on_part: progress of loading; see `build.OnPart`.
        borrow: `borrow(spec, device)` gives the transformer of `spec` for a `with` block, if somebody else has loaded
            it (see `load.transformer_identity`), or None.
    """

    def __init__(
        self,
        make_room: Callable[[int], None] = lambda needed: None,
        free_host_memory: Callable[[], int] = lambda: psutil.virtual_memory().available,
        on_part: OnPart = lambda done, total, what: None,
        borrow: Borrow = lambda spec, device: nullcontext(),
    ):
        self._lock, self._borrow = threading.RLock(), borrow
        self._make_room, self._free_host_memory, self._on_part = make_room, free_host_memory, on_part
        self._held: dict[Part, _Held] = {}
        self._matrix: tuple[str, torch.Tensor] | None = None
        self._commits: dict[tuple[str, str], str] = {}

    @contextmanager
    def transformer(self, handle: ModelHandle, device: Device) -> Iterator[ChromaTransformer]:
        """The transformer with the handle's LoRAs on it: merged ones loaded in, live ones attached for this block.

        Without merged ones it may be borrowed.
        """
        merged = tuple(use for use in handle.loras if use.mode == "merged")
        with self._lock:
            spec = self._pinned(handle.spec, "transformer")
            with nullcontext() if merged else self._borrow(spec, torch.device(device)) as lent:
                if lent is not None:
                    with _with_live(lent, handle):
                        yield lent
                    return
            held = self._get(
                "transformer",
                spec,
                device,
                lambda: load_transformer(spec, device, merged, self._on_part),
                extra=repr([(use, _version(use.path)) for use in merged]),
            )
            held.users += 1
            try:
                with _with_live(held.value, handle):
                    yield held.value
            finally:
                held.users -= 1

    def text_encoder(self, spec: ModelSpec, device: Device) -> TextEncoder:
        """The text encoder of `spec`, on `device` until another component takes its turn."""
        with self._lock:
            spec = self._pinned(spec, "text_encoder")
            load = lambda: load_text_encoder(spec, device, self._on_part)  # noqa: E731
            return self._get("text_encoder", spec, device, load).value

    def vae(self, spec: ModelSpec, device: Device) -> Autoencoder:
        """The VAE of `spec`, on `device` until another component takes its turn."""
        with self._lock:
            spec = self._pinned(spec, "vae")
            return self._get("vae", spec, device, lambda: load_vae(spec, device)).value

    def preview_matrix(self, spec: ModelSpec, device: Device) -> torch.Tensor:
        """The latent → RGB map for live previews of `spec` (see `images.preview_matrix`)."""
        with self._lock:
            key = _key("vae", self._pinned(spec, "vae"), device)
            if self._matrix is None or self._matrix[0] != key:
                self._matrix = key, preview_matrix(self.vae(spec, device))
            return self._matrix[1]

    def clear(self) -> None:
        """Forget every component that is not in use, and return its memory."""
        with self._lock:
            gone = [weakref.ref(held.module) for held in self._held.values() if not held.users]
            self._held = {kind: held for kind, held in self._held.items() if held.users}
            self._commits.clear()
            release_memory(gone)

    def park(self) -> int:
        """Take every component that is not in use off its device; returns the bytes that this freed there.

        It is parked in host memory if there is room, else dropped. Either way its next use brings it back.
        """
        with self._lock:
            before = sum(self.device_bytes().values())
            self._send_away()
            return before - sum(self.device_bytes().values())

    def device_bytes(self) -> dict[str, int]:
        """Bytes that the components take now, by device name (`cuda:0`, `cpu`). Never waits for a sampler."""
        total: Counter[str] = Counter()
        for held in tuple(self._held.values()):
            total.update(module_bytes(held.module))
        return total

    def _pinned(self, spec: ModelSpec, part: ModelPart) -> ModelSpec:
        """`spec` with the commit that its branch meant when it was first used: the Hub is asked once, not every time.

        So parts that are loaded at different times are of one commit. `clear` forgets it.
        """
        if spec.revision is None or COMMIT.fullmatch(spec.revision):
            return spec
        branch = (spec.flavour, spec.revision)
        if branch not in self._commits:
            commit = locate(spec, part).parent.name
            if not COMMIT.fullmatch(commit):  # the part lies in a local file or folder
                return spec
            self._commits[branch] = commit
        return replace(spec, revision=self._commits[branch])

    def _get(self, kind: Part, spec: ModelSpec, device: Device, load: Callable[[], Any], extra: str = "") -> _Held:
        key = f"{_key(kind, spec, device)} {extra}"
        held = self._held.get(kind)
        if held is not None and held.key != key:
            gone = weakref.ref(held.module)
            del self._held[kind]
            held = None
            release_memory([gone])
        if held is not None and not held.parked:
            return held
        if spec.offload != "none":
            self._send_away(keep=kind)
        self._make_room(device_size(spec, kind) if held is None else sum(module_bytes(held.module).values()))
        if held is None:
            value = load()
            module = value.model if isinstance(value, TextEncoder) else value
            held = self._held[kind] = _Held(key, value, module, torch.device(device))
        else:
            to_device(held.module, held.device)
            held.parked = False
        return held

    def _send_away(self, keep: Part | None = None) -> None:
        gone = []
        for kind, held in tuple(self._held.items()):
            if kind == keep or held.users or held.parked:
                continue
            needed = sum(size for device, size in module_bytes(held.module).items() if device != "cpu")
            if self._free_host_memory() - needed < HOST_MEMORY_MARGIN:
                gone.append(weakref.ref(held.module))
                del self._held[kind]
            elif held.device.type != "cpu":  # a CPU keeps what fits beside the next one: parking would free nothing
                to_host(held.module)
                held.parked = True
        held = None  # it names the last of them
        release_memory(gone)


OF_ONE_PART: dict[Part, tuple[str, ...]] = {
    "transformer": ("precision", "compute", "resident_blocks", "transformer"),
    "text_encoder": ("text_precision", "text_encoder", "tokenizer"),
    "vae": ("vae",),
}
"""Fields of a `ModelSpec` that the other parts do not depend on, but for the files that they name."""


def _key(kind: Part, spec: ModelSpec, device: Device) -> str:
    """Equal when the same part would be loaded: one that is chosen anew leaves the others where they are.

    With the state of the files: one that was replaced under its name is another model.
    """
    others = [name for part, names in OF_ONE_PART.items() if part != kind for name in names]
    fields = {name: value for name, value in spec.to_dict().items() if name not in others}
    parts: tuple[ModelPart, ...] = ("text_encoder", "tokenizer") if kind == "text_encoder" else (kind,)
    paths = [locate(spec, part) for part in parts]
    return f"{kind} {fields} {device} {[(str(path), file_state(path)) for path in paths]}"


def live_name(number: int) -> str:
    """How the live LoRA of that number, counted from 0, is called on the model."""
    return f"live_{number}"


@contextmanager
def _with_live(model: ChromaTransformer, handle: ModelHandle) -> Iterator[None]:
    """The handle's live LoRAs on the model, inside a `with` block."""
    attached: list[str] = []
    before = tuple(model.step_hooks)
    try:
        with torch.inference_mode(False):
            for i, use in enumerate(use for use in handle.loras if use.mode == "live"):
                name = live_name(i)
                lora = read_lora(use.path)
                strengths = use.strengths(lora.modules)
                attach(model, lora, strengths, name=name, allow_partial=use.allow_partial)
                attached.append(name)
                if use.schedule:
                    model.step_hooks.append(follow(model, name, strengths, use.schedule))
        yield
    finally:
        model.step_hooks[:] = before
        for name in attached:
            detach(model, name)


def _version(path: str) -> str:
    """A text that changes when a LoRA is trained again under its old name, so that it is merged again."""
    try:
        return file_state(Path(path))
    except OSError:
        return "missing"  # reading it raises the readable error
