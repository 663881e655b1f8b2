"""Block streaming: the transformer's blocks rest in host memory and visit the device one after the other.

Sampling and training run the same way. `resident_blocks` bounds how many blocks are on the device at a time: the first
`resident_blocks` − 2 stay there, the other two places are for the block at work and the next one, which is copied
while the first computes. A backward pass walks the blocks in reverse order. Frozen weights are never copied back: a
visitor's copy is dropped.

Outside its own forward pass a block's modules hold the host's tensors, so whoever reads, saves or adapts the model sees
an ordinary one. LoRA branches live on the device all the time. Whatever computes with a streamed model computes on the
device of `transformer.x_embedder.weight`.

Autograd: with gradient checkpointing a block's forward pass is repeated in the backward pass, on the copy fetched for
it. Without it, autograd would keep every block's weights on the device until then; a weight is therefore saved as a
reference, and fetched when the backward pass asks for it. Both give the unstreamed model's gradients, bit for bit.

On the CPU the device is the host: the same code runs, and the copies are separate tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ..errors import ConfigError, PrecisionError
from ..lora.adapters import LoraBranch
from ..model.transformer import ChromaTransformer
from .movers import frozen_like, is_whole, mover, plain_parts, saving_references

BLOCK_LISTS = ("transformer_blocks", "single_transformer_blocks")
"""The module lists that are streamed, in the order in which the forward pass runs through them."""

_ATTRIBUTE = "block_streamer"


NOT_COMPILED = (
    "torch.compile and block streaming (offload 'block') exclude each other: moving the weights in and out breaks "
    "every block into pieces that are compiled again and again. Turn one of them off."
)


def stream_blocks(
    transformer: ChromaTransformer, device: torch.device | str, resident_blocks: int = 2
) -> BlockStreamer:
    """Stream a frozen transformer's blocks from host memory through `device`.

    Everything outside the blocks, and LoRA branches inside them, moves to the device for good. Weights must be ordinary
    tensors (not made under inference mode). At most `resident_blocks` ≥ 2 blocks are on the device at a time; a number
    from the model's blocks on keeps all there after their first visit.
    Raises ConfigError when the model is streamed already or compiled, `resident_blocks` is below 2, or a block's own
    weights are to be trained; PrecisionError when a library stores weights in a form that cannot be moved in and out.
    """
    streamer = BlockStreamer(transformer, device, resident_blocks)
    streamer.install()
    return streamer


def streamed(transformer: nn.Module) -> BlockStreamer | None:
    """The streamer of a model, if it has one."""
    return transformer.__dict__.get(_ATTRIBUTE)


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


class BlockStreamer:
    """Moves the blocks of one transformer; made by `stream_blocks`. One forward or backward pass at a time.

    `device` is where the model computes, `peak_resident` the most blocks that were there at once.
    """

    def __init__(self, transformer: ChromaTransformer, device: torch.device | str, resident_blocks: int = 2):
        if resident_blocks < 2:
            raise ConfigError(
                f"resident_blocks is {resident_blocks}; at least 2 blocks must fit on the device: the one that "
                "computes and the next one."
            )
        self.transformer = transformer
        self.device = torch.empty(0, device=device).device  # with its index, as tensors there report it
        named = [(f"{part}.{i}", block) for part in BLOCK_LISTS for i, block in enumerate(getattr(transformer, part))]
        self._names = [name for name, _ in named]
        self._blocks: list[nn.Module] = [block for _, block in named]
        self._permanent = len(named) if resident_blocks >= len(named) else resident_blocks - 2
        self._mover = mover(self.device)
        self._copies: dict[int, _Copy] = {}
        self._alive: list[_Alive] = []
        self._asked_for: int | None = None  # the block whose weights a backward pass without checkpointing uses now
        self._parked = False
        self.peak_resident = 0

    @property
    def warning(self) -> str | None:
        """What makes streaming slower than it could be, as a sentence for people; None when nothing does."""
        return self._mover.warning

    def install(self) -> None:
        """Put the model in place and take over its blocks' forward passes."""
        if streamed(self.transformer) is not None:
            raise ConfigError("This transformer is streamed already; remove its streamer before installing another.")
        if any(block._compiled_call_impl is not None for block in self._blocks):
            raise ConfigError(NOT_COMPILED)
        for name, block in zip(self._names, self._blocks, strict=True):
            _check_frozen(name, block)
        with torch.inference_mode(False):
            for block in self._blocks:
                if any(table[name].device.type != "cpu" for table, name in _places(block)):
                    block.to("cpu")
            self._move_residents(self.device)
            self._mover.pin(table[name] for block in self._blocks for table, name in _places(block))
        for index, block in enumerate(self._blocks):
            block.forward = functools.partial(self._visit, index, block.forward)
        self.transformer.__dict__[_ATTRIBUTE] = self

    def park(self) -> None:
        """Give the device's memory back: copies are dropped, the rest of the model goes to host memory."""
        self._drop(list(self._copies))
        self._asked_for = None
        with torch.inference_mode(False):
            self._move_residents(torch.device("cpu"))
        self._parked = True

    def unpark(self) -> None:
        """The way back from `park`; blocks come with the next pass."""
        with torch.inference_mode(False):
            self._move_residents(self.device)
        self._parked = False

    def remove(self) -> None:
        """Stop streaming: the model is an ordinary one in host memory again."""
        self.park()
        self._mover.unpin()
        for block in self._blocks:
            del block.forward  # the class's own shows again
        self.transformer.__dict__.pop(_ATTRIBUTE, None)

    def resident(self) -> list[str]:
        """Names of the blocks that have tensors on the device now, also when only autograd still holds them."""
        self._alive = [alive for alive in self._alive if not alive.storage.expired()]
        indices = {alive.block for alive in self._alive}
        return [name for index, name in enumerate(self._names) if index in indices]

    def device_bytes(self) -> int:
        """Bytes of the model's tensors on the device now: visiting blocks, and the parts that live there."""
        self.resident()
        total = sum(alive.bytes for alive in self._alive)
        if not self._parked:
            tensors = [t for module in self._residents() for t in (*module.parameters(), *module.buffers())]
            total += sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())
        return total

    def _residents(self) -> Iterator[nn.Module]:
        """The modules that live on the device."""
        yield from (child for name, child in self.transformer.named_children() if name not in BLOCK_LISTS)
        yield from (m for block in self._blocks for m in block.modules() if isinstance(m, LoraBranch))

    def _move_residents(self, device: torch.device) -> None:
        for module in self._residents():
            module.to(device)

    def _visit(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A block's forward pass, on a copy of its weights on the device."""
        backward = torch._C._current_graph_task_id() != -1  # inside autograd: gradient checkpointing recomputes
        following = self._following(index, backward)
        self._enter(index, following)
        # Recomputation ends with an exception as soon as it has seen what it needs; that is no failure.
        proceed = backward
        places = _places(self._blocks[index])
        _put(places, self._copies[index].tensors)
        try:
            with self._saving(index):
                result = forward(*args, **kwargs)
            proceed = True
            return result
        finally:
            _put(places, self._copies[index].hosts)
            if proceed and following is not None:
                # After the block's work was handed to the device, which computes while this thread copies.
                self._load(following)

    def _following(self, index: int, backward: bool) -> int | None:
        """The block to fetch while that one works; None where the direction turns, or when all are there."""
        turns = backward or torch.is_grad_enabled()
        for _ in range(len(self._blocks) - 1):
            index += -1 if backward else 1
            if not 0 <= index < len(self._blocks):
                if turns:
                    return None
                index = 0  # sampling: the next pass begins
            if index >= self._permanent or index not in self._copies:
                return index
        return None

    def _enter(self, index: int, following: int | None) -> None:
        """Make that block's copy usable on the device, and room for the following one."""
        if self._parked:
            raise RuntimeError("This streamed transformer is parked in host memory: unpark() its streamer first.")
        self._drop([i for i in self._copies if i >= self._permanent and i not in (index, following)])
        self._load(index)
        self._mover.wait(self._copies[index].ready)
        self._asked_for = None

    def _drop(self, leaving: list[int]) -> None:
        if leaving:
            self._mover.catch_up()
        for index in leaving:
            del self._copies[index]

    def _load(self, index: int) -> None:
        """Start copying a block to the device, unless its copy is there."""
        hosts = [table[name] for table, name in _places(self._blocks[index])]
        known = self._copies.get(index)
        if known is not None:
            if known.is_of(hosts):
                return
            del known
            self._drop([index])  # weights were exchanged, or changed in place, since
        _check_frozen(self._names[index], self._blocks[index])
        # Ordinary tensors, even while an image is sampled in inference mode: a training step may use them next.
        with torch.inference_mode(False), torch.no_grad():
            copies, ready = self._mover.copy(hosts)
            tensors = [frozen_like(host, copy) for host, copy in zip(hosts, copies, strict=True)]
        self._copies[index] = _Copy(hosts, [host._version for host in hosts], tensors, ready)
        for part in self._copies[index].parts():
            storage = part.untyped_storage()
            self._alive.append(_Alive(index, StorageWeakRef(storage), storage.nbytes()))
        self.peak_resident = max(self.peak_resident, len(self.resident()))

    def _saving(self, index: int) -> AbstractContextManager[object]:
        """How autograd saves weights inside: for a block that is recomputed that is checkpointing's own affair."""
        if not torch.is_grad_enabled() or self.transformer.recomputes(index):
            return nullcontext()
        return saving_references(self._copies[index].parts(), functools.partial(self._fetch_again, index))

    def _fetch_again(self, index: int, part: int) -> Tensor:
        """A part of a block's weights in the backward pass."""
        if index != self._asked_for:
            following = self._following(index, backward=True)
            self._enter(index, following)
            if following is not None:
                self._load(following)
            self._asked_for = index
        return self._copies[index].parts()[part]


@dataclass
class _Copy:
    """A block's tensors on the device, and the host's that they were copied from."""

    hosts: list[Tensor]
    versions: list[int]
    tensors: list[Tensor]
    ready: Any

    def is_of(self, hosts: list[Tensor]) -> bool:
        return len(hosts) == len(self.hosts) and all(
            now is then and now._version == version and not now.requires_grad
            for now, then, version in zip(hosts, self.hosts, self.versions, strict=True)
        )

    def parts(self) -> list[Tensor]:
        return [part for tensor in self.tensors for part in plain_parts(tensor)]


class _Alive(NamedTuple):
    block: int
    storage: StorageWeakRef
    bytes: int


def _places(block: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Where a block's streamed tensors stand: a module's dict of parameters or buffers, and the name in it."""
    return [
        (table, name)
        for module in block.modules()
        if not isinstance(module, LoraBranch)
        for table in (module._parameters, module._buffers)
        for name, tensor in table.items()
        if tensor is not None
    ]


def _put(places: list[tuple[dict[str, Any], str]], tensors: list[Tensor]) -> None:
    for (table, name), tensor in zip(places, tensors, strict=True):
        table[name] = tensor


def _check_frozen(name: str, block: nn.Module) -> None:
    """Raise unless a block's weights can be streamed."""
    for table, leaf in _places(block):
        tensor = table[leaf]
        if tensor.requires_grad:
            raise ConfigError(
                f"The weights of '{name}' are to be trained ('{leaf}' requires a gradient), but streamed weights are "
                "never copied back: what they learn would be lost. Freeze the model, or choose another offload mode."
            )
        if not is_whole(tensor):
            raise PrecisionError(
                f"Block streaming cannot move the weights of '{name}': '{leaf}' is a {type(tensor).__name__}, which "
                "may keep parts of the weight outside of the tensor. Use one of our precisions, or another offload."
            )
