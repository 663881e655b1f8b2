"""A frozen quantised linear in plain torch, alike on CPU, CUDA, ROCm and MPS.

| scheme | codes | scales |
|---|---|---|
| `int8` | 8-bit integers, symmetric | one a row |
| `fp8` | e4m3 floats | one a row |
| `int4` | 16 even levels from the group's minimum to its maximum | two (step, minimum) a group |
| `nf4` | the 16 quantiles of a normal distribution (QLoRA, Dettmers et al. 2023, appendix E) | one a group |

A group is 64 neighbours in a row (or the largest power of two up to 64 that divides the row). The product keeps no
dequantised copy for its backward pass: the codes are dequantised again there, which costs a little time and saves one
copy of the weights.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import PrecisionError

Scheme = Literal["int8", "fp8", "int4", "nf4"]

GROUP = 64
_E4M3_MAX = 448.0
_SCALE_DTYPE = torch.float16  # of groups: 11 bits of mantissa; weights are far inside its range

# The levels of nf4: quantiles of N(0, 1) at eight even steps below and nine above the middle, scaled to −1..1 (QLoRA).
_NF4_OFFSET = 0.9677083


def _nf4_levels() -> Tensor:
    normal = torch.distributions.Normal(0.0, 1.0)
    above = normal.icdf(torch.linspace(_NF4_OFFSET, 0.5, 9))[:-1]
    below = -normal.icdf(torch.linspace(_NF4_OFFSET, 0.5, 8))[:-1]
    levels = torch.cat([above, torch.zeros(1), below]).sort().values
    return levels / levels.abs().max()


NF4_LEVELS = _nf4_levels()


def group_size(in_features: int) -> int:
    """Neighbours in a row that share a scale."""
    return math.gcd(in_features, GROUP)


def quantise_weight(weight: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    """Codes and scales of a weight [out, in] (any float dtype), computed in fp32.

    Returns `weight` (codes: [out, in], or [out, in/2] for the 4-bit schemes, two to a byte) and `scale`, for int4 also
    `minimum`. Raises PrecisionError for an odd row length in a 4-bit scheme, or a weight that is not finite.
    """
    if scheme not in get_args(Scheme):
        raise PrecisionError(f"There is no quantisation scheme '{scheme}': choose {', '.join(get_args(Scheme))}.")
    w = weight.detach().float()
    if not bool(torch.isfinite(w).all()):
        raise PrecisionError("The model holds weights that are not finite (NaN or infinity) and cannot be quantised.")
    if scheme in ("int8", "fp8"):
        scale = w.abs().amax(dim=1, keepdim=True) / (127 if scheme == "int8" else _E4M3_MAX)
        scaled = w / scale.where(scale > 0, 1)
        codes = scaled.round().to(torch.int8) if scheme == "int8" else scaled.to(torch.float8_e4m3fn).view(torch.uint8)
        return {"weight": codes, "scale": scale}
    rows, columns = w.shape
    if columns % 2:
        raise PrecisionError(f"A layer with {columns} inputs cannot be packed to 4 bits: the number must be even.")
    groups = w.view(rows, -1, group_size(columns))
    if scheme == "int4":
        minimum = groups.amin(dim=2, keepdim=True).to(_SCALE_DTYPE)
        step = ((groups.amax(dim=2, keepdim=True) - minimum.float()) / 15).to(_SCALE_DTYPE)
        divisor = step.float().where(step > 0, 1)
        codes = ((groups - minimum.float()) / divisor).round().clamp(0, 15)
        scales = {"scale": step[..., 0], "minimum": minimum[..., 0]}
    else:
        step = groups.abs().amax(dim=2, keepdim=True).to(_SCALE_DTYPE)
        levels = NF4_LEVELS.to(w.device)
        middles = (levels[1:] + levels[:-1]) / 2
        codes = torch.bucketize(groups / step.float().where(step > 0, 1), middles)
        scales = {"scale": step[..., 0]}
    nibbles = codes.to(torch.uint8).view(rows, columns // 2, 2)
    return {"weight": nibbles[..., 0] | nibbles[..., 1] << 4, **scales}


def dequantise_weight(parts: dict[str, Tensor], scheme: Scheme, dtype: torch.dtype) -> Tensor:
    """The weight [out, in] that codes and scales stand for, in `dtype`."""
    codes, scale = parts["weight"], parts["scale"]
    if scheme == "int8":
        return (codes.to(torch.float32) * scale).to(dtype)
    if scheme == "fp8":
        values = _e4m3(codes.device)[codes.int()] if codes.device.type == "mps" else codes.view(torch.float8_e4m3fn)
        return (values.to(torch.float32) * scale).to(dtype)
    nibbles = torch.stack([codes & 15, codes >> 4], dim=-1).view(codes.shape[0], scale.shape[1], -1)
    if scheme == "int4":
        return (nibbles.float() * scale.float()[..., None] + parts["minimum"].float()[..., None]).flatten(1).to(dtype)
    levels = NF4_LEVELS.to(codes.device)
    return (levels[nibbles.int()] * scale.float()[..., None]).flatten(1).to(dtype)


def _e4m3(device: torch.device) -> Tensor:
    """All 256 values of e4m3, for devices without the dtype."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().to(device)


class QuantisedLinear(nn.Module):
    """y = x·Wᵀ + b with a frozen, quantised W; gradients flow to x only.

    The buffer `weight` holds the codes, so a state dict stores and restores the layer exactly.
    """

    def __init__(self, in_features: int, out_features: int, scheme: Scheme, bias: bool, dtype: torch.dtype):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.scheme: Scheme = scheme
        with torch.device("meta"):
            parts = _shapes(in_features, out_features, scheme)
            self.names = tuple(parts)
            for name, tensor in parts.items():
                self.register_buffer(name, tensor)
            self.register_buffer("bias", torch.empty(out_features, dtype=dtype) if bias else None)

    @classmethod
    def from_linear(cls, linear: nn.Linear, scheme: Scheme) -> QuantisedLinear:
        """Quantise a linear; the bias is kept as it is."""
        bias = linear.bias
        layer = cls(linear.in_features, linear.out_features, scheme, bias is not None, linear.weight.dtype)
        for name, tensor in quantise_weight(linear.weight, scheme).items():
            layer.register_buffer(name, tensor)
        layer.register_buffer("bias", None if bias is None else bias.detach().clone())
        return layer.train(linear.training)

    def parts(self) -> dict[str, Tensor]:
        """Codes and scales by name."""
        return {name: getattr(self, name) for name in self.names}

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [out, in] as it is used."""
        return dequantise_weight(self.parts(), self.scheme, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out], in the dtype of x."""
        y = _Product.apply(x, self.scheme, self.names, *self.parts().values())
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        """As `nn.Linear`, with the scheme."""
        return f"in_features={self.in_features}, out_features={self.out_features}, scheme={self.scheme}"

    def _apply(self, fn, recurse=True):
        # `.to(bf16)` must move the scales, not round them; the bias computes in the model's dtype and follows.
        kept = {name: tensor for name, tensor in self.parts().items() if tensor.is_floating_point()}
        super()._apply(fn, recurse)
        for name, tensor in kept.items():
            moved = getattr(self, name)
            if moved.dtype != tensor.dtype:
                self.register_buffer(name, tensor.to(moved.device))
        return self


def _shapes(in_features: int, out_features: int, scheme: Scheme) -> dict[str, Tensor]:
    """What `quantise_weight` gives, without values (on the meta device)."""
    if scheme in ("int8", "fp8"):
        codes = torch.empty(out_features, in_features, dtype=torch.int8 if scheme == "int8" else torch.uint8)
        return {"weight": codes, "scale": torch.empty(out_features, 1)}
    scale = torch.empty(out_features, in_features // group_size(in_features), dtype=_SCALE_DTYPE)
    codes = torch.empty(out_features, in_features // 2, dtype=torch.uint8)
    return {"weight": codes, "scale": scale} | ({"minimum": scale.clone()} if scheme == "int4" else {})


class _Product(torch.autograd.Function):
    """x·Wᵀ, with W dequantised afresh in both directions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scheme: Scheme, names: tuple[str, ...], *parts: Tensor) -> Tensor:
        ctx.scheme, ctx.names = scheme, names
        ctx.save_for_backward(*parts)  # the layer's own buffers: nothing is copied
        return F.linear(x, dequantise_weight(dict(zip(names, parts, strict=True)), scheme, x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        parts = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        weight = dequantise_weight(parts, ctx.scheme, gradient.dtype)
        return (gradient @ weight, None, None, *(None for _ in parts))
