"""Numbers, names and sizes at their limits and beyond; every check is one pass."""

from dataclasses import replace
from typing import Any

import pytest

from mempool.errors import InvalidRequest, RequestTooLarge
from mempool.shard import bounds
from mempool.types import (
    CommitPart,
    CommitRequest,
    Envelope,
    Ledger,
    LedgerEntry,
    PreparePart,
    PrepareRequest,
    StepId,
    WriteId,
)


def _step(group: str = "g", rank: int = 0, step: int = 1) -> StepId:
    return StepId(group=group, rank=rank, step=step)


def test_what_is_within_the_limits_passes() -> None:
    bounds.check_step(_step("é" * 128, 2**32 - 1, 2**53 - 1), (0, 2**53 - 1))
    bounds.check_step(_step(), tuple(range(bounds.MAX_SEQUENCES)))
    bounds.check_lookup_id(2**64 - 1)
    bounds.check_released(range(bounds.MAX_RELEASED))
    bounds.check_freeze(0.01, token="t" * 64, lease_s=0.0)
    bounds.check_reply(10**12, None, "anything")
    bounds.check_reply(2**20, 2**20 + 2048, "a gather")
    bounds.check_ledger(None)
    bounds.check_ledger(Ledger(version=1, entries={("g", 0): LedgerEntry(step=1, version=1)}))


@pytest.mark.parametrize("order", [-1.0, float("nan"), -float("inf")])
def test_orders_of_norms(order: float) -> None:
    for right in (0.0, 0.5, float("inf")):
        bounds.check_prepare(_prepare(right))
    with pytest.raises(InvalidRequest, match=f"norm_order = {order} must be above 0"):
        bounds.check_prepare(_prepare(order))


def _prepare(order: float) -> PrepareRequest:
    envelope = Envelope(table_id=1, epoch=1, incarnation=1, table_version=0)
    part = PreparePart(envelope=envelope, step_id=_step(), sequences=())
    return PrepareRequest(parts=(part,), want_norm=True, norm_order=order, decider_table=1, decider_step=1)


@pytest.mark.parametrize(
    ("step_id", "sequences", "match"),
    [
        (_step(""), (), r"name '' has 0 bytes; it must have 1 to 256"),
        (_step("é" * 129), (), r"has 258 bytes"),
        (_step("x" * 2**22), (), r"name 'x{64}\.\.\.' has 4,194,304 bytes"),
        (_step("\ud800" * 100), (), r"has 300 bytes"),
        (_step(rank=-1), (), "rank = -1"),
        (_step(rank=2**32), (), "rank = 4294967296"),
        (_step(step=-1), (), "step = -1"),
        (_step(step=0), (), "step = 0: steps are counted from 1"),
        (replace(_step(), generation=-1), (), "generation = -1"),
        (_step(step=2**53), (), "step = 9007199254740992"),
        (_step(), (3, -1), "sequence = -1"),
        (_step(), (2**63,), "sequence = 9223372036854775808"),
        (_step(), (1, 2, 1), "sequence 1 is named twice"),
        (_step(), tuple(range(bounds.MAX_SEQUENCES + 1)), "names 65,537 sequences"),
    ],
)
def test_steps_out_of_bounds(step_id: StepId, sequences: tuple[int, ...], match: str) -> None:
    with pytest.raises(InvalidRequest, match=match) as raised:
        bounds.check_step(step_id, sequences)
    assert len(str(raised.value)) < 500, "a message shows no megabytes"


class _Counted(int):
    """A number that counts how often it is compared."""

    compared = 0

    def __eq__(self, other: object) -> bool:
        _Counted.compared += 1
        return int(self) == other

    def __hash__(self) -> int:
        return int(self) * 7919


def test_a_sequence_named_twice_is_found_in_one_pass() -> None:
    sequences = tuple(_Counted(number) for number in (*range(40_000), 39_999))
    _Counted.compared = 0
    with pytest.raises(InvalidRequest, match="sequence 39999 is named twice"):
        bounds.check_step(_step(), sequences)
    assert _Counted.compared < 4 * len(sequences)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"lr": float("nan")}, "lr = nan"),
        ({"lr": float("inf")}, "lr = inf"),
        ({"lr": -1.0}, "lr = -1.0"),
        ({"grad_scale": float("nan")}, "grad_scale = nan"),
        ({"grad_scale": float("-inf")}, "grad_scale = -inf"),
        ({"sequences": (1, 1)}, "named twice"),
        ({"version": -1}, "version = -1"),
    ],
)
def test_commits_out_of_bounds(changes: dict[str, object], match: str) -> None:
    values: dict[str, object] = {"lr": 0.1, "grad_scale": 1.0, "sequences": (1,)} | changes
    envelope = Envelope(table_id=1, epoch=1, incarnation=1)
    part = CommitPart(envelope=envelope, step_id=_step(), **values)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match=match):
        bounds.check_commit(CommitRequest(parts=(part,), one_phase=True))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"writer": 0}, "numbered from 1"),
        ({"writer": 2**64}, "writer = 18446744073709551616"),
        ({"number": 0}, "numbered from 1"),
        ({"number": -1}, "a write's number = -1"),
        ({"number": 2**53}, "a write's number = 9007199254740992"),
        ({"open": (0, 3)}, r"open writes \(0, 3\) before write 9 must ascend"),
        ({"open": (3, 3)}, r"open writes \(3, 3\) before write 9 must ascend"),
        ({"open": (5, 3)}, "must ascend"),
        ({"open": (3, 9)}, "must ascend, from 1 to below it. Nothing was changed"),
        (
            {"open": tuple(range(1, 1026)), "number": 2000},
            "names 1,025 open ones before it; a client has at most 1,024",
        ),
    ],
)
def test_writes_out_of_bounds(changes: dict[str, Any], match: str) -> None:
    write_id = WriteId(writer=1, number=9, open=(1, 8))
    bounds.check_write(write_id)
    bounds.check_write(None)
    with pytest.raises(InvalidRequest, match=match):
        bounds.check_write(replace(write_id, **changes))


@pytest.mark.parametrize("timeout_s", [float("nan"), float("inf"), float("-inf"), -0.0, 0.0, -1.0, 1e9, 3600.1])
def test_freezes_that_nobody_can_wait_for(timeout_s: float) -> None:
    with pytest.raises(InvalidRequest, match=r"timeout_s = .* must be above 0 and at most 3600 seconds"):
        bounds.check_freeze(timeout_s, token="", lease_s=1.0)
    if timeout_s != 0.0:
        with pytest.raises(InvalidRequest, match=r"lease_s = .* must be at least 0 \(no end\) and at most 3600 s"):
            bounds.check_freeze(1.0, token="", lease_s=timeout_s)


def test_lists_that_are_too_long_and_ids_that_are_too_large() -> None:
    with pytest.raises(InvalidRequest, match="release names 65,537 lookups"):
        bounds.check_released(range(bounds.MAX_RELEASED + 1))
    for number in (-1, 2**64):
        with pytest.raises(InvalidRequest, match=f"lookup_id = {number}"):
            bounds.check_lookup_id(number)


def test_ledgers_that_no_shard_makes() -> None:
    entry = LedgerEntry(step=1)
    with pytest.raises(InvalidRequest, match="has 300 bytes"):
        bounds.check_ledger(Ledger(entries={("x" * 300, 0): entry}))
    for odd in (
        Ledger(version=-1),
        Ledger(version=2**53),
        Ledger(updates_applied=-1),
        Ledger(version=1, step_offset=-2),
    ):
        with pytest.raises(InvalidRequest, match="the ledger's"):
            bounds.check_ledger(odd)
    with pytest.raises(InvalidRequest, match="step = -1"):
        bounds.check_ledger(Ledger(entries={("x", 0): LedgerEntry(step=-1)}))
    with pytest.raises(InvalidRequest, match="the ledger has 16,385 entries"):
        bounds.check_ledger(Ledger(entries={("x", rank): entry for rank in range(16_385)}))


def test_answers_that_are_too_large() -> None:
    with pytest.raises(RequestTooLarge, match=r"5 rows would be answered by 1,048,576 bytes; .* at most 1,048,576"):
        bounds.check_reply(2**20, 2**20, "5 rows")


def test_what_messages_show_is_short() -> None:
    assert bounds.shown("facts") == "'facts'"
    assert bounds.shown_numbers((1, 2)) == "(1, 2)"
    assert bounds.shown_numbers(range(10**6)) == "(0, 1, 2, 3, 4, 5, 6, 7, ...)"


def test_steps_of_too_many_tables() -> None:
    def part(table_id: int, sequences: tuple[int, ...] = ()) -> PreparePart:
        envelope = Envelope(table_id=table_id, epoch=1, incarnation=1)
        return PreparePart(envelope=envelope, step_id=_step(), sequences=sequences)

    def check(*parts: PreparePart) -> None:
        bounds.check_prepare(PrepareRequest(parts=parts, want_norm=False, decider_table=0, decider_step=1))

    check(*(part(table_id) for table_id in range(1000)))
    with pytest.raises(InvalidRequest, match="1 to 1,000 tables; 1,001 were named"):
        check(*(part(table_id) for table_id in range(1001)))
    with pytest.raises(InvalidRequest, match=r"a table is named twice in one step: \(1, 2, 1\)"):
        check(part(1), part(2), part(1))
    half = tuple(range(40_000))
    with pytest.raises(InvalidRequest, match="names 80,000 sequences; its tables together have at most 65,536"):
        check(part(1, half), part(2, half))


def test_a_token_is_short() -> None:
    bounds.check_token("\u00e9" * 32)
    with pytest.raises(InvalidRequest, match=r"the token '.*' has more than 64 bytes"):
        bounds.check_token("\u00e9" * 33)
