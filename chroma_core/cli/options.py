"""What several commands share: parsers that are filled when needed, flags from options, the type of `--lora`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError

if TYPE_CHECKING:
    from ..loading.spec import LoraUse


class Command(argparse.ArgumentParser):
    """One command. `options` adds its options when it is first asked for, so that naming it imports nothing heavy."""

    def __init__(self, *args: Any, options: Callable[[argparse.ArgumentParser], None] | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._options = options

    def complete(self) -> Command:
        """The parser with its options."""
        if (add := self._options) is not None:
            self._options = None
            add(self)
        return self

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        """As the base has it, with the options."""
        return super(Command, self.complete()).parse_known_args(*args, **kwargs)


def add_flag(parser: argparse.ArgumentParser, owner: type, field: str, flag: str = "", **changes: Any) -> None:
    """The flag for the option `field` of `owner` (see `chroma_core.options`); `changes` are what this command has
    otherwise, `flag` the name where it is not the option's."""
    from ..options import option_of

    option = option_of(owner, field)
    given: dict[str, Any] = {"default": option.default, "help": option.sentence.replace("%", "%%")}
    if option.kind is bool:
        given["action"] = "store_true"
    elif option.choices:
        given["choices"] = list(option.choices)
    elif option.kind in (int, float):
        given["type"] = option.kind
    parser.add_argument(flag or f"--{field.replace('_', '-')}", **{**given, **changes})


def lora_use(text: str) -> LoraUse:
    """FILE[@STRENGTH] as a `LoraUse`: the type of `--lora`. Raises ConfigError."""
    from ..loading.spec import LoraUse

    path, separator, strength = text.rpartition("@")
    if not separator:
        return LoraUse(text)
    try:
        return LoraUse(path, float(strength))
    except ValueError:
        raise ConfigError(f"--lora {text}: what stands after the last @ must be a number, the strength.") from None
