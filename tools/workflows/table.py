"""The example workflows, in the order of the index: a newcomer's first, then what else there is.

`build.py` turns each into its window form and its API form. The host lists templates by file name and knows
no index of a pack's own, so the first ones carry their place in their names.
"""

from __future__ import annotations

from .parts import Workflow
from .presets import presets
from .training import FIRST_LORA, TRAINING_WORKFLOWS
from .using import FIRST_PICTURE, USE_LORA, USING_WORKFLOWS


def workflows() -> tuple[Workflow, ...]:
    """All of them. A function, because the presets ask the pack itself, which needs torch."""
    return (FIRST_PICTURE, FIRST_LORA, USE_LORA, *presets(), *TRAINING_WORKFLOWS, *USING_WORKFLOWS)
