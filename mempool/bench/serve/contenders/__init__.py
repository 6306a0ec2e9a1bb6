"""Ways to look up what a table holds: in this process, in a pool, in other libraries' processes; and floors."""

from mempool.bench.serve.contenders.contender import Contender, LookUp

__all__ = ["Contender", "LookUp"]
