"""Questions to hashed n-grams, answers to characters and back. Both twins read and write through this, unchanged.

No vocabulary is fitted to the questions and none is downloaded: a word is the bag of its character n-grams, hashed.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from facts.data import words

NGRAM_BUCKETS = 16_384
MAX_WORDS = 24
END = 0


@dataclass(frozen=True, slots=True)
class QuestionBatch:
    """B questions as ragged arrays: words of n-grams, questions of words.

    Attributes:
        ngrams: [num_ngrams] int64, hashed n-grams of all words, one after another.
        word_starts: [num_words] int64, where each word's n-grams begin.
        word_at: [num_words] int64, where the word stands in the flat [B * max_words] grid.
        num_questions: B.
        max_words: the longest question's words.
    """

    ngrams: torch.Tensor
    word_starts: torch.Tensor
    word_at: torch.Tensor
    num_questions: int
    max_words: int


@lru_cache(maxsize=200_000)
def word_ngrams(word: str) -> np.ndarray:
    """The hashed n-grams of a word: itself, and its 2- to 4-character pieces with `<` and `>` at the ends."""
    marked = f"<{word}>"
    pieces = {marked[i : i + n] for n in (2, 3, 4) for i in range(len(marked) - n + 1)}
    return np.array([zlib.crc32(piece.encode()) % NGRAM_BUCKETS for piece in sorted(pieces | {marked})], dtype=np.int64)


def encode_questions(questions: Sequence[str]) -> QuestionBatch:
    """Encodes questions; words past MAX_WORDS are cut off, an empty question is one empty word.

    Args:
        questions: B texts.
    """
    rows = [words(question)[:MAX_WORDS] or [""] for question in questions]
    max_words = max(len(row) for row in rows)
    pieces = [word_ngrams(word) for row in rows for word in row]
    lengths = np.fromiter((len(piece) for piece in pieces), dtype=np.int64, count=len(pieces))
    word_at = np.concatenate([np.arange(len(row)) + i * max_words for i, row in enumerate(rows)])
    return QuestionBatch(
        ngrams=torch.from_numpy(np.concatenate(pieces)),
        word_starts=torch.from_numpy(np.cumsum(lengths) - lengths),
        word_at=torch.from_numpy(word_at),
        num_questions=len(rows),
        max_words=max_words,
    )


class AnswerSpelling:
    """Answers as rows of characters, END-padded, over the alphabet of the answers it is made from."""

    def __init__(self, answers: Iterable[str]) -> None:
        answers = list(answers)
        self.alphabet = sorted({char for answer in answers for char in answer})
        self.num_positions = max(len(answer) for answer in answers) + 1
        self._codes = {char: code for code, char in enumerate(self.alphabet, start=END + 1)}

    @property
    def num_codes(self) -> int:
        """Characters to choose from at each position, END included."""
        return len(self.alphabet) + 1

    def encode(self, answers: Sequence[str]) -> torch.Tensor:
        """[B] answers to [B, num_positions] int64 codes."""
        codes = np.full((len(answers), self.num_positions), END, dtype=np.int64)
        for row, answer in zip(codes, answers, strict=True):
            row[: len(answer)] = [self._codes[char] for char in answer]
        return torch.from_numpy(codes)

    def decode(self, codes: torch.Tensor) -> list[str]:
        """[B, num_positions] codes to [B] answers: everything before the first END."""
        answers = []
        for row in codes.tolist():
            end = row.index(END) if END in row else len(row)
            answers.append("".join(self.alphabet[code - 1] for code in row[:end]))
        return answers
