"""The generator of initial values, defined to the bit."""

from __future__ import annotations

import torch
from torch import Tensor

GAMMA = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB


def signed(bits: int) -> int:
    """64 bits as torch's int64 holds them."""
    bits &= 0xFFFFFFFFFFFFFFFF
    return bits - (1 << 64) if bits >> 63 else bits


def shift_right(bits: Tensor, count: int) -> Tensor:
    """A shift that brings in zeros."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def mix(bits: Tensor) -> Tensor:
    """The finaliser of splitmix64."""
    bits = (bits ^ shift_right(bits, 30)) * signed(_MIX1)
    bits = (bits ^ shift_right(bits, 27)) * signed(_MIX2)
    return bits ^ shift_right(bits, 31)


def _log(uniform: Tensor) -> Tensor:
    bits = uniform.view(torch.int64)
    exponent = (bits >> 52) - 1023
    mantissa = ((bits & 0xFFFFFFFFFFFFF) | 0x3FF0000000000000).view(torch.float64)
    large = mantissa > 1.4142135623730951
    mantissa = torch.where(large, mantissa * 0.5, mantissa)
    exponent = torch.where(large, exponent + 1, exponent)
    ratio = (mantissa - 1.0) / (mantissa + 1.0)
    square = ratio * ratio
    series = torch.full_like(square, 1.0 / 15.0)
    for odd in (13.0, 11.0, 9.0, 7.0, 5.0, 3.0, 1.0):
        series = series * square + 1.0 / odd
    return exponent.double() * 0.6931471805599453 + (ratio + ratio) * series


def _cos_of_turn(turn: Tensor) -> Tensor:
    quadrant = (turn + (1 << 29)) >> 30
    angle = (turn - (quadrant << 30)).double() * 1.4629180792671596e-09
    square = angle * angle
    cosine = torch.full_like(square, -1.0 / 87178291200.0)
    for coefficient in (479001600.0, -3628800.0, 40320.0, -720.0, 24.0, -2.0, 1.0):
        cosine = cosine * square + 1.0 / coefficient
    sine = torch.full_like(square, 1.0 / 6227020800.0)
    for coefficient in (-39916800.0, 362880.0, -5040.0, 120.0, -6.0, 1.0):
        sine = sine * square + 1.0 / coefficient
    quarter = quadrant & 3
    magnitude = torch.where(quarter & 1 == 1, sine * angle, cosine)
    return torch.where((quarter == 1) | (quarter == 2), -magnitude, magnitude)


def initial_values(
    seed: int, *, slots_start: int, num_slots: int, column_start: int, num_columns: int, std: float
) -> Tensor:
    """Normal numbers, each a function of (seed, slot, column) alone, defined to the bit by +, -, *, / and sqrt.

    A slot's columns are the outputs of the splitmix64 generator, started from a hash of seed and slot. The upper and
    lower 32 bits of an output are the two uniform numbers of the Box-Muller transform, computed in float64 with the
    logarithm and cosine written out as series, since libraries' own differ in the last bits.
    """
    gamma = signed(GAMMA)
    slots = torch.arange(slots_start, slots_start + num_slots)
    columns = torch.arange(column_start + 1, column_start + num_columns + 1)
    start = mix(torch.tensor(signed(seed + GAMMA)))
    bits = mix(mix(start + slots * gamma)[:, None] + columns * gamma)
    uniform = (shift_right(bits, 32) + 1).double() * 2.3283064365386963e-10
    radius = (-2.0 * _log(uniform)).sqrt()
    return (std * (radius * _cos_of_turn(bits & 0xFFFFFFFF))).float()
