"""The training step: what it learns, what it draws, and what must not change its result."""

import math

import pytest
import torch

from chroma_core.data.randomness import generator
from chroma_core.errors import DataError
from chroma_core.lora.adapters import adapters_disabled
from chroma_core.training.loop import train_step
from chroma_core.training.objective import (
    HELDOUT_SIGMAS,
    add_noise,
    heldout_loss,
    loss,
    predict_velocity,
    training_target,
)
from chroma_core.training.optim import learning_rate_at
from training_cases import Bench, config, model_folder, write_dataset


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loop")
    return model_folder(folder / "model"), write_dataset(folder / "data", 6), folder / "cache"


def bench(places, **changes) -> Bench:
    return Bench(config(places[0], places[1], **changes), places[2])


def steps(made: Bench, count: int, start: int = 0):
    return [
        train_step(step, made.transformer, made.parameters, made.optimizer, made.batches, made.config)
        for step in range(start, start + count)
    ]


def heldout(made: Bench) -> float:
    pictures = [
        (made.data.cache.latents(sample.latents[0]), made.data.cache.text(sample.captions[0]))
        for sample in made.data.heldout
    ]
    return sum(heldout_loss(made.transformer, pictures)) / len(HELDOUT_SIGMAS)


def test_the_objective_in_numbers():
    x0, noise = torch.full((2, 1, 1, 1), 2.0), torch.full((2, 1, 1, 1), 10.0)
    assert add_noise(x0, noise, torch.tensor([0.25, 1.0])).flatten().tolist() == [4.0, 10.0]
    assert training_target(x0, noise).flatten().tolist() == [8.0, 8.0]
    small = torch.tensor([1e-4], dtype=torch.bfloat16)
    assert loss(small, torch.zeros(1)).dtype == torch.float32
    assert loss(small, torch.zeros(1)).item() == pytest.approx(1e-8, rel=0.01)


def test_overfitting_two_pictures_lowers_the_loss(places):
    made = bench(places, validation_dataset={"folder": str(places[1])}, batch_size=6, learning_rate=2e-2)
    before = heldout(made)
    results = steps(made, 60)
    after = heldout(made)
    assert not any(result.skipped for result in results)
    assert after < 0.85 * before, (before, after)
    with adapters_disabled(made.transformer):
        assert heldout(made) == before, "the base itself is not touched"


def test_a_step_is_a_function_of_its_number(places):
    first, second = bench(places), bench(places)
    a, b = steps(first, 5), steps(second, 5)
    assert a == b
    assert len({result.loss for result in a}) == 5
    for x, y in zip(first.parameters, second.parameters, strict=True):
        assert torch.equal(x, y)
    assert steps(bench(places, seed=43), 1)[0].loss != a[0].loss


def test_accumulation_equals_a_larger_batch(places):
    results, weights = [], []
    for batch_size, accumulation in ((4, 1), (2, 2), (1, 4)):
        made = bench(places, batch_size=batch_size, gradient_accumulation=accumulation, learning_rate=1e-3)
        results.append(steps(made, 3))
        weights.append(torch.cat([parameter.detach().flatten() for parameter in made.parameters]))
    for other in (1, 2):
        for a, b in zip(results[0], results[other], strict=True):
            assert abs(a.loss - b.loss) <= 1e-6 and abs(a.grad_norm - b.grad_norm) <= 1e-6
        # Adam turns a gradient's last bits into steps of full size where the gradient is almost nothing.
        assert (weights[0] - weights[other]).abs().mean() < 1e-5
    assert {len(made.batches[step]) for step in range(4)} == {4, 2}, "six pictures: a full and a short batch"


def test_gradient_checkpointing_changes_nothing(places):
    plain, saving = bench(places, batch_size=2), bench(places, batch_size=2, gradient_checkpointing=True)
    assert saving.transformer.is_gradient_checkpointing
    for a, b in zip(steps(plain, 3), steps(saving, 3), strict=True):
        assert abs(a.loss - b.loss) <= 1e-6 and abs(a.grad_norm - b.grad_norm) <= 1e-5
    for x, y in zip(plain.parameters, saving.parameters, strict=True):
        assert torch.allclose(x, y, atol=1e-6)


def test_the_global_random_state_is_neither_read_nor_moved(places):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    made = bench(places, lora={"rank": 4, "dropout": 0.3}, gradient_checkpointing=True)
    first = steps(made, 3)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert steps(bench(places, lora={"rank": 4, "dropout": 0.3}, gradient_checkpointing=True), 3) == first


def test_unequal_captions_in_a_batch_count_like_alone(places):
    made = bench(places, batch_size=6)
    batch = made.batches[0]
    assert len({len(condition.states) for condition in batch.conditions}) > 1
    x = add_noise(batch.latents, batch.noise, batch.sigmas)
    with torch.no_grad():
        together = predict_velocity(made.transformer, x, batch.sigmas, batch.conditions)
        for i in range(len(batch)):
            alone = predict_velocity(made.transformer, x[i : i + 1], batch.sigmas[i : i + 1], [batch.conditions[i]])
            assert (together[i] - alone[0]).abs().max() <= 1e-5


def test_a_step_that_is_not_finite_is_skipped(places):
    made = bench(places)
    steps(made, 1)
    before = [parameter.detach().clone() for parameter in made.parameters]
    state = {key: value.clone() for key, value in made.optimizer.state[made.parameters[0]].items()}
    with torch.no_grad():
        made.parameters[1][0, 0] = math.nan
    (result,) = steps(made, 1, start=1)
    assert result.skipped and not math.isfinite(result.loss)
    with torch.no_grad():
        made.parameters[1][0, 0] = before[1][0, 0]
    for now, then in zip(made.parameters, before, strict=True):
        assert torch.equal(now, then) and now.grad is None
    assert all(torch.equal(made.optimizer.state[made.parameters[0]][key], value) for key, value in state.items())


def test_sigmas_follow_the_objective(places):
    made = bench(places, objective={"minimum": 0.4, "maximum": 0.6}, batch_size=6)
    sigmas = torch.cat([made.batches[step].sigmas for step in range(20)])
    assert sigmas.min() >= 0.4 and sigmas.max() <= 0.6 and sigmas.unique().numel() == len(sigmas)


def test_a_vanished_cache_entry_is_named(places, tmp_path):
    made = Bench(config(places[0], places[1]), tmp_path / "cache")
    for path in (tmp_path / "cache" / "latents").rglob("*.safetensors"):
        path.unlink()
    with pytest.raises(DataError, match="latents entry .* Resume the job"):
        made.batches[0]


def test_learning_rate_schedules(places):
    def rates(schedule, warmup=0):
        made = config(places[0], places[1], lr_schedule=schedule, warmup_steps=warmup, steps=10, learning_rate=1.0)
        return [round(learning_rate_at(step, made), 4) for step in range(10)]

    assert rates("constant") == [1.0] * 10
    assert rates("linear") == [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    assert rates("constant", 4) == [0.25, 0.5, 0.75, 1.0] + [1.0] * 6
    cosine = rates("cosine", 2)
    assert (
        cosine[:3] == [0.5, 1.0, 1.0] and cosine[6] == 0.5 and cosine == cosine[:2] + sorted(cosine[2:], reverse=True)
    )


def test_heldout_noise_does_not_depend_on_the_job(places):
    a = bench(places, validation_dataset={"folder": str(places[1])}, seed=1)
    b = bench(places, validation_dataset={"folder": str(places[1])}, seed=2, validation_pictures=6)
    assert heldout(a) == heldout(b)
    assert HELDOUT_SIGMAS == (0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95)
    assert torch.equal(torch.rand(3, generator=generator(1, "x")), torch.rand(3, generator=generator(1, "x")))
