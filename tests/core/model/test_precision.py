"""Every precision on a miniature: the matrix of docs/precision.md, one linear, and what is refused."""

import copy

import pytest
import torch
from torch import nn

from chroma_core.errors import PrecisionError
from chroma_core.model.precision import (
    PRECISIONS,
    dequantised_weight,
    pack_linear,
    precision,
    quantisable_linears,
    quantise,
    quantise_linear,
    require,
    unpack_linear,
)
from chroma_core.model.quantised import CODES, QuantisedLinear, outline
from miniature import transformer
from tools.docs.precision_matrix import (
    Case,
    case,
    measure,
    measure_text,
    reference,
    relative,
    stored_bytes,
    tiny_text_encoder,
)
from tools.docs.precision_table import PAGE, documented_rows

QUANTISED = [name for name, p in PRECISIONS.items() if p.quantised]
SHAPES = [
    (32, 32),
    (96, 160),
    (128, 384),
    (100, 42),
]  # 160: rows of 2.5 blocks of 64; 42: groups of 2, odd group counts
WEIGHT_ERROR = {"int8": 0.008, "fp8": 0.03, "int4": 0.11, "nf4": 0.11}
OUTPUT_ERROR = {"bf16": 0.05, "fp16": 0.01, "fp32": 1e-6, "int8": 0.06, "fp8": 0.1, "int4": 0.3, "nf4": 0.3}


def format_of(name: str) -> str:
    return name.partition("-")[0]


def linear(rows: int = 96, columns: int = 160, bias: bool = True) -> nn.Linear:
    generator = torch.Generator().manual_seed(rows)
    layer = nn.Linear(columns, rows, bias=bias, device="meta", dtype=torch.bfloat16)
    layer.weight = nn.Parameter(torch.randn(rows, columns, generator=generator).bfloat16() * 0.02)
    if bias:
        layer.bias = nn.Parameter(torch.randn(rows, generator=generator).bfloat16())
    return layer.requires_grad_(False)


def shell(rows: int, columns: int, bias: bool = True) -> nn.Linear:
    return nn.Linear(columns, rows, bias=bias, device="meta")


@pytest.fixture(scope="module")
def miniature_case() -> Case:
    return case(lambda: transformer(), 16, 16, 5)


@pytest.fixture(scope="module")
def expected(miniature_case):
    return reference(miniature_case)


@pytest.fixture(scope="module")
def kept_by_bf16(miniature_case, expected) -> int:
    return measure(miniature_case, expected, "bf16").kept_bytes


@pytest.mark.parametrize("name", PRECISIONS)
def test_the_matrix(miniature_case, expected, kept_by_bf16, name):
    row = measure(miniature_case, expected, name)
    limit = OUTPUT_ERROR[format_of(name)]
    assert row.error < limit
    assert row.live < 2 * limit and row.merged < 3 * limit and row.merged < 0.7  # 1: the LoRA was dropped
    assert row.gradient < 3 * limit
    assert row.saved_identical and row.moved_identical
    if name in QUANTISED:
        assert 0 < row.error and row.size < (0.6 if "8" in name else 1)  # at width 32 scales and tables weigh a lot
        assert row.kept_bytes == kept_by_bf16  # no dequantised copy


@pytest.mark.parametrize("name", PRECISIONS)
def test_a_text_encoder_survives_every_precision(name):
    """T5 casts activations to the dtype of the next layer's weight: codes must not look like a dtype to cast to."""
    error, size = measure_text(name)
    assert error < OUTPUT_ERROR[format_of(name)]
    assert size <= PRECISIONS[name].bytes_per_weight / 2 * 1.1  # scales of short rows


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", QUANTISED)
def test_one_linear(name, shape):
    rows, columns = shape
    plain, chosen = linear(rows, columns), PRECISIONS[name]
    layer = quantise_linear(plain, chosen)
    assert (layer.in_features, layer.out_features, layer.weight.device.type) == (columns, rows, "cpu")
    weight = dequantised_weight(layer)
    assert weight.shape == shape and weight.dtype == torch.float32
    assert relative(weight, plain.weight) < WEIGHT_ERROR[format_of(name)]
    x = torch.randn(2, 3, columns, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
    y = layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, nn.functional.linear(x, dequantised_weight(layer, torch.bfloat16)) + plain.bias)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert relative(gradient[0, 0], dequantised_weight(layer, torch.bfloat16).sum(0)) < 0.02


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", QUANTISED)
def test_packed_and_unpacked_are_one_layer(name, bias):
    chosen, layer = PRECISIONS[name], quantise_linear(linear(bias=bias), PRECISIONS[name])
    x = torch.randn(4, 160, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.no_grad():
        y = layer(x)  # a library's own layer may rearrange its weights here
        packed = pack_linear(layer, chosen)
        assert all(type(t) is torch.Tensor and t.is_contiguous() and t.device.type == "cpu" for t in packed.values())
        again = unpack_linear(shell(96, 160, bias), packed, chosen)
        assert torch.equal(again(x), y)
        for moved in (copy.deepcopy(again), copy.deepcopy(again).to(torch.float32).to(torch.bfloat16), again.to("cpu")):
            assert torch.equal(moved(x), y)
    assert pack_linear(again, chosen).keys() == packed.keys()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", QUANTISED)
def test_outlines_and_declared_sizes(name, shape):
    packed = pack_linear(quantise_linear(linear(*shape, bias=False), PRECISIONS[name]), PRECISIONS[name])
    assert {n: (t.dtype, t.shape) for n, t in packed.items()} == {
        n: (t.dtype, t.shape) for n, t in outline(*shape, name).items()
    }
    assert packed["weight"].dtype == CODES
    real = outline(3072, 12288, name).values()
    bytes_per_weight = sum(t.numel() * t.element_size() for t in real) / (3072 * 12288)
    assert bytes_per_weight == pytest.approx(PRECISIONS[name].bytes_per_weight, rel=1e-3)


@pytest.mark.parametrize("name", QUANTISED)
def test_only_plain_block_linears_are_taken_and_by_full_name(name):
    model, chosen = transformer().bfloat16(), PRECISIONS[name]
    plain = [path for path, _ in quantisable_linears(model)]
    quantise(model, chosen)
    quantise(model, chosen)
    taken = [path for path, layer in model.named_modules() if isinstance(layer, QuantisedLinear)]
    assert taken == plain and not list(quantisable_linears(model))
    assert "single_transformer_blocks.0.proj_out" in taken and "proj_out" not in taken
    outside = ("x_embedder", "context_embedder", "distilled_guidance_layer", "proj_out")
    assert not any(path.startswith(outside) for path in taken)
    assert model.proj_out.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("name", PRECISIONS)
def test_every_precision_works_on_this_cpu(name):
    require(PRECISIONS[name], "cpu")


def test_what_cannot_be_packed_or_unpacked_is_an_error():
    int8, nf4 = PRECISIONS["int8"], PRECISIONS["nf4"]
    layer = quantise_linear(linear(), int8)
    packed = pack_linear(layer, int8)
    for module, chosen, found in ((layer, nf4, "quantised as int8"), (linear(), int8, "a Linear")):
        with pytest.raises(PrecisionError, match=f"cannot be saved as '{chosen.name}': it is {found}"):
            pack_linear(module, chosen)
    bad = [
        (shell(96, 128), packed, int8),
        (shell(96, 160, bias=False), packed, int8),
        (shell(96, 160), packed, nf4),
        (shell(96, 160), {k: v for k, v in packed.items() if k != "scale"}, int8),
        (shell(96, 160), packed | {"minimum": torch.zeros(1)}, int8),
        (shell(96, 160), packed | {"scale": packed["scale"].half()}, int8),
    ]
    for place, tensors, chosen in bad:
        with pytest.raises(PrecisionError, match="quantise again"):
            unpack_linear(place, tensors, chosen)
    with pytest.raises(PrecisionError, match="nothing to unpack"):
        unpack_linear(shell(96, 160), packed, PRECISIONS["bf16"])
    with pytest.raises(PrecisionError, match="A ReLU is neither"):
        dequantised_weight(nn.ReLU())


@pytest.mark.parametrize("name", QUANTISED)
def test_bad_weights_are_refused(name):
    layer = linear(64, 64)
    layer.weight.data[3, 3] = float("nan")
    with pytest.raises(PrecisionError, match="not finite"):
        quantise_linear(layer, PRECISIONS[name])
    if "4" in name:
        with pytest.raises(PrecisionError, match="must be even"):
            quantise_linear(linear(8, 7), PRECISIONS[name])


def test_plain_precisions_change_nothing():
    model = tiny_text_encoder(torch.bfloat16)
    before = dict(model.named_modules())
    quantise(model, PRECISIONS["bf16"])
    assert dict(model.named_modules()) == before
    layer = linear()
    assert quantise_linear(layer, PRECISIONS["fp16"]) is layer
    assert torch.equal(dequantised_weight(layer), layer.weight.float())
    assert stored_bytes(layer) == 2 * 96 * 160


def test_an_unknown_precision_lists_the_known_ones():
    with pytest.raises(PrecisionError, match="no precision 'int3'.*bf16, fp16, fp32, int8.*fp8-torchao"):
        precision("int3")


@pytest.mark.parametrize("heading", ["Memory of the real model", "A random Chroma", "`tiny`", "T5"])
def test_the_documented_tables_list_todays_precisions(heading):
    assert documented_rows(PAGE.read_text(encoding="utf-8"), heading) == list(PRECISIONS)
