"""Gathers that are started early: bitwise what ``gather`` gives, in any order; nothing is kept of those given up."""

import gc
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mempool.client import PendingGather, Pool, Table
from mempool.client.gathers.window import Window
from mempool.errors import DeadlineExceeded, InvalidRequest, MempoolError
from mempool.types.bags import Bags
from mempool.wire.channels.loop import begin
from tests.support.faulty import LAYOUTS, Fault, FaultyPool
from tests.support.waiting import BOUND_S, HeldBack, until

LR = 0.5


@pytest.fixture
def open_table(open_pool: Callable[..., Pool]) -> Callable[..., tuple[FaultyPool, Table]]:
    def make(layout: str = "columns", **options: Any) -> tuple[FaultyPool, Table]:
        fake = FaultyPool(LAYOUTS[layout])
        return fake, open_pool(fake, **options).table("facts")

    return make


def make_inputs(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randint(0, 64, (5, 4), generator=generator),
        torch.randn(5, 4, generator=generator).requires_grad_(),
    )


def settled(pending: PendingGather) -> None:
    until(pending.done)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weighted", [True, False])
def test_values_gradients_and_steps_are_those_of_gather(open_table, layout: str, weighted: bool) -> None:  # type: ignore[no-untyped-def]
    found = []
    for start in (Table.gather, Table.gather_async):
        fake, table = open_table(layout)
        ids, weights = make_inputs()
        pooled = start(table, ids, weights if weighted else None)
        pooled = pooled if isinstance(pooled, Tensor) else pooled.result()
        pooled.sin().sum().backward()
        assert table.pending == 1
        table.commit(lr=LR)
        found.append((pooled, fake.values, weights.grad if weighted else torch.zeros(1)))
    for ours, expected in zip(*found, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("wire_dtype", ["float32", "bfloat16"])
def test_other_dtypes_are_gathers(open_table, dtype: torch.dtype, wire_dtype: str) -> None:  # type: ignore[no-untyped-def]
    _, table = open_table()
    table.wire_dtype = wire_dtype
    ids, leaf = make_inputs()
    found = []
    for start in (table.gather, lambda *given: table.gather_async(*given).result()):
        weights = leaf.detach().to(dtype).requires_grad_()
        pooled = start(ids, weights)
        pooled.sin().sum().backward()
        assert weights.grad.dtype == dtype
        found.append((pooled, weights.grad))
    for ours, expected in zip(*found, strict=True):
        assert torch.equal(ours, expected)


@given(
    moves=st.lists(st.tuples(st.sampled_from(("start", "finish", "drop", "backward", "commit")), st.integers(0, 7))),
    layout=st.sampled_from(sorted(LAYOUTS)),
)
@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_in_any_order_they_are_those_of_gather(open_table, moves: list[tuple[str, int]], layout: str) -> None:  # type: ignore[no-untyped-def]
    (fake, table), (plain_fake, plain) = open_table(layout), open_table(layout)
    leaves = [make_inputs(seed) for seed in range(8)]
    plain_weights = [weights.detach().clone().requires_grad_() for _, weights in leaves]
    under_way: list[tuple[PendingGather, Tensor]] = []
    finished: list[tuple[Tensor, Tensor]] = []
    for move, number in moves:
        if move == "start":
            ids, weights = leaves[number]
            under_way.append((table.gather_async(ids, weights), plain.gather(ids, plain_weights[number])))
        elif move == "finish" and under_way:
            pending, expected = under_way.pop(number % len(under_way))
            finished.append((pending.result(), expected))
            assert torch.equal(*finished[-1])
        elif move == "drop" and under_way:
            del under_way[number % len(under_way)]
        elif move == "backward" and finished:
            for pooled in finished.pop(number % len(finished)):
                pooled.sin().sum().backward()
        elif move == "commit":
            for pending, _ in under_way:
                settled(pending)  # whether it sees the step is no matter of order otherwise
            assert table.commit(lr=LR) == plain.commit(lr=LR)
    assert table.pending == plain.pending
    assert torch.equal(fake.values, plain_fake.values)
    for (_, weights), plain_leaf in zip(leaves, plain_weights, strict=True):
        assert (weights.grad is None) == (plain_leaf.grad is None)
        assert weights.grad is None or torch.equal(weights.grad, plain_leaf.grad)


def test_the_caller_goes_on_and_shards_work(open_table) -> None:  # type: ignore[no-untyped-def]
    fake, table = open_table("one")
    held = HeldBack(fake.shards[0], "gather")
    ids, weights = make_inputs()
    pending = [table.gather_async(ids, weights) for _ in range(3)]
    until(lambda: held.arrived == 3)
    assert not any(each.done() for each in pending)
    assert "pending" in repr(pending[0])
    held.let_go()
    for each in pending:
        each.result()
        assert "done" in repr(each)


def test_in_the_backward_pass_the_gradient_of_weights_is_waited_for_where_the_gather_was_started(open_table) -> None:  # type: ignore[no-untyped-def]
    """What lies between start and result is differentiated before the shard has answered."""
    fake, table = open_table("one")
    ids, weights = make_inputs()
    x = torch.randn(5, 12, requires_grad=True)
    pending = table.gather_async(ids, weights)
    between = x.sin()
    held, between_done = HeldBack(fake.shards[0], "update"), threading.Event()

    def differentiated(_: Tensor) -> None:
        until(lambda: held.arrived == 1)
        between_done.set()
        held.let_go()

    between.register_hook(differentiated)
    (between * pending.result()).sum().backward()
    assert between_done.is_set()
    assert weights.grad is not None
    assert table.pending == 1


def test_an_update_has_its_place_in_the_step_when_it_goes_out(open_table) -> None:  # type: ignore[no-untyped-def]
    """However late the loop comes to it: sums are made in the order of updates."""
    _, table = open_table()
    ids, weights = make_inputs()
    table.gather(ids, weights).sum().backward()  # the first asks whether this process is of a group, on the loop
    _, record = table.link.send_gather(
        Bags(ids.flatten(), weights.detach().flatten(), torch.arange(6) * 4), remember=True
    )
    busy, go_on, let_go = threading.Event(), threading.Event(), []

    async def hold_up() -> None:
        busy.set()
        let_go.append(go_on.wait(BOUND_S))

    begin(hold_up())
    assert busy.wait(BOUND_S)
    pending = table.link.begin_update(record, torch.ones(5, 12), hold=True)
    try:
        assert table.pending == 2
    finally:
        go_on.set()
    assert pending.result().shape == (20,)
    assert let_go == [True]


def test_the_graph_is_made_where_the_result_is_taken(open_table) -> None:  # type: ignore[no-untyped-def]
    _, table = open_table()
    ids, weights = make_inputs()
    table.gather(ids, weights).sum().backward()
    expected = weights.grad
    pending = table.gather_async(ids, weights)
    with torch.no_grad():
        assert not pending.result().requires_grad
    with torch.no_grad():
        later = table.gather_async(ids, weights)
    for each in (pending, later):
        weights.grad = None
        each.result().sum().backward()
        assert torch.equal(weights.grad, expected)
    table.requires_grad_(False)
    assert not table.gather_async(ids).result().requires_grad


def test_weights_are_those_of_the_start(open_table) -> None:  # type: ignore[no-untyped-def]
    _, table = open_table()
    ids, weights = make_inputs()
    expected = table.gather(ids, weights).detach()
    scaled = weights * 1.0
    pending = table.gather_async(ids, scaled)
    scaled.mul_(3.0)
    pending.result().sum().backward()
    assert torch.equal(pending.result(), expected)
    own = weights.grad
    assert own is not None
    weights.grad = None
    table.gather(ids, weights).sum().backward()
    assert torch.equal(own, weights.grad)
    with torch.no_grad():
        late = table.gather_async(ids, weights)
        weights.mul_(3.0)
    with pytest.raises(InvalidRequest, match="written to before its result was taken"):
        late.result()


def test_a_result_taken_twice_is_two_tensors_and_two_graphs(open_table) -> None:  # type: ignore[no-untyped-def]
    _, table = open_table()
    ids, weights = make_inputs()
    pending = table.gather_async(ids, weights)
    first, second = pending.result(), pending.result()
    kept = first.detach().clone()
    (first + second).sum().backward()
    assert table.pending == 2
    twice = weights.grad
    weights.grad = None
    with torch.no_grad():
        first.zero_()
    assert torch.equal(second, kept)
    table.gather(ids, weights).sum().backward()
    assert torch.equal(twice, 2 * weights.grad)


def test_gradients_of_named_inputs_ask_for_no_others(open_table) -> None:  # type: ignore[no-untyped-def]
    fake, table = open_table("one")
    ids, weights = make_inputs()
    x = torch.ones(5, 12, requires_grad=True)
    loss = (table.gather_async(ids, weights).result() * x).sum()
    torch.autograd.grad(loss, x, retain_graph=True)
    assert not fake.shards[0].requests("update")
    loss.backward(inputs=[table._anchor], retain_graph=True)
    assert [request.want_weight_grad for request in fake.shards[0].requests("update")] == [False]
    assert table.discard() == 1
    (grad,) = torch.autograd.grad(loss, weights, retain_graph=True)
    assert table.pending == 0
    loss.backward()
    assert torch.equal(grad, weights.grad)
    assert table.pending == 1
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.parametrize("upstream", [True, False])
def test_gradients_of_gradients_are_refused(open_table, upstream: bool) -> None:  # type: ignore[no-untyped-def]
    _, table = open_table()
    ids, leaf = make_inputs()
    weights = leaf.softmax(-1) if upstream else leaf
    (grad,) = torch.autograd.grad(table.gather_async(ids, weights).result().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(grad.sum(), leaf, allow_unused=True)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_activation_checkpointing_counts_each_gradient_once(open_table, reentrant: bool, inside: bool) -> None:  # type: ignore[no-untyped-def]
    found = []
    for early in (True, False):
        _, table = open_table()
        ids, weights = make_inputs()
        x = torch.ones(5, 12, requires_grad=True)
        outside = table.gather_async(ids, weights) if early and not inside else None

        def block(x: Tensor, table=table, ids=ids, weights=weights, outside=outside, early=early) -> Tensor:  # type: ignore[no-untyped-def]
            pending = outside or (table.gather_async(ids, weights) if early else None)
            return (x.sin() * (pending.result() if pending else table.gather(ids, weights))).cos()

        checkpoint(block, x, use_reentrant=reentrant).sum().backward()
        assert table.pending == 1
        found.append((weights.grad, x.grad))
    for ours, expected in zip(*found, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("end", ["dropped", "taken", "trained"])
@pytest.mark.parametrize("early", [True, False])
def test_nothing_is_remembered_of_what_is_gone(open_table, end: str, early: bool) -> None:  # type: ignore[no-untyped-def]
    """A handle that is dropped before its answer is here lets shards forget when it comes."""
    fake, table = open_table()
    ids, weights = make_inputs()
    held = HeldBack(fake.shards[0], "gather")
    pending = table.gather_async(ids, weights)
    until(lambda: held.arrived == 1)
    if early and end == "dropped":
        del pending
        gc.collect()
        held.let_go()
    else:
        held.let_go()
        pooled = pending.result() if end != "dropped" else None
        if end == "trained" and pooled is not None:
            pooled.sum().backward()
        until(lambda: fake.shards[0].context_bytes > 0)
        del pending, pooled
        gc.collect()
    until(lambda: not table.link._window.num_bytes)
    table.gather(ids, weights.detach(), remember=False)
    table.gather(ids, weights.detach(), remember=False)
    assert not any(shard.context_bytes for shard in fake.shards)


def test_the_graph_keeps_the_lookup_where_the_handle_is_gone(open_table) -> None:  # type: ignore[no-untyped-def]
    fake, table = open_table("one")
    ids, weights = make_inputs()
    pooled = table.gather_async(ids, weights).result()
    gc.collect()
    table.gather(ids, weights.detach(), remember=False)
    pooled.sum().backward()
    assert [request.ids for request in fake.shards[0].requests("update")] == [None]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"ids": torch.zeros(3, dtype=torch.int64)}, "give ids"),
        ({"ids": torch.full((2, 2), 64)}, "is outside table"),
        ({"ids": torch.zeros(2, 2), "weights": None}, "integer dtype"),
        ({"ids": torch.zeros(2, 2, dtype=torch.int64), "weights": torch.zeros(2)}, "they must agree"),
        ({"ids": torch.zeros(2, 2, dtype=torch.int64), "padding_idx": 99}, "padding_idx = 99"),
    ],
)
def test_mistakes_are_told_at_the_start_as_gather_tells_them(open_table, arguments: dict[str, Any], text: str) -> None:  # type: ignore[no-untyped-def]
    fake, table = open_table()
    said = []
    for start in (table.gather, table.gather_async):
        with pytest.raises(InvalidRequest, match=text) as caught:
            start(**arguments)
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert not any(shard.calls for shard in fake.shards)


def test_errors_are_the_results_in_the_words_of_gather(open_table) -> None:  # type: ignore[no-untyped-def]
    fake, table = open_table("one")
    ids, weights = make_inputs()
    fake.shards[0].faults["gather"] = [Fault.DATA_LOSS] * 2
    with pytest.raises(MempoolError) as expected:
        table.gather(ids, weights)
    pending = table.gather_async(ids, weights)
    for _ in range(2):
        with pytest.raises(type(expected.value)) as caught:
            pending.result()
        assert str(caught.value) == str(expected.value)
    assert caught.value.shard == expected.value.shard == 0
    assert table.gather_async(ids, weights).result().shape == (5, 12)


def test_an_update_that_fails_fails_the_backward_pass(open_table) -> None:  # type: ignore[no-untyped-def]
    fake, table = open_table("one")
    ids, weights = make_inputs()
    pooled = table.gather_async(ids, weights).result()
    fake.shards[0].faults["update"] = [Fault.DATA_LOSS]
    with pytest.raises(MempoolError, match="restore checkpoint 7"):
        pooled.sum().backward(retain_graph=True)
    assert table.pending == 0
    pooled.sum().backward()
    assert table.pending == 1


def test_a_silent_shard_is_waited_for_until_the_deadline_of_the_start(open_table) -> None:  # type: ignore[no-untyped-def]
    fake, table = open_table("one", timeout_s=0.2)
    fake.shards[0].faults["gather"] = [Fault.SILENT] * 10
    with pytest.raises(MempoolError, match="shard 0"):
        table.gather_async(*make_inputs()).result()
    assert table.link._window.num_bytes == 0


def test_a_pool_that_is_closed_meanwhile(open_pool: Callable[..., Pool]) -> None:
    fake = FaultyPool(LAYOUTS["one"])
    pool = open_pool(fake)
    table = pool.table("facts")
    ids, weights = make_inputs()
    answered, held = table.gather_async(ids, weights), None
    settled(answered)
    held = HeldBack(fake.shards[0], "gather")
    asked = table.gather_async(ids, weights)
    until(lambda: held.arrived == 1)
    pool.close()
    assert answered.result().shape == (5, 12)
    with pytest.raises(InvalidRequest, match="is closed"):
        table.gather_async(ids, weights)
    with pytest.raises(InvalidRequest, match="is closed"):
        answered.result().sum().backward()
    held.let_go()
    assert asked.result().shape == (5, 12)
    assert table.link._window.num_bytes == 0


def test_threads_start_and_finish_each_others(open_table) -> None:  # type: ignore[no-untyped-def]
    _, table = open_table()
    inputs = [make_inputs(seed) for seed in range(12)]
    expected = [table.gather(ids, weights).detach() for ids, weights in inputs]
    pending = [table.gather_async(ids, weights) for ids, weights in inputs]
    wrong: list[int] = []

    def finish(first: int) -> None:
        for number in range(first, first + 12):
            pooled = pending[number % 12].result()
            if not torch.equal(pooled, expected[number % 12]):
                wrong.append(number)
            (pooled * 0.25).sum().backward()

    threads = [threading.Thread(target=finish, args=(3 * number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(BOUND_S)
    assert not wrong
    assert table.pending == 48
    for ids, weights in inputs:
        own = weights.grad
        weights.grad = None
        table.gather(ids, weights).sum().backward()
        torch.testing.assert_close(own, weights.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_empty_batches_ask_nobody(open_table, shape: tuple[int, int]) -> None:  # type: ignore[no-untyped-def]
    fake, table = open_table()
    weights = torch.zeros(shape, requires_grad=True)
    pending = table.gather_async(torch.zeros(shape, dtype=torch.int64), weights)
    assert pending.done()
    pooled = pending.result()
    assert torch.equal(pooled, torch.zeros(shape[0], 12))
    pooled.sum().backward()
    assert torch.equal(weights.grad, torch.zeros(shape))
    assert not any(shard.calls for shard in fake.shards)


def test_it_cannot_be_pickled(open_table) -> None:  # type: ignore[no-untyped-def]
    _, table = open_table()
    with pytest.raises(InvalidRequest, match="cannot be pickled"):
        pickle.dumps(table.gather_async(*make_inputs()))


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_code_breaks_its_graph_and_export_is_refused(open_table) -> None:  # type: ignore[no-untyped-def]
    _, table = open_table()
    ids, weights = make_inputs()

    def model(weights: Tensor) -> Tensor:
        pending = table.gather_async(ids, weights.softmax(-1))
        between = weights.sin()
        return pending.result().sum() * between.sum()

    (expected,) = torch.autograd.grad(model(weights), weights)
    (found,) = torch.autograd.grad(torch.compile(model, backend="eager")(weights), weights)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    torch.compiler.reset()
    with pytest.raises(Exception, match=r"torch\.compiler\.disable|cannot be exported|Unsupported"):
        torch.compile(model, backend="eager", fullgraph=True)(weights)
    torch.compiler.reset()
    with pytest.raises(InvalidRequest, match="cannot be exported"):
        torch.jit.trace(model, (weights.detach(),))


def test_the_window_is_a_bound_and_its_wait_has_one() -> None:
    window = Window(window_bytes=100)
    first = window.enter(300, timeout_s=BOUND_S)  # one alone may be larger
    with pytest.raises(DeadlineExceeded, match="waited for that; nothing was sent"):
        window.enter(1, timeout_s=0.01)
    threading.Timer(0.02, window.leave, (first,)).start()
    rooms = [window.enter(60, timeout_s=BOUND_S), window.enter(40, timeout_s=BOUND_S)]
    with pytest.raises(DeadlineExceeded):
        window.enter(1, timeout_s=0.01)
    window.leave(first)  # it has left
    assert window.num_bytes == 100
    rooms.pop()  # of somebody who was interrupted
    assert window.num_bytes == 60


def test_who_starts_more_than_the_window_holds_waits(open_table) -> None:  # type: ignore[no-untyped-def]
    fake, table = open_table("one")
    ids, weights = make_inputs()
    table.link._window = Window(window_bytes=1_100)  # each is 528
    held, started = HeldBack(fake.shards[0], "gather"), []

    def start() -> None:
        started.extend(table.gather_async(ids, weights) for _ in range(6))

    thread = threading.Thread(target=start)
    thread.start()
    until(lambda: held.arrived == 2)
    until(lambda: len(started) == 2)  # it has the answers' handles a moment later
    held.let_go()
    thread.join(BOUND_S)
    assert len({pending.result() for pending in started}) == 6
    assert table.link._window.num_bytes == 0
