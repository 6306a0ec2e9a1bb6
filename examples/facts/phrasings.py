"""How each relation is asked: phrasings to train on, and phrasings kept back for the evaluation only.

Which facts there are is `data.py`'s. Edit this file to ask in other words; a phrasing may stand in one list only.
"""

from __future__ import annotations

from dataclasses import dataclass

SUBJECT = "{}"
"""Stands for what is asked about: a city, an airport, a country."""


@dataclass(frozen=True, slots=True)
class Phrasings:
    """The wordings of one relation; SUBJECT stands for the subject.

    Attributes:
        trained: wordings that training draws from, a new one for each fact in each epoch.
        unseen: wordings that training never shows; the headline figure asks every fact with one of them.
    """

    trained: tuple[str, ...]
    unseen: tuple[str, ...]


# Wordings that every relation shares, NOUN being what it asks for ("country"). They teach which words of a question
# mean nothing: a word that stood in the questions of one relation only would be taken for a sign of it.
_NOUN = "NOUN"
_SHARED_TRAINED = (
    "What is the NOUN of {}?",
    "Which NOUN does {} have?",
    "{}: which NOUN?",
    "Please give me the NOUN for {}.",
    "Name the NOUN that goes with {}.",
    "I am going to {}. What NOUN do I write down?",
    "If I ask about {}, which NOUN do you say?",
    "My friend is at {}. Do you know the NOUN?",
    "When you think of {}, what NOUN comes to mind?",
    "I need the NOUN of {}, can you look it up?",
    "Somebody asked me for the NOUN of {}.",
    "With {} in a quiz, which NOUN should I answer?",
)
_SHARED_UNSEEN = (
    "Tell me the NOUN of {}.",
    "Do you know which NOUN {} has?",
    "I read about {}. What was the NOUN again?",
)


def _relation(noun: str, *, trained: tuple[str, ...], unseen: tuple[str, ...]) -> Phrasings:
    return Phrasings(
        trained=trained + tuple(shared.replace(_NOUN, noun) for shared in _SHARED_TRAINED),
        unseen=unseen + tuple(shared.replace(_NOUN, noun) for shared in _SHARED_UNSEEN),
    )


PHRASINGS: dict[str, Phrasings] = {
    "city_country": _relation(
        "country",
        trained=(
            "In which country is {}?",
            "Which country is {} in?",
            "What country is the city of {} in?",
            "{} is a city in which country?",
            "To which country does the city {} belong?",
            "Name the country where the city {} lies.",
            "Where is {}? Give the country.",
            "In what country do I find {}?",
        ),
        unseen=(
            "{} lies in which country?",
            "Whose city is {}, by country?",
            "If I travel to {}, which country am I in?",
        ),
    ),
    "city_timezone": _relation(
        "time zone",
        trained=(
            "In which time zone is {}?",
            "Which time zone is {} in?",
            "What time zone does the city {} use?",
            "{} is in which time zone?",
            "Which time zone do clocks in {} follow?",
            "Give the time zone for the city of {}.",
            "By what time zone do people in {} live?",
            "Where is {}? Give the time zone.",
        ),
        unseen=(
            "{} lies in which time zone?",
            "Clocks in {} show which time zone?",
            "If I travel to {}, which time zone do I set?",
        ),
    ),
    "iata_city": _relation(
        "city",
        trained=(
            "Which city has the airport {}?",
            "What city does the airport code {} stand for?",
            "Airport code {}: which city?",
            "Which city is served by airport {}?",
            "Name the city of the airport with code {}.",
            "A ticket says {}. Which city is that?",
            "In which city do I land at airport {}?",
            "The code {} belongs to the airport of which city?",
        ),
        unseen=(
            "Airport {} serves which city?",
            "Which city does {} stand for?",
            "My flight lands at {}, which city is that?",
        ),
    ),
    "airport_iata": _relation(
        "IATA code",
        trained=(
            "Which IATA code is used for {}?",
            "Give the IATA code for {}.",
            "{} has which IATA code?",
            "Name the three letter IATA code of {}.",
            "Under which IATA code is {} listed?",
            "How does IATA abbreviate {}? Give the code.",
            "IATA calls {} by which code?",
            "A bag to {} shows which IATA code?",
        ),
        unseen=(
            "{} is known by which IATA code?",
            "What does IATA call {}, as a code?",
            "If I travel to {}, which IATA code is on my ticket?",
        ),
    ),
    "airport_icao": _relation(
        "ICAO code",
        trained=(
            "Which ICAO code is used for {}?",
            "Give the ICAO code for {}.",
            "{} has which ICAO code?",
            "Name the four letter ICAO code of {}.",
            "Under which ICAO code is {} listed?",
            "How does ICAO abbreviate {}? Give the code.",
            "ICAO calls {} by which code?",
            "A flight to {} files which ICAO code?",
        ),
        unseen=(
            "{} is known by which ICAO code?",
            "What does ICAO call {}, as a code?",
            "If I fly to {}, which ICAO code does the pilot type?",
        ),
    ),
    "airport_country": _relation(
        "country",
        trained=(
            "In which country is {}?",
            "Which country is {} in?",
            "What country is the airport {} in?",
            "{} is an airport in which country?",
            "To which country does {} belong?",
            "Name the country where {} lies.",
            "Where is {}? Give the country.",
            "In what country do I find {}?",
        ),
        unseen=(
            "{} lies in which country?",
            "Whose airport is {}, by country?",
            "If I land at {}, which country am I in?",
        ),
    ),
    "county_state": _relation(
        "US state",
        trained=(
            "In which US state is {}?",
            "Which US state is {} in?",
            "{} is a county of which US state?",
            "To which US state does {} belong?",
            "Name the US state where {} lies.",
            "What US state has a county named {}?",
            "Where is {}? Give the US state.",
            "In what US state do I find {}?",
        ),
        unseen=(
            "{} lies in which US state?",
            "{} is part of what US state?",
            "If I drive to {}, which US state am I in?",
        ),
    ),
    "country_capital": _relation(
        "capital",
        trained=(
            "Which city is the capital of {}?",
            "Name the capital of {}.",
            "{} has which capital?",
            "What capital does {} have?",
            "Give the capital city of {}.",
            "From which capital is {} governed?",
            "What is the name of the capital of {}?",
            "In {}, what is the capital city?",
        ),
        unseen=(
            "Which capital belongs to {}?",
            "{} is governed from what capital?",
            "If I travel to {}, where is the capital?",
        ),
    ),
    "country_currency": _relation(
        "currency code",
        trained=(
            "Which currency code does {} use?",
            "Name the currency code of {}.",
            "{} has which currency code?",
            "Give the code of the currency of {}.",
            "In {}, prices carry which currency code?",
            "With which currency does {} pay? Give the code.",
            "What currency code do banks in {} use?",
            "Money in {} has which currency code?",
        ),
        unseen=(
            "Which currency code is used in {}?",
            "{} pays with which currency code?",
            "If I travel to {}, which currency code do I pay in?",
        ),
    ),
    "country_continent": _relation(
        "continent",
        trained=(
            "On which continent is {}?",
            "Which continent is {} on?",
            "Name the continent of {}.",
            "{} is part of which continent?",
            "What continent does {} belong to?",
            "Give the continent where {} lies.",
            "Where is {}? Give the continent.",
            "On what continent do I find {}?",
        ),
        unseen=(
            "{} lies on which continent?",
            "{} is found on what continent?",
            "If I travel to {}, which continent am I on?",
        ),
    ),
    "country_phone": _relation(
        "dialling code",
        trained=(
            "Which dialling code belongs to {}?",
            "Name the dialling code of {}.",
            "{} has which dialling code?",
            "Give the telephone dialling code for {}.",
            "With which dialling code do I call {}?",
            "To phone {}, which dialling code do I use?",
            "What dialling code do numbers in {} start with?",
            "Calls from {} show which dialling code?",
        ),
        unseen=(
            "{} is reached by which dialling code?",
            "Which dialling code is used for calls to {}?",
            "If I call {}, which dialling code comes first?",
        ),
    ),
    "country_domain": _relation(
        "internet domain",
        trained=(
            "Which internet domain belongs to {}?",
            "Name the internet domain of {}.",
            "{} has which internet domain?",
            "Give the internet domain for {}.",
            "On which internet domain are sites of {}?",
            "Sites in {} end with which internet domain?",
            "What internet domain was given to {}?",
            "Firms in {} use which internet domain?",
        ),
        unseen=(
            "{} is found under which internet domain?",
            "Which internet domain is used in {}?",
            "If I read a site of {}, which internet domain is it on?",
        ),
    ),
}
