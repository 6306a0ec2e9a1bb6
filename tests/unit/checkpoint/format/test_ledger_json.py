"""Ledgers come back exactly; what is none is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mempool.checkpoint.format.json_values import Unfit
from mempool.checkpoint.format.ledger_json import ledger_json, parse_ledger
from mempool.types import DecidedStep, Ledger, LedgerEntry, StepId

COUNT = st.integers(0, 2**63 - 1)
DECIDED = st.builds(
    DecidedStep,
    table_id=st.integers(0, 2**64 - 1),
    version=COUNT,
    step_id=st.builds(StepId, group=st.text(max_size=5), rank=COUNT, step=COUNT, generation=COUNT),
    lr=st.floats(allow_nan=False, allow_infinity=False),
    grad_scale=st.floats(allow_nan=False, allow_infinity=False),
    sequences=st.lists(COUNT, max_size=3).map(tuple),
)
ENTRY = st.builds(
    LedgerEntry,
    generation=COUNT,
    step=COUNT,
    version=COUNT,
    dropped=COUNT,
    others=st.lists(DECIDED, max_size=2).map(tuple),
)
LEDGERS = st.builds(
    Ledger,
    version=COUNT,
    updates_applied=COUNT,
    step_offset=st.integers(-(2**63) + 1, 2**63 - 1),
    entries=st.dictionaries(st.tuples(st.text(max_size=5), COUNT), ENTRY, max_size=4),
)


@settings(max_examples=100, deadline=None)
@given(LEDGERS)
def test_every_ledger_comes_back(ledger: Ledger) -> None:
    found = parse_ledger(json.loads(json.dumps(ledger_json(ledger), allow_nan=False)))
    assert found == ledger
    assert list(found.entries) == list(ledger.entries)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"version": -1}, r"ledger\.version is -1"),
        ({"entries": {}}, r"ledger\.entries is no array"),
        ({"more": 1}, r"ledger\.more is not known"),
        ({"entries": [{"group": 3}]}, r"ledger\.entries\[0\]\.group is 3"),
    ],
)
def test_what_is_none_is_refused(change: dict[str, Any], told: str) -> None:
    with pytest.raises(Unfit, match=told):
        parse_ledger(ledger_json(Ledger()) | change)


def test_a_rank_is_there_once() -> None:
    there = ledger_json(Ledger(entries={("a", 0): LedgerEntry()}))
    with pytest.raises(Unfit, match="rank 0 is there twice"):
        parse_ledger({**there, "entries": there["entries"] * 2})
