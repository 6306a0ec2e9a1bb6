"""What the planner gives each shard of a table: which part of rows and columns, in how many bytes.

Legend: S shards, P row pages, C column blocks.
"""

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from mempool.placement import LayoutKind, layout_kind, plan_table
from mempool.placement.runs import compress
from mempool.types import OwnKeySpec, TableSchema, TrainedKeySpec
from mempool.types.keys import key_table
from mempool.types.sizes import bytes_by_owner, num_pages, owned_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """What some shards own, each as much.

    Attributes:
        shards: How many.
        share: Of the table's row pages, those of which a shard owns anything: so great a part of all pairs it is sent.
        width: Columns of all blocks that it owns anything of: so wide are its answers.
        area: Of the table's values, its part.
        row_bytes: Of one slot there, values and optimizer state.
        num_bytes: Of all its pages, as `mempool status` tells.
    """

    shards: int
    share: float
    width: int
    area: float
    row_bytes: int
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """A table on S shards.

    Attributes:
        schema: The table.
        shards: S.
        kind: What the layout turned out as.
        holdings: Of the shards that own row pages; what most of them have first.
        bytes_of: By shard, of this table alone, page tables and all.
        keys: The table of the keys that it trains in the pool; None: it trains none.
    """

    schema: TableSchema
    shards: int
    kind: LayoutKind
    holdings: tuple[Holding, ...]
    bytes_of: tuple[int, ...]
    keys: "Split | None" = None

    @property
    def owners(self) -> int:
        """Shards that own anything of it, or of its keys: steps are agreed on with all of them."""
        return sum(num_bytes > 0 for num_bytes in self._bytes_of_all)

    @property
    def total_bytes(self) -> int:
        """Of all shards, with its keys."""
        return sum(self._bytes_of_all)

    @property
    def largest_bytes(self) -> int:
        """Of the shard with most."""
        return max(self._bytes_of_all)

    @property
    def num_keys(self) -> int:
        """Of a table of keys: how many it has; other slots fill its sections up. 0: it is none."""
        keys = self.schema.keys
        return keys.sections * keys.rows if isinstance(keys, OwnKeySpec) else 0

    @property
    def probes(self) -> int:
        """Groups that a query looks into, of hierarchical keys that it trains; 0: it has others."""
        keys = self.schema.keys
        return keys.probes if isinstance(keys, TrainedKeySpec) else 0

    @property
    def num_pages(self) -> int:
        """That a view of it, and one of its keys, say the owners of."""
        return num_pages(self.schema) + (0 if self.keys is None else self.keys.num_pages)

    @property
    def _bytes_of_all(self) -> tuple[int, ...]:
        keys = (0,) * self.shards if self.keys is None else self.keys.bytes_of
        return tuple(map(sum, zip(self.bytes_of, keys, strict=True)))

    @property
    def asked(self) -> int:
        """Shards that a look-up asks."""
        return sum(held.shards for held in self.holdings)

    @property
    def filtered(self) -> int:
        """Those of them that are sent a part of the pairs."""
        return sum(held.shards for held in self.holdings if held.share < 1.0)

    @property
    def times_sent(self) -> float:
        """How often a pair is sent, in all."""
        return sum(held.shards * held.share for held in self.holdings)

    @property
    def busiest(self) -> Holding:
        """What the shard with the most values has."""
        return max(self.holdings, key=lambda held: (held.area, held.width, held.share))


def split(schema: TableSchema, shards: int) -> Split:
    """A new table on so many shards, and the table of the keys that it trains, as the planner lays them.

    Args:
        schema: Of the table, whose layout is asked for.
        shards: At least 1.
    """
    keys = key_table(schema)
    found = _split(schema, shards)
    return found if keys is None else replace(found, keys=_split(keys, shards))


def _split(schema: TableSchema, shards: int) -> Split:
    assignment = plan_table(schema, None, range(shards))
    runs = compress(assignment.owners)
    patterns: dict[int, Counter[tuple[int, ...]]] = {}
    for owners, length in zip(runs.owners_RC, runs.lengths.tolist(), strict=True):
        order = np.argsort(owners, kind="stable")
        distinct, starts = np.unique(owners[order], return_index=True)
        for shard, blocks in zip(distinct.tolist(), np.split(order, starts[1:]), strict=True):
            patterns.setdefault(shard, Counter())[tuple(blocks.tolist())] += length
    heads = Counter(assignment.key_owners.tolist())
    holdings = {shard: _holding(schema, pages, heads=heads[shard]) for shard, pages in patterns.items()}
    held = Counter(holdings.values())
    alone = {shard: owned_bytes(schema, {}, heads=count) for shard, count in heads.items() if shard not in patterns}
    return Split(
        schema=schema,
        shards=shards,
        kind=layout_kind(assignment),
        holdings=tuple(
            Holding(shards=count, share=share, width=width, area=area, row_bytes=row_bytes, num_bytes=num_bytes)
            for (share, width, area, row_bytes, num_bytes), count in held.most_common()
        ),
        bytes_of=tuple(holdings[shard][-1] if shard in holdings else alone.get(shard, 0) for shard in range(shards)),
    )


def values_bytes(schema: TableSchema) -> int:
    """Of all pages wherever they are, without what shards add: at least so much a table and its keys take."""
    owners = np.zeros((1, schema.num_blocks), dtype=np.int32)
    one = bytes_by_owner(schema, owners, np.zeros(0, dtype=np.int32))[0]
    keys = key_table(schema)
    return one * schema.num_row_pages + (0 if keys is None else values_bytes(keys))


def _holding(schema: TableSchema, pages: Counter[tuple[int, ...]], *, heads: int) -> tuple[float, int, float, int, int]:
    every = tuple(sorted({block for blocks in pages for block in blocks}))
    rows = sum(pages.values())
    area = sum(schema.width(blocks) * count for blocks, count in pages.items())
    num_bytes = owned_bytes(schema, pages, heads=heads)
    return (
        rows / schema.num_row_pages,
        schema.width(every),
        area / (schema.value_dim * schema.num_row_pages),
        round(num_bytes / (rows * schema.page_slots)),
        num_bytes,
    )
