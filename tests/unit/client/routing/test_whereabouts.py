"""What is said of a pool, by where it is."""

import pytest

from mempool.client.routing.retry import Backoff, GiveUp, Retry
from mempool.client.routing.whereabouts import Whereabouts
from mempool.errors import MempoolError, PoolUnreachable, ShardUnavailable, StalePlacement

REMOTE_WORDS = ("mempool status", "mempool up", "Is it up", "connect", "address")
ERRORS = (ShardUnavailable("no answer", shard=0), PoolUnreachable("no answer"), StalePlacement("old", shard=0))


def final(where: Whereabouts, error: MempoolError) -> str:
    retry = Retry(table="facts", where=where, start_s=0.0, timeout_s=1.0, backoff=Backoff(), jitter=lambda: 0.0)
    action = retry.failed(error, now_s=2.0)
    assert isinstance(action, GiveUp)
    return str(action.error)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_embedded_pool_gives_no_remote_advice(error: MempoolError) -> None:
    where = Whereabouts(name="local", embedded=True)
    said = final(where, error)
    assert "embedded pool 'local'" in said
    assert "epeat the call" in said
    for text in (said, where.closed):
        assert not [word for word in REMOTE_WORDS if word in text]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_remote_pool_gives_remote_advice(error: MempoolError) -> None:
    said = final(Whereabouts(name="run-7"), error)
    assert "pool 'run-7'" in said
    assert any(word in said for word in REMOTE_WORDS)


def test_an_embedded_shard_says_what_it_is_at() -> None:
    where = Whereabouts(name="local", embedded=True, doing=lambda shard: f"it is at 'gather' {shard}")
    assert "nothing is lost: it is at 'gather' 0." in final(where, ShardUnavailable("no answer", shard=0))
    idle = Whereabouts(name="local", embedded=True, doing=lambda _: "")
    assert "kernels are being compiled, which happens once" in final(idle, ShardUnavailable("no answer", shard=0))


def test_a_pool_without_a_name_yet_is_no_pool_that_answered() -> None:
    assert final(Whereabouts(), PoolUnreachable("refused")).startswith("no pool answered within 2.0 s (1 try; last: ")
