"""How much memory a run will need, and what to choose on this machine."""

from .anatomy import transformer_on_meta
from .estimate import MemoryEstimate, estimate, recommend
from .machine import Machine, in_gib, machine
from .plan import Recommendation
from .table import MemoryPlan, PlanRow, memory_plan, plan_table

__all__ = [
    "Machine",
    "MemoryEstimate",
    "MemoryPlan",
    "PlanRow",
    "Recommendation",
    "estimate",
    "in_gib",
    "machine",
    "memory_plan",
    "plan_table",
    "recommend",
    "transformer_on_meta",
]
