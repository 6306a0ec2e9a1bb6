"""Records survive their bytes: whatever they say, bit for bit."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mempool.errors import DataLoss
from mempool.shard.durable.encoding import apart, decode, encode, joined
from mempool.shard.durable.records import (
    KINDS,
    Applied,
    Begun,
    CaughtUp,
    Counted,
    Decided,
    Dropped,
    Forked,
    Gone,
    Held,
    Kept,
    Over,
    Prepared,
    RecordOf,
    Restored,
    Schedule,
    Staged,
    StagedLedger,
    Stopped,
    Unstaged,
    Written,
)
from mempool.shard.steps.held import HeldUpdate
from mempool.types import (
    DecidedStep,
    Envelope,
    Ledger,
    LedgerEntry,
    PageBatch,
    PreparePart,
    PrepareRequest,
    StepCountRequest,
    StepId,
    WriteId,
    WriteRowsRequest,
)
from mempool.types.bags import Bags

_NUMBER = st.integers(0, 2**62)
_FLOAT = st.floats(allow_nan=False, width=64)
_STEP_ID = st.builds(StepId, group=st.text(max_size=40), rank=st.integers(0, 2**31), step=_NUMBER, generation=_NUMBER)
_SEQUENCES = st.lists(_NUMBER, max_size=5).map(lambda found: tuple(sorted(found)))
_STEP = st.builds(
    DecidedStep, table_id=_NUMBER, version=_NUMBER, step_id=_STEP_ID, lr=_FLOAT, grad_scale=_FLOAT, sequences=_SEQUENCES
)
_STEPS = st.lists(_STEP, min_size=1, max_size=4).map(tuple)
_ENVELOPE = st.builds(Envelope, table_id=_NUMBER, epoch=_NUMBER, incarnation=_NUMBER, table_version=_NUMBER)


def _tensor(dtype: torch.dtype, *shape: int) -> st.SearchStrategy[torch.Tensor]:
    """Of any bits."""
    size = int(np.prod(shape)) * dtype.itemsize
    return st.binary(min_size=size, max_size=size).map(
        lambda data: (
            torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape) if data else torch.empty(shape, dtype=dtype)
        )
    )


@st.composite
def _held(draw: st.DrawFn) -> Held:
    bags, pairs, width = draw(st.integers(0, 4)), draw(st.integers(0, 5)), draw(st.integers(1, 6))
    weights = draw(st.none() | _tensor(torch.float32, pairs))
    held = Bags(ids=draw(_tensor(torch.int64, pairs)), weights=weights, offsets=draw(_tensor(torch.int64, bags + 1)))
    grads = draw(_tensor(torch.float32, bags, width))
    update = HeldUpdate(held, grads, input_dim=draw(st.integers(0, 3)))
    return Held(draw(_NUMBER), draw(_STEP_ID), draw(_NUMBER), update)


@st.composite
def _written(draw: st.DrawFn) -> Written:
    count, width = draw(st.integers(0, 4)), draw(st.integers(1, 6))
    dtype = draw(st.sampled_from((torch.float32, torch.bfloat16)))
    write_id = draw(st.none() | st.builds(WriteId, writer=_NUMBER, number=_NUMBER, open=_SEQUENCES))
    request = WriteRowsRequest(
        envelope=draw(_ENVELOPE),
        array=draw(st.sampled_from(("values", "keys", "values.exp_avg"))),
        ids=draw(_tensor(torch.int64, count)),
        blocks=tuple(range(draw(st.integers(0, 3)))),
        rows=draw(_tensor(dtype, count, width)),
        write_id=write_id,
        fresh=draw(st.booleans()),
    )
    return Written(request)


@st.composite
def _staged(draw: st.DrawFn) -> Staged:
    pages = np.arange(draw(st.integers(0, 3)), dtype=np.int64)
    arrays = {"values": draw(_tensor(torch.uint8, len(pages) * 2, 4)), "x": draw(_tensor(torch.float32, 3))}
    batch = PageBatch(
        table_id=draw(_NUMBER), row_pages=pages, blocks=(0, 2), key_pages=(1,), arrays=arrays, version=draw(_NUMBER)
    )
    return Staged(draw(st.text(max_size=30)), batch)


@st.composite
def _schedule(draw: st.DrawFn) -> Schedule:
    count = draw(st.integers(0, 5))
    return Schedule(
        draw(_NUMBER),
        draw(st.integers(1, 2**40)),
        draw(_tensor(torch.float32, 3, count)),
        draw(_tensor(torch.float64, count + 1)),
    )


_ENTRY = st.builds(LedgerEntry, generation=_NUMBER, step=_NUMBER, version=_NUMBER, dropped=_NUMBER, others=_STEPS)
_LEDGER = st.builds(
    Ledger,
    version=_NUMBER,
    updates_applied=_NUMBER,
    entries=st.dictionaries(st.tuples(st.text(max_size=20), st.integers(0, 2**31)), _ENTRY, max_size=3),
    step_offset=st.integers(-(2**40), 2**40),
)
_PART = st.builds(PreparePart, envelope=_ENVELOPE, step_id=_STEP_ID, sequences=_SEQUENCES)
_PREPARE = st.builds(
    PrepareRequest,
    parts=st.lists(_PART, min_size=1, max_size=3).map(tuple),
    want_norm=st.booleans(),
    decider_table=_NUMBER,
    decider_step=_NUMBER,
    attempt=_NUMBER,
)
RECORDS: st.SearchStrategy[RecordOf] = st.one_of(
    st.builds(Begun, _NUMBER),
    st.builds(Dropped, _NUMBER),
    st.builds(Prepared, _PREPARE),
    st.builds(Decided, _STEPS),
    st.builds(Kept, _STEPS),
    st.builds(Applied, _STEP, st.lists(_STEP, max_size=3).map(tuple)),
    st.builds(Over, _NUMBER, _STEP_ID),
    st.builds(Counted, st.builds(StepCountRequest, envelope=_ENVELOPE, set=_NUMBER, at_version=_NUMBER)),
    st.builds(StagedLedger, _NUMBER, st.text(max_size=30), _LEDGER, st.booleans()),
    st.builds(CaughtUp, _NUMBER, st.integers(0, 6).flatmap(lambda count: _tensor(torch.int64, count))),
    st.builds(Stopped, _NUMBER, _NUMBER),
    st.builds(Unstaged, _NUMBER),
    st.builds(Gone, _NUMBER, _STEP_ID, _STEPS),
    st.builds(Forked, _NUMBER, _NUMBER),
    st.builds(
        lambda staged, over: Restored(staged.batch.table_id, None if over else staged.batch), _staged(), st.booleans()
    ),
    _held(),
    _written(),
    _staged(),
    _schedule(),
)


def _plain(value: Any) -> Any:
    """A value whose equality is of all its bits."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), bytes(value.reshape(-1).contiguous().view(torch.uint8).tolist())
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.tolist()
    if isinstance(value, dict):
        return [(key, _plain(item)) for key, item in value.items()]
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, HeldUpdate):
        return HeldUpdate, _plain(value.bags), _plain(value.grads), value.input_dim
    if dataclasses.is_dataclass(value):
        return type(value), [_plain(getattr(value, field.name)) for field in dataclasses.fields(value)]
    return value


@settings(max_examples=300, deadline=None)
@given(RECORDS)
def test_a_record_is_what_its_bytes_say(record: RecordOf) -> None:
    kind, parts = encode(record)
    data = b"".join(parts)
    for shift in (0, 3):  # wherever it lies in what was read
        assert _plain(decode(kind, memoryview(bytes(shift) + data)[shift:])) == _plain(record)


@settings(max_examples=50, deadline=None)
@given(st.lists(RECORDS, max_size=5))
def test_joined_they_come_apart(found: list[RecordOf]) -> None:
    assert [_plain(record) for record in apart(joined(found))] == [_plain(record) for record in found]


def test_what_is_held_is_not_copied() -> None:
    grads = torch.ones(64, 64)
    bags = Bags(ids=torch.arange(64), weights=None, offsets=torch.arange(65))
    _, parts = encode(Held(1, StepId(group="g", rank=0, step=1), 1, HeldUpdate(bags, grads)))
    before = b"".join(parts)
    grads[0, 0] = 2.0
    assert b"".join(parts) != before


@pytest.mark.parametrize("kind", [0, len(KINDS) + 1, 60_000])
def test_a_kind_that_nobody_knows_is_of_a_later_version(kind: int) -> None:
    with pytest.raises(DataLoss, match="later version"):
        decode(kind, b"")


@settings(max_examples=200, deadline=None)
@given(st.integers(1, len(KINDS)), st.binary(max_size=80))
def test_other_bytes_are_none(kind: int, data: bytes) -> None:
    try:
        record = decode(kind, data)
    except DataLoss:
        return
    assert type(record) is KINDS[kind - 1]


def test_numbers_of_kinds_never_change() -> None:
    names = "Begun Attached Dropped Viewed Held Prepared Decided Applied Over Written Counted Staged StagedLedger"
    assert [kind.__name__ for kind in KINDS] == [
        *names.split(),
        "Kept",
        "Schedule",
        "CaughtUp",
        "Restored",
        "Stopped",
        "Unstaged",
        "Gone",
        "Forked",
    ]
