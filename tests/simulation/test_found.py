"""What the simulation found, each as small as it can be: faults that are mended, and must not come back."""

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
