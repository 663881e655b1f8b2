"""Imported by Python at its start where this folder is on PYTHONPATH: notes every file that the process writes, moves
or removes outside of the folders that it may, and every one that it opens below one that is none of its business.

CHROMAKIT_WATCH is a JSON object: `log` (a file, a line of JSON for each), `may_write` (folders), `may_not_read`.

ComfyUI's process ends when all that is to be done at its end is done, without clearing away its modules, which takes
two seconds; tests/host/test_shared_output.py has one that ends in full.
"""

import atexit
import json
import os
import sys

_watch = json.loads(os.environ["CHROMAKIT_WATCH"])
_log = os.open(_watch["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
_may_write = tuple(os.path.join(os.path.realpath(folder), "") for folder in _watch["may_write"])
_may_not_read = tuple(os.path.join(os.path.realpath(folder), "") for folder in _watch["may_not_read"])
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_PATHS: dict[str, tuple[tuple[int, int | None], ...]] = {
    "os.remove": ((0, 1),),
    "os.rename": ((0, 2), (1, 3)),
    "os.mkdir": ((0, 2),),
    "os.rmdir": ((0, 1),),
    "os.link": ((0, 2), (1, 3)),
    "os.symlink": ((1, 2),),
    "os.truncate": ((0, None),),
    "os.chmod": ((0, 2),),
    "os.chown": ((0, 3),),
    "os.utime": ((0, 3),),
    "shutil.rmtree": ((0, 1),),
    "os.listdir": ((0, None),),
    "os.scandir": ((0, None),),
}
"""Events that change files or look into folders: which arguments are paths, and which where these begin."""
_LOOKS = ("os.listdir", "os.scandir")


def _hook(event: str, arguments: tuple) -> None:
    if event == "open":
        path, _, flags = arguments
        _note(event, path, None, bool((flags or 0) & _WRITES))
    else:
        for path, folder in _PATHS.get(event, ()):
            _note(event, arguments[path], None if folder is None else arguments[folder], event not in _LOOKS)


def _note(event: str, path: object, folder: int | None, writes: bool) -> None:
    if not isinstance(path, str | bytes | os.PathLike):
        return  # a handle that was opened before, which was looked at then
    begin = "" if folder is None or folder < 0 else f"/proc/self/fd/{folder}"
    full = os.path.join(os.path.realpath(os.path.join(begin, os.fsdecode(path))), "")
    if full.startswith(_may_not_read) or (writes and not full.startswith(_may_write)):
        os.write(_log, json.dumps([event, full[:-1], "writes" if writes else "reads"]).encode() + b"\n")


def _end() -> None:
    if sys.argv[0] == "main.py":
        os._exit(int(hasattr(sys, "last_type")))


sys.addaudithook(_hook)
atexit.register(_end)  # the first, and so the last that is called
