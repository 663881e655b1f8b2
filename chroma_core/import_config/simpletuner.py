"""SimpleTuner's `config.json`: what each of its options becomes.

Facts (names, choices, defaults) from SimpleTuner's own documentation: OPTIONS.md and quickstart/CHROMA.md.
"""

from __future__ import annotations

from . import simpletuner_convert as convert
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
    lost,
    maps,
    number,
    switch,
    text,
    true_is,
    whole,
)
from .shared import (
    CONSTANT_LR,
    ForeignPath,
    file_name,
    model_source,
    no_remap,
    part_source,
    picture_size,
    quanto_names,
    single_prompt,
)
from .simpletuner_rest import REST

OPTIONS: Table = {
    "model_family": ignored("checked: chroma"),
    "model_type": ignored("checked: lora"),
    "model_flavour": choice("model.flavour", {"base": "base", "hd": "hd", "flash": "flash"}),
    "output_dir": maps(
        "name", file_name, "its last folder becomes the job's name; `--output` of `train` chooses the place"
    ),
    "pretrained_model_name_or_path": custom(
        model_source, "model.flavour, model.folder or model.transformer", "see below"
    ),
    "pretrained_transformer_model_name_or_path": custom(
        part_source("transformer"), "model.transformer", "a file or folder"
    ),
    "pretrained_vae_model_name_or_path": custom(part_source("vae"), "model.vae", "a file or folder"),
    "pretrained_t5_model_name_or_path": custom(part_source("text_encoder"), "model.text_encoder", "a file or folder"),
    "revision": maps("model.revision"),
    "mixed_precision": custom(convert.precision, "model.precision", "`bf16`, `fp16`, `no` → `fp32`; `fp8` differs"),
    "base_model_precision": choice("model.precision", quanto_names()),
    "text_encoder_1_precision": choice("model.text_precision", quanto_names()),
    "offload_during_startup": maps("model.offload_during_startup", switch),
    "enable_group_offload": true_is({"model.offload": "block"}, "blocks are streamed by ChromaKit's own offloading"),
    "ramtorch": true_is({"model.offload": "block"}, "blocks are streamed by ChromaKit's own offloading"),
    "seed": custom(convert.seed, "seed", "0 and -1, a new one at every start, have no counterpart"),
    "max_train_steps": custom(convert.steps, "steps", "0 leaves it to `num_train_epochs`"),
    "num_train_epochs": custom(convert.epochs, "", "steps are counted, not epochs", "no counterpart"),
    "train_batch_size": maps("batch_size", whole),
    "gradient_accumulation_steps": maps("gradient_accumulation", whole),
    "learning_rate": maps("learning_rate", number),
    "lr_scheduler": choice(
        "lr_schedule",
        {
            "constant": "constant",
            "constant_with_warmup": "constant",
            "linear": "linear",
            "polynomial": Near("polynomial", "SimpleTuner ends at lr_end, ChromaKit at 0"),
            "cosine": Near(
                "cosine", "SimpleTuner's period is lr_warmup_steps, its end lr_end; here one half wave to 0"
            ),
            "cosine_with_restarts": Near("restarts", "SimpleTuner's period is lr_warmup_steps, its end lr_end"),
            "sine": Lost(CONSTANT_LR),
        },
    ),
    "lr_warmup_steps": custom(
        convert.warmup, "warmup_steps", "for the cosine and sine schedules SimpleTuner's period: differs"
    ),
    "lr_num_cycles": custom(convert.cycles, "lr_cycles", "read only with restarts"),
    "lr_power": maps("lr_power", number),
    "lr_end": lost("schedules end at 0 here"),
    "optimizer": choice(
        "optimizer",
        {
            "adamw_bf16": Near("adamw", "SimpleTuner's keeps bf16 weights; here the LoRA and its moments are fp32"),
            "optimi-adamw": Near("adamw", "SimpleTuner's keeps bf16 weights; here the LoRA and its moments are fp32"),
            "optimi-stableadamw": Near("adamw", "there is no StableAdamW; plain AdamW is used"),
            "adamw": "adamw",
            "bnb-adamw": "adamw",
            "bnb-adamw-paged": "adamw",
            "bnb-adamw8bit": "adamw8bit",
            "bnb-adamw8bit-paged": "adamw8bit",
            "ao-adamw8bit": Near("adamw8bit", "torchao's 8-bit states; here those of bitsandbytes"),
            "adamw_schedulefree": "schedule-free",
            "adamw_schedulefree+aggressive": Near("schedule-free", "without SimpleTuner's aggressive settings"),
            "adamw_schedulefree+no_kahan": "schedule-free",
            "prodigy": "prodigy",
            "adafactor": "adafactor",
            "came": "came",
        },
    ),
    "optimizer_config": lost("settings of a single optimizer beyond betas and weight decay cannot be set"),
    "optimizer_beta1": custom(convert.betas, "betas", "with `optimizer_beta2`; the other one's default is 0.9, 0.999"),
    "optimizer_beta2": custom(convert.betas, "betas", "with `optimizer_beta1`"),
    "adam_weight_decay": maps("weight_decay", number),
    "adam_epsilon": custom(
        lambda value, given: (
            Outcome("ignored", {}, "1e-8 here too")
            if number(value) == 1e-8
            else Outcome("no counterpart", {}, "epsilon is 1e-8")
        ),
        "",
        "1e-8 here; another value has no counterpart",
        "no counterpart",
    ),
    "max_grad_norm": maps("max_grad_norm", number),
    "grad_clip_method": choice(
        "", {"norm": Same("the norm is clipped here too"), "value": Lost("the norm of all gradients is clipped here")}
    ),
    "gradient_checkpointing": maps("gradient_checkpointing", switch),
    "gradient_checkpointing_interval": maps("checkpointing_interval", whole),
    "dynamo_backend": choice("compile", {"no": False, "inductor": True}),
    "lora_rank": maps("lora.rank", whole, "also `network_rank`"),
    "lora_alpha": maps("lora.alpha", number, "also `network_alpha`"),
    "lora_dropout": maps("lora.dropout", number),
    "lora_type": choice(
        "lora.kind",
        {
            "standard": Same("an ordinary LoRA"),
            "lycoris": Near("lokr", "what lycoris_config says is not read: set it in [lora]"),
        },
    ),
    "use_dora": custom(
        lambda value, given: (
            Outcome("maps", {"lora.kind": "dora"}) if switch(value) else Outcome("ignored", {}, "not used")
        ),
        "lora.kind",
        "true → `dora`",
    ),
    "init_lora": maps("lora.start_from", lambda value: ForeignPath(text(value))),
    "flux_lora_target": choice(
        "lora.target",
        {name: name for name in ("all", "all+ffs", "all+ffs+embedder", "context", "context+ffs", "tiny")}
        | {
            "ai-toolkit": "all+ffs",
            "mmdit": "attention",
            "nano": "attention",
            "tiny+embedder": Near("tiny", "without the input projection"),
        },
    ),
    "lora_init_type": choice("", {"default": Same("the same start"), "gaussian": Lost("PEFT's default start is used")}),
    "use_ema": custom(convert.ema, "lora.ema_decay", "with `ema_decay`; false → 0"),
    "ema_decay": ignored("taken over with use_ema"),
    "ema_update_interval": custom(
        lambda value, given: (
            Outcome("ignored", {}, "every step here too")
            if whole(value) == 1
            else Outcome("no counterpart", {}, "the average is updated at every step")
        ),
        "",
        "the average is updated at every step",
        "no counterpart",
    ),
    "ema_validation": lost("previews show the trained weights; the averaged ones are saved beside them"),
    "flow_sigmoid_scale": maps("objective.scale", number),
    "flow_schedule_shift": custom(
        convert.shift, "objective.flow_shift", "0 and 1 → `none`; others differ beside the tail remap"
    ),
    "flow_schedule_auto_shift": custom(
        convert.auto_shift, "objective.flow_shift", "true → `dynamic`; differs beside the tail remap"
    ),
    "flow_use_uniform_schedule": custom(
        lambda value, given: (
            Outcome("maps", {"objective.draw": "uniform"}) if switch(value) else Outcome("ignored", {}, "not used")
        ),
        "objective.draw",
        "true → `uniform`, without tail remap, as in SimpleTuner",
    ),
    "flow_use_beta_schedule": lost("there is no Beta draw; logit-normal is used, without tail remap"),
    "flux_fast_schedule": lost(
        "a fixed list of noise levels for Flux Schnell; logit-normal is used, without tail remap"
    ),
    "flux_guidance_mode": custom(
        convert.guidance, "objective.guidance, objective.guidance_range", "given to the model", "differs"
    ),
    "flux_guidance_value": ignored("taken over with flux_guidance_mode"),
    "flux_guidance_min": ignored("taken over with flux_guidance_mode"),
    "flux_guidance_max": ignored("taken over with flux_guidance_mode"),
    "flux_attention_masked_training": ignored(
        "padding is never attended to here, and SimpleTuner's Chroma always masks it"
    ),
    "t5_padding": choice(
        "objective.text_padding", {"zero": "zero", "unmodified": "unmodified"}, "also `flux_t5_padding`"
    ),
    "noise_offset": custom(
        convert.noise_offset, "objective.noise_offset", "only with `offset_noise`; for a part of the samples differs"
    ),
    "offset_noise": ignored("taken over with noise_offset"),
    "noise_offset_probability": ignored("taken over with noise_offset"),
    "loss_type": choice(
        "objective.loss",
        {
            "l2": "mse",
            "huber": Near(
                "huber", "SimpleTuner's is the smooth pseudo-Huber with a threshold that may follow the noise level"
            ),
            "smooth_l1": Near("huber", "the nearest loss that there is"),
        },
    ),
    "huber_c": maps("objective.huber_delta", number),
    "huber_schedule": choice(
        "",
        {
            "constant": Same("constant here too"),
            "snr": Lost("the threshold is constant"),
            "exponential": Lost("the threshold is constant"),
        },
    ),
    "data_backend_config": ignored("the dataloader file; see below"),
    "validation_prompt": custom(convert.prompt, "previews.prompts", "one prompt"),
    "validation_negative_prompt": maps("previews.negative"),
    "validation_step_interval": maps("previews.every", whole, "also `validation_steps`"),
    "validation_num_inference_steps": maps("previews.steps", whole),
    "validation_guidance_real": maps("previews.guidance", number),
    "validation_guidance": lost("for Chroma SimpleTuner's previews follow validation_guidance_real"),
    "validation_seed": maps("previews.seed", whole),
    "validation_resolution": custom(picture_size, "previews.width, previews.height", "of several the first; differs"),
    "validation_disable": custom(convert.previews_off, "previews.prompts", "true → no prompts"),
    "validation_on_startup": custom(
        convert.on_startup, "", "the first preview is always made before training", "differs"
    ),
    "num_validation_images": custom(
        single_prompt, "", "one picture a prompt; more has no counterpart", "no counterpart"
    ),
    "validation_noise_scheduler": lost("previews are sampled with the flow-match sampler of every other picture"),
    "eval_steps_interval": maps("validate_every", whole),
    "num_eval_images": maps("validation_pictures", whole),
    "checkpoint_step_interval": maps("checkpoint_every", whole, "also `checkpointing_steps`"),
    "checkpoints_total_limit": maps("keep_checkpoints", whole),
    "resume_from_checkpoint": custom(convert.resume, "", "a job always goes on from its newest checkpoint", "ignored"),
    "tokenizer_max_length": custom(convert.tokens, "", "512 tokens", "no counterpart"),
    "lycoris_config": ignored("said with lora_type"),
    **REST,
}


def built_in(given: Given) -> list[tuple[str, Outcome]]:
    """What SimpleTuner does for Chroma without an option: the tail remap, except where a schedule switches it off."""
    remap = "none" if no_remap(given) else "quadratic_split"
    return [("tail remap", Outcome("maps", {"objective.remap": remap}))]
