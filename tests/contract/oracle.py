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

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        (values_NV,) = self.param_groups[0]["params"]
        gradient = values_NV.grad.coalesce()
        rows, grad = gradient.indices()[0], gradient.values()
        spec, lr = self.schema.optimizer, self.param_groups[0]["lr"]
        self.steps += 1
        mean_square = torch.empty_like(grad)
        for block in range(self.schema.num_blocks):
            columns = slice(*self.schema.block_columns(block))
            mean_square[:, columns] = grad[:, columns].square().mean(1, keepdim=True)
        if spec.algorithm == "rowwise_adagrad":
            self.exp_avg_sq[rows] += mean_square
            values_NV[rows] -= lr * grad / (self.exp_avg_sq[rows].sqrt() + spec.eps)
            return
        square = mean_square if spec.algorithm == "rowwise_adam" else grad.square()
        self.exp_avg[rows] += (1 - spec.beta1) * (grad - self.exp_avg[rows])
        self.exp_avg_sq[rows] += (1 - spec.beta2) * (square - self.exp_avg_sq[rows])
        first, second = 1 - spec.beta1**self.steps, (1 - spec.beta2**self.steps) ** 0.5
        if spec.algorithm == "rowwise_adam":  # as SparseAdam: eps beside the root that is not corrected
            values_NV[rows] -= lr * second / first * self.exp_avg[rows] / (self.exp_avg_sq[rows].sqrt() + spec.eps)
        else:
            values_NV[rows] *= 1 - lr * spec.weight_decay
            values_NV[rows] -= lr / first * self.exp_avg[rows] / (self.exp_avg_sq[rows].sqrt() / second + spec.eps)


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
    if spec.dense:
        return torch.optim.AdamW(
            [values_NV], lr=spec.lr, eps=spec.eps, betas=(spec.beta1, spec.beta2), weight_decay=spec.weight_decay
        )
    return TouchedRows(values_NV, schema)
