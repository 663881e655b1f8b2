"""The weights of one part of a model, in whatever file or folder they come: names, shapes, and reading one at a time.

Nothing but headers (and the scales of quantised rows) is read on opening; a tensor is read, unpacked and cast when it
is asked for, whole or some rows of it. What a file cannot be used for is refused on opening, with the reason: model
folders hold half downloads, web pages that a browser saved under the model's name, pointers that git left in place of
the file, and pickles that somebody renamed. The first bytes tell, not the name.
"""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import ModelFileError, first_few
from ..files import strict_json
from .gguf_files import GGUF_MAGIC, read_gguf
from .identify import PARTS, Part, find_part
from .safetensors_files import read_safetensors
from .scales import join_scales
from .stored_tensors import DOWNLOAD_AGAIN, Scheme, Stored, damaged, unreadable

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


INDEX_SUFFIX = ".index.json"
_INDEX = re.compile(r"\.safetensors\.index(\.[^.]+)?\.json$")
"""The end of an index's name; before `.json` the variant (`fp16`), as diffusers' and transformers' savers put it."""

USUAL_NAMES = {
    f"{stem}.safetensors{suffix}" for stem in ("diffusion_pytorch_model", "model") for suffix in ("", INDEX_SUFFIX)
}
"""How diffusers and transformers name a component's weights; in a folder these go before variants (`model.fp16`)."""

_PACKED = re.compile(r"\.weight\.(absmax|quant_map|nested_absmax|quant_state\.bitsandbytes__\w+)$|\.SCB$")
"""What bitsandbytes keeps beside its 4-bit and 8-bit weights."""

_SHARD = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.(?P<suffix>safetensors|gguf)$")


class Weights:
    """Named tensors in files. Any number of threads may read; files are open only while something is read.

    path: the file or folder that was opened, for messages.
    files: the files that hold the tensors.
    metadata: texts of the header (`general.architecture` of a GGUF file, `modelspec.*` …), of all shards together.
    shapes: of the logical tensors, in torch's order; scales and markers of quantised formats are not listed.
    storage: how each is stored, e.g. `bf16`, `fp8`, `scaled fp8`, `nvfp4`, `Q4_K`.
    schemes: of those that are stored as a quantised layer of ours holds them, the scheme (see `codes`).
    """

    def __init__(
        self, path: Path, files: tuple[Path, ...], metadata: Mapping[str, str], tensors: Mapping[str, Stored]
    ) -> None:
        self.path = path
        self.files = files
        self.metadata: Mapping[str, str] = dict(metadata)
        self.shapes: Mapping[str, tuple[int, ...]] = {name: tensor.shape for name, tensor in tensors.items()}
        self.storage: Mapping[str, str] = {name: tensor.label for name, tensor in tensors.items()}
        self.schemes: Mapping[str, Scheme] = {
            name: tensor.scheme for name, tensor in tensors.items() if tensor.scheme is not None
        }
        self._tensors = dict(tensors)

    def read(self, name: str, dtype: torch.dtype, rows: tuple[int, int] | None = None) -> Tensor:
        """A new contiguous CPU tensor that owns its memory: unpacked and scaled in fp32, rounded once to `dtype`.

        Args:
            rows: first and one-past-last row (of dimension 0) to read; the others are not touched.
        Raises:
            ModelFileError: no such tensor; a stored type that weights do not come in; the file was cut or replaced.
            ValueError: rows that the tensor does not have.
        """
        tensor = self._tensors.get(name)
        if tensor is None:
            raise ModelFileError(f"'{self.path}' holds no tensor '{name}'. The file is incomplete or of another model.")
        if rows is not None and not (tensor.shape and 0 <= rows[0] <= rows[1] <= tensor.shape[0]):
            raise ValueError(f"rows {rows} of '{name}', whose shape is {list(tensor.shape)}")
        return tensor.read(dtype, rows)

    def codes(self, name: str, rows: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
        """Of a tensor in `schemes`: its codes as they are stored [rows, columns], and their scales, fp32 [rows, 1].

        Raises ModelFileError as `read` does.
        """
        return self._tensors[name].codes(rows)


def open_weights(path: Path | str) -> Weights:
    """Open a .safetensors/.sft or .gguf file, a *.index.json with its shards, or the folder of one component.

    A file that is one shard of several opens all of them, by the index beside it. What a file is shows in its first
    bytes; its name decides nothing.

    Raises ModelFileError, one paragraph that names the file, what it is or lacks, and what to do.
    """
    path = Path(path)
    file = _in_folder(path) if os.path.isdir(path) else path
    if file.name.endswith(INDEX_SUFFIX) or _INDEX.search(file.name):
        return _open_index(path, file)
    kind = file_kind(file)
    shard = _SHARD.match(file.name)
    if shard and kind == "safetensors" and int(shard["count"]) > 1:
        return _open_index(path, _index_of(file, shard))
    if kind == "gguf":
        metadata, tensors = read_gguf(file)
        return Weights(path, (file,), metadata, tensors)
    metadata, tensors = read_safetensors(file)
    _refuse_packed(path, tensors)
    return Weights(path, (file,), metadata, join_scales(file, [metadata], tensors))


def parts_in(path: Path | str) -> frozenset[Part]:
    """The parts of Chroma that one file holds, by the names in its header; none for whatever is no weights file."""
    path = Path(path)
    try:
        tensors = (read_gguf if file_kind(path) == "gguf" else read_safetensors)(path)[1]
    except ModelFileError:
        return frozenset()
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    return frozenset(part for part in PARTS if find_part(shapes, part) is not None)


def _refuse_packed(path: Path, tensors: Mapping[str, Stored]) -> None:
    """Raises ModelFileError for weights that bitsandbytes packed: their shapes say nothing of the layers."""
    packed = next((name for name in tensors if _PACKED.search(name)), None)
    if packed is not None:
        raise ModelFileError(
            f"The model '{path}' was quantised by bitsandbytes (it has '{packed}'), and is not read so. Take the "
            "unquantised file, and choose the precision nf4-bnb, nf4 or int8: it is then quantised as it is loaded."
        )


def _in_folder(folder: Path) -> Path:
    """The index, or the only file, of a component folder."""
    try:
        files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    except OSError as error:
        raise unreadable(folder, error) from error
    indexes = [p for p in files if _INDEX.search(p.name)]
    models = [p for p in files if p.suffix in (".safetensors", ".sft")]
    for found in (indexes, models, [p for p in files if p.suffix == ".gguf"]):
        preferred = [p for p in found if p.name in USUAL_NAMES] or found
        if len(preferred) == 1 or (preferred and all(_SHARD.match(p.name) for p in preferred)):
            return preferred[0]
        if preferred:
            raise ModelFileError(
                f"The folder '{folder}' holds several models "
                f"({first_few((p.name for p in preferred), 4)}), and none has the usual name. Choose one of the files."
            )
    if (folder / "model_index.json").is_file() or any((folder / part).is_dir() for part in ("transformer", "vae")):
        found = "it is a whole model; choose the sub-folder of one part, or give it as the model's folder"
    elif partial := [p.name for p in files if p.suffix in PARTIAL_SUFFIXES]:
        found = f"'{partial[0]}' is an unfinished download; let it finish or start it again"
    elif pickles := [p.name for p in files if p.suffix in PICKLE_SUFFIXES]:
        found = f"'{pickles[0]}' is a pickle, which is never read; get the .safetensors release"
    else:
        found = "choose another folder, or download the model again"
    raise ModelFileError(f"There are no weights in the folder '{folder}' (expected {EXPECTED}): {found}.")


def _index_of(file: Path, shard: re.Match[str]) -> Path:
    stem, _, variant = shard["stem"].rpartition(".")
    index = file.with_name(f"{shard['stem']}.safetensors{INDEX_SUFFIX}")
    of_variant = file.with_name(f"{stem}.safetensors.index.{variant}.json")
    if stem and of_variant.is_file():
        return of_variant
    if not index.is_file():
        raise ModelFileError(
            f"The file '{file}' is one of {int(shard['count'])} parts of a model, and the index that says what the "
            f"parts hold, '{index.name}', is not beside it. Download the index and all parts into one folder."
        )
    return index


def _open_index(path: Path, index: Path) -> Weights:
    folder, listed = index.parent, _weight_map(index)
    shards = sorted(set(listed.values()))
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing:
        raise ModelFileError(
            f"The model '{index}' is incomplete: {len(missing)} of its {len(shards)} parts are not beside it "
            f"({first_few(missing)}). Download them into the same folder; "
            "parts that are there can stay."
        )
    metadatas: list[dict[str, str]] = []
    tensors: dict[str, Stored] = {}
    for name in shards:
        if file_kind(folder / name) != "safetensors":
            raise _mismatch(index, f"its part '{name}' is no safetensors file")
        metadata, held = read_safetensors(folder / name)
        metadatas.append(metadata)
        if twice := sorted(set(held) & set(tensors)):
            other = tensors[twice[0]].file.path.name
            raise _mismatch(index, f"the tensor '{twice[0]}' is in '{other}' and in '{name}'")
        tensors |= held
    for name, shard in listed.items():
        if name not in tensors or tensors[name].file.path.name != shard:
            raise _mismatch(index, f"the index says that '{shard}' holds the tensor '{name}', but it does not")
    if unlisted := sorted(set(tensors) - set(listed)):
        raise _mismatch(index, f"the index does not list the tensor '{unlisted[0]}'")
    _refuse_packed(path, tensors)
    merged = {key: value for metadata in reversed(metadatas) for key, value in metadata.items()}
    return Weights(path, tuple(folder / name for name in shards), merged, join_scales(index, metadatas, tensors))


def _mismatch(index: Path, found: str) -> ModelFileError:
    return ModelFileError(
        f"The parts of the model '{index}' do not belong together: {found}. Parts of two releases may be mixed: "
        "download the index and all parts again into an empty folder."
    )


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name → shard; shards are names of files beside the index, never paths."""
    if not index.is_file():
        raise ModelFileError(f"There is no '{index}'. Check the name, or choose another file; expected {EXPECTED}.")
    try:
        value: Any = strict_json(index.read_bytes())
    except OSError as error:
        raise unreadable(index, error) from error
    except ValueError as error:
        raise damaged(index, f"it is no JSON ({error})") from error
    listed = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
        raise ModelFileError(f"The file '{index}' is no index of a model: it has no weight_map. {DOWNLOAD_AGAIN}")
    for name in listed.values():
        if PurePosixPath(name).name != name or "\\" in name or ":" in name or name in ("", ".", ".."):
            raise ModelFileError(
                f"The index '{index}' points to '{name}', but parts must lie beside it. {DOWNLOAD_AGAIN}"
            )
    return listed
