"""A few kills of the controller in rescales; more: ``python -m tests.hostile.controller_kills``."""

from tests.integration.kills import kill_controllers
from tests.integration.pools import RayPool, Training


def test_the_same_command_ends_a_rescale_whose_controller_was_killed(shared_pool: RayPool) -> None:
    before = len(shared_pool.status()["shards"])
    with shared_pool.connect() as pool:
        training = Training(pool, "moved", num_slots=20_000)
        outcome = kill_controllers(shared_pool, training, kills=2, seed=3, after_s=0.3)
        assert outcome.repeats == [1, 1], str(outcome)
        training.assert_exact(pool)
        pool.drop_table("moved")
        pool.rescale(before)
