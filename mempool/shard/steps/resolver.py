"""Asks other shards what this one is in doubt of, while there is anything to ask. What that is: ``shard.resolving``."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

from mempool.agreement.doubt import AGAIN_S
from mempool.errors import MempoolError, ShardUnavailable
from mempool.shard.resolving import AT_ONCE, Decisions, DoubtfulRound, Question
from mempool.types import ShardHost, ShardInfo, StepId, TableView
from mempool.types.caller import Caller, calling

_LOG = logging.getLogger("mempool.shard")

_Key = tuple[int, int, StepId | str | None]
"""Whom something is asked, of which table, and of what."""

_ANSWER_S = 5.0
_MOMENT_S = 0.002
"""Many call at a time: so long they are waited for."""


class Ask(Protocol):
    """Runs a job on the engine's thread, before what clients do."""

    async def __call__(self, stage: str, do: Callable[[Any], Any], request: object) -> Any: ...


class Resolver:
    """Asks other shards, while there is anything to ask. All on the engine's loop.

    Args:
        decisions: What to ask, and who is told.
        run: To the engine's thread.
        peers: Reaches a shard; None: there is none to be asked.
        adopt: Adopts a view, on the engine's thread.
    """

    def __init__(
        self,
        decisions: Decisions,
        *,
        run: Ask,
        peers: Callable[[ShardInfo], ShardHost] | None,
        adopt: Callable[[TableView], None],
    ) -> None:
        self._decisions = decisions
        self._run = run
        self._peers = peers
        self._adopt = adopt
        self._task: asyncio.Task[None] | None = None
        self._asking: dict[_Key, asyncio.Task[None]] = {}
        self._rung = asyncio.Event()
        self._closed = False

    def poke(self) -> None:
        """There may be something to ask."""
        self._rung.set()
        if self._task is None and not self._closed:
            with calling(Caller()):
                self._task = asyncio.get_running_loop().create_task(self._work())

    async def close(self) -> None:
        """Ask nothing more. Repeatable."""
        self._closed = True
        tasks = [*self._asking.values(), *([self._task] if self._task is not None else [])]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _work(self) -> None:
        try:
            next_s: float | None = 0.0
            while next_s is not None or self._rung.is_set():
                if next_s:
                    await self._pause(min(next_s, 1.0))
                self._rung.clear()
                try:
                    questions, next_s = await self._run("resolve", lambda _: self._decisions.questions(), None)
                    rounds = await self._run("resolve", lambda _: self._decisions.doubtful_rounds(), None)
                except ShardUnavailable:  # the engine is closed
                    return
                except MempoolError as error:  # too much waits there, say
                    _LOG.warning("what became of steps cannot be asked now: %s", error)
                    next_s = AGAIN_S
                    continue
                for question in questions:
                    key = question.target.shard, question.request.table_id, question.request.step_id
                    self._begin(key, partial(self._ask, question))
                for round_here in rounds:
                    if round_here.gate is not None:
                        key = round_here.gate.shard, round_here.table_id, round_here.token
                        self._begin(key, partial(self._ask_round, round_here, round_here.gate))
        finally:
            self._task = None

    async def _pause(self, longest_s: float) -> None:
        """Until somebody calls, but for a moment: many call at a time."""
        await asyncio.sleep(min(longest_s, _MOMENT_S))
        with suppress(TimeoutError):
            async with asyncio.timeout(longest_s):
                await self._rung.wait()

    def _begin(self, key: _Key, ask: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Ask, unless the same is being asked, or too much is: what is not asked now is asked again."""
        if key in self._asking or len(self._asking) >= AT_ONCE or self._peers is None:
            return
        task = asyncio.get_running_loop().create_task(ask())
        self._asking[key] = task
        task.add_done_callback(lambda _: self._asking.pop(key, None))

    async def _ask_round(self, asked: DoubtfulRound, gate: ShardInfo) -> None:
        assert self._peers is not None, "nothing is begun without"
        try:
            async with asyncio.timeout(_ANSWER_S):
                host = self._peers(gate)
                # The view last: read first, a round that is decided in between would look like one that is over.
                status = await host.status()
                views = await host.views()
        except (MempoolError, TimeoutError) as error:
            _LOG.info("shard %d does not say what became of a round: %s", gate.shard, error)
            return
        view = next((view for view in views if view.schema.table_id == asked.table_id), None)
        seen = next((table for table in status.tables if table.table_id == asked.table_id), None)
        if seen is None:
            view = None  # without the table it knows nothing of its rounds
        # One of an older version does not say which: it is taken for this one.
        token = None if seen is None or not seen.frozen else seen.round or asked.token

        def tell(_: object) -> None:
            adopted = self._decisions.told_of_round(asked, view, token=token)
            if adopted is not None:
                self._adopt(adopted)

        try:
            await self._run("resolve", tell, None)
        except MempoolError as error:
            _LOG.warning("table %d cannot follow its gate now: %s", asked.table_id, error)

    async def _ask(self, question: Question) -> None:
        assert self._peers is not None, "nothing is begun without"
        try:
            async with asyncio.timeout(_ANSWER_S):
                reply = await self._peers(question.target).resolve(question.request)
        except (MempoolError, TimeoutError) as error:
            _LOG.info("shard %d does not say what became of steps: %s", question.target.shard, error)
            return
        try:
            await self._run("resolve", lambda told: self._decisions.told(question, told), reply)
        except MempoolError as error:
            _LOG.warning("what shard %d decided cannot be applied now: %s", question.target.shard, error)
        self.poke()  # it may have left other questions
