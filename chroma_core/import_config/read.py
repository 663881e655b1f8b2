"""What all foreign configurations are made of: files (JSON with comments and trailing commas, YAML, TOML), values,
previews, and names of layers."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tomlkit
import tomlkit.exceptions
import yaml

from ..errors import ConfigError
from ..files import each_once
from ..names.transformer import to_diffusers_modules

MAX_BYTES = 4 * 2**20
"""A configuration is a few kilobytes; anything of this size is a mistake."""

_COMMENT = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/\*.*?\*/', re.DOTALL)
_TRAILING_COMMA = re.compile(r'"(?:\\.|[^"\\\n])*"|,(?=\s*[\]}])')


class Unreadable(ValueError):
    """A value that the foreign tool could not use either. The text says what it must be.

    `option`: whose value it is, where another one asked for it.
    """

    def __init__(self, must: str, option: str = "") -> None:
        super().__init__(must)
        self.option = option


class _Refused(Exception):
    """Something that the parser lets pass and a configuration must not have."""


def read_lines(path: Path) -> list[str]:
    """The lines of a text file. Raises ConfigError."""
    return _content(path).splitlines()


def _content(path: Path) -> str:
    try:
        if path.is_file() and path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"'{path.name}' is larger than {MAX_BYTES >> 20} MiB and so no configuration file.")
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"The file '{path}' cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"'{path.name}' is not UTF-8 text ({error.reason} at byte {error.start}).") from error


def read_config(path: Path) -> Any:
    """The content of a `.json`, `.jsonc`, `.yaml`, `.yml` or `.toml` file. Raises ConfigError with file and place."""
    content = _content(path)
    suffix = path.suffix.lower()
    if not content.strip():
        raise ConfigError(f"'{path.name}' is empty.")
    is_yaml = suffix in (".yaml", ".yml") or (suffix not in (".json", ".jsonc") and content.lstrip()[0] not in "{[")
    try:
        if suffix == ".toml":
            return _toml(content, path.name)
        return _yaml(content, path.name) if is_yaml else _json(content, path.name)
    except _Refused as error:
        raise ConfigError(f"'{path.name}': {error}") from error
    except RecursionError as error:
        raise ConfigError(f"'{path.name}' is nested too deeply to be a configuration file.") from error


def _json(content: str, name: str) -> Any:
    # Comments and commas become blanks, so that a place in an error message is the place in the file.
    blanked = _COMMENT.sub(lambda m: m[0] if m[0][0] == '"' else re.sub(r"[^\n]", " ", m[0]), content)
    blanked = _TRAILING_COMMA.sub(lambda m: m[0] if m[0][0] == '"' else " ", blanked)
    try:
        twice = "the option {!r} stands there twice. Remove one of the two."
        return json.loads(blanked, object_pairs_hook=each_once(twice), parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"'{name}' is not valid JSON: {error.msg} in line {error.lineno}, column {error.colno}. (Comments and "
            "trailing commas are allowed.)"
        ) from error
    except ValueError as error:
        raise _Refused(str(error)) from error


def _no_constant(word: str) -> float:
    if word == "NaN":
        raise _Refused("it contains NaN, which is no number.")
    return float(word)  # OneTrainer writes Infinity; no option that is read takes it


def _toml(content: str, name: str) -> Any:
    try:
        return tomlkit.parse(content).unwrap()
    except tomlkit.exceptions.TOMLKitError as error:
        raise ConfigError(f"'{name}' is not valid TOML: {error}.") from error


def _yaml(content: str, name: str) -> Any:
    try:
        return yaml.load(content, _Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        what = getattr(error, "problem", None) or type(error).__name__
        raise ConfigError(f"'{name}' is not valid YAML: {what}{where}.") from error
    except ValueError as error:  # a date such as 2000-99-99
        raise ConfigError(f"'{name}' is not a configuration file: {error}.") from error


class _Loader(yaml.SafeLoader):
    """Plain data only, and a repeated key is an error, as YAML's own specification has it."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge":
                word = key.value if isinstance(key.value, str) else str(key.start_mark)
                if word in seen:
                    line = key.start_mark.line + 1
                    raise _Refused(f"the option {word!r} stands twice in line {line}'s section. Remove one of the two.")
                seen.add(word)
        return super().construct_mapping(node, deep)


def whole(value: Any) -> int:
    """A whole number, also written as text (`"16"`) or with a point (16.0)."""
    read = number(value)
    if read != int(read):
        raise Unreadable("a whole number")
    return int(read)


def number(value: Any) -> float:
    """A finite number, also written as text: YAML reads `1e-4` as text, and SimpleTuner's configure writes text."""
    try:
        read = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        read = math.nan
    if not math.isfinite(read):
        raise Unreadable("a number")
    return read


def switch(value: Any) -> bool:
    """true or false, also written as text."""
    known = {"true": True, "false": False}
    read = known.get(value.strip().lower()) if isinstance(value, str) else value
    if not isinstance(read, bool):
        raise Unreadable("true or false")
    return read


def text(value: Any) -> str:
    """A text; a number is taken as it is written."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise Unreadable("a text")
    return str(value)


def word(value: Any) -> str:
    """A text in small letters."""
    return text(value).strip().lower()


class Epochs(float):
    """A number of epochs, which becomes steps once the images are counted, see `job.finish`."""


class ForeignPath(str):
    """A path as the foreign file has it: made absolute where it exists, see `resolve`."""


def resolve(value: Any, folders: Sequence[Path]) -> Any:
    """Foreign paths are relative to wherever the tool was started: taken from the first folder where they exist.

    One that exists nowhere stays as it stands (and is then relative to the job file).
    """
    if not isinstance(value, ForeignPath):
        return value
    for folder in folders:
        place = folder / os.path.expanduser(value)
        if place.exists():
            return str(place.resolve())
    return str(value)


def ask(given: Mapping[str, Any], option: str, read: Callable[[Any], Any]) -> Any:
    """The value of one of the given options, read. Raises Unreadable with its name."""
    try:
        return read(given[option])
    except Unreadable as error:
        raise Unreadable(str(error), error.option or option) from error


def is_on(given: Mapping[str, Any], option: str) -> bool:
    """Whether a switch among the given options is on; it is off where it is not stated."""
    return option in given and ask(given, option, switch)


def is_off(value: Any) -> bool:
    """Whether the value says that an option is not used: false, 0, empty, `none`, `no`."""
    return value in (None, False, 0, "", "false", "none", "None", "no", "0", "0.0") or value in ([], {})


# Previews: a text with settings behind it (`a fox --w 512 --n ugly`), or an object.

PREVIEW = {"width": whole, "height": whole, "seed": whole, "steps": whole, "guidance": number, "negative": text}
"""The fields of a `PreviewPrompt` besides its prompt, and how a foreign value is read."""
FLAGS = {"w": "width", "h": "height", "d": "seed", "seed": "seed", "s": "steps", "steps": "steps"}
FLAGS |= {"l": "guidance", "cfg": "guidance", "n": "negative"}
"""What ai-toolkit and sd-scripts read behind a prompt, `--` before each."""


def preview_of_line(line: str) -> tuple[dict[str, Any], list[str]]:
    """A prompt with its settings, and those of them that mean nothing here."""
    prompt, *settings = re.split(r"\s+--(?=\w)", line.strip())
    flags = [(*setting.partition(" ")[::2], f"--{setting.strip()}") for setting in settings]
    values, left = _preview((FLAGS.get(flag.lower(), ""), value.strip(), said) for flag, value, said in flags)
    return {"prompt": prompt.strip(), **values}, left


def preview_of_object(item: Mapping[str, Any], names: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """The same of an object; `names`: its names → fields of ours. Null is not set."""
    return _preview((names.get(key, ""), value, f"{key} = {value}") for key, value in item.items() if value is not None)


def _preview(settings: Iterable[tuple[str, Any, str]]) -> tuple[dict[str, Any], list[str]]:
    values: dict[str, Any] = {}
    left = []
    for name, value, said in settings:
        if not name or name == "seed" and whole(value) < 0:
            left.append(said)
        else:
            values[name] = PREVIEW.get(name, text)(value)
    return values, left


# Layers: ai-toolkit and sd-scripts know the model by its original names (`double_blocks.3.img_attn.qkv`), in which one
# layer holds several of ours; OneTrainer by ours (`transformer_blocks.3.attn.to_q`).

_LAYERS = {
    "double_blocks": [f"{s}_{layer}" for s in ("img", "txt") for layer in ("attn.qkv", "attn.proj", "mlp.0", "mlp.2")],
    "single_blocks": ["linear1", "linear2"],
}
BLOCKS = {
    name: tuple(part.name for part in to_diffusers_modules(name) or ())
    for kind, count in {"double_blocks": 19, "single_blocks": 38}.items()
    for block in range(count)
    for layer in _LAYERS[kind]
    for name in [f"{kind}.{block}.{layer}"]
}
"""The 228 linear layers of Chroma's blocks by their original names, and the 418 of ours that they hold."""
_INSIDE = tuple(part for parts in BLOCKS.values() for part in parts)
_OUTSIDE = ("x_embedder", "context_embedder", "proj_out")
"""Our names of the layers outside the blocks, the approximator's apart."""


def original(keep: Callable[[str], bool]) -> list[str]:
    """Patterns for `lora.target`, for the layers whose original name is kept; empty where none is."""
    return _patterns([part for name, parts in BLOCKS.items() if keep(name) for part in parts])


def ours(keep: Callable[[str], bool]) -> list[str]:
    """Patterns for the layers whose name with us is kept; empty where none is."""
    return _patterns([name for name in (*_INSIDE, *_OUTSIDE) if keep(name)])


def _starred(name: str) -> str:
    kind, _, rest = name.partition(".")
    return f"{kind}.*.{rest.partition('.')[2]}" if rest else name


_EVERYWHERE = Counter(map(_starred, _INSIDE))


def _patterns(names: Sequence[str]) -> list[str]:
    """The names; a layer that is kept in every block as one with a star for the block's number."""
    outside = [name for name in names if name in _OUTSIDE]
    if len(names) - len(outside) == len(_INSIDE):
        return ["transformer_blocks.*", "single_transformer_blocks.*", *outside]
    seen = Counter(map(_starred, names))
    return list(dict.fromkeys(s if seen[s := _starred(name)] == _EVERYWHERE[s] else name for name in names))
