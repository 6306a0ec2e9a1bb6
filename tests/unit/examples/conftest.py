"""Makes the examples importable as they are when run: with their own folder on the path."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "examples"))

import mempool
from facts.data import Fact, FactBook, build_facts
from facts.phrasings import Phrasings


@pytest.fixture(scope="session")
def book() -> FactBook:
    return build_facts()


@pytest.fixture(scope="session")
def small_book() -> FactBook:
    """48 facts of two relations about the same 24 subjects."""
    middles = ("ra", "mi", "lo", "ne", "ku", "st")
    subjects = [f"{first}{middle}ton" for first in ("al", "be", "co", "du") for middle in middles]
    shades = ("red", "green", "blue", "amber", "black")
    sizes = ("tiny", "small", "large")
    facts = [Fact("shade", subject, shades[i % 5]) for i, subject in enumerate(subjects)]
    facts += [Fact("size", subject, sizes[i * 7 % 3]) for i, subject in enumerate(subjects)]
    return FactBook(
        facts=tuple(facts),
        phrasings={
            "shade": Phrasings(trained=("What shade is {}?", "Which shade has {}?"), unseen=("Shade of {}?",)),
            "size": Phrasings(trained=("What size is {}?", "Which size has {}?"), unseen=("Size of {}?",)),
        },
    )


@pytest.fixture
def table() -> Iterator[mempool.Table]:
    with mempool.local(shards=2) as pool:
        yield pool.create_table(mempool.TableConfig(name="facts", num_slots=32**2, value_dim=64))
