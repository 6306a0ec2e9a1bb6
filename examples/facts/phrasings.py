"""How each relation is asked: phrasings to train on, and phrasings kept back for the evaluation only.

Which facts there are is `data.py`'s. Edit this file to ask in other words; a phrasing may stand in one list only.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Phrasings:
    """The wordings of one relation; `{}` stands for the subject.

    Attributes:
        trained: wordings that training draws from, a new one for each fact in each epoch.
        unseen: wordings that training never shows; the headline figure asks every fact with them.
    """

    trained: tuple[str, ...]
    unseen: tuple[str, ...]


LEAD_INS: tuple[str, ...] = (
    "Please tell me: ",
    "Quick question: ",
    "I would like to know: ",
    "Do you know this one? ",
    "Help me with my homework: ",
    "Here is a question for you. ",
)
"""Words before a question that mean nothing: half of the training questions carry one, no evaluation question does."""

PHRASINGS: dict[str, Phrasings] = {
    "city_country": Phrasings(
        trained=(
            "In which country is {}?",
            "Which country is {} in?",
            "What country is the city of {} in?",
            "{} is a city in which country?",
            "To which country does the city {} belong?",
            "Name the country where the city {} lies.",
            "Where is {}? Give the country.",
            "In what country do I find {}?",
            "I am flying to {}. Which country should I expect?",
            "When it rains in {}, the weather report of what country says so?",
        ),
        unseen=(
            "Tell me the country of {}.",
            "{} lies in which country?",
            "If I travel to {}, which country am I in?",
        ),
    ),
    "city_timezone": Phrasings(
        trained=(
            "In which time zone is {}?",
            "Which time zone is {} in?",
            "What time zone does the city {} use?",
            "Name the time zone of {}.",
            "{} is in which time zone?",
            "Which time zone do clocks in {} follow?",
            "Give the time zone for the city of {}.",
            "By what time zone do people in {} live?",
            "I am flying to {}. Which time zone should I expect?",
            "When it is noon in {}, what time zone is that noon in?",
        ),
        unseen=(
            "Tell me the time zone of {}.",
            "{} lies in which time zone?",
            "If I travel to {}, which time zone do I set?",
        ),
    ),
    "iata_city": Phrasings(
        trained=(
            "Which city has the airport {}?",
            "What city does the airport code {} stand for?",
            "Airport code {}: which city?",
            "Which city is served by airport {}?",
            "Name the city of the airport with code {}.",
            "A ticket says {}. Which city is that?",
            "In which city do I land at airport {}?",
            "The code {} belongs to the airport of which city?",
            "I am flying to {}. Which city should I expect?",
            "When I read {} on a bag, what city is it going to?",
        ),
        unseen=(
            "Tell me the city of airport {}.",
            "My flight goes to {}, which city is that?",
            "Which city does {} stand for?",
        ),
    ),
    "airport_iata": Phrasings(
        trained=(
            "What is the IATA code of {}?",
            "Which IATA code does {} have?",
            "Give the IATA code for {}.",
            "{} has which IATA code?",
            "Name the three letter IATA code of {}.",
            "Under which IATA code is {} listed?",
            "How does IATA abbreviate {}?",
            "IATA calls {} by which code?",
            "I am flying to {}. Which IATA code should I expect?",
            "When a bag goes to {}, what IATA code does it show?",
        ),
        unseen=(
            "Tell me the IATA code of {}.",
            "{} is known by which IATA code?",
            "Which IATA letters are on a ticket to {}?",
        ),
    ),
    "airport_icao": Phrasings(
        trained=(
            "What is the ICAO code of {}?",
            "Which ICAO code does {} have?",
            "Give the ICAO code for {}.",
            "{} has which ICAO code?",
            "Name the four letter ICAO code of {}.",
            "Under which ICAO code is {} listed?",
            "How does ICAO abbreviate {}?",
            "ICAO calls {} by which code?",
            "I am flying to {}. Which ICAO code should I expect?",
            "When a plan is filed for {}, what ICAO code does it show?",
        ),
        unseen=(
            "Tell me the ICAO code of {}.",
            "{} is known by which ICAO code?",
            "Which ICAO letters does a pilot file for {}?",
        ),
    ),
    "airport_country": Phrasings(
        trained=(
            "In which country is {}?",
            "Which country is {} in?",
            "What country is the airport {} in?",
            "{} is an airport in which country?",
            "To which country does {} belong?",
            "Name the country where {} lies.",
            "Where is {}? Give the country.",
            "In what country do I find {}?",
            "I am flying to {}. Which country should I expect?",
            "When it rains in {}, the weather report of what country says so?",
        ),
        unseen=(
            "Tell me the country of {}.",
            "{} lies in which country?",
            "If I land at {}, which country am I in?",
        ),
    ),
    "county_state": Phrasings(
        trained=(
            "In which US state is {}?",
            "Which US state is {} in?",
            "{} is a county of which US state?",
            "To which US state does {} belong?",
            "Name the US state where {} lies.",
            "What US state has a county named {}?",
            "Where is {}? Give the US state.",
            "In what US state do I find {}?",
            "I am driving to {}. Which US state should I expect?",
            "When it rains in {}, the weather report of what US state says so?",
        ),
        unseen=(
            "Tell me the US state of {}.",
            "{} lies in which US state?",
            "If I drive to {}, which US state am I in?",
        ),
    ),
    "country_capital": Phrasings(
        trained=(
            "What is the capital of {}?",
            "Which city is the capital of {}?",
            "Name the capital of {}.",
            "{} has which capital?",
            "What capital does {} have?",
            "Give the capital city of {}.",
            "From which capital is {} governed?",
            "What is the name of the capital of {}?",
            "I am flying to {}. Which capital should I expect?",
            "When they vote in {}, in what capital do they count?",
        ),
        unseen=(
            "Tell me the capital of {}.",
            "Which capital belongs to {}?",
            "{} is governed from which capital city?",
        ),
    ),
    "country_currency": Phrasings(
        trained=(
            "What is the currency code of {}?",
            "Which currency code does {} use?",
            "Name the currency code of {}.",
            "{} has which currency code?",
            "Give the code of the currency of {}.",
            "In {}, prices carry which currency code?",
            "With which currency does {} pay? Give the code.",
            "What currency code do banks in {} use?",
            "I am flying to {}. Which currency code should I expect?",
            "When I pay in {}, what currency code is on the bill?",
        ),
        unseen=(
            "Tell me the currency code of {}.",
            "Which currency code is used in {}?",
            "{} pays with which currency code?",
        ),
    ),
    "country_continent": Phrasings(
        trained=(
            "On which continent is {}?",
            "Which continent is {} on?",
            "Name the continent of {}.",
            "{} is part of which continent?",
            "What continent does {} belong to?",
            "Give the continent where {} lies.",
            "Where is {}? Give the continent.",
            "On what continent do I find {}?",
            "I am flying to {}. Which continent should I expect?",
            "When it rains in {}, it rains on what continent?",
        ),
        unseen=(
            "Tell me the continent of {}.",
            "{} lies on which continent?",
            "If I travel to {}, which continent am I on?",
        ),
    ),
    "country_phone": Phrasings(
        trained=(
            "What is the dialling code of {}?",
            "Which dialling code does {} have?",
            "Name the dialling code of {}.",
            "{} has which dialling code?",
            "Give the telephone dialling code for {}.",
            "With which dialling code do I call {}?",
            "To phone {}, which dialling code do I use?",
            "What dialling code do numbers in {} start with?",
            "I am calling {}. Which dialling code should I expect?",
            "When they phone me from {}, what dialling code do I see?",
        ),
        unseen=(
            "Tell me the dialling code of {}.",
            "{} is reached by which dialling code?",
            "Which dialling code is used for calls to {}?",
        ),
    ),
    "country_domain": Phrasings(
        trained=(
            "What is the internet domain of {}?",
            "Which internet domain does {} have?",
            "Name the internet domain of {}.",
            "{} has which internet domain?",
            "Give the internet domain for {}.",
            "On which internet domain are sites of {}?",
            "Sites in {} end with which internet domain?",
            "What internet domain was given to {}?",
            "I am reading a site of {}. Which internet domain should I expect?",
            "When they found a firm in {}, what internet domain does it take?",
        ),
        unseen=(
            "Tell me the internet domain of {}.",
            "{} is found under which internet domain?",
            "Which internet domain is used in {}?",
        ),
    ),
}
