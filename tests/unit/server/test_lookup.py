"""The coordinator of thin clients' lookups: what it takes and stamps. Against the client's own: test_server.py."""

from typing import Any

import pytest
import torch

import mempool
from mempool.errors import InvalidRequest, NotFound, RequestTooLarge
from mempool.server import LookupCoordinator
from mempool.types import ShardInfo
from mempool.wire.channels.loop import run
from mempool.wire.codecs.lookup import LookupReply, LookupRequest

CALL_S = 20.0


def lookup(pool: mempool.Pool, info: ShardInfo | None = None, **request: object) -> LookupReply:
    asked = LookupRequest(**{"topk": 2, **request})  # type: ignore[arg-type]
    return run(LookupCoordinator(pool.router, info=info).lookup(asked), CALL_S)


@pytest.mark.parametrize(
    "keys",
    [
        mempool.ProductKeys(heads=1, key_dim=4),
        mempool.ProductKeys(heads=1, key_dim=4, optimizer=mempool.optim.SGD(0.1)),
        mempool.HierarchicalKeys(key_dim=4, optimizer=mempool.optim.SGD(0.1)),
    ],
)
def test_stamp_and_dtype_are_as_asked(keys: Any) -> None:
    with mempool.local(shards=2) as pool:
        pool.create_table(mempool.TableConfig(name="keyed", num_slots=64, value_dim=8, keys=keys))
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


@pytest.mark.parametrize(
    ("keys", "queries", "fits", "too_many"),
    [
        (mempool.ProductKeys(heads=2, key_dim=4), (2, 4), 20, 21),  # 2 x 2 x 16 bytes and a value of 32
        (mempool.FlatKeys(key_dim=4), (4,), 30, 31),  # 64 bytes
        (mempool.FlatKeys(key_dim=4, optimizer=mempool.optim.SGD(0.1)), (4,), 30, 31),
        # From two shards, 2 x 12 bytes of each of four sections.
        (mempool.ProductKeys(heads=2, key_dim=4, optimizer=mempool.optim.SGD(0.1)), (2, 4), 15, 16),
        # Of each of two queries four groups.
        (mempool.HierarchicalKeys(key_dim=4, probes=4, optimizer=mempool.optim.SGD(0.1)), (2, 4), 15, 16),
    ],
)
def test_an_answer_that_no_message_holds_is_refused_before_any_work(
    keys: Any, queries: tuple[int, ...], fits: int, too_many: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with mempool.local(shards=2) as pool:
        pool.create_table(mempool.TableConfig(name="keyed", num_slots=64, value_dim=8, keys=keys))
        small = LookupCoordinator(pool.router, max_answer_bytes=1024 + 96 * 20)

        def asked(num_queries: int) -> LookupRequest:
            return LookupRequest(table="keyed", queries=torch.zeros(num_queries, *queries), topk=2)

        assert run(small.lookup(asked(fits)), CALL_S).values.shape == (fits, 8)
        with monkeypatch.context() as patch:
            patch.setattr(pool.router, "lookup", None)
            with pytest.raises(RequestTooLarge, match=rf"a lookup of {too_many} queries .*Ask for fewer queries"):
                run(small.lookup(asked(too_many)), CALL_S)


def test_what_every_shard_finds_by_flat_keys_meets_here_and_is_counted() -> None:
    with mempool.local(shards=3) as pool:
        pool.create_table(
            mempool.TableConfig(
                name="keyed", num_slots=64, value_dim=1, keys=mempool.FlatKeys(key_dim=4), layout="rows"
            )
        )
        small = LookupCoordinator(pool.router, max_answer_bytes=1024 + 20 * 8 * 12 * 3)
        request = LookupRequest(table="keyed", queries=torch.zeros(28, 4), topk=8)  # itself of 3,696 + 1,024 bytes
        with pytest.raises(RequestTooLarge, match=r"takes 8,064 bytes of answers"):
            run(small.lookup(request), CALL_S)
        request = LookupRequest(table="keyed", queries=torch.zeros(20, 4), topk=8)
        assert run(small.lookup(request), CALL_S).ids.numel() == 20 * 8
