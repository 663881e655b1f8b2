"""Streamed blocks through interruptions, parking and removal."""

import copy
import gc

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from chroma_core.errors import ConfigError, PrecisionError
from chroma_core.lora.adapters import (
    attach,
)
from chroma_core.streaming import stream_blocks, streamed
from lora_cases import random_lora
from streaming_cases import BLOCKS, backward, call, model, predict, trainable


class Cancelled(Exception):
    pass


@pytest.mark.parametrize("at", [0, 2, 4])
def test_an_interrupted_pass_leaves_the_next_one_right(at):
    made, inputs = model(), call()
    expected = predict(made, inputs)
    streamer = stream_blocks(made, "cpu", 3)

    def cancel(*_):
        raise Cancelled

    for _ in range(2):
        hook = made.get_submodule(BLOCKS[at]).attn.register_forward_pre_hook(cancel)
        with pytest.raises(Cancelled):
            predict(made, inputs)
        hook.remove()
        weights = {id(t) for t in made.state_dict(keep_vars=True).values()}
        assert torch.equal(predict(made, inputs), expected)
        assert {id(t) for t in made.state_dict(keep_vars=True).values()} == weights, "the host's tensors were back"
    assert streamer.peak_resident <= 3


@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointing", "plain"])
def test_an_interrupted_backward_pass_leaves_the_next_one_right(checkpointing):
    plain, made, inputs = model(), model(), call()
    expected, parameters = trainable(plain), trainable(made)
    streamer = stream_blocks(made, "cpu")
    for each in (plain, made):
        each.checkpointing_interval = int(checkpointing)

    def cancel(*_):
        if torch._C._current_graph_task_id() != -1:
            raise Cancelled

    layer = made.get_submodule(f"{BLOCKS[2]}.attn.to_q")
    if checkpointing:
        hook = layer.register_forward_pre_hook(cancel)  # in recomputation
    else:
        hook = layer.branches[0].down.register_hook(cancel)
    with pytest.raises(Cancelled):
        backward(made, inputs)
    hook.remove()
    for parameter in parameters:
        parameter.grad = None
    assert torch.equal(backward(made, inputs), backward(plain, inputs))
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(parameters, expected, strict=True))
    assert streamer.peak_resident == 2


def test_device_bytes_are_what_is_there():
    made, inputs = model(), call()
    sizes = {n: sum(t.nbytes for t in made.get_submodule(n).state_dict().values()) for n in BLOCKS}
    rest = sum(t.nbytes for t in made.state_dict().values()) - sum(sizes.values())
    streamer = stream_blocks(made, "cpu")
    assert streamer.device_bytes() == rest
    predict(made, inputs)
    assert streamer.device_bytes() == rest + sum(sizes[name] for name in streamer.resident())
    attach(made, random_lora(made))
    lora = sum(t.nbytes for name, t in made.state_dict().items() if ".branches." in name)
    assert streamer.device_bytes() == rest + lora + sum(sizes[name] for name in streamer.resident())


def test_parked_and_back():
    made, inputs = model(), call()
    parameters = trainable(made)
    expected = predict(made, inputs)
    streamer = stream_blocks(made, "cpu", 4)
    predict(made, inputs)
    assert len(streamer.resident()) == 4
    streamer.park()
    assert streamer.resident() == [] and streamer.device_bytes() == 0
    with pytest.raises(RuntimeError, match="parked"):
        predict(made, inputs)
    streamer.unpark()
    assert torch.equal(predict(made, inputs), expected)
    now = [p for name, p in made.named_parameters() if ".branches." in name]
    assert {id(p) for p in now} == {id(p) for p in parameters}, "an optimizer still knows them"


def test_removed_it_is_the_plain_model():
    made, inputs = model(), call()
    before = {name: id(t) for name, t in made.state_dict(keep_vars=True).items()}
    expected = predict(made, inputs)
    streamer = stream_blocks(made, "cpu")
    assert streamed(made) is streamer
    with pytest.raises(ConfigError, match="already"):
        stream_blocks(made, "cpu")
    predict(made, inputs)
    streamer.remove()
    assert streamed(made) is None and streamer.resident() == []
    assert all("forward" not in made.get_submodule(name).__dict__ for name in BLOCKS)
    assert {name: id(t) for name, t in made.state_dict(keep_vars=True).items()} == before
    assert torch.equal(predict(made, inputs), expected)
    assert torch.equal(predict(copy.deepcopy(made), inputs), expected)
    stream_blocks(made, "cpu", 3)
    assert torch.equal(predict(made, inputs), expected)


def test_a_forgotten_model_is_freed():
    made = model()
    streamer = stream_blocks(made, "cpu")
    predict(made, call())
    storage = StorageWeakRef(made.transformer_blocks[0].attn.to_q.weight.untyped_storage())
    del made, streamer
    gc.collect()
    assert storage.expired()


def test_refusals():
    with pytest.raises(ConfigError, match="at least 2"):
        stream_blocks(model(), "cpu", 1)
    unfrozen = model().requires_grad_(True)
    with pytest.raises(ConfigError, match=r"'transformer_blocks\.0'.*Freeze"):
        stream_blocks(unfrozen, "cpu")
    assert streamed(unfrozen) is None
    made = model()
    stream_blocks(made, "cpu")
    predict(made, call())
    made.single_transformer_blocks.requires_grad_(True)
    with pytest.raises(ConfigError, match=r"'single_transformer_blocks\.0'.*never copied back"):
        made(**call())


def test_bitsandbytes_own_layers_are_refused_with_the_reason():
    bnb = pytest.importorskip("bitsandbytes")
    made = model()
    linear = made.transformer_blocks[1].attn.to_q
    layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features)
    layer.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False)
    made.transformer_blocks[1].attn.to_q = layer.requires_grad_(False)
    with pytest.raises(PrecisionError, match=r"'transformer_blocks\.1'.*Params4bit"):
        stream_blocks(made, "cpu")
