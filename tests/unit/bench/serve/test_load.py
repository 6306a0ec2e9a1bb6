"""What clients count in open and closed loops, and pools of several sizes."""

import time

import pytest

from mempool.bench.serve import run
from mempool.bench.serve.client import Spell, arrivals, spend
from mempool.bench.serve.contenders import pools
from mempool.bench.serve.shapes import Pairs, Shape, TableSize, drawn_pairs

TABLE = TableSize(64, 8)
TINY = run.Workload(
    table=TABLE, shapes=(Shape(4, 3), Shape(2, 2)), budget_s=5.0, batch_s=0.001, embedded_shards=(1, 2),
    served_shards=(),
)  # fmt: skip


def test_pools_of_several_sizes_and_a_further_shards_cost() -> None:
    outcome = run.run(run.Options(rounds=2, only=("shards",)), say=lambda _: None, workload=TINY)
    assert outcome.failed == []
    assert [(one.layout, one.measured.shape.name) for one in outcome.shards] == [
        ("columns", "4x3"), ("columns", "2x2"), ("rows", "4x3"), ("rows", "2x2"),
    ]  # fmt: skip
    for one in outcome.shards:
        document = one.document()
        assert document["shards"] == {"mempool embedded, 1 shard": 1, "mempool embedded, 2 shards": 2}
        few, many = (document["contenders"][name]["client_cpu_ms"] for name in document["shards"])
        assert document["further_shard_cpu_ms"] == {pools.EMBEDDED: many - few, **dict.fromkeys(pools.REMOTE)}


def test_a_wait_behind_others_counts_in_an_open_loop() -> None:
    (pairs,) = drawn_pairs(Shape(1, 1), TABLE, seed=0, num_sets=1)
    clock = [100.0]

    class Clock:
        """Calls take a second each; nothing else takes time."""

        @staticmethod
        def monotonic() -> float:
            return clock[0]

        @staticmethod
        def sleep(seconds: float) -> None:
            clock[0] += seconds

    def a_second(_: Pairs) -> None:
        clock[0] += 1.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mempool.bench.serve.client.time", Clock)
        patch.setattr("mempool.bench.serve.client.arrivals", lambda *_: [0.0, 0.1, 0.2, 5.0])
        found = spend(Spell("x", [1, 1], 100.0, 6.0, rate=1.0), a_second, [pairs])
        assert found["latencies_ms"] == pytest.approx([1000.0, 1900.0, 2800.0, 1000.0])
        assert found["spent_s"] == pytest.approx(6.0)
        clock[0] = 100.0
        settled = spend(Spell("x", [1, 1], 100.0, 6.0, rate=1.0, settle_s=0.2), a_second, [pairs])
        assert settled["latencies_ms"] == pytest.approx([2800.0, 1000.0]), (
            "what waits behind the begin waits all the same"
        )
        assert (settled["spent_s"], settled["served"]) == (pytest.approx(5.8), 4)
        clock[0] = 100.0
        patch.setattr("mempool.bench.serve.client.arrivals", lambda *_: [0.0] * 5)
        late = spend(Spell("x", [1, 1], 100.0, 1.0, rate=1.0), a_second, [pairs])
        assert (len(late["latencies_ms"]), late["unserved"]) == (3, 2)


def test_arrivals_are_as_many_as_the_rate_says() -> None:
    found = arrivals(1000.0, 2.0, seed=1)
    assert found == sorted(found)
    assert all(0.0 < moment < 2.0 for moment in found)
    assert 1800 < len(found) < 2200
    assert arrivals(1e-9, 1.0, seed=1) == [0.0]


def test_a_failed_call_ends_the_spell() -> None:
    def fails(_: Pairs) -> None:
        raise ConnectionError("gone")

    (pairs,) = drawn_pairs(Shape(1, 1), TABLE, seed=0, num_sets=1)
    with pytest.raises(ConnectionError, match="gone"):
        spend(Spell("x", [1, 1], time.monotonic(), 0.01, threads=2), fails, [pairs])
