"""A pool's status, asked of addresses of which some do not answer."""

from collections.abc import Iterator
from contextlib import AsyncExitStack

import pytest

from mempool.client import asking
from mempool.client.asking import pool_status
from mempool.errors import PoolUnreachable, Unauthenticated
from mempool.wire.channels.loop import run
from tests.support.serving import ServedPool, served_pool

NOBODY = "127.0.0.1:1"


@pytest.fixture(scope="module")
def served() -> Iterator[ServedPool]:
    stack = AsyncExitStack()
    yield run(stack.enter_async_context(served_pool(1, token="a-token")), timeout_s=30)
    run(stack.aclose(), timeout_s=30)


def test_the_first_that_answers(served: ServedPool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pool_status([NOBODY, served.address], token="a-token").name == "served"
    by_shard = pool_status([served.shards[0].info.address], token="a-token")
    assert [shard.info.shard for shard in by_shard.shards] == [0]
    monkeypatch.setenv("MEMPOOL_TOKEN", "a-token")
    assert pool_status([served.address], timeout_s=0.0).name == "served"
    with pytest.raises(Unauthenticated, match="token"):
        pool_status([served.address], token="another")


def test_each_address_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "_PAUSE_S", 0.01)
    with pytest.raises(PoolUnreachable) as caught:
        pool_status([NOBODY, "nowhere.invalid:7077"], timeout_s=0.1)
    message = caught.value.message
    assert message.startswith(f"no pool answers at {NOBODY} (connection refused), nowhere.invalid:7077 (")
    assert message.count(NOBODY) == message.count("nowhere.invalid") == 1
