"""Gathers that wait together are one kernel: each has the bits, the errors and the memory that it has alone."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from mempool.errors import InvalidRequest, MempoolError, NotFound, Overloaded, StalePlacement
from mempool.shard import Engine, answers
from mempool.shard.work import pace
from mempool.types import GatherReply, GatherRequest, OptimizerSpec
from mempool.types.caller import Caller, calling
from tests.contract.bags import make_bags
from tests.contract.driver import Driver, make_schema, same

from .conftest import MakeDriver
from .test_at_once import asked, engine_of

BOUND_S = 20.0
OPTIMIZERS = {
    "adagrad": OptimizerSpec(algorithm="adagrad", lr=0.1),
    "adam": OptimizerSpec(algorithm="adam", lr=0.1),
    "dense adamw": OptimizerSpec(algorithm="adamw", lr=0.1, weight_decay=0.1, dense=True),
}
Ask = Callable[[], Any]


@pytest.fixture(autouse=True)
def from_two_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU."""
    monkeypatch.setattr(answers, "LEAST_TOGETHER_ON_CPU", answers.LEAST_TOGETHER)


def together(engine: Engine, driver: Driver, *asks: Ask, then: Callable[[], None] = lambda: None) -> list[Future[Any]]:
    """Each is asked by a caller of its own; all are in line, in that order, when the shard's thread is free."""
    going, go_on = threading.Event(), threading.Event()

    def busy(_: object) -> None:
        going.set()
        assert go_on.wait(BOUND_S)

    async def called(name: str, ask: Ask) -> Any:
        with calling(Caller(name)):
            return await ask()

    def has_jobs(number: int) -> bool:
        return engine._thread.num_jobs == number

    held_up = driver.submit(engine._thread.run("busy", busy))
    assert going.wait(BOUND_S)
    try:
        waiting = []
        for number, ask in enumerate(asks):
            waiting.append(driver.submit(called(getattr(ask, "caller", f"host {number}:1"), ask)))
            wait_until(partial(has_jobs, number + 2))
        then()
    finally:
        go_on.set()
    held_up.result(BOUND_S)
    return waiting


def wait_until(there: Callable[[], bool]) -> None:
    end_s = time.monotonic() + BOUND_S
    while not there():
        assert time.monotonic() < end_s
        time.sleep(0.001)


def gathers(engine: Engine, requests: Sequence[GatherRequest]) -> list[Ask]:
    return [partial(engine.gather, request) for request in requests]


def batches(driver: Driver, shard: int = 0) -> dict[str, int]:
    stages = driver.call(driver.host(shard).status()).stages
    return {stage.stage: stage.count for stage in stages if stage.stage.startswith("batch")}


def some(driver: Driver, shard: int) -> list[GatherRequest]:
    """All kinds of gathers, most of which have others like them."""
    requests = []
    for number, lengths in enumerate([(3, 0, 5, 1), (40,), (0, 0), (), (1,) * 9, (2, 30)] * 2):
        bags = make_bags(number, lengths=lengths)
        requests.append(
            GatherRequest(
                envelope=driver.envelope(shard),
                lookup_id=100 + number,
                ids=bags.ids,
                weights=None if number % 5 == 4 else bags.weights,
                offsets=bags.offsets,
                remember=number != 3,
                release=(100,) if number == 7 else (),
                reply_dtype="bfloat16" if number % 4 == 2 else "float32",
            )
        )
    return requests


@pytest.mark.parametrize(
    ("layout", "dtype", "optimizer"),
    [
        ("one", "float32", "adagrad"),
        ("one", "float32", "dense adamw"),
        ("one", "bfloat16", "dense adamw with master"),
        ("one", "float8_e4m3fn", "adam"),
        ("mixed", "float32", "dense adamw"),
        ("mixed", "bfloat16", "adam"),
        ("mixed", "int8", "dense adamw with master"),
    ],
)
def test_each_has_the_bits_that_it_has_alone(make_driver: MakeDriver, layout: str, dtype: str, optimizer: str) -> None:
    """Also of rows that are brought up to date for several of them at once."""
    optimizer, master, _ = optimizer.partition(" with master")
    schema = make_schema(dtype=dtype, optimizer=OPTIMIZERS[optimizer], master=bool(master))
    drivers = [make_driver(3).create(schema, layout) for _ in range(2)]
    for driver in drivers:
        for step in (1, 2, 3):
            bags = make_bags(50 + step, lengths=(4, 4))
            driver.train(step, {1: (bags, torch.randn(2, 10, generator=torch.Generator().manual_seed(step)))})
    one, other = drivers
    for shard in one.owners:
        engine: Any = other.host(shard)
        expected = [one.call(one.host(shard).gather(request)) for request in some(one, shard)]
        found = [reply.result(BOUND_S) for reply in together(engine, other, *gathers(engine, some(other, shard)))]
        assert sum(batches(other, shard).values()) > 1
        for alone, reply in zip(expected, found, strict=True):
            assert (reply.stamp, reply.blocks) == (alone.stamp, alone.blocks)
            assert reply.values.dtype == alone.values.dtype
            assert same(reply.values, alone.values)
        assert one.status(shard).lookups == other.status(shard).lookups
    for driver in drivers:  # each is remembered by itself
        driver.lookup_id = 105
    grads = torch.randn(2, 10, generator=torch.Generator().manual_seed(9))
    assert same(one.update(4, 1, grads), other.update(4, 1, grads))
    left, right = one.contents(), other.contents()
    assert left.keys() == right.keys()
    for name, was in left.items():
        is_same = torch.equal(was, right[name]) if isinstance(was, torch.Tensor) else was == right[name]
        assert is_same, name


def test_an_answer_keeps_no_other_alive(make_driver: MakeDriver) -> None:
    """Who takes long to fetch one answer would hold the memory of all, of which only its own is counted."""
    driver = make_driver().create(make_schema())
    engine = engine_of(driver)
    found = together(engine, driver, *gathers(engine, [asked(driver, number) for number in range(1, 6)]))
    for reply in found:
        values = reply.result(BOUND_S).values
        assert values.untyped_storage().nbytes() == values.nbytes
    assert batches(driver) == {"batch of 5 to 8": 1}


def test_an_error_of_one_leaves_the_others_answered(make_driver: MakeDriver) -> None:
    driver = make_driver().create(make_schema())
    engine = engine_of(driver)
    many = torch.zeros(3, dtype=torch.int64)
    wrong: list[tuple[type[MempoolError], dict[str, Any]]] = [
        (InvalidRequest, {"ids": many + 50, "weights": None, "offsets": torch.tensor([0, 3])}),
        (InvalidRequest, {"ids": many, "weights": None, "offsets": torch.tensor([0, 2])}),
        (InvalidRequest, {"reply_dtype": "float64"}),
        (StalePlacement, {"envelope": driver.envelope(0, epoch=0)}),
        (NotFound, {"envelope": replace(driver.envelope(0), table_id=77)}),
    ]
    requests = [asked(driver, number) for number in range(1, 7)]
    for place, (_, changes) in enumerate(wrong):
        requests.insert(2 * place + 1, replace(requests[0], **changes))
    found = together(engine, driver, *gathers(engine, requests))
    expected = [driver.call(engine.gather(request)) for request in requests[::2]]
    assert len(expected) == 6
    for reply, alone in zip([*found[:10:2], found[10]], expected, strict=True):
        assert same(reply.result(BOUND_S).values, alone.values)
    for reply, (error, _) in zip(found[1:10:2], wrong, strict=True):
        with pytest.raises(error):
            reply.result(BOUND_S)


def test_one_that_waits_holds_up_no_other(make_driver: MakeDriver) -> None:
    """It knows a placement whose view is still on its way."""
    driver = make_driver(3).create(make_schema(), "one")
    engine = engine_of(driver)
    driver.freeze(0, token="round 9")
    waits = asked(driver, 2, envelope=driver.envelope(0, epoch=2))
    first, parked, last = together(engine, driver, *gathers(engine, [asked(driver, 1), waits, asked(driver, 3)]))
    assert first.result(BOUND_S).stamp.epoch == last.result(BOUND_S).stamp.epoch == 1
    assert not parked.done()
    assert batches(driver) == {"batch of 2": 1}
    driver.move("mixed", token="round 9")
    reply = parked.result(BOUND_S)
    assert same(reply.values, driver.call(engine.gather(asked(driver, 2))).values)
    assert reply.stamp.epoch == 2


def test_what_has_no_room_is_refused_alone(make_driver: MakeDriver) -> None:
    """The answer of each is counted before any is made."""
    driver = make_driver(client_memory_bytes=2**20).create(make_schema())
    engine = engine_of(driver)
    offsets = torch.zeros(2_500, dtype=torch.int64)
    large = asked(driver, 9, ids=offsets[:0], weights=None, offsets=offsets, remember=False)
    found = together(engine, driver, *gathers(engine, [asked(driver, 1), *[large] * 8, asked(driver, 2)]))
    refused = [reply for reply in found if isinstance(reply.exception(BOUND_S), Overloaded)]
    assert 0 < len(refused) < 8
    assert not {found[0], found[-1]} & set(refused)
    for reply in set(found) - set(refused):
        reply.result(BOUND_S)
    assert driver.call(engine.status()).queued_bytes == 0


def test_a_callers_order_is_kept(make_driver: MakeDriver) -> None:
    """Gathers before and after its update and commit, among those of others."""
    driver = make_driver().create(make_schema())
    engine = engine_of(driver)
    bags = make_bags(1)
    update = driver.update_request(0, 1, 1, torch.ones(bags.num_bags, 10), bags=bags)
    commit = driver.commit_request(0, 1, (1,), one_phase=True)

    class Mine:
        caller = "me"

        def __init__(self, ask: Ask) -> None:
            self.ask = ask

        def __call__(self) -> Any:
            return self.ask()

    mine = [Mine(ask) for ask in gathers(engine, [asked(driver, 1), asked(driver, 2)])]
    mine += [Mine(lambda: engine.update(update)), Mine(lambda: engine.commit(commit))]
    mine += [Mine(ask) for ask in gathers(engine, [asked(driver, 3), asked(driver, 4)])]
    others = gathers(engine, [asked(driver, number) for number in range(5, 11)])
    found = together(engine, driver, *[ask for both in zip(mine, others, strict=True) for ask in both])
    versions = [reply.result(BOUND_S).stamp.table_version for reply in found[0:4:2] + found[8::2]]
    assert versions == [0, 0, 1, 1]
    values = [reply.result(BOUND_S) for reply in found[1::2]]
    assert all(isinstance(reply, GatherReply) for reply in values)
    assert batches(driver)


def test_what_is_longer_than_it_looked_is_done_in_pieces(
    make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = make_driver().create(make_schema())
    engine = engine_of(driver)
    requests = [asked(driver, number) for number in range(1, 4)]
    expected = [driver.call(engine.gather(request)) for request in requests]
    monkeypatch.setattr(pace, "PIECE_BYTES", 40)
    monkeypatch.setattr(pace, "WHOLE_BYTES", 40)
    found = [reply.result(BOUND_S) for reply in together(engine, driver, *gathers(engine, requests))]
    for reply, alone in zip(found, expected, strict=True):
        assert same(reply.values, alone.values)
    assert batches(driver) == {}


def test_few_gain_nothing_on_a_cpu(make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "LEAST_TOGETHER_ON_CPU", 4)
    driver = make_driver().create(make_schema())
    engine = engine_of(driver)
    requests = [asked(driver, number) for number in range(1, 5)]
    for few in (requests[:3], requests):
        for reply in together(engine, driver, *gathers(engine, few)):
            reply.result(BOUND_S)
    assert batches(driver) == {"batch of 3 to 4": 1}


def test_only_those_that_are_alike_are_summed_together(make_driver: MakeDriver) -> None:
    """Of one table, all with weights or none; the order in line is any."""
    one = make_driver().create(make_schema())
    engine = engine_of(one)
    other = Driver(one.hosted, table_id=2).create(make_schema(name="others", seed=8))
    requests = [asked(driver, number) for number in (1, 2) for driver in (one, other)]
    requests += [replace(request, weights=None) for request in requests]
    expected = [one.call(engine.gather(request)) for request in requests]
    assert not same(expected[0].values, expected[1].values)
    found = [reply.result(BOUND_S) for reply in together(engine, one, *gathers(engine, requests))]
    for reply, alone in zip(found, expected, strict=True):
        assert same(reply.values, alone.values)
    assert batches(one) == {"batch of 2": 4}
    other.drop()


def test_large_ones_are_done_alone(make_driver: MakeDriver) -> None:
    driver = make_driver().create(make_schema())
    engine = engine_of(driver)
    ids = torch.zeros(100_000, dtype=torch.int64)
    large = asked(driver, ids=ids, weights=None, offsets=torch.tensor([0, 100_000]), remember=False)
    assert engine._answers.shared_gather(large, lambda answer, request: answer(request)) is None
    found = together(engine, driver, *gathers(engine, [large, large]))
    assert same(found[0].result(BOUND_S).values, found[1].result(BOUND_S).values)
    assert batches(driver) == {}


def test_those_who_are_told_later_are_among_them(make_driver: MakeDriver) -> None:
    """Clients on the same host, whose answers are written to the memory of their lines."""
    driver = make_driver().create(make_schema())
    engine = engine_of(driver)
    driver.freeze(0)
    found: dict[int, Any] = {}
    memory: dict[int, torch.Tensor] = {}

    def tell(number: int, reply: Any, error: BaseException | None) -> None:
        assert error is None
        found[number] = reply

    def space(number: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        memory[number] = torch.empty(shape, dtype=dtype)
        return memory[number]

    requests = [asked(driver, 1), asked(driver, 2), asked(driver, 3, envelope=driver.envelope(0, epoch=2))]

    def begin() -> None:
        for number, request in enumerate(requests):
            engine.at_once.line_up_gather(
                request,
                caller=f"{number}",
                timeout_s=BOUND_S,
                tell=partial(tell, number),
                space=partial(space, number),
            )
        engine.at_once.hand_over()

    remote = together(engine, driver, *gathers(engine, [asked(driver, 4)]), then=begin)
    replies = [remote[0].result(BOUND_S)]
    wait_until(lambda: len(found) == 3)
    assert batches(driver) == {"batch of 3 to 4": 1}
    assert found[2] is None
    replies += [found[0], found[1]]
    for reply, request in zip(replies, [asked(driver, 4), *requests[:2]], strict=True):
        assert same(reply.values, driver.call(engine.gather(request)).values)
    for number in range(2):
        assert found[number].values.data_ptr() == memory[number].data_ptr()
