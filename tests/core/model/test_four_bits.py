"""The kernels for nf4 and int4: run by Triton's interpreter, and compiled for GPUs that are not here."""

from __future__ import annotations

import importlib.util
import logging
from types import ModuleType

import pytest
import torch

from chroma_core.model import four_bits
from chroma_core.model.quantised import dequantise_into, dequantise_weight, quantise_weight

pytest.importorskip("triton", reason="comes with torch on Linux only")
from chroma_core.model import triton_kernels

CPU = torch.device("cpu")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture
def interpreted(monkeypatch) -> ModuleType:
    """The kernels once more, as Triton's interpreter runs them."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    spec = importlib.util.spec_from_file_location("interpreted_kernels", triton_kernels.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # to fp16, as in PyTorch
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", four_bits.SCHEMES)
def test_every_scale_and_code_give_pytorchs_bits(scheme, dtype, interpreted, monkeypatch):
    monkeypatch.setattr(four_bits, "BLOCK", 1 << 16)  # the interpreter takes as long for any

    def fill(*args) -> None:
        four_bits.launch(interpreted, *args)

    assert four_bits.wrong_numbers(fill, CPU, scheme, dtype, dequantise_into) == ""

    def otherwise(weight, *args) -> None:
        dequantise_into(weight, *args)
        weight.view(torch.int16)[0, 5] += 1  # the last bit of one number

    assert four_bits.wrong_numbers(fill, CPU, scheme, dtype, otherwise).startswith("1 of 2031616 numbers differ")


@pytest.mark.parametrize("scheme", four_bits.SCHEMES)
def test_every_case_is_every_case(scheme):
    parts, shape = four_bits.every_case(scheme, CPU)
    assert dequantise_weight(parts, scheme, torch.float32, shape).shape == shape
    scale, codes = parts["scale"].flatten(), parts["weight"].view(torch.uint8).view(-1, 32)
    assert scale.isfinite().all() and len(scale.view(torch.int16).unique()) == len(scale) == 0x7C00
    assert all(
        (half.sort(dim=1).values == torch.arange(16).repeat_interleave(2)).all() for half in (codes & 15, codes >> 4)
    )
    assert len(codes.unique()) == 256


@pytest.mark.parametrize("shape", [(33, 18), (5, 256), (1, 2), (70, 192)])
@pytest.mark.parametrize("scheme", four_bits.SCHEMES)
def test_any_shape(scheme, shape, interpreted):
    """Groups of 2 to 64, and a last program that is not full."""
    parts = quantise_weight(torch.randn(shape, generator=torch.Generator().manual_seed(0)), scheme)
    weight = torch.full(shape, torch.nan, dtype=torch.bfloat16)
    four_bits.launch(interpreted, weight, parts, scheme)
    assert torch.equal(weight, dequantise_weight(parts, scheme, torch.bfloat16, weight.shape))


@pytest.mark.parametrize("capability", [75, 90])
def test_the_compiler_keeps_to_the_rules(capability):
    """Small numbers are not cut off, and nothing is joined that would be rounded otherwise."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compiled

    for scheme, name, kind in (("nf4", "levels", "*fp32"), ("int4", "minimum", "*fp16")):
        types = {"weight": "*i16", "codes": "*i8", "scale": "*fp16", name: kind, "pairs": "i32"}
        fixed = {"half": 32, "bf16": True, "block": four_bits.BLOCK}
        source = ASTSource(getattr(triton_kernels, scheme), types | dict.fromkeys(fixed, "constexpr"), fixed)
        code = compiled(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]
        assert ".ftz" not in code and ("fma." in code) == (scheme == "int4")


def test_where_it_cannot_be_launched_pytorch_does_it(caplog):
    weight = torch.empty(4, 64, dtype=torch.bfloat16)
    parts = quantise_weight(torch.randn(4, 64), "nf4")
    with caplog.at_level(logging.INFO, logger="chromakit"):
        assert [four_bits.filled(weight, parts, "nf4", dequantise_into) for _ in range(2)] == [False, False]
    assert len(caplog.records) == 1 and "by PyTorch's kernels on cpu, not by Triton's: " in caplog.text


def test_too_little_memory_says_nothing_of_the_kernel():
    def full(*_) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    weight = torch.empty(2, 2, device="meta", dtype=torch.bfloat16)
    key = ("of this test", weight.dtype)
    with pytest.raises(torch.OutOfMemoryError):
        four_bits._tried(full, (weight.device, *key))
