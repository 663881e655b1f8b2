"""Applying LoRAs."""

from __future__ import annotations

from typing import get_args

from comfy_api.latest import io

from ..chroma_core.errors import LoraError
from ..chroma_core.loading.load import transformer_outline
from ..chroma_core.loading.model_files import base_warning
from ..chroma_core.loading.spec import LoraMode, LoraUse, ModelSpec
from ..chroma_core.lora.adapters import check_fits
from ..chroma_core.lora.files import describe, read_lora
from . import host
from .sockets import ChromaModel, schema

NO_FILE = "none"


class ChromaApplyLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ChromaApplyLora",
            display_name="Chroma Apply LoRA",
            description="Puts a LoRA on the model. Chain several. A LoRA that does not fit is an error, never ignored.",
            search_aliases=["load lora", "chroma lora", "lora loader", "use lora", "lora strength", "lora stack"],
            inputs=[
                ChromaModel.Input("model", tooltip="From Chroma Load Model or another Chroma Apply LoRA."),
                io.Combo.Input(
                    "lora",
                    options=[NO_FILE, *host.lora_names()],
                    default=NO_FILE,
                    tooltip="A file in the host's LoRA folders. Not read when lora_name is linked.",
                ),
                io.Float.Input(
                    "strength", default=1.0, min=-4.0, max=4.0, step=0.05, tooltip="1: as trained. 0: no effect."
                ),
                io.Combo.Input(
                    "mode",
                    options=list(get_args(LoraMode)),
                    default="live",
                    tooltip="live: beside the weights; changing the strength costs nothing. merged: into the "
                    "weights before they are quantised; a little faster, and reloads the model when changed.",
                    optional=True,
                    advanced=True,
                ),
                io.Boolean.Input(
                    "allow_partial",
                    default=False,
                    tooltip="Apply what fits when some of the file's modules do not belong to this model.",
                    optional=True,
                    advanced=True,
                ),
                io.String.Input(
                    "lora_name",
                    optional=True,
                    force_input=True,
                    tooltip="A LoRA by name, e.g. one that Chroma Wait for Training has just made.",
                ),
            ],
            outputs=[
                ChromaModel.Output("model", tooltip="The model with the LoRA on it."),
                io.String.Output("report", tooltip="What was applied."),
            ],
        )

    @classmethod
    def validate_inputs(cls, lora, input_types) -> bool:
        """Any name passes here: the file may be trained by the very prompt that is being queued."""
        return True

    @classmethod
    def fingerprint_inputs(cls, lora=None, lora_name=None, **_) -> list[str]:
        """A file may be replaced by another of the same name."""
        chosen = lora_name or lora
        return [chosen, host.file_state(host.lora_path(chosen))] if chosen in host.lora_names() else [str(chosen)]

    @classmethod
    def execute(cls, model, lora, strength, mode="live", allow_partial=False, lora_name=None) -> io.NodeOutput:
        name = lora_name or lora
        if name == NO_FILE:
            raise LoraError("No LoRA is chosen. Pick a file from the list, link a lora_name, or take this node out.")
        use = LoraUse(str(host.lora_path(name)), strength, mode, allow_partial)
        report, remark = _report(model.spec, use)
        if remark:
            host.warn(f"{name}: {remark}")
            report = f"WARNING: {remark}\n{report}"
        return io.NodeOutput(model.with_lora(use), f"{name} at {strength:g}, {mode}: {report}")


def _report(spec: ModelSpec, use: LoraUse) -> tuple[str, str | None]:
    """What the file holds and how it fits, and a remark when it was trained on another base.

    Raises LoraError if it does not fit. No weights are loaded for that, and no large file is read.
    """
    lora = read_lora(use.path)
    fit = check_fits(transformer_outline(spec), lora, use.allow_partial)
    return f"{fit.report()}. {describe(lora)}", base_warning(lora.metadata, spec)


NODES = [ChromaApplyLora]
