"""Layers that the original layout fuses: several LoRAs as one for `qkv` or `linear1`, and back, both exactly.

Apart → fused: parts with one and the same down matrix stack their up matrices, at their rank r. Parts with different
ones go block-diagonally, down over down and up beside zeros, at the sum of their ranks (3r for `qkv`, 4r for
`linear1`). Fused → apart: every part has the whole down and its own rows of up; from a block-diagonal one it gets back
only the columns that it put in, since the others are zero in its rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..errors import LoraError
from ..names.transformer import Rows, to_diffusers_modules, to_original_module
from .modules import AdapterModule, LoraModule


def folded(module: LoraModule, scale: float = 1.0) -> LoraModule:
    """The same update with its factor at `scale` and the difference in `up`: computed in fp32, rounded once."""
    if module.scale == scale:
        return module
    up = (module.up.float() * (module.scale / scale)).to(module.up.dtype)
    return dataclasses.replace(module, up=up, alpha=scale * module.rank)


def fused_modules(modules: Mapping[str, AdapterModule]) -> dict[str, LoraModule]:
    """LoRAs by original name from LoRAs by diffusers name. A part that has none changes nothing in the fused layer.

    Raises LoraError for a Kronecker product, a name that is not Chroma's, and a DoRA on only some of the parts: what
    the others' magnitudes would be stands in the base, not in the file.
    """
    gathered: dict[str, list[tuple[Rows, LoraModule]]] = {}
    for name, module in modules.items():
        rows = to_original_module(name)
        if rows is None or not isinstance(module, LoraModule):
            raise LoraError(f"'{name}' cannot be written by the original layout's names: it is {_what(rows, module)}.")
        gathered.setdefault(rows.name, []).append((rows, module))
    return {original: fuse(original, parts) for original, parts in gathered.items()}


def fuse(original: str, parts: Sequence[tuple[Rows, LoraModule]]) -> LoraModule:
    """The LoRA of a fused layer from those of its parts (each with the rows that it takes)."""
    parts = sorted(parts, key=lambda part: part[0].start)
    first, module = parts[0]
    if len(parts) == 1 and first.of == 1:
        return module
    names = [part.name for part in to_diffusers_modules(original) or ()]
    with_magnitude = [part for _, part in parts if part.magnitude is not None]
    if with_magnitude and len(with_magnitude) < len(names):
        raise LoraError(
            f"'{original}' cannot be put together: {len(with_magnitude)} of its {len(names)} parts are DoRA, and the "
            "magnitudes of the others stand in the base model only. The universal, peft and diffusers dialects keep "
            "the parts apart and hold it."
        )
    share = module.shape[0] // (first.stop - first.start)
    leading = next((part for _, part in parts if part.scale), module)  # an alpha of 0 cannot hold the others' factors
    same_scale = [folded(part, leading.scale) for _, part in parts]
    dtype = module.down.dtype
    for _, part in parts:
        dtype = torch.promote_types(torch.promote_types(dtype, part.down.dtype), part.up.dtype)
    shared = all(part.down.shape == module.down.shape and torch.equal(part.down, module.down) for _, part in parts)
    down = module.down.to(dtype) if shared else torch.cat([part.down.to(dtype) for part in same_scale])
    up = torch.zeros(share * first.of, down.shape[0], dtype=dtype)
    column = 0
    for (rows, _), part in zip(parts, same_scale, strict=True):
        start, stop = rows.start * share, rows.stop * share
        if part.up.shape[0] != stop - start:
            raise LoraError(
                f"'{original}' cannot be put together: its parts have other sizes than Chroma's ({part.up.shape[0]} "
                f"rows where {stop - start} belong). The LoRA was made for another architecture."
            )
        up[start:stop, column : column + part.rank] = part.up.to(dtype)
        column += 0 if shared else part.rank
    magnitude = None
    if with_magnitude:
        magnitude = torch.cat([part.magnitude for _, part in parts if part.magnitude is not None])
    # alpha · (sum of ranks) / rank, in this order: with whole numbers no digit is lost.
    return LoraModule(down, up, leading.alpha * down.shape[0] / leading.rank, magnitude)


def own_columns(up: Tensor, layers: Sequence[Rows]) -> dict[str, Tensor]:
    """Of a fused `up` [rows, rank]: which columns belong to which part alone (indices, ascending).

    Empty unless the parts use different columns, that is unless the matrix is block-diagonal; a part without any
    column is then one that the LoRA does not touch.
    """
    if len(layers) < 2 or up.ndim != 2 or up.shape[0] % layers[0].of:
        return {}
    used = {layer.name: layer.take(up).float().any(dim=0) for layer in layers}
    if not any(column.any() for column in used.values()):
        return {}  # an untrained one: all of it belongs to every part
    if torch.stack(list(used.values())).sum(dim=0).max() > 1:
        return {}
    return {name: column.nonzero().flatten() for name, column in used.items()}


def _what(rows: Rows | None, module: AdapterModule) -> str:
    return "no layer of Chroma" if rows is None else f"a {module.kind}"
