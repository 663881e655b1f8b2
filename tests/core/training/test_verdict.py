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


def test_captions_that_are_alike_are_named():
    found = verdict(Record.of(lines(LEVEL, images=14, captions=1)))
    assert found is not None and found.sentence.startswith("Too few different captions: 1 for 14 images")


def test_without_a_validation_loss_nothing_is_said():
    assert verdict(Record.of([])) is None
    assert verdict(Record.of([{"step": 1, "loss": 0.5, "lr": 1e-3, "grad_norm": 1.0}])) is None


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
