"""Words as espeak-ng speaks them: a program of Debian's, run once a word, its sounds kept in a folder.

Who has no espeak-ng gets an error that names the package.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from digits.errors import DigitsError

_PROGRAM = "espeak-ng"
_WORD_S = 20.0
_HEADER = b"data"


class Voice(NamedTuple):
    """Who speaks, and how.

    Attributes:
        language: As espeak-ng and num2words name it.
        speaker: A variant of espeak-ng's: "m1", "f2", ...
        speed: Words per minute.
    """

    language: str
    speaker: str
    speed: int


class Sound(NamedTuple):
    """Samples [T] float32 in -1 .. 1, and how many a second has."""

    samples: Tensor
    rate: int


Speaker = Callable[[Voice, Sequence[str]], list[Sound]]
"""Speaks some words in one voice."""


def espeak(voice: Voice, words: Sequence[str]) -> list[Sound]:
    """Speaks words, each by itself; raises DigitsError where espeak-ng is missing or fails."""
    if shutil.which(_PROGRAM) is None:
        raise DigitsError(f"{_PROGRAM} is not installed, which speaks the words: apt install {_PROGRAM}")
    return [_read_wav(_spoken(voice, word)) for word in words]


class Cached:
    """A speaker whose sounds are kept, a file for each voice and list of words.

    Args:
        speak: Who speaks what is not there yet.
        folder: Is made.
    """

    def __init__(self, speak: Speaker, folder: Path) -> None:
        self._speak, self._folder = speak, folder

    def __call__(self, voice: Voice, words: Sequence[str]) -> list[Sound]:
        path = self._folder / f"{voice.language}-{voice.speaker}-{voice.speed}.pt"
        if path.exists():
            kept = torch.load(path)
            if kept["words"] == list(words):
                return [Sound(samples.float() / 32768.0, rate) for samples, rate in kept["sounds"]]
        sounds = self._speak(voice, words)
        pcm = [((sound.samples * 32768.0).clamp(-32768, 32767).to(torch.int16), sound.rate) for sound in sounds]
        self._folder.mkdir(parents=True, exist_ok=True)
        handle, made = tempfile.mkstemp(dir=self._folder, suffix=".new")
        try:
            with os.fdopen(handle, "wb") as file:
                torch.save({"words": list(words), "sounds": pcm}, file)
            os.replace(made, path)  # whole or not at all
        except BaseException:
            os.unlink(made)
            raise
        return [Sound(samples.float() / 32768.0, rate) for samples, rate in pcm]


def speak_all(speak: Speaker, jobs: Sequence[tuple[Voice, Sequence[str]]]) -> list[list[Sound]]:
    """Several voices at a time: they are processes of their own."""
    with ThreadPoolExecutor(max_workers=max(1, os.cpu_count() or 1)) as threads:
        return list(threads.map(lambda job: speak(*job), jobs))


def _spoken(voice: Voice, word: str) -> bytes:
    command = [_PROGRAM, "-v", f"{voice.language}+{voice.speaker}", "-s", str(voice.speed), "--stdout", "--", word]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_WORD_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise DigitsError(f"{' '.join(command)} did not end within {_WORD_S:g} s") from error
    if done.returncode != 0 or len(done.stdout) < 1000:
        said = done.stderr.decode(errors="replace").strip() or f"{len(done.stdout)} bytes of sound"
        raise DigitsError(f"{' '.join(command)} failed ({done.returncode}): {said}")
    return done.stdout


def _read_wav(wav: bytes) -> Sound:
    """16 bits, one channel. What --stdout writes has no true lengths in its header, so all after it is sound."""
    begin = wav.index(_HEADER) + 8
    samples = torch.frombuffer(bytearray(wav[begin : begin + (len(wav) - begin) // 2 * 2]), dtype=torch.int16)
    return Sound(samples.float() / 32768.0, int.from_bytes(wav[24:28], "little"))
