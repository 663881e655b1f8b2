"""Forty configurations as people have them, ten a trainer: no option of any is silent, and every one becomes a job."""

import json
import sys
from pathlib import Path

import pytest
import tomlkit
import torch
import yaml

from chroma_core.import_config import import_config, job_toml
from chroma_core.import_config.trainers import KOHYA, ONETRAINER, SIMPLETUNER, flattened
from chroma_core.lora.settings import target_modules
from chroma_core.model.transformer import ChromaTransformer
from chroma_core.training.config import TrainingConfig
from import_cases import flat

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).parents[2] / "foreign_configs"
FILES = sorted(FOLDER.glob("*/[01][0-9]-*"))
IDS = [f"{file.parent.name}/{file.name}" for file in FILES]


def content(path: Path):
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".toml":
        return tomlkit.parse(text).unwrap()
    if path.suffix == ".yaml":
        return yaml.safe_load(text)
    return json.loads("\n".join(line for line in text.replace(",\n}", "\n}").split("\n") if "// " not in line))


def of_ai_toolkit(config, file: Path) -> set[str]:
    process = config["config"]["process"][0]
    found = {"config.name"}
    for key, value in process.items():
        if key == "datasets":
            found |= {f"datasets.{i}.{option}" for i, each in enumerate(value) for option in each}
        elif key in ("network", "save", "train", "model", "sample"):
            found |= {f"{key}.{option}" for option in value}
        else:
            found.add(key)
    return found


def of_simpletuner(config, file: Path) -> set[str]:
    found = set(config)
    named = config.get("data_backend_config") or config.get("--data_backend_config")
    for each in content(file.parent / named) if named else []:
        whole = each.get("disabled") or each.get("dataset_type", "image") not in ("image", "eval")
        # A set that is not trained is answered as a whole.
        found |= {each["id"]} if whole or "instance_data_dir" not in each else {f"{each['id']}: {k}" for k in each}
    return found


def of_onetrainer(config, file: Path) -> set[str]:
    sections = ("transformer", "text_encoder", "vae", "quantization", "optimizer")
    found = {key for key in config if key not in sections and not (key == "prior" and "transformer" not in config)}
    for section in sections:
        part = config.get(section, config.get("prior", {}) if section == "transformer" else {})
        found |= {f"{section}.{option}" for option in part} if isinstance(part, dict) else {f"{section}.{section}"}
    concepts = config.get("concepts")
    if concepts is None and (file.parent / config.get("concept_file_name", "nothing")).is_file():
        concepts = content(file.parent / config["concept_file_name"])
    for i, concept in enumerate(concepts or []):
        if not concept.get("enabled", True):
            found.add(f"concepts.{i}")
            continue
        for key, value in concept.items():
            nested = value if key in ("image", "text") else {}
            found |= {f"concepts.{i}.{key}.{option}" for option in nested if option != "__version"}
            found |= set() if nested else {f"concepts.{i}.{'balancing' if key == 'repeats' else key}"}
    return found


def of_kohya(config, file: Path) -> set[str]:
    found = set(flattened(config))
    named = flattened(config).get("dataset_config")
    if named:
        sets = content(file.parent / named)
        found |= {f"general.{key}" for key in sets.get("general", {})}
        for i, each in enumerate(sets["datasets"]):
            found |= {f"datasets.{i}.{key}" for key in each if key not in ("subsets", "batch_size")}
            found |= {f"datasets.{i}.subsets.{j}.{key}" for j, one in enumerate(each["subsets"]) for key in one}
    return found


OPTIONS = {"ai-toolkit": of_ai_toolkit, "simpletuner": of_simpletuner, "onetrainer": of_onetrainer, "kohya": of_kohya}


def answered(option: str, lines: set[str]) -> bool:
    """Whether a line is about the option; one that holds for several sets has a line in each of them."""
    name = option.rpartition(".")[2] if option.startswith(("general.", "datasets.")) else option
    return option in lines or any(line.endswith((f": {name}", f".{name}")) for line in lines)


@pytest.fixture(scope="module")
def real() -> ChromaTransformer:
    with torch.device("meta"):
        return ChromaTransformer()


@pytest.mark.parametrize("file", FILES, ids=IDS)
def test_every_option_is_mapped_remarked_or_refused(file, real, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    imported = import_config(file)
    lines = {line.option for line in imported.lines}
    asked = OPTIONS[file.parent.name](content(file), file)
    assert [option for option in sorted(asked) if not answered(option, lines)] == []
    assert [line.option for line in imported.of("unknown")] == []
    assert all(line.reason or line.kind == "maps" for line in imported.lines)
    assert all(line.values or line.kind != "maps" for line in imported.lines)
    # What was written is what the report says was written.
    written = flat({path: value for line in imported.lines for path, value in line.values.items()})
    job = {key: value for key, value in imported.values.items() if not key.endswith(("dataset", "datasets", "name"))}
    assert {path: written.get(path) for path in flat(job)} == flat(job)
    # The job is valid, for the model's real layers too, and reads back.
    assert TrainingConfig.parse(tomllib.loads(job_toml(imported))) == imported.config
    layers = target_modules(real, imported.config.lora.target)
    imported.config.lora.check_patterns(layers)
    imported.config.preview_size()


def test_there_are_ten_a_trainer():
    assert {name: sum(file.parent.name == name for file in FILES) for name in OPTIONS} == dict.fromkeys(OPTIONS, 10)


SAID: dict[str, dict] = {
    "ai-toolkit/02-window-job.yaml": {
        "weight_decay": 1e-4,
        "lora.rank": 32,
        "lora.kind": "lora",
        "objective.draw": "logit_normal",
        "dataset.caption_lines": "joined",
        "previews.prompts.1": {"prompt": "a bar at closing time", "width": 768, "height": 1152, "seed": 7},
        "layers": 418,
    },
    "ai-toolkit/05-attention-only.yaml": {
        "objective.draw": "uniform",
        "layers": 19 * 4 + 4,
        "model.precision": "fp8-torchao",
    },
    "ai-toolkit/10-nothing-but-the-needful.yaml": {
        "steps": 1000,
        "learning_rate": 1e-6,
        "batch_size": 1,
        "dataset.resolutions": (512,),
        "dataset.caption_dropout": 0.0,
    },
    "simpletuner/01-quickstart.json": {
        "batch_size": 4,
        "max_grad_norm": 2.0,
        "objective.flow_shift": 3,
        "objective.shift_first": True,
        "lora.dropout": 0.1,
        "objective.remap": "quadratic_split",
        "layers": 266,
        "learning_rate": 2e-4,
    },
    "simpletuner/02-configured.json": {
        "layers": 419,
        "dataset.repeats": 5,
        "dataset.resolutions": (512, 1024),
        "previews.guidance": 3.0,
        "lr_schedule": "polynomial",
    },
    "simpletuner/03-lycoris-lokr.json": {
        "lora.kind": "lokr",
        "lora.rank": 1024,
        "lora.lokr_factor": 16,
        "layers": 266,
        "dataset.default_caption": "a photo of subjectname",
        "dataset.repeats": 11,
    },
    "simpletuner/05-schedules.json": {
        "layers": 210,
        "objective.flow_shift": "dynamic",
        "objective.scale": 0.8,
        "optimizer": "schedule-free",
        "betas": (0.9, 0.98),
    },
    "simpletuner/06-uniform.json": {
        "objective.draw": "uniform",
        "objective.remap": "none",
        "objective.flow_shift": 1.73,
        "objective.shift_first": False,
        "lora.kind": "dora",
        "learning_rate": 1.0,
    },
    "onetrainer/01-preset-24gb.json": {
        "objective.draw": "chroma",
        "objective.remap": "none",
        "lora.rank": 16,
        "lora.alpha": 1.0,
        "warmup_steps": 200,
        "learning_rate": 3e-4,
        "batch_size": 2,
        "dataset.flip": True,
        "dataset.crop": "random",
        # `attn` and `ff.net`, which is no part of `ff_context.net`: 266 and twice 19.
        "layers": 266 + 38,
    },
    "onetrainer/02-preset-8gb.json": {"model.precision": "fp8", "model.offload": "block", "layers": 266 + 38 + 38},
    "onetrainer/04-prodigy.json": {
        "optimizer": "prodigy",
        "betas": (0.9, 0.99),
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "name": "fjord-v3",
        "dataset.resolutions": (512, 768, 1024),
        "dataset.crop": "centre",
        "dataset.flip": False,
        "dataset.keep_tags": 2,
    },
    "onetrainer/05-masked-dora.json": {
        "lora.kind": "dora",
        "dataset.masks": "files",
        "dataset.mask_floor": 0.05,
        "dataset.random_crops": 5,
        "layers": 421,
        "lora.ema_decay": 0.9999,
        "model.offload": "block",
        "objective.noise_offset": 0.03,
    },
    "onetrainer/06-logit-normal.json": {
        # A bias of .5 is a shift of e^.5, beside the shift of 1.5.
        "objective.draw": "logit_normal",
        "objective.scale": 1.2,
        "objective.flow_shift": 2.473082,
        "objective.loss": "huber",
        "objective.huber_delta": 0.2,
        "lr_schedule": "restarts",
        "lr_cycles": 3,
        "dataset.weight": 0.5,
        "layers": (19 + 38) * 3,
    },
    "onetrainer/08-lokr.json": {
        "lora.kind": "lokr",
        "lora.rank": 64,
        "lora.alpha": 64.0,
        "lora.lokr_factor": 8,
        "learning_rate": 2e-4,
        "layers": 266,
        "optimizer": "came",
        "dataset.resolutions": (941,),
    },
    "onetrainer/09-older.json": {
        "model.precision": "nf4",
        "optimizer": "adafactor",
        "dataset.repeats": 3,
        "dataset.caption_source": "filenames",
        "layers": 266,
        "gradient_checkpointing": True,
    },
    "kohya/01-guide.toml": {
        "lora.rank": 16,
        "lora.alpha": 1.0,
        "objective.draw": "logit_normal",
        "objective.flow_shift": "none",
        "batch_size": 4,
        "objective.guidance": "none",
        "dataset.keep_tags": 0,
        "dataset.default_caption": "hoge girl",
        "layers": 418,
    },
    "kohya/02-sections.toml": {
        "warmup_steps": 200,
        "betas": (0.9, 0.99),
        "weight_decay": 0.01,
        "objective.flow_shift": 3.1582,
        "objective.loss": "huber",
        "objective.huber_delta": 0.2,
        "lr_schedule": "cosine",
        "layers": 190,
        "model.precision": "fp8",
        "dataset.upscale": False,
        "dataset.alignment": 32,
        "dataset.resolutions": (1024,),
    },
    "kohya/03-folders.toml": {
        "learning_rate": 2e-4,
        "objective.flow_shift": "dynamic",
        "objective.prior_weight": 0.8,
        "dataset.repeat_folders": True,
        "dataset.caption_extension": ".caption",
        "dataset.resolutions": (768,),
    },
    # 8 double blocks, in which the image stream's attention and MLP are trained, and all single blocks.
    "kohya/04-layers.toml": {"layers": 8 * 6 + 190, "lora.rank_pattern.transformer_blocks.0.ff.net.2": 8},
    "kohya/05-regex.toml": {
        "hold_out": 0.0,
        "objective.draw": "logit_normal",
        "objective.flow_shift": "none",
        "lr_power": 2.0,
        "layers": 418,
        "lora.rank_pattern.single_transformer_blocks.10.proj_out": 4,
        "dataset.masks": "files",
    },
    "kohya/06-lycoris.toml": {
        "lora.kind": "lokr",
        "lora.rank": 1024,
        "lora.lokr_factor": 16,
        "layers": 266,
        "optimizer": "came",
        "dataset.caption_lines": "each",
        "objective.scale": 1.2,
    },
    # Nothing stated: even draws, shift 3, guidance 3.5.
    "kohya/07-defaults.toml": {
        "steps": 1600,
        "learning_rate": 2e-6,
        "lora.rank": 4,
        "lora.alpha": 1.0,
        "objective.draw": "uniform",
        "objective.flow_shift": 3,
        "objective.guidance": "constant",
        "objective.guidance_range": (3.5, 3.5),
        "dataset.caption_extension": ".caption",
        "dataset.caption_lines": "first",
        "dataset.upscale": True,
    },
    "kohya/09-validation.toml": {"hold_out": 0.1, "validate_every": 100},
}
"""What some of them come to, read from the files by hand; `layers`: how many of Chroma's layers are trained."""


@pytest.mark.parametrize("name", SAID)
def test_what_they_come_to(name, real, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = import_config(FOLDER / name).config
    for path, expected in SAID[name].items():
        if path == "layers":
            found = len(target_modules(real, config.lora.target))
        elif path.startswith("lora.rank_pattern."):
            found = config.lora.rank_of(path.removeprefix("lora.rank_pattern."))
        elif path == "previews.prompts.1":
            found = config.previews.prompts[1].model_dump(exclude_none=True)  # type: ignore[union-attr]
        else:
            found = config
            for part in path.split("."):
                found = getattr(found, part)
        assert found == expected, path


def test_the_tables_do_not_share_a_name_by_mistake():
    for tables in (ONETRAINER, KOHYA, SIMPLETUNER):
        assert all(rule.reason or rule.to for rule in tables.sections[""].values())
