"""SimpleTuner's `config.json` and dataset file (multidatabackend.json): what each of their options becomes.

Facts (names, choices, defaults) from SimpleTuner's own documentation: OPTIONS.md, DATALOADER.md, quickstart/CHROMA.md.
"""

from __future__ import annotations

import math
from pathlib import PurePosixPath
from typing import Any

from .convert import (  # isort: skip
    CONSTANT_LR, MODEL_SOURCE, OWN_LAYERS, START_FROM, STREAMED, Given, Lost, Near, Rule, Same, Table, alike, choice,
    ignored, lost, maps, only, part_source, when_on,
)  # fmt: skip
from .read import Unreadable, is_false, is_off, is_on, number, path, switch, text, whole

FIRST_PREVIEW = "the first preview is always made before training"
LOCAL = "only folders of this computer are read"
THROUGHOUT = "every set is used from the first step to the last"
STORES = ("text_embeds", "image_embeds", "conditioning_image_embeds")
"""Kinds of dataset that only say where a cache lies."""


def plain_name(name: str) -> str:
    """SimpleTuner's names with and without dashes, deprecated and documented ones, as one name."""
    name = name.strip().lstrip("-").replace("-", "_")
    return {
        "network_rank": "lora_rank",
        "network_alpha": "lora_alpha",
        "validation_steps": "validation_step_interval",
        "checkpointing_steps": "checkpoint_step_interval",
        "model_flavor": "model_flavour",
        "flux_t5_padding": "t5_padding",
        "adam_beta1": "optimizer_beta1",
        "adam_beta2": "optimizer_beta2",
    }.get(name, name)


def no_remap(given: Given) -> bool:
    """Whether an option switches off SimpleTuner's tail remap for Chroma."""
    return any(is_on(given, f"{name}_schedule") for name in ("flux_fast", "flow_use_beta", "flow_use_uniform"))


def built_in(given: Given) -> dict[str, Any]:
    """What SimpleTuner does for Chroma without an option: the tail remap, except where a schedule switches it off."""
    return {"tail remap": {"objective.remap": "none" if no_remap(given) else "quadratic_split"}}


def precision(value: Any, given: Given) -> Any:
    word = text(value).lower()
    if given.get("base_model_precision", "no_change") != "no_change":
        if word == "bf16":
            return Same("base_model_precision says how weights are stored; computing is in bf16 here too")
        return Near({}, "a quantised base model computes in bf16 here")
    if word == "fp8":
        return Near("fp8", "the weights are stored in fp8 and computing is in bf16 here")
    known = {"bf16": "bf16", "fp16": "fp16", "no": "fp32", "fp32": "fp32"}
    if word not in known:
        raise Unreadable("no, fp16, bf16 or fp8")
    return known[word]


QUANTISED = alike("bf16 int8-quanto int4-quanto fp8-quanto nf4-bnb fp8-torchao") | {
    "no_change": Same("not quantised"),
    "int8-torchao": Near("int8", OWN_LAYERS),
    "int4-torchao": Near("int4", OWN_LAYERS),
    "fp8uz-quanto": Near("fp8-quanto", "the fp8 format of other hardware"),
    "int2-quanto": Lost("2 bits are not offered: int4, nf4"),
}


def epochs(value: Any, given: Given) -> Any:
    if whole(value) == 0:
        return Same("0: max_train_steps decides")
    if not is_off(given.get("max_train_steps")):
        return Same("max_train_steps goes first in SimpleTuner too")
    return Lost("steps are counted here: set steps = epochs × images × repeats / (batch_size × gradient_accumulation)")


def warmup(value: Any, given: Given) -> Any:
    steps, schedule = whole(value), given.get("lr_scheduler")
    if steps and schedule == "constant":
        return Same("SimpleTuner's constant schedule has no warm-up")
    if steps and schedule in ("cosine", "cosine_with_restarts", "sine"):
        return Near(0, f"for {schedule} SimpleTuner takes it as the period, not a warm-up")
    return steps


def cycles(value: Any, given: Given) -> Any:
    if given.get("lr_scheduler") in ("polynomial", "cosine_with_restarts"):
        return max(1, whole(value))
    return Same("read by no other schedule than the restarting one")


def betas(value: Any, given: Given) -> Any:
    return [number(given.get("optimizer_beta1", 0.9)), number(given.get("optimizer_beta2", 0.999))]


def guidance(value: Any, given: Given) -> Any:
    mode = text(given.get("flux_guidance_mode", "constant"))
    if mode not in ("constant", "random-range"):
        raise Unreadable("constant or random-range")
    constant = number(given.get("flux_guidance_value", 1.0))
    low, high = number(given.get("flux_guidance_min", 0.0)), number(given.get("flux_guidance_max", 4.0))
    scale = [constant, constant] if mode == "constant" else [low, high]
    return Near(
        {"objective.guidance": mode, "objective.guidance_range": scale},
        "SimpleTuner's Chroma code does not hand this value to the model; here the model gets it",
    )


def shift(value: Any, given: Given) -> Any:
    if number(value) in (0, 1):
        return "none"
    if is_on(given, "flow_schedule_auto_shift"):
        return Same("flow_schedule_auto_shift decides")
    return shifted(number(value), given)


def shifted(value: Any, given: Given) -> Any:
    reason = "SimpleTuner shifts before its tail remap, ChromaKit after it: other noise levels"
    return value if no_remap(given) else Near(value, reason)


def noise_offset(value: Any, given: Given) -> Any:
    if number(value) == 0 or not is_on(given, "offset_noise"):
        return Same("not used without offset_noise")
    chance = number(given.get("noise_offset_probability", 0.25))
    reason = f"SimpleTuner adds it to {chance:g} of the samples (noise_offset_probability), here to all"
    return number(value) if chance == 1 else Near(number(value), reason)


def picture_size(value: Any, given: Given) -> Any:
    """`1024`, `1024x768` or several, separated by commas; below 16 megapixels."""
    first, *others = [part.strip().lower() for part in text(value).split(",")]
    width, _, height = first.partition("x")
    sides = [number(width), number(height or width)]
    if not height and sides[0] < 16:
        sides = [megapixels(sides[0])] * 2
    size = {"previews.width": whole(sides[0]), "previews.height": whole(sides[1])}
    return Near(size, "all previews have one size: the first is taken") if others else size


def megapixels(area: float) -> int:
    """The side in pixels of a square with `area` million pixels, to the next multiple of 64 (1.0 → 1024)."""
    if area < 0:
        raise Unreadable("a size above 0")
    return max(64, 64 * round(math.sqrt(area * 1e6) / 64))


def resume(value: Any, given: Given) -> Any:
    if is_off(value) or value == "latest":
        return Same("a job with the same settings always goes on from its newest checkpoint")
    return Lost("another program's checkpoint cannot be continued; lora.start_from takes its LoRA")


# fmt: off
OPTIONS: Table = {
    **ignored({"checked: chroma": "model_family", "checked: lora": "model_type"}),
    "model_flavour": choice("model.flavour", alike("base hd flash")),
    "output_dir": maps("name", lambda value: PurePosixPath(text(value).replace("\\", "/")).name or "imported",
                       "its last folder becomes the job's name; `--output` of `train` chooses the place"),
    "pretrained_model_name_or_path": MODEL_SOURCE,
    "pretrained_transformer_model_name_or_path": part_source("transformer"),
    "pretrained_vae_model_name_or_path": part_source("vae"),
    "pretrained_t5_model_name_or_path": part_source("text_encoder"),
    "revision": maps("model.revision"),
    "mixed_precision": Rule(precision, "model.precision", "`bf16`, `fp16`, `no` → `fp32`; `fp8` differs"),
    "base_model_precision": choice("model.precision", QUANTISED),
    "text_encoder_1_precision": choice("model.text_precision", QUANTISED),
    "offload_during_startup": maps("model.offload_during_startup", switch),
    "enable_group_offload": STREAMED,
    "ramtorch": STREAMED,
    "seed": Rule(lambda value, given: whole(value) if whole(value) > 0
                 else Lost("a new seed at every start; a job has a fixed one"),
                 "seed", "0 and -1, a new one at every start, have no counterpart"),
    "max_train_steps": Rule(lambda value, given: whole(value) or Same("0: the number of epochs decides"),
                            "steps", "0 leaves it to `num_train_epochs`"),
    "num_train_epochs": Rule(epochs, "", "steps are counted, not epochs", "no counterpart"),
    "train_batch_size": maps("batch_size", whole),
    "gradient_accumulation_steps": maps("gradient_accumulation", whole),
    "learning_rate": maps("learning_rate", number),
    "lr_scheduler": choice("lr_schedule", {
        "constant": "constant", "constant_with_warmup": "constant", "linear": "linear",
        "polynomial": Near("polynomial", "SimpleTuner ends at lr_end, ChromaKit at 0"),
        "cosine": Near("cosine", "SimpleTuner's period is lr_warmup_steps, its end lr_end; here one half wave to 0"),
        "cosine_with_restarts": Near("restarts", "SimpleTuner's period is lr_warmup_steps, its end lr_end"),
        "sine": Lost(CONSTANT_LR),
    }),
    "lr_warmup_steps": Rule(warmup, "warmup_steps", "for the cosine and sine schedules SimpleTuner's period: differs"),
    "lr_num_cycles": Rule(cycles, "lr_cycles", "read only with restarts"),
    "lr_power": maps("lr_power", number),
    "optimizer": choice("optimizer", {
        "adamw": "adamw", "bnb-adamw": "adamw", "bnb-adamw-paged": "adamw",
        "bnb-adamw8bit": "adamw8bit", "bnb-adamw8bit-paged": "adamw8bit",
        "adamw_schedulefree": "schedule-free", "adamw_schedulefree+no_kahan": "schedule-free",
        "prodigy": "prodigy", "adafactor": "adafactor", "came": "came",
        "adamw_bf16": Near("adamw", "SimpleTuner's keeps bf16 weights; here the LoRA and its moments are fp32"),
        "optimi-adamw": Near("adamw", "SimpleTuner's keeps bf16 weights; here the LoRA and its moments are fp32"),
        "optimi-stableadamw": Near("adamw", "there is no StableAdamW; plain AdamW is used"),
        "ao-adamw8bit": Near("adamw8bit", "torchao's 8-bit states; here those of bitsandbytes"),
        "adamw_schedulefree+aggressive": Near("schedule-free", "without SimpleTuner's aggressive settings"),
    }),
    "optimizer_beta1": Rule(betas, "betas", "with `optimizer_beta2`; the other one's default is 0.9, 0.999"),
    "optimizer_beta2": Rule(betas, "betas", "with `optimizer_beta1`"),
    "adam_weight_decay": maps("weight_decay", number),
    "adam_epsilon": only(lambda value: number(value) == 1e-8, "epsilon is 1e-8", "1e-8 here too",
                         "1e-8 here; another value has no counterpart"),
    "max_grad_norm": maps("max_grad_norm", number),
    "grad_clip_method": choice("", {"norm": Same("the norm is clipped here too"),
                                    "value": Lost("the norm of all gradients is clipped here")}),
    "gradient_checkpointing": maps("gradient_checkpointing", switch),
    "gradient_checkpointing_interval": maps("checkpointing_interval", whole),
    "dynamo_backend": choice("compile", {"no": False, "inductor": True}),
    "lora_rank": maps("lora.rank", whole, "also `network_rank`"),
    "lora_alpha": maps("lora.alpha", number, "also `network_alpha`"),
    "lora_dropout": maps("lora.dropout", number),
    "lora_type": choice("lora.kind", {
        "standard": Same("an ordinary LoRA"),
        "lycoris": Near("lokr", "what lycoris_config says is not read: set it in [lora]"),
    }),
    "use_dora": when_on("lora.kind", "dora"),
    "init_lora": START_FROM,
    "flux_lora_target": choice("lora.target", alike("all all+ffs all+ffs+embedder context context+ffs tiny") | {
        "ai-toolkit": "all+ffs", "mmdit": "attention", "nano": "attention",
        "tiny+embedder": Near("tiny", "without the input projection"),
    }),
    "lora_init_type": choice("", {"default": Same("the same start"), "gaussian": Lost("PEFT's default start is used")}),
    "use_ema": Rule(lambda value, given: number(given.get("ema_decay", 0.995)) if switch(value) else 0.0,
                    "lora.ema_decay", "with `ema_decay`; false → 0"),
    "ema_update_interval": only(lambda value: whole(value) == 1, "the average is updated at every step",
                                "every step here too"),
    "flow_sigmoid_scale": maps("objective.scale", number),
    "flow_schedule_shift": Rule(shift, "objective.flow_shift", "0 and 1 → `none`; others differ beside the tail remap"),
    "flow_schedule_auto_shift": Rule(
        lambda value, given: shifted("dynamic", given) if switch(value) else Same("not used"),
        "objective.flow_shift", "true → `dynamic`; differs beside the tail remap"),
    "flow_use_uniform_schedule": when_on("objective.draw", "uniform",
                                         "true → `uniform`, without tail remap, as in SimpleTuner"),
    "flow_use_beta_schedule": only(is_false, "there is no Beta draw; logit-normal is used, without tail remap",
                                   "not used"),
    "flux_fast_schedule": only(
        is_false, "a fixed list of noise levels for Flux Schnell; logit-normal is used, without tail remap",
        "not used"),
    "flux_guidance_mode": Rule(guidance, "objective.guidance, objective.guidance_range", "given to the model",
                               "differs"),
    "t5_padding": choice("objective.text_padding", alike("zero unmodified"), "also `flux_t5_padding`"),
    "noise_offset": Rule(noise_offset, "objective.noise_offset",
                         "only with `offset_noise`; for a part of the samples differs"),
    "loss_type": choice("objective.loss", {
        "l2": "mse",
        "huber": Near("huber", "SimpleTuner's is the smooth pseudo-Huber with a threshold that may follow the noise "
                               "level"),
        "smooth_l1": Near("huber", "the nearest loss that there is"),
    }),
    "huber_c": maps("objective.huber_delta", number),
    "huber_schedule": choice("", {
        "constant": Same("constant here too"),
        "snr": Lost("the threshold is constant"), "exponential": Lost("the threshold is constant"),
    }),
    "validation_prompt": Rule(
        lambda value, given: Same("validation_disable") if is_on(given, "validation_disable") else [text(value)],
        "previews.prompts", "one prompt"),
    "validation_negative_prompt": maps("previews.negative"),
    "validation_step_interval": maps("previews.every", whole, "also `validation_steps`"),
    "validation_num_inference_steps": maps("previews.steps", whole),
    "validation_guidance_real": maps("previews.guidance", number),
    "validation_seed": maps("previews.seed", whole),
    "validation_resolution": Rule(picture_size, "previews.width, previews.height", "of several the first; differs"),
    "validation_disable": when_on("previews.prompts", [], "true → no prompts"),
    "validation_on_startup": Rule(
        lambda value, given: Same(FIRST_PREVIEW) if switch(value) else Near({}, FIRST_PREVIEW),
        "", FIRST_PREVIEW, "differs"),
    "num_validation_images": only(
        lambda value: whole(value) <= 1, "a prompt gives one image: write it several times into previews.prompts",
        "one image per prompt here too", "one image per prompt; more has no counterpart"),
    "eval_steps_interval": maps("validate_every", whole),
    "num_eval_images": maps("validation_pictures", whole),
    "checkpoint_step_interval": maps("checkpoint_every", whole, "also `checkpointing_steps`"),
    "checkpoints_total_limit": maps("keep_checkpoints", whole),
    "resume_from_checkpoint": Rule(resume, "", "a job always goes on from its newest checkpoint", "ignored"),
    "tokenizer_max_length": only(lambda value: whole(value) == 512,
                                 "captions are read up to 512 tokens, as the model was trained", "512 tokens here too",
                                 "512 tokens"),
    **lost({
        "schedules end at 0 here": "lr_end",
        "settings of a single optimizer beyond betas and weight decay cannot be set": "optimizer_config",
        "previews show the trained weights; the averaged ones are saved beside them": "ema_validation",
        "for Chroma SimpleTuner's previews follow validation_guidance_real": "validation_guidance",
        "previews are sampled with the flow-match sampler of every other image": "validation_noise_scheduler",
        "publishing and tracking: no part of a job; metrics.jsonl has the numbers":
            "report_to push_to_hub push_checkpoints_to_hub publishing_config webhook_config post_upload_script "
            "post_checkpoint_script validation_external_script",
        "the prompts stand in another file: copy those you want into previews.prompts":
            "validation_prompt_library user_prompt_library",
        "previews have no such setting":
            "validation_guidance_rescale validation_no_cfg_until_timestep validation_guidance_skip_layers "
            "validation_randomize validation_using_datasets evaluation_type ema_foreach_disable "
            "validation_adapter_path validation_adapter_config validation_torch_compile",
        "steps are counted here, not epochs":
            "checkpoint_epoch_interval validation_epoch_interval eval_epoch_interval checkpointing_rolling_steps",
        "ControlNets are not trained": "controlnet control",
        "the transformer alone is trained": "train_text_encoder text_encoder_lr refiner_training",
        "TREAD is not built in; SimpleTuner's does not work for Chroma either": "tread_config",
        "PyTorch's own attention": "fuse_qkv_projections attention_mechanism sageattention_usage quantize_activations",
        "a weighting for noise-predicting models, not for flow matching": "snr_gamma use_soft_min_snr snr_weight",
        "the learning rate is taken as it stands": "lr_scale lr_scale_sqrt",
        "not built in":
            "input_perturbation masked_loss_probability distillation_method scheduled_sampling_max_step_offset "
            "crepa_enabled diff2flow_enabled peft_lora_mode slider_lora_target init_lokr_norm layer_freeze_strategy",
        "see sigma_bias of a dataset": "timestep_bias_strategy",
        "the LoRA is written so that ComfyUI and diffusers both load it": "lora_format",
        'use offload = "block" in [model]': "musubi_blocks_to_swap",
    }),
    **ignored({
        "taken over with use_ema": "ema_decay",
        "taken over with flux_guidance_mode": "flux_guidance_value flux_guidance_min flux_guidance_max",
        "padding is never attended to here, and SimpleTuner's Chroma always masks it": "flux_attention_masked_training",
        "taken over with noise_offset": "offset_noise noise_offset_probability",
        "the dataloader file; see below": "data_backend_config",
        "said with lora_type": "lycoris_config",
        "where and how fast, not what":
            "quantize_via offload_during_save base_model_default_dtype group_offload_type group_offload_use_stream "
            "group_offload_blocks_per_group group_offload_to_disk_path ramtorch_target_modules ramtorch_text_encoder "
            "ramtorch_vae ema_device ema_cpu_only set_grads_to_none torch_num_threads gradient_precision "
            "optimizer_cpu_offload_method optimizer_offload_gradients optimizer_release_gradients fuse_optimizer "
            "disable_tf32 accelerator_cache_clear_interval dynamo_mode dynamo_fullgraph dynamo_dynamic "
            "dynamo_use_regional_compilation keep_vae_loaded vae_enable_tiling vae_enable_slicing vae_dtype "
            "vae_batch_size fully_unload_text_encoder num_processes num_machines local_rank",
        "latents and text states are always cached, and in ChromaKit's own way":
            "cache_dir cache_dir_text cache_dir_vae compress_disk_cache vae_cache_ondemand vae_cache_disable "
            "write_batch_size vae_cache_scan_behaviour read_batch_size image_processing_batch_size max_workers "
            "enable_multiprocessing aws_max_pool_connections dataloader_prefetch dataloader_prefetch_qlen "
            "aspect_bucket_worker_count metadata_update_interval skip_file_discovery preserve_data_backend_cache "
            "override_dataset_config aspect_bucket_disable_rebuild text_cache_ondemand text_cache_disable "
            "text_encoder_batch_size",
        "reports and progress, not training":
            "hub_model_id tracker_run_name tracker_project_name tracker_image_layout logging_dir "
            "push_to_hub_background model_card_private model_card_safe_for_work model_card_note "
            "webhook_reporting_interval disable_benchmark print_filenames print_sampler_statistics "
            "debug_aspect_buckets debug_dataset_loader i_know_what_i_am_doing validation_preview "
            "validation_preview_steps validation_disable_unconditional validation_seed_source "
            "validation_stitch_input_location eval_timesteps eval_dataset_id eval_dataset_pooling "
            "checkpointing_use_tempdir",
        "the order of the data is ChromaKit's own: every image once per epoch, whatever the bucket's size":
            "disable_bucket_pruning allow_dataset_oversubscription ignore_missing_files ignore_final_epochs "
            "aspect_bucket_rounding data_backend_sampling disable_segmented_timestep_sampling seed_for_each_device",
        "of other model families":
            "prediction_type unet_attention_slice variant rescale_betas_zero_snr training_scheduler_timestep_spacing "
            "inference_scheduler_timestep_spacing framerate ltx_train_mode ltx_i2v_prob sd3_clip_uncond_behaviour "
            "sd3_t5_uncond_behaviour text_encoder_2_precision text_encoder_3_precision text_encoder_4_precision "
            "data_aesthetic_score enable_watermark validation_num_video_frames controlnet_model_name_or_path",
    }),
}

FOR_ALL_SETS = (
    "resolution", "resolution_type", "caption_strategy", "instance_prompt", "prepend_instance_prompt",
    "only_instance_prompt", "caption_dropout_probability", "aspect_bucket_alignment", "minimum_image_size",
    "maximum_image_size", "target_downsample_size", "max_upscale_threshold", "delete_unwanted_images",
    "delete_problematic_images", "parquet_caption_column", "parquet_filename_column",
)
"""Options of config.json that hold for every set which does not say otherwise."""
# fmt: on


def fixed_caption(given: Given) -> bool:
    strategy = given.get("caption_strategy")
    return is_on(given, "only_instance_prompt") or strategy in ("instanceprompt", "instance_prompt")


def caption_source(value: Any, given: Given) -> Any:
    known = {"textfile": "files", "filename": "filenames"}
    none = Lost("captions come from text files, metadata.jsonl/csv, file names or one sentence")
    return "fixed" if fixed_caption(given) else known.get(text(value), none)


def instance_prompt(value: Any, given: Given) -> Any:
    if fixed_caption(given):
        return {"caption_source": "fixed", "default_caption": text(value)}
    if is_on(given, "prepend_instance_prompt"):
        return {"caption_prefix": text(value)}
    return Same("not used with this caption strategy")


def resolution(value: Any, given: Given) -> Any:
    kind, size = given.get("resolution_type", "pixel_area"), number(value)
    if kind == "area" or size < 16:
        return [megapixels(size)]
    reason = "the resolution is the side of a square with the bucket's area here, not the shorter side"
    return Near([whole(size)], reason) if kind == "pixel" else [whole(size)]


def crop(value: Any, given: Given) -> Any:
    if not switch(value):
        return "centre"
    style, aspect = given.get("crop_style", "center"), given.get("crop_aspect", "square")
    ours = "random" if style == "random" else "centre"
    if aspect in ("square", "random"):
        return Near(ours, f"crop_aspect {aspect}: images keep their own shape here (aspect buckets)")
    if style not in ("center", "centre", "random"):
        return Near(ours, f"crop_style {style}: crops are centred or random")
    return ours


def shuffle(value: Any, given: Given) -> Any:
    if not isinstance(value, dict) or not is_on(value, "enable"):
        return Same("not used")
    if value.get("split_on", "comma") != "comma":
        return Lost("only tags between commas are shuffled")
    values = {"tag_shuffles": whole(value.get("count", 1)), "keep_tags": whole(value.get("position_start", 0))}
    if switch(value.get("include_original", True)):
        return values
    return Near(values, "the caption as written is always one of the orders")


def sigma_bias(value: Any, given: Given) -> Any:
    if number(value) == 0:
        return Same("not used")
    reason = "SimpleTuner moves the draw before its tail remap, ChromaKit moves the noise level after it"
    return Near(round(number(value) / math.log(8), 6), reason)


def from_step(first: int) -> Rule:
    return only(lambda value: whole(value) <= first, THROUGHOUT, "used from the start", "every set is used throughout")


# fmt: off
SET_OPTIONS: Table = {
    **ignored({
        "a name": "id",
        "`image`; `eval` becomes validation_dataset; caches are left out; others have no counterpart": "dataset_type",
        "a disabled set is left out": "disabled disable",
    }),
    "type": choice("", {"local": Same("a folder of this computer")}
                   | dict.fromkeys(("aws", "csv", "huggingface", "webshart", "parquet"), Lost(LOCAL))),
    "instance_data_dir": maps("folder", path),
    "caption_strategy": Rule(caption_source, "caption_source", "`textfile` → `files`, `filename` → `filenames`, "
                             "`instanceprompt` → `fixed`; `parquet`, `csv`, … have no counterpart"),
    "instance_prompt": Rule(instance_prompt, "default_caption or caption_prefix",
                            "the only caption, or with `prepend_instance_prompt` the prefix"),
    "only_instance_prompt": when_on("caption_source", "fixed"),
    "caption_dropout_probability": maps("caption_dropout", number),
    "caption_shuffle": Rule(shuffle, "tag_shuffles, keep_tags", "`count`, `position_start`; tags between commas"),
    "repeats": maps("repeats", lambda value: whole(value) + 1,
                    "SimpleTuner counts the repetitions beside the first use: n → n + 1"),
    "probability": maps("weight", number),
    "resolution": Rule(resolution, "resolutions",
                       "`pixel_area`; `area` in megapixels (1.0 → 1024); `pixel`, the shorter side, differs"),
    "aspect_bucket_alignment": maps("alignment", whole),
    "crop": Rule(crop, "crop", "with `crop_style` (`center`, `random`); square crops differ: buckets keep the shape"),
    "is_regularisation_data": maps("regularisation", switch),
    "is_regularization_data": maps("regularisation", switch),
    "timestep_sampling_offset": Rule(sigma_bias, "sigma_bias", "offset / ln 8", "differs"),
    "start_epoch": from_step(1),
    "start_step": from_step(0),
    "metadata_backend": choice("", {
        "discovery": Same("sizes are read from the images"),
        "parquet": Lost("captions come from text files or metadata.jsonl/csv"),
    }),
    **lost({
        "each line of a caption file is a caption of its own": "disable_multiline_split",
        "buckets follow from resolution and alignment": "crop_aspect_buckets",
        "small images are named and trained at their own size: sort them out by hand": "minimum_image_size",
        "images are never enlarged, unless upscale = true": "max_upscale_threshold",
        THROUGHOUT: "end_epoch end_step",
        "all images of a folder are used": "minimum_aspect_ratio maximum_aspect_ratio max_num_samples",
        "images are never deleted": "delete_unwanted_images delete_problematic_images delete_nsfw_images",
        "no conditioning images":
            "conditioning conditioning_data conditioning_type source_dataset_id grounding",
        "not trained": "slider_strength video audio",
        "captions are taken as they are":
            "parquet caption_filter_list parquet_caption_column parquet_filename_column",
        LOCAL: "aws_bucket_name aws_data_prefix csv_file huggingface",
    }),
    **ignored({
        "taken over with instance_prompt": "prepend_instance_prompt",
        "taken over with resolution": "resolution_type",
        "taken over with crop": "crop_style crop_aspect",
        "images are always scaled down before they are cropped": "maximum_image_size target_downsample_size",
        "latents and text states are always cached, and in ChromaKit's own way":
            "cache_dir cache_dir_vae cache_dir_conditioning_image_embeds text_embeds image_embeds write_batch_size "
            "conditioning_image_embeds text_encoder_batch_size vae_cache_clear_each_epoch vae_cache_ondemand "
            "vae_cache_disable text_cache_ondemand text_cache_disable skip_file_discovery preserve_data_backend_cache "
            "metadata_update_interval hash_filenames default aws_region_name aws_endpoint_url aws_access_key_id "
            "aws_secret_access_key",
    }),
}
# fmt: on
