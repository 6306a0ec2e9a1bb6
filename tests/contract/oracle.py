"""What a pool must equal: one process, torch's own sparse optimizers, float64."""

import torch
from torch import Tensor

from mempool.types import TableSchema

from .bags import Bags


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
            if self.schema.optimizer.dense:
                self.values.grad = self.values.grad.to_dense()
            self.optimizer.step()
        self.optimizer.zero_grad()


class TouchedRows(torch.optim.Optimizer):
    """Rules that torch has not for sparse gradients: of rows with a gradient, row-wise state per (slot, block)."""

    def __init__(self, values_NV: Tensor, schema: TableSchema) -> None:
        super().__init__([values_NV], {"lr": 0.0})
        self.schema = schema
        self.steps = 0
        self.exp_avg = torch.zeros_like(values_NV)
        self.exp_avg_sq = torch.zeros_like(values_NV)
        self.touched = torch.zeros(values_NV.shape[0], 1, dtype=torch.bool)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        (values_NV,) = self.param_groups[0]["params"]
        gradient = values_NV.grad.coalesce()
        rows, grad = gradient.indices()[0], gradient.values()
        spec, lr = self.schema.optimizer, self.param_groups[0]["lr"]
        self.steps += 1
        if spec.decoupled_weight_decay or spec.algorithm == "adamw":
            values_NV[rows] *= 1 - lr * spec.weight_decay
        else:
            grad = grad + spec.weight_decay * values_NV[rows]
        values_NV[rows] -= lr * self._update(rows, grad)
        self.touched[rows] = True
        if spec.max_norm is not None:
            norms = values_NV[rows].norm(dim=1, keepdim=True)
            values_NV[rows] *= (spec.max_norm / norms).clamp(max=1.0)

    def _update(self, rows: Tensor, grad: Tensor) -> Tensor:
        """What the learning rate multiplies."""
        spec = self.schema.optimizer
        if spec.algorithm == "sgd":
            later = spec.momentum * self.exp_avg[rows] + (1 - spec.dampening) * grad
            self.exp_avg[rows] = torch.where(self.touched[rows], later, grad)
            return grad + spec.momentum * self.exp_avg[rows] if spec.nesterov else self.exp_avg[rows]
        square = grad.square()
        if spec.algorithm.startswith("rowwise"):
            for block in range(self.schema.num_blocks):
                columns = slice(*self.schema.block_columns(block))
                square[:, columns] = square[:, columns].mean(1, keepdim=True)
        if spec.algorithm.endswith("adagrad"):
            self.exp_avg_sq[rows] += square
            return grad / (self.exp_avg_sq[rows].sqrt() + spec.eps)
        self.exp_avg[rows] += (1 - spec.beta1) * (grad - self.exp_avg[rows])
        self.exp_avg_sq[rows] += (1 - spec.beta2) * (square - self.exp_avg_sq[rows])
        first, second = 1 - spec.beta1**self.steps, (1 - spec.beta2**self.steps) ** 0.5
        if spec.corrected_eps or spec.algorithm == "adamw":
            return self.exp_avg[rows] / first / (self.exp_avg_sq[rows].sqrt() / second + spec.eps)
        # As SparseAdam: eps beside the root that is not corrected.
        return second / first * self.exp_avg[rows] / (self.exp_avg_sq[rows].sqrt() + spec.eps)


def _optimizer(schema: TableSchema, values_NV: Tensor) -> torch.optim.Optimizer:
    spec = schema.optimizer
    if spec.momentum or spec.max_norm or spec.corrected_eps or (spec.weight_decay and not spec.dense):
        return TouchedRows(values_NV, schema)
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
    if spec.dense:
        return torch.optim.AdamW(
            [values_NV], lr=spec.lr, eps=spec.eps, betas=(spec.beta1, spec.beta2), weight_decay=spec.weight_decay
        )
    return TouchedRows(values_NV, schema)
