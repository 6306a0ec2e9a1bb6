"""A DDP job under torchrun, which says nothing to the pool: where one of its ranks dies it trains as one process; and a
program that just ends."""

import subprocess
import sys
from pathlib import Path

import torch

import mempool
from tests.agreement import torchrun_rank
from tests.unit.client.grpc_pool import GrpcPoolHere

_BOUND_S = 150.0
_FIRST = """
import mempool

pool = mempool.connect({address!r})
pool.join("job", 0, 2)
pool.table("facts").commit()
"""


def test_two_ranks_of_which_one_dies_train_what_one_process_trains(tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    (tmp_path / "one").mkdir()
    here = GrpcPoolHere(shards=2)
    try:
        command = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
        script = ["--monitor-interval=0.1", "-m", "tests.agreement.torchrun_rank", here.address, str(tmp_path / "two")]
        done = subprocess.run(
            [sys.executable, "-m", *command, *script], capture_output=True, text=True, timeout=_BOUND_S, check=False
        )
        assert done.returncode == 0, done.stderr[-4000:]
        with mempool.connect(here.address) as pool:
            table = pool.table("facts")
            assert table.link.version() == torchrun_rank.STEPS
            trained = table.rows(range(table.num_slots))
    finally:
        here.close()
    with mempool.local() as alone:
        expected = alone.create_table(torchrun_rank.CONFIG)
        model = torchrun_rank.train(expected, tmp_path / "one")
        rows = expected.rows(range(expected.num_slots))
    assert (trained - rows).norm() <= 1e-5 * rows.norm()
    dense = torch.load(tmp_path / "two" / "state.pt")["model"]
    for name, parameter in model.state_dict().items():
        assert torch.allclose(dense[name], parameter, rtol=1e-4, atol=1e-6), name


def test_a_program_that_ends_with_its_last_step_has_told_the_others_of_it() -> None:
    here = GrpcPoolHere(shards=2, lease_s=2.0)
    try:
        with mempool.connect(here.address) as pool:
            table = pool.create_table(torchrun_rank.CONFIG)
            first = subprocess.Popen([sys.executable, "-c", _FIRST.format(address=here.address)])
            try:
                pool.join("job", 1, 2)
                table.gather(torch.zeros(1, 1, dtype=torch.int64)).sum().backward()
                assert table.commit() == 1
                assert first.wait(_BOUND_S) == 0
            finally:
                first.kill()
    finally:
        here.close()
