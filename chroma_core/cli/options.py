"""What several commands share: a parser whose options are added when they are needed, and the type of `--lora`."""

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
