"""What a process tells of itself: timers and counters."""

from mempool.observe.stages import Stages

__all__ = ["Stages"]
