"""Between ComfyUI's own types and ours: a MODEL that its guiders and samplers can drive, made of a CHROMA_MODEL; and
what its loaders have loaded, as ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..chroma_core.errors import ConfigError
from ..chroma_core.loading.spec import LoraUse, ModelHandle, ModelSpec
from ..chroma_core.model.latents import PATCH, image_ids, pack, unpack
from ..chroma_core.model.transformer import ChromaTransformer
from ..chroma_core.weights.identify import Part
from . import host
from .loaders import SAME, checked, keep_quantised, memory_plan_of, outputs, spec_of
from .lora import put_on
from .option_widgets import widget
from .sockets import ChromaModel, schema


class HostDiffusionModel(torch.nn.Module):
    """Chroma's transformer in the shape in which ComfyUI calls a diffusion model; it holds a handle, no weights.

    Weights stay with the pack's cache, so quantised models and LoRAs work here as in Chroma Sampler, and ComfyUI has
    nothing to patch or move.
    """

    dtype = torch.float32
    """What ComfyUI is told: latents and sigma reach `forward` unrounded, as in Chroma Sampler."""

    def __init__(self, handle: ModelHandle):
        super().__init__()
        self.handle = handle
        self._opened: ChromaTransformer | None = None

    @contextmanager
    def opened(self) -> Iterator[ChromaTransformer]:
        """The transformer, loaded; within an outer `opened` block, the one that is loaded already."""
        if self._opened is not None:
            yield self._opened
            return
        with host.working():
            with host.components.transformer(self.handle, host.device()) as transformer:
                self._opened = transformer
                try:
                    yield transformer
                finally:
                    self._opened = None
            host.stay_known()  # ComfyUI's sampling loads models of its own beside this one

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor, **kwargs: Any) -> Tensor:
        """Velocity [B, C, H, W] for latents `x` at σ = `timestep` [B] and text states `context` [B, T, channels].

        An `attention_mask` [B, T] of booleans or 0/1 hides text tokens. Latents are in the transformer's own space.
        """
        if x.ndim != 4 or x.shape[-2] % PATCH or x.shape[-1] % PATCH:
            raise ConfigError(
                f"The latents have shape {tuple(x.shape)}; Chroma takes images whose sides are multiples of 16 "
                "pixels. Make them with Chroma Empty Latent, or change the size."
            )
        if kwargs.get("control") is not None:
            raise ConfigError("The conditioning carries a ControlNet, which Chroma does not take. Remove it.")
        mask = kwargs.get("attention_mask")
        with self.opened() as transformer:
            transformer.at_step(_place(timestep, kwargs.get("transformer_options") or {}))
            weight = transformer.x_embedder.weight
            channels = transformer.config.joint_attention_dim
            if context.ndim != 3 or context.shape[-1] != channels:
                raise ConfigError(
                    f"The conditioning has shape {tuple(context.shape)}; this model takes {channels} channels a token. "
                    "Encode the prompt with Chroma Text Encode, connected to the same Chroma Load Model."
                )
            rows, columns = x.shape[-2:]
            velocity = transformer(
                pack(x).to(weight.device, weight.dtype),
                context.to(weight.device, weight.dtype),
                timestep,
                image_ids(rows, columns, weight.device),
                None if mask is None else mask.to(weight.device, torch.bool),
            )
        return unpack(velocity.to(x.device, x.dtype), rows, columns)


def _place(timestep: Tensor, options: dict[str, Any]) -> float:
    """Where σ stands in the run that ComfyUI's sampler makes: 0 at its first step, 1 at its last; 0 if it does not say.

    Between two of its noise levels, where some samplers look, it is the place of the step that begins before.
    """
    levels = options.get("sample_sigmas")
    if levels is None or len(levels) < 3:
        return 0.0
    begun = int((levels[:-1].cpu() >= timestep.max().cpu() - 1e-6).sum()) - 1
    return max(0, begun) / (len(levels) - 2)


class ChromaHostModel(io.ComfyNode):
    """CHROMA_MODEL → MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "model",
            node_id="ChromaHostModel",
            display_name="Chroma Host Model",
            description="Makes a Chroma model drivable by ComfyUI's own guiders and samplers.",
            search_aliases=["guider", "cfg guider", "ksampler model", "native model", "convert model", "model patcher"],
            inputs=[ChromaModel.Input("model", tooltip="A Chroma model. Its LoRAs are applied before this node.")],
            outputs=[io.Model.Output(tooltip="For CFGGuider, BasicGuider, KSampler and the like.")],
        )

    @classmethod
    def execute(cls, model: ModelHandle) -> io.NodeOutput:
        module = HostDiffusionModel(model)
        return io.NodeOutput(host.as_host_model(module, module.opened))


LINKED: dict[Part, str] = {"transformer": "model", "text_encoder": "clip", "vae": "vae"}
"""The part of a model that each input brings."""


class ChromaFromHost(io.ComfyNode):
    """MODEL, CLIP, VAE → CHROMA_MODEL, CHROMA_TEXT_ENCODER: the files that they were read from, as Chroma Load Model
    would name them. What the graph tells is never loaded by ComfyUI."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "model",
            node_id="ChromaFromHost",
            display_name="Chroma from MODEL and CLIP",
            description="The files that ComfyUI's Load Diffusion Model, Load CLIP and Load VAE name, as a Chroma "
            "model: for graphs that have these nodes already. They are not loaded a second time.",
            search_aliases=[
                "load diffusion model",
                "unet loader",
                "load clip",
                "clip loader",
                "load checkpoint",
                "convert model",
                "stock model",
                "model to chroma",
            ],
            inputs=[
                io.Model.Input(
                    "model",
                    lazy=True,
                    tooltip="From Load Diffusion Model or Load Checkpoint. LoRAs of Load LoRA between "
                    "them are taken over; other changes are refused. weight_dtype is not read: see precision.",
                ),
                io.Clip.Input("clip", lazy=True, tooltip="From Load CLIP (any type that takes T5-XXL)."),
                io.Vae.Input(
                    "vae",
                    lazy=True,
                    optional=True,
                    tooltip="From Load VAE; for previews and training. Not linked: the flavour's published one (0.2 "
                    "GB), fetched the first time.",
                ),
                *(widget(ModelSpec, name, **({"default": "hd"} if name == "flavour" else {})) for name in SAME),
                keep_quantised(),
            ],
            outputs=outputs(),
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
        )

    @classmethod
    def check_lazy_status(cls, **given: Any) -> list[str]:
        """What the graph does not tell has to be loaded."""
        return [name for part, name in LINKED.items() if name in given and cls._in_graph(part) is None]

    @classmethod
    def _in_graph(cls, part: Part) -> host.LoadedFile | None:
        return host.file_in_graph(cls.hidden.dynprompt, cls.hidden.unique_id, LINKED[part], part)

    @classmethod
    def execute(cls, model=None, clip=None, vae=None, **held: Any) -> io.NodeOutput:
        found = {
            part: cls._in_graph(part) or (None if value is None else host.file_of(value, part))
            for part, value in zip(LINKED, (model, clip, vae), strict=True)
        }
        files: dict[str, Any] = {part: each.path for part, each in found.items() if each}
        spec, planned = checked(spec_of(**held, **files), host.Downloads())
        handle = ModelHandle(spec)
        for name, strength in found["transformer"].loras if found["transformer"] else ():
            handle, _ = put_on(handle, name, LoraUse(str(host.lora_path(name)), strength))
        return io.NodeOutput(handle, spec, memory_plan_of(spec, planned))


NODES = [ChromaHostModel, ChromaFromHost]
