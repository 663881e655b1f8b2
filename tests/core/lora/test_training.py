"""LoRAs in training: fresh start, seeds, dtypes, checkpointing, dropout, saving and resuming."""

import threading

import pytest
import torch

from chroma_core.errors import ConfigError, LoraError
from chroma_core.lora.adapters import adapters_disabled, attach, detach
from chroma_core.lora.files import read_lora, write_lora
from chroma_core.lora.modules import LoraFile, LoraModule
from chroma_core.lora.settings import LoraSettings
from chroma_core.lora.trainable import add_trainable, load_trained, seed_dropout, trained_lora
from chroma_core.model.precision import PRECISIONS, precision, quantise
from lora_cases import distance, inputs, predict, random_lora
from miniature import transformer

QUANTISED = [name for name in PRECISIONS if name not in ("fp32", "bf16", "fp16")]


def train(model, steps=3, seed=7, dropout=False):
    """A few steps of plain gradient descent towards a fixed random target."""
    call = inputs(model)
    target = torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(seed))
    parameters = [p for p in model.parameters() if p.requires_grad]
    for step in range(steps):
        if dropout:
            seed_dropout(model, step)
        dtype = model.x_embedder.weight.dtype
        out = model(call["latents_BLD"].to(dtype), call["text_BTC"].to(dtype), call["sigma_B"], call["img_ids_L3"])
        loss = (out.float() - target).square().mean()
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for p, g in zip(parameters, gradients, strict=True):
                p -= 0.5 * g
    return trained_lora(model)


def equal(a: LoraFile, b: LoraFile) -> bool:
    return a.modules.keys() == b.modules.keys() and all(
        torch.equal(a.modules[n].down, b.modules[n].down) and torch.equal(a.modules[n].up, b.modules[n].up)
        for n in a.modules
    )


def test_a_fresh_lora_changes_nothing_and_is_all_that_trains():
    model = transformer()
    call = inputs(model)
    base = predict(model, call)
    parameters = add_trainable(model, LoraSettings(rank=8, alpha=4), seed=3)
    assert torch.equal(predict(model, call), base)
    assert len(parameters) == 2 * len(trained_lora(model).modules) == 2 * 22
    assert {id(p) for p in parameters} == {id(p) for p in model.parameters() if p.requires_grad}
    lora = trained_lora(model)
    for module in lora.modules.values():
        assert module.alpha == 4 and module.down.dtype == torch.float32 and not module.up.any()
        bound = module.down.shape[1] ** -0.5
        assert 0.8 * bound < module.down.abs().max() <= bound  # uniform within ±1/√in, PEFT's default


def test_seed_and_layer_name_decide_and_the_global_stream_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()

    def fresh(seed, target="all"):
        model = transformer()
        add_trainable(model, LoraSettings(target=target), seed)
        return trained_lora(model)

    first = fresh(1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    results = []
    thread = threading.Thread(target=lambda: results.append(fresh(1)))
    thread.start()
    thread.join()
    assert equal(first, results[0])
    assert not equal(first, fresh(2))
    wider = fresh(1, "all+ffs")  # more targets do not change the others
    assert all(torch.equal(wider.modules[n].down, first.modules[n].down) for n in first.modules)
    for down in (module.down for module in first.modules.values()):
        assert 0.9 < down.abs().max() * down.shape[1] ** 0.5 <= 1, "uniform in ±1/√in"


def test_inside_inference_mode_it_can_still_be_trained():
    """Host nodes run under inference mode; so does whatever they call."""
    model, outside = transformer(), transformer()
    below = random_lora(model, "context", seed=4, size=0.2)
    with torch.inference_mode():
        attach(model, LoraFile({n: LoraModule(m.down + 0, m.up + 0, m.alpha) for n, m in below.modules.items()}), 0.5)
        add_trainable(model, LoraSettings(rank=2), seed=3)
    attach(outside, below, 0.5)
    add_trainable(outside, LoraSettings(rank=2), seed=3)
    assert equal(train(model), train(outside))


@pytest.mark.parametrize("cast_first", [True, False])
def test_weights_stay_fp32_and_the_computation_stays_bf16(cast_first):
    model = transformer()
    if cast_first:
        model.bfloat16()
    parameters = add_trainable(model, LoraSettings(rank=4), seed=3)
    start = trained_lora(model)
    if not cast_first:
        model.to("cpu", torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in parameters)
    assert {id(p) for p in parameters} == {id(p) for p in model.parameters() if p.requires_grad}
    assert equal(trained_lora(model), start)  # not rounded on the way
    assert predict(model, inputs(model), torch.bfloat16).dtype == torch.bfloat16
    result = train(model)
    assert any(m.up.any() for m in result.modules.values())
    assert any(not torch.equal(m.up, m.up.bfloat16().float()) for m in result.modules.values())


@pytest.mark.parametrize("name", QUANTISED)
def test_training_on_a_quantised_base(name):
    model = transformer().bfloat16()
    quantise(model, precision(name))
    add_trainable(model, LoraSettings(rank=4, target="all+ffs"), seed=3)
    assert all(m.up.any() for m in train(model).modules.values())


def test_gradient_checkpointing_changes_nothing_even_with_dropout():
    results = []
    for checkpointing in (False, True):
        model = transformer().train()
        model.checkpointing_interval = int(checkpointing)
        add_trainable(model, LoraSettings(rank=4, dropout=0.3), seed=3)
        results.append(train(model, dropout=True))
    assert equal(*results)


def test_dropout_needs_a_seed_is_decided_by_it_and_sleeps_outside_training():
    model = transformer().train()
    call = inputs(model)
    add_trainable(model, LoraSettings(rank=4, dropout=0.5), seed=3)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.1)
    with pytest.raises(ConfigError, match="seed_dropout"):
        predict(model, call)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    outputs = []
    for seed in (1, 2, 1):
        seed_dropout(model, seed)
        outputs.append(predict(model, call))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(outputs[0], outputs[2]) and not torch.equal(outputs[0], outputs[1])
    model.eval()
    assert not torch.equal(predict(model, call), outputs[0])
    assert torch.equal(predict(model, call), predict(model, call))


def test_trained_goes_to_a_file_and_comes_back_the_same(tmp_path):
    model, applied, resumed = transformer(), transformer(), transformer()
    call = inputs(model)
    base = predict(model, call)
    settings = LoraSettings(rank=4, alpha=7, target="all+ffs")
    add_trainable(model, settings, seed=3)
    write_lora(tmp_path / "a.safetensors", train(model))
    result = predict(model, call)
    assert distance(result, base) > 1e-4
    lora = read_lora(tmp_path / "a.safetensors")
    attach(applied, lora)
    assert torch.equal(predict(applied, call), result)  # what the preview showed is what the file gives
    add_trainable(resumed, settings, seed=99)
    load_trained(resumed, lora)
    assert torch.equal(predict(resumed, call), result)
    assert equal(trained_lora(resumed), lora)
    with adapters_disabled(model):
        assert torch.equal(predict(model, call), base)
    detach(model, "trained")
    assert torch.equal(predict(model, call), base)


def test_trained_lora_is_a_copy():
    model = transformer()
    add_trainable(model, LoraSettings(rank=4), seed=3)
    before = trained_lora(model)
    train(model)
    assert not equal(before, trained_lora(model))


@pytest.mark.parametrize("other", [LoraSettings(rank=8), LoraSettings(alpha=3), LoraSettings(target="context")])
def test_a_checkpoint_with_other_settings_is_refused(other):
    saved, model = transformer(), transformer()
    add_trainable(saved, other, seed=3)
    add_trainable(model, LoraSettings(), seed=3)
    with pytest.raises(LoraError, match="differ in"):
        load_trained(model, trained_lora(saved))


def test_misuse_is_an_error():
    model = transformer()
    for act in (lambda: trained_lora(model), lambda: load_trained(model, random_lora(model))):
        with pytest.raises(LoraError, match="no LoRA in training"):
            act()
    add_trainable(model, LoraSettings(), seed=0)
    with pytest.raises(LoraError, match="already"):
        add_trainable(model, LoraSettings(), seed=0)
    for values in ({"rank": 0}, {"alpha": 0.0}, {"alpha": float("inf")}, {"dropout": 1.0}):
        with pytest.raises(ConfigError, match=next(iter(values))):
            LoraSettings.parse(values)
