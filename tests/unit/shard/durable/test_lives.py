"""A shard with storage is, after whatever ends it, the shard that it was: pages, optimizer state, ledger, order."""

import asyncio
import errno
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from byhand import ByHand
from fakefiles import FakeFiles
from shard_lives import Lives, hold, step

from mempool.errors import DataLoss, NotFound, StorageFailed
from mempool.journal import Snapshot
from mempool.shard.durable.records import Held
from mempool.shard.durable.store import Store
from mempool.shard.steps.held import HeldUpdate
from mempool.types import (
    AttachTable,
    DecidedStep,
    OptimizerSpec,
    ProductKeySpec,
    StepId,
    TableSchema,
    TableSource,
    TableView,
)
from mempool.types.bags import Bags
from mempool.wire.channels.loop import run
from tests.contract.driver import Driver, make_schema, same
from tests.contract.layouts import LAYOUTS

ADAM = OptimizerSpec(algorithm="adam", lr=0.1, eps=1e-8)
DENSE = OptimizerSpec(algorithm="adamw", lr=0.1, eps=1e-8, weight_decay=0.1, dense=True)
SCHEMAS = {
    "adagrad": make_schema(),
    "adam, bfloat16": make_schema(optimizer=ADAM, dtype="bfloat16", rounding="stochastic"),
    "dense adamw, master": make_schema(optimizer=DENSE, dtype="bfloat16", master=True, rounding="nearest"),
    "adagrad, int8": make_schema(dtype="int8", rounding="stochastic"),
    "product keys": make_schema(num_slots=49, stride=7, keys=ProductKeySpec(heads=2, key_dim=4)),
}


def create(driver: Driver, schema: TableSchema, owners: str = "one") -> Driver:
    heads = (0,) * schema.num_key_pages
    return driver.create(schema, owners, heads)


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS.keys())
def test_a_power_cut_at_any_step_loses_nothing(make_lives: Callable[..., Lives], schema: TableSchema) -> None:
    lives = make_lives()
    driver = create(lives.begin(), schema)
    for number in range(1, 6):
        if number % 2 == 0:
            driver.write("values", torch.arange(number, number + 9), torch.randn(9, 10))
        if number == 4 and schema.keys is not None:
            driver.write("keys", torch.tensor([1]), torch.randn(1, 28))
        step(driver, number)
        again = make_lives(lives.after_power_cut(number)).begin(driver)
        assert same(again.contents(), driver.contents())
        assert again.hosted[0].info.incarnation > driver.hosted[0].info.incarnation
        if number == 3:
            driver = again = make_lives(lives := lives.after_power_cut(9)).begin(driver)  # it goes on there


@pytest.mark.parametrize("schema", [SCHEMAS["adam, bfloat16"], SCHEMAS["dense adamw, master"]], ids=["adam", "dense"])
def test_snapshots_bound_the_journal_and_change_no_bit(make_lives: Callable[..., Lives], schema: TableSchema) -> None:
    """Steps go on while they are taken: whatever a step writes to was copied before."""
    never_died = make_lives()
    lives = make_lives(journal_limit=2**18)
    oracle, driver = create(never_died.begin(), schema), create(lives.begin(), schema)
    engine = lives.engines[-1]
    store, taking = engine._store, engine._taking
    assert store is not None
    assert taking is not None
    for number in range(1, 25):
        taken = driver.submit(taking.take()) if number % 3 == 0 else None
        for one in (oracle, driver):
            step(one, number)
        if taken is not None:
            assert taken.result(timeout=20)
        if number % 4 == 1:
            again = make_lives(lives.after_power_cut(number)).begin(driver)
            assert same(again.contents(), oracle.contents())
            assert same(driver.contents(), oracle.contents())  # reading changes bits of a dense optimizer's later steps
    assert same(driver.contents(), oracle.contents())
    assert store.snapshots.newest is not None
    assert store.journal.num_bytes < store.journal_limit


def test_a_snapshot_is_taken_when_the_journal_is_half_full(make_lives: Callable[..., Lives]) -> None:
    lives = make_lives(journal_limit=2**17)
    driver = create(lives.begin(), make_schema())
    store = lives.engines[-1]._store
    assert store is not None
    rows = torch.randn(50, 10)
    for number in range(200):
        rows[0] = float(number)
        driver.write("values", torch.arange(50), rows)
    killed = make_lives(lives.after_kill())
    assert store.snapshots.newest is not None
    assert store.journal.num_bytes < 2 * store.journal_limit
    again = killed.begin(driver)
    assert same(again.contents(), driver.contents())


def test_a_snapshot_that_is_given_up_as_it_is_finished_is_whole_or_never_was(
    make_lives: Callable[..., Lives], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard that is closed gives up the one that is under way: its pack must not go as its manifest gets its name."""
    lives = make_lives()
    driver = create(lives.begin(), make_schema())
    step(driver, 1)
    begun, go_on, done = threading.Event(), threading.Event(), list[str]()
    finish, abandon = Snapshot.finish, Snapshot.abandon

    def finished(self: Snapshot, head: bytes) -> object:
        begun.set()
        assert go_on.wait(20)
        try:
            return finish(self, head)
        finally:
            done.append("finished")

    def abandoned(self: Snapshot) -> None:
        done.append("given up")
        abandon(self)

    monkeypatch.setattr(Snapshot, "finish", finished)
    monkeypatch.setattr(Snapshot, "abandon", abandoned)
    taking = lives.engines[-1]._taking
    assert taking is not None

    async def give_up() -> None:
        task = asyncio.create_task(taking.take())
        assert await asyncio.to_thread(begun.wait, 20)
        for _ in range(2):  # a second one changes nothing
            task.cancel()
            for _ in range(5):
                await asyncio.sleep(0)
        go_on.set()
        await asyncio.wait([task])

    run(give_up(), timeout_s=40)
    assert done == ["finished", "given up"]
    again = make_lives(lives.after_kill()).begin(driver)
    assert same(again.contents(), driver.contents())


def test_no_snapshot_is_begun_by_a_shard_that_is_closing(
    make_lives: Callable[..., Lives], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls that end meanwhile find the journal half full, and another process may have the folder by then."""
    lives = make_lives()
    step(create(lives.begin(), make_schema()), 1)
    taking = lives.engines[-1]._taking
    assert taking is not None
    monkeypatch.setattr(Store, "is_half_full", True)

    async def close() -> None:
        await taking.close()
        taking._not_before_s = 0.0
        taking.poke()
        assert taking._task is None

    run(close(), timeout_s=20)


def test_what_was_read_of_a_dense_table_is_as_after_the_reading(make_lives: Callable[..., Lives]) -> None:
    """Several steps at once round otherwise than one by one: where a reader had them done the next life knows it."""
    lives, never_died = make_lives(), make_lives()
    driver, oracle = (create(each.begin(), SCHEMAS["dense adamw, master"]) for each in (lives, never_died))
    for number in range(1, 7):
        for one in (driver, oracle):
            step(one, number)
            one.read()
        lives = make_lives(lives.after_power_cut(number))
        driver = lives.begin(driver)
    for one in (driver, oracle):
        step(one, 7)
    assert same(driver.contents(), oracle.contents())


def test_held_and_prepared_steps_are_there_again(make_lives: Callable[..., Lives]) -> None:
    lives = make_lives()
    driver = create(lives.begin(shards=2), make_schema(), "columns")
    step(driver, 1)
    hold(driver, 2)
    driver.prepare(2, [0, 1])
    prepared = make_lives(lives.after_power_cut(1))
    again = prepared.begin(driver)
    assert same(again.contents(), driver.contents())
    for one in (driver, again):
        one.commit(2, [0, 1])
    assert same(again.contents(), driver.contents())


def test_what_the_gate_has_decided_the_others_apply(make_lives: Callable[..., Lives]) -> None:
    lives = make_lives()
    driver = create(lives.begin(shards=2), make_schema(), "columns")
    hold(driver, 1)
    driver.prepare(1, [0, 1])
    driver.decide(1, [0, 1])
    again = make_lives(lives.after_power_cut(1)).begin(driver)
    rows = again.read()  # whoever reads waits until the gate was asked
    driver.commit(1, [0, 1])
    assert same({"values": rows}, {"values": driver.read()})


def test_pages_that_moved_are_at_their_new_owner(make_lives: Callable[..., Lives]) -> None:
    lives = make_lives()
    driver = create(lives.begin(shards=3), make_schema(optimizer=ADAM), "one")
    step(driver, 1)
    driver.move("columns")
    step(driver, 2)
    again = make_lives(lives.after_power_cut(1)).begin(driver)
    assert same(again.contents(), driver.contents())
    for one in (driver, again):
        one.move("rows")
        step(one, 3)
    assert same(again.contents(), driver.contents())


def pulled(driver: Driver, owners: str, *, token: str) -> TableView:
    """A round of a move as far as it is undecided: all stand still, and who is to have pages has them."""
    target = driver.make_view(driver.schema, LAYOUTS[owners], epoch=driver.placed.placement.epoch + 1)
    for shard in sorted({*driver.owners, *target.placement.shards}):
        driver.freeze(shard, token=token)
    for dest, request in driver.pulls(target):
        driver.call(driver.host(dest).pull_pages(replace(request, token=token)))
    return target


def test_all_that_die_between_a_pull_and_the_view_lose_nothing(make_lives: Callable[..., Lives]) -> None:
    """The gate has taken the view, and no other shard: its pages are where they are to be, and where they were."""
    lives = make_lives()
    driver = create(lives.begin(shards=3), make_schema(optimizer=ADAM), "one")
    step(driver, 1)
    target = pulled(driver, "columns", token="round")
    driver.call(driver.host(driver.gate).set_view(target, token="round"))
    again = make_lives(lives.after_power_cut(1)).begin(driver)
    for one in (driver, again):
        view = replace(target, shards=tuple(hosted.info for hosted in one.hosted))
        for hosted in one.hosted:
            one.call(hosted.host.set_view(view))
        one.view = view
    assert same(again.contents(), driver.contents())
    for one in (driver, again):
        step(one, 2)
    assert same(again.contents(), driver.contents())


def test_a_round_that_nobody_decided_is_undone_after_a_power_cut(make_lives: Callable[..., Lives]) -> None:
    lives = make_lives()
    driver = create(lives.begin(shards=3), make_schema(optimizer=ADAM), "one")
    step(driver, 1)
    pulled(driver, "columns", token="first")
    for shard in driver.owners:
        driver.thaw(shard, token="first")
    again = make_lives(lives.after_power_cut(1)).begin(driver)
    for one in (driver, again):
        for shard in range(3):
            one.thaw(shard, token="first")  # where pages had come
        step(one, 2)
        one.move("rows", token="second")
        step(one, 3)
    assert same(again.contents(), driver.contents())
    once_more = make_lives(lives.after_power_cut(2)).begin(driver)
    assert same(once_more.contents(), driver.contents())


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_full_disk_refuses_and_is_gone_on_with(make_lives: Callable[..., Lives], code: int) -> None:
    lives = make_lives()
    driver = create(lives.begin(), make_schema())
    step(driver, 1)
    hold(driver, 2)
    if code == errno.ENOSPC:
        lives.files.capacity_bytes = 0
    else:
        for number in range(1, 40):
            lives.files.fail(number, code)
    with pytest.raises(StorageFailed):
        driver.commit(2, [0, 1], one_phase=True)
    with pytest.raises(StorageFailed):
        driver.write("values", torch.arange(3), torch.zeros(3, 10))
    killed = make_lives(lives.after_kill())
    lives.files.heal()
    killed.files.heal()
    lives.files.capacity_bytes = killed.files.capacity_bytes = 2**40
    assert killed.begin(driver).status(0).version in (1, 2)  # nobody was told
    for _ in range(50):
        try:
            replies = driver.commit(2, [0, 1], one_phase=True)
            break
        except StorageFailed:
            time.sleep(0.02)  # what the disk has refused is on its way
    assert replies[0].version == 2
    step(driver, 3)
    again = make_lives(lives.after_power_cut(1)).begin(driver)
    assert same(again.contents(), driver.contents())


def test_what_a_dropped_table_had_decided_for_others_is_known_behind_a_snapshot(
    make_lives: Callable[..., Lives],
) -> None:
    lives = make_lives()
    driver = create(lives.begin(), make_schema())
    (engine,) = lives.engines
    assert engine._taking is not None
    step(driver, 1)
    decided = DecidedStep(
        table_id=99,
        version=4,
        step_id=StepId(group="trainer", rank=0, step=1),
        lr=0.1,
        grad_scale=1.0,
        sequences=(1, 2),
    )
    table = engine._tenancy.table(driver.table_id)
    entry = table.ledger.entry(decided.step_id)
    table.ledger._entries["trainer", 0] = replace(entry, others=(decided,))
    driver.call(engine.drop_table(driver.table_id))
    known = list(engine._tenancy.decisions.of_dropped())
    assert [others for _, _, others in known] == [(decided,)]
    assert driver.submit(engine._taking.take()).result(timeout=20)
    again = make_lives(lives.after_power_cut(1))
    again.begin(driver)
    assert list(again.engines[0]._tenancy.decisions.of_dropped()) == known


def test_a_flipped_bit_is_named(make_lives: Callable[..., Lives]) -> None:
    lives = make_lives()
    driver = create(lives.begin(), make_schema())
    for number in range(1, 4):
        step(driver, number)
    damaged = make_lives(lives.after_kill())
    (path,) = [path for path in damaged.files.paths() if path.endswith(".segment")]
    damaged.files.flip(path, 8 * (len(damaged.files.content(path)) // 2))
    with pytest.raises(DataLoss, match=rf"{path} is damaged at byte [\d,]+"):
        damaged.begin(driver)


def test_closed_and_dropped(make_lives: Callable[..., Lives]) -> None:
    lives = make_lives()
    driver = create(lives.begin(), make_schema())
    step(driver, 1)
    run(lives.engines[0].close(), timeout_s=20)
    again = lives.begin(driver)
    assert again.status(0).version == 1
    again.drop()
    run(lives.engines[1].close(), timeout_s=20)
    assert not again.call(lives.begin(driver).host(0).status()).tables


def test_a_table_that_could_not_be_filled_is_attached_again_in_every_life(make_lives: Callable[..., Lives]) -> None:
    lives = make_lives()
    driver = lives.begin()
    driver.view = driver.make_view(make_schema(), LAYOUTS["one"], (), epoch=1)
    source = TableSource(url="/nowhere/at/all", checkpoint="000001-00000000", table="facts")
    with pytest.raises(NotFound):
        driver.call(driver.host(0).attach_table(AttachTable(view=driver.view, mode="restore", source=source)))
    create(driver, make_schema())
    step(driver, 1)
    again = make_lives(lives.after_kill()).begin(driver)
    assert same(again.contents(), driver.contents())


def test_of_two_updates_of_one_number_the_one_that_was_held_last_is_replayed(make_lives: Callable[..., Lives]) -> None:
    """The first was dropped with its lease; a trainer that is not ours may send another one in its place."""
    lives = make_lives()
    driver = create(lives.begin(), make_schema())
    hold(driver, 1, seed=5)
    (table,) = lives.engines[-1]._tenancy.tables.values()
    driver.call(lives.engines[-1]._on_thread("forget", lambda _: table.updates.clear()))
    step(driver, 1)
    again = make_lives(lives.after_kill()).begin(driver)
    assert same(again.contents(), driver.contents())


def test_who_gives_up_waiting_keeps_nobody_from_being_told() -> None:
    hand = ByHand()
    store = Store("disk", pool="pool", pool_id="one", shard=0, files=FakeFiles(), runner=hand)
    store.caught_up_of(1)(torch.tensor([1]), True)  # which nobody waits for, so that one word reaches both
    first, second = store.when_synced(), store.when_synced()
    first.cancel()
    hand.work()
    assert second.result(timeout=0) == 2  # behind what the first has had written
    run(store.close(), timeout_s=20)


def test_whether_all_is_durable_is_said_without_waiting_for_who_was_interrupted() -> None:
    """By a signal's handler, which looks up what it has interrupted a look-up of."""
    hand = ByHand()
    store = Store("disk", pool="pool", pool_id="one", shard=0, files=FakeFiles(), runner=hand)
    asking = threading.Thread(target=lambda: said.append(store.is_settled), daemon=True)
    said: list[bool] = []
    with store._lock:
        asking.start()
        asking.join(10.0)
        assert said == [True]
    store.caught_up_of(1)(torch.tensor([1]), False)
    assert not store.is_settled
    hand.work()
    assert store.is_settled
    run(store.close(), timeout_s=20)


def test_updates_that_no_step_follows_are_not_kept_for_ever() -> None:
    """Of a trainer that never commits: its lease ends, and what it held is dropped; more of it comes."""
    hand, grads = ByHand(), torch.zeros(4, 2**16)
    store = Store("disk", pool="pool", pool_id="one", shard=0, files=FakeFiles(), runner=hand)
    bags = Bags(ids=torch.arange(4), weights=None, offsets=torch.arange(5))
    for number in range(1, 65):
        step_id = StepId(group="g", rank=0, step=number, generation=1)
        store.add(Held(1, step_id, 0, HeldUpdate(bags, grads)))  # 1 MiB
        hand.work()
    assert len(store._waiting) <= 33
    run(store.settled(), timeout_s=20)  # nobody has to wait for it
    run(store.close(), timeout_s=20)
