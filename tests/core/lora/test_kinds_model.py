"""Every kind of adapter on the model: applied, trained, streamed; ranks and alphas by pattern."""

import math

import pytest
import torch

from chroma_core.errors import ConfigError, LoraError
from chroma_core.lora.adapters import adapters_disabled, attach, detach, merge, set_strength
from chroma_core.lora.files import read_lora, write_lora
from chroma_core.lora.modules import LoraFile
from chroma_core.lora.settings import LoraSettings
from chroma_core.lora.trainable import add_trainable, load_trained, seed_dropout, trained_lora
from chroma_core.model.precision import precision, quantise
from chroma_core.streaming import stream_blocks
from lora_cases import distance, equal, inputs, predict, random_kind
from miniature import transformer

KINDS = ("lora", "rslora", "dora", "lokr")
FORMS = ("lora", "dora", "lokr")


def train(model, steps=3, seed=7, dropout=False) -> LoraFile:
    """A few steps of plain gradient descent towards a fixed random target."""
    call = inputs(model)
    target = torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(seed))
    parameters = [p for p in model.parameters() if p.requires_grad]
    dtype = model.x_embedder.weight.dtype
    for step in range(steps):
        if dropout:
            seed_dropout(model, step)
        out = model(call["latents_BLD"].to(dtype), call["text_BTC"].to(dtype), call["sigma_B"], call["img_ids_L3"])
        gradients = torch.autograd.grad((out.float() - target).square().mean(), parameters)
        with torch.no_grad():
            for p, g in zip(parameters, gradients, strict=True):
                p -= 0.5 * g
    return trained_lora(model)


# --- applied ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [1.0, -0.5])
@pytest.mark.parametrize("kind", FORMS)
def test_live_equals_merged_and_comes_off(kind, strength):
    live, merged = transformer(), transformer()
    call = inputs(live)
    base = predict(live, call)
    lora = random_kind(live, kind)
    attach(live, lora, strength)
    merge(merged, lora, strength)
    assert distance(predict(live, call), base) > 0.05
    assert distance(predict(live, call), predict(merged, call)) <= 1e-5
    set_strength(live, "lora", 0.0)
    assert torch.equal(predict(live, call), base)
    set_strength(live, "lora", strength)
    with adapters_disabled(live):
        assert torch.equal(predict(live, call), base)
    detach(live, "lora")
    assert torch.equal(predict(live, call), base)


def test_kinds_add_up_beside_each_other():
    """Each live adapter's share is the one that it has alone on that layer."""
    model, other = transformer(), transformer()
    name = "single_transformer_blocks.0.proj_mlp"
    layer, x = model.get_submodule(name), torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    base, alone = layer(x), []
    for kind in FORMS:
        lora = LoraFile({name: random_kind(other, kind).modules[name]})
        attach(other, lora, 0.5, name=kind)
        alone.append(other.get_submodule(name)(x) - base)
        detach(other, kind)
        attach(model, lora, 0.5, name=kind)
    assert distance(model.get_submodule(name)(x), base + sum(alone)) <= 1e-6


@pytest.mark.parametrize("kind", ["dora", "lokr"])
@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_on_a_quantised_base(kind, name):
    model, plain = transformer().bfloat16(), transformer().bfloat16()
    call, lora = inputs(model), random_kind(model, kind, size=0.3)
    quantise(model, precision(name))
    base = predict(model, call, torch.bfloat16)
    attach(plain, lora)
    wanted = predict(plain, call, torch.bfloat16)
    attach(model, lora)
    assert distance(predict(model, call, torch.bfloat16), base) > 0.1
    assert distance(predict(model, call, torch.bfloat16), wanted) < (0.05 if name == "int8" else 0.2)
    detach(model, "lora")
    with pytest.raises(LoraError, match="is quantised"):
        merge(model, lora)
    add_trainable(model, LoraSettings(rank=2, kind=kind, target="all+ffs"), seed=3)
    assert torch.equal(predict(model, call, torch.bfloat16), base)
    start = trained_lora(model)
    now = train(model)
    assert all(not torch.equal(t, start.modules[n].factors()[f]) for n in now.modules for f, t in touched(now, n))


def touched(lora: LoraFile, name: str):
    """The factors that the first steps move: those that start at zero, and a DoRA's magnitudes."""
    return [(f, t) for f, t in lora.modules[name].factors().items() if f in ("up", "w2", "w2_b", "magnitude")]


def test_a_dora_merges_in_bf16_with_one_rounding():
    model = transformer().bfloat16()
    name = "transformer_blocks.0.attn.to_q"
    weight = model.get_submodule(name).weight.clone()
    lora = random_kind(model, "dora", size=0.1)
    module = lora.modules[name]
    merge(model, lora)
    changed = weight.double() + module.up.double() @ module.down.double() * 1.5
    wanted = changed * (module.magnitude.double() / changed.norm(dim=1))[:, None]
    assert ((model.get_submodule(name).weight.double() - wanted) / wanted).abs().max() <= 2**-8


# --- trained ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_changes_nothing_and_draws_nothing_global(kind, dtype):
    model = transformer().to(dtype)
    call = inputs(model)
    base = predict(model, call, dtype)
    before = torch.get_rng_state()
    parameters = add_trainable(model, LoraSettings(rank=2, kind=kind), seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(predict(model, call, dtype), base)
    assert {id(p) for p in parameters} == {id(p) for p in model.parameters() if p.requires_grad}
    assert all(p.dtype == torch.float32 for p in parameters)
    again = transformer().to(dtype)
    add_trainable(again, LoraSettings(rank=2, kind=kind, target="all+ffs"), seed=3)
    wide, narrow = trained_lora(again), trained_lora(model)
    assert equal(LoraFile({n: wide.modules[n] for n in narrow.modules}), narrow)


@pytest.mark.parametrize("kind", KINDS)
def test_trained_goes_to_a_file_and_comes_back_the_same(tmp_path, kind):
    """What the preview showed is what the file gives, and a resumed run goes on bit for bit."""
    model, applied, resumed = transformer(), transformer(), transformer()
    call = inputs(model)
    settings = LoraSettings(
        rank=3, alpha=0.7, kind=kind, target="all+ffs", rank_pattern={"*.attn.*": 2}, alpha_pattern={"proj_out": 0.3}
    )
    add_trainable(model, settings, seed=3)
    write_lora(tmp_path / "a.safetensors", train(model))
    result = predict(model, call)
    lora = read_lora(tmp_path / "a.safetensors")
    assert lora.unmatched == () and lora.key_format == "universal"
    attach(applied, lora)
    assert torch.equal(predict(applied, call), result)
    add_trainable(resumed, settings, seed=99)
    load_trained(resumed, lora)
    assert torch.equal(predict(resumed, call), result)
    assert equal(train(resumed), train(model))


@pytest.mark.parametrize("kind", ["dora", "lokr"])
def test_checkpointing_and_streaming_change_nothing_even_with_dropout(kind):
    results = []
    for checkpointing, streaming in ((False, False), (True, False), (True, True), (False, True)):
        model = transformer().train()
        if streaming:
            stream_blocks(model, "cpu", 2)
        model.checkpointing_interval = int(checkpointing)
        add_trainable(model, LoraSettings(rank=2, kind=kind, dropout=0.3), seed=3)
        results.append(train(model, dropout=True))
    assert all(equal(result, results[0]) for result in results[1:])


def test_a_checkpoint_of_another_kind_is_refused():
    for kind in ("rslora", "dora", "lokr"):
        saved, model = transformer(), transformer()
        add_trainable(saved, LoraSettings(kind=kind), seed=3)
        add_trainable(model, LoraSettings(), seed=3)
        with pytest.raises(LoraError, match="differ in 22 layers"):
            load_trained(model, trained_lora(saved))


def test_rslora_is_a_lora_with_a_larger_alpha(tmp_path):
    model, plain = transformer(), transformer()
    add_trainable(model, LoraSettings(rank=8, alpha=4, kind="rslora", rank_pattern={"*.to_k": 2}), seed=3)
    add_trainable(plain, LoraSettings(rank=8, alpha=4 * math.sqrt(8)), seed=3)
    lora = trained_lora(model)
    assert lora.alphas == pytest.approx([4 * math.sqrt(2), 4 * math.sqrt(8)])
    module = lora.modules["transformer_blocks.0.attn.to_k"]
    assert module.scale == pytest.approx(4 / math.sqrt(2))
    write_lora(tmp_path / "a.safetensors", lora)
    assert equal(read_lora(tmp_path / "a.safetensors"), lora)
    assert (
        distance(
            lora.modules["transformer_blocks.0.attn.to_q"].down,
            trained_lora(plain).modules["transformer_blocks.0.attn.to_q"].down,
        )
        == 0
    )


def test_a_fresh_lokr_has_lycoris_shapes():
    model = transformer()
    add_trainable(model, LoraSettings(rank=3, kind="lokr", target="*.proj_mlp, *.to_q", lokr_factor=2), seed=3)
    modules = trained_lora(model).modules
    mlp, query = modules["single_transformer_blocks.0.proj_mlp"], modules["transformer_blocks.0.attn.to_q"]
    assert {f: tuple(t.shape) for f, t in mlp.factors().items()} == {"w1": (2, 2), "w2_a": (64, 3), "w2_b": (3, 16)}
    assert query.blocks == ((2, 2), (16, 16))
    add_trainable(whole := transformer(), LoraSettings(rank=8, kind="lokr", target="*.to_q", lokr_factor=2), seed=3)
    factors = trained_lora(whole).modules["transformer_blocks.0.attn.to_q"].factors()
    assert {f: tuple(t.shape) for f, t in factors.items()} == {"w1": (2, 2), "w2": (16, 16)}
    assert 0.3 < factors["w1"].abs().max() <= 2**-0.5 and not factors["w2"].any()


# --- patterns ---------------------------------------------------------------------------------------------------------


def test_ranks_and_alphas_by_pattern_the_first_match_counts():
    settings = LoraSettings(
        rank=4,
        alpha=8,
        rank_pattern={"transformer_blocks.0.*": 2, "*.to_q": 6},
        alpha_pattern={"*.to_v": 1.0, "single_transformer_blocks.*": 3.0},
    )
    model = transformer()
    add_trainable(model, settings, seed=3)
    found = {n: (m.rank, m.alpha) for n, m in trained_lora(model).modules.items()}
    assert found["transformer_blocks.0.attn.to_q"] == (2, 8)
    assert found["transformer_blocks.0.attn.to_v"] == (2, 1)
    assert found["transformer_blocks.1.attn.to_q"] == (6, 8)
    assert found["single_transformer_blocks.0.attn.to_q"] == (6, 3)
    assert found["single_transformer_blocks.0.attn.to_v"] == (4, 1)
    assert found["transformer_blocks.1.attn.add_k_proj"] == (4, 8)
    # Without any alpha, alpha is the layer's own rank.
    add_trainable(plain := transformer(), LoraSettings(rank=4, rank_pattern={"*.to_q": 6}), seed=3)
    assert {m.alpha / m.rank for m in trained_lora(plain).modules.values()} == {1.0}


def test_a_layers_start_does_not_depend_on_the_patterns_of_others():
    add_trainable(a := transformer(), LoraSettings(rank=4), seed=3)
    add_trainable(b := transformer(), LoraSettings(rank=4, rank_pattern={"*.to_q": 2}), seed=3)
    name = "transformer_blocks.0.attn.to_k"
    assert torch.equal(trained_lora(a).modules[name].down, trained_lora(b).modules[name].down)


@pytest.mark.parametrize("option", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_matches_no_trained_layer_is_an_error(option):
    model = transformer()
    for pattern in ("to_q", "proj_out", "transformer_blocks.9.*"):
        with pytest.raises(ConfigError, match=f"{option} '{pattern.replace('*', '.*')}' matches none of the 22 layers"):
            add_trainable(model, LoraSettings(**{option: {"*.to_q": 2, pattern: 2}}), seed=0)
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(LoraError, match="no LoRA in training"):
        trained_lora(model)


def test_wrong_settings():
    for values in (
        {"kind": "loha"},
        {"rank_pattern": {"*": 0}},
        {"alpha_pattern": {"*": -1.0}},
        {"lokr_factor": 0},
    ):
        with pytest.raises(ConfigError):
            LoraSettings.parse(values)
