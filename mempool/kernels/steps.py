"""An optimizer's step as kernels take it: rule, numbers, state, rounding, and the schedule of a dense AdamW."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Algorithm = Literal["sgd", "sgd_momentum", "adagrad", "rowwise_adagrad", "adam", "adamw", "rowwise_adam"]

#: Names of the state tensors each algorithm keeps, in the order in which kernels take them. A step acts on one array:
#: whoever keeps several has these names behind the array's own, as in "values.sum".
STATE_NAMES: dict[str, tuple[str, ...]] = {
    "sgd": (),
    "sgd_momentum": ("momentum_buffer",),
    "adagrad": ("sum",),
    "rowwise_adagrad": ("row_sum",),
    "adam": ("exp_avg", "exp_avg_sq"),
    "adamw": ("exp_avg", "exp_avg_sq"),
    "rowwise_adam": ("exp_avg", "row_exp_avg_sq"),
}

#: State of one number per (row, block); all other state has one per element.
BLOCK_STATE = frozenset({"row_sum", "row_exp_avg_sq", "last_step"})

#: Float32 values [R, W] that the stored ones are rounded from: may accompany any algorithm's state.
MASTER = "master"
#: [R, blocks] int32, the step up to which a row is caught up: accompanies the state of a dense AdamW.
LAST_STEP = "last_step"

#: What a momentum buffer holds in elements that had no gradient yet: the first one is not dampened. Equal to 0.
NO_MOMENTUM = -0.0

ALGORITHMS: tuple[Algorithm, ...] = (
    "sgd",
    "sgd_momentum",
    "adagrad",
    "rowwise_adagrad",
    "adam",
    "adamw",
    "rowwise_adam",
)

_GAMMA = 0x9E3779B97F4A7C15
_MASK = 0xFFFFFFFFFFFFFFFF
#: Momentum smaller than this share of what it was moves no float32 any more, whatever the learning rates.
_NEGLIGIBLE = 2.0**-60


def _mix(bits: int) -> int:
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & _MASK
    return bits ^ (bits >> 31)


@dataclass(frozen=True, slots=True)
class RandomRounding:
    """Stochastic rounding of a step's results to the stored element, from a counter-based generator.

    The 32 random bits of an element are a function of (key, slot id, table column) alone, defined to the bit in
    ``reference.random_bits``: a replay and any placement round alike.

    Attributes:
        key: 64 bits, made by ``RandomRounding.key_of``.
        columns: [num_blocks] int64, beside the arena: the table's column at which each block of the arena starts.
    """

    key: int
    columns: Tensor

    @staticmethod
    def key_of(*, seed: int, table: int, step: int) -> int:
        """The key of one step of one table, as a signed 64-bit number."""
        key = 0
        for number in (seed, table, step):
            key = _mix((key + (number + 1) * _GAMMA) & _MASK)
        return key - (1 << 64) if key >> 63 else key


@dataclass(frozen=True, slots=True)
class OptimizerStep:
    """One commit's optimizer step, with the arithmetic of torch's own optimizers.

    In this order: the gradient is scaled; an L2 decay is added to it; values are multiplied by the decoupled decay; the
    rule; the row is shrunk to ``max_norm``. Only rows with a gradient take part.

    Attributes:
        algorithm: Which rule; see STATE_NAMES for the state it keeps.
        lr: Learning rate.
        grad_scale: Multiplies every summed gradient first (clipping, unscaling, mean over ranks).
        step: Number of this commit, from 1; the step of Adam's bias correction and of Adagrad's learning rate decay.
        eps: Added to the square root, as torch.optim.Adagrad, SparseAdam and AdamW add it.
        beta1: Decay of Adam's first moment.
        beta2: Decay of Adam's second moment.
        lr_decay: Adagrad's learning rate decay.
        weight_decay: Decoupled: values are first multiplied by ``1 - rate * weight_decay``, of the step's own learning
            rate. With ``l2``: values times it are added to the gradient.
        block_dim: Columns of a block; row-wise state is per (row, block). The last block may be narrower.
        rounding: Stochastic rounding of the results; None rounds to nearest, ties to even. float32 is never rounded,
            and neither are rows with a master, which are rounded to nearest.
        l2: Weight decay is part of the gradient, and so of momentum and moments; not of adamw.
        momentum: Of sgd_momentum, as in torch.optim.SGD: the buffer times it, plus the gradient.
        dampening: What is left out of the gradients in that sum, but of the first one of an element (NO_MOMENTUM).
        nesterov: The update is the gradient plus momentum times the buffer.
        corrected_eps: Adam and row-wise Adam add eps after the bias correction of the root, as torch.optim.Adam and
            FBGEMM do; False: beside the uncorrected root, as SparseAdam. AdamW's always is corrected.
        max_norm: Rows with a larger 2-norm after the step are scaled to it, before they are rounded to the stored
            element; infinity bounds nothing. Rows must be one block.

    Raises:
        ValueError: Unknown algorithm, step below 1, block_dim below 1, or an option that the algorithm has not.
    """

    algorithm: Algorithm
    lr: float
    grad_scale: float = 1.0
    step: int = 1
    eps: float = 1e-10
    beta1: float = 0.9
    beta2: float = 0.999
    lr_decay: float = 0.0
    weight_decay: float = 0.0
    block_dim: int = 64
    rounding: RandomRounding | None = None
    l2: bool = False
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    corrected_eps: bool = False
    max_norm: float = math.inf

    def __post_init__(self) -> None:
        if self.algorithm not in STATE_NAMES:
            raise ValueError(f"unknown optimizer algorithm {self.algorithm!r}; known: {', '.join(STATE_NAMES)}")
        if self.step < 1:
            raise ValueError(f"step counts commits from 1, got {self.step}")
        if self.block_dim < 1:
            raise ValueError(f"block_dim must be at least 1, got {self.block_dim}")
        if (self.momentum or self.dampening or self.nesterov) and self.algorithm != "sgd_momentum":
            raise ValueError(f"momentum is of sgd_momentum alone, not of {self.algorithm}")
        if self.l2 and self.algorithm == "adamw":
            raise ValueError("adamw's weight decay is decoupled; for L2 take adam with corrected_eps")
        if not self.max_norm > 0.0:
            raise ValueError(f"max_norm must be above 0, got {self.max_norm}")

    @property
    def rate(self) -> float:
        """The learning rate of this step: Adagrad's decayed, the others' as it is."""
        if self.algorithm in ("adagrad", "rowwise_adagrad"):
            return self.lr / (1.0 + (self.step - 1) * self.lr_decay)
        return self.lr

    @property
    def corrected(self) -> bool:
        """Whether eps is added after the bias correction of the root."""
        return self.algorithm == "adamw" or (self.corrected_eps and self.algorithm in ("adam", "rowwise_adam"))

    @property
    def step_size(self) -> float:
        """What multiplies the update: the step's rate, Adam's bias corrections folded in as torch does."""
        if self.algorithm in ("adam", "adamw", "rowwise_adam"):
            first = 1.0 - self.beta1**self.step
            if self.corrected:
                return self.lr / first
            return self.lr * math.sqrt(1.0 - self.beta2**self.step) / first
        return self.rate

    @property
    def root_correction(self) -> float:
        """What the root of the second moment is divided by before eps is added; 1 where it is not corrected."""
        return math.sqrt(1.0 - self.beta2**self.step) if self.corrected else 1.0

    @property
    def decay(self) -> float:
        """What values are multiplied with first."""
        return 1.0 if self.l2 else 1.0 - self.rate * self.weight_decay

    @property
    def gradient_decay(self) -> float:
        """What multiplies the values that are added to the gradient."""
        return self.weight_decay if self.l2 else 0.0

    @property
    def plain(self) -> bool:
        """Whether it is a rule by itself. Kernels compile variants of their own for options that are used."""
        decays = self.weight_decay != 0.0 and self.algorithm != "adamw"
        return self.algorithm != "sgd_momentum" and not decays and math.isinf(self.max_norm)


class DenseSchedule:
    """The learning rates of a dense AdamW's steps, as what a row without a gradient does in each of them.

    With a gradient of zero, step s makes ``m *= beta1; v *= beta2; x = x * decays[s] - step_sizes[s] * m / (sqrt(v) /
    root_corrections[s] + eps)``. A row that was not touched does its missed steps when it is next touched
    (``mempool.kernels.catch_up``).

    Args:
        first_step: The first step that is recorded; rows know a last step of at least ``first_step - 1``. A table's
            version serves: bias corrections can have numbers of their own.
        beta1, beta2, eps, weight_decay: AdamW's.
        device: Where the kernels run.
    """

    def __init__(
        self,
        *,
        first_step: int,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        device: torch.device | str = "cpu",
    ) -> None:
        self.first_step = first_step
        self.beta1, self.beta2, self.eps, self.weight_decay = beta1, beta2, eps, weight_decay
        self._count = 0
        self._stops: list[int] = []
        self._log_decay = 0.0
        self._steps = torch.empty((3, 64), dtype=torch.float32, device=device)
        self._log_decays = torch.zeros(65, dtype=torch.float64, device=device)

    @property
    def last_step(self) -> int:
        """The last step that is recorded."""
        return self.first_step + self._count - 1

    @property
    def horizon(self) -> int:
        """Steps after which what is left of a row's momentum changes nothing; decay goes on in closed form."""
        return 1 if self.beta1 == 0.0 else max(1, math.ceil(math.log(_NEGLIGIBLE) / math.log(self.beta1)))

    @property
    def steps(self) -> Tensor:
        """[3, T] float32: step_sizes, root_corrections and decays from ``first_step`` on; rows are not contiguous."""
        return self._steps[:, : self._count]

    @property
    def log_decays(self) -> Tensor:
        """[T + 1] float64: the logarithm of the product of all decays before each step."""
        return self._log_decays[: self._count + 1]

    def stop(self, step: int) -> bool:
        """Rows that are behind do their steps up to ``step`` before they go on to later ones, whenever that is: so they
        come out as if all had been looked at then. Ascending. Returns whether that is new."""
        if self._stops and self._stops[-1] >= step:
            return False
        self._stops.append(step)
        return True

    def legs(self, done: int, to: int) -> list[int]:
        """The steps up to which rows are brought one after the other, on their way from ``done`` to ``to``."""
        return [*self._stops[bisect_right(self._stops, done) : bisect_left(self._stops, to)], to]

    @property
    def stops(self) -> tuple[int, ...]:
        """The steps at which it was stopped, ascending."""
        return tuple(self._stops)

    def restore(self, first_step: int, steps: Tensor, log_decays: Tensor) -> None:
        """Take over what another one has recorded, as ``steps`` and ``log_decays`` were there."""
        self.first_step, self._count = first_step, steps.shape[1]
        room = max(64, self._count)
        self._steps = torch.empty((3, room), dtype=torch.float32, device=self._steps.device)
        self._steps[:, : self._count] = steps
        self._log_decays = torch.zeros(room + 1, dtype=torch.float64, device=self._steps.device)
        self._log_decays[: self._count + 1] = log_decays
        self._log_decay = float(log_decays[-1])

    def append(self, lr: float, *, number: int | None = None) -> None:
        """Record the next step. number: of bias corrections, where it is not counted as rows count their last step."""
        if self._count == self._steps.shape[1]:
            self._steps = torch.cat([self._steps, torch.empty_like(self._steps)], dim=1)
            self._log_decays = torch.cat([self._log_decays, torch.zeros_like(self._log_decays[1:])])
        step = OptimizerStep(
            "adamw",
            lr=lr,
            step=self.last_step + 1 if number is None else number,
            beta1=self.beta1,
            beta2=self.beta2,
            eps=self.eps,
            weight_decay=self.weight_decay,
        )
        self._steps[:, self._count] = torch.tensor(
            [step.step_size, step.root_correction, step.decay], dtype=torch.float32, device=self._steps.device
        )
        # A decay of 0 or below (lr * weight_decay >= 1) has no logarithm: NaN sends kernels to the steps one by one.
        self._log_decay += math.log(step.decay) if step.decay > 0.0 else math.nan
        self._count += 1
        self._log_decays[self._count] = self._log_decay
