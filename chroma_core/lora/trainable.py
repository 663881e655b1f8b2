"""The LoRA in training: put on, copied out, copied in, and started from a file."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from ..errors import LoraError
from .branches import LoraBranch, branch_of
from .fresh import fresh_module
from .layer import adapted_layers, attached, compute_device, linear_modules, wrapped
from .modules import AdapterModule, LoraFile, quoted
from .settings import LoraSettings
from .start import fitted
from .targets import target_modules

TRAINED = "trained"
"""The name of the adapter that `add_trainable` makes."""


def add_trainable(transformer: nn.Module, settings: LoraSettings, seed: int) -> list[nn.Parameter]:
    """Put a trainable LoRA on the target layers and freeze everything else; returns its parameters, layer by layer.

    They are fp32 on the device where the layers compute, stay fp32 when the model is cast, and are ordinary (not
    inference) tensors in any context. Random starts depend on the seed and the layer's name alone; no process-wide
    random stream is read or moved. With dropout, call `seed_dropout` before every forward pass, and
    `transformer.train()`.
    Raises ConfigError for a target or pattern that matches nothing, LoraError when a trainable LoRA is already there,
    PrecisionError when DoRA cannot read a layer's weight.
    """
    if TRAINED in attached(transformer):
        raise LoraError("This model already has a LoRA in training; take it off before adding another.")
    names = target_modules(transformer, settings.target)
    settings.check_patterns(names)
    linears = linear_modules(transformer)
    branches: dict[str, LoraBranch] = {}
    with torch.inference_mode(False):
        for name in names:
            device = compute_device(transformer, linears[name])
            module = fresh_module(settings, name, linears[name], _seed("init", seed, name), device)
            branches[name] = branch_of(TRAINED, module, dropout=settings.dropout, trainable=True)
        transformer.requires_grad_(False)
        for name, branch in branches.items():
            wrapped(transformer, name, linears[name]).add(branch)
    return [parameter for branch in branches.values() for parameter in branch.factors().values()]


def seed_dropout(transformer: nn.Module, seed: int) -> None:
    """Set the dropout masks of the next forward passes. The same seed gives the same masks, on any run and thread."""
    for name, layer in adapted_layers(transformer):
        branch = layer.branch(TRAINED)
        if branch is not None:
            branch.dropout_seed = _seed("dropout", seed, name)


def trained_lora(transformer: nn.Module) -> LoraFile:
    """The LoRA in training, as fp32 copies on the CPU. Raises LoraError when there is none."""
    return LoraFile({name: branch.module().map(_fp32_copy) for name, branch in _trained_branches(transformer)})


def load_trained(transformer: nn.Module, lora: LoraFile) -> None:
    """Copy `lora` into the LoRA in training, bit for bit (resume). Layers, kinds, shapes and alphas must agree."""
    branches = dict(_trained_branches(transformer))
    different = sorted(set(branches) ^ set(lora.modules)) or [
        name for name, branch in branches.items() if _outline(branch.module()) != _outline(lora.modules[name])
    ]
    if different:
        raise LoraError(
            f"The saved LoRA and the one in training differ in {len(different)} layers, e.g. {quoted(different)}. "
            "Continue with the kind, target, rank, alpha and base model that it was started with."
        )
    for name, branch in branches.items():
        _copy_in(branch, lora.modules[name])


def start_from(transformer: nn.Module, lora: LoraFile) -> tuple[str, ...]:
    """Let the fresh LoRA in training begin as `lora`, read from a file of any dialect; returns the layers without one.

    The model then computes what it computes with the file applied at strength 1. A smaller rank in the file is padded
    so that this is exact: the added columns of `up` are zero, the added rows of `down` keep their random start and can
    learn. Another alpha is folded into the weights. Layers that the file lacks begin fresh.
    Raises LoraError, before anything changes, when the file has layers that are not trained, foreign keys, another
    kind, a larger rank, other LoKr factors, or another size of model.
    """
    branches = dict(_trained_branches(transformer))
    outside = [*(name for name in lora.modules if name not in branches), *lora.unmatched]
    if outside:
        raise LoraError(
            f"Training cannot start from this LoRA: {len(outside)} of its layers or keys are not among the "
            f"{len(branches)} that are trained: {quoted(outside)}. What it does there would be lost. Choose a target "
            "that includes them."
        )
    with torch.no_grad():
        starts = {
            name: fitted(name, module, branches[name].module().map(_fp32_copy)) for name, module in lora.modules.items()
        }
    for name, module in starts.items():
        _copy_in(branches[name], module)
    return tuple(name for name in branches if name not in starts)


def _trained_branches(transformer: nn.Module) -> list[tuple[str, LoraBranch]]:
    branches = [(name, layer.branch(TRAINED)) for name, layer in adapted_layers(transformer)]
    found = [(name, branch) for name, branch in branches if branch is not None]
    if not found:
        raise LoraError("This model has no LoRA in training; add one first.")
    return found


def _outline(module: AdapterModule) -> tuple[float, dict[str, torch.Size]]:
    """What must agree between a checkpoint and the LoRA in training; alpha as a file holds it, in fp32."""
    alpha = torch.tensor(module.alpha, dtype=torch.float32).item()
    return alpha, {name: tensor.shape for name, tensor in module.factors().items()}


def _copy_in(branch: LoraBranch, module: AdapterModule) -> None:
    factors = branch.factors()
    with torch.no_grad():
        for name, tensor in module.factors().items():
            factors[name].copy_(tensor)


def _seed(purpose: str, seed: int, name: str) -> int:
    """A 63-bit seed for one purpose and layer, the same on every machine."""
    digest = hashlib.sha256(f"chromakit lora {purpose} {seed} {name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _fp32_copy(parameter: Tensor) -> Tensor:
    return parameter.detach().to("cpu", torch.float32, copy=True)
