"""Moments that nobody waits for any more."""

import asyncio
import time
from contextlib import suppress

import torch

from mempool.controller.calls import ShardCalls
from mempool.controller.saving.cut import Owner
from mempool.controller.saving.moment import Moments
from mempool.types import ShardHost
from mempool.wire.channels.loop import run
from tests.unit.controller.bench import CALL_S, Bench, config


def test_tables_go_on_at_once_where_a_moment_is_given_up() -> None:
    with Bench(3) as bench:
        table = bench.pool.create_table(config(layout="rows"))
        calls = ShardCalls("bench", bench.fleet.dial)
        view = bench.view(table.name)

        async def given_up() -> None:
            stands = asyncio.Event()

            async def hang(_: ShardHost, __: Owner, ___: int) -> None:
                stands.set()
                await asyncio.Event().wait()

            moments = Moments(roster=bench.controller._roster, calls=calls, trainer_lease_s=10.0, clock=time.monotonic)
            taking = asyncio.create_task(moments.take([view], "a" * 32, hang))
            await asyncio.wait_for(stands.wait(), CALL_S)
            taking.cancel()
            with suppress(asyncio.CancelledError):
                await taking

        run(given_up(), timeout_s=2 * CALL_S)
        assert all("thaw" in host.calls for host in bench.fleet.hosts.values()), "nobody waits for a freeze's lease"
        table.gather(torch.arange(12).reshape(3, 4), torch.ones(3, 4)).sum().backward()  # type: ignore[no-untyped-call]
        assert table.commit(lr=0.1) == 1
