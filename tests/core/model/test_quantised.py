"""The quantised linear against its own formats' error bounds, bitsandbytes' nf4 table, and plain autograd."""

import copy
import threading

import pytest
import torch
from torch import nn

from chroma_core.errors import PrecisionError
from chroma_core.model import quantised
from chroma_core.model.device import broken
from chroma_core.model.quantised import CODES, NF4_LEVELS, QuantisedLinear, group_size, outline, quantise_weight

SCHEMES = ["int8", "fp8", "int4", "nf4"]
BYTES = {"int8": 1.0, "fp8": 1.0, "int4": 0.5 + 4 / 64, "nf4": 0.5 + 2 / 64}


def linear(rows: int = 96, columns: int = 128, seed: int = 0) -> nn.Linear:
    layer = nn.Linear(columns, rows)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator))
        layer.bias.copy_(torch.randn(rows, generator=generator))
    return layer.requires_grad_(False)


def test_nf4_levels_are_those_of_the_paper():
    """QLoRA, appendix E, to the digits printed there."""
    printed = [-1.0, -0.6961928, -0.5250730, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
               0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]  # fmt: skip
    assert NF4_LEVELS.tolist() == pytest.approx(printed, abs=2e-5)


def test_nf4_takes_the_nearest_level_and_in_the_middle_the_lower_one():
    """Each group of 64 has its largest number at 1; the others lie on, and just beside, levels and middles."""
    middles = (NF4_LEVELS[1:] + NF4_LEVELS[:-1]) / 2
    places = torch.cat([NF4_LEVELS, middles, *(middles.nextafter(torch.full_like(middles, to)) for to in (-2, 2))])
    values = torch.nn.functional.pad(places, (0, 128 - len(places)), value=1.0).view(2, 64).flip(1)
    packed = quantise_weight(values, "nf4")["weight"].view(torch.uint8)
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).view(2, 64)
    assert torch.equal(codes.long(), torch.bucketize(values, middles))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_one_number_that_is_not_finite_breaks_a_tensor(dtype):
    tensor = torch.randn(3, 70).to(dtype)
    assert not broken(tensor) and not broken(tensor[:0])
    for number in ("nan", "inf", "-inf"):
        changed = tensor.clone()
        changed[2, 69] = float(number)
        assert broken(changed) and broken(changed[2, 69])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_weight_is_within_its_formats_error(scheme):
    layer = linear()
    error = (QuantisedLinear.from_linear(layer, scheme).dequantise() - layer.weight).abs()
    groups = layer.weight.view(96, -1, group_size(128))
    if scheme == "int8":
        bound = layer.weight.abs().amax(1, keepdim=True) / 127 / 2
    elif scheme == "fp8":  # half a unit in the last of 3 mantissa bits; subnormals: half of 2^-9 of the scale
        bound = (layer.weight.abs() / 16).clamp(min=(layer.weight.abs().amax(1, keepdim=True) / 448 * 2**-10))
    elif scheme == "int4":
        span = groups.amax(2) - groups.amin(2)
        bound = (span / 15 / 2 + groups.abs().amax(2) * 2e-3)[..., None].expand_as(groups).reshape_as(error)
    else:
        gap = NF4_LEVELS.diff().max() / 2 + 1e-3
        bound = (groups.abs().amax(2) * gap)[..., None].expand_as(groups).reshape_as(error)
    assert (error <= bound * 1.001).all()


@pytest.mark.parametrize(("scheme", "limit"), [("int8", 0.01), ("fp8", 0.035), ("int4", 0.11), ("nf4", 0.11)])
def test_output_error_is_what_is_published_for_the_format(scheme, limit):
    layer, x = linear(), torch.randn(32, 128)
    quantised = QuantisedLinear.from_linear(layer, scheme)
    relative = (quantised(x) - layer(x)).norm() / layer(x).norm()
    assert limit / 5 < relative < limit


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_gradient_equal_the_dequantised_layer(scheme, dtype):
    quantised = QuantisedLinear.from_linear(linear().to(dtype), scheme)
    x = torch.randn(2, 5, 128, dtype=dtype, requires_grad=True)
    y = quantised(x)
    reference = nn.functional.linear(x, quantised.dequantise(dtype)) + quantised.bias
    assert y.dtype == dtype and torch.equal(y, reference)
    weights = torch.randn_like(y)
    (gradient,) = torch.autograd.grad((y * weights).sum(), x)
    (expected,) = torch.autograd.grad((reference * weights).sum(), x)
    assert torch.allclose(gradient, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_backward_keeps_only_the_codes(scheme):
    quantised = QuantisedLinear.from_linear(linear(), scheme)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        quantised(torch.randn(4, 128, requires_grad=True))
    own = {t.data_ptr() for t in quantised.parts().values()}
    assert kept and {t.data_ptr() for t in kept} <= own


@pytest.mark.parametrize("scheme", SCHEMES)
def test_size_and_state_dict(scheme):
    layer = linear(rows=1024, columns=1024)
    quantised = QuantisedLinear.from_linear(layer, scheme)
    size = sum(t.numel() * t.element_size() for t in quantised.parts().values())
    assert size / layer.weight.numel() == pytest.approx(BYTES[scheme], rel=0.005)
    expected = outline(1024, 1024, scheme)
    assert {n: (t.dtype, t.shape) for n, t in quantised.parts().items()} == {
        n: (t.dtype, t.shape) for n, t in expected.items()
    }
    assert quantised.weight.dtype == CODES
    empty = QuantisedLinear(1024, 1024, scheme, expected, torch.empty(1024, device="meta"))
    empty.load_state_dict(quantised.state_dict(), assign=True)
    assert torch.equal(empty.dequantise(), quantised.dequantise())
    x = torch.randn(2, 1024)
    assert torch.equal(empty(x), quantised(x)) and torch.equal(copy.deepcopy(quantised)(x), quantised(x))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_cast_keeps_the_weights(scheme):
    quantised = QuantisedLinear.from_linear(linear(), scheme)
    before = quantised.dequantise()
    quantised.to(torch.bfloat16)
    assert torch.equal(quantised.dequantise(), before)
    assert quantised.bias is not None and quantised.bias.dtype == torch.bfloat16


@pytest.mark.parametrize("scheme", SCHEMES)
def test_zero_rows_and_short_groups(scheme):
    layer = linear(rows=4, columns=40)
    with torch.no_grad():
        layer.weight[1] = 0
    quantised = QuantisedLinear.from_linear(layer, scheme)
    assert group_size(40) == 8
    assert torch.equal(quantised.dequantise()[1], torch.zeros(40)) and torch.isfinite(quantised.dequantise()).all()


def test_bad_weights_are_named():
    with pytest.raises(PrecisionError, match="not finite"):
        quantise_weight(torch.tensor([[float("nan"), 1.0]]), "int8")
    with pytest.raises(PrecisionError, match="even"):
        quantise_weight(torch.zeros(2, 3), "nf4")
    with pytest.raises(PrecisionError, match="int8, fp8, int4, nf4, int8-quanto"):
        quantise_weight(torch.zeros(2, 4), "int2")  # type: ignore[arg-type]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_compiles(scheme):
    quantised = QuantisedLinear.from_linear(linear(), scheme)
    torch._dynamo.reset()  # every scheme compiles the same code anew, which has a limit
    compiled = torch.compile(quantised, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 128, requires_grad=True)
    y = compiled(x)
    assert torch.allclose(y, quantised(x), atol=1e-6)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.allclose(gradient, quantised.dequantise().sum(0).expand_as(x), atol=1e-4)


def test_a_large_weight_has_its_room_and_its_products_are_their_own(monkeypatch):
    """On a CPU large weights share memory, in a mode and out of it; no result changes by that."""
    layers = [QuantisedLinear.from_linear(linear(rows=512, columns=1024, seed=i), "int8") for i in range(2)]
    x = torch.randn(3, 1024)
    weight = torch.randn(3, 512)

    def results() -> list[torch.Tensor]:
        own = x.clone().requires_grad_()
        found = [layer(own) for layer in layers]
        gradients = [torch.autograd.grad((y * weight).sum(), own)[0] for y in found]
        with torch.inference_mode():
            return [*(y.detach().clone() for y in found), *gradients, *(layer(x).clone() for layer in layers)]

    before = results()
    monkeypatch.setattr(quantised, "FRESH", 1 << 10)
    monkeypatch.setattr(quantised, "_rooms", threading.local())
    with torch.inference_mode():
        layers[0](x)
    assert quantised._rooms.bytes.numel() == 512 * 1024 * 4
    assert all(torch.equal(*pair) for pair in zip(before, results(), strict=True))
