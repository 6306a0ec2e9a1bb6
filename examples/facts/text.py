"""Questions to word numbers, answers to characters and back. Both twins read and write through this, unchanged.

Nothing here is trained and nothing is downloaded: a word's vector is the sum of random vectors of its character
n-grams, so that words spelled alike start out alike, and no fact can hide in the encoder. What a model makes of it is
`model.py`'s.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from facts.data import FactBook, words
from facts.phrasings import SUBJECT

WORD_DIM = 128
MAX_WORDS = 32
END = 0
"""Code of an answer's end, and the padding after it."""

_NO_WORD = 0
_NGRAM_BUCKETS = 16_384
_RARE_FACTS = 16.0


class WordBook:
    """The words of the training questions: a fixed vector and a weight each.

    The weight of a word in f facts' questions is 16 / (16 + f): close to 1 for a name, close to 0 for "which" (smooth
    inverse frequency, Arora et al. 2017). Words that training never shows have no number: they are skipped, as by any
    closed vocabulary.

    Attributes:
        facts_by_word: what it was made from: in how many facts' questions each word is.
        vectors: [num_words + 1, WORD_DIM] float32, each of root mean square 1; row 0 is no word and all zeros.
        log_weights: [num_words + 1] float32; row 0 is so low that softmax gives it nothing.
    """

    def __init__(self, facts_by_word: dict[str, float], *, seed: int = 0) -> None:
        self.facts_by_word = facts_by_word
        self._numbers = {word: number for number, word in enumerate(sorted(facts_by_word), start=1)}
        facts = np.array([facts_by_word[word] for word in self._numbers], dtype=np.float64)
        weights = _RARE_FACTS / (_RARE_FACTS + facts)
        buckets = np.random.default_rng(seed).standard_normal((_NGRAM_BUCKETS, WORD_DIM)).astype(np.float32)
        vectors = np.zeros((len(self._numbers) + 1, WORD_DIM), dtype=np.float32)
        for word, number in self._numbers.items():
            vector = buckets[_ngram_buckets(word)].sum(axis=0)
            vectors[number] = vector / np.sqrt(np.mean(vector**2))
        self.vectors = torch.from_numpy(vectors)
        self.log_weights = torch.from_numpy(np.concatenate([[-1e4], np.log(weights)]).astype(np.float32))
        self._is_common = torch.from_numpy(np.concatenate([[False], weights < 1 / 3]))

    @classmethod
    def from_facts(cls, book: FactBook, *, seed: int = 0) -> WordBook:
        """Counts the words of all trained phrasings of all facts; unseen phrasings are not looked at."""
        facts_by_word: Counter[str] = Counter()
        relation_sizes = Counter(fact.relation for fact in book.facts)
        for fact in book.facts:
            facts_by_word.update(set(words(fact.subject)))
        for relation, num_facts in relation_sizes.items():
            phrasings = book.phrasings[relation].trained
            for phrasing in phrasings:
                for word in set(words(phrasing.replace(SUBJECT, " "))):
                    facts_by_word[word] += num_facts / len(phrasings)  # type: ignore[assignment]
        return cls(dict(facts_by_word), seed=seed)

    def encode(
        self, questions: Sequence[str], *, drop_common: float = 0.0, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """Numbers of the words of B questions: [B, W] int64, W the longest question's words, 0 behind the others' ends.

        Args:
            questions: B texts; words past MAX_WORDS are cut off.
            drop_common: the share of common words to leave out, by chance; against learning wordings by heart.
            generator: decides which.
        """
        rows = [[self._numbers[word] for word in words(text) if word in self._numbers] for text in questions]
        numbers = torch.full((len(rows), max(1, *map(len, rows)) if rows else 1), _NO_WORD, dtype=torch.int64)
        for row, row_numbers in enumerate(rows):
            numbers[row, : len(row_numbers)] = torch.tensor(row_numbers)
        numbers = numbers[:, :MAX_WORDS]
        if drop_common:
            dropped = torch.rand(numbers.shape, generator=generator) < drop_common
            numbers = numbers.masked_fill(dropped & self._is_common[numbers], _NO_WORD)
        return numbers


class AnswerSpelling:
    """Answers as rows of characters, END-padded, over the alphabet of the answers it is made from.

    Attributes:
        num_positions: the longest answer's characters, and one END.
        num_codes: what a model chooses from at each position: the alphabet and END.
    """

    def __init__(self, answers: Iterable[str]) -> None:
        answers = list(answers)
        self._alphabet = sorted({char for answer in answers for char in answer})
        self._codes = {char: code for code, char in enumerate(self._alphabet, start=END + 1)}
        self.num_positions = max(len(answer) for answer in answers) + 1
        self.num_codes = len(self._alphabet) + 1

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
            answers.append("".join(self._alphabet[code - 1] for code in row[:end]))
        return answers


def _ngram_buckets(word: str) -> np.ndarray:
    """Hashed pieces of a word: all of it, and its runs of 2 to 4 characters with `<` and `>` at the ends."""
    marked = f"<{word}>"
    pieces = {marked[i : i + n] for n in (2, 3, 4) for i in range(len(marked) - n + 1)} | {marked}
    return np.array([zlib.crc32(piece.encode()) % _NGRAM_BUCKETS for piece in sorted(pieces)])
