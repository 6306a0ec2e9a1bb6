"""One process as a rank of a group: asks the group's home, says that it lives, arrives at meetings and waits there.

What a meeting is about is ``stepping``'s. Everything runs on the IO loop.
"""

import asyncio
import atexit
import secrets
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import replace

from mempool.client.groups.joining import Joining
from mempool.client.routing.router import Router
from mempool.errors import AlreadyExists, DeadlineExceeded, MempoolError, RankLost, ShardUnavailable
from mempool.types import PoolApi, ShardInfo
from mempool.types.groups.meeting import MeetKind, MeetReply, MeetRequest, Seen, Undecided, Word
from mempool.wire.channels.loop import run

HOME = 0
"""The shard that is the home of groups: the lowest-numbered one, which no rescale takes away."""
_LEAVING_S = 2.0
_SHORTEST_S = 0.05
_LATE_S = 1.0
_PAUSE_S = 0.2


class Member:
    """A rank.

    Args:
        joining: As what.
        router: Reaches shards.
        api: Says where the home is.
        changed: Awaited when the group has begun a generation, which it is told.

    Attributes:
        generation: Of the group, as this process knows it; 0 before it has joined.
        meeting: At which it arrives next.
        steps: That it has seen committed.
        word: Of the leader: its last one.
        undecided: What ranks of an earlier generation had arrived to commit when it joined.
        lease_s: Silence after which a rank is taken for dead.
        waits: It has arrived, and not heard what came of that.
    """

    def __init__(
        self, joining: Joining, *, router: Router, api: PoolApi, changed: Callable[[int], Awaitable[None]]
    ) -> None:
        self.joining = joining
        self.generation = 0
        self.meeting = 1
        self.steps = joining.step or 0
        self.word: Word | None = None
        self.undecided: Undecided | None = None
        self.lease_s = 10.0
        self.waits = False
        self._router = router
        self._api = api
        self._changed = changed
        self._home: ShardInfo | None = None
        self._number = 0
        self._home_now = self._home_before = 0  # incarnations: that answered last, and before the last arrival
        self._beating: asyncio.Task[None] | None = None
        self._saying: set[asyncio.Task[None]] = set()
        self._base = MeetRequest(
            group=joining.group,
            rank=joining.rank,
            nonce=secrets.randbits(52) + 1,
            host=joining.host,
            terms=joining.terms,
            kind="join",
            restart=joining.restart,
            launcher=joining.launcher,
        )

    @property
    def leads(self) -> bool:
        """Whether it carries steps out for all."""
        return self.joining.rank == 0

    async def join(self) -> int:
        """Become the rank. Answers how many steps the group has committed, as far as is known; 0 where it is not.

        Raises:
            InvalidRequest: Others are in it under other terms.
            AlreadyExists: Another process is this rank, and lives.
            DeadlineExceeded: Ranks that live did not take notice in time.
            MempoolError: The home does not answer.
        """
        clock = asyncio.get_running_loop()
        began_s = clock.time()
        ticket = 0
        while True:
            reply = await self._ask("join", replace(self._base, number=ticket))
            if reply.ticket:
                first, ticket = not ticket, reply.ticket
                if first:
                    continue
            waited_s = clock.time() - began_s
            if reply.answer == "heard":
                self.generation, self.lease_s, self.undecided = reply.generation, reply.lease_s, reply.undecided
                self.steps = reply.step
                self._base = replace(self._base, ticket=ticket)
                self._beating = clock.create_task(self._beat())
                atexit.register(self._at_exit)
                return reply.step
            if reply.answer == "occupied" and waited_s > reply.lease_s + _LATE_S:
                there = reply.others[0]
                raise AlreadyExists(
                    f"rank {there.rank} of group {self.joining.group!r} is {there.host}, which lives: "
                    f"{self.joining.host} cannot be rank {self.joining.rank} now. If that is another job, give this "
                    "one another group name; if it is an old one, end it"
                )
            if waited_s > self.joining.patience_s:
                raise DeadlineExceeded(
                    f"group {self.joining.group!r} could not be joined within {waited_s:.1f} s: {_waited(reply.others)}"
                )
            await asyncio.sleep(_PAUSE_S)

    async def arrive(self, offer: MeetRequest) -> MeetReply:
        """Be at the next meeting, and wait for what comes of it: "arrived", "word" or "changed".

        Args:
            offer: What it comes with, made by ``offer``.

        Raises:
            RankLost: Ranks are gone.
            DeadlineExceeded: Ranks that live did not come.
        """
        clock = asyncio.get_running_loop()
        began_s = clock.time()
        self._number += 1
        self._home_before = self._home_now
        self.waits = True
        offer = replace(offer, number=self._number)
        while True:
            reply = await self._ask("arrive", offer)
            if reply.answer == "lost":
                raise self._lost(reply.others)
            if reply.answer != "wait":
                self.waits = False
                return reply
            if clock.time() - began_s > self.joining.patience_s:
                raise DeadlineExceeded(
                    f"group {self.joining.group!r}: rank {self.joining.rank} is at step {self.steps + 1} and has waited"
                    f" for {clock.time() - began_s:.1f} s (timeout_s of join): {_waited(reply.others)}. What is pending"
                    f" is kept. {self._advice}"
                )

    def offer(self) -> MeetRequest:
        """An empty arrival, to be filled."""
        return replace(self._base, kind="arrive")

    def say(self, word: Word) -> None:
        """The leader's word. Nobody waits for it: it goes along with all that is said later, too."""
        self.word = word
        self.meeting = word.meeting + 1
        task = asyncio.get_running_loop().create_task(self._tell())
        self._saying.add(task)
        task.add_done_callback(self._saying.discard)

    async def hear(self) -> None:
        """Ask whether the group has begun a generation, and go on in that."""
        reply = await self._ask("beat")
        self.lease_s = reply.lease_s
        if reply.answer == "changed":
            await self._changed(reply.generation)
            await self._ask("beat")

    async def newest_generation(self) -> int:
        """The group's, asked for now."""
        reply = await self._ask("beat")
        return reply.generation if reply.answer == "changed" else self.generation

    async def take_back(self) -> MeetReply | None:
        """Ask that what it has arrived with, and heard no end of, is not committed. "heard": it is not; "wait": all are
        there, or may have been; None: the home does not answer."""
        with suppress(MempoolError):
            reply = await self._ask("beat", replace(self._base, number=self._number))
            if reply.answer == "heard" and reply.home != self._home_before:
                reply = replace(reply, answer="wait")  # an earlier home may have had all there
            self.waits = reply.answer == "wait"
            return reply
        return None

    def begin(self, generation: int) -> None:
        """Go on in a generation."""
        self.generation, self.meeting, self.word, self.waits = generation, 1, None, False

    async def leave(self) -> None:
        """Say that it comes no more."""
        atexit.unregister(self._at_exit)
        tasks = [task for task in (self._beating, *self._saying) if task is not None]
        await self._said()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self.generation:
            with suppress(MempoolError, TimeoutError):
                async with asyncio.timeout(_LEAVING_S):
                    await self._ask("leave")

    def _at_exit(self) -> None:
        """A program that ends with its last step, and closes no pool: others may wait for what came of that."""
        with suppress(MempoolError, CancelledError):
            run(self._said(), timeout_s=2 * _LEAVING_S)

    async def _said(self) -> None:
        if self._saying:  # the others wait for it
            await asyncio.wait(tuple(self._saying), timeout=_LEAVING_S)

    async def _tell(self) -> None:
        with suppress(MempoolError):
            await self._ask("beat")

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(max(_SHORTEST_S, self.lease_s / 3))
            with suppress(MempoolError):
                await self.hear()

    async def _ask(self, kind: MeetKind, offer: MeetRequest | None = None) -> MeetReply:
        async def once() -> MeetReply:
            request = replace(
                self._base if offer is None else offer,
                kind=kind,
                generation=self.generation if kind != "join" else 0,
                meeting=self.meeting if kind == "arrive" else self.meeting - 1,
                step=self.steps,
                word=self.word,
            )
            reply = await self._router.dial(await self._found()).meet(request)
            self._home_now = max(self._home_now, reply.home)
            return reply

        return await self._router.tries.run(f"group {self.joining.group}", once, refresh=self._look_again)

    async def _found(self) -> ShardInfo:
        if self._home is None:
            status = await self._api.status()
            self._home = next((each.info for each in status.shards if each.info.shard == HOME), None)
        if self._home is None:
            raise ShardUnavailable(f"shard {HOME}, where ranks meet, is not known to the pool just now", shard=HOME)
        return self._home

    async def _look_again(self) -> bool:
        before, self._home = self._home, None
        with suppress(MempoolError, TimeoutError):
            async with asyncio.timeout(_LEAVING_S):
                await self._found()
        return self._home != before

    def _lost(self, ranks: Sequence[Seen]) -> RankLost:
        lost = [each for each in ranks if each.state in ("lost", "left")]
        return RankLost(
            f"group {self.joining.group!r}: {_waited(lost)}. The step is applied whole or not at all, and what is "
            "pending here is kept: the same call goes on when the rank is back (torchrun --max-restarts starts it)",
            ranks=tuple(each.rank for each in lost),
        )

    @property
    def _advice(self) -> str:
        if not self.joining.found:
            return "All ranks commit the same number of steps"
        return (
            "All ranks of a job that torchrun has started commit each step together; where they are not to, set "
            "MEMPOOL_JOIN=0, or call pool.join(..., world_size=1)"
        )


def _waited(ranks: Sequence[Seen]) -> str:
    return "; ".join(map(_words, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "") or "no rank"


def _words(seen: Seen) -> str:
    if not seen.host:
        since = f" in the {seen.silent_s:.1f} s since shard {HOME}, where ranks meet, began anew"
        return f"rank {seen.rank} has not come{since if seen.state == 'lost' else ''}"
    who = f"rank {seen.rank} ({seen.host})"
    if seen.state == "left":
        return f"{who} has left: its pool was closed"
    if seen.state == "lost":
        return f"{who} was not heard of for {seen.silent_s:.1f} s, longer than its lease"
    return f"{who} is at step {seen.step + 1}"


def error_of(word: Word) -> MempoolError:
    """What the leader met, as an error of that kind."""
    kinds: list[type[MempoolError]] = [MempoolError]
    for kind in kinds:
        kinds.extend(kind.__subclasses__())
    found = next((kind for kind in kinds if kind.code == word.code), MempoolError)
    return found(f"rank 0 of the group, which commits for all, met this: {word.message}")
