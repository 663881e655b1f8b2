"""Loading Chroma: what a model is, not its weights, travels over the links."""

from __future__ import annotations

from typing import get_args

from comfy_api.latest import io

from ..chroma_core.flavours import FLAVOURS
from ..chroma_core.loading.spec import ModelHandle, ModelSpec, Offload
from ..chroma_core.precision import PRECISIONS
from . import host
from .sockets import ChromaModel, ChromaTextEncoder, schema

PUBLISHED = "as published"


class ChromaLoadModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ChromaLoadModel",
            display_name="Chroma Load Model",
            description="Chooses a Chroma model and how to hold it in memory. Its parts are loaded when a node needs "
            "them.",
            search_aliases=["load chroma", "chroma checkpoint", "chroma1-hd", "chroma1-base", "chroma1-flash", "t5"],
            inputs=[
                io.Combo.Input(
                    "flavour",
                    options=list(FLAVOURS),
                    default="tiny",
                    tooltip="base: balanced, the one to train on. hd: finer detail. flash: few steps, no guidance. "
                    "tiny: a miniature that ships with the pack and paints coloured shapes at 64 pixels, to try "
                    "everything with. All but tiny are fetched from the Hub the first time (about 27 GB).",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    default="bf16",
                    tooltip="How the transformer's weights are held. int8-quanto takes half the memory of bf16.",
                ),
                io.Combo.Input(
                    "text_precision",
                    options=list(PRECISIONS),
                    default="bf16",
                    tooltip="The same choice for the T5 text encoder.",
                    optional=True,
                    advanced=True,
                ),
                io.Combo.Input(
                    "offload",
                    options=list(get_args(Offload)),
                    default="none",
                    tooltip="none: keep every loaded part on the device. model: text encoder, transformer and VAE "
                    "take turns.",
                    optional=True,
                    advanced=True,
                ),
                io.Combo.Input(
                    "folder",
                    options=[PUBLISHED, *host.model_folders()],
                    default=PUBLISHED,
                    tooltip="A model of your own in diffusers layout, from the host's models/diffusers folder, "
                    "instead of the flavour's published weights. The flavour then only sets the defaults.",
                    optional=True,
                    advanced=True,
                ),
            ],
            outputs=[
                ChromaModel.Output(
                    "model", tooltip="The model, for Chroma Sampler, Chroma Apply LoRA and Chroma Train LoRA."
                ),
                ChromaTextEncoder.Output("text_encoder", tooltip="The text encoder, for Chroma Text Encode."),
                io.Vae.Output("vae", tooltip="The VAE, for the host's VAE Encode and VAE Decode."),
            ],
        )

    @classmethod
    def execute(cls, flavour, precision, text_precision="bf16", offload="none", folder=PUBLISHED) -> io.NodeOutput:
        own_folder = None if folder == PUBLISHED else host.model_folder(folder)
        spec = ModelSpec(flavour, own_folder, precision, text_precision, offload)
        if own_folder is None and FLAVOURS[flavour].repository:
            host.say(f"Using {FLAVOURS[flavour].repository}; what is not on this machine yet is fetched from the Hub.")
        return io.NodeOutput(ModelHandle(spec), spec, host.host_vae(spec))


NODES = [ChromaLoadModel]
