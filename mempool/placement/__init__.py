"""Which shard owns which page of a table, and the plan of moves from one placement to another: pure functions.

Nothing here sends, waits or knows an address; the controller carries moves out and ``client`` routes by them.
"""

from mempool.placement.assignment import Assignment
from mempool.placement.moves import Moves, apply_moves, moves, rounds
from mempool.placement.planner import plan
from mempool.placement.routing import Route, routes
from mempool.placement.summary import LayoutKind, ShardSummary, describe, layout_kind
from mempool.placement.tables import assignment_of, plan_table

__all__ = [
    "Assignment",
    "LayoutKind",
    "Moves",
    "Route",
    "ShardSummary",
    "apply_moves",
    "assignment_of",
    "describe",
    "layout_kind",
    "moves",
    "plan",
    "plan_table",
    "rounds",
    "routes",
]
