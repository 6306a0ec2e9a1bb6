"""Digits as images, as spoken and as written words: features and labels, for training and never seen in training."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from digits.errors import needed
from digits.spectrogram import features
from digits.speech import Speaker, Voice, speak_all

LANGUAGES = ("en", "de", "fr", "es", "it", "nl")
TRAINED_SPEAKERS = ("m1", "m2", "m3", "m4", "f1", "f2", "f3")
TRAINED_SPEEDS = (140, 190)
UNSEEN_SPEAKERS = ("m5", "m7", "f4", "f5")
UNSEEN_SPEED = 165
TEXT_DIM = 256
_UNSEEN_IMAGES = 0.25


class Items(NamedTuple):
    """Features [N, width] float32, and of each the digit, [N] int64."""

    features: Tensor
    digits: Tensor

    def of_digit(self, digit: int) -> Tensor:
        """Places of its items."""
        return (self.digits == digit).nonzero().flatten()


class Way(NamedTuple):
    """One modality. Features are scaled by the mean and deviation of what is trained.

    Attributes:
        trained: What training sees.
        asked: What retrieval asks with, and finds; of words the same as ``trained``, there are no others.
    """

    trained: Items
    asked: Items


def build(
    speak: Speaker,
    *,
    languages: Sequence[str] = LANGUAGES,
    trained_speakers: Sequence[str] = TRAINED_SPEAKERS,
    trained_speeds: Sequence[int] = TRAINED_SPEEDS,
    unseen_speakers: Sequence[str] = UNSEEN_SPEAKERS,
) -> dict[str, Way]:
    """By name "image", "sound" and "text"; raises DigitsError where something is not installed."""
    by_language = {language: written(language) for language in languages}
    trained = [(Voice(lang, name, speed), by_language[lang]) for lang in languages for name in trained_speakers
               for speed in trained_speeds]  # fmt: skip
    unseen = [(Voice(lang, name, UNSEEN_SPEED), by_language[lang]) for lang in languages for name in unseen_speakers]
    words = [word for of_one in by_language.values() for word in of_one]
    text = Items(torch.stack([spelled(word) for word in words]), _digits(len(languages)))
    return {
        "image": scaled(*images()),
        "sound": scaled(spoken(speak, trained), spoken(speak, unseen)),
        "text": scaled(text, text),
    }


def written(language: str) -> list[str]:
    """The words of 0 to 9."""
    num2words = needed("num2words", "num2words").num2words
    return [num2words(digit, lang=language) for digit in range(10)]


def spelled(word: str) -> Tensor:
    """How often a word has each run of one to three characters, hashed to [TEXT_DIM], of length 1."""
    counts = torch.zeros(TEXT_DIM)
    marked = f"<{word.casefold()}>"
    for length in (1, 2, 3):
        for begin in range(len(marked) - length + 1):
            counts[zlib.crc32(marked[begin : begin + length].encode()) % TEXT_DIM] += 1.0
    unit: Tensor = counts / counts.norm()
    return unit


def spoken(speak: Speaker, jobs: Sequence[tuple[Voice, Sequence[str]]]) -> Items:
    """Each of ten words in each voice."""
    sounds = [sound for of_voice in speak_all(speak, jobs) for sound in of_voice]
    return Items(torch.stack([features(*sound) for sound in sounds]), _digits(len(jobs)))


def images() -> tuple[Items, Items]:
    """scikit-learn's 1,797 of 8 x 8, in their order: the last quarter is never seen."""
    data = needed("sklearn.datasets", "scikit-learn").load_digits()
    pixels, digits = torch.from_numpy(data.data).float() / 16.0, torch.from_numpy(data.target).long()
    first = round(len(digits) * (1.0 - _UNSEEN_IMAGES))
    return Items(pixels[:first], digits[:first]), Items(pixels[first:], digits[first:])


def scaled(trained: Items, asked: Items) -> Way:
    """Each feature to a mean of 0 and a deviation of 1 over what is trained; one that never varies there to 0."""
    deviation, mean = torch.std_mean(trained.features, dim=0)
    scale = torch.where(deviation > 1e-4, 1.0 / deviation, 0.0)
    ours, theirs = (Items((items.features - mean) * scale, items.digits) for items in (trained, asked))
    return Way(ours, ours if asked is trained else theirs)


def _digits(times: int) -> Tensor:
    return torch.arange(10).repeat(times)
