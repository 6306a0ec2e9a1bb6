"""Shards of this process: at work is not away."""

import asyncio
import logging
import threading

import pytest
import torch

import mempool
from mempool.client.routing import patience as patience_module
from mempool.client.routing.patience import Deadline, Patience, Watchdog
from mempool.errors import ShardUnavailable, StalePlacement


def waiting() -> tuple[tuple[int, str], ...]:
    return ((0, ""), (1, ""))


def deadline(timeout_s: float, patience: Patience | None, *, watchdog: Watchdog | None = None) -> Deadline:
    began_s = asyncio.get_running_loop().time()
    return Deadline(watchdog or Watchdog(), timeout_s, began_s=began_s, waiting_for=waiting, patience=patience)


def test_the_deadline_waits_for_work_and_says_so_once(  # type: ignore[no-untyped-def]
    wait, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(patience_module, "_QUIET_S", 0.02)
    at_work = True
    patience = Patience("embedded pool 'local'", lambda shard: "it is at 'gather'" if at_work and shard == 1 else "")

    def stop() -> None:
        nonlocal at_work
        at_work = False

    async def main() -> None:
        for _ in range(2):
            with deadline(0.05, patience):
                await asyncio.sleep(0.4)
        asyncio.get_running_loop().call_later(0.2, stop)
        with pytest.raises(TimeoutError), deadline(0.05, patience):
            await asyncio.Event().wait()

    with caplog.at_level(logging.WARNING, logger="mempool"):
        wait(main())
    (record,) = caplog.records
    assert "embedded pool 'local': a call has taken 0.0 s so far: it is at 'gather'." in record.getMessage()


def test_the_longest_work_ends_too(wait, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(patience_module, "LONGEST_WORK_S", 0.1)

    async def main() -> None:
        with pytest.raises(TimeoutError), deadline(0.01, Patience("it", lambda _: "work")):
            await asyncio.Event().wait()

    wait(main())


def test_each_of_many_calls_ends_at_its_own_deadline(wait) -> None:  # type: ignore[no-untyped-def]
    """By one timer of all, whatever the order in which they begin and end."""

    async def main() -> None:
        watchdog, loop = Watchdog(), asyncio.get_running_loop()
        ended: list[float] = []

        async def one(timeout_s: float, lasts_s: float) -> None:
            began_s = loop.time()
            try:
                with deadline(timeout_s, None, watchdog=watchdog):
                    await asyncio.sleep(lasts_s)
            except TimeoutError:
                assert loop.time() - began_s >= timeout_s - 1e-3
                ended.append(timeout_s)

        calls = [(0.30, 60.0), (0.05, 60.0), (0.20, 0.01), (0.10, 60.0), (60.0, 0.15)]
        await asyncio.wait_for(asyncio.gather(*(one(*call) for call in calls)), 30.0)
        assert ended == [0.05, 0.10, 0.30]

    wait(main())


def test_a_call_ends_at_the_moment_at_which_it_is_looked_at(wait) -> None:  # type: ignore[no-untyped-def]
    """Also where what is spent rounds to less than it may take: on a clock that stands still nothing would go on."""

    async def main() -> None:
        began_s, timeout_s = asyncio.get_running_loop().time(), 60.0
        while (began_s + timeout_s) - began_s >= timeout_s:
            timeout_s += 0.01
        bound = Deadline(Watchdog(), timeout_s, began_s=began_s)
        asyncio.get_running_loop().call_soon(bound.look, bound.at_s)
        with pytest.raises(TimeoutError), bound:
            await asyncio.Event().wait()

    wait(main())


def test_a_deadline_leaves_others_cancellations_alone(wait) -> None:  # type: ignore[no-untyped-def]
    """As ``asyncio.timeout`` does: who cancels the task as well is obeyed."""

    async def main() -> None:
        async def call() -> None:
            with deadline(0.05, None):
                await asyncio.Event().wait()

        task = asyncio.create_task(call())
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.wait({task}, timeout=30.0)
        assert task.cancelled()

    wait(main())


@pytest.mark.parametrize("found", [False, True])
def test_who_cancels_a_call_as_it_is_cut_off_is_obeyed(wait, found: bool) -> None:  # type: ignore[no-untyped-def]
    async def main() -> None:
        async def check() -> None:
            raise StalePlacement("moved")

        bound = Deadline(Watchdog(), 60.0, began_s=asyncio.get_running_loop().time(), check=check, silence_s=30.0)

        async def call() -> None:
            with bound:
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    assert bound.found() is None
                    raise

        task = asyncio.create_task(call())
        await asyncio.sleep(0)
        if found:
            bound.look(bound.at_s)
            await asyncio.sleep(0)  # it is found by now, and the call has not heard yet
        else:
            bound.look(bound.at_s + 60.0)
        task.cancel()
        await asyncio.wait({task}, timeout=20.0)
        await bound.rest()
        assert task.cancelled()

    wait(main())


@pytest.mark.parametrize("first", ["deadline", "check"])
def test_a_call_that_is_cut_off_twice_at_once_is_out_of_time(wait, first: str) -> None:  # type: ignore[no-untyped-def]
    """Its deadline ends in the moment in which it is found to go by an old view."""

    async def main() -> None:
        async def check() -> None:
            if first == "check":
                asyncio.get_running_loop().call_soon(bound.look, bound.at_s + 60.0)
            raise StalePlacement("moved")

        bound = Deadline(Watchdog(), 60.0, began_s=asyncio.get_running_loop().time(), check=check, silence_s=30.0)
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().call_soon(bound.look, bound.at_s + (60.0 if first == "deadline" else 0.0))
        with pytest.raises(TimeoutError), bound:
            await asyncio.Event().wait()
        assert not task.cancelling()
        await bound.rest()

    wait(main())


def test_a_watchdog_goes_on_with_another_loop() -> None:
    watchdog = Watchdog()

    async def main() -> None:
        with pytest.raises(TimeoutError), deadline(0.02, None, watchdog=watchdog):
            await asyncio.wait_for(asyncio.Event().wait(), 30.0)

    async def leave() -> None:
        with deadline(60.0, None, watchdog=watchdog):
            await asyncio.sleep(0)

    asyncio.run(leave())
    asyncio.run(main())


def test_an_embedded_call_outlasts_its_deadline_while_its_shard_works() -> None:
    """As where a kernel is compiled."""
    with mempool.local(timeout_s=0.3) as pool:
        table = pool.create_table(mempool.TableConfig(name="facts", num_slots=64, value_dim=8))
        ids = torch.tensor([[1, 2]])
        expected = table.gather(ids)
        done = threading.Event()
        (host,) = (pool.router._dial(shard.info) for shard in pool.status().shards)  # type: ignore[attr-defined]
        work = asyncio.run_coroutine_threadsafe(host._thread.run("compiling", lambda _: done.wait(1.2)), _loop())
        assert torch.equal(table.gather(ids), expected)
        assert work.result(30.0) is False


def test_an_idle_shard_that_does_not_answer_is_away_at_the_deadline() -> None:
    with mempool.local(timeout_s=0.3) as pool:
        table = pool.create_table(mempool.TableConfig(name="facts", num_slots=64, value_dim=8))
        (host,) = (pool.router._dial(shard.info) for shard in pool.status().shards)  # type: ignore[attr-defined]
        asyncio.run_coroutine_threadsafe(
            host.freeze(table.schema.table_id, 5.0, token="move", lease_s=60.0), _loop()
        ).result(30.0)
        with pytest.raises(ShardUnavailable, match="embedded pool 'local' did not answer within 0"):
            table.write(torch.tensor([1]), torch.zeros(1, 8))


def _loop() -> asyncio.AbstractEventLoop:
    from mempool.wire.channels.loop import io_loop

    return io_loop()
