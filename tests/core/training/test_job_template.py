"""The commented job file: what it says is what is true when nothing is said."""

import re

import tomlkit

from chroma_core.cli.main import main
from chroma_core.options import options_of
from chroma_core.training.config import TrainingConfig
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
