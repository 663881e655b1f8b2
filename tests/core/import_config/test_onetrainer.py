"""What OneTrainer says beside its configuration: concepts, samples, layers, units of time, older names."""

import json

import pytest

from chroma_core.import_config import import_config
from chroma_core.import_config.read import ours
from chroma_core.lora.settings import LoraSettings
from import_cases import kinds

BASE = {"training_method": "LORA", "model_type": "CHROMA_1", "base_model_name": "lodestones/Chroma1-HD"}


@pytest.fixture
def images(tmp_path):
    for i in range(6):
        path = tmp_path / "a" / ("deeper" if i == 5 else ".") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return tmp_path / "a"


def test_epochs_and_units_of_time(put, images):
    config = BASE | {
        "concepts": [{"path": "a", "balancing": 2}], "epochs": 10, "batch_size": 4, "sample_after": 2,
        "sample_after_unit": "EPOCH", "save_every": 50, "save_every_unit": "STEP", "backup_after": 2,
        "backup_after_unit": "HOUR", "validation": True, "validate_after": 3, "rolling_backup": True,
        "rolling_backup_count": 5, "gradient_accumulation_steps": 1, "learning_rate_warmup_steps": 90,
    }  # fmt: skip
    imported = import_config(put("config.json", config))
    job = imported.config
    assert job.steps == 10 * 3  # 6 images twice, 4 to a step
    assert (job.previews.every, job.checkpoint_every, job.validate_every) == (6, 50, 9)
    assert (job.checkpoint_minutes, job.keep_checkpoints, job.warmup_steps) == (120, 5, 90)
    config |= {"sample_after_unit": "MINUTE", "gradient_accumulation_steps": 3, "learning_rate_warmup_steps": 0.1}
    imported = import_config(put("config.json", config))
    assert kinds(imported)["sample_after"] == kinds(imported)["learning_rate_warmup_steps"] == "no counterpart"
    config["learning_rate_warmup_steps"] = 90
    job = import_config(put("config.json", config)).config
    assert (job.warmup_steps, job.checkpoint_every, job.validate_every) == (30, 16, 3)  # OneTrainer counts batches


def test_concepts_and_samples_in_files_of_their_own(put, images):
    put("c.json", [{"path": "a", "type": "VALIDATION"}, {"path": "a", "image": {"enable_crop_jitter": False}}])
    put("s.json", [{"prompt": "a star"}, {"prompt": "a moon", "seed": 3, "cfg_scale": 2.5, "width": 768}])
    config = put("config.json", BASE | {"concept_file_name": "c.json", "sample_definition_file_name": "s.json"})
    imported = import_config(config)
    assert imported.sources == ("config.json", "c.json", "s.json")
    assert imported.config.validation_dataset is not None and imported.config.dataset.crop == "centre"
    star, moon = imported.config.preview_list()
    assert (star.width, star.settings.seed, star.settings.guidance) == (512, 42, 7.0)
    assert (moon.width, moon.settings.seed, moon.settings.guidance, moon.settings.steps) == (768, 3, 2.5, 20)
    other = import_config(config, put("other.json", [{"path": "a", "balancing": 4}]))
    assert other.config.dataset.repeats == 4
    missing = import_config(put("b.json", BASE | {"concept_file_name": "nowhere.json"}))
    assert any("nowhere.json" in item and "--dataloader" in item for item in missing.todo)


def test_images_in_sub_folders_are_remarked_where_there_are_some(put, images):
    imported = import_config(put("config.json", BASE | {"concepts": [{"path": "a", "include_subdirectories": False}]}))
    assert kinds(imported)["concepts.0.include_subdirectories"] == "differs"
    (images / "deeper" / "5.png").unlink()
    imported = import_config(put("config.json", BASE | {"concepts": [{"path": "a", "include_subdirectories": False}]}))
    assert kinds(imported)["concepts.0.include_subdirectories"] == "ignored"


def test_null_is_no_clipping_and_infinity_is_read(put):
    text = json.dumps(BASE | {"clip_grad_norm": None, "optimizer": {"optimizer": "PRODIGY", "growth_rate": 1e400}})
    assert "Infinity" in text
    imported = import_config(put("config.json", text))
    assert imported.config.max_grad_norm == 0 and imported.config.optimizer == "prodigy"
    assert imported.config.learning_rate == 1.0  # its 3e-6 means nothing to Prodigy


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"learning_rate_scheduler": "COSINE", "optimizer": {"optimizer": "SCHEDULE_FREE_ADAMW"}}, "constant"),
        ({"learning_rate_scheduler": "COSINE_WITH_HARD_RESTARTS", "optimizer": {"optimizer": "PRODIGY"}}, "cosine"),
        ({"learning_rate_scheduler": "COSINE_WITH_HARD_RESTARTS"}, "restarts"),
    ],
)
def test_a_schedule_that_an_optimizer_does_not_take_is_replaced_and_said(put, options, kind):
    imported = import_config(put("config.json", BASE | options))
    assert imported.config.lr_schedule == kind
    said = [line.values for line in imported.remarks if line.option == "learning_rate_scheduler"]
    assert said == ([] if kind == "restarts" else [{"lr_schedule": kind}])


def test_patterns_of_layers_say_what_was_kept():
    """A star only where the layer is kept in every block."""
    kept = ours(lambda name: name.endswith("attn.to_q") and ".3." not in name)
    names = [f"transformer_blocks.{i}.attn.to_q" for i in range(19) if i != 3]
    names += [f"single_transformer_blocks.{i}.attn.to_q" for i in range(38) if i != 3]
    assert kept == names
    assert ours(lambda name: "single" in name and name.endswith("to_q")) == ["single_transformer_blocks.*.attn.to_q"]
    assert LoraSettings(target=kept).rank == 16


def test_rex_is_a_power_that_comes_near(put):
    """REX: z / (.1 + .9 z), z the share of the steps that are left."""
    imported = import_config(put("config.json", BASE | {"learning_rate_scheduler": "REX"}))
    left = [i / 1000 for i in range(1001)]
    errors = [z / (0.1 + 0.9 * z) - z**imported.config.lr_power for z in left]
    assert imported.config.lr_schedule == "polynomial" and kinds(imported)["learning_rate_scheduler"] == "differs"
    assert sum(error**2 for error in errors) / len(errors) < 0.07**2
    assert all(abs(error) < 0.07 for z, error in zip(left, errors, strict=True) if z > 0.1)
