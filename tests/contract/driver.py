"""What contract tests do with a table: the least of a client and of a controller, over the protocols alone.

Its routing is the simplest there is (every shard gets every pair) and shares no code with the package.
Legend: B bags, L pairs, V value dim, N slots, W columns of a shard's blocks.
"""

import asyncio
import itertools
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from mempool.kernels import PackedLayout, unpack_rows
from mempool.types import (
    AttachTable,
    CommitPart,
    CommitRequest,
    CommittedPart,
    DiscardPart,
    DiscardRequest,
    Envelope,
    ExportLedger,
    ExportPages,
    GatherRequest,
    Ledger,
    LedgerEntry,
    OptimizerSpec,
    Placement,
    PreparedPart,
    PreparePart,
    PrepareRequest,
    ProductKeySpec,
    PullPages,
    ReadRowsRequest,
    ScoreRequest,
    ShardHost,
    ShardInfo,
    StepId,
    TableSchema,
    TableStatus,
    TableView,
    UpdateRequest,
    WriteRowsRequest,
)
from mempool.wire.channels.loop import io_loop, run

from .bags import Bags
from .layouts import BLOCK_ARRAYS, LAYOUTS

T = TypeVar("T")
CALL_S = 100.0
_NONE = np.empty(0, dtype=np.int64)
_lookup_ids = itertools.count(1)


def make_schema(**changes: Any) -> TableSchema:
    """A table of 50 slots in 7 pages of 8 and 10 columns in blocks of 4, 4 and 2."""
    schema = TableSchema(
        table_id=0,
        name="facts",
        num_slots=50,
        value_dim=10,
        block_dim=4,
        page_slots=8,
        dtype="float32",
        seed=7,
        init_std=0.5,
        stride=0,
        layout="auto",
        optimizer=OptimizerSpec(algorithm="adagrad", lr=0.1),
    )
    return replace(schema, **changes)


@dataclass(frozen=True)
class Hosted:
    """A shard under test and where it is."""

    host: ShardHost
    info: ShardInfo


class Driver:
    """One table on the shards under test."""

    def __init__(self, hosted: Sequence[Hosted], *, table_id: int) -> None:
        self.hosted = list(hosted)
        self.table_id = table_id
        self.view: TableView | None = None

    # Calls

    def call(self, coro: Coroutine[Any, Any, T]) -> T:
        """Run to its end, within a bound."""
        return run(coro, timeout_s=CALL_S)

    def submit(self, coro: Coroutine[Any, Any, T]) -> Future[T]:
        """Start, and go on."""
        return asyncio.run_coroutine_threadsafe(coro, io_loop())

    def host(self, shard: int) -> ShardHost:
        return self.hosted[shard].host

    def envelope(self, shard: int, **changes: int) -> Envelope:
        envelope = Envelope(
            table_id=self.table_id,
            epoch=self.placed.placement.epoch,
            incarnation=self.hosted[shard].info.incarnation,
        )
        return replace(envelope, **changes)

    @property
    def placed(self) -> TableView:
        assert self.view is not None, "make the table first"
        return self.view

    @property
    def schema(self) -> TableSchema:
        return self.placed.schema

    @property
    def owners(self) -> tuple[int, ...]:
        return self.placed.placement.shards

    def blocks(self, shard: int) -> tuple[int, ...]:
        """Blocks of which a shard owns any page."""
        return tuple(np.flatnonzero((self.placed.placement.owners == shard).any(axis=0)).tolist())

    def columns(self, blocks: Sequence[int]) -> Tensor:
        return torch.cat([torch.arange(*self.schema.block_columns(block)) for block in blocks])

    # The controller's part

    def make_view(self, schema: TableSchema, owners: Any, key_owners: Any = (), *, epoch: int) -> TableView:
        placement = Placement(
            table_id=self.table_id,
            epoch=epoch,
            owners=np.array(owners, dtype=np.int32),
            key_owners=np.array(key_owners, dtype=np.int32),
        )
        infos = tuple(hosted.info for hosted in self.hosted)
        return TableView(schema=replace(schema, table_id=self.table_id), placement=placement, shards=infos)

    def create(self, schema: TableSchema, owners: Any = "one", key_owners: Any = ()) -> "Driver":
        """Make the table on every shard, each with the pages it owns."""
        owners = LAYOUTS[owners] if isinstance(owners, str) else owners
        self.view = self.make_view(schema, owners, key_owners, epoch=1)
        for shard in range(len(self.hosted)):
            mode = "initialise" if shard in self.owners else "empty"
            self.call(self.host(shard).attach_table(AttachTable(view=self.view, mode=mode)))  # type: ignore[arg-type]
        return self

    def drop(self) -> None:
        for hosted in self.hosted:
            self.call(hosted.host.drop_table(self.table_id))
        self.table_id += 1  # none comes back

    def pulls(self, target: TableView) -> list[tuple[int, PullPages]]:
        """(destination, request) of every page that changes its owner, block by block."""
        old, new = self.placed.placement, target.placement
        requests = []
        for source, dest in itertools.permutations(range(len(self.hosted)), 2):
            info = self.hosted[source].info
            moved = (old.owners == source) & (new.owners == dest)
            for pattern in np.unique(moved, axis=0):
                row_pages = np.flatnonzero((moved == pattern).all(axis=1))
                if pattern.any():
                    blocks = tuple(np.flatnonzero(pattern).tolist())
                    requests.append(
                        (dest, PullPages(table_id=self.table_id, source=info, row_pages=row_pages, blocks=blocks))
                    )
            heads = tuple(np.flatnonzero((old.key_owners == source) & (new.key_owners == dest)).tolist())
            if heads:
                pull = PullPages(table_id=self.table_id, source=info, row_pages=_NONE, blocks=(), key_pages=heads)
                requests.append((dest, pull))
        return requests

    def move(self, owners: Any, key_owners: Any = None, *, token: str = "") -> int:
        """Freeze, pull, set the new view everywhere. Returns how many pages moved."""
        placement = self.placed.placement
        owners = LAYOUTS[owners] if isinstance(owners, str) else owners
        keys = placement.key_owners if key_owners is None else key_owners
        target = self.make_view(self.schema, owners, keys, epoch=placement.epoch + 1)
        token = token or f"round {next(_lookup_ids)}"
        for shard in (taking_part := sorted({*self.owners, *target.placement.shards})):
            self.freeze(shard, token=token)
        pages, pulls = 0, self.pulls(target)
        if self.gate != (gate := target.placement.shards[0]):
            old = self.hosted[self.gate].info
            pulls.append((gate, PullPages(table_id=self.table_id, source=old, row_pages=_NONE, blocks=())))
        for dest, request in pulls:
            pages += self.call(self.host(dest).pull_pages(replace(request, token=token))).pages
        for shard, hosted in enumerate(self.hosted):
            self.call(hosted.host.set_view(target, token=token if shard in taking_part else ""))
        self.view = target
        return pages

    def freeze(
        self, shard: int, timeout_s: float = 5.0, *, token: str = "round", lease_s: float = 60.0, renew: bool = False
    ) -> int:
        """Hold one shard's Prepares off. Returns the version at which the table stands still."""
        host = self.host(shard)
        return self.call(host.freeze(self.table_id, timeout_s, token=token, lease_s=lease_s, renew=renew))

    def thaw(self, shard: int, *, token: str = "round") -> None:
        self.call(self.host(shard).thaw(self.table_id, token=token))

    def status(self, shard: int) -> TableStatus:
        """The table as one shard sees it, once it has applied what it has acknowledged."""
        self.call(self.host(shard).export_ledger(ExportLedger(table_id=self.table_id, first=2**31)))
        tables = self.call(self.host(shard).status()).tables
        return next(table for table in tables if table.table_id == self.table_id)

    def ledger(self, shard: int) -> Ledger:
        """What was applied to the table, as one shard knows it, read part after part."""
        entries: dict[tuple[str, int], LedgerEntry] = {}
        while True:
            request = ExportLedger(table_id=self.table_id, first=len(entries))
            part = self.call(self.host(shard).export_ledger(request))
            entries |= part.entries
            if not part.entries or len(entries) == part.num_entries:
                return Ledger(
                    version=part.version,
                    updates_applied=part.updates_applied,
                    entries=entries,
                    step_offset=part.step_offset,
                )

    def contents(self) -> dict[str, Any]:
        """Everything that a bad request must not change: every page of every array, the ledgers, what is held."""
        found: dict[str, Any] = {}
        for shard in self.owners:
            placement = self.placed.placement
            found[f"{shard} ledger"] = self.ledger(shard)
            owned = placement.owners == shard
            for pattern in np.unique(owned, axis=0):
                blocks, pages = np.flatnonzero(pattern), np.flatnonzero((owned == pattern).all(axis=1))
                if len(blocks):
                    request = ExportPages(table_id=self.table_id, row_pages=pages, blocks=tuple(blocks.tolist()))
                    batch = self.call(self.host(shard).export_pages(request))
                    for name, rows in batch.arrays.items():
                        found[f"{name} of pages {pages} blocks {blocks}"] = rows.clone()
            heads = tuple(np.flatnonzero(placement.key_owners == shard).tolist())
            if heads:
                request = ExportPages(table_id=self.table_id, row_pages=_NONE, blocks=(), key_pages=heads)
                batch = self.call(self.host(shard).export_pages(request))
                found |= {f"{name} of heads {heads}": keys.clone() for name, keys in batch.arrays.items()}
            found[f"{shard} held"] = self.status(shard).updates_held
        return found

    # The client's part

    def gather(self, bags: Bags, *, remember: bool = True, lookup_id: int | None = None, **changes: Any) -> Tensor:
        """[B, V]: columns of all shards, partial sums added in ascending order of shards. Returns the values."""
        values = torch.zeros(bags.num_bags, self.schema.value_dim)
        self.lookup_id = next(_lookup_ids) if lookup_id is None else lookup_id
        for shard in self.owners:
            if not self.blocks(shard):
                continue
            request = GatherRequest(
                envelope=self.envelope(shard),
                lookup_id=self.lookup_id,
                ids=bags.ids,
                weights=bags.weights,
                offsets=bags.offsets,
                remember=remember,
            )
            reply = self.call(self.host(shard).gather(replace(request, **changes)))
            assert reply.blocks == self.blocks(shard)
            packed = reply.values.dtype == torch.uint8
            sums = unpack_rows(self.packed(shard), reply.values) if packed else reply.values.float()
            values[:, self.columns(reply.blocks)] += sums
        return values

    def packed(self, shard: int) -> PackedLayout:
        """How a shard's sums lie in packed rows."""
        schema = self.schema
        return PackedLayout("float8_e4m3fn", width=schema.width(self.blocks(shard)), block_dim=schema.block_dim)

    def update_request(
        self, shard: int, step: int, sequence: int, grads: Tensor, *, bags: Bags | None = None, **changes: Any
    ) -> UpdateRequest:
        """The update of the last lookup, or of ``bags``, for one shard."""
        request = UpdateRequest(
            envelope=self.envelope(shard),
            step_id=self.step_id(step),
            sequence=sequence,
            lookup_id=self.lookup_id if bags is None else 0,
            blocks=self.blocks(shard),
            grads=grads[:, self.columns(self.blocks(shard))].contiguous(),
            hold=True,
            want_weight_grad=True,
            ids=None if bags is None else bags.ids,
            weights=None if bags is None else bags.weights,
            offsets=None if bags is None else bags.offsets,
        )
        return replace(request, **changes)

    def update(self, step: int, sequence: int, grads: Tensor, *, bags: Bags | None = None, **changes: Any) -> Tensor:
        """[L]: d_weights over all shards."""
        parts = []
        for shard in self.owners:
            if self.blocks(shard):
                request = self.update_request(shard, step, sequence, grads, bags=bags, **changes)
                parts.append(self.call(self.host(shard).update(request)).weight_grad)
        weight_grad = torch.zeros(())
        for part in parts:
            assert part is not None
            weight_grad = weight_grad + part
        return weight_grad

    def step_id(self, step: int, group: str = "trainer", generation: int = 0) -> StepId:
        return StepId(group=group, rank=0, step=step, generation=generation)

    def prepare_request(
        self,
        shard: int,
        step: int,
        sequences: Sequence[int],
        *,
        want_norm: bool = True,
        norm_order: float = 0.0,
        wait: bool = False,
        attempt: int = 0,
        **step_id: Any,
    ) -> PrepareRequest:
        part = PreparePart(
            envelope=self.envelope(shard), step_id=self.step_id(step, **step_id), sequences=tuple(sequences)
        )
        return PrepareRequest(
            parts=(part,),
            want_norm=want_norm,
            norm_order=norm_order,
            decider_table=self.table_id,
            decider_step=step,
            wait=wait,
            attempt=attempt,
        )

    def prepare(self, step: int, sequences: Sequence[int], **how: Any) -> dict[int, PreparedPart]:
        """At all owners at once, as a client asks."""
        return {
            shard: self.call(self.host(shard).prepare(self.prepare_request(shard, step, sequences, **how))).parts[0]
            for shard in self.owners
        }

    @property
    def gate(self) -> int:
        return min(self.owners)

    def commit_request(
        self,
        shard: int,
        step: int,
        sequences: Sequence[int],
        *,
        lr: float = 0.1,
        grad_scale: float = 1.0,
        one_phase: bool = False,
        version: int = 0,
        decided: bool = False,
        **step_id: Any,
    ) -> CommitRequest:
        part = CommitPart(
            envelope=self.envelope(shard),
            step_id=self.step_id(step, **step_id),
            lr=lr,
            grad_scale=grad_scale,
            sequences=tuple(sequences),
            version=version,
        )
        return CommitRequest(parts=(part,), one_phase=one_phase, decided=decided)

    def decide(self, step: int, sequences: Sequence[int], **how: Any) -> CommittedPart:
        """The Commit at the gate, which decides."""
        return self.call(self.host(self.gate).commit(self.commit_request(self.gate, step, sequences, **how))).parts[0]

    def commit(self, step: int, sequences: Sequence[int], **how: Any) -> dict[int, CommittedPart]:
        """At the gate, then at the others."""
        replies = {self.gate: self.decide(step, sequences, **how)}
        how.pop("one_phase", None)
        for shard in self.owners:
            if shard != self.gate:
                request = self.commit_request(
                    shard, step, sequences, decided=True, version=replies[self.gate].version, **how
                )
                replies[shard] = self.call(self.host(shard).commit(request)).parts[0]
        return replies

    def discard(self, step: int, *, keep_updates: bool = False, **step_id: Any) -> dict[int, int]:
        """How many held updates each owner dropped."""
        replies = {}
        for shard in self.owners:
            part = DiscardPart(envelope=self.envelope(shard), step_id=self.step_id(step, **step_id))
            request = DiscardRequest(parts=(part,), keep_updates=keep_updates)
            replies[shard] = self.call(self.host(shard).discard(request)).discarded
        return replies

    def train(
        self, step: int, lookups: Mapping[int, tuple[Bags, Tensor]], *, want_norm: bool = True, **how: Any
    ) -> None:
        """One whole step: sequence -> (bags, gradient of their sums)."""
        for sequence, (bags, grads) in lookups.items():
            self.gather(bags)
            self.update(step, sequence, grads)
        replies = self.prepare(step, list(lookups), want_norm=want_norm)
        assert all(reply.missing == () and not reply.applied for reply in replies.values()), replies
        assert all(reply.version for reply in self.commit(step, list(lookups), **how).values())

    def score(self, queries: Tensor, topk: int) -> dict[int, tuple[tuple[int, ...], Tensor, Tensor]]:
        """heads, scores, ids by shard."""
        replies = {}
        for shard in self.owners:
            request = ScoreRequest(envelope=self.envelope(shard), queries=queries, topk=topk)
            reply = self.call(self.host(shard).score(request))
            replies[shard] = (reply.heads, reply.scores, reply.ids)
        return replies

    def row_columns(self, array: str, blocks: Sequence[int]) -> Tensor:
        """Where a shard's columns of an array stand in the whole row."""
        if array == "keys":
            return torch.arange(self.row_width(array))
        return torch.tensor(list(blocks)) if array in BLOCK_ARRAYS else self.columns(blocks)

    def row_width(self, array: str) -> int:
        keys = self.schema.keys
        if array == "keys":
            assert keys is not None
            if isinstance(keys, ProductKeySpec):
                return round(self.schema.num_slots**0.5) * keys.key_dim
            return keys.key_dim
        return self.schema.num_blocks if array in BLOCK_ARRAYS else self.schema.value_dim

    def read(self, array: str = "values", ids: Tensor | None = None) -> Tensor:
        """Whole rows, put together from all shards; of all slots by default."""
        ids = torch.arange(self.schema.num_slots) if ids is None else ids
        rows: Tensor | None = None
        for shard in self.owners:
            request = ReadRowsRequest(envelope=self.envelope(shard), array=array, ids=ids)
            reply = self.call(self.host(shard).read_rows(request))
            if rows is None:
                rows = torch.zeros(ids.shape[0], self.row_width(array), dtype=reply.rows.dtype)
            rows[:, self.row_columns(array, reply.blocks)] += reply.rows
        assert rows is not None
        return rows

    def write(self, array: str, ids: Tensor, rows: Tensor) -> None:
        for shard in self.owners:
            if array == "keys":
                blocks: tuple[int, ...] = () if isinstance(self.schema.keys, ProductKeySpec) else (0,)
            else:
                blocks = self.blocks(shard)
            columns = self.row_columns(array, blocks)
            request = WriteRowsRequest(
                envelope=self.envelope(shard), array=array, ids=ids, blocks=blocks, rows=rows[:, columns].contiguous()
            )
            self.call(self.host(shard).write_rows(request))


def same(left: Any, right: Any) -> bool:
    """Equal to the bit, through dicts and tensors (NaN equals NaN)."""
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, Tensor):
        same_kind = left.dtype == right.dtype and left.shape == right.shape
        return same_kind and torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))
    return bool(left == right)
