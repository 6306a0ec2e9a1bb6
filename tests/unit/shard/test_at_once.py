"""Calls answered on the thread that asks: the same answers, or none; nobody's turn is taken; nothing is torn."""

import itertools
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from types import FrameType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mempool import kernels
from mempool.errors import DeadlineExceeded, MempoolError, Overloaded
from mempool.shard import Engine
from mempool.shard.parking import Behind, Parked
from mempool.shard.steps.contexts import Contexts
from mempool.shard.work import pace
from mempool.types import GatherRequest, OptimizerSpec, UpdateRequest
from mempool.types.messages import ArrayGather, ArrayGathered
from mempool.wire.channels.loop import run
from tests.contract.bags import make_bags
from tests.contract.driver import Driver, make_schema, same

from .conftest import MakeDriver

BOUND_S = 20.0


def engine_of(driver: Driver) -> Engine:
    engine = driver.host(0)
    assert isinstance(engine, Engine)
    return engine


def asked(driver: Driver, lookup_id: int = 1, **changes: Any) -> GatherRequest:
    bags = make_bags(lookup_id)
    request = GatherRequest(
        envelope=driver.envelope(0),
        lookup_id=lookup_id,
        ids=bags.ids,
        weights=bags.weights,
        offsets=bags.offsets,
        remember=True,
    )
    return replace(request, **changes)


def kept_busy(driver: Driver, **options: int) -> Callable[[], None]:
    """The engine is at work from now on, until what is returned is called."""
    going, go_on = threading.Event(), threading.Event()

    def busy(_: object) -> None:
        going.set()
        assert go_on.wait(BOUND_S)

    working = driver.submit(engine_of(driver)._thread.run("busy", busy, **options))
    assert going.wait(BOUND_S)

    def finish() -> None:
        go_on.set()
        working.result(BOUND_S)

    return finish


def begun(engine: Engine, request: GatherRequest) -> Any:
    return engine.at_once.begin_gather(request, timeout_s=5.0, narrow_ids=False, alone=True)()


def lined_up(engine: Engine, request: GatherRequest, *, take: bool, timeout_s: float = BOUND_S) -> Callable[[], Any]:
    """Its answer when it is asked for; take: in turns that are taken here."""
    told: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
    engine.at_once.line_up_gather(
        request, caller="me", timeout_s=timeout_s, tell=lambda reply, error: told.put((reply, error))
    )
    if not take:
        engine.at_once.hand_over()

    def answer() -> Any:
        while take and engine.at_once.take_turn():
            pass
        reply, error = told.get(timeout=BOUND_S)
        if error is not None:
            raise error
        return reply

    return answer


def test_it_answers_what_the_engine_answers(make_driver: MakeDriver) -> None:
    driver = make_driver().create(make_schema())
    engine = engine_of(driver)
    request = asked(driver)
    expected = driver.call(engine.gather(request))
    for found in (
        begun(engine, request),
        engine.at_once.gather(request, caller="me"),
        lined_up(engine, request, take=True)(),
        lined_up(engine, request, take=False)(),
    ):
        assert found.stamp == expected.stamp
        assert found.blocks == expected.blocks
        assert same(found.values, expected.values)
    bags = make_bags(1)
    update = UpdateRequest(
        envelope=driver.envelope(0),
        step_id=driver.step_id(1),
        sequence=1,
        lookup_id=1,
        blocks=driver.blocks(0),
        grads=torch.ones(bags.offsets.shape[0] - 1, 10),
        hold=False,
        want_weight_grad=True,
    )
    weight_grad = driver.call(engine.update(update)).weight_grad
    direct = engine.at_once.begin_update(update, timeout_s=5.0, narrow_ids=False, alone=True)()
    assert direct is not None
    assert same(direct.weight_grad, weight_grad)
    there = engine.at_once.update(replace(update, hold=True), caller="me")
    assert there is not None
    assert same(there.weight_grad, weight_grad)
    assert driver.status(0).updates_held == 1


def as_arrays(request: GatherRequest, **changes: Any) -> ArrayGather:
    arrays = ArrayGather(
        request.envelope,
        request.lookup_id,
        request.ids.to(torch.uint32).numpy(),
        None if request.weights is None else request.weights.to(torch.float32).numpy().copy(),
        request.offsets.numpy().copy(),
        request.remember,
        request.release,
        False,
    )
    return arrays._replace(**changes)


def summed(engine: Engine, asked: ArrayGather, *, cost: int = 1, caller: str = "me") -> ArrayGathered | None:
    with engine._thread._at_work:  # what it was asked before has ended
        pass
    return engine.at_once.gather_arrays(
        asked, cost=cost, caller=caller, space=lambda bags, width: np.empty((bags, width), np.float32)
    )


@pytest.mark.skipif(kernels.array_sums() is None, reason="needs Numba")
def test_arrays_are_answered_with_the_same_bits_and_are_remembered(make_driver: MakeDriver) -> None:
    driver = make_driver().create(make_schema())
    engine = engine_of(driver)
    request = asked(driver, remember=False)
    expected = driver.call(engine.gather(request))
    given = as_arrays(request, lookup_id=7, remember=True)
    found = summed(engine, given)
    assert found is not None
    assert (found.stamp, found.blocks) == (expected.stamp, expected.blocks)
    assert same(torch.from_numpy(found.values), expected.values)
    here = begun(engine, replace(request, ids=request.ids.to(torch.uint32), private=True))
    assert same(here.values, expected.values)
    kept = engine._answers._contexts.recall(7, table_id=driver.table_id, epoch=driver.envelope(0).epoch)
    assert kept is not None
    given.ids[:] = 0  # whoever sent them may write to where they lie
    given.offsets[:] = 0
    if given.weights is not None:
        given.weights[:] = 0
    assert kept.ids.tolist() == request.ids.tolist()
    assert kept.offsets.tolist() == request.offsets.tolist()
    if request.weights is not None and kept.weights is not None:
        assert same(kept.weights, request.weights.to(torch.float32))
    assert summed(engine, as_arrays(request, release=(7,))) is not None
    assert engine._answers._contexts.recall(7, table_id=driver.table_id, epoch=driver.envelope(0).epoch) is None


@pytest.mark.skipif(kernels.array_sums() is None, reason="needs Numba")
@pytest.mark.parametrize(
    "wrong",
    [
        {"ids": np.array([50] * 3, np.uint32), "weights": None, "offsets": np.array([0, 3])},
        {"offsets": np.array([0])},
        {"offsets": np.array([0, 1])},
        {"lookup_id": 2**64},
        {"release": tuple(range(10**5))},
    ],
)
def test_arrays_that_are_wrong_are_left_to_the_engine_and_change_nothing(
    make_driver: MakeDriver, wrong: dict[str, Any]
) -> None:
    driver = make_driver().create(make_schema())
    engine = engine_of(driver)
    table = engine._tenancy.table(driver.table_id)
    assert summed(engine, as_arrays(asked(driver), **wrong)) is None
    assert summed(engine, as_arrays(asked(driver, envelope=driver.envelope(0, epoch=7)))) is None
    assert summed(engine, as_arrays(asked(driver, envelope=driver.envelope(0, table_version=1)))) is None
    assert table.lookups == 0
    assert len(engine._answers._contexts) == 0


def test_what_may_not_be_told_yet_is_not_read(make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = make_driver().create(make_schema())
    engine = engine_of(driver)
    request = asked(driver)
    store = SimpleNamespace(is_settled=False)  # the disk is behind
    monkeypatch.setattr(engine.at_once, "_store", store)
    request = replace(request, ids=request.ids.to(torch.uint32), private=True)
    table = engine._tenancy.table(driver.table_id)
    assert begun(engine, request) is None
    assert engine.at_once.gather(request, caller="me") is None
    assert table.lookups == 0

    def falls_behind(asked: ArrayGather) -> Any:
        store.is_settled = False
        return read(asked)

    read = engine._answers.arrays.reading
    monkeypatch.setattr(engine._answers.arrays, "reading", falls_behind)
    store.is_settled = True
    assert begun(engine, request) is None
    assert table.lookups == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"ids": torch.tensor([50] * 3), "weights": None, "offsets": torch.tensor([0, 3])},
        {"reply_dtype": "float64"},
        {
            "ids": torch.tensor([1, 2, 3]).to(torch.uint32),
            "weights": torch.ones(2),
            "offsets": torch.tensor([0, 3]),
            "private": True,
        },
    ],
)
def test_what_is_refused_or_still_to_come_is_left_to_the_engine(make_driver: MakeDriver, wrong: dict[str, Any]) -> None:
    driver = make_driver().create(make_schema())
    engine = engine_of(driver)
    assert begun(engine, asked(driver, **wrong)) is None
    assert begun(engine, asked(driver, envelope=driver.envelope(0, epoch=7))) is None
    assert begun(engine, asked(driver, envelope=driver.envelope(0, table_version=1))) is None
    table = engine._tenancy.table(driver.table_id)
    assert not any(waiting for waiting in vars(table).values() if type(waiting).__name__ == "Waiting" and waiting)
    assert begun(engine, asked(driver)) is not None


def test_what_would_write_is_not_done_where_a_signal_could_cut_it_off(make_driver: MakeDriver) -> None:
    """Rows of a dense optimizer are brought up to date when they are read."""
    driver = make_driver().create(make_schema(optimizer=OptimizerSpec(algorithm="adamw", lr=0.1, dense=True)))
    engine = engine_of(driver)
    assert begun(engine, asked(driver)) is None
    assert engine.at_once.gather(asked(driver), caller="me") is not None


def test_who_waits_has_the_first_turn(make_driver: MakeDriver) -> None:
    driver = make_driver().create(make_schema())
    engine = engine_of(driver)
    finish = kept_busy(driver)
    assert engine.at_once.gather(asked(driver), caller="me") is None
    answer = lined_up(engine, asked(driver), take=False)
    assert engine._thread.num_jobs == 2
    assert not engine.at_once.take_turn(), "the thread is at it"
    assert begun(engine, asked(driver)) is None, "there is one in line"
    finish()
    assert answer() is not None
    assert begun(engine, asked(driver)) is not None


@pytest.mark.skipif(kernels.array_sums() is None, reason="needs Numba")
def test_little_goes_before_what_waits_where_its_turn_is_first(make_driver: MakeDriver) -> None:
    driver = make_driver().create(make_schema())
    engine = engine_of(driver)
    given = as_arrays(asked(driver), lookup_id=7)
    answer = lined_up(engine, asked(driver), take=True)
    assert engine.at_once.gather(asked(driver), caller="another") is None, "there is one in line"
    assert summed(engine, given, caller="another") is not None
    assert summed(engine, given, caller="another", cost=2**20) is None, "the other one's turn is first"
    assert answer() is not None


def test_who_waits_is_answered_in_pieces_where_the_work_is_long(
    make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "PIECE_BYTES", 40)
    monkeypatch.setattr(pace, "WHOLE_BYTES", 40)
    driver = make_driver().create(make_schema())
    engine = engine_of(driver)
    request = asked(driver)
    expected = driver.call(engine.gather(request))

    def kernels() -> int:
        return next(stage.count for stage in engine._stages.snapshot() if stage.stage == "kernel")

    before = kernels()
    found: Any = engine.at_once._in_turn("gather", engine._answers.gather, request, 4096, BOUND_S)()
    assert found is not None, "the engine would do all of it again"
    assert same(found.values, expected.values)
    assert kernels() - before > 1

    def is_behind() -> Any:
        yield
        raise Behind(lambda _: Parked())

    assert engine.at_once._in_turn("gather", lambda _: is_behind(), request, 4096, BOUND_S)() is None

    def behind(_: object) -> Any:
        raise Behind(lambda _: Parked())

    assert engine.at_once._in_turn("gather", behind, request, 4096, BOUND_S)() is None
    for wait in (False, True):
        assert engine.at_once._answer("gather", behind, request, wait=wait) is None


def test_who_does_not_get_a_turn_in_time_is_told_nothing_and_leaves_nothing(make_driver: MakeDriver) -> None:
    driver = make_driver().create(make_schema())
    engine = engine_of(driver)
    finish = kept_busy(driver)
    answer = lined_up(engine, asked(driver), take=False, timeout_s=0.05)
    time.sleep(0.1)
    finish()
    with pytest.raises(DeadlineExceeded):
        answer()
    driver.status(0)  # by then its turn has come, and was found late
    assert engine._thread.num_jobs == 0
    assert engine._budget.queued_bytes == 0


def test_a_read_that_is_cut_off_leaves_the_count_right(
    make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = make_driver().create(make_schema())
    engine = engine_of(driver)
    expire = Contexts.expire
    cut_off = [True]

    def interrupted(self: Contexts) -> None:
        expire(self)
        if cut_off[0]:
            self.num_bytes += 1_000_000  # half of what comes next was done
            raise KeyboardInterrupt

    monkeypatch.setattr(Contexts, "expire", interrupted)
    with pytest.raises(KeyboardInterrupt):
        begun(engine, asked(driver))
    cut_off[0] = False
    assert engine._answers._contexts.num_bytes == 0
    assert begun(engine, asked(driver)) is not None, "nobody is locked out"


def test_what_is_remembered_at_once_is_forgotten_in_time(make_driver: MakeDriver) -> None:
    """Nobody rings for it."""
    driver = make_driver(context_lease_s=0.2).create(make_schema())
    engine = engine_of(driver)
    driver.call(engine.status())
    time.sleep(0.1)  # the thread rests
    assert begun(engine, asked(driver)) is not None
    assert len(engine._answers._contexts) == 1
    end_s = time.monotonic() + BOUND_S
    while len(engine._answers._contexts):
        assert time.monotonic() < end_s
        time.sleep(0.02)


def test_a_closed_engine_answers_nobody(make_driver: MakeDriver) -> None:
    driver = make_driver().create(make_schema())
    engine = engine_of(driver)
    request = asked(driver)
    driver.call(engine.close())
    assert begun(engine, request) is None
    assert engine.at_once.gather(request, caller="me") is None


def test_a_queue_that_is_full_refuses_as_always(make_driver: MakeDriver) -> None:
    driver = make_driver(client_memory_bytes=16384).create(make_schema())
    engine = engine_of(driver)
    finish = kept_busy(driver, cost=1)

    def asks_for_much() -> None:
        gather = engine._answers.gather
        waits = [engine.at_once._in_turn("gather", gather, asked(driver), 4096, BOUND_S) for _ in range(10)]
        finish()
        for wait in waits:
            wait()

    with pytest.raises(Overloaded):
        asks_for_much()
    driver.status(0)
    assert engine._budget.queued_bytes == 0


def test_who_is_interrupted_anywhere_leaves_nothing_in_the_queue(make_driver: MakeDriver) -> None:
    """At each line that an update on the caller's own thread goes through: nothing is counted for ever, and it ends."""
    driver = make_driver().create(make_schema())
    engine = engine_of(driver)
    bags = make_bags(1)
    update = UpdateRequest(
        envelope=driver.envelope(0),
        step_id=driver.step_id(1),
        sequence=1,
        lookup_id=1,
        blocks=driver.blocks(0),
        grads=torch.ones(bags.offsets.shape[0] - 1, 10),
        hold=False,
        want_weight_grad=True,
        ids=bags.ids,
        weights=bags.weights,
        offsets=bags.offsets,
    )
    left = 0

    def interrupt(frame: FrameType, event: str, _: object) -> object:
        nonlocal left
        if "/shard/work/" not in frame.f_code.co_filename:
            return None
        if event == "line":
            left -= 1
            if not left:
                raise KeyboardInterrupt
        return interrupt

    for lines in itertools.count(1):
        left = lines
        sys.settrace(interrupt)
        try:
            answer = engine.at_once.begin_update(update, timeout_s=BOUND_S, narrow_ids=False, alone=True)()
        except KeyboardInterrupt:
            answer = None
        finally:
            sys.settrace(None)
        driver.call(engine._thread.run("a turn", lambda _: None))  # before it had what was asked before
        assert engine._budget.queued_bytes == 0, f"interrupted at line {lines}"
        assert engine._thread.num_jobs == 0
        assert not engine._thread.others_wait()
        if left > 0:
            break
    assert lines > 10
    assert answer is not None


def test_a_handler_that_asks_does_not_wait_for_what_it_has_interrupted(
    make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = make_driver().create(make_schema())
    engine = engine_of(driver)
    expire, found = Contexts.expire, []

    def signalled(self: Contexts) -> None:
        if not found:
            found.append("the handler runs")
            signal.raise_signal(signal.SIGUSR1)
        expire(self)

    monkeypatch.setattr(Contexts, "expire", signalled)

    class Late(Exception):
        """Of whoever sets a limit to what is interrupted."""

    def handler(*_: object) -> None:
        found.append(begun(engine, asked(driver, 2)))
        with pytest.raises(MempoolError, match="handler"):
            run(engine.status())
        raise Late

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        with pytest.raises(Late):
            begun(engine, asked(driver))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert found == ["the handler runs", None]
    assert begun(engine, asked(driver)) is not None


def test_whoever_has_the_shard_is_known_wherever_a_handler_may_come(make_driver: MakeDriver) -> None:
    """Another thread read last: the handler must see that its own thread has the shard now, or it waits for itself."""
    driver = make_driver().create(make_schema())
    engine = engine_of(driver)
    reader = threading.Thread(target=begun, args=(engine, asked(driver)))
    reader.start()
    reader.join(BOUND_S)
    thread, me, unknown = engine._thread, threading.get_ident(), []

    def look(frame: FrameType, event: str, _: object) -> None:
        if frame.f_code.co_name == "at_once" and event == "c_return" and thread._at_work.locked():
            unknown.append(thread._reader != me)

    sys.setprofile(look)
    try:
        assert begun(engine, asked(driver)) is not None
    finally:
        sys.setprofile(None)
    assert not any(unknown)
