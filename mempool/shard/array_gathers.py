"""Gathers that are asked for, and answered, as arrays: the usual ones on the CPU, in a few steps and without tensors.

What is not so plain (rows in several places, steps in doubt, pieces, anything that is wrong) is left to ``Answers``,
which does the same and knows what to say.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mempool import kernels
from mempool.observe import Stages
from mempool.shard.bounds import MAX_LOOKUP_ID, MAX_RELEASED, fits_reply
from mempool.shard.hosted import HostedTable
from mempool.shard.reading.arrays import rows_then
from mempool.shard.steps.contexts import Contexts
from mempool.shard.tenancy import Tenancy
from mempool.shard.work.pace import BAG_ROWS, Pace
from mempool.types.bags import Bags
from mempool.types.messages import ArrayGather, ArrayGathered

_Array = npt.NDArray[Any]
ArraySpace = Callable[[int, int], Any]
"""Gives the memory of an answer [B, W] float32, contiguous; None: ``Answers`` is to be asked."""


class ArrayGathers:
    """See the module; on the engine's thread, or whoever has it stand still, or reads beside it.

    Args:
        tenancy: The tables.
        contexts: Lookups remembered.
        stages: Where time is counted.
        reply_bytes: What values may have; None: as much as there is.
        pace: Says how much is read before others have their turn.
    """

    def __init__(
        self, tenancy: Tenancy, *, contexts: Contexts, stages: Stages, reply_bytes: int | None, pace: Pace
    ) -> None:
        self._tenancy = tenancy
        self._contexts = contexts
        self._stages = stages
        self._reply_bytes = reply_bytes
        self._pace = pace
        self._sums = kernels.array_sums()

    def gather(self, asked: ArrayGather, *, space: ArraySpace) -> ArrayGathered | None:
        """The sums of bags; None where ``Answers`` is to be asked, and then nothing has changed.

        Raises:
            As ``Tenancy.fenced``; VersionGone.
        """
        if self._sums is None:
            return None
        table = self._tenancy.fenced(asked.envelope)
        storage = table.storage
        rows = storage.array_rows
        if rows is None or (asked.pin and asked.remember):
            return None
        if not asked.pin and (asked.envelope.table_version > table.order.applied or not table.is_settled):
            return None
        width, num_pairs, num_bags = storage.width, asked.ids.shape[0], asked.offsets.shape[0] - 1
        row_bytes = 4 * width
        if (
            num_bags < 1
            or not fits_reply(row_bytes * num_bags, self._reply_bytes)
            or not 0 <= asked.lookup_id <= MAX_LOOKUP_ID
            or len(asked.release) > MAX_RELEASED
            or self._pace.is_long(row_bytes * (num_pairs + BAG_ROWS * num_bags))
        ):
            return None
        began_s, stamp, num_slots = self._pace.clock(), table.stamp, storage.schema.num_slots
        ids, offsets = asked.ids, asked.offsets
        if asked.pin:
            ids, offsets = (ids, offsets) if asked.private else (ids.copy(), offsets.copy())
            named = ids
            moment = storage.moments.pins.moment(asked.pin)
            then = rows_then(storage, moment, ids) if num_pairs else None
            if then is None:
                return None
            rows, ids = then
            num_slots = max(num_slots, num_pairs)
            stamp = replace(stamp, table_version=moment.version)
        values = space(num_bags, width)
        if values is None:
            return None
        read = self._sums(
            rows, ids, asked.weights, offsets, num_slots=num_slots, private=asked.private or bool(asked.pin), out=values
        )
        if read is None:
            return None
        took_s = self._pace.clock() - began_s
        self._stages.note(("kernel", took_s))
        self._pace.took(row_bytes * num_pairs, took_s)
        if asked.release:
            self._contexts.release(asked.release)
        if asked.remember:
            self._remember(table, asked, *read)
        table.lookups += 1
        heat = storage.heat
        heat.calls += 1
        if heat.calls >= heat.due:
            heat.sample(named if asked.pin else read[0])
        return ArrayGathered(stamp, storage.blocks, values)

    def reading(self, asked: ArrayGather) -> ArrayGathered | None:
        """As ``gather``, to memory of its own; it may be cut off anywhere."""
        try:
            return self.gather(asked, space=_new_values)
        except BaseException:
            self._contexts.recount()
            raise

    def _remember(
        self, table: HostedTable, asked: ArrayGather, ids: npt.NDArray[Any], offsets: npt.NDArray[Any]
    ) -> None:
        weights = asked.weights
        if weights is not None and not asked.private:
            weights = weights.copy()
        bags = Bags(
            ids=torch.from_numpy(ids),
            weights=None if weights is None else torch.from_numpy(weights),
            offsets=torch.from_numpy(offsets),
        )
        self._contexts.remember(asked.lookup_id, table_id=table.table_id, epoch=table.epoch, bags=bags)


def _new_values(num_bags: int, width: int) -> Any:
    return np.empty((num_bags, width), np.float32)
