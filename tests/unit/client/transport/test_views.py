"""Views that a client asks for again: it is told what is other, by whoever still has the view that it knows."""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mempool.client.transport.pool import GrpcPool
from mempool.config import TableConfig, resolve
from mempool.placement.changes import ToldViews
from mempool.types import Placement, ShardInfo, TableView
from mempool.wire import methods
from mempool.wire.channels.grpc_channel import GrpcChannels
from mempool.wire.channels.loop import run
from mempool.wire.codecs.tables import AskTable, ToldTable
from tests.unit.client.grpc_pool import GrpcPoolHere

PAGE = 4
CONFIG = TableConfig(name="facts", num_slots=16 * PAGE, value_dim=12, block_dim=4, page_slots=PAGE, layout="rows")


class Seen:
    """A ``Channel`` that notes what is asked for and answered."""

    def __init__(self, channel: Any, notes: list[tuple[AskTable, ToldTable]]) -> None:
        self._channel, self._notes = channel, notes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._channel, name)

    async def call(self, method: Any, request: Any, **options: Any) -> Any:
        reply = await self._channel.call(method, request, **options)
        if method is methods.GET_TABLE:
            self._notes.append((request, reply))
        return reply


@pytest.fixture(scope="module")
def here() -> Iterator[GrpcPoolHere]:
    pool = GrpcPoolHere(shards=4)
    yield pool
    pool.close()


def test_after_a_rescale_a_client_hears_what_has_moved(here: GrpcPoolHere) -> None:
    notes: list[tuple[AskTable, ToldTable]] = []
    channels = GrpcChannels()

    async def use() -> None:
        pool = GrpcPool([here.address], lambda address: Seen(channels(address), notes))  # type: ignore[arg-type, return-value]
        made = await pool.create_table(resolve(CONFIG))
        assert same(await pool.table("facts"), made)
        async for _ in pool.rescale(5):
            pass
        moved = await pool.table("facts")
        assert moved.placement.epoch > made.placement.epoch
        other = GrpcPool([here.infos[0].address], lambda address: Seen(channels(address), notes))  # type: ignore[arg-type, return-value]
        assert same(await other.table("facts"), moved)
        assert same(await other.table("facts"), moved)
        for each in (pool, other):
            await each.close()

    run(use(), 60.0)
    changes = [reply.change for _, reply in notes]
    assert [change is not None for change in changes] == [True, True, False, True]
    first, second, _, last = changes
    assert first is not None
    assert second is not None
    assert last is not None
    assert (len(first.pages), len(last.pages)) == (0, 0)
    assert 0 < len(second.pages) < 16


def same(first: TableView, second: TableView) -> bool:
    return (
        first.schema == second.schema
        and first.placement.epoch == second.placement.epoch
        and first.placement.same_owners(second.placement)
        and set(first.shards) == set(second.shards)
    )


def view_of(epoch: int, moved: int, pages: int = 16) -> TableView:
    schema = replace(resolve(CONFIG.model_copy(update={"num_slots": pages * PAGE})), table_id=5)
    owners = np.zeros((pages, 3), np.int32)
    owners[:moved] = 1
    placement = Placement(table_id=5, epoch=epoch, owners=owners, key_owners=np.zeros(0, np.int32))
    shards = tuple(ShardInfo(shard=shard, address=f"s{shard}:1", incarnation=1) for shard in range(2))
    return TableView(schema=schema, placement=placement, shards=shards)


class Place:
    """A ``Channel`` to whoever answers so; every message goes through its bytes.

    Attributes:
        asked: What was asked, as it came.
        num_bytes: Of each answer.
    """

    def __init__(self, answer: Callable[[AskTable], ToldTable]) -> None:
        self._answer = answer
        self.asked: list[AskTable] = []
        self.num_bytes: list[int] = []

    async def call(self, method: Any, request: Any, **_: Any) -> Any:
        self.asked.append(method.request.decode(method.request.encode(request)))
        frame = method.reply.encode(self._answer(self.asked[-1]))
        self.num_bytes.append(len(frame))
        return method.reply.decode(frame)


def asked_twice(answer: Callable[[AskTable], ToldTable]) -> tuple[Place, list[TableView]]:
    place = Place(answer)

    async def use() -> list[TableView]:
        pool = GrpcPool(["here:1"], lambda _: place)  # type: ignore[arg-type, return-value]
        return [await pool.table("facts") for _ in range(2)]

    return place, asyncio.run(use())


def test_a_few_pages_of_many_are_told_in_few_bytes() -> None:
    told, views = ToldViews(), iter([view_of(1, 0, 2**14), view_of(2, 3, 2**14)])

    def answer(request: AskTable) -> ToldTable:
        view = next(views)
        told.tell(view)
        change = None if request.known is None else told.change(request.known, view)
        return ToldTable(view=view) if change is None else ToldTable(change=change)

    place, found = asked_twice(answer)
    assert same(found[1], view_of(2, 3, 2**14))
    assert place.num_bytes[0] > 4 * 3 * 2**14
    assert place.num_bytes[1] < 300


def test_who_knows_of_no_changes_answers_with_the_view() -> None:
    views = iter([view_of(1, 0), view_of(2, 3)])
    place, found = asked_twice(lambda _: ToldTable(view=next(views)))
    assert same(found[1], view_of(2, 3))
    assert [request.known is not None for request in place.asked] == [False, True]


def test_where_a_change_makes_another_view_the_view_is_asked_for() -> None:
    told = ToldViews()
    told.tell(view_of(1, 0))

    def answer(request: AskTable) -> ToldTable:
        if request.known is None:
            return ToldTable(view=view_of(2, 3) if len(place_asked) else view_of(1, 0))
        place_asked.append(request)
        change = told.change(request.known, view_of(2, 3))
        assert change is not None
        return ToldTable(change=replace(change, digest=1))

    place_asked: list[AskTable] = []
    place, found = asked_twice(answer)
    assert same(found[1], view_of(2, 3))
    assert [request.known is not None for request in place.asked] == [False, True, False]
