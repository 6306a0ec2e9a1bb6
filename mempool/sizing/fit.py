"""Constants out of measured points: least squares of relative errors, none of them negative."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from mempool.sizing.traffic import Amounts

_ROUNDS = 100
_TOLERANCE = 1e-10

_Vector = npt.NDArray[np.float64]


def fitted(
    amounts: Sequence[Amounts], seconds: Sequence[float], weights: Sequence[float] | None = None
) -> dict[str, float]:
    """The constants by which amounts come nearest to what was measured; each at least 0.

    Args:
        amounts: Of each point, by term; a term that one lacks is 0 there.
        seconds: What is to be explained, of each point.
        weights: By what an error of each point is divided; the seconds themselves, if not given.

    Returns:
        Seconds for one of each term.
    """
    terms = sorted({term for point in amounts for term in point})
    table = np.array([[point.get(term, 0.0) for term in terms] for point in amounts], dtype=np.float64)
    scale = np.maximum(np.array(seconds if weights is None else weights, dtype=np.float64), 1e-9)
    wanted = np.array(seconds, dtype=np.float64) / scale
    table = table / scale[:, None]
    size = np.maximum(np.linalg.norm(table, axis=0), 1e-300)
    found = _not_negative(table / size, wanted) / size
    return dict(zip(terms, found.tolist(), strict=True))


def total(constants: Mapping[str, float], amounts: Amounts) -> float:
    """Seconds of these amounts."""
    return sum(constants.get(term, 0.0) * amount for term, amount in amounts.items())


def _not_negative(table: _Vector, wanted: _Vector) -> _Vector:
    """Lawson and Hanson's active set: argmin |table x - wanted| over x >= 0."""
    count = table.shape[1]
    free = np.zeros(count, dtype=np.bool_)
    found: _Vector = np.zeros(count)
    for _ in range(_ROUNDS):
        slope = table.T @ (wanted - table @ found)
        slope[free] = -np.inf
        if free.all() or slope.max() <= _TOLERANCE:
            break
        free[int(slope.argmax())] = True
        while True:
            trial: _Vector = np.zeros(count)
            trial[free] = np.linalg.lstsq(table[:, free], wanted, rcond=None)[0]
            below = free & (trial <= 0.0)
            if not below.any():
                found = trial
                break
            step = float((found[below] / np.maximum(found[below] - trial[below], 1e-300)).min())
            found = found + step * (trial - found)
            free &= found > _TOLERANCE * max(1.0, float(found.max()))
            found[~free] = 0.0
    return found
