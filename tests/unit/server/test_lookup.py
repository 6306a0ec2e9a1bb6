"""The coordinator of thin clients' lookups: what it takes and stamps. Against the client's own: test_server.py."""

import pytest
import torch

import mempool
from mempool.errors import InvalidRequest, NotFound
from mempool.server import LookupCoordinator
from mempool.types import ShardInfo
from mempool.wire.channels.loop import run
from mempool.wire.codecs.lookup import LookupReply, LookupRequest

CALL_S = 20.0


def lookup(pool: mempool.Pool, info: ShardInfo | None = None, **request: object) -> LookupReply:
    asked = LookupRequest(**{"topk": 2, **request})  # type: ignore[arg-type]
    return run(LookupCoordinator(pool.router, info=info).lookup(asked), CALL_S)


def test_stamp_and_dtype_are_as_asked() -> None:
    with mempool.local(shards=2) as pool:
        pool.create_table(
            mempool.TableConfig(name="keyed", num_slots=64, value_dim=8, keys=mempool.ProductKeys(heads=1, key_dim=4))
        )
        queries = torch.randn(3, 4)
        plain = lookup(pool, table="keyed", queries=queries)
        assert (plain.stamp.shard, plain.stamp.incarnation) == (0, 0)
        assert plain.values.dtype == torch.float32
        assert plain.ids.shape == (3, 1, 2)
        info = ShardInfo(shard=1, address="", incarnation=7)
        narrow = lookup(pool, info, table="keyed", queries=queries.unsqueeze(1), reply_dtype="bfloat16")
        assert (narrow.stamp.shard, narrow.stamp.incarnation) == (1, 7)
        assert narrow.values.dtype == torch.bfloat16
        assert torch.equal(narrow.ids, plain.ids)
        assert torch.equal(narrow.values, plain.values.to(torch.bfloat16))


def test_what_does_not_fit_is_said() -> None:
    with mempool.local(shards=1) as pool:
        pool.create_table(
            mempool.TableConfig(name="keyed", num_slots=64, value_dim=8, keys=mempool.ProductKeys(heads=2, key_dim=4))
        )
        with pytest.raises(InvalidRequest):
            lookup(pool, table="keyed", queries=torch.randn(3, 4))
        with pytest.raises(InvalidRequest):
            lookup(pool, table="keyed", queries=torch.full((3, 2, 4), float("nan")))
        with pytest.raises(InvalidRequest):
            lookup(pool, table="keyed", queries=torch.randn(3, 2, 4), topk=65)
        with pytest.raises(NotFound):
            lookup(pool, table="nowhere", queries=torch.randn(3, 2, 4))
