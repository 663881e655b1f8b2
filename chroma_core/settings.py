"""The base of all values that are parsed from what a user wrote, and their fields that are options."""

from __future__ import annotations

import dataclasses
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from typing_extensions import Self

from .errors import ConfigError, check_text
from .options import Option


def option(default: Any, sentence: str, **about: Any) -> Any:
    """A field of `Settings` that is an option: `rank: int = option(16, "Size of the LoRA.", ge=1, le=1024, most=512)`.

    Args:
        default: `...` for one that the user has to give.
        sentence, about: of `Option`; what that does not know is pydantic's, the range for one.
    """
    shown = {field.name: about.pop(field.name) for field in dataclasses.fields(Option) if field.name in about}
    extra: dict[str, Any] = {"option": Option(sentence, **shown)}
    return Field(default, json_schema_extra=extra, **about)


class Settings(BaseModel):
    """A frozen value with no unknown fields, parsed from a node, a TOML file or JSON. `parse` is for a user's text."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def parse(cls, data: Any) -> Self:
        """`model_validate` with the errors as one paragraph. Raises ConfigError, also for text that is none."""
        check_text(data, "These settings cannot be used: ")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ConfigError(f"These settings cannot be used: {'; '.join(map(_line, error.errors()))}.") from error


def _line(error: Any) -> str:
    where = ".".join(map(str, error["loc"])) or "settings"
    if error["type"] == "extra_forbidden":
        return f"{where} is not a known option (check its spelling)"
    message = error["msg"].removeprefix("Value error, ")
    if isinstance(error["input"], dict | list) or error["type"] == "missing":
        return f"{where}: {message}"
    return f"{where}: {message} (found {error['input']!r})"
