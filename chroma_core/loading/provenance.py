"""Whether a LoRA meets the base that it was trained on, as far as its header and the model's files tell."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from .components import base_hash, known_base_hash
from .spec import ModelSpec

SHOWN = 12
"""Digits of a sha256 in a message."""


def base_remark(metadata: Mapping[str, str], spec: ModelSpec, read_everything: bool = False) -> str | None:
    """What to tell a person when the LoRA was trained on another base; None when it fits or nothing is known.

    The sha256 of the base's file decides when both are known, otherwise the published flavour's name. No large file is
    read for that, unless `read_everything`: see `fingerprints`.

    Args:
        metadata: the LoRA's header.
        spec: the model that it is put on; its files must be on this machine.
    """
    trained_sha, trained_flavour = metadata.get("chromakit.base_sha256"), metadata.get("chromakit.flavour")
    trained_file = metadata.get("chromakit.base_file")
    if trained_sha is None and trained_flavour is None:
        return None
    own = spec.transformer or spec.folder
    sha = (base_hash(spec) if read_everything else known_base_hash(spec)) if trained_sha else None
    if trained_sha and sha:
        same = trained_sha == sha
    else:
        same = not (own is None and trained_file is None and trained_flavour and trained_flavour != spec.flavour)
    if same:
        return None
    trained = _named(trained_flavour, trained_file, trained_sha)
    here = _named(None if own else spec.flavour, Path(own).name if own else None, sha)
    alike = not own and trained_flavour == spec.flavour
    hint = " That may be another revision or number format of the same weights." if alike or own else ""
    return (
        f"The LoRA was trained on another base: on {trained}, while this model is {here}.{hint} For what its training "
        "previews showed, load the base that it was trained on."
    )


def _named(flavour: str | None, file: str | None, sha: str | None) -> str:
    parts = [part for part in (flavour, f"'{file}'" if file else None) if part]
    return f"{' '.join(parts) or 'an unnamed file'}{f' (sha256 {sha[:SHOWN]}…)' if sha else ''}"
