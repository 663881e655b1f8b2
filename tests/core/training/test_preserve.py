"""What `[preserve]` adds to a step: its closed form, its draws, images by the base, and exactness after a stop."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from chroma_core.data.captions import without_trigger
from chroma_core.errors import ConfigError
from chroma_core.loading.load import load_transformer
from chroma_core.memory.plan import Settings, peaks, step_cost, step_traffic
from chroma_core.training.config import PreserveConfig, TrainingConfig
from chroma_core.training.control import Control, Halted
from chroma_core.training.run.faults import plan_settings
from chroma_core.training.run.metrics import JobPaths
from chroma_core.training.run.run import run_training
from chroma_core.training.run.stepper import Stepper
from chroma_core.training.step.objective import add_noise, predict_velocity, training_target
from training_cases import Bench, bench, config, model_folder, steps, write_dataset

PROMPTS = ("a house", "a tree by the sea")
KINDS = {
    "class": {"class_weight": 0.7, "class_word": "dog"},
    "blank": {"blank_weight": 0.7},
    "prompts": {"prompts": PROMPTS, "prompts_weight": 0.7, "images": 0},
}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preserve")
    return model_folder(folder / "model"), write_dataset(folder / "data", 6), folder / "cache"


class Watched(Stepper):
    """Keeps the gradient of the step that it takes."""

    def apply(self, *args):
        self.gradient = [parameter.grad for parameter in self.parameters]
        return super().apply(*args)


def preserving(places, preserve: dict, **changes) -> Bench:
    """A bench whose adapter has moved, with a trigger word."""
    data = {"folder": str(places[1]), "trigger": "sks", "caption_dropout": 0.0}
    made = bench(places, **{"dataset": data, "max_grad_norm": 0, "preserve": {"share": 1, **preserve}, **changes})
    made.stepper = Watched(made.parameters, made.config.optimizer_settings(), made.trained.factors)
    with torch.no_grad():
        for i, parameter in enumerate(made.parameters):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_the_closed_form(places, kind):
    """∇ of mean (v(c) − (ε − x₀))² + w · mean (v(c′) − v₀(c′))², where v₀ is a model that never had an adapter."""
    made = preserving(places, KINDS[kind], batch_size=2)
    base = load_transformer(made.config.model, "cpu")
    batch = made.batches[0]
    x = add_noise(batch.latents, batch.noise, batch.sigmas)
    written = [condition.text for condition in batch.conditions]
    if kind == "class":
        others = [caption.replace("sks", "dog") for caption in written]
    else:
        others = [c.text for c in batch.beside.conditions] if kind == "prompts" else ["", ""]
        assert set(others) <= {"", *PROMPTS}
    conditions = [made.data.cache.text(other) for other in others]
    velocity = predict_velocity(made.transformer, x, batch.sigmas, batch.conditions)
    with torch.no_grad():
        target = predict_velocity(base, x, batch.sigmas, conditions)
    moved = predict_velocity(made.transformer, x, batch.sigmas, conditions) - target
    plain = (velocity - training_target(batch.latents, batch.noise)).square().mean()
    kept = 0.7 * moved.square().mean()
    gradient = torch.autograd.grad(plain + kept, made.parameters)
    (result,) = steps(made, 1)
    assert (result.loss, result.preserved) == pytest.approx((plain.item(), kept.item()), rel=1e-5)
    for found, expected in zip(made.stepper.gradient, gradient, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("adapter", ("lora", "dora", "lokr"))
def test_an_adapter_that_adds_nothing_has_nothing_to_give_back(places, adapter):
    model = config(*places[:2]).model.to_dict() | {"precision": "int8" if adapter == "lora" else "fp32"}
    made = bench(places, lora={"rank": 4, "kind": adapter}, model=model, preserve={"blank_weight": 5.0, "share": 0.5})
    results = steps(made, 4)
    assert [result.preserved is None for result in results] == [True, False, True, False]
    made = bench(places, lora={"rank": 4, "kind": adapter}, model=model, preserve={"blank_weight": 5.0, "share": 1})
    first, second = steps(made, 2)
    assert first.preserved == 0.0 and second.preserved is not None and second.preserved > 0


def test_accumulation_equals_a_larger_batch(places):
    found = []
    for batch_size, accumulation in ((4, 1), (1, 4)):
        preserve = {**KINDS["class"], **KINDS["prompts"]}
        made = preserving(places, preserve, batch_size=batch_size, gradient_accumulation=accumulation)
        found.append([(r.loss, r.preserved, r.grad_norm) for r in steps(made, 2)])
    assert found[0] == [pytest.approx(values, abs=1e-5) for values in found[1]]


def test_passes_lie_evenly_and_kinds_take_turns():
    for share in (0.01, 0.25, 1 / 3, 0.7, 1.0):
        options = PreserveConfig(class_weight=1, blank_weight=2, prompts=PROMPTS, share=share)
        turns = [options.turn(step) for step in range(600)]
        for n in range(601):
            assert sum(turn is not None for turn in turns[:n]) == math.floor(n * share)
        kinds = [turn for turn in turns if turn]
        assert kinds[:6] == ["class", "blank", "prompts"] * 2 and len(kinds) == math.floor(600 * share)
    assert PreserveConfig(share=1).turn(0) is None and PreserveConfig(prompts=PROMPTS, prompts_weight=0).turn(3) is None


def test_the_trigger_word_is_replaced_as_a_word():
    assert without_trigger("a SKS dog, sks2 and (sks)", ["sks"], "red") == "a red dog, sks2 and (red)"
    assert without_trigger("a sks dog", ["sks", "sks dog"]) == "a"
    assert without_trigger("two  blanks", ["sks"], "red") == "two  blanks"


def settings(places, **changes) -> TrainingConfig:
    data = {"folder": str(places[1]), "trigger": "sks"}
    preserve = {"prompts": PROMPTS, "blank_weight": 1, "class_weight": 1, "share": 0.7}
    return config(*places[:2], **{"dataset": data, "validate_every": 0, "steps": 6, "preserve": preserve, **changes})


def run(made: TrainingConfig, root: Path, end_at: str = "") -> tuple[dict, list[str]]:
    """A job in this thread, asked to end when its message begins with `end_at`, or at step 3; weights and messages."""
    paths, control, said = JobPaths.of(root / "jobs", made.job_id(), root / "loras"), Control(), []
    paths.job.mkdir(parents=True, exist_ok=True)

    def report(**fields):
        said.append(fields.get("message", ""))
        if end_at and said[-1].startswith(end_at):
            control.stop.set()
        if end_at == "halt" and fields.get("step") == 3:
            control.halt.set()

    state, files = run_training(made, paths, "cpu", control, report)
    return (load_file(files["lora_path"]) if state == "completed" else {}), said


def test_a_job_that_ends_while_images_are_generated_or_later_goes_on_with_the_same_bits(places, tmp_path):
    made = settings(places)
    whole, said = run(made, tmp_path / "whole")
    entries = sorted((tmp_path / "whole/jobs/cache/generated").rglob("*.safetensors"))
    assert len(entries) == len(PROMPTS) and "caching images of preserved prompts: 1 of 2" in said
    ended, _ = run(made, tmp_path / "parts", "caching images of preserved prompts: 1 of 2")
    assert not ended and len(list((tmp_path / "parts/jobs/cache/generated").rglob("*.safetensors"))) == 1
    with pytest.raises(Halted):
        run(made, tmp_path / "parts", "halt")
    again, said = run(made, tmp_path / "parts")
    assert not any("preserved prompts" in message for message in said), "they are there already"
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)
    for entry in entries:
        twin = tmp_path / "parts" / entry.relative_to(tmp_path / "whole")
        assert torch.equal(load_file(entry)["latents"], load_file(twin)["latents"])


def test_what_cannot_work_is_refused_in_words(places):
    plain = config(*places[:2])
    assert (
        config(*places[:2], preserve={}).job_id()
        == plain.job_id()
        == config(*places[:2], preserve={"share": 0.25}).job_id()
    )
    assert settings(places).job_id() != plain.job_id()
    for preserve, trigger, message in (
        ({"class_weight": 1}, "", "no dataset has one"),
        ({"class_word": "dog"}, "sks", "class_weight is 0"),
        ({"prompts": ["a sks house"]}, "sks", "calls the concept"),
        ({"prompts": ["a [trigger] house"]}, "sks", "calls the concept"),
        ({"prompts": [" "]}, "sks", "is empty"),
        ({"blank_weight": math.inf}, "sks", "less than or equal to 100"),
        ({"blank_weight": 1, "share": 0}, "sks", "greater than 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            config(*places[:2], dataset={"folder": str(places[1]), "trigger": trigger}, preserve=preserve)
    with pytest.raises(ConfigError, match="there is no such model any more"):
        TrainingConfig.parse(
            {
                **plain.model_dump(exclude={"lora", "preserve"}),
                "full": {"target": "single_blocks.0"},
                "preserve": {"blank_weight": 1},
            }
        )


def test_the_plan_counts_a_second_pass(places):
    made = plan_settings(settings(places))
    assert made.preserved == 0.7 and plan_settings(config(*places[:2])).preserved == 0
    for interval, cost in ((0, 1.5), (1, 13 / 9)):
        third = Settings(preserved=1 / 3, gradient_checkpointing=interval > 0)
        assert step_cost(third) == pytest.approx(cost) and step_cost(Settings()) == 1
        found, plain = peaks(third), peaks(Settings(gradient_checkpointing=interval > 0))
        assert 0 < found.moments["target of the second pass"] < found.moments["step"]
        assert found.training == plain.training
    streamed = Settings(precision="int8", offload="block")
    more = step_traffic(Settings(precision="int8", offload="block", preserved=1)) / step_traffic(streamed)
    assert more == pytest.approx(2.5, rel=0.05)
