"""Configurations of other trainers, and how the tests look at what became of them."""

import json
import sys

from chroma_core.import_config import job_toml
from chroma_core.training.config import TrainingConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SEED_SNIPPET = """
{
  "model_type": "lora",
  "model_family": "chroma",
  "model_flavour": "base",
  "output_dir": "/workspace/chroma-output",
  "network_rank": 16,
  "learning_rate": 2.0e-4,
  "mixed_precision": "bf16",
  "gradient_checkpointing": true,
  "pretrained_model_name_or_path": null
}
"""

SIMPLETUNER = {
    "batch_size": 4,
    "gradient_accumulation": 1,
    "learning_rate": 4e-7,
    "lr_schedule": "constant",
    "warmup_steps": 0,
    "optimizer": "adamw",
    "weight_decay": 0.01,
    "max_grad_norm": 2.0,
    "lora.rank": 16,
    "lora.dropout": 0.1,
    "lora.target": "all",
    "objective.flow_shift": 3,
    "objective.shift_first": True,
    "objective.remap": "quadratic_split",
}
"""What SimpleTuner does for Chroma when its config.json does not say otherwise."""
SIMPLETUNER_SET = {"upscale": True, "repeat_folders": False}
NOTHING_NAMED = SIMPLETUNER_SET | {"folder": "pictures", "caption_dropout": 0.0, "resolutions": [1024]}
"""The dataset of such a file that names none; the captions are whatever the folder will have."""
AI_TOOLKIT = {
    "recipe": "ai-toolkit",
    "steps": 1000,
    "batch_size": 1,
    "gradient_accumulation": 1,
    "learning_rate": 1e-6,
    "optimizer": "adamw",
    "weight_decay": 0.01,
    "lr_schedule": "constant",
    "max_grad_norm": 1.0,
    "lora.target": ["transformer_blocks.*", "single_transformer_blocks.*"],
    "objective.draw": "logit_normal",
    "objective.remap": "none",
}
"""What ai-toolkit does for Chroma when its YAML does not say otherwise, and in a dataset."""
AI_TOOLKIT_SET = {
    "caption_extension": ".txt",
    "caption_dropout": 0.0,
    "resolutions": [512],
    "repeats": 1,
    "alignment": 64,
    "caption_lines": "joined",
    "missing_caption": "empty",
    "repeat_folders": False,
}

SMALL = {"model_family": "chroma", "model_type": "lora", "output_dir": "out"}

SECOND = SMALL | {
    "model_flavour": "base",
    "optimizer": "adamw_bf16",
    "lr_scheduler": "sine",
    "lr_warmup_steps": 500,
    "num_train_epochs": 20,
    "max_train_steps": 0,
    "flow_schedule_shift": 3,
    "flux_guidance_mode": "random-range",
    "flux_guidance_min": 1,
    "flux_guidance_max": 5,
    "t5_padding": "zero",
    "noise_offset": 0.1,
    "offset_noise": True,
    "loss_type": "huber",
    "use_dora": True,
    "enable_group_offload": True,
    "offload_during_startup": True,
    "push_to_hub": True,
    "tread_config": {"routes": [{"start": 2}]},
    "lora_rank": 8,
    "made_up_option": [1, 2],
    "controlnet": False,
    "validation_resolution": "512x512,768x768",
    "validation_guidance": 4.0,
    "init_lora": "loras/start.safetensors",
    "dynamo_backend": "no",
    "grad_clip_method": "value",
}

YAML = "config:\n  process:\n    - type: sd_trainer\n      network: {linear: 4}\n      model: {arch: %s}\n"


def kinds(imported) -> dict[str, str]:
    return {line.option: line.kind for line in imported.lines}


def flat(tree: dict, prefix: str = "") -> dict:
    found = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def check(imported, expected: dict, sets: dict | None = None) -> None:
    """The job has exactly these values, and the file reads back as the same job."""
    written = flat(
        {k: v for k, v in imported.values.items() if k not in ("dataset", "validation_dataset", "more_datasets")}
    )
    assert written == expected
    for place, values in (sets or {}).items():
        assert imported.values[place] == values
    assert tomllib.loads(job_toml(imported)) == json.loads(json.dumps(imported.values))
    assert TrainingConfig.parse(tomllib.loads(job_toml(imported))) == imported.config
