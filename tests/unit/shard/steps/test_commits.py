"""When a failed commit has changed nothing, when rows may be lost, and memory that runs short in between."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mempool import kernels
from mempool.errors import DataLoss, StepConflict
from mempool.shard.steps import commits, parts
from mempool.types import DecidedStep, StepId
from tests.contract.bags import make_bags
from tests.contract.driver import Driver, make_schema, same
from tests.unit.shard.conftest import MakeDriver

LENGTHS = (400, 0, 70, 1900)
GRADS = torch.randn(4, 10, generator=torch.Generator().manual_seed(1))


def _failing(real: Callable[..., Any], *, at: int, error: BaseException, times: int = 1) -> Callable[..., Any]:
    """``real``, but calls number ``at`` to ``at + times - 1`` fail."""
    calls = 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if at <= calls < at + times:
            raise error
        return real(*args, **kwargs)

    return call


def _prepared(make_driver: MakeDriver, *, commit_memory_bytes: int = 100_000, keep: bool = False) -> Driver:
    """A step of many parts that is prepared. keep: what its Prepare has sorted, where that is small enough."""
    driver = make_driver(commit_memory_bytes=commit_memory_bytes).create(make_schema())
    for sequence in (0, 1):
        driver.update(1, sequence, GRADS, bags=make_bags(sequence, lengths=LENGTHS))
    engine: Any = driver.host(0)
    taken = 0 if keep else commit_memory_bytes // 2
    engine._budget.kept_bytes += taken
    driver.prepare(1, [0, 1], want_norm=False)
    engine._budget.kept_bytes -= taken
    return driver


def _commit(driver: Driver) -> None:
    engine: Any = driver.host(0)
    table = engine._tenancy.table(1)
    step_id = driver.step_id(1)
    decided = DecidedStep(table_id=1, version=1, step_id=step_id, lr=0.1, grad_scale=1.0, sequences=(0, 1))
    commits.apply(table.storage, table.updates, table.ledger, decided)


@pytest.mark.parametrize("error", [MemoryError("none"), torch.OutOfMemoryError("none"), ValueError("odd")])
@pytest.mark.parametrize("commit_memory_bytes", [2**24, 100_000])
@pytest.mark.parametrize("kernel", ["sort_pairs", "segment_sum"])
def test_what_fails_before_the_first_write_changes_nothing(
    make_driver: MakeDriver,
    monkeypatch: pytest.MonkeyPatch,
    kernel: str,
    commit_memory_bytes: int,
    error: Exception,
) -> None:
    driver = _prepared(make_driver, commit_memory_bytes=commit_memory_bytes)
    before = driver.contents()
    if kernel == "segment_sum" and commit_memory_bytes > 10**6:
        kernel = "sort_pairs"  # summed and applied at once
    with monkeypatch.context() as patch:
        patch.setattr(kernels, kernel, _failing(getattr(kernels, kernel), at=1, error=error, times=100))
        with pytest.raises(type(error)):
            _commit(driver)
    assert same(driver.contents(), before)
    assert driver.status(0).lost_pages == 0
    assert driver.commit(1, [0, 1])[0].version == 1


@pytest.mark.parametrize("error", [MemoryError("none"), torch.OutOfMemoryError("none")])
def test_memory_that_runs_short_between_parts_makes_them_smaller(
    make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    whole = _prepared(make_driver)
    whole.commit(1, [0, 1])
    for at in (2, 3):
        driver = _prepared(make_driver)
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "segment_sum", _failing(kernels.segment_sum, at=at, error=error))
            _commit(driver)
        assert same(driver.contents(), whole.contents())


def test_parts_that_go_on_elsewhere_have_the_same_bits(
    make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = _prepared(make_driver)
    engine: Any = driver.host(0)
    table = engine._tenancy.table(1)
    held = commits._held(table.updates, StepId(group="trainer", rank=0, step=1), (0, 1))

    def sums(reductions: Any) -> dict[int, torch.Tensor]:
        found: dict[int, torch.Tensor] = {}
        for reduction in reductions:
            assert not found.keys() & set(reduction.pairs.slots.tolist()), "each slot is in one part"
            found |= dict(zip(reduction.pairs.slots.tolist(), reduction.sums.clone(), strict=True))
        return found

    expected = sums(parts.reduce_in_parts(table.storage, held, 2**24))
    for at in range(1, 8):
        with monkeypatch.context() as patch:
            failing = _failing(kernels.segment_sum, at=at, error=MemoryError("none"))
            patch.setattr(kernels, "segment_sum", failing)
            assert same(sums(parts.reduce_in_smaller_parts(table.storage, held, 400_000)), expected)


@pytest.mark.parametrize("kernel", ["optimizer_step", "segment_sum"])
def test_what_fails_after_the_first_write_is_a_loss(
    make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch, kernel: str
) -> None:
    driver = _prepared(make_driver)
    with monkeypatch.context() as patch:
        at = 1 if kernel == "optimizer_step" else 2
        patch.setattr(kernels, kernel, _failing(getattr(kernels, kernel), at=at, error=ValueError("odd"), times=100))
        with pytest.raises(DataLoss, match=r"step 1.*failed half way.*odd"):
            _commit(driver)


def test_a_gpu_that_has_no_memory_for_its_first_kernel_loses_nothing(
    make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = _prepared(make_driver, commit_memory_bytes=2**24)
    before = driver.contents()
    with monkeypatch.context() as patch:
        error = torch.OutOfMemoryError("CUDA out of memory")
        patch.setattr(kernels, "fused_step", _failing(kernels.fused_step, at=1, error=error))
        with pytest.raises(torch.OutOfMemoryError):
            _commit(driver)
    assert same(driver.contents(), before)
    assert driver.commit(1, [0, 1])[0].version == 1


def test_what_was_sorted_to_prepare_a_step_need_not_be_sorted_to_commit_it(
    make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once a step is decided there is nothing left that wants much memory."""
    whole = _prepared(make_driver, commit_memory_bytes=2**24)
    _commit(whole)
    driver = _prepared(make_driver, commit_memory_bytes=2**24, keep=True)
    engine: Any = driver.host(0)
    assert engine._budget.kept_bytes > 0
    with monkeypatch.context() as patch:
        for kernel in ("sort_pairs", "segment_sum"):
            patch.setattr(kernels, kernel, _failing(getattr(kernels, kernel), at=1, error=MemoryError("none")))
        _commit(driver)
    assert engine._budget.kept_bytes == 0
    assert same(driver.contents(), whole.contents())


def test_steps_are_decided_in_order(make_driver: MakeDriver) -> None:
    driver = _prepared(make_driver)
    assert driver.prepare(1, [0, 1, 5, 3])[0].missing == (3, 5)
    assert driver.commit(1, [1, 0])[0].version == 1
    with pytest.raises(StepConflict, match=r"is not prepared here: .* With that the step is over here"):
        driver.commit(2, [0, 1])
    driver.update(3, 7, GRADS, bags=make_bags(1))
    driver.prepare(3, [7])
    with pytest.raises(StepConflict, match=r"was prepared with updates \[7\] .* With that the step is over here"):
        driver.commit(3, [])
    with pytest.raises(StepConflict, match=r"step 3 .* was dropped"):
        driver.prepare(3, [7])
