"""Traps meet the message that they wait for, and no other."""

from random import Random

import pytest

from mempool.wire import methods
from tests.simulation.faults import Faults
from tests.simulation.run import Outcome, Run
from tests.simulation.traps import Effect, Scene, Trap

pytestmark = pytest.mark.filterwarnings("ignore")  # of processes that were killed with calls under way


def played(seed: int, *traps: Trap, rescales: bool = False) -> tuple[Run, Outcome]:
    run = Run(seed, faults=Faults(scene=Scene(traps=traps, rescales=rescales, tables=False)), encode=False)
    return run, run.play()


@pytest.mark.parametrize("effect", ["comes late", "comes again", "is answered late", "its server stands still"])
def test_as_many_messages_are_met_as_the_trap_says(effect: Effect) -> None:
    run, outcome = played(1, Trap(path=methods.PREPARE.path, effect=effect, for_s=0.5, skip=2, times=3))
    assert run.network.counts[f"trap: Prepare {effect}"] == 3
    assert not outcome.violations


def test_a_controller_dies_when_a_round_has_begun_elsewhere() -> None:
    trap = Trap(path=methods.FREEZE.path, effect="its sender dies", for_s=25.0, only="not first of its round")
    for seed in range(1, 20):
        run, outcome = played(seed, trap, rescales=True)
        if run.network.counts["trap: Freeze its sender dies"]:
            assert outcome.marks["a round that ended undecided"]
            assert not outcome.violations
            return
    pytest.fail("no run froze a table on two shards")


def test_a_seed_draws_the_same_traps() -> None:
    drawn = [[Trap.draw(Random(seed), rescales=True, tables=True) for seed in range(20)] for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) > 10
    assert len({Scene.draw(Random(seed)) for seed in range(40)}) > 10
