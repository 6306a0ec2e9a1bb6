"""Codecs of what the ranks of a group say to their home, and of its answers."""

from mempool.types.groups import meeting as types
from mempool.wire.codecs.codec import FrameCodec
from mempool.wire.codecs.mirror import Choice, Mirror, Several
from mempool.wire.v1 import data_pb2 as pb

_TERMS = Mirror(
    pb.Terms,
    types.Terms,
    {
        "consistency": Choice(
            {"sync": pb.CONSISTENCY_SYNC, "async": pb.CONSISTENCY_ASYNC, "bounded": pb.CONSISTENCY_BOUNDED}
        ),
        "reduction": Choice({"mean": pb.REDUCTION_MEAN, "sum": pb.REDUCTION_SUM}),
    },
)
_KIND = Choice(
    {
        "join": pb.MEET_KIND_JOIN,
        "beat": pb.MEET_KIND_BEAT,
        "arrive": pb.MEET_KIND_ARRIVE,
        "leave": pb.MEET_KIND_LEAVE,
    }
)
_PHASE = Choice({"prepare": pb.MEET_PHASE_PREPARE, "commit": pb.MEET_PHASE_COMMIT}, absent="commit")
_OFFERED = Several(Mirror(pb.OfferedPart, types.OfferedPart))
_WORD = Mirror(
    pb.Word,
    types.Word,
    {
        "kind": Choice(
            {
                "prepared": pb.WORD_KIND_PREPARED,
                "done": pb.WORD_KIND_DONE,
                "earlier": pb.WORD_KIND_EARLIER,
                "again": pb.WORD_KIND_AGAIN,
                "undone": pb.WORD_KIND_UNDONE,
                "failed": pb.WORD_KIND_FAILED,
            }
        ),
        "parts": Several(Mirror(pb.WordPart, types.WordPart)),
    },
)
_ANSWER = Choice(
    {
        "heard": pb.MEET_ANSWER_HEARD,
        "wait": pb.MEET_ANSWER_WAIT,
        "occupied": pb.MEET_ANSWER_OCCUPIED,
        "changed": pb.MEET_ANSWER_CHANGED,
        "lost": pb.MEET_ANSWER_LOST,
        "arrived": pb.MEET_ANSWER_ARRIVED,
        "word": pb.MEET_ANSWER_WORD,
    }
)

MEET_REQUEST = FrameCodec(
    Mirror(
        pb.MeetRequest,
        types.MeetRequest,
        {"terms": _TERMS, "kind": _KIND, "phase": _PHASE, "parts": _OFFERED, "word": _WORD},
        optional=("word",),
    )
)
MEET_REPLY = FrameCodec(
    Mirror(
        pb.MeetReply,
        types.MeetReply,
        {
            "answer": _ANSWER,
            "arrivals": Several(Mirror(pb.Arrival, types.Arrival, {"phase": _PHASE, "parts": _OFFERED})),
            "word": _WORD,
            "others": Several(Mirror(pb.SeenRank, types.Seen)),
            "undecided": Mirror(pb.UndecidedStep, types.Undecided, {"parts": _OFFERED}),
        },
        optional=("word", "undecided"),
    )
)
