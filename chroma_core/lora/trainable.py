"""The LoRA in training: settings, fresh weights from a seed, and copies of them out and in."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ..errors import ConfigError, LoraError
from .formats import LoraFile, LoraModule, quoted
from .layer import LoraBranch, adapted_layers, attached, features, linear_modules, wrapped
from .targets import target_modules

TRAINED = "trained"
"""The name of the adapter that `add_trainable` makes."""

LoraInit = Literal["kaiming", "gaussian"]


@dataclass(frozen=True)
class LoraSettings:
    """What is trained: rank ≥ 1, alpha > 0 (None = rank), target (see `targets`), dropout in [0, 1).

    init: how `down` starts (`up` is zero, so training starts at the base model): `kaiming` = uniform in ±1/√in, PEFT's
    default; `gaussian` = normal with deviation 1/rank.
    """

    rank: int = 16
    alpha: float | None = None
    target: str | Sequence[str] = "all"
    dropout: float = 0.0
    init: LoraInit = "kaiming"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"The LoRA rank is {self.rank}; it must be at least 1 (16 is usual).")
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ConfigError(f"The LoRA alpha is {self.alpha}; it must be above 0. Leave it out for alpha = rank.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"The LoRA dropout is {self.dropout}; it must be at least 0 and below 1.")
        if self.init not in get_args(LoraInit):
            raise ConfigError(f"The LoRA init is '{self.init}'; choose one of: {', '.join(get_args(LoraInit))}.")


def add_trainable(transformer: nn.Module, settings: LoraSettings, seed: int) -> list[nn.Parameter]:
    """Put a trainable LoRA on the target layers and freeze everything else; returns its parameters, layer by layer.

    They are fp32 on the layers' device, stay fp32 when the model is cast, and are ordinary (not inference) tensors in
    any context. `down` depends on the seed and the layer's name alone; no process-wide random stream is read or moved.
    With dropout, call `seed_dropout` before every forward pass, and `transformer.train()`.
    Raises ConfigError for a target that matches nothing, LoraError when a trainable LoRA is already there.
    """
    if TRAINED in attached(transformer):
        raise LoraError("This model already has a LoRA in training; take it off before adding another.")
    names = target_modules(transformer, settings.target)
    linears = linear_modules(transformer)
    transformer.requires_grad_(False)
    alpha = float(settings.rank if settings.alpha is None else settings.alpha)
    parameters: list[nn.Parameter] = []
    with torch.inference_mode(False):
        for name in names:
            rows, columns = features(linears[name])
            down = _initial_down(settings, columns, _seed("init", seed, name))
            up = torch.zeros(rows, settings.rank, dtype=torch.float32, device="cpu")
            branch = LoraBranch(TRAINED, down, up, alpha, dropout=settings.dropout, trainable=True)
            wrapped(transformer, name, linears[name]).add(branch)
            parameters += [branch.down, branch.up]
    return parameters


def seed_dropout(transformer: nn.Module, seed: int) -> None:
    """Set the dropout masks of the next forward passes. The same seed gives the same masks, on any run and thread."""
    for name, layer in adapted_layers(transformer):
        branch = layer.branch(TRAINED)
        if branch is not None:
            branch.dropout_seed = _seed("dropout", seed, name)


def trained_lora(transformer: nn.Module) -> LoraFile:
    """The LoRA in training, as fp32 copies on the CPU. Raises LoraError when there is none."""
    modules = {
        name: LoraModule(_fp32_copy(branch.down), _fp32_copy(branch.up), branch.alpha)
        for name, branch in _trained_branches(transformer)
    }
    return LoraFile(modules)


def load_trained(transformer: nn.Module, lora: LoraFile) -> None:
    """Copy `lora` into the LoRA in training (resume, or a warm start). Layers, ranks and alphas must be the same."""
    branches = dict(_trained_branches(transformer))
    different = sorted(set(branches) ^ set(lora.modules)) or [
        name
        for name, branch in branches.items()
        if (branch.down.shape, branch.up.shape, branch.alpha)
        != (lora.modules[name].down.shape, lora.modules[name].up.shape, lora.modules[name].alpha)
    ]
    if different:
        raise LoraError(
            f"The saved LoRA and the one in training differ in {len(different)} layers, e.g. {quoted(different)}. "
            "Continue with the target, rank, alpha and base model that it was started with."
        )
    with torch.no_grad():
        for name, branch in branches.items():
            branch.down.copy_(lora.modules[name].down)
            branch.up.copy_(lora.modules[name].up)


def _trained_branches(transformer: nn.Module) -> list[tuple[str, LoraBranch]]:
    branches = [(name, layer.branch(TRAINED)) for name, layer in adapted_layers(transformer)]
    found = [(name, branch) for name, branch in branches if branch is not None]
    if not found:
        raise LoraError("This model has no LoRA in training; add one first.")
    return found


def _seed(purpose: str, seed: int, name: str) -> int:
    """A 63-bit seed for one purpose and layer, the same on every machine."""
    digest = hashlib.sha256(f"chromakit lora {purpose} {seed} {name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _initial_down(settings: LoraSettings, columns: int, seed: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    down = torch.empty(settings.rank, columns, dtype=torch.float32, device="cpu")
    if settings.init == "gaussian":
        return down.normal_(0, 1 / settings.rank, generator=generator)
    bound = 1 / math.sqrt(columns)
    return down.uniform_(-bound, bound, generator=generator)


def _fp32_copy(parameter: Tensor) -> Tensor:
    return parameter.detach().to("cpu", torch.float32, copy=True)
