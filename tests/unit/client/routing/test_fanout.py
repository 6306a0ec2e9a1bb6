"""Asking shards together: replies in order, the gravest error, and who has not answered."""

import asyncio
import gc
from typing import Any

import pytest

from mempool.client.routing.fanout import Fanout, Traffic, Versions
from mempool.client.routing.plan import make_plan
from mempool.errors import DataLoss, InvalidRequest, MempoolError, ShardUnavailable, StalePlacement
from mempool.types import Envelope, Placement, ShardInfo, TableView
from tests.support.faulty import COLUMNS, make_schema

INFOS = tuple(ShardInfo(shard=shard, address=f"host-{shard}:1", incarnation=5 + shard) for shard in range(3))


def make_fanout(**known: int) -> Fanout:
    placement = Placement(
        table_id=1, epoch=4, owners=COLUMNS.astype("int32"), key_owners=COLUMNS[:0, 0].astype("int32")
    )
    view = TableView(schema=make_schema(), placement=placement, shards=INFOS)
    versions = Versions()
    if known:
        versions.saw(1, known["version"])
    return Fanout(make_plan(view), dial=lambda info: info, traffic=Traffic(), versions=versions)  # type: ignore[arg-type, return-value]


async def answers(host: Any, envelope: Envelope) -> tuple[Any, Envelope]:
    await asyncio.sleep(0.001 * (3 - host.shard))  # the last one first
    return host, envelope


def fails(error: MempoolError, *, after_s: float = 0.0) -> Any:
    async def fail(_: Any, __: Envelope) -> None:
        await asyncio.sleep(after_s)
        raise error

    return fail


async def is_silent(_: Any, __: Envelope) -> None:
    await asyncio.Event().wait()


def test_replies_are_in_the_order_of_the_calls_and_each_has_its_envelope(wait) -> None:  # type: ignore[no-untyped-def]
    fanout = make_fanout(version=9)
    replies = wait(fanout.each([(info, answers) for info in INFOS]))
    assert [host for host, _ in replies] == list(INFOS)
    assert [envelope for _, envelope in replies] == [
        Envelope(table_id=1, epoch=4, incarnation=5 + shard, table_version=9) for shard in range(3)
    ]
    assert fanout.waiting_for == ()
    assert wait(fanout.each([])) == []


def test_the_version_that_is_known_to_be_only_rises(wait) -> None:  # type: ignore[no-untyped-def]
    fanout = make_fanout()
    for version in (3, 2):
        fanout.saw(version)
        ((_, envelope),) = wait(fanout.each([(INFOS[0], answers)]))
        assert envelope.table_version == 3


@pytest.mark.parametrize(
    ("errors", "gravest"),
    [
        ([ShardUnavailable("away"), DataLoss("lost")], 1),
        ([StalePlacement("old"), ShardUnavailable("away")], 0),
        ([InvalidRequest("wrong"), StalePlacement("old")], 0),
    ],
)
def test_the_gravest_error_is_raised_and_names_its_shard(  # type: ignore[no-untyped-def]
    wait, errors: list[MempoolError], gravest: int
) -> None:
    fanout = make_fanout()
    with pytest.raises(type(errors[gravest])) as raised:
        wait(fanout.each([(info, fails(error)) for info, error in zip(INFOS, errors, strict=False)]))
    assert raised.value is errors[gravest]
    assert (raised.value.shard, raised.value.address) == (gravest, f"host-{gravest}:1")
    assert fanout.waiting_for == ()


def test_one_failure_ends_the_others(wait) -> None:  # type: ignore[no-untyped-def]
    ended = []

    async def long(host: Any, _: Envelope) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(host.shard)

    with pytest.raises(DataLoss):
        wait(
            make_fanout().each([(INFOS[0], long), (INFOS[1], fails(DataLoss("lost"), after_s=0.001)), (INFOS[2], long)])
        )
    assert sorted(ended) == [0, 2]


def test_where_all_are_to_hear_one_failure_ends_nobody(wait) -> None:  # type: ignore[no-untyped-def]
    heard = []

    async def hears(host: Any, _: Envelope) -> None:
        await asyncio.sleep(0.005)
        heard.append(host.shard)

    calls = [(INFOS[0], hears), (INFOS[1], fails(ShardUnavailable("away"))), (INFOS[2], hears)]
    with pytest.raises(ShardUnavailable, match="away"):
        wait(make_fanout().each(calls, to_the_end=True))
    assert sorted(heard) == [0, 2]


def test_those_who_did_not_answer_in_time_are_known(wait) -> None:  # type: ignore[no-untyped-def]
    fanout = make_fanout()

    async def main() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await fanout.each([(INFOS[0], answers), (INFOS[1], is_silent), (INFOS[2], is_silent)])

    wait(main())
    assert fanout.waiting_for == ((1, "host-1:1"), (2, "host-2:1"))


def test_errors_of_calls_that_were_cut_off_are_not_left_to_be_logged(wait) -> None:  # type: ignore[no-untyped-def]
    logged: list[str] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: logged.append(context["message"]))
        try:
            calls = [(INFOS[0], fails(ShardUnavailable("away"))), (INFOS[1], is_silent)]
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await make_fanout().each(calls, to_the_end=True)
            gc.collect()
            await asyncio.sleep(0)
        finally:
            loop.set_exception_handler(None)

    wait(main())
    assert logged == []
