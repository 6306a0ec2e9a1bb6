"""What the simulation found, each as small as it can be: faults that are mended, and must not come back."""

from random import Random
from typing import Any

import pytest

from mempool.agreement.rounds import Round, Ticked
from mempool.controller.changes import first_view
from mempool.types import AttachTable, ShardInfo
from mempool.wire import methods
from mempool.wire.codecs.pages import ForgetTable
from mempool.wire.methods import Method
from tests.simulation.faults import Faults
from tests.simulation.history import History
from tests.simulation.loop import Scheduler
from tests.simulation.network import Call, Network
from tests.simulation.run import Run
from tests.simulation.saving import Saver
from tests.simulation.tables import draw_schema
from tests.simulation.workload import Workload


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


def test_a_table_that_not_every_shard_knows_to_be_made_waits_for_a_controller() -> None:
    """A controller had confirmed it at one shard, and was then away for good: nobody else tells the others."""
    scheduler = Scheduler(306)
    network, history, process = Network(scheduler), History(), scheduler.loop("controller")
    history.watch(network)
    infos = tuple(ShardInfo(shard=shard, address=f"shard-{shard}:7070", incarnation=1) for shard in range(3))
    view, _ = first_view(draw_schema(Random(306), "facts"), infos)
    fill = AttachTable(view=view, mode="initialise", pending=True)
    made = AttachTable(view=view, mode="confirm")

    def served(shard: int, request: Any, method: Method[Any, None] = methods.ATTACH_TABLE) -> bool:
        call = Call(1, process, "controller", f"shard-{shard}", method, request, sent_s=0.0)
        for observer in network.on_served:
            observer(call, None)
        return history.half_told

    for info in infos:
        history.shard_started(info, f"shard-{info.shard}")
        assert not served(info.shard, fill)  # nobody uses it yet
    assert served(0, made)
    assert served(0, fill)  # it came late
    assert served(1, made)  # the third one has not heard
    assert not served(2, ForgetTable(table_id=view.schema.table_id, unmade=False), methods.SHARD_DROP_TABLE)
    scheduler.close()


@pytest.mark.parametrize("restoring", [False, True])
@pytest.mark.filterwarnings("ignore")  # of processes that were killed with calls under way
def test_who_restores_a_table_is_not_left_without_a_controller(
    restoring: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run had its controller die for good while somebody waited for a table that was restored: it never was."""
    run = Run(1, faults=Faults(controller_dies=True), saves=True)
    monkeypatch.setattr(Workload, "rescaling", True)
    monkeypatch.setattr(Saver, "restoring", restoring)
    outcome = run.play()
    assert not outcome.violations
    assert outcome.marks["a controller that died in a rescale and did not come back"] == (not restoring)
