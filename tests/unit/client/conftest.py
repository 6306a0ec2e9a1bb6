"""Runs coroutines of the client on a loop of the test's own, with a bound; and opens pools in memory."""

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

import pytest
import torch

from mempool.client import Pool
from tests.support.faulty import FaultyPool

T = TypeVar("T")

_BOUND_S = 30.0


@pytest.fixture
def wait() -> Callable[[Coroutine[Any, Any, T]], T]:
    """Runs a coroutine to its end, for at most half a minute."""

    async def bounded(coroutine: Coroutine[Any, Any, T]) -> T:
        async with asyncio.timeout(_BOUND_S):
            return await coroutine

    return lambda coroutine: asyncio.run(bounded(coroutine))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors here are tiny: torch's threads would only wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def open_pool() -> Iterator[Callable[..., Pool]]:
    """Makes clients of pools in memory, and closes them."""
    opened: list[Pool] = []

    def make(fake: FaultyPool, *, timeout_s: float = 10.0) -> Pool:
        opened.append(Pool(fake, fake.dial, name="run-7", timeout_s=timeout_s))
        return opened[-1]

    yield make
    for pool in opened:
        pool.close()
