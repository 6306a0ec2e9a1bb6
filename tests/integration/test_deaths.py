"""Trainers, shards and controllers that die or fall silent; more and longer: ``python -m tests.hostile.deaths``."""

import pytest

from tests.integration.deaths import REST_S, controller_dies_creating, trainer_dies
from tests.integration.pools import RayPool
from tests.integration.silences import cut_off, stopped_shard


@pytest.mark.parametrize(("cut", "side", "applied"), [(3, "after", False), (4, "after", True)])
def test_a_dead_trainers_step_is_whole_or_absent(shared_pool: RayPool, cut: int, side: str, applied: bool) -> None:
    """Three shards have prepared it; the decider has decided it, and nobody else was told."""
    found = trainer_dies(shared_pool, cut=cut, side=side)
    assert (found.died, found.applied) == (True, applied), str(found)
    assert found.rescale_s <= shared_pool.trainer_lease_s + REST_S


# It is told so, in a warning.
@pytest.mark.filterwarnings("ignore:(a step|updates) of .* dropped by shards:UserWarning")
def test_a_trainer_cut_off_for_longer_than_its_lease_loses_nothing(shared_pool: RayPool) -> None:
    found = cut_off(shared_pool, shard=1, method="Prepare")
    assert found.silent_s >= shared_pool.trainer_lease_s


@pytest.mark.filterwarnings("ignore:(a step|updates) of .* dropped by shards:UserWarning")
def test_a_shard_that_stands_still_for_longer_than_leases(shared_pool: RayPool) -> None:
    stopped_shard(shared_pool, for_s=3 * shared_pool.trainer_lease_s)


def test_a_controller_killed_inside_create_table(shared_pool: RayPool) -> None:
    found = controller_dies_creating(shared_pool, kills=2, seed=1, slots=60_000, after_s=0.1)
    assert found.kept + found.dropped == 2
