"""Which layers of Chroma another trainer's filter means, as patterns for `lora.target`.

ai-toolkit and kohya's sd-scripts know the model by its original names (`double_blocks.3.img_attn.qkv`), in which one
layer holds several of ours; OneTrainer by ours (`transformer_blocks.3.attn.to_q`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from ..names.transformer import to_diffusers_modules

_LAYERS = {
    "double_blocks": [f"{s}_{layer}" for s in ("img", "txt") for layer in ("attn.qkv", "attn.proj", "mlp.0", "mlp.2")],
    "single_blocks": ["linear1", "linear2"],
}
_BLOCKS = {
    name: tuple(part.name for part in to_diffusers_modules(name) or ())
    for kind, count in {"double_blocks": 19, "single_blocks": 38}.items()
    for number in range(count)
    for layer in _LAYERS[kind]
    for name in [f"{kind}.{number}.{layer}"]
}
"""The 228 linear layers of Chroma's blocks by their original names, and the 418 of ours that they hold."""

_OUTSIDE = ("x_embedder", "context_embedder", "proj_out")
"""Our names of the layers outside the blocks, the approximator's apart."""

EVERY_BLOCK = ("transformer_blocks.*", "single_transformer_blocks.*")
"""Patterns for all 418."""


def original(keep: Callable[[str], bool]) -> list[str]:
    """Patterns for the layers whose original name is kept; empty where none is."""
    return _patterns(part for name, parts in _BLOCKS.items() if keep(name) for part in parts)


def ours(keep: Callable[[str], bool]) -> list[str]:
    """Patterns for the layers whose name with us is kept; empty where none is."""
    return _patterns(name for name in (*_INSIDE, *_OUTSIDE) if keep(name))


def _starred(name: str) -> str:
    kind, _, rest = name.partition(".")
    return f"{kind}.*.{rest.partition('.')[2]}" if rest else name


_INSIDE = tuple(part for parts in _BLOCKS.values() for part in parts)
_EVERYWHERE = Counter(map(_starred, _INSIDE))


def _patterns(names: Iterable[str]) -> list[str]:
    """The names; a layer that is kept in every block as one with a star for the block's number."""
    found = list(dict.fromkeys(names))
    outside = [name for name in found if name in _OUTSIDE]
    if len(found) - len(outside) == len(_INSIDE):
        return [*EVERY_BLOCK, *outside]
    seen = Counter(map(_starred, found))
    return list(dict.fromkeys(s if seen[s := _starred(name)] == _EVERYWHERE[s] else name for name in found))
