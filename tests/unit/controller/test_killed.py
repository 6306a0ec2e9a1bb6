"""A controller that is killed at any of its calls: the next one finds a whole table or none, and finishes a rescale."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import torch

from mempool import errors
from mempool.config import resolve
from mempool.controller import Controller
from mempool.controller.mover import Mover
from mempool.types import ShardHost, ShardInfo
from mempool.wire.channels.loop import run

from .bench import CALL_S, Bench, config, train

EVERYTHING = torch.arange(600)
SCHEMA = resolve(config(layout="rows"))


class Killed:
    """What a controller reaches shards by: from its ``number``-th call on nothing arrives, or nothing is answered.

    Attributes:
        number: The call that it does not survive; 0: there is none.
        calls: How many it has made.
        died: Set when the call came that it did not survive.
    """

    def __init__(self, dial: Callable[[ShardInfo], ShardHost], *, arrives: bool) -> None:
        self._dial = dial
        self.number = 0
        self._arrives = arrives
        self.calls = self.under_way = 0
        self.died = asyncio.Event()

    def dial(self, info: ShardInfo) -> ShardHost:
        return _Cut(self, self._dial(info))  # type: ignore[return-value]  # all methods come through __getattr__

    async def call(self, method: Callable[..., Awaitable[Any]], *arguments: Any, **named: Any) -> Any:
        self.calls += 1
        number = self.calls
        survives = not self.number or number < self.number
        if survives or (number == self.number and self._arrives):
            self.under_way += 1
            try:
                answer = await method(*arguments, **named)
            finally:
                self.under_way -= 1
            if survives:
                return answer
        self.died.set()
        return await asyncio.Event().wait()


class _Cut:
    def __init__(self, killed: Killed, host: ShardHost) -> None:
        self._killed, self._host = killed, host

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **named: self._killed.call(getattr(self._host, name), *arguments, **named)


def doomed(bench: Bench, number: int, *, arrives: bool) -> tuple[Controller, Killed]:
    """Another controller of the bench's shards, which has adopted them and dies at one of its next calls."""
    killed = Killed(bench.fleet.dial, arrives=arrives)
    controller = Controller("bench", launcher=bench.fleet, dial=killed.dial, round_bytes=60_000)
    run(controller.adopt(shards_of(bench), wanted=bench.fleet.wanted), timeout_s=CALL_S)
    killed.number = killed.calls + number
    return controller, killed


def heir_of(bench: Bench) -> Controller:
    """The controller that comes after one that died."""
    heir = bench.heir()
    run(heir.adopt(shards_of(bench), wanted=bench.fleet.wanted), timeout_s=CALL_S)
    return heir


def shards_of(bench: Bench) -> list[ShardInfo]:
    return [host.info for _, host in sorted(bench.fleet.hosts.items())]


async def until_dead(work: Awaitable[Any], killed: Killed) -> bool:
    """Whether it died before its work was done."""
    task, died = asyncio.ensure_future(work), asyncio.ensure_future(killed.died.wait())
    async with asyncio.timeout(CALL_S):
        await asyncio.wait([task, died], return_when=asyncio.FIRST_COMPLETED)
        while killed.under_way:  # what it had sent before arrives
            await asyncio.sleep(0.001)
    finished = task.done()
    if finished:
        await task
    died.cancel()
    task.cancel()
    return not finished


@pytest.mark.parametrize("arrives", [False, True])
def test_a_creation_that_was_cut_off_leaves_a_whole_table_or_none(arrives: bool) -> None:
    outcomes: list[bool] = []
    with Bench(3) as bench:
        dead = True
        while dead:
            controller, killed = doomed(bench, len(outcomes) + 1, arrives=arrives)
            dead = run(until_dead(controller.create_table(SCHEMA), killed), timeout_s=CALL_S)
            heir = heir_of(bench)
            states = [run(host.status(), timeout_s=CALL_S).tables for host in bench.fleet.hosts.values()]
            tables = run(heir.tables(), timeout_s=CALL_S)
            outcomes.append(bool(tables))
            if tables:
                assert [[table.pending for table in each] for each in states] == [[False]] * 3
                table = bench.pool_of(heir).table("facts")
                assert table.rows(EVERYTHING).shape == (600, 128)
                train(table, 0)
                run(heir.drop_table("facts"), timeout_s=CALL_S)
            else:
                assert states == [()] * 3
                assert [run(host.views(), timeout_s=CALL_S) for host in bench.fleet.hosts.values()] == [()] * 3
    # Three calls attach it, the fourth decides, two more tell the others; the seventh is never made.
    assert outcomes == [False] * (3 if arrives else 4) + [True] * (4 if arrives else 3)


def test_a_pending_table_answers_no_client_and_says_so() -> None:
    with Bench(2) as bench:
        controller, killed = doomed(bench, 3, arrives=False)  # dies before anybody is told that it is made
        assert run(until_dead(controller.create_table(SCHEMA), killed), timeout_s=CALL_S)
        host = bench.fleet.hosts[0]
        (status,) = run(host.status(), timeout_s=CALL_S).tables
        assert status.pending
        assert status.bytes_to_fill == 0
        assert run(host.views(), timeout_s=CALL_S) == ()
        with pytest.raises(errors.ShardUnavailable, match="is being made"):
            run(host.freeze(status.table_id, 1.0, token="t", lease_s=1.0), timeout_s=CALL_S)


def rescale_dying_at(bench: Bench, shards: int, number: int, *, arrives: bool) -> bool:
    """Whether a controller died at that call of a rescale."""
    controller, killed = doomed(bench, number, arrives=arrives)

    async def rescale() -> None:
        async for _ in controller.rescale(shards):
            pass

    return run(until_dead(rescale(), killed), timeout_s=CALL_S)


@pytest.mark.parametrize("arrives", [False, True])
def test_the_same_rescale_ends_it_wherever_its_controllers_died(arrives: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Mover.__init__, "__kwdefaults__", {**(Mover.__init__.__kwdefaults__ or {}), "lease_s": 0.5})
    with Bench(2) as bench:
        table = bench.pool.create_table(config(layout="rows"))
        train(table, 0)
        values, number, deaths = table.rows(EVERYTHING), 1, 0
        for shards in (1, 2):
            for _ in range(4):
                number += 5
                deaths += rescale_dying_at(bench, shards, number, arrives=arrives)
            heir = heir_of(bench)
            bench.pool_of(heir).rescale(shards)
            status = run(heir.status(), timeout_s=CALL_S)
            assert (status.wanted_shards, status.unfinished, len(status.shards)) == (shards, "", shards)
            inherited = bench.pool_of(heir).table("facts")
            assert torch.equal(inherited.rows(EVERYTHING), values)
            train(inherited, shards)
            values = inherited.rows(EVERYTHING)
        assert deaths >= 4
