"""Comparing: a training preview sampled again, and which number moves an image how far."""

from __future__ import annotations

from typing import Any, get_args

from comfy_api.latest import io, ui

from ..chroma_core.model.drawing import side_by_side
from ..chroma_core.parity import Case, FactorKind, NotRun, Report, Sampled, in_process, read_preview, vary
from ..chroma_core.parity.preview import last_preview
from ..chroma_core.sampling.recipe import recipe as find_recipe
from ..chroma_core.sampling.sampler import SamplingSettings
from ..chroma_core.training.config import TrainingConfig
from . import host, jobs
from .option_widgets import widget
from .sockets import ChromaJob, ChromaModel, ChromaTextEncoder, schema, to_image, whole_spec

NO_FACTORS, ALL_FACTORS = "none", "all"


class ChromaParity(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "sampling",
            node_id="ChromaParity",
            display_name="Chroma Parity",
            description="Generates one image several times, each time with one number changed, and says which of them "
            "moves it how far. With a job linked, first replays its last preview.",
            search_aliases=[
                "compare",
                "mismatch",
                "preview looks different",
                "replay preview",
                "reproduce",
                "debug lora",
            ],
            is_output_node=True,
            inputs=[
                ChromaModel.Input("model", tooltip="From Chroma Load Model or Chroma Apply LoRA."),
                ChromaTextEncoder.Input("text_encoder", tooltip="From Chroma Load Model."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="a photo of a sks emblem",
                    tooltip="What to generate, with the trigger word in it. Not read when a job is linked.",
                ),
                io.String.Input("negative", default="", tooltip="What to steer away from."),
                io.Combo.Input(
                    "factors",
                    options=[NO_FACTORS, *get_args(FactorKind), ALL_FACTORS],
                    default="recipe",
                    tooltip="Which numbers to change, one at a time. precision loads the model anew for each; all "
                    "generates about 35 images.",
                ),
                io.Int.Input("width", default=1024, min=32, max=4096, step=16, tooltip="Pixels. tiny: 64."),
                io.Int.Input("height", default=1024, min=32, max=4096, step=16, tooltip="Pixels. tiny: 64."),
                widget(SamplingSettings, "seed", tooltip="The noise to start from."),
                widget(SamplingSettings, "steps", tooltip="Steps of the sampler."),
                widget(SamplingSettings, "guidance", tooltip="As in Chroma Sampler."),
                widget(TrainingConfig, "recipe", tooltip="As in Chroma Sampler."),
                ChromaJob.Input(
                    "job",
                    optional=True,
                    tooltip="A finished training: its last preview is generated again, with its own prompt, settings "
                    "and LoRA, and compared with what was shown.",
                ),
            ],
            outputs=[
                io.Image.Output("sheet", tooltip="The images side by side."),
                io.String.Output("report", tooltip="Which change moves the image how far, the largest first."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> Any:
        """A job that went on has another last preview."""
        return jobs.fingerprint()

    @classmethod
    def execute(cls, factors, job=None, **inputs: Any) -> io.NodeOutput:
        case, shown = _preview_of(job) if job else (_case_of(**inputs), None)
        kinds = {NO_FACTORS: (), ALL_FACTORS: get_args(FactorKind)}.get(factors, (factors,))
        with host.working():
            report = _compare(case, shown, kinds)
        text, sheet = report.table(), to_image([side_by_side(report.images)])
        preview = ui.PreviewImage(sheet, cls=cls).as_dict()
        return io.NodeOutput(sheet, text, ui={**preview, "text": (text,)})


def _preview_of(job: str) -> tuple[Case, Sampled]:
    path = last_preview(jobs.find(job).folder)
    host.say(f"Replaying {path.name}")
    return read_preview(path)


def _case_of(model, text_encoder, prompt, negative, width, height, seed, steps, guidance, recipe) -> Case:
    settings = SamplingSettings(steps, guidance, seed)
    spec = whole_spec(model, text_encoder)
    return Case(spec, prompt, width, height, negative, settings, find_recipe(recipe), model.loras)


def _compare(case: Case, shown: Sampled | None, kinds: tuple[FactorKind, ...]) -> Report:
    factors = list(vary(case, kinds))
    total, done = (1 + len(factors)) * case.settings.steps, 0
    progress = host.Progress(total)

    def generate(each: Case) -> Sampled:
        host.make_room(0)
        return in_process(
            each,
            host.components,
            host.device(),
            lambda info: progress.step(done + case.settings.steps * info.step // info.steps, total),
        )

    report, base = Report(case), generate(case)
    report.add_pairs({"node": base} if shown is None else {"preview": shown, "node": base})
    for factor in factors:
        done += case.settings.steps
        host.say(f"Sampling with {factor.name}")
        try:
            report.add_factor(factor, base, generate(factor.case))
        except NotRun as reason:
            report.add_factor(factor, base, reason)
    return report


NODES = [ChromaParity]
