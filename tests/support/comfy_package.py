"""Imports the host's `comfy` package into this process, for comparisons with its own Chroma and its own LoRA loader."""

from __future__ import annotations

import sys
from types import ModuleType

from _environment import host_folder


def import_comfy() -> ModuleType:
    """The host's `comfy` package, set up for the CPU; must come before anything else imports `comfy`.

    The host's folder goes first on `sys.path`, because this pack has a `nodes` package too.
    """
    folder = str(host_folder())
    if folder in sys.path:
        sys.path.remove(folder)
    sys.path.insert(0, folder)
    arguments = sys.argv
    sys.argv = [arguments[0], "--cpu"]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.cli_args
        import comfy.model_management
    finally:
        sys.argv = arguments
    return comfy
