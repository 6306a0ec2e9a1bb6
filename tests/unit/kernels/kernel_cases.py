"""Random cases for the kernels: arenas with holes, ragged bags, repeated ids, odd widths; NaN where nobody may look."""

import functools
from dataclasses import dataclass

import torch
from hypothesis import settings
from hypothesis import strategies as st

from mempool import kernels
from mempool.kernels import Paged

kernel_settings = settings.get_profile("kernels")

WIDTHS = (1, 3, 36, 65, 100, 256)


@dataclass(frozen=True)
class UnderTest:
    name: str
    device: str

    @property
    def kernels(self) -> kernels.Implementation:
        return kernels.implementation(self.name)

    @property
    def interpreted(self) -> bool:
        """Whether Triton's interpreter runs the kernels: a thousand times slower, so tests take smaller cases."""
        return self.name == "triton" and self.device == "cpu"

    def to(self, value):
        """Tensors of a case, of any nesting, on the device under test."""
        if isinstance(value, torch.Tensor):
            return value.to(self.device, copy=True)
        if isinstance(value, Paged):
            return Paged(self.to(value.rows), self.to(value.page_table), value.page_shift)
        if isinstance(value, dict):
            return {name: self.to(item) for name, item in value.items()}
        return value


@dataclass(frozen=True)
class Case:
    paged: Paged
    num_slots: int
    ids: torch.Tensor
    weights: torch.Tensor | None
    offsets: torch.Tensor
    bags: torch.Tensor
    grads: torch.Tensor

    @functools.cached_property
    def owned_rows(self) -> torch.Tensor:
        """Mask of the arena rows that belong to a page in the page table."""
        owned = torch.zeros(self.paged.rows.shape[0], dtype=torch.bool)
        for page in self.paged.page_table.tolist():
            if page >= 0:
                owned[page << self.paged.page_shift : (page + 1) << self.paged.page_shift] = True
        return owned


def make_paged(generator, *, num_pages, page_shift, width, dtype, missing=0.3):
    """An arena with shuffled pages, some of them missing; rows of no page are NaN."""
    page_slots = 1 << page_shift
    num_arena_pages = num_pages + 2
    rows = torch.full((num_arena_pages * page_slots, width), torch.nan)
    page_table = torch.randperm(num_arena_pages, generator=generator)[:num_pages].to(torch.int32)
    page_table[torch.rand(num_pages, generator=generator) < missing] = -1
    for page in page_table.tolist():
        if page >= 0:
            rows[page * page_slots : (page + 1) * page_slots] = torch.randn(page_slots, width, generator=generator)
    return Paged(rows.to(dtype), page_table, page_shift)


@st.composite
def cases(draw, widths=WIDTHS, dtypes=kernels.STORAGE_DTYPES, max_bags=6, max_pairs=24):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    page_shift = draw(st.integers(0, 4))
    num_pages = draw(st.integers(1, 5))
    width = draw(st.sampled_from(widths))
    paged = make_paged(
        generator,
        num_pages=num_pages,
        page_shift=page_shift,
        width=width,
        dtype=draw(st.sampled_from(dtypes)),
        missing=draw(st.sampled_from((0.0, 0.4, 1.0))),
    )
    num_slots = num_pages << page_shift
    sizes = draw(st.lists(st.integers(0, max_pairs), max_size=max_bags))
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    num_pairs = int(offsets[-1])
    # Few distinct ids, so that they repeat, and the last slot often.
    span = draw(st.integers(1, num_slots))
    ids = torch.randint(0, span, (num_pairs,), generator=generator)
    ids[torch.rand(num_pairs, generator=generator) < 0.2] = num_slots - 1
    weights = torch.randn(num_pairs, generator=generator) if draw(st.booleans()) else None
    return Case(
        paged=paged,
        num_slots=num_slots,
        ids=ids,
        weights=weights,
        offsets=offsets,
        bags=torch.repeat_interleave(torch.arange(len(sizes)), offsets.diff()),
        grads=torch.randn(len(sizes), width, generator=generator),
    )


def assert_close(actual, expected, *, tolerance=2e-6):
    """Difference within ``tolerance`` of the largest element (float32 sums of a few dozen products)."""
    actual, expected = actual.double().cpu(), expected.double()
    assert actual.shape == expected.shape
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    assert not actual.isnan().any()
    assert float((actual - expected).abs().max() if expected.numel() else 0.0) <= tolerance * scale


def same_bits(left, right):
    """Bitwise equality, which NaN passes and -0.0 against 0.0 does not."""
    as_integers = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
    left, right = left.cpu().contiguous(), right.cpu().contiguous()
    assert left.dtype == right.dtype
    if left.dtype in as_integers:
        left, right = left.view(as_integers[left.dtype]), right.view(as_integers[right.dtype])
    return torch.equal(left, right)
