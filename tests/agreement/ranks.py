"""Ranks as threads of this process, each with a client of its own, on a pool on loopback."""

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch

import mempool
from mempool.client import Pool, Table
from mempool.client.groups.group import Group
from mempool.wire.channels.loop import run
from tests.unit.client.grpc_pool import GrpcPoolHere

BOUND_S = 60.0


def together(work: Sequence[Callable[[], Any]]) -> list[Any]:
    """What these answer, each on a thread; the first error of any, with all others ended."""
    answers: list[Any] = [None] * len(work)
    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            answers[number] = work[number]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(BOUND_S)
        assert not thread.is_alive(), "a rank hangs"
    if errors:
        raise errors[0]
    return answers


class Ranks:
    """Clients of one pool that have joined one group.

    Args:
        config: Of the table that they train.
        how: As of ``Pool.join``.
    """

    def __init__(
        self, here: GrpcPoolHere, configs: Sequence[mempool.TableConfig], *, world_size: int, **how: Any
    ) -> None:
        self._stack = ExitStack()
        self._address = here.address
        self.names = [config.name for config in configs]
        with mempool.connect(here.address) as pool:
            for config in configs:
                pool.create_table(config, exist_ok=True)
        self.pools = [self._stack.enter_context(mempool.connect(here.address)) for _ in range(world_size)]
        self.group = how.pop("group", "job")
        self.groups = together(
            [
                lambda pool=pool, rank=rank: pool.join(self.group, rank, world_size, **how)
                for rank, pool in enumerate(self.pools)
            ]
        )

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def tables(self, rank: int) -> list[Table]:
        return [self.pools[rank].table(name) for name in self.names]

    def kill(self, rank: int) -> None:
        """Its process is gone: nothing is heard of it any more, and nobody is told."""
        coordinator = self.pools[rank].table(self.names[0]).link.session.coordinator
        member = coordinator.group.member

        async def die() -> None:
            for task in (member._beating, *member._saying, *coordinator._telling):
                task.cancel()
            await coordinator.heartbeats.close()

        run(die(), BOUND_S)
        coordinator.group = None  # so that its pool, when it is closed, says nothing either

    def come_back(self, rank: int, **how: Any) -> Group:
        """Another process as that rank. Blocks until it is let in."""
        self.pools[rank] = self._stack.enter_context(mempool.connect(self._address))
        return self.pools[rank].join(self.group, rank, len(self.pools), **how)

    def each(self, work: Callable[[int, Pool], Any]) -> list[Any]:
        """What each rank answers."""
        return together([lambda rank=rank, pool=pool: work(rank, pool) for rank, pool in enumerate(self.pools)])


def batch(step: int, *, slots: int, dim: int, bags: int = 12, pairs: int = 6) -> tuple[torch.Tensor, ...]:
    """Of a step: ids [bags, pairs], weights, and the gradient [bags, dim] of the sum over the whole batch."""
    generator = torch.Generator().manual_seed(1_000 + step)
    ids = torch.randint(slots, (bags, pairs), generator=generator)
    return ids, torch.rand(bags, pairs, generator=generator), torch.randn(bags, dim, generator=generator)


def push(table: Table, step: int, *, rank: int, world_size: int, scale: float = 1.0) -> None:
    """A rank's share of a batch: its mean loss, of which DDP makes the mean over ranks."""
    ids, weights, grads = (
        part.chunk(world_size)[rank] for part in batch(step, slots=table.num_slots, dim=table.value_dim)
    )
    (table.gather(ids, weights) * grads).sum().mul(scale).backward()
