"""Gradient checkpointing every n blocks, and compiled blocks: what they cost and that they change nothing."""

from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from chroma_core.errors import ConfigError
from chroma_core.lora.settings import LoraSettings
from chroma_core.lora.trainable import CastFactors, add_trainable
from chroma_core.model.latents import image_ids
from chroma_core.model.precision import precision, quantise
from chroma_core.model.recomputing import recomputing
from chroma_core.streaming import stream_blocks
from chroma_core.training.config import TrainingConfig
from chroma_core.training.run.faults import resume_warnings
from chroma_core.training.run.metrics import Progress
from chroma_core.training.run.prepare import COMPILE_STEPS, compile_blocks, why_not_compiled
from miniature import transformer


def trainable(layers: int = 2, single_layers: int = 4, base: str | None = None, **lora):
    """A miniature with a LoRA that does something, and the LoRA's parameters."""
    model = transformer(layers, single_layers)
    if base:
        quantise(model, precision(base))
    parameters = add_trainable(model, LoraSettings(rank=4, **{"target": "attention", **lora}), 0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model, parameters


def gradients(model, parameters, height: int = 8, text: int = 7, ragged: bool = False):
    """The output and the LoRA's gradients for a batch of two."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, height * 3, 64, generator=generator)
    states = torch.randn(2, text, 32, generator=generator)
    mask = None
    if ragged:
        mask = torch.ones(2, text, dtype=torch.bool)
        mask[1, 3:] = False
    for parameter in parameters:
        parameter.grad = None
    output = model(latents, states, torch.tensor([0.3, 0.9]), image_ids(height, 12), mask)
    output.square().mean().backward()
    return [output.detach(), *(parameter.grad.clone() for parameter in parameters)]


def saved_bytes(model) -> int:
    """Bytes that a forward pass keeps for its backward pass outside checkpointed blocks, without the weights."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(torch.randn(1, 24, 64), torch.randn(1, 7, 32), torch.tensor([0.3]), image_ids(8, 12))
    assert output.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("ragged", [False, True])
def test_every_checkpointing_interval_gives_the_same_gradients(ragged):
    model, parameters = trainable()
    plain = gradients(model, parameters, ragged=ragged)
    for interval in (1, 2, 3, 5, 6, 100):
        model.checkpointing_interval = interval
        for a, b in zip(plain, gradients(model, parameters, ragged=ragged), strict=True):
            assert torch.equal(a, b), interval


class Products(TorchDispatchMode):
    """How often rows were multiplied by a matrix of each shape [in, out]."""

    def __init__(self):
        super().__init__()
        self.of = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("mm", "addmm"):
            self.of[tuple(args[-1].shape)] += 1
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("target", ["attention", "all+ffs"])
@pytest.mark.parametrize("kind", ["lora", "lokr", "dora"])
def test_the_last_layers_of_a_block_are_not_computed_again(target, kind):
    """But where the adapter needs their input: a DoRA."""
    model, parameters = trainable(target=target, kind=kind)
    width, found, counts = model.inner_dim, [], []
    for interval in (0, 1):
        model.checkpointing_interval = interval
        with Products() as products:
            found.append(gradients(model, parameters))
        # Single blocks: proj_mlp, computed again, and proj_out, which is not.
        counts.append([products.of[width, 4 * width], products.of[5 * width, width]])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    again = [later - earlier for earlier, later in zip(*counts, strict=True)]
    whole = kind == "dora" and target == "all+ffs"
    assert again[0] > 0 and again[1] == (4 if whole else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["lora", "dora", "lokr"])
def test_factors_that_were_cast_before_give_the_same_bits(dtype, kind):
    model, parameters = trainable(kind=kind)
    model.to(dtype)
    model.checkpointing_interval = 1
    cast = CastFactors(model)
    found = []
    for ready in (False, True):
        for parameter in parameters:
            parameter.grad = None
        for seed in (1, 2):  # the parts of a step add up
            latents = torch.randn(1, 24, 64, generator=torch.Generator().manual_seed(seed)).to(dtype)
            with cast.to(dtype) if ready else nullcontext():
                output = model(latents, torch.ones(1, 7, 32, dtype=dtype), torch.tensor([0.3]), image_ids(8, 12))
                output.float().square().mean().backward()
        assert {parameter.grad.dtype for parameter in parameters} == {torch.float32}
        found.append([parameter.grad.clone() for parameter in parameters])
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*found, strict=True))
    assert not any(branch.cast for branch in cast.branches)


def test_what_is_computed_again_is_told_to_be_the_same():
    """As far as the last tensor that the backward pass needs, once."""
    x, calls = torch.ones(3, requires_grad=True), []

    def function(x):
        calls.append("begun")
        y = (x * 2).exp() if len(calls) < 4 else x * 2
        calls.append("ended")
        return y.sin() + 1

    y = recomputing(function, x).sum()
    (gradient,) = torch.autograd.grad(y, x, retain_graph=True)
    assert torch.equal(gradient, torch.autograd.grad(torch.exp(x * 2).sin().sum(), x)[0])
    assert calls == ["begun", "ended", "begun", "ended"]
    with pytest.raises(RuntimeError, match="this is a second one"):
        torch.autograd.grad(y, x)
    with pytest.raises(RuntimeError, match="saved 1 tensors instead of 2"):
        calls[:] = ["begun"]
        torch.autograd.grad(recomputing(function, x).sum(), x)


def test_a_larger_interval_recomputes_fewer_blocks_and_keeps_more():
    """Two double and four single blocks: all, three, two, one, and none are recomputed."""
    model, _ = trainable()
    sizes, recomputed = [], []
    for interval in (1, 2, 4, 6):
        model.checkpointing_interval = interval
        recomputed.append(sum(model.recomputes(index) for index in range(6)))
        sizes.append(saved_bytes(model))
    model.checkpointing_interval = 0
    sizes.append(saved_bytes(model))
    assert recomputed == [6, 3, 2, 1] and not model.recomputes(0)
    assert sizes == sorted(sizes) and len(set(sizes)) == 5
    assert sizes[0] < 0.2 * sizes[-1] and 0.3 < sizes[1] / sizes[-1] < 0.7
    assert type(model).checkpointing_interval == 0


def test_streamed_blocks_take_an_interval_too():
    model, parameters = trainable()
    plain = gradients(model, parameters)
    stream_blocks(model, "cpu", 2)
    for interval in (1, 2, 6):
        model.checkpointing_interval = interval
        for a, b in zip(plain, gradients(model, parameters), strict=True):
            assert torch.equal(a, b), interval


@pytest.mark.filterwarnings("ignore:Guards may run slower:RuntimeWarning")
@pytest.mark.slow
def test_compiled_blocks_give_the_same_gradients():
    """On a quantised base: a graph for the first double block, the others, the single blocks, for all sizes."""
    model, parameters = trainable(2, 2, "int8")
    model.checkpointing_interval = 1
    sizes = ({}, {"height": 12, "text": 9})
    plain = [gradients(model, parameters, **size) for size in sizes]
    torch._dynamo.reset()
    counters.clear()
    compile_blocks(model, backend="eager")
    trial = counters["stats"]["unique_graphs"]
    for expected, size in zip(plain, sizes, strict=True):
        for a, b in zip(expected, gradients(model, parameters, **size), strict=True):
            assert torch.allclose(a, b, atol=1e-6)
    assert counters["stats"]["unique_graphs"] - trial <= 3
    assert not counters["graph_break"]


def test_compiling_by_itself(tmp_path):
    """On CUDA, where the compiler works and there are steps enough; otherwise the reason is told, and nothing asked."""
    asked = []

    def works(backend: str, device: torch.device) -> None:
        asked.append((backend, str(device)))

    def fails(backend: str, device: torch.device) -> None:
        raise ConfigError("There is no Triton.")

    def reason(device: str = "cuda", check=works, sharded: bool = False, **options) -> str:
        values = {"name": "x", "dataset": {"folder": str(tmp_path)}, "compile_auto": True, "steps": COMPILE_STEPS}
        return why_not_compiled(TrainingConfig.parse({**values, **options}), device, sharded, check)

    assert reason() == "" and asked == [("inductor", "cuda")]
    assert "runs on 'cpu'" in reason("cpu") and "999 steps are too few" in reason(steps=COMPILE_STEPS - 1)
    assert "offload mode block" in reason(model={"flavour": "base", "offload": "block"})
    assert "FSDP2" in reason(sharded=True) and "dropout" in reason(lora={"dropout": 0.1})
    assert reason(check=fails) == "compile_auto: the blocks are not compiled: There is no Triton."
    assert len(asked) == 1


def test_a_job_that_is_compiled_otherwise_than_before_says_so():
    before = {known: Progress(step=5, data="x", compiled=known) for known in (None, False, True)}
    found = [len(resume_warnings(before[known], [], "x", now)) for known in before for now in (False, True)]
    assert found == [0, 0, 0, 1, 1, 0]
    assert "are no longer compiled from step 5 on" in resume_warnings(before[True], [], "x", False)[0]


def test_what_cannot_be_compiled_is_refused():
    dropping, _ = trainable(dropout=0.1)
    with pytest.raises(ConfigError, match="Set dropout = 0, or turn compile off"):
        compile_blocks(dropping, backend="aot_eager")
    streamed, _ = trainable()
    stream_blocks(streamed, "cpu", 2)
    with pytest.raises(ConfigError, match="Turn one of them off"):
        compile_blocks(streamed, backend="aot_eager")
    plain, _ = trainable()
    with pytest.raises(ConfigError, match="backend 'nonsense' cannot work on the device 'cpu'.*Turn compile off"):
        compile_blocks(plain, backend="nonsense")
    compiled, _ = trainable()
    compiled.transformer_blocks[1].compile(backend="eager")
    with pytest.raises(ConfigError, match="Turn one of them off"):
        stream_blocks(compiled, "cpu", 2)
    for model in (dropping, streamed, plain):
        assert all(getattr(block, "_compiled_call_impl", None) is None for block in model.transformer_blocks)
