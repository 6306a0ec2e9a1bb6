"""Valid requests of every method against a table that is there: what mutations start from."""

import random
import secrets
from typing import Any

import numpy as np
from google.protobuf.message import Message

from mempool.wire.v1 import data_pb2, pool_pb2, shard_pb2, table_pb2, tensor_pb2
from tests.hostile.raw import RawChannel

DTYPES = {
    np.dtype(np.float32): tensor_pb2.DTYPE_FLOAT32,
    np.dtype(np.int64): tensor_pb2.DTYPE_INT64,
    np.dtype(np.uint32): tensor_pb2.DTYPE_UINT32,
    np.dtype(np.int32): tensor_pb2.DTYPE_INT32,
}
NUM_SLOTS, VALUE_DIM, BLOCK_DIM, HEADS, KEY_DIM = 256, 32, 16, 2, 8
VICTIM, WITNESS = "victim", "witness"
GROUPED, GROUPED_KEYS, GROUPS = "grouped", "grouped:keys", 16
"""A table that trains keys in groups, and its keys'."""
PLACE = "memory://fuzz"


def tensor(array: Any) -> tensor_pb2.Tensor:
    """An array as it travels."""
    array = np.ascontiguousarray(array)
    return tensor_pb2.Tensor(dtype=DTYPES[array.dtype], shape=array.shape, inline=array.tobytes())


def schema(name: str, **changes: Any) -> table_pb2.TableSchema:
    """A small table with product keys."""
    fields: dict[str, Any] = {
        "name": name,
        "num_slots": NUM_SLOTS,
        "value_dim": VALUE_DIM,
        "block_dim": BLOCK_DIM,
        "page_slots": 16,
        "dtype": tensor_pb2.DTYPE_FLOAT32,
        "seed": 7,
        "init_std": 0.5,
        "stride": 16,
        "layout": table_pb2.LAYOUT_AUTO,
        "optimizer": table_pb2.OptimizerSpec(algorithm=table_pb2.ALGORITHM_ADAGRAD, lr=0.1),
        "product_keys": table_pb2.ProductKeySpec(heads=HEADS, key_dim=KEY_DIM),
        "rounding": table_pb2.ROUNDING_NEAREST,
        "usage": True,
    }
    return table_pb2.TableSchema(**(fields | changes))


def grouped(name: str) -> table_pb2.TableSchema:
    """The same with keys in groups, which it trains."""
    sgd = table_pb2.OptimizerSpec(algorithm=table_pb2.ALGORITHM_SGD, lr=0.1)
    keys = table_pb2.TrainedKeySpec(heads=1, key_dim=KEY_DIM, optimizer=sgd, groups=GROUPS, probes=4)
    return schema(name, product_keys=None, trained_keys=keys)


class Requests:
    """Valid requests to one shard about one table.

    Args:
        view: The table as the pool says it is.
        shard: Index of the shard that is asked.
        seed: Of everything drawn.
    """

    def __init__(self, view: table_pb2.TableView, *, shard: int, seed: int) -> None:
        self.view = view
        self.info = next(info for info in view.shards if info.shard == shard)
        owners = np.frombuffer(view.placement.owners.inline, np.int32).reshape(tuple(view.placement.owners.shape))
        self.blocks = [int(block) for block in np.flatnonzero((owners == shard).any(0))]
        self.random = random.Random(seed)
        self._arrays = np.random.default_rng(seed)
        self._group = secrets.token_hex(4)

    def of(self, label: str) -> Message:
        """A valid request of a method."""
        make = {
            "MemoryService.Gather": self._gather,
            "MemoryService.Update": self._update,
            "MemoryService.Prepare": self._prepare,
            "MemoryService.Commit": self._commit,
            "MemoryService.Discard": self._discard,
            "MemoryService.Heartbeat": self._heartbeat,
            "MemoryService.Score": self._score,
            "MemoryService.Lookup": self._lookup,
            "MemoryService.ReadRows": self._read_rows,
            "MemoryService.WriteRows": self._write_rows,
            "MemoryService.StepCount": lambda: data_pb2.StepCountRequest(envelope=self.envelope()),
            "MemoryService.Usage": lambda: data_pb2.UsageRequest(
                envelope=self.envelope(), older_than=self.random.randrange(3)
            ),
            "MemoryService.Pin": self._pin,
            "MemoryService.Meet": self._meet,
            "MemoryService.OpenLine": lambda: data_pb2.OpenLineRequest(version=4, client=self.random.randrange(2**60)),
            "ShardService.AttachTable": self._attach_table,
            "ShardService.DropTable": self._shard_drop,
            "ShardService.Freeze": self._freeze,
            "ShardService.Thaw": self._thaw,
            "ShardService.Resolve": self._resolve,
            "ShardService.ExportPages": self._export_pages,
            "ShardService.ExportLedger": lambda: shard_pb2.ExportLedgerRequest(
                table_id=self.view.schema.table_id, first=self.random.randrange(2)
            ),
            "ShardService.PullPages": self._pull_pages,
            "ShardService.SetView": lambda: shard_pb2.SetViewRequest(view=self.view),
            "ShardService.MarkTable": lambda: shard_pb2.MarkTableRequest(
                table_id=self.view.schema.table_id, token="late", version=self.random.randrange(3), lease_s=1.0
            ),
            "ShardService.WritePart": lambda: shard_pb2.WritePartRequest(
                table_id=self.view.schema.table_id, token="late", url=PLACE, checkpoint="000001-0123abcd"
            ),
            "ShardService.ReleaseMark": lambda: shard_pb2.ReleaseMarkRequest(
                table_id=self.view.schema.table_id, token="late", kept="000001-0123abcd"
            ),
            "ShardService.ReadHeat": lambda: shard_pb2.ReadHeatRequest(table_id=self.view.schema.table_id),
            "ShardService.Status": shard_pb2.StatusRequest,
            "PoolService.CreateTable": self._create,
            "PoolService.DropTable": lambda: pool_pb2.DropTableRequest(name="nobody"),
            "PoolService.GetTable": lambda: pool_pb2.GetTableRequest(name=VICTIM),
            "PoolService.ListTables": pool_pb2.ListTablesRequest,
            "PoolService.Rescale": lambda: pool_pb2.RescaleRequest(shards=len(self.view.shards)),
            "PoolService.Rebalance": lambda: pool_pb2.RebalanceRequest(dry_run=True),
            "PoolService.Checkpoint": lambda: pool_pb2.CheckpointRequest(
                url=PLACE, tables=["nobody"], extra=b'{"a": 1}'
            ),
            "PoolService.ForkTable": lambda: pool_pb2.ForkTableRequest(table=VICTIM, name="fork"),
            "PoolService.Restore": lambda: pool_pb2.RestoreRequest(url=PLACE, tables=[VICTIM], replace=True),
            "PoolService.GetStatus": pool_pb2.GetStatusRequest,
        }[label]
        message: Message = make()
        return message

    def envelope(self) -> data_pb2.Envelope:
        return data_pb2.Envelope(
            table_id=self.view.schema.table_id, epoch=self.view.placement.epoch, incarnation=self.info.incarnation
        )

    def bags(self, bags: int = 4, pairs: int = 3) -> dict[str, tensor_pb2.Tensor]:
        ids = self._arrays.integers(0, NUM_SLOTS, bags * pairs)
        return {
            "ids": tensor(ids if self.random.random() < 0.5 else ids.astype(np.uint32)),
            "weights": tensor(self._arrays.random(bags * pairs, np.float32)),
            "offsets": tensor(np.arange(bags + 1, dtype=np.int64) * pairs),
        }

    def step(self) -> data_pb2.StepId:
        return data_pb2.StepId(group=self._group, rank=0, step=1 + self.random.randrange(1000))

    def _gather(self) -> Message:
        return data_pb2.GatherRequest(
            envelope=self.envelope(),
            lookup_id=self.random.getrandbits(20),
            remember=self.random.random() < 0.5,
            release=[1, 2],
            reply_dtype=tensor_pb2.DTYPE_FLOAT32,
            **self.bags(),
        )

    def _update(self) -> Message:
        return data_pb2.UpdateRequest(
            envelope=self.envelope(),
            step_id=self.step(),
            sequence=self.random.randrange(1000),
            lookup_id=self.random.getrandbits(20),
            blocks=self.blocks,
            hold=True,
            want_weight_grad=self.random.random() < 0.5,
            grads=tensor(self._arrays.random((4, len(self.blocks) * BLOCK_DIM), np.float32)),
            **self.bags(),
        )

    def _prepare(self) -> Message:
        step_id = self.step()
        part = data_pb2.PreparePart(envelope=self.envelope(), step_id=step_id, sequences=[1, 2, 3])
        return data_pb2.PrepareRequest(
            parts=[part],
            want_norm=self.random.random() < 0.5,
            decider_table=self.view.schema.table_id,
            decider_step=step_id.step,
        )

    def _commit(self) -> Message:
        kind = self.random.random()
        part = data_pb2.CommitPart(
            envelope=self.envelope(),
            step_id=self.step(),
            lr=0.1,
            grad_scale=1.0,
            sequences=[1, 2],
            version=1 if kind > 0.9 else 0,
        )
        return data_pb2.CommitRequest(parts=[part], one_phase=kind < 0.7, decided=kind > 0.8)

    def _discard(self) -> Message:
        part = data_pb2.DiscardPart(envelope=self.envelope(), step_id=self.step())
        return data_pb2.DiscardRequest(parts=[part], keep_updates=self.random.random() < 0.3)

    def _heartbeat(self) -> Message:
        return data_pb2.HeartbeatRequest(incarnation=self.info.incarnation, group=self._group, rank=0)

    def _resolve(self) -> Message:
        return shard_pb2.ResolveRequest(
            table_id=self.view.schema.table_id,
            after_version=self.random.randrange(3),
            step_id=self.step(),
            give_up=self.random.random() < 0.5,
        )

    def _queries(self) -> tensor_pb2.Tensor:
        heads = 1 if self.view.schema.name == GROUPED_KEYS else HEADS
        return tensor(self._arrays.random((3, heads, KEY_DIM), np.float32))

    def _score(self) -> Message:
        if self.view.schema.name != GROUPED_KEYS or self.random.random() < 0.3:
            return data_pb2.ScoreRequest(envelope=self.envelope(), topk=4, queries=self._queries())
        every = np.tile(np.arange(GROUPS, dtype=np.int64), (3, 1))
        groups = np.sort(self._arrays.permuted(every, axis=1)[:, :4], axis=1)
        return data_pb2.ScoreRequest(
            envelope=self.envelope(),
            topk=4,
            queries=self._queries(),
            groups=tensor(groups),
            group_scores=tensor(self._arrays.random((3, 4), np.float32)),
        )

    def _lookup(self) -> Message:
        return data_pb2.LookupRequest(table=VICTIM, topk=4, queries=self._queries())

    def _pin(self) -> data_pb2.PinRequest:
        pin = f"reader-{self.random.randrange(4)}"
        return data_pb2.PinRequest(envelope=self.envelope(), do=data_pb2.PIN_ACTION_ARM, pin=pin, lease_s=5.0)

    def _meet(self) -> data_pb2.MeetRequest:
        terms = data_pb2.Terms(
            world_size=2, consistency=data_pb2.CONSISTENCY_SYNC, reduction=data_pb2.REDUCTION_MEAN, elastic=True
        )
        return data_pb2.MeetRequest(
            group=f"group-{self.random.randrange(4)}",
            rank=self.random.randrange(2),
            nonce=self.random.randrange(1, 2**40),
            host="somewhere, pid 7",
            launcher="somewhere, pid 6",
            terms=terms,
            kind=data_pb2.MEET_KIND_JOIN,
        )

    def _read_rows(self) -> Message:
        ids = self._arrays.integers(0, NUM_SLOTS, 5)
        return data_pb2.ReadRowsRequest(envelope=self.envelope(), array="values", ids=tensor(ids))

    def _write_rows(self) -> Message:
        return data_pb2.WriteRowsRequest(
            envelope=self.envelope(),
            array="values",
            blocks=self.blocks,
            write_id=data_pb2.WriteId(writer=self.random.getrandbits(63) + 1, number=9, open=[3, 7]),
            fresh=self.random.random() < 0.3,
            ids=tensor(self._arrays.integers(0, NUM_SLOTS, 5)),
            rows=tensor(self._arrays.random((5, len(self.blocks) * BLOCK_DIM), np.float32)),
        )

    def _attach_table(self) -> Message:
        return shard_pb2.AttachTableRequest(view=self.view, mode=shard_pb2.ATTACH_MODE_EMPTY)

    def _shard_drop(self) -> Message:
        return shard_pb2.ShardServiceDropTableRequest(table_id=self.random.getrandbits(16))

    def _freeze(self) -> Message:
        return shard_pb2.FreezeRequest(table_id=self.view.schema.table_id, timeout_s=0.1, lease_s=5.0)

    def _thaw(self) -> Message:
        return shard_pb2.ThawRequest(table_id=self.view.schema.table_id)

    def _export_pages(self) -> Message:
        owners = np.frombuffer(self.view.placement.owners.inline, np.int32).reshape(
            tuple(self.view.placement.owners.shape)
        )
        mine = np.flatnonzero((owners[:, self.blocks] == self.info.shard).all(1)) if self.blocks else np.array([], int)
        return shard_pb2.ExportPagesRequest(
            table_id=self.view.schema.table_id, blocks=self.blocks, row_pages=tensor(mine[:2].astype(np.int64))
        )

    def _pull_pages(self) -> Message:
        other = next((info for info in self.view.shards if info.shard != self.info.shard), self.info)
        return shard_pb2.PullPagesRequest(
            table_id=self.view.schema.table_id,
            source=other,
            blocks=self.blocks,
            row_pages=tensor(np.array([0, 1], np.int64)),
        )

    def _create(self) -> Message:
        return pool_pb2.CreateTableRequest(schema=schema(f"t{self.random.randrange(4)}"))


async def view_of(pool: RawChannel, name: str) -> table_pb2.TableView:
    """A table's view; it is made where it is not there."""
    listed = await pool.ask("PoolService.ListTables")
    for view in listed.views:
        if view.schema.name == name:
            found: table_pb2.TableView = view
            return found
    wanted = grouped(name) if name == GROUPED else schema(name)
    made = await pool.ask("PoolService.CreateTable", pool_pb2.CreateTableRequest(schema=wanted), timeout_s=120)
    created: table_pb2.TableView = made.view
    return created
