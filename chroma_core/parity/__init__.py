"""Do the runtimes sample the same image, and if not, which number makes the difference?

case.py        what is sampled, what came out, and how two results differ
runtimes.py    sample it in this process, by the command line, by the nodes in a real ComfyUI
with_diffusers.py  … by diffusers' pipeline; imported by who needs it
preview.py     … as the trainer's preview showed it
report.py      pairs of runtimes, and one number changed at a time: as a table, as JSON, and side by side
"""

from .case import Case, Difference, NotRun, Sampled, compare
from .preview import read_preview, train_briefly
from .report import FactorKind, Report, vary
from .runtimes import in_process, through_comfyui, through_command_line

__all__ = [
    "Case",
    "Difference",
    "FactorKind",
    "NotRun",
    "Report",
    "Sampled",
    "compare",
    "in_process",
    "read_preview",
    "through_comfyui",
    "through_command_line",
    "train_briefly",
    "vary",
]
