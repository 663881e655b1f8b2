"""SimpleTuner's options that become none of ours, with the reason: see `simpletuner` for the others."""

from __future__ import annotations

from .rules import Table, ignored_all, lost, lost_all

CACHE = "latents and text states are always cached, and in ChromaKit's own way"
PUBLISH = "publishing and tracking: no part of a job; metrics.jsonl has the numbers"
OTHER_MODEL = "of other model families"

REST: Table = {
    "report_to": lost(PUBLISH),
    **lost_all(
        "push_to_hub push_checkpoints_to_hub publishing_config webhook_config post_upload_script "
        "post_checkpoint_script "
        "validation_external_script",
        PUBLISH,
    ),
    **lost_all(
        "validation_prompt_library user_prompt_library",
        "the prompts stand in another file: copy those you want into previews.prompts",
    ),
    **lost_all(
        "validation_guidance_rescale validation_no_cfg_until_timestep validation_guidance_skip_layers "
        "validation_randomize "
        "validation_using_datasets evaluation_type ema_foreach_disable validation_adapter_path "
        "validation_adapter_config "
        "validation_torch_compile",
        "previews have no such setting",
    ),
    **lost_all(
        "checkpoint_epoch_interval validation_epoch_interval eval_epoch_interval checkpointing_rolling_steps",
        "steps are counted here, not epochs",
    ),
    **lost_all("controlnet control", "ControlNets are not trained"),
    **lost_all("train_text_encoder text_encoder_lr refiner_training", "the transformer alone is trained"),
    **lost_all("tread_config", "TREAD is not built in; SimpleTuner's does not work for Chroma either"),
    **lost_all(
        "fuse_qkv_projections attention_mechanism sageattention_usage quantize_activations", "PyTorch's own attention"
    ),
    **lost_all(
        "snr_gamma use_soft_min_snr snr_weight", "a weighting for noise-predicting models, not for flow matching"
    ),
    **lost_all("lr_scale lr_scale_sqrt", "the learning rate is taken as it stands"),
    **lost_all("input_perturbation masked_loss_probability", "not built in"),
    **lost_all("timestep_bias_strategy", "see sigma_bias of a data set"),
    **lost_all(
        "distillation_method scheduled_sampling_max_step_offset crepa_enabled diff2flow_enabled", "not built in"
    ),
    **lost_all("peft_lora_mode slider_lora_target init_lokr_norm layer_freeze_strategy", "not built in"),
    **lost_all("lora_format", "the LoRA is written so that ComfyUI and diffusers both load it"),
    **lost_all("musubi_blocks_to_swap", 'use offload = "block" in [model]'),
    **ignored_all(
        "quantize_via offload_during_save base_model_default_dtype group_offload_type group_offload_blocks_per_group "
        "group_offload_use_stream group_offload_to_disk_path ramtorch_target_modules ramtorch_text_encoder "
        "ramtorch_vae "
        "ema_device ema_cpu_only set_grads_to_none torch_num_threads gradient_precision optimizer_cpu_offload_method "
        "optimizer_offload_gradients optimizer_release_gradients fuse_optimizer disable_tf32 "
        "accelerator_cache_clear_interval "
        "dynamo_mode dynamo_fullgraph dynamo_dynamic dynamo_use_regional_compilation keep_vae_loaded vae_enable_tiling "
        "vae_enable_slicing vae_dtype vae_batch_size fully_unload_text_encoder num_processes num_machines local_rank",
        "where and how fast, not what",
    ),
    **ignored_all(
        "cache_dir cache_dir_text cache_dir_vae compress_disk_cache vae_cache_ondemand vae_cache_disable "
        "write_batch_size "
        "vae_cache_scan_behaviour read_batch_size image_processing_batch_size max_workers enable_multiprocessing "
        "aws_max_pool_connections dataloader_prefetch dataloader_prefetch_qlen aspect_bucket_worker_count "
        "metadata_update_interval skip_file_discovery preserve_data_backend_cache override_dataset_config "
        "aspect_bucket_disable_rebuild text_cache_ondemand text_cache_disable text_encoder_batch_size",
        CACHE,
    ),
    **ignored_all(
        "hub_model_id tracker_run_name tracker_project_name tracker_image_layout logging_dir push_to_hub_background "
        "model_card_private model_card_safe_for_work model_card_note webhook_reporting_interval disable_benchmark "
        "print_filenames print_sampler_statistics debug_aspect_buckets debug_dataset_loader i_know_what_i_am_doing "
        "validation_preview validation_preview_steps validation_disable_unconditional validation_seed_source "
        "validation_stitch_input_location eval_timesteps eval_dataset_id eval_dataset_pooling "
        "checkpointing_use_tempdir",
        "reports and progress, not training",
    ),
    **ignored_all(
        "disable_bucket_pruning allow_dataset_oversubscription ignore_missing_files ignore_final_epochs "
        "aspect_bucket_rounding "
        "data_backend_sampling disable_segmented_timestep_sampling seed_for_each_device",
        "the order of the data is ChromaKit's own: every picture once an epoch, whatever the bucket's size",
    ),
    **ignored_all(
        "prediction_type unet_attention_slice variant rescale_betas_zero_snr training_scheduler_timestep_spacing "
        "inference_scheduler_timestep_spacing framerate ltx_train_mode ltx_i2v_prob sd3_clip_uncond_behaviour "
        "sd3_t5_uncond_behaviour text_encoder_2_precision text_encoder_3_precision text_encoder_4_precision "
        "data_aesthetic_score enable_watermark validation_num_video_frames controlnet_model_name_or_path",
        OTHER_MODEL,
    ),
}
