"""Sums and gradients in packed rows: how far off they are at most, and that blocks are apart from each other."""

import pytest
import torch

from mempool.kernels import PackedLayout, pack_rows, pick_blocks, unpack_rows

LAYOUTS = [(64, 64), (60, 16), (1, 1), (7, 3), (16, 64)]
SUM = PackedLayout("float8_e4m3fn", width=60, block_dim=16)


def spread(layout: PackedLayout, seed: int = 0, num_bags: int = 300) -> torch.Tensor:
    """Numbers of all sizes that float32 has, and of some within a bag; a bag of zeros."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(num_bags, layout.width, generator=generator)
    values *= torch.exp2(torch.randint(-149, 126, (num_bags, 1), generator=generator).float())
    values *= torch.exp2(torch.randint(-20, 1, values.shape, generator=generator).float())
    values[0] = 0.0
    return values


def scales_of(layout: PackedLayout, values: torch.Tensor) -> torch.Tensor:
    """[B, W] float64: of each number, what its block's scale should be."""
    blocks = [part.abs().amax(dim=1) for part in values.double().split(layout.block_dim, dim=1)]
    largest = torch.stack(blocks, dim=1).repeat_interleave(layout.block_dim, dim=1)[:, : layout.width]
    return (largest / 448).clamp(min=2.0**-126)


@pytest.mark.parametrize(("width", "block_dim"), LAYOUTS)
def test_a_number_is_off_by_no_more_than_is_said(width: int, block_dim: int) -> None:
    layout = PackedLayout("float8_e4m3fn", width=width, block_dim=block_dim)
    values = spread(layout)
    rows = pack_rows(layout, values)
    assert (rows.dtype, rows.shape) == (torch.uint8, (300, layout.row_bytes))
    found = unpack_rows(layout, rows).double()
    bound = torch.maximum(values.double().abs() / 16, scales_of(layout, values) * 2.0**-10)
    assert bool(((found - values.double()).abs() <= bound * (1 + 1e-6)).all())
    assert not found[0].any()
    assert torch.equal(pack_rows(layout, values.t().contiguous().t()), rows)


def test_a_block_that_is_not_finite_is_nan_and_no_other_is() -> None:
    values = torch.randn(4, 60)
    values[0, 3], values[1, 59], values[2, 16] = float("inf"), float("nan"), -float("inf")
    found = unpack_rows(SUM, pack_rows(SUM, values))
    lost = torch.zeros(4, 60, dtype=torch.bool)
    lost[0, :16] = lost[1, 48:] = lost[2, 16:32] = True
    assert torch.equal(found.isnan(), lost)
    assert bool(found[~lost].isfinite().all())


@pytest.mark.parametrize("blocks", [(0,), (3,), (1, 3), (0, 1, 2), (0, 1, 2, 3)])
def test_picked_blocks_are_what_packing_them_gives(blocks: tuple[int, ...]) -> None:
    values = spread(SUM, 1)
    values[5, 20] = float("nan")
    mine = torch.cat([values[:, 16 * block : 16 * (block + 1)] for block in blocks], dim=1)
    picked = PackedLayout("float8_e4m3fn", width=mine.shape[1], block_dim=16)
    assert torch.equal(pick_blocks(SUM, pack_rows(SUM, values), picked, blocks), pack_rows(picked, mine))


def test_any_bytes_are_numbers() -> None:
    rows = torch.randint(0, 256, (200, SUM.row_bytes), dtype=torch.uint8)
    codes = rows[:, :60].contiguous().view(torch.float8_e4m3fn).double()
    scales = rows[:, SUM.scales_start : SUM.scales_start + 16].contiguous().view(torch.float32).double()
    expected = (codes * scales.repeat_interleave(16, dim=1)[:, :60]).float()
    torch.testing.assert_close(unpack_rows(SUM, rows), expected, rtol=1e-6, atol=1e-44, equal_nan=True)


def test_no_bags_are_no_rows() -> None:
    assert unpack_rows(SUM, pack_rows(SUM, torch.empty(0, 60))).shape == (0, 60)
