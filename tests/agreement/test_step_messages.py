"""What a training step sends, and what it waits for: messages are counted, no time is measured."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.agreement.step_messages import Counts, Training, counted_pool

BOUND_S = 30.0


class Held:
    """Messages of a method wait until they are let go."""

    def __init__(self, counts: Counts, name: str) -> None:
        self.arrived = threading.Event()
        self._let_go = threading.Event()
        counts.before[name] = self._wait

    def let_go(self) -> None:
        self._let_go.set()

    async def _wait(self) -> None:
        self.arrived.set()
        async with asyncio.timeout(BOUND_S):
            while not self._let_go.is_set():
                await asyncio.sleep(0.005)


def sent(found: dict[str, Any]) -> tuple[dict[str, int], int]:
    return found["messages"], found["rounds"]


@pytest.mark.parametrize("over", ["memory", "grpc"])
def test_a_step_of_three_tables_on_four_shards_is_two_round_trips(over: str) -> None:
    with counted_pool(4, over=over) as (pool, counts):
        training = Training(pool, counts, tables=3)
        for _ in range(2):
            found = training.step()
            assert sent(found["zero_grad"]) == ({}, 0)
            assert found["backward"]["messages"] == {"update": 12}
            assert sent(found["step"]) == ({"prepare": 4, "commit": 1, "apply": 3}, 2)


def test_a_step_of_three_tables_on_one_shard_is_one_message() -> None:
    with counted_pool(1) as (pool, counts):
        found = Training(pool, counts, tables=3).step()
        assert sent(found["step"]) == ({"commit": 1}, 1)


def test_what_is_not_there_costs_no_message() -> None:
    """zero_grad where nothing was pushed, or where all was committed; a step without a backward pass."""
    with counted_pool(4) as (pool, counts):
        training = Training(pool, counts, tables=3)
        training.forward()
        for _ in range(2):
            counts.clear()
            training.optimizer.zero_grad()
            training.optimizer.step()
            training.optimizer.zero_grad()
            assert not counts.messages
            training.step()


def test_zero_grad_tells_the_owners_of_the_tables_that_hold_something_at_once() -> None:
    with counted_pool(4) as (pool, counts):
        training = Training(pool, counts, tables=3)
        training.forward().backward()
        counts.settle()
        counts.clear()
        training.optimizer.zero_grad()
        assert counts.messages["discard"] == 4
        assert counts.round_of["discard"] == 1


def test_gradients_are_waited_for_by_the_step_and_not_by_the_backward_pass() -> None:
    with counted_pool(4) as (pool, counts):
        training = Training(pool, counts, tables=3)
        loss = training.forward()
        held = Held(counts, "update")
        loss.backward()
        while counts.messages["update"] < 12:
            assert held.arrived.wait(BOUND_S)
            time.sleep(0.005)
        counts.clear()
        with ThreadPoolExecutor(1) as executor:
            step = executor.submit(training.optimizer.step)
            time.sleep(0.1)
            assert not counts.messages, "it waits for the shards to say that they hold them"
            assert not step.done()
            held.let_go()
            step.result(timeout=BOUND_S)
        assert counts.messages["prepare"] == 4
        assert counts.messages["update"] == 0


def test_where_the_gradient_of_weights_is_wanted_the_backward_pass_waits_for_it() -> None:
    with counted_pool(4) as (pool, counts):
        training = Training(pool, counts, tables=1)
        loss = training.forward(weights=True)
        held = Held(counts, "update")
        with ThreadPoolExecutor(1) as executor:
            backward = executor.submit(loss.backward)
            assert held.arrived.wait(BOUND_S)
            assert not backward.done()
            held.let_go()
            backward.result(timeout=BOUND_S)
