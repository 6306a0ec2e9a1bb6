"""Counted heat: of a sample, right on the whole; halved with time; without a pattern in what it looks at."""

import numpy as np
import pytest
import torch

from mempool.observe import Heat

SHIFT = 4


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_heat_is_what_was_read_on_the_whole() -> None:
    heat = Heat(8, SHIFT, clock=Clock())
    random = np.random.default_rng(0)
    read = np.zeros(8)
    for _ in range(4000):
        ids = (random.beta(1, 4, size=random.integers(1, 1500)) * 128).astype(np.int32)
        read += np.bincount(ids >> SHIFT, minlength=8)
        heat.used(ids)
    np.testing.assert_allclose(heat.now(), read, rtol=0.1, atol=0.002 * read.sum())
    assert 0.001 * read.sum() < heat.seen() < 0.1 * read.sum()


def test_whatever_comes_in_turn_is_seen_alike() -> None:
    """Sixteen tables' worth of layers, in step, of which each reads a page of its own; heads in step within a bag."""
    heat = Heat(16, SHIFT, clock=Clock())
    for call in range(16_000):
        ids = np.full(64, (call % 16) << SHIFT, np.int64)
        heat.used(ids)
    assert heat.now().min() > 0.6 * heat.now().mean()
    heads = Heat(4, SHIFT, clock=Clock())
    ids = np.tile(np.arange(4, dtype=np.int64) << SHIFT, 512)
    for _ in range(2000):
        heads.used(ids)
    assert heads.now().min() > 0.6 * heads.now().mean()


def test_heat_is_halved_every_ten_minutes() -> None:
    clock = Clock()
    heat = Heat(2, SHIFT, clock=clock)
    for _ in range(2000):
        heat.used(np.zeros(8, np.int64))
    before, seen = heat.now()[0], heat.seen()
    clock.now_s = 600.0
    assert heat.now()[0] == pytest.approx(before / 2)
    assert heat.seen() == pytest.approx(seen / 2)
    for _ in range(2000):
        heat.used(np.full(8, 1 << SHIFT, np.int64))
    assert heat.now()[0] == pytest.approx(before / 2), "what is forgotten is so once"
    assert heat.now()[1] > before / 2


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_tensors_count_as_arrays_do(dtype: torch.dtype) -> None:
    one, other = Heat(8, SHIFT, seed=3, clock=Clock()), Heat(8, SHIFT, seed=3, clock=Clock())
    ids = torch.randint(0, 128, (900,), dtype=dtype)
    for _ in range(100):
        one.used(ids)
        other.used(ids.numpy())
    assert one.now().tolist() == other.now().tolist()
    assert one.now().sum() > 0
