"""Carrying out retries: one deadline, which goes along with the call."""

import asyncio
import gc
import time
import weakref
from contextlib import suppress

import pytest

from mempool.client.routing.retry import Backoff
from mempool.client.routing.tries import Tries
from mempool.client.routing.whereabouts import Whereabouts
from mempool.errors import DataLoss, MempoolError, PoolUnreachable, ShardUnavailable, StalePlacement
from mempool.types.caller import Caller, calling, current_caller


def make_tries(*, timeout_s: float = 20.0) -> Tries:
    return Tries(Whereabouts(name="run-7"), timeout_s=timeout_s, backoff=Backoff(first_s=0.001, longest_s=0.002))


def test_tries_until_it_succeeds(wait) -> None:  # type: ignore[no-untyped-def]
    failures = [ShardUnavailable("away", shard=1)] * 3
    refreshed = []

    async def once() -> str:
        if failures:
            raise failures.pop()
        return "done"

    async def refresh() -> bool:
        refreshed.append(True)
        return False

    assert wait(make_tries().run("facts", once, refresh=refresh)) == "done"
    assert len(refreshed) == 3


def test_a_newer_view_is_tried_at_once_however_many_there_were(wait) -> None:  # type: ignore[no-untyped-def]
    """Rounds of a move come one after another; a wait between two tries would meet the next of them."""
    failures = [StalePlacement("moved")] * 5

    async def once() -> str:
        if failures:
            raise failures.pop()
        return "done"

    async def refresh() -> bool:
        return True

    tries = Tries(Whereabouts(name="run-7"), timeout_s=20.0, backoff=Backoff(first_s=3600.0, longest_s=3600.0))
    assert wait(tries.run("facts", once, refresh=refresh)) == "done"


def test_the_deadline_goes_along(wait) -> None:  # type: ignore[no-untyped-def]
    async def once() -> Caller:
        return current_caller()

    begin_s = time.monotonic()
    caller = wait(make_tries(timeout_s=7.0).run("facts", once))
    assert begin_s + 7.0 <= caller.deadline_s <= time.monotonic() + 7.0
    assert wait(make_tries().run("facts", once, timeout_s=3.0)).deadline_s <= time.monotonic() + 3.0


def test_whoever_asked_for_it_has_a_name_and_maybe_less_time(wait) -> None:  # type: ignore[no-untyped-def]
    early_s = time.monotonic() + 0.5

    async def once() -> Caller:
        return current_caller()

    async def served(caller: Caller) -> Caller:
        with calling(caller):
            return await make_tries(timeout_s=7.0).run("facts", once)

    assert wait(served(Caller(name="ipv4:1.2.3.4:5", deadline_s=early_s))) == Caller("ipv4:1.2.3.4:5", early_s)
    late = wait(served(Caller(name="ipv4:1.2.3.4:5", deadline_s=early_s + 100.0)))
    assert late.deadline_s < early_s + 7.0


def test_where_nobody_listens_it_ends_sooner_if_asked_to(wait) -> None:  # type: ignore[no-untyped-def]
    async def refused() -> None:
        error = PoolUnreachable("connection refused")
        error.refused = True
        raise error

    begin_s = time.monotonic()
    with pytest.raises(PoolUnreachable, match="last: connection refused"):
        wait(make_tries(timeout_s=25.0).run("status", refused, refused_s=0.05))
    assert time.monotonic() - begin_s < 20.0


def test_closed_means_no_further_try(wait) -> None:  # type: ignore[no-untyped-def]
    tries = make_tries()

    async def once() -> None:
        tries.close()
        raise ShardUnavailable("away")

    with pytest.raises(MempoolError, match="pool 'run-7' was closed during the call"):
        wait(tries.run("facts", once))


def test_what_no_retry_heals_is_raised_as_it_is(wait) -> None:  # type: ignore[no-untyped-def]
    lost = DataLoss("lost")

    async def once() -> None:
        raise lost

    with pytest.raises(DataLoss) as raised:
        wait(make_tries().run("facts", once))
    assert raised.value is lost


def test_silence_after_a_further_try_is_looked_at_as_well(wait) -> None:  # type: ignore[no-untyped-def]
    """Each try on a new view may get old in its turn, long before the call's deadline."""
    tried: list[int] = []

    async def once() -> str:
        tried.append(len(tried))
        if len(tried) <= 3:
            await asyncio.Event().wait()
        return "done"

    async def check() -> None:
        raise StalePlacement("moved")

    async def refresh() -> bool:
        return True

    tries = make_tries(timeout_s=1e6)
    assert wait(tries.run("facts", once, refresh=refresh, check=check, silence_s=0.02)) == "done"
    assert len(tried) == 4


def test_a_try_that_fails_while_it_is_cut_off_leaves_the_deadline_as_it_was(wait) -> None:  # type: ignore[no-untyped-def]
    """As where a part of a gather fails in the moment in which the others are cancelled."""
    tried: list[int] = []

    async def once() -> str:
        tried.append(len(tried))
        try:
            return await asyncio.Event().wait() and ""
        except asyncio.CancelledError:
            if len(tried) > 1:
                raise
            raise ShardUnavailable("away", shard=1) from None

    async def check() -> None:
        if len(tried) == 1:
            raise StalePlacement("moved")

    async def main() -> None:
        with pytest.raises(ShardUnavailable, match="2 tries"):
            await make_tries(timeout_s=0.3).run("facts", once, check=check, silence_s=0.02)
        task = asyncio.current_task()
        assert task is not None
        assert not task.cancelling()

    wait(main())


def test_a_try_that_succeeds_while_it_is_cut_off_leaves_nobody_cancelled(wait) -> None:  # type: ignore[no-untyped-def]
    async def once() -> str:
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        return "done"

    async def check() -> None:
        raise StalePlacement("moved")

    async def main() -> None:
        assert await make_tries().run("facts", once, check=check, silence_s=0.02) == "done"
        task = asyncio.current_task()
        assert task is not None
        assert not task.cancelling()

    wait(main())


@pytest.mark.parametrize("how", ["fails for good", "is tried no further", "gets old", "cannot be checked"])
def test_what_was_asked_is_kept_no_longer_than_its_error(wait, how: str) -> None:  # type: ignore[no-untyped-def]
    """It may be large, and the collector of cycles comes late."""

    class Asked:
        pass

    async def ask(asked: Asked) -> None:
        async def once() -> None:
            assert asked
            if how in ("gets old", "cannot be checked"):
                await asyncio.Event().wait()
            raise DataLoss("gone") if how == "fails for good" else ShardUnavailable("away", shard=1)

        async def check() -> None:
            raise StalePlacement("moved") if how == "gets old" else ValueError("odd")

        await make_tries().run(
            "facts", once, check=check, silence_s=0.02, again=how not in ("is tried no further", "gets old")
        )

    async def main() -> bool:
        asked = Asked()
        known = weakref.ref(asked)
        with pytest.raises((MempoolError, ValueError)) as raised:
            await ask(asked)
        del asked, raised
        await asyncio.sleep(0)
        return known() is None

    gc.disable()
    try:
        assert wait(main())
    finally:
        gc.enable()
