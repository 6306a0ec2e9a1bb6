"""Tables at a version, as a client of an embedded pool has them."""

import gc
import threading
from collections.abc import Callable, Iterator

import pytest
import torch

import mempool
from mempool.client import Pool, Table, TableAt
from mempool.errors import AlreadyExists, InvalidRequest, NotFound, VersionGone
from tests.support.faulty import COLUMNS, Fault, FaultyPool

SLOTS = 256
ALL = torch.arange(SLOTS)


@pytest.fixture
def pool() -> Iterator[Pool]:
    with mempool.local(shards=3) as made:
        yield made


@pytest.fixture
def table(pool: Pool) -> Table:
    return pool.create_table(mempool.TableConfig(name="facts", num_slots=SLOTS, value_dim=24, page_slots=16))


def train(table: Table, seed: int, lr: float = 0.1) -> None:
    ids = torch.randint(0, SLOTS, (16, 4), generator=torch.Generator().manual_seed(seed))
    table.gather(ids).square().mean().backward()
    table.commit(lr=lr)


def kept_bytes(pool: Pool) -> int:
    return sum(shard.version_bytes for shard in pool.status().shards)


class Trainer:
    """Trains on a thread of its own, and keeps what each version is."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self._stop = threading.Event()
        self.history = {0: table.rows(ALL)}
        self._thread = threading.Thread(target=self._train)

    def _train(self) -> None:
        while not self._stop.is_set():
            version = len(self.history)
            train(self._table, version)
            self.history[version] = self._table.rows(ALL)

    def __enter__(self) -> "Trainer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def test_each_look_up_is_bitwise_of_its_version_while_training_goes_on(pool: Pool, table: Table) -> None:
    """A few of them; ``python -m tests.benchmarks.readers`` does 100,000."""
    versions = set()
    with Trainer(table) as trainer:
        for number in range(6):
            with table.at() as seen:
                sums, weights = None, torch.rand(4, 8)
                for look_up in range(40):
                    ids = torch.randint(0, SLOTS, (32,), generator=torch.Generator().manual_seed(40 * number + look_up))
                    found = seen.gather(ids[:, None])
                    while seen.version not in trainer.history:
                        pass
                    assert torch.equal(found, trainer.history[seen.version][ids]), (seen.version, look_up)
                    sums = seen.gather(ALL[:32].view(4, 8), weights) if sums is None else sums
                    assert torch.equal(sums, seen.gather(ALL[:32].view(4, 8), weights))
                versions.add(seen.version)
    assert len(versions) == 6, "training went on"
    assert kept_bytes(pool) == 0


def test_every_acknowledged_commit_is_in_it(table: Table) -> None:
    for version in range(1, 5):
        train(table, version)
        with table.at() as seen:
            assert seen.version == version
            assert torch.equal(seen.rows(ALL), table.rows(ALL))


def test_a_version_by_its_number(pool: Pool, table: Table) -> None:
    train(table, 1)
    with table.at(1) as first:
        rows = first.rows(ALL)
        train(table, 2)
        with table.at(1) as again:
            first.close()
            assert (again.version, torch.equal(again.rows(ALL), rows)) == (1, True)
    with pytest.raises(VersionGone, match="version 1 of table 'facts' is not there any more"):
        table.at(1)
    with pytest.raises(InvalidRequest, match=r"version 3 .* still to come: it is at 2"):
        table.at(3)
    for bad in (-1, 1.5, True, None):
        with pytest.raises(InvalidRequest, match="version = "):
            table.at(bad)  # type: ignore[arg-type]
    assert kept_bytes(pool) == 0
    assert all(status.pins == () for shard in pool.status().shards for status in shard.tables)


def test_snapshots(pool: Pool, table: Table) -> None:
    other = pool.create_table(mempool.TableConfig(name="other", num_slots=64, value_dim=8))
    train(table, 1)
    assert pool.snapshot("before") == {"facts": 1, "other": 0}
    rows = table.rows(ALL)
    train(table, 2)
    with table.at("before") as seen, other.at("before") as also:
        assert (seen.version, also.version) == (1, 0)
        assert torch.equal(seen.rows(ALL), rows)
        with pytest.raises(AlreadyExists, match="drop it first"):
            pool.snapshot("before", tables=["facts"])
        with pytest.raises(AlreadyExists):
            pool.snapshot("before")
        assert torch.equal(seen.rows(ALL), rows)
    named = {(pin.name, pin.version) for shard in pool.status().shards for each in shard.tables for pin in each.pins}
    assert named == {("before", 1), ("before", 0)}
    pool.drop_snapshot("before", tables=["other"])
    with pytest.raises(VersionGone, match=r"snapshot 'before' of table 'other'.*released"):
        other.at("before")
    pool.drop_snapshot("before")
    pool.drop_snapshot("before")
    assert kept_bytes(pool) == 0
    with pytest.raises(NotFound, match="no table 'none'"):
        pool.snapshot("x", tables=["none"])
    for bad in ("latest", "", "x" * 65, 7):
        with pytest.raises(InvalidRequest, match="snapshot's name"):
            pool.snapshot(bad)  # type: ignore[arg-type]


def test_a_rescale_ends_it_and_says_so(pool: Pool, table: Table) -> None:
    seen = table.at()
    pool.snapshot("before")
    pool.rescale(2)
    with pytest.raises(VersionGone, match=r"moved.*table\.at\(\)"):
        seen.gather(torch.tensor([[1]]))
    with pytest.raises(VersionGone, match="snapshot 'before'"):
        table.at("before")
    with table.at() as again:
        assert torch.equal(again.rows(ALL), table.rows(ALL))
    seen.close()


def test_nothing_trains_it_and_nothing_writes_to_it(table: Table) -> None:
    seen = table.at()
    weights = torch.ones(1, 1, requires_grad=True)
    refused = "cannot be (trained|written|asked|cached|another|read)"
    with pytest.raises(InvalidRequest, match=refused):
        seen.gather(torch.tensor([[1]]), weights).sum().backward()
    with pytest.raises(InvalidRequest, match=refused):
        seen.gather_async(torch.tensor([[1]]), weights).result().sum().backward()
    calls = (
        seen.commit,
        seen.step_count,
        seen.at,
        lambda: seen.requires_grad_(True),
        lambda: seen.write([1], torch.ones(1, 24)),
        lambda: seen.write_state([1], {}),
        lambda: seen.write_keys(torch.ones(1, 24)),
        lambda: seen.set_step(1),
        lambda: seen.state([1]),
        lambda: setattr(seen, "cache_bytes", 9),
        lambda: mempool.optim.PoolOptimizer(seen),
    )
    for call in calls:
        with pytest.raises(InvalidRequest, match=refused):
            call()
    assert seen.prepare() is None
    assert (seen.discard(), seen.pending, seen.cache_bytes, seen.requires_grad) == (0, 0, 0, False)
    assert repr(seen).endswith("version=0)")
    train(table, 1)
    assert not torch.equal(seen.rows(ALL), table.rows(ALL)), "training the table goes on"
    seen.close()
    seen.close()
    with pytest.raises(VersionGone, match="it was released"):
        seen.rows(ALL)


def test_one_that_is_forgotten_is_let_go(pool: Pool, table: Table) -> None:
    seen = table.at()
    train(table, 1)
    table.rows(ALL)  # until then the step may be acknowledged only
    assert kept_bytes(pool) > 0
    del seen
    gc.collect()
    for _ in range(1000):
        if kept_bytes(pool) == 0:
            break
    assert kept_bytes(pool) == 0


def test_a_models_layers_read_at_a_version(pool: Pool, table: Table) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(mempool.nn.MemoryLayer(16, table=table, heads=2, topk=4, key_dim=8))
    x = torch.randn(5, 16)
    with torch.no_grad():
        wanted = model(x)
    with table.at() as seen:
        train(table, 1, lr=10.0)
        with mempool.nn.reading(model, seen):
            with torch.no_grad():
                assert torch.equal(model(x), wanted)
            with pytest.raises(InvalidRequest, match="cannot be trained"):
                model(x).sum().backward()
            assert isinstance(model[0].table, TableAt)
        with torch.no_grad():
            assert not torch.equal(model(x), wanted)
        assert model[0].table is table
        other = pool.create_table(mempool.TableConfig(name="other", num_slots=64, value_dim=8))
        no_layer = pytest.raises(InvalidRequest, match="no layer of table 'other'")
        with other.at() as wrong, no_layer, mempool.nn.reading(model, wrong):
            pass
        with pytest.raises(InvalidRequest, match="two versions"), mempool.nn.reading(model, seen, seen):
            pass
    model(x).square().mean().backward()
    mempool.optim.PoolOptimizer(model).step()
    assert table.step_count() == 2


@pytest.mark.parametrize("fault", [Fault.ERROR_BEFORE, Fault.ERROR_AFTER, Fault.STALE])
def test_messages_that_are_lost_while_it_is_taken(open_pool: Callable[..., Pool], fault: Fault) -> None:
    fake = FaultyPool(COLUMNS)
    facts = open_pool(fake).table("facts")
    for shard in (0, 1):
        fake.shards[shard].faults["pin"] = [fault]
        with facts.at() as seen:
            assert torch.equal(seen.rows(range(64)), facts.rows(range(64)))


def test_a_shard_that_is_started_anew_ends_it(open_pool: Callable[..., Pool]) -> None:
    fake = FaultyPool(COLUMNS)
    facts = open_pool(fake).table("facts")
    with facts.at() as seen:
        fake.shards[0].faults["gather"] = [Fault.RESTART]
        with pytest.raises(VersionGone, match="not there any more on shard 0"):
            seen.gather(torch.tensor([[1]]))
        assert torch.equal(facts.gather(torch.tensor([[1]])).detach(), facts.rows([1]))
