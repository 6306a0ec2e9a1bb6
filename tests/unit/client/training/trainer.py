"""A session and, beside it, the same training on one tensor in float64."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mempool.client.routing.retry import Backoff
from mempool.client.routing.router import Router
from mempool.client.training.session import Session
from mempool.types.bags import Bags
from tests.support.faulty import FaultyPool

LR = 0.25


@dataclass
class Trainer:
    """A session and, beside it, the same training on one tensor in float64."""

    pool: FaultyPool
    session: Session
    router: Router
    expected: Tensor
    gradient: Tensor
    count: int = 0

    @classmethod
    def of(cls, pool: FaultyPool, *, timeout_s: float = 20.0) -> "Trainer":
        router = Router(
            pool, dial=pool.dial, pool="run-7", timeout_s=timeout_s, backoff=Backoff(first_s=0.001, longest_s=0.002)
        )
        session = Session(router, table_id=1, group="g")
        return cls(pool, session, router, pool.values.clone(), torch.zeros_like(pool.values))

    async def push(self, *, scale: float = 1.0) -> None:
        """One lookup and its update, other ids, weights and gradients each time."""
        self.count += 1
        generator = torch.Generator().manual_seed(self.count)
        bags = Bags(
            ids=torch.randint(0, 64, (6,), generator=generator),
            weights=torch.randn(6, generator=generator),
            offsets=torch.tensor([0, 2, 6]),
        )
        grads = scale * torch.randn(2, 12, generator=generator)
        _, record = await self.session.gather(bags, remember=True)
        assert await self.session.update(record, grads, hold=True, want_weight_grad=False) is None
        assert bags.weights is not None
        bag = torch.repeat_interleave(bags.offsets.diff())
        self.gradient.index_add_(0, bags.ids, bags.weights.double()[:, None] * grads.double()[bag])

    def apply(self, *, grad_scale: float = 1.0, lr: float = LR) -> None:
        self.expected = self.expected - lr * grad_scale * self.gradient
        self.forget()

    def forget(self) -> None:
        self.gradient = torch.zeros_like(self.gradient)

    async def assert_applied(self) -> None:
        """Once every owner has applied what was acknowledged."""
        await self.session.coordinator.applied([self.session])
        self.assert_equal()

    def assert_equal(self) -> None:
        torch.testing.assert_close(self.pool.values, self.expected, rtol=1e-5, atol=2e-5)

    def sent(self) -> list[str]:
        return [name for shard in self.pool.shards for name in shard.names()]
