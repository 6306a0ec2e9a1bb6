import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from facts.data import FactBook
from facts.text import END, MAX_WORDS, WORD_DIM, AnswerSpelling, WordBook


@given(st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=8))
def test_spelled_answers_are_read_back(answers: list[str]) -> None:
    spelling = AnswerSpelling(answers)
    codes = spelling.encode(answers)
    assert codes.shape == (len(answers), max(map(len, answers)) + 1)
    assert int(codes.max()) < spelling.num_codes
    assert spelling.decode(codes) == answers


def test_reading_stops_at_the_first_end_and_at_the_last_position() -> None:
    spelling = AnswerSpelling(["ab"])
    a, b = spelling.encode(["ab"])[0, :2].tolist()
    assert spelling.decode(torch.tensor([[a, END, b], [END, a, b], [b, b, b]])) == ["a", "", "bbb"]


def test_word_weights_fall_with_the_number_of_facts(book: FactBook) -> None:
    word_book = WordBook.from_facts(book)
    which, reykjavik, nothing = word_book.log_weights[[*word_book.encode(["which reykjavik"])[0].tolist(), 0]].exp()
    assert which < 0.01 < 0.5 < reykjavik < 1
    assert nothing == 0


def test_word_weight_is_16_over_16_plus_facts() -> None:
    word_book = WordBook({"often": 16.0, "once": 0.0})
    weights = word_book.log_weights[word_book.encode(["once often"])[0]].exp()
    torch.testing.assert_close(weights, torch.tensor([1.0, 0.5]))


def test_words_are_counted_by_phrasing_and_subject(small_book: FactBook) -> None:
    # "which": half of the phrasings of 48 facts; "shade": all of 24; "alraton": 2 facts.
    word_book = WordBook.from_facts(small_book)
    weights = word_book.log_weights[word_book.encode(["which shade alraton"])[0]].exp()
    torch.testing.assert_close(weights, torch.tensor([16 / 40, 16 / 40, 16 / 18]))


def test_vectors_are_fixed_unit_and_alike_for_words_spelled_alike() -> None:
    facts_by_word = {"stuttgart": 1.0, "stuttgarter": 1.0, "lisboa": 1.0}
    one, two = WordBook(facts_by_word), WordBook(facts_by_word)
    assert torch.equal(one.vectors, two.vectors)
    assert torch.equal(one.vectors[0], torch.zeros(WORD_DIM))
    torch.testing.assert_close(one.vectors[1:].square().mean(dim=1), torch.ones(3))
    lisboa, stuttgart, stuttgarter = one.vectors[1:]
    assert torch.cosine_similarity(stuttgart, stuttgarter, dim=0) > 0.6
    assert abs(torch.cosine_similarity(stuttgart, lisboa, dim=0)) < 0.35


def test_encoding_skips_words_never_trained_and_pads_with_no_word() -> None:
    word_book = WordBook({"graz": 1.0, "in": 5.0, "is": 5.0})
    assert word_book.encode(["Is Graz in Styria?", "Graz!", "Vaduz?"]).tolist() == [[3, 1, 2], [1, 0, 0], [0, 0, 0]]
    assert word_book.encode(["graz " * (MAX_WORDS + 5)]).tolist() == [[1] * MAX_WORDS]
    assert word_book.encode([]).shape == (0, 1)


def test_only_common_words_are_dropped_and_reproducibly() -> None:
    word_book = WordBook({"which": 1000.0, "graz": 1.0})
    questions = ["which graz"] * 2000

    def encode() -> torch.Tensor:
        return word_book.encode(questions, drop_common=0.25, generator=torch.Generator().manual_seed(3))

    numbers = encode()
    assert torch.equal(numbers, encode())
    assert bool((numbers[:, 1] == 1).all())
    assert float((numbers[:, 0] == 0).float().mean()) == pytest.approx(0.25, abs=0.05)
