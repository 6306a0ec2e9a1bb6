"""Views of one table that are heard of one after the other, and not in the order in which they were made."""

from dataclasses import replace

from mempool.types import ShardInfo
from mempool.types.pool import merged
from tests.unit.agreement.test_recovery import view


def test_a_view_that_comes_late_takes_back_no_start_of_a_shard() -> None:
    """Simulation, seed 3153: a copy of a controller's that is gone; whoever asked that shard then asked nobody."""
    old, new = ShardInfo(shard=0, address="", incarnation=0), ShardInfo(shard=0, address="a:1", incarnation=5)
    other = ShardInfo(shard=1, address="b:1", incarnation=6)
    known, late = replace(view(1), shards=(new, other)), replace(view(1), shards=(old, other))
    assert merged(known, late).shards == (new, other)
    assert merged(late, known).shards == (new, other)
    assert merged(known, known) is known
    gone = replace(view(1, epoch=2), shards=(new,))
    assert merged(known, gone).shards == (new,), "a shard that a rescale has taken away"
