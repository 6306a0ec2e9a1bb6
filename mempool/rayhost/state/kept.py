"""What a pool on Ray has in its shards' folders besides what the shards themselves keep: how many shards it is meant to
have. What lies there, for who looks for them; and the end of such a folder.
"""

import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from mempool.errors import StorageFailed
from mempool.journal import DiskFiles
from mempool.journal.folder import FORMAT_NAME, LOCK_NAME, shard_path

_LOG = logging.getLogger("mempool.rayhost")
_NAME = "wanted.json"
_NEW = ".new"
_GONE = "gone-"
_MOST_BYTES = 4096
_TRIES = 100
"""To remove a folder that others remove, too: each try removes at least what it finds before they do."""


@dataclass(frozen=True, slots=True, order=True)
class Wanted:
    """How many shards a pool is meant to have; the one with the highest ``number`` was asked for last."""

    number: int
    shards: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptFolder:
    """A shard's folder, as a process of this machine sees it.

    Attributes:
        mark: What tells it from every other folder, on whatever machine it is looked at.
        changed_ns: When a file of it was changed last, nanoseconds since 1970.
        wanted: What it was given to keep.
    """

    mark: str
    changed_ns: int
    wanted: Wanted | None = None


def read_wanted(path: str, pool: str, shard: int) -> Wanted | None:
    """What lies in a shard's folder; None for nothing. Others have it, too: one that is damaged is passed over."""
    name = Path(shard_path(path, pool, shard), _NAME)
    try:
        said = json.loads(name.read_bytes()[:_MOST_BYTES])
        return Wanted(int(said["number"]), int(said["shards"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        _LOG.warning("%s cannot be read, and is passed over: %r", name, error)
        return None


def write_wanted(path: str, pool: str, shard: int, wanted: Wanted) -> None:
    """Write it durably into a shard's folder, which is there. Raises StorageFailed."""
    files, folder = DiskFiles(), shard_path(path, pool, shard)
    name = os.path.join(folder, _NAME)
    with closing(files.open(name + _NEW, new=True)) as file:
        file.write([json.dumps({"number": wanted.number, "shards": wanted.shards}).encode() + b"\n"], 0)
        file.sync()
    files.rename(name + _NEW, name)
    files.sync_folder(folder)


def remove_kept(path: str, pool: str, shard: int) -> bool:
    """Remove all that a shard has kept here; no error where there is nothing. Any later process sees all of it, or
    nothing.

    Returns:
        Whether there was anything.

    Raises:
        StorageFailed: A process uses it, or it cannot be removed.
    """
    files, folder = DiskFiles(), shard_path(path, pool, shard)
    for left in Path(path, pool).glob(f"{_GONE}*"):  # a process died at this
        shutil.rmtree(left, ignore_errors=True)
    if not os.path.isdir(folder):
        return False
    lock = files.lock(os.path.join(folder, LOCK_NAME), owner=f"process {os.getpid()}, which removes it")
    try:
        gone = os.path.join(path, pool, f"{_GONE}{uuid.uuid4().hex}")
        files.rename(folder, gone)
        files.sync_folder(os.path.join(path, pool))
    finally:
        lock.release()
    for _ in range(_TRIES):
        try:
            shutil.rmtree(gone)
            break
        except FileNotFoundError:  # another shard of this host clears it too
            if not os.path.isdir(gone):
                break
        except OSError as error:
            raise StorageFailed(f"{gone} is needed no more, and cannot be removed: {error}") from error
    return True


def drop_kept(path: str, pool: str, *, say: Callable[[str], None]) -> None:
    """Remove all that shards of a pool have kept on this machine, and say so. Raises StorageFailed as above."""
    shards = kept_shards(path, pool)
    for shard in shards:
        remove_kept(path, pool, shard)
    with suppress(OSError):  # it is not empty, or was never there
        os.rmdir(os.path.join(path, pool))
    if shards:
        say(f"removed what {len(shards)} shard(s) had kept in {os.path.join(path, pool)} on this machine")


def kept_shards(path: str, pool: str) -> tuple[int, ...]:
    """The shards that have a folder on this machine, ascending."""
    found = (folder.name.removeprefix("shard-") for folder in Path(path, pool).glob("shard-*"))
    return tuple(sorted(int(number) for number in found if number.isdecimal()))


def kept_folders(path: str, pool: str) -> dict[int, KeptFolder]:
    """The folders of a pool's shards on this machine, by shard. Reads no journal, and nothing of it fails: what cannot
    be looked at is not there."""
    found = {}
    for shard in kept_shards(path, pool):
        with suppress(OSError):
            folder = Path(shard_path(path, pool, shard))
            said = folder / FORMAT_NAME  # it is written once, and says when
            number = said.stat().st_ino
            mark = f"{number} {said.read_bytes()[:_MOST_BYTES].hex()}"
            changed_ns = max(_changed_ns(file) for file in folder.rglob("*"))
            found[shard] = KeptFolder(mark=mark, changed_ns=changed_ns, wanted=read_wanted(path, pool, shard))
    return found


def _changed_ns(file: Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except OSError:  # its shard has removed it meanwhile
        return 0
