"""Answers in pieces: the bits of the whole, others in between, and an end where the table goes away."""

import asyncio
import time
from collections.abc import Generator, Iterator
from dataclasses import replace
from types import GeneratorType
from typing import Any

import pytest
import torch

from mempool.errors import InvalidRequest, NotFound, RequestTooLarge, StalePlacement
from mempool.shard.answers import Answers
from mempool.shard.reading import pieces as cutting
from mempool.shard.reading import rows
from mempool.shard.reading.begun import parts_at_once
from mempool.shard.work import pace
from mempool.types import (
    FlatKeySpec,
    GatherReply,
    GatherRequest,
    OwnKeySpec,
    ProductKeySpec,
    ReadRowsRequest,
    ScoreReply,
    ScoreRequest,
    UpdateReply,
)
from mempool.types import bags as bags_module
from tests.contract.bags import make_bags
from tests.contract.driver import Driver, make_schema

from .conftest import MakeDriver

LENGTHS = (40, 0, 7, 90, 0, 0, 1, 300, 0, 12)
GRADS = torch.randn(len(LENGTHS), 10, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So small that each bag, query or row is one."""
    monkeypatch.setattr(pace, "PIECE_BYTES", 40)
    monkeypatch.setattr(pace, "WHOLE_BYTES", 40)
    monkeypatch.setattr(rows, "COPY_PIECE_BYTES", 40)
    monkeypatch.setattr(cutting, "SCORE_PIECE_PRODUCTS", 1)
    monkeypatch.setattr(cutting, "_LEAST_QUERIES", 1)


def _gather(driver: Driver, **changes: Any) -> GatherRequest:
    bags = make_bags(5, lengths=LENGTHS, num_slots=49)
    request = GatherRequest(
        envelope=driver.envelope(0),
        lookup_id=7,
        ids=bags.ids,
        weights=bags.weights,
        offsets=bags.offsets,
        remember=True,
    )
    return replace(request, **changes)


def _all(driver: Driver, schema: Any, step: int = 1) -> Iterator[tuple[str, Any]]:
    """(method, request) of everything that is read."""
    yield "gather", _gather(driver)
    yield "gather", _gather(driver, reply_dtype="bfloat16", weights=None)
    bags = make_bags(5, lengths=LENGTHS, num_slots=49)
    yield "update", driver.update_request(0, step, 3, GRADS, bags=bags)
    for array in ("values", "values.sum", *(["keys"] if schema.keys else [])):
        heads = array == "keys" and isinstance(schema.keys, ProductKeySpec)
        ids = torch.tensor([1, 0, 1]) if heads else torch.tensor([5, 0, 48, 5])
        yield "read_rows", ReadRowsRequest(envelope=driver.envelope(0), array=array, ids=ids)
    if schema.keys:
        heads_ = schema.num_key_pages or 1
        queries = torch.randn(6, heads_, schema.keys.key_dim, generator=torch.Generator().manual_seed(2))
        yield "score", ScoreRequest(envelope=driver.envelope(0), queries=queries, topk=5)


@pytest.mark.parametrize("layout", ["one", "mixed"])
@pytest.mark.parametrize("keys", [None, FlatKeySpec(key_dim=6), ProductKeySpec(heads=2, key_dim=4)])
def test_pieces_have_the_bits_of_the_whole(
    make_driver: MakeDriver, request: pytest.FixtureRequest, layout: str, keys: Any
) -> None:
    schema = make_schema(num_slots=49, stride=7, keys=keys)
    driver = make_driver(3).create(schema, layout, (0, 0) if isinstance(keys, ProductKeySpec) else ())
    engine: Any = driver.host(0)
    inner: Answers = engine._answers
    whole = [getattr(inner, method)(asked) for method, asked in _all(driver, schema)]
    assert not any(isinstance(reply, GeneratorType) for reply in whole)
    driver.discard(1)
    request.getfixturevalue("in_pieces")
    pieces = [getattr(inner, method)(asked) for method, asked in _all(driver, schema, 2)]
    assert all(isinstance(reply, GeneratorType) for reply in pieces)
    asked_of_engine = [driver.call(getattr(engine, method)(asked)) for method, asked in _all(driver, schema, 2)]
    for one, other in zip(whole, asked_of_engine, strict=True):
        assert type(one) is type(other)
        for name in type(one).__dataclass_fields__:
            left, right = getattr(one, name), getattr(other, name)
            assert torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right, (type(one), name)
    assert driver.status(0).updates_held == 1
    for generator in pieces:
        generator.close()


@pytest.mark.parametrize("layout", ["one", "mixed"])
@pytest.mark.parametrize("cut", [False, True], ids=["whole", "in pieces"])
def test_answers_are_written_where_they_are_wanted(
    make_driver: MakeDriver, request: pytest.FixtureRequest, layout: str, cut: bool
) -> None:
    schema = make_schema()
    driver = make_driver(3).create(schema, layout)
    engine: Any = driver.host(0)
    inner: Answers = engine._answers
    requests = [(method, asked) for method, asked in _all(driver, schema, 2) if method in ("gather", "update")]
    expected = [
        getattr(inner, method)(asked) for method, asked in _all(driver, schema) if method in ("gather", "update")
    ]
    driver.discard(1)
    if cut:
        request.getfixturevalue("in_pieces")
    for (method, asked), whole in zip(requests, expected, strict=True):
        name = "values" if method == "gather" else "weight_grad"
        right = getattr(whole, name)
        out = torch.full_like(right, float("nan"))

        def space(shape: tuple[int, ...], dtype: torch.dtype, out: torch.Tensor = out) -> torch.Tensor:
            assert (shape, dtype) == (tuple(out.shape), out.dtype)
            return out

        reply = getattr(inner, method)(asked, space=space)
        if isinstance(reply, GeneratorType):
            reply = _end_of(reply)
        assert getattr(reply, name) is out
        assert torch.equal(out, right)


def _end_of(pieces: Generator[None, None, Any]) -> Any:
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            return end.value


def test_an_answer_is_counted_before_it_is_made(make_driver: MakeDriver) -> None:
    """Small requests about large answers are refused for what they would hold."""
    driver = make_driver(client_memory_bytes=2**20).create(make_schema())
    many = torch.zeros(30_000, dtype=torch.int64)
    requests = [
        ("gather", _gather(driver, ids=many[:0], weights=None, offsets=many)),
        ("read_rows", ReadRowsRequest(envelope=driver.envelope(0), array="values", ids=many)),
    ]
    for method, request in requests:
        with pytest.raises(RequestTooLarge, match=rf"the answer to {method} of 1,.* does not fit"):
            driver.call(getattr(driver.host(0), method)(request))
    assert driver.call(driver.host(0).status()).queued_bytes == 0
    driver.gather(make_bags(1))


@pytest.mark.usefixtures("in_pieces")
def test_others_are_answered_between_pieces(make_driver: MakeDriver) -> None:
    driver = make_driver().create(make_schema())
    bags = make_bags(3, lengths=(2,) * 400)
    seen: list[str] = []

    async def both() -> None:
        async def ask(name: str, request: GatherRequest) -> None:
            await driver.host(0).gather(request)
            seen.append(name)

        long = _gather(driver, ids=bags.ids, weights=bags.weights, offsets=bags.offsets)
        async with asyncio.timeout(30):
            await asyncio.gather(ask("long", long), *(ask("short", _gather(driver)) for _ in range(3)))

    driver.call(both())
    assert seen == ["short", "short", "short", "long"]


@pytest.mark.usefixtures("in_pieces")
@pytest.mark.parametrize("how", ["drop", "move"])
def test_a_table_that_goes_away_ends_the_pieces(make_driver: MakeDriver, how: str) -> None:
    driver = make_driver(2).create(make_schema(), "one")
    for method, asked in _all(driver, driver.schema):
        engine: Any = driver.host(0)
        pieces = getattr(engine._answers, method)(asked)
        next(pieces)
        next(pieces)
        if how == "drop":
            driver.drop()
        else:
            driver.move("rows")
        with pytest.raises((NotFound, StalePlacement)):
            list(pieces)
        driver.drop()
        driver.create(make_schema(), "one")


@pytest.mark.usefixtures("in_pieces")
def test_an_update_in_pieces_is_held_once(make_driver: MakeDriver) -> None:
    driver = make_driver().create(make_schema())
    request = driver.update_request(0, 1, 3, GRADS, bags=make_bags(5, lengths=LENGTHS, num_slots=49))
    inner: Answers = driver.host(0)._answers  # type: ignore[attr-defined]
    first, second = inner.update(request), inner.update(request)
    for pieces in (first, second):
        assert not isinstance(pieces, UpdateReply)
        for _ in pieces:
            pass
    assert driver.status(0).updates_held == 1


def test_answers_that_no_message_holds_are_refused_first(make_driver: MakeDriver) -> None:
    driver = make_driver(max_message_bytes=2048).create(make_schema())
    before = driver.call(driver.host(0).status()).context_bytes
    empty = torch.zeros(1001, dtype=torch.int64)
    with pytest.raises(RequestTooLarge, match="1,000 bags of 0 pairs would be answered by 40,000 bytes"):
        driver.call(driver.host(0).gather(_gather(driver, ids=empty[:0], weights=None, offsets=empty)))
    read = ReadRowsRequest(envelope=driver.envelope(0), array="values", ids=torch.zeros(100, dtype=torch.int64))
    with pytest.raises(RequestTooLarge, match="100 rows of 'values'"):
        driver.call(driver.host(0).read_rows(read))
    assert driver.call(driver.host(0).status()).context_bytes == before
    driver.gather(make_bags(1))


def test_answers_for_clients_have_a_limit_of_their_own_and_a_row_travels_whatever_its_size(
    make_driver: MakeDriver,
) -> None:
    driver = make_driver(max_message_bytes=2**20, max_answer_bytes=1024 + 4).create(make_schema())
    empty = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(RequestTooLarge, match="a gather of 1 bags"):
        driver.call(driver.host(0).gather(_gather(driver, ids=empty[:0], weights=None, offsets=empty)))

    def read(rows: int) -> ReadRowsRequest:
        return ReadRowsRequest(envelope=driver.envelope(0), array="values", ids=torch.zeros(rows, dtype=torch.int64))

    with pytest.raises(RequestTooLarge, match="2 rows of 'values'"):
        driver.call(driver.host(0).read_rows(read(2)))
    assert driver.call(driver.host(0).read_rows(read(1))).rows.shape[0] == 1


@pytest.mark.parametrize("lengths", [(), (0,), (5,), (0, 0, 0), (100, 1), LENGTHS])
def test_parts_cover_every_bag_once(monkeypatch: pytest.MonkeyPatch, lengths: tuple[int, ...]) -> None:
    monkeypatch.setattr(pace, "PIECE_BYTES", 400)
    made = make_bags(1, lengths=lengths)
    bags = bags_module.Bags(made.ids, made.weights, made.offsets)
    parts = list(parts_at_once(bags, 40, pace.Pace(time.monotonic)))
    assert [part[0] for part in parts] == [0, *(part[1] for part in parts)][: len(parts)]
    assert sum(part.num_bags for _, _, part in parts) == len(lengths)
    for first, end, part in parts:
        assert part.num_bags == end - first <= 1  # ten rows are read in less time than one bag's answer takes
        assert part.num_pairs <= 10 or part.num_bags == 1
        assert int(part.offsets[0]) == 0
        assert int(part.offsets[-1]) == part.num_pairs
    assert torch.equal(torch.cat([part.ids for _, _, part in parts] or [made.ids]), made.ids)


@pytest.mark.parametrize(("topk", "queries"), [(1, 16), (3, 16), (4, 1), (49, 1)])
def test_queries_that_share_nothing_are_scored_one_by_one(
    make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch, topk: int, queries: int
) -> None:
    """Seconds of the engine's thread, of five queries for a quarter of all slots each, were one piece."""
    monkeypatch.setattr(cutting, "SCORE_PIECE_PRODUCTS", 1)
    driver = make_driver().create(
        make_schema(num_slots=49, keys=ProductKeySpec(heads=3, key_dim=2)), key_owners=[0, 0, 0]
    )
    engine: Any = driver.host(0)
    table = engine._tenancy.fenced(driver.envelope(0))
    assert cutting.queries_at_once(table.storage, topk) == queries


def test_long_reads_are_cut_sooner_where_others_wait(make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "PIECE_BYTES", 40)
    driver = make_driver().create(make_schema())
    inner: Answers = driver.host(0)._answers  # type: ignore[attr-defined]
    bags = make_bags(5, lengths=LENGTHS, num_slots=49)
    request = _gather(driver, ids=bags.ids, weights=bags.weights, offsets=bags.offsets)
    whole = inner.gather(request)
    assert isinstance(whole, GatherReply)
    monkeypatch.setattr(inner._pace, "_others_wait", lambda: True)
    pieces = inner.gather(request)
    assert not isinstance(pieces, GatherReply)
    *_, found = _values(pieces)
    assert torch.equal(found, whole.values)


def _values(pieces: Generator[None, None, GatherReply]) -> Iterator[torch.Tensor]:
    """What comes of work in pieces."""
    reply = yield from pieces  # type: ignore[misc]
    yield reply.values


def test_an_update_is_of_a_bounded_number_of_lookups_and_their_copy_is_reserved(make_driver: MakeDriver) -> None:
    driver = make_driver().create(make_schema())
    inner: Answers = driver.host(0)._answers  # type: ignore[attr-defined]
    request = replace(driver.update_request(0, 1, 3, GRADS, bags=make_bags(5, lengths=LENGTHS, num_slots=49)), ids=None)
    request = replace(request, weights=None, offsets=None)
    with pytest.raises(InvalidRequest, match="lookups"):
        inner.update(replace(request, lookups=4097))
    reserved: list[int] = []
    inner._reserve = reserved.append
    bags = bags_module.Bags(torch.tensor([1, 2]), None, torch.tensor([0, 2]))
    for number in (request.lookup_id, request.lookup_id + 1):
        inner._contexts.remember(number, table_id=request.envelope.table_id, epoch=request.envelope.epoch, bags=bags)
    with pytest.raises(InvalidRequest, match="grads must be"):
        inner.update(replace(request, lookups=2))
    assert reserved == [2 * bags.num_bytes]


GROUPED = make_schema(
    name="facts:keys", num_slots=49, stride=7, block_dim=10, keys=OwnKeySpec(sections=1, rows=49, groups=7)
)


def test_small_groups_are_cut_by_how_many_they_are(make_driver: MakeDriver) -> None:
    """To begin with a group takes as long as to score many slots."""
    driver = make_driver().create(GROUPED, [[0]] * 7)
    table = driver.host(0)._tenancy.fenced(driver.envelope(0))  # type: ignore[attr-defined]
    assert cutting.queries_at_once(table.storage, 3) == 2**32 // 70
    assert cutting.queries_at_once(table.storage, 3, probes=4) == 2**32 // (4 * 2**17)


@pytest.mark.usefixtures("in_pieces")
def test_pieces_of_groups_have_their_first_version_and_those_of_slots_their_last(make_driver: MakeDriver) -> None:
    """So that who asks for both sees whether a commit came between any two."""
    driver = make_driver().create(GROUPED, [[0]] * 7)
    inner: Answers = driver.host(0)._answers  # type: ignore[attr-defined]
    groups, added = torch.tensor([[0, 2]] * 6), torch.zeros(6, 2)
    asked = ScoreRequest(envelope=driver.envelope(0), queries=torch.randn(6, 1, 10), topk=3)
    for number, (named, version) in enumerate(((None, 0), (groups, 2)), 1):
        request = replace(asked, groups=named, group_scores=None if named is None else added)
        pieces: Any = inner.score(request)
        next(pieces)
        driver.train(number, {3: (make_bags(2, lengths=(1, 2), num_slots=49), torch.randn(2, 10))})
        *_, found = _score(pieces)
        assert found.stamp.table_version == version


def _score(pieces: Any) -> Iterator[ScoreReply]:
    reply = yield from pieces
    yield reply
