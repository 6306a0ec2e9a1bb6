import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mempool.shard.pages.masks import by_blocks, cells, runs


@given(
    st.integers(1, 40),
    st.integers(1, 20),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    st.booleans(),
)
def test_pages_are_grouped_by_their_blocks(
    num_pages: int, num_blocks: int, seed: int, share: float, alike: bool
) -> None:
    random = np.random.default_rng(seed)
    mask = random.random((num_pages, num_blocks)) < share
    if alike:
        mask = np.repeat(mask, random.integers(1, 4, num_pages), axis=0)
    expected: dict[tuple[int, ...], list[int]] = {}
    for page, row in enumerate(mask):
        expected.setdefault(tuple(np.flatnonzero(row).tolist()), []).append(page)
    assert {blocks: pages.tolist() for blocks, pages in by_blocks(mask).items()} == expected


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_a_mask_of_nothing_has_no_groups(shape: tuple[int, int]) -> None:
    assert by_blocks(np.ones(shape, dtype=np.bool_)) == {}


def test_cells_and_runs() -> None:
    mask = np.zeros((4, 3), dtype=np.bool_)
    mask[cells([0, 3], (1, 2))] = True
    assert np.argwhere(mask).tolist() == [[0, 1], [0, 2], [3, 1], [3, 2]]
    assert [run.tolist() for run in runs(np.array([1, 2, 3, 7, 9, 10]))] == [[1, 2, 3], [7], [9, 10]]
