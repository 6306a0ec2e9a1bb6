"""What a prefetch does elsewhere: by another thread, waited for only where it is under way, and in forked processes."""

import gc
import multiprocessing
import os
import threading
import time
from contextlib import suppress
from typing import Any

import pytest
import torch

from mempool.client.gathers.prefetched import Prefetched
from mempool.nn import NgramMemory
from mempool.nn.ngrams.ahead import Ahead, _helper
from mempool.nn.ngrams.early import Batch, Early
from mempool.types.running import holds_others_up

from .test_lookup import batch, memory, result_of  # noqa: F401 - a fixture


def begun(ahead: "Ahead[Any]") -> None:
    end_s = time.monotonic() + 30.0
    while not (ahead._done.running() or ahead._done.done()):
        assert time.monotonic() < end_s, "nobody takes it"
        time.sleep(0.001)


def test_tokens_are_hashed_by_another_thread(memory: NgramMemory, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    _, tokens = batch()
    hashed, threads = memory.lookup._hashed, []

    def watched(*args: object) -> object:
        threads.append(threading.current_thread())
        return hashed(*args)

    monkeypatch.setattr(memory.lookup, "_hashed", watched)
    assert memory.prefetch(tokens)
    begun(memory.lookup._early.started[0].asked)
    before = memory.lookup(tokens).values
    assert threads
    assert threading.current_thread() not in threads
    assert before.equal(memory.lookup(tokens).values)
    assert threading.current_thread() is threads[-1]


def test_what_nobody_has_begun_is_not_waited_for(memory: NgramMemory) -> None:  # noqa: F811
    hidden, tokens = batch()
    expected = result_of(memory, tokens, hidden)
    memory.lookup.table.discard()
    ends = threading.Event()
    holds_up = Ahead(lambda: ends.wait(30.0))
    begun(holds_up)
    try:
        assert memory.prefetch(tokens)
        found = result_of(memory, tokens, hidden)
    finally:
        ends.set()
    assert all(one.equal(other) for one, other in zip(found, expected, strict=True))
    assert holds_up.result()


def test_what_fails_is_done_by_the_call_that_wants_it() -> None:
    def fail() -> None:
        raise ValueError("as a pool that was closed")

    ahead = Ahead(fail)
    begun(ahead)
    assert ahead.result() is None


def test_a_signals_handler_does_not_wait_for_what_it_holds_up() -> None:
    """The thread asks shards itself, and what the handler has interrupted may have one of them."""
    ends = threading.Event()
    under_way = Ahead(lambda: ends.wait(5.0))
    begun(under_way)

    @holds_others_up
    def interrupted() -> list[object]:
        return [under_way.result(), under_way.begun()]

    assert interrupted() == [None, None]
    ends.set()
    assert under_way.result() is True
    assert interrupted() == [True, True]


def test_who_was_interrupted_before_it_could_ring_keeps_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = _helper(os.getpid())._worker

    def interrupted() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(worker, "ring", interrupted)
        with pytest.raises(KeyboardInterrupt):
            Ahead(lambda: 1)
    begun(Ahead(lambda: 2))


def test_threads_take_each_its_own(memory: NgramMemory) -> None:  # noqa: F811
    batches = [memory.lookup._batch(batch(seed)[1], {}) for seed in range(3)]
    early, other = Early(), []
    early.add(batches, 0, Ahead.of([]))

    def second(found: Batch) -> bool:  # while it compares, another thread takes the first
        if found is batches[1] and not other:
            other.append(early.take(lambda each: each is batches[0]))
        return found is batches[1]

    taken = early.take(second)
    assert taken is not None
    assert taken.batch is batches[1]
    assert [each.batch for each in early.started] == batches[2:]


def test_of_two_that_take_the_same_one_gets_it(memory: NgramMemory) -> None:  # noqa: F811
    early, other = Early(), []
    early.add([memory.lookup._batch(batch()[1], {})], 0, Ahead.of([]))

    def any_one(_: Batch) -> bool:
        other.append(early.take(lambda _: True))
        return True

    assert early.take(any_one) is None
    assert other[0] is not None


def test_a_mask_may_be_refilled_after_a_prefetch(memory: NgramMemory) -> None:  # noqa: F811
    _, tokens = batch()
    masks = [torch.rand(tokens.shape) < 0.5 for _ in range(2)]
    expected = [memory.lookup(tokens, mask=mask).values for mask in masks]
    ends, buffer = threading.Event(), torch.empty_like(masks[0])
    holds_up = Ahead(lambda: ends.wait(30.0))
    begun(holds_up)
    for mask in masks:
        assert memory.prefetch(tokens, mask=buffer.copy_(mask))
    ends.set()
    for ahead in memory.lookup._early.started:
        begun(ahead.asked)
    found = [memory.lookup(tokens, mask=buffer.copy_(mask)).values for mask in masks]
    assert all(one.equal(other) for one, other in zip(found, expected, strict=True))


def test_as_much_is_prefetched_as_there_is_room_for(memory: NgramMemory) -> None:  # noqa: F811
    link, (_, tokens) = memory.lookup.table.link, batch()
    rows = tokens.numel() * memory.lookup.ngrams.columns
    link.prefetched = Prefetched(max_bytes=int(2.5 * rows * (16 + 4 * link.value_dim)))
    ends = threading.Event()
    holds_up = Ahead(lambda: ends.wait(30.0))
    begun(holds_up)
    try:
        others = [tokens.roll(times) for times in range(2)]
        assert [memory.prefetch(each) for each in others] == [True, True]
        assert memory.prefetch(torch.full_like(tokens, 3))  # more than there is room for, but for few slots
        assert not memory.prefetch(torch.arange(tokens.numel()).view(tokens.shape) % 11)
    finally:
        ends.set()
    for each in others:
        memory.lookup(each)
    memory.lookup(torch.full_like(tokens, 3))
    assert link.prefetched.num_bytes == 0


def test_what_is_not_done_gives_back_its_room(memory: NgramMemory) -> None:  # noqa: F811
    _, tokens = batch()
    prefetched, ends = memory.lookup.table.link.prefetched, threading.Event()
    holds_up = Ahead(lambda: ends.wait(30.0))
    begun(holds_up)
    try:
        assert memory.prefetch(tokens)
        assert prefetched.num_bytes > 0
        memory.lookup.load_state_dict(memory.lookup.state_dict())
        assert prefetched.num_bytes == 0
    finally:
        ends.set()


def test_an_interrupt_keeps_no_room(memory: NgramMemory, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Between what takes it and what will give it back."""
    (_, tokens), link = batch(), memory.lookup.table.link

    def interrupted(*_: object, **__: object) -> None:
        assert link.prefetched.num_bytes > 0
        raise KeyboardInterrupt

    monkeypatch.setattr("mempool.nn.ngrams.lookup.Ahead", interrupted)
    with suppress(KeyboardInterrupt):
        memory.prefetch(tokens)
    assert link.prefetched.num_bytes == 0


def _forked(send: Any, ahead: "Ahead[Any]") -> None:
    send.send(ahead.result())


def test_a_forked_process_waits_for_no_thread_of_its_parent() -> None:
    ends = threading.Event()
    under_way = Ahead(lambda: ends.wait(30.0))
    begun(under_way)
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_forked, args=(send, under_way), daemon=True)
    child.start()
    try:
        assert receive.poll(20.0), "the child waits for its parent's thread"
        assert receive.recv() is None
    finally:
        ends.set()
        child.kill()
    child.join(30.0)


def _child(send: object) -> None:
    ahead = Ahead(lambda: 7)
    begun(ahead)
    send.send(ahead.result())  # type: ignore[attr-defined]


def test_a_forked_process_has_a_thread_of_its_own() -> None:
    first = Ahead(lambda: 5)
    begun(first)
    assert first.result() == 5
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(send,), daemon=True)
    child.start()
    assert receive.poll(30.0), "the child waits for its parent's thread"
    assert receive.recv() == 7
    child.join(30.0)


def test_shards_of_this_process_are_asked_by_the_thread_itself(
    memory: NgramMemory,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (hidden, tokens), session, threads = batch(), memory.lookup.table.link.session, []
    expected = result_of(memory, tokens, hidden)
    memory.lookup.table.discard()
    gather_at_once = session.gather_at_once

    def watched(*given: Any, **named: Any) -> Any:
        threads.append(threading.current_thread())
        return gather_at_once(*given, **named)

    monkeypatch.setattr(session, "gather_at_once", watched)
    assert memory.prefetch(tokens)
    memory.lookup._early.started[0].asked._done.result(30.0)
    assert len(threads) == 1
    assert threading.current_thread() not in threads
    found = result_of(memory, tokens, hidden)
    assert len(threads) == 1
    assert all(one.equal(other) for one, other in zip(found, expected, strict=True))


def test_what_was_asked_by_the_thread_and_is_never_taken_is_forgotten(
    memory: NgramMemory,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (_, tokens), link = batch(), memory.lookup.table.link
    released: list[int] = []
    router, release = link._router, link._router.release  # of shards that have no time for it, the loop's
    monkeypatch.setattr(
        router, "release", lambda record: lambda: released.append(record.lookup_id) or release(record)()
    )
    assert memory.prefetch(tokens)
    begun(memory.lookup._early.started[0].asked)
    assert memory.lookup._early.started[0].asked.result() is not None
    (fetch,) = link.prefetched._fetches
    fetch.pending.answered()
    assert released == []
    del fetch
    link.prefetched.drop()
    gc.collect()
    assert len(released) == 1


def test_what_is_done_for_several_is_not_given_up_for_one(memory: NgramMemory) -> None:  # noqa: F811
    batches = [batch(seed)[1] for seed in range(2)]
    expected = [memory.lookup(tokens).values for tokens in batches]
    ends = threading.Event()
    holds_up = Ahead(lambda: ends.wait(30.0))
    begun(holds_up)
    try:
        assert memory.prefetch_all(batches)
        asked = memory.lookup._early.started[1].asked
        before = memory.lookup.table.counters.lookups
        assert memory.lookup(batches[0]).values.equal(expected[0])  # nobody has begun: it asks itself
    finally:
        ends.set()
    asked._done.result(30.0)
    assert memory.lookup(batches[1]).values.equal(expected[1])
    assert memory.lookup.table.counters.lookups == before + 2


def test_what_is_done_for_several_is_given_up_with_the_last(memory: NgramMemory) -> None:  # noqa: F811
    batches, lookup = [batch(seed)[1] for seed in range(2)], memory.lookup
    expected = [lookup(tokens).values for tokens in batches]
    ends = threading.Event()
    holds_up = Ahead(lambda: ends.wait(30.0))
    begun(holds_up)
    try:
        assert memory.prefetch_all(batches)
        before = lookup.table.counters.lookups
        assert all(lookup(tokens).values.equal(rows) for tokens, rows in zip(batches, expected, strict=True))
        assert lookup.table.link.prefetched.num_bytes == 0
    finally:
        ends.set()
    begun(last := Ahead(lambda: None))
    last.result()
    assert lookup.table.counters.lookups == before + 2


@pytest.mark.parametrize("together", [False, True])
def test_what_is_prefetched_was_not_looked_up(memory: NgramMemory, together: bool) -> None:  # noqa: F811
    """It says nothing of how old the values of a gradient are, and no caution is given where nobody hears it."""
    table, (hidden, tokens) = memory.lookup.table, batch()
    others = [tokens.roll(times, dims=1) for times in range(1, 4)]
    memory(hidden, tokens).sum().backward()
    table.commit()
    table.link.expect(7, whose="a model")
    assert table.staleness == 1
    for some in (others[:2], others[2:]):  # the second start looks whether the first ones count
        assert memory.prefetch_all(some) if together else all(map(memory.prefetch, some))
        memory.lookup._early.started[-1].asked._done.result(30.0)
    assert table.staleness == 1
    with pytest.warns(UserWarning, match="saved beside version 7"):
        memory.lookup(others[0])
    assert table.staleness == 0


@pytest.mark.parametrize("shape", [(2, 12), (2, 3, 4), (24,)])
def test_tokens_that_were_written_to_since_are_other_ones(
    memory: NgramMemory,  # noqa: F811
    shape: tuple[int, ...],
) -> None:
    tokens = torch.arange(24).view(shape) % 10
    same = memory.lookup(tokens).values
    assert memory.prefetch(tokens)
    tokens += 1
    changed = memory.lookup(tokens).values
    assert changed.equal(memory.lookup(tokens.clone()).values)
    assert not changed.equal(same)
    tokens -= 1
    (ahead,) = memory.lookup._early.started
    assert ahead.batch.is_plainly(tokens)
    assert not ahead.batch.is_plainly(tokens.view(-1, 4) if shape != (2, 3, 4) else tokens.view(2, 12))
    assert memory.lookup(tokens).values.equal(same)
    assert memory.lookup._early.started == []
