"""Every crash point of a journal: power cuts, kills and failing disks at each operation; flipped bits and cut files."""

import errno
from random import Random

import pytest
from fakefiles import FakeFiles
from hypothesis import given, settings
from hypothesis import strategies as st
from journal_lives import FOLDER, OWNER, Lives, payload, script, until_it_ends

from mempool.errors import DataLoss
from mempool.journal.reading import MARK_NAME, read_chain, read_records
from mempool.journal.records import RECORD_BYTES


def _num_operations() -> int:
    lives = Lives(0)
    before = len(lives.files.operations)
    script(lives)
    assert not lives.failed
    return len(lives.files.operations) - before


def _goes_on(lives: Lives) -> None:
    """Whatever came before, it can be opened, appended to, and opened again."""
    lives.files.heal()
    lives.begin()
    lives.append(2)
    lives.work()
    lives.files.power_cut()
    found = lives.begin()
    assert found[-2:] == lives.appended[-2:]


@pytest.mark.parametrize("how", ["power", "kill"])
def test_a_crash_at_every_operation(how: str) -> None:
    num_operations = _num_operations()
    assert num_operations > 50
    torn = 0
    for seed in range(3):
        for number in range(1, num_operations + 1):
            lives = Lives(seed * 1000 + number)
            lives.files.cut_power_at(number)
            assert until_it_ends(lives, script)
            lives.files.heal()
            if how == "power":
                lives.files.power_cut()
            else:
                lives.files.killed()
            lives.begin()
            torn += lives.journal.torn is not None
            lives.append(1)
            lives.work()
            _crash_again(lives, how)
            _goes_on(lives)
    assert torn > 10


def _crash_again(lives: Lives, how: str) -> None:
    """With something written and not acknowledged; how the one crash ended is not how the other one does."""
    lives.append(3)
    lives.files.cut_power_at(1 + lives.files.random.randrange(3))
    until_it_ends(lives, Lives.work)
    lives.files.heal()
    lives.files.killed() if how == "power" else lives.files.power_cut()


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_failure_at_every_operation(code: int) -> None:
    failed = 0
    for number in range(1, _num_operations() + 1):
        lives = Lives(number)
        lives.files.fail(number, code)
        until_it_ends(lives, script)
        failed += len(lives.failed)
        lives.files.killed() if number % 2 else lives.files.power_cut()
        _goes_on(lives)
    assert failed > 50


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.lists(st.integers(1, 40), min_size=1, max_size=12))
def test_failures_and_crashes_in_any_order(seed: int, distances: list[int]) -> None:
    random = Random(seed)
    lives = Lives(seed)
    for distance in distances:
        what = random.choice(("cut", "fail", "both"))
        if what != "cut":
            lives.files.fail(random.randint(1, distance), random.choice((errno.EIO, errno.ENOSPC)))
        if what != "fail":
            lives.files.cut_power_at(distance)
        until_it_ends(lives, script)
        lives.files.heal()
        lives.files.power_cut() if random.random() < 0.6 else lives.files.killed()
        lives.begin()
        lives.files.killed()
    _goes_on(lives)


def test_a_full_disk_refuses_and_goes_on_when_there_is_room() -> None:
    lives = Lives(1, capacity_bytes=3000, segment_bytes=600)
    lives.begin()
    while not lives.failed:
        lives.append(2)
        lives.work()
    lives.append(1)
    lives.work()
    assert len(lives.failed) == 3
    lives.files.capacity_bytes = 10**6
    lives.append(2)
    lives.work()
    assert len(lives.failed) == 3
    lives.files.power_cut()
    found = lives.begin()
    assert found == [name for name in lives.appended if name not in lives.failed]


def _small_journal(*, clean: bool) -> tuple[FakeFiles, list[int]]:
    """Three segments, of two lives; the ids in it, all acknowledged."""
    lives = Lives(5, segment_bytes=250)
    lives.begin()
    for count in (2, 2, 1):
        lives.append(count)
        lives.work()
    lives.close()
    lives.begin()
    for count in (2, 1):
        lives.append(count)
        lives.work()
    if clean:
        lives.close()
    assert len([path for path in lives.files.paths() if path.endswith(".segment")]) == 3
    return lives.files.copy(), sorted(lives.acknowledged)


def _read(files: FakeFiles) -> list[int]:
    chain = read_chain(files, FOLDER, OWNER)
    found = []
    for record in read_records(files, chain, after=0):
        found.append(int.from_bytes(record.payload[:4], "little"))
        assert record.payload == payload(found[-1])
    return found


def _outcome(files: FakeFiles) -> list[int] | DataLoss:
    try:
        return _read(files)
    except DataLoss as error:
        return error


@pytest.mark.parametrize("clean", [True, False])
def test_every_flipped_bit_is_found_or_harms_nothing(clean: bool) -> None:
    files, names = _small_journal(clean=clean)
    harmless = 0
    for path in files.paths():
        content = files.content(path)
        for bit in range(8 * len(content)):
            files.flip(path, bit)
            found = _outcome(files)
            if isinstance(found, DataLoss):
                assert path in str(found)
            else:
                assert found == names
                harmless += 1
                assert path.endswith(MARK_NAME), "all other files count"
            files.flip(path, bit)
    assert harmless > 0
    assert _read(files) == names


@pytest.mark.parametrize("clean", [True, False])
def test_every_cut_file_is_found(clean: bool) -> None:
    files, names = _small_journal(clean=clean)
    for path in files.paths():
        content = files.content(path)
        for num_bytes in range(len(content)):
            cut = files.copy()
            cut.cut(path, num_bytes)
            if path.endswith(MARK_NAME):
                assert _read(cut) == names
            else:
                with pytest.raises(DataLoss, match=path):
                    _read(cut)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32))
def test_whatever_is_done_to_a_file_is_found_or_harms_nothing(seed: int) -> None:
    """Bytes put over others, put in, taken out, written twice, at places of one file or of several."""
    random = Random(seed)
    files, names = _small_journal(clean=seed % 2 == 0)
    touched = set()
    for _ in range(random.randint(1, 3)):
        path = random.choice(files.paths())
        content = files.content(path)
        at, num_bytes = random.randrange(len(content)), random.choice((1, 2, 8, 40, 48, 72))
        part = random.choice((random.randbytes(num_bytes), bytes(num_bytes), content[-num_bytes:], content[:num_bytes]))
        change = random.choice(
            (
                content[:at] + part + content[at + num_bytes :],
                content[:at] + part + content[at:],
                content[:at] + content[at + num_bytes :],
                content + part,
            )
        )
        if change != content:
            touched.add(path)
        files.cut(path, 0)
        files.open(path).write([change], 0)
    found = _outcome(files)
    if isinstance(found, DataLoss):
        assert any(path in str(found) for path in files.paths())
    elif touched <= {path for path in touched if path.endswith(MARK_NAME)}:
        assert found == names
    else:
        assert found == names[: len(found)], "a prefix, at least"
        marked = not any(path.endswith(MARK_NAME) for path in touched)
        assert found == names or not marked, "all of it, where the mark says what there was"


def test_without_the_mark_a_cut_or_flipped_end_gives_a_prefix_and_all_else_is_found() -> None:
    """As after a power cut that lost the mark: then nothing says of the newest batch whether it was acknowledged."""
    files, names = _small_journal(clean=False)
    files.forget(f"{FOLDER}/{MARK_NAME}")
    newest = files.paths()[-1]
    assert newest.endswith("3.segment")
    before_newest_batch = names[:-1]
    outcomes = set()
    for path in files.paths():
        for bit in range(8 * len(files.content(path))):
            files.flip(path, bit)
            found = _outcome(files)
            if isinstance(found, DataLoss):
                assert path in str(found)
                outcomes.add("found")
            else:
                assert path == newest
                assert found == before_newest_batch
                outcomes.add("torn")
            files.flip(path, bit)
    assert outcomes == {"found", "torn"}


def test_records_that_changed_places_are_found() -> None:
    lives = Lives(1, segment_bytes=10**6)
    lives.begin()
    lives.append(72)
    lives.work()
    path = next(path for path in lives.files.paths() if path.endswith(".segment"))
    whole = lives.files.content(path)
    first, second = (whole.index(payload(name)) for name in (1, 71))
    size = len(payload(1))
    assert len(payload(71)) == size
    file = lives.files.open(path)
    for place, taken in ((first, second), (second, first)):
        file.write([whole[taken - RECORD_BYTES : taken + size]], place - RECORD_BYTES)
    with pytest.raises(DataLoss, match="record 2 is not whole: it has number 72"):
        _read(lives.files)


def test_a_missing_segment_is_named() -> None:
    files, names = _small_journal(clean=False)
    segments = [path for path in files.paths() if path.endswith(".segment")]
    for path in segments[1:]:
        without = files.copy()
        without.forget(path)
        with pytest.raises(DataLoss, match="missing") as told:
            _read(without)
        assert path in str(told.value) or "were synced" in str(told.value)
    without = files.copy()
    without.forget(segments[0])
    with pytest.raises(DataLoss, match="begins with record 5, and what comes after 0 is wanted"):
        _read(without)
    for path in segments:
        files.forget(path)
    with pytest.raises(DataLoss, match=rf"records 1 to {len(names)} were synced"):
        _read(files)
