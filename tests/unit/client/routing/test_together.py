"""One message a shard for the parts of all tables, each with the envelope of its own table's plan."""

from dataclasses import replace
from typing import Any

import numpy as np

from mempool.agreement.step_events import Part
from mempool.client.routing.attempt import Attempt
from mempool.client.routing.fanout import Fanout, Traffic, Versions
from mempool.client.routing.plan import make_plan
from mempool.client.routing.together import Together
from mempool.errors import ShardUnavailable, StepConflict
from mempool.types import (
    CommitReply,
    CommittedPart,
    DiscardReply,
    Placement,
    PreparedPart,
    PrepareReply,
    ShardInfo,
    Stamp,
    StepId,
    TableView,
)
from tests.support.faulty import make_schema

STEP = StepId(group="g", rank=0, step=4)


class Host:
    """Answers, and keeps what it was asked."""

    def __init__(self, info: ShardInfo) -> None:
        self.info = info
        self.requests: list[Any] = []
        self.error: Exception | None = None

    async def prepare(self, request: Any) -> PrepareReply:
        self._take(request)
        return PrepareReply(parts=tuple(PreparedPart(stamp=self._stamp(part)) for part in request.parts))

    async def commit(self, request: Any) -> CommitReply:
        self._take(request)
        return CommitReply(parts=tuple(CommittedPart(stamp=self._stamp(part), version=9) for part in request.parts))

    async def discard(self, request: Any) -> DiscardReply:
        self._take(request)
        return DiscardReply(discarded=0)

    def _take(self, request: Any) -> None:
        self.requests.append(request)
        if self.error is not None:
            raise self.error

    def _stamp(self, part: Any) -> Stamp:
        envelope = part.envelope
        return Stamp(shard=self.info.shard, incarnation=envelope.incarnation, epoch=envelope.epoch, table_version=7)


class Tables:
    """Table 1 on shards 0 and 1, table 2 on shards 1 and 2, where shard 1 is known in a newer incarnation."""

    def __init__(self) -> None:
        self.versions = Versions()
        self.hosts: dict[ShardInfo, Host] = {}
        self.together = Together(
            {1: self.attempt(1, (0, 0, 1), epoch=3), 2: self.attempt(2, (1, 2, 2), epoch=5, incarnation=8)}
        )

    def attempt(self, table_id: int, owners: tuple[int, ...], *, epoch: int, incarnation: int = 1) -> Attempt:
        placement = Placement(
            table_id=table_id,
            epoch=epoch,
            owners=np.tile(np.array(owners, dtype=np.int32), (8, 1)),
            key_owners=np.zeros(0, dtype=np.int32),
        )
        infos = tuple(
            ShardInfo(shard=shard, address=f"h{shard}:1", incarnation=incarnation if shard == 1 else 1)
            for shard in range(3)
        )
        view = TableView(schema=replace(make_schema(), table_id=table_id), placement=placement, shards=infos)
        fanout = Fanout(make_plan(view), dial=self.dial, traffic=Traffic(), versions=self.versions)  # type: ignore[arg-type]
        return Attempt(fanout, take_released=lambda _: ())

    def dial(self, info: ShardInfo) -> Host:
        return self.hosts.setdefault(info, Host(info))

    def asked_all(self, shard: int) -> list[Any]:
        """What that shard was asked, in order."""
        return [request for info, host in self.hosts.items() if info.shard == shard for request in host.requests]

    def asked(self, shard: int) -> Any:
        """The one request that came to a shard."""
        (host,) = (host for info, host in self.hosts.items() if info.shard == shard)
        (request,) = host.requests
        return request


def parts(*table_ids: int) -> tuple[Part, ...]:
    return tuple(
        Part(table_id=table_id, step_id=STEP, sequences=(1, 2), lr=0.1 * table_id, version=6) for table_id in table_ids
    )


def test_one_prepare_a_shard_with_each_tables_own_envelope(wait) -> None:  # type: ignore[no-untyped-def]
    tables, heard = Tables(), []
    tables.versions.saw(1, 4)
    to = {0: parts(1), 1: parts(1, 2), 2: parts(2)}
    wait(
        tables.together.prepare(
            to,
            want_norm=True,
            norm_order=0.0,
            decider=parts(1)[0],
            wait=False,
            attempt=5,
            heard=lambda shard, *_: heard.append(shard),
        )
    )
    assert sorted(heard) == [0, 1, 2]
    request = tables.asked(1)
    assert [(each.envelope.table_id, each.envelope.epoch, each.envelope.incarnation) for each in request.parts] == [
        (1, 3, 1),
        (2, 5, 8),
    ]
    assert (request.want_norm, request.decider_table, request.decider_step, request.wait) == (True, 1, 4, False)
    assert request.attempt == 5
    assert request.parts[0].envelope.table_version in (4, 7)
    assert tables.versions.get(1) == tables.versions.get(2) == 7
    assert [(owners.table_id, owners.shards) for owners in tables.together.owners] == [(1, (0, 1)), (2, (1, 2))]


def test_the_decider_is_told_of_tables_that_it_owns_nothing_of(wait) -> None:  # type: ignore[no-untyped-def]
    tables = Tables()
    reply = wait(tables.together.commit(0, parts(1, 2), one_phase=False))
    assert [part.version for part in reply.parts] == [9, 9]
    request = tables.asked(0)
    assert [(each.envelope.epoch, each.envelope.incarnation) for each in request.parts] == [(3, 1), (5, 1)]
    assert [(each.version, each.lr) for each in request.parts] == [(0, 0.1), (0, 0.2)]
    assert tables.versions.get(1) == tables.versions.get(2) == 9


def test_a_decided_commit_reaches_all_whom_it_can(wait) -> None:  # type: ignore[no-untyped-def]
    tables, heard = Tables(), {}

    async def main() -> Exception | None:
        for shard, error in ((0, ShardUnavailable("away")), (1, StepConflict("forgotten")), (2, None)):
            tables.dial(tables.together._infos[shard]).error = error
        try:
            await tables.together.apply(
                {0: parts(1), 1: parts(1, 2), 2: parts(2)},
                heard=lambda shard, _, reply: heard.update({shard: reply}),
            )
        except ShardUnavailable as error:
            return error
        return None

    assert "away" in str(wait(main()))
    assert isinstance(heard[1], StepConflict)
    assert heard[2][0].version == 9
    assert 0 not in heard
    assert tables.asked(2).decided
    assert tables.asked(2).parts[0].version == 6


def test_discards_name_every_step_of_every_table_once_a_shard(wait) -> None:  # type: ignore[no-untyped-def]
    tables = Tables()
    older = replace(STEP, step=3)
    wait(tables.together.discard({1: [older, STEP], 2: [STEP]}))
    request = tables.asked(1)
    assert [(part.envelope.table_id, part.step_id.step) for part in request.parts] == [(1, 3), (1, 4), (2, 4)]
    assert not request.keep_updates
    tables = Tables()
    ended: list[int] = []
    wait(tables.together.end_prepare({2: parts(2)}, attempt=3, heard=ended.append))
    assert (tables.asked(2).keep_updates, tables.asked(2).attempt) == (True, 3)
    assert ended == [2]


def test_very_many_discards_are_named_some_at_a_time(wait) -> None:  # type: ignore[no-untyped-def]
    """A shard takes no more than 1,000 in a message, and a client that was cut off for long has more."""
    tables = Tables()
    wait(tables.together.discard({1: [replace(STEP, step=step) for step in range(1, 1201)]}))
    named = [[part.step_id.step for part in request.parts] for request in tables.asked_all(1)]
    assert [len(steps) for steps in named] == [500, 500, 200]
    assert [step for steps in named for step in steps] == list(range(1, 1201))
