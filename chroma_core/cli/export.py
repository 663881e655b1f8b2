"""The command line's part that exports workflows of the host's own nodes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

TEXTS = ("prompt", "negative", "trigger")
NUMBERS = {"width": int, "height": int, "steps": int, "guidance": float, "seed": int, "strength": float}


def add_export_command(commands) -> None:
    """The sub-command export-workflow."""
    command = commands.add_parser(
        "export-workflow", help="write a ComfyUI workflow of host nodes only that repeats a LoRA's preview"
    )
    command.add_argument("lora", type=Path, help="a LoRA file; its header says what to repeat")
    command.add_argument("--output", type=Path, default=None, help="the workflow to write (default: NAME_stock.json)")
    for part, folder in (("transformer", "diffusion_models"), ("text_encoder", "text_encoders"), ("vae", "vae")):
        option = f"--{part.replace('_', '-')}"
        command.add_argument(option, default=None, metavar="NAME", help=f"file in the host's models/{folder}")
    command.add_argument("--lora-name", default=None, metavar="NAME", help="the LoRA's name in the host's models/loras")
    for name in TEXTS:
        command.add_argument(f"--{name}", default=None, help="instead of the preview's")
    for name, kind in NUMBERS.items():
        command.add_argument(f"--{name}", type=kind, default=None, help="instead of the preview's")
    command.add_argument("--json", action="store_true", help="print what was written as JSON")
    command.set_defaults(run=_export)


def _export(options: argparse.Namespace) -> None:
    from ..comfy.stock import export_workflow

    window, api, preview = export_workflow(
        options.lora,
        options.output,
        {name: getattr(options, name) for name in (*TEXTS, *NUMBERS)},
        lora=options.lora_name,
        transformer=options.transformer,
        text_encoder=options.text_encoder,
        vae=options.vae,
    )
    if options.json:
        print(json.dumps({"workflow": str(window), "api": str(api), "remarks": list(preview.warnings)}))
        return
    print(window, api, *(f"note: {warning}" for warning in preview.warnings), sep="\n")
