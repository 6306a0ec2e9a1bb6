"""A front end for sounds: log mel spectrograms in plain torch.

Shape legend: T samples, F frames, M mel bands.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

BANDS = 24
FRAMES = 24
WINDOW_S = 0.025
HOP_S = 0.010
LOWEST_HZ, HIGHEST_HZ = 80.0, 7600.0
_FLOOR = 1e-4  # of the loudest: 40 dB down is silence
_SPOKEN = 1e-3  # of the loudest frame's energy: below it, at either end, nobody speaks yet, or any more


def features(samples: Tensor, rate: int) -> Tensor:
    """What a sound is to a model, [FRAMES * BANDS]: spoken part alone, of one length, whatever its speed and loudness.

    Args:
        samples: [T] float, T at least 1.
        rate: Samples per second.
    """
    log_mel_FM = log_mel(samples, rate)
    spoken = functional.interpolate(log_mel_FM.T[None], size=FRAMES, mode="linear", align_corners=False)[0]
    return (spoken - spoken.mean()).flatten()


def log_mel(samples: Tensor, rate: int) -> Tensor:
    """Logarithms of mel bands' energies [F, M], from log 1e-4 to 0 of the loudest; without silence at the ends."""
    window, hop = round(WINDOW_S * rate), round(HOP_S * rate)
    size = 1 << (window - 1).bit_length()
    padded = functional.pad(samples.float(), (window, window))
    spectrum = torch.stft(
        padded, size, hop_length=hop, win_length=window, window=torch.hann_window(window), center=False,
        return_complex=True,
    )  # fmt: skip
    energies_FM = spectrum.abs().square().T @ mel_filters(size, rate).T
    by_frame = energies_FM.sum(1)
    spoken = (by_frame > _SPOKEN * by_frame.max()).nonzero().flatten()
    if len(spoken):
        energies_FM = energies_FM[int(spoken[0]) : int(spoken[-1]) + 1]
    loudest = energies_FM.max().clamp_min(torch.finfo(torch.float32).tiny)
    return (energies_FM / loudest).clamp_min(_FLOOR).log()


def mel_filters(size: int, rate: int) -> Tensor:
    """Triangles [M, size // 2 + 1] over the bins of a transform, evenly spaced in mel between two frequencies."""
    bins_hz = torch.arange(size // 2 + 1, dtype=torch.float32) * rate / size
    low, high = (2595.0 * torch.tensor(1.0 + hz / 700.0).log10() for hz in (LOWEST_HZ, min(HIGHEST_HZ, rate / 2)))
    edges = torch.linspace(float(low), float(high), BANDS + 2)
    edges_hz = 700.0 * (10.0 ** (edges / 2595.0) - 1.0)
    left, centre, right = (edges_hz[i : i + BANDS, None] for i in range(3))
    rising, falling = (bins_hz - left) / (centre - left), (right - bins_hz) / (right - centre)
    return torch.minimum(rising, falling).clamp_min(0.0)
