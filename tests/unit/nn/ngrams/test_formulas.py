"""The n-gram memory against its paper's formulas in float64, over embedded and gRPC pools of one, two and three shards;
and trained, against the same module over a local tensor."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mempool
from mempool.client import Pool, Table
from mempool.nn import NgramLookup, NgramMemory, NgramRows, Ngrams, PoolOptimizer
from tests.unit.client.grpc_pool import GrpcPoolHere

from .formulas import output_of

DIM, HEAD_DIM, VOCAB = 6, 4, 11
NGRAMS = Ngrams(orders=(2, 3), heads=2, slots=(13, 20))

OPTIONS: list[dict[str, Any]] = [
    {},
    {"gate": "signed_sqrt", "bias": True, "kernel_size": 3, "dilation": 1},
    {"kernel_size": 0},
    {"multipliers": "per_head", "canonical": torch.arange(VOCAB) // 2, "pad_id": 3},
]


@contextmanager
def opened(kind: str, shards: int) -> Iterator[Pool]:
    if kind == "embedded":
        with mempool.local(shards=shards, device="cpu") as pool:
            yield pool
        return
    here = GrpcPoolHere(shards=shards)
    try:
        with mempool.connect(here.address) as pool:
            yield pool
    finally:
        here.close()


def make(pool: Pool, options: dict[str, Any], name: str = "ngrams") -> NgramMemory:
    table = pool.create_table(NGRAMS.table_config(name, head_dim=HEAD_DIM, lr=0.002, seed=3, page_slots=8))
    of_lookup = {key: options[key] for key in ("multipliers", "canonical", "pad_id") if key in options}
    of_layer = {key: value for key, value in options.items() if key not in of_lookup}
    torch.manual_seed(1)
    memory = NgramMemory(DIM, NgramLookup(table, NGRAMS, vocab_size=VOCAB, **of_lookup), **of_layer)
    for name, parameter in memory.named_parameters():
        if "lookup" not in name:
            nn.init.normal_(parameter)
    return memory


def batch(seed: int = 0, rows: int = 2, length: int = 9) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, length, DIM, generator=random)
    return hidden, torch.randint(0, VOCAB, (rows, length), generator=random)


def row_gradients(table: Table, before: Tensor) -> Tensor:
    """By a step of plain descent at rate 1: what was held."""
    table.commit(lr=1.0)
    return before - table.rows(range(table.num_slots))


@pytest.mark.parametrize(
    ("kind", "shards"), [("embedded", 1), ("embedded", 2), ("embedded", 3), ("grpc", 1), ("grpc", 2), ("grpc", 3)]
)
def test_the_output_and_all_gradients_are_the_formulas(kind: str, shards: int) -> None:
    with opened(kind, shards) as pool:
        for number, options in enumerate(OPTIONS):
            memory = make(pool, options, name=f"ngrams{number}")
            table = pool.create_table(
                NGRAMS.table_config(
                    f"plain{number}", head_dim=HEAD_DIM, lr=1.0, seed=3, page_slots=8, optimizer=mempool.optim.SGD(lr=1)
                )
            )
            memory.lookup.use_table(table)
            rows = table.rows(range(table.num_slots))
            hidden, tokens = batch()
            hidden.requires_grad_()
            y = memory(hidden, tokens)
            weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(9))
            (y * weights).sum().backward()

            parts = {name: p.detach().double().requires_grad_() for name, p in memory.named_parameters()}
            parts["rows"] = rows.double().requires_grad_()
            own = hidden.detach().double().requires_grad_()
            expected = torch.stack([output_of(memory, parts, own[b], tokens[b].tolist()) for b in range(len(tokens))])
            (expected * weights).sum().backward()
            torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(hidden.grad.double(), own.grad, rtol=1e-4, atol=1e-5)
            for name, parameter in memory.named_parameters():
                if name != "lookup.values":
                    torch.testing.assert_close(parameter.grad.double(), parts[name].grad, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(row_gradients(table, rows).double(), parts["rows"].grad, rtol=1e-4, atol=1e-5)


class LocalRows(nn.Module):
    """The same lookup over a tensor of this process."""

    def __init__(self, lookup: NgramLookup, rows: Tensor) -> None:
        super().__init__()
        self.lookup = (lookup,)
        self.rows = nn.Embedding.from_pretrained(rows.clone(), freeze=False, sparse=True)

    def forward(self, tokens: Tensor) -> NgramRows:
        slots = self.lookup[0].slots(tokens)
        positions = torch.arange(tokens.shape[-1]).expand(tokens.shape)
        return NgramRows(self.rows(slots).flatten(-2), positions, None)


def test_two_hundred_steps_are_those_of_a_local_tensor_through_rescales() -> None:
    with mempool.local(shards=1, device="cpu") as pool:
        # Not "signed_sqrt": its slope has no bound, and two orders of summing in one process end 1e-3 apart.
        memory, other = (make(pool, {}, name=name) for name in ("ngrams", "unused"))
        other.load_state_dict(memory.state_dict(), strict=True)
        table = memory.lookup.table
        local = LocalRows(memory.lookup, table.rows(range(table.num_slots)))
        mine = [p for name, p in memory.named_parameters() if name != "lookup.values"]
        theirs = [p for name, p in other.named_parameters() if name != "lookup.values"]
        dense = torch.optim.Adam(mine, lr=0.002)
        dense_other = torch.optim.Adam(theirs, lr=0.002)
        sparse = torch.optim.SparseAdam(local.parameters(), lr=0.01)
        memory_optimizer = PoolOptimizer(memory)
        for step in range(200):
            if step in (70, 140):
                pool.rescale(3 if step == 70 else 2)
            hidden, tokens = batch(step, length=7)
            memory.prefetch(tokens)
            for model, given in ((memory, tokens), (other, local(tokens))):
                (model(hidden, given) - hidden.roll(1, 1)).square().mean().backward()
            for optimizer in (dense, memory_optimizer, dense_other, sparse):
                optimizer.step()
                if optimizer is not memory_optimizer:
                    optimizer.zero_grad()
        ours, expected = table.rows(range(table.num_slots)), local.rows.weight.detach()
        assert float((ours - expected).norm() / expected.norm()) < 1e-5
        for own, parameter in zip(mine, theirs, strict=True):
            assert float((own - parameter).detach().norm()) <= 1e-5 * float(parameter.detach().norm())
