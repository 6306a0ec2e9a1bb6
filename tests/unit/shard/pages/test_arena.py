import gc
import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mempool import kernels
from mempool.errors import InvalidRequest
from mempool.shard.pages import arena as arena_module
from mempool.shard.pages.arena import PAGE_TABLE_BYTES, Arena, pieces
from mempool.shard.pages.memory import AllocatedRows, ReservedRows
from mempool.shard.pages.named_arrays import named_arrays, row_bytes
from mempool.types import FlatKeySpec, OptimizerSpec
from tests.contract.driver import make_schema

ROWWISE = OptimizerSpec(algorithm="rowwise_adagrad", lr=0.1)
SCHEMA = make_schema(optimizer=ROWWISE, keys=FlatKeySpec(key_dim=6))


def _arena(blocks: tuple[int, ...]) -> Arena:
    return Arena(schema=SCHEMA, blocks=blocks, arrays=named_arrays(SCHEMA), device=torch.device("cpu"))


def _fill(arena: Arena, row_pages: list[int]) -> dict[str, torch.Tensor]:
    """Put random pages there; returns what they hold."""
    taken = arena.take(len(row_pages))
    for array in arena.arrays:
        pages = arena.pages(array.name)
        pages[torch.from_numpy(taken)] = torch.randn(len(row_pages), *pages.shape[1:])
    arena.publish(np.array(row_pages), taken)
    return _read(arena, row_pages)


def _read(arena: Arena, row_pages: list[int]) -> dict[str, torch.Tensor]:
    ids = torch.cat([torch.arange(page * 8, page * 8 + 8) for page in row_pages])
    return {array.name: kernels.gather_rows(arena.paged(array.name), ids) for array in arena.arrays}


def _same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(
    ("blocks", "widths"),
    [
        ((0, 1, 2), {"values": 10, "values.row_sum": 3, "keys": 6}),
        ((1,), {"values": 4, "values.row_sum": 1}),
        ((0, 2), {"values": 6, "values.row_sum": 2, "keys": 6}),
    ],
)
def test_arrays_are_as_wide_as_their_blocks(blocks: tuple[int, ...], widths: dict[str, int]) -> None:
    arena = _arena(blocks)
    _fill(arena, [3])
    assert {name: rows.shape[1] for name, rows in _read(arena, [3]).items()} == widths


def test_growing_keeps_what_is_there() -> None:
    arena = _arena((0, 1, 2))
    first = _fill(arena, [0, 5])
    second = _fill(arena, [6, 1, 2])
    assert _same(_read(arena, [0, 5]), first)
    assert _same(_read(arena, [6, 1, 2]), second)


def test_the_first_take_and_a_reserve_are_exact() -> None:
    arena = _arena((0, 1, 2))
    arena.take(4)
    assert arena.num_bytes == 4 * arena.page_bytes + 7 * PAGE_TABLE_BYTES
    arena.reserve(3)
    arena.take(1), arena.take(2)
    assert arena.num_bytes == 7 * arena.page_bytes + 7 * PAGE_TABLE_BYTES


def test_pages_taken_answer_nothing_until_published() -> None:
    arena = _arena((1,))
    arena.take(2)
    assert torch.equal(_read(arena, [0])["values"], torch.zeros(8, 4))
    assert arena.num_taken == 2


def test_pages_given_back_are_used_again() -> None:
    arena = _arena((1,))
    kept = _fill(arena, [1])
    _fill(arena, [2, 3])
    size = arena.num_bytes
    arena.give_back(arena.withdraw(np.array([2, 3])))
    assert arena.num_taken == 1
    again = _fill(arena, [4, 5])
    assert arena.num_bytes == size
    assert _same(_read(arena, [4, 5]), again)
    assert _same(_read(arena, [1]), kept)


def test_shrinking_moves_rows_and_changes_none() -> None:
    arena = _arena((0, 2))
    _fill(arena, [0, 1, 2, 3, 4])
    kept = _read(arena, [3, 1])
    arena.give_back(arena.withdraw(np.array([0, 2, 4])))
    arena.shrink()
    assert arena.num_bytes == 2 * arena.page_bytes + 7 * PAGE_TABLE_BYTES
    assert _same(_read(arena, [3, 1]), kept)


def test_who_moves_pages_away_waits_for_as_much_as_moved_and_never_for_all_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A round of a move holds writers off while an arena shrinks."""
    monkeypatch.setattr(arena_module, "_SHRINK_BYTES", 1)
    schema = make_schema(num_slots=8 * 1000, optimizer=ROWWISE)
    arena = Arena(schema=schema, blocks=(0, 1), arrays=named_arrays(schema), device=torch.device("cpu"))
    arena.publish(np.arange(1000), taken := arena.take(1000))
    for array in ("values", "values.row_sum"):
        arena.pages(array)[torch.from_numpy(taken)] = torch.arange(1000.0)[:, None, None]
    capacity, left = arena.num_bytes, 1000
    for first in range(0, 1000, 10):
        before = arena.writes
        arena.give_back(arena.withdraw(np.arange(first, first + 10)))
        arena.shrink()
        left -= 10
        assert len(arena.written_since(before)) <= 20
        pages = (arena.num_bytes - len(arena.page_of) * PAGE_TABLE_BYTES) // arena.page_bytes
        assert left <= pages <= max(left * 16 / 15 + 70, left)  # what it lags behind at first it catches up with
        assert arena.num_taken == left
        ids = torch.arange(8 * (first + 10), 8000, 8)
        for array in ("values", "values.row_sum"):
            read = kernels.gather_rows(arena.paged(array), ids)
            assert torch.equal(read[:, 0], torch.arange(first + 10.0, 1000))
    assert arena.num_bytes < capacity / 8
    again = arena.take(500)
    assert len(set(again.tolist())) == 500


def test_an_arena_with_pages_on_their_way_does_not_shrink() -> None:
    arena = _arena((0, 2))
    taken = arena.take(5)
    arena.give_back(taken[1:])
    size = arena.num_bytes
    arena.shrink()
    assert arena.num_bytes == size


def test_rows_stay_where_they_lie_while_they_are_wanted_as_they_were() -> None:
    class Copies:
        def save(self, rows: torch.Tensor) -> None:
            raise AssertionError(f"rows {rows} are written to")

    arena = _arena((0, 2))
    _fill(arena, [0, 1, 2, 3, 4])
    arena.give_back(arena.withdraw(np.array([0, 2, 4])))
    arena.capture = Copies()
    before = arena.page_of.copy()
    arena.shrink()
    assert arena.page_of.tolist() == before.tolist()
    arena.capture = None
    arena.shrink()
    assert arena.num_bytes == 2 * arena.page_bytes + 7 * PAGE_TABLE_BYTES


def test_copying_takes_columns_of_named_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_module, "_COPY_BYTES", 1)  # page by page
    source, target = _arena((0, 1, 2)), _arena((0, 2))
    rows = _fill(source, [2, 4])
    taken = target.take(2)
    target.copy_from(source, blocks=(0, 2), source_pages=source.page_of[[2, 4]].astype(np.int64), arena_pages=taken)
    target.publish(np.array([2, 4]), taken)
    copied = _read(target, [2, 4])
    assert torch.equal(copied["values"], rows["values"][:, [0, 1, 2, 3, 8, 9]])
    assert torch.equal(copied["values.row_sum"], rows["values.row_sum"][:, [0, 2]])
    assert torch.equal(copied["keys"], rows["keys"])


@pytest.mark.parametrize(("num_pages", "page_bytes"), [(0, 10), (1, 2**30), (7, 2**22), (1000, 100)])
def test_pieces_cover_everything_once(num_pages: int, page_bytes: int) -> None:
    cut = list(pieces(num_pages, page_bytes))
    assert [page for piece in cut for page in range(num_pages)[piece]] == list(range(num_pages))
    assert all(piece.stop - piece.start == 1 or (piece.stop - piece.start) * page_bytes <= 2**24 for piece in cut)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8"])
def test_packed_rows_are_one_read_and_their_padding_stays_zero(dtype: str) -> None:
    schema = make_schema(dtype=dtype, master=True, optimizer=ROWWISE)
    blocks = (0, 2)
    arena = Arena(schema=schema, blocks=blocks, arrays=named_arrays(schema), device=torch.device("cpu"))
    # 6 codes to a multiple of 4, 2 scales, to a multiple of 16; a master of 6 and 2 sums beside them.
    assert row_bytes(schema, blocks) == 16 + 4 * 6 + 4 * 2
    assert arena.page_bytes == 8 * row_bytes(schema, blocks)
    for _ in range(3):  # grows, and takes again what was given back
        taken = arena.take(3)
        arena.publish(np.arange(3), taken)
        for name in ("values", "values.scales"):
            pages = arena.pages(name)
            pages[torch.from_numpy(taken)] = torch.ones(3, *pages.shape[1:], dtype=pages.dtype)
        rows = arena.paged().rows
        assert rows.shape[1] == 16
        assert not rows[:, 6:8].any()
        assert torch.equal(kernels.gather_rows(arena.paged(), torch.arange(24)), _ones(dtype).expand(24, 6))
        arena.give_back(arena.withdraw(np.arange(3))[:2])
    arena.publish(np.arange(1), taken[2:])
    kernels.scatter_rows(arena.paged(), torch.arange(8), torch.randn(8, 6))
    assert not arena.paged().rows[:, 6:8].any()


def _ones(dtype: str) -> torch.Tensor:
    """The value of the code 1."""
    code = torch.ones(1, dtype=torch.uint8)
    return code.view(torch.int8 if dtype == "int8" else torch.float8_e4m3fn).float()


class _BytesMoved(TorchDispatchMode):
    """Counts what operations write that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func.is_view:
            self.num_bytes += result.nbytes
        return result


def test_growing_in_many_rounds_moves_no_byte_and_takes_no_more_than_its_pages() -> None:
    schema = make_schema(num_slots=2**20, page_slots=64, value_dim=64, block_dim=64, optimizer=ROWWISE)
    arena = Arena(schema=schema, blocks=(0,), arrays=named_arrays(schema), device=torch.device("cpu"))
    moved = _BytesMoved()
    with moved:
        torch.zeros(1)  # loads what torch needs for this
    moved.num_bytes = 0
    before = _resident()
    addresses = set()
    for number in range(1_000):
        with moved:
            arena.reserve(1)
            taken = arena.take(1)
        with arena.writing(pages=torch.from_numpy(taken)):
            arena.pages("values")[taken[0]] = number
        arena.publish(np.array([number]), taken)
        addresses.add(tuple(arena.rows(array.name).data_ptr() for array in arena.arrays))
    assert len(addresses) == 1
    assert moved.num_bytes == 0
    assert arena.num_bytes == 1_000 * arena.page_bytes + schema.num_row_pages * PAGE_TABLE_BYTES
    assert _resident() - before < arena.num_bytes + 8 * 2**20
    read = kernels.gather_rows(arena.paged(), torch.arange(0, 64_000, 64))
    assert torch.equal(read[:, 0], torch.arange(1_000.0))
    arena.give_back(arena.withdraw(np.arange(0, 990)))
    arena.shrink()
    assert arena.num_bytes == 10 * arena.page_bytes + schema.num_row_pages * PAGE_TABLE_BYTES
    assert _resident() - before < 8 * 2**20
    assert torch.equal(
        kernels.gather_rows(arena.paged(), torch.arange(990 * 64, 64_000, 64))[:, 0], torch.arange(990.0, 1_000)
    )


def test_what_was_written_since_is_known_by_page() -> None:
    arena = _arena((0, 2))
    taken = arena.take(5)
    arena.publish(np.arange(5), taken)
    before = arena.writes
    assert arena.written_since(before).tolist() == []
    with arena.writing(torch.tensor([0, 7, 8, 7, 39])):
        pass
    between = arena.writes
    with arena.writing(pages=torch.tensor([3])):
        pass
    assert arena.written_since(before).tolist() == [0, 1, 3, 4]
    assert arena.written_since(between).tolist() == [3]


def test_rows_that_are_copied_to_grow_do_so_by_a_good_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: many small takes stay linear, the first is exact, and none is beyond the table."""
    monkeypatch.setattr(
        arena_module,
        "rows_on",
        lambda device, *, max_rows, width, dtype: AllocatedRows(width=width, dtype=dtype, device=device),  # noqa: ARG005
    )
    schema = make_schema(num_slots=8 * 100, optimizer=ROWWISE)
    arena = Arena(schema=schema, blocks=(0, 1), arrays=named_arrays(schema), device=torch.device("cpu"))
    copies, size = 0, 0
    for number in range(100):
        promised = arena.growth_bytes(1)
        before, size = size, arena.num_bytes
        taken = arena.take(1)
        arena.pages("values")[taken[0]] = number
        arena.publish(np.array([number]), taken)
        assert arena.num_bytes == size + promised
        copies += arena.num_bytes != before
        size = arena.num_bytes
    assert arena.num_bytes == 100 * arena.page_bytes + 100 * PAGE_TABLE_BYTES
    assert copies < 25
    assert torch.equal(kernels.gather_rows(arena.paged(), torch.arange(0, 800, 8))[:, 0], torch.arange(100.0))
    arena.give_back(arena.withdraw(np.arange(90)))
    arena.shrink()
    assert arena.num_bytes == 10 * arena.page_bytes + 100 * PAGE_TABLE_BYTES
    assert torch.equal(kernels.gather_rows(arena.paged(), torch.arange(720, 800, 8))[:, 0], torch.arange(90.0, 100))


def test_memory_that_cannot_be_had_leaves_the_arena_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    arena = _arena((0, 1, 2))
    kept = _fill(arena, [0, 3])
    size = arena.num_bytes
    real, calls = ReservedRows.resize, itertools.count()

    def resize(self: ReservedRows, num_rows: int) -> None:
        if next(calls) == 1:  # of the second array: the first has grown
            raise InvalidRequest("none left")
        real(self, num_rows)

    with monkeypatch.context() as patch:
        patch.setattr(ReservedRows, "resize", resize)
        with pytest.raises(InvalidRequest, match="none left"):
            arena.take(3)
    assert (arena.num_bytes, arena.num_taken) == (size, 2)
    assert _same(_read(arena, [0, 3]), kept)
    more = _fill(arena, [1, 2, 4])
    assert _same(_read(arena, [0, 3]), kept)
    assert _same(_read(arena, [1, 2, 4]), more)


def _resident() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
