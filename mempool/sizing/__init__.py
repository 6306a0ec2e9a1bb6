"""What a memory takes: bytes, shards, splits and times of a pool that need not exist. Pure functions, no I/O.

Bytes are the product's own (``types.sizes``, ``placement``); times are predicted by a machine's constants, which
`mempool bench plan` measures. Leaves to others: measuring (``bench``), and how it is shown (``cli``).
"""

from mempool.sizing.demands import Hosts, Model
from mempool.sizing.machine import Costs, Kernels, Machine, Path
from mempool.sizing.plan import Option, Plan, make_plan
from mempool.sizing.split import Holding, Split, split
from mempool.sizing.times import StepTime

__all__ = [
    "Costs",
    "Holding",
    "Hosts",
    "Kernels",
    "Machine",
    "Model",
    "Option",
    "Path",
    "Plan",
    "Split",
    "StepTime",
    "make_plan",
    "split",
]
