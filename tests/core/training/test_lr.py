"""Learning-rate schedules: the old ones to the last bit, and the new ones in numbers."""

import math

import pytest

from chroma_core.errors import ConfigError
from chroma_core.training.step.optimizers import Schedule
from training_cases import config


def test_old_learning_rates_are_the_same_to_the_last_bit(tmp_path):
    for steps, warmup, peak in ((10, 0, 1.0), (1000, 37, 2e-4), (7, 9, 3e-3)):
        for kind in ("constant", "linear", "cosine"):
            made = config(tmp_path, tmp_path, lr_schedule=kind, warmup_steps=warmup, steps=steps, learning_rate=peak)
            for step in range(steps):
                progress = (step - warmup) / max(1, steps - warmup)
                factor = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
                expected = peak * (step + 1) / warmup if step < warmup else peak * factor[kind]
                assert made.schedule().at(step) == expected
                assert Schedule(kind, peak, steps, warmup).at(step) == expected


def test_new_learning_rates():
    def rates(kind, count=10, **values) -> list[float]:
        schedule = Schedule(kind, 1.0, count, **values)
        return [round(schedule.at(step), 4) for step in range(count)]

    assert rates("restarts") == rates("cosine")
    assert rates("restarts", cycles=2) == rates("cosine", 5) * 2
    assert rates("restarts", 7, cycles=3)[:1] == [1.0] and min(rates("restarts", 7, cycles=3)) > 0
    assert rates("restarts", 12, warmup_steps=2, cycles=5)[2::2] == [1.0] * 5
    assert rates("polynomial", power=1.0) == rates("linear")
    assert rates("polynomial", 5, warmup_steps=1, power=2.0) == [1.0, 1.0, 0.5625, 0.25, 0.0625]
    assert Schedule("polynomial", 1.0, 10).at(10) == 0.0
    for values in ({"kind": "step"}, {"learning_rate": 0.0}, {"warmup_steps": -1}, {"cycles": 0}, {"power": 0.0}):
        with pytest.raises(ConfigError):
            Schedule(**values)
