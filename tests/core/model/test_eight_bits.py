"""8-bit products against fp64, with bounds that follow from the codes' steps; and the modes of a model's layers."""

from __future__ import annotations

import pytest
import torch

import streaming_cases
from chroma_core.errors import ConfigError
from chroma_core.loading.load import load_transformer, transformer_identity
from chroma_core.loading.spec import ModelSpec
from chroma_core.lora.trainable import LoraSettings, add_trainable
from chroma_core.model import eight_bits
from chroma_core.model.eight_bits import product, quantised_rows, transposed_product
from chroma_core.model.latents import image_ids
from chroma_core.model.precision import precision, quantisable_linears, quantise
from chroma_core.model.quantised import QuantisedLinear, compute_by, quantise_weight
from chroma_core.streaming import stream_blocks
from chroma_core.training.config import TrainingConfig
from chroma_core.training.config.changes import differences, with_changes

SCHEMES = list(eight_bits.LARGEST)
DTYPES = {torch.float32: 2**-20, torch.bfloat16: 2**-8, torch.float16: 2**-10}
"""Half a unit in the last place of the result, with room for fp32's sums."""


def numbers(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Rows of very different sizes."""
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=draws) * torch.logspace(-3, 2, rows)[:, None]


def half_steps(x: torch.Tensor, scheme: str) -> torch.Tensor:
    """How far a number may lie from what its code stands for, by the format's definition; fp64."""
    x = x.double()
    size = x.abs().amax(1, keepdim=True)
    if scheme == "int8":
        return (size / 127 / 2).expand_as(x)
    return torch.maximum(x.abs() / 16, size / 448 * 2**-10)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_is_within_the_error_of_its_codes(scheme, rows, dtype):
    """|y − x·Wᵀ| ≤ Σ half a step of x · |W|, and what writing y in its dtype rounds."""
    x = numbers(rows, 160, 1).to(dtype)
    parts = quantise_weight(numbers(96, 160, 2) * 1e-2, scheme)
    layer = QuantisedLinear(160, 96, scheme, parts, None)
    weight = layer.dequantise(torch.float32).double()
    exact = x.double() @ weight.T
    bound = half_steps(x, scheme) @ weight.abs().T * (1 + 1e-5)
    y = product(x.view(1, rows, 160), parts["weight"], parts["scale"], scheme)
    assert y.dtype == dtype and y.shape == (1, rows, 96)
    error = (y[0].double() - exact).abs()
    assert (error <= bound + DTYPES[dtype] * exact.abs() + 1e-6).all()
    assert error.norm() > 1e-4 * exact.norm()  # it does round x: these are not the dequantised weight's products


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_gradient_is_the_transposed_product(scheme):
    """∂x by autograd against fp64, with the bound of ∂y·s in codes."""
    parts = quantise_weight(numbers(96, 160, 2), scheme)
    layer = QuantisedLinear(160, 96, scheme, parts, None)
    layer.compute = "w8a8"
    x, upstream = numbers(40, 160, 1).requires_grad_(), numbers(40, 96, 3)
    (gradient,) = torch.autograd.grad(layer(x), x, upstream)
    codes = layer.dequantise(torch.float32).double() / parts["scale"].double()
    scaled = upstream * parts["scale"].T
    exact = upstream.double() @ layer.dequantise(torch.float32).double()
    bound = half_steps(scaled, scheme) @ codes.abs()
    error = (gradient.double() - exact).abs()
    assert (error <= bound * (1 + 1e-5) + 1e-5 * exact.abs().amax()).all()
    assert error.norm() < 0.05 * exact.norm()
    direct = transposed_product(upstream, parts["weight"], parts["scale"], scheme)
    assert torch.equal(gradient, direct)


@pytest.mark.parametrize(("scheme", "limit"), [("int8", 0.012), ("fp8", 0.04)])
def test_what_activations_add_to_a_layers_error(scheme, limit):
    """Of a normal layer: about as much as quantising its weights did."""
    weight, x = torch.randn(512, 512), torch.randn(64, 512)
    parts = quantise_weight(weight, scheme)
    exact = x @ QuantisedLinear(512, 512, scheme, parts, None).dequantise().T
    relative = (product(x, parts["weight"], parts["scale"], scheme) - exact).norm() / exact.norm()
    assert limit / 4 < relative < limit


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_do_not_depend_on_each_other(scheme, monkeypatch):
    """Neither on how many there are, nor on the pieces in which they are multiplied."""
    parts = quantise_weight(torch.randn(64, 128), scheme)
    x = torch.randn(70, 128)
    whole = product(x, parts["weight"], parts["scale"], scheme)
    monkeypatch.setattr(eight_bits, "ROWS", 32)
    assert torch.equal(product(x, parts["weight"], parts["scale"], scheme), whole) or scheme == "fp8"
    assert torch.allclose(product(x[:5], parts["weight"], parts["scale"], scheme), whole[:5], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_zeros_stay_and_what_is_broken_is_seen(scheme):
    x = torch.zeros(4, 32)
    x[1, 3], x[2, 3] = float("nan"), float("inf")
    parts = quantise_weight(torch.randn(16, 32), scheme)
    y = product(x, parts["weight"], parts["scale"], scheme)
    assert torch.equal(y[0], torch.zeros(16))
    assert not y[1].isfinite().any() and not y[2].isfinite().any()
    codes, size = quantised_rows(x[:1], scheme)
    assert size.item() < 1e-37 and not codes.float().any()


def test_it_is_a_mode_of_the_layers_and_their_weights_stay():
    model = load_transformer(ModelSpec("tiny", precision="int8", compute="w8a8"), "cpu")
    plain = load_transformer(ModelSpec("tiny", precision="int8"), "cpu")
    layers = [layer for layer in model.modules() if isinstance(layer, QuantisedLinear)]
    assert layers and all(layer.compute == "w8a8" for layer in layers)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    x = torch.randn(2, layers[0].in_features)
    mine = layers[0](x)
    assert compute_by(model, "weights", "cpu") == ""
    assert not torch.equal(mine, layers[0](x))
    assert torch.equal(layers[0](x), next(m for m in plain.modules() if isinstance(m, QuantisedLinear))(x))


def test_models_in_two_modes_are_not_each_others():
    """A job's model is lent only to prompts that compute alike."""
    assert transformer_identity(ModelSpec("tiny", precision="int8")) != transformer_identity(
        ModelSpec("tiny", precision="int8", compute="w8a8")
    )


@pytest.mark.parametrize("name", ["bf16", "nf4", "int8-quanto"])
def test_other_precisions_are_refused_with_what_to_choose(name):
    with pytest.raises(ConfigError, match=f"the precision is {name}. Choose the precision int8 or fp8"):
        ModelSpec("tiny", precision=name, compute="w8a8")
    with pytest.raises(ConfigError, match="The compute mode"):
        ModelSpec("tiny", compute="w4a4")  # type: ignore[arg-type]


def test_where_a_device_or_a_shape_cannot_it_is_said():
    model = torch.nn.Module()
    model.encoder = torch.nn.Module()
    model.encoder.block = torch.nn.Sequential(torch.nn.Linear(32, 24), torch.nn.Linear(24, 48))
    assert len(list(quantisable_linears(model))) == 2
    quantise(model, precision("int8"))
    said = compute_by(model, "w8a8", "mps")
    assert "not used: PyTorch has no 8-bit products on the device 'mps'" in said and "compute: weights" in said
    assert all(layer.compute == "weights" for layer in model.encoder.block)
    assert eight_bits.fits(24, 32, torch.device("cpu")) and not eight_bits.fits(24, 32, torch.device("cuda"))
    assert eight_bits.fits(3072, 12288, torch.device("cuda"))
    assert "only the precisions int8 and fp8" in eight_bits.cannot("nf4", "cpu")


@pytest.mark.parametrize(("scheme", "limit"), [("int8", 0.06), ("fp8", 0.12)])
def test_gradients_of_a_lora_are_nearly_those_of_exact_products(scheme, limit):
    """Through all blocks of `tiny`: the direction stays, within what rounding every activation may turn it."""
    found = {}
    for compute in ("weights", "w8a8"):
        model = load_transformer(ModelSpec("tiny", precision=scheme, compute=compute), "cpu")
        parameters = add_trainable(model, LoraSettings(rank=4, target="all"), 1)
        with torch.no_grad():
            for i, parameter in enumerate(parameters):
                parameter.normal_(0, 0.02, generator=torch.Generator().manual_seed(i))
        draws = torch.Generator().manual_seed(0)
        latents = torch.randn(2, 16, model.config.in_channels, generator=draws).bfloat16()
        text = torch.randn(2, 5, model.config.joint_attention_dim, generator=draws).bfloat16()
        velocity = model(latents, text, torch.tensor([0.3, 0.8]), image_ids(8, 8, "cpu"))
        velocity.float().square().mean().backward()
        found[compute] = torch.cat([p.grad.flatten().double() for p in parameters if p.grad is not None])
    difference = (found["w8a8"] - found["weights"]).norm() / found["weights"].norm()
    assert 1e-4 < difference < limit


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_layer_compiles_in_both_directions(scheme):
    layer = QuantisedLinear(160, 96, scheme, quantise_weight(numbers(96, 160, 2), scheme), torch.randn(96))
    layer.compute = "w8a8"
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x, upstream = numbers(40, 160, 1).requires_grad_(), numbers(40, 96, 3)
    assert torch.equal(compiled(x), layer(x))
    (gradient,) = torch.autograd.grad(compiled(x), x, upstream)
    assert torch.equal(gradient, transposed_product(upstream, layer.weight, layer.scale, scheme))


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_streamed_blocks_multiply_alike(scheme, checkpointing):
    """Predictions and gradients, to the bit, with codes that visit the device."""
    found = []
    for stream in (False, True):
        model = streaming_cases.model(scheme)
        assert compute_by(model, "w8a8", "cpu") == ""
        if stream:
            stream_blocks(model, "cpu", 2)
        parameters = streaming_cases.trainable(model)
        model.checkpointing_interval = int(checkpointing)
        inputs = streaming_cases.call(torch.bfloat16)
        loss = streaming_cases.backward(model, inputs)
        found.append([loss, streaming_cases.predict(model, inputs), *(p.grad for p in parameters)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_job_goes_on_with_the_products_that_it_began_with(tmp_path):
    values = {"name": "mode", "dataset": {"folder": str(tmp_path)}, "model": {"flavour": "tiny", "precision": "int8"}}
    plain = TrainingConfig.parse(values)
    changed = with_changes(plain, {"model.compute": "w8a8"})
    assert (
        TrainingConfig.parse({**values, "model": {**values["model"], "compute": "weights"}}).job_id() == plain.job_id()
    )
    assert changed.job_id() != plain.job_id()
    assert [(c.field, c.kind) for c in differences(plain, changed)] == [("model.compute", "exact")]
