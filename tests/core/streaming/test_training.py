"""Training through streamed blocks: the same gradients, to the bit; and on a real device where there is one."""

import gc
import os

import pytest
import torch

from chroma_core.lora.trainable import seed_dropout, trained_lora
from chroma_core.model.precision import precision
from chroma_core.streaming import stream_blocks
from streaming_cases import BLOCKS, TRAINED_PRECISIONS, Watch, backward, call, model, predict, trainable


@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointing", "plain"])
@pytest.mark.parametrize(("name", "resident_blocks"), [*((n, 2) for n in TRAINED_PRECISIONS), ("int8", 4), ("nf4", 5)])
def test_gradients_are_the_same_bits(name, checkpointing, resident_blocks):
    plain, made, inputs = model(name), model(name), call(precision(name).dtype)
    expected = trainable(plain)
    parameters = trainable(made)
    streamer = stream_blocks(made, "cpu", resident_blocks)
    watch = Watch(made)
    for each in (plain, made):
        each.checkpointing_interval = int(checkpointing)
    for _ in range(2):  # the second adds to the first, from what the first left on the device
        assert torch.equal(backward(made, inputs), backward(plain, inputs))
    assert all(p.grad.abs().sum() > 0 for p in expected)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(parameters, expected, strict=True))
    assert streamer.peak_resident == resident_blocks and watch.most <= resident_blocks
    there_and_back = BLOCKS + BLOCKS[-2::-1] if checkpointing else BLOCKS
    assert watch.order[: len(there_and_back)] == there_and_back


@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointing", "plain"])
def test_autograd_keeps_no_block_on_the_device(checkpointing):
    made, inputs = model("int8"), call(torch.bfloat16)
    trainable(made)
    streamer = stream_blocks(made, "cpu")
    made.checkpointing_interval = int(checkpointing)
    output = made(**inputs)
    assert len(streamer.resident()) <= 2, "the graph of all blocks stands"
    output.sum().backward()
    del output
    gc.collect()
    assert streamer.resident()[0] == BLOCKS[0] and len(streamer.resident()) <= 2, "ready for the next step"


@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointing", "plain"])
def test_a_backward_pass_fetches_in_reverse_order(checkpointing):
    made, seen = model(), {}
    trainable(made)
    streamer = stream_blocks(made, "cpu")
    made.checkpointing_interval = int(checkpointing)
    for index, name in enumerate(BLOCKS):
        # The gradient of a block's first layer is among the last that its backward pass computes.
        first = made.get_submodule(f"{name}.attn.to_q").branches[0].down
        first.register_hook(lambda _, index=index: seen.__setitem__(index, streamer.resident()))
    backward(made, call())
    assert seen == {index: BLOCKS[max(index - 1, 0) : index + 1] for index in range(len(BLOCKS))}


@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointing", "plain"])
def test_three_optimizer_steps_with_images_in_between(checkpointing):
    results = []
    for stream in (False, True):
        made = model("int8")
        if stream:
            stream_blocks(made, "cpu", 3)
        parameters = trainable(made, dropout=0.2)
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        made.checkpointing_interval = int(checkpointing)
        record = []
        for step in range(3):
            made.train()
            seed_dropout(made, step)
            record.append(backward(made, call(torch.bfloat16, seed=step), seed=step))
            optimizer.step()
            optimizer.zero_grad()
            made.eval()
            record.append(predict(made, call(torch.bfloat16)))
        lora = trained_lora(made)
        results.append([*record, *(t for m in lora.modules.values() for t in (m.down, m.up))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not torch.equal(results[0][1], results[0][3]), "it learns"


def close(a, b, **tolerances):
    """Compared only where there are numbers: the simulated card shows sizes, devices and the order of things."""
    assert a.shape == b.shape and a.device == b.device
    if "NULL_GPU_LIBRARY" not in os.environ:
        torch.testing.assert_close(a, b, **tolerances)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA or ROCm")
@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointing", "plain"])
@pytest.mark.parametrize("name", ["bf16", "int8", "nf4"])
def test_on_an_accelerator(name, checkpointing):
    plain, made = model(name).to("cuda"), model(name)
    inputs = call(precision(name).dtype, device="cuda")
    expected, streamer = trainable(plain), stream_blocks(made, "cuda")
    parameters = trainable(made)
    assert {p.device.type for p in parameters} == {"cuda"}
    for each in (plain, made):
        each.checkpointing_interval = int(checkpointing)
    for _ in range(5):
        close(predict(made, inputs), predict(plain, inputs))
        close(backward(made, inputs), backward(plain, inputs))
    for a, b in zip(parameters, expected, strict=True):
        close(a.grad, b.grad, rtol=1e-2, atol=1e-3 * float(b.grad.abs().max()))
    assert streamer.peak_resident == 2
    streamer.remove()
    assert {p.device.type for p in made.parameters()} == {"cpu"}
