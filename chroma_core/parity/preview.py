"""What the trainer showed: a recorded preview, the LoRA that it was made with, and a short job that makes one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..comfy.server import PACK
from ..errors import ConfigError, JobError
from ..files import only_names, read_json
from ..loading.load import Device
from ..loading.spec import LoraUse, ModelSpec
from ..model.images import LATENTS_SUFFIX, read_record
from ..sampling.recipe import Recipe
from ..sampling.sampler import SamplingSettings
from ..training.config import TrainingConfig
from ..training.jobs.blocking import run_job
from ..training.run.checkpoint import step_name
from ..training.run.trained import AdapterTraining
from .case import Case, NotRun, Sampled

EXAMPLE = PACK / "example_datasets" / "sks_emblem"


def read_preview(image: Path) -> tuple[Case, Sampled]:
    """A training preview as it was shown, and the case that samples it again with the LoRA of its step.

    Args:
        image: `samples/step-000100-0.png` in a job's folder.
    Raises:
        ConfigError: it is no preview, or its latents are gone.
        NotRun: the LoRA of that step was not kept.
    """
    record = read_record(image) if image.is_file() else None
    if record is None or "step" not in record:
        raise ConfigError(
            f"'{image}' is no training preview: it has no record of one. Give a step-….png of a job's samples folder."
        )
    shown = Sampled.read(image, image.with_suffix(LATENTS_SUFFIX))
    job = image.parent.parent
    if "model" in record:
        record = {**record, "model": _with_places(record["model"], job)}
    return Case.from_record(record, _loras_of(job, record["step"])), shown


def _with_places(model: dict[str, Any], job: Path) -> dict[str, Any]:
    """An image's word on its model, in which files have their names alone, with the places that the job knows."""
    known = read_json(job / "job.json")["config"]["model"]
    return {
        field: known[field] if value and value == only_names(known.get(field), field) else value
        for field, value in model.items()
    }


def last_preview(job: Path) -> Path:
    """The first image of the newest previews in a job's folder whose LoRA was kept. Raises JobError."""
    steps = sorted((job / "samples").glob("step-*-0.png"), reverse=True)
    for path in steps:
        if _checkpoint(job, int(path.stem.split("-")[1])).is_file():
            return path
    raise JobError(
        f"The job in '{job}' has no preview whose LoRA was kept: there are {len(steps)} previews. Give the job preview "
        "prompts, and let it reach its end or a checkpoint."
    )


def _checkpoint(job: Path, step: int) -> Path:
    return job / "checkpoints" / step_name(step) / AdapterTraining.weights_file


def _loras_of(job: Path, step: int) -> tuple[LoraUse, ...]:
    path = _checkpoint(job, step)
    if path.is_file():
        return (LoraUse(str(path)),)
    config = read_json(job / "job.json")["config"]
    if config.get("full"):
        raise NotRun(
            "The job trains the model itself, not a LoRA. Generate the preview's prompt with the model file "
            "that it wrote, and compare the images."
        )
    if step == 0 and not config["lora"].get("start_from"):
        return ()  # a LoRA that has learnt nothing adds nothing
    kept = sorted(path.name for path in (job / "checkpoints").glob("step-*"))
    raise NotRun(
        f"The LoRA of step {step} was not kept; the job's checkpoints are {', '.join(kept) or 'gone'}. Replay a "
        "preview of one of these steps."
    )


def train_briefly(
    spec: ModelSpec,
    prompt: str,
    negative: str,
    size: tuple[int, int],
    settings: SamplingSettings,
    recipe: Recipe,
    folder: Path,
    device: Device,
    steps: int = 20,
) -> Path:
    """Train for a moment on the bundled dataset; returns the preview that the job made at its end.

    It is a whole job of the real trainer, so its preview is what a user's would be. Raises JobError when it fails.
    """
    preview: dict[str, Any] = {"prompt": prompt, "negative": negative, "width": size[0], "height": size[1]}
    preview |= {field: getattr(settings, field) for field in ("steps", "guidance", "seed")}
    config = TrainingConfig.parse(
        {
            "name": "parity",
            "model": spec.to_dict(),
            "dataset": {"folder": str(EXAMPLE), "trigger": "sks"},
            "lora": {"rank": 8},
            "previews": {
                "prompts": [preview],
                "every": steps,
                **{field: getattr(settings, field) for field in ("tail_bias", "method", "spacing")},
            },
            "recipe": recipe.name,
            "steps": steps,
            "learning_rate": 2e-3,
            "checkpoint_every": steps,
        }
    )
    status = run_job(config, folder / "jobs", folder / "loras", device)
    if status["state"] != "completed":
        raise JobError(f"The short training job ended as {status['state']}: {status['message']}")
    return last_preview(folder / "jobs" / config.job_id())
