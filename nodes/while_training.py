"""What prompts do while a training job is at work: the choice of this host, kept in a file, and what follows from it.

`yield`: they run, and the job makes way. `finish`: they wait in ComfyUI's queue until no job is at work. `refuse`:
they are not accepted. Prompts that need no device run in any case, so that a job can be looked at and another queued.
"""

from __future__ import annotations

import json
import threading
from contextlib import suppress
from typing import Any, Literal, cast

from typing_extensions import TypedDict

from ..chroma_core.errors import ConfigError, JobError, check_choice
from ..chroma_core.files import check_format, write_json
from ..chroma_core.training.jobs.manager import JobStatus
from . import host, jobs

NAME = "prompts_while_training"
FORMAT = 1
"""Of the file; without a number it is the first."""
EVENT = "chromakit.settings"
"""The websocket event that carries what `settings` answers."""

YIELD, FINISH, REFUSE = CHOICES = ("yield", "finish", "refuse")

WITHOUT_DEVICE = frozenset(
    {
        "ChromaLoadModel", "ChromaDataset", "ChromaDatasetFromImages", "ChromaCombineDatasets",
        "ChromaTrainingSettings", "ChromaTrainLora", "ChromaWaitForTraining", "ChromaTrainingStatus",
        "LoadImage", "PreviewAny", "PreviewImage", "SaveImage", "LossGraphNode", "SaveLoRA",
        "PrimitiveString", "PrimitiveStringMultiline", "PrimitiveInt", "PrimitiveFloat", "PrimitiveBoolean",
    }
)  # fmt: skip
"""Nodes, ComfyUI's among them, that compute nothing on the device. Chroma Load Model only describes the model."""


class Choice(TypedDict):
    """What can be chosen."""

    prompts_while_training: Literal["yield", "finish", "refuse"]


class Chosen(Choice):
    """The choice, what else can be chosen in this ComfyUI, and how many prompts are held now (`finish`)."""

    choices: list[str]
    held: int


DETAILS = "This host takes no prompts while a training job is at work, but for those that need no device."

_changing = threading.Lock()
_choice = YIELD
_choices: tuple[str, ...] = (YIELD,)


def start() -> None:
    """Read the choice and see to it that it has effect. Called once, when ComfyUI loads the pack."""
    global _choice, _choices
    can = {
        YIELD: True,
        FINISH: host.watch_prompts(_holds, _passes, host.before_prompt),
        REFUSE: host.refuse_prompts(refusal, DETAILS, _passes),
    }
    _choices = tuple(choice for choice in CHOICES if can[choice])
    if missing := [choice for choice in CHOICES if not can[choice]]:
        host.log.warning(
            "ChromaKit: this version of ComfyUI cannot let prompts %s while a job trains; see %s in docs/training.md.",
            " or ".join(missing),
            NAME,
        )
    try:
        _choice = _read()
    except (OSError, ValueError, ConfigError) as error:
        host.log.warning("ChromaKit: '%s' is not used: %s. While training, prompts: %s.", _path(), error, _choice)


def _path() -> Any:
    return host.settings_file()


def _read() -> str:
    """The choice in the file. Raises OSError, ValueError for what is none, ConfigError for a later version's."""
    try:
        found = json.loads(_path().read_text(encoding="utf-8"))
    except FileNotFoundError:
        return YIELD
    if isinstance(found, dict):
        check_format(f"'{_path()}'", found.get("format"), FORMAT)
    chosen = found.get(NAME, YIELD) if isinstance(found, dict) else found
    if chosen not in _choices:
        raise ValueError(f"{NAME} is {chosen!r}; it must be one of {', '.join(_choices)}")
    return chosen


def settings() -> Chosen:
    """How it is now."""
    return cast(Chosen, {NAME: _choice, "choices": list(_choices), "held": host.held_prompts()})


def change(values: Any) -> Chosen:
    """Choose, from {prompts_while_training: …}; it holds at once, is kept, and every page is told.

    Returns `settings`. Raises ConfigError for anything else, and where a later version wrote the file; OSError when it
    cannot be written (then nothing changes).
    """
    global _choice
    if not isinstance(values, dict) or set(values) != {NAME}:
        found = ", ".join(map(str, values)) or "nothing" if isinstance(values, dict) else type(values).__name__
        raise ConfigError(f"The settings are a JSON object with {NAME} and nothing else; found {found}.")
    chosen = values[NAME]
    check_choice(NAME, chosen, _choices)
    with _changing:
        with suppress(OSError, ValueError):
            _read()
        write_json(_path(), {"format": FORMAT, NAME: chosen})
        _choice = chosen
    host.wake_prompts()
    host.broadcast(EVENT, found := settings())
    return found


def refusal() -> str | None:
    """Why a prompt is refused now, and what to do; None when it is not (any thread).

    Short, and without a full stop: the window shows about 130 letters of it.
    """
    job = jobs.at_work() if _choice == REFUSE else None
    if job is None:
        return None
    return (
        f"Refused while '{job['name']}' trains ({_how_far(job)}). Pause the job, wait, or choose otherwise in "
        "Settings → Chroma"
    )


def check_accepted() -> None:
    """Raises JobError with the refusal, if prompts are refused now."""
    if reason := refusal():
        raise JobError(f"{reason}. {DETAILS}")


def _how_far(job: JobStatus) -> str:
    if job["state"] != "running":
        return job["state"]
    words, left = f"step {job['step']} of {job['steps']}", job.get("eta_seconds")
    for unit, seconds in (("h", 3600), ("min", 60), ("s", 1)):
        if left and left >= 2 * seconds:
            return f"{words}, about {round(left / seconds)} {unit} left"
    return words


def _holds() -> bool:
    return _choice == FINISH and jobs.at_work() is not None


def _passes(prompt: dict[str, Any], outputs: list[str] | None) -> bool:
    return not needs_device(prompt, outputs)


def needs_device(prompt: dict[str, Any], outputs: list[str] | None = None) -> bool:
    """Whether a node of an API-format prompt, of those that `outputs` (ids; None: all nodes) need, is not known to do
    without the device."""
    left, seen = [key for key in (prompt if outputs is None else outputs) if isinstance(key, str)], set()
    while left:
        key = left.pop()
        node = prompt.get(key)
        if key in seen or not isinstance(node, dict):
            continue
        seen.add(key)
        if node.get("class_type") not in WITHOUT_DEVICE:
            return True
        inputs = node.get("inputs")
        values = inputs.values() if isinstance(inputs, dict) else ()
        left += [value[0] for value in values if isinstance(value, list) and value and isinstance(value[0], str)]
    return False
