"""A trainer's steps under faults: every committed update is applied exactly once, by what was decided for it."""

import asyncio

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mempool.errors import DataLoss, MempoolError, ShardUnavailable
from mempool.types.bags import Bags
from tests.support.faulty import COLUMNS, GRID, HEALING, LAYOUTS, ROWS, Fault, FaultyPool

from .trainer import LR, Trainer


@pytest.mark.parametrize("method", ["gather", "update", "prepare", "commit", "discard"])
@pytest.mark.parametrize("fault", HEALING)
@pytest.mark.parametrize("layout", ["one", "grid"])
def test_every_call_may_fail_twice_without_loss_or_doubling(  # type: ignore[no-untyped-def]
    wait, method: str, fault: Fault, layout: str
) -> None:
    trainer = Trainer.of(FaultyPool(LAYOUTS[layout]))

    async def main() -> None:
        await trainer.push()
        await trainer.session.commit(lr=LR)
        trainer.apply()
        await trainer.assert_applied()  # no shard that keeps its pages forgets what is decided and not applied
        for shard in trainer.pool.shards:
            shard.faults[method] = [fault, fault]
        await trainer.push()
        await trainer.session.discard()
        trainer.forget()
        await trainer.push()
        await trainer.push()
        await trainer.session.prepare()
        assert await trainer.session.commit(lr=LR) == 2
        trainer.apply()
        await trainer.assert_applied()

    wait(main())
    owners = trainer.pool.view.placement.shards
    assert all(trainer.pool.shards[shard].version == 2 for shard in owners)


class TestUnacknowledgedCommit:
    """The decider's answer never comes: nobody knows whether the step is decided, so it can only be finished."""

    async def fail(self, trainer: Trainer) -> None:
        await trainer.push()
        trainer.pool.shards[0].faults["commit"] = [Fault.SILENT]
        with pytest.raises(ShardUnavailable, match="shard 0 of pool 'run-7' did not answer within 0"):
            await trainer.session.commit(lr=LR, grad_scale=0.5, timeout_s=0.2)
        assert trainer.session.pending == 1

    def test_is_continued_with_what_was_decided(self, wait) -> None:  # type: ignore[no-untyped-def]
        trainer = Trainer.of(FaultyPool(COLUMNS))

        async def main() -> None:
            await self.fail(trainer)
            assert await trainer.session.commit(lr=99.0) == 1
            trainer.apply(grad_scale=0.5)
            await trainer.assert_applied()

        wait(main())
        assert {shard.version for shard in trainer.pool.shards} == {1}

    def test_is_finished_before_the_next_step(self, wait) -> None:  # type: ignore[no-untyped-def]
        trainer = Trainer.of(FaultyPool(COLUMNS))

        async def main() -> None:
            await self.fail(trainer)
            trainer.apply(grad_scale=0.5)
            await trainer.push()
            assert trainer.session.pending == 2
            assert await trainer.session.commit(lr=LR) == 2
            trainer.apply()
            await trainer.assert_applied()

        wait(main())
        assert {shard.version for shard in trainer.pool.shards} == {2}
        assert trainer.session.counters.steps_committed == 2

    def test_is_not_discarded(self, wait) -> None:  # type: ignore[no-untyped-def]
        trainer = Trainer.of(FaultyPool(COLUMNS))

        async def main() -> None:
            await self.fail(trainer)
            trainer.apply(grad_scale=0.5)
            await trainer.push()
            trainer.forget()
            assert await trainer.session.discard() == 1
            assert trainer.session.pending == 1
            assert await trainer.session.commit(lr=99.0) == 1
            await trainer.assert_applied()

        wait(main())

    def test_is_finished_by_prepare_too(self, wait) -> None:  # type: ignore[no-untyped-def]
        trainer = Trainer.of(FaultyPool(COLUMNS))

        async def main() -> None:
            await self.fail(trainer)
            trainer.apply(grad_scale=0.5)
            assert await trainer.session.prepare() is None
            await trainer.assert_applied()

        wait(main())

    def test_survives_a_restart_in_between(self, wait) -> None:  # type: ignore[no-untyped-def]
        trainer = Trainer.of(FaultyPool(COLUMNS))

        async def main() -> None:
            await self.fail(trainer)
            trainer.pool.shards[0].restart()
            trainer.pool.shards[2].restart()
            assert await trainer.session.commit(lr=LR) == 1
            trainer.apply(grad_scale=0.5)
            await trainer.assert_applied()

        wait(main())
        assert {shard.version for shard in trainer.pool.shards} == {1}

    def test_of_one_owner_may_be_finished_by_several(self, wait) -> None:  # type: ignore[no-untyped-def]
        trainer = Trainer.of(FaultyPool(LAYOUTS["one"], num_shards=3))

        async def main() -> None:
            await trainer.push()
            trainer.pool.shards[0].faults["commit"] = [Fault.SILENT]
            with pytest.raises(ShardUnavailable):
                await trainer.session.commit(lr=LR, timeout_s=0.1)
            trainer.pool.move(COLUMNS)
            assert await trainer.session.commit(lr=99.0) == 1
            trainer.apply()
            await trainer.assert_applied()

        wait(main())


def test_failed_prepare_leaves_a_step_that_goes_on(wait) -> None:  # type: ignore[no-untyped-def]
    trainer = Trainer.of(FaultyPool(COLUMNS))

    async def main() -> None:
        await trainer.push()
        trainer.pool.shards[1].faults["prepare"] = [Fault.SILENT]
        with pytest.raises(ShardUnavailable):
            await trainer.session.commit(lr=99.0, timeout_s=0.1)
        await trainer.push()
        assert await trainer.session.commit(lr=LR) == 2
        trainer.apply()
        await trainer.assert_applied()

    wait(main())


def test_failed_discard_neither_applies_nor_stands_in_the_way(wait) -> None:  # type: ignore[no-untyped-def]
    trainer = Trainer.of(FaultyPool(COLUMNS))

    async def main() -> None:
        await trainer.push()
        await trainer.session.prepare()
        trainer.pool.shards[1].faults["discard"] = [Fault.ERROR_BEFORE] * 1000
        with pytest.raises(ShardUnavailable):
            await trainer.session.discard(timeout_s=0.05)
        trainer.forget()
        assert trainer.session.pending == 0
        assert trainer.pool.shards[1].prepared  # it would refuse to prepare another step
        trainer.pool.shards[1].faults["discard"] = []
        await trainer.push()
        assert await trainer.session.commit(lr=LR) == 1
        trainer.apply()
        await trainer.assert_applied()

    wait(main())


def test_failed_update_is_no_part_of_the_step(wait) -> None:  # type: ignore[no-untyped-def]
    trainer = Trainer.of(FaultyPool(COLUMNS))

    async def main() -> None:
        bags = Bags(ids=torch.tensor([3]), weights=None, offsets=torch.tensor([0, 1]))
        _, record = await trainer.session.gather(bags, remember=True)
        trainer.pool.shards[2].faults["update"] = [Fault.DATA_LOSS]
        with pytest.raises(DataLoss):
            await trainer.session.update(record, torch.ones(1, 12), hold=True, want_weight_grad=True)
        assert trainer.session.pending == 0
        await trainer.push()
        await trainer.session.commit(lr=LR)
        trainer.apply()
        await trainer.assert_applied()

    wait(main())


def test_pages_move_between_any_two_calls_of_a_step(wait) -> None:  # type: ignore[no-untyped-def]
    placements = [LAYOUTS["one"], COLUMNS, GRID, ROWS]
    trainer = Trainer.of(FaultyPool(COLUMNS, num_shards=4))
    turn = 0

    def move() -> None:
        nonlocal turn
        turn += 1
        trainer.pool.move(placements[turn % len(placements)])

    async def main() -> None:
        for _ in range(4):
            await trainer.push()
            move()
            await trainer.push()
            move()
            await trainer.session.prepare()
            move()
            assert await trainer.session.commit(lr=LR) == 2
            trainer.apply()
            await trainer.assert_applied()
            move()

    wait(main())
    assert trainer.session.counters.updates_committed == 8


def test_backward_passes_of_many_threads_make_one_step(wait) -> None:  # type: ignore[no-untyped-def]
    trainer = Trainer.of(FaultyPool(COLUMNS))

    async def main() -> None:
        await asyncio.gather(*(trainer.push() for _ in range(25)))
        assert await trainer.session.commit(lr=LR) == 25
        trainer.apply()
        await trainer.assert_applied()

    wait(main())


def test_commits_at_once_commit_once(wait) -> None:  # type: ignore[no-untyped-def]
    trainer = Trainer.of(FaultyPool(COLUMNS))

    async def main() -> None:
        await trainer.push()
        assert sorted(await asyncio.gather(*(trainer.session.commit(lr=LR) for _ in range(4)))) == [0, 0, 0, 1]
        trainer.apply()
        await trainer.assert_applied()

    wait(main())


def test_shard_that_forgets_again_and_again_is_no_endless_loop(wait) -> None:  # type: ignore[no-untyped-def]
    trainer = Trainer.of(FaultyPool(COLUMNS))

    async def main() -> None:
        await trainer.push()
        trainer.pool.shards[0].faults["prepare"] = [Fault.FORGET] * 1000
        with pytest.raises(MempoolError, match=r"after 5 rounds of sending them again: \{1: \{0: \(1,\)\}\}"):
            await trainer.session.commit(lr=LR)

    wait(main())


_FAULTS = st.sampled_from([None, None, None, *HEALING])
_METHODS = ("gather", "update", "prepare", "commit", "discard")
_EVENTS = st.sampled_from(["push", "push", "push", "commit", "prepare", "discard", "move", "restart", "forget", "cut"])


@given(
    faults=st.fixed_dictionaries({name: st.lists(_FAULTS, max_size=12) for name in _METHODS}),
    events=st.lists(_EVENTS, max_size=15),
    layout=st.sampled_from(sorted(LAYOUTS)),
)
@settings(deadline=None, max_examples=60)
def test_any_history_applies_what_was_committed_once(faults, events, layout) -> None:  # type: ignore[no-untyped-def]
    placements = [LAYOUTS[name] for name in sorted(LAYOUTS)]
    trainer = Trainer.of(FaultyPool(LAYOUTS[layout], num_shards=4))
    for name, queue in faults.items():
        for number, fault in enumerate(queue):
            trainer.pool.shards[number % 4].faults[name].append(fault)

    async def cut_off_commit() -> None:
        """A commit whose caller gives up at some moment, wherever it is then; some shards may have applied it."""
        task = asyncio.create_task(trainer.session.commit(lr=LR))
        for _ in range(len(events)):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await trainer.session.commit(lr=LR)

    async def main() -> None:
        for number, event in enumerate(events):
            if event == "push":
                await trainer.push()
            elif event in ("commit", "cut"):
                await (trainer.session.commit(lr=LR) if event == "commit" else cut_off_commit())
                trainer.apply()
                await trainer.assert_applied()
            elif event == "prepare":
                await trainer.session.prepare()
            elif event == "discard":
                await trainer.session.discard()
                trainer.forget()
            elif event == "move":
                trainer.pool.move(placements[number % len(placements)])
            elif event == "restart":
                trainer.pool.shards[number % 4].restart()
            else:
                trainer.pool.shards[number % 4].forget()
        await trainer.session.commit(lr=LR)
        trainer.apply()
        await trainer.assert_applied()

    asyncio.run(asyncio.wait_for(main(), 30.0))
