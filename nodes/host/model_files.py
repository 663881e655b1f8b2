"""The model files that the user already has: names in ComfyUI's folders, as lists for widgets, and back to paths.

A name is a file below one of the folders that ComfyUI uses for its kind (also those of extra_model_paths.yaml), or,
with a slash at its end, a folder with one component in diffusers layout. GGUF files are listed too; ComfyUI's own
lists leave them out. Of models/checkpoints, the files that hold the part in question are listed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import comfy.sd
import folder_paths

from ...chroma_core.errors import ModelFileError, did_you_mean
from ...chroma_core.weights.identify import Part
from ...chroma_core.weights.opening import parts_in

FOLDERS: dict[Part, tuple[str, ...]] = {
    "transformer": ("diffusion_models", "unet"),
    "text_encoder": ("text_encoders", "clip"),
    "vae": ("vae",),
}
"""ComfyUI's kinds of folders for each part; the second names are those of older hosts."""

CHECKPOINTS = "checkpoints"
"""ComfyUI's kind of folder for files with several parts, of Chroma and of every other model."""

EXTENSIONS = {".safetensors", ".sft", ".gguf"}
INDEX = ".safetensors.index.json"


def model_file_names(part: Part) -> list[str]:
    """What ComfyUI's folders hold for `part`, sorted: files by relative name, component folders with a slash."""
    return sorted({name for root, name in _listed(part)})


def model_file(part: Part, name: str) -> str:
    """The path behind a name from `model_file_names`; never one outside ComfyUI's folders. Raises ModelFileError."""
    for root, listed in _listed(part):
        if name == listed:
            return _path(root, name)
    raise ModelFileError(
        f"There is no {part.replace('_', ' ')} '{name}' in ComfyUI's folders: {', '.join(_roots(*FOLDERS[part]))}. "
        "Choose one from the list (press R to refresh it), or put the file there."
        f"{did_you_mean(name, model_file_names(part))}"
    )


def model_file_name(part: Part, path: str) -> str | None:
    """The name behind a path that `model_file` gave; None for a file that is not in ComfyUI's folders any more."""
    return next((name for root, name in _listed(part) if _path(root, name) == path), None)


def model_folders() -> list[str]:
    """Names of models in diffusers layout in ComfyUI's `models/diffusers` folders."""
    found = [
        entry.name
        for root in folder_paths.get_folder_paths("diffusers")
        if os.path.isdir(root)
        for entry in os.scandir(root)
        if os.path.isfile(os.path.join(entry.path, "model_index.json"))
    ]
    return sorted(set(found))


def model_folder(name: str) -> str:
    """The folder behind a name from `model_folders`; raises ModelFileError."""
    if name in model_folders():
        for root in folder_paths.get_folder_paths("diffusers"):
            if os.path.isfile(os.path.join(root, name, "model_index.json")):
                return os.path.join(root, name)
    raise ModelFileError(
        f"There is no model '{name}' in models/diffusers. A model folder holds model_index.json and the sub-folders "
        f"transformer, text_encoder, tokenizer and vae.{did_you_mean(name, model_folders())}"
    )


def quantised_folder() -> Path:
    """Where quantised weights are kept: with ComfyUI's models, but in none of the folders that its lists show."""
    return Path(folder_paths.models_dir) / "chromakit" / "quantised"


def t5_tokenizer() -> Path | None:
    """T5's tokenizer, a copy of which comes with every ComfyUI."""
    folder = Path(comfy.sd.__file__).parent / "text_encoders" / "t5_tokenizer"
    return folder if (folder / "tokenizer.json").is_file() else None


def _listed(part: Part) -> Iterator[tuple[str, str]]:
    """(root, name) of every model for `part`; where two roots have a name, the first is meant."""
    for root in _roots(*FOLDERS[part]):
        yield from ((root, name) for name in _names(root))
    for root in _roots(CHECKPOINTS):
        yield from ((root, name) for name in _names(root) if part in _parts_in(_path(root, name)))


def _path(root: str, name: str) -> str:
    return os.path.join(root, *name.split("/")).rstrip(os.sep)


_held: dict[str, tuple[tuple[int, int], frozenset[Part]]] = {}


def _parts_in(path: str) -> frozenset[Part]:
    """The parts of Chroma in a checkpoint: its header is read again only when the file has changed."""
    try:
        stat = os.stat(path)
    except OSError:
        return frozenset()
    state = (stat.st_size, stat.st_mtime_ns)
    if _held.get(path, (None,))[0] != state:
        _held[path] = (state, parts_in(path))
    return _held[path][1]


def _roots(*kinds: str) -> list[str]:
    known = [kind for kind in kinds if kind in folder_paths.folder_names_and_paths] or [kinds[0]]
    return list(dict.fromkeys(root for kind in known for root in folder_paths.get_folder_paths(kind)))


_seen: dict[str, tuple[dict[str, int], list[str]]] = {}


def _names(root: str) -> list[str]:
    """The names below one root; read again only when a folder in it has changed, as the lists are asked for often."""
    if not os.path.isdir(root):
        return []
    if root not in _seen or any(_stamp(folder) != stamp for folder, stamp in _seen[root][0].items()):
        _seen[root] = _scan(root)
    return _seen[root][1]


def _scan(root: str) -> tuple[dict[str, int], list[str]]:
    """({folder: time of its last change}, names of models) below `root`."""
    stamps: dict[str, int] = {}
    names: list[str] = []
    for path, folders, files in os.walk(root, followlinks=True):
        stamps[path] = _stamp(path)
        folders[:] = [name for name in folders if not name.startswith(".")]
        weights = [name for name in files if os.path.splitext(name)[1].lower() in EXTENSIONS]
        relative = Path(path).relative_to(root)
        if path != root and _is_component(files, weights):
            names.append(f"{relative.as_posix()}/")
        else:
            names += [(relative / name).as_posix() for name in weights]
    return stamps, names


def _is_component(files: list[str], weights: list[str]) -> bool:
    return bool(weights) and ("config.json" in files or any(name.endswith(INDEX) for name in files))


def _stamp(folder: str) -> int:
    try:
        return os.stat(folder).st_mtime_ns
    except OSError:
        return -1
