"""Rows that were written outside of steps: by whom, when, and what a slot may have of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mempool.types import TableSchema


@dataclass(slots=True)
class Write:
    """A row that was, or may have been, written: by which client, when that began, and when it was known to be done, or
    was given up."""

    row: Tensor
    client: str
    began_s: float
    done_s: float | None = None
    given_up_s: float | None = None

    def is_over_for(self, later: "Write") -> bool:
        """Whether that one began when this one was over: done, or given up by the same client."""
        over_s = self.done_s
        if over_s is None and later.client == self.client:
            over_s = self.given_up_s
        return over_s is not None and over_s < later.began_s

    def taken_along(self, began_s: float, ended_s: float) -> "Write | None":
        """What a checkpoint that was taken meanwhile may have of it: it, or perhaps it, or None: it came later."""
        if self.began_s > ended_s:
            return None
        if self.done_s is not None and self.done_s < began_s:
            return self
        return replace(self, done_s=None, given_up_s=None)


def check_written(
    schema: TableSchema,
    ids: Tensor,
    rows: Tensor,
    *,
    writes_of: Callable[[int], Sequence[Write]],
    asked_s: float,
    say: Callable[[str], None],
) -> None:
    """What a row that was written has in each block is of one write, and of none that was over before one began that
    was done before the reading. Blocks may lie on several shards, which writes that overlap reach in any order.

    Args:
        ids, rows: [N] slots and [N, V] what they have.
        writes_of: Of a slot.
        asked_s: When they were asked for.
        say: Told what may not be.
    """
    for slot, row in zip(ids.tolist(), rows, strict=True):
        writes = writes_of(slot)
        done = [write for write in writes if write.done_s is not None and write.done_s < asked_s]
        if not done:
            continue
        for block in range(schema.num_blocks):
            columns = slice(*schema.block_columns(block))
            found = [write for write in writes if torch.equal(write.row[columns], row[columns])]
            if not found:
                say(f"slot {slot} of table {schema.name!r} is what nobody wrote: {row.tolist()}")
            elif all(any(write.is_over_for(later) for later in done) for write in found):
                say(
                    f"slot {slot} of table {schema.name!r} is of a write that was over at "
                    f"{found[-1].done_s or found[-1].given_up_s:.3f} s, and a later one was done: {row.tolist()}"
                )
