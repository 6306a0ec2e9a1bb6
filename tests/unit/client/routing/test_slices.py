"""Calls of any size as messages of a bounded one."""

import asyncio
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mempool
from mempool import FlatKeys, HierarchicalKeys, ProductKeys, optim
from mempool.client.routing import slices as slices_module
from mempool.client.routing.retry import Backoff
from mempool.client.routing.router import Router
from mempool.client.routing.slices import MESSAGE_BYTES, WINDOW, slices, some_at_a_time, together
from mempool.client.training.session import Session
from mempool.errors import Overloaded
from mempool.types import GatherRequest, ProductKeySpec, ScoreRequest, StepId, UpdateRequest
from mempool.types.bags import Bags
from tests.support.faulty import HEALING, LAYOUTS, Fault, FaultyPool, make_schema

STEP = StepId(group="g", rank=0, step=1)


@settings(deadline=None)
@given(st.integers(0, 5_000), st.integers(0, 2**24))
def test_slices_cover_all_once_in_messages_of_bounded_size(count: int, item_bytes: int) -> None:
    found = slices(count, item_bytes)
    assert found[0][0] == 0
    assert found[-1][1] == count
    assert all(first[1] == second[0] for first, second in pairwise(found))
    assert all((end - first) * item_bytes <= MESSAGE_BYTES + item_bytes for first, end in found)
    assert all(end > first for first, end in found) or count == 0
    if count * item_bytes <= MESSAGE_BYTES:
        assert len(found) == 1


def test_what_has_no_items_is_asked_once() -> None:
    assert slices(0, 100) == [(0, 0)]


def test_some_are_under_way_at_a_time_and_answers_keep_their_order() -> None:
    under_way = most = 0

    async def call(number: int) -> int:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.001 * (number % 3))
        under_way -= 1
        return number

    async def main() -> list[int]:
        return await some_at_a_time([lambda number=number: call(number) for number in range(11)])  # type: ignore[misc]

    assert asyncio.run(main()) == list(range(11))
    assert most == WINDOW


def test_one_that_fails_ends_the_others() -> None:
    ended: list[str] = []

    async def fails() -> None:
        raise ValueError("no")

    async def waits() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    async def main() -> None:
        with pytest.raises(ValueError, match="no"):
            await together([waits, fails])

    asyncio.run(main())
    assert ended == ["cancelled"]


def test_one_that_finds_no_room_is_asked_again_and_the_others_are_not() -> None:
    asked = [0] * 9
    refused = {2: 1, 3: 3, 8: slices_module._TRIES - 1}

    async def call(number: int) -> int:
        asked[number] += 1
        if asked[number] <= refused.get(number, 0):
            raise Overloaded("full", retry_after_s=0.001)
        return number

    async def main() -> list[int]:
        return await some_at_a_time([partial(call, number) for number in range(9)])

    assert asyncio.run(main()) == list(range(9))
    assert asked == [1 + refused.get(number, 0) for number in range(9)]


@pytest.mark.parametrize("retry_after_s", [-1.0, 0.0, float("nan"), float("inf"), 1e9])
def test_one_that_never_finds_room_fails_in_the_end(monkeypatch: pytest.MonkeyPatch, retry_after_s: float) -> None:
    monkeypatch.setattr(slices_module, "_LONGEST_PAUSE_S", 0.001)
    asked = 0

    async def call() -> None:
        nonlocal asked
        asked += 1
        raise Overloaded("full", retry_after_s=retry_after_s)

    async def main() -> None:
        with pytest.raises(Overloaded, match="full"):
            await some_at_a_time([call, partial(asyncio.sleep, 0)])

    asyncio.run(main())
    assert asked == slices_module._TRIES


@pytest.mark.parametrize("fault", HEALING)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_happens_between_two_messages_of_a_gather_changes_nothing(
    wait, monkeypatch: pytest.MonkeyPatch, layout: str, fault: Fault
) -> None:  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(0)
    bags = Bags(
        ids=torch.tensor([5, 5, 63, 1, 5, 20, 40, 63, 0, 31]),
        weights=torch.randn(10, generator=generator),
        offsets=torch.tensor([0, 0, 3, 3, 7, 10, 10]),
    )
    grads = torch.randn(6, 12, generator=generator)

    async def step(*faults: Fault | None, forgets: bool = False) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        pool = FaultyPool(LAYOUTS[layout])
        router = Router(pool, dial=pool.dial, backoff=Backoff(first_s=0.001, longest_s=0.001))
        pool.shards[0].faults["gather"] = list(faults)  # type: ignore[arg-type]
        session = Session(router, table_id=1, group="g")
        values, record = await session.gather(bags, remember=True)
        if forgets:  # one message of several
            first, *_ = (request for request in pool.shards[0].requests("gather") if request.remember)
            await pool.shards[0].gather(replace(first, remember=False, release=(record.lookup_id + 1,)))
        found = await session.update(record, grads, hold=True, want_weight_grad=True)
        missing = [request.ids is not None for request in pool.shards[0].requests("update")]
        assert not forgets or missing == [False, True]
        assert await session.commit(lr=0.5) == 1
        await session.coordinator.close(timeout_s=10.0)
        return values, found, [pool.values]

    whole = wait(step())
    monkeypatch.setattr(slices_module, "MESSAGE_BYTES", 4 * 12)
    for values, found, rows in (wait(step(None, fault)), wait(step(None, None, forgets=True))):
        assert torch.equal(values, whole[0])
        assert torch.equal(found, whole[1])
        assert torch.equal(rows[0], whole[2][0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weights", [True, False])
def test_large_answers_come_in_several_messages_and_nothing_else_changes(
    wait, monkeypatch: pytest.MonkeyPatch, layout: str, weights: bool
) -> None:  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(0)
    bags = Bags(
        ids=torch.randint(0, 64, (10,), generator=generator),
        weights=torch.randn(10, generator=generator) if weights else None,
        offsets=torch.tensor([0, 3, 3, 7, 10]),
    )
    grads = torch.randn(4, 12, generator=torch.Generator().manual_seed(1))

    async def step() -> tuple[FaultyPool, Tensor, Tensor | None]:
        pool = FaultyPool(LAYOUTS[layout])
        router = Router(pool, dial=pool.dial)
        values, record = await router.gather(1, bags=bags, remember=True)
        found = await router.call(
            1, lambda attempt: attempt.update(record, grads, step_id=STEP, sequence=1, hold=True, want_weight_grad=True)
        )
        for shard in pool.shards:
            (request,) = shard.requests("update")
            assert isinstance(request, UpdateRequest)
            assert request.ids is None  # remembered there, all of them
            assert request.lookups == len(shard.requests("gather"))
        asked = [{request.lookup_id for request in shard.requests("gather")} for shard in pool.shards]
        router.release(record)()
        await router.gather(1, bags=bags)  # which tells what may be forgotten
        told = [{number for request in shard.requests("gather") for number in request.release} for shard in pool.shards]
        assert told == asked
        return pool, values, found

    _, whole_values, whole_found = wait(step())
    monkeypatch.setattr(slices_module, "MESSAGE_BYTES", 4 * 12)
    pool, values, found = wait(step())
    assert torch.equal(values, whole_values)
    assert found is not None
    assert whole_found is not None
    assert torch.equal(found, whole_found)
    assert max(len(shard.requests("gather")) for shard in pool.shards) > 2


def test_what_few_bags_of_each_shard_take_is_one_message(wait, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    pool = FaultyPool(LAYOUTS["rows"])
    router = Router(pool, dial=pool.dial)
    bags = Bags(ids=torch.arange(64), weights=None, offsets=torch.arange(65))  # 24, 24 and 16 bags of the shards
    expected = pool.values[:64]
    for bags_of_message, messages in ((24, 1), (23, 2), (8, 3)):
        monkeypatch.setattr(slices_module, "MESSAGE_BYTES", bags_of_message * 4 * 12)
        values, record = wait(router.gather(1, bags=bags))
        asked = [shard.requests("gather")[-messages:] for shard in pool.shards]
        assert record.lookups == messages
        assert [len(shard.requests("gather")) for shard in pool.shards] == [messages] * 3
        assert [sum(request.offsets.numel() - 1 for request in some) for some in asked] == [24, 24, 16]
        assert max(request.offsets.numel() - 1 for some in asked for request in some) <= bags_of_message
        assert torch.equal(values, expected)
        for shard in pool.shards:
            shard.calls.clear()


@pytest.mark.parametrize(
    "keys",
    [FlatKeys(key_dim=3), ProductKeys(heads=2, key_dim=4), HierarchicalKeys(key_dim=3, optimizer=optim.SGD(lr=0.1))],
)
def test_many_queries_go_in_several_messages(monkeypatch: pytest.MonkeyPatch, keys: Any) -> None:
    tail = (keys.key_dim,) if isinstance(keys, FlatKeys) else (2, keys.key_dim)
    queries = torch.randn(5, *tail, generator=torch.Generator().manual_seed(3))
    with mempool.local(shards=2, device="cpu") as pool:
        table = pool.create_table(
            mempool.TableConfig(name="facts", num_slots=64, value_dim=8, keys=keys, optimizer=optim.SGD(lr=0.1))
        )
        whole = table.lookup(queries, 3)
        monkeypatch.setattr(slices_module, "MESSAGE_BYTES", 90)  # of two queries, or of one
        found = table.lookup(queries, 3)
    assert all(torch.equal(one, other) for one, other in zip(found, whole, strict=True))


def test_messages_that_ask_are_bounded_too(wait, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """Of many pairs for a bag, or queries wider than their answers."""
    ids, offsets = torch.randint(0, 64, (400,)), torch.arange(0, 401, 50)
    bags = Bags(ids=ids, weights=torch.randn(400), offsets=offsets)
    queries = torch.randn(6, 2, 4)

    async def ask() -> tuple[Tensor, list[GatherRequest], list[ScoreRequest]]:
        schema = make_schema(keys=ProductKeySpec(heads=2, key_dim=4), stride=8)
        pool = FaultyPool(LAYOUTS["one"], schema=schema, key_owners=[0, 0])
        router = Router(pool, dial=pool.dial)
        values, _ = await router.gather(1, bags=bags)
        await router.score(1, queries=queries, topk=1)
        shard = pool.shards[0]
        return values, shard.requests("gather"), shard.requests("score")

    whole, *_ = wait(ask())
    monkeypatch.setattr(slices_module, "MESSAGE_BYTES", 1250)  # of two bags
    values, gathers, _ = wait(ask())
    assert torch.equal(values, whole)
    assert [request.ids.shape[0] for request in gathers] == [100] * 4
    monkeypatch.setattr(slices_module, "MESSAGE_BYTES", 2 * 2 * 4 * 4)  # of two queries
    *_, scores = wait(ask())
    assert [request.queries.shape[0] for request in scores] == [2] * 3
