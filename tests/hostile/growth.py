"""How the time of a call grows with each field that repeats or has a length: 1x, 10x, 100x of an ordinary size.

    python -m tests.hostile.growth

Prints milliseconds of the whole call (best of three) and how much more than linear the last tenfold was.
"""

import argparse
import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from google.protobuf.message import Message

from mempool.wire.v1 import data_pb2, pool_pb2, shard_pb2
from tests.hostile.raw import METHODS, RawChannel
from tests.hostile.target import Target
from tests.hostile.valid import (
    BLOCK_DIM,
    GROUPED,
    GROUPED_KEYS,
    HEADS,
    KEY_DIM,
    NUM_SLOTS,
    VICTIM,
    Requests,
    schema,
    tensor,
    view_of,
)

TOKEN = "growth"
FACTORS = (1, 10, 100)
SUPERLINEAR = 2.0
WORTH_S = 0.05
"""Less than this is noise of the machine."""

Make = Callable[[Requests, int], Message]


def _zeros(count: int) -> np.ndarray:
    return np.zeros(count, np.int64)


def _gather(requests: Requests, *, pairs: int = 8, bags: int = 1, release: int = 0) -> Message:
    offsets = np.concatenate([_zeros(bags), [pairs]])
    return data_pb2.GatherRequest(
        envelope=requests.envelope(),
        lookup_id=1,
        remember=True,
        release=range(release),
        ids=tensor(_zeros(pairs)),
        weights=tensor(np.ones(pairs, np.float32)),
        offsets=tensor(offsets),
    )


def _in_groups(requests: Requests, queries: int) -> Message:
    groups = np.tile(np.arange(4, dtype=np.int64), (queries, 1))
    return data_pb2.ScoreRequest(
        envelope=requests.envelope(),
        topk=4,
        queries=tensor(_queries(queries)[:, :1]),
        groups=tensor(groups),
        group_scores=tensor(np.ones(groups.shape, np.float32)),
    )


def _update(requests: Requests, *, pairs: int = 8, bags: int = 1, blocks: int = 0, group: int = 4) -> Message:
    width = len(requests.blocks) * BLOCK_DIM
    return data_pb2.UpdateRequest(
        envelope=requests.envelope(),
        step_id=data_pb2.StepId(group="g" * group, step=1),
        sequence=requests.random.getrandbits(40),
        blocks=[*requests.blocks, *range(blocks)],
        hold=False,
        want_weight_grad=True,
        grads=tensor(np.ones((bags, width), np.float32)),
        ids=tensor(_zeros(pairs)),
        offsets=tensor(np.concatenate([_zeros(bags), [pairs]])),
    )


def _step(cls: type[Message], requests: Requests, *, sequences: int = 0, group: int = 4) -> Message:
    step = data_pb2.StepId(group="g" * group, step=requests.random.getrandbits(40))
    if cls is data_pb2.DiscardRequest:
        return data_pb2.DiscardRequest(parts=[data_pb2.DiscardPart(envelope=requests.envelope(), step_id=step)])
    part = data_pb2.CommitPart if cls is data_pb2.CommitRequest else data_pb2.PreparePart
    return cls(parts=[part(envelope=requests.envelope(), step_id=step, sequences=range(sequences))])  # type: ignore[call-arg]


def _view(requests: Requests, *, shards: int = 0, entries: int = 0) -> shard_pb2.AttachTableRequest:
    request = shard_pb2.AttachTableRequest(view=requests.view, mode=shard_pb2.ATTACH_MODE_EMPTY)
    for number in range(shards):
        request.view.shards.add(shard=10 + number, address="127.0.0.1:1", incarnation=1)
    for number in range(entries):
        request.ledger.entries.add(group=f"group {number}", rank=0, step=1)
    return request


def _pages(cls: type[Message], requests: Requests, *, rows: int = 1, blocks: int = 0, keys: int = 0) -> Message:
    request = cls(
        table_id=requests.view.schema.table_id,  # type: ignore[call-arg]
        blocks=[*requests.blocks, *range(blocks)],
        key_pages=range(keys),
        row_pages=tensor(_zeros(rows)),
    )
    if isinstance(request, shard_pb2.PullPagesRequest):
        request.source.CopyFrom(requests.view.shards[-1])
    return request


def _queries(count: int) -> "np.ndarray":
    return np.ones((count, HEADS, KEY_DIM), np.float32)


# label, field, ordinary size, request of a size
FIELDS: list[tuple[str, str, int, Make]] = [
    ("MemoryService.Gather", "ids", 10_000, lambda r, n: _gather(r, pairs=n)),
    ("MemoryService.Gather", "offsets", 1_000, lambda r, n: _gather(r, bags=n)),
    ("MemoryService.Gather", "release", 1_000, lambda r, n: _gather(r, release=n)),
    ("MemoryService.Update", "ids", 10_000, lambda r, n: _update(r, pairs=n)),
    ("MemoryService.Update", "grads, offsets", 1_000, lambda r, n: _update(r, bags=n)),
    ("MemoryService.Update", "blocks", 1_000, lambda r, n: _update(r, blocks=n)),
    ("MemoryService.Update", "group", 10_000, lambda r, n: _update(r, group=n)),
    ("MemoryService.Prepare", "sequences", 1_000, lambda r, n: _step(data_pb2.PrepareRequest, r, sequences=n)),
    ("MemoryService.Prepare", "group", 10_000, lambda r, n: _step(data_pb2.PrepareRequest, r, group=n)),
    ("MemoryService.Commit", "sequences", 1_000, lambda r, n: _step(data_pb2.CommitRequest, r, sequences=n)),
    ("MemoryService.Commit", "group", 10_000, lambda r, n: _step(data_pb2.CommitRequest, r, group=n)),
    ("MemoryService.Discard", "group", 10_000, lambda r, n: _step(data_pb2.DiscardRequest, r, group=n)),
    (
        "MemoryService.Score",
        "queries",
        100,
        lambda r, n: data_pb2.ScoreRequest(envelope=r.envelope(), topk=4, queries=tensor(_queries(n))),
    ),
    (
        "MemoryService.Score",
        "topk",
        2,
        lambda r, n: data_pb2.ScoreRequest(envelope=r.envelope(), topk=n, queries=tensor(_queries(64))),
    ),
    ("MemoryService.Score", "groups", 100, _in_groups),
    (
        "MemoryService.Lookup",
        "queries",
        100,
        lambda _, n: data_pb2.LookupRequest(table=VICTIM, topk=4, queries=tensor(_queries(n))),
    ),
    (
        "MemoryService.Lookup",
        "table",
        10_000,
        lambda _, n: data_pb2.LookupRequest(table="t" * n, topk=4, queries=tensor(_queries(1))),
    ),
    (
        "MemoryService.ReadRows",
        "ids",
        10_000,
        lambda r, n: data_pb2.ReadRowsRequest(envelope=r.envelope(), array="values", ids=tensor(_zeros(n))),
    ),
    (
        "MemoryService.ReadRows",
        "array",
        10_000,
        lambda r, n: data_pb2.ReadRowsRequest(envelope=r.envelope(), array="v" * n, ids=tensor(_zeros(1))),
    ),
    (
        "MemoryService.WriteRows",
        "ids, rows",
        1_000,
        lambda r, n: data_pb2.WriteRowsRequest(
            envelope=r.envelope(),
            array="values",
            blocks=r.blocks,
            ids=tensor(np.arange(n, dtype=np.int64) % NUM_SLOTS),
            rows=tensor(np.ones((n, len(r.blocks) * BLOCK_DIM), np.float32)),
        ),
    ),
    (
        "MemoryService.WriteRows",
        "write_id.open",
        10,
        lambda r, n: data_pb2.WriteRowsRequest(
            envelope=r.envelope(),
            array="values",
            blocks=r.blocks,
            write_id=data_pb2.WriteId(writer=r.random.getrandbits(63) + 1, number=n + 1, open=range(1, n + 1)),
            ids=tensor(_zeros(1)),
            rows=tensor(np.ones((1, len(r.blocks) * BLOCK_DIM), np.float32)),
        ),
    ),
    ("ShardService.AttachTable", "view.shards", 1_000, lambda r, n: _view(r, shards=n)),
    ("ShardService.AttachTable", "ledger.entries", 100, lambda r, n: _view(r, entries=n)),
    ("ShardService.ExportPages", "row_pages", 1_000, lambda r, n: _pages(shard_pb2.ExportPagesRequest, r, rows=n)),
    ("ShardService.ExportPages", "blocks", 1_000, lambda r, n: _pages(shard_pb2.ExportPagesRequest, r, blocks=n)),
    ("ShardService.ExportPages", "key_pages", 1_000, lambda r, n: _pages(shard_pb2.ExportPagesRequest, r, keys=n)),
    ("ShardService.PullPages", "row_pages", 1_000, lambda r, n: _pages(shard_pb2.PullPagesRequest, r, rows=n)),
    ("ShardService.PullPages", "blocks", 1_000, lambda r, n: _pages(shard_pb2.PullPagesRequest, r, blocks=n)),
    ("ShardService.PullPages", "key_pages", 1_000, lambda r, n: _pages(shard_pb2.PullPagesRequest, r, keys=n)),
    (
        "ShardService.SetView",
        "view.shards",
        1_000,
        lambda r, n: shard_pb2.SetViewRequest(view=_view(r, shards=n).view),
    ),
    ("PoolService.CreateTable", "name", 10_000, lambda _, n: _create(name="t" * n)),
    ("PoolService.CreateTable", "blocks", 10, lambda _, n: _create(value_dim=n, block_dim=1)),
    ("PoolService.CreateTable", "pages", 10_000, lambda _, n: _create(num_slots=n * n // 16 * 16, page_slots=1)),
    ("PoolService.CreateTable", "heads", 1_000, lambda _, n: _create(heads=n)),
    ("PoolService.DropTable", "name", 10_000, lambda _, n: pool_pb2.DropTableRequest(name="t" * n)),
    ("PoolService.GetTable", "name", 10_000, lambda _, n: pool_pb2.GetTableRequest(name="t" * n)),
]


def _create(*, name: str = "growing", heads: int = 1, **changes: object) -> Message:
    made = schema(name, **changes)
    made.product_keys.heads = heads
    if "value_dim" in changes or "num_slots" in changes:
        made.ClearField("product_keys")
        made.stride = 0
    return pool_pb2.CreateTableRequest(schema=made)


async def _measure(target: Target) -> int:
    pool = RawChannel(target.address, key=TOKEN)
    view = await view_of(pool, VICTIM)
    requests = Requests(view, shard=0, seed=1)
    await view_of(pool, GROUPED)
    grouped = Requests(await view_of(pool, GROUPED_KEYS), shard=0, seed=1)
    shard = RawChannel(target.shards[0], key=TOKEN)
    controller = RawChannel(target.shards[0], key=TOKEN, controller_key=target.controller_key)
    channels = {"MemoryService": shard, "ShardService": controller, "PoolService": pool}
    bad = 0
    for label, field, size, make in FIELDS:
        channel = channels[label.split(".")[0]]
        took_s, ended = [], []
        for factor in FACTORS:
            request = make(grouped if field == "groups" else requests, size * factor)
            frame = request.SerializeToString()
            best_s = 1e9
            for _ in range(3):
                started_s = time.monotonic()
                status, _, _ = await channel.send(METHODS[label], frame, timeout_s=120)
                best_s = min(best_s, time.monotonic() - started_s)
                if label == "PoolService.CreateTable" and status == "OK":
                    assert isinstance(request, pool_pb2.CreateTableRequest)
                    made = pool_pb2.DropTableRequest(name=request.schema.name)
                    await channel.ask("PoolService.DropTable", made)
            took_s.append(best_s)
            ended.append(status)
        over = took_s[2] / max(took_s[1], WORTH_S / 10) / 10
        wrong = over > SUPERLINEAR and took_s[2] > WORTH_S
        bad += wrong
        shown = "  ".join(f"{seconds * 1e3:9.1f} ms" for seconds in took_s)
        print(
            f"{label:26} {field:16} {size:7} x1 x10 x100: {shown}  {over:5.2f}x linear"
            f"{'  <-- more than linear' if wrong else ''}  {'/'.join(dict.fromkeys(ended))}",
            flush=True,
        )
    for channel in (pool, shard, controller):
        await channel.close()
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--log", type=Path)
    with Target(shards=1, token=TOKEN, log=parser.parse_args().log) as target:
        return 1 if asyncio.run(_measure(target)) else 0


if __name__ == "__main__":
    raise SystemExit(main())
