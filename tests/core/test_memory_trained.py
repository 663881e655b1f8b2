"""What is trained, in the memory plan: adapters' parameters and optimizers' state against the real things."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import Parameter

from chroma_core.errors import ConfigError
from chroma_core.lora.settings import LoraSettings
from chroma_core.lora.trainable import add_trainable
from chroma_core.memory import estimate
from chroma_core.memory.anatomy import lora_layers_of
from chroma_core.memory.plan import Settings, peaks
from chroma_core.memory.trained import OPTIMIZERS, adapter_shapes, state_bytes
from chroma_core.training.run.stepper import Stepper
from chroma_core.training.step.optimizers import OptimizerSettings
from tools.docs.memory_cases import Case


@pytest.mark.parametrize(("kind", "rank"), [("lora", 4), ("rslora", 4), ("dora", 4), ("lokr", 4), ("lokr", 512)])
def test_shapes_of_an_adapter_are_those_of_its_parameters(kind, rank):
    model = Case("fp32", heads=2).model()
    layers = lora_layers_of(model, "all")
    trained = add_trainable(model, LoraSettings(rank=rank, kind=kind, target="all"), seed=1)
    wanted = sorted(tuple(parameter.shape) for parameter in trained)
    assert wanted == sorted(s for rows, columns in layers.shapes for s in adapter_shapes(kind, rank, rows, columns))


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_state_of_an_optimizer_is_what_it_holds(name):
    shapes = [(16, 512), (768, 16), (300,), (8, 8)]
    parameters = [Parameter(torch.randn(shape)) for shape in shapes]
    try:
        stepper = Stepper(parameters, OptimizerSettings(name, 1.0 if name == "prodigy" else 1e-3))
    except ConfigError as error:
        pytest.skip(str(error))
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    stepper.apply(1.0 if name == "prodigy" else 1e-3, 1.0)
    tensors = [t for state in stepper.optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    held = {t.untyped_storage().data_ptr(): t.nbytes for t in tensors if t.numel() > 1}
    assert state_bytes(name, shapes) == pytest.approx(sum(held.values()), rel=0.02)


def test_mean_full_rank_and_long_texts_are_counted():
    base = Settings("base", "int8", size=512)
    plain = peaks(base)
    assert peaks(replace(base, ema=True)).training - plain.training == plain.lora
    count = 226_500_000
    full = peaks(replace(base, trained_parameters=count))
    assert (full.lora, full.optimizer) == (4 * count, 8 * count)
    assert full.moments["step"] - plain.moments["step"] == 16 * count - 2 * plain.lora - plain.optimizer
    long = peaks(replace(base, text_tokens=512, gradient_checkpointing=False)).activations
    assert 1.2 < long / peaks(replace(base, gradient_checkpointing=False)).activations < 1.6
    assert estimate(Settings("base", "int8", adapter="dora", size=512)).lora_bytes > plain.lora
    assert estimate(Settings("base", "int8", adapter="lokr", size=512)).lora_bytes < plain.lora
    with pytest.raises(ConfigError, match="adapter is 'loha'"):
        estimate(Settings("base", "int8", adapter="loha"))
