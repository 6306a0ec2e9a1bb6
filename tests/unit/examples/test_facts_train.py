from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from torch.nn.functional import one_hot

from facts.data import FactBook
from facts.model import DenseBlock, FactModel, ModelSize
from facts.text import AnswerSpelling, WordBook
from facts.train import TrainConfig, batches, contestant, evaluate, train


class Parrot(torch.nn.Module):
    """Spells the right answer of every question but those on chosen subjects, which it gets wrong by one character."""

    def __init__(self, book: FactBook, *, wrong: set[str], choices: list[int], unseen: bool) -> None:
        super().__init__()
        self.spelling = AnswerSpelling(fact.answer for fact in book.facts)
        self.word_book = WordBook.from_facts(book)
        self.answers = {}
        for index, fact in enumerate(book.facts):
            ask = book.unseen_question if unseen else book.trained_question
            answer = fact.answer[:-1] if fact.subject in wrong else fact.answer
            for choice in choices:
                self.answers[self._key(self.word_book.encode([ask(index, choice=choice)])[0])] = answer

    def forward(self, words_BW: torch.Tensor) -> torch.Tensor:
        codes = self.spelling.encode([self.answers[self._key(words_W)] for words_W in words_BW])
        return one_hot(codes, self.spelling.num_codes).float()

    @staticmethod
    def _key(words_W: torch.Tensor) -> tuple[int, ...]:
        return tuple(word for word in words_W.tolist() if word)


@pytest.mark.parametrize("unseen", [False, True])
def test_exact_match_counts_whole_answers_only(small_book: FactBook, unseen: bool) -> None:
    parrot = Parrot(small_book, wrong={"alraton", "costton", "duneton"}, choices=[0, 1], unseen=unseen)
    score = evaluate(
        parrot, small_book, word_book=parrot.word_book, spelling=parrot.spelling, unseen=unseen, seed=0
    )  # fmt: skip
    assert score.asked == Counter(shade=24, size=24)
    assert score.right == Counter(shade=21, size=21)
    assert score.exact_match == 42 / 48
    assert score.by_relation() == {"shade": 21 / 24, "size": 21 / 24}


def test_an_epoch_asks_every_fact_once_in_words_of_trained_phrasings(small_book: FactBook) -> None:
    word_book = WordBook.from_facts(small_book)
    spelling = AnswerSpelling(fact.answer for fact in small_book.facts)
    config = TrainConfig(epochs=3, batch=10, drop_common=0.0)
    found = list(batches(small_book, word_book=word_book, spelling=spelling, config=config))
    assert len(found) == 3 * config.steps_per_epoch(48) == 15
    assert {len(batch.words) for batch in found} == {9, 10}
    allowed = {
        (tuple(word_book.encode([small_book.trained_question(i, choice=c)])[0].tolist()), fact.answer): i
        for i, fact in enumerate(small_book.facts)
        for c in range(2)
    }
    for epoch in range(3):
        asked = Counter(
            allowed[tuple(word for word in words_W.tolist() if word), answer]
            for batch in found[5 * epoch : 5 * epoch + 5]
            for words_W, answer in zip(batch.words, spelling.decode(batch.codes), strict=True)
        )
        assert asked == Counter(range(48))


def test_batches_depend_on_the_seed_alone(small_book: FactBook) -> None:
    word_book = WordBook.from_facts(small_book)
    spelling = AnswerSpelling(fact.answer for fact in small_book.facts)

    def drawn(seed: int) -> list[torch.Tensor]:
        config = TrainConfig(epochs=2, batch=16, seed=seed)
        return [batch.words for batch in batches(small_book, word_book=word_book, spelling=spelling, config=config)]

    assert all(torch.equal(one, two) for one, two in zip(drawn(5), drawn(5), strict=True))
    assert not all(torch.equal(one, two) for one, two in zip(drawn(5), drawn(6), strict=True))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny tensors: threads that wait for one another would take most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_both_contestants_get_every_batch_and_learn(small_book: FactBook) -> None:
    word_book = WordBook.from_facts(small_book)
    spelling = AnswerSpelling(fact.answer for fact in small_book.facts)
    config = TrainConfig(epochs=30, batch=16, drop_common=0.0)
    size = ModelSize(dim=64)
    torch.manual_seed(0)
    pair = [
        contestant(
            name,
            FactModel(word_book, spelling, block=DenseBlock(size.dim, hidden=128), size=size),
            lr=1e-2,
            num_steps=90,
        )
        for name in ("one", "two")
    ]
    done: list[int] = []
    examples = batches(small_book, word_book=word_book, spelling=spelling, config=config)
    train(pair, examples=examples, on_step=done.append)
    assert done == list(range(1, 91))
    for each in pair:
        assert len(each.steps) == 90
        score = evaluate(each.model, small_book, word_book=word_book, spelling=spelling, unseen=False, seed=0)
        assert score.exact_match == 1.0


def test_few_facts_are_asked_more_often() -> None:
    assert TrainConfig().num_epochs(20_000) == 14
    assert TrainConfig().num_epochs(100) * TrainConfig().steps_per_epoch(100) == 400
    assert TrainConfig(epochs=3).num_epochs(100) == 3
