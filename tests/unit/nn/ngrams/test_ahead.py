"""What a prefetch does elsewhere: by another thread, waited for only where it is under way, and in forked processes."""

import multiprocessing
import threading
import time
from typing import Any

import pytest

from mempool.nn import NgramMemory
from mempool.nn.ngrams.ahead import Ahead

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
    begun(memory.lookup._ahead[0].asked)
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
