"""The command line's part that carries out inference requests."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tqdm import tqdm

from ..errors import ConfigError


def add_request_commands(commands) -> None:
    """The sub-command request."""
    command = commands.add_parser(
        "request", help="carry out inference requests: model, prompts[], loras[] as JSON (see docs/requests.md)"
    )
    command.add_argument("file", type=Path, nargs="+", help="a request; several keep the model loaded between them")
    command.add_argument("--output", type=Path, default=Path("output"), help="folder for the PNG files")
    command.add_argument("--device", default=None, help="cuda, mps or cpu (default: the best there is)")
    command.add_argument("--json", action="store_true", help="print what was made as JSON, one line a request")
    command.add_argument(
        "--api-prompt", action="store_true", help="paint nothing: print the request as a ComfyUI prompt in API format"
    )
    command.set_defaults(run=_request)


def _request(options: argparse.Namespace) -> None:
    from ..comfy.graph import to_prompt
    from ..loading.component_cache import ComponentCache
    from ..model.device import best_device
    from ..requests.request import InferenceRequest
    from ..requests.run import check_loras, lora_file, lora_uses, model_spec, part_file, run_request

    requests = []
    for file in options.file:
        try:
            requests.append((file, InferenceRequest.read(file.read_bytes())))
        except OSError as error:
            raise ConfigError(f"The request '{file}' cannot be read: {error.strerror or error}.") from error
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from error
    if options.api_prompt:
        for _, request in requests:
            print(json.dumps(to_prompt(request, request.pictures(), [lora.path for lora in request.loras])))
        return
    device = best_device(options.device)
    planned = []
    for file, request in requests:  # all of them before the first is painted
        folder = file.resolve().parent
        spec = model_spec(request, lambda field, name, folder=folder: part_file(folder, field, name))
        loras = lora_uses(request, lambda name, folder=folder: lora_file(folder, name))
        check_loras(spec, loras)
        planned.append((request, spec, loras))
    cache = ComponentCache()
    for request, spec, loras in planned:
        total = sum(picture.sample_steps for picture in request.pictures())
        with tqdm(total=total, unit="step", desc="painting") as bar:

            def show(picture: int, done: int, steps: int, bar=bar, of=request) -> None:
                bar.set_postfix_str(f"picture {picture + 1} of {len(of.prompts)}")
                bar.update()

            result = run_request(request, spec, loras, cache, device, options.output, show)
        if options.json:
            print(json.dumps(result, ensure_ascii=False))
            continue
        for made in result["prompts"]:
            cut = f", the last {made['truncated_tokens']} tokens cut off" if made["truncated_tokens"] else ""
            print(
                f"{made['file']}: {made['width']}×{made['height']}, seed {made['seed']}, {made['sample_steps']} steps, "
                f"guidance {made['guidance_scale']:g}{cut}"
            )
