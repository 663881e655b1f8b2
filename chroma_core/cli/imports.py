"""The commands that make a job file: from another trainer's configuration, or a template of all options."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add_import_command(commands) -> None:
    """The sub-commands import-config and job-template."""
    command = commands.add_parser(
        "import-config", help="turn a SimpleTuner config.json or an ai-toolkit YAML for Chroma into a job.toml"
    )
    command.add_argument("file", type=Path, help="config.json of SimpleTuner, or YAML of ai-toolkit")
    command.add_argument("--dataloader", type=Path, default=None, metavar="FILE", help="SimpleTuner's data set file")
    command.add_argument(
        "--output", type=Path, default=Path("job.toml"), help="the job file to write (default: job.toml)"
    )
    command.add_argument("--json", action="store_true", help="print the report as JSON")
    command.set_defaults(run=_import)

    template = commands.add_parser(
        "job-template", help="print a job.toml with every option, its default and its meaning"
    )
    template.add_argument("--output", type=Path, default=None, metavar="FILE", help="write it there instead")
    template.set_defaults(run=_template)


def _import(options: argparse.Namespace) -> None:
    from ..import_config import as_json, as_text, import_config, write_job

    imported = import_config(options.file, options.dataloader)
    path = write_job(imported, options.output)
    print(json.dumps(as_json(imported, path), ensure_ascii=False) if options.json else as_text(imported, path))


def _template(options: argparse.Namespace) -> None:
    from ..errors import ConfigError
    from ..training.config.template import job_template

    if options.output is None:
        print(job_template(), end="")
        return
    try:
        with options.output.open("x", encoding="utf-8") as file:
            file.write(job_template())
    except FileExistsError:
        raise ConfigError(f"'{options.output}' exists already. Choose another name, or remove it first.") from None
    except OSError as error:
        raise ConfigError(f"'{options.output}' cannot be written: {error.strerror or error}.") from error
