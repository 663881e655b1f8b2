"""ai-toolkit's YAML: what each option of a `sd_trainer` process becomes, section by section.

Facts from ai-toolkit's example configurations (config/examples/train_lora_chroma_*.yaml) and its option classes.
"""

from __future__ import annotations

from . import ai_toolkit_convert as convert
from .rules import (
    Given,
    Lost,
    Near,
    Outcome,
    Same,
    Table,
    choice,
    custom,
    ignored,
    ignored_all,
    is_off,
    lost,
    lost_all,
    maps,
    number,
    switch,
    text,
    true_is,
    whole,
)
from .shared import CONSTANT_LR, ForeignPath, model_source, part_source

CACHE = "latents and text states are always cached"
NOT_BUILT = "not built in"

SECTIONS: dict[str, Table] = {
    "": {
        "type": ignored("checked: sd_trainer"),
        "trigger_word": ignored("taken over as every data set's trigger"),
        **ignored_all(
            "training_folder device performance_log_every sqlite_db_path log_dir logging", "places and reports"
        ),
        "slider": lost("sliders are not trained"),
        "adapter": lost("adapters other than LoRA are not trained"),
        "embedding": lost("the text encoder's vocabulary is not trained"),
        "decorator": lost("the text encoder's vocabulary is not trained"),
    },
    "network": {
        "type": choice(
            "lora.kind",
            {
                "lora": Same("an ordinary LoRA"),
                "dora": "dora",
                "lokr": "lokr",
                "locon": Near("lora", "Chroma has no convolutions"),
            },
        ),
        "linear": maps("lora.rank", whole),
        "rank": maps("lora.rank", whole),
        "linear_alpha": custom(
            convert.alpha, "lora.alpha", "if it is the rank; ai-toolkit trains Chroma at scale 1 whatever it is"
        ),
        "alpha": ignored("linear_alpha counts"),
        "dropout": maps("lora.dropout", number),
        "lokr_factor": maps("lora.lokr_factor", whole),
        "lokr_full_rank": lost("give a rank"),
        "network_kwargs": lost("choose the layers with lora.target; the names there are those of diffusers"),
        "lorm": lost(NOT_BUILT),
        "pretrained_lora_path": maps("lora.start_from", lambda value: ForeignPath(text(value))),
        **ignored_all("conv conv_alpha transformer_only split_multistage_loras", "Chroma has no such layers"),
    },
    "save": {
        "dtype": choice(
            "lora.save_dtype",
            {
                "float32": "fp32",
                "fp32": "fp32",
                "bf16": "bf16",
                "bfloat16": "bf16",
                "float16": Near("fp32", "LoRA files are written in fp32 or bf16"),
                "fp16": Near("fp32", "LoRA files are written in fp32 or bf16"),
            },
        ),
        "save_every": maps("checkpoint_every", whole),
        "max_step_saves_to_keep": maps("keep_checkpoints", whole),
        "save_format": choice(
            "", {"safetensors": Same("the same"), "diffusers": Same("its names are diffusers' already")}
        ),
        "push_to_hub": lost("publishing is no part of a job"),
        **ignored_all("hf_repo_id hf_private", "publishing is no part of a job"),
    },
    "train": {
        "steps": maps("steps", whole),
        "batch_size": maps("batch_size", whole),
        "gradient_accumulation": maps("gradient_accumulation", whole),
        "gradient_accumulation_steps": maps("gradient_accumulation", whole),
        "lr": maps("learning_rate", number),
        "unet_lr": maps("learning_rate", number),
        "optimizer": choice(
            "optimizer",
            {
                "adamw": "adamw",
                "adamw8bit": "adamw8bit",
                "adafactor": "adafactor",
                "prodigy": "prodigy",
                "adam": Near("adamw", "Adam with its weight decay apart"),
                "adam8bit": Near("adamw8bit", "Adam with its weight decay apart"),
                "prodigy8bit": Near("prodigy", "its states have full precision"),
                "automagic": Lost("an optimizer of ai-toolkit's own"),
            },
        ),
        "optimizer_params": custom(
            lambda value, given: convert.parameters({"weight_decay": "weight_decay", "betas": "betas"}, value),
            "weight_decay, betas",
            "others have no counterpart",
        ),
        "lr_scheduler": choice(
            "lr_schedule",
            {
                "constant": "constant",
                "constant_with_warmup": "constant",
                "cosine": "cosine",
                "linear": "linear",
                "cosine_with_restarts": Near("restarts", "its cycles grow in ai-toolkit"),
                "sine": Lost(CONSTANT_LR),
            },
        ),
        "lr_scheduler_params": custom(
            lambda value, given: convert.parameters(
                {"num_warmup_steps": "warmup_steps", "warmup_steps": "warmup_steps"}, value
            ),
            "warmup_steps",
            "others have no counterpart",
        ),
        "max_grad_norm": maps("max_grad_norm", number),
        "dtype": custom(convert.dtype, "model.precision", "unless the model is quantised"),
        "gradient_checkpointing": maps("gradient_checkpointing", switch),
        "noise_scheduler": choice("", {"flowmatch": Same("Chroma is always trained by flow matching")}),
        "timestep_type": custom(
            convert.timesteps,
            "objective.draw",
            "`sigmoid` → `logit_normal`, `linear` → `uniform`, "
            "`shift` → `uniform` with the dynamic flow shift; `weighted`, `lognorm_blend` differ",
        ),
        "linear_timesteps": custom(
            convert.linear_timesteps, "objective.draw", "`uniform`, without the weighting", "differs"
        ),
        "linear_timesteps2": custom(
            convert.linear_timesteps, "objective.draw", "`uniform`, without the weighting", "differs"
        ),
        "content_or_style": choice(
            "",
            {
                "balanced": Same("the same"),
                "content": Lost("draws are not skewed"),
                "style": Lost("draws are not skewed"),
            },
        ),
        "min_denoising_steps": custom(
            convert.limit("maximum", 0), "objective.maximum", "1 − n / 1000, squeezed", "differs"
        ),
        "max_denoising_steps": custom(
            convert.limit("minimum", 999), "objective.minimum", "1 − n / 1000, squeezed", "differs"
        ),
        "loss_type": choice(
            "objective.loss",
            {"mse": "mse", "mae": Near("huber", "the nearest loss that there is"), "wavelet": Lost("mse or huber")},
        ),
        "noise_offset": maps("objective.noise_offset", number),
        "ema_config": custom(convert.ema, "lora.ema_decay", "`use_ema`, `ema_decay`"),
        "disable_sampling": true_is({"previews.prompts": []}),
        "optimal_noise_pairing_samples": custom(
            lambda value, given: (
                Outcome("ignored", {}, "not used")
                if whole(value) <= 1
                else Outcome(
                    "differs", {"objective.pair_noise": True}, "noises are paired inside the batch, not drawn from more"
                )
            ),
            "objective.pair_noise",
            "above 1 → true: paired inside the batch",
            "differs",
        ),
        "skip_first_sample": convert.only(False, "the first preview is always made before training"),
        "force_first_sample": ignored("the first preview is always made"),
        "train_unet": convert.only(True, "the transformer is what is trained"),
        "train_text_encoder": convert.only(False, "the text encoder is not trained"),
        **ignored_all(
            "text_encoder_lr cache_text_embeddings unload_text_encoder xformers sdp attention_backend", CACHE
        ),
        **ignored_all("bypass_guidance_embedding", "Chroma has no distilled guidance to bypass"),
        **lost_all("min_snr_gamma snr_gamma learnable_snr_gos", "a weighting for noise-predicting models"),
        **lost_all("prompt_dropout_prob", "see caption_dropout of a data set"),
        **lost_all(
            "diff_output_preservation inverted_mask_prior blank_prompt_preservation",
            "see regularisation sets, whose target is the model without the LoRA",
        ),
        **lost_all(
            "weight_jitter random_noise_multiplier random_noise_shift do_cfg do_guidance_loss force_consistent_noise "
            "dynamic_noise_offset blended_blur_noise standardize_latents standardize_images match_noise_norm "
            "short_and_long_captions single_item_batching loss_target diffusion_feature_extractor_path "
            "do_prior_divergence correct_pred_norm target_norm_std adapter_assist_name_or_path train_turbo",
            NOT_BUILT,
        ),
        **ignored_all(
            "diff_output_preservation_multiplier diff_output_preservation_class start_step switch_boundary_every",
            "said with another option",
        ),
        "reg_weight": lost("regularisation sets count as much as their weight says"),
    },
    "model": {
        "arch": ignored("checked: chroma"),
        "name_or_path": custom(model_source, "model.flavour, model.folder or model.transformer", "see below"),
        "quantize": custom(
            convert.quantize,
            "model.precision, model.text_precision",
            "with `qtype`: `qfloat8` → `fp8-quanto`, "
            "`qint8` → `int8-quanto`, `qint4` → `int4-quanto`, `float8` → `fp8-torchao`; T5 likewise",
        ),
        "quantize_te": custom(convert.quantize_te, "model.text_precision", "with `qtype_te`"),
        "vae_path": custom(part_source("vae"), "model.vae", "a file or folder"),
        "te_name_or_path": custom(part_source("text_encoder"), "model.text_encoder", "a file or folder"),
        "extras_name_or_path": custom(part_source("text_encoder"), "model.text_encoder", "a file or folder"),
        "lora_path": lost("merging a LoRA before training is not built in"),
        "assistant_lora_path": lost("merging a LoRA before training is not built in"),
        "inference_lora_path": lost("merging a LoRA before training is not built in"),
        "compile": maps("compile", switch),
        "low_vram": true_is({"model.offload_during_startup": True}),
        "layer_offloading": true_is({"model.offload": "block"}, "blocks are streamed by ChromaKit's own offloading"),
        **ignored_all(
            "qtype qtype_te quantize_kwargs dtype vae_dtype te_dtype vae_device te_device attn_masking "
            "layer_offloading_text_encoder_percent layer_offloading_transformer_percent model_kwargs is_flux "
            "split_model_over_gpus use_flux_cfg",
            "said with another option, or where and how fast",
        ),
        **lost_all(
            "ignore_if_contains only_if_contains accuracy_recovery_adapter refiner_name_or_path unet_path", NOT_BUILT
        ),
    },
    "sample": {
        "prompts": custom(convert.prompts, "previews.prompts", "`--` settings behind a prompt are left out"),
        "samples": custom(convert.prompts, "previews.prompts", "settings of single prompts are left out"),
        "neg": maps("previews.negative", lambda value: "" if is_off(value) else text(value)),
        "seed": maps("previews.seed", whole),
        "walk_seed": custom(convert.walk, "", "true is what ChromaKit does", "differs"),
        "guidance_scale": maps("previews.guidance", number),
        "sample_steps": maps("previews.steps", whole),
        "width": maps("previews.width", whole),
        "height": maps("previews.height", whole),
        "sample_every": maps("previews.every", whole),
        "sample_start_step": lost("the first preview is made before training"),
        "network_multiplier": custom(
            lambda value, given: (
                Outcome("ignored", {}, "strength 1 here too")
                if number(value) == 1
                else Outcome("no counterpart", {}, "previews use the LoRA at strength 1")
            ),
            "",
            "previews use the LoRA at strength 1",
            "no counterpart",
        ),
        "guidance_rescale": lost("previews have no such setting"),
        **ignored_all(
            "sampler format num_frames fps ext adapter_conditioning_scale refiner_start_at extra_values",
            "previews are PNG files from the flow-match sampler",
        ),
    },
}


def built_in(given: Given) -> list[tuple[str, Outcome]]:
    """What ai-toolkit does for Chroma without an option: its own recipe, no tail remap, LoRAs on fused layers."""
    layers = ["transformer_blocks.*", "single_transformer_blocks.*"]
    fused = "ai-toolkit has one LoRA for q, k and v together (and one for linear1); here each layer has its own"
    return [
        ("text and previews", Outcome("maps", {"recipe": "ai-toolkit"})),
        ("noise levels", Outcome("maps", {"objective.remap": "none"})),
        ("trained layers", Outcome("differs", {"lora.target": layers}, fused)),
    ]
