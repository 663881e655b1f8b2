"""Files that are never half written: temporary name, fsync, rename, fsync of the folder; patient on Windows.

Everything that the pack keeps (LoRA, checkpoint, job, cache entry) goes through this module. No torch here: tensors are
written by `weights.safetensors_files`.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO, TypeVar

from .errors import ChromaKitError, ConfigError, first_line

Result = TypeVar("Result")
PATIENCE = 5.0
"""Seconds that a file operation is tried again for while another program has the file open."""

_HELD = (5, 32, 33, 145)
"""What Windows says then: access denied, sharing violation, lock violation, folder not empty."""


def patiently(work: Callable[[], Result], path: Path) -> Result:
    """What `work()` gives; tried again for as long as Windows refuses because another program has `path` open.

    Scanners and indexers let go within a second. After `PATIENCE` seconds OSError names the file and the remedy; any
    other error comes at once, and elsewhere than on Windows no such error is known.
    """
    deadline, pause = time.monotonic() + PATIENCE, 0.01
    while True:
        try:
            return work()
        except OSError as error:
            if getattr(error, "winerror", None) not in _HELD:
                raise
            if time.monotonic() > deadline:
                text = f"another program has had this open for {PATIENCE:.0f} seconds (a virus scanner, an indexer, "
                text += "a viewer, a loaded model). Close it there and try again"
                raise OSError(error.errno, text, str(path)) from error
        time.sleep(pause)
        pause = min(2 * pause, 0.25)


def replace(source: Path, target: Path) -> None:
    """Rename a file or folder, patiently; a file that `target` names is replaced."""
    patiently(lambda: os.replace(source, target), target)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it, patiently; nothing happens where there is none."""
    patiently(lambda: _remove(path), path)


def _remove(path: Path) -> None:
    with suppress(FileNotFoundError):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _temporary(path: Path) -> Path:
    """A sibling name that no other thread or process writes to at the same time."""
    return path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable. Windows has no handle for it and needs none."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_file(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


@contextmanager
def atomic_file(path: Path | str) -> Iterator[BinaryIO]:
    """Fill a temporary file; on success it is synced and replaces `path`, on failure or a crash the old one stays."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_atomic(path: Path | str, content: bytes | str) -> None:
    """Replace `path` by `content`; after a crash the file is the old one or the new one, whole."""
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_json(path: Path | str, value: Any) -> None:
    """Write `value` as indented JSON, atomically; what is no text (a file name of foreign bytes) by its JSON escape."""
    write_atomic(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode(errors="backslashreplace"))


def disk_is_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, says that a disk, or the user's share of it, is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        # safetensors and torch say so in words of their own; torch's writer can fail for nothing else but its disk.
        if any(words in str(error) for words in ("No space left on device", "PytorchStreamWriter", "unexpected pos")):
            return True
        error = error.__cause__ or error.__context__
    return False


def read_json(path: Path | str, error: type[ChromaKitError] = ConfigError) -> Any:
    """The value of a JSON file. Raises `error`, naming the file, when it is not there or no JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"There is no file '{path}'.") from None
    except (OSError, ValueError) as cause:
        raise error(
            f"'{path}' cannot be read as JSON ({cause}): it is damaged or was not written by ChromaKit. Restore it "
            "from a backup, or remove it."
        ) from cause


PLACES = {
    *("folder", "transformer", "text_encoder", "tokenizer", "vae", "quantised_folder", "start_from", "path"),
    *("lora_path", "model_path", "model_folder"),
}
"""Fields of configurations, records and statuses that hold a path."""


def only_names(value: Any, field: str = "") -> Any:
    """JSON values in which every absolute path is its last name alone: what is written into files that are given away,
    and told to others, says nothing of this machine's folders."""
    if isinstance(value, dict):
        return {key: only_names(each, str(key).rpartition(".")[2]) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [only_names(each, field) for each in value]
    if field in PLACES and isinstance(value, str):
        kind = next((kind for kind in (PurePosixPath, PureWindowsPath) if kind(value).is_absolute()), None)
        return kind(value).name if kind else value
    return value


def check_format(what: str, found: Any, known: int, error: type[ChromaKitError] = ConfigError) -> None:
    """Raise `error` when `what` was written by a later version: its format number is above `known`.

    found: the number in the file; None, as the first version wrote, is 1.
    """
    number = 1 if found is None else found
    if type(number) is not int or not 1 <= number <= known:
        reads = "format 1" if known == 1 else f"formats 1 to {known}"
        raise error(
            f"{what} has the format {found!r}, which a later version of ChromaKit writes; this one reads {reads}. "
            "Update ChromaKit to use it. Nothing of it was changed."
        )


def read_kept(
    path: Path, what: str, known: int, parse: Callable[[Any], Result], error: type[ChromaKitError]
) -> Result | None:
    """What `parse` makes of a JSON file with a format number; None where there is none.

    Raises `error`, in which the file is called `what`, for a later version's and for a damaged one: neither is to be
    written over. `parse` may raise what a wrong type or a missing name does.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        check_format(what, found.get("format"), known, error)
        return parse(found)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as cause:
        raise error(f"{what} cannot be read ({first_line(cause)}). Repair it, or remove it.") from cause


def each_once(twice: str) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    """An `object_pairs_hook` for `json`: ValueError with `twice.format(name)` for an object that gives a name twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise ValueError(twice.format(name))
            found[name] = value
        return found

    return unique


def strict_json(text: str | bytes) -> Any:
    """`json.loads` that raises ValueError for an object that gives one name twice, and for bottomless nesting."""
    try:
        return json.loads(text, object_pairs_hook=each_once("'{}' is listed twice"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def free_path(folder: Path, name: str) -> Path:
    """The first of name.png, name-2.png, … in `folder` that does not exist: earlier files are never overwritten."""
    stem, suffix = Path(name).stem, Path(name).suffix
    return folder / f"{free_name(stem, lambda found: not (folder / f'{found}{suffix}').exists())}{suffix}"


def free_name(stem: str, is_free: Callable[[str], bool]) -> str:
    """The first of stem, stem-2, stem-3 … that is free."""
    return next(filter(is_free, (stem if count == 1 else f"{stem}-{count}" for count in itertools.count(1))))


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Fill a temporary folder; on success it is synced and renamed to `path`, on failure it vanishes.

    `path` must not exist yet: a finished folder is never replaced.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _sync_file(file)
        sync_folder(temporary)
        patiently(lambda: os.rename(temporary, path), path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove temporaries that a killed process left directly in `folder`, except what another program has open."""
    for path in folder.glob(".*.tmp"):
        with suppress(PermissionError):
            _remove(path)


def slug(text: str, fallback: str = "untitled") -> str:
    """A file name from free text: ASCII letters, digits, `-`, `_` and `.`, at most 80 characters, no leading dot."""
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", ascii_text).strip("-.")[:80] or fallback


_DEVICES = frozenset(["con", "prn", "aux", "nul", *(f"{port}{i}" for port in ("com", "lpt") for i in range(10))])


def file_stem(text: str) -> str:
    """`slug` as the name of a file or folder that Windows takes too: it has devices named con, nul, com1 …, whatever
    comes after a dot."""
    stem, dot, rest = slug(text).partition(".")
    return f"{stem}{'_' if stem.lower() in _DEVICES else ''}{dot}{rest}"


DISK_MARGIN = 256 << 20
"""Bytes that are left free beside what is asked room for: others write to the disk too."""


def require_room(
    folder: Path,
    needed: int,
    what: str,
    error: type[ChromaKitError],
    remedy: str = "Make room, or choose another disk.",
) -> None:
    """Raise `error` unless the disk of `folder` (made if it is not there) has room for `needed` bytes of `what`."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed + DISK_MARGIN:
        raise error(
            f"There is no room for {what}: about {(needed + DISK_MARGIN) / 2**30:.1f} GiB are needed in '{folder}', "
            f"{free / 2**30:.1f} GiB are free. {remedy}"
        )


def sha256_file(path: Path | str) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
