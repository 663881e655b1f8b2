"""The commented job file: what it says is what is true when nothing is said. Recipes: they are jobs, and say why."""

import re

import pytest
import tomlkit

from chroma_core.cli.main import main
from chroma_core.errors import ConfigError
from chroma_core.options import options_of
from chroma_core.training.config import TrainingConfig
from chroma_core.training.config.recipes import RECIPE_TABLE, SOURCES, recipe, recipes_as_json
from chroma_core.training.config.template import SECTIONS, job_template

COMMENTED = re.compile(r"# (\w+ = (?!….*).*)$")


def parsed(text: str) -> TrainingConfig:
    return TrainingConfig.parse(tomlkit.parse(text).unwrap())


def test_every_option_stands_there_with_its_default():
    text = job_template()
    before, _, full = text.partition("# [full]")
    uncommented = "\n".join(COMMENTED.sub(r"\1", line) for line in before.splitlines())
    assert parsed(text) == parsed(uncommented) and parsed(text).full is None
    in_full = "\n".join(COMMENTED.sub(r"\1", line) for line in full.splitlines())
    assert parsed(f"{before}[full]{in_full}").full is not None
    missing = [
        f"{section}.{name}"
        for section, owner in SECTIONS.items()
        for name in options_of(owner)
        if (section or name not in SECTIONS) and not re.search(rf"^(# )?{name} = ", text, re.MULTILINE)
    ]
    assert missing == []


def test_the_command_prints_or_writes_it(tmp_path, capsys):
    assert main(["job-template"]) == 0
    assert capsys.readouterr().out == job_template()
    path = tmp_path / "job.toml"
    assert main(["job-template", "--output", str(path)]) == 0
    assert path.read_text(encoding="utf-8") == job_template()
    assert main(["job-template", "--output", str(path)]) == 1
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize("name", RECIPE_TABLE)
def test_a_recipe_is_a_job_whose_numbers_all_say_where_they_come_from(name: str):
    own = recipe(name)
    job = TrainingConfig.parse(
        {"name": name, **own, "dataset": {**own["dataset"], "folder": "pictures", "trigger": "sks"}}
    )
    assert job.model.flavour == "hd" and job.preserve.weights and job.hold_out == 0.1
    assert job.steps // job.validate_every >= 10, "fewer validations than a verdict needs"
    *concept, ordinary = (preview.prompt for preview in job.preview_list())
    assert all("sks" in prompt for prompt in concept) and "sks" not in ordinary
    [told] = [each for each in recipes_as_json()["recipes"] if each["name"] == name]
    assert told["options"] == own
    named = [*told["options_from"].values(), told["images_from"], told["captions_from"]]
    assert all(names and set(names) <= SOURCES.keys() for names in named)


def test_a_recipe_that_there_is_not_lists_those_that_there_are():
    with pytest.raises(ConfigError, match=r"'portrait'. Choose one of: person, style, object, pose"):
        recipe("portrait")
