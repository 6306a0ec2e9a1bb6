"""A journal: one sync for all who wait, failures that reach those who wait, numbers, what is refused."""

import asyncio
import errno
import gc
import subprocess
import sys
import threading
import weakref
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
from byhand import ByHand
from fakefiles import FakeFiles

from mempool.errors import ConfigError, DataLoss, Internal, InvalidRequest, Overloaded, RequestTooLarge, StorageFailed
from mempool.journal import DiskFiles, Files, Journal, Owner, Sync
from mempool.journal.records import MOST_PAYLOAD_BYTES

OWNER = Owner("pool-1", 0)


@pytest.fixture
def files() -> FakeFiles:
    files = FakeFiles()
    files.make_folder("j")
    return files


@pytest.fixture
def hand() -> ByHand:
    return ByHand()


def _journal(
    files: Files, hand: ByHand, *, sync: Sync = "commit", segment_bytes: int = 10_000, after: int = 0
) -> Journal:
    return Journal(
        files,
        "j",
        owner=OWNER,
        runner=hand,
        sync=sync,
        segment_bytes=segment_bytes,
        most_waiting_bytes=1000,
        after=after,
    )


def _read(journal: Journal, *, after: int = 0) -> list[tuple[int, int, bytes]]:
    return [(record.number, record.kind, bytes(record.payload)) for record in journal.records(after=after)]


def test_threads_that_append_at_once_share_syncs_and_all_is_read_again(tmp_path: Path) -> None:
    async def life(count: int) -> list[tuple[int, int, bytes]]:
        journal = Journal(DiskFiles(), str(tmp_path), owner=OWNER, segment_bytes=200_000)
        before = _read(journal)
        appended: dict[int, tuple[int, int, bytes]] = {}

        def appends(thread: int) -> None:
            random = np.random.default_rng(thread)
            for _ in range(count):
                rows = random.standard_normal((random.integers(0, 40), 16), dtype=np.float32)
                number = journal.append(thread, [b"head", memoryview(rows)])
                appended[number] = (number, thread, b"head" + rows.tobytes())
                journal.when_synced(number).result(timeout=30)

        threads = [threading.Thread(target=appends, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            await asyncio.sleep(0.01)
        assert journal.num_syncs < len(appended) == 8 * count
        assert journal.waiting_bytes == 0
        await journal.close()
        await journal.close()
        assert journal.num_bytes >= sum(path.stat().st_size for path in tmp_path.glob("*.segment"))
        return [*before, *(appended[number] for number in sorted(appended))]

    asyncio.run(life(40))
    wanted = asyncio.run(life(10))
    assert len(list(tmp_path.glob("*.segment"))) > 2
    journal = Journal(DiskFiles(), str(tmp_path), owner=OWNER, runner=ByHand())
    assert journal.torn is None
    assert _read(journal) == wanted
    assert _read(journal, after=250) == wanted[250:]
    assert [number for number, _, _ in wanted] == list(range(1, 401))


_APPENDS = """
import os, sys
from mempool.journal import DiskFiles, Journal, Owner
journal = Journal(DiskFiles(), sys.argv[1], owner=Owner("pool-1", 0), segment_bytes=100_000)
while True:
    numbers = [journal.append(7, [b"%08d" % (journal.next_number), bytes(n * 100)]) for n in range(20)]
    journal.when_synced(numbers[-1]).result()
    os.write(1, b"%d\\n" % numbers[-1])
"""


def test_a_killed_process_loses_nothing_that_it_acknowledged(tmp_path: Path) -> None:
    acknowledged = 0
    for lines in (30, 7):
        with subprocess.Popen([sys.executable, "-c", _APPENDS, str(tmp_path)], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            for _ in range(lines):
                acknowledged = int(process.stdout.readline())
            process.kill()
            acknowledged = int(([b"%d" % acknowledged, *process.stdout.read().split()])[-1])
        journal = Journal(DiskFiles(), str(tmp_path), owner=OWNER, runner=ByHand())
        numbers = []
        for record in journal.records():
            assert record.kind == 7
            assert bytes(record.payload[:8]) == b"%08d" % record.number
            numbers.append(record.number)
        assert numbers == list(range(1, len(numbers) + 1))
        assert len(numbers) >= acknowledged > 0


def test_what_gathers_while_a_sync_runs_goes_with_the_next_one(files: FakeFiles, hand: ByHand) -> None:
    journal = _journal(files, hand)
    first = journal.append(1, [b"a"])
    second = journal.append(1, [b"b"])
    assert journal.when_synced(first) is journal.when_synced(second)
    assert not journal.when_synced(first).done()
    hand.work()
    assert journal.when_synced(second).done()
    assert journal.num_syncs == 1
    third = journal.append(1, [b"c"])
    assert not journal.when_synced(third).done()
    hand.work()
    assert journal.when_synced(third).result(timeout=0) is None
    assert journal.num_syncs == 2


def test_waiting_in_a_loop_can_be_given_up_without_the_others(files: FakeFiles, hand: ByHand) -> None:
    async def waits() -> None:
        journal = _journal(files, hand)
        number = journal.append(1, [b"a"])
        one, other = (asyncio.wrap_future(journal.when_synced(number)) for _ in range(2))
        one.cancel()
        await asyncio.sleep(0)
        hand.work()
        await asyncio.wait_for(other, timeout=5)

    asyncio.run(waits())


def test_a_failed_sync_fails_all_who_wait_and_nobody_later(files: FakeFiles, hand: ByHand) -> None:
    journal = _journal(files, hand)
    kept = journal.append(1, [b"kept"])
    hand.work()
    files.fail(2, errno.EIO)
    failed = [journal.append(1, [b"lost"]), journal.append(1, [b"lost too"])]
    waiting = [journal.when_synced(number) for number in failed]
    hand.work()
    for number, done in zip(failed, waiting, strict=True):
        with pytest.raises(StorageFailed, match=r"could not sync j/000000000001\.segment.*input/output"):
            done.result(timeout=0)
        assert isinstance(journal.when_synced(number).exception(timeout=0), StorageFailed)
    assert journal.when_synced(kept).result(timeout=0) is None
    later = journal.append(2, [b"later"])
    assert later == 4, "a number is one record's for ever"
    assert journal.last == kept
    hand.work()
    assert journal.when_synced(later).exception(timeout=0) is None
    assert isinstance(journal.when_synced(failed[1]).exception(timeout=0), StorageFailed)
    files.power_cut()
    assert _read(_journal(files, ByHand())) == [(1, 1, b"kept"), (4, 2, b"later")]


def test_a_failure_that_is_remembered_keeps_nothing_of_what_failed(files: FakeFiles, hand: ByHand) -> None:
    class Buffer(bytearray):
        """Of which one can see whether it is still there."""

    journal = _journal(files, hand)
    payload = Buffer(b"x" * 100)
    seen = weakref.ref(payload)
    files.fail(1, errno.EROFS)
    number = journal.append(1, [payload])
    del payload
    hand.work()
    gc.collect()
    assert seen() is None
    failed = journal.when_synced(number).exception(timeout=0)
    assert isinstance(failed, StorageFailed)
    assert failed.errno == errno.EROFS
    assert "read-only" in str(failed)


def test_what_waits_behind_a_failed_batch_fails_with_it(hand: ByHand) -> None:
    class Slow(FakeFiles):
        """Appends while it writes."""

        behind: "Future[None] | None" = None

        def _did(self, what: str, path: str, *rest: object) -> None:
            if what == "write" and path == "j/000000000001.segment" and self.behind is None:
                self.behind = journal.when_synced(journal.append(1, [b"behind"]))
                self.fail(1, errno.ENOSPC)
            super()._did(what, path, *rest)  # type: ignore[arg-type]

    files = Slow()
    files.make_folder("j")
    journal = _journal(files, hand)
    first = journal.when_synced(journal.append(1, [b"first"]))
    hand.work()
    assert files.behind is not None
    assert first.exception(timeout=0) is files.behind.exception(timeout=0) is not None
    journal.append(1, [b"after"])
    hand.work()
    assert _read(_journal(files.copy(), ByHand())) == [(3, 1, b"after")]


def test_a_bug_while_writing_fails_who_waits_and_leaves_the_journal_whole(hand: ByHand) -> None:
    class Broken(FakeFiles):
        broken = False

        def _did(self, what: str, path: str, *rest: object) -> None:
            if self.broken and what == "sync":
                raise RuntimeError("a bug")
            super()._did(what, path, *rest)  # type: ignore[arg-type]

    files = Broken()
    files.make_folder("j")
    journal = _journal(files, hand)
    journal.append(1, [b"a"])
    hand.work()
    files.broken = True
    lost = journal.append(1, [b"b"])
    done = journal.when_synced(lost)
    hand.work()
    assert isinstance(done.exception(timeout=0), Internal)
    files.broken = False
    journal.append(1, [b"c"])
    hand.work()
    assert _read(_journal(files.copy(), ByHand())) == [(1, 1, b"a"), (3, 1, b"c")]


def test_what_waits_is_bounded(files: FakeFiles, hand: ByHand) -> None:
    journal = _journal(files, hand)
    large = journal.append(1, [bytes(5000)])  # alone it may be larger
    with pytest.raises(Overloaded, match=r"5,048 bytes wait.*1,000 may") as told:
        journal.append(1, [b"x"])
    assert told.value.retry_after_s > 0
    hand.work()
    assert journal.when_synced(large).done()
    assert journal.append(1, [b"x"]) == large + 1


def test_what_nobody_rings_for_does_not_stand_in_the_way_for_ever(files: FakeFiles, hand: ByHand) -> None:
    journal = _journal(files, hand)
    journal.append(1, [bytes(600)], ring=False, wait=False)
    hand.work()
    with pytest.raises(Overloaded):
        journal.append(2, [bytes(600)])
    hand.work()
    assert journal.waiting_bytes == 0
    assert journal.append(2, [bytes(600)]) == 2
    hand.work()
    assert journal.last == 2


def test_what_nobody_rings_for_is_written_when_it_is_much(files: FakeFiles, hand: ByHand) -> None:
    journal = Journal(files, "j", owner=OWNER, runner=hand)
    for _ in range(4):
        journal.append(1, [bytes(2**20)], ring=False, wait=False)
    assert journal.waiting_bytes > 4 * 2**20
    hand.work()
    assert journal.waiting_bytes == 0
    assert journal.num_syncs == 0


def test_wrong_records_are_refused(files: FakeFiles, hand: ByHand) -> None:
    journal = _journal(files, hand)
    with pytest.raises(InvalidRequest, match="0 to 65,535, and not 65536"):
        journal.append(2**16, [b""])
    with pytest.raises(RequestTooLarge, match="larger than a journal's"):
        journal.append(1, [bytes(2**20)] * (MOST_PAYLOAD_BYTES // 2**20) + [b"x"])
    with pytest.raises(InvalidRequest, match="record 1 is not known"):
        journal.when_synced(1)
    assert journal.next_number == 1


def test_an_empty_record_is_a_record(files: FakeFiles, hand: ByHand) -> None:
    journal = _journal(files, hand)
    journal.append(65_535, [])
    journal.append(0, [b"", memoryview(np.zeros((3, 0)))])
    hand.work()
    assert _read(_journal(files.copy(), ByHand())) == [(1, 65_535, b""), (2, 0, b"")]


def test_with_sync_off_a_killed_process_loses_nothing(hand: ByHand) -> None:
    shortest = 20
    for seed in range(10):
        files = FakeFiles(seed)
        files.make_folder("j")
        journal = _journal(files, hand, sync="off", segment_bytes=400)
        for n in range(20):
            journal.append(n, [bytes(50)])
            hand.work()
            assert journal.when_synced(n + 1).done()
        files.killed()
        assert [number for number, _, _ in _read(_journal(files.copy(), ByHand()))] == list(range(1, 21))
        files.power_cut()
        left = [number for number, _, _ in _read(_journal(files, ByHand(), sync="off"))]
        assert left == list(range(1, len(left) + 1))
        assert len(left) >= 15, "older segments are synced"
        shortest = min(shortest, len(left))
    assert shortest < 20


def test_numbers_begin_behind_what_a_snapshot_has(files: FakeFiles, hand: ByHand) -> None:
    journal = _journal(files, hand, sync="off")
    journal.append(1, [b"a"])
    hand.work()
    files.killed()
    with pytest.raises(DataLoss, match="ends with record 1, and what was made of records up to 7 is there"):
        _journal(files, ByHand(), after=7)
    journal = _journal(files, hand, sync="off", after=7)
    assert journal.append(1, [b"b"]) == 8
    hand.work()
    files.killed()
    assert _read(_journal(files, ByHand(), after=7), after=7) == [(8, 1, b"b")]


def test_old_segments_go_when_nobody_needs_them(files: FakeFiles, hand: ByHand) -> None:
    journal = _journal(files, hand, segment_bytes=300)
    for n in range(12):
        journal.append(1, [bytes([n]) * 100])
        hand.work()
    before = journal.num_bytes
    removed = journal.remove_before(6)
    hand.work()
    assert journal.num_bytes == before - removed.result(timeout=0) < before
    assert sum(len(files.content(path)) for path in files.paths() if path.endswith(".segment")) == journal.num_bytes
    again = _journal(files.copy(), ByHand(), after=5)
    assert [number for number, _, _ in _read(again, after=5)] == list(range(6, 13))
    with pytest.raises(DataLoss, match="what comes after 0 is wanted"):
        _read(again)
    everything = journal.remove_before(1000)
    hand.work()
    everything.result(timeout=0)
    assert len([path for path in files.paths() if path.endswith(".segment")]) == 1, "the newest one stays"


def test_a_closed_journal_takes_nothing(files: FakeFiles, hand: ByHand) -> None:
    journal = _journal(files, hand)
    last = journal.append(1, [b"last"])
    done = journal.when_synced(last)
    asyncio.run(journal.close())
    assert done.result(timeout=0) is None
    for call in (lambda: journal.append(1, [b"x"]), lambda: journal.remove_before(1)):
        with pytest.raises(StorageFailed, match="closed"):
            call()


def test_anothers_segments_are_refused(files: FakeFiles, hand: ByHand) -> None:
    journal = _journal(files, hand)
    journal.append(1, [b"a"])
    hand.work()
    before = {path: files.content(path) for path in files.paths()}
    for owner, whose in ((Owner("pool-2", 0), "another pool"), (Owner("pool-1", 5), "shard 0")):
        with pytest.raises(ConfigError, match=rf"j/000000000001\.segment is a segment of {whose}"):
            Journal(files, "j", owner=owner, runner=hand)
    files.rename("j/000000000001.segment", "j/000000000002.segment")
    with pytest.raises(ConfigError, match="it was renamed"):
        _journal(files, hand)
    files.rename("j/000000000002.segment", "j/000000000001.segment")
    assert before == {path: files.content(path) for path in files.paths()}


def test_a_torn_tail_is_cut_off_and_told_once(files: FakeFiles, hand: ByHand) -> None:
    journal = _journal(files, hand)
    journal.append(1, [b"whole"])
    hand.work()
    whole = len(files.content("j/000000000001.segment"))
    file = files.open("j/000000000001.segment")
    file.write([b"half a record"], whole)
    files.killed()
    journal = _journal(files, hand)
    assert journal.torn is not None
    assert (journal.torn.path, journal.torn.offset, journal.torn.num_bytes) == ("j/000000000001.segment", whole, 13)
    assert "cut off" in journal.torn.why
    assert len(files.content("j/000000000001.segment")) == whole
    files.killed()
    journal = _journal(files, hand)
    assert journal.torn is None
    assert _read(journal) == [(1, 1, b"whole")]


def test_what_nobody_waits_for_is_written_at_once_and_durable_with_what_is_next(files: FakeFiles, hand: ByHand) -> None:
    journal = _journal(files, hand)
    early = journal.append(1, [b"early"], wait=False)
    hand.work()
    assert not journal.when_synced(early).done()
    assert (journal.num_syncs, journal.last) == (0, 0)
    later = journal.append(1, [b"later"], wait=False)
    hand.work()
    assert journal.when_synced(early) is not journal.when_synced(later)
    waited = journal.append(1, [b"waited"])
    hand.work()
    assert all(journal.when_synced(number).done() for number in (early, later, waited))
    assert (journal.num_syncs, journal.last) == (1, 3)


def test_where_a_sync_fails_what_was_written_before_it_fails_too(files: FakeFiles, hand: ByHand) -> None:
    journal = _journal(files, hand)
    journal.append(1, [b"kept"])
    hand.work()
    journal.append(1, [b"early"], wait=False)
    hand.work()
    files.fail(2, errno.EIO)  # the write, and then the sync
    failing = journal.append(1, [b"waited"])
    early = journal.when_synced(failing - 1)
    hand.work()
    for done in (early, journal.when_synced(failing - 1), journal.when_synced(failing)):
        assert isinstance(done.exception(timeout=0), StorageFailed)
    journal.append(1, [b"again"])
    hand.work()
    files.power_cut()
    assert [payload for _, _, payload in _read(_journal(files, ByHand()))] == [b"kept", b"again"]
