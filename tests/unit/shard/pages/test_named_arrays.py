import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mempool.shard.pages.named_arrays import (
    Blocks,
    half_keys,
    head_keys_shape,
    initial_columns,
    initial_head_keys,
    named_arrays,
)
from mempool.types import FlatKeySpec, OptimizerSpec, ProductKeySpec
from tests.contract.driver import make_schema

SCHEMA = make_schema(
    optimizer=OptimizerSpec(algorithm="rowwise_adagrad", lr=0.1), keys=FlatKeySpec(key_dim=6), value_dim=30
)
ARRAYS = {array.name: array for array in named_arrays(SCHEMA)}
BLOCKS = st.sets(st.integers(0, SCHEMA.num_blocks - 1)).map(lambda blocks: tuple(sorted(blocks)))


def _columns(name: str, blocks: Blocks) -> list[object]:
    """What each column of a row of these blocks is."""
    if name == "values.row_sum":
        return [("block", block) for block in blocks]
    if name == "keys":
        return [("key", column) for column in range(6)] if 0 in blocks else []
    return list(itertools.chain.from_iterable(range(*SCHEMA.block_columns(block)) for block in blocks))


@pytest.mark.parametrize("name", sorted(ARRAYS))
@given(among=BLOCKS, other=BLOCKS, part=BLOCKS)
def test_columns_of_blocks_are_found_in_rows_of_others(name: str, among: Blocks, other: Blocks, part: Blocks) -> None:
    array = ARRAYS[name]
    blocks = tuple(block for block in part if block in among and block in other)
    row, source = _columns(name, among), _columns(name, other)
    assert array.width(among) == len(row)
    assert [row[place] for place in array.places(blocks, among)] == _columns(name, blocks)
    copied: list[object] = [None] * len(row)
    for to, out_of in array.copies(blocks, into=among, out_of=other):
        assert to.stop - to.start == out_of.stop - out_of.start > 0
        copied[to] = source[out_of]
    wanted = _columns(name, blocks)
    assert copied == [column if column in wanted else None for column in row]


def test_neighbours_are_copied_together() -> None:
    values = ARRAYS["values"]
    every = tuple(range(SCHEMA.num_blocks))
    assert len(values.copies(every, into=every, out_of=every)) == 1
    assert len(values.copies((1, 2, 5), into=every, out_of=(1, 2, 5))) == 2
    wide = make_schema(value_dim=2**17, block_dim=1)
    (array,) = (array for array in named_arrays(wide) if array.name == "values")
    every = tuple(range(2**17))
    assert array.copies(every, into=every, out_of=every) == [(slice(0, 2**17), slice(0, 2**17))]


@given(BLOCKS)
def test_width_counts_the_last_block_as_narrow_as_it_is(blocks: Blocks) -> None:
    assert SCHEMA.width(blocks) == sum(stop - start for start, stop in map(SCHEMA.block_columns, blocks))


@pytest.mark.parametrize("name", ["values", "keys"])
def test_initial_columns_do_not_depend_on_how_they_are_cut(name: str) -> None:
    array = ARRAYS[name]
    whole = initial_columns(array, range(50), 0, 6)
    assert whole.std() > 0.1
    parts = [[initial_columns(array, range(a, b), c, d) for c, d in ((0, 1), (1, 6))] for a, b in ((0, 17), (17, 50))]
    assert torch.equal(torch.cat([torch.cat(row, 1) for row in parts]), whole)
    assert not torch.equal(whole, initial_columns(ARRAYS["keys" if name == "values" else "values"], range(50), 0, 6))


def test_head_keys_differ_and_depend_on_the_seed() -> None:
    schema = make_schema(num_slots=49, keys=ProductKeySpec(heads=3, key_dim=8))
    assert half_keys(schema) == 7
    assert head_keys_shape(schema) == (2, 7, 4)
    heads = [initial_head_keys(schema, head, range(14)) for head in range(3)]
    assert all(keys.shape == (14, 4) for keys in heads)
    assert len(torch.stack(heads).unique()) == 3 * 14 * 4
    assert torch.equal(initial_head_keys(schema, 1, range(3, 9)), heads[1][3:9])
    other = make_schema(num_slots=49, keys=ProductKeySpec(heads=3, key_dim=8), seed=8)
    assert not torch.equal(initial_head_keys(other, 0, range(14)), heads[0])
    assert head_keys_shape(make_schema()) == (2, 0, 0)


@pytest.mark.parametrize(
    ("dtype", "master", "algorithm", "names"),
    [
        ("float32", False, "sgd", ["values"]),
        ("bfloat16", True, "adam", ["values", "values.master", "values.exp_avg", "values.exp_avg_sq"]),
        ("int8", False, "rowwise_adagrad", ["values", "values.scales", "values.row_sum"]),
    ],
)
def test_arrays_are_those_of_dtype_and_optimizer(dtype: str, master: bool, algorithm: str, names: list[str]) -> None:
    schema = make_schema(dtype=dtype, master=master, optimizer=OptimizerSpec(algorithm=algorithm, lr=0.1))  # type: ignore[arg-type]
    assert [array.name for array in named_arrays(schema)] == names
    assert np.isscalar(named_arrays(schema)[0].width((0,)))
