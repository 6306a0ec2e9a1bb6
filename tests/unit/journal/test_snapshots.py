"""Snapshots: what is read is what was written; crashes, failures and damage at every point."""

import errno
from contextlib import suppress
from itertools import product
from pathlib import Path
from random import Random

import numpy as np
import pytest
from fakefiles import FakeFiles, PowerCut
from hypothesis import given, settings
from hypothesis import strategies as st

from mempool.errors import ConfigError, DataLoss, MempoolError, StorageFailed
from mempool.journal import DiskFiles, Files, Owner, Snapshots

OWNER = Owner("pool-1", 4)
Pages = dict[bytes, dict[str, bytes]]


def _page(name: int, version: int) -> dict[str, bytes]:
    random = Random(f"{name}/{version}")
    return {array: random.randbytes(random.randint(0, 150)) for array in ("values", "sum")[: random.randint(1, 2)]}


def _take(store: Snapshots, after: int, old: Pages, new: Pages) -> None:
    """A snapshot of ``new``; what is as in ``old`` is kept."""
    with store.begin(after=after) as snapshot:
        for key, arrays in new.items():
            if old.get(key) == arrays:
                snapshot.keep(key)
            else:
                snapshot.write(key, [(name, [data[:7], memoryview(data)[7:]]) for name, data in arrays.items()])
        snapshot.finish(f"head of {after}".encode())


def _all(store: Snapshots) -> Pages:
    found = {key: {name: bytes(data) for name, data in arrays.items()} for key, arrays in store.pages()}
    assert store.newest is not None
    assert found.keys() == store.newest.pages.keys()
    assert store.newest.head == f"head of {store.newest.after}".encode()
    return found


def _disk(files: FakeFiles) -> FakeFiles:
    files.make_folder("s")
    return files


def _history(length: int) -> list[Pages]:
    """Pages that come, change, and go."""
    history: list[Pages] = [{b"page-%d" % name: _page(name, 0) for name in range(6)}]
    for version in range(1, length):
        pages = dict(history[-1])
        for name in (version, version + 3):
            pages[b"page-%d" % (name % 8)] = _page(name % 8, version)
        pages.pop(b"page-%d" % (version * 5 % 8), None)
        history.append(pages)
    return history


def _write_all(files: Files, history: list[Pages]) -> None:
    store = Snapshots(files, "s", owner=OWNER)
    for after, (old, new) in enumerate(zip([{}, *history], history, strict=False)):
        _take(store, after, old, new)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.dictionaries(st.integers(0, 7), st.one_of(st.none(), st.integers(0, 3)), max_size=8), min_size=1, max_size=8
    )
)
def test_what_is_read_is_what_was_written_and_old_packs_go(changes: list[dict[int, int | None]]) -> None:
    files = _disk(FakeFiles())
    store, pages = Snapshots(files, "s", owner=OWNER), Pages()
    for after, change in enumerate(changes):
        old, pages = pages, dict(pages)
        for name, version in change.items():
            pages.pop(b"%d" % name, None)
            if version is not None:
                pages[b"%d" % name] = _page(name, version)
        _take(store, after, old, pages)
        assert _all(store) == pages
        store = Snapshots(files, "s", owner=OWNER)
        assert _all(store) == pages
        assert store.newest is not None
        assert list(store.newest.pages) == list(pages)
        used = sum(place.num_bytes for place in store.newest.pages.values())
        assert store.num_bytes <= 2 * used + 64 * len(pages)
        on_disk = [path for path in files.paths() if path.endswith(".pack")]
        assert sum(len(files.content(path)) for path in on_disk) == store.num_bytes
        assert len([path for path in files.paths() if not path.endswith(".pack")]) == 1


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.dictionaries(st.integers(0, 7), st.one_of(st.none(), st.integers(0, 2)), max_size=8), min_size=1, max_size=8
    )
)
def test_pages_that_are_the_same_lie_at_one_place_until_they_are_not(changes: list[dict[int, int | None]]) -> None:
    files = _disk(FakeFiles())
    store, pages = Snapshots(files, "s", owner=OWNER), Pages()
    for after, change in enumerate(changes):
        old, pages = pages, dict(pages)
        for name, version in change.items():
            pages.pop(b"%d" % name, None)
            if version is not None:
                pages[b"%d" % name] = _page(0, version)
        first: dict[str, bytes] = {}
        with store.begin(after=after) as snapshot:
            for key, arrays in pages.items():
                other = first.setdefault(repr(arrays), key)
                if old.get(key) == arrays:
                    snapshot.keep(key)
                elif other != key:
                    snapshot.same(key, other)
                else:
                    snapshot.write(key, [(name, [data]) for name, data in arrays.items()])
            snapshot.finish(f"head of {after}".encode())
        assert _all(store) == pages
        store = Snapshots(files, "s", owner=OWNER)
        assert _all(store) == pages
        assert store.newest is not None
        used = sum(place.num_bytes for place in set(store.newest.pages.values()))
        assert store.num_bytes <= 2 * used + 64 * len(pages)


def test_a_page_is_the_same_as_one_that_is_there(tmp_path: Path) -> None:
    store = Snapshots(DiskFiles(), str(tmp_path), owner=OWNER)
    with store.begin(after=1) as snapshot:
        snapshot.write(b"one", [("values", [b"abc"])])
        with pytest.raises(KeyError):
            snapshot.same(b"two", b"three")
        snapshot.same(b"two", b"one")
        with pytest.raises(ValueError, match="already"):
            snapshot.same(b"two", b"one")
        snapshot.finish(b"head of 1")
    assert _all(store) == {b"one": {"values": b"abc"}, b"two": {"values": b"abc"}}
    assert store.newest is not None
    assert len(set(store.newest.pages.values())) == 1


def test_arrays_of_numpy_come_back_aligned(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    values = random.standard_normal((500, 16), dtype=np.float32)
    halves = random.standard_normal((1, 33)).astype(np.float16)
    store = Snapshots(DiskFiles(), str(tmp_path), owner=OWNER)
    keys = [f"facts/rows/{n}".encode() for n in range(400)]
    with store.begin(after=1) as snapshot:
        for n, key in enumerate(keys):
            rows = values[n : n + 17]
            snapshot.write(key, [("values", [memoryview(rows)]), ("empty", []), ("halves", [memoryview(halves)])])
        snapshot.finish(b"")
    store = Snapshots(DiskFiles(), str(tmp_path), owner=OWNER)
    found = {key: {name: bytes(data) for name, data in arrays.items()} for key, arrays in store.pages()}
    assert list(found) == keys
    for n, key in enumerate(keys):
        assert list(found[key]) == ["values", "empty", "halves"]
        np.testing.assert_array_equal(
            np.frombuffer(found[key]["values"], np.float32).reshape(-1, 16), values[n : n + 17]
        )
        np.testing.assert_array_equal(np.frombuffer(found[key]["halves"], np.float16), halves[0])
        assert len(found[key]["empty"]) == 0
    assert all(place.offset % 64 == 0 for place in store.newest.pages.values()) if store.newest else False


def test_a_crash_at_every_operation_leaves_one_of_them_whole() -> None:
    history = _history(5)
    files = _disk(FakeFiles())
    before = len(files.operations)
    _write_all(files, history)
    num_operations = len(files.operations) - before
    assert num_operations > 60
    for number in range(1, num_operations + 1):
        files = _disk(FakeFiles(number))
        files.cut_power_at(number)
        with pytest.raises(PowerCut):
            _write_all(files, history)
        finished = sum(
            what == "sync_folder" and files.operations[place - 1][0] == "rename"
            for place, (what, _) in enumerate(files.operations[: before + number - 1])
        )
        files.heal()
        files.killed() if number % 3 == 0 else files.power_cut()
        store = Snapshots(files, "s", owner=OWNER)
        after = store.newest.after if store.newest is not None else -1
        assert finished - 1 <= after <= finished, "durable once it was finished, and seldom before"
        pages = _all(store) if store.newest is not None else {}
        assert pages == (history[after] if after >= 0 else {})
        _take(store, 9, pages, history[-1])
        files.power_cut()
        assert _all(Snapshots(files, "s", owner=OWNER)) == history[-1]


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_failure_at_every_operation_leaves_the_old_one(code: int) -> None:
    old, new = _history(2)
    number = 0
    while True:
        number += 1
        files = _disk(FakeFiles(number))
        _write_all(files, [old])
        store = Snapshots(files, "s", owner=OWNER)
        files.fail(number, code)
        try:
            _take(store, 1, old, new)
        except StorageFailed:
            assert store.newest is not None
            if store.newest.after == 0:
                assert _all(store) == old
        if not files._faults:
            assert _all(Snapshots(files.copy(), "s", owner=OWNER)) in (old, new)
        else:
            break
        files.heal()
        store = Snapshots(files, "s", owner=OWNER)
        _take(store, 2, _all(store), new)
        assert len(files.paths()) <= 3
        files.power_cut()
        assert _all(Snapshots(files, "s", owner=OWNER)) == new
    assert number > 10


def test_after_failures_a_crash_in_the_next_try_leaves_one_of_them_whole() -> None:
    old, new = _history(2)
    for seed, (first, failures, cut_at) in enumerate(product(range(1, 16), (1, 2, 5), range(1, 18))):
        files = _disk(FakeFiles(seed))
        _write_all(files, [old])
        store = Snapshots(files, "s", owner=OWNER)
        for number in range(first, first + failures):
            files.fail(number, errno.EIO)
        with suppress(StorageFailed):
            _take(store, 1, old, new)
        files.heal()
        assert store.newest is not None
        files.cut_power_at(cut_at)
        with suppress(PowerCut):
            _take(store, 2, old if store.newest.after == 0 else new, new)
        files.heal()
        files.power_cut()
        assert _all(Snapshots(files, "s", owner=OWNER)) in (old, new)


def test_a_manifest_that_failed_goes_before_its_pack() -> None:
    old, new = _history(2)
    for seed in range(150):
        files = _disk(FakeFiles(seed))
        _write_all(files, [old])
        store = Snapshots(files, "s", owner=OWNER)
        copy = files.copy()
        rehearsed = Snapshots(copy, "s", owner=OWNER)
        copy.operations.clear()
        _take(rehearsed, 1, old, new)
        done = [what for what, _ in copy.operations]
        files.fail(done.index("rename") + 2, errno.EIO)
        with pytest.raises(StorageFailed, match="could not sync_folder"):
            _take(store, 1, old, new)
        files.power_cut()
        assert _all(Snapshots(files, "s", owner=OWNER)) == old


def test_a_snapshot_that_is_left_was_never_there() -> None:
    files = _disk(FakeFiles())
    store = Snapshots(files, "s", owner=OWNER)
    pages = _history(1)[0]
    _take(store, 1, {}, pages)
    before = {path: files.content(path) for path in files.paths()}
    with store.begin(after=2) as snapshot:
        snapshot.write(b"new", [("values", [b"x" * 1000])])
    assert before == {path: files.content(path) for path in files.paths()}
    assert _all(store) == pages


def _outcome(files: FakeFiles) -> Pages | DataLoss:
    try:
        return _all(Snapshots(files, "s", owner=OWNER))
    except DataLoss as error:
        return error


def test_every_flipped_bit_and_every_cut_is_found() -> None:
    files = _disk(FakeFiles())
    tiny: list[Pages] = [
        {b"a": {"values": b"1" * 200}, b"b": {"values": b"2" * 65, "sum": b"3"}},
        {b"a": {"values": b"1" * 200}, b"b": {"values": b"4" * 65, "sum": b""}},
    ]
    _write_all(files, tiny)
    assert len(files.paths()) == 3
    unused = 0
    for path in files.paths():
        content = files.content(path)
        for bit in range(8 * len(content)):
            files.flip(path, bit)
            found = _outcome(files)
            if isinstance(found, DataLoss):
                assert path in str(found)
            else:
                assert found == tiny[-1]
                unused += 1
            files.flip(path, bit)
        for num_bytes in range(len(content)):
            cut = files.copy()
            cut.cut(path, num_bytes)
            found = _outcome(cut)
            assert isinstance(found, DataLoss) or found == tiny[-1]
    assert unused == 8 * (64 + 128 + 64), "page b as it was before, which nobody needs"


def test_what_is_missing_or_anothers_is_named() -> None:
    files = _disk(FakeFiles())
    _write_all(files, _history(2))
    for path in files.paths():
        without = files.copy()
        without.forget(path)
        if path.endswith(".pack"):
            with pytest.raises(DataLoss, match=rf"{path} is missing, and pages lie in it"):
                Snapshots(without, "s", owner=OWNER)
        else:
            assert Snapshots(without, "s", owner=OWNER).newest is None
    for owner, whose in ((Owner("pool-2", 4), "another pool"), (Owner("pool-1", 5), "shard 4")):
        with pytest.raises(ConfigError, match=rf"manifest is of {whose}"):
            Snapshots(files, "s", owner=owner)
    for kind in ("pack", "manifest"):
        renamed = files.copy()
        renamed.rename(next(path for path in files.paths() if path.endswith(kind)), f"s/000000000009.{kind}")
        with pytest.raises(MempoolError):
            Snapshots(renamed, "s", owner=OWNER)


def test_wrong_pages_are_refused() -> None:
    store = Snapshots(_disk(FakeFiles()), "s", owner=OWNER)
    with store.begin(after=0) as snapshot:
        snapshot.write(b"a", [("values", [b"x"])])
        with pytest.raises(ValueError, match=r"page b'a' is in this snapshot already"):
            snapshot.write(b"a", [])
        with pytest.raises(KeyError):
            snapshot.keep(b"b")
        for key, name in ((b"", "x"), (b"k" * 2000, "x"), (b"c", ""), (b"c", "n" * 2000)):
            with pytest.raises(ValueError, match="1 to 1,024 bytes"):
                snapshot.write(key, [(name, [b""])])
