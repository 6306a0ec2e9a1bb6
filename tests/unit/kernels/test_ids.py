"""Slot ids of 32 bits give the bits of wide ones, results are written where they are wanted, and ids from outside are
looked at, narrowed and copied in one pass."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import INTERPRETED, assert_close, cases, kernel_settings, same_bits

from mempool import kernels
from mempool.kernels import Paged, reference

NAN = float("nan")


#: Of the contract itself, whichever implementation is under test.
of_the_cpu = pytest.mark.skipif(INTERPRETED, reason="runs what the CPU has")

#: Each element is a variant of each kernel, which tests would wait for: of a plain one and of packed ones.
ELEMENTS = ("float32", "int8")


@kernel_settings
@given(case=cases(elements=ELEMENTS), dtype=st.sampled_from((torch.float32, torch.bfloat16)))
def test_narrow_ids_and_given_memory_change_no_bit(under_test, case, dtype):
    paged, ids, weights, offsets, grads = map(
        under_test.to, (case.paged, case.ids, case.weights, case.offsets, case.grads)
    )
    run, wide = under_test.kernels, ids.long()
    out = under_test.to(torch.full((case.grads.shape[0], case.paged.width), NAN, dtype=dtype))
    sums = run.weighted_sum(paged, ids, weights, offsets, dtype, out)
    assert sums is out
    assert same_bits(sums, run.weighted_sum(paged, wide, weights, offsets, dtype))
    if dtype == torch.float32:
        assert_close(sums, reference.weighted_sum(case.paged, case.ids, case.weights, case.offsets))
    out = under_test.to(torch.full((case.ids.numel(),), NAN))
    gradient = run.weight_gradient(paged, ids, offsets, grads, out)
    assert gradient is out
    assert same_bits(gradient, run.weight_gradient(paged, wide, offsets, grads))
    assert_close(gradient, reference.weight_gradient(case.paged, case.ids, case.offsets, case.grads), tolerance=1e-5)
    for wanted in (paged.value_dtype, torch.float16):
        assert same_bits(run.gather_rows(paged, ids, wanted), run.gather_rows(paged, wide, wanted))


@of_the_cpu
@kernel_settings
@given(case=cases(elements=ELEMENTS), private=st.booleans())
def test_sums_of_arrays_have_the_bits_of_those_of_tensors(case, private):
    sums = kernels.array_sums()
    if sums is None:
        pytest.skip("needs Numba")
    num_slots = case.paged.page_table.numel() << case.paged.page_shift
    ids = case.ids.clamp(0, num_slots - 1).to(torch.int32)
    given = ids.view(torch.uint32).numpy(), None if case.weights is None else case.weights.numpy(), case.offsets.numpy()
    out = torch.full((case.grads.shape[0], case.paged.width), NAN)
    read = sums(case.paged, *given, num_slots=num_slots, private=private, out=out.numpy())
    assert read is not None
    assert same_bits(out, kernels.weighted_sum(case.paged, ids, case.weights, case.offsets))
    assert read[0].tolist() == ids.tolist()
    assert read[1].tolist() == case.offsets.tolist()
    if ids.numel():
        assert private == (read[0].ctypes.data == given[0].ctypes.data)


@of_the_cpu
@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize(
    ("ids", "offsets"),
    [
        ([0, 9, 1], [0, 3]),
        ([0, 2**32 - 1, 1], [0, 3]),
        ([0, 2**31, 1], [0, 3]),
        ([0, 1, 2], [0, 4]),
        ([0, 1, 2], [1, 3]),
        ([0, 1, 2], [0, 2, 1, 3]),
        ([0, 1, 2], [0, 2**62, 3]),
    ],
)
def test_sums_of_wrong_arrays_are_none_and_nothing_is_written(ids, offsets, private):
    sums = kernels.array_sums()
    if sums is None:
        pytest.skip("needs Numba")
    paged = Paged(torch.ones(8, 4), torch.arange(2, dtype=torch.int32), 2)
    out = np.full((len(offsets) - 1, 4), np.nan, np.float32)
    given = np.array(ids, np.uint32), None, np.array(offsets, np.int64)
    assert sums(paged, *given, num_slots=8, private=private, out=out) is None
    assert np.isnan(out).all()


@kernel_settings
@given(case=cases(widths=(3,), elements=ELEMENTS))
def test_narrow_ids_are_sorted_as_wide_ones(under_test, case):
    paged = under_test.to(case.paged)
    expected = reference.sort_pairs(case.paged, case.ids)
    for ids in (case.ids, case.ids.long()):
        found = under_test.kernels.sort_pairs(paged, under_test.to(ids))
        for name in ("order", "rows", "slots", "starts"):
            assert torch.equal(getattr(found, name).cpu(), getattr(expected, name))


@pytest.mark.parametrize("width", [66, 256, 300])
def test_pieces_of_pairs_begin_and_end_anywhere(under_test, width):
    """Bags that end at, before and behind the pieces in which pairs are taken, all here or with holes."""
    if under_test.name != "numba":
        pytest.skip("the others take no pieces")
    generator = torch.Generator().manual_seed(width)
    rows, num_pairs = torch.randn(64, width, generator=generator), 2100
    ids = torch.randint(0, 64, (num_pairs,), generator=generator, dtype=torch.int32)
    weights, bounds = torch.randn(num_pairs, generator=generator), [0, 511, 512, 512, 513, 1024, 1024, 1030, 1536, 2100]
    offsets, grads = torch.tensor(bounds), torch.randn(len(bounds) - 1, width, generator=generator)
    for table in ([0, 1, 2, 3], [0, -1, 2, 3], [-1] * 4):
        paged = Paged(rows, torch.tensor(table, dtype=torch.int32), 4)
        absolute = Paged(rows.abs(), paged.page_table, 4)
        for weighted in (weights, None):
            sums = under_test.kernels.weighted_sum(paged, ids, weighted, offsets, torch.float32)
            terms = reference.weighted_sum(absolute, ids, None if weighted is None else weighted.abs(), offsets)
            assert_close(sums, reference.weighted_sum(paged, ids, weighted, offsets), terms=terms)
        gradient = under_test.kernels.weight_gradient(paged, ids, offsets, grads)
        assert_close(gradient, reference.weight_gradient(paged, ids, offsets, grads), tolerance=1e-5)


@of_the_cpu
def test_unsigned_ids_reach_as_far_as_pages_do():
    """Below 2**31 slots they are read as they lie; beyond, a slot from 2**31 on is one all the same."""
    few = Paged(torch.ones(4, 3), torch.tensor([0, 1], dtype=torch.int32), 1)
    ids, offsets = torch.tensor([1, 2**31, 2**32 - 1, 3]).to(torch.uint32), torch.tensor([0, 4])
    assert kernels.weighted_sum(few, ids, None, offsets).tolist() == [[2.0] * 3]
    assert kernels.weight_gradient(few, ids, offsets, torch.ones(1, 3)).tolist() == [3.0, 0.0, 0.0, 3.0]
    assert kernels.sort_pairs(few, ids).slots.tolist() == [1, 3]
    assert kernels.gather_rows(few, ids)[:, 0].tolist() == [1.0, 0.0, 0.0, 1.0]
    kernels.scatter_rows(few, ids, torch.full((4, 3), 5.0))
    assert few.rows[:, 0].tolist() == [1.0, 5.0, 1.0, 5.0]
    table = torch.full((2**12 + 1,), -1, dtype=torch.int32)
    table[2**12] = 0
    many = Paged(torch.ones(2**19, 1), table, 19)
    assert kernels.weighted_sum(many, ids, None, offsets).tolist() == [[1.0]]
    assert kernels.sort_pairs(many, ids).slots.tolist() == [2**31]


@of_the_cpu
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": torch.tensor([0, 1], dtype=torch.int16)}, "ids must be"),
        ({"ids": torch.tensor([[0, 1]])}, "ids must be"),
        ({"out": torch.empty(1, 4)}, "out must be"),
        ({"out": torch.empty(1, 3, dtype=torch.bfloat16)}, "out must be"),
        ({"out": torch.empty(1, 6)[:, ::2]}, "out must be contiguous"),
    ],
)
def test_what_kernels_cannot_read_or_write_is_refused(changes, message):
    paged = Paged(torch.ones(4, 3), torch.tensor([0, 1], dtype=torch.int32), 1)
    arguments = {"ids": torch.tensor([0, 1]), "out": None} | changes
    with pytest.raises(ValueError, match=message):
        kernels.weighted_sum(paged, arguments["ids"], None, torch.tensor([0, 2]), out=arguments["out"])


@of_the_cpu
def test_nothing_is_written_where_offsets_are_wrong():
    paged = Paged(torch.ones(4, 3), torch.tensor([0, 1], dtype=torch.int32), 1)
    ids, offsets, out = torch.tensor([0, 1]), torch.tensor([0, 2, 1]), torch.full((2, 3), 7.0)
    with pytest.raises(ValueError, match="offsets must run from 0 to the number of ids, 2"):
        kernels.weighted_sum(paged, ids, None, offsets, out=out)
    gradient = torch.full((2,), 7.0)
    with pytest.raises(ValueError, match="offsets must run from 0"):
        kernels.weight_gradient(paged, ids, offsets, torch.ones(2, 3), out=gradient)
    assert set(out.flatten().tolist() + gradient.tolist()) == {7.0}


IDS = st.lists(st.integers(0, 9) | st.sampled_from((-1, 10, 2**31, 2**32 - 1)), max_size=40)
DTYPES = st.sampled_from((torch.int64, torch.int32, torch.uint32))


@kernel_settings
@given(ids=IDS, came=DTYPES, kept=st.sampled_from((torch.int64, torch.int32)), own=st.booleans(), data=st.data())
def test_ids_and_offsets_that_are_admitted(under_test, ids, came, kept, own, data):
    inner = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=4)))
    bounds = [0, *data.draw(st.permutations(inner) | st.just(inner)), len(ids)]
    given_ids, offsets = (
        under_test.to(torch.tensor(ids, dtype=torch.int64).to(came)),
        under_test.to(torch.tensor(bounds)),
    )
    numbers = given_ids.to(torch.int64).tolist()
    found = under_test.kernels.admit_bags(given_ids, offsets, 10, kept, own)
    assert (found is not None) == (all(0 <= number < 10 for number in numbers) and sorted(bounds) == bounds)
    if found is None:
        return
    assert found[0].dtype == kept
    assert (found[0].tolist(), found[1].tolist()) == (numbers, bounds)
    if own:
        for mine, theirs in zip(found, (given_ids, offsets), strict=True):
            assert mine.numel() == 0 or mine.untyped_storage().data_ptr() != theirs.untyped_storage().data_ptr()


@pytest.mark.parametrize("offsets", [[1, 2], [0, 1], [0, 2**63 - 1, -(2**63), 2], [2]])
def test_offsets_that_are_not_admitted(under_test, offsets):
    ids, bounds = under_test.to(torch.tensor([1, 2])), under_test.to(torch.tensor(offsets))
    assert under_test.kernels.admit_bags(ids, bounds, 10, torch.int64, False) is None


@of_the_cpu
def test_admission_knows_its_arguments():
    ids, offsets = torch.tensor([1]), torch.tensor([0, 1])
    for wrong in (
        {"ids": ids.float()},
        {"ids": ids[None]},
        {"offsets": offsets[:0]},
        {"offsets": offsets.int()},
        {"dtype": torch.uint32},
        {"num_slots": 2**31 + 1},
    ):
        arguments = {"ids": ids, "offsets": offsets, "num_slots": 2, "dtype": torch.int32} | wrong
        with pytest.raises(ValueError, match="must be"):
            kernels.admit_bags(**arguments, own=False)
