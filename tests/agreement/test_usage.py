"""Counts of use equal a brute-force count, wherever slots are, and go with their table; dead slots begin anew."""

import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import mempool
from mempool.client import Pool, Table
from mempool.errors import AlreadyExists, InvalidRequest, StepConflict
from mempool.nn import PEERLayer
from mempool.optim import SGD, Adagrad, Adam, AdamW
from mempool.shard.usage import counting
from mempool.types.usage import Tally, usage_of
from tests.agreement.ranks import Ranks
from tests.unit.client.grpc_pool import GrpcPoolHere

from .conftest import Pools
from .reference import all_rows
from .test_checkpoints import _equal

SLOTS = 300
EVERY = torch.arange(SLOTS)
TABLE: dict[str, Any] = {"num_slots": SLOTS, "value_dim": 40, "block_dim": 16, "page_slots": 16, "usage": True}


class Count:
    """What is done to a table, counted slot by slot."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self.uses, self.last_use = torch.zeros(SLOTS, dtype=torch.int64), torch.zeros(SLOTS, dtype=torch.int64)
        self.version = 0
        self._random = torch.Generator().manual_seed(len(table.name))

    def bags(self) -> tuple[Tensor, Tensor]:
        """Few slots often, a third of all never."""
        ids = (200 * torch.rand(12, 7, generator=self._random) ** 3).long()
        return ids, torch.randn(12, 7, generator=self._random).requires_grad_()

    def step(self, *, pushes: int = 1, clip: bool = False) -> None:
        used = torch.zeros(SLOTS, dtype=torch.int64)
        for _ in range(pushes):
            ids, weights = self.bags()
            self.table.gather(ids, weights, padding_idx=5).square().sum().backward()
            used += torch.bincount(ids[ids != 5], minlength=SLOTS)
        scale = 1.0
        if clip:
            prepared = self.table.prepare()
            assert prepared is not None
            scale = 0.1
        assert self.table.commit(grad_scale=scale) == pushes
        self.version += 1
        self.uses += used
        self.last_use[used > 0] = self.version

    def check(self, table: Table | None = None) -> None:
        table = self.table if table is None else table
        raw = table.usage(EVERY)
        assert torch.equal(raw.slots, EVERY)
        assert torch.equal(raw.uses, self.uses)
        assert torch.equal(raw.last_use, self.last_use)
        found = table.usage(older_than=2)
        before = max(0, self.version - 1)
        whole = usage_of(
            Tally.of(self.uses.numpy(), self.last_use.numpy(), before=before), version=self.version, older_than=2
        )
        assert (found.uses, found.dead, found.outdated) == (whole.uses, whole.dead, whole.outdated)
        assert (found.histogram, found.zipf, found.most) == (whole.histogram, whole.zipf, whole.most)
        assert (found.version, found.num_slots, found.coverage) == (self.version, SLOTS, whole.coverage)
        assert (found.kl_uniform or 0.0) == pytest.approx(whole.kl_uniform or 0.0, rel=1e-9)


@pytest.mark.parametrize(("shards", "layout"), [(1, "auto"), (2, "columns"), (3, "columns"), (3, "rows"), (3, "grid")])
def test_counts_are_of_every_pair_that_was_committed(pools: Pools, shards: int, layout: str) -> None:
    optimizer = AdamW(lr=0.01, dense=True) if layout == "rows" else Adagrad(lr=0.1)
    table = pools.table(shards=shards, layout=layout, optimizer=optimizer, **TABLE)
    count = Count(table)
    count.check()
    count.step(pushes=2)
    count.step(clip=True)
    with torch.no_grad():
        table.gather(*count.bags())
    table.gather(*count.bags())  # whose gradient never comes
    table.requires_grad_(False)
    ids, weights = count.bags()
    table.gather(ids, weights).sum().backward()
    table.requires_grad_(True)
    table.gather(*count.bags()).sum().backward()
    assert table.discard() == 1
    count.check()
    count.step()
    count.step()
    count.check()
    some = torch.tensor([7, 299, 0, 7])
    assert torch.equal(table.usage(some).uses, count.uses[some])
    assert torch.equal(table.usage([7, 299]).uses, count.uses[[7, 299]])


def test_uses_of_experts_are_counted_once_each(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "_AT_ONCE", 7)  # of 30 pairs
    table = pools.table(shards=2, num_slots=256, value_dim=18, layout="rows", usage=True)
    layer = PEERLayer(9, table=table, heads=2, topk=3, key_dim=8)
    x, plain = torch.randn(5, 9), torch.randint(256, (4, 6))
    layer(x).sum().backward()
    table.commit()
    once = table.usage(range(256)).uses
    assert once.sum() == 5 * 2 * 3
    layer(x).sum().backward()  # its keys have not changed: it chooses the same ones
    table.gather(plain).sum().backward()
    table.commit()
    assert torch.equal(table.usage(range(256)).uses, 2 * once + torch.bincount(plain.flatten(), minlength=256))


def test_counts_go_with_a_rescale_a_checkpoint_a_fork_and_back(pools: Pools, tmp_path: Path) -> None:
    with pools.fresh(1) as pool:
        table = pool.create_table(mempool.TableConfig(name="facts", optimizer=Adam(lr=0.01), **TABLE))
        plain = pool.create_table(mempool.TableConfig(name="plain", **{**TABLE, "usage": False}))
        count = Count(table)
        count.step()
        for shards in (3, 2):
            pool.rescale(shards)
            count.check()
            count.step(pushes=2)
        count.check()
        fork = table.fork("then")
        then, moment = (count.uses.clone(), count.last_use.clone()), count.version
        pool.checkpoint(tmp_path)
        count.step()
        count.check()
        at_fork = Count(fork)
        (at_fork.uses, at_fork.last_use), at_fork.version = then, moment
        at_fork.check()
        with pytest.raises(AlreadyExists, match="usage"):
            plain.reset(to="then")
        table.reset(to="then")
        at_fork.check(table)
        at_fork.table = table
        at_fork.step()
        at_fork.check()
        file = tmp_path / "facts.safetensors"
        pool.export_table("facts", file, state=True)
        with safe_open(file, framework="pt") as tensors:
            assert torch.equal(tensors.get_tensor("values.uses")[:, 0], at_fork.uses)
        assert pool.import_table(file, name="again").usage().uses == 0  # as its optimizer's state begins anew
    for shards in (1, 3):
        (restored, _), other = pools.pool(shards).restore(tmp_path, tables=["facts", "plain"]), pools.pool(shards)
        pools.tables += [(other, restored), (other, other.table("plain"))]
        at = Count(restored)
        (at.uses, at.last_use), at.version = (count.uses * 0, count.last_use * 0), moment
        raw = restored.usage(EVERY)
        at.uses, at.last_use = raw.uses, raw.last_use
        assert int(at.last_use.max()) == moment
        at.step()
        at.check()
        pools.drop_tables()


def test_dead_slots_begin_anew_from_used_ones(pools: Pools) -> None:
    table = pools.table(shards=3, layout="columns", optimizer=Adam(lr=0.1), keys=mempool.FlatKeys(key_dim=6), **TABLE)
    count = Count(table)
    for _ in range(3):
        count.step()
    table.write_state([250], {"values.exp_avg": torch.ones(1, 40)})
    values, keys, state = all_rows(table), table.read_keys(), table.state(EVERY)
    done = table.reinit(noise=0.5, seed=4)
    dead = torch.nonzero(count.uses == 0)[:, 0]
    assert torch.equal(done.slots, dead)
    assert bool((count.uses[done.from_] > 0).all())
    drawn = torch.bincount(done.from_, minlength=SLOTS) / dead.shape[0]
    assert float((drawn - count.uses / count.uses.sum()).abs().max()) < 0.1  # by their counts
    used = count.uses > 0
    now = all_rows(table)
    assert torch.equal(now[used], values[used])
    noise = now[dead] - values[done.from_]
    assert float(noise.std()) == pytest.approx(0.5, rel=0.1)
    key_noise = table.read_keys()[dead] - keys[done.from_]
    assert float(key_noise.std()) == pytest.approx(0.5, rel=0.1)
    assert torch.equal(table.read_keys()[used], keys[used])
    for name, rows in table.state(EVERY).items():
        assert not rows[dead].any(), name
        assert torch.equal(rows[used], state[name][used]), name
    count.check()
    again = table.reinit(noise=0.5, seed=4)  # as whoever was cut off does
    assert torch.equal(again.from_, done.from_)
    assert torch.equal(all_rows(table), now)
    assert not torch.equal(table.reinit(noise=0.5, seed=5).from_, done.from_)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_some_slots_take_the_rows_that_they_are_told(pools: Pools, dtype: str) -> None:
    master = dtype == "bfloat16"
    optimizer = AdamW(lr=0.1, dense=True) if master else SGD(lr=0.1, momentum=0.9)
    keys = mempool.FlatKeys(key_dim=6, optimizer=Adagrad(lr=0.1))
    table = pools.table(shards=2, dtype=dtype, master=master, optimizer=optimizer, keys=keys, **TABLE)
    table.lookup(torch.randn(9, 6), 4).values.square().sum().backward()
    table.commit()
    used = torch.nonzero(table.usage(EVERY).uses)[:, 0]
    slots, from_ = used[:3], torch.tensor([290, 291, 292])
    before = {"rows": all_rows(table), "keys": table.read_keys(), **table.keys.state(EVERY)}
    with pytest.raises(InvalidRequest, match=rf"slot {int(slots[0])} was used .* times, and 3 of 3 slots were"):
        table.reinit(slots, from_=from_)
    done = table.reinit(slots, from_=from_, force=True)
    assert torch.equal(done.slots, slots)
    after = {"rows": all_rows(table), "keys": table.read_keys(), **table.keys.state(EVERY)}
    for name in ("rows", "keys"):
        assert torch.equal(after[name][slots], before[name][from_]), name
    assert not after["values.sum"][slots].any()
    others = ~torch.isin(EVERY, slots)
    _equal({name: part[others] for name, part in after.items()}, {name: part[others] for name, part in before.items()})
    if not master:
        assert not table.state(slots)["values.momentum_buffer"].any()
    uses = table.usage(EVERY).uses
    assert not uses[slots].any()
    assert table.usage().dead == SLOTS - used.shape[0] + 3
    drawn = table.reinit(slots[:1], seed=1).from_  # of one that is used
    assert bool((uses[drawn] > 0).all())


def test_slots_in_groups_take_the_keys_of_others_and_groups_keep_theirs(pools: Pools) -> None:
    keys = mempool.HierarchicalKeys(key_dim=6, groups=20, probes=3, optimizer=Adagrad(lr=0.1))
    table = pools.table(shards=2, keys=keys, **TABLE)
    table.lookup(torch.randn(9, 2, 6), 4).values.square().sum().backward()
    table.commit()
    values, before = all_rows(table), table.read_keys()
    slots, from_ = torch.tensor([3, 77, 299]), torch.tensor([290, 0, 150])
    table.reinit(slots, from_=from_, force=True)
    values[slots], before[20 + slots] = values[from_], before[20 + from_]
    assert torch.equal(all_rows(table), values)
    assert torch.equal(table.read_keys(), before)


def test_coverage_is_higher_once_dead_slots_have_begun_anew(pools: Pools) -> None:
    """Queries ask for the same few keys: those of the others are where nobody asks, until they begin anew."""
    torch.manual_seed(0)
    table = pools.table(
        shards=2, **{**TABLE, "num_slots": SLOTS}, keys=mempool.FlatKeys(key_dim=6, optimizer=SGD(lr=0.01))
    )
    around = torch.randn(4, 6)
    table.write_keys(torch.cat((around.repeat(10, 1) + 0.3 * torch.randn(40, 6), torch.randn(SLOTS - 40, 6) * 0.1)))

    def train() -> None:
        for _ in range(5):
            queries = around.repeat(8, 1) + 0.1 * torch.randn(32, 6)
            table.lookup(queries, 8).values.square().sum().backward()
            table.commit()

    train()
    before = table.usage().coverage
    assert before < 0.15
    table.reinit(noise=0.05)
    train()
    assert table.usage().coverage > 2 * before


def test_what_cannot_be_done_is_said_and_changes_nothing(pools: Pools) -> None:
    plain = pools.table(shards=2, **{**TABLE, "usage": False})
    for ask in (plain.usage, lambda: plain.usage([1]), plain.reinit, lambda: plain.reinit([1], from_=[2])):
        with pytest.raises(InvalidRequest, match=r"does not count how often its slots are used: .* usage=True"):
            ask()  # type: ignore[operator]
    before = all_rows(plain)
    plain.reinit([1], from_=[2], force=True)
    assert torch.equal(plain.rows([1]), before[2:3])

    table = pools.table(shards=2, **TABLE)
    before = all_rows(table)
    assert table.usage().kl_uniform is None
    wrong: list[tuple[dict[str, Any], str]] = [
        ({}, "no slot was used yet"),
        ({"slots": [1, 300], "from_": [2, 3]}, "300"),
        ({"slots": [1, 1], "from_": [2, 3]}, "must be distinct"),
        ({"slots": [1], "from_": [-1]}, "-1"),
        ({"slots": [1, 2], "from_": [3]}, "from_ names 1 slots for 2 in slots; give one for each"),
        ({"from_": [3]}, "slots does not say which take their rows"),
        ({"slots": [1, 2], "from_": [3, 2]}, "slot 2 is in slots and in from_"),
        ({"slots": [1], "from_": [3], "noise": -1.0}, "noise = -1.0 must be the standard deviation"),
        ({"slots": [1], "from_": [3], "noise": math.nan}, "noise = nan"),
        ({"slots": [1], "from_": [3], "noise": 1e39}, "noise = 1e.39 must be .* at most 1e.37"),
        ({"slots": [1], "from_": [3], "seed": -1}, "seed = -1 must be a whole number"),
        ({"slots": [1], "from_": [3], "seed": 0.5}, "seed = 0.5 must be"),
    ]
    for arguments, said in wrong:
        with pytest.raises(InvalidRequest, match=said):
            table.reinit(**arguments)
    for older_than in (-1, 0.5, 2**53):
        with pytest.raises(InvalidRequest, match=f"older_than = {older_than} must be a number of versions"):
            table.usage(older_than=older_than)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="older_than = 3 is of all slots together"):
        table.usage([1], older_than=3)  # type: ignore[call-overload]
    with pytest.raises(InvalidRequest, match="300"):
        table.usage([300])
    assert torch.equal(all_rows(table), before)

    count = Count(table)
    count.step()
    table.gather(*count.bags()).sum().backward()
    before = all_rows(table)
    with pytest.raises(StepConflict, match="1 updates are pending here"):
        table.reinit()
    table.discard()
    with table.at() as version:
        for refused in (version.usage, version.reinit):
            with pytest.raises(InvalidRequest, match="is read at version 1 here"):
                refused()
    assert torch.equal(all_rows(table), before)
    count.check()


def test_nobody_begins_anew_under_another_ones_step(pools: Pools) -> None:
    """Two clients of one pool."""
    if pools.kind != "grpc":
        pytest.skip("an embedded pool is one client's")
    table = pools.table(shards=2, **TABLE)
    count = Count(table)
    count.step()
    with mempool.connect(table.address) as other:
        theirs: Pool = other
        held = theirs.table(table.name)
        held.gather(*count.bags()).sum().backward()
        before = all_rows(table)
        with pytest.raises(StepConflict, match="is undecided, and slots cannot begin anew under it"):
            table.reinit(seed=1)
        assert torch.equal(all_rows(table), before)
        count.check()
        held.discard()
        assert table.reinit(seed=1).slots.numel() == table.usage().dead


def test_uses_of_all_ranks_are_counted_and_one_of_them_says_what_begins_anew() -> None:
    here = GrpcPoolHere(shards=2)
    barrier = threading.Barrier(2, timeout=30)
    pushed: list[Tensor] = []
    try:
        with Ranks(here, [mempool.TableConfig(name="facts", **TABLE)], world_size=2) as ranks:

            def train(rank: int, pool: Pool) -> None:
                table, random = pool.table("facts"), torch.Generator().manual_seed(rank)
                for number in range(3):
                    ids = torch.randint(0, 150, (6, 5), generator=random)
                    pushed.append(ids)
                    table.gather(ids, torch.rand(6, 5, generator=random)).square().sum().backward()
                    if number == 1:  # both have pushed, and nothing is decided
                        barrier.wait()
                        if rank:
                            with pytest.raises(StepConflict, match="are pending here"):
                                table.reinit()
                        barrier.wait()
                    assert table.commit() == 1
                    barrier.wait()
                    if rank and number == 1:
                        assert table.reinit(noise=0.1).slots.shape[0] == table.usage().dead
                    barrier.wait()

            ranks.each(train)
            uses = ranks.pools[0].table("facts").usage(EVERY).uses
    finally:
        here.close()
    assert torch.equal(uses, torch.bincount(torch.cat(pushed).flatten(), minlength=SLOTS))
