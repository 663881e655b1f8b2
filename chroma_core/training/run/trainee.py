"""What a job trains, as the rest of it sees it: parameters, a file in every checkpoint, and files at the end."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from torch import nn


class Trainee(Protocol):
    """An adapter, or layers of the model itself (see `trainees`).

    noun: what it is called to the user. weights_file: its name in a checkpoint. parameters: fp32, in an order that is
    the same in every run.
    """

    noun: str
    weights_file: str
    parameters: list[nn.Parameter]

    def save(self, path: Path) -> None:
        """Write the parameters, in fp32."""
        ...

    def load(self, path: Path) -> None:
        """Take them from such a file, bit for bit. Raises LoraError or ModelFileError for a damaged one."""
        ...

    def remember(self) -> Callable[[], None]:
        """A way back to the parameters of now, or to those before the first step, for when `load` fails midway."""
        ...

    def base(self, step: int) -> AbstractContextManager[None] | None:
        """The model without what was trained until `step`, inside a `with` block; None where it is not to be had."""
        ...

    def record(self) -> dict[str, Any]:
        """What previews note about it, as JSON values."""
        ...

    def write(self, header: Callable[..., dict[str, str]], suffix: str = "") -> dict[str, str]:
        """Write what the user gets, its name ending in `suffix`; the status fields that say where.

        Args:
            header: `header(architecture, trained)` gives the files' metadata (see `finish.file_metadata`).
        """
        ...
