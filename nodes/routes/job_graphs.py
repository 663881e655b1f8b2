"""A job as a graph again: the nodes and widgets that would start it, or that generate with what it trained.

Both are prompts in API form, which the page opens as a new workflow. What a job can have and no widget sets (options of
job files) is not in the graph; `again` says so by building the job that the graph would start and comparing.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from ...chroma_core.comfy.graph import Prompt, node
from ...chroma_core.comfy.stock import METHODS, StockPreview, check, stock_prompt
from ...chroma_core.data.dataset import DatasetConfig
from ...chroma_core.errors import ChromaKitError, JobError
from ...chroma_core.loading.spec import ModelHandle, ModelSpec
from ...chroma_core.model.flavours import flavour
from ...chroma_core.training.config import TrainingConfig
from ...chroma_core.training.config.changes import differences
from ...chroma_core.training.config.job import Preview
from ...chroma_core.training.jobs.manager import Job
from .. import dataset_widgets, host, loaders, settings, training
from ..dataset import SLOTS
from ..schedule import shift_widgets


class JobGraph(TypedDict):
    """A prompt in API form. missing: what it cannot say, in words. folded: ids of nodes that one rarely looks into."""

    prompt: Prompt
    missing: list[str]
    folded: list[str]


def again(job: Job) -> JobGraph:
    """The graph that starts this job."""
    config = job.config
    prompt: Prompt = {"load": _load(config.model)}
    main = _sets(prompt, (config.dataset, *config.more_datasets))
    held_out = _dataset(prompt, "heldout", config.validation_dataset) if config.validation_dataset else None
    chosen, train = settings.widgets_of(config), training.widgets_of(config)
    prompt["settings"] = node("ChromaTrainingSettings", "Chroma Training Settings", **chosen)
    prompt["train"] = node(
        "ChromaTrainLora",
        "Chroma Train LoRA",
        model=["load", 0],
        text_encoder=["load", 1],
        dataset=[main, 0],
        settings=["settings", 0],
        **train,
        if_exists="keep",
        **({"validation_dataset": [held_out, 0]} if held_out else {}),
    )
    prompt["status"] = node("ChromaTrainingStatus", "Chroma Training Status", job=["train", 0])
    folded = [key for key in ("settings", "heldout") if key in prompt]
    return {"prompt": prompt, "missing": _missing(config, prompt, train, chosen), "folded": folded}


def use(job: Job) -> JobGraph:
    """The graph that generates the job's first preview with the LoRA or model that it wrote.

    Raises JobError for a job that has written none.
    """
    status, previews = job.status(), job.config.preview_list()
    if not status["lora_path"] and not status["model_path"]:
        raise JobError(f"The job '{job.id}' has written no LoRA yet. Stop it, which writes one, or let it end.")
    lora = _lora_name(Path(status["lora_path"])) if status["lora_path"] else None
    prompt = image_graph(job.config, lora, 1.0, previews[0] if previews else None)
    if lora is None:
        prompt["load"]["inputs"]["transformer"] = loaders.part_name("transformer", status["model_path"])
    return {"prompt": prompt, "missing": [], "folded": []}


def image_graph(config: TrainingConfig, lora: str | None, strength: float, preview: Preview | None) -> Prompt:
    """What generates an image of the job's model, with a LoRA by its name among ComfyUI's; None: without."""
    model = ["load", 0]
    prompt: Prompt = {"load": _load(config.model)}
    if lora is not None:
        prompt["lora"] = node(
            "ChromaApplyLora", "Chroma Apply LoRA", model=model, lora=lora, strength=strength, mode="live"
        )
        model = ["lora", 0]
    sampled: dict[str, Any] = {"recipe": config.recipe, "recipe_overrides": settings.overrides_text(config)}
    if preview is not None:
        text, negative, width, height = preview.prompt, preview.negative, preview.width, preview.height
        shift, value = shift_widgets(preview.settings.flow_shift, "recipe")
        same = ("seed", "steps", "guidance", "method", "spacing", "tail_bias")
        sampled |= {name: getattr(preview.settings, name) for name in same}
        sampled |= {"flow_shift": shift, "flow_shift_value": value}
    else:
        width, height = config.preview_size()
        text, negative = f"a picture of {config.dataset.trigger or 'what was trained'}", ""
    return prompt | {
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


def stock_graph(config: TrainingConfig, lora: str, strength: float, preview: Preview) -> Prompt:
    """What generates an image of the job's model with ComfyUI's own nodes; of a flavour that their loaders do not know,
    with its KSampler on our loaded model.

    Raises ConfigError for settings that ComfyUI's nodes do not have.
    """
    chosen, settings = flavour(config.model.flavour), preview.settings
    if chosen.folder is None:
        text = (
            preview.prompt,
            preview.negative,
            preview.width,
            preview.height,
            settings,
            config.recipe_value(),
        )
        stock = StockPreview(Path(lora), chosen.name, *text, strength=strength)
        check(stock)
        parts = {part: loaders.part_name(part, getattr(config.model, part)) for part in loaders.PARTS}
        return stock_prompt(stock, lora=lora, **{k: v for k, v in parts.items() if v != loaders.PUBLISHED})
    prompt = image_graph(config, lora, strength, preview)
    prompt["host"] = node("ChromaHostModel", "Chroma Host Model", model=["lora", 0])
    links = {name: prompt["sample"]["inputs"][name] for name in ("positive", "negative")}
    prompt["sample"] = node(
        "KSampler",
        "KSampler",
        model=["host", 0],
        **links,
        latent_image=["latent", 0],
        seed=settings.seed,
        steps=settings.steps,
        cfg=max(1.0, settings.guidance),
        sampler_name=METHODS.get(settings.method, "euler"),
        scheduler="simple",
        denoise=1.0,
    )
    return prompt


def _load(spec: ModelSpec) -> dict[str, Any]:
    return node("ChromaLoadModel", "Chroma Load Model", **loaders.widgets_of(spec))


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
    prompt[key] = node(
        "ChromaDataset",
        "Held-out images" if key == "heldout" else "Chroma Dataset",
        folder=host.dataset_name(config.folder) or Path(config.folder).name,
        **dataset_widgets.widgets_of(config),
    )
    return key


def _missing(config: TrainingConfig, prompt: Prompt, train: dict[str, Any], chosen: dict[str, Any]) -> list[str]:
    """What differs between the job and the one that the graph would start, each as `option old → new`."""
    found = []
    for key, made in prompt.items():
        if made["class_type"] == "ChromaDataset":
            try:
                host.dataset_folder(made["inputs"]["folder"])
            except ChromaKitError:
                found.append(f"the folder of {key}, “{made['inputs']['folder']}”, which is not among the datasets here")
    sets = tuple(_set_again(one) for one in (config.dataset, *config.more_datasets))
    held_out = (_set_again(config.validation_dataset),) if config.validation_dataset else None
    try:
        built = training.training_config(
            ModelHandle(config.model),
            config.model,
            sets,
            settings=settings.settings_from(chosen),
            validation_dataset=held_out,
            **train,
        )
    except ChromaKitError as error:
        return [*found, str(error)]
    kept = replace(built.model, tokenizer=config.model.tokenizer)  # a matter of the machine, found anew
    return found + [str(change) for change in differences(config, built.model_copy(update={"model": kept}))]


def _set_again(config: DatasetConfig) -> DatasetConfig:
    """The dataset as its node would make it."""
    return dataset_widgets.config_from(config.folder, **dataset_widgets.widgets_of(config))
