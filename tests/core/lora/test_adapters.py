"""LoRAs on the model, live and merged; alone and together; on plain and quantised weights."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from chroma_core.errors import LoraError
from chroma_core.lora.adapters import (
    adapters_disabled,
    attach,
    attached,
    detach,
    merge,
    set_strength,
    without_adapters,
)
from chroma_core.model.precision import PRECISIONS, precision, quantise
from chroma_core.training.run.prepare import check_compiler, compile_blocks
from lora_cases import distance, inputs, predict, random_lora
from miniature import transformer

QUANTISED = [name for name in PRECISIONS if name not in ("fp32", "bf16", "fp16")]


@pytest.mark.parametrize("strength", [1.0, 0.6, -0.5])
def test_live_equals_merged(strength):
    live, merged = transformer(), transformer()
    call = inputs(live)
    base = predict(live, call)
    lora = random_lora(live)
    attach(live, lora, strength)
    merge(merged, lora, strength)
    assert distance(predict(live, call), base) > 0.05  # it does something
    assert distance(predict(live, call), predict(merged, call)) <= 1e-5


def test_strength_changes_at_once_and_detach_restores_every_bit():
    model = transformer()
    call, lora = inputs(model), random_lora(model)
    base, tree, state = predict(model, call), [n for n, _ in model.named_modules()], model.state_dict()
    modules = dict(model.named_modules())
    fit = attach(model, lora, 0.5, name="style")
    assert fit.report() == f"{len(lora.modules)} layers matched"
    half = predict(model, call)
    set_strength(model, "style", 1.0)
    full = predict(model, call)
    assert distance(half, full) > 0.01
    set_strength(model, "style", 0.0)
    assert torch.equal(predict(model, call), base)
    set_strength(model, "style", 0.5)
    assert torch.equal(predict(model, call), half)
    with adapters_disabled(model):
        assert torch.equal(predict(model, call), base)
    assert torch.equal(predict(model, call), half)
    detach(model, "style")
    assert torch.equal(predict(model, call), base)
    assert [n for n, _ in model.named_modules()] == tree
    assert all(dict(model.named_modules())[n] is m for n, m in modules.items())  # the very same modules
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())


def test_several_loras_add_up():
    model, merged = transformer(), transformer()
    call = inputs(model)
    first = random_lora(model, "all", rank=4, alpha=4, seed=1)
    second = random_lora(model, "context+ffs", rank=7, alpha=2, seed=5)
    attach(model, first, 0.8, name="first.v1")
    only_first = predict(model, call)
    attach(model, second, 0.4, name="second")
    assert attached(model) == ["first.v1", "second"]
    for lora, strength in ((first, 0.8), (second, 0.4)):
        merge(merged, lora, strength)
    assert distance(predict(model, call), predict(merged, call)) <= 1e-5
    detach(model, "second")
    assert torch.equal(predict(model, call), only_first)
    assert attached(model) == ["first.v1"]


@pytest.mark.filterwarnings("ignore:Guards may run slower:RuntimeWarning")
def test_a_compiled_layer_sees_every_change():
    """Whatever may change after it was compiled: strength, adapters on and off, their number, modes, weights, dtype.

    Python 3.13.0 hides from torch what is set as an attribute, unless torch looks at each.
    """
    model = transformer(layers=0, single_layers=1)
    quantise(model, precision("int8"))
    only = "single_transformer_blocks.0.proj_mlp"
    attach(model, random_lora(model, only), 0.5)
    check_compiler("eager", torch.device("cpu"))
    layer: Any = model.get_submodule(only)
    compiled, rows, seen = torch.compile(layer, backend="eager"), torch.randn(4, layer.in_features), []

    def check(new: bool = True, dtype: torch.dtype = torch.float32):
        with torch.no_grad():
            found = compiled(rows.to(dtype))
            assert torch.equal(found, layer(rows.to(dtype)))
        assert new != any(torch.equal(found, earlier) for earlier in seen)
        seen.append(found)

    check()
    check(new=False)  # shortcuts are taken from the second call on
    check(new=False)
    for strength in (1.0, -0.3, 0.7):
        set_strength(model, "lora", strength)
        check()
    with adapters_disabled(model):
        check()
    check(new=False)
    with without_adapters(model):
        check(new=False)
        attach(model, random_lora(model, only, seed=5), name="second")
        check()
    check()
    detach(model, "lora")
    check(new=False)
    layer.base_layer.compute = "w8a8"
    check()
    layer.base_layer.compute = "weights"
    model.train()
    check(new=False)
    layer.branch("second").up.data *= 2
    check()
    layer.branch("second").up = nn.Parameter(-layer.branch("second").up.detach())
    check()
    model.bfloat16()
    check(dtype=torch.bfloat16)


@pytest.mark.filterwarnings("ignore:Guards may run slower:RuntimeWarning")
@pytest.mark.slow
def test_a_compiled_model_sees_every_change():
    """`torch.compile` may ignore hooks that come later; layers put in place it does not."""
    model = transformer(layers=0, single_layers=1)
    call, lora = inputs(model), random_lora(model, "attention")
    plain = copy.deepcopy(model)
    compile_blocks(model, backend="eager")

    def check():
        found = predict(model, call)
        assert torch.equal(found, predict(plain, call))
        return found

    base = check()
    for each in (model, plain):
        attach(each, lora, 0.5)
    half = check()
    for each in (model, plain):
        set_strength(each, "lora", 1.0)
    assert not torch.equal(check(), half)
    for each in (model, plain):
        detach(each, "lora")
    assert torch.equal(check(), base)


def test_merge_below_a_live_lora():
    model, merged = transformer(), transformer()
    call, first, second = inputs(model), random_lora(model, seed=1), random_lora(model, seed=5)
    attach(model, first)
    merge(model, second, 0.3)
    merge(merged, first)
    merge(merged, second, 0.3)
    assert distance(predict(model, call), predict(merged, call)) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_live_keeps_the_dtype_of_the_model(dtype):
    model = transformer().to(dtype)
    call, lora = inputs(model), random_lora(model, size=0.3)
    reference = transformer()
    attach(reference, lora)
    attach(model, lora)
    out = predict(model, call, dtype)
    assert out.dtype == dtype
    assert distance(out, predict(reference, call)) < 0.05


def test_merging_rounds_once():
    model = transformer().bfloat16()
    weight = model.transformer_blocks[0].attn.to_q.weight.clone()
    lora = random_lora(model, size=0.01)
    merge(model, lora)
    delta = lora.modules["transformer_blocks.0.attn.to_q"].delta()
    assert torch.equal(model.transformer_blocks[0].attn.to_q.weight, (weight.float() + delta).bfloat16())


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_base_live_works_and_merging_is_refused(name):
    model, plain = transformer().bfloat16(), transformer().bfloat16()
    call, lora = inputs(model), random_lora(model, size=0.3)
    quantise(model, precision(name))
    base = predict(model, call, torch.bfloat16)
    wanted = predict(attached_model(plain, lora), call, torch.bfloat16)
    attach(model, lora)
    with_lora = predict(model, call, torch.bfloat16)
    assert with_lora.dtype == torch.bfloat16
    assert distance(with_lora, base) > 0.2
    assert distance(with_lora, wanted) < (0.05 if "8" in name else 0.2)  # the quantisation's own error
    detach(model, "lora")
    assert torch.equal(predict(model, call, torch.bfloat16), base)
    with pytest.raises(LoraError, match="is quantised.*Merge before"):
        merge(model, lora)
    assert torch.equal(predict(model, call, torch.bfloat16), base)


def attached_model(model, lora):
    attach(model, lora)
    return model


def test_a_refused_merge_changes_no_weight():
    """`x_embedder` is not quantised, and comes first."""
    model = transformer().bfloat16()
    quantise(model, precision("int8-quanto"))
    before = model.x_embedder.weight.clone()
    with pytest.raises(LoraError):
        merge(model, random_lora(model, "all+ffs+embedder"))
    assert torch.equal(model.x_embedder.weight, before)
