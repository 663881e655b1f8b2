"""Importing ai-toolkit's configurations: every mapped value, every remark."""

from chroma_core.import_config import import_config
from import_cases import check, kinds

AI_TOOLKIT = """
job: extension
config:
  name: "my_first_chroma_lora"
  process:
    - type: sd_trainer
      training_folder: "output"
      device: cuda:0
      trigger_word: "p3r5on"
      network: {type: lora, linear: 16, linear_alpha: 16}
      save: {dtype: float16, save_every: 250, max_step_saves_to_keep: 4, push_to_hub: false}
      datasets:
        - folder_path: "pictures"
          caption_ext: "txt"
          caption_dropout_rate: 0.05
          shuffle_tokens: false
          cache_latents_to_disk: true
          resolution: [512, 768, 1024]
      train:
        batch_size: 1
        steps: 2000
        gradient_accumulation: 2
        train_unet: true
        train_text_encoder: false
        gradient_checkpointing: true
        noise_scheduler: flowmatch
        optimizer: adamw8bit
        lr: 1e-4   # text in YAML 1.1
        ema_config: {use_ema: true, ema_decay: 0.99}
        dtype: bf16
      model:
        name_or_path: "lodestones/Chroma1-HD"
        arch: "chroma"
        quantize: true
      sample:
        sampler: flowmatch
        sample_every: 250
        width: 1024
        height: 768
        prompts:
          - "[trigger] playing chess"
          - "a horse is a DJ --w 512 --n ugly"
        neg: ""
        seed: 42
        walk_seed: true
        guidance_scale: 4
        sample_steps: 25
meta:
  name: "[name]"
  version: "1.0"
"""


def test_an_ai_toolkit_run(put, tmp_path):
    (tmp_path / "pictures").mkdir()
    imported = import_config(put("train.yaml", AI_TOOLKIT))
    check(
        imported,
        {
            "name": "my_first_chroma_lora",
            "recipe": "ai-toolkit",
            "model.flavour": "hd",
            "model.precision": "fp8-quanto",
            "model.text_precision": "fp8-quanto",
            "lora.rank": 16,
            "lora.alpha": 16.0,
            "lora.save_dtype": "fp32",
            "lora.target": ["transformer_blocks.*", "single_transformer_blocks.*"],
            "lora.ema_decay": 0.99,
            "objective.remap": "none",
            "checkpoint_every": 250,
            "keep_checkpoints": 4,
            "batch_size": 1,
            "steps": 2000,
            "gradient_accumulation": 2,
            "gradient_checkpointing": True,
            "optimizer": "adamw8bit",
            "learning_rate": 1e-4,
            "previews.every": 250,
            "previews.width": 1024,
            "previews.height": 768,
            "previews.prompts": ["[trigger] playing chess", "a horse is a DJ"],
            "previews.negative": "",
            "previews.seed": 42,
            "previews.guidance": 4.0,
            "previews.steps": 25,
        },
        {
            "dataset": {
                "trigger": "p3r5on",
                "folder": str(tmp_path / "pictures"),
                "caption_extension": ".txt",
                "caption_dropout": 0.05,
                "resolutions": [512, 768, 1024],
            }
        },
    )
    found = kinds(imported)
    assert found["save.dtype"] == found["sample.prompts"] == found["datasets.0.caption_dropout_rate"] == "differs"
    assert found["trained layers"] == "differs"
    assert found["sample.walk_seed"] == found["train.noise_scheduler"] == found["save.push_to_hub"] == "ignored"
    assert "unknown" not in found.values()
    assert imported.todo == ()


def test_another_ai_toolkit_run(put, tmp_path):
    text = """
config:
  name: style
  process:
    - type: sd_trainer
      network: {type: lokr, rank: 8, linear_alpha: 4, lokr_factor: 8, network_kwargs: {only_if_contains: [attn]}}
      save: {dtype: bf16}
      datasets:
        - {folder_path: a, shuffle_tokens: true, keep_tokens: 2, flip_x: true, num_repeats: 3, is_reg: true,
           alpha_mask: true}
      train: {steps: 100, lr: 0.001, unet_lr: 0.001, optimizer: lion8bit,

              optimizer_params: {weight_decay: 0.1, eps: 1.0e-6},
              timestep_type: shift, lr_scheduler: constant_with_warmup, lr_scheduler_params: {num_warmup_steps: 50},
              dtype: float32, disable_sampling: true, min_denoising_steps: 100, loss_type: mae, noise_offset: 0.0357,
              train_text_encoder: true, new_option: 1}
      model: {name_or_path: "lodestones/Chroma", arch: "chroma:ui", low_vram: true, compile: false}
      sample: {prompts: [x, y], walk_seed: false, neg: false, network_multiplier: 0.5}
"""
    imported = import_config(put("train.yml", text))
    values = {
        "name": "style", "recipe": "ai-toolkit", "model.flavour": "base", "model.precision": "fp32",
        "model.offload_during_startup": True, "compile": False, "lora.kind": "lokr", "lora.rank": 8, "lora.alpha": 4.0,
        "lora.lokr_factor": 8, "lora.save_dtype": "bf16",
        "lora.target": ["transformer_blocks.*", "single_transformer_blocks.*"],
        "steps": 100, "learning_rate": 0.001, "weight_decay": 0.1, "lr_schedule": "constant", "warmup_steps": 50,
        "objective.draw": "uniform", "objective.flow_shift": "dynamic", "objective.remap": "none",
        "objective.maximum": 0.9, "objective.loss": "huber", "objective.noise_offset": 0.0357,
        "previews.prompts": [], "previews.negative": "",
    }  # fmt: skip
    check(
        imported,
        values,
        {"dataset": {"folder": "a", "tag_shuffles": 8, "keep_tags": 2, "flip": True, "repeats": 3,
                     "regularisation": True, "masks": "alpha"}},
    )  # fmt: skip
    found = kinds(imported)
    assert found["train.new_option"] == "unknown"
    for option in (
        "train.optimizer",
        "network.network_kwargs",
        "train.train_text_encoder",
        "sample.network_multiplier",
    ):
        assert found[option] == "no counterpart", option
    for option in ("train.optimizer_params", "train.min_denoising_steps", "model.name_or_path", "sample.walk_seed"):
        assert found[option] == "differs", option
    assert "eps" in next(line.reason for line in imported.lines if line.option == "train.optimizer_params")
