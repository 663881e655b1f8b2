"""Whatever a program may send in the place of a value is used, or refused in words: nothing else is ever raised."""

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from chroma_core.errors import ChromaKitError
from chroma_core.requests.request import InferenceRequest
from chroma_core.training.config import TrainingConfig

ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 10**400, -(10**400), 1e308, float("nan"), float("inf"), 42.0),
    *("", "x" * 5000, "\ud800", "\x00", "../../etc/passwd", "1e999"),
    *([], {}, [[]], [None], {"a": 1}, ["\ud800"], [1, 2, 3], {"": {}}),
)
JOB = {
    "name": "x",
    "dataset": {"folder": "/tmp"},
    "more_datasets": [{"folder": "/tmp"}],
    "validation_dataset": {"folder": "/tmp"},
    "previews": {"prompts": ["a", {"prompt": "b", "width": 64}]},
}
REQUEST = {
    "prompts": ["a", {"prompt": "b", "width": 64, "height": 64, "seed": 1, "neg": "c", "sample_steps": 2}],
    "loras": [{"path": "a.safetensors", "network_multiplier": 0.5}],
    "model": "chroma",
    "guidance_scale": 4.0,
    "output_dir": "x",
}


def places(value: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in nested values, the whole first."""
    yield before
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield from places(each, (*before, key))


def with_value(values: Any, place: tuple[Any, ...], odd: Any) -> Any:
    if not place:
        return odd
    values = copy.deepcopy(values)
    at = values
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = odd
    return values


def swallowed(parse: Callable[[Any], Any], values: Any) -> tuple[int, list[str]]:
    """How many were tried, and what was raised that is no error of ours."""
    tried, found = 0, []
    for place in places(values):
        for odd in ODD:
            tried += 1
            try:
                parse(with_value(values, place, odd))
            except ChromaKitError as error:
                assert str(error).strip()
            except Exception as error:
                found.append(f"{place} = {str(odd)[:40]!r}: {type(error).__name__}: {error}")
    return tried, found


def test_a_jobs_configuration():
    whole = TrainingConfig.parse(JOB).model_dump(mode="json")
    tried, found = swallowed(TrainingConfig.parse, whole)
    assert tried > 3000 and not found, "\n".join(found)


def test_an_inference_request():
    tried, found = swallowed(InferenceRequest.parse, REQUEST)
    assert tried > 200 and not found, "\n".join(found)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "1" * 5000, b"\xff", "", "nul", '{"a":1,"a":2}'])
def test_a_requests_text(text):
    with pytest.raises(ChromaKitError, match="not valid JSON|must be a JSON object|twice"):
        InferenceRequest.read(text)


def test_every_value_of_a_job_comes_back_from_json():
    whole = TrainingConfig.parse(JOB).model_dump(mode="json")
    assert TrainingConfig.parse(json.loads(json.dumps(whole))).job_id() == TrainingConfig.parse(JOB).job_id()
