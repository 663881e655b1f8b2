"""What a file on the user's disk really is, told from its first bytes, not from its name.

Model folders hold more than models: half downloads, web pages that a browser saved under the model's name, pointers
that git left in place of the file, pickles that somebody renamed. Each is refused with what it is.
"""

from __future__ import annotations

import codecs
import os
from pathlib import Path
from typing import Literal

from ..errors import ModelFileError
from .stored_tensors import unreadable

GGUF_MAGIC = b"GGUF"
PICKLE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle")
PARTIAL_SUFFIXES = (".incomplete", ".part", ".partial", ".crdownload", ".download", ".aria2", ".tmp")
HEAD = 512
"""Bytes that are looked at."""
EXPECTED = "a .safetensors or .gguf file"


def file_kind(path: Path) -> Literal["safetensors", "gguf"]:
    """Raises ModelFileError that says what the file is instead: missing, empty, a half download, a pickle, a page…

    `safetensors` means that the file claims to be one; whether its header holds is for the reader to say.
    """
    if not os.path.exists(path):  # unlike Path.exists, False for names that no disk can hold
        raise ModelFileError(f"There is no '{path}'. Check the name, or choose another file; expected {EXPECTED}.")
    if not path.is_file():
        raise ModelFileError(f"'{path}' is not a file; expected {EXPECTED}.")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(HEAD)
    except OSError as error:
        raise unreadable(path, error) from error
    _refuse_half_download(path, size, head)
    if head.startswith(GGUF_MAGIC):
        return "gguf"
    # The eight bytes of a safetensors length can look like a pickle's beginning, hence the brace first.
    if head[8:9] == b"{":
        return "safetensors"
    _refuse_pickle(path, head)
    _refuse_text(path, head)
    if path.suffix in (".safetensors", ".sft"):
        return "safetensors"
    raise ModelFileError(
        f"The file '{path}' is neither safetensors nor GGUF: it begins with the bytes {head[:8].hex(' ')}. "
        f"Choose {EXPECTED}."
    )


def _refuse_half_download(path: Path, size: int, head: bytes) -> None:
    control = path.with_name(path.name + ".aria2")  # lies beside a file of full length until the download is done
    if path.suffix in PARTIAL_SUFFIXES:
        found = f"its name ends in {path.suffix}, as downloads do that are under way or broke off"
    elif control.exists():
        found = f"'{control.name}' beside it says that it is still being downloaded"
    elif size == 0:
        found = "it is empty (0 bytes)"
    elif not any(head):
        found = "it begins with zeros, as a file does whose space was reserved and never filled"
    else:
        return
    raise ModelFileError(
        f"The file '{path}' is not complete: {found}. Let the download finish or start it again, or "
        "choose another file."
    )


def _refuse_pickle(path: Path, head: bytes) -> None:
    is_zip = head.startswith(b"PK\x03\x04")
    is_pickle = len(head) > 1 and head[0] == 0x80 and head[1] <= 5
    if is_zip or is_pickle or path.suffix.lower() in PICKLE_SUFFIXES:
        raise ModelFileError(
            f"The file '{path}' is a pickle or an archive (PyTorch's .pt, .ckpt and .bin files are), whatever its name "
            "says. Pickles can run programs while they are opened and are never read. Use the model's .safetensors or "
            ".gguf release instead."
        )


def _refuse_text(path: Path, head: bytes) -> None:
    try:
        # The last character may be cut where the head ends.
        text = codecs.getincrementaldecoder("utf-8")().decode(head, final=len(head) < HEAD).strip()
        line = text.partition("\n")[0].rstrip()
    except UnicodeDecodeError:
        return
    if text.startswith("version https://git-lfs"):
        found = "a pointer that git left in place of the real file. Run `git lfs pull` in its folder"
    elif text.lower().startswith(("<!doctype", "<html", "<?xml", "<head")):
        found = "a web page that was saved in place of the model, perhaps a login or error page. Download it again"
    elif line and line.isprintable():
        found = f"a text that begins with '{line[:60]}', perhaps a server's error message. Download it again"
    else:
        return
    raise ModelFileError(f"The file '{path}' is no model but {found}, or choose {EXPECTED}.")
