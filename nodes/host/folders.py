"""ComfyUI's folders for data: jobs, LoRAs, datasets. A name never leads outside them. Models: see `model_files`."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports] (Python 3.10 brings none of its own)

import comfy.utils
import folder_paths
import torch

from ...chroma_core.data.images import image_extensions
from ...chroma_core.data.scan import is_hidden
from ...chroma_core.errors import DataError, LoraError, did_you_mean, first_few
from ...chroma_core.files import only_names

PACK = Path(__file__).resolve().parents[2]
LORAS = "loras"

log = logging.getLogger("chromakit")


def output_name(path: Path) -> str:
    """A place in ComfyUI's output folder as its nodes name it."""
    return path.relative_to(folder_paths.get_output_directory()).as_posix()


def jobs_folder() -> Path:
    """Where training jobs are kept."""
    return Path(folder_paths.get_output_directory()) / "chromakit" / "jobs"


def publish_folder() -> Path:
    """Where folders go that are ready to be uploaded to a hub."""
    return Path(folder_paths.get_output_directory()) / "chromakit" / "publish"


def images_folder() -> Path:
    """Where images from other nodes are kept for training, a dataset folder for each set of them."""
    return Path(folder_paths.get_output_directory()) / "chromakit" / "datasets"


def loras_folder() -> Path:
    """Where trained LoRAs go; ComfyUI searches it for LoRAs."""
    return Path(folder_paths.get_output_directory()) / LORAS


def lora_models_folder() -> Path:
    """Where LoRAs are kept that came over a link; ComfyUI does not search it."""
    return Path(folder_paths.get_output_directory()) / "chromakit" / "lora_models"


def models_folder() -> Path:
    """Where models that are made here go; ComfyUI searches it for diffusion models."""
    return Path(folder_paths.get_output_directory()) / "diffusion_models"


def settings_file() -> Path:
    """Where what was chosen for this host is kept, whoever uses it."""
    return Path(folder_paths.get_user_directory()) / "chromakit" / "settings.json"


def lora_names() -> list[str]:
    """LoRA files in ComfyUI's LoRA folders, as its own loaders list them."""
    return folder_paths.get_filename_list(LORAS)


def lora_path(name: str) -> Path:
    """The file behind a name from `lora_names`; raises LoraError that says what to do."""
    found = folder_paths.get_full_path(LORAS, name) if name else None
    if found is None:
        known = lora_names()
        listed = (
            f"It knows {', '.join(known[:8])}{' and more' if len(known) > 8 else ''}."
            if known
            else "There is none yet."
        )
        raise LoraError(
            f"There is no LoRA file '{name}' in ComfyUI's LoRA folders. {listed} Choose one from the list (press R to "
            f"refresh it), or put the file into '{loras_folder()}'.{did_you_mean(name, known)}"
        )
    return Path(found)


def file_state(path: Path) -> str:
    """A text that changes when the file does."""
    try:
        found = path.stat()
    except OSError:
        return "missing"
    return f"{found.st_size}-{found.st_mtime_ns}"


def _dataset_roots() -> list[Path]:
    """Where datasets may lie, in order of search: ComfyUI's input, the pack's examples, the owner's list."""
    roots = [Path(folder_paths.get_input_directory()), PACK / "example_datasets"]
    config = Path(folder_paths.get_user_directory()) / "chromakit" / "config.toml"
    if config.is_file():
        try:
            listed = tomllib.loads(config.read_text(encoding="utf-8")).get("dataset_roots", [])
            # The letters of a single text would be places too, "/" among them.
            if not isinstance(listed, list) or not all(isinstance(root, str) and root for root in listed):
                raise ValueError("dataset_roots is not a list of folders")
            roots += map(Path, listed)
        except (OSError, ValueError) as error:
            raise DataError(
                f"'{config}' cannot be read: {error}. Expected: dataset_roots = [\"/my/images\"]."
            ) from error
    return [root.resolve() for root in roots]


def _known_roots() -> list[Path]:
    """Where datasets may lie, images that other nodes gave included. Raises DataError."""
    return [*_dataset_roots(), images_folder().resolve()]


def dataset_names() -> list[str]:
    """Folders that hold images, one or two levels below a dataset root, named relative to it.

    A folder whose images all lie in sub-folders (kohya's `3_dog`) is one of them. ComfyUI asks for the names
    whenever it lists nodes, so what cannot be read is left out here and explained when used.
    """
    names: dict[str, None] = {}
    try:
        for root in _dataset_roots():
            for path in sorted([*root.glob("*/"), *root.glob("*/*/")]):
                name = path.relative_to(root).as_posix()
                if not is_hidden(path, root) and (
                    _holds_images(path) or any(map(_holds_images, sorted(path.glob("*/"))))
                ):
                    names[name] = None
    except (DataError, OSError) as error:
        log.warning("ChromaKit: not every dataset can be listed: %s", error)
    return list(names)


def _holds_images(folder: Path) -> bool:
    if not folder.is_dir() or not os.access(folder, os.R_OK | os.X_OK):
        return False
    with os.scandir(folder) as entries:
        return any(os.path.splitext(entry.name)[1].lower() in image_extensions() for entry in entries)


def dataset_folder(name: str) -> Path:
    """The folder behind a dataset name; never one outside the roots. Raises DataError.

    Images that other nodes gave are found by their folder's name too, so that a job on them can be started again.
    """
    for root in _known_roots():
        try:
            folder = (root / name.strip()).resolve()
            if name.strip() and folder != root and folder.is_relative_to(root) and folder.is_dir():
                return folder
        except (OSError, ValueError):  # too long for a name, or with a zero byte in it
            continue
    raise DataError(
        f"There is no dataset folder '{name}'. It must lie in one of: {', '.join(map(str, _dataset_roots()))}. Put a "
        "folder with images and .txt captions into ComfyUI's input folder, or list further places as dataset_roots in "
        f"user/chromakit/config.toml.{did_you_mean(name, dataset_names())}"
    )


def own_dataset_folder(name: str) -> Path:
    """The folder behind a dataset name that may be changed: one below ComfyUI's input, though it be still to be made.

    Raises DataError for any other, and for names that ComfyUI's own upload would understand otherwise.
    """
    root = Path(folder_paths.get_input_directory()).resolve()
    parts = name.split("/")
    try:
        # As one segment after the other, none of them hidden, and none that a system would trim or read as a way.
        plain = all(part == part.strip(" .") and part and not set(part) & set('\\:*?"<>|\0') for part in parts)
        folder = root.joinpath(*parts) if plain else root
        if folder != root and folder == folder.resolve() and (folder.is_dir() or not folder.exists()):
            return folder
    except (OSError, ValueError):  # too long for a name
        pass
    raise DataError(
        f"'{name[:200]}' is no dataset that can be changed here. Choose a folder below ComfyUI's input folder, or a "
        "name for a new one: letters, digits, spaces, - and _, with / for a folder within another."
    )


def is_own_dataset(folder: Path) -> bool:
    """Whether a dataset folder lies below ComfyUI's input, where it may be changed."""
    return folder.resolve().is_relative_to(Path(folder_paths.get_input_directory()).resolve())


def check_links(folder: Path) -> None:
    """Raise DataError when a file below a dataset folder is a link to a place where no dataset may lie."""
    _check_links(folder, _links(folder))


def check_link(folder: Path, path: Path) -> None:
    """`check_links` for one file of the folder."""
    _check_links(folder, [path])


def _links(folder: Path) -> Iterator[Path]:
    for where, folders, names in os.walk(folder):  # which does not go into folders that are links
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(where, name) for name in names if not name.startswith("."))


def _check_links(folder: Path, paths: Iterable[Path]) -> None:
    places = _known_roots()
    astray = [
        path.relative_to(folder).as_posix()
        for path in paths
        if path.is_symlink() and path.exists() and not any(path.resolve().is_relative_to(root) for root in places)
    ]
    if astray:
        raise DataError(
            f"The dataset folder '{folder.name}' holds links to files that lie elsewhere: {first_few(astray)}. Copy "
            "these files into it, or list the folder that they lie in as dataset_roots in user/chromakit/config.toml."
        )


def dataset_name(folder: str) -> str | None:
    """The name under which `dataset_folder` finds a folder; None when it does not."""
    path = Path(folder).resolve()
    for root in _known_roots():
        if path != root and path.is_relative_to(root):
            return path.relative_to(root).as_posix()
    return None


def path_state(path: str) -> str:
    """`file_state` or `folder_state`, whichever it is."""
    found = Path(path)
    return folder_state(found) if found.is_dir() else file_state(found)


def folder_state(folder: Path) -> str:
    """A text that changes when anything in the folder or below is added, removed, renamed or edited.

    Images, masks, captions with whatever extension and metadata all count, as do links that lead nowhere; hidden
    files and folders, which a scan does not look at and file managers keep writing, do not.
    """
    entries = []
    for where, folders, names in os.walk(folder):  # several times faster than rglob, which counts in large sets
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = os.path.relpath(where, folder)
        entries += [(inside, name, file_state(Path(where, name))) for name in names if not name.startswith(".")]
    return hashlib.sha256(repr(sorted(entries)).encode()).hexdigest()


def told(value: Any) -> Any:
    """JSON values, or a text, as they are told to others: places in the folders that are known by these folders' names
    (`output/loras/x.safetensors`), in the user's own folder after `~`, and elsewhere the last name alone."""
    places, pattern = _places()

    def named(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: named(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [named(each) for each in value]
        return pattern.sub(lambda found: places[found[0]], value) if isinstance(value, str) else value

    return only_names(named(value))


@cache
def _places() -> tuple[dict[str, str], re.Pattern[str]]:
    """The folders that are known, with what they are called, and what finds one at the beginning of a path.

    They are ComfyUI's, those that its owner lists, and the user's own; also as they are when links are followed.
    """
    named = {
        Path.home(): "~",
        Path(folder_paths.base_path): "ComfyUI",
        PACK: PACK.name,
        PACK / "example_datasets": "example_datasets",
        Path(folder_paths.models_dir): "models",
        Path(folder_paths.get_output_directory()): "output",
        Path(folder_paths.get_input_directory()): "input",
        Path(folder_paths.get_temp_directory()): "temp",
        Path(folder_paths.get_user_directory()): "user",
    }
    own = tuple(map(str, named))
    for kind, (folders, _) in folder_paths.folder_names_and_paths.items():
        named |= {Path(folder): f"models/{kind}" for folder in folders if not folder.startswith(own)}
    with suppress(DataError):  # which is told when a dataset is asked for
        named |= {root: root.name for root in _dataset_roots() if not str(root).startswith(own)}
    # The root of a drive is no name to hide.
    places = {str(form): name for path, name in named.items() for form in (path, path.resolve()) if form.name}
    names = "|".join(re.escape(place) for place in sorted(places, key=len, reverse=True))
    return places, re.compile(rf"(?<![\w./\\~-])(?:{names})(?![\w-])")


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, as ComfyUI's own LoRA nodes pass them on."""
    tensors: Any = comfy.utils.load_torch_file(str(path), safe_load=True)
    return tensors
