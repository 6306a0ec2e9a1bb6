"""A trainer's steps where nothing fails: what is sent, what is applied, what is counted."""

import asyncio

import pytest
import torch

from mempool.client.routing.router import Router
from mempool.client.routing.whereabouts import Whereabouts
from mempool.client.training import session as session_module
from mempool.client.training.session import Session
from mempool.errors import InvalidRequest
from mempool.types import CommitRequest, PrepareRequest, ProductKeySpec
from mempool.types.bags import Bags
from tests.support.faulty import COLUMNS, LAYOUTS, Fault, FaultyPool, make_schema

from .trainer import LR, Trainer


@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_of_several_updates_are_applied(wait, layout: str) -> None:  # type: ignore[no-untyped-def]
    trainer = Trainer.of(FaultyPool(LAYOUTS[layout]))

    async def main() -> None:
        for updates in (1, 3, 2):
            for _ in range(updates):
                await trainer.push()
            assert trainer.session.pending == updates
            assert await trainer.session.commit(lr=LR, grad_scale=0.5) == updates
            trainer.apply(grad_scale=0.5)
            await trainer.assert_applied()
            assert trainer.session.pending == 0

    wait(main())
    counters = trainer.session.counters
    assert (counters.lookups, counters.updates_pushed, counters.updates_committed, counters.steps_committed) == (
        6,
        6,
        6,
        3,
    )
    owners = trainer.pool.view.placement.shards
    assert all(trainer.pool.shards[shard].version == 3 for shard in owners)
    assert all(not shard.held for shard in trainer.pool.shards)


def test_one_owner_commits_in_one_message_and_several_in_two(wait) -> None:  # type: ignore[no-untyped-def]
    one, several = Trainer.of(FaultyPool(LAYOUTS["one"])), Trainer.of(FaultyPool(COLUMNS))

    async def main() -> None:
        for trainer in (one, several):
            await trainer.push()
            await trainer.session.commit(lr=LR)
            trainer.apply()
            await trainer.assert_applied()

    wait(main())
    assert one.pool.shards[0].names() == ["gather", "update", "commit"]
    assert [shard.names() for shard in several.pool.shards] == [["gather", "update", "prepare", "commit"]] * 3


def test_nothing_pending_sends_nothing_and_counts_no_step(wait) -> None:  # type: ignore[no-untyped-def]
    trainer = Trainer.of(FaultyPool(COLUMNS))

    async def main() -> None:
        assert await trainer.session.commit(lr=LR) == 0
        assert await trainer.session.prepare() is None
        assert await trainer.session.discard() == 0
        assert trainer.sent() == []
        await trainer.push()
        await trainer.session.commit(lr=LR)

    wait(main())
    (commit,) = trainer.pool.shards[0].requests("commit")
    assert isinstance(commit, CommitRequest)
    assert commit.parts[0].step_id.step == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_prepare_gives_the_norm_and_commit_takes_its_scale(wait, layout: str) -> None:  # type: ignore[no-untyped-def]
    trainer = Trainer.of(FaultyPool(LAYOUTS[layout]))

    async def main() -> None:
        await trainer.push()
        await trainer.push()
        prepared = await trainer.session.prepare(want_norm=True)
        assert prepared is not None
        norm = trainer.gradient.norm()
        assert prepared.updates == 2
        assert prepared.finite
        assert abs(prepared.squared_norm - float(norm**2)) <= 1e-5 * float(norm**2)
        assert await trainer.session.commit(lr=LR, grad_scale=float(0.1 / norm)) == 2
        trainer.apply(grad_scale=float(0.1 / norm))
        await trainer.assert_applied()

    wait(main())
    # Prepared once: the commit does not ask again.
    assert trainer.pool.shards[0].names().count("prepare") == 1


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_gradients_that_overflowed_are_sent_reported_and_discarded(wait, bad: float) -> None:  # type: ignore[no-untyped-def]
    trainer = Trainer.of(FaultyPool(COLUMNS))

    async def main() -> None:
        await trainer.push(scale=bad)
        prepared = await trainer.session.prepare()
        assert prepared is not None
        assert not prepared.finite
        assert await trainer.session.discard() == 1
        trainer.forget()
        await trainer.assert_applied()
        assert all(not shard.held and not shard.prepared for shard in trainer.pool.shards)
        await trainer.push()
        assert await trainer.session.commit(lr=LR) == 1
        trainer.apply()
        await trainer.assert_applied()

    wait(main())


def test_discarded_updates_are_never_applied(wait) -> None:  # type: ignore[no-untyped-def]
    trainer = Trainer.of(FaultyPool(COLUMNS))

    async def main() -> None:
        await trainer.push()
        await trainer.push()
        assert await trainer.session.discard() == 2
        trainer.forget()
        assert trainer.session.pending == 0
        await trainer.push()
        await trainer.session.commit(lr=LR)
        trainer.apply()
        await trainer.assert_applied()

    wait(main())
    assert trainer.session.counters.updates_committed == 1


def test_updates_after_prepare_are_prepared_with_the_others(wait) -> None:  # type: ignore[no-untyped-def]
    trainer = Trainer.of(FaultyPool(COLUMNS))

    async def main() -> None:
        await trainer.push()
        await trainer.session.prepare()
        await trainer.push()
        assert trainer.session.pending == 2
        prepared = await trainer.session.prepare()
        assert prepared is not None
        assert prepared.updates == 2
        assert prepared.squared_norm == pytest.approx(float(trainer.gradient.square().sum()), rel=1e-5)
        assert await trainer.session.commit(lr=LR) == 2
        trainer.apply()
        await trainer.assert_applied()
        assert all(not shard.held for shard in trainer.pool.shards)

    wait(main())


def test_frozen_table_gets_weight_gradients_and_no_updates(wait) -> None:  # type: ignore[no-untyped-def]
    trainer = Trainer.of(FaultyPool(COLUMNS))

    async def main() -> None:
        bags = Bags(ids=torch.tensor([3, 9]), weights=None, offsets=torch.tensor([0, 2]))
        _, record = await trainer.session.gather(bags, remember=True)
        found = await trainer.session.update(record, torch.ones(1, 12), hold=False, want_weight_grad=True)
        assert found is not None
        torch.testing.assert_close(found.double(), trainer.pool.values[[3, 9]].sum(1), rtol=1e-6, atol=1e-6)
        assert await trainer.session.update(record, torch.ones(1, 12), hold=False, want_weight_grad=False) is None
        assert trainer.session.pending == 0
        assert await trainer.session.commit(lr=LR) == 0

    wait(main())
    assert "commit" not in trainer.sent()
    assert trainer.sent().count("update") == 3


def test_owner_of_keys_alone_follows_the_ledger(wait) -> None:  # type: ignore[no-untyped-def]
    schema = make_schema(keys=ProductKeySpec(heads=1, key_dim=4), stride=8)
    trainer = Trainer.of(FaultyPool(COLUMNS, schema=schema, key_owners=(3,)))

    async def main() -> None:
        await trainer.push()
        await trainer.session.prepare()
        await trainer.session.commit(lr=LR)
        trainer.apply()
        await trainer.assert_applied()

    wait(main())
    assert trainer.pool.shards[3].names() == ["prepare", "commit"]
    (prepare,) = trainer.pool.shards[3].requests("prepare")
    assert isinstance(prepare, PrepareRequest)
    assert prepare.parts[0].sequences == ()
    assert {shard.version for shard in trainer.pool.shards} == {1}


@pytest.mark.parametrize(
    ("lr", "grad_scale", "text"),
    [
        (-0.1, 1.0, "lr = -0.1"),
        (torch.nan, 1.0, "lr = nan"),
        (torch.inf, 1.0, "lr = inf"),
        (0.1, torch.nan, "grad_scale"),
    ],
)
def test_wrong_numbers_change_nothing(wait, lr: float, grad_scale: float, text: str) -> None:  # type: ignore[no-untyped-def]
    trainer = Trainer.of(FaultyPool(COLUMNS))

    async def main() -> None:
        await trainer.push()
        with pytest.raises(InvalidRequest, match=text):
            await trainer.session.commit(lr=lr, grad_scale=grad_scale)
        assert await trainer.session.commit(lr=LR) == 1
        trainer.apply()
        await trainer.assert_applied()

    wait(main())


def embedded(layout: str) -> Trainer:
    pool = FaultyPool(LAYOUTS[layout])
    router = Router(pool, dial=pool.dial, pool=Whereabouts(name="here", embedded=True), timeout_s=20.0)
    session = Session(router, table_id=1, group="g")
    return Trainer(pool, session, router, pool.values.clone(), torch.zeros_like(pool.values))


def test_a_small_update_for_the_only_shard_of_this_process_is_held_when_it_returns(  # type: ignore[no-untyped-def]
    wait, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, several = embedded("one"), embedded("columns")

    async def main() -> None:
        await one.push()
        assert one.pool.shards[0].held == 1
        await several.push()
        assert not any(shard.held for shard in several.pool.shards)
        monkeypatch.setattr(session_module, "_WAITED_FOR_BYTES", 8)
        await one.push()
        assert one.pool.shards[0].held == 1
        for trainer in (one, several):
            await trainer.session.commit(lr=LR)
            trainer.apply()
            await trainer.assert_applied()

    wait(main())


def test_a_shard_of_this_process_that_does_not_answer_holds_up_a_backward_pass_for_its_deadline(wait) -> None:  # type: ignore[no-untyped-def]
    trainer = embedded("one")
    trainer.pool.shards[0].faults["update"] = [Fault.SILENT]

    async def main() -> None:
        bags = Bags(ids=torch.tensor([1]), weights=None, offsets=torch.tensor([0, 1]))
        _, record = await trainer.session.gather(bags, remember=True)
        async with asyncio.timeout(10.0):
            await trainer.session.update(record, torch.ones(1, 12), hold=True, want_weight_grad=False, timeout_s=0.1)
        assert trainer.session.pending == 1
        assert await trainer.session.commit(lr=LR) == 1

    wait(main())
