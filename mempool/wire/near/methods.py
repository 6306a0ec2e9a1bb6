"""The calls that lines carry, by number: what clients ask of shards. Both sides run the same version."""

from typing import Any

from mempool.wire import methods
from mempool.wire.methods import Method

METHODS: tuple[Method[Any, Any], ...] = (
    methods.GATHER,
    methods.UPDATE,
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
