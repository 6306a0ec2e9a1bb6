"""What an earlier version wrote is read for ever: a folder of each version of the format is kept."""

import shutil
from pathlib import Path

import pytest
from byhand import ByHand
from golden_storage import GOLDEN, PAGES, RECORDS, open_folder, write

from mempool.journal import DiskFiles, Journal, Snapshots

VERSIONS = sorted(GOLDEN.glob("storage-*"))


def _contents(path: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in path.rglob("*")
        if file.is_file() and file.name != "LOCK"
    }


@pytest.mark.parametrize("golden", VERSIONS, ids=lambda path: path.name)
def test_a_folder_of_this_version_is_read(golden: Path, tmp_path: Path) -> None:
    shutil.copytree(golden, tmp_path, dirs_exist_ok=True)
    with open_folder(DiskFiles(), str(tmp_path)) as folder:
        assert not folder.is_new
        snapshots = Snapshots(folder.files, folder.snapshots, owner=folder.owner)
        assert snapshots.newest is not None
        assert (snapshots.newest.after, snapshots.newest.head) == (4, b'{"tables": 1}')
        assert {key: {name: bytes(data) for name, data in arrays.items()} for key, arrays in snapshots.pages()} == PAGES
        journal = Journal(folder.files, folder.journal, owner=folder.owner, runner=ByHand(), after=4)
        assert journal.torn is None
        found = [(record.number, record.kind, bytes(record.payload)) for record in journal.records(after=4)]
        assert found == [(number, *RECORDS[number - 1]) for number in range(5, 12)]


def test_the_newest_version_is_what_is_written(tmp_path: Path) -> None:
    write(str(tmp_path))
    assert len(VERSIONS) == 1
    assert _contents(tmp_path) == _contents(VERSIONS[-1])
