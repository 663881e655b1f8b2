"""What is read and refused, and what is written: the job file, the report, the documentation, the command line."""

import json
import re
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

import chroma_core.import_config as import_config_room
from chroma_core.cli.main import main
from chroma_core.data.dataset import DatasetConfig
from chroma_core.errors import ConfigError
from chroma_core.import_config import as_json, as_text, import_config, job_toml, write_job
from chroma_core.import_config.answers import FUNCTIONS
from chroma_core.import_config.job import toml
from chroma_core.import_config.read import read_config
from chroma_core.import_config.trainers import AI_TOOLKIT, KOHYA, ONETRAINER, SIMPLETUNER
from chroma_core.options import Described, option_of
from chroma_core.training.config import TrainingConfig
from import_cases import SECOND, SEED_SNIPPET, SMALL, YAML
from tools.docs.import_tables import page

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

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
    ("config.json", {"foo": 1, "bar": 2}, ["none of its options is known", "foo, bar", "OneTrainer"]),
    ("config.json", {"LoRA_type": "Flux1", "learning_rate": 1}, ["kohya_ss", "TOML"]),
    ("config.json", {"training_method": "LORA", "model_type": "FLUX_DEV_1"}, ["'FLUX_DEV_1'", "CHROMA_1"]),
    ("config.json", {"training_method": "FINE_TUNE", "model_type": "CHROMA_1"}, ["FINE_TUNE", "LORA"]),
    ("config.json", {"base_model_name": "x", "model_type": "CHROMA_1"}, ["FINE_TUNE (not stated)"]),
    ("config.json", {"training_method": "LORA", "model_type": "CHROMA_1", "resolution": "wide"}, ["resolution"]),
    ("config.json", {"training_method": "LORA", "model_type": "CHROMA_1", "optimizer": [1]}, ["optimizer is [1]"]),
    ("config.json", {"training_method": "LORA", "model_type": "CHROMA_1", "concepts": {"a": 1}}, ["concepts", "list"]),
    ("k.toml", 'network_module = "networks.lora_flux"\noutput_name = "x"', ["'flux'", "sd-scripts", "chroma"]),
    ("k.toml", 'model_type = "chroma"\noutput_name = "x"', ["no network_module"]),
    ("k.toml", 'model_type = "chroma"\nnetwork_dim = 4\nnetwork_args = ["x"]', ["network_args", "weight_decay=0.1"]),
    ("k.toml", 'model_type = "chroma"\nnetwork_dim = 4\nnetwork_args = ["single_dim=0", "train_blocks=single"]',
     ["network_args", "layers to train"]),
    ("k.toml", 'model_type = "chroma"\nnetwork_dim = 4\nnetwork_args = ["network_reg_dims=(=4"]', ["regular expr"]),
    ("k.toml", "[[datasets]]\nresolution = 512", ["dataset file of sd-scripts", "--dataloader"]),
    ("k.toml", "a = 1\na = 2", ["not valid TOML"]),
    ("job.toml", 'name = "x"\nsteps = 3\n[dataset]\nfolder = "a"', ["job of ChromaKit", "no import"]),
    ("config.json", SMALL | {"lora_rank": "many"}, ["lora_rank", "'many'", "a number"]),
    ("config.json", SMALL | {"lora_rank": 16.5}, ["lora_rank", "a whole number"]),
    ("config.json", SMALL | {"lora_rank": 0}, ["lora_rank (our lora.rank) is 0", "greater than or equal to 1"]),
    ("config.json", SMALL | {"learning_rate": -1}, ["learning_rate", "greater than 0"]),
    ("config.json", SMALL | {"gradient_checkpointing": "sometimes"}, ["gradient_checkpointing", "true or false"]),
    ("config.json", SMALL | {"network_rank": 8, "lora_rank": 16}, ["network_rank and lora_rank", "8 and 16"]),
    ("config.json", SMALL | {"model_flavour": "hd", "pretrained_model_name_or_path": "lodestones/Chroma1-Base"},
     ["model.flavour", "model_flavour", "pretrained_model_name_or_path"]),
    ("config.json", SMALL | {"validation_resolution": "wide"}, ["validation_resolution", "'wide'"]),
    ("config.json", SMALL | {"validation_resolution": -1}, ["validation_resolution", "above 0"]),
    ("config.json", SMALL | {"resolution": -1}, ["resolution", "above 0"]),
    ("config.json", SMALL | {"flow_use_beta_schedule": "x"}, ["flow_use_beta_schedule", "true or false"]),
    ("config.json", SMALL | {"flux_fast_schedule": 1}, ["flux_fast_schedule", "true or false"]),
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
    # What another option asks for, what is looked at before, and what would divide by zero.
    ("k.toml", 'model_type = "chroma"\nnetwork_dim = 4\ndiscrete_flow_shift = true', ["discrete_flow_shift is true"]),
    ("t.yaml", YAML % "chroma" + "      datasets: [{folder_path: a, resolution: wide}]\n", ["a number"]),
    ("config.json", {"training_method": "LORA", "model_type": "CHROMA_1", "gradient_accumulation_steps": 0},
     ["gradient_accumulation_steps", "greater than or equal to 1"]),
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
    with pytest.raises(ConfigError, match="list of datasets"):
        import_config(put("config.json", SMALL), put("sets.json", {"id": "a"}))
    with pytest.raises(ConfigError, match="leave --dataloader out"):
        import_config(put("t.yaml", YAML % "chroma"), put("sets.json", []))
    deep = put("deep.json", "[" * 100_000)
    with pytest.raises(ConfigError, match="deep|JSON"):
        import_config(deep)


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


TRAINERS = {"SimpleTuner": SIMPLETUNER, "ai-toolkit": AI_TOOLKIT, "OneTrainer": ONETRAINER, "sd-scripts": KOHYA}
TABLES = {
    f"{name} {section}": rules
    for name, tables in TRAINERS.items()
    for section, rules in (*tables.sections.items(), ("datasets", tables.sets))
}


@pytest.mark.parametrize("name", TABLES)
def test_every_line_of_the_tables_says_what_or_why(name):
    for option, rule in TABLES[name].items():
        assert rule.to or rule.reason, option
        assert rule.kind in ("maps", "differs") or rule.reason, option
        assert re.fullmatch(r"[A-Za-z0-9_.]+", option), option
        named = {case.get("by") for case in rule.cases} | {rule.read}
        assert named - {None, ""} <= set(FUNCTIONS), option


def ours(path: str, owner: type) -> Described:
    *sections, name = path.split(".")
    for section in sections:
        owner = get_type_hints(owner)[section]
    return option_of(owner, name)


@pytest.mark.parametrize("tool", ["simpletuner", "ai_toolkit", "onetrainer", "kohya"])
def test_what_the_tables_write_is_an_option_with_this_choice(tool):
    data = read_config(Path(import_config_room.__file__).with_name(f"{tool}.yaml"))
    checked = 0
    for name, section in data.items():
        for option, entry in (section.get("options", {}) if isinstance(section, dict) else {}).items():
            entry = {"to": entry} if isinstance(entry, str) else entry
            paths = [path for path in re.split(", | or ", entry.get("to", "")) if path]
            found = [ours(path, DatasetConfig if name == "datasets" else TrainingConfig) for path in paths]
            answers = [*entry.get("alike", "").split(), *entry.get("words", {}).values()]
            for answer in answers:
                value = answer[0] if isinstance(answer, list) else answer
                if found and found[0].choices and not isinstance(value, dict):
                    assert value in found[0].choices, (option, value)
                    checked += 1
    assert checked > 10


def test_the_documentation_is_current():
    path = Path(__file__).parents[3] / "docs" / "import.md"
    assert path.read_text(encoding="utf-8") == page(), "run: python tools/docs/import_tables.py"


def test_the_command_line(put, tmp_path, capsys):
    put("config.json", SEED_SNIPPET)

    def run(*arguments: str) -> tuple[int, str, str]:
        status = main(["import-config", "config.json", *arguments])
        return status, *capsys.readouterr()

    report = json.loads(run("--json", "--output", "a.toml")[1])
    assert (report["tool"], report["unknown"]) == ("SimpleTuner", [])
    remarks = [line["option"] for line in (*report["differs"], *report["no_counterpart"])]
    assert remarks == ["optimizer", "num_train_epochs", "grad_clip_method"]
    assert {"option": "network_rank", "value": "16", "written": {"lora.rank": 16}, "reason": ""} in report["mapped"]
    status, text, _ = run()
    assert status == 0 and "network_rank = 16 → lora.rank = 16" in text and "3 warnings" in text
    assert (tmp_path / "job.toml").read_text() == (tmp_path / "a.toml").read_text()
    status, _, error = run()
    assert status == 1 and "exists already" in error
