"""What a process tells of itself: timers and counters."""

from mempool.observe.heat import Heat
from mempool.observe.stages import Stages

__all__ = ["Heat", "Stages"]
