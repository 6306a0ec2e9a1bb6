"""New pages: what they hold, in steps of bounded work, however many blocks a table has."""

from typing import Any

import numpy as np
import pytest
import torch

from mempool import kernels
from mempool.shard.pages import filling
from mempool.shard.pages.storage import Storage
from mempool.types import FlatKeySpec, OptimizerSpec, ProductKeySpec, TableSchema
from tests.contract.driver import make_schema

from .whole_tables import CPU, contents, make_table, placement_of, same_bits

DENSE = OptimizerSpec(algorithm="adamw", lr=0.1, dense=True)
ADAGRAD = OptimizerSpec(algorithm="adagrad", lr=0.1, initial_accumulator_value=0.25)
SCHEMAS = {
    "float32": make_schema(optimizer=ADAGRAD, keys=FlatKeySpec(key_dim=5)),
    "bfloat16 and master": make_schema(dtype="bfloat16", master=True, optimizer=ADAGRAD),
    "int8": make_schema(dtype="int8", optimizer=OptimizerSpec(algorithm="rowwise_adagrad", lr=0.1)),
    "dense": make_schema(optimizer=DENSE),
    "heads": make_schema(num_slots=49, keys=ProductKeySpec(heads=3, key_dim=6)),
}


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
@pytest.mark.parametrize("owners", ["one", "mixed"])
def test_pieces_change_no_bit(schema: TableSchema, owners: str, monkeypatch: pytest.MonkeyPatch) -> None:
    key_owners = [0, 1, 0][: schema.num_key_pages]
    whole = contents(make_table(schema, owners, key_owners=key_owners))
    for piece in (1, 40, 1_000):
        monkeypatch.setattr(filling, "_PIECE_BYTES", piece)
        assert same_bits(contents(make_table(schema, owners, key_owners=key_owners)), whole)


def test_values_are_those_of_the_generator_and_state_is_its_initial_one() -> None:
    table = make_table(SCHEMAS["float32"])
    expected = kernels.initial_values(7, 0, 50, 0, 10, 0.5)
    assert torch.equal(table.read("values", torch.arange(50)), expected)
    assert torch.equal(table.read("values.sum", torch.arange(50)), torch.full((50, 10), 0.25))
    (lane,) = table.lanes
    assert not lane.arena.rows("values")[50:].any()  # slots of the last page that do not exist


def test_rows_of_a_dense_optimizer_begin_at_the_tables_version() -> None:
    table = Storage(SCHEMAS["dense"], shard=0, device=CPU, version=5)
    for _ in table.initialise(placement_of("one")):
        pass
    assert torch.equal(table.read("values.last_step", torch.arange(50)), torch.full((50, 3), 5, dtype=torch.int32))


@pytest.mark.parametrize("what", ["wide", "many", "heads"])
def test_no_piece_is_larger_than_a_bound(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where one row, or one head's keys, is more than a piece."""
    schema = {
        "wide": make_schema(value_dim=40_000, block_dim=10_000, num_slots=12, optimizer=DENSE),
        "many": make_schema(num_slots=20_000, page_slots=2_048),
        "heads": make_schema(num_slots=200**2, value_dim=4, page_slots=4_096, keys=ProductKeySpec(heads=2, key_dim=64)),
    }[what]
    monkeypatch.setattr(filling, "_PIECE_BYTES", 64 * 2**10)
    monkeypatch.setattr(filling, "_STEP_BYTES", 0)
    drawn: list[int] = []
    real = kernels.initial_values

    def initial_values(*args: Any) -> torch.Tensor:
        found = real(*args)
        drawn[-1] += found.nbytes
        return found

    monkeypatch.setattr(kernels, "initial_values", initial_values)
    table = Storage(schema, shard=0, device=CPU)
    owners = [[0] * schema.num_blocks] * schema.num_row_pages
    drawn.append(0)
    written = 0
    for num_bytes in table.initialise(placement_of(owners, key_owners=[0] * schema.num_key_pages)):
        written += num_bytes
        drawn.append(0)
    assert 0.7 * table.num_bytes <= written + 128 * 2**10  # slots that do not exist cost nothing
    assert len(drawn) > 4
    assert max(drawn) <= 2 * 64 * 2**10
    assert sum(drawn) >= 4 * schema.num_slots * schema.value_dim


def _draws(num_blocks: int, monkeypatch: pytest.MonkeyPatch, *, every: int = 1) -> int:
    schema = make_schema(num_slots=16, page_slots=8, value_dim=num_blocks, block_dim=1)
    owners = [[0 if block % every == 0 else 1 for block in range(num_blocks)]] * 2
    calls = 0
    real = filling.initial_columns

    def initial_columns(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(filling, "initial_columns", initial_columns)
        table = make_table(schema, owners)
    ids = torch.arange(16)
    columns = np.arange(0, num_blocks, every)
    expected = kernels.initial_values(7, 0, 16, 0, num_blocks, 0.5)
    assert torch.equal(table.read("values", ids), expected[:, torch.from_numpy(columns)])
    return calls


def test_work_is_linear_in_the_column_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that are neighbours are filled together; others cost one draw each."""
    assert _draws(2**12, monkeypatch) == _draws(2**16, monkeypatch)
    assert _draws(2**10, monkeypatch, every=2) == 2 * _draws(2**9, monkeypatch, every=2)
    assert _draws(2**13, monkeypatch, every=2) == 16 * _draws(2**9, monkeypatch, every=2)
