"""What a trainer is told once about a table, because a loop that forgets it goes wrong without an error."""

import warnings

import torch.distributed

# Far above what gradient accumulation needs, far below what a shard or a trainer bears.
_MAX_UPDATES = 1_000
_MAX_BYTES = 1024**3


class Cautions:
    """One table's warnings, each given once.

    Args:
        table: Its name.
        grouped: Its updates are committed by a group of trainers together.
    """

    def __init__(self, table: str, *, grouped: bool) -> None:
        self._table = table
        self._ranks_told = grouped
        self._uncommitted_told = False

    def before_update(self) -> None:
        """Several ranks that train one table by themselves are several optimizer steps a step."""
        if self._ranks_told or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        world_size = torch.distributed.get_world_size()
        if world_size > 1:
            self._ranks_told = True
            warnings.warn(
                f"table {self._table!r} is trained by a process group of {world_size} ranks, and each rank commits its"
                f" own gradient: that is {world_size} optimizer steps a step, not one of the mean. Until this client"
                " joins groups, let one rank train the table (table.requires_grad_(rank == 0)), or divide its lr by"
                f" {world_size} where the optimizer is SGD",
                stacklevel=2,
            )

    def after_update(self, *, pending: int, pending_bytes: int) -> None:
        """Updates that nobody commits are kept, here and on the shards."""
        if not self._uncommitted_told and (pending >= _MAX_UPDATES or pending_bytes >= _MAX_BYTES):
            self._uncommitted_told = True
            warnings.warn(
                f"{pending:,} updates of table {self._table!r} ({pending_bytes / 2**20:.0f} MiB) wait for a commit, and"
                " more come: backward() only pushes them. Call step() of a mempool.optim.PoolOptimizer for this table"
                " after each backward pass (or table.commit()), zero_grad() to drop them, or freeze the table with"
                " table.requires_grad_(False)",
                stacklevel=2,
            )
