"""Trainers that commit at once make one order, which an oracle follows to the bit."""

from tests.agreement.two_trainers import check


def test_two_trainers_at_once_are_one_order_on_three_shards() -> None:
    assert check(3, 24).startswith("24 steps of 2 trainers on 3 shards")
