"""The command line: train a job file, sample pictures, look into a LoRA file, plan memory. No host needed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ..errors import ChromaKitError
from .export import add_export_command
from .imports import add_import_command
from .lora import add_lora_commands
from .models import add_model_commands
from .options import Command
from .parity import add_parity_command
from .plan import add_plan_command
from .requests import add_request_commands
from .sample import add_sample_command
from .train import add_train_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 a ChromaKitError (printed as one paragraph), 2 bad usage."""
    try:
        options = command_line().parse_args(arguments)
        return options.run(options) or 0
    except ChromaKitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def command_line() -> argparse.ArgumentParser:
    """The parser of all commands; a command that imports much for its options adds them when it is asked for."""
    parser = argparse.ArgumentParser(prog="python -m chroma_core", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Command)
    add_train_command(commands)
    add_sample_command(commands)
    add_model_commands(commands)
    add_import_command(commands)
    add_parity_command(commands)
    add_request_commands(commands)
    add_export_command(commands)
    add_lora_commands(commands)
    add_plan_command(commands)
    return parser
