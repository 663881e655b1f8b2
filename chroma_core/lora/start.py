"""Beginning a training from a finished LoRA: its update in the shape and scale of the fresh adapter."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..errors import LoraError
from .modules import AdapterModule, LokrModule, LoraModule


def fitted(name: str, given: AdapterModule, fresh: AdapterModule) -> AdapterModule:
    """`given`, with the factors and alpha of `fresh` (both of layer `name`), doing exactly what it did.

    Raises LoraError when that is impossible: another kind, a larger rank, another width, other Kronecker factors.
    """
    if given.kind != fresh.kind:
        raise LoraError(
            f"Training cannot start from this LoRA: for '{name}' it is a {given.kind}, in training is a {fresh.kind}. "
            f"Train with the kind '{given.kind}'."
        )
    if given.shape != fresh.shape:
        raise LoraError(
            f"Training cannot start from this LoRA: for '{name}' it has {given.shape[0]}×{given.shape[1]}, the model "
            f"{fresh.shape[0]}×{fresh.shape[1]}. It was made for another size of model."
        )
    given = given.map(lambda tensor: tensor.detach().to("cpu", torch.float32))
    if isinstance(given, LokrModule) and isinstance(fresh, LokrModule):
        return _fitted_lokr(name, given, fresh)
    assert isinstance(given, LoraModule) and isinstance(fresh, LoraModule)
    _check_rank(name, given.rank, fresh.rank)
    down = torch.cat([given.down, fresh.down[given.rank :]])
    up = _widened(given.up * (given.scale / fresh.scale), fresh.rank)
    return LoraModule(down, up, fresh.alpha, given.magnitude)


def _fitted_lokr(name: str, given: LokrModule, fresh: LokrModule) -> LokrModule:
    if given.blocks != fresh.blocks or given.rows is not None:
        raise LoraError(
            f"Training cannot start from this LoKr: for '{name}' it is {_blocks(given)}"
            f"{' (a part of a fused layer)' if given.rows is not None else ''}, in training is {_blocks(fresh)}. "
            "Set lokr_factor to the one that it was trained with."
        )
    start = dataclasses.replace(fresh, w1=given.left * (given.scale / fresh.scale))
    if fresh.w2 is not None:
        return dataclasses.replace(start, w2=given.right)
    if given.w2_a is None or given.w2_b is None:
        raise LoraError(
            f"Training cannot start from this LoKr: for '{name}' its w2 is a whole matrix, in training is one of rank "
            f"{fresh.rank}. Train with a rank of at least {_whole_from(fresh)}."
        )
    assert fresh.w2_a is not None and fresh.w2_b is not None
    rank, wanted = given.w2_b.shape[0], fresh.w2_b.shape[0]
    _check_rank(name, rank, wanted)
    # Here the second factor is the one that starts at zero.
    w2_a = torch.cat([given.w2_a, fresh.w2_a[:, rank:]], dim=1)
    return dataclasses.replace(start, w2_a=w2_a, w2_b=_widened(given.w2_b.T, wanted).T)


def _widened(matrix: Tensor, columns: int) -> Tensor:
    """The matrix with columns of zeros added: whatever stands across from them contributes nothing yet."""
    return torch.nn.functional.pad(matrix, (0, columns - matrix.shape[1]))


def _check_rank(name: str, given: int, wanted: int) -> None:
    if given > wanted:
        raise LoraError(
            f"Training cannot start from this LoRA: for '{name}' its rank is {given}, in training is {wanted}, and a "
            f"larger one cannot be cut down without changing what it does. Train with rank {given} or more."
        )


def _blocks(module: LokrModule) -> str:
    return " ⊗ ".join(f"{rows}×{columns}" for rows, columns in module.blocks)


def _whole_from(module: LokrModule) -> int:
    """The rank from which on w2 is trained as a whole matrix."""
    return (max(module.blocks[1]) + 1) // 2
