"""The frozen quantised linear of every quantised precision, and our own four schemes in plain torch.

| scheme | codes | scales |
|---|---|---|
| `int8` | 8-bit integers, symmetric | one a row |
| `fp8` | e4m3 floats | one a row |
| `int4` | 16 even levels from the group's minimum to its maximum | two (step, minimum) a group |
| `nf4` | the 16 quantiles of a normal distribution (QLoRA, Dettmers et al. 2023, appendix E) | one a group |

A group is 64 neighbours in a row (or the largest power of two up to 64 that divides the row). These four work alike on
CPU, CUDA, ROCm and MPS. Any other scheme is a library's (see `backends`): the library chooses the numbers, but the
layer is this one, so all of them move between devices, stream, save and train alike. The product keeps no dequantised
copy for its backward pass: the codes are dequantised again there, which costs a little time and saves one copy of the
weights. int8 and fp8 can also be multiplied as they are, by activations in 8 bits (see `eight_bits`).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import PrecisionError
from . import backends, eight_bits, four_bits
from .device import broken
from .eight_bits import Compute
from .four_bits import NF4_LEVELS

Scheme = Literal["int8", "fp8", "int4", "nf4"]

GROUP = 64
CHUNK = 1 << 22
"""Weights that are quantised at a time."""
CHUNKS = {"cpu": 1 << 17, "cuda": 10 << 20}
"""Weights that are dequantised at a time, by the type of the device: what a CPU keeps near, and what a GPU can hold
beside a model without many launches; elsewhere CHUNK."""
FRESH = 32 << 20
"""Bytes above which glibc gives memory back to the system at once: filling it anew costs more than dequantising."""
_rooms = threading.local()
_E4M3_MAX = 448.0
_SCALE_DTYPE = torch.float16  # of groups: 11 bits of mantissa; weights are far inside its range
CODES = torch.int8
"""How bytes of codes are stored, whatever they mean: T5 casts its activations to the dtype of the next layer's `weight`
unless that is int8 (transformers, `T5DenseGatedActDense`), so any other dtype would round them to integers."""


def group_size(in_features: int) -> int:
    """Neighbours in a row that share a scale."""
    return math.gcd(in_features, GROUP)


def quantise_weight(weight: Tensor, scheme: str) -> dict[str, Tensor]:
    """Codes and scales of a weight [out, in] (any float dtype); our own schemes compute in fp32, libraries in bf16.

    Returns `weight` (codes as int8: [out, in], or two to a byte), its scales (`scale`, for int4 also `minimum`, for a
    library its own), all new tensors. Raises PrecisionError for an unknown scheme, an odd row length in a 4-bit scheme,
    a weight that is not finite, or as the library does.
    """
    known = (*get_args(Scheme), *backends.SCHEMES)
    if scheme not in known:
        raise PrecisionError(f"There is no quantisation scheme '{scheme}': choose {', '.join(known)}.")
    rows, columns = weight.shape
    _refuse_odd(columns, scheme)
    for a, b in _chunks(rows, columns):
        if broken(weight[a:b]):
            raise PrecisionError(
                "The model holds weights that are not finite (NaN or infinity) and cannot be quantised. The file is "
                "damaged, or was saved by a training run that diverged: choose another."
            )
    if scheme in backends.SCHEMES:
        parts = backends.quantise(weight.detach(), scheme)
        return {name: tensor.view(CODES) if name == "weight" else tensor for name, tensor in parts.items()}
    pieces = [_quantise_rows(weight[a:b].detach().float(), scheme) for a, b in _chunks(rows, columns)]
    return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}


def _chunks(rows: int, columns: int, chunk: int = CHUNK) -> list[tuple[int, int]]:
    """Spans of rows of at most so many numbers: rows are independent, and copies of a whole weight would add up."""
    step = max(1, chunk // columns)
    return [(a, min(a + step, rows)) for a in range(0, rows, step)]


def _quantise_rows(w: Tensor, scheme: str) -> dict[str, Tensor]:
    rows, columns = w.shape
    if scheme in ("int8", "fp8"):
        # A tensor on the device: CUDA multiplies by the reciprocal of a Python number, and rounds otherwise than a CPU.
        largest = torch.full((), 127.0 if scheme == "int8" else _E4M3_MAX, device=w.device)
        scale = w.abs().amax(dim=1, keepdim=True) / largest
        scaled = w / scale.where(scale > 0, 1)
        codes = scaled.round().to(torch.int8) if scheme == "int8" else _e4m3_codes(scaled)
        return {"weight": codes, "scale": scale}
    groups = w.view(rows, -1, group_size(columns))
    if scheme == "int4":
        minimum = groups.amin(dim=2, keepdim=True).to(_SCALE_DTYPE)
        levels = torch.full((), 15.0, device=w.device)
        step = ((groups.amax(dim=2, keepdim=True) - minimum.float()) / levels).to(_SCALE_DTYPE)
        divisor = step.float().where(step > 0, 1)
        codes = ((groups - minimum.float()) / divisor).round().clamp(0, 15)
        scales = {"scale": step[..., 0], "minimum": minimum[..., 0]}
    else:
        step = groups.abs().amax(dim=2, keepdim=True).to(_SCALE_DTYPE)
        levels = NF4_LEVELS.to(w.device)
        middles = (levels[1:] + levels[:-1]) / 2
        scaled = groups / step.float().where(step > 0, 1)
        codes = torch.zeros_like(scaled, dtype=torch.uint8)
        for middle in middles:  # `bucketize` is the same, and takes a CPU more than twice as long
            codes += scaled > middle
        scales = {"scale": step[..., 0]}
    nibbles = codes.to(torch.uint8).view(rows, columns // 2, 2)
    return {"weight": (nibbles[..., 0] | nibbles[..., 1] << 4).view(CODES), **scales}


def _refuse_odd(columns: int, scheme: str) -> None:
    if columns % 2 and "4" in scheme:
        raise PrecisionError(f"A layer with {columns} inputs cannot be packed to 4 bits: the number must be even.")


def dequantise_weight(
    parts: Mapping[str, Tensor], scheme: str, dtype: torch.dtype, shape: torch.Size, room: Tensor | None = None
) -> Tensor:
    """The weight of `shape` [out, in] that codes and scales stand for, in `dtype`; in `room` if its pieces need one."""
    if scheme in backends.SCHEMES:
        return backends.backend(scheme).dequantise(parts, scheme, dtype, shape)
    device = parts["weight"].device
    fused = device.type == "cuda" and not torch.compiler.is_compiling()  # the compiler fuses by itself
    if fused and scheme in ("int8", "fp8"):  # at once: nothing is needed beside the result
        weight = torch.empty(shape, dtype=dtype, device=device)
        dequantise_into(weight, parts, scheme)
        return weight
    rows, columns = shape
    spans = _chunks(rows, columns, CHUNKS.get(device.type, CHUNK))
    if len(spans) == 1 and not fused:
        return _dequantise_rows(parts, scheme, dtype)
    weight = torch.empty(shape, dtype=dtype, device=device) if room is None else room
    if fused and scheme in four_bits.SCHEMES and four_bits.filled(weight, parts, scheme, dequantise_into):
        return weight
    for a, b in spans:
        piece = {name: tensor[a:b] for name, tensor in parts.items()}
        if fused:
            dequantise_into(weight[a:b], piece, scheme)
        else:
            weight[a:b] = _dequantise_rows(piece, scheme, torch.float32)  # rounded as it is written
    return weight


def _kept_room(shape: torch.Size, dtype: torch.dtype) -> Tensor | None:
    """A thread's memory for one large weight on a CPU, whose allocator would take fresh pages for each (FRESH). What
    lies in it is good until the next product."""
    size = shape.numel() * dtype.itemsize
    if size <= FRESH or torch.compiler.is_compiling():
        return None
    kept = getattr(_rooms, "bytes", None)
    if kept is None or kept.numel() < size:
        with torch.inference_mode(False):
            kept = _rooms.bytes = torch.empty(size, dtype=torch.uint8)
    return kept[:size].view(dtype).view(shape)


def dequantise_into(rows: Tensor, parts: Mapping[str, Tensor], scheme: str) -> None:
    """The bits of `_dequantise_rows` in few kernels, as a GPU likes it: computed in fp32, rounded as it is written."""
    codes, scale = parts["weight"], parts["scale"]
    if scheme == "int8":
        torch.mul(codes, scale, out=rows)
        return
    codes = codes.view(torch.uint8)
    if scheme == "fp8":
        rows.copy_(codes.view(torch.float8_e4m3fn)).mul_(scale)  # each of its values is one of 16 bits too
        return
    groups, step = rows.view(*scale.shape, -1), scale.float()[..., None]
    if scheme == "nf4":
        torch.mul(F.embedding(codes.int(), _nf4_pairs(codes.device)).view(groups.shape), step, out=groups)
        return
    nibbles = torch.stack([codes & 15, codes >> 4], dim=-1).view(groups.shape)
    torch.addcmul(parts["minimum"].float()[..., None], nibbles, step, out=groups)


def _dequantise_rows(parts: Mapping[str, Tensor], scheme: str, dtype: torch.dtype) -> Tensor:
    codes, scale = parts["weight"], parts["scale"]
    if scheme == "int8":
        return codes.to(torch.float32).mul_(scale).to(dtype)
    codes = codes.view(torch.uint8)
    if scheme == "fp8":
        values = _e4m3(codes.device)[codes.int()] if codes.device.type == "mps" else codes.view(torch.float8_e4m3fn)
        return values.to(torch.float32).mul_(scale).to(dtype)
    if scheme == "nf4":
        # Both levels of a byte at once, by a 4-byte index: `levels[codes]` would make an 8-byte one for every weight.
        pairs = F.embedding(codes.int(), _nf4_pairs(codes.device)).view(codes.shape[0], scale.shape[1], -1)
        return pairs.mul_(scale.float()[..., None]).flatten(1).to(dtype)
    nibbles = torch.stack([codes & 15, codes >> 4], dim=-1).view(codes.shape[0], scale.shape[1], -1)
    return (nibbles.float() * scale.float()[..., None] + parts["minimum"].float()[..., None]).flatten(1).to(dtype)


def outline(rows: int, columns: int, scheme: str) -> dict[str, Tensor]:
    """What `quantise_weight` gives for a weight [rows, columns], without values (on the meta device)."""
    _refuse_odd(columns, scheme)
    if scheme in backends.SCHEMES:
        return backends.backend(scheme).outline(rows, columns, scheme)
    with torch.device("meta"):
        if scheme in ("int8", "fp8"):
            return {"weight": torch.empty(rows, columns, dtype=CODES), "scale": torch.empty(rows, 1)}
        scale = torch.empty(rows, columns // group_size(columns), dtype=_SCALE_DTYPE)
        codes = torch.empty(rows, columns // 2, dtype=CODES)
        return {"weight": codes, "scale": scale} | ({"minimum": scale.clone()} if scheme == "int4" else {})


def _nf4_pairs(device: torch.device) -> Tensor:
    """The levels of the low and the high half of every byte, [256, 2]."""
    return _new_nf4_pairs(device) if torch.compiler.is_compiling() else _kept_nf4_pairs(device)


def _new_nf4_pairs(device: torch.device) -> Tensor:
    byte = torch.arange(256)
    return torch.stack([NF4_LEVELS[byte & 15], NF4_LEVELS[byte >> 4]], dim=1).to(device)


_kept_nf4_pairs = cache(_new_nf4_pairs)


def _e4m3_codes(values: Tensor) -> Tensor:
    """The bytes of the nearest e4m3 numbers; on the CPU for devices without the dtype."""
    there = values.cpu() if values.device.type == "mps" else values
    return there.to(torch.float8_e4m3fn).view(CODES).to(values.device)


def _e4m3(device: torch.device) -> Tensor:
    """All 256 values of e4m3, for devices without the dtype."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().to(device)


class QuantisedLinear(nn.Module):
    """y = x·Wᵀ + b with a frozen, quantised W; gradients flow to x only.

    The buffer `weight` holds the codes, so a state dict stores and restores the layer exactly. Built from what
    `quantise_weight` (or, on the meta device, `outline`) gives.
    """

    bias: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, scheme: str, parts: Mapping[str, Tensor], bias: Tensor | None
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.scheme = scheme
        self.names = tuple(parts)
        self._kind = _Kind(scheme, torch.Size((out_features, in_features)), self.names, "weights")
        for name, tensor in parts.items():
            self.register_buffer(name, tensor)
        self.register_buffer("bias", bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear, scheme: str) -> QuantisedLinear:
        """Quantise a linear on its device; the bias is copied as it is."""
        bias = None if linear.bias is None else linear.bias.detach().clone()
        parts = quantise_weight(linear.weight, scheme)
        return cls(linear.in_features, linear.out_features, scheme, parts, bias).train(linear.training)

    @property
    def compute(self) -> Compute:
        """How products are computed; see `compute_by`."""
        return self._kind.compute

    @compute.setter
    def compute(self, compute: Compute) -> None:
        self._kind = self._kind._replace(compute=compute)

    def parts(self) -> dict[str, Tensor]:
        """Codes and scales by name."""
        buffers: Any = self._buffers  # as attributes they are looked for by Python; FSDP2 makes parameters of them
        return {name: buffers[name] if name in buffers else getattr(self, name) for name in self.names}

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [out, in] as it is used."""
        return dequantise_weight(self.parts(), self.scheme, dtype, self._kind.shape)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out], in the dtype of x."""
        kind, parts, bias = self._kind, self.parts(), self.bias
        if torch.is_grad_enabled() and x.requires_grad:
            y = _Product.apply(x, kind, *parts.values())
        else:  # nothing to keep for a backward pass; and the compiler cannot trace a context that nobody needs
            y = kind.product(x, *parts.values())
        return y if bias is None else y + bias.to(y.dtype)

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


class _Kind(NamedTuple):
    """What a quantised product must know beside the tensors of its weight."""

    scheme: str
    shape: torch.Size
    names: tuple[str, ...]
    compute: Compute

    def product(self, x: Tensor, *parts: Tensor) -> Tensor:
        """x·Wᵀ."""
        named = dict(zip(self.names, parts, strict=True))
        if self.compute == "w8a8":
            return eight_bits.product(x, named["weight"], named["scale"], self.scheme)
        return F.linear(x, self._weight(named, x))

    def transposed_product(self, gradient: Tensor, *parts: Tensor) -> Tensor:
        """∂y·W."""
        named = dict(zip(self.names, parts, strict=True))
        if self.compute == "w8a8":
            return eight_bits.transposed_product(gradient, named["weight"], named["scale"], self.scheme)
        return gradient @ self._weight(named, gradient)

    def _weight(self, parts: Mapping[str, Tensor], x: Tensor) -> Tensor:
        room = _kept_room(self.shape, x.dtype) if x.is_cpu else None
        return dequantise_weight(parts, self.scheme, x.dtype, self.shape, room)


class _Product(torch.autograd.Function):
    """x·Wᵀ, with W dequantised afresh in both directions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: _Kind, *parts: Tensor) -> Tensor:
        ctx.kind = kind
        ctx.save_for_backward(*parts)  # the layer's own buffers: nothing is copied
        return kind.product(x, *parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        parts = ctx.saved_tensors
        return (ctx.kind.transposed_product(gradients[0], *parts), None, *(None for _ in parts))


def compute_by(model: nn.Module, compute: Compute, device: torch.device | str) -> str:
    """Let the quantised layers of a model compute so on the device. Returns what to say where they cannot, and compute
    with dequantised weights instead."""
    layers = [module for module in model.modules() if isinstance(module, QuantisedLinear)]
    for layer in layers:
        layer.compute = "weights"
    if compute == "weights" or not layers:
        return ""
    instead = "The products are those of the dequantised weights (compute: weights)."
    if reason := eight_bits.cannot(layers[0].scheme, device):
        return f"The compute mode w8a8 is not used: {reason}. {instead}"
    device = torch.device(device)
    fitting = [layer for layer in layers if eight_bits.fits(layer.out_features, layer.in_features, device)]
    for layer in fitting:
        layer.compute = compute
    left = len(layers) - len(fitting)
    if not left:
        return ""
    return (
        f"The compute mode w8a8 is not used in {left} of {len(layers)} quantised layers, whose sizes are no multiples "
        f"of {eight_bits.MULTIPLE}. {instead}"
    )
