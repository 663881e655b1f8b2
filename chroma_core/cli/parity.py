"""The command line's `parity`: one image through every runtime that is here, and the numbers that move it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

from ..errors import ChromaKitError, check_choice
from .options import add_device, add_flag, add_json, add_lora_flags, add_model_options, add_size, spec_from


def parity_options(parity: argparse.ArgumentParser) -> None:
    """What parity is asked."""
    from ..sampling.sampler import SamplingSettings
    from ..training.config import TrainingConfig

    parity.description = (
        "Samples one image in every runtime and says how far the results are apart. With the flavour tiny a LoRA is "
        "trained for a moment first; with another one, name a job or a preview to compare with."
    )
    add_model_options(parity, offload="none")
    parity.add_argument("--job", type=Path, help="a job's folder: replay its last preview")
    parity.add_argument("--preview", type=Path, metavar="PNG", help="replay this preview of a training job")
    parity.add_argument("--prompt", default="a photo of a sks emblem", help="of the image (default: one of tiny's)")
    parity.add_argument("--negative", default="", help="what to steer away from (default: the empty prompt)")
    add_size(parity)
    add_flag(parity, SamplingSettings, "steps", default=None)
    add_flag(parity, SamplingSettings, "guidance", default=None)
    add_flag(parity, SamplingSettings, "seed", help="The noise to start from.")
    add_flag(parity, TrainingConfig, "recipe", help="How texts are encoded and numbers rounded.")
    add_lora_flags(parity)
    parity.add_argument(
        "--factors",
        nargs="*",
        metavar="KIND",
        help="also change one number at a time: recipe schedule guidance lora precision size seed (none named: all)",
    )
    parity.add_argument("--no-comfyui", action="store_true", help="do not start a ComfyUI for the image of the nodes")
    add_device(parity)
    parity.add_argument("--output", type=Path, default=None, help="write parity.png and parity.json to this folder")
    add_json(parity)
    parity.set_defaults(run=_parity)


def _parity(options: argparse.Namespace) -> int:
    with TemporaryDirectory(prefix="chromakit-parity-") as temporary:
        report = _compare(options, Path(temporary))
    if options.output is not None:
        _write(report, options.output)
    print(json.dumps(report.to_dict()) if options.json else report.table())
    return exit_status(report)


def exit_status(report: Any) -> int:
    """0 when preview, command line and nodes agree, else 1; says which on the error output."""
    print(report.verdict() if report.same_image else f"error: {report.verdict()}", file=sys.stderr)
    return 0 if report.same_image else 1


def _compare(options: argparse.Namespace, folder: Path) -> Any:
    from ..loading.component_cache import ComponentCache
    from ..model.device import best_device
    from ..parity import NotRun, Report, in_process, through_command_line, vary

    device = best_device(options.device)
    kinds = _kinds(options.factors)
    case, preview = _case(options, folder, device)
    # After whatever can be wrong with the options: it imports diffusers, which takes long and has much to say.
    from ..parity.with_diffusers import through_diffusers

    images: dict[str, Any] = {} if preview is None else {"preview": preview}
    components = ComponentCache()

    def generate(name: str, how: Callable[[], Any]) -> Any:
        print(f"sampling: {name}", file=sys.stderr, flush=True)
        try:
            return how()
        except NotRun as reason:
            return reason

    images["core"] = generate("core", lambda: in_process(case, components, device))
    images["cli"] = generate("command line", lambda: through_command_line(case, folder / "cli", device))
    images["node"] = generate("nodes", lambda: _through_nodes(case, folder / "host", device, options.no_comfyui))
    images["diffusers"] = generate("diffusers", lambda: through_diffusers(case, device))
    as_it_ships = "diffusers_float_mask"
    images[as_it_ships] = generate(as_it_ships, lambda: through_diffusers(case, device, "float"))
    for mode in case.lora_modes if case.loras else ():
        images[mode] = generate(mode, lambda mode=mode: in_process(case.with_loras(mode=mode), components, device))
    report = Report(case)
    report.add_pairs(images)
    for factor in vary(case, kinds) if kinds else ():
        changed = generate(factor.name, lambda factor=factor: in_process(factor.case, components, device))
        report.add_factor(factor, images["core"], changed)
    return report


def _kinds(named: list[str] | None) -> tuple[Any, ...]:
    from ..parity import FactorKind

    known = get_args(FactorKind)
    if named is None:
        return ()
    for name in named:
        check_choice("A factor", name, known)
    return tuple(named) or known


def _case(options: argparse.Namespace, folder: Path, device: Any) -> tuple[Any, Any]:
    """What to generate, and the preview to compare with if there is one."""
    from ..model.flavours import flavour
    from ..parity import Case, read_preview, train_briefly
    from ..parity.preview import last_preview
    from ..sampling.recipe import recipe
    from ..sampling.sampler import SamplingSettings

    if options.preview or options.job:
        return read_preview(options.preview or last_preview(options.job))
    chosen, spec = flavour(options.flavour), spec_from(options)
    size = options.width or chosen.size, options.height or chosen.size
    settings = SamplingSettings(
        chosen.steps if options.steps is None else options.steps,
        chosen.guidance if options.guidance is None else options.guidance,
        options.seed,
    )
    rules, loras = recipe(options.recipe), tuple(options.lora)
    if options.flavour != "tiny" or loras:
        return Case(spec, options.prompt, *size, options.negative, settings, rules, loras), None
    print("training a LoRA for a moment", file=sys.stderr, flush=True)
    preview = train_briefly(spec, options.prompt, options.negative, size, settings, rules, folder, device)
    return read_preview(preview)


def _through_nodes(case: Any, base: Path, device: Any, unwanted: bool) -> Any:
    from ..comfy.server import HostError, find_comfyui, start_comfyui
    from ..parity import NotRun, through_comfyui

    if unwanted:
        raise NotRun("It was not wanted (--no-comfyui).")
    folder = find_comfyui()
    if folder is None:
        raise NotRun(
            "There is no ComfyUI here: name one in COMFYUI_PATH, or run this from a pack that is installed in one."
        )
    try:
        host = start_comfyui(folder, base, cpu=device.type == "cpu")
    except (HostError, OSError) as error:  # OSError: COMFYUI_PATH is no folder
        raise NotRun(f"ComfyUI did not start: {str(error).splitlines()[0]}") from error
    with host:
        return through_comfyui(case, host)


def _write(report: Any, folder: Path) -> None:
    from ..files import write_atomic
    from ..model.drawing import side_by_side
    from ..model.images import png_bytes

    values = report.to_dict()
    try:
        write_atomic(folder / "parity.json", json.dumps(values, indent=1))
        write_atomic(folder / "parity.png", png_bytes(side_by_side(report.images), values))
    except OSError as error:
        raise ChromaKitError(f"The report cannot be written to '{folder}': {error.strerror or error}.") from error
