"""Which shard owns which page of a table, and the plan of moves from one placement to another: pure functions.

Nothing here sends, waits or knows an address; ``control`` carries moves out and ``client`` routes by them.
"""

from mempool.placement.assignment import Assignment
from mempool.placement.moves import KeyMove, Move, Round, apply_round, moves, rounds
from mempool.placement.planner import plan
from mempool.placement.routing import Route, routes
from mempool.placement.summary import LayoutKind, ShardSummary, describe, layout_kind

__all__ = [
    "Assignment",
    "KeyMove",
    "LayoutKind",
    "Move",
    "Round",
    "Route",
    "ShardSummary",
    "apply_round",
    "describe",
    "layout_kind",
    "moves",
    "plan",
    "rounds",
    "routes",
]
