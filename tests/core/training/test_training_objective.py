"""The training step with the objective's options: masks, regularisation, offset and paired noise, guidance, padding."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from chroma_core.lora.adapters import adapters_disabled
from chroma_core.training.config import ObjectiveConfig
from chroma_core.training.run.loop import Batches
from chroma_core.training.step.objective import add_noise, loss, predict_velocity, training_target
from chroma_core.weights.safetensors_files import save_safetensors
from training_cases import Bench, bench, model_folder, steps, write_dataset

EVERYTHING = ObjectiveConfig(
    loss="huber",
    huber_delta=0.3,
    prior_weight=0.7,
    noise_offset=0.05,
    pair_noise=True,
    guidance="random-range",
    guidance_range=(1.0, 4.0),
)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("objective")
    return model_folder(folder / "model"), write_dataset(folder / "data", 6), folder / "cache"


def with_objective(made: Bench, objective: ObjectiveConfig, masks: Path | None = None, **flags) -> Bench:
    """The bench with another objective and `flags` on every other sample; `masks`: a folder for masks (right half)."""
    samples = list(made.data.samples)
    for i, sample in enumerate(samples):
        if masks is not None:
            height, width = (size // 8 for size in reversed(sample.bucket))
            mask = torch.ones(1, height, width)
            mask[:, :, : width // 2] = 0
            save_safetensors(masks / f"{i}.safetensors", {"mask": mask}, {})
            sample = replace(sample, masks=(masks / f"{i}.safetensors",) * len(sample.latents))
        samples[i] = replace(sample, **flags) if i % 2 else sample
    made.batches = Batches(samples, made.data.cache, made.config.model_copy(update={"objective": objective}))
    return made


def test_accumulation_equals_a_larger_batch_with_every_option(places, tmp_path):
    results = []
    for batch_size, accumulation in ((4, 1), (2, 2), (1, 4)):
        made = bench(places, batch_size=batch_size, gradient_accumulation=accumulation, learning_rate=1e-3)
        made = with_objective(made, EVERYTHING, tmp_path, regularisation=True, sigma_bias=0.5)
        results.append(steps(made, 3))
    assert len({result.loss for result in results[0]}) == 3
    for other in (1, 2):
        for a, b in zip(results[0], results[other], strict=True):
            assert abs(a.loss - b.loss) <= 1e-6 and abs(a.grad_norm - b.grad_norm) <= 1e-6


def test_the_options_leave_the_other_draws_alone(places, tmp_path):
    plain = bench(places, batch_size=6).batches[0]
    made = with_objective(
        bench(places, batch_size=6), EVERYTHING, tmp_path, regularisation=True, sigma_bias=1.0
    ).batches
    batch = made[0]
    assert (plain.mask, plain.regularisation, plain.guidance) == (None, None, None)
    assert torch.equal(batch.latents, plain.latents)
    assert batch.regularisation is not None and batch.mask is not None and batch.guidance is not None
    flagged = torch.tensor([index % 2 == 1 for index in made.indices(0)])
    assert torch.equal(batch.regularisation, flagged) and batch.mask.mean() == 0.5
    assert torch.equal(batch.sigmas[~flagged], plain.sigmas[~flagged])
    moved = torch.logit(plain.sigmas[flagged].double()) + math.log(8)
    assert torch.allclose(torch.logit(batch.sigmas[flagged].double()), moved, atol=1e-3)
    guidance = torch.cat([value for step in range(30) if (value := made[step].guidance) is not None])
    assert guidance.min() >= 1 and guidance.max() <= 4 and guidance.std() > 0.6 and guidance.unique().numel() > 80
    assert torch.equal(made[0].guidance, batch.guidance)
    assert (batch.latents - batch.noise).square().sum() < (plain.latents - plain.noise).square().sum()


def test_a_mask_hides_what_is_outside(places, tmp_path):
    losses = []
    for change in (0.0, 5.0):
        made = with_objective(bench(places, batch_size=3), ObjectiveConfig(), tmp_path)
        batch = made.batches[0]
        x = add_noise(batch.latents, batch.noise, batch.sigmas)
        with torch.no_grad():
            velocity = predict_velocity(made.transformer, x, batch.sigmas, batch.conditions)
        target = training_target(batch.latents, batch.noise)
        half = target.shape[-1] // 2
        by_hand = (velocity - target)[..., half:].square().mean().item()
        target[..., :half] += change
        losses.append(loss(velocity, target, mask_B1HW=batch.mask).item())
        assert losses[-1] == pytest.approx(by_hand, rel=1e-6)
        assert steps(made, 1)[0].loss == pytest.approx(by_hand, rel=1e-6)
    assert losses[0] == losses[1]


def test_prior_preservation_pulls_only_an_adapter_that_moved(places):
    made = bench(places, learning_rate=5e-3)
    made.batches = Batches(
        [replace(sample, regularisation=True) for sample in made.data.samples], made.data.cache, made.config
    )
    for result in steps(made, 3):
        assert (result.loss, result.grad_norm) == (0.0, 0.0), "an adapter that adds nothing is where it should be"
    with torch.no_grad():
        for up in made.parameters[1::2]:
            up.add_(0.1)
    again = [steps(made, 1, start=3)[0] for _ in range(40)]
    assert again[0].grad_norm > 0 and again[-1].loss < again[0].loss / 2, [result.loss for result in again]


def test_a_batch_may_mix_both_kinds(places):
    made = with_objective(bench(places, batch_size=6), ObjectiveConfig(prior_weight=0.25), regularisation=True)
    with torch.no_grad():
        made.parameters[1].add_(0.1)
    batch = made.batches[0]
    assert batch.regularisation is not None and 0 < batch.regularisation.sum() < 6
    x = add_noise(batch.latents, batch.noise, batch.sigmas)
    with torch.no_grad():
        now = predict_velocity(made.transformer, x, batch.sigmas, batch.conditions)
        with adapters_disabled(made.transformer):
            base = predict_velocity(made.transformer, x, batch.sigmas, batch.conditions)
    expected = 0.0
    for row, prior in enumerate(batch.regularisation.tolist()):
        target = base[row] if prior else batch.noise[row] - batch.latents[row]
        expected += (0.25 if prior else 1.0) * (now[row] - target).square().mean().item() / 6
    assert steps(made, 1)[0].loss == pytest.approx(expected, rel=1e-5)


def test_zero_padding_shows_all_512_places(places):
    made = with_objective(bench(places, batch_size=2), ObjectiveConfig(text_padding="zero"))
    assert {len(condition.states) for condition in made.batches[0].conditions} == {512}
    padded, plain = steps(made, 1)[0], steps(bench(places, batch_size=2), 1)[0]
    assert math.isfinite(padded.loss) and abs(padded.loss - plain.loss) > 1e-6
