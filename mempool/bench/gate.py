"""The correctness gate: no contender's time counts before its result on the very inputs agrees with float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: Largest difference from float64 that a float32 result may have, as a share of the largest number expected.
FLOAT32_TOLERANCE = 1e-5
#: The same for results that are rounded to bfloat16, or made of numbers that were: one unit in the last place.
BFLOAT16_TOLERANCE = 2.0**-7


@dataclass(frozen=True)
class Check:
    """How far a contender's result is from what float64 says.

    Attributes:
        contender: Whose result.
        error: The largest difference, as a share of the largest number expected; NaN or inf if the result has such.
        tolerance: What it may be.
    """

    contender: str
    error: float
    tolerance: float

    @classmethod
    def of(
        cls,
        contender: str,
        actual: Sequence[Tensor],
        expected: Sequence[Tensor],
        tolerance: float = FLOAT32_TOLERANCE,
    ) -> Check:
        """Compare parts of a contender's result with what float64 says; the worst part counts."""
        errors = [difference(found, wanted) for found, wanted in zip(actual, expected, strict=True)]
        # max() of Python would drop a NaN that does not come first.
        return cls(contender, float(torch.tensor(errors, dtype=torch.float64).max()), tolerance)

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # False for NaN

    def __str__(self) -> str:
        return f"{self.contender} is off by {self.error:.3g} of the largest number, {self.tolerance:.3g} is allowed"


class GateError(Exception):
    """Contenders of a case disagree with the float64 reference."""

    def __init__(self, case: str, checks: Sequence[Check]) -> None:
        self.case = case
        self.wrong = tuple(check for check in checks if not check.passed)
        super().__init__(f"{case}: " + "; ".join(map(str, self.wrong)))


def difference(actual: Tensor, expected: Tensor) -> float:
    """Largest difference from ``expected``, as a share of its largest magnitude.

    Args:
        actual: Any shape and dtype.
        expected: The same shape, finite.
    """
    if actual.shape != expected.shape:
        raise ValueError(f"a result of shape {list(actual.shape)} is compared with {list(expected.shape)}")
    if not actual.numel():
        return 0.0
    expected = expected.double().cpu()
    largest = float(expected.abs().max())
    return float((actual.double().cpu() - expected).abs().max()) / (largest if largest > 0.0 else 1.0)
