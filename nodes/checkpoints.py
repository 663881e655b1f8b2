"""Whole models and LoRAs: LoRAs merged into a model, a LoRA out of two models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from comfy_api.latest import io

from ..chroma_core.checkpoints.extract import extract_lora
from ..chroma_core.checkpoints.merge import LAYOUTS, merge_loras
from ..chroma_core.errors import ConfigError, LoraError
from ..chroma_core.files import file_stem
from ..chroma_core.loading.spec import ModelHandle, ModelSpec
from ..chroma_core.lora.convert import DTYPES
from . import host
from .lora import kept, size_inputs
from .sockets import ChromaModel, schema


class ChromaMergeLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "LoRA",
            node_id="ChromaMergeLora",
            display_name="Chroma Merge LoRA",
            description="Writes the model with the LoRAs that Chroma Apply LoRA put on it merged in, as a new file in "
            "output/diffusion_models, layer by layer. No file of yours is overwritten.",
            search_aliases=["merge lora", "save model", "save checkpoint", "bake lora", "fuse lora", "export model"],
            is_output_node=True,
            inputs=[
                ChromaModel.Input(
                    "model", tooltip="A model with at least one Chroma Apply LoRA, each with its strength."
                ),
                io.Combo.Input(
                    "layout",
                    options=list(LAYOUTS),
                    default="original",
                    tooltip="original: one file, for ComfyUI and most others. diffusers: a transformer folder.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(DTYPES),
                    default="keep",
                    tooltip="Number format of all weights. keep: the model file's own; fp8 and GGUF become bf16.",
                ),
                io.String.Input(
                    "filename",
                    default="",
                    tooltip="Empty: the names of model and LoRAs. A name that another model has is an error.",
                    optional=True,
                ),
            ],
            outputs=[
                ChromaModel.Output("model", tooltip="The new model, without LoRAs."),
                io.String.Output("report", tooltip="What was written where, and what was merged."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **_) -> str:
        """A merged file that was removed is a reason to write it again."""
        return host.folder_state(host.models_folder())

    @classmethod
    def execute(cls, model: ModelHandle, layout, dtype, filename="") -> io.NodeOutput:
        if not model.loras:
            raise LoraError("The model has no LoRA to merge. Put Chroma Apply LoRA between it and this node.")
        names = [_called(model.spec), *(Path(use.path).stem for use in model.loras)]
        stem = file_stem(filename.strip().removesuffix(".safetensors") or "-".join(names))
        output = host.models_folder() / (f"{stem}.safetensors" if layout == "original" else stem)
        progress = host.Progress(1)
        made = merge_loras(
            model.spec, model.loras, output, layout, dtype, lambda done, total, _: progress.step(done, total)
        )
        host.say(made.report)
        spec = replace(model.spec, transformer=str(made.path))
        return io.NodeOutput(ModelHandle(spec), made.report, ui={"text": (made.report,)})


class ChromaExtractLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "LoRA",
            node_id="ChromaExtractLora",
            display_name="Chroma Extract LoRA",
            description="Writes what a tuned model has more than its base as a LoRA into output/loras: the best "
            "approximation of the difference in every layer.",
            search_aliases=["extract lora", "lora from checkpoint", "model difference", "subtract models", "svd"],
            is_output_node=True,
            inputs=[
                ChromaModel.Input("base", tooltip="What the other model was tuned from."),
                ChromaModel.Input("tuned", tooltip="The tuned model, of the same size."),
                *size_inputs(32, "0: as the energy asks."),
                io.Combo.Input(
                    "dtype",
                    options=[name for name in DTYPES if name != "keep"],
                    default="bf16",
                    tooltip="Number format of the file.",
                ),
                io.String.Input(
                    "filename",
                    default="",
                    tooltip="Empty: the tuned model's name and the rank. A name that another file has is an error.",
                    optional=True,
                ),
            ],
            outputs=[
                io.String.Output("lora_name", tooltip="The new file's name, for Chroma Apply LoRA's lora_name."),
                io.String.Output("report", tooltip="What was written, how much of the change it keeps, what it lacks."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **_) -> str:
        """An extracted file that was removed is a reason to write it again."""
        return host.folder_state(host.loras_folder())

    @classmethod
    def execute(cls, base: ModelHandle, tuned: ModelHandle, dtype, rank=32, energy=1.0, filename="") -> io.NodeOutput:
        if base.loras or tuned.loras:
            raise ConfigError(
                "Models are compared by their files, which LoRAs that are applied are no part of. Link the models "
                "without Chroma Apply LoRA, or write one with Chroma Merge LoRA first."
            )
        stem = file_stem(filename.strip().removesuffix(".safetensors") or f"{_called(tuned.spec)}-{rank or 'all'}")
        progress = host.Progress(1)
        with host.working():
            host.make_room(0)
            made = extract_lora(
                base.spec,
                tuned.spec,
                host.loras_folder() / f"{stem}.safetensors",
                kept(rank, energy),
                dtype,
                device=host.device(),
                on_part=lambda done, total, _: progress.step(done, total),
            )
        report = made.report()
        host.say(report)
        name = str(made.path.relative_to(host.loras_folder()))
        return io.NodeOutput(name, report, ui={"text": (report,)})


def _called(spec: ModelSpec) -> str:
    return Path(spec.own_file).stem or spec.flavour


NODES = [ChromaMergeLora, ChromaExtractLora]
