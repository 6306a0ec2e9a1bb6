"""A table on one shard that can be given any pages, and a library that has all of them: for tests without an engine."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mempool.shard.pages.masks import by_blocks
from mempool.shard.pages.staging import Staging
from mempool.shard.pages.storage import Storage
from mempool.shard.pages.transfer import export
from mempool.types import ExportPages, Ledger, LedgerEntry, Placement, TableSchema
from tests.contract.layouts import LAYOUTS

CPU = torch.device("cpu")
NOBODY = 9


def placement_of(owners: Any, *, epoch: int = 1, key_owners: Any = ()) -> Placement:
    """owners: one of LAYOUTS, or shard by row page and block."""
    owners = LAYOUTS[owners] if isinstance(owners, str) else owners
    return Placement(
        table_id=1,
        epoch=epoch,
        owners=np.array(owners, dtype=np.int32),
        key_owners=np.array(key_owners, dtype=np.int32),
    )


def make_table(schema: TableSchema, owners: Any = "one", *, shard: int = 0, key_owners: Any = ()) -> Storage:
    """A filled table."""
    table = Storage(schema, shard=shard, device=CPU)
    for _ in table.initialise(placement_of(owners, key_owners=key_owners)):
        pass
    return table


class MovingTable:
    """Shard 0's pages of a table, which come from a library that never changes."""

    def __init__(self, schema: TableSchema, owners: Any = "one", *, key_owners: Any = ()) -> None:
        self.schema = schema
        self.placement = placement_of(owners, key_owners=key_owners)
        self.table = make_table(schema, owners, key_owners=key_owners)
        self.staging = Staging(self.table)
        self.library = make_table(
            schema, [[0] * schema.num_blocks] * schema.num_row_pages, key_owners=[0] * len(key_owners)
        )

    def stage(self, target: Placement) -> None:
        """Bring here what the target gives shard 0 and it has not."""
        lacking = (target.owners == 0) & ~self.table.owned
        for blocks, row_pages in by_blocks(lacking).items():
            if blocks:
                request = ExportPages(table_id=1, row_pages=row_pages, blocks=blocks)
                self.staging.put(export(self.library, request, version=0))
        heads = tuple(np.flatnonzero((target.key_owners == 0) & ~self.table.key_owned).tolist())
        if heads:
            none = np.empty(0, dtype=np.int64)
            request = ExportPages(table_id=1, row_pages=none, blocks=(), key_pages=heads)
            self.staging.put(export(self.library, request, version=0))
        if self.staging.lacks_ledger(0):
            self.staging.put_ledger(Ledger())

    def move(self, owners: Any, *, key_owners: Any = None) -> None:
        target = placement_of(
            owners,
            epoch=self.placement.epoch + 1,
            key_owners=self.placement.key_owners if key_owners is None else key_owners,
        )
        self.stage(target)
        self.staging.adopt(target, version=0)
        self.table.shrink_arenas()
        self.placement = target


def contents(table: Storage) -> dict[str, Tensor]:
    """Every array's rows of all slots, as they are read."""
    ids = torch.arange(table.schema.num_slots)
    found = {name: table.read(name, ids) for name in table.arrays if table.row_width(name)}
    return found | {"heads": torch.tensor(table.heads), "head_keys": table.head_keys.clone()}


def same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Equal to the bit, NaN and -0.0 included."""
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype
        and left[name].shape == right[name].shape
        and left[name].contiguous().view(torch.uint8).equal(right[name].contiguous().view(torch.uint8))
        for name in left
    )


def a_ledger(num_entries: int, name_bytes: int) -> Ledger:
    """As many groups, each with a name of so many bytes."""
    entries = {
        (f"{number:0{name_bytes}d}", 0): LedgerEntry(step=number + 1, version=7) for number in range(num_entries)
    }
    return Ledger(version=7, updates_applied=11, entries=entries, step_offset=-3)
