"""Small reads beside a long one: let in while it reads and at no other moment, never left in, the same bits."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from mempool import kernels
from mempool.shard import Engine
from mempool.shard.work import pace
from mempool.shard.work.beside import Beside
from mempool.types import GatherRequest, OptimizerSpec
from mempool.types.caller import Caller, calling
from mempool.types.messages import ArrayGather, ArrayGathered
from tests.contract.bags import Bags, make_bags
from tests.contract.driver import Driver, make_schema

from .conftest import MakeDriver

BOUND_S = 20.0
LITTLE = 1024
needs_arrays = pytest.mark.skipif(kernels.array_sums() is None, reason="needs Numba")


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as threads:
        yield threads


class Reading:
    """What a job reads until it is told to end."""

    def __init__(self) -> None:
        self.began, self.end = threading.Event(), threading.Event()

    def __call__(self) -> str:
        self.began.set()
        assert self.end.wait(BOUND_S)
        return "read"


def test_others_are_let_in_while_a_turns_job_reads_and_at_no_other_moment(pool: ThreadPoolExecutor) -> None:
    beside, reading, found = Beside(), Reading(), []

    def job() -> None:
        found.append(beside.read(lambda: "before"))
        found.append(beside.letting_in(reading))
        found.append(beside.read(lambda: "after"))

    turn = pool.submit(beside.turn, job)
    assert reading.began.wait(BOUND_S)
    assert beside.read(lambda: "beside") == "beside"
    reading.end.set()
    turn.result(BOUND_S)
    assert found == [None, "read", None]


def test_nobody_is_let_in_by_who_may_be_interrupted(pool: ThreadPoolExecutor) -> None:
    beside, reading = Beside(), Reading()
    job = pool.submit(beside.letting_in, reading)
    assert reading.began.wait(BOUND_S)
    assert beside.read(lambda: "beside") is None
    reading.end.set()
    assert job.result(BOUND_S) == "read"


def test_a_job_goes_on_when_the_last_one_beside_it_has_read(pool: ThreadPoolExecutor) -> None:
    beside, job, other = Beside(), Reading(), Reading()
    turn = pool.submit(beside.turn, lambda: beside.letting_in(job) and None)
    assert job.began.wait(BOUND_S)
    read = pool.submit(beside.read, other)
    assert other.began.wait(BOUND_S)
    assert beside.read(lambda: "a third") is None, "one at a time"
    job.end.set()
    time.sleep(0.05)
    assert not turn.done(), "it would write while somebody reads"
    assert beside.read(lambda: "too late") is None
    other.end.set()
    assert read.result(BOUND_S) == "read"
    turn.result(BOUND_S)


def test_a_read_that_fails_leaves_nobody_in(pool: ThreadPoolExecutor) -> None:
    beside, reading = Beside(), Reading()
    turn = pool.submit(beside.turn, lambda: beside.letting_in(reading) and None)
    assert reading.began.wait(BOUND_S)
    with pytest.raises(ZeroDivisionError):
        beside.read(lambda: 1 // 0)
    assert beside.read(lambda: "the next") == "the next"
    reading.end.set()
    turn.result(BOUND_S)
    with pytest.raises(ZeroDivisionError):
        beside.turn(lambda: beside.letting_in(lambda: 1 // 0) and None)
    assert beside.read(lambda: "after it failed") is None


def engine_of(driver: Driver) -> Engine:
    engine = driver.host(0)
    assert isinstance(engine, Engine)
    return engine


def as_arrays(driver: Driver, bags: Bags, *, lookup_id: int = 7, remember: bool = False, version: int = 0) -> Any:
    assert bags.weights is not None
    return ArrayGather(
        driver.envelope(0, table_version=version), lookup_id, bags.ids.to(torch.uint32).numpy(), bags.weights.numpy(),
        bags.offsets.numpy(), remember, (), True,
    )  # fmt: skip


def summed(engine: Engine, asked: ArrayGather) -> ArrayGathered | None:
    return engine.at_once.gather_arrays(
        asked, cost=LITTLE, caller="ipv4:10.0.0.2:3", space=lambda bags, width: np.empty((bags, width), np.float32)
    )


def at_work(driver: Driver, job: Callable[[Engine], object], reading: Reading) -> Callable[[], None]:
    """The shard's thread does a job that reads, until what is returned is called."""
    engine = engine_of(driver)
    working = driver.submit(engine._thread.run("busy", lambda _: job(engine), caller=Caller("ipv4:10.0.0.1:4")))
    assert reading.began.wait(BOUND_S)

    def finish() -> None:
        reading.end.set()
        working.result(BOUND_S)

    return finish


@needs_arrays
def test_a_small_gather_is_answered_and_remembered_beside_a_job_that_reads(make_driver: MakeDriver) -> None:
    driver = make_driver().create(make_schema())
    engine, reading, bags = engine_of(driver), Reading(), make_bags(7)
    expected = driver.gather(bags, remember=False)
    finish = at_work(driver, lambda engine: engine._thread.beside.letting_in(reading), reading)
    found = summed(engine, as_arrays(driver, bags, remember=True))
    assert found is not None
    assert torch.equal(torch.from_numpy(found.values), expected)
    assert len(engine._answers._contexts) == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pace, "LEAST_PIECE_BYTES", 16)
        assert summed(engine, as_arrays(driver, bags)) is None, "it would hold the job up"
    assert engine.at_once.gather(_request(driver, bags), caller="ipv4:10.0.0.2:3") is None, "a tensor's way is not so"
    finish()


@needs_arrays
def test_nobody_reads_beside_a_step(make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = make_driver().create(make_schema())
    engine, stepping, bags = engine_of(driver), Reading(), make_bags(7)
    fused = kernels.fused_step

    def blocked(*arguments: Any) -> None:
        stepping()
        fused(*arguments)

    monkeypatch.setattr(kernels, "fused_step", blocked)
    driver.update(1, 1, torch.ones(bags.num_bags, 10), bags=bags)
    driver.prepare(1, [1], want_norm=False)
    committed = driver.submit(engine.commit(driver.commit_request(0, 1, [1])))
    assert stepping.began.wait(BOUND_S)
    assert summed(engine, as_arrays(driver, bags)) is None
    stepping.end.set()
    committed.result(BOUND_S)


@needs_arrays
def test_a_long_gather_of_lines_is_left_to_the_shards_thread_where_somebody_asks_for_little(
    make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "LEAST_PIECE_BYTES", 2**16)
    driver = make_driver(clock=lambda: 0.0).create(make_schema())  # nobody asked longer ago than just now
    engine, bags = engine_of(driver), make_bags(3, lengths=(2**14,))
    answers: list[Any] = []
    told = threading.Event()

    def tell(reply: Any, error: BaseException | None) -> None:
        answers.append((reply, error))
        told.set()

    def line_up() -> None:
        told.clear()
        engine.at_once.line_up_gather(_request(driver, bags), caller="ipv4:10.0.0.1:4", timeout_s=BOUND_S, tell=tell)

    line_up()
    until_s = time.monotonic() + BOUND_S
    while not told.is_set():  # the shard's thread may be at its last turn still
        assert time.monotonic() < until_s
        engine.at_once.take_turn()
    engine._thread.pace.asks("ipv4:10.0.0.2:3", LITTLE)
    line_up()
    assert not engine.at_once.take_turn(), "the other one could not ask meanwhile"
    engine.at_once.hand_over()
    assert told.wait(BOUND_S)
    assert [error for _, error in answers] == [None, None]
    assert torch.equal(answers[0][0].values, answers[1][0].values)


def test_who_only_looks_makes_nothing_that_is_kept(make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the lines' thread, while rows may be moved: a view of where they lay would be kept for good."""
    monkeypatch.setattr(pace, "LEAST_PIECE_BYTES", 16)
    driver = make_driver().create(make_schema())
    engine = engine_of(driver)
    storage = engine._tenancy.tables[driver.table_id].storage
    (lane,) = storage.lanes
    lane.arena._paged.clear()
    request = _request(driver, make_bags(3, lengths=(2**6,)))
    assert engine._answers.lets_in(request)
    assert not lane.arena._paged
    storage._lanes = ()
    assert not engine._answers.lets_in(request)


@needs_arrays
def test_small_gathers_beside_long_ones_and_commits_are_of_one_version_each(
    make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each commit adds 1 to all rows: a sum of rows of two versions would be no multiple of its pairs."""
    monkeypatch.setattr(pace, "LEAST_PIECE_BYTES", 2**18)
    num_slots, dim = 512, 64
    schema = make_schema(
        num_slots=num_slots, value_dim=dim, block_dim=dim, page_slots=64, init_std=0.0,
        optimizer=OptimizerSpec(algorithm="sgd", lr=1.0),
    )  # fmt: skip
    driver = make_driver().create(schema, np.zeros((num_slots // 64, 1), np.int32))
    engine = engine_of(driver)
    everything = Bags(torch.arange(num_slots), torch.ones(num_slots), torch.tensor([0, num_slots]))
    generator = torch.Generator().manual_seed(5)
    long = Bags(
        torch.randint(num_slots, (2**17,), generator=generator), torch.ones(2**17), torch.arange(0, 2**17 + 1, 2**10)
    )
    few = Bags(torch.randint(num_slots, (96,), generator=generator), torch.ones(96), torch.arange(0, 97, 32))
    read, beside = engine._thread.beside.read, []
    monkeypatch.setattr(engine._thread.beside, "read", lambda asked: _noted(beside, read(asked)))
    until_s, steps = time.monotonic() + BOUND_S, 0
    while steps < 8 or not beside:
        assert time.monotonic() < until_s, "none was answered beside a long one"
        steps += 1
        driver.update(steps, 1, -torch.ones(1, dim), bags=everything)
        under_way = [
            driver.submit(_called(engine, _request(driver, long, lookup_id=number), f"ipv4:10.0.0.{number}:4"))
            for number in (3, 4)
        ]
        committed = driver.submit(_committed(driver, engine, steps))
        while not all(call.done() for call in (*under_way, committed)):
            found = summed(engine, as_arrays(driver, few))
            if found is not None:
                version = found.stamp.table_version
                assert np.array_equal(found.values, np.full((3, dim), 32.0 * version, np.float32))
        for call in (*under_way, committed):
            call.result(BOUND_S)
    assert torch.equal(driver.read(), torch.full((num_slots, dim), float(steps)))


def _noted(found: list[object], reply: object) -> object:
    if reply is not None:
        found.append(reply)
    return reply


def _request(driver: Driver, bags: Bags, lookup_id: int = 5) -> GatherRequest:
    return GatherRequest(
        envelope=driver.envelope(0), lookup_id=lookup_id, ids=bags.ids, weights=bags.weights, offsets=bags.offsets,
        remember=False,
    )  # fmt: skip


async def _called(engine: Engine, request: GatherRequest, caller: str) -> None:
    with calling(Caller(caller)):
        await engine.gather(request)


async def _committed(driver: Driver, engine: Engine, step: int) -> None:
    await engine.prepare(driver.prepare_request(0, step, [1]))
    await engine.commit(driver.commit_request(0, step, [1], lr=1.0))
