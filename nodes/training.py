"""Training: the node that makes sure a job runs, one that waits for it, one that shows how it is doing."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from comfy_api.latest import io, ui
from PIL import Image

from ..chroma_core.data.dataset import DatasetConfig
from ..chroma_core.errors import ConfigError, JobError
from ..chroma_core.loading.spec import ModelHandle, ModelSpec
from ..chroma_core.training.config import LoraConfig, PreviewConfig, PreviewPrompt, TrainingConfig
from ..chroma_core.training.jobs.curve import plot_losses
from ..chroma_core.training.jobs.manager import ACTIVE, IfExists, Job, JobStatus
from . import host, jobs
from .dataset import check_main, single
from .option_widgets import lines, values_at, widget
from .sockets import (
    ChromaDatasetType,
    ChromaJob,
    ChromaModel,
    ChromaTextEncoder,
    ChromaTrainingType,
    schema,
    to_image,
    whole_spec,
)

POLL_SECONDS = 0.2


class ChromaTrainLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "training",
            node_id="ChromaTrainLora",
            display_name="Chroma Train LoRA",
            description="Makes sure that a training job with these settings exists, and returns at once: it trains "
            "in the background. The same settings are the same job, however often they are queued.",
            search_aliases=[
                "lora train",
                "lora trainer",
                "lora training",
                "train chroma",
                "finetune",
                "dreambooth",
                "learning rate",
                "resume training",
            ],
            is_output_node=True,
            inputs=[
                ChromaModel.Input("model", tooltip="From Chroma Load Model. The job loads its own copy."),
                ChromaTextEncoder.Input("text_encoder", tooltip="From the same Chroma Load Model."),
                ChromaDatasetType.Input(
                    "dataset", tooltip="The images to learn from. Several sets: Chroma Combine Datasets."
                ),
                widget(TrainingConfig, "name", default="my-lora"),
                widget(TrainingConfig, "steps"),
                widget(LoraConfig, "rank"),
                widget(
                    LoraConfig, "alpha", default=0.0, tooltip="Scale: alpha / rank. 0: the same as rank.", advanced=True
                ),
                widget(TrainingConfig, "learning_rate"),
                widget(LoraConfig, "target"),
                widget(TrainingConfig, "batch_size"),
                # else the page would draw a new seed, and so another job, at every queue
                widget(TrainingConfig, "seed", control_after_generate=False, advanced=True),
                io.String.Input(
                    "preview_prompt",
                    multiline=True,
                    default="",
                    tooltip="Generated during training, one prompt a line. [trigger] stands for the dataset's trigger "
                    "word. Empty: none.",
                ),
                widget(PreviewConfig, "every", "preview_every"),
                io.Combo.Input(
                    "if_exists",
                    options=["keep", "resume", "restart"],
                    default="keep",
                    tooltip="When this very job exists: keep takes it as it is (and picks up one that was "
                    "interrupted or failed), "
                    "resume also goes on with a stopped one, restart trains again from nothing.",
                ),
                ChromaTrainingType.Input(
                    "settings",
                    optional=True,
                    tooltip="From Chroma Training Settings, or from nodes with the settings of one subject, chained.",
                ),
                ChromaDatasetType.Input(
                    "validation_dataset",
                    optional=True,
                    tooltip="Images that are not trained on (one set, not a combined one). The loss on them tells "
                    "learning from memorising.",
                ),
            ],
            outputs=[ChromaJob.Output("job", tooltip="For Chroma Wait for Training and Chroma Training Status.")],
        )

    @classmethod
    def fingerprint_inputs(cls, if_exists="keep", **_: Any) -> Any:
        """Replaying the id is right as long as the job lives on; `resume` and `restart` ask for acting again."""
        return jobs.fingerprint() if if_exists == "keep" else uuid.uuid4().hex

    @classmethod
    def execute(cls, model, text_encoder, dataset, if_exists: IfExists = "keep", **inputs: Any) -> io.NodeOutput:
        config = training_config(model, text_encoder, dataset, **inputs)
        job = jobs.manager().ensure(config, if_exists=if_exists)
        host.log.info("ChromaKit: training job %s", describe(job.status()))
        return io.NodeOutput(job.id, ui={"chromakit_job": (job.id,)})


def training_config(
    model: ModelHandle,
    text_encoder: ModelSpec,
    dataset: tuple[DatasetConfig, ...],
    preview_prompt: str,
    preview_every: int,
    rank: int,
    alpha: float,
    target: str,
    settings: dict[str, Any] | None = None,
    validation_dataset: tuple[DatasetConfig, ...] | None = None,
    **plain: Any,
) -> TrainingConfig:
    """One `TrainingConfig` from the node's inputs; its own widgets win over the linked settings.

    Raises ConfigError for parts that do not belong together, PromptError for `[trigger]` without a trigger word.
    """
    settings = settings or {}
    prompts = lines(preview_prompt)
    sets = {"dataset": dataset[0], "more_datasets": dataset[1:], "validation_dataset": single(validation_dataset)}
    own = {} if "full" in settings else {"rank": rank, "alpha": alpha or None, "target": target}
    lora = {**own, **settings.get("lora", {})}
    previews = {**settings.get("previews", {}), "prompts": prompts, "every": preview_every}
    parts = {"model": _trained_spec(model, text_encoder), "lora": lora, "previews": previews}
    return checked(TrainingConfig.parse({**settings, **plain, **sets, **parts}))


def checked(config: TrainingConfig) -> TrainingConfig:
    """The job, which is refused now rather than when it begins.

    Raises ConfigError for a main set that is one of regularisation, PromptError for `[trigger]` without trigger word.
    """
    check_main((config.dataset,))
    config.preview_list()
    return config


def widgets_of(config: TrainingConfig) -> dict[str, Any]:
    """The node's widgets that mean a job's configuration; each prompt on one line."""
    lora, previews = config.lora, config.previews
    prompts = [entry.prompt if isinstance(entry, PreviewPrompt) else entry for entry in previews.prompts]
    plain = ("name", "steps", "learning_rate", "batch_size", "seed")
    return {
        **values_at(config, {name: name for name in plain}),
        "rank": lora.rank,
        "alpha": lora.alpha or 0.0,
        "target": lora.target if isinstance(lora.target, str) else "all",
        "preview_prompt": "\n".join(" ".join(prompt.split()) for prompt in prompts),
        "preview_every": previews.every,
    }


def _trained_spec(model: ModelHandle, text_encoder: ModelSpec) -> ModelSpec:
    if model.loras:
        raise ConfigError(
            "The model to train already has a LoRA on it. Link Chroma Load Model straight to Chroma Train LoRA: a "
            "new LoRA is trained on the plain model, and can be combined with others afterwards."
        )
    return whole_spec(model, text_encoder)


def describe(status: Mapping[str, Any]) -> str:
    """A job's state in words."""
    said = [f"{status['id']}: {status['state']}, step {status['step']} of {status['steps']}"]
    if status.get("elsewhere"):
        said[0] += ", in another process"
    elif status.get("yielded"):
        said[0] += ", yielding to the queue"
    elif status.get("waits_for") == "memory":
        said[0] += ", waiting for free GPU memory"
    for key, label in (
        ("loss_smooth", "loss"),
        ("heldout_loss_base", "held-out loss, base"),
        ("heldout_loss", "held-out loss"),
    ):
        if status.get(key) is not None:
            said.append(f"{label}: {status[key]:.4f}")
    if status.get("verdict"):
        said.append(f"verdict: {status['verdict']['sentence']}")
    if status.get("eta_seconds") and status["state"] == "running":
        said.append(f"time left: {status['eta_seconds']:.0f} s")
    if status.get("lora_name"):
        said.append(f"LoRA: {status['lora_name']}")
    if status.get("model_name"):
        said.append(f"model: {status['model_name']} (choose it as transformer in Chroma Load Model)")
    said += [status["message"]] if status.get("message") else []
    said += [f"warning: {warning}" for warning in status.get("warnings") or ()]
    return "\n".join(said)


class ChromaWaitForTraining(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "training",
            node_id="ChromaWaitForTraining",
            display_name="Chroma Wait for Training",
            description="Holds this prompt until the job has ended, then hands on the LoRA. Cancel stops the job, "
            "which keeps what it has learnt.",
            search_aliases=["wait lora", "wait for job", "train and sample", "finished lora", "lora model"],
            inputs=[ChromaJob.Input("job", tooltip="From Chroma Train LoRA.")],
            outputs=[
                io.LoraModel.Output("lora_model", tooltip="For ComfyUI's own Load LoRA Model and Save LoRA Weights."),
                io.String.Output("lora_name", tooltip="For Chroma Apply LoRA's lora_name."),
                io.LossMap.Output("loss_map", tooltip="For ComfyUI's Plot Loss Graph."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> Any:
        """What a finished job gave stays right until it is resumed."""
        return jobs.fingerprint()

    @classmethod
    async def execute(cls, job) -> io.NodeOutput:
        found = jobs.find(job)
        status = await wait_for(found)
        model = status["model_path"] or status["model_folder"]
        if status["state"] in ("completed", "stopped") and model:
            raise JobError(
                f"The training job {job} is {status['state']}. It trained the model itself, so there is no LoRA to "
                f"hand on: its model is '{Path(model).name}' in '{Path(model).parent}'. Take this node out, press R, "
                "and choose that file as transformer in Chroma Load Model (or in ComfyUI's Load Diffusion Model)."
            )
        if status["state"] in ("failed", "interrupted") or not status["lora_path"]:
            raise JobError(
                f"The training job {job} is {status['state']} and has no LoRA to give. {status['message'] or ''} "
                "Queue Chroma Train LoRA again to go on with it."
            )
        losses = [entry["loss"] for entry in found.metrics() if entry.get("loss") is not None]
        return io.NodeOutput(host.load_tensors(Path(status["lora_path"])), status["lora_name"], {"loss": losses})


async def wait_for(job: Job) -> JobStatus:
    """Show a job's progress on the running node until it has ended. Cancel stops the job and ends the prompt."""
    status = job.status()
    progress, shown = host.Progress(status["steps"]), None
    try:
        with host.waiting():
            while status["state"] in ACTIVE:
                sample = next(iter(job.latest_samples()), None)
                preview = Image.open(sample) if sample and sample != shown else None
                progress.step(status["step"], status["steps"], preview)
                shown = sample
                await asyncio.sleep(POLL_SECONDS)
                status = jobs.find(job.id).status()  # which another process may train, and delete
    except host.Interrupted:
        with suppress(JobError):  # it may have ended at this very moment
            jobs.manager().stop(job.id)
        raise
    return status


class ChromaUseStep(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "training",
            node_id="ChromaUseStep",
            display_name="Chroma Use Step",
            description="The LoRA of one step of a training job, also while it still trains. It is put into "
            "output/loras under the job's name and the step's, and is never thinned away.",
            search_aliases=[
                "best step",
                "best checkpoint",
                "lora checkpoint",
                "epoch",
                "overfitting",
                "early stopping",
            ],
            inputs=[
                ChromaJob.Input("job", tooltip="From Chroma Train LoRA."),
                io.Int.Input(
                    "step",
                    default=0,
                    min=0,
                    max=1000000,
                    tooltip="A step with a preview or a validation; the job's list names those that are kept. 0: the "
                    "one with the lowest validation loss.",
                ),
            ],
            outputs=[
                io.LoraModel.Output("lora_model", tooltip="For ComfyUI's own Load LoRA Model and Save LoRA Weights."),
                io.String.Output("lora_name", tooltip="For Chroma Apply LoRA's lora_name."),
                io.String.Output("report", tooltip="Which step it is, and what the job's verdict says."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, step=0, **_: Any) -> Any:
        """The best step may be another one by now."""
        return jobs.fingerprint() if step else uuid.uuid4().hex

    @classmethod
    def execute(cls, job, step=0) -> io.NodeOutput:
        found = jobs.find(job)
        path = jobs.manager().use(found.id, step)
        told = found.verdict()
        report = f"{path.name}" + (f": {told.sentence}" if told else "")
        return io.NodeOutput(host.load_tensors(path), path.name, report, ui={"text": (report,)})


LOOK_AGAIN = "Run again to look again. The tab Chroma and the panel on Chroma Train LoRA show it live."


class ChromaTrainingStatus(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "training",
            node_id="ChromaTrainingStatus",
            display_name="Chroma Training Status",
            description="How a job is doing right now: state and losses in words, the latest previews, the loss "
            "curve. Queue again to look again.",
            search_aliases=["training progress", "job status", "loss curve", "loss graph", "training preview"],
            is_output_node=True,
            inputs=[ChromaJob.Input("job", tooltip="From Chroma Train LoRA.")],
            outputs=[
                io.String.Output("status", tooltip="State, step, losses and warnings in words."),
                io.Image.Output("samples", tooltip="The latest previews; one black image while there are none."),
                io.Image.Output("loss_plot", tooltip="Loss and held-out loss over the steps."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> str:
        """A status is never replayed."""
        return uuid.uuid4().hex

    @classmethod
    def execute(cls, job) -> io.NodeOutput:
        found = jobs.find(job)
        text = host.told(describe(found.status()))
        images = [Image.open(path) for path in found.latest_samples()]
        samples = to_image(images or [Image.new("RGB", (64, 64))])
        plot = to_image([plot_losses(found.metrics(), instead=f"{text}\n\n{LOOK_AGAIN}")])
        shown = [samples, plot] if images else [plot]
        previews = [each for tensor in shown for each in ui.PreviewImage(tensor, cls=cls).values]
        return io.NodeOutput(text, samples, plot, ui={"images": previews, "text": (text,), "chromakit_job": (job,)})


NODES = [ChromaTrainLora, ChromaWaitForTraining, ChromaTrainingStatus, ChromaUseStep]
