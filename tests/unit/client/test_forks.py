"""A process that forks after it opened a pool, as a DataLoader with workers does: silent, safe, and clear."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]

_SCRIPT = """
import gc, torch, mempool
from tests.unit.client.grpc_pool import GrpcPoolHere
class Ids(torch.utils.data.Dataset):
    def __len__(self): return 4
    def __getitem__(self, index):
        gc.collect()
        if index == 3:
            try: table.rows(torch.tensor([index]))
            except mempool.errors.MempoolError as error: return str(error)
        return str(index)
here = GrpcPoolHere()
for name, pool in (
    ("remote", mempool.connect(here.address, timeout_s=60)),
    ("embedded", mempool.local(timeout_s=60)),
):
    with pool:
        table = pool.create_table(mempool.TableConfig(name="facts", num_slots=64, value_dim=8))
        before = table.gather(torch.tensor([[1, 2]]))
        for epoch in range(2):
            loader = torch.utils.data.DataLoader(
                Ids(), batch_size=None, num_workers=2, multiprocessing_context="fork"
            )
            said = list(loader)
        assert said[:3] == ["0", "1", "2"], said
        print(name, said[3])
        assert torch.equal(before, table.gather(torch.tensor([[1, 2]])))
"""


def test_workers_are_silent_and_the_pool_lives_on() -> None:
    done = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True, timeout=100, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "fork" not in done.stderr
    for name, said in zip(("remote", "embedded"), done.stdout.splitlines(), strict=True):
        assert said.startswith(name)
        assert "was forked from process" in said
        assert "Start processes by spawn" in said
