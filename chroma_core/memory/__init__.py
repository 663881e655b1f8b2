"""How much memory a run will need, and what to choose on this machine."""

from .anatomy import transformer_on_meta
from .machine import Machine, in_gib, machine
from .plan import Recommendation, Settings, heldout_rows, peaks, recommend, recomputing_least
from .table import MemoryEstimate, MemoryPlan, PlanRow, estimate, memory_plan

__all__ = [
    "Machine",
    "MemoryEstimate",
    "MemoryPlan",
    "PlanRow",
    "Recommendation",
    "Settings",
    "estimate",
    "heldout_rows",
    "in_gib",
    "machine",
    "memory_plan",
    "peaks",
    "recommend",
    "recomputing_least",
    "transformer_on_meta",
]
