"""What a split says shards have is what shards say they have; what it says is sent is what is encoded."""

from typing import Any

import pytest
import torch

import mempool
from mempool.client.routing.plan import make_plan as client_plan
from mempool.client.routing.plan import packed_sums
from mempool.client.routing.plan import split as parts_of
from mempool.config import SGD, Adam, AdamW, ProductKeys, RowWiseAdagrad, TableConfig, resolve
from mempool.controller.changes import first_view
from mempool.kernels import pack_rows
from mempool.sizing import split
from mempool.sizing.traffic import columns_sent, keys_traffic, traffic
from mempool.types import ShardInfo, TableSchema
from mempool.types.bags import Bags
from mempool.types.keys import key_table_name
from mempool.types.messages import Envelope, GatherReply, GatherRequest, Stamp, StepId, UpdateReply, UpdateRequest
from mempool.wire.codecs import messages as codecs

ENVELOPE = Envelope(table_id=0, epoch=1, incarnation=1)
STAMP = Stamp(shard=0, incarnation=1, epoch=1, table_version=0)
HEADER_BYTES = 120
_PAIR_BYTES = 8


TABLES: list[dict[str, Any]] = [
    {},
    {"dtype": "bfloat16", "optimizer": Adam(0.1), "layout": "rows"},
    {"dtype": "int8", "master": True, "optimizer": SGD(0.1, momentum=0.9), "layout": "columns"},
    {"dtype": "float8_e4m3fn", "optimizer": RowWiseAdagrad(0.1), "layout": "grid"},
    {"optimizer": AdamW(0.1, dense=True), "layout": "grid", "block_dim": 16},
    {"dtype": "bfloat16", "optimizer": RowWiseAdagrad(0.1, rowwise="row")},
    {"keys": ProductKeys(heads=3, key_dim=6), "value_dim": 100, "block_dim": 40},
    {"keys": mempool.FlatKeys(key_dim=5), "dtype": "int8"},
    {"keys": ProductKeys(heads=3, key_dim=6, optimizer=AdamW(0.1, dense=True)), "layout": "columns"},
    {"keys": mempool.FlatKeys(key_dim=5, optimizer=SGD(0.1)), "dtype": "bfloat16"},
    {"keys": mempool.HierarchicalKeys(key_dim=5, optimizer=AdamW(0.1, dense=True)), "layout": "grid"},
]


@pytest.mark.parametrize("shards", [1, 3, 4])
def test_shards_have_what_it_says(shards: int) -> None:
    configs = [
        TableConfig(**{"name": f"t{number}", "num_slots": 24**2, "value_dim": 64, **fields})
        for number, fields in enumerate(TABLES)
    ]
    with mempool.local(shards=shards, device="cpu") as pool:
        for config in configs:
            pool.create_table(config)
        told = pool.status()
    for config in configs:
        found = split(resolve(config), shards)
        names = (config.name, key_table_name(config.name))
        seen = [[table for table in shard.tables if table.name in names] for shard in told.shards]
        bytes_of = [sum(table.num_bytes for table in tables) for tables in seen]
        assert found.total_bytes == sum(bytes_of), config
        assert found.largest_bytes == max(bytes_of)
        assert found.owners == sum(any(table.pages > 0 for table in tables) for tables in seen)


@pytest.mark.parametrize("shards", [1, 3, 8])
@pytest.mark.parametrize(
    "keys",
    [
        ProductKeys(heads=2, key_dim=16, optimizer=SGD(0.1)),
        mempool.FlatKeys(key_dim=16, optimizer=SGD(0.1)),
        # Of one slot each, so that all that a query finds have groups of their own.
        mempool.HierarchicalKeys(key_dim=16, groups=64**2, probes=8, optimizer=SGD(0.1)),
    ],
)
def test_what_is_sent_of_keys_is_what_a_client_sends(keys: Any, shards: int) -> None:
    bags, topk, heads = 512, 8, 1 if isinstance(keys, mempool.FlatKeys) else 2
    config = TableConfig(name="a", num_slots=64**2, value_dim=8, page_slots=16, keys=keys)
    with mempool.local(shards=shards, device="cpu") as pool:
        table = pool.create_table(config)
        counted = pool.router.traffic
        before = counted.bytes_sent, counted.bytes_received
        queries = torch.randn(bags, *((16,) if isinstance(keys, mempool.FlatKeys) else (2, 16)))
        table.score(queries.requires_grad_(), topk).scores.square().sum().backward()
        table.commit()  # whose messages have no tensors: what was pushed has gone by then
        sent, received = counted.bytes_sent - before[0], counted.bytes_received - before[1]
    found = split(resolve(config), shards)
    said = keys_traffic(found, bags=bags, topk=topk, heads=heads)
    assert found.keys is not None
    sent -= 4 * bags * topk * heads**2  # ids are counted as int64, and sent as int32
    assert sent == pytest.approx(said.out, rel=0.05)
    assert received == pytest.approx(said.back, rel=0.05)


@pytest.mark.parametrize("layout", ["columns", "rows", "grid", "auto"])
@pytest.mark.parametrize("shards", [1, 4, 6])
@pytest.mark.parametrize(
    ("wire_dtype", "bags"), [("float32", 8), ("bfloat16", 8), ("float8_e4m3fn", 8), ("float32", 4096)]
)
def test_what_is_sent_is_what_is_encoded(layout: Any, shards: int, wire_dtype: Any, bags: int) -> None:
    schema = resolve(TableConfig(name="a", num_slots=4096, value_dim=256, layout=layout, page_slots=16, block_dim=32))
    pairs = 4096
    generator = torch.Generator().manual_seed(0)
    drawn = Bags(
        ids=torch.randperm(4096, generator=generator),  # each slot once: every shard gets exactly its part
        weights=torch.ones(pairs),
        offsets=torch.arange(0, pairs + 1, pairs // bags),
    )
    sent = encoded(schema, shards, drawn, wire_dtype)
    said = traffic(split(schema, shards), bags=bags, pairs=pairs, wire_dtype=wire_dtype)
    for name, num_bytes in sent.items():
        headers = num_bytes - getattr(said, name)
        # Of a part of a pair, a whole one is said; of a bag too, where it has one pair.
        more = _PAIR_BYTES if bags == 8 else 4 * 256
        assert -more * shards < headers < HEADER_BYTES * shards, name


def encoded(schema: TableSchema, shards: int, drawn: Bags, wire_dtype: str) -> dict[str, int]:
    """Bytes of all messages of one look-up and its update, as a client would send and get them."""
    view, _ = first_view(schema, tuple(ShardInfo(shard=shard, address="", incarnation=1) for shard in range(shards)))
    sent = dict.fromkeys(("request", "reply", "grads", "weight_grads"), 0)
    for part in parts_of(client_plan(view), drawn):
        values = torch.zeros(part.bags.num_bags, part.route.width)
        grads = values.bfloat16() if wire_dtype == "bfloat16" else values
        if wire_dtype == "float8_e4m3fn":
            grads = pack_rows(packed_sums(schema, part.route.width), values)
        request = GatherRequest(
            envelope=ENVELOPE, lookup_id=1, ids=part.bags.ids, weights=part.bags.weights, offsets=part.bags.offsets,
            remember=True,
        )  # fmt: skip
        reply = GatherReply(stamp=STAMP, blocks=part.route.blocks, values=values if part.route.partial else grads)
        update = UpdateRequest(
            envelope=ENVELOPE, step_id=StepId(group="g", rank=0, step=1), sequence=1, lookup_id=1,
            blocks=part.route.blocks, grads=grads, hold=True, want_weight_grad=True,
        )  # fmt: skip
        answer = UpdateReply(stamp=STAMP, weight_grad=torch.zeros(part.bags.num_pairs))
        sent["request"] += len(codecs.GATHER_REQUEST.encode(request, narrow_ids=True))
        sent["reply"] += len(codecs.GATHER_REPLY.encode(reply))
        sent["grads"] += len(codecs.UPDATE_REQUEST.encode(update))
        sent["weight_grads"] += len(codecs.UPDATE_REPLY.encode(answer))
    return sent


def test_a_thousand_shards_are_laid_out_as_asked() -> None:
    config = TableConfig(name="a", num_slots=8192**2, value_dim=2048, dtype="bfloat16", layout="grid", block_dim=64)
    found = split(resolve(config), 1024)
    assert (found.kind, found.asked, found.owners, found.filtered) == ("grid", 1024, 1024, 1024)
    (held,) = found.holdings
    assert (held.share, held.width, held.area) == (1 / 32, 64, 1 / 1024)
    assert found.times_sent == 32
    assert columns_sent(found, bags=8, pairs=8 * 1024) == 8 * 65536  # every bag has pairs of all rows of shards
    assert columns_sent(found, bags=8, pairs=8) == pytest.approx(8 * 2048)  # and here of one
    values = 8192**2 * 2048 * (2 + 4)
    assert values < found.total_bytes < 1.01 * values
