"""The command line: train a job file, sample images, look into a LoRA file, plan memory. No host needed."""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import ChromaKitError, did_you_mean
from .completion import SHELLS, completion_script
from .jobs import jobs_options
from .lora import convert_options, export_options, inspect_lora_options
from .lora_tools import extract_options, merge_options, resize_options
from .models import fetch_options, inspect_model_options, plan_options, quantise_options
from .parity import parity_options
from .sample import request_options, sample_options
from .train import import_options, init_options, resume_options, template_options, train_options


def completion_options(command: argparse.ArgumentParser) -> None:
    """What completion is asked."""
    command.add_argument("shell", choices=list(SHELLS), help="the shell that reads it")
    command.set_defaults(run=lambda options: print(completion_script(command_line(), options.shell), end=""))


COMMANDS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], str]] = {
    "init": (init_options, "write a commented job.toml for a folder of images"),
    "train": (train_options, "train a LoRA or the model's blocks from a job.toml; resumes what exists"),
    "resume": (resume_options, "go on with a training job, by its id"),
    "jobs": (jobs_options, "what training jobs say of themselves; use the LoRA of one of their steps; resume one"),
    "sample": (sample_options, "make images"),
    "fetch": (fetch_options, "download a flavour from the Hub, or what is missing of it"),
    "quantise": (quantise_options, "write a quantised model file, which loads faster"),
    "inspect-model": (inspect_model_options, "what a model file is, and whether ChromaKit reads it"),
    "import-config": (
        import_options,
        "turn a SimpleTuner config.json or an ai-toolkit YAML for Chroma into a job.toml",
    ),
    "job-template": (template_options, "print a job.toml with every option, its default and its meaning"),
    "parity": (
        parity_options,
        "do the training preview, the command line, the nodes and diffusers give the same image?",
    ),
    "request": (
        request_options,
        "carry out inference requests: model, prompts[], loras[] as JSON (see docs/requests.md)",
    ),
    "export-workflow": (export_options, "write a ComfyUI workflow of host nodes only that repeats a LoRA's preview"),
    "inspect-lora": (inspect_lora_options, "what a LoRA file holds, and whether it suits a base"),
    "convert-lora": (convert_options, "write a LoRA in the names of another program"),
    "resize-lora": (resize_options, "write a LoRA at a smaller rank, as near to it as that rank allows"),
    "merge-lora": (merge_options, "write a model with LoRAs merged into it"),
    "extract-lora": (extract_options, "write the difference of two models as a LoRA"),
    "plan": (plan_options, "how much memory a flavour needs, and what to choose on this machine"),
    "completion": (completion_options, "print what makes a shell complete these commands"),
}
"""Every command: what adds its options, and what it does in a line."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 a ChromaKitError (printed as one paragraph), 2 bad usage."""
    _hush()
    try:
        options = command_line().parse_args(arguments)
        return options.run(options) or 0
    except ChromaKitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _hush() -> None:
    """Libraries say of one another what they lack as soon as they are imported; what they cannot do is still raised."""
    for library in ("bitsandbytes", "torchao"):
        logging.getLogger(library).setLevel(logging.ERROR)
    for library in ("DIFFUSERS", "TRANSFORMERS"):  # which set their own level later
        os.environ.setdefault(f"{library}_VERBOSITY", "error")


def command_line() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = Command(prog="python -m chroma_core", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (options, line) in COMMANDS.items():
        commands.add_parser(name, help=line, options=options)
    return parser


class Command(argparse.ArgumentParser):
    """One command. `options` adds its options when it is first asked for, so that naming it imports nothing heavy.

    What is misspelt is named first, with what it may be meant for.
    """

    def __init__(self, *args: Any, options: Callable[[argparse.ArgumentParser], None] | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._options = options

    def complete(self) -> Command:
        """The parser with its options."""
        if (add := self._options) is not None:
            self._options = None
            add(self)
        return self

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As the base has it, with the options."""
        self.complete()
        if args and not any(isinstance(action, argparse._SubParsersAction) for action in self._actions):
            self._check_flags(args)
        return super().parse_known_args(args, namespace)

    def _check_flags(self, arguments: Sequence[str]) -> None:
        """End with bad usage for a flag that is the beginning of none; else a missing argument would be named first."""
        known = self._option_string_actions
        for argument in itertools.takewhile(lambda each: each != "--", arguments):
            flag = argument.partition("=")[0]
            if flag.startswith("--") and " " not in flag and not any(each.startswith(flag) for each in known):
                self.error(f"there is no option {flag}.{did_you_mean(flag, known)}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += f".{did_you_mean(value, action.choices or ())}"
            raise
