"""Codecs of the requests and replies in ``mempool.types.messages``, one per class, named after it in capitals.

Shapes and dtypes of tensors are checked here; what they must be in view of a table is checked by ``shard``.
"""

from mempool.types import messages as types
from mempool.types.reading.pins import PinReply, PinRequest
from mempool.types.usage import UsageReply, UsageRequest
from mempool.wire.codecs.codec import INT64, PER_HEAD, SLOT_IDS, SUMS_DTYPE, FrameCodec, TensorField
from mempool.wire.codecs.mirror import Choice, Converter, Mirror, Several
from mempool.wire.v1 import data_pb2 as pb

ENVELOPE = Mirror(pb.Envelope, types.Envelope)
STAMP = Mirror(pb.Stamp, types.Stamp)
STEP_ID = Mirror(pb.StepId, types.StepId)
WRITE_ID = Mirror(pb.WriteId, types.WriteId)

_FLOATS = ("float32", "bfloat16")
_WEIGHTS = TensorField(dtypes=_FLOATS, optional=True)
_BAGS = TensorField(dtypes=(*_FLOATS, "uint8"), dims=(2,))  # uint8: packed rows
_ROWS = TensorField(dtypes=(), dims=(2,))

_REQUEST: dict[str, Converter] = {"envelope": ENVELOPE}
_STEP: dict[str, Converter] = {"envelope": ENVELOPE, "step_id": STEP_ID}
_WRITE: dict[str, Converter] = {"envelope": ENVELOPE, "write_id": WRITE_ID}
_REPLY: dict[str, Converter] = {"stamp": STAMP}

GATHER_REQUEST = FrameCodec(
    Mirror(pb.GatherRequest, types.GatherRequest, {**_REQUEST, "reply_dtype": SUMS_DTYPE}),
    {
        "ids": SLOT_IDS,
        "weights": _WEIGHTS,
        "offsets": INT64,
        "inputs": TensorField(dtypes=_FLOATS, dims=(2,), optional=True),
    },
)
GATHER_REPLY = FrameCodec(Mirror(pb.GatherReply, types.GatherReply, _REPLY), {"values": _BAGS})
UPDATE_REQUEST = FrameCodec(
    Mirror(pb.UpdateRequest, types.UpdateRequest, _STEP),
    {
        "grads": _BAGS,
        "ids": TensorField(dtypes=SLOT_IDS.dtypes, optional=True, ids=True),
        "weights": _WEIGHTS,
        "offsets": TensorField(dtypes=INT64.dtypes, optional=True),
    },
)
UPDATE_REPLY = FrameCodec(
    Mirror(pb.UpdateReply, types.UpdateReply, _REPLY), {"weight_grad": TensorField(optional=True)}
)
PREPARE_REQUEST = FrameCodec(
    Mirror(
        pb.PrepareRequest, types.PrepareRequest, {"parts": Several(Mirror(pb.PreparePart, types.PreparePart, _STEP))}
    )
)
PREPARE_REPLY = FrameCodec(
    Mirror(pb.PrepareReply, types.PrepareReply, {"parts": Several(Mirror(pb.PreparedPart, types.PreparedPart, _REPLY))})
)
COMMIT_REQUEST = FrameCodec(
    Mirror(pb.CommitRequest, types.CommitRequest, {"parts": Several(Mirror(pb.CommitPart, types.CommitPart, _STEP))})
)
COMMIT_REPLY = FrameCodec(
    Mirror(pb.CommitReply, types.CommitReply, {"parts": Several(Mirror(pb.CommittedPart, types.CommittedPart, _REPLY))})
)
DISCARD_REQUEST = FrameCodec(
    Mirror(
        pb.DiscardRequest, types.DiscardRequest, {"parts": Several(Mirror(pb.DiscardPart, types.DiscardPart, _STEP))}
    )
)
DISCARD_REPLY = FrameCodec(Mirror(pb.DiscardReply, types.DiscardReply))
HEARTBEAT_REQUEST = FrameCodec(Mirror(pb.HeartbeatRequest, types.HeartbeatRequest))
HEARTBEAT_REPLY = FrameCodec(Mirror(pb.HeartbeatReply, types.HeartbeatReply))
SCORE_REQUEST = FrameCodec(
    Mirror(pb.ScoreRequest, types.ScoreRequest, _REQUEST),
    {
        "queries": PER_HEAD,
        "groups": TensorField(dtypes=INT64.dtypes, dims=(2,), optional=True),
        "group_scores": TensorField(dims=(2,), optional=True),
    },
)
SCORE_REPLY = FrameCodec(
    Mirror(pb.ScoreReply, types.ScoreReply, _REPLY),
    {"scores": PER_HEAD, "ids": TensorField(dtypes=INT64.dtypes, dims=(3,))},
)
READ_ROWS_REQUEST = FrameCodec(Mirror(pb.ReadRowsRequest, types.ReadRowsRequest, _REQUEST), {"ids": SLOT_IDS})
READ_ROWS_REPLY = FrameCodec(Mirror(pb.ReadRowsReply, types.ReadRowsReply, _REPLY), {"rows": _ROWS})
WRITE_ROWS_REQUEST = FrameCodec(
    Mirror(pb.WriteRowsRequest, types.WriteRowsRequest, _WRITE, optional=("write_id",)),
    {"ids": SLOT_IDS, "rows": _ROWS},
)
WRITE_ROWS_REPLY = FrameCodec(Mirror(pb.WriteRowsReply, types.WriteRowsReply, _REPLY))
_PIN_ACTIONS = Choice(
    {
        "arm": pb.PIN_ACTION_ARM,
        "settle": pb.PIN_ACTION_SETTLE,
        "attach": pb.PIN_ACTION_ATTACH,
        "renew": pb.PIN_ACTION_RENEW,
        "release": pb.PIN_ACTION_RELEASE,
    }
)
PIN_REQUEST = FrameCodec(Mirror(pb.PinRequest, PinRequest, {**_REQUEST, "do": _PIN_ACTIONS}))
PIN_REPLY = FrameCodec(Mirror(pb.PinReply, PinReply, _REPLY))
STEP_COUNT_REQUEST = FrameCodec(Mirror(pb.StepCountRequest, types.StepCountRequest, _WRITE, optional=("write_id",)))
STEP_COUNT_REPLY = FrameCodec(Mirror(pb.StepCountReply, types.StepCountReply, _REPLY))
USAGE_REQUEST = FrameCodec(Mirror(pb.UsageRequest, UsageRequest, _REQUEST))
USAGE_REPLY = FrameCodec(
    Mirror(pb.UsageReply, UsageReply, _REPLY), {"histogram": TensorField(dtypes=INT64.dtypes, dims=(2,), array=True)}
)
