"""Pools to agree with: every test that asks for ``pools`` runs on each kind of pool in KINDS, all cases on the first.

To add a kind: a context manager ``kind(shards)`` that yields a ``mempool.Pool`` of that many shards.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, AsyncExitStack, ExitStack, contextmanager
from typing import Any

import pytest

import mempool
from mempool.client import Pool, Table
from mempool.wire.channels import loop
from tests.support.kinds import leave_out_repeats, parameter
from tests.support.serving import served_pool

_START_S = 60.0
_names = itertools.count(1)


@contextmanager
def _grpc(shards: int) -> Iterator[Pool]:
    stack = AsyncExitStack()
    served = loop.run(stack.enter_async_context(served_pool(shards)), timeout_s=_START_S)
    try:
        with mempool.connect(served.address) as pool:
            yield pool
    finally:
        loop.run(stack.aclose(), timeout_s=_START_S)


KINDS: dict[str, Callable[[int], AbstractContextManager[Pool]]] = {
    "local": lambda shards: mempool.local(shards=shards, device="cpu"),
    "grpc": _grpc,
}


# What is computed is the same; messages of all dtypes and layouts are the contract's (tests/contract).
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    leave_out_repeats(config, items, lambda item: "grpc" if _is_repeated(item) else "")


def _is_repeated(item: pytest.Item) -> bool:
    return parameter(item, "_pools") == "grpc" and item.path.stem != "test_wire_dtypes"


class Pools:
    """Pools of one kind, by number of shards, opened once and shared; and tables of a test's own in them."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.stack = ExitStack()
        self.tables: list[tuple[Pool, Table]] = []
        self._open = KINDS[kind]
        self._shared: dict[int, Pool] = {}

    def pool(self, shards: int) -> Pool:
        """The shared pool of that many shards. Not to be rescaled."""
        if shards not in self._shared:
            self._shared[shards] = self.stack.enter_context(self._open(shards))
        return self._shared[shards]

    def fresh(self, shards: int) -> AbstractContextManager[Pool]:
        """A pool of the test's own."""
        return self._open(shards)

    def table(self, *, shards: int = 2, pool: Pool | None = None, **config: Any) -> Table:
        """A new table, dropped when the test ends if its pool is a shared one."""
        home = self.pool(shards) if pool is None else pool
        table = home.create_table(mempool.TableConfig(**{"name": f"table-{next(_names)}"} | config))
        if pool is None:
            self.tables.append((home, table))
        return table

    def drop_tables(self) -> None:
        while self.tables:
            pool, table = self.tables.pop()
            pool.drop_table(table.name)


@pytest.fixture(scope="session", params=list(KINDS))
def _pools(request: pytest.FixtureRequest) -> Iterator[Pools]:
    pools = Pools(request.param)
    with pools.stack:
        yield pools


@pytest.fixture
def pools(_pools: Pools) -> Iterator[Pools]:
    yield _pools
    _pools.drop_tables()
