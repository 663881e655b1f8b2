"""Importing ai-toolkit's configurations: every mapped value, every remark."""

import pytest
import torch

from chroma_core.data.captions import prepared
from chroma_core.import_config import import_config
from chroma_core.lora.settings import target_modules
from chroma_core.model.transformer import ChromaTransformer
from chroma_core.sampling.schedule import draw_sigmas
from import_cases import AI_TOOLKIT, AI_TOOLKIT_SET, check, kinds

YAML_FILE = """
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
    imported = import_config(put("train.yaml", YAML_FILE))
    check(
        imported,
        AI_TOOLKIT
        | {
            "name": "my_first_chroma_lora",
            "model.flavour": "hd",
            "model.precision": "fp8-quanto",
            "model.text_precision": "fp8-quanto",
            "lora.rank": 16,
            "lora.alpha": 16.0,
            "lora.save_dtype": "fp32",
            "lora.ema_decay": 0.99,
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
            "previews.prompts": [
                "[trigger] playing chess",
                {"prompt": "a horse is a DJ", "width": 512, "negative": "ugly"},
            ],
            "previews.negative": "",
            "previews.seed": 42,
            "previews.guidance": 4.0,
            "previews.steps": 25,
        },
        {
            "dataset": AI_TOOLKIT_SET
            | {
                "trigger": "p3r5on",
                "folder": str(tmp_path / "pictures"),
                "caption_extension": ".txt",
                "caption_dropout": 0.05,
                "resolutions": [512, 768, 1024],
            }
        },
    )
    found = kinds(imported)
    assert found["sample.prompts"] == "maps"
    assert found["save.dtype"] == found["datasets.0.caption_dropout_rate"] == "differs"
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
    values = AI_TOOLKIT | {
        "name": "style", "model.flavour": "base", "model.precision": "fp32",
        "model.offload_during_startup": True, "compile": False, "lora.kind": "lokr", "lora.rank": 8, "lora.alpha": 4.0,
        "lora.lokr_factor": 8, "lora.save_dtype": "bf16",
        "lora.target": [
            *(f"transformer_blocks.*.attn.{n}" for n in ("to_q", "to_k", "to_v", "to_out.0")),
            *(f"transformer_blocks.*.attn.{n}" for n in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
        ],
        "steps": 100, "learning_rate": 0.001, "weight_decay": 0.1, "lr_schedule": "constant", "warmup_steps": 50,
        "objective.draw": "uniform", "objective.flow_shift": 3.1582, "objective.remap": "none",
        "objective.maximum": 0.9, "objective.loss": "huber", "objective.noise_offset": 0.0357,
        "previews.prompts": [], "previews.negative": "",
    }  # fmt: skip
    del values["optimizer"]  # Lion has no counterpart
    check(
        imported,
        values,
        {"dataset": AI_TOOLKIT_SET | {"folder": "a", "tag_shuffles": 8, "keep_tags": 2, "flip": True, "repeats": 3,
                     "regularisation": True, "masks": "alpha"}},
    )  # fmt: skip
    found = kinds(imported)
    assert found["train.new_option"] == "unknown"
    for option in (
        "train.optimizer",
        "train.train_text_encoder",
        "sample.network_multiplier",
    ):
        assert found[option] == "no counterpart", option
    for option in ("train.optimizer_params", "train.min_denoising_steps", "model.name_or_path"):
        assert found[option] == "differs", option
    assert "eps" in next(line.reason for line in imported.lines if line.option == "train.optimizer_params")


MINIMAL = """
config:
  name: x
  process:
    - type: sd_trainer
      trigger_word: p3r5on
      network: {{type: lora, linear: 4}}
      datasets: [{datasets}]
      train: {{steps: 10, {train}}}
      model: {{name_or_path: "lodestones/Chroma1-HD", arch: chroma}}
"""


@pytest.mark.parametrize(
    ("size", "shift", "mean"), [(512, 3.1582, 0.685), (768, 7.5132, 0.798), (1024, 25.2797, 0.904)]
)
def test_the_shift_is_that_of_the_size(put, size, shift, mean):
    """Numbers of ai-toolkit's own scheduler; it counts latents before they are packed."""
    datasets = f"{{folder_path: a, resolution: {size}}}"
    imported = import_config(put("train.yml", MINIMAL.format(datasets=datasets, train="timestep_type: shift")))
    objective = imported.config.objective
    assert objective.flow_shift == shift and kinds(imported)["train.timestep_type"] == "maps"
    drawn = draw_sigmas(100_000, objective.sigmas(), torch.Generator().manual_seed(0), (size // 16) ** 2)
    assert float(drawn.mean()) == pytest.approx(mean, abs=0.003)


def test_sizes_of_several_kinds_are_remarked(put):
    datasets = "{folder_path: a, resolution: [512, 1024]}"
    imported = import_config(put("train.yml", MINIMAL.format(datasets=datasets, train="timestep_type: shift")))
    (line,) = [line for line in imported.remarks if line.option == "train.timestep_type"]
    assert imported.config.objective.flow_shift == 25.2797 and "3.1582 at 512" in line.reason


def test_a_set_of_ordinary_images_is_not_told_of_the_new_word(put, tmp_path):
    """Its captions stay as they are: "a dog"."""
    datasets = "{folder_path: a}, {folder_path: dogs, is_reg: true}"
    imported = import_config(put("train.yml", MINIMAL.format(datasets=datasets, train="lr: 1e-4")))
    new, ordinary = imported.config.dataset, imported.config.more_datasets[0]
    assert new.trigger == "p3r5on" and ordinary.trigger == "" and ordinary.regularisation
    assert prepared(("a dog",), ordinary.trigger) == ("a dog",)


@pytest.mark.parametrize(("train", "kind"), [("lr: 1e-4", "differs"), ("", ""), ("lr: 1.0", "maps")])
def test_prodigys_rate_is_a_factor(put, train, kind):
    train = ", ".join(filter(None, ["optimizer: prodigy", train]))
    imported = import_config(put("train.yml", MINIMAL.format(datasets="{folder_path: a}", train=train)))
    assert imported.config.learning_rate == 1.0
    assert kinds(imported).get("train.lr", "") == kind or not kind


@pytest.mark.parametrize(("network", "rank", "kind"), [
    ("{type: lokr, linear: 32, linear_alpha: 32, lokr_full_rank: true, lokr_factor: 8}", 1024, "maps"),
    ("{type: lokr, linear: 32, linear_alpha: 32, lokr_full_rank: true, lokr_factor: 4}", 1024, "differs"),
    ("{type: lokr, linear: 32, lokr_full_rank: false}", 32, "ignored"),
    ("{type: lora, linear: 32, lokr_full_rank: true}", 32, "ignored"),
])  # fmt: skip
def test_a_lokr_of_full_rank_has_whole_factors(put, network, rank, kind):
    text = MINIMAL.format(datasets="{folder_path: a}", train="lr: 1e-4").replace("{type: lora, linear: 4}", network)
    imported = import_config(put("train.yml", text))
    assert imported.config.lora.rank == rank and kinds(imported)["network.lokr_full_rank"] == kind


def sampled(put, sample: str):
    text = MINIMAL.format(datasets="{folder_path: a}", train="lr: 1e-4") + f"      sample: {sample}\n"
    return import_config(put("train.yml", text))


def test_previews_keep_their_own_settings(put):
    imported = sampled(
        put,
        """
        walk_seed: true
        seed: 7
        neg: blurry
        width: 1024
        height: 1024
        prompts: ["a fox --w 512 --h 768 --seed 3 --n ugly, red --cfg 2.5 --s 30", "a horse -- yes", "plain --m 0.8"]
""",
    )
    first, second, third = imported.config.preview_list()
    assert (first.prompt, first.width, first.height, first.negative) == ("a fox", 512, 768, "ugly, red")
    assert (first.settings.seed, first.settings.guidance, first.settings.steps) == (3, 2.5, 30)
    assert (second.prompt, second.width, second.negative) == ("a horse -- yes", 1024, "blurry")
    assert second.settings.seed == 8 and third.prompt == "plain"
    (line,) = [line for line in imported.remarks if line.option == "sample.prompts"]
    assert "--m 0.8" in line.reason


def test_previews_given_as_objects(put):
    imported = sampled(
        put,
        """
        seed: 42
        samples:
          - {prompt: a fox, width: 512, height: 512, seed: 1, neg: ugly, guidance_scale: 3, sample_steps: 12}
          - {prompt: a horse, seed: null, ctrl_img: /x.png}
""",
    )
    first, second = imported.config.preview_list()
    assert (first.width, first.settings.seed, first.negative) == (512, 1, "ugly")
    assert (first.settings.guidance, first.settings.steps) == (3, 12)
    # Without walk_seed all have the seed itself, where ours would be seed + i.
    assert second.settings.seed == 42 and kinds(imported)["sample.samples"] == "differs"


@pytest.mark.parametrize(
    ("kwargs", "count"),
    [
        ("{only_if_contains: [single_blocks]}", 190),
        ("{only_if_contains: [transformer.single_blocks.7.linear2, single_blocks_20_linear2]}", 2),
        ("{ignore_if_contains: [double_blocks]}", 190),
        ("{only_if_contains: [img_], ignore_if_contains: [mlp]}", 76),
        ("{ignore_if_contains: []}", 418),
    ],
)
def test_filters_of_layers_become_patterns(put, kwargs, count):
    """Counted at 19 + 38 blocks: a fused layer of ai-toolkit's holds three or four of ours."""
    text = MINIMAL.format(datasets="{folder_path: a}", train="lr: 1e-4").replace(
        "linear: 4}", f"linear: 4, network_kwargs: {kwargs}}}"
    )
    imported = import_config(put("train.yml", text))
    with torch.device("meta"):
        model = ChromaTransformer()
    assert len(target_modules(model, imported.config.lora.target)) == count


def test_the_whole_caption_file_is_one_caption(put):
    imported = sampled(put, "{}")
    assert imported.config.dataset.caption_lines == "joined"


@pytest.mark.parametrize(
    ("train", "batches", "kind"),
    [
        ("gradient_accumulation: 3", 3, ""),
        ("gradient_accumulation_steps: 1, gradient_accumulation: 3", 3, "ignored"),
        ("gradient_accumulation_steps: 4", 4, "differs"),
        ("gradient_accumulation: 3, gradient_accumulation_steps: 4", 12, "differs"),
        ("gradient_accumulation_steps: -1", 1, "no counterpart"),
    ],
)
def test_both_ways_of_accumulating(put, train, batches, kind):
    imported = import_config(put("train.yml", MINIMAL.format(datasets="{folder_path: a}", train=train)))
    assert imported.config.gradient_accumulation == batches
    assert kinds(imported).get("train.gradient_accumulation_steps", "") == kind


def test_preservation_is_taken_over_with_its_weight_and_word(put):
    text = YAML_FILE.replace(
        "        train_unet: true",
        "        diff_output_preservation: true\n        diff_output_preservation_multiplier: 0.5\n"
        "        diff_output_preservation_class: person\n        blank_prompt_preservation: true\n"
        "        train_unet: true",
    )
    found = import_config(put("train.yaml", text))
    wanted = {"class_weight": 0.5, "class_word": "person", "blank_weight": 1.0, "share": 1.0}
    assert found.values["preserve"] == wanted and not any("preserv" in line.option for line in found.remarks)
    off = import_config(put("off.yaml", text.replace("preservation: true", "preservation: false")))
    assert "preserve" not in off.values
