"""Runs coroutines of the client on a loop of the test's own, with a bound."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import pytest

T = TypeVar("T")

_BOUND_S = 30.0


@pytest.fixture
def wait() -> Callable[[Coroutine[Any, Any, T]], T]:
    """Runs a coroutine to its end, for at most half a minute."""

    async def bounded(coroutine: Coroutine[Any, Any, T]) -> T:
        async with asyncio.timeout(_BOUND_S):
            return await coroutine

    return lambda coroutine: asyncio.run(bounded(coroutine))
