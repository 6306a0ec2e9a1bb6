"""What a pool must equal: one process, torch's own sparse optimizers, float64."""

import torch
from torch import Tensor

from mempool.types import TableSchema

from .driver import Bags


class Oracle:
    """One process with torch's own optimizer, in float64."""

    def __init__(self, schema: TableSchema, values_NV: Tensor) -> None:
        self.schema = schema
        self.values = torch.nn.Parameter(values_NV.double())
        self.optimizer = _optimizer(schema, self.values)

    def backward(self, bags: Bags, grads_BV: Tensor) -> Tensor:
        """Adds a lookup's gradient to the step's; returns d_weights."""
        ones = torch.ones(bags.ids.shape[0], dtype=torch.float64)
        weights = (ones if bags.weights is None else bags.weights.double()).requires_grad_()
        sums = torch.nn.functional.embedding_bag(
            bags.ids,
            self.values,
            bags.offsets,
            mode="sum",
            per_sample_weights=weights,
            sparse=True,
            include_last_offset=True,
        )
        with torch.sparse.check_sparse_tensor_invariants():
            sums.backward(grads_BV.double())
        assert weights.grad is not None
        return weights.grad

    def step(self, lr: float, grad_scale: float) -> None:
        assert self.values.grad is not None
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # torch warns of the checks it leaves out unless told which way; they are wanted here.
        with torch.sparse.check_sparse_tensor_invariants():
            self.values.grad = self.values.grad.coalesce() * grad_scale
            self.optimizer.step()
        self.optimizer.zero_grad()


class RowWiseAdagrad(torch.optim.Optimizer):
    """Adagrad with one accumulator per (slot, block): the mean of the squared gradient. torch has none of its own."""

    def __init__(self, values_NV: Tensor, schema: TableSchema) -> None:
        super().__init__([values_NV], {"lr": 0.0})
        self.schema = schema
        self.row_sum = torch.zeros(values_NV.shape[0], schema.num_blocks, dtype=torch.float64)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        (values_NV,) = self.param_groups[0]["params"]
        grad = values_NV.grad.coalesce()
        rows = grad.indices()[0]
        for block in range(self.schema.num_blocks):
            columns = slice(*self.schema.block_columns(block))
            part = grad.values()[:, columns]
            self.row_sum[rows, block] += part.square().mean(1)
            divisor = self.row_sum[rows, block].sqrt() + self.schema.optimizer.eps
            values_NV[rows, columns] -= self.param_groups[0]["lr"] * part / divisor[:, None]


def _optimizer(schema: TableSchema, values_NV: Tensor) -> torch.optim.Optimizer:
    spec = schema.optimizer
    if spec.algorithm == "sgd":
        return torch.optim.SGD([values_NV], lr=spec.lr)
    if spec.algorithm == "adagrad":
        return torch.optim.Adagrad(
            [values_NV],
            lr=spec.lr,
            eps=spec.eps,
            lr_decay=spec.lr_decay,
            initial_accumulator_value=spec.initial_accumulator_value,
        )
    if spec.algorithm == "adam":
        return torch.optim.SparseAdam([values_NV], lr=spec.lr, eps=spec.eps, betas=(spec.beta1, spec.beta2))
    return RowWiseAdagrad(values_NV, schema)
