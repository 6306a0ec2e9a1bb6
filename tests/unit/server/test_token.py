"""Who has no token, or no key, gets nothing: before a byte of its message is read."""

import asyncio
import sys
from collections.abc import Iterator
from unittest.mock import AsyncMock

import grpc
import grpc.aio
import numpy as np
import pytest
from serving import ServedPool, served_pool

import mempool
from mempool import errors
from mempool.client import GrpcShard
from mempool.config import resolve
from mempool.server import Server
from mempool.types import (
    AttachTable,
    ExportLedger,
    ExportPages,
    MarkTable,
    PullPages,
    ReleaseMark,
    ResolveRequest,
    TableSchema,
    TableView,
    WritePart,
)
from mempool.wire import methods
from mempool.wire.channels.grpc_channel import GrpcChannels
from mempool.wire.channels.loop import run
from mempool.wire.methods import GATHER, Method
from mempool.wire.v1 import shard_pb2

from .doors import CALL_S, CONTROLLER_KEY, ServerProcess, ended, raw, served

MIB = 2**20


@pytest.fixture
def process() -> Iterator[ServerProcess]:
    process = ServerProcess()
    yield process
    process.close()


async def flood(address: str, size: int, *metadata: tuple[str, str]) -> set[grpc.StatusCode]:
    """Ten calls of one size, in pairs."""
    body = bytes(size)
    codes: set[grpc.StatusCode] = set()
    for _ in range(5):
        codes |= set(await asyncio.gather(*(ended(address, GATHER.path, body, *metadata) for _ in range(2))))
    return codes


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks at /proc")
def test_messages_of_callers_without_the_token_are_never_read(process: ServerProcess) -> None:
    before = process.resident_bytes()
    assert run(flood(process.address, 200 * MIB), 120.0) == {grpc.StatusCode.UNAUTHENTICATED}
    assert process.resident_bytes("VmHWM") - before < 32 * MIB


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks at /proc")
def test_messages_over_the_limit_and_many_at_a_time_are_bounded(process: ServerProcess) -> None:
    before = process.resident_bytes()
    token = ("authorization", "Bearer sesame")
    assert run(flood(process.address, 64 * MIB, token), 60.0) == {grpc.StatusCode.RESOURCE_EXHAUSTED}

    async def many() -> set[grpc.StatusCode]:
        body = bytes(16 * MIB)
        return set(await asyncio.gather(*(ended(process.address, GATHER.path, body, token) for _ in range(64))))

    # All zeros is no message: refused once it is read.
    assert run(many(), 60.0) == {grpc.StatusCode.INVALID_ARGUMENT}
    # 1 GiB came. Two messages at a time may be here, and of those that wait 2 MiB each; gRPC copies each twice, in
    # memory that it reuses late. By gRPC's own windows it were 320 to 400 MiB.
    assert process.resident_bytes("VmHWM") - before < 288 * MIB


@pytest.mark.parametrize("metadata", [(), (("authorization", "Bearer wrong"),), (("authorization", "sesame"),)])
def test_a_call_without_the_token_reaches_nothing(metadata: tuple[tuple[str, str], ...]) -> None:
    async def main() -> None:
        shard = AsyncMock()
        async with served(shard, token="sesame") as (address, _):
            for method in vars(methods).values():
                if isinstance(method, Method):
                    code = await ended(address, method.path, b"", *metadata)
                    assert code is grpc.StatusCode.UNAUTHENTICATED, method
        assert shard.mock_calls == []

    run(main(), CALL_S)


CONTROLLERS = {
    "AttachTable",
    "DropTable",
    "Freeze",
    "Thaw",
    "Resolve",
    "ExportPages",
    "ExportLedger",
    "PullPages",
    "SetView",
    "MarkTable",
    "WritePart",
    "ReleaseMark",
    "ReadHeat",
}


def test_the_controllers_calls_are_these() -> None:
    service = shard_pb2.DESCRIPTOR.services_by_name["ShardService"]
    assert {method.name for method in service.methods} >= CONTROLLERS | {"Status"}
    known = [method for method in vars(methods).values() if isinstance(method, Method)]
    assert {method.name for method in known if method.controls} == {
        method.name for method in service.methods if method.name != "Status"
    }
    assert all(method.service == methods.SHARD_SERVICE for method in known if method.controls)


@pytest.mark.parametrize("token", [None, "sesame"])
def test_a_client_cannot_do_what_the_controller_does(token: str | None) -> None:
    async def main() -> None:
        async with served_pool(2, token=token) as pool:
            await pool.controller.create_table(schema())
            (view,) = await pool.controller.tables()
            before = await pool.shards[0].engine.status()
            for key in (None, "guessed"):
                await attempts(pool, view, GrpcChannels(token=token, controller_key=key))
            after = await pool.shards[0].engine.status()
            assert after.tables == before.tables
            client = GrpcChannels(token=token)(pool.shards[0].info.address, shard=0)
            host = GrpcShard(pool.shards[0].info, client)
            assert (await host.status()).tables == before.tables
            await host.close()

    run(main(), 3 * CALL_S)


def schema() -> TableSchema:
    return resolve(mempool.TableConfig(name="facts", num_slots=64, value_dim=8))


async def attempts(pool: ServedPool, view: TableView, channels: GrpcChannels) -> None:
    info, table_id = pool.shards[0].info, view.schema.table_id
    host = GrpcShard(info, channels(info.address, shard=0))
    pages = np.array([0])
    calls = [
        host.attach_table(AttachTable(view=view, mode="lost")),
        host.drop_table(table_id),
        host.freeze(table_id, 1.0, token="", lease_s=1.0),
        host.thaw(table_id),
        host.resolve(ResolveRequest(table_id=table_id, after_version=0)),
        host.export_pages(ExportPages(table_id=table_id, row_pages=pages, blocks=(0,))),
        host.export_ledger(ExportLedger(table_id=table_id, first=0)),
        host.pull_pages(PullPages(table_id=table_id, source=pool.shards[1].info, row_pages=pages, blocks=(0,))),
        host.set_view(view),
        host.mark_table(MarkTable(table_id=table_id, token="round", version=0, lease_s=1.0)),
        host.write_part(WritePart(table_id=table_id, token="round", url="/place", checkpoint="000001-7e19cac2")),
        host.release_mark(ReleaseMark(table_id=table_id, token="round")),
        host.read_heat(table_id),
    ]
    assert len(calls) == len(CONTROLLERS)
    for call in calls:
        with pytest.raises(errors.Unauthenticated, match="is for the pool's controller and its shards alone"):
            await call
    await host.close()


def test_a_server_without_a_key_takes_no_controllers_calls_at_all() -> None:
    async def main() -> None:
        server = Server(token=None)
        address = f"127.0.0.1:{server.bind('127.0.0.1', [0])}"
        shard = AsyncMock()
        await server.start(shard=shard, pool=AsyncMock(), lookup=AsyncMock())
        try:
            for key in ("", "None", CONTROLLER_KEY):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await raw(address, methods.THAW.path, b"", (methods.CONTROLLER_KEY, key))
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        finally:
            await server.stop(0.0)
        assert shard.mock_calls == []

    run(main(), CALL_S)


def test_a_channel_sends_the_key_only_where_it_is_needed() -> None:
    channel_metadata: list[tuple[str, bool]] = []

    async def main() -> None:
        async with served() as (address, _):
            channel = GrpcChannels(controller_key=CONTROLLER_KEY)(address, shard=0)
            for method in vars(methods).values():
                if isinstance(method, Method):
                    sent = dict(channel._metadata_of(method))
                    channel_metadata.append((method.path, methods.CONTROLLER_KEY in sent))
            await channel.close()

    run(main(), CALL_S)
    assert {path for path, has_key in channel_metadata if has_key} == {
        f"/{methods.SHARD_SERVICE}/{name}" for name in CONTROLLERS
    }
