"""One job as its folder knows it: state, numbers, files. Survives the process that made it."""

from __future__ import annotations

import os
import shutil
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, cast

from filelock import FileLock, Timeout
from typing_extensions import TypedDict  # typing's own has no schema before Python 3.12

from ...errors import ChromaKitError, ConfigError, JobError, counted, first_few, first_line
from ...files import check_format, read_json, write_json
from ..config import TrainingConfig
from ..run.kept import kept_loras
from ..run.metrics import MetricsLog
from ..run.verdict import Record, Verdict, verdict
from .curve import Curve

JobState = Literal["queued", "preparing", "running", "paused", "completed", "stopped", "failed", "interrupted"]
ACTIVE: tuple[JobState, ...] = ("queued", "preparing", "running", "paused")
"""States of a job that a manager works on; found in a folder of a dead process they mean `interrupted`."""

FORMAT = 1
"""Of a job's folder with all that is in it. Raised whenever an older version would misread it."""

WRITE_EVERY_SECONDS = 5.0
NOTIFY_EVERY_SECONDS = 0.5


class JobEnd(TypedDict):
    """How a job stands, in the fewest words; all that a rank of a distributed run other than 0 knows of it."""

    state: JobState
    message: str


class JobProgress(JobEnd):
    """What changes of a job while it is worked on, without what only one who looks into it needs.

    loss, loss_smooth, lr, heldout_loss: of the newest step that has one. step_seconds: running mean; eta_seconds: time
    left, by it. checkpoint: step of the newest one. best_step: of the lowest validation loss. verdict: at the
    newest step to validate at (see `run.verdict`). held_out: images of the dataset that are measured on instead of
    trained. yielded: whether the trainer waits for a prompt. waits_for: `prompt`, `memory` (until ComfyUI makes room),
    or nothing. created, updated: Unix time.
    """

    step: int
    steps: int
    loss: float | None
    loss_smooth: float | None
    lr: float | None
    step_seconds: float | None
    eta_seconds: float | None
    lora_name: str | None
    model_name: str | None
    model_folder: str | None
    heldout_loss_base: float | None
    heldout_loss: float | None
    best_step: int | None
    verdict: dict[str, Any] | None
    held_out: list[str]
    train_seconds: float
    skipped_steps: int
    checkpoint: int | None
    yielded: bool
    waits_for: Literal["", "prompt", "memory"]
    created: float
    updated: float


class JobValues(JobProgress):
    """All that changes of a job. changes: options changed since the start (see `changes.entry`). memory: bytes (see
    `device.OwnMemory`).
    """

    warnings: list[str]
    changes: list[dict[str, Any]]
    lora_path: str | None
    model_path: str | None
    base_sha256: str | None
    memory: dict[str, int] | None


class JobStatus(JobValues):
    """A job as routes and listeners have it, and `job.json` but for `elsewhere`.

    samples: names of the preview images, oldest first. elsewhere: whether another process works on it. kept:
    `{step, used}` of the LoRAs in its folder; used: the name under which one was put into the LoRA folder.
    """

    id: str
    name: str
    elsewhere: bool
    samples: list[str]
    kept: list[dict[str, Any]]
    config: dict[str, Any]
    recipe: dict[str, Any]


class JobSummary(JobProgress):
    """What a list of jobs shows. kind: `lora` or `full`."""

    id: str
    name: str
    elsewhere: bool
    flavour: str
    kind: Literal["lora", "full"]
    warning_count: int


def _fresh(config: TrainingConfig) -> dict[str, Any]:
    """The `JobValues` of a job that has not begun; what is not named here is not known yet: None."""
    now = time.time()
    values: dict[str, Any] = {**dict.fromkeys(JobValues.__annotations__), "created": now, "updated": now}
    values |= {
        "state": "queued",
        "message": "",
        "step": 0,
        "steps": config.steps,
        "warnings": [],
        "changes": [],
        "held_out": [],
    }
    return {**values, "train_seconds": 0.0, "skipped_steps": 0, "yielded": False, "waits_for": ""}


class FolderLock:
    """Says that a living process works on a folder, from `take` to `let_go`; the system ends it when that dies."""

    def __init__(self, folder: Path):
        self._path = folder / ".lock"
        self._file = FileLock(self._path, thread_local=False)

    @property
    def held(self) -> bool:
        """Whether it is ours."""
        return self._file.is_locked

    def take(self) -> bool:
        """Whether it is ours from now on: False when another has it, or there is no such folder. Never waits.

        Raises OSError when the folder may not be written to.
        """
        if self.held:
            return True
        if not self._path.parent.is_dir():
            return False
        before = _identity(self._path)
        try:
            self._file.acquire(timeout=0)
        except Timeout:
            return False
        now = _identity(self._path)
        # What was renamed away in this moment is locked. Times say nothing: some versions of filelock truncate.
        if before and (not now or before[0] != now[0]):
            self.let_go()
            return False
        return True

    def let_go(self) -> None:
        """Let others have it."""
        self._file.release()


def _identity(path: Path) -> tuple[int, int, int] | None:
    """Another one for each file that was ever put in a path's place; None where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


class Job:
    """A job's status, kept in memory and in `job.json`.

    `job.json` is written at every change of state and at most every few seconds in between; the metrics and checkpoints
    have files of their own. Only who holds `lock` writes to the folder; what others wrote is taken over by `reread`.
    """

    def __init__(self, folder: Path, config: TrainingConfig, earlier: Mapping[str, Any] | None = None):
        self.folder = folder
        self.lock, self.elsewhere = FolderLock(folder), False
        self.notify: Callable[[JobStatus], None] = lambda status: None
        self.ended = threading.Event()
        self.curve = Curve(folder / "metrics.jsonl")
        self._lock, self._writing = threading.RLock(), threading.Lock()
        self._written = self._notified = 0.0
        self._seen: object = None
        self._take_over(config, earlier or {})

    @classmethod
    def read(cls, folder: Path) -> Job:
        """Open the job of an earlier session.

        Raises JobError for one of a later version, KeyError or ConfigError for a foreign folder.
        """
        seen = _identity(folder / "job.json")
        job = cls(folder, *_read(folder))
        job._seen = seen
        return job

    def reread(self) -> bool:
        """Take over what another process has written since; says whether there was anything.

        Raises as `read`; the job is then as before.
        """
        seen = _identity(self.folder / "job.json")
        if seen in (None, self._seen):
            return False
        config, values = _read(self.folder)
        with self._lock:
            known = self._values["updated"]
            self._take_over(config, values)
            self._values["updated"] = max(self._values["updated"], known + 1e-6)
            self._seen = seen
        return True

    def _take_over(self, config: TrainingConfig, values: Mapping[str, Any]) -> None:
        self.config = config
        known = _fresh(config)
        self._values = known | {name: value for name, value in values.items() if name in known}
        self._tell_waiting()

    @property
    def id(self) -> str:
        """The folder's name: that of the options it began with, whatever was changed since."""
        return self.folder.name

    @property
    def state(self) -> JobState:
        return self._values["state"]

    def status(self) -> JobStatus:
        """Everything about the job as JSON values."""
        with self._lock:
            values = self._values.copy()
        values |= {"samples": [path.name for path in self.samples()], "config": self.config.model_dump(mode="json")}
        values["kept"] = [{"step": one.step, "used": one.used} for one in kept_loras(self.folder / "loras")]
        values["recipe"] = self.config.recipe_value().to_dict()
        return cast(JobStatus, {"id": self.id, "name": self.config.name, "elsewhere": self.elsewhere, **values})

    def summary(self) -> JobSummary:
        """The job in short."""
        with self._lock:
            values = self._values.copy()
        kept = {name: values[name] for name in JobProgress.__annotations__}
        kind = "lora" if self.config.full is None else "full"
        facts = {"flavour": self.config.model.flavour, "kind": kind, "warning_count": len(values["warnings"])}
        return cast(JobSummary, {"id": self.id, "name": self.config.name, "elsewhere": self.elsewhere, **kept, **facts})

    def samples(self) -> list[Path]:
        """All preview images, oldest first."""
        return sorted((self.folder / "samples").glob("step-*.png"), key=_sample_order)

    def latest_samples(self) -> list[Path]:
        """The preview images of the last step that has any, in the order of the prompts."""
        images = self.samples()
        return [path for path in images if _sample_order(path)[0] == _sample_order(images[-1])[0]]

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`."""
        return MetricsLog(self.folder / "metrics.jsonl").read()

    def verdict(self) -> Verdict | None:
        """What its metrics say of it now; None while they are few."""
        return verdict(Record.of(self.metrics()))

    def best_step(self) -> int:
        """The step with the lowest validation loss. Raises JobError when there is none, or the base measured best."""
        found = self.verdict()
        if found is None or not found.step:
            measured = found is not None and found.measured
            why = "no step is better than the base" if measured else "it has no validation loss"
            raise JobError(f"The job '{self.id}' has no best step: {why}. Choose one of those that are kept.")
        return found.step

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the job is in no active state; False when `timeout` seconds passed before."""
        return self.ended.wait(timeout)

    def update(self, *, surely: bool = False, **fields: Any) -> None:
        """Take over new values; write and tell others when the state changed, else now and then.

        What cannot be written now is tried again with the next update; with `surely`, OSError (or ValueError) is raised
        instead, nobody is told, and the values are as before.

        Two fields are digested: `step_seconds_now` into a running mean and the time left, `new_samples` only wakes
        listeners (images are listed from the folder).
        """
        urgent = "new_samples" in fields or "checkpoint" in fields
        previews = fields.pop("new_samples", None)
        with self._lock:
            all_before = self._values.copy()
            before, known = self.state, len(self._values["warnings"])
            waited_for = self._values["waits_for"]
            if fields.get("yielded") is False:
                fields.setdefault("waits_for", "")
            if (seconds := fields.pop("step_seconds_now", None)) is not None:
                mean = self._values["step_seconds"]
                self._values["step_seconds"] = round(seconds if mean is None else 0.9 * mean + 0.1 * seconds, 4)
            if fields.get("lora_path") is not None:
                fields["lora_path"] = str(fields["lora_path"])
                fields["lora_name"] = Path(fields["lora_path"]).name
            if fields.get("model_path") is not None:
                fields["model_name"] = Path(fields["model_path"]).name
            if "warnings" in fields:  # the run goes on adding to its own list
                fields["warnings"] = list(fields["warnings"])
            # Strictly increasing, so that whoever gets two states of a job out of order knows the newer one.
            self._values |= {**fields, "updated": max(time.time(), self._values["updated"] + 1e-6)}
            if self._values["step_seconds"] is not None:
                left = self.config.steps - self._values["step"]
                self._values["eta_seconds"] = round(left * self._values["step_seconds"], 1)
            changed = self.state != before
            self._write_down(before, previews, fields, known)
            now = time.monotonic()
            due = surely or changed or urgent or now - self._written > WRITE_EVERY_SECONDS
            # Nothing else may come for as long as a prompt runs.
            turned = self._values["waits_for"] != waited_for
            announce = changed or turned or urgent or now - self._notified > NOTIFY_EVERY_SECONDS
            if announce:
                self._notified = now
        if due:
            try:
                self.write()
            except (
                OSError,
                ValueError,
            ) as error:  # held by another program for long, or a full disk; the next update tries again
                self._written = 0.0
                if surely:
                    with self._lock:
                        self._values = all_before
                    raise
                with suppress(OSError):
                    self.log(f"job.json was not written: {error}")
        if announce:
            try:
                self.notify(self.status())
            except Exception:
                self.log(f"A listener failed:\n{traceback.format_exc()}")
        self._tell_waiting()

    def _tell_waiting(self) -> None:
        with self._lock:  # by the state of now: a listener or another thread may have taken the job up again
            if self.state in ACTIVE:
                self.ended.clear()
            else:
                self.ended.set()

    def write(self) -> None:
        """Write `job.json`."""
        with self._writing:  # not the lock of the values: who asks for them is not to wait for a disk
            self._written = time.monotonic()
            path = self.folder / "job.json"
            values = {name: value for name, value in self.status().items() if name != "elsewhere"}
            write_json(path, {"format": FORMAT, **values})
            self._seen = _identity(path)

    def fail(self, error: BaseException) -> None:
        """Record an error: ours as it stands, any other with its type, and its trace in `log.txt`."""
        if isinstance(error, ChromaKitError):
            message = str(error)
        else:
            message = f"{type(error).__name__}: {first_line(error, 300)} (the trace is in log.txt in the job's folder)"
        with suppress(OSError):
            self.log("".join(traceback.format_exception(error)))
        self.update(state="failed", message=message, yielded=False)

    def _write_down(self, before: str, previews: list[str] | None, fields: dict[str, Any], known: int) -> None:
        """What happened, in the log: changes of state, checkpoints, previews, new warnings."""
        lines = []
        if self.state != before:
            message = self._values["message"] if self.state not in ("preparing", "failed") else ""
            lines.append(f"{self.state} at step {self._values['step']}" + (f": {message}" if message else ""))
        if fields.get("checkpoint") is not None:
            lines.append(f"checkpoint of step {fields['checkpoint']}")
        if previews:
            lines.append(f"{len(previews)} previews of step {self._values['step']}")
        if fields.get("held_out"):
            names = first_few(fields["held_out"], 8)
            lines.append(f"{counted(len(fields['held_out']), 'image')} held out for the validation loss: {names}")
        if self.state != before and self.state not in ACTIVE and self._values["verdict"] is not None:
            lines.append(f"verdict: {self._values['verdict']['sentence']}")
        lines += [f"warning: {warning}" for warning in self._values["warnings"][known:]]
        with suppress(OSError):  # a full disk must not end the job for the sake of its log
            for line in lines:
                self.log(line)

    def remove(self) -> None:
        """Remove the folder of a job that never began, which is ours."""
        if os.name == "nt":  # where what is open cannot be removed
            self.lock.let_go()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.lock.let_go()

    def log_lines(self, limit: int = 200) -> list[str]:
        """The last lines of `log.txt`, at most `limit`."""
        try:
            with (self.folder / "log.txt").open("rb") as file:
                size = file.seek(0, 2)
                file.seek(max(0, size - 400 * limit))
                lines = file.read().decode("utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return []
        return lines[-limit:]

    def log(self, text: str) -> None:
        """Append to `log.txt`."""
        with (self.folder / "log.txt").open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text.rstrip()}\n")


def check_folder(folder: Path) -> None:
    """Raise JobError when a later version wrote the job in a folder; all else is left to who opens it."""
    values: Any = None
    with suppress(ConfigError, ValueError):
        values = read_json(folder / "job.json")
    if isinstance(values, dict):
        check_format(f"The training job '{folder.name}'", values.get("format"), FORMAT, JobError)


def _read(folder: Path) -> tuple[TrainingConfig, dict[str, Any]]:
    """What `job.json` says. Raises JobError for one of a later version, KeyError or ConfigError for a foreign one."""
    check_folder(folder)
    values = read_json(folder / "job.json")
    return TrainingConfig.parse(values["config"]), values


def _sample_order(path: Path) -> tuple[int, int]:
    """step-000100-0.png → (100, 0)."""
    step, _, index = path.stem.removeprefix("step-").partition("-")
    return (int(step), int(index)) if step.isdigit() and index.isdigit() else (-1, 0)
