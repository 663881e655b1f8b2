"""The quantising libraries: their own numbers in our layer, nothing of the process changed, and every refusal."""

import logging
import sys

import pytest
import torch
import torch._inductor.config
from torch import nn

from chroma_core.errors import PrecisionError
from chroma_core.model import backends
from chroma_core.model.precision import (
    PRECISIONS,
    dequantised_weight,
    quantisable_linears,
    quantise,
    quantise_linear,
    require,
)
from miniature import transformer
from tools.docs.precision_matrix import relative

QUANTISED = [name for name, p in PRECISIONS.items() if p.quantised]
LIBRARY = [name for name, p in PRECISIONS.items() if p.library]


def linear(rows: int = 96, columns: int = 160) -> nn.Linear:
    generator = torch.Generator().manual_seed(rows)
    layer = nn.Linear(columns, rows, bias=False, device="meta", dtype=torch.bfloat16)
    layer.weight = nn.Parameter(torch.randn(rows, columns, generator=generator).bfloat16() * 0.02)
    return layer.requires_grad_(False)


@pytest.mark.parametrize("name", ["int8-quanto", "fp8-quanto"])
def test_numbers_are_quantos_own(name):
    from optimum.quanto import QLinear, qfloat8_e4m3fn, qint8

    theirs = QLinear.from_module(linear(128, 384), weights=qint8 if name == "int8-quanto" else qfloat8_e4m3fn)
    theirs.freeze()
    ours = quantise_linear(linear(128, 384), PRECISIONS[name])
    assert torch.equal(dequantised_weight(ours, torch.bfloat16), theirs.weight.dequantize())


def test_numbers_are_quantos_own_in_4_bits():
    """Its layer computes in a kernel for groups of 128, from the same codes."""
    from optimum.quanto import QLinear, qint4

    theirs = QLinear.from_module(linear(128, 384), weights=qint4)
    theirs.freeze()
    ours = quantise_linear(linear(128, 384), PRECISIONS["int4-quanto"])
    x = torch.randn(8, 384, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.no_grad():
        assert relative(ours(x), theirs(x)) < 0.01
        assert relative(ours(x), linear(128, 384)(x)) < 0.1


def test_numbers_are_torchaos_own():
    from torchao.quantization import Float8WeightOnlyConfig, quantize_

    theirs = linear(128, 384)
    quantize_(theirs, Float8WeightOnlyConfig(set_inductor_config=False))
    ours = quantise_linear(linear(128, 384), PRECISIONS["fp8-torchao"])
    assert torch.equal(dequantised_weight(ours, torch.bfloat16), theirs.weight.dequantize())


def test_numbers_are_bitsandbytes_own():
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    codes, state = quantize_4bit(linear(128, 384).weight.data, compress_statistics=True, quant_type="nf4")
    ours = quantise_linear(linear(128, 384), PRECISIONS["nf4-bnb"])
    assert torch.equal(dequantised_weight(ours, torch.bfloat16), dequantize_4bit(codes, state))


def test_weights_from_an_unaligned_place_are_fine():
    """Views of a memory-mapped file start anywhere; some kernels crash on them."""
    chosen, raw = PRECISIONS["int8-quanto"], torch.zeros(64 * 64 * 2 + 8, dtype=torch.uint8)
    layer = linear(64, 64)
    raw[2 : 2 + 64 * 64 * 2].copy_(layer.weight.data.view(torch.uint8).flatten())
    wanted = dequantised_weight(quantise_linear(layer, chosen))
    layer.weight = nn.Parameter(raw[2 : 2 + 64 * 64 * 2].view(torch.bfloat16).view(64, 64), requires_grad=False)
    assert layer.weight.data_ptr() % 16
    assert torch.equal(dequantised_weight(quantise_linear(layer, chosen)), wanted)
    layer.weight = nn.Parameter(layer.weight.t().contiguous().t(), requires_grad=False)
    assert torch.equal(dequantised_weight(quantise_linear(layer, chosen)), wanted)


@pytest.mark.parametrize("name", QUANTISED)
def test_the_caller_keeps_its_weights_and_its_random_stream(name):
    def process() -> tuple:
        """What torchao's defaults would change, and other settings of the whole process."""
        compiler = torch._inductor.config.coordinate_descent_tuning, torch._inductor.config.force_fuse_int_mm_with_mul
        return compiler, torch.get_float32_matmul_precision(), torch.get_default_dtype(), torch.is_grad_enabled()

    plain = linear()
    weight, state, before = plain.weight.clone(), torch.get_rng_state(), process()
    layer = quantise_linear(plain, PRECISIONS[name])
    layer.to(torch.float32)
    assert torch.equal(plain.weight, weight) and torch.equal(torch.get_rng_state(), state)
    assert process() == before


def test_layers_of_the_libraries_themselves_are_not_quantised_again():
    from bitsandbytes.nn import Linear4bit
    from optimum.quanto import QLinear, qint8

    model = transformer().bfloat16()
    count = len(list(quantisable_linears(model)))
    attention = model.transformer_blocks[0].attn
    attention.to_q = QLinear.from_module(attention.to_q, weights=qint8)
    attention.to_k = Linear4bit(32, 32, device="meta")
    assert len(list(quantisable_linears(model))) == count - 2


@pytest.mark.parametrize("name", LIBRARY)
def test_the_compiler_takes_a_librarys_layer_whole(name):
    layer = quantise_linear(linear(), PRECISIONS[name])
    x = torch.randn(4, 160, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
    torch._dynamo.reset()  # every scheme compiles the same code anew, which has a limit
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    results = [(y, torch.autograd.grad(y.sum(), x)[0]) for y in (compiled(x), layer(x))]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name", LIBRARY)
def test_a_missing_library_is_named_before_anything_is_loaded(name, monkeypatch):
    chosen = PRECISIONS[name]
    package = {"optimum-quanto": "optimum.quanto"}.get(chosen.library, chosen.library)
    for module in list(sys.modules):
        if module == package or module.startswith(f"{package}."):
            monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"{backends.__name__}.{backends._FILES[chosen.library]}", raising=False)
    monkeypatch.setattr(backends, "_loaded", {})
    model = transformer().bfloat16()
    for attempt in (lambda: require(chosen, "cpu"), lambda: quantise(model, chosen)):
        message = (
            rf"'{name}' needs the package {chosen.library}.*pip install {chosen.library}.* {backends.twin(name)}, "
        )
        with pytest.raises(PrecisionError, match=message):
            attempt()
    assert len(list(quantisable_linears(model))) == len(list(quantisable_linears(transformer())))


def test_devices_that_cannot_are_refused_with_the_reason():
    with pytest.raises(PrecisionError, match="'nf4-bnb' cannot be used.*'mps'.*fetched from the Hub.*Choose nf4"):
        backends.check("nf4-bnb", torch.device("mps"))
    if not torch.cuda.is_available():
        with pytest.raises(PrecisionError, match="'bf16' computes in bfloat16, which the device 'cuda' cannot"):
            require(PRECISIONS["bf16"], "cuda")
        with pytest.raises(PrecisionError, match="'fp8-torchao' cannot be used on the device 'cuda'.*Choose fp8"):
            backends.check("fp8-torchao", torch.device("cuda"))


def test_bitsandbytes_is_imported_without_the_network(monkeypatch, caplog):
    """Where `kernels` is installed, its import would fetch code; where it is not, it would log a warning."""
    from chroma_core.model.backends.bitsandbytes import _without_kernels

    fetched = object()
    monkeypatch.setitem(sys.modules, "kernels", fetched)
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    with caplog.at_level(logging.WARNING, logger.name):  # which the command line may have made quieter
        with _without_kernels():
            with pytest.raises(ImportError):
                __import__("kernels")
            logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s", "no module")
            logger.warning("another thing")
        logger.warning("kernels-community, later")
    assert sys.modules["kernels"] is fetched
    assert [r.getMessage() for r in caplog.records] == ["another thing", "kernels-community, later"]
