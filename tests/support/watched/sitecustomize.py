"""Imported by Python at its start where this folder is on PYTHONPATH: notes every file that the process writes, moves
or removes outside of the folders that it may, and every one that it opens below one that is none of its business.

CHROMAKIT_WATCH is a JSON object: `log` (a file, a line of JSON for each), `may_write` (folders), `may_not_read`.
"""

import json
import os
import sys

_watch = json.loads(os.environ["CHROMAKIT_WATCH"])
_log = os.open(_watch["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
_may_write = tuple(os.path.join(os.path.realpath(folder), "") for folder in _watch["may_write"])
_may_not_read = tuple(os.path.join(os.path.realpath(folder), "") for folder in _watch["may_not_read"])
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_PATHS = {
    "os.remove": 1, "os.rename": 2, "os.mkdir": 1, "os.rmdir": 1, "os.link": 2, "os.symlink": 2, "os.truncate": 1,
    "os.chmod": 1, "os.chown": 1, "os.utime": 1, "shutil.rmtree": 1, "os.listdir": 1, "os.scandir": 1,
}  # fmt: skip
"""Events that change files or look into folders, and how many of their first arguments are paths."""
_LOOKS = ("os.listdir", "os.scandir")


def _hook(event: str, arguments: tuple) -> None:
    if event == "open":
        path, _, flags = arguments
        _note(event, path, bool((flags or 0) & _WRITES))
    elif event in _PATHS:
        for path in arguments[1:2] if event == "os.symlink" else arguments[: _PATHS[event]]:
            _note(event, path, event not in _LOOKS)


def _note(event: str, path: object, writes: bool) -> None:
    if not isinstance(path, str | bytes | os.PathLike):
        return  # a handle that was opened before, which was looked at then
    full = os.path.join(os.path.realpath(os.fsdecode(path)), "")
    if full.startswith(_may_not_read) or (writes and not full.startswith(_may_write)):
        os.write(_log, json.dumps([event, full[:-1], "writes" if writes else "reads"]).encode() + b"\n")


sys.addaudithook(_hook)
