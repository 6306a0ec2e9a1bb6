"""Model, optimizers and tables saved and loaded together: training goes on as if it had never stopped, bit for bit."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful

import mempool
from mempool.checkpoint import looking
from mempool.checkpoint.stores import open_store
from mempool.errors import InvalidRequest, NotFound
from mempool.nn import MemoryLayer, PoolOptimizer, PoolState
from mempool.optim import SGD, Adagrad

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

TABLES = (
    mempool.TableConfig(name="facts", num_slots=81, value_dim=8, optimizer=Adagrad(0.1)),
    mempool.TableConfig(name="words", num_slots=64, value_dim=8, dtype="bfloat16", optimizer=SGD(0.1, momentum=0.9)),
)


class Dense(Stateful):
    """The part that torch's own helpers save: as its tutorial does it."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        optimizer = get_optimizer_state_dict(self.model, self.optimizer)
        return {"model": get_model_state_dict(self.model), "optimizer": optimizer}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        set_model_state_dict(self.model, state_dict["model"])
        set_optimizer_state_dict(self.model, self.optimizer, state_dict["optimizer"])


class Job:
    """A training job on a pool, from the start."""

    def __init__(self, pool: mempool.Pool, place: Path, *, seed: int = 5) -> None:
        self.pool = pool
        self.tables = [pool.create_table(config, exist_ok=True) for config in TABLES]
        torch.manual_seed(seed)
        layers = [MemoryLayer(8, table=table, heads=2, topk=3, key_dim=4) for table in self.tables]
        self.model = nn.Sequential(nn.Linear(8, 8), *layers)
        self.dense = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.memory = PoolOptimizer(self.model)
        self.state = PoolState(pool, place / "pool")
        self.parts = {"dense": Dense(self.model, self.dense), "memory": self.memory, "tables": self.state}

    def train(self, *steps: int) -> None:
        for step in steps:
            x = torch.randn(6, 8, generator=torch.Generator().manual_seed(step))
            self.dense.zero_grad()
            self.memory.zero_grad()
            self.model(x).square().mean().backward()
            self.dense.step()
            self.memory.step()

    def everything(self) -> dict[str, Tensor]:
        """All that training changed, by name."""
        found = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for number, state in self.dense.state_dict()["state"].items():
            found |= {f"dense.{number}.{name}": tensor for name, tensor in state.items()}
        for table in self.tables:
            ids = torch.arange(table.num_slots)
            found |= {f"{table.name}.values": table.rows(ids), f"{table.name}.steps": torch.tensor(table.step_count())}
            found |= {f"{table.name}.{name}": tensor for name, tensor in table.state(ids).items()}
        return {name: tensor.clone() for name, tensor in found.items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def names(place: Path) -> list[str]:
    return [str(each["name"]) for each in looking.checkpoints(open_store(str(place / "pool")))]


@pytest.fixture
def pool() -> Iterator[mempool.Pool]:
    with mempool.local(shards=2, device="cpu") as pool:
        yield pool


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    """Six steps without a stop."""
    with mempool.local(shards=2, device="cpu") as pool:
        job = Job(pool, Path("unused"))
        job.train(1, 2, 3, 4, 5, 6)
        return job.everything()


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
    with pytest.raises(InvalidRequest, match=r"is no state of a PoolState .* Nothing was changed"):
        PoolState(pool, tmp_path).load_state_dict(state)


def test_a_checkpoint_that_is_gone_is_named(pool: mempool.Pool, tmp_path: Path) -> None:
    job = Job(pool, tmp_path)
    job.train(1)
    state = job.state.state_dict()
    values = job.tables[0].rows(torch.arange(64))
    elsewhere = PoolState(pool, tmp_path / "elsewhere")
    with pytest.raises(NotFound, match=rf"{state['checkpoint']}.* taken at .*/pool; .* looks for it at .*/elsewhere"):
        elsewhere.load_state_dict(state)
    assert torch.equal(job.tables[0].rows([0, 1]), values)


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
    model, memory = job.model.state_dict(), job.memory.state_dict()
    job.train(3)
    job.model.load_state_dict(model)
    job.memory.load_state_dict(memory)
    pool.restore(tmp_path / "pool", replace=True)
    job.train(3)  # and warns of nothing
