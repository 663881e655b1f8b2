"""Block streaming against the model without it: the same bits, few blocks on the device, an untouched host copy."""

import copy
import gc

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from chroma_core.errors import ConfigError, PrecisionError
from chroma_core.latents import image_ids
from chroma_core.lora.adapters import (
    LoraSettings,
    add_trainable,
    attach,
    detach,
    merge,
    seed_dropout,
    set_strength,
    trained_lora,
)
from chroma_core.precision import PRECISIONS, precision, quantise
from chroma_core.streaming import stream_blocks, streamed
from lora_cases import random_lora
from miniature import transformer

DOUBLE, SINGLE = 2, 3
BLOCKS = [f"transformer_blocks.{i}" for i in range(DOUBLE)] + [f"single_transformer_blocks.{i}" for i in range(SINGLE)]
TRAINED_PRECISIONS = ["fp32", "int8", "nf4", "int8-quanto"]


def model(name: str = "fp32", seed: int = 0):
    made = transformer(DOUBLE, SINGLE, seed).to(precision(name).dtype)
    quantise(made, precision(name))
    return made.requires_grad_(False)


def call(dtype: torch.dtype = torch.float32, seed: int = 1, device: str = "cpu"):
    """Two rows of different length."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, 4:] = False
    made = {
        "latents_BLD": torch.randn(2, 24, 64, generator=generator).to(dtype),
        "text_BTC": torch.randn(2, 7, 32, generator=generator).to(dtype),
        "sigma_B": torch.tensor([0.3, 0.9]),
        "img_ids_L3": image_ids(8, 12),
        "text_mask_BT": mask,
    }
    return {key: value.to(device) for key, value in made.items()}


def predict(made, inputs):
    with torch.inference_mode():
        return made(**inputs)


def backward(made, inputs, seed: int = 5):
    """A loss and its gradients on the trained LoRA's parameters."""
    weight = torch.randn(2, 24, 64, generator=torch.Generator().manual_seed(seed))
    loss = (made(**inputs).float() * weight).sum()
    loss.backward()
    return loss.detach()


def trainable(made, dropout: float = 0.0):
    """Parameters of a LoRA whose `up` is not zero, so that every gradient counts."""
    parameters = add_trainable(made, LoraSettings(rank=4, target="all+ffs", dropout=dropout), seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return parameters


class Watch:
    """Counts, from outside, the blocks whose device tensors are alive, each time a block's layer computes."""

    def __init__(self, made):
        self.most, self.order, self._alive = 0, [], {}
        self._own = {t.untyped_storage().data_ptr() for t in (*made.parameters(), *made.buffers())}
        for name in BLOCKS:
            for leaf in made.get_submodule(name).modules():
                if getattr(leaf, "weight", None) is not None and not list(leaf.children()):
                    leaf.register_forward_pre_hook(lambda leaf, _, name=name: self.look(name, leaf))

    def look(self, name, leaf):
        storage = leaf.weight.untyped_storage()
        assert storage.data_ptr() not in self._own, "computes with the host's tensor"
        if self.order[-1:] != [name]:
            self.order.append(name)
        self._alive.setdefault(storage.data_ptr(), (name, StorageWeakRef(storage)))
        self._alive = {key: seen for key, seen in self._alive.items() if not seen[1].expired()}
        self.most = max(self.most, len({name for name, _ in self._alive.values()}))


# --- sampling ---------------------------------------------------------------------------------------------------------


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
    made.gradient_checkpointing = True
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


# --- live LoRAs -------------------------------------------------------------------------------------------------------


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
    made.gradient_checkpointing = True
    made(**inputs).sum().backward()
    assert {(p.device.type, p.grad.device.type) for p in parameters} == {("meta", "meta")}
    assert {
        t.device.type for name, t in made.state_dict().items() if "_blocks." in name and "branches" not in name
    } == {"cpu"}


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointing", "plain"])
@pytest.mark.parametrize(("name", "resident_blocks"), [*((n, 2) for n in TRAINED_PRECISIONS), ("int8", 4), ("nf4", 5)])
def test_gradients_are_the_same_bits(name, checkpointing, resident_blocks):
    plain, made, inputs = model(name), model(name), call(precision(name).dtype)
    expected = trainable(plain)
    parameters = trainable(made)
    streamer = stream_blocks(made, "cpu", resident_blocks)
    watch = Watch(made)
    for each in (plain, made):
        each.gradient_checkpointing = checkpointing
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
    made.gradient_checkpointing = checkpointing
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
    made.gradient_checkpointing = checkpointing
    for index, name in enumerate(BLOCKS):
        # The gradient of a block's first layer is among the last that its backward pass computes.
        first = made.get_submodule(f"{name}.attn.to_q").branches[0].down
        first.register_hook(lambda _, index=index: seen.__setitem__(index, streamer.resident()))
    backward(made, call())
    assert seen == {index: BLOCKS[max(index - 1, 0) : index + 1] for index in range(len(BLOCKS))}


@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointing", "plain"])
def test_three_optimizer_steps_with_pictures_in_between(checkpointing):
    results = []
    for stream in (False, True):
        made = model("int8")
        if stream:
            stream_blocks(made, "cpu", 3)
        parameters = trainable(made, dropout=0.2)
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        made.gradient_checkpointing = checkpointing
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


# --- interruptions, parking, removal ----------------------------------------------------------------------------------


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
        each.gradient_checkpointing = checkpointing

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


# --- a real device ----------------------------------------------------------------------------------------------------


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
        each.gradient_checkpointing = checkpointing
    for _ in range(5):
        torch.testing.assert_close(predict(made, inputs), predict(plain, inputs))
        torch.testing.assert_close(backward(made, inputs), backward(plain, inputs))
    for a, b in zip(parameters, expected, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-2, atol=1e-3 * float(b.grad.abs().max()))
    assert streamer.peak_resident == 2
    streamer.remove()
    assert {p.device.type for p in made.parameters()} == {"cpu"}
