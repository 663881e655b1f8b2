"""A ComfyUI that is watched: which files it touches that are none of its business; see watched/sitecustomize.py."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from _host import Host, start_host
from chroma_core.comfy.server import PACK_NAME

WATCHED = Path(__file__).resolve().parent / "watched"
TAGGER = Path(__file__).resolve().parent / "tagger"
"""A pack of nodes of somebody else, beside ours."""
NOT_OURS = "none_of_its_business"
"""A folder beside those of a watched ComfyUI, with images and a LoRA, which no request may reach."""
PACKS = ("--whitelist-custom-nodes", PACK_NAME, TAGGER.name)
"""The packs that a watched ComfyUI loads."""


@contextmanager
def watched_host(base: Path) -> Iterator[Host]:
    """A running ComfyUI as `start_host` starts it; `strays` tells what it touched."""
    foreign = base / NOT_OURS
    foreign.mkdir(parents=True)
    roots = [base / name for name in ("output", "temp", "user", "models/chromakit", "input")]
    roots += [Path(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}"), Path("/dev")]
    watch = {"log": str(_log(base)), "may_write": list(map(str, roots)), "may_not_read": [str(foreign)]}
    before = {name: os.environ.get(name) for name in ("CHROMAKIT_WATCH", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE")}
    os.environ["CHROMAKIT_WATCH"] = json.dumps(watch)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(WATCHED), before["PYTHONPATH"]]))
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    try:
        (base / "custom_nodes").mkdir()
        shutil.copytree(TAGGER, base / "custom_nodes" / TAGGER.name)
        host = start_host(base, extra=PACKS)
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
    with host:
        yield host


def strays(base: Path) -> list[list[str]]:
    """What the watched process did outside of its folders: [event, path, `reads` or `writes`], each once."""
    lines = _log(base).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in dict.fromkeys(lines)]


def _log(base: Path) -> Path:
    return base.with_name(f"{base.name}-strays.jsonl")
