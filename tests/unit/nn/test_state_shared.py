"""A pool that several clients share: one restores a table, the others go on with it; ranks save and load together."""

import copy
import multiprocessing
from collections.abc import Iterator
from contextlib import AsyncExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

import mempool
from mempool.errors import InvalidRequest, MempoolError, NotFound
from mempool.nn import PoolState
from mempool.wire.channels import loop
from tests.support.serving import served_pool

from .job import Job, same, undisturbed

pytestmark = pytest.mark.filterwarnings("ignore:.*process group of .* ranks:UserWarning")

BOUND_S = 90.0
ADAM = ("step", "exp_avg", "exp_avg_sq")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    stack = AsyncExitStack()
    served = loop.run(stack.enter_async_context(served_pool(2)), timeout_s=BOUND_S)
    yield served.address
    loop.run(stack.aclose(), timeout_s=BOUND_S)


def test_another_client_goes_on_with_a_table_that_was_replaced(address: str, tmp_path: Path) -> None:
    with mempool.connect(address) as one, mempool.connect(address) as two:
        job = Job(two, tmp_path)
        job.train(1, 2)
        one.checkpoint(tmp_path / "pool")
        model = copy.deepcopy(job.model.state_dict())
        facts = job.tables[0]
        then = facts.rows([0, 1, 2])
        lookup = facts.gather(torch.tensor([[0, 1]]))
        facts.gather(torch.tensor([[0, 1]])).sum().backward()
        assert facts.pending == 1
        one.restore(tmp_path / "pool", tables=["facts"], replace=True)
        with pytest.raises(NotFound, match=r"made again .*pool\.reopen\('facts'\)"):
            facts.rows([0])
        assert two.reopen("facts") is facts
        assert two.table("facts") is facts
        assert two.reopen("facts") is facts, "which it is already"
        assert facts.pending == 0, "it was of values that are gone"
        assert facts.counters.updates_discarded == 1
        with pytest.raises(InvalidRequest, match="before table 'facts' was restored or made again"):
            lookup.sum().backward()
        assert torch.equal(facts.rows([0, 1, 2]), then)
        job.train(3)
        assert facts.step_count() == 3
        assert facts.counters.steps_committed == 3, "this client's, of both"
        job.model.load_state_dict(model)
        with pytest.warns(UserWarning, match="'facts' is at version 3, and the state of a model .* version 2: "):
            job.model[1](torch.randn(2, 8))
        one.drop_table("facts")
        one.create_table(mempool.TableConfig(name="facts", num_slots=81, value_dim=4))
        with pytest.raises(InvalidRequest, match=r"another kind of table now \(value_dim 8 before, 4 now.*pool.table"):
            two.reopen("facts")
        one.drop_table("facts")
        one.drop_table("words")
        with pytest.raises(NotFound):
            two.reopen("facts")


def test_who_opened_a_replaced_table_anew_has_those_before_follow_it(address: str, tmp_path: Path) -> None:
    with mempool.connect(address) as one, mempool.connect(address) as two:
        one.create_table(mempool.TableConfig(name="again", num_slots=16, value_dim=8))
        first = two.table("again")
        one.checkpoint(tmp_path / "pool")
        one.restore(tmp_path / "pool", tables=["again"], replace=True)
        fresh = two.table("again")
        assert fresh is not first
        assert two.reopen("again") is first
        assert torch.equal(first.rows([3]), fresh.rows([3]))
        for number in (1, 2):
            for table in (first, fresh):
                table.gather(torch.tensor([[0, 1]])).sum().backward()
            assert fresh.commit(lr=0.1) == 2, "they are of one session"
            assert first.step_count() == 1
            assert fresh.counters.steps_committed == first.counters.steps_committed == number
            one.restore(tmp_path / "pool", tables=["again"], replace=True)
            two.reopen("again")
        one.drop_table("again")


def be_rank(rank: int, address: str, folder: Path) -> dict[str, Any]:
    """One of two ranks: the same model on both, the tables trained by the first. Saves, goes astray, loads, goes on."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=BOUND_S),
    )
    try:
        with mempool.connect(address) as pool:
            if rank == 1:
                dist.barrier()  # until the first has made the tables
            job = Job(pool, folder)
            if rank == 0:
                dist.barrier()
            for table in job.tables:
                table.requires_grad_(rank == 0)
            dist.barrier()
            job.train(1, 2, 3, together=dist.barrier)
            dcp.save(job.parts, checkpoint_id=folder / "model")
            job.train(7, 8, together=dist.barrier)
            dcp.load(job.parts, checkpoint_id=folder / "model")
            job.train(4, 5, 6, together=dist.barrier)
            with pytest.raises(MempoolError, match="/proc"):  # on both ranks, of which one has asked
                PoolState(pool, "/proc/nobody/may/write").state_dict()
            with mempool.local(device="cpu") as own, pytest.raises(InvalidRequest, match="there are 2 ranks"):
                PoolState(own, folder).state_dict()
            everything = job.everything()
            dist.barrier()
            return everything
    finally:
        dist.destroy_process_group()


def be_second(address: str, folder: Path, answers: "multiprocessing.Queue[dict[str, Any]]") -> None:
    torch.set_num_threads(1)
    answers.put({name: tensor.float().numpy() for name, tensor in be_rank(1, address, folder).items()})


def test_two_ranks_save_and_load_one_pool(address: str, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    second = context.Process(target=be_second, args=(address, tmp_path, answers))
    second.start()
    try:
        first = be_rank(0, address, tmp_path)
        theirs = answers.get(timeout=BOUND_S)
        second.join(BOUND_S)
        assert second.exitcode == 0
    finally:
        second.kill()
    expected = undisturbed()
    same(first, expected)
    assert set(expected) - set(theirs) == {f"dense.{of}.{what}" for of in (3, 11) for what in ADAM}, (
        "of `values`, there"
    )
    same({name: torch.from_numpy(array) for name, array in theirs.items()}, {n: expected[n].float() for n in theirs})
    assert len(list((tmp_path / "pool").iterdir())) == 1, "one checkpoint of the pool for both"
