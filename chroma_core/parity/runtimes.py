"""Our own ways to sample a case: in this process, by the command line, by the nodes in ComfyUI."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from ..comfy.graph import Graph, Prompt
from ..comfy.server import PACK, Host, HostError
from ..loading.component_cache import ComponentCache
from ..loading.load import Device
from ..loading.spec import ModelHandle
from ..model.images import LATENTS_SUFFIX, decode, read_latents
from ..model.latents import LatentFormat
from ..sampling.sampler import OnStep, sample
from .case import Case, NotRun, Sampled


def in_process(case: Case, components: ComponentCache, device: Device, on_step: OnStep | None = None) -> Sampled:
    """Sample with `components`, as the sampler node and the command line do."""
    width, height = case.effective_size
    encoder = components.text_encoder(case.spec, device)
    positive = encoder.encode(case.prompt, case.recipe)
    negative = encoder.encode(case.negative, case.recipe) if case.settings.guidance > 1 else None
    with components.transformer(ModelHandle(case.spec, case.loras), device) as transformer:
        latents = sample(
            transformer,
            [positive],
            negative,
            width=width,
            height=height,
            settings=case.settings,
            recipe=case.recipe,
            on_step=on_step,
        )
    vae = components.vae(case.spec, device)
    return Sampled(LatentFormat.of(vae).to_vae(latents).cpu(), decode(vae, latents)[0])


def through_command_line(case: Case, folder: Path, device: Device) -> Sampled:
    """Sample by `python -m chroma_core sample` in a process of its own; its files go to `folder`.

    Raises NotRun when the command line fails, with its message.
    """
    command = [sys.executable, "-m", "chroma_core", "sample", *_arguments(case), "--save-latents"]
    command += ["--device", str(device), "--output", str(folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PACK), os.environ.get("PYTHONPATH", "")])}
    # The same bits need the same number of threads.
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    done = subprocess.run(command, cwd=PACK, env=environment, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise NotRun(f"The command line failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    image = Path(done.stdout.strip().splitlines()[-1])
    return Sampled.read(image, image.with_suffix(LATENTS_SUFFIX))


def _arguments(case: Case) -> list[str]:
    """The options of `sample` that mean this case."""
    spec, settings = case.spec, case.settings
    case.check_whole()
    name, overrides = case.recipe_words
    local = ("offload_during_startup", "quantised_folder")  # they change how it is loaded, not what it is
    schedule = ("steps", "guidance", "seed", "tail_bias", "flow_shift", "method", "spacing", "first_block_cache")
    options = {
        **{field: value for field, value in asdict(spec).items() if field not in local},
        **{field: getattr(case, field) for field in ("prompt", "negative", "width", "height")},
        **{field: getattr(settings, field) for field in schedule},
        "recipe": name,
    }
    # One word each, so that a prompt may begin with a dash.
    words = [f"--{field.replace('_', '-')}={value}" for field, value in options.items() if value is not None]
    words += [f"--recipe-set={field}={value}" for field, value in overrides.items()]
    for use in case.loras:
        words.append(f"--lora={use.path}@{use.strength!r}")
        words += [f"--lora-{field}={text}" for field in ("blocks", "schedule") if (text := getattr(use, field))]
    modes = {use.mode for use in case.loras}
    if len(modes) > 1:
        raise NotRun("The command line applies all LoRAs in one mode.")
    return words + [f"--lora-mode={mode}" for mode in modes]


def through_comfyui(case: Case, host: Host) -> Sampled:
    """Sample with Chroma Load Model, Text Encode, Apply LoRA and Sampler, and ComfyUI's Save Latent.

    The LoRAs are copied into the server's folder (it is one of our own). Raises NotRun for a case that the nodes cannot
    be given, or that fails there.
    """
    names = []
    for i, use in enumerate(case.loras):
        target = host.base / "models" / "loras" / f"parity-{i}-{Path(use.path).name}"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(use.path, target)
        names.append(target.name)
    try:
        history = host.run(api_prompt(case, names), timeout=24 * 3600)
    except HostError as error:  # refused, failed, or the server went away
        raise NotRun(f"ComfyUI did not sample it: {getattr(error, 'exception_message', '') or error}") from error
    (saved,) = history["outputs"]["latents"]["latents"]
    return Sampled(read_latents(host.view(saved)), host.images(history)[0])


def api_prompt(case: Case, loras: list[str]) -> Prompt:
    """The case as an API-format prompt; `loras` are the names that ComfyUI knows its LoRAs by."""
    spec, settings = case.spec, case.settings
    local = [part for part in (spec.folder, spec.transformer, spec.text_encoder, spec.tokenizer, spec.vae) if part]
    if local:
        raise NotRun(f"The model is '{local[0]}', which lies outside the folders of the ComfyUI that is started here.")
    case.check_whole()
    recipe, overrides = case.recipe_words
    shift = settings.flow_shift
    constant = isinstance(shift, float)
    graph = Graph()
    chosen = ("flavour", "precision", "text_precision", "offload", "resident_blocks", "compute")
    loader = graph.add("load", "ChromaLoadModel", **{field: getattr(spec, field) for field in chosen})
    model = loader[0]
    for i, (use, name) in enumerate(zip(case.loras, loras, strict=True)):
        model = graph.add_lora(i, model, name, use.strength, use.mode, use.allow_partial, use.blocks, use.schedule)
    same = ("seed", "steps", "guidance", "tail_bias", "method", "denoise", "spacing", "first_block_cache")
    widgets = {
        **{field: getattr(settings, field) for field in same},
        "flow_shift": "recipe" if shift is None else "constant" if constant else shift,
        "flow_shift_value": shift if constant else 1.0,
        "recipe": recipe,
        "recipe_overrides": ", ".join(f"{field}={value}" for field, value in overrides.items()),
    }
    sampler = graph.add_image(model, loader, case.prompt, case.negative, case.effective_size, widgets, "parity")
    graph.add("latents", "SaveLatent", samples=sampler[0], filename_prefix="parity")
    return graph.prompt
