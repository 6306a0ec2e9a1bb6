"""The folder of an embedded pool of known contents, as it is kept in tests/golden for each version of the format.

python -m tests.support.golden_pool tests/golden/pool-1        # once, when a version is new

It is that of a process that was killed: of its shards each has a snapshot, and records of every kind behind it that is
written while tables are trained, moved and checkpointed. Beside it lies what its tables hold.
"""

import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import mempool
from mempool import optim
from mempool.shard.durable.store import Store
from tests.support.durable_trainer import contents
from tests.support.killed_copies import left_by_a_kill

GOLDEN = Path(__file__).parents[1] / "golden"
CONTENTS = "contents.safetensors"
STEPS, SLOTS, DIM = 30, 60, 8
CONFIGS = (
    mempool.TableConfig(
        name="facts",
        num_slots=SLOTS,
        value_dim=DIM,
        block_dim=4,
        page_slots=8,
        dtype="bfloat16",
        optimizer=optim.Adam(lr=0.01),
    ),
    mempool.TableConfig(
        name="dense",
        num_slots=49,
        value_dim=DIM,
        page_slots=8,
        dtype="bfloat16",
        master=True,
        optimizer=optim.AdamW(lr=0.01, weight_decay=0.1, dense=True),
        keys=mempool.ProductKeys(heads=2, key_dim=4),
    ),
    mempool.TableConfig(
        name="coded", num_slots=SLOTS, value_dim=DIM, page_slots=8, dtype="int8", optimizer=optim.Adagrad(lr=0.1)
    ),
)


def train(tables: list[mempool.Table], step: int, *, commit: bool = True) -> None:
    """One step; without its end its updates are held."""
    random = torch.Generator().manual_seed(step)
    for table in tables:
        ids = torch.randint(0, table.num_slots, (3, 4), generator=random)
        target = torch.randn(3, DIM, generator=random)
        (table.gather(ids, torch.rand(3, 4, generator=random)).float() * target).sum().backward()
    if step % 7 == 0:
        tables[0].write(torch.arange(5), torch.randn(5, DIM, generator=random))
    for table in tables if commit else ():
        table.commit()


def tables_of(pool: mempool.Pool) -> list[mempool.Table]:
    """The tables, in their order."""
    return [pool.table(config.name) for config in CONFIGS]


def write(path: Path) -> dict[str, Tensor]:
    """Make the folder; answers what the tables hold."""
    Store.__init__.__kwdefaults__["journal_limit"] = 2**17
    with tempfile.TemporaryDirectory() as live, mempool.local(live, shards=1) as pool:
        tables = [pool.create_table(config) for config in CONFIGS]
        for step in range(1, STEPS + 1):
            train(tables, step)
            if step == 5:
                pool.rescale(2)
            if step == 9:
                pool.checkpoint(Path(live, "checkpoints"))
            if step == 11:
                pool.restore(Path(live, "checkpoints"), tables=["facts"], name="restored")
            if step == 20:
                large = torch.zeros(SLOTS, DIM)
                for _ in range(40):  # so that the journal is half full
                    tables[2].write(torch.arange(SLOTS), large)
            if step == 25:
                pool.drop_table("restored")
        train(tables, STEPS + 1, commit=False)
        found = contents(tables)
        left_by_a_kill(Path(live, "local"), path / "local")
    save_file(found, path / CONTENTS)
    return found


if __name__ == "__main__":
    write(Path(sys.argv[1]))
