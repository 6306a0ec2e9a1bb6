"""The soak in seconds: clients that are killed, both ways, leave nothing; and what they would leave is seen."""

import json
import os
import signal
import sys
from dataclasses import replace

import pytest

from mempool.bench.serve.contenders import pools
from mempool.bench.serve.shapes import Shape, TableSize
from mempool.bench.serve.soak import command
from mempool.bench.serve.soak.footprint import Footprint, slope
from mempool.bench.serve.soak.nursery import _forked
from mempool.bench.serve.soak.run import POOLED_THREADS, Outcome, Plan, _Clients, run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc tells what a process takes")

_BASE = Footprint(100.0, 50.0, 20, 12, 500, 0)
_OUTCOME = Outcome(_BASE, _BASE, _BASE, [], 0.0, 0.0, 3, 10.0, [])


def test_clients_that_are_killed_leave_nothing() -> None:
    plan = Plan(
        soak_s=1.0, first_s=0.0, warm_up_s=0.0, kill_every_s=0.2, least_kills=3, sample_s=0.1, clients=3, threads=1,
        pause_s=0.005, table=TableSize(64, 8), shapes=(Shape(64, 128), Shape(2, 2)),
    )  # fmt: skip
    outcome = run(plan, say=lambda _: None)
    assert outcome.failed == []
    assert outcome.kills >= 3
    assert outcome.peak.descriptors > outcome.base.descriptors
    assert outcome.peak.shared_mappings >= 2, "a client has asked through shared memory"
    assert outcome.after.shared_mappings == 0
    assert outcome.leaks == []


def test_what_is_left_is_said_and_ends_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left = replace(_BASE, descriptors=21, shared_mappings=2, threads=_BASE.threads + POOLED_THREADS + 1)
    assert replace(_OUTCOME, after=replace(_BASE, threads=_BASE.threads + POOLED_THREADS)).leaks == []
    outcome = replace(_OUTCOME, after=left, slope_mib=1.5)
    assert outcome.leaks == ["1 descriptors", "2 mappings of memory that was shared", f"{POOLED_THREADS + 1} threads"]
    plans: list[Plan] = []
    for found, code in ((outcome, 1), (_OUTCOME, 0), (replace(_OUTCOME, failed=["client 1: gone"]), 1)):
        monkeypatch.setattr(command, "run", lambda plan, say, found=found: plans.append(plan) or found)  # noqa: ARG005
        assert command.main(["--minutes", "1", "--ways", "near"]) == code
    said = capsys.readouterr().out
    assert "left behind: 1 descriptors, 2 mappings" in said
    assert "+1.50 MiB a minute (+0.00 of its own; wanted: under 1): above" in said
    assert "failed: client 1: gone" in said
    assert (plans[0].soak_s, plans[0].warm_up_s, plans[0].ways) == (60.0, 12.0, (pools.NEAR,))
    assert command.main(["--json"]) == 1
    assert json.loads(capsys.readouterr().out)["left"]["descriptors"] == 0


def test_a_client_that_ends_by_itself_or_does_not_end_has_failed() -> None:
    class Nursery:
        def __init__(self) -> None:
            self.answers = [1, 2, 1, 3, None, 0]

        def say(self, _: object) -> None:
            pass

        def hear(self, _: float) -> object:
            return self.answers.pop(0)

    clients = _Clients(Nursery(), Plan(clients=2, ways=("x",)))  # type: ignore[arg-type]
    clients.start()
    clients.replace_one()
    clients.stop()
    assert clients.kills == 1
    assert [line.partition(": ")[2] for line in clients.failed] == [
        "ended with 1; what it said is above", "did not end when it was to; what it said is above",
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of a fork where other tests have left threads
def test_a_client_ends_when_it_is_to_though_others_were_forked_later() -> None:
    def asks(stopped: int) -> None:
        os.read(stopped, 1)

    first = _forked(asks, [])
    second = _forked(asks, [first[1]])
    os.close(first[1])
    assert os.waitstatus_to_exitcode(os.waitpid(first[0], 0)[1]) == 0
    os.kill(second[0], signal.SIGKILL)
    os.close(second[1])
    assert os.waitstatus_to_exitcode(os.waitpid(second[0], 0)[1]) == -signal.SIGKILL


def test_figures_of_a_process_and_their_slope() -> None:
    descriptor, found = os.memfd_create("mempool"), Footprint.of(os.getpid())
    os.close(descriptor)
    less = Footprint.of(os.getpid())
    assert found.less(less).descriptors == 1
    assert less.most(found).descriptors == found.descriptors
    assert found.resident_mib >= found.own_mib > 1.0
    assert found.threads >= 1
    assert found.mappings > 10
    assert slope([(0.0, 1.0), (1.0, 3.0), (2.0, 5.0)]) == pytest.approx(2.0)
    assert slope([]) == slope([(1.0, 2.0)]) == 0.0
