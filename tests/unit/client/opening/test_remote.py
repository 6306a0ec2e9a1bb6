"""Pools over gRPC, on loopback: real engines, real servers; what clients meet when parts of a pool are away."""

import threading
import time
from collections.abc import Iterable, Iterator

import pytest
import torch

from mempool.client import GrpcDialer, GrpcShard, connect
from mempool.client.opening import remote as remote_module
from mempool.client.opening.remote import addresses_of
from mempool.client.transport import shard as transport_module
from mempool.client.transport.shard import _fit_narrow
from mempool.config import SGD, Adagrad, FlatKeys, TableConfig
from mempool.errors import (
    DataLoss,
    InvalidRequest,
    MempoolError,
    NotFound,
    PoolUnreachable,
    ShardUnavailable,
    Unauthenticated,
)
from mempool.placement.changes import ViewChange, changed
from mempool.server import services
from mempool.types import ExportLedger, RescaleProgress, ShardInfo, TableView
from mempool.wire.channels.grpc_channel import GrpcChannels
from mempool.wire.channels.loop import run
from tests.unit.client.grpc_pool import CONTROLLER_KEY, GrpcPoolHere, addresses

CONFIG = TableConfig(name="facts", num_slots=100, value_dim=96, block_dim=16, optimizer=SGD(lr=0.5))
NOBODY = "127.0.0.1:1"


@pytest.fixture
def here() -> Iterator[GrpcPoolHere]:
    pool = GrpcPoolHere()
    yield pool
    pool.close()


def make_inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 100, (7, 5), generator=generator), torch.randn(7, 5, generator=generator)


def test_trains_as_a_local_tensor_does(here: GrpcPoolHere) -> None:
    with connect(here.address) as pool:
        assert pool.name == "here"
        table = pool.create_table(CONFIG)
        values = table.rows(torch.arange(100)).requires_grad_()
        optimizer = torch.optim.SGD([values], lr=0.5)
        ids, weights = make_inputs()
        reports: list[RescaleProgress] = []
        for step in range(6):
            expected = torch.nn.functional.embedding_bag(ids, values, mode="sum", per_sample_weights=weights)
            found = table.gather(ids, weights)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            for pooled in (found, expected):
                (pooled - step).square().mean().backward()
            if step in (2, 4):  # pages move between an update and its commit
                pool.rescale(3 if step == 2 else 1, progress=reports.append)
            assert table.commit() == 1
            optimizer.step()
            optimizer.zero_grad()
        rows = table.rows(torch.arange(100))
        assert (rows - values).norm() <= 1e-5 * values.norm()
        assert reports[-1].done
        assert table.counters.updates_committed == 6
        assert [shard.tables[0].version for shard in pool.status().shards] == [6]


def test_shards_are_told_what_a_rescale_changes(here: GrpcPoolHere, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[ViewChange] = []

    def seen(views: Iterable[TableView], change: ViewChange) -> TableView:
        told.append(change)
        return changed(views, change)

    monkeypatch.setattr(services, "changed", seen)
    with connect(here.address) as pool:
        table = pool.create_table(TableConfig(name="facts", num_slots=4096, value_dim=8, page_slots=16, layout="rows"))
        rows = table.rows(torch.arange(4096))
        pool.rescale(3)
        assert [change.pages.shape[0] for change in told if change.pages.size].count(85) >= 2, "of 256 pages"
        assert torch.equal(table.rows(torch.arange(4096)), rows)


def test_lookups_and_keys_over_the_wire(here: GrpcPoolHere) -> None:
    config = TableConfig(name="keyed", num_slots=100, value_dim=8, keys=FlatKeys(key_dim=6), optimizer=Adagrad(lr=0.1))
    with connect(here.address) as pool:
        table = pool.create_table(config)
        keys = torch.randint(-3, 4, (100, 6)).float()
        table.write_keys(keys)
        assert torch.equal(table.read_keys(), keys)
        queries = torch.randint(-3, 4, (9, 6)).float()
        found = table.lookup(queries, topk=7)
        order = (queries @ keys.t()).argsort(dim=-1, descending=True, stable=True)[:, :7]
        assert torch.equal(found.ids, order)
        state = table.state(torch.tensor([1, 2, 3]))["values.sum"]
        assert torch.equal(state, torch.zeros(3, 8))


def test_client_outlives_the_controller(here: GrpcPoolHere) -> None:
    with connect(here.address, timeout_s=5.0) as pool:
        table = pool.create_table(CONFIG)
        here.stop_controller()
        ids, weights = make_inputs()
        table.gather(ids, weights).sum().backward()
        assert table.commit() == 1
        assert pool.table("facts") is table  # answered by a shard
        assert [shard.state for shard in pool.status().shards] == ["ready", "ready"]
        pool.router.tries.timeout_s = 0.3
        with pytest.raises(PoolUnreachable, match="pool 'here' did not answer within"):
            pool.create_table(TableConfig(name="other", num_slots=10, value_dim=4))


def test_any_of_several_addresses_will_do(here: GrpcPoolHere) -> None:
    with connect(here.address) as pool:
        pool.create_table(CONFIG)
    with connect(f"{NOBODY}, {here.address}") as pool:
        assert pool.table("facts").num_slots == 100
        pool.create_table(TableConfig(name="other", num_slots=10, value_dim=4))
        with pytest.raises(NotFound, match="nothing"):
            pool.table("nothing")
    here.stop_controller()
    with connect(f"{NOBODY},{addresses(here, [1])}", timeout_s=5.0) as pool:
        assert {table.name for table in pool.tables()} == {"facts", "other"}
        ids, weights = make_inputs()
        assert pool.table("facts").gather(ids, weights).shape == (7, 96)


def test_shard_alone_knows_the_pool_but_does_not_change_it(here: GrpcPoolHere) -> None:
    with connect(addresses(here, [0]), timeout_s=0.5) as pool:
        assert pool.name == "here"
        with pytest.raises(PoolUnreachable, match="only the controller of pool 'here' changes it"):
            pool.create_table(CONFIG)


def test_nobody_there() -> None:
    with pytest.raises(PoolUnreachable, match=r"no pool answered within 0.* mempool up -f") as raised:
        connect(NOBODY, timeout_s=0.3)
    assert str(raised.value).count(NOBODY) == 1
    assert "connection refused: nobody listens at that port" in str(raised.value)


def test_where_nobody_listens_connecting_ends_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "_REFUSED_S", 0.2)
    with pytest.raises(PoolUnreachable, match=r"no pool answered within 0\."):
        connect(f"{NOBODY}, 127.0.0.1:2", timeout_s=300.0)


@pytest.mark.parametrize(
    ("address", "right"),
    [
        ("", "'localhost:7077'"),
        ("localhost", "the port is missing; a pool's is 7077 unless its file says otherwise: 'localhost:7077'"),
        (":7077", "the host is missing; this machine is 'localhost:7077'"),
        ("localhost:", "'localhost:7077'"),
        ("localhost:http", "the port is 'http', must be a number from 1 to 65535"),
        ("a:1,b", "'b:7077'"),
        ("a:0", "the port is '0', must be"),
        ("a:70000", "the port is '70000', must be"),
        ("a:\u0667\u0667", "must be a number"),
        ("http://host:7077", "there is no http:// before it; give 'host:7077'"),
        ("grpc://host:7077/", "give 'host:7077'"),
        ("host:7077/pool", "a host and a port are all of it"),
        ("::1:7077", "an IPv6 address stands in brackets; give '[::1]:7077'"),
        (7077, "must be text"),
    ],
)
def test_addresses_are_host_and_port_and_the_right_one_is_said(address: str, right: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        connect(address)
    assert right in str(raised.value)


def test_addresses_that_are_right_pass() -> None:
    assert addresses_of(" localhost:7077, [::1]:7078 ,10.0.0.1:65535") == [
        "localhost:7077",
        "[::1]:7078",
        "10.0.0.1:65535",
    ]


def test_token_is_asked_for_and_taken_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEMPOOL_TOKEN", raising=False)
    here = GrpcPoolHere(token="secret")
    try:
        for token in (None, "wrong"):
            begin = time.monotonic()
            with pytest.raises(Unauthenticated):
                connect(here.address, token=token)
            assert time.monotonic() - begin < 15.0  # at once, not after the deadline of 30 s
        with connect(here.address, token="secret") as pool:
            pool.create_table(CONFIG)
        monkeypatch.setenv("MEMPOOL_TOKEN", "secret")
        with connect(here.address) as pool:
            assert pool.table("facts").gather(torch.tensor([[1]])).shape == (1, 96)
    finally:
        here.close()


def test_shard_that_is_gone_is_named(here: GrpcPoolHere) -> None:
    with connect(here.address, timeout_s=0.6) as pool:
        table = pool.create_table(CONFIG)
        address = here.infos[1].address
        here.stop_shard(1)
        with pytest.raises(ShardUnavailable, match="shard 1 of pool 'here' did not answer within 0") as raised:
            table.gather(torch.tensor([[1]]))
        assert (raised.value.shard, raised.value.address) == (1, address)


def test_shard_that_came_back_without_its_pages_says_so_and_takes_new_tables(here: GrpcPoolHere) -> None:
    with connect(here.address) as pool:
        table = pool.create_table(CONFIG)
        pooled = table.gather(torch.tensor([[1]]))
        here.restart_shard(1)
        pooled.sum().backward()  # nobody waits for what becomes of it
        with pytest.raises(DataLoss):
            table.commit()
        with pytest.raises(DataLoss):
            table.gather(torch.tensor([[1]]))
        other = pool.create_table(CONFIG.model_copy(update={"name": "other"}))
        other.gather(torch.tensor([[1]])).sum().backward()
        assert other.commit() == 1


def test_calls_under_way_end_when_the_pool_is_closed(here: GrpcPoolHere) -> None:
    pool = connect(here.address)
    table = pool.create_table(CONFIG)
    here.freeze(table.schema.table_id)
    errors: list[MempoolError] = []

    def write() -> None:
        try:
            table.write(torch.tensor([1]), torch.zeros(1, 96))
        except MempoolError as error:
            errors.append(error)

    writer = threading.Thread(target=write)
    writer.start()
    writer.join(0.5)
    assert writer.is_alive()  # a write waits while pages move
    pool.close()
    writer.join(20.0)
    assert not writer.is_alive()
    assert str(errors[0]) == "pool 'here' was closed during the call."


def test_dialer_keeps_one_connection_to_each_start_and_closes_idle_ones(
    here: GrpcPoolHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        dialer = GrpcDialer(GrpcChannels())
        first = here.infos[0]
        host = dialer.dial(first)
        assert dialer.dial(first) is host
        assert (await host.status()).info == first
        monkeypatch.setattr(transport_module, "_IDLE_S", -1.0)
        again = dialer.dial(ShardInfo(shard=0, address=first.address, incarnation=2))
        assert again is not host
        with pytest.raises(ShardUnavailable, match="closed on this side"):
            await host.status()
        await dialer.close()
        await dialer.close()
        with pytest.raises(ShardUnavailable, match="the pool was closed on this side"):
            dialer.dial(first)
        with pytest.raises(ShardUnavailable, match="closed on this side"):
            await again.status()

    run(main(), 30.0)


def test_shard_without_an_address_cannot_be_dialled() -> None:
    async def main() -> None:
        with pytest.raises(ShardUnavailable, match="shard 3 cannot be reached: it has no address yet"):
            GrpcDialer(GrpcChannels()).dial(ShardInfo(shard=3, address="", incarnation=1))

    run(main(), 30.0)


def test_shard_behind_its_address_is_a_whole_shard_host(here: GrpcPoolHere) -> None:
    with connect(here.address) as pool:
        table = pool.create_table(CONFIG)
        table_id = table.schema.table_id
        table.gather(torch.tensor([[1]])).sum().backward()
        table.commit()

    async def main() -> None:
        info = here.infos[0]
        shard = GrpcShard(info, GrpcChannels(controller_key=CONTROLLER_KEY)(info.address, shard=0))
        assert await shard.freeze(table_id, 5.0, token="here", lease_s=30.0) == 1
        part = await shard.export_ledger(ExportLedger(table_id=table_id, first=0))
        assert (part.version, part.updates_applied, part.num_entries, len(part.entries)) == (1, 1, 1, 1)
        await shard.thaw(table_id, token="here")
        assert [view.schema.name for view in await shard.views()] == ["facts"]
        assert (await shard.status()).tables[0].version == 1
        await shard.drop_table(table_id)
        assert await shard.views() == ()
        await shard.close()
        with pytest.raises(ShardUnavailable, match="closed on this side"):
            await shard.views()

    run(main(), 30.0)


def test_ids_are_narrow_where_they_fit() -> None:
    assert _fit_narrow(torch.tensor([], dtype=torch.int64))
    assert _fit_narrow(torch.tensor([0, 2**32 - 1]))
    assert not _fit_narrow(torch.tensor([0, 2**32]))
    assert not _fit_narrow(torch.tensor([-1, 5]))
