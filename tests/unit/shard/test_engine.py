import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mempool import kernels
from mempool.errors import (
    ContextMissing,
    DataLoss,
    DeadlineExceeded,
    Internal,
    InvalidRequest,
    MempoolError,
    NotFound,
    Overloaded,
    RequestTooLarge,
    ShardUnavailable,
)
from mempool.shard import Engine
from mempool.shard.pages import arena, filling
from mempool.shard.steps.contexts import context_bytes
from mempool.types import (
    AttachTable,
    ExportLedger,
    ExportPages,
    FlatKeySpec,
    GatherRequest,
    LedgerPart,
    PageBatch,
    ProductKeySpec,
    PullPages,
    ShardInfo,
)
from mempool.types.bags import Bags as TypesBags
from mempool.wire.channels.loop import run
from tests.contract.bags import make_bags
from tests.contract.driver import Driver, Hosted, make_schema, same
from tests.contract.layouts import LAYOUTS

from .conftest import MakeDriver

GRADS = torch.linspace(-1, 1, 40).view(4, 10)


@contextmanager
def _unlogged() -> Iterator[None]:
    """Failures that a test provokes are not logged."""
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def test_contexts_are_forgotten_under_their_budget(make_driver: MakeDriver) -> None:
    bags = make_bags(1)
    one = context_bytes(TypesBags(bags.ids.int(), bags.weights, bags.offsets))  # as they are kept
    driver = make_driver(context_budget_bytes=2 * one).create(make_schema())
    for lookup_id in (1, 2, 3):
        driver.gather(bags, lookup_id=lookup_id)
    assert run(driver.host(0).status(), timeout_s=20).context_bytes == 2 * one
    driver.lookup_id = 1
    with pytest.raises(ContextMissing):
        driver.update(1, 0, GRADS)
    for lookup_id in (2, 3):
        driver.lookup_id = lookup_id
        driver.update(1, lookup_id, GRADS)


def test_contexts_of_an_older_epoch_take_no_room(make_driver: MakeDriver) -> None:
    driver = make_driver(2).create(make_schema(), "columns")
    driver.gather(make_bags(1))
    assert driver.call(driver.host(0).status()).context_bytes > 0
    driver.move("rows")
    assert driver.call(driver.host(0).status()).context_bytes == 0
    driver.gather(make_bags(1))
    driver.drop()
    assert driver.call(driver.host(0).status()).context_bytes == 0


def test_more_updates_than_the_budget_are_refused(make_driver: MakeDriver) -> None:
    driver = make_driver(client_memory_bytes=14_000).create(make_schema())
    driver.update(1, 0, GRADS, bags=make_bags(1))
    driver.update(1, 1, GRADS, bags=make_bags(1))
    before = driver.contents()
    with pytest.raises(RequestTooLarge, match=r"holds 7,.* may hold .* of the 14,000 for clients; commit more often"):
        driver.update(1, 2, GRADS, bags=make_bags(1))
    driver.update(1, 1, GRADS, bags=make_bags(1))  # a repeat takes no room
    assert same(driver.contents(), before)
    driver.prepare(1, [0, 1])
    driver.commit(1, [0, 1])
    driver.update(2, 2, GRADS, bags=make_bags(1))
    driver.drop()
    driver.create(make_schema())
    driver.update(1, 0, GRADS, bags=make_bags(1))
    driver.update(1, 1, GRADS, bags=make_bags(1))


def test_a_dead_trainers_prepared_step_does_not_hold_off_a_freeze_forever(make_driver: MakeDriver) -> None:
    driver = make_driver(held_lease_s=0.0).create(make_schema())
    driver.gather(make_bags(1))
    driver.update(1, 0, GRADS)
    driver.prepare(1, [0])
    assert driver.freeze(0) == 0
    assert driver.status(0).updates_held == 0


def test_a_freeze_whose_caller_is_gone_and_a_waiting_prepare(make_driver: MakeDriver) -> None:
    driver = make_driver().create(make_schema())
    driver.gather(make_bags(1))
    driver.update(1, 0, GRADS)
    driver.prepare(1, [0])
    freezing = driver.submit(driver.host(0).freeze(1, 20.0, token="round", lease_s=60.0))
    assert any(driver.status(0).frozen for _ in range(10_000))
    freezing.cancel()
    waiting = driver.submit(driver.host(0).prepare(driver.prepare_request(0, 1, [], group="b", wait=True)))
    driver.status(0)
    waiting.cancel()
    driver.commit(1, [0])
    driver.thaw(0)
    assert driver.freeze(0, 5.0, token="another") == 1  # a turn that nobody takes ends by itself
    assert list(driver.ledger(0).entries) == [("trainer", 0)]


def test_an_abandoned_step_of_a_rank_that_goes_on_lets_the_freeze_through(make_driver: MakeDriver) -> None:
    driver = make_driver().create(make_schema())
    driver.gather(make_bags(1))
    driver.update(1, 0, GRADS)
    driver.prepare(1, [0])
    freezing = driver.submit(driver.host(0).freeze(1, 20.0, token="round", lease_s=60.0))
    assert any(driver.status(0).frozen for _ in range(10_000))
    driver.update(2, 1, GRADS)
    waiting = driver.submit(driver.host(0).prepare(driver.prepare_request(0, 2, [1], wait=True)))
    assert freezing.result(timeout=20) == 0
    driver.thaw(0)
    assert waiting.result(timeout=20).parts[0].missing == ()


def test_pages_are_pulled_in_batches_between_lookups(make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena, "_COPY_BYTES", 1)
    asked: list[ExportPages] = []
    real = Engine.export_pages

    async def export_pages(self: Engine, request: ExportPages) -> PageBatch:
        asked.append(request)
        return await real(self, request)

    monkeypatch.setattr(Engine, "export_pages", export_pages)
    driver = make_driver(2).create(make_schema(keys=FlatKeySpec(key_dim=5)), "one")
    driver.train(1, {0: (make_bags(1), GRADS)})
    values, keys = driver.read(), driver.read("keys")
    driver.move("rows")
    assert [request.row_pages.tolist() for request in asked] == [[4], [5], [6]]
    assert torch.equal(driver.read(), values)
    assert torch.equal(driver.read("keys"), keys)


def test_a_source_that_fails_leaves_everything_as_it_was(make_driver: MakeDriver) -> None:
    class Broken:
        async def export_pages(self, request: ExportPages) -> PageBatch:
            if request.row_pages[0] > 4:
                raise ShardUnavailable("gone")
            return await engines[0].host.export_pages(request)

        async def export_ledger(self, request: ExportLedger) -> LedgerPart:
            return await engines[0].host.export_ledger(request)

    driver = make_driver(2, peers=lambda _: Broken()).create(make_schema(), "one")  # type: ignore[arg-type,return-value]
    engines = driver.hosted
    before = driver.contents()
    driver.freeze(0)
    for page in ([4], [5]):
        pull = PullPages(table_id=1, source=engines[0].info, row_pages=np.array(page), blocks=(0, 1, 2))
        if page == [5]:
            with pytest.raises(ShardUnavailable, match="gone"):
                driver.call(driver.host(1).pull_pages(pull))
        else:
            driver.call(driver.host(1).pull_pages(pull))
    for shard in (0, 1):
        driver.thaw(shard, token="")
    assert same(driver.contents(), before)
    assert driver.status(1).num_bytes == 0


def _batch(**changes: Any) -> Any:
    class Odd:
        def __init__(self) -> None:
            self.hosted: Any = None

        async def export_pages(self, request: ExportPages) -> PageBatch:
            batch = await self.hosted.host.export_pages(request)
            return replace(batch, **{name: change(getattr(batch, name)) for name, change in changes.items()})

    return Odd()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"row_pages": lambda pages: pages + 1}, "other pages than it was asked for"),
        ({"blocks": lambda blocks: blocks[:1]}, "other pages than it was asked for"),
        ({"arrays": lambda arrays: {"values": arrays["values"]}}, "do all shards run the same version"),
        ({"arrays": lambda arrays: {name: rows[1:] for name, rows in arrays.items()}}, "do all shards run the same"),
        ({"arrays": lambda arrays: {name: rows.double() for name, rows in arrays.items()}}, "do all shards run"),
    ],
)
def test_pages_that_are_not_what_was_asked_for_are_refused(
    make_driver: MakeDriver, changes: dict[str, Any], match: str
) -> None:
    odd = _batch(**changes)
    driver = make_driver(2, peers=lambda _: odd).create(make_schema(), "one")
    odd.hosted = driver.hosted[0]
    pull = PullPages(table_id=1, source=driver.hosted[0].info, row_pages=np.array([2, 3]), blocks=(0, 1, 2))
    with pytest.raises(Internal, match=match):
        driver.call(driver.host(1).pull_pages(pull))
    driver.thaw(1, token="")
    assert driver.status(1).num_bytes == 0


def test_without_peers_nothing_is_pulled() -> None:
    engine = Engine(ShardInfo(shard=0, address="", incarnation=1))
    pull = PullPages(table_id=1, source=engine.info, row_pages=np.array([0]), blocks=(0,))
    with pytest.raises(Internal, match="without peers"):
        run(engine.pull_pages(pull), timeout_s=20)
    run(engine.close(), timeout_s=20)


def test_a_table_dropped_while_it_is_pulled(make_driver: MakeDriver) -> None:
    class Dropping:
        async def export_pages(self, request: ExportPages) -> PageBatch:
            batch = await driver.host(0).export_pages(request)
            await driver.host(1).drop_table(1)
            return batch

    driver = make_driver(2, peers=lambda _: Dropping()).create(make_schema(), "one")  # type: ignore[arg-type,return-value]
    pull = PullPages(table_id=1, source=driver.hosted[0].info, row_pages=np.array([0]), blocks=(0,))
    with pytest.raises(NotFound, match="dropped while its pages were pulled"):
        driver.call(driver.host(1).pull_pages(pull))


def test_a_commit_that_fails_half_way_loses_the_table_and_says_so(
    make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = make_driver().create(make_schema())
    driver.gather(make_bags(1))
    driver.update(1, 0, GRADS)
    driver.prepare(1, [0], want_norm=False)
    before = driver.contents()

    def fail(*_: Any) -> None:
        raise MemoryError("out of memory")

    with monkeypatch.context() as patch, _unlogged():
        patch.setattr(kernels, "sort_pairs", fail)
        driver.gather(make_bags(1))  # of the same lookup, pairs that are sorted are found
        driver.update(2, 1, GRADS, step_id=driver.step_id(2, "another"))
        with pytest.raises(Overloaded, match="no memory for prepare just now"):
            driver.prepare(2, [1], want_norm=False, group="another")
        assert driver.contents().keys() == before.keys()  # nothing was written yet
        patch.setattr(kernels, "fused_step", fail)
        assert driver.commit(1, [0])[0].version == 1  # decided: what fails then is told to whoever comes next
        driver.status(0)  # by then it has failed
    with pytest.raises(DataLoss, match="lost 21 pages"):
        driver.gather(make_bags(1))
    assert driver.status(0).lost_pages == 21


def test_large_sums_are_not_kept_and_change_no_bit(make_driver: MakeDriver) -> None:
    results = []
    for commit_memory_bytes in (2**20, 60_000, 40_000, 30_000, 10_000):
        driver = make_driver(3, commit_memory_bytes=commit_memory_bytes).create(make_schema(), "mixed")
        bags = make_bags(1, lengths=(40, 0, 7, 90))
        driver.gather(bags)
        driver.update(1, 0, GRADS)
        norms = [reply.squared_norm for reply in driver.prepare(1, [0]).values()]
        driver.commit(1, [0])
        results.append((norms, driver.contents()))
    for norms, contents in results[1:]:
        assert norms == pytest.approx(results[0][0], rel=1e-12)
        assert same(contents, results[0][1])


def test_a_large_table_is_filled_in_pieces(make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two pieces, which are jobs of their own, other tables are answered."""
    monkeypatch.setattr(filling, "_PIECE_BYTES", 1)
    driver = make_driver().create(make_schema(keys=FlatKeySpec(key_dim=5)))
    pieces = next(time for time in driver.call(driver.host(0).status()).stages if time.stage == "fill")
    assert pieces.count > 50 * 10  # elements of the values alone
    values, keys = driver.read(), driver.read("keys")
    monkeypatch.undo()
    whole = make_driver().create(make_schema(keys=FlatKeySpec(key_dim=5)))
    assert torch.equal(whole.read(), values)
    assert torch.equal(whole.read("keys"), keys)


def test_dropping_a_table_ends_its_filling_at_once_and_others_are_served_meanwhile(
    make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = make_driver().create(make_schema())
    monkeypatch.setattr(filling, "_PIECE_BYTES", 1)
    large = Driver(driver.hosted, table_id=2)
    schema = make_schema(num_slots=2**16, page_slots=2**12, value_dim=2**14, block_dim=1)  # millions of pieces
    large.view = large.make_view(schema, np.zeros((16, 2**14)), epoch=1)
    filled = large.submit(large.host(0).attach_table(AttachTable(view=large.view, mode="initialise")))
    while len(driver.call(driver.host(0).status()).tables) < 2:
        assert not filled.done()
    driver.gather(make_bags(1))
    driver.train(1, {0: (make_bags(1), GRADS)})
    assert not filled.done()
    large.call(large.host(0).drop_table(2))
    with pytest.raises(NotFound, match="dropped while it was being made"):
        filled.result(timeout=20)
    assert len(driver.call(driver.host(0).status()).tables) == 1


def test_a_table_that_is_being_made_says_so(make_driver: MakeDriver) -> None:
    driver = make_driver()
    driver.view = driver.make_view(make_schema(), LAYOUTS["one"], epoch=1)
    engine: Any = driver.host(0)
    request = AttachTable(view=driver.placed, mode="initialise")
    driver.call(engine._thread.run("attach_table", engine._tenancy.attach, request))
    with pytest.raises(ShardUnavailable, match="still writing the initial values of table 'facts'"):
        driver.gather(make_bags(1))
    driver.call(engine.attach_table(request))  # a repeat goes on where the first was cut off
    driver.gather(make_bags(1))


def test_half_a_table_does_not_stay(make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = make_driver()
    driver.view = driver.make_view(make_schema(), LAYOUTS["one"], epoch=1)

    def fail(*_: Any) -> None:
        raise MemoryError("no room")

    with monkeypatch.context() as patch, _unlogged():
        patch.setattr(kernels, "initial_values", fail)
        with pytest.raises(
            InvalidRequest, match=r"no memory left for the pages of table 'facts' .MemoryError: no room"
        ):
            driver.call(driver.host(0).attach_table(AttachTable(view=driver.placed, mode="initialise")))
    assert run(driver.host(0).status(), timeout_s=20).tables == ()
    driver.create(make_schema())
    driver.gather(make_bags(1))


def test_status_tells_what_is_there(make_driver: MakeDriver) -> None:
    driver = make_driver(2).create(make_schema(), "columns")
    driver.gather(make_bags(1))
    driver.update(1, 0, GRADS)
    status = run(driver.host(1).status(), timeout_s=20)
    assert (status.info.shard, status.state, status.device) == (1, "ready", "cpu")
    (table,) = status.tables
    assert (table.pages, table.lookups, table.updates_held, table.frozen) == (14, 1, 1, False)
    # 7 pages of 8 slots, 6 columns, values and "sum"; and the page table
    assert status.num_bytes == table.num_bytes == 7 * 8 * 6 * 4 * 2 + 7 * arena.PAGE_TABLE_BYTES
    counts = {time.stage: time.count for time in status.stages}
    assert counts["gather"] == counts["update"] == 1
    assert counts["queue"] >= 4
    assert status.uptime_s > 0


def test_closing_wakes_who_waits_and_is_repeatable(make_driver: MakeDriver) -> None:
    driver = make_driver().create(make_schema())
    driver.gather(make_bags(1))
    driver.update(1, 0, GRADS)
    driver.freeze(0)
    waiting = driver.submit(driver.host(0).prepare(driver.prepare_request(0, 1, [0], wait=True)))
    driver.status(0)
    driver.call(driver.host(0).close())
    with pytest.raises((ShardUnavailable, NotFound)):
        waiting.result(timeout=20)
    driver.call(driver.host(0).close())
    with pytest.raises(ShardUnavailable, match="shard 0 of pool 'local' is closed"):
        driver.gather(make_bags(1))


def test_a_freeze_in_vain_names_the_table(make_driver: MakeDriver) -> None:
    driver = make_driver().create(make_schema())
    driver.gather(make_bags(1))
    driver.update(1, 0, GRADS)
    driver.prepare(1, [0])
    with pytest.raises(DeadlineExceeded, match=r"table 'facts' did not come to rest on shard 0 within 0\.01 s"):
        driver.freeze(0, 0.01)


def test_a_table_that_does_not_fit_is_refused_before_anything_is_allocated(make_driver: MakeDriver) -> None:
    schema = make_schema(keys=ProductKeySpec(heads=2, key_dim=6), num_slots=49)
    key_owners = (0, 0)
    whole = make_driver().create(schema, key_owners=key_owners).status(0).num_bytes
    driver = make_driver(memory_bytes=whole)
    driver.create(schema, key_owners=key_owners)
    assert driver.status(0).num_bytes == whole  # to the byte
    with pytest.raises(InvalidRequest, match=r"table 'facts' do not fit on shard 0.*shard\.memory.*mempool scale"):
        Driver(driver.hosted, table_id=2).create(make_schema())
    assert len(driver.call(driver.host(0).status()).tables) == 1
    driver.gather(make_bags(1, num_slots=49))
    driver.drop()
    Driver(driver.hosted, table_id=2).create(make_schema())
    with pytest.raises(InvalidRequest, match="do not fit"):
        make_driver(memory_bytes=whole - 1).create(schema, key_owners=key_owners)


def test_a_table_that_is_being_filled_takes_its_room_from_the_start(make_driver: MakeDriver) -> None:
    whole = make_driver().create(make_schema()).status(0).num_bytes
    driver = make_driver(memory_bytes=2 * whole - 1)
    driver.view = driver.make_view(make_schema(), LAYOUTS["one"], epoch=1)
    engine: Any = driver.host(0)
    request = AttachTable(view=driver.placed, mode="initialise")
    driver.call(engine._thread.run("attach_table", engine._tenancy.attach, request))
    with pytest.raises(InvalidRequest, match="do not fit"):
        Driver(driver.hosted, table_id=2).create(make_schema())


@pytest.mark.parametrize("layout", ["rows", "columns", "mixed"])
def test_pages_that_do_not_fit_are_not_pulled(make_driver: MakeDriver, layout: str) -> None:
    schema = make_schema(keys=ProductKeySpec(heads=2, key_dim=6), num_slots=49)
    free = make_driver(3).create(schema, "one", (0, 0))
    free.move(layout, (1, 1))
    most = max(free.status(shard).num_bytes for shard in (1, 2))
    tight = make_driver(3, memory_bytes=max(free.status(0).num_bytes, most) - 1)
    with pytest.raises(InvalidRequest, match=r"do not fit on shard 0: it may hold .* and holds 0.0 MiB"):
        tight.create(schema, "one", (0, 0))

    small: list[Engine] = []
    engines = make_driver(3, peers=lambda info: small[info.shard])
    for hosted in engines.hosted:
        small.append(
            Engine(
                hosted.info, peers=lambda info: small[info.shard], memory_bytes=most // 2 if hosted.info.shard else None
            )
        )
    driver = Driver([Hosted(host=engine, info=engine.info) for engine in small], table_id=1).create(
        schema, "one", (0, 0)
    )
    before = driver.contents()
    with pytest.raises(InvalidRequest, match=r"do not fit on shard [12]: it may hold"):
        driver.move(layout, (1, 1))
    for shard in range(3):
        driver.thaw(shard, token="")
    assert driver.status(1).num_bytes == driver.status(2).num_bytes == 0
    assert same(driver.contents(), before)
    for engine in small:
        run(engine.close(), timeout_s=20)


def test_nothing_of_a_refused_call_outlives_it(make_driver: MakeDriver) -> None:
    """Without the cyclic collector, though somebody keeps the error: it knows no frame and no request."""
    driver = make_driver(max_message_bytes=2**16, client_memory_bytes=2**22).create(make_schema())
    wrong: dict[str, Callable[[], dict[str, Any]]] = {
        "stale": lambda: {"envelope": driver.envelope(0, epoch=9)},
        "too large": lambda: {
            "offsets": torch.zeros(100_000, dtype=torch.int64),
            "ids": torch.zeros(0, dtype=torch.int64),
        },
        "invalid": lambda: {"ids": torch.full((9,), 77)},
    }
    gc.disable()
    try:
        for case, make in wrong.items():
            bags = make_bags(1)
            request = GatherRequest(
                envelope=driver.envelope(0),
                lookup_id=1,
                ids=bags.ids,
                weights=None,
                offsets=bags.offsets,
                remember=True,
            )
            request = replace(request, **make())
            alive = [weakref.ref(request.ids), weakref.ref(request.offsets)]
            with pytest.raises(MempoolError) as raised:
                driver.call(driver.host(0).gather(request))
            error = raised.value.with_traceback(None)
            assert error.__context__ is None
            assert error.__cause__ is None
            del raised, request, bags
            driver.gather(make_bags(2), remember=False)  # the thread and the loop have gone on
            assert [ref() for ref in alive] == [None, None], case
    finally:
        gc.enable()
    assert driver.call(driver.host(0).status()).queued_bytes == 0
