"""The embedded pool on a disk: closed or killed and opened again it is what it was, bit for bit."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from durable_trainer import contents, differences, open_tables, train
from torch import Tensor

import mempool
from mempool import errors

LAST = 14
_TRAINER = Path(__file__).parents[2] / "support" / "durable_trainer.py"


Lives = dict[int, list[dict[str, Tensor]]]
"""By number of shards, what a pool that never dies holds after each step; by less than 0, when it has written rows."""


@pytest.fixture(scope="module")
def lives() -> Lives:
    return {}


def never_died(lives: Lives, shards: int) -> list[dict[str, Tensor]]:
    if shards not in lives:
        with mempool.local(shards=shards) as pool:
            tables = open_tables(pool)
            behind, written = lives[shards], lives[-shards] = [contents(tables)], []
            for step in range(1, LAST + 1):
                train(tables, step, on_written=lambda: written.append(contents(tables)))  # noqa: B023
                written += behind[len(written) :]  # where none are written
                behind.append(contents(tables))
    return lives[shards]


@contextmanager
def trainer(path: Path, *, shards: int, first: int = 1, last: int = LAST) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, str(_TRAINER), str(path), str(shards), str(first), str(last)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=30)


@pytest.mark.parametrize("shards", [1, 2])
def test_closed_and_opened_it_goes_on(tmp_path: Path, lives: Lives, shards: int) -> None:
    expected = never_died(lives, shards)
    done = 0
    for end in (5, 6, LAST):
        with mempool.local(tmp_path, shards=shards) as pool:
            tables = open_tables(pool)
            assert differences(contents(tables), expected[done]) == []
            for step in range(done + 1, end + 1):
                train(tables, step)
            done = end
    with mempool.local(tmp_path) as pool:
        assert differences(contents(open_tables(pool)), expected[done]) == []
        assert len(pool.status().shards) == shards


@pytest.mark.parametrize(("shards", "after"), [(1, 3), (1, 10), (2, 7)])
def test_killed_and_opened_it_has_what_was_acknowledged(tmp_path: Path, lives: Lives, shards: int, after: int) -> None:
    expected = never_died(lives, shards)
    with trainer(tmp_path, shards=shards) as process:
        assert process.stdout is not None
        said = ""
        while said != str(after):
            said = process.stdout.readline().strip()
    with mempool.local(tmp_path) as pool:
        tables = open_tables(pool)
        found = contents(tables)
        # The step that was under way is there, or not, as a whole; before it rows may have been written.
        written = [*lives[-shards], expected[LAST]]
        done = next(
            (
                step
                for step in range(after, LAST + 1)
                if not differences(found, expected[step]) or not differences(found, written[step])
            ),
            None,
        )
        assert done is not None, differences(found, expected[after])
        for step in range(done + 1, LAST + 1):
            train(tables, step)
        assert differences(contents(tables), expected[LAST]) == []


def test_another_process_is_kept_out_and_told_whose_it_is(tmp_path: Path) -> None:
    with trainer(tmp_path, shards=1, last=0) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "ready"
        with pytest.raises(errors.StorageFailed, match=f"process {process.pid} "):
            mempool.local(tmp_path)


def test_another_number_of_shards_is_refused(tmp_path: Path) -> None:
    with mempool.local(tmp_path, shards=2):
        pass
    with pytest.raises(errors.ConfigError, match="has 2 shards, and is to be opened with 3"):
        mempool.local(tmp_path, shards=3)
    with mempool.local(tmp_path) as pool:
        assert len(pool.status().shards) == 2


def test_what_is_no_pool_is_refused_and_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(errors.StorageFailed, match="file"):
        mempool.local(file)
    assert file.read_text() == "mine"
    said = tmp_path / "pools" / "local" / "pool.json"
    said.parent.mkdir(parents=True)
    for text, error in (
        ('{"version": 2, "pool_id": "x", "shards": 1}', errors.ConfigError),
        ('{"version": 1}', errors.DataLoss),
        ("{", errors.DataLoss),
    ):
        said.write_text(text)
        for _ in range(2):  # the lock is free again
            with pytest.raises(error, match=str(said)):
                mempool.local(tmp_path / "pools")
        assert said.read_text() == text


def test_a_rescale_is_kept(tmp_path: Path) -> None:
    with mempool.local(tmp_path) as pool:
        table = open_tables(pool, ["adam"])[0]
        train([table], 1)
        pool.rescale(3)
        train([table], 2)
        found = contents([table])
    with mempool.local(tmp_path) as pool:
        assert len(pool.status().shards) == 3
        tables = open_tables(pool, ["adam"])
        assert differences(contents(tables), found) == []
        pool.rescale(1)
        assert differences(contents(tables), found) == []
    (tmp_path / "local" / "shard-1.gone" / "journal").mkdir(parents=True)  # as where a process dies at it
    (tmp_path / "local" / "shard-1.gone" / "journal" / "000000000002.segment").write_bytes(b"half")
    with mempool.local(tmp_path) as pool:
        assert len(pool.status().shards) == 1
        assert differences(contents(open_tables(pool, ["adam"])), found) == []
    assert sorted(path.name for path in (tmp_path / "local").glob("shard-*")) == ["shard-0"]


def test_a_path_is_a_users_and_one_that_is_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with (
        mempool.local("~/kept"),
        pytest.raises(errors.StorageFailed, match=r"that is this process.*pool\.close\(\)"),
    ):
        mempool.local(tmp_path / "kept")
    for path in ("", b"kept", 7):
        with pytest.raises(errors.ConfigError, match="give a folder's path"):
            mempool.local(path)  # type: ignore[arg-type]
