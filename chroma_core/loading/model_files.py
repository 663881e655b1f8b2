"""Where each part of a model lies (a file or component folder on this machine, or the Hub's cache), what its sha256 is,
and whether a LoRA meets the base that it was trained on.

The sha256 of weight files is had without reading 17 GiB each time. A file in the Hub's cache is named by it. Any other
one is read once; the result is remembered in this process, by size and time of change, and in a small file in the
Hugging Face folder, so that a LoRA can be compared with its base at no cost later.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Literal

from huggingface_hub import constants

from ..errors import ConfigError, ModelFileError
from ..files import check_format, read_json, sha256_file, write_atomic
from ..model.flavours import flavour
from ..weights.identify import Part
from ..weights.opening import open_weights, parts_in
from .hub import OnDownload, fetch
from .spec import ModelSpec

log = logging.getLogger(__name__)

ModelPart = Literal["transformer", "text_encoder", "tokenizer", "vae"]

TOKENIZER_FILES = ("tokenizer.json", "spiece.model")


def locate(spec: ModelSpec, part: ModelPart, on_progress: OnDownload | None = None) -> Path:
    """The file or component folder that holds `part`; only what is nowhere on this machine is downloaded.

    In this order: the part's own field in `spec`; for the tokenizer, what lies in or beside the text encoder's folder;
    `spec.folder`; the transformer's own file, where it is a checkpoint with all parts in it; the folder of an embedded
    flavour; the Hub's shared cache, or the Hub itself.

    Args:
        on_progress: see `hub.fetch`.
    Raises:
        ModelFileError: nothing there, or the download failed; with what to do.
    """
    own = getattr(spec, part)
    if own is not None:
        return _existing(Path(own), part)
    if part == "tokenizer" and (text_encoder := spec.text_encoder or in_checkpoint(spec, "text_encoder")):
        beside = _tokenizer_beside(Path(text_encoder))
        if beside is not None:
            return beside
    if whole := in_checkpoint(spec, part):
        return whole
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


def in_checkpoint(spec: ModelSpec, part: ModelPart) -> Path | None:
    """The transformer's file, where it holds a part that is named nowhere else."""
    if spec.transformer is None or spec.folder is not None or part in ("transformer", "tokenizer"):
        return None
    path = Path(spec.transformer)
    return path if path.is_file() and part in _parts_in(path, file_state(path)) else None


@lru_cache(maxsize=16)
def _parts_in(path: Path, state: str) -> frozenset[Part]:
    """`parts_in`, once for a file that does not change."""
    return parts_in(path)


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


AT_ONCE = 256 << 20
"""Bytes up to which a file is read whenever somebody asks: under a second."""

FORMAT = 1
"""Of the file of digests. Raised whenever an older version would misread it; without a number it is the first."""

KEPT = 200
"""Entries in the file; the oldest are forgotten first."""

_BLOB = re.compile(r"^[0-9a-f]{64}$")
_known: dict[str, str] = {}
_lock = threading.Lock()


def sha256_of(path: Path) -> str:
    """Hex digest of a file's content; computed at most once for a file that does not change."""
    key, known = _looked_up(path)  # before reading: of a file that grows meanwhile, the digest is nobody's afterwards
    if known is None:
        known = sha256_file(path)
        _remember(key, known)
    return known


def known_sha256(path: Path) -> str | None:
    """`sha256_of` where that takes no time, else None."""
    return sha256_of(path) if path.stat().st_size <= AT_ONCE else _looked_up(path)[1]


def joined(digests: Sequence[str]) -> str:
    """One fingerprint for several files in order; that of a single file is its own."""
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def remembered_in() -> Path:
    """The file in which digests are kept between runs."""
    return Path(constants.HF_HOME) / "chromakit" / "sha256.json"


def _looked_up(path: Path) -> tuple[str, str | None]:
    """The state of a file, and its digest if it is known."""
    real, key = path.resolve(), file_state(path)
    if real.parent.name == "blobs" and _BLOB.match(real.name):
        return key, real.name
    known = _known.get(key)
    if known is None:
        with suppress(ModelFileError):  # said when it cannot be added to
            known = _stored().get(key)
    return key, known


def _stored() -> dict[str, str]:
    """The digests that are kept. Raises ModelFileError for a later version's file."""
    with suppress(ConfigError):
        if isinstance(found := read_json(remembered_in()), dict):
            check_format(f"'{remembered_in()}'", found.get("format"), FORMAT, ModelFileError)
            return {key: value for key, value in found.items() if isinstance(value, str) and _BLOB.match(value)}
    return {}


def _remember(key: str, digest: str) -> None:
    """Small files are not worth an entry on disk: they are read again in no time."""
    with _lock:
        _known[key] = digest
        if int(key.rsplit(" ", 2)[1]) <= AT_ONCE:
            return
        # A read-only home, or one of a later version, costs a second reading later, nothing more.
        try:
            entries = [*(item for item in _stored().items() if item[0] != key), (key, digest)][-KEPT:]
            write_atomic(remembered_in(), json.dumps({"format": FORMAT, **dict(entries)}, indent=1))
        except ModelFileError as error:
            log.warning("ChromaKit: %s The file's SHA-256 is computed again each time.", error)
        except OSError:
            pass


SHOWN = 12
"""Digits of a sha256 in a message."""


def base_hash(spec: ModelSpec) -> str:
    """A fingerprint of the transformer's weights: the file's sha256, or for shards the sha256 of theirs in order."""
    return joined([sha256_of(path) for path in open_weights(locate(spec, "transformer")).files])


def known_base_hash(spec: ModelSpec) -> str | None:
    """`base_hash` when it is known without reading a large file, else None."""
    digests: dict[Path, str] = {}
    # The largest first: where it is not known, the small ones beside it need not be read.
    files = open_weights(locate(spec, "transformer")).files
    for path in sorted(files, key=lambda file: -file.stat().st_size):
        if (digest := known_sha256(path)) is None:
            return None
        digests[path] = digest
    return joined([digests[path] for path in files])


def base_header(spec: ModelSpec) -> dict[str, str]:
    """What the header of a file that is made from a model says of it; see `base_warning`."""
    facts = {
        "chromakit.base_sha256": base_hash(spec),
        "chromakit.flavour": "" if spec.own_file else spec.flavour,
        "chromakit.base_file": spec.own_file,
    }
    return {key: value for key, value in facts.items() if value}


def base_warning(metadata: Mapping[str, str], spec: ModelSpec, read_everything: bool = False) -> str | None:
    """What to tell a person when the LoRA was trained on another base; None when it fits or nothing is known.

    The sha256 of the base's file decides when both are known, otherwise the published flavour's name. No large file is
    read for that, unless `read_everything`.

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
