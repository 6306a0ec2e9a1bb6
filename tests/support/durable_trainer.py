"""A trainer with a pool of its own, kept on a disk: what it trains at step n is known, so that any life of it can be
compared with one that never died. As a program it trains until it is killed, and prints what was acknowledged.
"""

import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

import mempool
from mempool import optim
from mempool.client.training.tables import TableCommit, commit_tables, prepare_tables

T = TypeVar("T")
SLOTS, DIM, BAGS, PAIRS = 300, 24, 6, 5
CONFIGS = (
    mempool.TableConfig(name="sgd", num_slots=SLOTS, value_dim=DIM, optimizer=optim.SGD(lr=0.1)),
    mempool.TableConfig(
        name="momentum", num_slots=SLOTS, value_dim=DIM, dtype="bfloat16", optimizer=optim.SGD(lr=0.1, momentum=0.9)
    ),
    mempool.TableConfig(
        name="adagrad", num_slots=SLOTS, value_dim=DIM, dtype="int8", usage=True, optimizer=optim.Adagrad(lr=0.1)
    ),
    mempool.TableConfig(
        name="rowwise_adagrad",
        num_slots=SLOTS,
        value_dim=DIM,
        dtype="float8_e4m3fn",
        optimizer=optim.RowWiseAdagrad(lr=0.1),
        keys=mempool.FlatKeys(key_dim=8),
    ),
    mempool.TableConfig(name="adam", num_slots=SLOTS, value_dim=DIM, dtype="bfloat16", optimizer=optim.Adam(lr=0.01)),
    mempool.TableConfig(
        name="dense",
        num_slots=400,
        value_dim=DIM,
        dtype="bfloat16",
        master=True,
        usage=True,
        optimizer=optim.AdamW(lr=0.01, weight_decay=0.1, dense=True),
        keys=mempool.ProductKeys(heads=2, key_dim=8),
    ),
    mempool.TableConfig(name="rowwise_adam", num_slots=SLOTS, value_dim=DIM, optimizer=optim.RowWiseAdam(lr=0.01)),
)


def open_tables(pool: mempool.Pool, names: Iterable[str] = ()) -> list[mempool.Table]:
    """The tables, made where they are not there yet."""
    wanted = set(names) or {config.name for config in CONFIGS}
    made = {table.name for table in pool.tables()}
    return [
        pool.table(config.name) if config.name in made else pool.create_table(config, exist_ok=True)
        for config in CONFIGS
        if config.name in wanted
    ]


def once(call: Callable[[], T]) -> T:
    """A call that must not fail."""
    return call()


def train(
    tables: list[mempool.Table],
    step: int,
    *,
    on_written: Callable[[], None] = lambda: None,
    persist: Callable[[Callable[[], object]], object] = once,
) -> None:
    """Step ``step``, from 1: now and then of one table alone, with a norm asked for, or rows written before it.

    on_written: Called when they are, and when its count was set, before the step is committed: a killed process may
        have come that far.
    persist: Makes every call to the pool.
    """
    random = torch.Generator().manual_seed(step)
    every = tables
    tables = tables[step % len(tables) :][:1] if step % 4 == 0 else tables
    for table in tables:
        for _ in range(1 + step % 2):
            ids = torch.randint(0, table.num_slots, (BAGS, PAIRS), generator=random)
            weights = torch.rand(BAGS, PAIRS, generator=random)
            target = torch.randn(BAGS, DIM, generator=random)
            persist(partial(_push, table, ids, weights, target))
    if step % 5 == 1:
        ids = torch.arange(step % 7, step % 7 + 20)
        persist(partial(tables[-1].write, ids, torch.randn(20, DIM, generator=random)))
        on_written()
    if step % 3 == 0:
        persist(partial(prepare_tables, [table.link for table in tables], want_norm=True))
    if step == 9:
        persist(partial(tables[-1].set_step, 100))
        on_written()
    lr, scale = 0.01 * (1 + step % 3), 1.0 / (1 + step % 2)
    persist(partial(commit_tables, [TableCommit(table.link, lr=lr, grad_scale=scale) for table in tables]))
    for table in every:  # a dense optimizer's bits depend on when rows are read: here, whoever compares them
        persist(partial(table.rows, torch.arange(table.num_slots)))


def _push(table: mempool.Table, ids: Tensor, weights: Tensor, target: Tensor) -> None:
    (table.gather(ids, weights).float() * target).sum().backward()


def contents(tables: Iterable[mempool.Table]) -> dict[str, Tensor]:
    """All that tables hold, by table and array, and what their optimizers count."""
    found = {}
    for table in tables:
        ids = torch.arange(table.num_slots)
        found[f"{table.name}/values"] = table.rows(ids)
        found |= {f"{table.name}/{name}": rows for name, rows in table.state(ids).items()}
        if table.schema.usage:
            counts = table.usage(ids)
            found |= {f"{table.name}/uses": counts.uses, f"{table.name}/last use": counts.last_use}
        if table.schema.keys is not None:
            found[f"{table.name}/keys"] = table.read_keys()
        found[f"{table.name}/steps"] = torch.tensor(table.step_count())
    return found


def differences(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    """What is not the same bit for bit."""
    assert one.keys() == other.keys()
    return [name for name, rows in one.items() if not _same(rows, other[name])]


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(_bits(one), _bits(other))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).contiguous().view(torch.uint8)


def main(path: str, shards: int, first: int, last: int) -> None:
    """Train steps ``first`` to ``last``, and say when each is acknowledged."""
    pool = mempool.local(path, shards=shards)
    tables = open_tables(pool)
    print("ready", flush=True)
    for step in range(first, last + 1):
        train(tables, step)
        print(step, flush=True)
    sys.stdin.read()  # until it is killed


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
