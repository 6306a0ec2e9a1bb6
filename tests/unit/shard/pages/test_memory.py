"""Memory of arrays: what growing and shrinking cost, what is left behind, and what is refused."""

import gc
import os
import platform
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from mempool.errors import InvalidRequest
from mempool.shard.pages import memory
from mempool.shard.pages.memory import AllocatedRows, ReservedRows, Rows, rows_on

CPU = torch.device("cpu")
MIB = 2**20


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _is_mapped(address: int) -> bool:
    spans = (line.split(" ", 1)[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
    return any(int(first, 16) <= address < int(end, 16) for first, end in spans)


def _make(kind: str, *, max_rows: int = 10_000, width: int = 3, dtype: torch.dtype = torch.float32) -> Rows:
    if kind == "reserved":
        return rows_on(CPU, max_rows=max_rows, width=width, dtype=dtype)
    return AllocatedRows(width=width, dtype=dtype, device=CPU)


@pytest.mark.parametrize("kind", ["reserved", "allocated"])
def test_rows_keep_what_they_hold_and_new_ones_are_zero(kind: str) -> None:
    rows = _make(kind)
    assert rows.first(0).shape == (0, 3)
    kept = torch.empty(0, 3)
    for num_rows in (1, 7, 700, 3, 5, 5_000, 4_999, 0, 10_000):  # 4,999 and 3 end within a page of memory
        rows.resize(num_rows)
        held = rows.first(num_rows)
        assert held.is_contiguous()
        assert torch.equal(held[: len(kept)], kept[:num_rows])
        assert not held[len(kept) :].any()
        kept = torch.randn(num_rows, 3)
        held.copy_(kept)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.int32])
def test_rows_of_every_dtype(dtype: torch.dtype) -> None:
    rows = _make("reserved", dtype=dtype, width=5)
    rows.resize(9)
    rows.first(9).fill_(3)
    assert rows.first(9).dtype == dtype
    assert rows.first(9).sum() == 9 * 5 * 3


def test_a_range_of_addresses_costs_no_memory_and_rows_in_use_what_they_are() -> None:
    gc.collect()
    before = _resident()
    rows = ReservedRows(max_rows=2**30, width=256, dtype=torch.float32)  # 1 TiB
    rows.resize(2**16)
    assert _resident() - before < 8 * MIB
    rows.first(2**16)[:] = 1
    assert 64 * MIB <= _resident() - before < 76 * MIB
    rows.resize(2**10)
    assert _resident() - before < 16 * MIB
    assert torch.equal(rows.first(2**10), torch.ones(2**10, 256))


def test_nothing_beyond_the_rows_is_resident_by_a_huge_page() -> None:
    """An array that needs little takes little, however many addresses it has."""
    gc.collect()
    before = _resident()
    many = [ReservedRows(max_rows=2**24, width=64, dtype=torch.float32) for _ in range(32)]
    for rows in many:
        rows.resize(16)
        rows.first(16)[:] = 1
    assert _resident() - before < 8 * MIB


def test_memory_that_is_asked_for_ahead_is_there_and_changes_no_row() -> None:
    rows = ReservedRows(max_rows=2**16, width=256, dtype=torch.float32)
    rows.resize(2**16)  # 64 MiB
    rows.first(2**16)[:40_000:20_000] = 7
    before = _resident()
    rows.populate()
    if tuple(map(int, platform.release().split(".")[:2])) >= (5, 14):  # Linux before it gives memory as it is needed
        assert _resident() - before > 48 * MIB
    found = rows.first(2**16)
    assert int((found == 7).sum()) == 2 * 256
    assert int((found != 0).sum()) == 2 * 256
    AllocatedRows(width=4, dtype=torch.float32, device=CPU).populate()


def test_addresses_are_given_back_with_the_last_tensor() -> None:
    rows = ReservedRows(max_rows=2**20, width=64, dtype=torch.float32)
    rows.resize(10)
    held = rows.first(10)[2:4]
    held.fill_(5)
    address = held.data_ptr()
    del rows
    gc.collect()
    assert _is_mapped(address)
    assert torch.equal(held, torch.full((2, 64), 5.0))
    del held
    gc.collect()
    assert not _is_mapped(address)


def test_many_come_and_go() -> None:
    """More than a process may have mappings at once."""
    for _ in range(200):
        many = [ReservedRows(max_rows=2**20, width=64, dtype=torch.float32) for _ in range(400)]
        for rows in many:
            rows.resize(1)
            rows.first(1).fill_(1)


def test_a_forked_process_has_a_copy_of_its_own() -> None:
    rows = ReservedRows(max_rows=2**20, width=64, dtype=torch.float32)
    rows.resize(100)
    rows.first(100).fill_(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads: the child runs none of their code
        child = os.fork()
    if child == 0:
        seen = float(rows.first(100)[99, 63])
        rows.first(100).view(-1).numpy()[:] = 3
        del rows
        os._exit(0 if seen == 2 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(rows.first(100), torch.full((100, 64), 2.0))


def test_more_addresses_than_there_are_are_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"MiB for pages cannot be had: no such range of addresses is free \(.+\)"):
        ReservedRows(max_rows=2**46, width=2**10, dtype=torch.float32)


def test_memory_that_the_system_refuses_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = _make("reserved")
    rows.resize(100)
    rows.first(100).fill_(4)
    real = memory.libc()

    class Refusing:
        def __getattr__(self, name: str) -> Any:
            return (lambda *_: -1) if name == "mprotect" else getattr(real, name)

    with monkeypatch.context() as patch:
        patch.setattr(memory, "libc", Refusing)
        with pytest.raises(InvalidRequest, match=r"the system refuses it.*mempool scale.*Nothing was changed"):
            rows.resize(10_000)
    assert torch.equal(rows.first(100), torch.full((100, 3), 4.0))
    rows.resize(10_000)
    assert not rows.first(10_000)[100:].any()
