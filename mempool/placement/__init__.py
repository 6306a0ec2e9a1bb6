"""Which shard owns which page of a table, and the plan of moves from one placement to another: pure functions.

Nothing here sends, waits or knows an address; the controller carries moves out and ``client`` routes by them.
"""

from mempool.placement.assignment import Assignment
from mempool.placement.moves import Moves, Rounds, apply_moves, moves, rounds
from mempool.placement.planner import plan
from mempool.placement.routing import Route, routes
from mempool.placement.summary import LayoutKind, ShardSummary, describe, layout_kind

__all__ = [
    "Assignment",
    "LayoutKind",
    "Moves",
    "Rounds",
    "Route",
    "ShardSummary",
    "apply_moves",
    "describe",
    "layout_kind",
    "moves",
    "plan",
    "rounds",
    "routes",
]
