"""Loading Chroma: what a model is, not its weights, travels over the links."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ..chroma_core.errors import ModelFileError
from ..chroma_core.loading.hub import OnDownload
from ..chroma_core.loading.load import describe
from ..chroma_core.loading.model_files import in_checkpoint, locate
from ..chroma_core.loading.spec import ModelHandle, ModelSpec, Offload
from ..chroma_core.memory import Settings, estimate, in_gib, memory_plan
from ..chroma_core.model.flavours import FLAVOURS
from ..chroma_core.model.latents import PATCH
from ..chroma_core.options import option_of
from ..chroma_core.weights.identify import Part
from . import host
from .option_widgets import ADVANCED, values_at, widget
from .sockets import ChromaModel, ChromaTextEncoder, schema

PUBLISHED = "as published"

PARTS: tuple[Part, ...] = ("transformer", "text_encoder", "vae")

T5_VOCABULARY = 32128
"""Rows of the published T5's token table; a T5 of this size reads the tokens of the published tokenizer."""

FULL_SIZE: dict[str, dict[str, int]] = {
    "transformer": {"joint_attention_dim": 4096, "in_channels": 64},
    "text_encoder": {"d_model": 4096},
    "vae": {"latent_channels": 16},
}
"""What must agree between the parts, as it is in every published flavour."""


class ChromaLoadModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "model",
            node_id="ChromaLoadModel",
            display_name="Chroma Load Model",
            description="Chooses a Chroma model, from files on this machine or from the Hub, and how to hold it in "
            "memory. Files are checked here; weights are loaded when a node needs them.",
            search_aliases=[
                "load chroma",
                "chroma loader",
                "chroma checkpoint",
                "load checkpoint",
                "checkpoint loader",
                "load diffusion model",
                "unet loader",
                "chroma1-hd",
                "chroma1-base",
                "chroma1-flash",
                "t5",
                "gguf",
                "fp8",
                "low vram",
                "offload",
                "memory plan",
            ],
            inputs=[
                widget(
                    ModelSpec,
                    "flavour",
                    default="tiny",
                    tooltip=f"{option_of(ModelSpec, 'flavour').sentence} Of all but tiny, the parts that are "
                    f"'{PUBLISHED}' below are fetched from the Hub the first time: transformer 17.8 GB, text encoder "
                    "9.5 GB, VAE 0.2 GB.",
                ),
                widget(ModelSpec, "precision"),
                widget(ModelSpec, "text_precision"),
                widget(ModelSpec, "offload"),
                io.Combo.Input(
                    "folder",
                    options=[PUBLISHED, *host.model_folders()],
                    default=PUBLISHED,
                    tooltip="A whole model of your own in diffusers layout, from ComfyUI's models/diffusers folder, "
                    "instead of the flavour's published weights. The flavour then only sets the defaults.",
                    **ADVANCED,
                ),
                _file_input(
                    "transformer",
                    "A Chroma transformer from models/diffusion_models: .safetensors in the original or in diffusers "
                    "layout (bf16, fp16, fp32, fp8 or one of ComfyUI's quantised formats), .gguf, or a folder with a "
                    "diffusers transformer. Of models/checkpoints, the files with a Chroma in them: what they hold of "
                    "text encoder and VAE is used, too.",
                ),
                _file_input(
                    "text_encoder",
                    "A T5-XXL text encoder from models/text_encoders: .safetensors (fp16, bf16, fp8 or one of "
                    "ComfyUI's quantised formats), .gguf, or a folder. Its tokenizer comes with ComfyUI.",
                ),
                _file_input("vae", "The Flux VAE (ae.safetensors) from models/vae, in either layout, or a folder."),
                widget(ModelSpec, "resident_blocks"),
                widget(ModelSpec, "offload_during_startup"),
                keep_quantised(),
                widget(ModelSpec, "compute"),
            ],
            outputs=outputs(io.Vae.Output("vae", tooltip="The VAE, for ComfyUI's VAE Encode and VAE Decode.")),
        )

    @classmethod
    def fingerprint_inputs(cls, folder=PUBLISHED, transformer=PUBLISHED, text_encoder=PUBLISHED, vae=PUBLISHED, **_):
        """A file may be replaced by another of the same name."""
        chosen = dict(zip(PARTS, (transformer, text_encoder, vae), strict=True))
        states = [
            host.path_state(host.model_file(part, name))
            for part, name in chosen.items()
            if name != PUBLISHED and name in host.model_file_names(part)
        ]
        return [folder, *chosen.values(), *states]

    @classmethod
    def execute(
        cls,
        folder=PUBLISHED,
        transformer=PUBLISHED,
        text_encoder=PUBLISHED,
        vae=PUBLISHED,
        **held: Any,
    ) -> io.NodeOutput:
        spec, planned = checked(
            spec_of(
                **held,
                folder=None if folder == PUBLISHED else host.model_folder(folder),
                transformer=_path("transformer", transformer),
                text_encoder=_path("text_encoder", text_encoder),
                vae=_path("vae", vae),
            ),
            host.Downloads(),
        )
        return io.NodeOutput(ModelHandle(spec), spec, host.host_vae(spec), memory_plan_of(spec, planned))


def keep_quantised() -> Any:
    """The widget that has no field of its own: where quantised weights are kept is not the user's to say."""
    return io.Boolean.Input(
        "keep_quantised",
        default=False,
        tooltip="Keep a copy of quantised weights in models/chromakit/quantised, so that the next start "
        "neither reads the full weights nor quantises again. Takes as much disk as the model does memory.",
        **ADVANCED,
    )


def outputs(*between: Any) -> list[Any]:
    """What a node gives that chooses a model; `between` before its memory plan."""
    return [
        ChromaModel.Output("model", tooltip="The model, for Chroma Sampler, Chroma Apply LoRA and Chroma Train LoRA."),
        ChromaTextEncoder.Output("text_encoder", tooltip="The text encoder, for Chroma Text Encode."),
        *between,
        io.String.Output(
            "memory_plan",
            tooltip="What each precision and offload mode would need on this machine, and what is "
            "recommended. Link it to Preview as Text.",
        ),
    ]


def spec_of(
    *, offload: Offload = "none", resident_blocks: int = 2, keep_quantised: bool = False, **fields: Any
) -> ModelSpec:
    """The specification that a node's widgets and files mean. Raises ConfigError."""
    return ModelSpec(
        offload=offload,
        resident_blocks=resident_blocks if offload == "block" else 2,  # else unread, and no reason to load again
        quantised_folder=str(host.quantised_folder()) if keep_quantised else None,
        **fields,
    )


SAME = ("flavour", "precision", "text_precision", "offload", "resident_blocks", "offload_during_startup", "compute")
"""Widgets that are fields of the specification, as they are."""


def widgets_of(spec: ModelSpec) -> dict[str, Any]:
    """The node's widgets that mean a specification; a file's bare name where it is in none of the host's folders."""
    return {
        **values_at(spec, {name: name for name in SAME}),
        "folder": Path(spec.folder).name if spec.folder else PUBLISHED,
        **{part: part_name(part, getattr(spec, part)) for part in PARTS},
        "keep_quantised": spec.quantised_folder is not None,
    }


def part_name(part: Any, path: str | None) -> str:
    """A model file's name in the host's folders; its bare name when it is in none of them."""
    return PUBLISHED if path is None else host.model_file_name(part, path) or Path(path).name


def memory_plan_of(spec: ModelSpec, planned: str) -> str:
    """The table of what fits; when the chosen settings do not, that is also said on the node."""
    here = host.here()
    settings = Settings.of(spec, flavour=planned)
    needed = estimate(settings, here)
    if needed.sampling_peak_bytes > here.device_budget:
        host.say(
            f"These settings need about {in_gib(needed.sampling_peak_bytes)}, and {in_gib(here.device_budget)} are "
            f"usable here. {needed.recommendation.sentence}"
        )
    return memory_plan(settings, here).text


def _file_input(part: Part, tooltip: str) -> io.Combo.Input:
    return io.Combo.Input(
        part,
        options=[PUBLISHED, *host.model_file_names(part)],
        default=PUBLISHED,
        tooltip=f"{tooltip} '{PUBLISHED}': the flavour's own, or that of the folder.",
        optional=True,
    )


def _path(part: Part, name: str) -> str | None:
    return None if name == PUBLISHED else host.model_file(part, name)


def checked(spec: ModelSpec, on_download: OnDownload | None = None) -> tuple[ModelSpec, str]:
    """The specification with its tokenizer, and the flavour whose memory it needs, when all its parts fit together.

    Only headers are read. The user's own files come first, so that a wrong one is refused before anything is fetched.

    Args:
        on_download: see `hub.fetch`; who may not download asks `hub.is_here` before.
    """
    held = {part: str(path) for part in PARTS if (path := in_checkpoint(spec, part)) and getattr(spec, part) is None}
    if held:
        spec = replace(spec, **held)
        host.say(f"{' and '.join(held).replace('_', ' ')}: out of '{Path(held.popitem()[1]).name}', too.")
    published: list[Part] = [part for part in PARTS if getattr(spec, part) is None]
    own: list[Part] = [part for part in PARTS if part not in published]
    found = {part: _described(spec, part) for part in own}
    if published and spec.folder is None and FLAVOURS[spec.flavour].repository:
        _check_fit({**FULL_SIZE, **found})  # before anything is fetched
        host.say(
            f"{', '.join(published).replace('_', ' ')} of {FLAVOURS[spec.flavour].repository}: what is not on this "
            "machine yet is fetched from the Hub."
        )
    for part in published:
        try:
            found[part] = _described(spec, part, on_download)
        except ModelFileError as error:
            raise ModelFileError(f"{error}{_what_is_here(spec, part)}") from error
    _check_fit(found)
    if spec.text_encoder and not spec.folder and found["text_encoder"].get("vocab_size") == T5_VOCABULARY:
        tokenizer = host.t5_tokenizer()
        spec = spec if tokenizer is None else replace(spec, tokenizer=str(tokenizer))
    locate(spec, "tokenizer", on_download)
    if FLAVOURS[spec.flavour].folder is None or _value(found, "transformer", "joint_attention_dim") < 4096:
        return spec, spec.flavour
    host.warn(
        f"These are files of a full-size Chroma, but the flavour is {spec.flavour}. Choose the flavour they belong to: "
        "LoRAs trained on them record it."
    )
    return spec, "base"


def _described(spec: ModelSpec, part: Part, on_download: OnDownload | None = None) -> dict[str, Any]:
    """A part's configuration, from its header; what there is to know of its file is said on the node."""
    component = describe(spec, part, on_download)
    for note in component.notes:
        host.say(note)
    return component.config


def _what_is_here(spec: ModelSpec, part: Part) -> str:
    """The user's own files that would do for a part, as a sentence; empty when there are none."""
    fitting = []
    for name in host.model_file_names(part):
        try:
            describe(replace(spec, **{part: host.model_file(part, name)}), part)
        except ModelFileError:
            continue
        fitting.append(name)
    return f" On this machine these would do as {part}: {', '.join(fitting[:8])}." if fitting else ""


def _check_fit(found: dict[str, dict[str, Any]]) -> None:
    """Raises ModelFileError when the parts belong to different models."""
    read = _value(found, "transformer", "joint_attention_dim")
    given = _value(found, "text_encoder", "d_model")
    if read != given:
        raise ModelFileError(
            f"The text encoder gives {given} numbers a token, but the transformer reads {read}: they belong to "
            "different models. The real Chroma goes with T5-XXL (4096); choose both from your files, or neither."
        )
    channels, latents = _value(found, "transformer", "in_channels"), _value(found, "vae", "latent_channels")
    if channels != latents * PATCH**2:
        raise ModelFileError(
            f"The VAE has {latents} latent channels, but the transformer reads {channels // PATCH**2}: they belong to "
            "different models. Chroma goes with the Flux VAE (16 channels, ae.safetensors)."
        )


def _value(found: dict[str, dict[str, Any]], part: str, name: str) -> int:
    """A number of a part's configuration; one that is left out is that of full-size Chroma."""
    return found[part].get(name, FULL_SIZE[part][name])


NODES = [ChromaLoadModel]
