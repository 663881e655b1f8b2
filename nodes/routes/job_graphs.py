"""A job as a graph again: the nodes and widgets that would start it, or that paint with what it trained.

Both are prompts in API form, which the page opens as a new workflow. What a job can have and no widget sets (options of
job files) is not in the graph; `again` says so by building the job that the graph would start and comparing.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ...chroma_core.comfy.graph import Prompt, node
from ...chroma_core.data.dataset import DatasetConfig
from ...chroma_core.errors import ChromaKitError, JobError
from ...chroma_core.loading.spec import ModelHandle, ModelSpec
from ...chroma_core.sampling.schedule import FlowShift
from ...chroma_core.training.config import PreviewPrompt, TrainingConfig
from ...chroma_core.training.config.changes import differences
from ...chroma_core.training.jobs.manager import Job
from .. import host
from ..dataset import SLOTS
from ..dataset_widgets import config_from
from ..loaders import PARTS, PUBLISHED
from ..settings import ADAPTER, OBJECTIVE, PLAIN, PREVIEWS, settings_from
from ..training import training_config

IN_JOB_ONLY = ("folder", "resolutions", "default_caption")
"""Fields of a `DatasetConfig` that a widget of another name sets."""


def again(job: Job) -> dict[str, Any]:
    """The graph that starts this job: `{prompt, missing, folded}`.

    `missing` is what it cannot say, in words; `folded` are the ids of nodes that one rarely looks into.
    """
    config = job.config
    prompt: Prompt = {"load": _load(config.model)}
    main = _sets(prompt, (config.dataset, *config.more_datasets))
    held_out = _dataset(prompt, "heldout", config.validation_dataset) if config.validation_dataset else None
    settings = _settings(config)
    prompt["settings"] = node("ChromaTrainingSettings", "Chroma Training Settings", **settings)
    train = _train(config)
    prompt["train"] = node(
        "ChromaTrainLora",
        "Chroma Train LoRA",
        model=["load", 0],
        text_encoder=["load", 1],
        dataset=[main, 0],
        settings=["settings", 0],
        **train,
        **({"validation_dataset": [held_out, 0]} if held_out else {}),
    )
    prompt["status"] = node("ChromaTrainingStatus", "Chroma Training Status", job=["train", 0])
    folded = [key for key in ("settings", "heldout") if key in prompt]
    return {"prompt": prompt, "missing": _missing(config, prompt, train, settings), "folded": folded}


def use(job: Job) -> dict[str, Any]:
    """The graph that paints the job's first preview with the LoRA or model that it wrote, as `again` has it.

    Raises JobError for a job that has written none.
    """
    status, config = job.status(), job.config
    spec, model = config.model, ["load", 0]
    if not status["lora_path"] and not status["model_path"]:
        raise JobError(f"The job '{job.id}' has written no LoRA yet. Stop it, which writes one, or let it end.")
    load = _load(spec)
    prompt: Prompt = {"load": load}
    if status["lora_path"]:
        name = _lora_name(Path(status["lora_path"]))
        prompt["lora"] = node("ChromaApplyLora", "Chroma Apply LoRA", model=model, lora=name, strength=1.0, mode="live")
        model = ["lora", 0]
    else:
        load["inputs"]["transformer"] = _part_name("transformer", status["model_path"])
    previews = config.preview_list()
    if previews:
        first = previews[0]
        text, negative, width, height, settings = (
            first.prompt, first.negative, first.width, first.height, first.settings
        )  # fmt: skip
    else:
        width, height = config.preview_size()
        text, negative = f"a picture of {config.dataset.trigger or 'what was trained'}", ""
        settings = None
    sampled: dict[str, Any] = {"recipe": config.recipe, "recipe_overrides": _overrides(config)}
    if settings is not None:
        shift, value = _shift(settings.flow_shift, "recipe")
        sampled |= {
            "seed": settings.seed, "steps": settings.steps, "guidance": settings.guidance, "method": settings.method,
            "spacing": settings.spacing, "tail_bias": settings.tail_bias, "flow_shift": shift,
            "flow_shift_value": value,
        }  # fmt: skip
    prompt |= {
        "positive": node("ChromaTextEncode", "Prompt", text_encoder=["load", 1], text=text, trigger=""),
        "negative": node("ChromaTextEncode", "Negative prompt", text_encoder=["load", 1], text=negative, trigger=""),
        "latent": node("ChromaEmptyLatent", "Chroma Empty Latent", width=width, height=height, batch_size=1),
        "sample": node(
            "ChromaSampler",
            "Chroma Sampler",
            model=model,
            positive=["positive", 0],
            negative=["negative", 0],
            latent=["latent", 0],
            **{"seed": 42, "steps": 25, "guidance": 4.0, "tail_bias": 0.0, "denoise": 1.0, **sampled},
        ),
        "decode": node("VAEDecode", "VAE Decode", samples=["sample", 0], vae=["load", 2]),
        "save": node("SaveImage", "Save Image", images=["decode", 0], filename_prefix=f"chroma/{config.name}"),
    }
    return {"prompt": prompt, "missing": [], "folded": []}


def _load(spec: ModelSpec) -> dict[str, Any]:
    return node(
        "ChromaLoadModel",
        "Chroma Load Model",
        flavour=spec.flavour,
        precision=spec.precision,
        text_precision=spec.text_precision,
        offload=spec.offload,
        folder=Path(spec.folder).name if spec.folder else PUBLISHED,
        **{part: _part_name(part, getattr(spec, part)) for part in PARTS},
        resident_blocks=spec.resident_blocks,
        offload_during_startup=spec.offload_during_startup,
        keep_quantised=spec.quantised_folder is not None,
    )


def _part_name(part: Any, path: str | None) -> str:
    """A model file's name in the host's folders; its bare name when it is in none of them."""
    return PUBLISHED if path is None else host.model_file_name(part, path) or Path(path).name


def _lora_name(path: Path) -> str:
    return next((name for name in host.lora_names() if host.lora_path(name) == path), path.name)


def _sets(prompt: Prompt, sets: tuple[DatasetConfig, ...]) -> str:
    """Nodes for the training sets; returns the key of the one to link."""
    keys = [_dataset(prompt, "dataset" if i == 0 else f"dataset_{i + 1}", one) for i, one in enumerate(sets)]
    while len(keys) > 1:  # chains of SLOTS sets, the first of each being the chain before
        joined, keys = keys[:SLOTS], keys[SLOTS:]
        key = f"combine_{len(prompt)}"
        links = {f"dataset_{i}": [name, 0] for i, name in enumerate(joined, 1)}
        weights = {f"weight_{i}": 1.0 for i in range(1, len(joined) + 1)}
        prompt[key] = node("ChromaCombineDatasets", "Chroma Combine Datasets", **links, **weights)
        keys.insert(0, key)
    return keys[0]


def _dataset(prompt: Prompt, key: str, config: DatasetConfig) -> str:
    sizes = config.resolutions
    values = {name: value for name, value in config.model_dump().items() if name not in IN_JOB_ONLY}
    prompt[key] = node(
        "ChromaDataset",
        "Held-out images" if key == "heldout" else "Chroma Dataset",
        folder=host.dataset_name(config.folder) or Path(config.folder).name,
        resolution=sizes[0] if sizes else 0,
        more_resolutions=", ".join(map(str, sizes[1:])),
        default_caption=config.default_caption or "",
        **values,
    )
    return key


def _shift(shift: FlowShift | None, unset: str) -> tuple[str, float]:
    """The two widgets of a flow shift."""
    if shift is None:
        return unset, 1.0
    return (shift, 1.0) if isinstance(shift, str) else ("constant", float(shift))


def _overrides(config: TrainingConfig) -> str:
    return ", ".join(f"{name}={value}" for name, value in config.recipe_overrides.items())


def _settings(config: TrainingConfig) -> dict[str, Any]:
    """The widgets of Chroma Training Settings."""
    shift, value = _shift(config.objective.flow_shift, "none")
    kind = config.lora
    target = kind.target
    return {
        **{name: getattr(config, name) for name in PLAIN},
        **{name: getattr(config.objective, name) for name in OBJECTIVE},
        **{f"preview_{name}": getattr(config.previews, name) for name in PREVIEWS},
        **{name: getattr(kind, field) for name, field in ADAPTER.items()},
        "ema_decay": config.ema_decay,
        "save_dtype": kind.save_dtype,
        "sigma_draw": config.objective.draw,
        "sigma_remap": config.objective.remap,
        "sigma_scale": config.objective.scale,
        "sigma_shift": shift,
        "sigma_shift_value": value,
        "sigma_minimum": config.objective.minimum,
        "sigma_maximum": config.objective.maximum,
        "target_patterns": "" if isinstance(target, str) else "\n".join(target),
        "recipe_overrides": _overrides(config),
        "full_rank_blocks": config.full.target if config.full else "",
    }


def _train(config: TrainingConfig) -> dict[str, Any]:
    """The widgets of Chroma Train LoRA."""
    kind = config.lora
    prompts = [entry.prompt if isinstance(entry, PreviewPrompt) else entry for entry in config.previews.prompts]
    return {
        "name": config.name,
        "steps": config.steps,
        "rank": kind.rank,
        "alpha": kind.alpha or 0.0,
        "learning_rate": config.learning_rate,
        "target": kind.target if isinstance(kind.target, str) else "all",
        "batch_size": config.batch_size,
        "seed": config.seed,
        "preview_prompt": "\n".join(" ".join(prompt.split()) for prompt in prompts),
        "preview_every": config.previews.every,
        "if_exists": "keep",
    }


def _missing(config: TrainingConfig, prompt: Prompt, train: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """What differs between the job and the one that the graph would start, each as `option old → new`."""
    found = []
    for key, made in prompt.items():
        if made["class_type"] == "ChromaDataset":
            try:
                host.dataset_folder(made["inputs"]["folder"])
            except ChromaKitError:
                found.append(
                    f"the folder of {key}, “{made['inputs']['folder']}”, which is not among the data sets here"
                )
    plain = {name: value for name, value in train.items() if name != "if_exists"}
    sets = tuple(_set_again(one) for one in (config.dataset, *config.more_datasets))
    held_out = (_set_again(config.validation_dataset),) if config.validation_dataset else None
    try:
        model = ModelHandle(config.model)
        built = training_config(
            model, config.model, sets, settings=settings_from(settings), validation_dataset=held_out, **plain
        )
    except ChromaKitError as error:
        return [*found, str(error)]
    kept = replace(built.model, tokenizer=config.model.tokenizer)  # a matter of the machine, found anew
    return found + [str(change) for change in differences(config, built.model_copy(update={"model": kept}))]


def _set_again(config: DatasetConfig) -> DatasetConfig:
    """The data set as its node would make it."""
    values = {name: value for name, value in config.model_dump().items() if name not in IN_JOB_ONLY}
    sizes = config.resolutions
    return config_from(
        config.folder,
        sizes[0] if sizes else 0,
        ", ".join(map(str, sizes[1:])),
        config.default_caption or "",
        **values,
    )
