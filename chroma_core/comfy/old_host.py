"""What the pack says on a ComfyUI that is too old for it: one sentence, in the log and in the list of nodes.

Imported before anything else of the pack, by versions of ComfyUI that know none of the interfaces it is written for:
this file needs Python alone.
"""

from __future__ import annotations

import re
from typing import Any

OLDEST = "0.16.3"
"""The oldest ComfyUI on which the pack's nodes, jobs and routes have been run; `requires-comfyui` in pyproject.toml."""

NODE_ID = "ChromaKitNeedsANewerComfyUI"


def complaint(found: str | None) -> str | None:
    """The sentence for a ComfyUI of version `found` (None: one that does not say); None where it will do."""
    if found is not None and _numbers(found) >= _numbers(OLDEST):
        return None
    return f"ChromaKit needs ComfyUI {OLDEST} or newer, and this is {found or 'an older one'}: update ComfyUI."


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def placeholder(sentence: str) -> type:
    """A node, in the form that every version of ComfyUI reads, that only says so: in its name, and when it is run."""

    class NeedsANewerComfyUI:
        CATEGORY = "Chroma"
        DESCRIPTION = sentence
        RETURN_TYPES = ()
        FUNCTION = "refuse"
        OUTPUT_NODE = True

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:
            return {"required": {}}

        def refuse(self) -> None:
            raise RuntimeError(sentence)

    return NeedsANewerComfyUI
