"""For the type checker: transformers names whatever it has, unread, which would take a third of the check's time."""

from typing import Any

def __getattr__(name: str) -> Any: ...
