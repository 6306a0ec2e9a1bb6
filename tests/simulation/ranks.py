"""Runs whose trainers are the ranks of one sync group: they die, come back, stand still and repeat as trainers do.

``python -m tests.simulation.ranks --seeds 200`` runs many. Beside what every run must show, each step has updates of
all ranks, and no update is lost or in two steps, whichever generations it was sent in.
"""

import argparse
import asyncio
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from typing import Any
from unittest import mock

from mempool.agreement.book import OF_OTHER_RANKS
from mempool.agreement.groups import home
from mempool.agreement.groups.home import Groups
from mempool.client.groups import group as client_group
from mempool.client.groups.group import enter
from mempool.client.groups.joining import Joining
from mempool.client.groups.stepping import SyncGroup
from mempool.client.training.commitment import Commitment
from mempool.client.training.coordinator import Coordinator
from mempool.client.training.session import Session
from mempool.errors import AlreadyExists, MempoolError, RankLost
from mempool.shard import engine
from mempool.shard.meeting import Meetings
from mempool.types import StepId
from mempool.types.bags import Bags
from mempool.types.groups.meeting import Terms
from mempool.wire import methods
from mempool.wire.methods import Method
from tests.simulation import traps
from tests.simulation.faults import Faults
from tests.simulation.lives import _Life
from tests.simulation.oracle import Content
from tests.simulation.processes import Trainer
from tests.simulation.run import Outcome, Run, prepare_worker
from tests.simulation.tables import draw_bags, draw_grads
from tests.simulation.traps import NO_SCENE, Scene, Trap
from tests.simulation.workload import Workload

GROUP = "group"
_MEET = (methods.MEET,) * 6


class RankLife(_Life):
    """One process that is a rank: joins, and steps with the others until all have, without faults, at the end."""

    def __init__(self, workload: "GroupWorkload", trainer: Trainer, name: str) -> None:
        super().__init__(workload, trainer, name)
        self.group = workload
        self.rank = int(trainer.name.rsplit("-", 1)[1])
        self.coordinator = Coordinator(trainer.router)
        self.sessions: list[Session] = []
        self.mine: dict[tuple[int, int], Content] = {}
        self.prepared = False
        self.kept = False
        self.ended = False

    async def live(self) -> None:
        for _, view in sorted(self.workload.views.items()):
            self.trainer.api._learned(view)
            self.trainer.router.adopt(view)
            session = Session(
                self.trainer.router,
                table_id=view.schema.table_id,
                group=self.name,
                coordinator=self.coordinator,
            )
            self.sessions.append(session)
        while not await self.join():
            await asyncio.sleep(0.5)
        while not (self.ended and self.group.all_ended()):
            await self.rest()
            for session in self.sessions:
                await self.push(session)
            if not await self.commit():
                break
            if self.workload.ending:
                self.ended = True
                self.group.ended.add(self.rank)
        await self.coordinator.close(timeout_s=5.0)

    async def join(self) -> bool:
        self.doing = self.trainer.doing = f"joining since {self.now_s():.1f} s"
        joining = Joining(
            group=GROUP,
            rank=self.rank,
            terms=Terms(world_size=self.group.world_size),
            restart=self.group.restarts() if self.group.counts_restarts else 0,
            patience_s=300.0,
        )
        entering = enter(joining, coordinator=self.coordinator, router=self.trainer.router, api=self.trainer.api)
        try:
            await entering
        except (*self.workload.faults, AlreadyExists):
            self.workload.marks["a join that failed"] += 1
            return False
        group = self.coordinator.group
        assert isinstance(group, SyncGroup)
        self.group.gone_on(group.member.generation)
        renew = group._renew

        async def renewed(generation: int) -> None:
            await renew(generation)
            self.workload.marks["a generation that a rank went on in"] += 1
            self.register()

        group._renew = renewed  # type: ignore[method-assign]
        return True

    def register(self) -> None:
        """Its updates, under the generation that they are sent in now."""
        for session in self.sessions:
            for (table_id, sequence), content in self.mine.items():
                if table_id == session.table_id:
                    self.workload.history.contents[table_id, GROUP, session.book.generation, sequence] = content

    async def push(self, session: Session) -> None:
        """One update at least."""
        for _ in range(self.random.choice((1, 1, 2))):
            while True:
                ids, weights, offsets = draw_bags(self.random)
                bags = Bags(ids=ids, weights=weights, offsets=offsets)
                content = Content(ids, weights, offsets, draw_grads(self.random, len(offsets) - 1))
                if await self.pushed(session, bags, content):
                    break
                await asyncio.sleep(0.2)

    async def pushed(self, session: Session, bags: Bags, content: Content) -> bool:
        self.doing = self.trainer.doing = f"pushing since {self.now_s():.1f} s"
        want = self.random.random() < 0.5
        try:
            _, record = await session.gather(bags, remember=self.random.random() < 0.7, timeout_s=30.0)
            key = session.table_id, session.book._next_sequence
            self.mine[key] = content
            self.register()
            try:
                await session.update(record, content.grads, hold=True, want_weight_grad=want, timeout_s=30.0)
            except BaseException:
                del self.mine[key]
                raise
            if self.kept:
                self.group.beside.append(content)
        except self.workload.faults:
            return False
        return True

    async def commit(self) -> bool:
        """Until it is done; False: the others have ended."""
        commitments = [Commitment(session, lr=0.05) for session in self.sessions]
        self.prepared = False
        while True:
            self.doing = self.trainer.doing = f"a commit since {self.now_s():.1f} s"
            try:
                if self.group.prepares and not self.prepared:  # as who clips
                    await self.coordinator.prepare(self.sessions, timeout_s=30.0)
                    self.prepared = True
                    self.workload.marks["a prepare of a group"] += 1
                await self.coordinator.commit(commitments, timeout_s=30.0)
            except RankLost:
                self.workload.marks["a commit that was told of a lost rank"] += 1
                self.prepared = False
                if self.ended and self.group.all_ended():
                    return False
                if self.group.drops and not self.ended and self.random.random() < 0.4:
                    await self.drop()
            except self.workload.faults:
                self.workload.marks["a commit of a group that failed"] += 1
            except MempoolError as error:
                self.workload.history.say(f"{self.name}: a commit: {error!r}")
                return False
            else:
                break
            await asyncio.sleep(0.3)
        for session in self.sessions:
            self.acknowledge(session, self.gone(session))
        self.kept = False
        self.workload.marks["a commit of a group"] += 1
        return True

    async def drop(self) -> None:
        """As zero_grad() after an error, and the step again: what may be committed stays, and comes with it."""
        before = {
            id(each): set() if each.book.closing is None else set(each.book.closing.updates) for each in self.sessions
        }
        dropped = await self.coordinator.discard(self.sessions, timeout_s=30.0)
        for session, count in zip(self.sessions, dropped, strict=True):
            gone = self.gone(session)
            if count < len(gone):  # it has heard that what it had come with is committed
                self.acknowledge(session, [key for key in gone if key[1] in before[id(session)]])
                gone = [key for key in gone if key in self.mine]
            if len(gone) != count:
                self.workload.history.say(
                    f"{self.name}: {count} updates are said to be dropped, and {len(gone)} are gone"
                )
            self.group.dropped += [(self.name, key[0], self.mine.pop(key)) for key in gone]
            self.workload.marks["updates of a group that were dropped"] += count
            self.kept |= session.book.closing is not None
        for session in self.sessions:
            await self.push(session)

    def gone(self, session: Session) -> list[tuple[int, int]]:
        """Its updates that are pending no more."""
        book = session.book
        left = set(book.open.updates) | (set() if book.closing is None else set(book.closing.updates))
        return [key for key in self.mine if key[0] == session.table_id and key[1] not in left]

    def acknowledge(self, session: Session, keys: list[tuple[int, int]]) -> None:
        """They are committed, as this rank knows."""
        self.group.acknowledged += [(self.name, session.table_id, self.mine.pop(key)) for key in keys]


class GroupWorkload(Workload):
    """Its trainers are one group.

    Attributes:
        ended: Ranks that have committed since the end began.
        acknowledged: (rank, table id, update) of each that a rank was told of. dropped: of each that it has dropped.
        beside: Updates of ranks that had kept, in a drop, what may be committed: where it is, these are a step more.
        prepares, drops: Whether steps are prepared before they are committed, and dropped after an error.
        ended_with: By generation that a rank has entered: the steps of the group that were decided by then.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.world_size = self._random.choice((2, 2, 3))
        self.counts_restarts = self._random.random() < 0.5
        self.changes_tables = False
        self.ended: set[int] = set()
        self.acknowledged: list[tuple[str, int, Content]] = []
        self.dropped: list[tuple[str, int, Content]] = []
        self.beside: list[Content] = []
        self.prepares = self._random.random() < 0.5
        self.drops = self._random.random() < 0.5
        self.ended_with: dict[int, set[tuple[int, StepId]]] = {}

    async def begin(self) -> None:
        await self._on(self._operator, self._make_tables(self._random.choice((1, 1, 2))))
        for rank in range(self.world_size):
            self._start(f"rank-{rank}", RankLife)  # type: ignore[arg-type]
        self._operating = self._operator.loop.create_task(self._operate())

    async def end(self) -> None:
        """Also of ranks that are dead just now: each comes back, and commits once more."""
        self.ending = True
        while not (self.all_ended() or any(life.done() for life in self._lives.values())):
            await asyncio.sleep(0.5)
        await super().end()

    def _start(self, name: str, kind: Any) -> None:  # noqa: ARG002
        if name in self.trainers:
            return  # also at the end: the others wait for it
        self._starts += 1
        self._kinds[name] = RankLife  # type: ignore[assignment]
        trainer = self.trainers[name] = Trainer(self.park, name)
        life = RankLife(self, trainer, f"{name}/{self._starts}")
        self._lives[name] = trainer.loop.create_task(life.live())

    def gone_on(self, generation: int) -> None:
        """A rank has entered: what is of an earlier one is decided by now, or never."""
        decided = {(table_id, step.step_id) for (table_id, _), step in self.history.decided.items()}
        self.ended_with.setdefault(generation, decided)

    def restarts(self) -> int:
        """As a launcher counts them."""
        return self._starts

    def all_ended(self) -> bool:
        return len(self.ended) == self.world_size


class GroupRun(Run):
    """A run of one group, on shards with disks."""

    def __post_init__(self) -> None:
        self.storage, self.saves = True, False
        drawn = Faults.draw(traps.Random(f"group {self.seed}"))
        restarts = traps.Random(f"restarts {self.seed}").random() < 0.5
        asked = self.faults or replace(drawn, shards_die=False, scene=NO_SCENE, restarts=restarts)
        self.faults = asked
        super().__post_init__()
        self.workload = GroupWorkload(self.park, self.history, self.marks, scene=NO_SCENE)

    def play(self) -> Outcome:
        wall_s = partial(Meetings, wall_s=lambda: self.scheduler.now_s + 1.0)
        steps = (*traps._STEPS, *_MEET)
        with mock.patch.object(engine, "Meetings", wall_s), mock.patch.object(traps, "_STEPS", steps):
            return super().play()

    def _play(self) -> None:
        super()._play()
        check_group(self)


def check_group(run: GroupRun) -> None:
    """What holds of a group beside what holds of every trainer."""
    history, workload = run.history, run.workload
    assert isinstance(workload, GroupWorkload)
    found: Counter[int] = Counter()
    for (table_id, version), step in history.decided.items():
        if step.step_id.group != GROUP:
            continue
        ranks = {sequence // OF_OTHER_RANKS for sequence in step.sequences}
        contents = [history.contents.get((table_id, GROUP, step.step_id.generation, each)) for each in step.sequences]
        more = all(any(content is each for each in workload.beside) for content in contents)
        if ranks != set(range(workload.world_size)) and not more:
            history.say(f"version {version} of table {table_id} has updates of ranks {sorted(ranks)} alone")
        for sequence in step.sequences:
            content = history.contents.get((table_id, GROUP, step.step_id.generation, sequence))
            if content is None:
                history.say(f"version {version} of table {table_id} has update {sequence}, which nobody has sent")
            else:
                found[id(content)] += 1
    for generation, decided in workload.ended_with.items():
        for (table_id, version), step in history.decided.items():
            if step.step_id.generation < generation and (table_id, step.step_id) not in decided:
                history.say(
                    f"version {version} of table {table_id} is of generation {step.step_id.generation}, and was decided"
                    f" after a rank had gone on in {generation}"
                )
    if any(count > 1 for count in found.values()):
        history.say(f"{sum(count > 1 for count in found.values())} updates are in two steps")
    for name, table_id, content in workload.acknowledged:
        if not found[id(content)]:
            history.say(f"{name} was told that an update of table {table_id} is committed, and it is in no step")
            break
    for name, table_id, content in workload.dropped:
        if found[id(content)]:
            history.say(f"{name} has dropped an update of table {table_id}, and it is in a step")
            break


def _let_in(groups: Groups, group: Any, request: Any, known: Any, now_s: float, _: int) -> None:  # noqa: ARG001
    """Whoever comes is in the generation that there is."""
    member = home._Member(request, now_s)
    group.members[request.rank] = member
    group.changes += 1


async def _never(*_: Any) -> bool:
    return False


def _taken_back(groups: Groups, group: Any, member: Any, request: Any, _: float) -> Any:
    """Whoever wants its arrival back gets it, whatever has come of it."""
    member.number = max(member.number, request.number + 1)
    groups._take(member, None)
    return groups._reply(group, "heard")


def _meeting(method: Method[Any, Any], effect: traps.Effect, for_s: float, **which: int) -> Faults:
    """Such messages, and who has sent them, meet something."""
    return Faults(scene=Scene(traps=(Trap(path=method.path, effect=effect, for_s=for_s, **which),)))  # type: ignore[arg-type]


def _dying(method: Method[Any, Any], *, skip: int, times: int) -> Faults:
    """Ranks die as such a message of theirs has been served."""
    return _meeting(method, "its sender dies", 1.0, skip=skip, times=times)


ABLATIONS: dict[str, tuple[Any, str, Any]] = {
    "generation of a group": (Groups, "_admit", _let_in),
    "what became of a step": (SyncGroup, "_is_decided", _never),
    "lease of a rank": (Groups, "_lives", lambda _, member, __: member is not None),
    "sending again": (SyncGroup, "_send_again", _never),
    "end of earlier generations": (client_group, "end_before", _never),
    "arrivals that are not given back": (Groups, "_take_back", _taken_back),
    "ticket of a join": (Groups, "_is_due", lambda *_: True),
}
"""Safeguards of groups, and what takes their place where one is switched off."""
SCENES: dict[str, Faults] = {
    "generation of a group": _dying(methods.UPDATE, skip=1, times=4),
    "what became of a step": _dying(methods.COMMIT, skip=1, times=2),
    "end of earlier generations": Faults(
        scene=Scene(
            traps=(
                Trap(path=methods.COMMIT.path, effect="comes late, as all trainers die", for_s=4.0, skip=1, times=3),
                Trap(path=methods.UPDATE.path, effect="comes late", for_s=6.0, skip=8, times=1000),
            )
        )
    ),
    "arrivals that are not given back": _meeting(methods.COMMIT, "its sender stands still", 14.0, skip=1, times=4),
    "ticket of a join": Faults(
        scene=Scene(
            traps=(
                Trap(path=methods.MEET.path, effect="comes again", for_s=9.0, times=1000),
                Trap(path=methods.UPDATE.path, effect="its sender dies", for_s=1.0, skip=1, times=2),
                Trap(path=methods.UPDATE.path, effect="its sender stands still", for_s=14.0, skip=5, times=4),
            )
        )
    ),
}
"""In which they are missed soon; others are in any run."""


def play(seed: int) -> Outcome:
    """One run of a seed."""
    return GroupRun(seed).play()


def play_with(asked: tuple[str, int]) -> Outcome:
    """One run of a seed, in the scene of a safeguard."""
    return GroupRun(asked[1], faults=SCENES.get(asked[0])).play()


def play_without(asked: tuple[str, int]) -> Outcome:
    """The same, with that off."""
    with mock.patch.object(*ABLATIONS[asked[0]]):
        return play_with(asked)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1, help="the first of them")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--without", choices=sorted(ABLATIONS), help="a safeguard that is off; ends with its first seed"
    )
    options = parser.parse_args()
    began_s, failed, done, marks = time.monotonic(), 0, 0, Counter[str]()
    seeds = range(options.seed, options.seed + options.seeds)
    with get_context("spawn").Pool(options.processes, prepare_worker, maxtasksperchild=1000) as pool:
        name = options.without
        outcomes = pool.imap(play_without, [(name, seed) for seed in seeds]) if name else pool.imap(play, seeds)
        for outcome in outcomes:
            marks.update(outcome.marks)
            done += 1
            if done % 100 == 0:
                print(f"... {done} seeds, {failed} with violations, {time.monotonic() - began_s:.0f} s", flush=True)
            if outcome.violations:
                failed += 1
                print(f"seed {outcome.seed}: {len(outcome.violations)} violations", flush=True)
                for text in outcome.violations[:5]:
                    print(f"  {text}")
                if name:
                    return 0
    for mark, count in sorted(marks.items()):
        print(f"{count:8,}  {mark}")
    spent_s = time.monotonic() - began_s
    print(f"{len(seeds)} seeds, {failed} with violations, {len(seeds) / spent_s:.2f} seeds/s")
    return 1 if failed else 0


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        sys.exit(main())
