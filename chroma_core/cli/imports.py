"""The command line's part that imports other trainers' configurations."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add_import_command(commands) -> None:
    """The sub-command import-config."""
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


def _import(options: argparse.Namespace) -> None:
    from ..import_config import as_json, as_text, import_config, write_job

    imported = import_config(options.file, options.dataloader)
    path = write_job(imported, options.output)
    print(json.dumps(as_json(imported, path), ensure_ascii=False) if options.json else as_text(imported, path))
