"""One definition of every option: what is read from a field, and what is made of it; the commented job
file says what is true when nothing is said; recipes are jobs that say why."""

import re
from typing import Annotated, get_args

import pytest
import tomlkit
from pydantic import Field

from chroma_core.cli.main import main
from chroma_core.data.dataset import DatasetConfig
from chroma_core.errors import ConfigError
from chroma_core.loading.spec import ModelSpec, Offload
from chroma_core.options import Option, option_of, options_of
from chroma_core.sampling.sampler import SamplingSettings
from chroma_core.training.config import TrainingConfig
from chroma_core.training.config.job import LoraConfig, ObjectiveConfig, PreviewConfig
from chroma_core.training.config.preserve import PreserveConfig
from chroma_core.training.config.recipes import RECIPE_TABLE, SOURCES, recipe, recipes_as_json
from chroma_core.training.config.template import SECTIONS, job_template

JOB = {"name": "A Job", "dataset": {"folder": "/data/set"}}
COMMENTED = re.compile(r"# (\w+ = (?!….*).*)$")


def test_an_option_knows_its_type_range_and_default():
    rank = option_of(LoraConfig, "rank")
    assert (rank.kind, rank.default, rank.required, rank.range) == (int, 16, False, "1 to 1024")
    alpha = option_of(LoraConfig, "alpha")
    assert (alpha.kind, alpha.default, alpha.range) == (float, None, "above 0")
    assert option_of(ModelSpec, "offload").choices == get_args(Offload)
    assert option_of(TrainingConfig, "name").required
    assert option_of(TrainingConfig, "betas").kind is object


@pytest.mark.parametrize(
    "owner",
    [
        TrainingConfig,
        LoraConfig,
        ObjectiveConfig,
        PreserveConfig,
        PreviewConfig,
        DatasetConfig,
        ModelSpec,
        SamplingSettings,
    ],
)
def test_every_option_says_what_it_is_in_a_sentence(owner: type):
    sections = {"model", "dataset", "more_datasets", "validation_dataset", "lora", "objective", "previews"}
    fields = set(getattr(owner, "model_fields", None) or owner.__dataclass_fields__)
    assert fields - set(options_of(owner)) <= sections
    for name, each in options_of(owner).items():
        assert each.sentence.endswith("."), name


def test_an_option_added_later_leaves_the_id_of_a_job_that_does_not_use_it():
    class Lora(LoraConfig):
        brand_new: Annotated[int, Field(ge=0), Option("Does something.", since="0.2")] = 3

    class Dataset(DatasetConfig):
        brand_new: Annotated[str, Option("Does something.", since="0.2")] = "no"

    class Job(TrainingConfig):
        lora: Lora = Lora()
        more_datasets: tuple[Dataset, ...] = ()

    before = TrainingConfig.parse({**JOB, "more_datasets": [{"folder": "/other"}]})
    after = Job.parse({**JOB, "more_datasets": [{"folder": "/other"}]})
    dumped = after.model_dump(mode="json")
    assert dumped["lora"]["brand_new"] == 3 and dumped["more_datasets"][0]["brand_new"] == "no"
    assert after.job_id() == before.job_id()
    used = Job.parse({**JOB, "more_datasets": [{"folder": "/other", "brand_new": "yes"}]})
    assert used.job_id() != before.job_id()
    assert Job.parse({**JOB, "lora": {"brand_new": 4}}).job_id() != Job.parse(JOB).job_id()


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
