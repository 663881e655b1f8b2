"""Sampling: a prompt as conditioning, an empty latent, the sampler."""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..chroma_core.errors import ConfigError
from ..chroma_core.loading.component_cache import live_name
from ..chroma_core.loading.spec import LoraUse, ModelHandle, ModelSpec
from ..chroma_core.lora.effects import Effects, effects_of
from ..chroma_core.model.images import decode, preview_image
from ..chroma_core.model.latents import FLUX_LATENTS, LatentFormat, snap_size
from ..chroma_core.sampling.recipe import Recipe, parse_overrides
from ..chroma_core.sampling.recipe import recipe as find_recipe
from ..chroma_core.sampling.sampler import SamplingSettings, StepInfo, sample
from ..chroma_core.sampling.text import apply_trigger
from ..chroma_core.training.config import TrainingConfig
from . import host
from .option_widgets import ADVANCED, changed, defaults_of, unfolded, widget, with_options
from .schedule import SHIFT_TIP, SHIFTS, end_step_widget, flow_shift_of, shift_value
from .sockets import (
    OURS,
    ChromaModel,
    ChromaSamplerOptionsType,
    ChromaTextEncoder,
    crop_latents,
    encoder_of,
    from_conditioning,
    noise_mask,
    prompt_to_encode_again,
    schema,
    to_conditioning,
)


class ChromaEmptyLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "sampling",
            node_id="ChromaEmptyLatent",
            display_name="Chroma Empty Latent",
            description="Empty latents of a size that Chroma can generate, and that size: sides are floored to "
            "multiples of 32.",
            search_aliases=["chroma latent", "empty latent", "size", "image size", "resolution"],
            inputs=[
                io.Int.Input(
                    "width", default=1024, min=32, max=4096, step=32, tooltip="Pixels. tiny was trained at 64."
                ),
                io.Int.Input(
                    "height", default=1024, min=32, max=4096, step=32, tooltip="Pixels. tiny was trained at 64."
                ),
                io.Int.Input(
                    "batch_size", default=1, min=1, max=64, tooltip="Images at once; each has a seed of its own."
                ),
            ],
            outputs=[
                io.Latent.Output("latent", tooltip="For Chroma Sampler or ComfyUI's own samplers."),
                io.Int.Output("effective_width", tooltip="The width after flooring, in pixels."),
                io.Int.Output("effective_height", tooltip="The height after flooring, in pixels."),
            ],
        )

    @classmethod
    def execute(cls, width, height, batch_size) -> io.NodeOutput:
        width, height = snap_size(width, height)
        format_ = LatentFormat()
        samples = torch.zeros(batch_size, format_.channels, height // format_.downscale, width // format_.downscale)
        return io.NodeOutput({"samples": samples}, width, height)


class ChromaTextEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "sampling",
            node_id="ChromaTextEncode",
            display_name="Chroma Text Encode",
            description="Encodes a prompt with T5, the way Chroma was trained: the real tokens and one visible pad "
            "token.",
            search_aliases=[
                "chroma prompt",
                "t5 encode",
                "clip text encode",
                "negative prompt",
                "trigger word",
                "conditioning",
            ],
            inputs=[
                ChromaTextEncoder.Input("text_encoder", tooltip="From Chroma Load Model."),
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    tooltip="The prompt. [trigger] stands for the trigger word. Empty is a good negative prompt.",
                ),
                io.String.Input(
                    "trigger",
                    default="",
                    tooltip="The word that [trigger] in the prompt becomes, e.g. the one the LoRA was trained with.",
                ),
            ],
            outputs=[io.Conditioning.Output("conditioning", tooltip="For Chroma Sampler or ComfyUI's own samplers.")],
        )

    @classmethod
    def execute(cls, text_encoder, text, trigger) -> io.NodeOutput:
        prompt = apply_trigger(text, trigger)
        with host.working():
            condition = host.components.text_encoder(text_encoder, host.device()).encode(prompt)
        if condition.truncated:
            host.warn(f"The prompt is too long: its last {condition.truncated} tokens were cut off.")
        return io.NodeOutput(to_conditioning(condition, text_encoder))


def sampler_options() -> dict[str, Any]:
    """The widgets of Chroma Sampler that few people set, by name."""
    found = [
        io.Combo.Input(
            "flow_shift",
            options=["recipe", *SHIFTS],
            default="recipe",
            tooltip=f"recipe: what the recipe says. {SHIFT_TIP}",
            **ADVANCED,
        ),
        shift_value(**ADVANCED),
        widget(SamplingSettings, "method", display_name="sampler_name"),
        widget(
            TrainingConfig,
            "recipe",
            tooltip="How text, noise and time are computed: canonical follows the model's author; the "
            "others reproduce what ComfyUI, ai-toolkit or diffusers generate.",
            **ADVANCED,
        ),
        widget(SamplingSettings, "spacing", display_name="scheduler"),
        widget(SamplingSettings, "start_step"),
        end_step_widget(),
        widget(SamplingSettings, "add_noise"),
        widget(TrainingConfig, "recipe_overrides", kind=io.String, default=""),
        widget(SamplingSettings, "first_block_cache"),
    ]
    return {each.id: each for each in found}


class ChromaSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        folded = sampler_options()
        return schema(
            "sampling",
            node_id="ChromaSampler",
            display_name="Chroma Sampler",
            description="Generates images. The trainer's previews come from the same sampler: same prompt, seed and "
            "settings, same image.",
            search_aliases=[
                "ksampler",
                "chroma generate",
                "generate image",
                "sample chroma",
                "text to image",
                "txt2img",
                "image to image",
                "img2img",
                "inpaint",
            ],
            inputs=[
                ChromaModel.Input("model", tooltip="From Chroma Load Model or Chroma Apply LoRA."),
                io.Conditioning.Input(
                    "positive", tooltip="What to generate. From Chroma Text Encode, or ComfyUI's T5 encoder."
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="What to steer away from. Not linked: the empty prompt. Not read when guidance is 1 or "
                    "less.",
                ),
                io.Latent.Input(
                    "latent", tooltip="Empty for a new image, or an encoded image (and noise mask) to change."
                ),
                widget(SamplingSettings, "seed", control_after_generate=True),
                widget(SamplingSettings, "steps"),
                widget(SamplingSettings, "guidance", display_name="cfg"),
                widget(SamplingSettings, "tail_bias"),
                # Saved workflows hold values by position: new widgets go to the end.
                *(folded.pop(name) for name in ("flow_shift", "flow_shift_value", "method")),
                widget(SamplingSettings, "denoise"),
                *folded.values(),
                ChromaSamplerOptionsType.Input(
                    "options",
                    optional=True,
                    tooltip="From Chroma Sampler Options, in place of the advanced inputs. What both set in different "
                    "ways is an error.",
                ),
            ],
            outputs=[io.Latent.Output("latent", tooltip="The generated latents, for VAE Decode.")],
        )

    @classmethod
    def execute(cls, model, positive, latent, negative=None, options=None, **widgets: Any) -> io.NodeOutput:
        widgets = with_options("Chroma Sampler", widgets, options, defaults_of(sampler_options().values()))
        settings, rules = settings_of(**widgets)
        with host.working():
            return io.NodeOutput(_sample(model, positive, negative, latent, settings, rules))


def settings_of(
    flow_shift: str = "recipe",
    flow_shift_value: float = 1.0,
    end_step: int = 0,
    recipe: str = "canonical",
    recipe_overrides: str = "",
    **fields: Any,
) -> tuple[SamplingSettings, Recipe]:
    """What the sampler's widgets mean. Raises ConfigError."""
    shift = flow_shift_of(flow_shift, flow_shift_value)
    settings = SamplingSettings(flow_shift=shift, end_step=end_step or None, **fields)
    return settings, find_recipe(recipe, parse_overrides(recipe_overrides))


class ChromaSamplerOptions(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "sampling",
            node_id="ChromaSamplerOptions",
            display_name="Chroma Sampler Options",
            description="What few images need: another sampler, scheduler, flow shift or recipe, a part of the steps. "
            "For Chroma Sampler.",
            search_aliases=["sampler name", "scheduler", "flow shift", "start at step", "end at step", "recipe"],
            inputs=unfolded(sampler_options().values()),
            outputs=[ChromaSamplerOptionsType.Output("options", tooltip="For the options of Chroma Sampler.")],
        )

    @classmethod
    def execute(cls, **widgets: Any) -> io.NodeOutput:
        return io.NodeOutput(changed(widgets, defaults_of(sampler_options().values())))


def _sample(
    model: ModelHandle,
    positive: list,
    negative: list | None,
    latent: dict[str, Any],
    settings: SamplingSettings,
    recipe: Recipe,
) -> dict[str, Any]:
    """Between ComfyUI's LATENT and CONDITIONING and the core's sampler."""
    device = host.device()
    format_ = FLUX_LATENTS
    samples, notice = crop_latents(latent, format_, recipe.size_multiple)
    said = f"{notice}\nRecipe {recipe.describe()}".strip()
    tell = host.warn if notice else host.say
    tell(said)
    B, _, rows, columns = samples.shape
    mask = noise_mask(latent, recipe.size_multiple // format_.downscale)
    matrix = host.components.preview_matrix(model.spec, device) if host.wants_previews() else None
    positive = _encoded_for(recipe, positive)
    if settings.guidance > 1:
        negative = _encoded_for(recipe, negative) if negative else _empty(recipe, positive)
    else:
        negative = None
    progress = host.Progress(settings.run_steps)

    def on_step(info: StepInfo) -> None:
        image = None if matrix is None else preview_image(info.denoised_BCHW, matrix)
        progress.step(info.step, info.steps, image)
        if settings.first_block_cache and info.step == info.steps:
            tell(f"{said}\nApproximate: the first-block cache cut {info.cut_short:.0%} of the passes short.")

    host.make_room(0)  # a transformer that is loaded already still needs room to compute
    with host.components.transformer(model, device) as transformer:
        channels = transformer.config.joint_attention_dim
        x = sample(
            transformer,
            from_conditioning(positive, B, channels),
            from_conditioning(negative, B, channels) if negative else None,
            width=columns * format_.downscale,
            height=rows * format_.downscale,
            settings=settings,
            recipe=recipe,
            latent_format=format_,
            start_BCHW=format_.to_model(samples) if torch.count_nonzero(samples) else None,
            noise_mask_BHW=mask,
            on_step=on_step,
        )
    result = {**latent, "samples": format_.to_vae(x).to(samples.device)}
    result[OURS] = {"recipe": recipe.to_dict(), "settings": settings.to_dict()}
    result.pop("downscale_ratio_spacial", None)  # ComfyUI's empty latents carry it for models of another ratio
    if mask is not None:
        result["noise_mask"] = mask[:, None]
    return result


def block_effects(
    model: ModelHandle, lora: str, positive: list, negative: list | None, latent: dict[str, Any], groups: int
) -> Effects:
    """What each group of a LoRA's blocks does to the image that Chroma Sampler gave as `latent`.

    Where the model has that LoRA already, its strength there counts; otherwise it is put on at 1. Raises ConfigError
    for latents that are not those of a whole run from noise.
    """
    note, device = latent.get(OURS) or {}, host.device()
    if "settings" not in note:
        raise ConfigError("The latent is not Chroma Sampler's: link the latent that it gives for the image.")
    settings = SamplingSettings(**note["settings"] | {"first_block_cache": 0.0})  # its error would count as an effect
    recipe = Recipe.from_dict(note["recipe"])
    if (settings.denoise, settings.start_step, settings.end_step, settings.add_noise) != (1.0, 0, None, True):
        raise ConfigError("The latent was not sampled from noise in one run: link one that was (denoise 1, all steps).")
    own = next((use for use in model.loras if Path(use.path) == Path(lora)), LoraUse(lora))
    others = tuple(use for use in model.loras if use != own)
    handle = replace(model, loras=(*others, replace(own, mode="live", schedule="")))
    positive = _encoded_for(recipe, positive)
    if settings.guidance > 1:
        negative = _encoded_for(recipe, negative) if negative else _empty(recipe, positive)
    else:
        negative = None
    rows, columns = latent["samples"].shape[-2:]
    with host.working():
        host.make_room(0)
        with host.components.transformer(handle, device) as transformer:
            channels = transformer.config.joint_attention_dim
            # A group more or less than asked for, where the blocks do not divide; one for layers outside of blocks.
            total = (groups + 3) * settings.run_steps
            progress, done = host.Progress(total), count(1)

            def generate() -> Tensor:
                return sample(
                    transformer,
                    from_conditioning(positive, 1, channels),
                    from_conditioning(negative, 1, channels) if negative else None,
                    width=columns * FLUX_LATENTS.downscale,
                    height=rows * FLUX_LATENTS.downscale,
                    settings=settings,
                    recipe=recipe,
                    on_step=lambda _: progress.step(next(done), total),
                )

            name = live_name(sum(use.mode == "live" for use in handle.loras) - 1)
            latents = effects_of(transformer, name, groups, generate)
        vae = host.components.vae(model.spec, device)
        return Effects({label: decode(vae, each)[0] for label, each in latents.items()})


def _encoded_for(recipe: Recipe, conditioning: list) -> list:
    """The conditioning, encoded again if the recipe treats text in another way."""
    again = prompt_to_encode_again(conditioning, recipe)
    return conditioning if again is None else _encode(*again, recipe)


def _empty(recipe: Recipe, positive: list) -> list:
    spec = encoder_of(positive)
    if spec is None:
        raise ConfigError(
            "With a guidance above 1 and a prompt from another encoder, a negative prompt must be linked (an empty one "
            "will do). Link one, or set the guidance to 1."
        )
    return _encode("", spec, recipe)


def _encode(text: str, spec: ModelSpec, recipe: Recipe) -> list:
    return to_conditioning(host.components.text_encoder(spec, host.device()).encode(text, recipe), spec, recipe)


NODES = [ChromaTextEncode, ChromaEmptyLatent, ChromaSampler, ChromaSamplerOptions]
