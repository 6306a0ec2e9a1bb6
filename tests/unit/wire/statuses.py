"""What shards say of themselves, drawn at random, and the plain values that messages are made of."""

from typing import Any

from hypothesis import strategies as st

from mempool import types
from tests.unit.wire.right_schemas import U64

U32 = st.one_of(st.integers(0, 300), st.integers(0, 2**32 - 1))
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
SECONDS = st.floats(0.0, allow_infinity=False)
U64S = st.lists(U64, max_size=5).map(tuple)


def build(cls: type, **parts: Any) -> st.SearchStrategy[Any]:
    return st.builds(cls, **parts)


SHARD_INFO = build(types.ShardInfo, shard=U32, address=TEXT, incarnation=U64)
PIN_STATUS = build(types.PinStatus, version=U64, name=TEXT, pins=U32)
TABLE_STATUS = build(
    types.TableStatus,
    table_id=U64,
    name=TEXT,
    epoch=U64,
    version=U64,
    pages=U64,
    lost_pages=U64,
    num_bytes=U64,
    updates_held=U64,
    updates_applied=U64,
    lookups=U64,
    frozen=st.booleans(),
    bytes_to_fill=U64,
    preparing=TEXT,
    pending=st.booleans(),
    round=TEXT,
    load=SECONDS,
    pins=st.lists(PIN_STATUS, max_size=2).map(tuple),
)
STAGE_TIME = build(types.StageTime, stage=TEXT, count=U64, total_s=SECONDS, p50_s=SECONDS, p99_s=SECONDS, max_s=SECONDS)
SHARD_STATUS = build(
    types.ShardStatus,
    info=SHARD_INFO,
    state=st.sampled_from(["ready", "starting", "unreachable"]),
    device=TEXT,
    num_bytes=U64,
    context_bytes=U64,
    held_bytes=U64,
    queued_bytes=U64,
    queued_calls=U64,
    kept_bytes=U64,
    client_limit_bytes=U64,
    page_limit_bytes=U64,
    uptime_s=SECONDS,
    tables=st.lists(TABLE_STATUS, max_size=2).map(tuple),
    stages=st.lists(STAGE_TIME, max_size=2).map(tuple),
    dropped=U64S,
    copied_bytes=U64,
    version_bytes=U64,
    version_limit_bytes=U64,
    near_clients=U32,
    tcp_line_clients=U32,
    storage=TEXT,
    journal_bytes=U64,
    storage_refuses=TEXT,
)
