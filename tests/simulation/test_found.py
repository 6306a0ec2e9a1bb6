"""What the simulation found, each as small as it can be: faults that are mended, and must not come back."""

from random import Random

from mempool.agreement.rounds import Round, Ticked


def test_a_round_that_waits_long_is_not_ticked_again_and_again() -> None:
    """The controller's loop span from half a second of waiting on, until the freeze was answered."""
    round_ = Round(gate=0, others=[1], bystanders=[], pulls=1, lease_s=30.0)
    round_.begin(0.0)
    now, ticks = 0.0, 0
    while now < 9.0:
        next_s = round_.next_s
        assert next_s is not None
        now = max(now, next_s)
        round_.handle(Ticked(), now)
        ticks += 1
        assert ticks < 10


def test_what_a_round_is_ticked_for_is_due_then_whatever_the_clock_says() -> None:
    """A last bit kept the renewal of a freeze from being due at the moment that was said: ticked for ever."""
    random = Random(281)
    for _ in range(200):
        round_ = Round(gate=0, others=[1], bystanders=[], pulls=1, lease_s=10.0)
        now = random.random() * 1e5
        round_.begin(now)
        for _ in range(5):
            next_s = round_.next_s
            assert next_s is not None
            round_.handle(Ticked(), next_s)
            assert round_.next_s is None or round_.next_s > next_s
