"""Rows of a table's named arrays, read and written as they are, and what is told of them all: a part of ``Answers``."""

from collections.abc import Callable

import torch
from torch import Tensor

from mempool.shard import bounds, validate
from mempool.shard.durable.records import Counted, Written
from mempool.shard.hosted import HostedTable
from mempool.shard.parking import Parked
from mempool.shard.reading.begun import Pieces, Read
from mempool.shard.tenancy import Tenancy
from mempool.shard.usage.renewal import check_fresh, written
from mempool.shard.usage.telling import count_pieces, tallied
from mempool.types import (
    Envelope,
    ReadRowsReply,
    ReadRowsRequest,
    StepCountReply,
    StepCountRequest,
    WriteRowsReply,
    WriteRowsRequest,
)
from mempool.types.usage import Tally, UsageReply, UsageRequest

COPY_PIECE_BYTES = 64 * 2**20
"""Bytes of rows that are read as they are at once."""


class RowAnswers:
    """A part of ``Answers``."""

    _tenancy: Tenancy
    _reply_bytes: int | None
    _reserve: Callable[[int], None]
    _asked_s: Callable[[], float]
    _of: Callable[[ReadRowsRequest], Read]
    _waits: Callable[[Read, Envelope], Parked | None]
    _copy_out: Callable[[Tensor], Tensor]

    def read_rows(self, request: ReadRowsRequest) -> ReadRowsReply | Parked | Pieces[ReadRowsReply]:
        table = self._of(request)
        if (waits := self._waits(table, request.envelope)) is not None:
            return waits
        ids = validate.check_read(table.storage, request, reply_bytes=self._reply_bytes)
        blocks = table.storage.row_blocks(request.array)
        self._reserve(validate.row_bytes(table.storage, request.array) * ids.shape[0])
        num_rows = max(1, COPY_PIECE_BYTES // max(1, validate.row_bytes(table.storage, request.array)))
        if ids.shape[0] > num_rows:
            return self._read_in_pieces(request, table, ids, num_rows)
        rows = self._copy_out(table.storage.read(request.array, ids))
        return ReadRowsReply(stamp=table.stamp, blocks=blocks, rows=rows)

    def _read_in_pieces(
        self, request: ReadRowsRequest, table: Read, ids: Tensor, num_rows: int
    ) -> Pieces[ReadRowsReply]:
        stamp, blocks = table.stamp, table.storage.row_blocks(request.array)
        rows: Tensor | None = None
        for first in range(0, ids.shape[0], num_rows):
            table = self._of(request)
            part = self._copy_out(table.storage.read(request.array, ids[first : first + num_rows]))
            if rows is None:
                rows = torch.empty((ids.shape[0], part.shape[1]), dtype=part.dtype)
            rows[first : first + num_rows] = part
            yield
        assert rows is not None, "there are more rows than a piece has"
        return ReadRowsReply(stamp=stamp, blocks=blocks, rows=rows)

    def write_rows(self, request: WriteRowsRequest) -> WriteRowsReply | Parked:
        table = self._tenancy.fenced(request.envelope)
        if (waits := self._waits(table, request.envelope)) is not None:  # what the client committed comes before it
            return waits
        if table.frozen or table.storage.crowded():
            return table.park_until_thaw(self._asked_s())
        ids = validate.check_array(table.storage, request.array, request.ids)
        rows = validate.check_rows(table.storage, request.array, ids, request.blocks, request.rows)
        bounds.check_write(request.write_id)
        if table.writes.is_due(request.write_id):
            if request.fresh:
                check_fresh(table, request.array)
            self._tenancy.log.require(rows.nbytes + ids.nbytes)
            table.num_writes += 1
            written(table.storage, request, ids, rows)
            self._tenancy.log.add(Written(request))
        table.writes.did(request.write_id)
        return WriteRowsReply(stamp=table.stamp)

    def step_count(self, request: StepCountRequest) -> StepCountReply | Parked:
        table = self._tenancy.fenced(request.envelope)
        if (waits := self._waits(table, request.envelope)) is not None:
            return waits
        if request.set is not None:
            if table.frozen:  # the ledger is on its way to other shards
                return table.park_until_thaw(self._asked_s())
            bounds.check_number("set", request.set)
            bounds.check_write(request.write_id)
            if table.writes.is_due(request.write_id):
                self._tenancy.log.require()
                table.ledger.count_steps(request.set, at_version=request.at_version)
                self._tenancy.log.add(Counted(request))
            table.writes.did(request.write_id)
        return StepCountReply(stamp=table.stamp, count=table.ledger.step)

    def usage(self, request: UsageRequest) -> Parked | Pieces[UsageReply]:
        """Counted anew from the first slot on where pages move meanwhile: its caller is told to plan anew."""
        table = self._tenancy.fenced(request.envelope)
        if (waits := self._waits(table, request.envelope)) is not None:
            return waits
        bounds.check_number("older_than", request.older_than)
        return self._usage_in_pieces(request, table, count_pieces(table.storage))

    def _usage_in_pieces(self, request: UsageRequest, table: HostedTable, pieces: list[range]) -> Pieces[UsageReply]:
        stamp, tally = table.stamp, Tally.none()
        for piece in pieces:
            table = self._tenancy.fenced(request.envelope)
            tally += tallied(table.storage, piece, version=stamp.table_version, older_than=request.older_than)
            yield
        return UsageReply(
            stamp=stamp,
            outdated=tally.outdated,
            most=tally.most,
            log_sum=tally.log_sum,
            histogram=tally.histogram,
        )
