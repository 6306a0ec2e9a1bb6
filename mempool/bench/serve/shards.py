"""The same look-up in pools of more and more shards: what a further one costs the client, embedded and in processes."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from mempool.bench.serve import lookups
from mempool.bench.serve.callers import Within
from mempool.bench.serve.contenders import Contender, here, pools
from mempool.bench.serve.contenders.pools import Layout
from mempool.bench.serve.lookups import LookUps
from mempool.bench.serve.shapes import Shape, TableSize

LAYOUTS: tuple[Layout, ...] = ("columns", "rows")
#: Pools of which there are several sizes.
KINDS = (pools.EMBEDDED, *pools.REMOTE)


@dataclass(frozen=True)
class Scaling:
    """One shape in pools of several sizes, in the same rounds.

    Attributes:
        layout: How the table lies on the shards.
        shards: Of each contender that is a pool.
        measured: Its figures; torch's embedding_bag beside them, in the same process.
    """

    layout: Layout
    shards: dict[str, int]
    measured: LookUps

    def pools_of(self, kind: str) -> dict[int, str]:
        """Contenders of a kind ("mempool embedded"), by their shards, ascending."""
        found = {shards: name for name, shards in self.shards.items() if name.startswith(kind)}
        return dict(sorted(found.items()))

    def further_ms(self, kind: str) -> float | None:
        """CPU of this process that a look-up takes for each shard beyond the first; None with a single size."""
        contenders = self.pools_of(kind)
        few, many = min(contenders, default=0), max(contenders, default=0)
        if few == many:
            return None
        low, high = (self.measured.cpu[contenders[size]].client_ms for size in (few, many))
        return None if low is None or high is None else (high - low) / (many - few)

    def wall_ratio(self, kind: str, shards: int) -> float | None:
        """How many times longer a look-up takes of so many shards than of one; None without both."""
        contenders = self.pools_of(kind)
        if not {1, shards} <= contenders.keys():
            return None
        return self.measured.times[contenders[shards]].over(self.measured.times[contenders[1]])

    def document(self) -> dict[str, Any]:
        """As it stands in the result file."""
        return {
            "layout": self.layout,
            **self.measured.document(),
            "shards": self.shards,
            "further_shard_cpu_ms": {kind: self.further_ms(kind) for kind in KINDS},
        }


def start(
    stack: ExitStack, table: TableSize, layout: Layout, *, embedded: tuple[int, ...], served: tuple[int, ...]
) -> tuple[Within, dict[str, int]]:
    """Pools with the table, all asked by this process, until the stack ends; and the shards of each."""
    found: list[Contender] = [here.here(table)[0]]
    shards: dict[str, int] = {}
    made = [(count, stack.enter_context(pools.embedded(table, shards=count, layout=layout))) for count in embedded]
    for count in served:
        made += [(count, one) for one in stack.enter_context(pools.served(table, shards=count, layout=layout))]
    for count, pool in made:
        name = f"{pool.name}, {count} shard{'s' if count > 1 else ''}"
        found.append(pool.named(name))
        shards[name] = count
    return Within(table, found), shards


def measure(
    layout: Layout,
    shards: dict[str, int],
    shape: Shape,
    table: TableSize,
    caller: Within,
    *,
    rounds: int,
    budget_s: float,
    batch_s: float,
    seed: int,
) -> Scaling:
    """As ``lookups.measure``. Raises GateError."""
    measured = lookups.measure(
        shape, table, [caller], rounds=rounds, budget_s=budget_s, batch_s=batch_s, seed=seed, case=f"{layout} "
    )
    return Scaling(layout, shards, measured)
