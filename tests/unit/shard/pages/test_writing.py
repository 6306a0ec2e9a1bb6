"""The one door to an arena's bytes: every writer says exactly which pages it writes to, before it does."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mempool.agreement.ledger import AppliedLedger
from mempool.shard.pages.arena import Arena
from mempool.shard.steps import commits
from mempool.shard.steps.budget import Budget
from mempool.shard.steps.held import HeldUpdate, HeldUpdates
from mempool.types import DecidedStep, FlatKeySpec, OptimizerSpec, StepId, TableSchema
from mempool.types.bags import Bags
from tests.contract.driver import make_schema

from .whole_tables import MovingTable, make_table

SCHEMAS = {
    "adagrad": make_schema(optimizer=OptimizerSpec(algorithm="adagrad", lr=0.1), keys=FlatKeySpec(key_dim=5)),
    "dense": make_schema(optimizer=OptimizerSpec(algorithm="adamw", lr=0.1, eps=1e-8, weight_decay=0.1, dense=True)),
    "int8 and master": make_schema(
        dtype="int8", master=True, optimizer=OptimizerSpec(algorithm="rowwise_adagrad", lr=0.1)
    ),
}


def _bytes(arena: Arena) -> Tensor:
    """[capacity, bytes of a page]."""
    capacity = arena.num_taken + len(arena._free)
    stores = arena._stores.values()
    return torch.cat([rows.contiguous().view(torch.uint8).view(capacity, -1) for rows in stores], dim=1)


class Watched:
    """A table whose every write is compared with what the door was told."""

    def __init__(self, schema: TableSchema, seed: int) -> None:
        self.moving = MovingTable(schema, "mixed")
        self.table = self.moving.table
        self.updates = HeldUpdates(budget=Budget(2**30), lease_s=600.0)
        self.ledger = AppliedLedger(None)
        self.random = np.random.default_rng(seed)

    def watch(self, work: Callable[[], Any]) -> dict[tuple[int, ...], tuple[list[int], list[int]]]:
        """By arena: the pages whose bytes changed and those that were marked; arenas that are new begin as zeros."""
        before = {blocks: (_bytes(arena), arena.writes) for blocks, arena in self.table.arenas.items()}
        work()
        found = {}
        for blocks, arena in self.table.arenas.items():
            after = _bytes(arena)
            old, writes = before.get(blocks, (after[:0], 0))
            was = torch.zeros_like(after)
            was[: min(len(old), len(after))] = old[: len(after)]
            changed = (was != after).any(dim=1).nonzero()[:, 0].tolist()
            found[blocks] = (changed, arena.written_since(writes).tolist())
        return found

    def ids(self, count: int) -> Tensor:
        return torch.from_numpy(self.random.integers(0, self.table.schema.num_slots, count))

    def arena_pages(self, ids: Tensor) -> dict[tuple[int, ...], list[int]]:
        """The pages that these slots lie in."""
        pages = ids.numpy() >> 3
        return {
            blocks: sorted({int(arena.page_of[page]) for page in pages if arena.page_of[page] >= 0})
            for blocks, arena in self.table.arenas.items()
        }

    def commit(self, ids: Tensor, *, norm: bool) -> None:
        step_id = StepId(group="trainer", rank=0, step=self.ledger.version + 1)
        grads = torch.from_numpy(self.random.normal(1, 0.1, (1, self.table.schema.width(self.table.blocks)))).float()
        bags = Bags(ids, None, torch.tensor([0, len(ids)]))
        self.updates.hold(step_id, 0, HeldUpdate(bags, grads))
        if norm:
            commits.prepare(self.table, self.updates, step_id, (0,), decider=(1, step_id.step), want_norm=True)
        decided = DecidedStep(table_id=1, version=0, step_id=step_id, lr=0.1, grad_scale=1.0, sequences=(0,))
        commits.apply(self.table, self.updates, self.ledger, decided)


def _owners(random: np.random.Generator) -> list[list[int]]:
    return random.choice([0, 0, 0, 1], (7, 3)).tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    operations=st.lists(st.sampled_from(["write", "state", "commit", "norm", "read", "export", "move"]), max_size=8),
)
def test_exactly_the_pages_that_are_written_to_are_marked(
    schema: TableSchema, seed: int, operations: list[str]
) -> None:
    watched = Watched(schema, seed)
    table = watched.table
    for operation in operations:
        ids = watched.ids(int(watched.random.integers(1, 5)))
        if operation == "move":
            if schema.optimizer.dense and watched.ledger.version:
                continue  # the library knows no steps
            found = watched.watch(lambda: watched.moving.move(_owners(watched.random)))
            for changed, marked in found.values():
                assert set(changed) <= set(marked)
            continue
        if not table.blocks:
            continue
        name = {"write": "values", "state": f"values.{table.step_names[0]}"}.get(operation, "")
        if name:
            rows = torch.from_numpy(watched.random.normal(size=(len(ids), table.row_width(name)))).float()
            found = watched.watch(lambda name=name, ids=ids, rows=rows: table.write(name, ids, rows))  # type: ignore[misc]
        elif operation in ("commit", "norm"):
            found = watched.watch(lambda ids=ids, how=operation: watched.commit(ids, norm=how == "norm"))  # type: ignore[misc]
        elif operation == "read":
            found = watched.watch(lambda ids=ids: table.pooled(Bags(ids, None, torch.tensor([0, len(ids)]))))  # type: ignore[misc]
        else:
            found = watched.watch(lambda ids=ids: table.catch_up_pages(np.unique(ids.numpy() >> 3)))  # type: ignore[misc]
        expected = watched.arena_pages(ids)
        for blocks, (changed, marked) in found.items():
            assert changed == marked
            if name or operation in ("commit", "norm"):
                assert marked == expected[blocks]
            else:
                assert set(marked) <= set(expected[blocks])  # those alone that had missed steps


def test_reading_marks_the_pages_that_catch_up() -> None:
    watched = Watched(SCHEMAS["dense"], 1)
    watched.commit(torch.tensor([0, 1]), norm=False)
    late = torch.tensor([9, 10])
    first = watched.watch(lambda: watched.table.read("values", late))
    assert any(marked for _, marked in first.values())
    assert {blocks: marked for blocks, (_, marked) in first.items()} == watched.arena_pages(late)
    again = watched.watch(lambda: watched.table.read("values", late))
    assert not any(marked for _, marked in again.values())


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_filling_marks_all_that_it_fills(schema: TableSchema) -> None:
    for arena in make_table(schema, "mixed").arenas.values():
        assert arena.written_since(0).tolist() == list(range(arena.num_taken))


def test_shrinking_marks_the_pages_that_others_moved_into() -> None:
    moving = MovingTable(SCHEMAS["adagrad"])
    (arena,) = moving.table.arenas.values()
    arena.give_back(arena.withdraw(np.array([0, 1, 2, 5])))
    writes = arena.writes
    before = _bytes(arena)
    arena.shrink()
    changed = (before[:3] != _bytes(arena)).any(dim=1).nonzero()[:, 0].tolist()
    assert arena.written_since(writes).tolist() == changed == [0, 1, 2]
