"""Sampling with block streaming against the model without it: the same bits, few blocks on the device."""

import pytest
import torch

from chroma_core.lora.adapters import attach, detach, merge, set_strength
from chroma_core.lora.settings import LoraSettings
from chroma_core.lora.trainable import add_trainable
from chroma_core.model.precision import PRECISIONS, precision
from chroma_core.streaming import stream_blocks
from lora_cases import random_lora
from streaming_cases import BLOCKS, Watch, backward, call, model, predict, trainable


@pytest.mark.parametrize(("name", "resident_blocks"), [*((name, 2) for name in PRECISIONS), ("int8", 3), ("bf16", 5)])
def test_outputs_are_the_same_bits(name, resident_blocks):
    made, inputs = model(name), call(precision(name).dtype)
    expected = [predict(made, inputs), predict(made, call(precision(name).dtype, seed=2))]
    streamer = stream_blocks(made, "cpu", resident_blocks)
    for _ in range(2):
        assert torch.equal(predict(made, inputs), expected[0])
        assert torch.equal(predict(made, call(precision(name).dtype, seed=2)), expected[1])
    assert streamer.peak_resident == resident_blocks


@pytest.mark.parametrize(
    ("resident_blocks", "most"), [(2, 2), (3, 3), (4, 4), (5, 5), (99, 5)], ids=["2", "3", "4", "all", "more"]
)
def test_no_more_blocks_are_on_the_device_than_asked(resident_blocks, most):
    made, inputs = model(), call()
    streamer = stream_blocks(made, "cpu", resident_blocks)
    watch = Watch(made)
    for _ in range(3):
        predict(made, inputs)
        assert len(streamer.resident()) <= most
    assert watch.order == BLOCKS * 3
    assert streamer.peak_resident == most
    assert watch.most <= most


def test_the_next_block_comes_while_one_works_and_the_first_ones_stay():
    made, inputs, seen = model(), call(), []
    streamer = stream_blocks(made, "cpu", 3)
    made.single_transformer_blocks[1].register_forward_hook(lambda *_: seen.append(streamer.resident()))
    made.single_transformer_blocks[2].attn.register_forward_pre_hook(lambda *_: seen.append(streamer.resident()))
    predict(made, inputs)
    first, at_work, following = BLOCKS[0], BLOCKS[3], BLOCKS[4]
    assert seen[0] == [first, at_work, following], "fetched before the next block asks for it"
    assert seen[1] == [first, following], "and gone when the next block works"
    assert streamer.resident() == [first, BLOCKS[1], following], "the next pass begins with what is there"


def test_the_host_copy_is_never_written_or_replaced():
    made, inputs = model("int8"), call(torch.bfloat16)
    hosts = {name: (t, t.data_ptr(), t._version, t.clone()) for name, t in made.state_dict(keep_vars=True).items()}
    stream_blocks(made, "cpu")
    trainable(made)
    made.checkpointing_interval = 1
    backward(made, inputs)
    predict(made, inputs)
    now = {name.replace(".base_layer", ""): t for name, t in made.state_dict(keep_vars=True).items()}
    for name, (tensor, pointer, version, values) in hosts.items():
        assert now[name] is tensor, name
        assert (tensor.data_ptr(), tensor._version) == (pointer, version), name
        assert torch.equal(tensor, values), name


def test_weights_exchanged_or_changed_on_the_host_are_used():
    plain, made, inputs = model(), model(), call()
    stream_blocks(made, "cpu", 4)
    before = predict(made, inputs)
    lora = random_lora(plain)
    merge(plain, lora)
    merge(made, lora)
    assert torch.equal(predict(made, inputs), predict(plain, inputs))
    other = model(seed=7)
    made.load_state_dict(other.state_dict())
    assert torch.equal(predict(made, inputs), predict(other, inputs))
    made.load_state_dict(model().state_dict())
    assert torch.equal(predict(made, inputs), before)


def test_library_tensors_are_copied_part_by_part():
    """A caller may have put a library's own layers in place, whose weights are wrapped tensors."""
    from optimum.quanto import QLinear, qint8

    made, reference, inputs = model(), model(), call()
    for each in (made, reference):
        for name, linear in list(each.named_modules()):
            if type(linear) is torch.nn.Linear and "_blocks." in name:
                layer = QLinear.from_module(linear, weights=qint8)
                layer.freeze()
                each.set_submodule(name, layer.requires_grad_(False))
    streamer = stream_blocks(made, "cpu")
    assert torch.equal(predict(made, inputs), predict(reference, inputs))
    gradients = []
    for each in (made, reference):
        parameters = trainable(each)
        backward(each, inputs)
        gradients.append([p.grad for p in parameters])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert streamer.peak_resident == 2


@pytest.mark.parametrize("name", ["fp32", "int4"])
def test_live_loras_come_and_go(name):
    plain, made, inputs = model(name), model(name), call(precision(name).dtype)
    lora, base = random_lora(plain), predict(plain, inputs)
    attach(plain, lora, 0.7)
    streamer = stream_blocks(made, "cpu")
    for _ in range(2):
        assert torch.equal(predict(made, inputs), base)
        attach(made, lora, 0.4)
        set_strength(made, "lora", 0.7)
        assert torch.equal(predict(made, inputs), predict(plain, inputs))
        detach(made, "lora")
    attach(made, lora, 0.7)
    streamer.remove()
    assert torch.equal(predict(made, inputs), predict(plain, inputs))
    stream_blocks(made, "cpu")
    assert torch.equal(predict(made, inputs), predict(plain, inputs)), "also one that was there before"


def test_loras_live_where_the_model_computes():
    """The meta device has no values, but refuses every operation with a tensor of the host: all places are right."""
    made, inputs = model(), call(device="meta")
    attach(made, random_lora(model()), name="before")
    stream_blocks(made, "meta")
    attach(made, random_lora(model()), name="after")
    assert predict(made, inputs).device.type == "meta"
    parameters = add_trainable(made, LoraSettings(rank=2, target="all+ffs"), seed=1)
    made.checkpointing_interval = 1
    made(**inputs).sum().backward()
    assert {(p.device.type, p.grad.device.type) for p in parameters} == {("meta", "meta")}
    assert {
        t.device.type for name, t in made.state_dict().items() if "_blocks." in name and "branches" not in name
    } == {"cpu"}
