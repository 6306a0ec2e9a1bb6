"""A step of two tables is decided, its trainer dies, and the deciding table's gate moves: its other part is applied."""

import pytest

from mempool.types import CommitPart, CommitRequest, PreparePart, PrepareRequest, StepId
from tests.contract.driver import Driver, make_schema

from .conftest import MakeDriver
from .test_no_half_steps import push


def prepare_together(first: Driver, second: Driver, step_id: StepId) -> None:
    """A step of both tables, prepared at all owners."""
    for table in (first, second):
        push(table, step_id, prepare=False)
    for shard in sorted({*first.owners, *second.owners}):
        parts = tuple(
            PreparePart(envelope=table.envelope(shard), step_id=step_id, sequences=(0,))
            for table in (first, second)
            if shard in table.owners
        )
        prepare = PrepareRequest(parts=parts, want_norm=False, decider_table=1, decider_step=step_id.step)
        first.call(first.host(shard).prepare(prepare))


def decide_together(first: Driver, second: Driver, step_id: StepId) -> None:
    """A step of both tables, decided at the first one's gate; nobody else is told."""
    prepare_together(first, second, step_id)
    gate = first.gate
    commit = CommitRequest(
        parts=tuple(
            CommitPart(
                envelope=table.envelope(gate),
                step_id=step_id,
                lr=0.1,
                grad_scale=1.0,
                sequences=(0,) if gate == table.gate else (),
            )
            for table in (first, second)
        )
    )
    assert first.call(first.host(gate).commit(commit)).parts[0].version == 1


@pytest.mark.parametrize(
    ("before", "after"),
    [([[0, 1, 0]] * 7, [[1, 1, 1]] * 7), ([[1, 2, 1]] * 7, [[1, 0, 1]] * 7), ([[1, 2, 1]] * 7, [[0, 0, 0]] * 7)],
    ids=["an owner", "newcomer from other", "newcomer from all"],
)
def test_the_new_gate_knows_what_the_old_one_decided(
    make_driver: MakeDriver, before: list[list[int]], after: list[list[int]]
) -> None:
    first = make_driver(3).create(make_schema(), before)
    second = Driver(first.hosted, table_id=2).create(make_schema(name="other"), [[2, 2, 2]] * 7)
    decide_together(first, second, first.step_id(1, "a"))
    first.move(after)
    second.read()
    assert second.status(2).version == 1
    first.read()
    assert first.status(first.gate).version == 1


@pytest.mark.parametrize("what", ["moved to an owner", "moved to a newcomer", "dropped", "moved and dropped"])
def test_so_it_is_where_its_trainer_has_gone_on_in_a_new_generation_without_the_other_table(
    make_driver: MakeDriver, what: str
) -> None:
    first = make_driver(3).create(make_schema(), [[1, 1, 1]] * 7 if "newcomer" in what else [[0, 1, 0]] * 7)
    second = Driver(first.hosted, table_id=2).create(make_schema(name="other"), [[2, 2, 2]] * 7)
    decide_together(first, second, first.step_id(7, "a"))
    for shard in first.owners[1:]:
        first.call(first.host(shard).commit(first.commit_request(shard, 7, [0], decided=True, version=1, group="a")))
    push(first, first.step_id(1, "a", generation=1))
    first.commit(1, [0], group="a", generation=1)
    if "moved" in what:
        first.move([[0, 0, 0]] * 7 if "newcomer" in what else [[1, 1, 1]] * 7)
    if "dropped" in what:
        for shard in range(3):
            first.call(first.host(shard).drop_table(1))
    second.read()
    assert second.status(2).version == 1
