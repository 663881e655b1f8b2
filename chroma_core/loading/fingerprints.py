"""The sha256 of weight files, without reading 17 GiB each time: remembered by size and time of change.

A file in the Hub's cache is named by its sha256. Any other one is read once; the result is remembered in this process
and in a small file in the Hugging Face folder, so that a LoRA can be compared with its base at no cost later.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from huggingface_hub import constants

from ..files import sha256_file, write_atomic

AT_ONCE = 256 << 20
"""Bytes up to which a file is read whenever somebody asks: under a second."""

KEPT = 200
"""Entries in the file; the oldest are forgotten first."""

_BLOB = re.compile(r"^[0-9a-f]{64}$")
_known: dict[str, str] = {}
_lock = threading.Lock()


def sha256_of(path: Path) -> str:
    """Hex digest of a file's content; computed at most once for a file that does not change."""
    known = _looked_up(path)
    if known is None:
        key = _key(path)  # before reading: of a file that grows meanwhile, the digest is nobody's afterwards
        known = sha256_file(path)
        _remember(key, known)
    return known


def known_sha256(path: Path) -> str | None:
    """`sha256_of` where that takes no time, else None."""
    known = _looked_up(path)
    if known is None and path.stat().st_size <= AT_ONCE:
        key = _key(path)
        known = _known[key] = sha256_file(path)
    return known


def joined(digests: Sequence[str]) -> str:
    """One fingerprint for several files in order; that of a single file is its own."""
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def remembered_in() -> Path:
    """The file in which digests are kept between runs."""
    return Path(constants.HF_HOME) / "chromakit" / "sha256.json"


def _looked_up(path: Path) -> str | None:
    real = path.resolve()
    if real.parent.name == "blobs" and _BLOB.match(real.name):
        return real.name
    key = _key(path)
    return _known.get(key) or _stored().get(key)


def _key(path: Path) -> str:
    real = path.resolve()
    state = real.stat()
    return f"{real} {state.st_size} {state.st_mtime_ns}"


def _stored() -> dict[str, str]:
    with suppress(OSError, ValueError):
        found = json.loads(remembered_in().read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return {key: value for key, value in found.items() if isinstance(value, str) and _BLOB.match(value)}
    return {}


def _remember(key: str, digest: str) -> None:
    """Small files are not worth an entry on disk: they are read again in no time."""
    with _lock:
        _known[key] = digest
        if int(key.rsplit(" ", 2)[1]) <= AT_ONCE:
            return
        entries = [*(item for item in _stored().items() if item[0] != key), (key, digest)]
        with suppress(OSError):  # a read-only home costs a second reading later, nothing more
            write_atomic(remembered_in(), json.dumps(dict(entries[-KEPT:]), indent=1))
