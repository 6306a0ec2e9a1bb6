"""Keys that train in the pool have one life with their table: made, dropped, saved, restored, read at a version."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from killed_copies import left_by_a_kill

import mempool
from mempool import errors
from mempool.client.reading import pinning
from mempool.client.routing.attempt import Attempt
from mempool.client.training.tables import prepare_tables
from mempool.nn import MemoryLayer, PoolOptimizer, reading
from mempool.optim import SGD
from mempool.types import ForkTable
from mempool.wire.channels import loop

from .conftest import Pools
from .reference import all_rows
from .test_key_training import KEYS, assert_same, everything_of, queries_for, train

SIZES: dict[str, Any] = {"num_slots": 8**2, "value_dim": 8, "optimizer": SGD(lr=0.1)}


def made(pool: mempool.Pool, kind: str, **config: Any) -> mempool.Table:
    return pool.create_table(mempool.TableConfig(**{"name": kind, "keys": KEYS[kind], **SIZES, **config}))


def names_of(pool: mempool.Pool) -> list[str]:
    """All tables that there are, those of keys too."""
    return sorted(view.schema.name for view in pool.status().tables)


def test_they_are_made_and_dropped_with_their_table_and_no_tables_of_users(pools: Pools) -> None:
    with pools.fresh(2) as pool:
        table = made(pool, "flat")
        assert names_of(pool) == ["flat", "flat:keys"]
        assert pool.tables() == (table,)
        assert table.keys is table.keys
        assert pool.create_table(mempool.TableConfig(name="flat", keys=KEYS["flat"], **SIZES), exist_ok=True) is table
        other = mempool.FlatKeys(key_dim=8, optimizer=SGD(lr=0.1))
        with pytest.raises(errors.AlreadyExists, match=r"keys\.optimizer\.algorithm is 'adagrad'"):
            pool.create_table(mempool.TableConfig(name="flat", keys=other, **SIZES), exist_ok=True)
        for ask in (pool.table, pool.drop_table):
            with pytest.raises(errors.InvalidRequest, match="has the keys of"):
                ask("flat:keys")
        before = table.read_keys()
        train(table)
        assert not torch.equal(table.read_keys(), before)
        pool.drop_table("flat")
        assert names_of(pool) == []
        again = made(pool, "flat")
        assert torch.equal(again.read_keys(), before)
        train(again)


def test_a_making_that_is_given_up_leaves_no_keys(pools: Pools) -> None:
    with pools.fresh(1) as pool:
        with pytest.raises(errors.InvalidRequest, match="for pages cannot be had"):  # after its keys were made
            made(pool, "product", num_slots=2**32, value_dim=512)
        assert names_of(pool) == []
        made(pool, "product")


def test_keys_that_are_left_over_make_room_for_those_of_a_table_of_that_name(tmp_path: Path) -> None:
    with mempool.local() as pool:
        before = made(pool, "flat").read_keys()
        pool.checkpoint(tmp_path)

        def drop_alone() -> None:
            """As a controller does that dies before it drops the keys."""
            train(pool.table("flat"))
            loop.run(pool._api._changes._drop("flat"), timeout_s=30)
            pool._open.dropped("flat")
            assert names_of(pool) == ["flat:keys"]

        drop_alone()
        assert torch.equal(made(pool, "flat").read_keys(), before)
        drop_alone()
        (restored,) = pool.restore(tmp_path)
        assert torch.equal(restored.read_keys(), before)
        drop_alone()
        made(pool, "flat", keys=None)
        assert names_of(pool) == ["flat"]


@pytest.mark.parametrize("kind", KEYS)
def test_a_checkpoint_has_them_and_so_has_what_is_restored(pools: Pools, tmp_path: Path, kind: str) -> None:
    with pools.fresh(2) as pool:
        table = made(pool, kind)
        train(table)
        saved = everything_of(table)
        pool.checkpoint(tmp_path / "place", tables=[kind])
        train(table)
        keys = table.keys
        with pytest.raises(errors.AlreadyExists):
            pool.restore(tmp_path / "place")
        (copy,) = pool.restore(tmp_path / "place", tables=[kind], name="copy")
        assert_same(everything_of(copy), saved)
        (back,) = pool.restore(tmp_path / "place", replace=True)
        assert back is table
        assert back.keys is keys
        assert_same(everything_of(back), saved)
        for each in (copy, back):
            torch.manual_seed(1)
            train(each)
        assert_same(everything_of(copy), everything_of(back))
        with pytest.raises(errors.InvalidRequest, match="has the keys of table"):
            pool.restore(tmp_path / "place", tables=[f"{kind}:keys"])
        pool.drop_table("copy")
        assert names_of(pool) == [kind, f"{kind}:keys"]


@pytest.mark.parametrize("kind", KEYS)
def test_a_fork_has_them_and_so_has_what_is_reset(pools: Pools, kind: str) -> None:
    with pools.fresh(2) as pool:
        table = made(pool, kind)
        train(table)
        before, keys = everything_of(table), table.keys
        fork = table.fork("fork")
        assert names_of(pool) == sorted(["fork", "fork:keys", kind, f"{kind}:keys"])
        assert_same(everything_of(fork), before)
        for each in (table, fork):
            torch.manual_seed(2)
            train(each)
        assert_same(everything_of(fork), everything_of(table))
        train(table)
        moved = everything_of(table)
        train(fork)
        assert_same(everything_of(table), moved)
        table.reset(fork)
        assert table.keys is keys
        assert_same(everything_of(table), everything_of(fork))
        train(table)
        pool.drop_table("fork")
        assert names_of(pool) == sorted([kind, f"{kind}:keys"])
        with pytest.raises(errors.InvalidRequest, match="the table of another one's keys"):
            keys.fork("other")


def test_a_reset_elsewhere_gives_nobody_the_values_of_one_table_and_the_keys_of_another(pools: Pools) -> None:
    with pools.fresh(2) as pool:
        table = made(pool, "flat")
        train(table)
        before = everything_of(table)
        fork = table.fork("fork")
        train(table)
        kept = table.at()
        queries = torch.randn(5, 8)
        table.score(queries, 4)  # where the keys are is known
        # What another client does: nothing of it is known here.
        schema, to = table.schema, fork.schema
        request = ForkTable(table="fork", table_id=to.table_id, name="flat", replace=True, newest_id=2**62)
        loop.run(pool._api.fork(request), timeout_s=60)
        for _ in range(2):
            with pytest.raises(errors.NotFound, match=rf"'flat' is another one by now \(id \d+, not {schema.table_id}"):
                table.score(queries, 4)
        with pytest.raises(errors.MempoolError):
            kept.lookup(queries, 4)
        assert pool.reopen("flat") is table
        assert_same(everything_of(table), before)
        assert torch.equal(table.score(queries, 4).ids, fork.score(queries, 4).ids)


@pytest.mark.parametrize("kind", KEYS)
def test_a_file_has_them_and_so_has_what_is_imported(pools: Pools, tmp_path: Path, kind: str) -> None:
    with pools.fresh(2) as pool:
        table = made(pool, kind, num_slots=19**2)  # sections of product keys have rows that fill them up
        train(table)
        file = tmp_path / "table.safetensors"
        pool.export_table(kind, file)
        copy = pool.import_table(file, name="copy")
        assert copy.schema.keys == table.schema.keys
        of_kind = getattr(mempool, f"{kind.capitalize()}Keys")
        # Those in groups are trained in any case.
        told = KEYS[kind].model_dump(exclude={"type"} if kind == "hierarchical" else {"optimizer", "type"})
        served = of_kind(**told)
        config = mempool.TableConfig(name="served", **SIZES | {"num_slots": 19**2}, keys=served)
        for imported in (copy, pool.import_table(file, config)):
            assert torch.equal(imported.read_keys(), table.read_keys())
            assert torch.equal(all_rows(imported), all_rows(table))
        train(copy)
        pool.export_table("served", file)
        back = mempool.TableConfig(name="back", **SIZES | {"num_slots": 19**2}, keys=KEYS[kind])
        assert torch.equal(pool.import_table(file, back).read_keys(), table.read_keys())
        bare = mempool.TableConfig(name="bare", **SIZES | {"num_slots": 19**2})
        pool.create_table(bare)
        pool.export_table("bare", file)
        fresh = pool.import_table(file, back.model_copy(update={"name": "fresh", "seed": 0}))
        assert torch.equal(fresh.read_keys(), made(pool, kind, num_slots=19**2, name="new").read_keys())


@pytest.mark.parametrize(("heads", "ways", "num_slots"), [(1, 3, 5**3), (2, 3, 5**3), (3, 4, 3**4), (2, 2, 19**2 - 12)])
def test_a_file_has_all_parts_of_them(pools: Pools, tmp_path: Path, heads: int, ways: int, num_slots: int) -> None:
    keys = mempool.ProductKeys(heads=heads, key_dim=2 * ways, ways=ways, optimizer=SGD(lr=0.5))
    config = mempool.TableConfig(name="facts", num_slots=num_slots, value_dim=8, keys=keys)
    file = tmp_path / "table.safetensors"
    with pools.fresh(2) as pool:
        table = pool.create_table(config)
        table.lookup(torch.randn(6, heads, 2 * ways), 4).values.square().sum().backward()
        table.commit()
        own = table.read_keys()
        pool.export_table("facts", file)
        assert torch.equal(safetensors.torch.load_file(file)["head_keys"], own)
        copy = pool.import_table(file, name="copy")
        assert copy.schema.keys == table.schema.keys
        assert torch.equal(copy.read_keys(), own)
        forms = {"heads": own, "stacked": own.flatten(0, 2), "pairs": own.transpose(1, 2).contiguous()}
        for name, form in forms.items():
            safetensors.torch.save_file({"values": all_rows(table), "keys": form}, file)
            imported = pool.import_table(file, config.model_copy(update={"name": name}))
            assert torch.equal(imported.read_keys(), own), name
        safetensors.torch.save_file({"values": all_rows(table), "keys": own[:, 1:].contiguous()}, file)
        with pytest.raises(errors.InvalidRequest, match="takes"):
            pool.import_table(file, config.model_copy(update={"name": "lacking"}))


def test_a_pool_on_a_disk_has_them_again(tmp_path: Path) -> None:
    with mempool.local(tmp_path / "memory", shards=2) as pool:
        for kind in KEYS:
            train(made(pool, kind))
            train(pool.table(kind))
        before = {kind: everything_of(pool.table(kind)) for kind in KEYS}
        left_by_a_kill(tmp_path / "memory", tmp_path / "killed")
    for place in ("killed", "memory"):
        reopened(tmp_path / place, before)


def reopened(place: Path, before: dict[str, dict[str, torch.Tensor]]) -> None:
    with mempool.local(place, shards=2) as pool:
        for kind in KEYS:
            assert_same(everything_of(pool.table(kind)), before[kind])
            train(pool.table(kind))


@pytest.mark.parametrize("kind", KEYS)
def test_readers_see_the_keys_of_their_version(pools: Pools, kind: str) -> None:
    with pools.fresh(2) as pool:
        table = made(pool, kind)
        train(table)
        queries = queries_for(table, 5).requires_grad_()
        expected, keys = table.lookup(queries, 4), table.read_keys()
        assert pool.snapshot("then") == {kind: 1}
        with table.at() as seen, table.at("then") as then, table.at(1) as numbered:
            train(table)
            for at in (seen, then, numbered):
                for _ in range(2):
                    found = at.lookup(queries, 4)
                    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
                    assert torch.equal(at.read_keys(), keys)
                    train(table)
            with pytest.raises(errors.InvalidRequest, match=f"table '{kind}:keys' is read at version 1 here"):
                seen.score(queries, 4).scores.sum().backward()
            layer = MemoryLayer(6, table=table, keys="pool", topk=4)
            x = torch.randn(3, 6)
            with torch.no_grad(), reading(layer, seen):
                first = layer(x)
                train_later = table.read_keys()
                assert torch.equal(layer.scoring_keys(), as_scored(keys, table))
            assert torch.equal(layer.scoring_keys(), as_scored(train_later, table))
            assert not torch.equal(layer(x), first)
        pool.drop_snapshot("then")
        with pytest.raises(errors.VersionGone):
            table.at("then")


def as_scored(keys: torch.Tensor, table: mempool.Table) -> torch.Tensor:
    """Of slots in groups, the key of each with its group's."""
    groups = table.schema.keys.groups
    if not groups:
        return keys
    size = -(-table.num_slots // groups)
    return keys[groups:] + keys[:groups].repeat_interleave(size, dim=0)[: table.num_slots]


class CommitsBetween:
    """Has a commit come while tables are pinned: once the values are armed for the first time, before the keys are.

    Args:
        commit: The step.
        times: How many looks it befalls.
    """

    def __init__(self, patch: pytest.MonkeyPatch, commit: Callable[[], None], *, times: int) -> None:
        self.left, self.commit, self.armed = times, commit, asyncio.Event()
        self.pin = Attempt.pin
        patch.setattr(Attempt, "pin", lambda attempt, do, *args, **options: self.pinned(attempt, do, args, options))

    async def pinned(self, attempt: Attempt, do: str, args: tuple[Any, ...], options: dict[str, Any]) -> list[int]:
        if do != "arm" or not self.left:
            return await self.pin(attempt, do, *args, **options)
        if not attempt.plan.schema.name.endswith(":keys"):
            found = await self.pin(attempt, do, *args, **options)
            self.armed.set()
            return found
        await self.armed.wait()
        self.armed.clear()
        self.left -= 1
        await asyncio.to_thread(self.commit)
        return await self.pin(attempt, do, *args, **options)


@pytest.mark.parametrize("how", ["at", "snapshot", "number"])
def test_values_and_keys_are_of_one_moment_where_commits_come_while_they_are_pinned(
    pools: Pools, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    with pools.fresh(2) as pool:
        table = made(pool, "flat")
        train(table)
        between = CommitsBetween(monkeypatch, lambda: train(table), times=3)
        if how == "at":
            at = table.at()
        elif how == "snapshot":
            assert pool.snapshot("then") == {"flat": 4}
            at = table.at("then")
        else:
            with pytest.raises(errors.VersionGone):  # of version 1 there is nothing any more, when it has looked
                table.at(1)
            at = table.at(4)
        with at:
            assert not between.left
            assert (at.version, at.keys.version) == (4, 4)
            assert torch.equal(at.read_keys(), table.read_keys())
            assert torch.equal(all_rows(at), all_rows(table))
        assert not pool.status().shards[0].version_bytes or how == "snapshot"


class CommitsWithin:
    """Has a commit come between the two calls of so many looks at keys in groups."""

    def __init__(self, patch: pytest.MonkeyPatch, commit: Callable[[], None], *, times: int) -> None:
        self.left, self.commit, self.looks = times, commit, 0
        self.score = Attempt.score
        patch.setattr(Attempt, "score", lambda attempt, queries, **asked: self.scored(attempt, queries, asked))

    async def scored(self, attempt: Attempt, queries: torch.Tensor, asked: dict[str, Any]) -> Any:
        if asked.get("groups") is not None and self.left:
            self.left -= 1
            await asyncio.to_thread(self.commit)
        self.looks += asked.get("groups") is None
        return await self.score(attempt, queries, **asked)


def test_groups_and_their_slots_are_scored_at_one_version(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    with pools.fresh(2) as pool:
        table = made(pool, "hierarchical", keys=mempool.HierarchicalKeys(key_dim=8, probes=3, optimizer=SGD(lr=1.0)))
        every = torch.arange(table.keys.num_slots)[None]

        def commit() -> None:
            """All keys become others."""
            (table.keys.gather(every, torch.randn(every.shape)) * torch.randn(8)).sum().backward()
            assert table.commit() == 1

        queries = torch.randn(5, 2, 8)
        for times, looks in ((2, 3), (99, 8)):
            with monkeypatch.context() as patch:
                between = CommitsWithin(patch, commit, times=times)
                found = table.score(queries, 4)
                assert between.looks == looks
            again = table.score(queries, 4)
            # Where a commit meets every look, the last one's answer has groups of one version and slots of the next.
            assert torch.equal(found.scores, again.scores) == (times < looks)


def test_tables_that_never_stand_still_are_not_pinned_at_one_moment(
    pools: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pinning, "MOST_LOOKS", 4)
    with pools.fresh(1) as pool:
        table = made(pool, "flat")
        CommitsBetween(monkeypatch, lambda: train(table), times=5)
        with pytest.raises(errors.Overloaded, match=r"'flat', 'flat:keys' cannot be pinned at one moment: .* 4 looks"):
            table.at()
        assert not any(seen.pins for shard in pool.status().shards for seen in shard.tables)
        with table.at() as seen:
            assert seen.version == 5


def test_keys_that_nobody_has_pinned_with_a_version_are_gone(pools: Pools) -> None:
    with pools.fresh(2) as pool:
        table = made(pool, "flat")
        keys_id, table_id = table.keys.schema.table_id, table.schema.table_id
        alone = loop.run(pinning.pin_newest(pool.router, [table_id]), timeout_s=30)
        assert alone.versions == {table_id: 0}
        before = all_rows(table)
        train(table)
        with table.at(0) as seen:
            assert torch.equal(all_rows(seen), before)
            for read in (seen.lookup, seen.score, seen.lookup_async, torch.no_grad()(seen.lookup)):
                with pytest.raises(errors.VersionGone, match="nobody keeps its keys as they were then: take table"):
                    read(torch.randn(2, 8), 4)
            with pytest.raises(errors.VersionGone, match="nobody keeps its keys"):
                seen.read_keys()
        with table.at(1) as seen:
            assert seen.keys.version == table.at().keys.version == 1
            assert keys_id in {each.table_id for each in pool.status().shards[0].tables}


def test_zeroing_and_freezing_reach_the_keys(pools: Pools) -> None:
    table = pools.table(keys=KEYS["product"], **SIZES)
    layer = MemoryLayer(6, table=table, keys="pool", topk=4)
    memory = PoolOptimizer(layer)
    assert [len(group["params"]) for group in memory.param_groups] == [2, 2]

    def backward() -> None:
        layer(torch.randn(4, 6)).square().sum().backward()

    backward()
    assert (table.pending, table.keys.pending) == (1, 1)
    layer.zero_grad()
    assert (table.pending, table.keys.pending) == (0, 0)
    before = everything_of(table)
    with pytest.warns(UserWarning, match="Step first, then zero"):
        memory.step()
    assert_same(everything_of(table), before)
    layer.pool_keys.requires_grad_(False)
    backward()
    assert (table.pending, table.keys.pending) == (1, 0)
    layer.pool_keys.requires_grad_(True)
    table.keys.requires_grad_(False)
    backward()
    assert (table.pending, table.keys.pending) == (2, 0)
    table.keys.requires_grad_(True)
    memory.zero_grad()
    assert table.pending == 0
    queries = torch.randn(4, 2, 8)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(table.lookup(queries, 3).values.sum() * torch.inf).backward()
    scaler.step(memory)
    scaler.update()
    assert_same(everything_of(table), before)
    assert (table.pending, table.keys.pending) == (0, 0)
    table.lookup(queries, 3).values.sum().backward()
    together = table.prepare(norm_order=3.0)
    parts = prepare_tables(table.step_links, norm_order=3.0)
    assert together.updates == 2
    assert together.squared_norm == pytest.approx(sum(part.squared_norm for part in parts))
    assert together.norm == pytest.approx(sum(part.norm**3 for part in parts) ** (1 / 3))
    assert all(part.norm > 0.0 for part in parts)
    assert table.discard() == 2
    table.lookup(queries, 3).values.sum().backward()
    assert table.commit(lr=0.0, keys_lr=0.0) == 2
    assert torch.equal(table.read_keys(), before["keys"])


def test_what_cannot_be_is_refused(pools: Pools) -> None:
    plain = pools.table(**SIZES)
    served = pools.table(keys=mempool.FlatKeys(key_dim=8), **SIZES)
    table = pools.table(keys=KEYS["flat"], **SIZES)
    for without in (plain, served):
        with pytest.raises(errors.InvalidRequest, match="trains no keys in the pool"):
            without.score(torch.randn(2, 8), 3)
        with pytest.raises(errors.InvalidRequest, match="trains no keys in the pool"):
            PoolOptimizer([{"table": without}, {"table": without.keys}])
        with pytest.raises(errors.InvalidRequest, match=r'keys = "pool", and table .* trains no keys'):
            MemoryLayer(4, table=without, keys="pool")
        with pytest.raises(errors.InvalidRequest, match=r"keys_lr = 0\.1, and it trains no keys"):
            without.commit(keys_lr=0.1)
    for options, message in (
        ({"keys": "there"}, "keys = 'there': must be \"product\""),
        ({"keys": "pool", "heads": 2}, "heads = 2, and the keys of table .* have heads = 1"),
        ({"keys": "pool", "qk_norm": True}, "qk_norm is of keys in the model"),
        ({"keys": "pool", "key_init_std": 0.0}, "key_init_std is of keys in the model"),
    ):
        with pytest.raises(errors.InvalidRequest, match=message):
            MemoryLayer(4, table=table, topk=4, **options)
    with pytest.raises(errors.InvalidRequest, match=r"queries has shape \[2, 7\]"):
        table.score(torch.randn(2, 7), 3)
    with pytest.raises(errors.InvalidRequest, match="look up in that one"):
        table.keys.lookup(torch.randn(2, 8), 3)
    with pytest.raises(errors.ConfigError, match=r"keys\.deterministic = False is of keys that nobody trains"):
        mempool.TableConfig(
            name="a", keys={"type": "flat", "key_dim": 4, "deterministic": False, "optimizer": SGD(0.1)}, **SIZES
        )
    with pytest.raises(errors.ConfigError, match=r"keys\.optimizer\.lr = -1"):
        mempool.TableConfig(
            name="a", keys={"type": "flat", "key_dim": 4, "optimizer": {"type": "sgd", "lr": -1}}, **SIZES
        )
    with pytest.raises(errors.ConfigError, match="name"):
        mempool.TableConfig(name="flat:keys", **SIZES)
    before = table.read_keys()
    with pytest.raises(errors.InvalidRequest, match="keys must be finite"):
        table.write_keys(torch.full((64, 8), torch.nan))
    assert torch.equal(table.read_keys(), before)
    table.keys.write([3], torch.full((1, 8), torch.nan))
    with pytest.raises(errors.InvalidRequest, match="fewer than 64 keys that give a score"):
        table.score(torch.randn(2, 8), 64)
    assert all_rows(table).isfinite().all()
