"""Quantised models on disk, so that the next start neither reads the full weights nor quantises again.

One safetensors file a part. Block linears are stored as their back end packs them (`<module>.<suffix>`), everything
else as it is. The header's `chromakit` entry says what the file is: part, precision, configuration, and the version of
the library that packed it. Loading gives the same module, bit for bit.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import ModelFileError
from ..files import check_format
from ..lora.adapters import linear_modules
from ..model.precision import PRECISIONS, Precision, pack_linear, quantisable_linears, unpack_linear
from ..weights.identify import Part
from ..weights.safetensors_files import read_safetensors, write_safetensors
from ..weights.stored_tensors import Stored
from .build import OnPart, Placement, finished, grouped, is_block, set_tensor
from .matching import build_part
from .model_files import file_state

FORMAT = 1
KEY = "chromakit_quantised"


def kept_file(folder: Path, part: Part, chosen: Precision, source: Path) -> Path:
    """Where the quantised copy of a part's files is kept; another name when the files or the library change."""
    text = f"{FORMAT} {part} {chosen.name} {_library_version(chosen)} {file_state(source)}"
    if chosen.dtype != PRECISIONS[chosen.name].dtype:  # what is not quantised has been rounded otherwise
        text += f" {chosen.dtype}"
    return folder / f"chroma-{part}-{chosen.name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.safetensors"


def save_quantised(path: Path, module: nn.Module, part: Part, chosen: Precision, config: dict[str, Any]) -> None:
    """Write a quantised part. The tensors go to the file one by one: no second copy in memory."""
    header = {
        "format": FORMAT,
        "part": part,
        "precision": chosen.name,
        "library_version": _library_version(chosen),
        "config": {k: v for k, v in config.items() if not k.startswith("_")},
    }
    layout = [(name, tensor.to("meta")) for name, tensor in _packed(module, chosen)]
    write_safetensors(path, layout, _packed(module, chosen), {KEY: json.dumps(header)})


def is_quantised_file(path: Path) -> bool:
    """Whether a path is a file that `save_quantised` wrote."""
    return path.suffix == ".safetensors" and path.is_file() and quantised_header(path) is not None


def quantised_header(path: Path) -> dict[str, Any] | None:
    """What a quantised file says of itself: part, precision, configuration, library version. None for other files."""
    try:
        text = read_safetensors(path)[0].get(KEY)
        value = json.loads(text) if text else None
    except (ModelFileError, ValueError):
        return None  # `open_weights` gives the readable error
    return value if isinstance(value, dict) else None


def quantised_config(path: Path, part: Part, chosen: Precision) -> dict[str, Any]:
    """The configuration of a quantised file's module.

    Raises ModelFileError when it is another part, in another precision, of another version of the library, or of a
    later one of ChromaKit.
    """
    header = quantised_header(path)
    if header is None:
        raise ModelFileError(f"'{path}' is not a quantised model that ChromaKit wrote, or it is damaged.")
    check_format(f"'{path.name}'", header.get("format"), FORMAT, ModelFileError)
    if header.get("part") != part:
        raise ModelFileError(f"'{path.name}' holds the {header.get('part')}, not the {part}. Choose another file.")
    if header["precision"] != chosen.name:
        raise ModelFileError(
            f"'{path.name}' holds weights quantised to {header['precision']}, but the precision chosen is "
            f"{chosen.name}. Choose {header['precision']}, or an unquantised file."
        )
    if header["library_version"] != _library_version(chosen):
        raise ModelFileError(
            f"'{path.name}' was written with {chosen.library} {header['library_version']}; installed is "
            f"{_library_version(chosen)}, whose format may differ. Quantise the model again."
        )
    return header["config"]


def load_quantised(path: Path, part: Part, chosen: Precision, placement: Placement, on_part: OnPart) -> nn.Module:
    """Load a quantised part, layer by layer. Raises ModelFileError, as `quantised_config` or if damaged."""
    module = build_part(part, quantised_config(path, part, chosen))
    linears = dict(quantisable_linears(module))
    _, tensors = read_safetensors(path)
    owners = grouped(tensors, lambda name: _owner(name, linears))
    try:
        for i, (owner, names) in enumerate(owners.items()):
            on_part(i, len(owners), owner)
            read = {name: _as_stored(tensors[name]) for name in names}
            if owner in linears:
                packed = {name[len(owner) + 1 :]: tensor for name, tensor in read.items()}
                module.set_submodule(owner, unpack_linear(linears[owner], packed, chosen))
            else:
                for name, tensor in read.items():
                    set_tensor(module, name, tensor.to(chosen.dtype))
            module.get_submodule(owner).to(placement.of(owner))
    except (KeyError, AttributeError) as error:
        raise ModelFileError(f"'{path}' is damaged ({error}). Delete it and quantise the model again.") from error
    on_part(len(owners), len(owners), "")
    return finished(module)


def _as_stored(tensor: Stored) -> Tensor:
    assert tensor.dtype is not None  # what `write_safetensors` writes, torch has
    return tensor.read(tensor.dtype)


def _owner(name: str, linears: Mapping[str, nn.Module]) -> str:
    """The module that a stored tensor belongs to: a quantised linear, whose tensors may lie deeper, or its own."""
    owner = name
    while "." in owner:
        owner = owner.rpartition(".")[0]
        if owner in linears:
            return owner
    return name.rpartition(".")[0]


def _packed(module: nn.Module, chosen: Precision) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the file: block linears as their back end packs them, everything else as it is."""
    linears = {name: layer for name, layer in linear_modules(module).items() if is_block(name)}
    for name, layer in linears.items():
        for suffix, tensor in pack_linear(layer, chosen).items():
            yield f"{name}.{suffix}", tensor
    seen: set[int] = set()
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if _owner(name, linears) not in linears and id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor.detach()


def _library_version(chosen: Precision) -> str:
    if chosen.library is None:
        return ""
    try:
        return importlib.metadata.version(chosen.library)
    except importlib.metadata.PackageNotFoundError:
        return "missing"
