import hashlib
import os
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from facts import data
from facts.data import MAX_ANSWER_CHARS, QUOTAS, Fact, FactBook, build_facts, single_answers, words
from facts.phrasings import PHRASINGS, SUBJECT


def digest(book: FactBook) -> str:
    return hashlib.sha256(repr(book.facts).encode()).hexdigest()


def test_same_facts_in_the_same_order_in_another_process_with_other_string_hashes(book: FactBook) -> None:
    code = (
        "import hashlib; from facts.data import build_facts;"
        "print(hashlib.sha256(repr(build_facts().facts).encode()).hexdigest())"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(data.__file__).parents[1]),
        "PYTHONHASHSEED": "271",
        "PYTHONIOENCODING": "utf-8",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=100, check=True
    )
    assert done.stdout.strip() == digest(book)


def test_another_seed_gives_other_airports_in_another_order(book: FactBook) -> None:
    other = build_facts(num_facts=2000, seed=1)
    assert len(other.facts) == 2000
    assert {fact.subject for fact in other.facts if fact.relation == "airport_iata"} != {
        fact.subject for fact in book.facts if fact.relation == "airport_iata"
    }


def test_there_are_20_000_facts_of_every_relation(book: FactBook) -> None:
    counts = Counter(fact.relation for fact in book.facts)
    assert len(book.facts) == 20_000
    assert counts.keys() == PHRASINGS.keys()
    assert all(counts[relation] >= 0.95 * quota for relation, quota in QUOTAS.items())
    assert min(counts.values()) > 200


def test_every_question_has_exactly_one_right_answer(book: FactBook) -> None:
    answers: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for fact in book.facts:
        phrasings = book.phrasings[fact.relation]
        for phrasing in phrasings.trained + phrasings.unseen:
            answers[tuple(words(phrasing.replace(SUBJECT, fact.subject)))].add(fact.answer)
    assert {question: found for question, found in answers.items() if len(found) != 1} == {}


def test_answers_can_be_spelled(book: FactBook) -> None:
    assert all(0 < len(fact.answer) <= MAX_ANSWER_CHARS for fact in book.facts)
    assert all(fact.answer == fact.answer.strip() for fact in book.facts)


def test_facts_are_true_and_ambiguous_names_are_left_out(book: FactBook) -> None:
    known = {(fact.relation, fact.subject): fact.answer for fact in book.facts}
    assert known["country_capital", "Austria"] == "Vienna"
    assert known["country_currency", "Japan"] == "JPY"
    assert known["country_continent", "Kenya"] == "Africa"
    assert known["city_country", "Mumbai"] == "India"
    # San Jose: United States, Costa Rica and more; Hyderabad: India and Pakistan.
    assert ("city_country", "San Jose") not in known
    assert ("city_country", "Hyderabad") not in known


def test_trained_and_unseen_phrasings_are_disjoint_over_all_relations() -> None:
    trained = {tuple(words(p.replace(SUBJECT, "subject"))) for each in PHRASINGS.values() for p in each.trained}
    unseen = {tuple(words(p.replace(SUBJECT, "subject"))) for each in PHRASINGS.values() for p in each.unseen}
    assert trained & unseen == set()
    assert len(unseen) >= 40


@pytest.mark.parametrize("relation", PHRASINGS)
def test_phrasings_of_a_relation_differ_and_have_one_subject(relation: str) -> None:
    phrasings = PHRASINGS[relation].trained + PHRASINGS[relation].unseen
    assert len({(*words(phrasing), phrasing.index(SUBJECT)) for phrasing in phrasings}) == len(phrasings)
    assert all(phrasing.count(SUBJECT) == 1 for phrasing in phrasings)
    assert not any("NOUN" in phrasing for phrasing in phrasings)


def test_questions_are_asked_in_the_chosen_phrasing(book: FactBook) -> None:
    fact = book.facts[7]
    trained = book.phrasings[fact.relation].trained
    assert book.trained_question(7, choice=1) == trained[1].replace("{}", fact.subject)
    assert book.trained_question(7, choice=1 + len(trained)) == book.trained_question(7, choice=1)
    assert book.unseen_question(7, choice=0) == book.phrasings[fact.relation].unseen[0].replace("{}", fact.subject)


def test_contradicted_facts_are_dropped_and_repeats_kept_once() -> None:
    facts = [
        Fact("city_country", "Córdoba", "Argentina"),
        Fact("city_country", "Cordoba", "Spain"),
        Fact("city_country", "Graz", "Austria"),
        Fact("city_country", "GRAZ", "Austria"),
        Fact("airport_country", "Graz", "Austria"),  # asked in the same words as the city
        Fact("city_timezone", "Graz", "Europe/Vienna"),
        Fact("country_capital", "Nowhere", ""),
        Fact("country_capital", "Longland", "x" * (MAX_ANSWER_CHARS + 1)),
    ]
    assert single_answers(facts) == [facts[2], facts[5]]


def test_words_drop_case_accents_and_punctuation() -> None:
    assert words("In which country is Köln-Süd?") == ["in", "which", "country", "is", "koln", "sud"]
    assert words("?!") == []


@given(st.text())
def test_words_of_words_are_the_same(text: str) -> None:
    assert words(" ".join(words(text))) == words(text)


def test_num_facts_must_be_positive() -> None:
    with pytest.raises(ValueError, match="num_facts = 0"):
        build_facts(0)
