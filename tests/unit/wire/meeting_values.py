"""Values of what the ranks of a group say to their home, and of its answers, drawn at random."""

from typing import Any

from hypothesis import strategies as st

from mempool.types.groups import meeting as types
from mempool.wire import methods
from mempool.wire.methods import Method
from mempool.wire.v1 import data_pb2
from tests.unit.wire.right_schemas import U64

_U32 = st.one_of(st.integers(0, 300), st.integers(0, 2**32 - 1))
_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
_DOUBLE = st.floats(allow_nan=False)
_SECONDS = st.floats(0.0, allow_infinity=False)
_U64S = st.lists(U64, max_size=5).map(tuple)


def _some(each: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(each, max_size=3).map(tuple)


_TERMS = st.builds(
    types.Terms,
    world_size=_U32,
    consistency=st.sampled_from(["sync", "async", "bounded"]),
    staleness=_U32,
    reduction=st.sampled_from(["mean", "sum"]),
    elastic=st.booleans(),
)
_PHASE = st.sampled_from(["prepare", "commit"])
_OFFERED = _some(st.builds(types.OfferedPart, table_id=U64, step=U64, sequences=_U64S, lr=_DOUBLE, grad_scale=_DOUBLE))
_WORD = st.none() | st.builds(
    types.Word,
    meeting=U64,
    kind=st.sampled_from(["prepared", "done", "earlier", "again", "undone", "failed"]),
    parts=_some(
        st.builds(
            types.WordPart,
            table_id=U64,
            step=U64,
            sequences=_U64S,
            version=U64,
            squared_norm=_DOUBLE,
            finite=st.booleans(),
            norm=_DOUBLE,
            updates=U64,
        )
    ),
    message=_TEXT,
    code=_U32,
)
MEETINGS: dict[Method[Any, Any], Any] = {
    methods.MEET: (
        data_pb2.MeetRequest,
        st.builds(
            types.MeetRequest,
            group=_TEXT,
            rank=_U32,
            nonce=U64,
            host=_TEXT,
            terms=_TERMS,
            kind=st.sampled_from(["join", "beat", "arrive", "leave"]),
            launcher=_TEXT,
            restart=U64,
            generation=U64,
            meeting=U64,
            step=U64,
            phase=_PHASE,
            parts=_OFFERED,
            want_norm=st.booleans(),
            norm_order=_DOUBLE,
            word=_WORD,
            number=U64,
            ticket=U64,
        ),
        data_pb2.MeetReply,
        st.builds(
            types.MeetReply,
            answer=st.sampled_from(["heard", "wait", "occupied", "changed", "lost", "arrived", "word"]),
            generation=U64,
            step=U64,
            lease_s=_SECONDS,
            arrivals=_some(
                st.builds(
                    types.Arrival,
                    rank=_U32,
                    host=_TEXT,
                    phase=_PHASE,
                    parts=_OFFERED,
                    want_norm=st.booleans(),
                    norm_order=_DOUBLE,
                )
            ),
            word=_WORD,
            others=_some(
                st.builds(
                    types.Seen,
                    rank=_U32,
                    host=_TEXT,
                    state=st.sampled_from(["here", "lost", "left", "awaited"]),
                    silent_s=_SECONDS,
                    meeting=U64,
                    step=U64,
                )
            ),
            undecided=st.none() | st.builds(types.Undecided, generation=U64, step=U64, parts=_OFFERED),
            ticket=U64,
        ),
    )
}
