"""Random cases for the kernels: arenas with holes, ragged bags, repeated ids, odd widths; NaN where nobody may look."""

import dataclasses
import functools
import math
import os
from dataclasses import dataclass
from typing import get_args

import torch
from hypothesis import settings
from hypothesis import strategies as st

from mempool import kernels
from mempool.kernels import OptimizerStep, PackedElement, PackedLayout, Paged, SortedPairs, num_blocks, reference

kernel_settings = settings.get_profile("kernels")

#: As UnderTest.interpreted, for what is said before there is one.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

WIDTHS = (1, 3, 36, 65, 100, 256)
#: Of an arena that is cut into parts.
CUT_WIDTHS = (1, 65, 600) if INTERPRETED else (*WIDTHS, 7, 31, 127, 130, 600)
BLOCK_DIMS = (16, 64, 5, 500)


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
            return Paged(self.to(value.rows), self.to(value.page_table), value.page_shift, value.packed)
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
    #: Columns of a block: of the packed layout, and for row-wise optimizers.
    block_dim: int

    @functools.cached_property
    def owned_rows(self) -> torch.Tensor:
        return owned_rows(self.paged)


def owned_rows(paged: Paged) -> torch.Tensor:
    """Mask [R] of the arena rows that belong to a page in the page table."""
    owned = torch.zeros(paged.rows.shape[0], dtype=torch.bool)
    for page in paged.page_table.tolist():
        if page >= 0:
            owned[page << paged.page_shift : (page + 1) << paged.page_shift] = True
    return owned


def make_arena(num_rows, *, width, element="float32", block_dim=16):
    """Rows of an arena in which every value, and every byte, is NaN, and their packed layout if they have one."""
    if element in get_args(PackedElement):
        packed = PackedLayout(element, width, block_dim)
        return torch.full((num_rows, packed.row_bytes), 0xFF, dtype=torch.uint8), packed
    return torch.full((num_rows, width), torch.nan, dtype=getattr(torch, element)), None


def make_paged(generator, *, num_pages, page_shift, width, element="float32", block_dim=16, missing=0.3):
    """An arena with shuffled pages, some of them missing; rows of no page are NaN in every value and scale."""
    page_slots = 1 << page_shift
    num_arena_pages = num_pages + 2
    rows, packed = make_arena(num_arena_pages * page_slots, width=width, element=element, block_dim=block_dim)
    page_table = torch.randperm(num_arena_pages, generator=generator)[:num_pages].to(torch.int32)
    page_table[torch.rand(num_pages, generator=generator) < missing] = -1
    paged = Paged(rows, page_table, page_shift, packed)
    owned = owned_rows(paged).nonzero().squeeze(1)
    reference.write_values(paged, owned, torch.randn(owned.numel(), width, generator=generator))
    return paged


def column_slice(paged: Paged, first: int, end: int) -> Paged:
    """The same slots in an arena of some of the columns; packed rows are cut where blocks start, with their scales."""
    layout = paged.packed
    if layout is None:
        return Paged(paged.rows[:, first:end].contiguous(), paged.page_table, paged.page_shift)
    assert first % layout.block_dim == 0
    part = PackedLayout(layout.element, end - first, layout.block_dim)
    rows = torch.zeros(paged.rows.shape[0], part.row_bytes, dtype=torch.uint8)
    rows[:, : part.width] = paged.rows[:, first:end]
    first_scale = layout.scales_start + 4 * (first // layout.block_dim)
    scales = slice(first_scale, first_scale + 4 * part.num_blocks)
    rows[:, part.scales_start : part.scales_start + 4 * part.num_blocks] = paged.rows[:, scales]
    return Paged(rows, paged.page_table, paged.page_shift, part)


@st.composite
def cases(draw, widths=WIDTHS, elements=kernels.ELEMENTS, max_bags=6, max_pairs=24):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    page_shift = draw(st.integers(0, 4))
    num_pages = draw(st.integers(1, 5))
    width, block_dim = draw(st.sampled_from(widths)), draw(st.sampled_from(BLOCK_DIMS))
    paged = make_paged(
        generator,
        num_pages=num_pages,
        page_shift=page_shift,
        width=width,
        element=draw(st.sampled_from(elements)),
        block_dim=block_dim,
        missing=draw(st.sampled_from((0.0, 0.4, 1.0))),
    )
    num_slots = num_pages << page_shift
    sizes = draw(st.lists(st.integers(0, max_pairs), max_size=max_bags))
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    num_pairs = int(offsets[-1])
    # Few distinct ids, so that they repeat, and the last slot often.
    span = draw(st.integers(1, num_slots))
    # As shards keep them, for whom rows are read by int64; the other kind is test_ids.py's.
    ids = torch.randint(0, span, (num_pairs,), generator=generator, dtype=torch.int32)
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
        block_dim=block_dim,
    )


def make_state(paged: Paged, step: OptimizerStep, *, master: bool = False, seed: int = 0) -> dict[str, torch.Tensor]:
    """Positive state, and any master, for the owned rows, NaN in the spare ones. Some momentum has not begun."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name in kernels.STATE_NAMES[step.algorithm]:
        columns = num_blocks(paged.width, step.block_dim) if name in kernels.BLOCK_STATE else paged.width
        state[name] = torch.rand(paged.rows.shape[0], columns, generator=generator)
        if name == "momentum_buffer":
            state[name][::3] = kernels.NO_MOMENTUM
    if master:
        state["master"] = torch.randn(paged.rows.shape[0], paged.width, generator=generator)
    for tensor in state.values():
        tensor[~owned_rows(paged)] = torch.nan
    return state


def fitted(step: OptimizerStep, case: Case, **changes) -> OptimizerStep:
    """The step with the case's blocks: norms are bounded where a row is one."""
    max_norm = step.max_norm if case.block_dim >= case.paged.width else math.inf
    return dataclasses.replace(step, block_dim=case.block_dim, max_norm=max_norm, **changes)


def pairs_of(rows: torch.Tensor, slots: torch.Tensor | None = None) -> SortedPairs:
    """Distinct rows, one pair each."""
    places = torch.arange(rows.numel() + 1)
    return SortedPairs(order=places[:-1], rows=rows, slots=rows if slots is None else slots, starts=places)


def moved(under_test, pairs: SortedPairs) -> SortedPairs:
    return SortedPairs(**{name: under_test.to(getattr(pairs, name)) for name in ("order", "rows", "slots", "starts")})


@st.composite
def steps(draw) -> OptimizerStep:
    """Every rule with every option that it has."""
    algorithm = draw(st.sampled_from(kernels.ALGORITHMS))
    momentum = {}
    if algorithm == "sgd_momentum":
        nesterov = draw(st.booleans())
        dampening = 0.0 if nesterov else draw(st.sampled_from((0.0, 0.4)))
        momentum = {"momentum": 0.8, "dampening": dampening, "nesterov": nesterov}
    return OptimizerStep(
        algorithm,
        lr=draw(st.sampled_from((0.1, 1e-3))),
        grad_scale=draw(st.sampled_from((1.0, 0.37))),
        step=draw(st.integers(1, 50)),
        eps=draw(st.sampled_from((1e-8, 0.3))),
        lr_decay=draw(st.sampled_from((0.0, 0.01))),
        weight_decay=draw(st.sampled_from((0.0, 0.1))),
        l2=algorithm != "adamw" and draw(st.booleans()),
        corrected_eps=draw(st.booleans()),
        max_norm=draw(st.sampled_from((math.inf, 0.5, 4.0))),
        **momentum,
    )


def assert_close(actual, expected, *, tolerance=2e-6, terms=None):
    """Difference within ``tolerance`` of the largest element (float32 sums of a few dozen products).

    terms: The same sums of absolute values, where terms may cancel: what is rounded is as large as these.
    """
    actual, expected = actual.double().cpu(), expected.double()
    assert actual.shape == expected.shape
    largest = expected if terms is None else terms
    scale = max(1.0, float(largest.abs().max())) if expected.numel() else 1.0
    assert not actual.isnan().any()
    assert float((actual - expected).abs().max() if expected.numel() else 0.0) <= tolerance * scale


def same_bits(left, right):
    """Bitwise equality, which NaN passes and -0.0 against 0.0 does not."""
    as_integers = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
    left, right = left.cpu().contiguous(), right.cpu().contiguous()
    assert left.dtype == right.dtype
    if left.dtype in as_integers:
        left, right = left.view(as_integers[left.dtype]), right.view(as_integers[right.dtype])
    return torch.equal(left, right)
