"""Quantisation by libraries, one file each, imported when first used: none of them is needed to install the pack.

A library quantises a weight and turns it back; the layer around that is always our own `QuantisedLinear`. Their own
layers were tried and given up: torchao's keeps a dequantised copy of every weight for the backward pass;
optimum-quanto's compile C++ or CUDA code at run time for 4 bits and fp8, and dequantise 4 bits by multiplying with an
identity matrix; bitsandbytes' repacks its weights on some CPUs when it first computes, and cannot give them back
exactly. `docs/precision.md` has the measurements.

Each file offers `quantise(weight, scheme)` (codes as `weight`, one byte an element, and scales), its inverse
`dequantise(parts, scheme, dtype, shape)`, and `outline(rows, columns, scheme)`, which gives the same as `quantise` on
the meta device; and, where that is known beforehand, `refusal(device)`, which names why the library cannot work there,
or is None. Otherwise the trial in `check` tells (fp8 of optimum-quanto fails in it on Apple's GPU).
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor

from ...errors import PrecisionError
from ..device import is_out_of_memory

SCHEMES = {
    "int8-quanto": "optimum-quanto",
    "int4-quanto": "optimum-quanto",
    "fp8-quanto": "optimum-quanto",
    "nf4-bnb": "bitsandbytes",
    "fp8-torchao": "torchao",
}
"""Scheme → the package that does it."""

_FILES = {"optimum-quanto": "quanto", "bitsandbytes": "bitsandbytes", "torchao": "torchao"}
_loaded: dict[str, ModuleType] = {}


def backend(scheme: str) -> ModuleType:
    """The file that speaks to the scheme's library; PrecisionError when the library is missing or broken."""
    package = SCHEMES[scheme]
    if package in _loaded:  # asked first, since torch's compiler cannot follow an import
        return _loaded[package]
    try:
        _loaded[package] = importlib.import_module(f".{_FILES[package]}", __name__)
        return _loaded[package]
    except Exception as error:  # a library built for another torch fails with whatever it likes
        missing = isinstance(error, ImportError)
        raise PrecisionError(
            f"The precision '{scheme}' needs the package {package}, which "
            f"{'is not installed here' if missing else 'cannot be imported'} ({type(error).__name__}: {error}). "
            f"Install it with `pip install {package}`, or choose {twin(scheme)}, which needs nothing."
        ) from error


def twin(scheme: str) -> str:
    """Our own scheme of the same format: `nf4` for `nf4-bnb`."""
    return scheme.partition("-")[0]


def check(scheme: str, device: torch.device) -> None:
    """Try the library on that device with a small matrix; PrecisionError with the reason when it fails."""
    library = backend(scheme)
    reason = library.refusal(device) if hasattr(library, "refusal") else None
    if reason is None:
        try:
            sample = torch.linspace(-1, 1, 64 * 256, device=device).view(64, 256)
            parts = library.quantise(sample, scheme)
            error = (library.dequantise(parts, scheme, torch.float32, sample.shape) - sample).abs().max().item()
            reason = None if error < 0.25 else f"a test matrix came back with an error of {error:.2g}"
        except Exception as failure:
            if is_out_of_memory(failure):  # says nothing of the library
                raise
            reason = f"{type(failure).__name__}: {failure}"
    if reason is not None:
        raise PrecisionError(
            f"The precision '{scheme}' cannot be used on the device '{device}': {SCHEMES[scheme]} cannot work there "
            f"({reason}). Choose {twin(scheme)}, which works on every device."
        )


def quantise(weight: Tensor, scheme: str) -> dict[str, Tensor]:
    """Codes (`weight`, one byte an element) and scales of a weight [out, in], as the library chooses them."""
    # A fresh, aligned, contiguous copy: libraries read past views, and crash on weights that lie unaligned in a file.
    copy = torch.empty(weight.shape, dtype=torch.bfloat16, device=weight.device).copy_(weight)
    return backend(scheme).quantise(copy, scheme)
