"""Packed sequences are each sequence alone, padding changes nothing, and what contradicts itself is refused."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mempool.client import Pool
from mempool.errors import InvalidRequest
from mempool.nn import NgramMemory

from .test_formulas import DIM, VOCAB, make

LENGTHS = (5, 1, 7, 2)


@pytest.fixture
def memory(pool: Pool) -> Iterator[NgramMemory]:
    yield make(pool, {"gate": "signed_sqrt", "bias": True, "dilation": 2})
    pool.drop_table("ngrams")


def sequences() -> list[tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(4)
    return [
        (torch.randn(length, DIM, generator=random), torch.randint(0, VOCAB, (length,), generator=random))
        for length in LENGTHS
    ]


def packings() -> dict[str, dict[str, Tensor]]:
    lengths = torch.tensor(LENGTHS)
    segments = torch.repeat_interleave(torch.tensor([3, 3 + 1, 0, 9]), lengths)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    cu_seqlens = torch.cat([torch.tensor([0]), lengths.cumsum(0)]).int()
    return {
        "segment_ids": {"segment_ids": segments},
        "positions": {"positions": positions},
        "cu_seqlens": {"cu_seqlens": cu_seqlens},
    }


def gradients(memory: NgramMemory) -> list[Tensor]:
    """Of the parameters, and of the rows as their squared norm; nothing stays."""
    prepared = memory.lookup.table.prepare()
    assert prepared is not None
    memory.lookup.table.discard()
    found = [p.grad.clone() for name, p in memory.named_parameters() if p.grad is not None and "lookup" not in name]
    memory.zero_grad()
    return [*found, torch.tensor(prepared.squared_norm, dtype=torch.float32)]


@pytest.mark.parametrize("way", packings())
def test_packed_sequences_are_each_alone(memory: NgramMemory, way: str) -> None:
    each = sequences()
    hidden, tokens = torch.cat([h for h, _ in each]), torch.cat([t for _, t in each])
    alone = torch.cat([memory(h, t) for h, t in each])
    alone.sin().sum().backward()
    expected = gradients(memory)
    packed = memory(hidden, tokens, **packings()[way])
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-6)
    packed.sin().sum().backward()
    torch.testing.assert_close(gradients(memory), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(memory(hidden, tokens), alone)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_changes_nothing(memory: NgramMemory, side: str) -> None:
    (short, few), (long, many) = sequences()[0], sequences()[2]
    alone = [memory(short, few), memory(long, many)]
    sum(each.sin().sum() for each in alone).backward()  # type: ignore[union-attr]
    expected = gradients(memory)
    place = slice(0, 5) if side == "right" else slice(2, 7)
    hidden, tokens, mask = torch.randn(2, 7, DIM), torch.full((2, 7), -100), torch.zeros(2, 7, dtype=torch.int64)
    hidden[0, place], tokens[0, place], mask[0, place] = short, few, 1
    hidden[1], tokens[1], mask[1] = long, many, 1
    hidden.requires_grad_()
    y = memory(hidden, tokens, mask=mask)
    torch.testing.assert_close([y[0, place], y[1]], alone, rtol=1e-5, atol=1e-6)
    assert float(y[mask == 0].detach().abs().max()) == 0.0
    y.cos().sum().backward()
    assert float(hidden.grad[mask == 0].abs().max()) == 0.0
    gradients(memory)
    memory(hidden, tokens, mask=mask).sin().sum().backward()
    torch.testing.assert_close(gradients(memory), expected, rtol=1e-4, atol=1e-5)


def test_padding_asks_for_no_rows(memory: NgramMemory) -> None:
    before = memory.lookup.table.counters.lookups
    rows = memory.lookup(torch.full((2, 3), -1), mask=torch.zeros(2, 3, dtype=torch.bool))
    assert memory.lookup.table.counters.lookups == before
    assert float(rows.values.detach().abs().max()) == 0.0


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"segment_ids": torch.zeros(1, 4).long(), "positions": torch.arange(4)[None]}, "segment_ids and positions both"),
    ({"segment_ids": torch.zeros(4).long()}, r"segment_ids is \[4\] for tokens of \[1, 4\]"),
    ({"segment_ids": torch.zeros(1, 4)}, "must be a tensor of integers, got torch.float32"),
    ({"positions": torch.tensor([[2, 3, 4, 5]])}, r"positions\[0, 0\] = 2 comes after nothing"),
    ({"positions": torch.tensor([[0, 1, 3, 4]])}, r"positions\[0, 2\] = 3 comes after 1"),
    ({"positions": torch.arange(4)[None], "mask": torch.tensor([[1, 0, 1, 1]])}, r"positions\[0, 2\] = 2"),
    ({"cu_seqlens": torch.tensor([0, 3])}, r"must rise from 0 to the 4 tokens, got \[0, 3\]"),
    ({"cu_seqlens": torch.tensor([0, 3, 2, 4])}, "must rise from 0"),
    ({"cu_seqlens": torch.tensor([], dtype=torch.int64)}, "must rise from 0"),
    ({"cu_seqlens": torch.tensor([[0, 4]])}, r"must be a tensor \[sequences \+ 1\]"),
    ({"mask": torch.tensor([[0, 1, 2, 1]])}, "neither 0 nor 1"),
    ({"mask": torch.ones(4)}, r"mask is \[4\] for tokens of \[1, 4\]"),
]


@pytest.mark.parametrize(("packing", "told"), WRONG)
def test_packing_that_makes_no_sense(memory: NgramMemory, packing: dict[str, Tensor], told: str) -> None:
    before = memory.lookup.table.counters.lookups
    with pytest.raises(InvalidRequest, match=told):
        memory(torch.zeros(1, 4, DIM), torch.zeros(1, 4, dtype=torch.int64), **packing)
    with pytest.raises(InvalidRequest, match=told):
        memory.prefetch(torch.zeros(1, 4, dtype=torch.int64), **packing)
    assert memory.lookup.table.counters.lookups == before


def test_cu_seqlens_are_of_one_row(memory: NgramMemory) -> None:
    with pytest.raises(InvalidRequest, match="got 2 rows"):
        memory.prefetch(torch.zeros(2, 4, dtype=torch.int64), cu_seqlens=torch.tensor([0, 4]))


def test_empty_batches_have_empty_answers(memory: NgramMemory) -> None:
    for shape in ((0, 4), (2, 0), (0,)):
        y = memory(torch.zeros(*shape, DIM), torch.zeros(*shape, dtype=torch.int64))
        assert y.shape == (*shape, DIM)
