"""LoRA files: put on a model, looked into, and written in the names of another program."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from comfy_api.latest import io, ui
from PIL import Image
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from ..chroma_core.checkpoints.merge import norms_on
from ..chroma_core.errors import ConfigError, LoraError
from ..chroma_core.files import file_stem, write_atomic
from ..chroma_core.loading.load import transformer_outline
from ..chroma_core.loading.model_files import base_warning
from ..chroma_core.loading.spec import LoraMode, LoraUse, ModelHandle, ModelSpec
from ..chroma_core.lora.adapters import check_fits
from ..chroma_core.lora.convert import DTYPES, convert_lora
from ..chroma_core.lora.files import lora_of, read_lora
from ..chroma_core.lora.key_formats import KEY_FORMATS
from ..chroma_core.lora.lowrank import LARGEST_RANK, Truncation
from ..chroma_core.lora.modules import LoraFile
from ..chroma_core.lora.report import describe, heat_map, lora_report, report_text, update_norms
from ..chroma_core.model.drawing import side_by_side
from . import host
from .option_widgets import widget
from .sampling import block_effects
from .sockets import ChromaModel, schema, to_image

NO_FILE = "none"
NOT_ASKED = "link positive and latent"
"""What stands where no image was asked for."""


def size_inputs(rank: int, otherwise: str) -> list[Any]:
    """How much of a LoRA is kept: a rank (0: `otherwise`), a share of ‖ΔW‖²."""
    return [
        io.Int.Input(
            "rank",
            default=rank,
            min=0,
            max=LARGEST_RANK,
            tooltip=f"Keep at most this rank in every layer. {otherwise}",
            optional=True,
        ),
        io.Float.Input(
            "energy",
            default=1.0,
            min=0.01,
            max=1.0,
            step=0.01,
            tooltip="Keep the smallest rank that holds this share of the change (‖ΔW‖²) in every layer, e.g. 0.95. "
            "1: all of it.",
            optional=True,
        ),
    ]


def kept(rank: int, energy: float) -> Truncation:
    """What the widgets of `size_inputs` ask for."""
    return Truncation(rank or None, energy if energy < 1 or not rank else None)


def _file_inputs() -> list[Any]:
    """A LoRA by its file, and by a name over a link."""
    return [
        io.Combo.Input(
            "lora",
            options=[NO_FILE, *host.lora_names()],
            default=NO_FILE,
            tooltip="A file in ComfyUI's LoRA folders. Not read when lora_name is linked.",
        ),
        io.String.Input(
            "lora_name",
            optional=True,
            force_input=True,
            tooltip="A LoRA by name, e.g. one that Chroma Wait for Training has just made.",
        ),
    ]


class ChromaApplyLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        file, file_name = _file_inputs()
        return schema(
            "LoRA",
            node_id="ChromaApplyLora",
            display_name="Chroma Apply LoRA",
            description="Puts a LoRA on the model. Chain several. A LoRA that does not fit is an error, never ignored.",
            search_aliases=["load lora", "chroma lora", "lora loader", "use lora", "lora strength", "lora stack"],
            inputs=[
                ChromaModel.Input("model", tooltip="From Chroma Load Model or another Chroma Apply LoRA."),
                file,
                widget(LoraUse, "strength"),
                widget(LoraUse, "mode"),
                widget(LoraUse, "allow_partial"),
                file_name,
                widget(LoraUse, "blocks", default=""),
                widget(LoraUse, "schedule", default=""),
                io.LoraModel.Input(
                    "lora_model",
                    optional=True,
                    tooltip="A LoRA over a link, e.g. from ComfyUI's Train LoRA, in place of a file. A copy is kept "
                    "in output/chromakit/lora_models.",
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
    def execute(
        cls,
        model,
        lora,
        strength,
        mode: LoraMode = "live",
        allow_partial=False,
        lora_name=None,
        blocks="",
        schedule="",
        lora_model=None,
    ) -> io.NodeOutput:
        name = lora_name or lora
        if lora_model is not None:
            name, path = "LORA_MODEL", _kept(lora_model)
        elif name == NO_FILE:
            raise LoraError(
                "No LoRA is chosen. Pick a file from the list, link a lora_name or a lora_model, or take this node out."
            )
        else:
            path = host.lora_path(name)
        use = LoraUse(str(path), strength, mode, allow_partial, blocks, schedule)
        return io.NodeOutput(*put_on(model, name, use))


def _kept(tensors: Mapping[str, Tensor]) -> Path:
    """A file with a LORA_MODEL in it, as a CHROMA_MODEL names its LoRAs; written once, under its content's digest.

    Raises LoraError for what is no LoRA of Chroma's.
    """
    lora_of(tensors)
    content = safetensors_bytes({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()})
    path = host.lora_models_folder() / f"{hashlib.sha256(content).hexdigest()}.safetensors"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content)
    return path


def put_on(model: ModelHandle, name: str, use: LoraUse) -> tuple[ModelHandle, str]:
    """The model with the LoRA of that name, and a report. Raises LoraError if it does not fit."""
    report, remark = _report(model.spec, use)
    if remark:
        host.warn(f"{name}: {remark}")
        report = f"WARNING: {remark}\n{report}"
    return model.with_lora(use), f"{name} at {use.strength:g}, {use.mode}: {report}"


def _report(spec: ModelSpec, use: LoraUse) -> tuple[str, str | None]:
    """What the file holds and how it fits, and a remark when it was trained on another base.

    Raises LoraError if it does not fit. No weights are loaded for that, and no large file is read.
    """
    lora = read_lora(use.path)
    fit = check_fits(transformer_outline(spec), lora, use.allow_partial)
    use.strengths(lora.modules)
    return f"{fit.report()}. {describe(lora)}", base_warning(lora.metadata, spec)


def _file_state(lora: str | None, lora_name: str | None) -> str:
    """A text that changes when the chosen file does."""
    chosen = lora_name or lora
    return f"{chosen} {host.file_state(host.lora_path(chosen))}" if chosen in host.lora_names() else str(chosen)


class ChromaInspectLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "LoRA",
            node_id="ChromaInspectLora",
            display_name="Chroma Inspect LoRA",
            description="What a LoRA holds: layers, rank, alpha, size, base, recipe, trigger word, training, warnings; "
            "and an image of how much it changes where. Any key format.",
            search_aliases=[
                "lora info",
                "lora metadata",
                "read lora",
                "lora details",
                "lora layers",
                "analyse lora",
                "trigger word",
            ],
            is_output_node=True,
            inputs=[
                *_file_inputs(),
                io.LoraModel.Input(
                    "lora_model",
                    optional=True,
                    tooltip="A LoRA over a link, in place of a file. It has no header: base and recipe are unknown.",
                ),
                ChromaModel.Input(
                    "model",
                    optional=True,
                    tooltip="Also say whether the LoRA fits this model, whether it was trained on it, and how large "
                    "the change is against its weights.",
                ),
                io.Conditioning.Input(
                    "positive",
                    optional=True,
                    tooltip="With model and latent: also sample that image without one group of blocks at a time.",
                ),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="What the image steers away from, as in Chroma Sampler."
                ),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="What Chroma Sampler made from noise: its size, seed and settings are sampled again.",
                ),
                io.Int.Input(
                    "groups",
                    default=8,
                    min=1,
                    max=57,
                    tooltip="About how many groups the blocks are taken in. Each costs a sampling, with two on top.",
                    optional=True,
                    advanced=True,
                ),
            ],
            outputs=[
                io.String.Output("report", tooltip="What the LoRA is, as text."),
                io.Image.Output("heat_map", tooltip="The size of the change in every layer: bright is large."),
                io.Image.Output("effects", tooltip="What each group of blocks does to the image, if one is linked."),
            ],
        )

    @classmethod
    def validate_inputs(cls, lora, input_types) -> bool:
        """Any name passes here: the file may be trained by the very prompt that is being queued."""
        return True

    @classmethod
    def fingerprint_inputs(cls, lora=None, lora_name=None, **_) -> str:
        """A file may be replaced by another of the same name."""
        return _file_state(lora, lora_name)

    @classmethod
    def execute(
        cls,
        lora=NO_FILE,
        lora_name=None,
        lora_model=None,
        model=None,
        positive=None,
        negative=None,
        latent=None,
        groups=8,
    ) -> io.NodeOutput:
        chosen = lora_name or lora
        if lora_model is not None:
            name, path, found = "LORA_MODEL", None, lora_of(lora_model)
        elif chosen == NO_FILE:
            raise LoraError("No LoRA is chosen. Pick a file from the list, or link a lora_name or a lora_model.")
        else:
            name, path = chosen, host.lora_path(chosen)
            found = read_lora(path)
        norms, remarks = update_norms(found), []
        if model is not None:
            progress = host.Progress(1)
            norms = norms_on(found, model.spec, lambda done, total, _: progress.step(done, total))
            remarks = _remarks(found, model)
        text = report_text(lora_report(found, name, path, remarks, norms))
        image = to_image([heat_map(norms)])
        sheet = to_image([side_by_side({NOT_ASKED: Image.new("RGB", (256, 256))})])
        if positive is not None or latent is not None:
            if path is None or model is None or positive is None or latent is None:
                raise ConfigError(
                    "What each block does to an image needs a LoRA file, and model, positive and latent linked. "
                    "Link all of them, or none."
                )
            effects = block_effects(model, str(path), positive, negative, latent, groups)
            text, sheet = f"{text}\n\n{effects.report()}", to_image([effects.sheet()])
        host.say(_in_short(text))
        shown = ui.PreviewImage(image, cls=cls).as_dict()
        return io.NodeOutput(text, image, sheet, ui={**shown, "text": (text,)})


def _in_short(report: str) -> str:
    """The report's head, base and trigger word: on the node a line break is a blank, and the table would be a wall."""
    head, *rest = report.split("\n\n")
    told = [line for part in rest for line in part.splitlines() if line.startswith(("base:", "trigger:"))]
    return ". ".join([*head.splitlines(), *told])


def _remarks(lora: LoraFile, model: ModelHandle) -> list[str]:
    """What speaks against putting the LoRA on that model."""
    try:
        fit = check_fits(transformer_outline(model.spec), lora, allow_partial=True)
    except LoraError as error:
        return [str(error)]
    remark = base_warning(lora.metadata, model.spec)
    return [*([fit.report()] if fit.unmatched else []), *([remark] if remark else [])]


class ChromaConvertLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "LoRA",
            node_id="ChromaConvertLora",
            display_name="Chroma Convert LoRA",
            description="Writes a LoRA of any key format in the names of another program, exactly, with its recipe, "
            "into output/loras; at a smaller rank if wanted. No file of yours is overwritten.",
            search_aliases=[
                "lora format",
                "kohya",
                "peft",
                "diffusers",
                "export lora",
                "save lora",
                "lora dtype",
                "resize lora",
                "lora rank",
                "shrink lora",
            ],
            is_output_node=True,
            inputs=[
                *_file_inputs(),
                io.Combo.Input(
                    "dialect",
                    options=list(KEY_FORMATS),
                    default="universal",
                    tooltip="universal: ComfyUI and diffusers, complete. kohya, ai-toolkit: the original fused layers. "
                    "peft: a folder with adapter_config.json. See the help page for what each can hold.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(DTYPES),
                    default="keep",
                    tooltip="Number format. keep: as it is. bf16 halves an fp32 file and rounds it.",
                ),
                io.String.Input(
                    "filename",
                    default="",
                    tooltip="Empty: the LoRA's name and the key format. A name that another file has is an error.",
                    optional=True,
                ),
                *size_inputs(0, "0: the LoRA's own."),
            ],
            outputs=[
                io.LoraModel.Output("lora_model", tooltip="The converted tensors, for ComfyUI's own LoRA nodes."),
                io.String.Output("lora_name", tooltip="The new file's name, for Chroma Apply LoRA's lora_name."),
                io.String.Output("report", tooltip="What was written where, and what to know about it."),
            ],
        )

    @classmethod
    def validate_inputs(cls, lora, input_types) -> bool:
        """Any name passes here: the file may be trained by the very prompt that is being queued."""
        return True

    @classmethod
    def fingerprint_inputs(cls, lora=None, lora_name=None, **_) -> str:
        """Another file of the same name, or a converted file that was removed, is a reason to convert again."""
        return f"{_file_state(lora, lora_name)} {host.folder_state(host.loras_folder())}"

    @classmethod
    def execute(cls, dialect, dtype, lora=NO_FILE, lora_name=None, filename="", rank=0, energy=1.0) -> io.NodeOutput:
        chosen = lora_name or lora
        if chosen == NO_FILE:
            raise LoraError("No LoRA is chosen. Pick a file from the list, or link a lora_name.")
        folder = host.loras_folder()
        folder.mkdir(parents=True, exist_ok=True)
        stem = filename.strip().removesuffix(".safetensors")
        output: Path = folder / f"{file_stem(stem)}.safetensors" if stem else folder
        shrink = kept(rank, energy) if rank or energy < 1 else None
        made = convert_lora(host.lora_path(chosen), dialect, output, dtype, shrink)
        host.say(made.report())
        name = str(made.path.relative_to(folder))
        return io.NodeOutput(host.load_tensors(made.path), name, made.report(), ui={"text": (made.report(),)})


NODES = [ChromaApplyLora, ChromaInspectLora, ChromaConvertLora]
