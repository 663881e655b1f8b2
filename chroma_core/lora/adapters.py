"""LoRAs on a transformer: applied live beside the weights, or merged into them. Training one is in `trainable`.

`live` puts a branch beside each layer: it works on a quantised base, its strength changes at once, and taking it off
restores the model bit for bit. `merged` adds ΔW to the weights before they are quantised: no cost afterwards, strength
fixed. Several LoRAs add up.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import LoraError
from .layer import (
    AdaptedLinear,
    LoraBranch,
    adapted_layers,
    attached,
    branch_of,
    compute_device,
    features,
    linear_modules,
    wrapped,
)
from .modules import LoraFile, quoted


@dataclass(frozen=True)
class Fit:
    """How a LoRA file meets a model: layers that it changes, and the names or keys that found no place."""

    matched: tuple[str, ...]
    unmatched: tuple[str, ...]

    def report(self) -> str:
        """One line for a person."""
        text = f"{len(self.matched)} layers matched"
        return f"{text}, {len(self.unmatched)} left out ({quoted(self.unmatched)})" if self.unmatched else text


@contextmanager
def adapters_disabled(transformer: nn.Module) -> Iterator[None]:
    """The model without any of its LoRAs, inside a `with` block."""
    layers = [layer for _, layer in adapted_layers(transformer)]
    before = [layer.enabled for layer in layers]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


@contextmanager
def without_adapters(transformer: nn.Module) -> Iterator[None]:
    """The model as it was before its LoRAs came, in eval mode, inside a `with` block.

    Unlike in `adapters_disabled` other LoRAs may be attached and detached meanwhile, and have effect.
    """
    layers = [layer for _, layer in adapted_layers(transformer)]
    branches = [branch for layer in layers for branch in layer.loras()]
    enabled, strengths = [layer.enabled for layer in layers], [branch.strength for branch in branches]
    training = transformer.training
    for layer in layers:
        layer.enabled = True
    for branch in branches:
        branch.strength = 0.0  # which is the layer without it, bit for bit
    transformer.eval()
    try:
        yield
    finally:
        transformer.train(training)
        for layer, before in zip(layers, enabled, strict=True):
            layer.enabled = before
        for branch, strength in zip(branches, strengths, strict=True):
            branch.strength = strength


def check_fits(transformer: nn.Module, lora: LoraFile, allow_partial: bool = False) -> Fit:
    """Compare a LoRA with a model before anything is changed.

    Raises LoraError, listing names, when no layer matches, when a shape differs (the LoRA is for another size of
    model), or, unless `allow_partial`, when a layer or key of the file found no place.
    """
    linears = linear_modules(transformer)
    matched = tuple(name for name in lora.modules if name in linears)
    unmatched = (*(name for name in lora.modules if name not in linears), *lora.unmatched)
    if not matched:
        raise LoraError(
            f"The LoRA changes nothing here: none of its {len(lora.modules)} layers ({quoted(tuple(lora.modules))}) is "
            "a layer of this model. It was made for another model."
        )
    for name in matched:
        found, shape = lora.modules[name].shape, features(linears[name])
        if found != shape:
            raise LoraError(
                f"The LoRA does not fit: for '{name}' it has {found[0]}×{found[1]}, the model {shape[0]}×{shape[1]}. "
                "It was made for another size of model."
            )
    if unmatched and not allow_partial:
        raise LoraError(
            f"The LoRA fits only in part: {len(matched)} layers match, {len(unmatched)} do not: {quoted(unmatched)}. "
            "Applying a part changes what it does; allow partial application if that is wanted."
        )
    return Fit(matched, unmatched)


def attach(
    transformer: nn.Module,
    lora: LoraFile,
    strength: float = 1.0,
    name: str = "lora",
    allow_partial: bool = False,
) -> Fit:
    """Apply `lora` live, under a name of its own. The file's tensors are copied to where the layers compute.

    Raises LoraError as `check_fits` does, or when the name is taken; the model is then unchanged.
    """
    fit = check_fits(transformer, lora, allow_partial)
    _finite(strength)
    if name in attached(transformer):
        raise LoraError(f"A LoRA named '{name}' is already on this model. Detach it first, or choose another name.")
    linears = linear_modules(transformer)
    branches: list[tuple[str, LoraBranch]] = []
    with torch.inference_mode(False):
        # All copies first: running out of memory here leaves the model as it was.
        for layer in fit.matched:
            device = compute_device(transformer, linears[layer])
            module = lora.modules[layer].map(functools.partial(_copied, device=device))
            branches.append((layer, branch_of(name, module, strength)))
        for layer, branch in branches:
            wrapped(transformer, layer, linears[layer]).add(branch)
    return fit


def set_strength(transformer: nn.Module, name: str, strength: float) -> None:
    """Change the strength of a live LoRA. 0 gives the model without it, bit for bit."""
    _finite(strength)
    if name not in attached(transformer):
        raise LoraError(_not_attached(transformer, name))
    for _, layer in adapted_layers(transformer):
        branch = layer.branch(name)
        if branch is not None:
            branch.strength = float(strength)


def detach(transformer: nn.Module, name: str) -> None:
    """Take a live (or trained) LoRA off; layers without any are the very modules they were before."""
    if name not in attached(transformer):
        raise LoraError(_not_attached(transformer, name))
    for path, layer in adapted_layers(transformer):
        layer.remove(name)
        if len(layer.branches) == 0:
            transformer.set_submodule(path, layer.base_layer)


def merge(transformer: nn.Module, lora: LoraFile, strength: float = 1.0, allow_partial: bool = False) -> Fit:
    """Add strength · ΔW to the weights, for good: in fp32, rounded once to the weight's dtype.

    A DoRA's ΔW is the one for the weights that it meets, with what was merged before.

    Raises LoraError as `check_fits` does, or when a weight is quantised: merge first, quantise afterwards. Everything
    is checked before the first weight changes.
    """
    fit = check_fits(transformer, lora, allow_partial)
    _finite(strength)
    linears = linear_modules(transformer)
    bases: dict[str, nn.Linear] = {}
    for name in fit.matched:
        layer = linears[name]
        base = layer.base_layer if isinstance(layer, AdaptedLinear) else layer
        # Quantising libraries subclass nn.Linear or the tensor; adding to either may be dropped without an error.
        plain = type(base) is nn.Linear and type(base.weight) is nn.Parameter and type(base.weight.data) is Tensor
        if not plain or base.weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise LoraError(
                f"The LoRA cannot be merged: '{name}' is quantised ({type(base).__name__}). Merge before the model is "
                "quantised, or apply the LoRA live."
            )
        bases[name] = base  # type: ignore[assignment]
    with torch.inference_mode(False), torch.no_grad():
        for name, base in bases.items():
            weight = base.weight
            module = lora.modules[name].map(functools.partial(torch.Tensor.to, device=weight.device))
            delta = module.delta(weight)
            merged = (weight.float() + strength * delta).to(weight.dtype)
            base.weight = nn.Parameter(merged, requires_grad=weight.requires_grad)
    return fit


def _copied(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.detach().to(device, copy=True)


def _finite(strength: float) -> None:
    if not math.isfinite(strength):
        raise LoraError(f"The LoRA strength is {strength}; it must be a finite number, usually between -2 and 2.")


def _not_attached(transformer: nn.Module, name: str) -> str:
    return f"No LoRA named '{name}' is on this model. Attached are: {', '.join(attached(transformer)) or 'none'}."
