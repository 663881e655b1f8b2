"""The curve of a job: read on from where it was, thinned with its spikes, begun anew when steps were taken back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chroma_core.training.jobs.curve import COLUMNS, Curve
from chroma_core.training.run.metrics import MetricsLog
from chroma_core.training.step.objective import HELDOUT_SIGMAS


def step(number: int, loss: float) -> dict[str, float]:
    fixed = {"loss_smooth": 0.5, "lr": 2e-4, "grad_norm": 1.5, "sigma": 0.4, "seconds": 0.1}
    return {"step": number, "loss": loss, **fixed}


def write(path: Path, count: int, first: int = 1, spike: int | None = None) -> MetricsLog:
    log = MetricsLog(path)
    for number in range(first, first + count):
        log.append(**step(number, 9.0 if number == spike else 0.3 + 0.0001 * (number % 7)))
    return log


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def test_a_job_without_a_file_has_an_empty_curve(path: Path):
    found = Curve(path).read()
    assert found["total"] == 0 and all(found[name] == [] for name in COLUMNS)
    assert found["heldout"] == found["notes"] == [] and found["base"] is None
    assert found["sigmas"] == list(HELDOUT_SIGMAS)


def test_every_kind_of_line_has_its_place(path: Path):
    log = write(path, 3)
    by_sigma = [0.1 * i for i in range(10)]
    log.append(step=0, heldout_loss_base=0.6, heldout_by_sigma_base=by_sigma)
    log.append(step=3, heldout_loss=0.4, heldout_by_sigma=by_sigma)
    log.append(step=4, skipped="broken", lr=1e-4)
    log.append(step=5, warning="far above")
    found = Curve(path).read()
    assert found["step"] == [1, 2, 3] and found["lr"] == [2e-4] * 3
    assert found["base"] == {"loss": 0.6, "by_sigma": by_sigma}
    assert found["heldout"] == [{"step": 3, "loss": 0.4, "by_sigma": by_sigma}]
    assert [note.get("skipped") or note.get("warning") for note in found["notes"]] == ["broken", "far above"]
    json.dumps(found, allow_nan=False)


def test_a_long_curve_is_thinned_and_keeps_its_spike_and_its_end(path: Path):
    write(path, 20_000, spike=12_345)
    found = Curve(path).read(points=400)
    assert found["total"] == 20_000 and 200 <= len(found["step"]) <= 402
    assert found["step"] == sorted(set(found["step"])) and found["step"][-1] == 20_000
    spike = found["step"].index(12_345)
    assert found["loss"][spike] == 9.0 and max(found["loss"]) == 9.0


def test_only_what_is_new_is_sent_to_who_has_the_rest(path: Path):
    log = write(path, 10)
    curve = Curve(path)
    first = curve.read()
    log.append(step=10, heldout_loss=0.4, heldout_by_sigma=None)
    log.append(**step(11, 0.2))
    more = curve.read(after=10, token=first["token"])
    assert more["continued"] and more["step"] == [11] and more["total"] == 11
    assert [entry["step"] for entry in more["heldout"]] == [10], "measured at the step that was sent already"
    everything = curve.read(after=10, token="of another reading")
    assert not everything["continued"] and everything["step"] == list(range(1, 12))


def test_a_resume_takes_steps_back_and_who_had_them_gets_all_anew(path: Path):
    log = write(path, 10)
    length = path.read_bytes().index(b'{"step": 7')
    curve = Curve(path)
    before = curve.read()
    log.truncate(length)
    write(path, 9, first=7, spike=8)  # longer than before: only the bytes tell
    after = curve.read(after=10, token=before["token"])
    assert after["token"] != before["token"] and not after["continued"]
    assert after["step"] == list(range(1, 16)) and after["loss"][7] == 9.0


def test_a_line_that_is_being_written_waits_and_one_that_was_cut_off_is_left_out(path: Path):
    write(path, 2)
    curve = Curve(path)
    curve.read()
    line = json.dumps(step(3, 0.25))
    with path.open("a") as file:
        file.write(line[:20])
    assert curve.read()["total"] == 2
    with path.open("a") as file:
        file.write(line[20:] + "\n" + '{"step": 4, "lo\n' + json.dumps(step(5, float("nan"))) + "\n")
    found = curve.read()
    assert found["step"] == [1, 2, 3, 5] and found["loss"][-1] is None
