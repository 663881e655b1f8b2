"""How much memory a run will need, and what to choose on this machine."""

from .anatomy import transformer_on_meta
from .estimate import MemoryEstimate, estimate, plan_table, recommend
from .machine import Machine, in_gib, machine
from .plan import Recommendation

__all__ = [
    "Machine",
    "MemoryEstimate",
    "Recommendation",
    "estimate",
    "in_gib",
    "machine",
    "plan_table",
    "recommend",
    "transformer_on_meta",
]
