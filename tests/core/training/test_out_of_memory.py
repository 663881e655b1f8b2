"""Memory that does not suffice, at one place of a job after the other: the LoRA has the bits of an undisturbed run."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from chroma_core.model.device import is_out_of_memory
from chroma_core.model.transformer import ChromaTransformer
from chroma_core.training.config import TrainingConfig
from chroma_core.training.control import Control, Halted
from chroma_core.training.run.faults import MEMORY_TRIES
from chroma_core.training.run.metrics import JobPaths, MetricsLog
from chroma_core.training.run.run import run_training
from training_cases import config, model_folder, write_dataset

PLACES = {
    "cache_samples": "latents on their way to the cache",
    "cache_texts": "text states on their way to the cache",
    "load_transformer": "loading",
    "make_trained": "the adapter",
    "restore_latest": "a resume",
    "heldout_loss": "the held-out loss",
    "sample": "a preview",
    "decode": "a preview's image",
    "predict_velocity": "a forward pass",
    "backward": "a backward pass",
    "apply": "the optimizer's step",
    "update": "the average",
    "save_checkpoint": "a checkpoint",
    "_write_files": "the LoRA itself",
}
"""Functions of the trainer; the innermost that is on the stack is where an operation belongs."""


def where() -> tuple[str, tuple[str, int]]:
    """The place that the operation at work belongs to, and the line of the pack that asked for it."""
    frame, site = sys._getframe(), ("", 0)
    while frame is not None:
        code = frame.f_code
        if "chroma_core" in code.co_filename:
            site = site if site[0] else (code.co_filename.rpartition("chroma_core")[2], frame.f_lineno)
            if code.co_name in PLACES:
                return code.co_name, site
        frame = frame.f_back
    return "", site


@cache
def makes_tensors(func) -> bool:
    """Whether an operation's results are new tensors: not of those in place, nor views."""
    return not (func._schema.is_mutable or any(result.alias_info for result in func._schema.returns))


def takes_memory(func, args, kwargs) -> bool:
    """Whether an operation makes a tensor; shapes alone (on the meta device) are none."""
    if not makes_tensors(func):
        return False
    tensors = [each for each in tree_iter((args, kwargs)) if isinstance(each, torch.Tensor)]
    device = (kwargs or {}).get("device")
    return not any(tensor.is_meta for tensor in tensors) and (device is None or torch.device(device).type != "meta")


def full() -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB (a test)")


@dataclass
class Full(TorchDispatchMode):
    """Every operation of torch, counted by place; memory runs out at number `at` of `place`, `times` times."""

    place: str = ""
    at: int = 0
    times: int = 1
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PLACES, 0))
    sites: Counter = field(default_factory=Counter)
    raised: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, site = where()
        if takes_memory(func, args, kwargs):
            self.sites.update([site, (name, 0)])
        if name:
            self.counts[name] += 1
            if name == self.place and self.counts[name] >= self.at and self.raised < self.times:
                self.raised += 1
                raise full()
        return func(*args, **kwargs or {})


class EverySite(TorchDispatchMode):
    """Memory runs out once at every line of the pack that makes a tensor, and once in every place, as soon as it was
    passed so often."""

    def __init__(self, at: dict[tuple[str, int], int]):
        super().__init__()
        self.left, self.passed = dict(at), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if takes_memory(func, args, kwargs):
            name, site = where()
            for key in (site, (name, 0)):
                self.passed[key] += 1
                if self.passed[key] > self.left.get(key, sys.maxsize):
                    del self.left[key]
                    raise full()
        return func(*args, **kwargs or {})


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> TrainingConfig:
    folder = tmp_path_factory.mktemp("memory")
    data = write_dataset(folder / "data", 3)
    return config(
        model_folder(folder / "model"),
        data,
        steps=3,
        checkpoint_every=2,
        validate_every=3,
        validation_dataset={"folder": str(data)},
        validation_pictures=1,
        previews={"prompts": "sks", "steps": 1, "every": 3},
        lora={"rank": 2, "dropout": 0.1, "ema_decay": 0.9},
        gradient_accumulation=2,
    )


@dataclass
class Job:
    """One run of the job in this thread."""

    folder: Path
    settings: TrainingConfig
    control: Control = field(default_factory=Control)
    told: list[dict] = field(default_factory=list)

    def run(self, mode: TorchDispatchMode) -> str:
        paths = JobPaths.of(self.folder, "job", self.folder / "loras", None)
        paths.job.mkdir(parents=True, exist_ok=True)
        with mode:
            return run_training(self.settings, paths, "cpu", self.control, lambda **told: self.told.append(told))[0]

    def result(self) -> tuple[dict[str, torch.Tensor], list[float]]:
        files = sorted((self.folder / "loras").glob("*.safetensors"))
        assert len(files) == 2, "the LoRA and its average"
        tensors = {f"{file.stem} {name}": value for file in files for name, value in load_file(file).items()}
        return tensors, [
            line["loss"] for line in MetricsLog(self.folder / "job/metrics.jsonl").read() if "loss" in line
        ]


@pytest.fixture(scope="module")
def undisturbed(settings, tmp_path_factory):
    job, mode = Job(tmp_path_factory.mktemp("undisturbed"), settings), Full()
    assert job.run(mode) == "completed"
    assert all(count for place, count in mode.counts.items() if place != "restore_latest"), mode.counts
    gc.collect()
    gc.freeze()  # what the job imported stays: half of the time went into the collection after each shortage
    return mode.counts, job.result(), mode.sites


def same(job: Job, undisturbed) -> bool:
    (tensors, losses), (expected, expected_losses) = job.result(), undisturbed[1]
    assert tensors.keys() == expected.keys() and losses == expected_losses
    return all(torch.equal(tensors[name], expected[name]) for name in expected)


@pytest.mark.parametrize("late", [0, 1])
def test_every_line_where_memory_runs_out_once_changes_nothing(settings, undisturbed, tmp_path, late):
    """One after the other in one job, half of them when first passed; where it pauses, the user resumes it."""
    # safetensors makes errors of its own of what is raised inside it.
    passed = {site: count for site, count in undisturbed[2].items() if count and site[0] not in ("", "/data/cache.py")}
    sites = enumerate(sorted(passed.items()))
    mode = EverySite({site: 3 * count // 4 if i % 2 == late else 0 for i, (site, count) in sites})
    assert len(passed) > 140 and len(set(PLACES) & {name for name, _ in passed}) >= 10
    job = Job(tmp_path, settings)
    job.control.on_wait = lambda paused, *_: job.control.pause.clear() if paused else None
    assert job.run(mode) == "completed"
    assert not mode.left
    assert same(job, undisturbed)


def test_a_resume_that_finds_no_memory_tries_again(settings, undisturbed, tmp_path):
    first = Job(tmp_path, settings)
    first.control.on_wait = lambda *waiting: None
    halt_after(first, steps=2)
    with pytest.raises(Halted):
        first.run(Full())
    job, mode = Job(tmp_path, settings), Full("restore_latest", 1)
    assert job.run(mode) == "completed" and mode.raised == 1
    assert same(job, undisturbed)


def halt_after(job: Job, steps: int) -> None:
    """The process goes down as soon as the job has told of so many steps."""

    class Told(list):
        def append(self, values):
            super().append(values)
            if values.get("step", 0) >= steps:
                job.control.halt.set()

    job.told = Told()


def test_memory_that_stays_full_pauses_the_job_with_a_checkpoint_and_words(settings, undisturbed, tmp_path):
    job, mode = Job(tmp_path, settings), Full("predict_velocity", 1 + undisturbed[0]["predict_velocity"] // 2, 10**9)

    def on_wait(paused: bool, yielded: bool, short: bool) -> None:
        if paused:  # the user makes room, and resumes it
            assert mode.raised == MEMORY_TRIES and list((tmp_path / "job/checkpoints").iterdir())
            (said,) = [told["message"] for told in job.told if told.get("message", "").startswith("Paused: ")]
            assert "ran out of memory" in said and "should fit here" in said
            mode.times = 0
            job.control.pause.clear()

    job.control.on_wait = on_wait
    assert job.run(mode) == "completed" and mode.raised == MEMORY_TRIES
    assert same(job, undisturbed)


def test_a_job_that_recomputes_what_the_memory_asks_for_recomputes_all_when_it_runs_out(
    settings, undisturbed, tmp_path, monkeypatch
):
    auto = settings.model_copy(update={"gradient_checkpointing": True})
    assert auto.checkpointing_interval == 0
    seen = []
    run = ChromaTransformer._run

    def watched(self, *args):
        seen.append(self.checkpointing_interval)
        return run(self, *args)

    monkeypatch.setattr(ChromaTransformer, "_run", watched)
    job, mode = Job(tmp_path, auto), Full("predict_velocity", 1 + undisturbed[0]["predict_velocity"] // 2)
    assert job.run(mode) == "completed" and mode.raised == 1
    assert list(dict.fromkeys(seen)) == [0, 1] and same(job, undisturbed)


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "CUDA error: out of memory",
        "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory",
    ],
)
def test_libraries_that_find_no_memory_say_so_in_words_of_their_own(said):
    assert is_out_of_memory(RuntimeError(said))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not is_out_of_memory(ValueError(said))
