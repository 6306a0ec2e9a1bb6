"""Initial values on the CPU: the counter-based normal numbers that mempool.kernels.reference defines, bit for bit."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mempool.kernels.cpu.runtime import Array, kernel, serial, spread, use_threads

GAMMA = np.uint64(0x9E3779B97F4A7C15)


@serial
def mix(bits: np.uint64) -> np.uint64:
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


@serial
def _log(uniform: np.float64) -> np.float64:
    """Natural logarithm of a normal number in (0, 1], in additions, products and one division."""
    bits = np.float64(uniform).view(np.int64)
    exponent = (bits >> np.int64(52)) - np.int64(1023)
    mantissa = np.int64((bits & np.int64(0xFFFFFFFFFFFFF)) | np.int64(0x3FF0000000000000)).view(np.float64)
    if mantissa > 1.4142135623730951:
        mantissa = mantissa * 0.5
        exponent = exponent + np.int64(1)
    ratio = (mantissa - 1.0) / (mantissa + 1.0)
    square = ratio * ratio
    series = 1.0 / 15.0
    series = series * square + 1.0 / 13.0
    series = series * square + 1.0 / 11.0
    series = series * square + 1.0 / 9.0
    series = series * square + 1.0 / 7.0
    series = series * square + 1.0 / 5.0
    series = series * square + 1.0 / 3.0
    series = series * square + 1.0
    return np.float64(exponent) * 0.6931471805599453 + (ratio + ratio) * series


@serial
def _cos_of_turn(turn: np.int64) -> np.float64:
    """cos(2 pi turn / 2**32) by the sine or cosine series on [-1/8, 1/8] of a turn."""
    octant_pair = (turn + np.int64(1 << 29)) >> np.int64(30)
    angle = np.float64(turn - (octant_pair << np.int64(30))) * 1.4629180792671596e-09
    square = angle * angle
    cosine = -1.0 / 87178291200.0
    cosine = cosine * square + 1.0 / 479001600.0
    cosine = cosine * square - 1.0 / 3628800.0
    cosine = cosine * square + 1.0 / 40320.0
    cosine = cosine * square - 1.0 / 720.0
    cosine = cosine * square + 1.0 / 24.0
    cosine = cosine * square - 0.5
    cosine = cosine * square + 1.0
    sine = 1.0 / 6227020800.0
    sine = sine * square - 1.0 / 39916800.0
    sine = sine * square + 1.0 / 362880.0
    sine = sine * square - 1.0 / 5040.0
    sine = sine * square + 1.0 / 120.0
    sine = sine * square - 1.0 / 6.0
    sine = sine * square + 1.0
    sine = sine * angle
    quarter = octant_pair & np.int64(3)
    magnitude = sine if quarter & np.int64(1) else cosine
    return -magnitude if quarter == np.int64(1) or quarter == np.int64(2) else magnitude


@serial
def _initial_task(
    task: int, seed: np.uint64, slots_start: int, column_start: int, std: float, num_tasks: int, out: Array
) -> None:
    for row in range(out.shape[0] * task // num_tasks, out.shape[0] * (task + 1) // num_tasks):
        stream = mix(mix(seed + GAMMA) + np.uint64(slots_start + row) * GAMMA)
        for column in range(out.shape[1]):
            bits = mix(stream + np.uint64(column_start + column + 1) * GAMMA)
            uniform = np.float64(np.int64(bits >> np.uint64(32)) + np.int64(1)) * 2.3283064365386963e-10
            radius = np.sqrt(-2.0 * _log(uniform))
            out[row, column] = np.float32(std * (radius * _cos_of_turn(np.int64(bits & np.uint64(0xFFFFFFFF)))))


@kernel
def _initial_values(
    seed: np.uint64, slots_start: int, column_start: int, std: float, num_tasks: int, out: Array
) -> None:
    spread(num_tasks, _initial_task, (seed, slots_start, column_start, std, num_tasks, out))


def initial_values(
    seed: int, *, slots_start: int, num_slots: int, column_start: int, num_columns: int, std: float
) -> Tensor:
    """See mempool.kernels.initial_values."""
    out = torch.empty(num_slots, num_columns, dtype=torch.float32, device="cpu")
    num_threads = use_threads(8 * out.numel())
    bits = np.uint64(seed & 0xFFFFFFFFFFFFFFFF)
    _initial_values(bits, slots_start, column_start, float(std), num_threads, out.numpy())
    return out
