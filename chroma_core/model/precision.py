"""Precisions: the dtype in which a model computes and, for quantised ones, how its weights are stored.

Only the linears inside the blocks are ever quantised (96.7 % of Chroma's weights). The approximator, `x_embedder`,
`context_embedder`, `norm_out` and the final `proj_out` stay in the compute dtype: rounding them moves every token of
every image. They are told apart by full module name, because leaf names repeat inside the blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..errors import PrecisionError, did_you_mean
from . import backends
from .device import has_bf16, is_out_of_memory
from .quantised import QuantisedLinear, outline


@dataclass(frozen=True)
class Precision:
    """A choice in the precision widget.

    `scheme` names what `quantised` does to a block linear, and `library` the package that does it if it is not our own
    code; neither for a plain dtype. `bytes_per_weight` counts a block linear's codes and its scales of groups (scales
    of whole rows are a thousandth of it).
    """

    name: str
    dtype: torch.dtype
    scheme: str | None = None
    library: str | None = None
    bytes_per_weight: float = 2.0

    @property
    def quantised(self) -> bool:
        """Whether block linears are stored in fewer bits than `dtype` has."""
        return self.scheme is not None


def _quantised(scheme: str, bytes_per_weight: float) -> Precision:
    return Precision(scheme, torch.bfloat16, scheme, backends.SCHEMES.get(scheme), bytes_per_weight)


PRECISIONS: dict[str, Precision] = {
    p.name: p
    for p in (
        Precision("bf16", torch.bfloat16),
        Precision("fp16", torch.float16),
        Precision("fp32", torch.float32, bytes_per_weight=4.0),
        _quantised("int8", 1.0),
        _quantised("fp8", 1.0),
        _quantised("int4", 1 / 2 + 4 / 64),
        _quantised("nf4", 1 / 2 + 2 / 64),
        _quantised("int8-quanto", 1.0),
        _quantised("int4-quanto", 1 / 2 + 4 / 128),
        _quantised("fp8-quanto", 1.0),
        _quantised("nf4-bnb", 1 / 2 + 1 / 64 + 4 / (64 * 256)),
        _quantised("fp8-torchao", 1.0),
    )
}

QUANTISED_PARTS = ("transformer_blocks", "single_transformer_blocks", "encoder.block")
"""Roots of the module names below which linears may be quantised: Chroma's blocks and T5's."""


def precision(name: str) -> Precision:
    """Look up a precision; raises PrecisionError that lists the known ones."""
    try:
        return PRECISIONS[name]
    except KeyError:
        meant = did_you_mean(name, PRECISIONS)
        raise PrecisionError(
            f"There is no precision '{name}'. Choose one of: {', '.join(PRECISIONS)}.{meant}"
        ) from None


def computed_on(chosen: Precision, device: torch.device | str) -> Precision:
    """The precision as a transformer computes it there: beside quantised weights in fp16 where bf16 is only emulated.

    T5 overflows in fp16, so this is not for it.
    """
    return replace(chosen, dtype=torch.float16) if chosen.quantised and not has_bf16(device) else chosen


def slow_here(name: str, device: torch.device | str) -> str:
    """What to say of a precision that the device can only emulate; empty where it computes in it."""
    if name != "bf16" or has_bf16(device):
        return ""
    return (
        "This GPU only emulates bf16: every step is slow, and attention needs many times the memory. Choose the "
        "precision fp16, or a quantised one, which computes in fp16 here."
    )


def require(chosen: Precision, device: torch.device | str) -> None:
    """Try the precision on the device with a small matrix, in milliseconds once its library is imported.

    Raises PrecisionError now, not after minutes of loading: the library is missing or broken, or it or the dtype does
    not work on this device, with the reason.
    """
    device = torch.device(device)
    try:
        ones = torch.ones(64, 64, dtype=chosen.dtype, device=device)
        works = bool(torch.isfinite(ones @ ones).all())
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        if is_out_of_memory(error):  # says nothing of the precision
            raise
        raise PrecisionError(
            f"The precision '{chosen.name}' computes in {str(chosen.dtype).removeprefix('torch.')}, which the device "
            f"'{device}' cannot do ({error}). Choose another precision ({', '.join(PRECISIONS)}) or device."
        ) from error
    if not works:
        raise PrecisionError(f"The device '{device}' computes wrongly in {chosen.dtype}: choose another precision.")
    if chosen.scheme is not None and chosen.library is not None:
        with torch.no_grad():
            backends.check(chosen.scheme, device)


def quantisable_linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Full names and modules of the linears that a quantised precision replaces; quantised ones are not among them."""
    roots = tuple(f"{part}." for part in QUANTISED_PARTS)
    for name, module in model.named_modules():
        # Exactly nn.Linear: the libraries' own layers, which a caller may have put there, are subclasses of it.
        if type(module) is nn.Linear and name.startswith(roots):
            yield name, module


def quantise(model: nn.Module, chosen: Precision) -> None:
    """Quantise the block linears in place; plain dtypes are left as they are.

    Raises PrecisionError when the library is missing or cannot work on the linears' device.
    """
    if not chosen.quantised:
        return
    for name, linear in list(quantisable_linears(model)):
        model.set_submodule(name, quantise_linear(linear, chosen))


def quantise_linear(linear: nn.Linear, chosen: Precision) -> nn.Module:
    """One linear, quantised and frozen, on its device. A plain dtype gives the linear itself.

    Merge LoRAs before: a quantised weight takes none. Raises PrecisionError as `quantise` does.
    """
    if chosen.scheme is None:
        return linear
    return QuantisedLinear.from_linear(linear, chosen.scheme)


def pack_linear(module: nn.Module, chosen: Precision) -> dict[str, Tensor]:
    """Everything that `unpack_linear` needs: suffix of the name (`weight`, `scale`, `bias`, …) → CPU tensor.

    At any time, also after the layer has computed or moved. Raises PrecisionError when the module is not a linear of
    that precision.
    """
    if not isinstance(module, QuantisedLinear) or module.scheme != chosen.scheme:
        is_ours = isinstance(module, QuantisedLinear)
        found = f"quantised as {module.scheme}" if is_ours else f"a {type(module).__name__}"
        raise PrecisionError(
            f"A layer cannot be saved as '{chosen.name}': it is {found}. Take LoRAs off before saving."
        )
    tensors = module.parts() | ({} if module.bias is None else {"bias": module.bias})
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def unpack_linear(shell: nn.Linear, tensors: Mapping[str, Tensor], chosen: Precision) -> nn.Module:
    """The layer that `pack_linear` saved, on the tensors' device; its outputs are the same, bit for bit.

    shell: the linear whose place it takes, for its sizes (it may be on the meta device).
    Raises PrecisionError when the library is missing, or the tensors are not those of such a layer.
    """
    if chosen.scheme is None:
        raise PrecisionError(f"The precision '{chosen.name}' is not quantised: there is nothing to unpack.")
    expected = outline(shell.out_features, shell.in_features, chosen.scheme)
    found = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items() if name != "bias"}
    wanted = {name: (t.dtype, tuple(t.shape)) for name, t in expected.items()}
    bias = tensors.get("bias")
    if found != wanted or (None if bias is None else bias.shape) != (None if shell.bias is None else shell.bias.shape):
        raise PrecisionError(
            f"The saved weights are not those of a layer with {shell.in_features} inputs and {shell.out_features} "
            f"outputs in '{chosen.name}': found {_names(tensors)}, expected {_names(expected)}"
            f"{' and bias' if shell.bias is not None else ''}. They belong to another model or version: quantise again."
        )
    parts = {name: tensors[name] for name in expected}
    return QuantisedLinear(shell.in_features, shell.out_features, chosen.scheme, parts, bias).train(shell.training)


def dequantised_weight(module: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight [out, in] with which a plain or quantised linear computes, in `dtype`, on its device.

    Raises PrecisionError for any other module.
    """
    if isinstance(module, QuantisedLinear):
        return module.dequantise(dtype)
    if type(module) is nn.Linear:
        return module.weight.detach().to(dtype)
    raise PrecisionError(
        f"A {type(module).__name__} is neither a plain nor a quantised linear, so its weight cannot be read. Take "
        "LoRAs off first, or ask its `base_layer`."
    )


def _names(tensors: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} {str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for name, t in tensors.items())
