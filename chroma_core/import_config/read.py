"""Reading foreign configuration files: JSON with comments and trailing commas, and YAML."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ..errors import ConfigError

MAX_BYTES = 4 * 2**20
"""A configuration is a few kilobytes; anything of this size is a mistake."""

_COMMENT = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/\*.*?\*/', re.DOTALL)
_TRAILING_COMMA = re.compile(r'"(?:\\.|[^"\\\n])*"|,(?=\s*[\]}])')


class _Repeated(ValueError):
    pass


def read_config(path: Path) -> Any:
    """The content of a `.json`, `.jsonc`, `.yaml` or `.yml` file. Raises ConfigError with the file and the place."""
    try:
        if path.is_file() and path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"'{path.name}' is larger than {MAX_BYTES >> 20} MiB and so no configuration file.")
        content = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"The file '{path}' cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"'{path.name}' is not UTF-8 text ({error.reason} at byte {error.start}).") from error
    suffix = path.suffix.lower()
    if suffix == ".toml":
        raise ConfigError(
            f"'{path.name}' is a TOML file. import-config reads SimpleTuner's config.json and ai-toolkit's YAML; "
            f"a job.toml "
            "of ChromaKit needs no import: `python -m chroma_core train job.toml`."
        )
    if not content.strip():
        raise ConfigError(f"'{path.name}' is empty.")
    if suffix in (".yaml", ".yml") or (suffix not in (".json", ".jsonc") and content.lstrip()[0] not in "{["):
        return _yaml(content, path.name)
    return _jsonc(content, path.name)


def _jsonc(content: str, name: str) -> Any:
    # Comments and commas become blanks, so that a place in an error message is the place in the file.
    blanked = _COMMENT.sub(lambda m: m[0] if m[0][0] == '"' else re.sub(r"[^\n]", " ", m[0]), content)
    blanked = _TRAILING_COMMA.sub(lambda m: m[0] if m[0][0] == '"' else " ", blanked)
    try:
        return json.loads(blanked, object_pairs_hook=_unique, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"'{name}' is not valid JSON: {error.msg} in line {error.lineno}, column {error.colno}. (Comments and "
            f"trailing "
            "commas are allowed.)"
        ) from error
    except _Repeated as error:
        raise ConfigError(f"'{name}': {error}") from error
    except RecursionError as error:
        raise ConfigError(f"'{name}' is nested too deeply to be a configuration file.") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _Repeated(f"the option {key!r} stands there twice. Remove one of the two.")
        found[key] = value
    return found


def _no_constant(word: str) -> Any:
    raise _Repeated(f"it contains {word}, which is no number.")


def _yaml(content: str, name: str) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ConfigError(
            f"'{name}' is a YAML file, and the package PyYAML, which reads it, is not installed: pip install pyyaml."
        ) from error

    class Loader(yaml.SafeLoader):
        """Plain data only, and a repeated key is an error, as YAML's own specification has it."""

        def construct_mapping(self, node, deep=False):
            seen = set()
            for key, _ in node.value:
                if key.tag != "tag:yaml.org,2002:merge":
                    word = key.value if isinstance(key.value, str) else str(key.start_mark)
                    if word in seen:
                        raise _Repeated(
                            f"the option {word!r} stands twice in line {key.start_mark.line + 1}'s section."
                        )
                    seen.add(word)
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(content, Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        what = getattr(error, "problem", None) or type(error).__name__
        raise ConfigError(f"'{name}' is not valid YAML: {what}{where}.") from error
    except _Repeated as error:
        raise ConfigError(f"'{name}': {error} Remove one of the two.") from error
    except (RecursionError, ValueError) as error:
        raise ConfigError(f"'{name}' is not a configuration file: {error}.") from error
