"""What a trainer is told once about a table, because a loop that forgets it goes wrong without an error."""

import warnings

import torch.distributed

from mempool.client.routing.attempt import Seen

# Far above what gradient accumulation needs, far below what a shard or a trainer bears.
_MAX_UPDATES = 1_000
_MAX_BYTES = 1024**3


class Cautions:
    """One table's warnings, each given once.

    Args:
        table: Its name.
    """

    def __init__(self, table: str) -> None:
        self._table = table
        self._ranks_told = False
        self._uncommitted_told = False
        self._expected: dict[str, int] = {}

    def before_update(self, *, grouped: bool) -> None:
        """Several ranks that train one table by themselves are several optimizer steps a step. grouped: They are of a
        group, or are to be by themselves."""
        if grouped or self._ranks_told or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        world_size = torch.distributed.get_world_size()
        if world_size > 1:
            self._ranks_told = True
            warnings.warn(
                f"table {self._table!r} is trained by a process group of {world_size} ranks, and each rank commits its"
                f" own gradient: that is {world_size} optimizer steps a step, not one of the mean. Call"
                " pool.join(group, rank, world_size) before the first backward pass, with one group name for all ranks"
                " of this job (torchrun's jobs join by themselves, by RANK and WORLD_SIZE), on a pool that"
                " all of them reach; MEMPOOL_JOIN=0, or pool.join(..., world_size=1), says that it is meant",
                stacklevel=2,
            )

    def expect(self, version: int | None, *, known: int | None, whose: str) -> None:
        """State was loaded that was saved beside this version of the table (None: beside none that is known).

        Said at the next look into the table, where that meets another version: the table may be restored after what
        goes with it was loaded. Nothing more is looked for where the table is known to be at that version now.

        Args:
            known: The newest version that is known, without asking anybody.
            whose: What the state is of, for the message.
        """
        self._expected.pop(whose, None)
        if version is not None and version != known:
            self._expected[whose] = version

    def after_gather(self, seen: Seen) -> None:
        """The table has answered."""
        if not self._expected:
            return
        expected, self._expected = self._expected, {}
        for whose, version in expected.items():
            if not seen.oldest_version <= version <= seen.newest_version:
                warnings.warn(
                    f"table {self._table!r} is at version {seen.newest_version}, and the state of {whose} that was "
                    f"loaded was saved beside version {version}: they are not of one step. Restore the table as it was "
                    "then: pool.restore(place, checkpoint=NAME, replace=True), where `mempool checkpoints PLACE` lists "
                    "names and versions. mempool.nn.PoolState saves and loads both together",
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
