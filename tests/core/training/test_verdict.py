"""What is said of a job: a function of its metrics, right on drawn curves, the same however the job came there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chroma_core.training.jobs.curve import Curve
from chroma_core.training.run.verdict import Record, memorising_for, verdict

BASE = 1.0


def lines(losses: list[float], every: int = 10, rate: float = 1e-3, images: int = 14, captions: int = 14) -> list[Any]:
    """The metrics of a job that was validated `every` steps."""
    at_base: dict[str, Any] = {"step": 0, "heldout_loss_base": BASE, "heldout_by_sigma_base": [BASE] * 10}
    found = [{**at_base, "images": images, "captions": captions}]
    found.append({"step": 0, "heldout_loss": BASE, "heldout_by_sigma": [BASE] * 10})
    for count, loss in enumerate(losses):
        for step in range(count * every + 1, count * every + every + 1):
            found.append({"step": step, "loss": 0.5, "loss_smooth": 0.5, "lr": rate, "grad_norm": 1.0})
        found.append({"step": count * every + every, "heldout_loss": loss, "heldout_by_sigma": [loss] * 10})
    return found


FALLING = [0.9, 0.8, 0.72, 0.65, 0.59, 0.54, 0.5, 0.46]
LEVEL = [0.8, 0.65, 0.56, 0.52, 0.5, 0.502, 0.501, 0.503]
RISING = [0.8, 0.6, 0.5, 0.51, 0.59, 0.62, 0.65, 0.7]
WILD = [0.8, 0.6, 0.5, 0.9, 1.3, 1.1, 1.6, 1.4]
NEVER = [1.3, 1.2, 1.4, 1.3, 1.35, 1.3, 1.4, 1.5]


@pytest.mark.parametrize(
    "losses, kind, step, command",
    [
        (FALLING[:3], "early", 30, ""),
        (FALLING, "learning", 80, "train --resume j --extend 40"),
        (LEVEL, "settled", 50, "jobs use j 50"),
        (RISING, "memorises", 30, "jobs use j 30"),
        (WILD, "hot", 30, "train --branch j --step 30 --learning-rate 0.0005"),
        (NEVER, "worse", 0, "train --branch j --learning-rate 0.0005"),
    ],
)
def test_each_curve_has_its_sentence(losses: list[float], kind: str, step: int, command: str):
    found = verdict(Record.of(lines(losses)))
    assert found is not None and (found.kind, found.step, found.at) == (kind, step, 10 * len(losses))
    assert found.command("j") == (f"python -m chroma_core {command}" if command else "")
    told = found.to_dict("j")
    assert json.loads(json.dumps(told, allow_nan=False)) == told and told["sentence"].endswith(".")


@pytest.mark.parametrize("heldout_images, kind", [(2, "settled"), (9, "memorises"), (None, "memorises")])
def test_a_rise_must_be_clear_for_so_many_images(heldout_images: int | None, kind: str):
    """Of 15 % of the gain; by how much their mean may rise by chance goes with the root of their number."""
    risen = [0.8, 0.65, 0.56, 0.53, 0.5, 0.56, 0.57, 0.58]
    base, *rest = lines(risen)
    found = verdict(Record.of([base | ({"heldout_images": heldout_images} if heldout_images else {}), *rest]))
    assert found is not None and found.kind == kind, found.evidence


def test_captions_that_are_alike_are_named():
    found = verdict(Record.of(lines(LEVEL, images=14, captions=1)))
    assert found is not None and found.sentence.startswith("Too few different captions: 1 for 14 images")


def alone(change: float, steps: int = 60, captions: int = 14, spikes: int = 0) -> list[Any]:
    """The metrics of a job that holds nothing out: its loss, which the noise level decides most of, changes by that
    factor from the first step to the last; so many steps have ten times the gradient norm of the others."""
    found: list[Any] = [{"step": 0, "images": 14, "captions": captions}]
    for step in range(1, steps + 1):
        sigma = (0.37 * step) % 1
        loss = (0.2 + sigma**2) * change ** (step / steps)
        norm = 10.0 if step > steps - spikes else 1.0
        found.append({"step": step, "loss": loss, "lr": 1e-3, "grad_norm": norm, "sigma": sigma})
    return found


@pytest.mark.parametrize(
    "metrics, kind, command",
    [
        (alone(2), "diverged", "train --branch j --learning-rate 0.0005"),
        (alone(0.7, spikes=2), "unsteady", "train --branch j --learning-rate 0.0005"),
        (alone(0.7, captions=2), "captions", ""),
        (alone(0.7), "falling", "train --resume j --extend 30"),
        (alone(0.7, spikes=1), "falling", "train --resume j --extend 30"),
        (alone(0.3), "fallen", ""),
        (alone(1), "unclear", ""),
        ([{**line, "sigma": 0.5} for line in alone(0.9)], "unclear", ""),
        ([*alone(0.7), {"step": 61, "skipped": "broken"}], "unsteady", "train --branch j --learning-rate 0.0005"),
    ],
)
def test_without_held_out_images_training_loss_and_gradient_norm_speak(metrics: list[Any], kind: str, command: str):
    """Losses are compared at like noise levels: with those taken for the same, a fall drowns in their scatter."""
    found = verdict(Record.of(metrics))
    assert found is not None and (found.kind, found.step, found.at, found.measured) == (kind, 0, 60, False)
    assert found.command("j") == (f"python -m chroma_core {command}" if command else "")
    told = found.to_dict("j")
    assert json.loads(json.dumps(told, allow_nan=False)) == told and told["sentence"].endswith(".")
    assert memorising_for(metrics) == 0 and verdict(Record.of(metrics[:24])) is None


def test_held_out_images_have_the_word_once_they_were_measured():
    """Whatever training loss and gradient norm are then."""
    first, at_base, *rest = lines(FALLING)
    for line in rest:
        line.update({"loss": line["step"], "grad_norm": 2.0 ** line["step"], "sigma": 0.5} if "loss" in line else {})
    found = [verdict(Record.of([first, at_base, *rest[:n]])) for n in range(len(rest) + 1)]
    assert {each.kind for each in found if each} == {"early", "learning"}
    before = verdict(Record.of([first, *[line for line in rest if "loss" in line]]))
    assert before is not None and before.kind == "diverged"


def test_a_step_that_broke_is_never_all_well():
    found = verdict(Record.of([*lines(LEVEL), {"step": 81, "skipped": "broken", "lr": 1e-3}]))
    assert found is not None and found.kind == "hot"
    found = verdict(Record.of([*lines(LEVEL), {"step": 81, "skipped": "scale", "lr": 1e-3}]))
    assert found is not None and found.kind == "settled", "a smaller loss scale is no fault"


def test_how_long_it_has_memorised():
    assert memorising_for(lines(RISING)) == 4
    assert memorising_for(lines([*RISING, 0.45])) == 0, "a better step was found after all"
    assert memorising_for(lines(LEVEL)) == memorising_for([]) == 0


def test_the_file_alone_decides(tmp_path: Path):
    """Read whole, read on bit by bit, or read again after a kill and a resume that took steps back: the same."""
    text = [json.dumps(line) + "\n" for line in lines(RISING)]
    path = tmp_path / "j" / "metrics.jsonl"
    path.parent.mkdir()
    curve = Curve(path)
    said = []
    for end in range(1, len(text) + 1):
        path.write_text("".join(text[:end]))
        found = verdict(Record.of(map(json.loads, text[:end])))
        said.append(found and found.to_dict("j"))
        assert curve.read()["verdict"] == said[-1]
    path.write_text("".join(text[:40]))  # killed; its newest checkpoint was made then
    assert curve.read()["verdict"] == said[39]
    path.write_text("".join(text) + '{"step": 81, "lo')
    assert curve.read()["verdict"] == said[-1]
