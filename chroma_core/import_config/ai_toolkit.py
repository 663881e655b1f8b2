"""ai-toolkit's YAML: what each option of a `sd_trainer` process becomes, section by section.

Facts from ai-toolkit's example configurations (config/examples/train_lora_chroma_*.yaml) and its option classes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from .convert import (  # isort: skip
    CONSTANT_LR, MODEL_SOURCE, OWN_LAYERS, START_FROM, STREAMED, Given, Lost, Near, Rule, Same, Table, alike, choice,
    ignored, lost, maps, only, part_source, when_on,
)  # fmt: skip
from .read import Unreadable, is_false, is_off, is_on, number, path, switch, text, whole

CACHE = "latents and text states are always cached"
NOT_BUILT = "not built in"
NO_WEIGHTING = "the loss is not weighted by the noise level here"
QTYPES = {
    "qfloat8": "fp8-quanto",
    "qint8": "int8-quanto",
    "qint4": "int4-quanto",
    "float8": "fp8-torchao",
    "int8": Near("int8", OWN_LAYERS),
    "uint8": Near("int8", OWN_LAYERS),
    "int4": Near("int4", OWN_LAYERS),
    "uint4": Near("int4", OWN_LAYERS),
}


def quantised(qtypes: dict[str, str]) -> Any:
    """`qtypes`: our option → ai-toolkit's qtype."""
    values, reason = {}, ""
    for to, qtype in qtypes.items():
        found = QTYPES.get(qtype, Lost(f"there is no {qtype}: choose a precision, e.g. int8 or nf4"))
        if isinstance(found, Lost):
            return found
        if isinstance(found, Near):
            found, reason = found.value, found.reason
        values[to] = found
    return Near(values, reason) if reason else values


def quantize(value: Any, given: Given) -> Any:
    if not switch(value):
        return Same("not used")
    qtypes = {"model.precision": text(given.get("qtype", "qfloat8"))}
    if "quantize_te" not in given:  # it follows `quantize`
        qtypes["model.text_precision"] = text(given.get("qtype_te", "qfloat8"))
    return quantised(qtypes)


def quantize_te(value: Any, given: Given) -> Any:
    if not switch(value):
        return Same("not used")
    return quantised({"model.text_precision": text(given.get("qtype_te", "qfloat8"))})


def dtype(value: Any, given: Given) -> Any:
    known = {"bf16": "bf16", "bfloat16": "bf16", "fp16": "fp16", "float16": "fp16", "fp32": "fp32", "float32": "fp32"}
    word = known.get(text(value).lower())
    if word is None:
        raise Unreadable("bf16, fp16 or fp32")
    if is_off(given.get("model.quantize")):
        return word
    reason = "a quantised base model computes in bf16 here"
    return Same(reason) if word == "bf16" else Near({}, reason)


def alpha(value: Any, given: Given) -> Any:
    rank, alpha = number(given.get("linear", given.get("rank", 16))), number(value)
    if text(given.get("type", "lora")).lower() == "lokr" or alpha == rank:
        return alpha
    return Near(rank, "ai-toolkit trains Chroma at scale 1, whatever stands here")


def timesteps(value: Any, given: Given) -> Any:
    word = text(value)
    if word in ("shift", "flux_shift", "lumina2_shift"):
        return {"objective.draw": "uniform", "objective.flow_shift": "dynamic"}
    draws = {
        "sigmoid": "logit_normal",
        "linear": "uniform",
        "weighted": Near("uniform", NO_WEIGHTING),
        "lognorm_blend": Near("logit_normal", "without the blend with even draws"),
    }
    return draws.get(word, Lost("draws are logit-normal, uniform or chroma"))


def limit(to: str, *everything: int) -> Rule:
    """A bound of the denoising steps; `everything`: steps that leave out nothing."""

    def convert(value: Any, given: Given) -> Any:
        if whole(value) in everything:
            return Same("all noise levels")
        return Near(round(1 - whole(value) / 1000, 6), "draws are squeezed into the range here, not drawn again")

    return Rule(convert, to, "1 − n / 1000, squeezed", "differs")


def parameters(known: dict[str, str], read: Callable[[Any], Any]) -> Rule:
    """A dictionary inside an option: known names map, the others are named in the reason."""

    def convert(value: Any, given: Given) -> Any:
        if not isinstance(value, dict):
            raise Unreadable("a section with options")
        values = {known[key]: read(item) for key, item in value.items() if key in known}
        others = ", ".join(str(key) for key in value if key not in known)
        return Near(values, f"without counterpart: {others}") if others else values

    return Rule(convert, ", ".join(dict.fromkeys(known.values())), "others have no counterpart")


def numbers(value: Any) -> Any:
    return [number(item) for item in value] if isinstance(value, list) else number(value)


def ema(value: Any, given: Given) -> Any:
    if not isinstance(value, dict):
        raise Unreadable("a section with use_ema and ema_decay")
    if not is_on(value, "use_ema"):
        return 0.0
    others = ", ".join(str(key) for key in value if key not in ("use_ema", "ema_decay"))
    decay = number(value.get("ema_decay", 0.999))
    return Near(decay, f"without counterpart: {others}") if others else decay


def prompts(value: Any, given: Given) -> Any:
    if not is_off(given.get("train.disable_sampling")):
        return Same("disable_sampling")
    prompts, with_settings = [], False
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, dict):
            with_settings |= bool(set(item) - {"prompt"})
            item = item.get("prompt")
        prompt, *settings = re.split(r"\s+--(?=\w)", text(item))
        with_settings |= bool(settings)
        prompts.append(prompt.strip())
    reason = "settings of single prompts are left out: all previews have the same size, steps and guidance"
    return Near(prompts, reason) if with_settings else prompts


def walk_seed(value: Any, given: Given) -> Any:
    if switch(value):
        return Same("prompt i has the seed + i here too")
    if len(given.get("prompts") or given.get("samples") or []) < 2:
        return Same("a single prompt")
    return Near({}, "prompt i has the seed + i here")


def caption_dropout(value: Any, given: Given) -> Any:
    reason = "a dropped caption is empty here; ai-toolkit leaves the trigger word in it"
    differs = number(value) > 0 and not is_off(given.get("trigger_word"))
    return Near(number(value), reason) if differs else number(value)


def resolutions(value: Any) -> list[int]:
    return sorted({whole(size) for size in (value if isinstance(value, list) else [value])})


def extension(value: Any) -> str:
    return "." + text(value).lstrip(".")


EVEN = when_on("objective.draw", Near("uniform", NO_WEIGHTING), "`uniform`, without the weighting")

# fmt: off
SECTIONS: dict[str, Table] = {
    "": {
        **lost({
            "sliders are not trained": "slider",
            "adapters other than LoRA are not trained": "adapter",
            "the text encoder's vocabulary is not trained": "embedding decorator",
        }),
        **ignored({
            "checked: sd_trainer": "type",
            "taken over as every dataset's trigger": "trigger_word",
            "places and reports": "training_folder device performance_log_every sqlite_db_path log_dir logging",
        }),
    },
    "network": {
        "type": choice("lora.kind", {
            **alike("dora lokr"), "lora": Same("an ordinary LoRA"), "locon": Near("lora", "Chroma has no convolutions"),
        }),
        "linear": maps("lora.rank", whole),
        "rank": maps("lora.rank", whole),
        "linear_alpha": Rule(alpha, "lora.alpha",
                             "if it is the rank; ai-toolkit trains Chroma at scale 1 whatever it is"),
        "dropout": maps("lora.dropout", number),
        "lokr_factor": maps("lora.lokr_factor", whole),
        "pretrained_lora_path": START_FROM,
        **lost({
            "give a rank": "lokr_full_rank",
            "choose the layers with lora.target; the names there are those of diffusers": "network_kwargs",
            NOT_BUILT: "lorm",
        }),
        **ignored({
            "linear_alpha counts": "alpha",
            "Chroma has no such layers": "conv conv_alpha transformer_only split_multistage_loras",
        }),
    },
    "save": {
        "dtype": choice("lora.save_dtype", {
            "float32": "fp32", "fp32": "fp32", "bf16": "bf16", "bfloat16": "bf16",
            **dict.fromkeys(("float16", "fp16"), Near("fp32", "LoRA files are written in fp32 or bf16")),
        }),
        "save_every": maps("checkpoint_every", whole),
        "max_step_saves_to_keep": maps("keep_checkpoints", whole),
        "save_format": choice("", {
            "safetensors": Same("the same"), "diffusers": Same("its names are diffusers' already"),
        }),
        **lost({"publishing is no part of a job": "push_to_hub"}),
        **ignored({"publishing is no part of a job": "hf_repo_id hf_private"}),
    },
    "train": {
        "steps": maps("steps", whole),
        "batch_size": maps("batch_size", whole),
        "gradient_accumulation": maps("gradient_accumulation", whole),
        "gradient_accumulation_steps": maps("gradient_accumulation", whole),
        "lr": maps("learning_rate", number),
        "unet_lr": maps("learning_rate", number),
        "optimizer": choice("optimizer", {
            **alike("adamw adamw8bit adafactor prodigy"),
            "adam": Near("adamw", "Adam with its weight decay apart"),
            "adam8bit": Near("adamw8bit", "Adam with its weight decay apart"),
            "prodigy8bit": Near("prodigy", "its states have full precision"),
            "automagic": Lost("an optimizer of ai-toolkit's own"),
        }),
        "optimizer_params": parameters({"weight_decay": "weight_decay", "betas": "betas"}, numbers),
        "lr_scheduler": choice("lr_schedule", {
            "constant": "constant", "constant_with_warmup": "constant", **alike("cosine linear"),
            "cosine_with_restarts": Near("restarts", "its cycles grow in ai-toolkit"),
            "sine": Lost(CONSTANT_LR),
        }),
        "lr_scheduler_params": parameters({"num_warmup_steps": "warmup_steps", "warmup_steps": "warmup_steps"}, whole),
        "max_grad_norm": maps("max_grad_norm", number),
        "dtype": Rule(dtype, "model.precision", "unless the model is quantised"),
        "gradient_checkpointing": maps("gradient_checkpointing", switch),
        "noise_scheduler": choice("", {"flowmatch": Same("Chroma is always trained by flow matching")}),
        "timestep_type": Rule(timesteps, "objective.draw",
                              "`sigmoid` → `logit_normal`, `linear` → `uniform`, "
                              "`shift` → `uniform` with the dynamic flow shift; `weighted`, `lognorm_blend` differ"),
        "linear_timesteps": EVEN,
        "linear_timesteps2": EVEN,
        "content_or_style": choice("", {
            "balanced": Same("the same"),
            **dict.fromkeys(("content", "style"), Lost("draws are not skewed")),
        }),
        "min_denoising_steps": limit("objective.maximum", 0),
        "max_denoising_steps": limit("objective.minimum", 999, 1000),
        "loss_type": choice("objective.loss", {
            "mse": "mse", "mae": Near("huber", "the nearest loss that there is"), "wavelet": Lost("mse or huber"),
        }),
        "noise_offset": maps("objective.noise_offset", number),
        "ema_config": Rule(ema, "lora.ema_decay", "`use_ema`, `ema_decay`"),
        "disable_sampling": when_on("previews.prompts", []),
        "optimal_noise_pairing_samples": Rule(
            lambda value, given: Same("not used") if whole(value) <= 1
            else Near(True, "noises are paired inside the batch, not drawn from more"),
            "objective.pair_noise", "above 1 → true: paired inside the batch", "differs"),
        "skip_first_sample": only(is_false, "the first preview is always made before training"),
        "train_unet": only(switch, "the transformer is what is trained"),
        "train_text_encoder": only(is_false, "the text encoder is not trained"),
        **lost({
            "a weighting for noise-predicting models": "min_snr_gamma snr_gamma learnable_snr_gos",
            "see caption_dropout of a dataset": "prompt_dropout_prob",
            "see regularisation sets, whose target is the model without the LoRA":
                "diff_output_preservation inverted_mask_prior blank_prompt_preservation",
            NOT_BUILT:
                "weight_jitter random_noise_multiplier random_noise_shift do_cfg do_guidance_loss "
                "force_consistent_noise dynamic_noise_offset blended_blur_noise standardize_latents "
                "standardize_images match_noise_norm short_and_long_captions single_item_batching loss_target "
                "diffusion_feature_extractor_path do_prior_divergence correct_pred_norm target_norm_std "
                "adapter_assist_name_or_path train_turbo",
            "regularisation sets count as much as their weight says": "reg_weight",
        }),
        **ignored({
            "the first preview is always made": "force_first_sample",
            CACHE: "text_encoder_lr cache_text_embeddings unload_text_encoder xformers sdp attention_backend",
            "Chroma has no distilled guidance to bypass": "bypass_guidance_embedding",
            "said with another option":
                "diff_output_preservation_multiplier diff_output_preservation_class start_step switch_boundary_every",
        }),
    },
    "model": {
        "name_or_path": MODEL_SOURCE,
        "quantize": Rule(quantize, "model.precision, model.text_precision", "with `qtype`: `qfloat8` → `fp8-quanto`, "
                         "`qint8` → `int8-quanto`, `qint4` → `int4-quanto`, `float8` → `fp8-torchao`; T5 likewise"),
        "quantize_te": Rule(quantize_te, "model.text_precision", "with `qtype_te`"),
        "vae_path": part_source("vae"),
        "te_name_or_path": part_source("text_encoder"),
        "extras_name_or_path": part_source("text_encoder"),
        "compile": maps("compile", switch),
        "low_vram": when_on("model.offload_during_startup", True),
        "layer_offloading": STREAMED,
        **lost({
            "merging a LoRA before training is not built in": "lora_path assistant_lora_path inference_lora_path",
            NOT_BUILT:
                "ignore_if_contains only_if_contains accuracy_recovery_adapter refiner_name_or_path unet_path",
        }),
        **ignored({
            "checked: chroma": "arch",
            "said with another option, or where and how fast":
                "qtype qtype_te quantize_kwargs dtype vae_dtype te_dtype vae_device te_device attn_masking "
                "layer_offloading_text_encoder_percent layer_offloading_transformer_percent model_kwargs is_flux "
                "split_model_over_gpus use_flux_cfg",
        }),
    },
    "sample": {
        "prompts": Rule(prompts, "previews.prompts", "`--` settings behind a prompt are left out"),
        "samples": Rule(prompts, "previews.prompts", "settings of single prompts are left out"),
        "neg": maps("previews.negative", lambda value: "" if is_off(value) else text(value)),
        "seed": maps("previews.seed", whole),
        "walk_seed": Rule(walk_seed, "", "true is what ChromaKit does", "differs"),
        "guidance_scale": maps("previews.guidance", number),
        "sample_steps": maps("previews.steps", whole),
        "width": maps("previews.width", whole),
        "height": maps("previews.height", whole),
        "sample_every": maps("previews.every", whole),
        "network_multiplier": only(lambda value: number(value) == 1, "previews use the LoRA at strength 1",
                                   "strength 1 here too"),
        **lost({
            "the first preview is made before training": "sample_start_step",
            "previews have no such setting": "guidance_rescale",
        }),
        **ignored({
            "previews are PNG files from the flow-match sampler":
                "sampler format num_frames fps ext adapter_conditioning_scale refiner_start_at extra_values",
        }),
    },
}

SET_OPTIONS: Table = {
    "folder_path": maps("folder", path),
    "dataset_path": maps("folder", path),
    "caption_ext": maps("caption_extension", extension),
    "caption_type": maps("caption_extension", extension),
    "default_caption": maps("default_caption"),
    "trigger_word": maps("trigger", text, "also the process's `trigger_word`"),
    "caption_dropout_rate": Rule(caption_dropout, "caption_dropout",
                                 "with a trigger word: differs, it is dropped as well"),
    "shuffle_tokens": when_on(
        "tag_shuffles", Near(8, "captions have 8 fixed orders of their tags here, since text states are cached; "
                                "ai-toolkit shuffles at every use"),
        "8 fixed orders; ai-toolkit shuffles at every use"),
    "keep_tokens": maps("keep_tags", whole),
    "resolution": maps("resolutions", resolutions, "one number or several"),
    "num_repeats": maps("repeats", whole),
    "bucket_tolerance": maps("alignment", whole),
    "flip_x": maps("flip", switch),
    "flip_y": only(is_false, "images are mirrored sideways only"),
    "random_crop": when_on("crop", "random"),
    "is_reg": maps("regularisation", switch),
    "alpha_mask": when_on("masks", "alpha"),
    "mask_min_value": maps("mask_floor", number),
    "buckets": only(switch, "aspect buckets are always used"),
    "type": choice("", {"image": Same("images")}),
    "num_frames": only(lambda value: whole(value) == 1, "no videos", "images",
                       "1: images; videos are not trained"),
    **lost({
        'masks lie beside the images: name them `picture-masklabel.png` and set masks = "files"': "mask_path",
        "white is what counts: invert the files": "invert_mask",
        "see weight: how often a set is used": "loss_multiplier",
        "one strength for all sets": "network_weight",
        "captions are taken as they are": "token_dropout_rate random_triggers replacements use_short_captions",
        NOT_BUILT: "augments augmentations random_scale square_crop poi standardize_images scale",
        "no conditioning images": "control_path inpaint_path unconditional_path controls clip_image_path",
    }),
    **ignored({
        CACHE: "cache_latents cache_latents_to_disk cache_text_embeddings cache_clip_vision_to_disk",
        "not what is trained":
            "num_workers prefetch_factor fast_image_size debug shrink_video_to_frames fps do_i2v guidance_type "
            "full_size_control_images random_triggers_max replay_transforms shuffle_augmentations extra_values "
            "control_transparent_color",
    }),
}
# fmt: on

BUILT_IN = {
    "text and previews": {"recipe": "ai-toolkit"},
    "noise levels": {"objective.remap": "none"},
    "trained layers": Near(
        {"lora.target": ["transformer_blocks.*", "single_transformer_blocks.*"]},
        "ai-toolkit has one LoRA for q, k and v together (and one for linear1); here each layer has its own",
    ),
}
"""What ai-toolkit does for Chroma without an option: its own recipe, no tail remap, LoRAs on fused layers."""
