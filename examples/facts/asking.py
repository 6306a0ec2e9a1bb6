"""A trained memory model as a file, and asking it: everything but its memory, which stays in the pool."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

import mempool
from facts.model import FactModel, ModelSize, memory_block
from facts.race import Race
from facts.text import AnswerSpelling, WordBook

_TRIED = 64


@dataclass(frozen=True, slots=True)
class Asked:
    """A question and what a model answered."""

    question: str
    answer: str


class FactAnswerer:
    """Answers questions by a model and the table of a pool.

    Attributes:
        asked: a question that was answered when the model was written to its file.
    """

    def __init__(self, model: FactModel, *, word_book: WordBook, spelling: AnswerSpelling, asked: Asked) -> None:
        self._model = model.eval()
        self._word_book = word_book
        self._spelling = spelling
        self.asked = asked

    @classmethod
    def read(cls, path: Path, *, pool: mempool.Pool) -> Self:
        """The model of a file that `write_model` made, with the pool's table.

        Raises:
            OSError: if the file cannot be read.
            MempoolError: what the pool raises.
        """
        saved = torch.load(path)
        word_book, spelling = WordBook(saved["facts_by_word"]), AnswerSpelling(saved["answers"])
        size = ModelSize(**saved["size"])
        block = memory_block(pool.table(saved["table"]), size=size)
        model = FactModel(word_book, spelling, block=block, size=size)
        model.load_state_dict(saved["model"])
        return cls(model, word_book=word_book, spelling=spelling, asked=Asked(**saved["asked"]))

    @torch.no_grad()
    def answers(self, questions: list[str]) -> list[str]:
        """One answer for each question, spelled character by character."""
        return self._spelling.decode(self._model(self._word_book.encode(questions)).argmax(dim=-1))


def write_model(race: Race, path: Path) -> Asked:
    """Writes the memory model of a race to a file, with a question that it answers rightly, if there is one.

    Returns:
        the question and the answer.
    """
    book = race.book
    ask = book.unseen_question if book.has_unseen else book.trained_question
    few = range(min(_TRIED, len(book.facts)))
    questions = [ask(fact, choice=fact) for fact in few]
    asked = Asked("", "")
    answerer = FactAnswerer(race.memory.model, word_book=race.word_book, spelling=race.spelling, asked=asked)
    answers = answerer.answers(questions)
    chosen = next((fact for fact in few if answers[fact] == book.facts[fact].answer), 0)
    asked = Asked(questions[chosen], answers[chosen])
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(
        {
            "model": race.memory.model.state_dict(),
            "size": dataclasses.asdict(race.size),
            "table": race.table.name,
            "facts_by_word": race.word_book.facts_by_word,
            "answers": sorted({fact.answer for fact in book.facts}),
            "asked": dataclasses.asdict(asked),
        },
        path,
    )
    return asked
