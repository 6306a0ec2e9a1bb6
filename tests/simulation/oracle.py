"""What every answer is compared with: one shard that owns all of a table, in this process, fed with decided steps.

Same kernels, one owner, no network, no faults. A test compares it with torch's optimizers in float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mempool.shard import Engine
from mempool.types import (
    AttachTable,
    CommitPart,
    CommitRequest,
    Envelope,
    GatherRequest,
    Ledger,
    Placement,
    ReadRowsRequest,
    ShardInfo,
    StepId,
    TableSchema,
    TableSource,
    TableView,
    UpdateRequest,
)
from tests.simulation.loop import InlineRunner, Scheduler

ORACLE_TABLE = 1
"""Its table's id: no pool gives it."""


@dataclass(frozen=True, slots=True)
class Content:
    """One update: ids [L] int64, weights [L] or None, offsets [B + 1], grads [B, V]."""

    ids: Tensor
    weights: Tensor | None
    offsets: Tensor
    grads: Tensor


class Oracle:
    """One table, whole, at one version after the other.

    source, version: A checkpoint's table that it begins with; else with initial values.
    """

    def __init__(self, schema: TableSchema, *, source: TableSource | None = None, version: int = 0) -> None:
        self.schema = replace(schema, table_id=ORACLE_TABLE)
        self.version = version
        self._scheduler = Scheduler(0)
        loop = self._scheduler.world
        runner = InlineRunner(loop, self._scheduler.random("oracle"), longest_s=0.0)
        self._engine = Engine(ShardInfo(shard=0, address="", incarnation=1), clock=loop.time, runner=runner)
        shape = self.schema.num_row_pages, self.schema.num_blocks
        placement = Placement(
            table_id=ORACLE_TABLE,
            epoch=1,
            owners=np.zeros(shape, dtype=np.int32),
            key_owners=np.zeros(self.schema.num_key_pages, dtype=np.int32),
        )
        self._blocks = tuple(range(self.schema.num_blocks))
        view = TableView(schema=self.schema, placement=placement, shards=(self._engine.info,))
        request = AttachTable(view=view, mode="initialise")
        if source is not None:
            request = replace(request, mode="restore", ledger=Ledger(version=version), source=source)
        self._run(self._engine.attach_table(request))

    def becomes(self, schema: TableSchema) -> None:
        """Go on as a table that was restored from this one, of another name and layout."""
        self.schema = replace(schema, table_id=ORACLE_TABLE)
        self._engine._tenancy.table(ORACLE_TABLE).storage.schema = self.schema

    def step(self, contents: Sequence[Content], *, lr: float, grad_scale: float) -> None:
        """Apply one step; contents: its updates in their order."""
        step_id = StepId(group="oracle", rank=0, step=self.version + 1)
        sequences = tuple(range(1, len(contents) + 1))

        async def apply() -> None:
            for sequence, content in zip(sequences, contents, strict=True):
                await self._engine.update(
                    UpdateRequest(
                        envelope=self._envelope,
                        step_id=step_id,
                        sequence=sequence,
                        lookup_id=sequence,
                        blocks=self._blocks,
                        grads=content.grads,
                        hold=True,
                        want_weight_grad=False,
                        ids=content.ids,
                        weights=content.weights,
                        offsets=content.offsets,
                    )
                )
            part = CommitPart(
                envelope=self._envelope, step_id=step_id, lr=lr, grad_scale=grad_scale, sequences=sequences
            )
            reply = await self._engine.commit(CommitRequest(parts=(part,), one_phase=True))
            assert not reply.parts[0].missing, "the oracle was given all"
            assert reply.parts[0].version == self.version + 1, "the oracle counts steps"

        self._run(apply())
        self.version += 1

    def gather(self, ids: Tensor, weights: Tensor | None, offsets: Tensor, *, dtype: Any = "float32") -> Tensor:
        """[B, V]."""
        request = GatherRequest(
            envelope=self._envelope,
            lookup_id=1,
            ids=ids,
            weights=weights,
            offsets=offsets,
            remember=False,
            reply_dtype=dtype,
        )
        return self._run(self._engine.gather(request)).values

    def gather_all(self, bags: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Sequence[Tensor]:
        """[B, V] of each (ids, weights, offsets): what they would be one by one."""
        if not bags:
            return ()
        ids, weights = (torch.cat([each[number] for each in bags]) for number in (0, 1))
        offsets, pairs = [torch.zeros(1, dtype=torch.int64)], 0
        for each in bags:
            offsets.append(each[2][1:] + pairs)
            pairs += len(each[0])
        return self.gather(ids, weights, torch.cat(offsets)).split([len(each[2]) - 1 for each in bags])

    def read(self, array: str, ids: Tensor) -> Tensor:
        """Rows of a named array."""
        request = ReadRowsRequest(envelope=self._envelope, array=array, ids=ids)
        return self._run(self._engine.read_rows(request)).rows

    def arrays(self) -> list[str]:
        """Names of what is kept of every slot."""
        return [
            name for name in self._engine._tenancy.table(ORACLE_TABLE).storage.arrays if not name.startswith("keys")
        ]

    def close(self) -> None:
        self._run(self._engine.close())
        self._scheduler.close()

    @property
    def _envelope(self) -> Envelope:
        return Envelope(table_id=ORACLE_TABLE, epoch=1, incarnation=1)

    def _run(self, call: Any) -> Any:
        with torch.no_grad():
            return self._scheduler.run(call)
