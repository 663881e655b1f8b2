"""Attention that keeps its scores: the same numbers as the fused one, and only where gradients flow."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from chroma_core.memory.plan import Settings, peaks
from chroma_core.model.transformer import unfused_attention
from chroma_core.training.config.changes import differences
from chroma_core.training.run.metrics import JobPaths
from chroma_core.training.run.run import Run
from streaming_cases import backward, call, model, predict, trainable
from training_cases import Control, config, model_folder, write_dataset


class Attention(TorchDispatchMode):
    """How often fused attention runs."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "scaled_dot_product" in str(func)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("masked", [False, True])
def test_numbers_and_gradients_are_those_of_fused_attention(masked):
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 3, 20, 16, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3))
    mask = torch.ones(2, 1, 1, 20, dtype=torch.bool)
    mask[0, ..., 13:] = False
    chosen = mask if masked else None
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=chosen)
    found = unfused_attention(q, k, v, attn_mask=chosen)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    weight = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    there = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    here = torch.autograd.grad((found * weight).sum(), (q, k, v))
    for a, b in zip(here, there, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [0, 1])
def test_a_deterministic_model_trains_without_fused_attention_and_samples_with_it(checkpointing):
    gradients, losses = [], []
    for on in (False, True):
        made = model()
        parameters = trainable(made)
        made.set_deterministic(on)
        made.checkpointing_interval = checkpointing
        with Attention() as training:
            losses.append(backward(made, call()))
        with Attention() as sampling:
            predict(made, call())
        assert (training.count == 0) == on and sampling.count > 0
        gradients.append([parameter.grad for parameter in parameters])
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_the_option_reaches_the_model_and_the_plan_and_leaves_ids_alone(tmp_path):
    data = write_dataset(tmp_path / "data", 2)
    plain = config(model_folder(tmp_path / "model"), data)
    chosen = config(tmp_path / "model", data, deterministic=True)
    assert plain.job_id() != chosen.job_id()
    (change,) = differences(plain, chosen)
    assert (change.field, change.kind) == ("deterministic", "exact")
    for settings in (plain, chosen):
        paths = JobPaths.of(tmp_path / "jobs", settings.job_id(), tmp_path / "loras", None)
        paths.job.mkdir(parents=True)
        run = Run(settings, paths, "cpu", Control(), lambda **_: None)
        run.prepare()
        run.load()
        assert {block.attn.deterministic for block in run.transformer.transformer_blocks} == {settings.deterministic}
        run.close()
    more = peaks(Settings(size=512, deterministic=True)).moments["step"] - peaks(Settings(size=512)).moments["step"]
    assert more == 4 * 4 * 24 * (32 * 32 + 128) ** 2  # fp32 scores of one block, and three of that size at work
