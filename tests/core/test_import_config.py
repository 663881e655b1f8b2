"""Importing SimpleTuner's and ai-toolkit's configurations: every mapped value, every remark, every refusal."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from chroma_core.errors import ConfigError
from chroma_core.import_config import (
    ai_toolkit,
    ai_toolkit_sets,
    import_config,
    job_toml,
    simpletuner,
    simpletuner_sets,
    write_job,
)
from chroma_core.import_config.document import page
from chroma_core.import_config.fields import missing, set_list, set_missing
from chroma_core.import_config.job_toml import toml
from chroma_core.import_config.report import as_json, as_text
from chroma_core.training.config.config import TrainingConfig

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

SMALL = {"model_family": "chroma", "model_type": "lora", "output_dir": "out"}


@pytest.fixture
def put(tmp_path, monkeypatch):
    """Writes a file (JSON unless text) into a fresh present folder."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, content) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return write


def kinds(imported) -> dict[str, str]:
    return {line.option: line.kind for line in imported.lines}


def existing(flat: dict, known=missing) -> dict:
    """What of these options this version has: other parts of the project may add the rest."""
    return {path: value for path, value in flat.items() if not known(path, value)}


def flat(tree: dict, prefix: str = "") -> dict:
    found = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def check(imported, expected: dict, sets: dict | None = None) -> None:
    """The job has exactly these values (as far as the options exist), and the file reads back as the same job."""
    written = flat({k: v for k, v in imported.values.items() if k not in ("dataset", "validation_dataset", set_list())})
    assert written == existing(expected)
    for place, values in (sets or {}).items():
        assert imported.values[place] == existing(values, set_missing)
    assert tomllib.loads(job_toml(imported)) == json.loads(json.dumps(imported.values))
    assert TrainingConfig.parse(tomllib.loads(job_toml(imported))) == imported.config


def test_the_seeds_snippet_imports_without_a_remark(put):
    imported = import_config(put("config.json", SEED_SNIPPET))
    assert imported.remarks == []
    check(
        imported,
        {
            "name": "chroma-output",
            "model.flavour": "base",
            "model.precision": "bf16",
            "lora.rank": 16,
            "learning_rate": 2e-4,
            "gradient_checkpointing": True,
            "objective.remap": "quadratic_split",
        },
        {"dataset": {"folder": "pictures"}},
    )
    assert kinds(imported)["pretrained_model_name_or_path"] == "ignored"
    assert len(imported.todo) == 1 and "[dataset]" in imported.todo[0]


FIRST = """{
  // dashes, comments and trailing commas
  "--model_family": "chroma", "--model_type": "lora", "--model_flavour": "hd",
  "--output_dir": "output/portrait-v2",  /* the name */
  "--data_backend_config": "config/multidatabackend.json",
  "--max_train_steps": "3000", "--num_train_epochs": 0,
  "--train_batch_size": 2, "--gradient_accumulation_steps": 4,
  "--learning_rate": "1e-4", "--lr_scheduler": "constant_with_warmup", "--lr_warmup_steps": 100,
  "--optimizer": "bnb-adamw8bit", "--adam_weight_decay": 0.02, "--optimizer_beta1": 0.9, "--optimizer_beta2": 0.99,
  "--max_grad_norm": 1.0, "--grad_clip_method": "norm", "--seed": 7,
  "--lora_rank": 32, "--lora_alpha": 16, "--lora_dropout": 0.1, "--lora_type": "standard",
  "--flux_lora_target": "all+ffs", "--base_model_precision": "int8-quanto", "--mixed_precision": "bf16",
  "--text_encoder_1_precision": "no_change", "--gradient_checkpointing": "true",
  "--gradient_checkpointing_interval": 2, "--use_ema": true, "--ema_decay": 0.999,
  "--caption_dropout_probability": 0.05, "--resolution": 768, "--resolution_type": "pixel_area",
  "--validation_prompt": "a portrait // of \\"sks\\",]", "--validation_negative_prompt": "blurry",
  "--validation_steps": 200, "--validation_num_inference_steps": 28, "--validation_guidance_real": 3.0,
  "--validation_seed": 11, "--validation_resolution": "1024x768", "--num_validation_images": 1,
  "--checkpointing_steps": 500, "--checkpoints_total_limit": 5, "--resume_from_checkpoint": "latest",
  "--push_to_hub": false, "--report_to": "none", "--eval_steps_interval": 100,
}"""

FIRST_SETS = [
    {
        "id": "portrait-512",
        "type": "local",
        "instance_data_dir": "data/portraits",
        "caption_strategy": "textfile",
        "resolution": 512,
        "repeats": 9,
        "crop": False,
        "cache_dir_vae": "cache/vae",
        "metadata_backend": "discovery",
    },
    {
        "id": "portrait-768",
        "type": "local",
        "instance_data_dir": "data/portraits",
        "caption_strategy": "textfile",
        "repeats": 9,
        "crop": False,
        "cache_dir_vae": "cache/vae2",
    },
    {"id": "old", "disabled": True, "instance_data_dir": "data/old"},
    {"id": "held-out", "dataset_type": "eval", "instance_data_dir": "data/held-out", "resolution": 512},
    {"id": "text", "dataset_type": "text_embeds", "default": True, "cache_dir": "cache/text"},
]


def test_a_usual_simpletuner_run(put, tmp_path):
    for folder in ("data/portraits", "data/held-out"):
        (tmp_path / folder).mkdir(parents=True)
    put("config/multidatabackend.json", FIRST_SETS)
    imported = import_config(put("config/config.json", FIRST))
    assert all("this version of ChromaKit has no" in line.reason for line in imported.remarks)
    check(
        imported,
        {
            "name": "portrait-v2",
            "model.flavour": "hd",
            "model.precision": "int8-quanto",
            "steps": 3000,
            "batch_size": 2,
            "gradient_accumulation": 4,
            "learning_rate": 1e-4,
            "lr_schedule": "constant",
            "warmup_steps": 100,
            "optimizer": "adamw8bit",
            "weight_decay": 0.02,
            "betas": [0.9, 0.99],
            "max_grad_norm": 1.0,
            "seed": 7,
            "lora.rank": 32,
            "lora.alpha": 16.0,
            "lora.dropout": 0.1,
            "lora.target": "all+ffs",
            "lora.ema_decay": 0.999,
            "gradient_checkpointing": True,
            "checkpointing_interval": 2,
            "objective.remap": "quadratic_split",
            "previews.prompts": ['a portrait // of "sks",]'],
            "previews.negative": "blurry",
            "previews.every": 200,
            "previews.steps": 28,
            "previews.guidance": 3.0,
            "previews.seed": 11,
            "previews.width": 1024,
            "previews.height": 768,
            "checkpoint_every": 500,
            "keep_checkpoints": 5,
            "validate_every": 100,
        },
        {
            "dataset": {
                "folder": str(tmp_path / "data/portraits"),
                "caption_source": "files",
                "resolutions": [512, 768],
                "repeats": 10,
                "crop": "centre",
                "caption_dropout": 0.05,
            },
            "validation_dataset": {
                "folder": str(tmp_path / "data/held-out"),
                "resolutions": [512],
                "caption_dropout": 0.05,
            },
        },
    )
    assert imported.todo == ()
    assert kinds(imported)["old"] == kinds(imported)["text"] == "ignored"


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


def test_what_differs_and_what_has_no_counterpart(put, tmp_path):
    start = put("loras/start.safetensors", "x")
    backends = [
        {
            "id": "all",
            "instance_data_dir": "/nowhere/pictures",
            "caption_strategy": "instanceprompt",
            "instance_prompt": "a photo of sks",
            "resolution": 1.0,
            "resolution_type": "area",
            "crop": True,
            "crop_aspect": "square",
            "crop_style": "random",
            "caption_shuffle": {"enable": True, "count": 3, "position_start": 1},
            "timestep_sampling_offset": -0.5,
            "is_regularisation_data": True,
            "probability": 0.5,
            "minimum_image_size": 0,
            "colour": "blue",
        },
        {"id": "film", "dataset_type": "video", "instance_data_dir": "data/film"},
        {"id": "cloud", "type": "aws", "aws_bucket_name": "b"},
    ]
    imported = import_config(put("config.json", SECOND), put("sets.json", backends))
    values = {
        "name": "out",
        "model.flavour": "base",
        "model.offload": "block",
        "model.offload_during_startup": True,
        "optimizer": "adamw",
        "warmup_steps": 0,
        "objective.remap": "quadratic_split",
        "objective.flow_shift": 3.0,
        "objective.guidance": "random-range",
        "objective.guidance_range": [1.0, 5.0],
        "objective.text_padding": "zero",
        "objective.noise_offset": 0.1,
        "objective.loss": "huber",
        "lora.kind": "dora",
        "lora.rank": 8,
        "lora.start_from": str(start.resolve()),
        "compile": False,
        "previews.width": 512,
        "previews.height": 512,
    }
    check(
        imported,
        values,
        {
            "dataset": {
                "folder": "/nowhere/pictures",
                "caption_source": "fixed",
                "default_caption": "a photo of sks",
                "resolutions": [1024],
                "crop": "random",
                "tag_shuffles": 3,
                "keep_tags": 1,
                "sigma_bias": -0.240449,
                "regularisation": True,
                "weight": 0.5,
            }
        },
    )
    found = kinds(imported)
    assert found["made_up_option"] == found["all: colour"] == "unknown"
    for option in (
        *("lr_scheduler", "num_train_epochs", "push_to_hub", "tread_config", "validation_guidance", "film", "cloud"),
        "grad_clip_method",
    ):
        assert found[option] == "no counterpart", option
    for option in ("flow_schedule_shift", "lr_warmup_steps", "enable_group_offload", "validation_resolution"):
        assert found[option] == "differs", option
    ours = {"optimizer": "optimizer", "loss_type": "objective.loss", "noise_offset": "objective.noise_offset"}
    for option, path in (ours | {"flux_guidance_mode": "objective.guidance"}).items():
        assert found[option] == ("differs" if path in existing(values) else "no counterpart"), option
    assert found["controlnet"] == found["max_train_steps"] == "ignored"
    reason = next(line.reason for line in imported.lines if line.option == "flow_schedule_shift")
    assert "before" in reason and "after" in reason
    assert all(line.reason for line in imported.lines if line.kind != "maps")
    assert any("/nowhere/pictures" in item for item in imported.todo)
    text = job_toml(imported)
    for line in imported.remarks:
        assert f"- {line.option} = " in re.sub(r"\n#   ", " ", text)


@pytest.mark.parametrize(
    "options, expected, differs",
    [
        ({"flow_use_uniform_schedule": True, "flow_schedule_shift": 2},
         {"objective.draw": "uniform", "objective.remap": "none", "objective.flow_shift": 2.0}, []),
        ({"flow_use_beta_schedule": True}, {"objective.remap": "none"}, ["flow_use_beta_schedule"]),
        ({"flux_fast_schedule": False, "flow_sigmoid_scale": 1.5, "flow_schedule_shift": 0},
         {"objective.remap": "quadratic_split", "objective.scale": 1.5, "objective.flow_shift": "none"}, []),
        ({"flow_schedule_auto_shift": True, "flow_schedule_shift": 3},
         {"objective.remap": "quadratic_split", "objective.flow_shift": "dynamic"}, ["flow_schedule_auto_shift"]),
        ({"mixed_precision": "no", "lr_scheduler": "constant", "lr_warmup_steps": 99},
         {"objective.remap": "quadratic_split", "model.precision": "fp32", "lr_schedule": "constant"}, None),
        ({"pretrained_model_name_or_path": "lodestones/Chroma1-Flash"},
         {"objective.remap": "quadratic_split", "model.flavour": "flash"}, []),
        ({"pretrained_model_name_or_path": "/models/chroma.safetensors", "base_model_precision": "nf4-bnb"},
         {"objective.remap": "quadratic_split", "model.transformer": "/models/chroma.safetensors",
          "model.precision": "nf4-bnb"}, []),
        ({"pretrained_model_name_or_path": "someone/chroma-tune", "flux_lora_target": "mmdit"},
         {"objective.remap": "quadratic_split", "lora.target": "attention"}, ["pretrained_model_name_or_path"]),
        ({"pretrained_vae_model_name_or_path": "./vae/ae.safetensors", "pretrained_t5_model_name_or_path": "t5.gguf"},
         {"objective.remap": "quadratic_split", "model.vae": "./vae/ae.safetensors",
          "model.text_encoder": "t5.gguf"}, []),
        ({"validation_disable": True, "validation_prompt": "x"},
         {"objective.remap": "quadratic_split", "previews.prompts": []}, []),
        ({"base_model_precision": "int8-torchao", "mixed_precision": "fp16", "text_encoder_1_precision": "int4-quanto"},
         {"objective.remap": "quadratic_split", "model.precision": "int8", "model.text_precision": "int4-quanto"},
         ["base_model_precision", "mixed_precision"]),
    ],
)  # fmt: skip
def test_single_options(put, options, expected, differs):
    imported = import_config(put("config.json", SMALL | options))
    check(imported, {"name": "out"} | expected)
    if differs is not None:
        assert [line.option for line in imported.remarks] == differs


def test_a_third_simpletuner_run_with_several_sets(put, tmp_path):
    backends = [
        {
            "id": "a",
            "instance_data_dir": "a",
            "instance_prompt": "sks man",
            "prepend_instance_prompt": True,
            "repeats": 0,
        },
        {"id": "b", "instance_data_dir": "b", "caption_strategy": "filename", "crop": True, "crop_aspect": "preserve"},
    ]
    for backend in backends:
        (tmp_path / backend["id"]).mkdir()
    config = SMALL | {"caption_strategy": "textfile", "aspect_bucket_alignment": 32, "data_backend_config": "sets.json"}
    put("sets.json", backends)
    imported = import_config(put("config.json", config))
    first = {"folder": str(tmp_path / "a"), "caption_source": "files", "caption_prefix": "sks man", "repeats": 1,
             "alignment": 32}  # fmt: skip
    second = {"folder": str(tmp_path / "b"), "caption_source": "filenames", "crop": "centre", "alignment": 32}
    check(imported, {"name": "out", "objective.remap": "quadratic_split"}, {"dataset": first})
    if set_list():
        assert imported.values[set_list()] == [existing(second, set_missing)]
    else:
        assert kinds(imported)[str(tmp_path / "b")] == "no counterpart"


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


YAML = "config:\n  process:\n    - type: sd_trainer\n      network: {linear: 4}\n      model: {arch: %s}\n"

REFUSED = [
    ("config.json", SMALL | {"model_family": "flux"}, ["'flux'", "Chroma"]),
    ("config.json", SMALL | {"model_family": "sdxl"}, ["'sdxl'"]),
    ("config.json", {"model_type": "lora", "lora_rank": 4}, ["does not say its model_family"]),
    ("config.json", SMALL | {"model_type": "full"}, ["model_type", "full", "LoRA"]),
    ("config.json", '{"model_family": "chroma", "lora_rank": }', ["not valid JSON", "line 1, column 41"]),
    ("config.json", '{"model_family": "chroma",\n "seed": 1,\n "seed": 2}', ["'seed' stands there twice"]),
    ("config.json", '{"model_family": "chroma", "learning_rate": NaN}', ["NaN"]),
    ("config.json", "", ["empty"]),
    ("config.json", [{"id": "a", "instance_data_dir": "x"}], ["--dataloader"]),
    ("config.json", {"_class_name": "ChromaTransformer2DModel", "num_layers": 19}, ["diffusers"]),
    ("config.json", {"nodes": [], "links": []}, ["ComfyUI workflow"]),
    ("config.json", {"network_module": "networks.lora", "learning_rate": 1}, ["kohya"]),
    ("config.json", {"foo": 1, "bar": 2}, ["neither", "foo, bar"]),
    ("config.json", SMALL | {"lora_rank": "many"}, ["lora_rank", "'many'", "a number"]),
    ("config.json", SMALL | {"lora_rank": 16.5}, ["lora_rank", "a whole number"]),
    ("config.json", SMALL | {"lora_rank": 0}, ["lora_rank (our lora.rank) is 0", "greater than or equal to 1"]),
    ("config.json", SMALL | {"learning_rate": -1}, ["learning_rate", "greater than 0"]),
    ("config.json", SMALL | {"gradient_checkpointing": "sometimes"}, ["gradient_checkpointing", "true or false"]),
    ("config.json", SMALL | {"network_rank": 8, "lora_rank": 16}, ["network_rank and lora_rank", "8 and 16"]),
    ("config.json", SMALL | {"model_flavour": "hd", "pretrained_model_name_or_path": "lodestones/Chroma1-Base"},
     ["model.flavour", "model_flavour", "pretrained_model_name_or_path"]),
    ("config.json", SMALL | {"validation_resolution": "wide"}, ["validation_resolution", "'wide'"]),
    ("config.json", SMALL | {"resolution": 10000}, ["resolution", "4096"]),
    ("config.json", SMALL | {"mixed_precision": "tf32"}, ["mixed_precision", "no, fp16, bf16 or fp8"]),
    ("config.toml", "steps = 1", ["TOML", "no import"]),
    ("t.yaml", YAML % "flux", ["'flux'", "Chroma"]),
    ("t.yaml", YAML % "sdxl", ["'sdxl'"]),
    ("t.yaml", "config:\n  process:\n    - {type: sd_trainer, network: {}, model: {is_flux: true}}", ["'flux'"]),
    ("t.yaml", "config:\n  process:\n    - {type: sd_trainer, model: {arch: chroma}}", ["no `network`"]),
    ("t.yaml", "config:\n  process: []", ["config.process"]),
    ("t.yaml", "config:\n  process:\n    - {type: extract, model: {arch: chroma}}", ["'extract'"]),
    ("t.yaml", "config:\n  name: a\n  name: b\n", ["'name' stands twice in line 3"]),
    ("t.yaml", "config: [", ["not valid YAML", "line 1"]),
    ("t.yaml", "config: !!python/object/apply:os.system ['true']", ["not valid YAML"]),
    ("t.yaml", "just a sentence", ["holds no options"]),
    ("t.yaml", YAML % "chroma" + "      train: [1]\n", ["train is [1]", "a section"]),
    ("t.yaml", YAML % "chroma" + "      train: {lr: fast}\n", ["train.lr", "'fast'", "a number"]),
]  # fmt: skip


@pytest.mark.parametrize("name, content, words", REFUSED)
def test_what_cannot_be_imported_is_refused_with_the_reason(put, name, content, words):
    with pytest.raises(ConfigError) as error:
        import_config(put(name, content))
    assert not [word for word in words if word not in str(error.value)], str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_are_missing_or_no_text(put, tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        import_config(tmp_path / "nothing.json")
    (tmp_path / "bytes.json").write_bytes(b'{"model_family": "\xff"}')
    with pytest.raises(ConfigError, match="not UTF-8"):
        import_config(tmp_path / "bytes.json")
    with pytest.raises(ConfigError, match="list of data sets"):
        import_config(put("config.json", SMALL), put("sets.json", {"id": "a"}))
    with pytest.raises(ConfigError, match="leave --dataloader out"):
        import_config(put("t.yaml", YAML % "chroma"), put("sets.json", []))
    deep = put("deep.json", "[" * 100_000)
    with pytest.raises(ConfigError, match="deep|JSON"):
        import_config(deep)


def test_a_dataloader_that_is_not_there_is_left_to_do(put):
    imported = import_config(put("config.json", SMALL | {"data_backend_config": "config/sets.json"}))
    assert any("config/sets.json" in item and "--dataloader" in item for item in imported.todo)
    assert imported.values["dataset"] == {"folder": "pictures"}


def test_hostile_texts_stay_texts(put, tmp_path):
    evil = 'a"\n[model]\nflavour = "tiny"\x00\x1b[2J\x7f \\ 🐸'
    imported = import_config(put("config.json", SMALL | {"validation_prompt": evil, 'odd"\n[x]\ny = 1 #': evil}))
    text = job_toml(imported)
    read = tomllib.loads(text)
    assert read["previews"]["prompts"] == [evil]
    assert "model" not in read and "x" not in read
    assert not [c for c in as_text(imported, tmp_path) if c != "\n" and not c.isprintable()]
    with pytest.raises(ConfigError, match="surrogate"):
        job_toml(import_config(put("half.json", '{"model_family": "chroma", "validation_prompt": "\\ud83d"}')))


def test_the_serialiser_writes_what_tomllib_reads():
    values = {
        "text": 'quotes " and \\ and \t\n\r\x01 é 🐸',
        "odd key.": {"inner": 1, "deep": {"x": [1.5, 2.0]}},
        "numbers": [1e-5, 1e300, -0.0, 3.0, 2e-4],
        "empty": [],
        "flags": [True, False],
        "table": {},
        "list": [{"a": 1, "b": {"c": "d"}}, {"a": 2}],
        "words": ["a", "b,c"],
    }
    assert tomllib.loads(toml(values)) == values
    assert tomllib.loads(toml({"none": None, "a": {"b": None}})) == {"a": {}}


def test_an_existing_file_is_not_overwritten(put, tmp_path):
    imported = import_config(put("config.json", SEED_SNIPPET))
    path = write_job(imported, tmp_path / "new" / "job.toml")
    assert TrainingConfig.from_toml(path).lora.rank == 16
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="not overwritten"):
        write_job(imported, path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["job.toml"]


def test_every_option_of_the_file_is_in_the_report(put, tmp_path):
    report = as_json(import_config(put("config.json", SECOND)), tmp_path / "job.toml")
    named = {
        line["option"]
        for kind in ("mapped", "differs", "no_counterpart", "unknown", "ignored")
        for line in report[kind]
    }
    assert set(SECOND) <= named
    assert json.loads(json.dumps(report)) == report


TABLES = {
    "SimpleTuner": (simpletuner.OPTIONS, missing),
    "SimpleTuner's sets": (simpletuner_sets.SET_OPTIONS, set_missing),
    **{f"ai-toolkit {name}": (table, missing) for name, table in ai_toolkit.SECTIONS.items()},
    "ai-toolkit's sets": (ai_toolkit_sets.SET_OPTIONS, set_missing),
}


@pytest.mark.parametrize("name", TABLES)
def test_every_line_of_the_tables_says_what_or_why(name):
    table, _ = TABLES[name]
    for option, rule in table.items():
        assert rule.to or rule.reason, option
        assert rule.kind in ("maps", "differs") or rule.reason, option
        assert re.fullmatch(r"[a-z0-9_]+", option), option


def test_an_option_that_this_version_lacks_is_never_written():
    assert missing("lora.rank", 4) == ""
    assert "no option lora.colour" in missing("lora.colour", 4)
    assert "no option model.colour" in missing("model.colour", 4)
    assert "it has" in missing("objective.remap", "cubic")
    assert set_missing("folder", "x") == "" and "no option" in set_missing("colour", "x")


def test_the_documentation_is_current():
    path = Path(__file__).parents[2] / "docs" / "import.md"
    assert path.read_text(encoding="utf-8") == page(), f"run: python -m chroma_core.import_config.document {path}"


def test_the_command_line(put, tmp_path):
    put("config.json", SEED_SNIPPET)
    script = (
        "import argparse, sys; from chroma_core.cli.imports import add_import_command\n"
        "parser = argparse.ArgumentParser(); add_import_command(parser.add_subparsers(required=True))\n"
        "options = parser.parse_args(sys.argv[1:]); options.run(options)"
    )

    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", script, "import-config", "config.json", *arguments]
        root = str(Path(__file__).parents[2])
        return subprocess.run(
            command, cwd=tmp_path, env={"PYTHONPATH": root, "PATH": ""}, capture_output=True, text=True
        )

    report = json.loads(run("--json", "--output", "a.toml").stdout)
    assert (report["tool"], report["differs"], report["no_counterpart"], report["unknown"]) == (
        "SimpleTuner",
        [],
        [],
        [],
    )
    assert {"option": "network_rank", "value": "16", "written": {"lora.rank": 16}, "reason": ""} in report["mapped"]
    text = run().stdout
    assert "network_rank = 16 → lora.rank = 16" in text and "0 remarks" in text
    assert (tmp_path / "job.toml").read_text() == (tmp_path / "a.toml").read_text()
    again = run()
    assert again.returncode != 0 and "exists already" in again.stderr
