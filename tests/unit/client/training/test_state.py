"""Optimizer state and step count through a table: read, written back to the bit, refused in words."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

import mempool
from mempool.client import Pool, Table
from mempool.errors import InvalidRequest, StepConflict
from mempool.optim import SGD, Adagrad, Adam, AdamW, RowWiseAdagrad, RowWiseAdam
from mempool.types import CommitPart, CommitRequest, PreparePart, PrepareRequest, StepId
from tests.support.faulty import ROWS, FaultyPool
from tests.unit.client.routing.test_router import make_router

IDS = torch.tensor([99, 0, 17, 64])

TABLES: dict[str, dict[str, object]] = {
    "sgd": {"optimizer": SGD(0.1)},
    "momentum": {"optimizer": SGD(0.1, momentum=0.9, dampening=0.5)},
    "adagrad": {"optimizer": Adagrad(0.1)},
    "rowwise_adagrad": {"optimizer": RowWiseAdagrad(0.1)},
    "adam": {"optimizer": Adam(0.1), "dtype": "bfloat16", "master": True},
    "dense adamw": {"optimizer": AdamW(0.1, dense=True)},
    "rowwise_adam": {"optimizer": RowWiseAdam(0.1, rowwise="row"), "dtype": "int8"},
}


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with mempool.local(shards=3, device="cpu") as pool:
        yield pool


@pytest.fixture
def make(pool: Pool):  # type: ignore[no-untyped-def]
    made: list[Table] = []

    def table(**config: object) -> Table:
        plain = {"name": f"t{len(made)}", "num_slots": 100, "value_dim": 20, "page_slots": 16, "layout": "rows"}
        made.append(pool.create_table(mempool.TableConfig(**plain | config)))  # type: ignore[arg-type]
        return made[-1]

    yield table
    for one in made:
        pool.drop_table(one.name)


def train(table: Table, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        ids = torch.randint(0, table.num_slots, (8, 6), generator=generator)
        grads = torch.randn(8, table.value_dim, generator=generator)
        (table.gather(ids) * grads).sum().backward()
        table.commit()


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("layout", ["rows", "auto"])
def test_what_is_read_is_written_back_to_the_bit_and_training_goes_on_from_it(make, kind: str, layout: str) -> None:  # type: ignore[no-untyped-def]
    """Of values in one byte, the stored ones themselves are rounded again when they are written."""
    config = TABLES[kind] | (
        {"layout": "auto", "block_dim": 8} if layout == "auto" and "int8" not in str(TABLES[kind]) else {}
    )
    first, second = make(**config), make(**config)
    everything = torch.arange(100)
    train(first, 3)
    state = first.state(everything)
    second.write(everything, first.rows(everything))
    second.write_state(everything, state)
    second.set_step(first.step_count())
    again = second.state(everything)
    assert list(state) == list(again)
    assert all(torch.equal(again[name].view(torch.int32), state[name].view(torch.int32)) for name in state)
    assert second.step_count() == 3
    train(first, 2, seed=1)
    train(second, 2, seed=1)
    assert first.step_count() == second.step_count() == 5
    if "int8" not in str(TABLES[kind]):
        assert torch.equal(first.rows(everything), second.rows(everything))
        assert all(map(torch.equal, first.state(everything).values(), second.state(everything).values()))


def test_names_say_whose_state_it_is(make) -> None:  # type: ignore[no-untyped-def]
    shapes = {
        "sgd": {},
        "momentum": {"values.momentum_buffer": (4, 20)},
        "rowwise_adagrad": {"values.row_sum": (4, 1)},
        "adam": {"values.master": (4, 20), "values.exp_avg": (4, 20), "values.exp_avg_sq": (4, 20)},
        "rowwise_adam": {"values.exp_avg": (4, 20), "values.row_exp_avg_sq": (4, 1)},
    }
    for kind, expected in shapes.items():
        table = make(**TABLES[kind])
        assert {name: tuple(state.shape) for name, state in table.state(IDS).items()} == expected
    scales = table.state(IDS, ["values.scales"])["values.scales"]
    assert (scales.shape, scales.dtype) == ((4, 1), torch.float32)
    assert make(**TABLES["dense adamw"]).state(IDS, ["values.last_step"])["values.last_step"].tolist() == [[0]] * 4


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"sum": torch.ones(4, 20)}, "no state 'sum' here; it has values.sum"),
        ({"values.exp_avg": torch.ones(4, 20)}, "no state 'values.exp_avg' here; it has values.sum"),
        ({"values": torch.ones(4, 20)}, "no state 'values' here"),
        ({"values.sum": torch.ones(4, 19)}, r"values\.sum has shape \[4, 19\], must be \[4, 20\]"),
        ({"values.sum": torch.ones(3, 20)}, r"has shape \[3, 20\], must be \[4, 20\]"),
        ({"values.sum": torch.ones(4, 20, dtype=torch.int64)}, "must be a floating torch.Tensor, not torch.int64"),
        ({"values.sum": [1.0]}, "must be a floating torch.Tensor, not list"),
        ([torch.ones(4, 20)], "state must be a dict of name and tensor, not list; its names are values.sum"),
    ],
)
def test_wrong_state_is_refused_and_changes_nothing(make, state: object, message: str) -> None:  # type: ignore[no-untyped-def]
    table = make()
    train(table, 1)
    before = table.state(IDS)["values.sum"]
    with pytest.raises(InvalidRequest, match=message):
        table.write_state(IDS, state)
    good = {"values.sum": torch.ones(4, 20)}
    if isinstance(state, dict):
        with pytest.raises(InvalidRequest, match=message):
            table.write_state(IDS, good | state)
    with pytest.raises(InvalidRequest, match="must be distinct"):
        table.write_state(torch.tensor([1, 1, 2, 3]), good)
    assert torch.equal(table.state(IDS)["values.sum"], before)


def test_wrong_names_and_steps_are_refused(make) -> None:  # type: ignore[no-untyped-def]
    table = make()
    with pytest.raises(InvalidRequest, match=r"no state 'values\.scales' here; it has values\.sum"):
        table.state(IDS, ["values.scales"])
    with pytest.raises(InvalidRequest, match=r"give a list of names, \['values\.sum'\]"):
        table.state(IDS, "values.sum")
    for step in (-1, 1.0, True, "3", None, 2**60):
        with pytest.raises(InvalidRequest, match="must be the number of steps that are done"):
            table.set_step(step)
    assert table.step_count() == 0


def test_the_step_is_every_owners_also_of_those_that_come_later(make) -> None:  # type: ignore[no-untyped-def]
    """Before any commit too, where a new owner's version is no lower than the old ones'."""
    table = make()
    table.set_step(7)
    with mempool.local(shards=1, device="cpu") as other:
        moved = other.create_table(mempool.TableConfig(name="m", num_slots=100, value_dim=20, page_slots=16))
        moved.set_step(7)
        other.rescale(shards=3)
        assert moved.step_count() == 7
        train(moved, 1)
        other.rescale(shards=2)
        assert moved.step_count() == 8
    train(table, 1)
    assert table.step_count() == 8
    table.set_step(0)
    assert table.step_count() == 0


def test_a_commit_that_one_owner_has_is_every_owners_before_steps_are_counted(wait) -> None:  # type: ignore[no-untyped-def]
    """Owners at different versions: one has got a commit that the others have not heard of."""
    pool = FaultyPool(ROWS)

    async def main() -> None:
        router = make_router(pool)
        assert await router.step_count(1, to=5) == 5
        first = pool.shards[0]
        envelope, *others = (shard.requests("step_count")[0].envelope for shard in pool.shards)
        step_id = StepId(group="g", rank=0, step=1)
        part = CommitPart(envelope=envelope, step_id=step_id, lr=1.0, grad_scale=1.0, sequences=())
        prepare = PreparePart(envelope=envelope, step_id=step_id, sequences=())
        await first.prepare(PrepareRequest(parts=(prepare,), want_norm=False, decider_table=1, decider_step=1))
        reply = await first.commit(CommitRequest(parts=(part,)))
        assert reply.parts[0].version == 1
        with pytest.raises(StepConflict, match=r"owners of table 'facts' are at versions 0 to 1 .* 5 to 6 steps"):
            await router.step_count(1)
        # Now that it knows of the version, nobody answers before it: whoever has prepared the step asks for it.
        for shard, other in zip(pool.shards[1:], others, strict=True):
            part_there = replace(prepare, envelope=other)
            request = PrepareRequest(parts=(part_there,), want_norm=False, decider_table=1, decider_step=1)
            await shard.prepare(request)
        assert await router.step_count(1) == 6
        assert await router.step_count(1, to=9) == 9

    wait(main())
