"""Do the runtimes paint the same picture, and if not, which number makes the difference?

case.py        what is painted            painted.py     what came out, and how two of them differ
runtimes.py    paint it in this process, through the command line, through diffusers
comfyui.py     … through the nodes, in a real ComfyUI
preview.py     … as the trainer's preview showed it
factors.py     one picture again with one number changed at a time
report.py      pairs and factors as a table, as JSON, and side by side
"""

from .case import Case, NotRun
from .factors import FactorKind, vary
from .painted import Difference, Painted, compare
from .preview import read_preview, train_briefly
from .report import Report, side_by_side
from .runtimes import in_process, through_command_line, through_diffusers

__all__ = [
    "Case",
    "Difference",
    "FactorKind",
    "NotRun",
    "Painted",
    "Report",
    "compare",
    "in_process",
    "read_preview",
    "side_by_side",
    "through_command_line",
    "through_diffusers",
    "train_briefly",
    "vary",
]
