"""The calls that lines carry, by number: what clients ask of shards. Both sides run the same version."""

from dataclasses import replace
from typing import Any

from mempool.wire import methods
from mempool.wire.lines import plain
from mempool.wire.methods import Method

GATHER = replace(methods.GATHER, request=plain.GatherRequests(), reply=plain.GatherReplies())
UPDATE = replace(methods.UPDATE, request=plain.UpdateRequests(), reply=plain.UpdateReplies())

METHODS: tuple[Method[Any, Any], ...] = (
    GATHER,
    UPDATE,
    methods.PREPARE,
    methods.COMMIT,
    methods.DISCARD,
    methods.HEARTBEAT,
    methods.SCORE,
    methods.READ_ROWS,
    methods.WRITE_ROWS,
    methods.STEP_COUNT,
)
NUMBERS = {method.path: number for number, method in enumerate(METHODS)}
