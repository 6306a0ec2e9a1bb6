"""The table's face: rows, writes, keys, lookups, and what wrong arguments are told before anything is sent."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mempool.client import Pool, Table
from mempool.client import rows as rows_module
from mempool.client.routing.slices import WINDOW
from mempool.errors import InvalidRequest, ShardUnavailable
from mempool.types import FlatKeySpec, OptimizerSpec, ProductKeySpec, StepCountReply, StepCountRequest
from tests.support.faulty import COLUMNS, LAYOUTS, Fault, FaultyPool, make_schema


@pytest.fixture
def opened(open_pool: Callable[..., Pool]) -> Callable[..., tuple[FaultyPool, Table]]:
    def make(fake: FaultyPool | None = None, **options: object) -> tuple[FaultyPool, Table]:
        fake = fake or FaultyPool(COLUMNS)
        return fake, open_pool(fake, **options).table("facts")

    return make


def test_says_what_it_is(opened) -> None:  # type: ignore[no-untyped-def]
    _, table = opened()
    assert (table.name, table.num_slots, table.value_dim, table.dtype) == ("facts", 64, 12, torch.float32)
    assert repr(table) == "Table('facts', num_slots=64, value_dim=12, dtype='float32')"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_and_writes(opened, layout: str) -> None:  # type: ignore[no-untyped-def]
    rowwise = OptimizerSpec(algorithm="rowwise_adagrad", lr=0.5, initial_accumulator_value=2.0)
    fake, table = opened(FaultyPool(LAYOUTS[layout], schema=make_schema(optimizer=rowwise)))
    ids = torch.tensor([63, 0, 9, 0], dtype=torch.int32)
    assert torch.equal(table.rows(ids), fake.values.float()[ids.long()])
    values = torch.randn(3, 12, dtype=torch.float64)
    table.write(ids[:3], values)
    assert torch.equal(table.rows(ids[:3]), values.float())
    assert table.rows(ids[:0]).shape == (0, 12)
    table.write(ids[:0], values[:0])


def test_large_reads_and_writes_are_cut_into_messages(opened, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(rows_module, "MESSAGE_BYTES", 4 * 12 * 10)
    fake, table = opened(FaultyPool(LAYOUTS["one"]))
    table.write(torch.arange(64), torch.arange(64.0)[:, None].expand(64, 12))
    assert torch.equal(table.rows(torch.arange(63, -1, -1)), torch.arange(63.0, -1, -1)[:, None].expand(64, 12))
    assert [len(request.ids) for request in fake.shards[0].requests("write_rows")] == [10] * 6 + [4]
    assert [len(request.ids) for request in fake.shards[0].requests("read_rows")] == [10] * 6 + [4]


def test_some_messages_of_a_large_read_or_write_are_under_way_together(opened, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(rows_module, "MESSAGE_BYTES", 4 * 12 * 10)
    adam = OptimizerSpec(algorithm="adam", lr=0.5)
    fake, table = opened(FaultyPool(LAYOUTS["one"], schema=make_schema(optimizer=adam)))
    host, under_way, most = fake.shards[0], 0, dict[str, int]()

    def counted(name: str) -> None:
        serve = getattr(host, name)

        async def call(request: Any) -> Any:
            nonlocal under_way
            under_way += 1
            most[name] = max(most.get(name, 0), under_way)
            await asyncio.sleep(0)
            try:
                return await serve(request)
            finally:
                under_way -= 1

        monkeypatch.setattr(host, name, call)

    counted("read_rows")
    counted("write_rows")
    ids = torch.arange(63, -1, -1)
    table.write_state(ids, {"values.exp_avg": torch.arange(64.0)[:, None].expand(64, 12)})
    state = table.state(torch.arange(64))
    assert torch.equal(state["values.exp_avg"], torch.arange(63.0, -1, -1)[:, None].expand(64, 12))
    assert not state["values.exp_avg_sq"].any()
    assert most == {"read_rows": WINDOW, "write_rows": WINDOW}
    assert table.state(torch.arange(64), []) == {}
    twice = table.state(torch.arange(64), ["values.exp_avg", "values.exp_avg"])
    assert torch.equal(twice["values.exp_avg"], state["values.exp_avg"])


def test_rows_of_a_closed_pool_are_refused(open_pool: Callable[..., Pool]) -> None:
    pool = open_pool(FaultyPool(COLUMNS))
    table = pool.table("facts")
    pool.close()
    for refused in (
        lambda: table.rows(torch.arange(3)),
        lambda: table.write(torch.arange(3), torch.zeros(3, 12)),
    ):
        with pytest.raises(InvalidRequest, match="closed"):
            refused()


def test_values_are_rounded_to_the_tables_dtype(opened) -> None:  # type: ignore[no-untyped-def]
    fake, table = opened(FaultyPool(COLUMNS, schema=make_schema(dtype="bfloat16")))
    assert table.dtype == torch.bfloat16
    table.write(torch.tensor([3]), torch.full((1, 12), 1.001))
    assert {request.rows.dtype for request in fake.shards[0].requests("write_rows")} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("ids", "values", "text"),
    [
        (
            torch.tensor([1, 2, 1]),
            torch.zeros(3, 12),
            r"ids\[0\], ids\[2\] are both 1; ids of a write must be distinct",
        ),
        (torch.tensor([1]), torch.zeros(1, 11), r"values has shape \[1, 11\], must be \[1, 12\]"),
        (torch.tensor([1]), torch.zeros(1, 12).long(), "values must be a floating torch.Tensor, not torch.int64"),
        (torch.tensor([1]), [[0.0] * 12], "values must be a floating torch.Tensor, not list"),
        (torch.tensor([64]), torch.zeros(1, 12), r"ids\[0\] = 64 is outside table 'facts'"),
        (torch.tensor([1.0]), torch.zeros(1, 12), "ids must be of an integer dtype"),
    ],
)
def test_wrong_writes_send_nothing(opened, ids: Tensor, values: Tensor, text: str) -> None:  # type: ignore[no-untyped-def]
    fake, table = opened()
    with pytest.raises(InvalidRequest, match=text):
        table.write(ids, values)
    assert not any(shard.calls for shard in fake.shards)


def test_wrong_gathers_send_nothing(opened) -> None:  # type: ignore[no-untyped-def]
    fake, table = opened()
    with pytest.raises(InvalidRequest, match=r"ids\[1, 0\] = 64 is outside table 'facts': it has 64 slots, 0 to 63"):
        table.gather(torch.tensor([[1], [64]]))
    with pytest.raises(InvalidRequest, match=r"weights has shape \[2, 2\], ids has \[2, 1\]"):
        table.gather(torch.tensor([[1], [2]]), torch.ones(2, 2))
    with pytest.raises(InvalidRequest, match="wire_dtype = 'float16'"):
        table.wire_dtype = "float16"  # type: ignore[assignment]
    assert not any(shard.calls for shard in fake.shards)


def test_flat_keys_and_lookups(opened) -> None:  # type: ignore[no-untyped-def]
    keys = torch.randn(64, 5)
    fake, table = opened(
        FaultyPool(LAYOUTS["rows"], schema=make_schema(keys=FlatKeySpec(key_dim=5)), keys=keys.clone())
    )
    queries = torch.randn(6, 5, dtype=torch.float64)
    found = table.lookup(queries, topk=4)
    scores, ids = (queries.float() @ keys.t()).topk(4)
    assert torch.equal(found.ids, ids)
    torch.testing.assert_close(found.scores, scores)
    torch.testing.assert_close(found.weights, scores.softmax(-1))
    expected = (fake.values.float()[ids] * scores.softmax(-1)[..., None]).sum(1)
    torch.testing.assert_close(found.values, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(table.gather(found.ids, found.weights).detach(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(table.read_keys(), keys)
    assert torch.equal(table.read_keys(torch.tensor([7, 3])), keys[[7, 3]])
    table.write_keys(torch.full((2, 5), 2.0), torch.tensor([9, 8]))
    assert torch.equal(fake.keys[[8, 9]], torch.full((2, 5), 2.0))
    table.write_keys(keys)
    assert torch.equal(table.read_keys(), keys)


def test_product_keys_have_the_models_shape(opened) -> None:  # type: ignore[no-untyped-def]
    schema = make_schema(keys=ProductKeySpec(heads=3, key_dim=4), stride=8)
    fake, table = opened(FaultyPool(COLUMNS, schema=schema, key_owners=(0, 2, 0), keys=torch.zeros(3, 2, 8, 2)))
    keys = torch.randn(3, 2, 8, 2)
    table.write_keys(keys)
    assert torch.equal(table.read_keys(), keys)
    table.write_keys(keys[:1], torch.tensor([2]))
    assert torch.equal(table.read_keys(torch.tensor([2])), keys[:1])
    assert table.lookup(torch.randn(5, 3, 4), topk=6).ids.shape == (5, 3, 6)
    assert table.lookup(torch.randn(0, 3, 4), topk=6).values.shape == (0, 12)
    with pytest.raises(InvalidRequest, match=r"ids\[0\] = 3 is outside table 'facts': it has 3 heads"):
        table.read_keys(torch.tensor([3]))
    with pytest.raises(InvalidRequest, match=r"keys has shape \[2, 2, 8, 2\], must be \[3, 2, 8, 2\]"):
        table.write_keys(keys[:2])
    with pytest.raises(InvalidRequest, match="keys must be finite"):
        table.write_keys(keys * torch.nan)
    assert torch.equal(fake.keys[2], keys[0])


def test_tables_without_keys_say_so(opened) -> None:  # type: ignore[no-untyped-def]
    _, table = opened()
    for call in (table.read_keys, lambda: table.write_keys(torch.zeros(1)), lambda: table.lookup(torch.zeros(1, 2), 1)):
        with pytest.raises(InvalidRequest, match="table 'facts' has no keys in the pool"):
            call()


def test_commit_takes_the_tables_own_learning_rate(opened) -> None:  # type: ignore[no-untyped-def]
    schema = make_schema(optimizer=OptimizerSpec(algorithm="sgd", lr=0.125))
    fake, table = opened(FaultyPool(COLUMNS, schema=schema))
    for lr, expected in ((None, 0.125), (0.5, 0.5), (0.0, 0.0)):
        table.gather(torch.tensor([[1]])).sum().backward()
        assert table.pending == 1
        assert table.commit(lr=lr) == 1
        assert fake.shards[0].requests("commit")[-1].parts[0].lr == expected
    assert table.commit() == 0
    assert table.counters.updates_committed == table.counters.updates_pushed == table.counters.lookups == 3


def test_discard_and_prepare_go_through(opened) -> None:  # type: ignore[no-untyped-def]
    fake, table = opened()
    before = fake.values.clone()
    table.gather(torch.tensor([[1], [1]])).sum().backward()
    prepared = table.prepare()
    assert prepared is not None
    assert prepared.squared_norm == pytest.approx(4.0 * 12)
    assert table.discard() == 1
    assert table.prepare() is None
    assert torch.equal(fake.values, before)


@pytest.mark.parametrize(("refuses", "count"), [(0, 0), (1, 100), (2, 100)])
def test_a_step_count_that_was_set_on_some_shards_is_finished_by_who_asks(  # type: ignore[no-untyped-def]
    opened, monkeypatch: pytest.MonkeyPatch, refuses: int, count: int
) -> None:
    fake, table = opened()
    host = fake.shards[refuses].host
    served = host.step_count

    async def refuse(request: StepCountRequest) -> StepCountReply:
        if request.set is not None:
            raise InvalidRequest("so far and no further")
        return await served(request)

    with monkeypatch.context() as patch:
        patch.setattr(host, "step_count", refuse)
        with pytest.raises(InvalidRequest, match="no further"):
            table.set_step(100)
    assert table.step_count() == count
    assert [shard.ask("step_count").count for shard in fake.shards] == [count] * 3


def test_traffic_is_counted(open_pool) -> None:  # type: ignore[no-untyped-def]
    pool = open_pool(FaultyPool(COLUMNS))
    pool.table("facts").gather(torch.zeros(8, 4, dtype=torch.int64), torch.ones(8, 4))
    assert pool.router.traffic.bytes_sent == 3 * (32 * 4 + 32 * 4 + 9 * 8)
    assert pool.router.traffic.bytes_received == 8 * 12 * 4


def test_pools_deadline_is_that_of_its_calls(opened) -> None:  # type: ignore[no-untyped-def]
    fake, table = opened(timeout_s=0.2)
    fake.shards[1].faults["gather"] = [Fault.SILENT]
    with pytest.raises(ShardUnavailable, match=r"shard 1 of pool 'run-7' did not answer within 0.2 s \(1 try"):
        table.gather(torch.tensor([[1]]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_inputs_and_answers_are_on_the_callers_device(opened) -> None:  # type: ignore[no-untyped-def]
    fake, table = opened()
    ids = torch.tensor([[1, 2], [3, 3]], device="cuda")
    weights = torch.rand(2, 2, device="cuda", dtype=torch.float16, requires_grad=True)
    pooled = table.gather(ids, weights)
    assert pooled.device == ids.device
    pooled.sum().backward()
    assert weights.grad is not None
    assert weights.grad.device == ids.device
    expected = fake.values.float()[ids.cpu()].sum(-1)
    torch.testing.assert_close(weights.grad.float().cpu(), expected, rtol=1e-3, atol=1e-3)
    assert table.gather(ids).device == ids.device
