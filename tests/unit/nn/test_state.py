"""Model, optimizers and tables saved and loaded together: training goes on as if it had never stopped, bit for bit."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.stateful import Stateful

import mempool
from mempool.checkpoint import looking
from mempool.checkpoint.stores import open_store
from mempool.errors import AlreadyExists, InvalidRequest, NotFound
from mempool.nn import PoolState

from .job import Job, same, undisturbed

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def names(place: Path) -> list[str]:
    return [str(each["name"]) for each in looking.checkpoints(open_store(str(place / "pool")))]


@pytest.fixture
def pool() -> Iterator[mempool.Pool]:
    with mempool.local(shards=2, device="cpu") as pool:
        yield pool


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return undisturbed()


def test_a_job_goes_back_to_the_step_it_saved(pool: mempool.Pool, tmp_path: Path, expected: dict[str, Tensor]) -> None:
    job = Job(pool, tmp_path)
    assert isinstance(job.state, Stateful)
    job.train(1, 2, 3)
    dcp.save(job.parts, checkpoint_id=tmp_path / "model")
    job.train(7, 8, 9)  # other examples: at version 6 the tables are others than those of the undisturbed run
    tables = list(job.tables)
    dcp.load(job.parts, checkpoint_id=tmp_path / "model")
    assert len(names(tmp_path)) == 1, "to load is not to save"
    assert [pool.table(table.name) for table in tables] == tables, "those that the layers use are the restored ones"
    job.train(4, 5, 6)
    same(job.everything(), expected)


def test_a_job_goes_on_in_another_pool(pool: mempool.Pool, tmp_path: Path, expected: dict[str, Tensor]) -> None:
    first = Job(pool, tmp_path)
    first.train(1, 2, 3)
    dcp.save(first.parts, checkpoint_id=tmp_path / "model")
    with mempool.local(shards=2, device="cpu") as other:
        second = Job(other, tmp_path, seed=6)
        second.train(9)
        dcp.load(second.parts, checkpoint_id=tmp_path / "model")
        second.train(4, 5, 6)
        same(second.everything(), expected)


def test_what_it_answers_is_small_and_plain(pool: mempool.Pool, tmp_path: Path) -> None:
    job = Job(pool, tmp_path)
    job.train(1, 2)
    state = PoolState(pool, tmp_path / "pool", tables=[job.tables[0]]).state_dict()
    assert state["place"] == str(tmp_path / "pool")
    assert [state["checkpoint"]] == names(tmp_path)
    assert json.loads(state["tables"]) == {"facts": 2}
    torch.save(state, tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt") == state
    words = job.tables[1].rows(torch.arange(64))
    job.train(3)
    PoolState(pool, tmp_path / "pool").load_state_dict(state)
    assert job.tables[0].step_count() == 2
    assert job.tables[1].step_count() == 3, "a table that the state does not name stays"
    assert not torch.equal(job.tables[1].rows(torch.arange(64)), words)


def test_the_first_save_of_a_job_removes_nothing_and_later_ones_keep_so_many(
    pool: mempool.Pool, tmp_path: Path
) -> None:
    Job(pool, tmp_path)
    for _ in range(3):
        pool.checkpoint(tmp_path / "pool")
    state = PoolState(pool, tmp_path / "pool", keep=2)
    state.state_dict()
    assert len(names(tmp_path)) == 4, "the model may be beside any of them: of this one it is not written yet"
    newest = state.state_dict()["checkpoint"]
    assert len(names(tmp_path)) == 2
    assert newest in names(tmp_path)
    with pytest.raises(InvalidRequest, match="keep=1: a PoolState keeps 2"):
        PoolState(pool, tmp_path / "pool", keep=1)
    with pytest.raises(InvalidRequest, match="name at least one table"):
        PoolState(pool, tmp_path / "pool", tables=[])


@pytest.mark.parametrize(
    "state", [{}, {"place": "", "checkpoint": "", "tables": ""}, {"place": "p", "checkpoint": "c", "tables": "{"}]
)
def test_no_state_is_refused(pool: mempool.Pool, tmp_path: Path, state: dict[str, str]) -> None:
    with pytest.raises(InvalidRequest, match=r"is no state of a PoolState, .* Nothing was changed"):
        PoolState(pool, tmp_path).load_state_dict(state)


def test_a_checkpoint_that_is_gone_is_named(pool: mempool.Pool, tmp_path: Path) -> None:
    job = Job(pool, tmp_path)
    job.train(1)
    state = job.state.state_dict()
    values = job.tables[0].rows(torch.arange(64))
    elsewhere = PoolState(pool, tmp_path / "elsewhere")
    with pytest.raises(NotFound, match=rf"{state['checkpoint']}.* taken at .*/pool; .* looks for it at .*/elsewhere"):
        elsewhere.load_state_dict(state)
    assert torch.equal(job.tables[0].rows(torch.arange(64)), values)


def test_a_model_beside_a_table_of_another_step_is_told_of(tmp_path: Path) -> None:
    with mempool.local(tmp_path / "memory", device="cpu") as pool:
        job = Job(pool, tmp_path)
        job.train(1, 2)
        torch.save(job.model.state_dict(), tmp_path / "model.pt")
        job.train(3)
    with mempool.local(tmp_path / "memory", device="cpu") as pool:
        job = Job(pool, tmp_path)
        job.model.load_state_dict(torch.load(tmp_path / "model.pt"))
        told = r"table 'facts' is at version 3, and the state of a model .* version 2: .*pool\.restore\(place"
        with pytest.warns(UserWarning, match=told), torch.no_grad():
            job.model[1](torch.randn(2, 8))
        job.model[1](torch.randn(2, 8))  # it is told once
        state = job.model.state_dict()
        job.model.load_state_dict(state)  # of this step: nothing is to be told
        job.train(4)


def test_a_table_that_is_restored_after_the_model_is_of_its_step(pool: mempool.Pool, tmp_path: Path) -> None:
    job = Job(pool, tmp_path)
    job.train(1, 2)
    pool.checkpoint(tmp_path / "pool")
    model, memory = copy.deepcopy(job.model.state_dict()), job.memory.state_dict()
    job.train(3)
    job.model.load_state_dict(model)
    job.memory.load_state_dict(memory)
    pool.restore(tmp_path / "pool", replace=True)
    job.train(3)  # and warns of nothing
    job.model.load_state_dict(model)
    with pytest.warns(UserWarning, match="version 3, and .* of a model that was loaded was saved beside version 2"):
        job.model(torch.randn(2, 8))


def test_a_table_that_was_dropped_before_makes_room_for_the_restored_one(
    pool: mempool.Pool, tmp_path: Path, expected: dict[str, Tensor]
) -> None:
    job = Job(pool, tmp_path)
    job.train(1, 2, 3)
    dcp.save(job.parts, checkpoint_id=tmp_path / "model")
    for table in job.tables:
        pool.drop_table(table.name)
    dcp.load(job.parts, checkpoint_id=tmp_path / "model")
    assert [pool.table(table.name) for table in job.tables] == job.tables
    job.train(4, 5, 6)
    same(job.everything(), expected)


def test_a_table_of_another_kind_takes_nobody_along(pool: mempool.Pool, tmp_path: Path) -> None:
    pool.create_table(mempool.TableConfig(name="facts", num_slots=81, value_dim=4))
    pool.checkpoint(tmp_path)
    pool.drop_table("facts")
    wide = pool.create_table(mempool.TableConfig(name="facts", num_slots=81, value_dim=8))
    with pytest.raises(AlreadyExists, match="value_dim is 8, not 4"):
        pool.restore(tmp_path, replace=True)
    pool.drop_table("facts")
    (narrow,) = pool.restore(tmp_path)
    assert narrow is not wide
    assert (narrow.value_dim, wide.value_dim) == (4, 8)
    with pytest.raises(NotFound, match=r"pool\.table\('facts'\)"):
        wide.rows([0])


def test_a_state_that_is_no_copy_is_of_no_version(pool: mempool.Pool, tmp_path: Path) -> None:
    job = Job(pool, tmp_path)
    job.train(1)
    state = job.model.state_dict()  # as torch's loaders take one, and write to its tensors
    job.train(2)
    job.model.load_state_dict(state)
    job.train(3)  # and warns of nothing
