"""Which file a MODEL, a CLIP or a VAE was read from.

The graph of the prompt says it without loading anything, as far as the nodes in it are known. Where it does not, the
value itself does: ComfyUI's loaders note on it how it would be read again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import comfy.model_patcher
import comfy.sd
import folder_paths

from ...chroma_core.errors import ConfigError, first_few
from ...chroma_core.weights.identify import Part
from .model_files import CHECKPOINTS, FOLDERS

NAMES: dict[Part, str] = {"transformer": "MODEL", "text_encoder": "CLIP", "vae": "VAE"}
"""ComfyUI's types for the parts of a model."""

LOADERS: dict[Part, dict[str, str]] = {
    "transformer": {"UNETLoader": "unet_name", "UnetLoaderGGUF": "unet_name", "CheckpointLoaderSimple": "ckpt_name"},
    "text_encoder": {"CLIPLoader": "clip_name", "CLIPLoaderGGUF": "clip_name", "CheckpointLoaderSimple": "ckpt_name"},
    "vae": {"VAELoader": "vae_name", "CheckpointLoaderSimple": "ckpt_name"},
}
"""Nodes that read a part from one file, and the widget that names it: ComfyUI's, and those of ComfyUI-GGUF."""

LORA_LOADERS = ("LoraLoaderModelOnly", "LoraLoader")
"""ComfyUI's nodes that put one LoRA, `lora_name` at `strength_model`, on their `model`."""

OWN_SETTING = "manual_cast_dtype"
"""A patch that ComfyUI's own loader of text encoders makes."""


@dataclass(frozen=True)
class LoadedFile:
    """The file of a part, and the LoRAs on it by name and strength, the first one applied first."""

    path: str
    loras: tuple[tuple[str, float], ...] = ()


def is_model(value: Any) -> bool:
    """Whether a value is a MODEL."""
    return isinstance(value, comfy.model_patcher.ModelPatcher)


def is_clip(value: Any) -> bool:
    """Whether a value is a CLIP."""
    return isinstance(value, comfy.sd.CLIP)


def is_vae(value: Any) -> bool:
    """Whether a value is a VAE."""
    return isinstance(value, comfy.sd.VAE)


def file_in_graph(prompt: Any, node_id: str, name: str, part: Part) -> LoadedFile | None:
    """The file behind the input `name` of a node in ComfyUI's `DynamicPrompt`; None where the graph does not tell.

    It does where a loader of `LOADERS` is linked, for a MODEL also behind LoRA loaders, and all of them have their
    values in widgets.
    """
    loras: list[tuple[str, float]] = []
    while True:
        link = prompt.get_node(node_id)["inputs"].get(name)
        if not isinstance(link, list) or not prompt.has_node(link[0]):
            return None
        node_id = link[0]
        source = prompt.get_node(node_id)
        kind, values = source["class_type"], source["inputs"]
        if part == "transformer" and kind in LORA_LOADERS:
            name, lora, strength = "model", values.get("lora_name"), values.get("strength_model")
            if not isinstance(lora, str) or not isinstance(strength, int | float):
                return None
            loras.insert(0, (lora, float(strength)))
            continue
        file = values.get(LOADERS[part].get(kind, ""))
        path = _path(part, file) if isinstance(file, str) else None
        return LoadedFile(path, tuple(each for each in loras if each[1])) if path else None


def _path(part: Part, name: str) -> str | None:
    kinds = [kind for kind in (*FOLDERS[part], CHECKPOINTS) if kind in folder_paths.folder_names_and_paths]
    return next((path for kind in kinds if (path := folder_paths.get_full_path(kind, name))), None)


def file_of(value: Any, part: Part) -> LoadedFile:
    """The file that a loaded MODEL, CLIP or VAE was read from.

    Raises ConfigError where that is not known, is more than one file, or where the value was changed since.
    """
    patcher, name = getattr(value, "patcher", value), NAMES[part]
    made = getattr(patcher, "cached_patcher_init", None)
    files = made[1][0] if made else ()
    files = [files] if isinstance(files, str) else list(files)
    if len(files) != 1:
        found = f"was read from {len(files)} files" if files else "does not say which file it was read from"
        raise ConfigError(
            f"The {name} {found}. Link ComfyUI's {_LOADER[part]}, or choose the file in Chroma Load Model."
        )
    if changes := _changes(value, patcher):
        raise ConfigError(
            f"The {name} was changed after it was loaded ({first_few(changes)}), which a Chroma model does not take "
            "over. Link the loader itself; LoRAs go on with Chroma Apply LoRA, the flow shift is set in Chroma Sampler."
        )
    return LoadedFile(files[0])


_LOADER: dict[Part, str] = {
    "transformer": "Load Diffusion Model",
    "text_encoder": "Load CLIP",
    "vae": "Load VAE",
}


def _changes(value: Any, patcher: Any) -> list[str]:
    """What was put on a loaded model, in words; ComfyUI would apply it, and we could not."""
    options = {**patcher.model_options, **patcher.model_options.get("transformer_options", {})}
    options.pop("transformer_options", None)
    found = [f"patches on {len(patcher.patches)} weights"] if patcher.patches else []
    found += [key for key in patcher.object_patches if key != OWN_SETTING]
    found += [key for key, set_ in options.items() if set_]
    for kind in ("wrappers", "callbacks"):
        found += [kind] if any(any(each.values()) for each in getattr(patcher, kind, {}).values()) else []
    for kind in ("weight_wrapper_patches", "hook_patches", "injections", "additional_models"):
        found += [kind.replace("_", " ")] if getattr(patcher, kind, None) else []
    return found + (["the layer that it stops at"] if getattr(value, "layer_idx", None) is not None else [])
