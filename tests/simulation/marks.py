"""Rare branches that a run met, seen from outside: by what crosses the links. A suite that never met one fails."""

from collections import Counter
from typing import Any

from mempool.wire import methods
from tests.simulation.network import Call, Network


class Marks:
    """Counts what was met.

    Args:
        counter: Counted here, by words.
    """

    def __init__(self, counter: Counter[str]) -> None:
        self._counter = counter
        self._committed: set[Any] = set()

    def watch(self, network: Network) -> None:
        network.on_served.append(self._served)
        network.on_answered.append(self._answered)

    def _met(self, what: str) -> None:
        self._counter[what] += 1

    def _served(self, call: Call, reply: Any) -> None:
        path = call.method.path
        if path == methods.PREPARE.path:
            self._prepared(call.request, reply)
        elif path == methods.COMMIT.path:
            self._commit(call, reply)
        elif path == methods.RESOLVE.path:
            self._resolved(call.request, reply)
        elif path == methods.DISCARD.path and call.request.keep_updates:
            self._met("a Prepare that was ended and whose updates were kept")

    def _prepared(self, request: Any, reply: Any) -> None:
        for part in reply.parts:
            if part.missing:
                self._met("updates that were missing at a Prepare")
            if part.held_off:
                self._met("a Prepare that was held off, as pages move")
            if part.applied:
                self._met("a Prepare of a step that was applied")
        if request.wait:
            self._met("a Prepare that waited for a move")
        if len(request.parts) > 1:
            self._met("a Prepare of several tables")

    def _commit(self, call: Call, reply: Any) -> None:
        request = call.request
        if request.one_phase:
            self._met("a Commit in one phase")
        for asked, part in zip(request.parts, reply.parts, strict=True):
            if part.missing:
                self._met("updates that were missing at a Commit in one phase")
            key = call.server, asked.envelope.table_id, asked.step_id
            if part.version and key in self._committed:
                self._met("a Commit that came again")
            if part.version:
                self._committed.add(key)
            if not part.version and not part.missing:
                self._met("a Commit decided by another table's gate")

    def _resolved(self, request: Any, reply: Any) -> None:
        if request.step_id is not None:
            self._met(f"a step that a shard asked for and that was {reply.state or 'unknown'}")
            if request.give_up and reply.state == "dropped":
                self._met("a step that was given up, as its trainer's lease had ended")
        if request.after_version is not None and reply.steps:
            self._met("an order of steps that a shard asked for")

    def _answered(self, call: Call) -> None:
        if call.error is not None:
            self._met(f"{call.method.name} ended with {type(call.error).__name__}")
