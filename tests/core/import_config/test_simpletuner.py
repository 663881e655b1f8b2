"""Importing SimpleTuner's configurations: every mapped value, every remark."""

import json
import math
import re

import pytest
import torch
from scipy import stats

from chroma_core.import_config import import_config, job_toml
from chroma_core.sampling.schedule import draw_sigmas
from import_cases import NOTHING_NAMED, SECOND, SEED_SNIPPET, SIMPLETUNER, SIMPLETUNER_SET, SMALL, check, kinds


def test_the_seeds_snippet_imports_with_what_it_does_not_state(put):
    imported = import_config(put("config.json", SEED_SNIPPET))
    # SimpleTuner's own values: bf16 weights, clipping by value, one epoch. Nothing that the snippet states differs.
    assert [line.option for line in imported.remarks] == ["num_train_epochs", "optimizer", "grad_clip_method"]
    assert all(line.value.endswith(" (not stated)") for line in imported.remarks)
    check(
        imported,
        SIMPLETUNER
        | {
            "name": "chroma-output",
            "model.flavour": "base",
            "model.precision": "bf16",
            "learning_rate": 2e-4,
            "gradient_checkpointing": True,
        },
        {"dataset": NOTHING_NAMED},
    )
    assert kinds(imported)["pretrained_model_name_or_path"] == "ignored"
    assert len(imported.todo) == 2 and "[dataset]" in imported.todo[1] and "set steps" in imported.todo[0]


def test_the_imported_noise_levels_are_simpletuners(put):
    """Drawn by the imported job: shares 13.6 / 0 / 86.4 % below ¼, between and from ¾ on; Φ(−ln 3) = .136."""
    objective = import_config(put("config.json", SEED_SNIPPET)).config.objective
    sigma = draw_sigmas(200_000, objective.sigmas(), torch.Generator().manual_seed(0), 4096)
    shares = torch.histc(sigma, 4, 0, 1) / len(sigma)
    assert shares[1] == shares[2] == 0
    assert float(shares[0]) == pytest.approx(stats.norm.cdf(-math.log(3)), abs=0.003)
    assert float(sigma.mean()) == pytest.approx(0.8246, abs=0.003)


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
    assert imported.remarks == []
    check(
        imported,
        SIMPLETUNER
        | {
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
            "dataset": SIMPLETUNER_SET
            | {
                "folder": str(tmp_path / "data/portraits"),
                "caption_source": "files",
                "resolutions": [512, 768],
                "repeats": 10,
                "crop": "centre",
                "caption_dropout": 0.05,
            },
            "validation_dataset": SIMPLETUNER_SET
            | {
                "folder": str(tmp_path / "data/held-out"),
                "caption_source": "filenames",
                "resolutions": [512],
                "caption_dropout": 0.05,
            },
        },
    )
    assert imported.todo == ()
    assert kinds(imported)["old"] == kinds(imported)["text"] == "ignored"


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
    values = SIMPLETUNER | {
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
    del values["lr_schedule"]  # a sine wave has no counterpart
    check(
        imported,
        values,
        {
            "dataset": SIMPLETUNER_SET
            | {
                "folder": "/nowhere/pictures",
                "caption_source": "fixed",
                "default_caption": "a photo of sks",
                "caption_dropout": 0.0,
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
    for option in ("lr_warmup_steps", "enable_group_offload", "validation_resolution"):
        assert found[option] == "differs", option
    for option in ("optimizer", "loss_type", "noise_offset", "flux_guidance_mode"):
        assert found[option] == "differs", option
    assert found["controlnet"] == found["max_train_steps"] == "ignored"
    assert found["flow_schedule_shift"] == "maps"
    assert all(line.reason for line in imported.lines if line.kind != "maps")
    assert any("/nowhere/pictures" in item for item in imported.todo)
    text = job_toml(imported)
    for line in imported.remarks:
        assert f"- {line.option} = " in re.sub(r"\n#   ", " ", text)


@pytest.mark.parametrize(
    "options, expected, differs",
    [
        ({"flow_use_uniform_schedule": True, "flow_schedule_shift": 2},
         {"objective.draw": "uniform", "objective.remap": "none", "objective.flow_shift": 2.0,
          "objective.shift_first": None}, []),
        ({"flow_use_beta_schedule": True}, {"objective.remap": "none", "objective.shift_first": None},
         ["flow_use_beta_schedule"]),
        ({"flux_fast_schedule": False, "flow_sigmoid_scale": 1.5, "flow_schedule_shift": 0},
         {"objective.scale": 1.5, "objective.flow_shift": "none", "objective.shift_first": None}, []),
        ({"flow_schedule_auto_shift": True, "flow_schedule_shift": 0}, {"objective.flow_shift": "dynamic"}, []),
        ({"flow_schedule_auto_shift": True}, {"objective.flow_shift": "dynamic"}, []),
        ({"flux_lora_target": "tiny+embedder"}, {"lora.target": "tiny+embedder"}, []),
        ({"flux_lora_target": "ai-toolkit"}, {"lora.target": "ai-toolkit"}, []),
        ({"mixed_precision": "no", "lr_scheduler": "constant", "lr_warmup_steps": 99},
         {"model.precision": "fp32", "lr_schedule": "constant", "warmup_steps": None}, None),
        ({"pretrained_model_name_or_path": "lodestones/Chroma1-Flash"},
         {"model.flavour": "flash"}, []),
        ({"pretrained_model_name_or_path": "/models/chroma.safetensors", "base_model_precision": "nf4-bnb"},
         {"model.transformer": "/models/chroma.safetensors",
          "model.precision": "nf4-bnb"}, []),
        ({"pretrained_model_name_or_path": "someone/chroma-tune", "flux_lora_target": "mmdit"},
         {"lora.target": "attention"}, ["pretrained_model_name_or_path"]),
        ({"pretrained_vae_model_name_or_path": "./vae/ae.safetensors", "pretrained_t5_model_name_or_path": "t5.gguf"},
         {"model.vae": "./vae/ae.safetensors",
          "model.text_encoder": "t5.gguf"}, []),
        ({"init_lora": ""}, {}, []),
        ({"validation_disable": True, "validation_prompt": "x"},
         {"previews.prompts": []}, []),
        ({"base_model_precision": "int8-torchao", "mixed_precision": "fp16", "text_encoder_1_precision": "int4-quanto"},
         {"model.precision": "int8", "model.text_precision": "int4-quanto"},
         ["base_model_precision", "mixed_precision"]),
    ],
)  # fmt: skip
def test_single_options(put, options, expected, differs):
    imported = import_config(put("config.json", SMALL | options))
    values = SIMPLETUNER | {"name": "out"} | expected
    check(imported, {option: value for option, value in values.items() if value is not None})
    if differs is not None:
        stated = [line.option for line in imported.remarks if not line.value.endswith("(not stated)")]
        assert stated == differs


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
    both = SIMPLETUNER_SET | {"alignment": 32, "caption_dropout": 0.0, "resolutions": [1024]}
    first = both | {"folder": str(tmp_path / "a"), "caption_source": "files", "caption_prefix": "sks man", "repeats": 1}
    second = both | {"folder": str(tmp_path / "b"), "caption_source": "filenames", "crop": "centre"}
    check(imported, SIMPLETUNER | {"name": "out"}, {"dataset": first})
    assert imported.values["more_datasets"] == [second]


def test_a_dataloader_that_is_not_there_is_left_to_do(put):
    imported = import_config(put("config.json", SMALL | {"data_backend_config": "config/sets.json"}))
    assert any("config/sets.json" in item and "--dataloader" in item for item in imported.todo)
    assert imported.values["dataset"] == NOTHING_NAMED


@pytest.mark.parametrize(
    ("lycoris", "values"),
    [
        ({"algo": "lora", "linear_dim": 64}, {"kind": "lora", "rank": 64, "alpha": 1.0}),
        ({"algo": "locon", "linear_dim": 8, "linear_alpha": 8, "dora_wd": True},
         {"kind": "dora", "rank": 8, "alpha": 8.0}),
        ({"algo": "lokr", "linear_dim": 16, "linear_alpha": 4, "factor": 8, "multiplier": 1},
         {"kind": "lokr", "rank": 16, "alpha": 4.0, "lokr_factor": 8}),
    ],
)  # fmt: skip
def test_what_lycoris_config_says_is_read(put, lycoris, values):
    put("lycoris.json", json.dumps(lycoris))
    asked = SMALL | {"lora_type": "lycoris", "lycoris_config": "lycoris.json", "lora_rank": 32}
    imported = import_config(put("config.json", json.dumps(asked)))
    assert {name: getattr(imported.config.lora, name) for name in values} == values
    assert kinds(imported)["lora_rank"] == "ignored" and kinds(imported)["lora_type"] == "maps"


def test_what_lycoris_has_and_we_have_not_is_said(put):
    put("lycoris.json", json.dumps({"algo": "lokr", "full_matrix": True}))
    put("oft.json", json.dumps({"algo": "diag-oft"}))
    asked = SMALL | {"lora_type": "lycoris", "lycoris_config": "lycoris.json"}
    imported = import_config(put("config.json", json.dumps(asked)))
    (line,) = [line for line in imported.remarks if line.option == "lora_type"]
    assert "full_matrix" in line.reason
    imported = import_config(put("config.json", json.dumps(asked | {"lycoris_config": "oft.json"})))
    assert kinds(imported)["lora_type"] == "no counterpart"
    imported = import_config(put("config.json", json.dumps(asked | {"lycoris_config": "nowhere.json"})))
    assert "nowhere.json" in imported.todo[0] and kinds(imported)["lora_type"] == "differs"


def test_epochs_become_steps_where_the_images_are_here(put, tmp_path):
    for i in range(10):
        put(f"data/{i}.png", "x")
    put("data/1-masklabel.png", "x")
    put("data/1.txt", "a caption")
    sets = [
        {"id": "a", "instance_data_dir": "data", "repeats": 2, "caption_strategy": "textfile"},
        {"id": "b", "instance_data_dir": "data", "caption_strategy": "textfile", "resolution": 512},
    ]
    config = SMALL | {"num_train_epochs": 5, "train_batch_size": 4, "gradient_accumulation_steps": 2}
    imported = import_config(put("config.json", config), put("sets.json", sets))
    # 10 × 3 + 10 × 1 images, 8 to a step, 5 times over.
    assert imported.config.steps == 5 * 5 and imported.todo == ()
    (line,) = [line for line in imported.remarks if line.option == "num_train_epochs"]
    assert "40 images" in line.reason and line.values == {"steps": 25}
    imported = import_config(put("config.json", config | {"max_train_steps": 70}), put("sets.json", sets))
    assert imported.config.steps == 70 and kinds(imported)["num_train_epochs"] == "ignored"


@pytest.mark.parametrize("how", [{"conditioning_data": "masks"}, {}])
def test_a_set_of_masks_is_taken_over_with_what_is_left_to_do(put, tmp_path, how):
    (tmp_path / "a").mkdir()
    masks = {"id": "masks", "dataset_type": "conditioning", "conditioning_type": "mask", "instance_data_dir": "m"}
    sets = [{"id": "a", "instance_data_dir": "a"} | how, masks if how else masks | {"source_dataset_id": "a"}]
    imported = import_config(put("config.json", SMALL), put("sets.json", sets))
    assert imported.config.dataset.masks == "files"
    assert any("masklabel" in item and "'m'" in item for item in imported.todo)
    sets[1]["conditioning_type"] = "canny"
    imported = import_config(put("config.json", SMALL), put("sets.json", sets))
    assert imported.config.dataset.masks == "none" and kinds(imported)["masks"] == "no counterpart"
    if how:
        assert kinds(imported)["a: conditioning_data"] == "no counterpart"


def test_the_lines_of_a_caption_file(put, tmp_path):
    sets = [{"id": "a", "instance_data_dir": "a", "disable_multiline_split": True}]
    imported = import_config(put("config.json", SMALL), put("sets.json", sets))
    assert imported.config.dataset.caption_lines == "joined"
    imported = import_config(put("config.json", SMALL), put("sets.json", [{"id": "a", "instance_data_dir": "a"}]))
    assert imported.config.dataset.caption_lines == "each"
