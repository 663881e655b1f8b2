"""Where each part of a model lies: a file or component folder on this machine, or the Hub's cache."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from ..errors import ModelFileError
from ..model.flavours import flavour
from .hub import OnDownload, fetch
from .spec import ModelSpec

ModelPart = Literal["transformer", "text_encoder", "tokenizer", "vae"]

TOKENIZER_FILES = ("tokenizer.json", "spiece.model")


def locate(spec: ModelSpec, part: ModelPart, on_progress: OnDownload | None = None) -> Path:
    """The file or component folder that holds `part`; only what is nowhere on this machine is downloaded.

    In this order: the part's own field in `spec`; for the tokenizer, what lies in or beside the text encoder's folder;
    `spec.folder`; the folder of an embedded flavour; the Hub's shared cache, or the Hub itself.

    Args:
        on_progress: see `hub.fetch`.
    Raises:
        ModelFileError: nothing there, or the download failed; with what to do.
    """
    own = getattr(spec, part)
    if own is not None:
        return _existing(Path(own), part)
    if part == "tokenizer" and spec.text_encoder is not None:
        beside = _tokenizer_beside(Path(spec.text_encoder))
        if beside is not None:
            return beside
    chosen = flavour(spec.flavour)
    folder = Path(spec.folder) if spec.folder else chosen.folder
    if folder is None:
        return fetch(chosen, [part], spec.revision, on_progress) / part
    if not (folder / "model_index.json").is_file():
        raise ModelFileError(
            f"'{folder}' is not a model in diffusers layout: it has no model_index.json. Name the folder that holds "
            "the sub-folders transformer, text_encoder, tokenizer and vae, or name single files for the parts."
        )
    return _existing(folder / part, part)


def _existing(path: Path, part: ModelPart) -> Path:
    if not path.exists():
        raise ModelFileError(
            f"The {part.replace('_', ' ')} should be at '{path}', but nothing is there. Choose another file, or put "
            "it back."
        )
    return path


def _tokenizer_beside(text_encoder: Path) -> Path | None:
    folder = text_encoder if text_encoder.is_dir() else text_encoder.parent
    for candidate in (folder, folder / "tokenizer", folder.parent / "tokenizer"):
        if any((candidate / name).is_file() for name in TOKENIZER_FILES):
            return candidate
    return None


def file_state(path: Path) -> str:
    """A text that changes when a file, or a weight or JSON file of a folder, is replaced: names, sizes, times."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    states = []
    for file in files:
        stat = os.stat(file)
        states.append(f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}")
    return "\n".join(states)
