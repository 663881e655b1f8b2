"""LoRAs on a transformer: applied live beside the weights, or merged into them. Training one is in `trainable`.

`live` puts a branch beside each layer: it works on a quantised base, its strength changes at once, and taking it off
restores the model bit for bit. `merged` adds ΔW to the weights before they are quantised: no cost afterwards, strength
fixed. Several LoRAs add up.

An adapted linear layer is y = base(x) + Σ strength · ΔW x, one branch per adapter, of any kind. A branch's weights keep
their dtype when the model is cast; the computation runs in the dtype of x. Strength 0 is the layer without it, for
every kind: a DoRA's ΔW is the difference of the whole rescaled weight to the base's.

Why not PEFT's layer (0.21): building one draws from the process-wide random stream even with its own initialisation
off, or else patches `nn.Module` for the whole process, and a training thread may do neither while ComfyUI generates
images; it takes the base's dtype, lifts the activations to the adapter's, and chooses its class by the base's type.
This one never touches global state, keeps its weights as given and the computation in the dtype of x, and works beside
any module that has `in_features` and `out_features`, quantised or not.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError, LoraError
from ..model.precision import dequantised_weight
from .key_formats import foreign_kinds
from .modules import AdapterModule, FullModule, LokrModule, LoraFile, LoraModule, quoted, row_norms


class LoraBranch(nn.Module):
    """One adapter of one layer; a subclass per way of computing. The tensors of `module` become its parameters.

    Dropout (on the branch's input, in training mode only) draws its mask from `dropout_seed` afresh in every forward
    pass instead of from a running stream: gradient checkpointing runs the forward twice and must see the same mask.
    """

    in_halves = True
    """Whether `added` needs nothing but what `begin` gives, so that the branch's input need not be kept for it."""
    bias: nn.Parameter | None

    def __init__(
        self, name: str, module: AdapterModule, strength: float = 1.0, dropout: float = 0.0, trainable: bool = False
    ):
        super().__init__()
        self.name = name
        self.register_parameter("bias", None)
        for factor, tensor in module.factors().items():
            self.register_parameter(factor, nn.Parameter(tensor, requires_grad=trainable))
        self.alpha = module.alpha
        self.strength = strength
        self.dropout = dropout
        self.dropout_seed: int | None = None
        self.cast: dict[str, Tensor] = {}
        """Factors in the dtype of computing, where somebody has them already; see `trainable.CastFactors`."""

    def factor(self, name: str, dtype: torch.dtype) -> Tensor:
        """A factor in the dtype of computing."""
        cast = self.cast.get(name)
        return cast if cast is not None and cast.dtype == dtype else getattr(self, name).to(dtype)

    def module(self) -> AdapterModule:
        """The adapter as a value, whose tensors are the branch's own."""
        raise NotImplementedError

    def factors(self) -> dict[str, nn.Parameter]:
        """The branch's parameters by name, in the order of the adapter's fields."""
        return dict(self.named_parameters(recurse=False))

    def forward(self, x: Tensor, y: Tensor, base: nn.Module, plain: Tensor) -> Tensor:
        """y and the branch's share. x [..., in]; y [..., out] so far, plain [..., out] = base(x), in whatever dtype the
        base gives."""
        return self.added(y, self.begin(x))

    def begin(self, x: Tensor) -> Tensor:
        """What `added` needs of the input."""
        return self._begin(self._drop(x) if self.dropout > 0 and self.training else x)

    def _begin(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def added(self, y: Tensor, begun: Tensor) -> Tensor:
        """y [..., out] and the branch's share."""
        raise NotImplementedError

    def biased(self, y: Tensor) -> Tensor:
        """y [..., out] with the difference of the bias, if there is one."""
        return y if self.bias is None else y + (self.bias * self.strength).to(y.dtype)

    def _drop(self, x: Tensor) -> Tensor:
        if self.dropout_seed is None:
            raise ConfigError(
                "LoRA dropout has no seed for this step, so it would drop the same places for ever. Call "
                "`seed_dropout(transformer, seed)` with a new seed before every forward pass of training."
            )
        generator = torch.Generator(x.device).manual_seed(self.dropout_seed)
        keep = torch.rand(x.shape, generator=generator, device=x.device, dtype=torch.float32) >= self.dropout
        return x * keep / (1 - self.dropout)

    def _apply(self, fn, recurse=True):
        # `model.to(bf16)` would round the weights that are being trained; follow the device only.
        sample = next(self.parameters())
        device = fn(torch.empty(0, dtype=sample.dtype, device=sample.device)).device
        return super()._apply(lambda tensor: tensor.to(device), recurse)


class LowRankBranch(LoraBranch):
    """y + strength · (alpha / rank) · up(down(x)), with down [rank, in] and up [out, rank]."""

    down: nn.Parameter
    up: nn.Parameter

    @property
    def scale(self) -> float:
        """The factor on up(down(x))."""
        return self.strength * self.alpha / self.down.shape[0]

    def module(self) -> LoraModule:
        """The adapter as a value, whose tensors are the branch's own."""
        return LoraModule(alpha=self.alpha, **self.factors())

    def _begin(self, x: Tensor) -> Tensor:
        """down(x) [rows, rank] in the dtype of x.

        As products of two dimensions: torch chooses, and rounds, others differently for weights with and without
        gradients, so that a preview in training would not be, to the last bit, what the finished LoRA gives.
        """
        return F.linear(x.reshape(-1, x.shape[-1]), self.factor("down", x.dtype))

    def added(self, y: Tensor, begun: Tensor) -> Tensor:
        """y + scale · up(begun) in one product, rounded once."""
        rows = y.reshape(-1, y.shape[-1])
        return torch.addmm(rows, begun, self.factor("up", begun.dtype).T, alpha=self.scale).view(y.shape)


class DoraBranch(LowRankBranch):
    """The weight-decomposed update (Liu et al. 2024, section 4; PEFT): y' = (magnitude / ‖W + ΔV‖) · (W + ΔV) x + bias.

    The norm is computed afresh in every pass, in fp32, from the weight that the base computes with, where it computes:
    a streamed layer has its weight on the device just then. It is constant to the gradient (section 4.3).
    """

    in_halves = False
    magnitude: nn.Parameter

    def forward(self, x: Tensor, y: Tensor, base: nn.Module, plain: Tensor) -> Tensor:
        scale = self.alpha / self.down.shape[0]
        factor = self.magnitude.float() / changed_norms(base, self.down, self.up, scale)
        begun = self.begin(x)
        low_rank = F.linear(begun, self.factor("up", begun.dtype)).reshape(plain.shape) * scale
        bias: Any = base.bias
        weighted = plain if bias is None else plain - bias
        # The difference to 1 is taken before rounding: near 1, bf16 has steps of 0.4 %.
        share = (factor - 1).to(y.dtype) * weighted + factor.to(y.dtype) * low_rank.to(y.dtype)
        return y + (share if self.strength == 1 else share * self.strength)


class LokrBranch(LoraBranch):
    """strength · scale · (w1 ⊗ w2) x, without ever making the product: x as a matrix [in_m, in_n], w1 · x · w2ᵀ."""

    def __init__(self, name: str, module: LokrModule, *args: Any, **kwargs: Any):
        super().__init__(name, module, *args, **kwargs)
        self.rows = module.rows

    def module(self) -> LokrModule:
        """The adapter as a value, whose tensors are the branch's own."""
        return LokrModule(self.alpha, **self.factors(), rows=self.rows)

    def _begin(self, x: Tensor) -> Tensor:
        """The whole share."""
        own = self.module()
        cast = own.to(x.dtype)
        (_, in_m), (_, in_n) = cast.blocks
        grouped = x.reshape(-1, in_n)
        if cast.w2 is not None:
            inner = F.linear(grouped, cast.w2)
        else:
            inner = F.linear(F.linear(grouped, cast.w2_b), cast.w2_a)  # type: ignore[arg-type]
        # Two-dimensional products throughout, for the reason told in `LowRankBranch`.
        height = inner.shape[1]
        crossed = inner.reshape(-1, in_m, height).transpose(1, 2).reshape(-1, in_m)
        product = F.linear(crossed, cast.left).reshape(-1, height, cast.left.shape[0]).transpose(1, 2)
        share = product.reshape(*x.shape[:-1], -1) * (self.strength * own.scale)
        return share if self.rows is None else share[..., self.rows[0] : self.rows[1]]

    def added(self, y: Tensor, begun: Tensor) -> Tensor:
        return y + begun.to(y.dtype)


class WholeBranch(LoraBranch):
    """strength · ΔW x, for the kinds whose ΔW [out, in] has to be made whole: afresh in every pass, in fp32, where it
    depends on the weight from that which the base computes with, as in a DoRA. Not to be trained."""

    in_halves = False

    def __init__(self, name: str, module: AdapterModule, *args: Any, **kwargs: Any):
        super().__init__(name, module, *args, **kwargs)
        self.fixed = module.map(lambda _: torch.empty(0))
        self.has_bias_only = isinstance(module, FullModule) and module.diff is None
        self.needs_weight = module.kind == "oft" or "magnitude" in module.factors()

    def module(self) -> AdapterModule:
        """The adapter as a value, whose tensors are the branch's own."""
        return dataclasses.replace(self.fixed, **self.factors())

    def forward(self, x: Tensor, y: Tensor, base: nn.Module, plain: Tensor) -> Tensor:
        if self.has_bias_only:
            return y
        with torch.no_grad():
            device = next(self.parameters()).device
            weight = dequantised_weight(base, torch.float32).to(device) if self.needs_weight else None
            delta = self.module().delta(weight) * self.strength
        return y + F.linear(x, delta.to(x.dtype)).to(y.dtype)


def changed_norms(base: nn.Module, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """Row lengths [out] of W + scale · up @ down in fp32, without gradient, on the device of `down`."""
    with torch.no_grad():
        weight = dequantised_weight(base, torch.float32).to(down.device)
        return row_norms(torch.addmm(weight, up.float(), down.float(), alpha=scale))


def branch_of(
    name: str, module: AdapterModule, strength: float = 1.0, dropout: float = 0.0, trainable: bool = False
) -> LoraBranch:
    """The branch that computes with an adapter, of the class of its kind."""
    return _BRANCHES.get(module.kind, WholeBranch)(name, module, strength, dropout, trainable)


_BRANCHES: dict[str, Any] = {"lora": LowRankBranch, "dora": DoraBranch, "lokr": LokrBranch}


class Adapted(nn.Module):
    """Stands in the place of a layer that has at least one branch; the layer itself is `base_layer`."""

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self.branches = nn.ModuleList()
        self.enabled = True
        self.train(base_layer.training)

    @property
    def weight(self) -> Tensor:
        """The base's own weight, without the branches."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return self.base_layer.bias  # type: ignore[return-value]

    def branch(self, name: str) -> LoraBranch | None:
        """The branch of that adapter, if this layer has one."""
        return next((b for b in self.loras() if b.name == name), None)

    def loras(self) -> list[LoraBranch]:
        """The branches, in the order in which they came."""
        return list(self.branches)  # type: ignore[arg-type]

    def add(self, branch: LoraBranch) -> None:
        """Put one more branch beside the base, in its mode. It has to be where the layer computes: `compute_device`."""
        branch.train(self.training)
        self.branches.append(branch)

    def remove(self, name: str) -> None:
        """Take the branch of that adapter away, if there is one."""
        self.branches = nn.ModuleList(b for b in self.loras() if b.name != name)

    def _active(self) -> list[LoraBranch]:
        return [branch for branch in self.loras() if branch.strength != 0] if self.enabled else []


class AdaptedNorm(Adapted):
    """A root-mean-square norm with differences of its scale."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width] → the same, normed."""
        base: Any = self.base_layer
        active = self._active()
        weight = base.weight
        if active:
            # As `merge` does it: in fp32, rounded once.
            total = sum((branch.diff.float() * branch.strength for branch in active), weight.float())  # type: ignore[operator]
            weight = total.to(weight.dtype)
        return F.rms_norm(x, base.normalized_shape, weight, base.eps)


class AdaptedLinear(Adapted):
    """A linear layer with its branches."""

    def __init__(self, base_layer: nn.Module):
        super().__init__(base_layer)
        self.out_features, self.in_features = features(base_layer)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out], in the dtype that the base gives."""
        plain = y = self.base_layer(x)
        for branch in self._active():
            y = branch.biased(branch(x, y, self.base_layer, plain))
        return y

    def in_halves(self) -> bool:
        """Whether `end` needs nothing of the input for a backward pass but what `begin` gives."""
        frozen = not any(parameter.requires_grad for parameter in self.base_layer.parameters())
        return frozen and all(branch.in_halves for branch in self._active())

    def begin(self, x: Tensor) -> tuple[Tensor, ...]:
        """The first half of `forward`: x, and what each branch makes of it. See `transformer.Block`."""
        active = self._active()
        return (x, *(branch.begin(x) for branch in active)) if all(branch.in_halves for branch in active) else (x,)

    def end(self, x: Tensor, *begun: Tensor) -> Tensor:
        """The second half."""
        if not begun:
            return self(x)
        y = self.base_layer(x)
        for branch, its in zip(self._active(), begun, strict=True):
            y = branch.biased(branch.added(y, its))
        return y


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Full name → every linear layer, plain, quantised or adapted, in the order of the module tree.

    An adapted layer appears once, under the name that the layer has without its adapters.
    """
    return _visit(model, _is_linear)


def adaptable_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Like `linear_modules`, with the norms that have a scale: all that a LoRA file can change."""
    return _visit(model, lambda layer: _is_linear(layer) or _is_norm(layer))


def _visit(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}

    def visit(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            if wanted(child):
                found[prefix + name] = child
            elif not isinstance(child, Adapted):
                visit(child, f"{prefix}{name}.")

    visit(model, "")
    return found


def _is_linear(layer: nn.Module) -> bool:
    widths = (getattr(layer, "in_features", None), getattr(layer, "out_features", None))
    return all(isinstance(width, int) for width in widths)


def _is_norm(layer: nn.Module) -> bool:
    return isinstance(layer, AdaptedNorm) or (isinstance(layer, nn.RMSNorm) and layer.weight is not None)


def _shape(layer: nn.Module) -> tuple[int, ...]:
    """Of the weight, also when that is stored packed."""
    return features(layer) if _is_linear(layer) else tuple(layer.weight.shape)  # type: ignore[arg-type]


def features(layer: nn.Module) -> tuple[int, int]:
    """Output and input width of a linear layer: the shape of its weight, also when that is stored packed."""
    return layer.out_features, layer.in_features  # type: ignore[return-value]


def compute_device(model: nn.Module, layer: nn.Module) -> torch.device:
    """Where a layer of a transformer computes: its weight's device, or, when that rests in host memory between visits
    to the device (see `streaming`), the device of the model's embedder, which is never streamed."""
    embedder = getattr(model, "x_embedder", layer)
    return embedder.weight.device  # type: ignore[return-value]


def adapted_layers(model: nn.Module) -> list[tuple[str, Adapted]]:
    """Full name and module of every layer that has a branch."""
    return [(name, layer) for name, layer in adaptable_modules(model).items() if isinstance(layer, Adapted)]


def attached(model: nn.Module) -> list[str]:
    """Names of the LoRAs on the model, in the order in which they came."""
    names = (branch.name for _, layer in adapted_layers(model) for branch in layer.loras())
    return list(dict.fromkeys(names))


def wrapped(model: nn.Module, name: str, layer: nn.Module) -> Adapted:
    """The layer of that name ready to take a branch; a plain one is replaced in the model."""
    if isinstance(layer, Adapted):
        return layer
    adapted = AdaptedLinear(layer) if _is_linear(layer) else AdaptedNorm(layer)
    model.set_submodule(name, adapted)
    return adapted


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
    layers = adaptable_modules(transformer)
    matched = tuple(name for name in lora.modules if name in layers)
    unmatched = (*(name for name in lora.modules if name not in layers), *lora.unmatched)
    if not matched:
        raise LoraError(
            f"The LoRA changes nothing here: none of its {len(lora.modules)} layers ({quoted(tuple(lora.modules))}) is "
            "a layer of this model. It was made for another model."
        )
    for name in matched:
        _check_shape(name, lora.modules[name], layers[name])
    if unmatched and not allow_partial:
        kinds = foreign_kinds(list(unmatched))
        raise LoraError(
            f"The LoRA fits only in part: {len(matched)} layers match, {len(unmatched)} do not: {quoted(unmatched)}"
            f"{f' ({kinds[0]})' if kinds else ''}. Applying a part changes what it does; allow it, if that is wanted, "
            "with allow_partial (--allow-partial)."
        )
    return Fit(matched, unmatched)


Strength = float | Mapping[str, float]
"""Of a whole LoRA, or of each of its layers by name."""


def strength_of(strength: Strength, layer: str) -> float:
    """The strength of one layer."""
    return float(strength[layer] if isinstance(strength, Mapping) else strength)


def _check_shape(name: str, module: AdapterModule, layer: nn.Module) -> None:
    found, shape = module.shape, _shape(layer)
    whole = not isinstance(module, FullModule) or module.diff is None
    # The rows alone are known of a rotation, and of a difference of the bias.
    fits = found == (shape[: len(found)] if whole else shape)
    if not fits or (not _is_linear(layer) and (whole or module.bias is not None)):
        raise LoraError(
            f"The LoRA does not fit: for '{name}' it has {'×'.join(map(str, found))}, the model "
            f"{'×'.join(map(str, shape))}. It was made for another size of model."
        )


def attach(
    transformer: nn.Module, lora: LoraFile, strength: Strength = 1.0, name: str = "lora", allow_partial: bool = False
) -> Fit:
    """Apply `lora` live, under a name of its own. The file's tensors are copied to where the layers compute.

    Raises LoraError as `check_fits` does, or when the name is taken; the model is then unchanged.
    """
    fit = check_fits(transformer, lora, allow_partial)
    _finite(strength)
    if name in attached(transformer):
        raise LoraError(f"A LoRA named '{name}' is already on this model. Detach it first, or choose another name.")
    layers = adaptable_modules(transformer)
    branches: list[tuple[str, LoraBranch]] = []
    with torch.inference_mode(False):
        # All copies first: running out of memory here leaves the model as it was.
        for layer in fit.matched:
            device = compute_device(transformer, layers[layer])
            module = lora.modules[layer].map(lambda tensor, to=device: tensor.detach().to(to, copy=True))
            branches.append((layer, branch_of(name, module, strength_of(strength, layer))))
        for layer, branch in branches:
            wrapped(transformer, layer, layers[layer]).add(branch)
    return fit


def set_strength(transformer: nn.Module, name: str, strength: Strength) -> None:
    """Change the strength of a live LoRA. 0 gives the model without it, bit for bit."""
    _finite(strength)
    _check_attached(transformer, name)
    for path, layer in adapted_layers(transformer):
        branch = layer.branch(name)
        if branch is not None:
            branch.strength = strength_of(strength, path)


def detach(transformer: nn.Module, name: str) -> None:
    """Take a live (or trained) LoRA off; layers without any are the very modules they were before."""
    _check_attached(transformer, name)
    for path, layer in adapted_layers(transformer):
        layer.remove(name)
        if len(layer.branches) == 0:
            transformer.set_submodule(path, layer.base_layer)


def merge(transformer: nn.Module, lora: LoraFile, strength: Strength = 1.0, allow_partial: bool = False) -> Fit:
    """Add strength · ΔW to the weights, for good: in fp32, rounded once to the weight's dtype.

    A DoRA's ΔW is the one for the weights that it meets, with what was merged before.

    Raises LoraError as `check_fits` does, or when a weight is quantised: merge first, quantise afterwards. Everything
    is checked before the first weight changes.
    """
    fit = check_fits(transformer, lora, allow_partial)
    _finite(strength)
    layers = adaptable_modules(transformer)
    bases: dict[str, Any] = {}
    for name in fit.matched:
        layer = layers[name]
        base: Any = layer.base_layer if isinstance(layer, Adapted) else layer
        # Quantising libraries subclass nn.Linear or the tensor; adding to either may be dropped without an error.
        plain = (
            type(base) in (nn.Linear, nn.RMSNorm)
            and type(base.weight) is nn.Parameter
            and type(base.weight.data) is Tensor
        )
        if not plain or base.weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise LoraError(
                f"The LoRA cannot be merged: '{name}' is quantised ({type(base).__name__}). Merge before the model is "
                "quantised, or apply the LoRA live."
            )
        bases[name] = base
    with torch.inference_mode(False), torch.no_grad():
        for name, base in bases.items():
            module = lora.modules[name].map(lambda tensor, to=base.weight.device: tensor.to(to))
            own = strength_of(strength, name)
            base.weight = _plus(base.weight, module.delta(base.weight), own)
            if module.bias is not None:
                base.bias = _plus(base.bias, module.bias, own)
    return fit


def _plus(weight: nn.Parameter, delta: Tensor, strength: float) -> nn.Parameter:
    summed = weight.float() + strength * delta.float()
    return nn.Parameter(summed.to(weight.dtype), requires_grad=weight.requires_grad)


def _finite(strength: Strength) -> None:
    for value in strength.values() if isinstance(strength, Mapping) else (strength,):
        if not math.isfinite(value):
            raise LoraError(f"The LoRA strength is {value}; it must be a finite number, usually between -2 and 2.")


def _check_attached(transformer: nn.Module, name: str) -> None:
    names = attached(transformer)
    if name not in names:
        raise LoraError(f"No LoRA named '{name}' is on this model. Attached are: {', '.join(names) or 'none'}.")
