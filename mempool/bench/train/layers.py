"""A step of a small model with a memory layer: its values here, in an embedded pool, or in a shard's process."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import mempool
from mempool.bench.cases.inputs import distinct, sampled
from mempool.bench.gate import Check
from mempool.bench.serve.shapes import NUM_INPUTS, TableSize
from mempool.bench.train.measured import LAYER, Measured, Work, timed
from mempool.bench.train.steps import CHANGE_TOLERANCE, expected_changes
from mempool.bench.train.tables import LEARNING_RATE, LocalTable
from mempool.nn import MemoryLayer, MemoryLookup, PoolOptimizer
from mempool.nn.choice import weights_of
from mempool.nn.scoring import product_topk

_SAMPLED_PAIRS = 24
_WIDER = 4
#: So wide a dense block takes longer than the memory layer beside it, at the usual sizes.
LONG = 16


class LocalLayer(MemoryLayer):
    """A memory layer whose values are in this process: everything else is the product's.

    Args:
        local: The values.
        dim, shape: As of ``MemoryLayer``, whose table says the sizes and is not asked.
    """

    def __init__(self, dim: int, *, local: LocalTable, **shape: Any) -> None:
        super().__init__(dim, **shape)
        self.local = local

    def _lookup(self, queries: Tensor) -> tuple[Tensor, MemoryLookup]:
        queries_BHD = queries.reshape(-1, self.heads, self.key_dim)
        stride = self.table.schema.stride
        scores, ids = product_topk(queries_BHD, self.scoring_keys(), topk=self.topk, stride=stride)
        weights = weights_of(scores, self.scores)
        bags = self.local.gather(ids.flatten(1), weights.flatten(1))
        return bags, MemoryLookup(ids, scores, weights)


class Model(nn.Module):
    """A dense block, and a memory layer beside it.

    Args:
        wider: The block's inner width, in dims.
        overlapped: The look-up is started before the block, and finished behind it.
    """

    def __init__(self, dim: int, layer: MemoryLayer, *, wider: int = _WIDER, overlapped: bool = False) -> None:
        super().__init__()
        self.dense = nn.Sequential(nn.Linear(dim, wider * dim), nn.GELU(), nn.Linear(wider * dim, dim))
        self.layer = layer
        self.overlapped = overlapped

    def forward(self, x: Tensor) -> Tensor:
        if self.overlapped:
            pending = self.layer.start(x)
            beside: Tensor = self.dense(x)
            return beside + pending.result()
        y: Tensor = self.dense(x) + self.layer(x)
        return y


class Trained:
    """A model and its optimizers.

    Args:
        model: Which.
        commit: Steps the values.
    """

    def __init__(self, model: Model, commit: Callable[[], object]) -> None:
        self.model = model
        self._commit = commit
        # Parameters whose gradients stand for a table's values are the table's optimizer's.
        dense = [parameter for name, parameter in model.named_parameters() if not name.endswith("values")]
        self._dense = torch.optim.SGD(dense, lr=LEARNING_RATE)

    def step(self, x: Tensor, grads: Tensor) -> Tensor:
        """Forward, backward, both optimizers; the output."""
        self._dense.zero_grad(set_to_none=True)
        y: Tensor = self.model(x)
        y.backward(grads)  # type: ignore[no-untyped-call]
        self._dense.step()
        self._commit()
        return y.detach()


def trained(
    dim: int,
    table: mempool.Table,
    *,
    heads: int,
    topk: int,
    seed: int,
    local: LocalTable | None = None,
    wider: int = _WIDER,
    overlapped: bool = False,
) -> Trained:
    """A model of a seed; with values here, if they are given. wider, overlapped: As of ``Model``."""
    torch.manual_seed(seed)
    shape: dict[str, Any] = {"table": table, "heads": heads, "topk": topk, "key_dim": min(128, 2 * dim)}
    layer = MemoryLayer(dim, **shape) if local is None else LocalLayer(dim, local=local, **shape)
    model = Model(dim, layer, wider=wider, overlapped=overlapped)
    return Trained(model, PoolOptimizer(model).step if local is None else local.commit)


def measure(
    size: TableSize,
    models: Mapping[str, Trained],
    *,
    tokens: int,
    rounds: int,
    budget_s: float,
    seed: int,
    family: str = LAYER,
) -> Measured:
    """A step of models that are the same but for where their values are.

    Args:
        size: Of their tables, which train by SGD.
        models: By contender, untrained.
        tokens: Of a step.
        rounds: Rounds to time.
        budget_s: When it is spent, the rounds end early.
        seed: Of the tokens.
        family: Of the ``Work``.

    Raises:
        GateError: A model's output, or the values after its first step, are wrong: nothing was timed.
    """
    generator = torch.Generator().manual_seed(seed)
    dim = next(iter(models.values())).model.layer.dim
    sets = [
        (torch.randn(tokens, dim, generator=generator), torch.randn(tokens, dim, generator=generator))
        for _ in range(NUM_INPUTS)
    ]
    checks = [check for name, model in models.items() for check in checked(name, size, model, *sets[0])]
    layer = next(iter(models.values())).model.layer
    work = Work(family, "sgd", size.num_slots, tokens, layer.heads * layer.topk)
    runs = {name: partial(_on, model, sets) for name, model in models.items()}
    return timed(work, checks, runs, num_inputs=len(sets), rounds=rounds, budget_s=budget_s)


def _on(model: Trained, sets: Sequence[tuple[Tensor, Tensor]], number: int) -> object:
    return model.step(*sets[number])


def checked(name: str, size: TableSize, trained: Trained, x: Tensor, grads: Tensor) -> list[Check]:
    """The output, and the changes of some rows after the first step, beside the same model in float64."""
    model = trained.model
    with torch.no_grad():
        _, lookup = model.layer(x, return_lookup=True)
    ids, weights = (part.reshape(x.shape[0], -1) for part in (lookup.ids, lookup.weights))
    slots, places = torch.unique(ids, return_inverse=True)
    assert model.layer.gate is not None
    assert model.layer.out is not None
    dense, gate, out = (copy.deepcopy(part).double() for part in (model.dense, model.layer.gate, model.layer.out))
    values = size.values(slots).double()
    bags = (values[places] * weights.double().unsqueeze(-1)).sum(1).requires_grad_()
    y = dense(x.double()) + out(torch.nn.functional.silu(gate(x.double())) * bags)
    (bag_grads,) = torch.autograd.grad(y, bags, grads.double())
    found = trained.step(x, grads)
    flat = ids.flatten()
    some = distinct(flat[sampled(_SAMPLED_PAIRS, flat.numel(), size.seed)])
    changes = expected_changes(some, ids, weights, bag_grads, "sgd")
    table = model.layer.local if isinstance(model.layer, LocalLayer) else model.layer.table
    changed = table.rows(some).double() - size.values(some).double()
    return [Check.of(name, [found], [y.detach()]), Check.of(name, [changed], [changes], CHANGE_TOLERANCE)]
