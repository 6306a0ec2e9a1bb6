"""Threads of a kernel's team keep off the processor of whoever has called it."""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from mempool import kernels
from mempool.kernels import teams

pytestmark = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="one processor, or no Linux"
)
BOUND_S = 60.0
ROWS = 1 << 12


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    teams._processor.cache_clear()
    yield
    torch.set_num_threads(before)
    teams._processor.cache_clear()


def sum_much() -> None:
    """A kernel's work that is enough for two threads."""
    paged = kernels.Paged(torch.ones(ROWS, 64), torch.arange(ROWS >> 4, dtype=torch.int32), 4)
    ids, offsets = torch.arange(ROWS).repeat(4), torch.arange(0, 4 * ROWS + 1, 4)
    assert torch.equal(kernels.weighted_sum(paged, ids, None, offsets), torch.full((ROWS, 64), 4.0))


def on_a_thread(work: Callable[[], None]) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(work).result(BOUND_S)


@pytest.mark.usefixtures("two_threads")
def test_a_team_follows_its_caller_from_processor_to_processor() -> None:
    def work() -> None:
        torch.set_num_threads(2)
        allowed = os.sched_getaffinity(0)
        for cpu in [*sorted(allowed), min(allowed)]:
            os.sched_setaffinity(0, {cpu})  # the only way to be on that one for sure
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(teams.os, "sched_getaffinity", lambda _: allowed)
                sum_much()
            (other,) = teams._TEAM.others
            assert other != threading.get_native_id()
            assert os.sched_getaffinity(other) == allowed - {cpu}

    on_a_thread(work)


@pytest.mark.usefixtures("two_threads")
def test_where_there_is_one_processor_for_all_nobody_is_moved() -> None:
    def work() -> None:
        torch.set_num_threads(2)
        only = {min(os.sched_getaffinity(0))}
        os.sched_setaffinity(0, only)
        sum_much()
        (other,) = teams._TEAM.others
        assert os.sched_getaffinity(other) == only

    on_a_thread(work)


@pytest.mark.usefixtures("two_threads")
def test_the_main_thread_and_who_has_bound_his_threads_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert threading.current_thread() is threading.main_thread()
    sum_much()
    assert not teams._TEAM.others
    monkeypatch.setenv("OMP_PROC_BIND", "true")

    def work() -> None:
        torch.set_num_threads(2)
        sum_much()
        assert not teams._TEAM.others
        assert not teams._TEAM.is_moved

    on_a_thread(work)


@pytest.mark.usefixtures("two_threads")
def test_what_the_system_refuses_is_not_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def refuse(thread: int, _: set[int]) -> None:
        asked.append(thread)
        raise errors.pop()

    errors: list[OSError] = [PermissionError(), ProcessLookupError()]
    monkeypatch.setattr(teams.os, "sched_setaffinity", refuse)

    def work() -> None:
        torch.set_num_threads(2)
        for _ in range(4):
            sum_much()
        assert not teams._TEAM.is_moved

    on_a_thread(work)
    assert len(asked) == 2, "once more where threads have ended, and never again where it is not allowed"


@pytest.mark.usefixtures("two_threads")
def test_a_thread_that_does_not_come_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teams, "_ROLL_CALL_S", 0.01)

    class Absent:
        def __init__(self, _: int) -> None:
            pass

        def wait(self, _: float) -> None:
            raise threading.BrokenBarrierError

    monkeypatch.setattr(teams.threading, "Barrier", Absent)
    monkeypatch.setattr(teams.threading, "get_native_id", lambda: 1)  # all are one

    def work() -> None:
        torch.set_num_threads(2)
        sum_much()
        assert not teams._TEAM.is_moved

    on_a_thread(work)
