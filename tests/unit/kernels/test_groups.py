"""The best slots in groups against brute force: keys on pages anywhere, parts of them, ties that rounding makes."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mempool import kernels
from mempool.kernels.dispatch import groups as grouped_module


def paged(keys: Tensor, *, size: int, rows_before: int, shift: int, generator: torch.Generator) -> list[kernels.Paged]:
    """Keys of slots on pages of two arenas, in any order, beside rows that are none of them."""
    ids = torch.arange(len(keys))
    ids = ids + (ids // size + 1) * rows_before
    num_pages = (int(ids[-1]) >> shift) + 1
    whole = torch.full((num_pages << shift, keys.shape[1]), 77.0)  # what is none of the slots would win
    whole[ids] = keys
    owner = torch.randint(0, 2, (num_pages,), generator=generator)
    found = []
    for arena in (0, 1):
        own = (owner == arena).nonzero()[:, 0]
        own = own[torch.randperm(len(own), generator=generator)]
        table = torch.full((num_pages,), -1, dtype=torch.int32)
        table[own] = torch.arange(len(own), dtype=torch.int32)
        rows = whole.view(num_pages, 1 << shift, -1)[own].flatten(0, 1) if len(own) else torch.zeros(1, keys.shape[1])
        found.append(kernels.Paged(rows.contiguous(), table, shift))
    return found


def brute_force(
    queries: Tensor, keys: Tensor, groups: Tensor, added: Tensor, k: int, size: int
) -> tuple[Tensor, Tensor]:
    page = torch.zeros(1, dtype=torch.int32)
    scores, ids = kernels.flat_topk(queries, kernels.Paged(keys, page, 30), len(keys), len(keys))
    scores = scores.gather(1, ids.argsort(dim=1))  # by slot, to the kernel's bits
    of_group = torch.arange(len(keys)) // size
    matches = groups[:, :, None] == of_group
    sums = scores + (added[:, :, None] * matches).sum(dim=1)
    sums = sums.masked_fill(~matches.any(dim=1), -torch.inf)
    best = sums.sort(dim=1, descending=True, stable=True)
    lacking = max(0, k - len(keys))
    values = torch.nn.functional.pad(best.values[:, :k], (0, lacking), value=-torch.inf)
    ids = torch.nn.functional.pad(best.indices[:, :k], (0, lacking), value=-1)
    return values, ids.masked_fill(values == -torch.inf, -1)


@settings(max_examples=60, deadline=None)
@given(
    num_slots=st.integers(1, 90),
    rows_before=st.integers(0, 1),
    shift=st.integers(0, 5),
    loud=st.sampled_from([0.0, 1.0, 2.0**24]),
    candidates=st.sampled_from([1, 100, 1 << 22]),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_parts_of_the_keys_merge_to_the_best_of_all(
    num_slots: int, rows_before: int, shift: int, loud: float, candidates: int, seed: int, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_groups = -(-num_slots // data.draw(st.integers(1, num_slots)))
    size = -(-num_slots // num_groups)
    num_groups = -(-num_slots // size)
    probes, k = data.draw(st.integers(1, num_groups)), data.draw(st.integers(1, 12))
    keys = torch.randn(num_slots, 3, generator=generator)
    queries = torch.randn(5, 3, generator=generator)
    groups = (
        torch.stack([torch.randperm(num_groups, generator=generator)[:probes] for _ in range(5)]).sort(dim=1).values
    )
    # Beside loud ones all scores of a group become equal sums: ties go by number, whatever the scores were.
    added = loud * torch.randint(1, 3, (5, probes), generator=generator).float()
    parts = paged(keys, size=size, rows_before=rows_before, shift=shift, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouped_module, "_CHUNK_CANDIDATES", candidates)
        found = [
            kernels.grouped_topk(
                queries, part, groups, added, k, num_slots=num_slots, group_size=size, rows_before=rows_before
            )
            for part in parts
        ]
    sums, slots = (torch.cat(each, dim=1) for each in zip(*found, strict=True))
    order = torch.where(slots < 0, num_slots, slots).argsort(dim=1, stable=True)
    order = order.gather(1, sums.gather(1, order).argsort(dim=1, descending=True, stable=True))[:, :k]
    expected = brute_force(queries, keys, groups, added, k, size)
    assert torch.equal(sums.gather(1, order), expected[0])
    assert torch.equal(slots.gather(1, order), expected[1])


def test_slots_without_a_score_are_no_candidates() -> None:
    keys = torch.tensor([[1.0], [torch.nan], [2.0], [-torch.inf]])
    page = kernels.Paged(keys, torch.zeros(1, dtype=torch.int32), 2)
    ones, groups = torch.ones(1, 1), torch.tensor([[0, 1]])
    sums, slots = kernels.grouped_topk(ones, page, groups, torch.zeros(1, 2), 4, num_slots=4, group_size=2)
    assert slots.tolist() == [[2, 0, 3, -1]]
    assert sums.tolist() == [[2.0, 1.0, -torch.inf, -torch.inf]]
    none = kernels.grouped_topk(ones[:0], page, groups[:0], torch.zeros(0, 2), 4, num_slots=4, group_size=2)
    assert [part.shape for part in none] == [(0, 4), (0, 4)]
    with pytest.raises(ValueError, match="groups of a query must be at least 1, got 4, 2, 4, 0"):
        kernels.grouped_topk(ones, page, groups[:, :0], torch.zeros(1, 0), 4, num_slots=4, group_size=2)


@pytest.mark.parametrize("probes", [1, 3])
def test_all_slots_are_looked_at_where_the_last_winner_has_a_tie_and_no_more(
    monkeypatch: pytest.MonkeyPatch, probes: int
) -> None:
    """Also where all winners are of one group, whose last candidate would otherwise be the last winner."""
    taken: list[int] = []

    def flat_topk(queries: Tensor, keys: kernels.Paged, k: int, *given: int, **options: bool) -> tuple[Tensor, Tensor]:
        taken.append(k)
        return kernels.flat_topk(queries, keys, k, *given, **options)

    monkeypatch.setattr(grouped_module, "flat_topk", flat_topk)
    generator = torch.Generator().manual_seed(3)
    keys = torch.randn(64, 3, generator=generator)
    page = kernels.Paged(keys, torch.zeros(1, dtype=torch.int32), 6)
    queries, groups = torch.randn(5, 3, generator=generator), torch.arange(probes).repeat(5, 1)
    for loud, expected in ((0.0, {5}), (2.0**24, {5, 16})):
        taken.clear()
        added = torch.full((5, probes), loud)
        added[:, 0] += 9.0
        kernels.grouped_topk(queries, page, groups, added, 4, num_slots=64, group_size=16)
        assert set(taken) == expected


@pytest.mark.parametrize(("queries", "groups"), [(40, 3), (1, 40)])
def test_queries_are_copied_for_their_groups_some_at_a_time(
    monkeypatch: pytest.MonkeyPatch, queries: int, groups: int
) -> None:
    copied: list[int] = []
    candidates = grouped_module._Search._candidates

    def watched(search: grouped_module._Search, some: Tensor, *given: Any) -> Any:
        copied.append(given[0].numel() * some.shape[1])
        return candidates(search, some, *given)

    monkeypatch.setattr(grouped_module._Search, "_candidates", watched)
    monkeypatch.setattr(grouped_module, "_CHUNK_CANDIDATES", 600)
    page = kernels.Paged(torch.randn(40, 50), torch.zeros(1, dtype=torch.int32), 6)
    named = torch.arange(groups).repeat(queries, 1)
    kernels.grouped_topk(torch.randn(queries, 50), page, named, torch.zeros(named.shape), 1, num_slots=40, group_size=1)
    assert max(copied) <= 600
    assert sum(copied) == 50 * queries * groups
