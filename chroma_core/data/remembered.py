"""What reading image files told, by path, inode, size and times, so that a second start opens none of them."""

from __future__ import annotations

import json
import logging
import os
import stat
import time
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import DataError
from ..files import check_format, sha256_file, write_atomic
from .images import ImageFacts, UnreadableImage, image_facts

FORMAT = 1
"""Raised whenever the same file would be read otherwise."""

SETTLED = 2.0
"""Seconds: a file that was written so recently could be written again with the very same time."""

MOST = 200_000
"""Files that are remembered; those that were read last."""

log = logging.getLogger(__name__)


class Remembered:
    """Facts and hashes of image files, for as long as these do not change. May be used by several threads.

    Args:
        cache: the folder where they are kept for the next process, in a file that any number of jobs and processes
            share; None: nowhere. A file that is damaged, or of an older version, counts as empty; one of a later
            version is left alone.
        most_bytes: how much is read for hashes; None: everything. The `facts` of files beyond come with an empty hash,
            and these files are `unread`.
    """

    def __init__(self, cache: Path | None = None, most_bytes: int | None = None):
        self._left = most_bytes
        self.unread: list[Path] = []
        self._file = None if cache is None else cache / "images.json"
        self._known: dict[str, list] = {}
        if self._file is not None:
            try:
                self._known = _read(self._file)
            except DataError as error:
                log.warning("ChromaKit: %s The images are read again each time.", error)
                self._file = None
        self._new: dict[str, list] = {}

    def facts(self, path: Path) -> tuple[ImageFacts, str]:
        """What an image's header tells, and the file's SHA-256. Raises OSError, UnreadableImage."""
        size, digest = self._of(f"facts {path}", path, lambda: [[*astuple(image_facts(path))], self._hash(path)])
        return ImageFacts(*size), digest

    def _hash(self, path: Path) -> str:
        if self._left is not None:
            self._left -= path.stat().st_size
            if self._left < 0:
                self.unread.append(path)
                return ""
        return sha256_file(path)

    def sha256(self, path: Path) -> str:
        """A file's SHA-256. Raises OSError, UnreadableImage."""
        return self._of(f"hash {path}", path, lambda: [sha256_file(path)])[0]

    def save(self) -> None:
        """Keep what is new for the next process. What cannot be written is only read again."""
        if self._file is None or not self._new:
            return
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{self._file}.lock", timeout=10):
                others = {key: value for key, value in _read(self._file).items() if key not in self._new}
                latest = dict([*others.items(), *self._new.items()][-MOST:])
                text = json.dumps({"format": FORMAT, "files": latest}, ensure_ascii=False)
                write_atomic(self._file, text.encode(errors="backslashreplace"))  # names of files may be no UTF-8
            self._new = {}
        except (OSError, Timeout, UnicodeEncodeError, DataError) as error:
            log.warning("ChromaKit: what was read of the images is not remembered: %s", error)

    def _of(self, key: str, path: Path, read: Callable[[], list]) -> list:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            raise UnreadableImage("not a file")
        state = [found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]
        known = self._known.get(key)
        if known is not None and known[0] == state:
            return known[1]
        value = read()
        if value[-1] and time.time() - max(found.st_mtime, found.st_ctime) >= SETTLED:
            self._known[key] = self._new[key] = [state, value]
            if len(self._known) > MOST:
                self._known.pop(next(iter(self._known)), None)
        return value


def _read(file: Path) -> dict[str, list]:
    """Raises DataError for a later version's file."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if type(found["format"]) is not int or found["format"] > FORMAT:
            check_format(f"'{file}'", found["format"], FORMAT, DataError)
        return found["files"] if found["format"] == FORMAT else {}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, LookupError, TypeError) as error:
        log.warning("ChromaKit: '%s' cannot be read (%s); the images are read again.", file.name, error)
        return {}
