"""The folder of one shard on a disk: whose it is, and that nobody else uses it. What lies in it is for others."""

import json
import os
import socket
import time
from collections.abc import Callable
from contextlib import closing
from types import TracebackType

from mempool.errors import ConfigError, DataLoss
from mempool.journal.files import Files, join
from mempool.journal.reading import NEW
from mempool.journal.records import VERSION, Owner, check_version
from mempool.types.schema_checks import NAME

JOURNAL = "journal"
SNAPSHOTS = "snapshots"
FORMAT_NAME = "format.json"
LOCK_NAME = "LOCK"
_MOST_FORMAT_BYTES = 65_536


class ShardFolder:
    """``<path>/<pool>/shard-<n>/``, locked until it is closed.

    Attributes:
        path: Where it is.
        journal: The folder of its journal, which is there.
        snapshots: The folder of its snapshots, which is there.
        owner: Whose it is.
        created: When it was made, in seconds since 1970.
        is_new: It was made just now.

    Args:
        path: shard.storage.path; made where it is missing.
        pool: The pool's name.
        pool_id: What tells this pool from another one of the same name.
        wall: Seconds since 1970.

    Raises:
        ConfigError: The names cannot be a folder's; or the folder is another pool's or shard's, or of a newer format.
            Nothing was changed.
        DataLoss: There is no saying whose it is.
        StorageFailed: It is no folder, cannot be written, or is locked by another process.
    """

    def __init__(
        self, files: Files, path: str, *, pool: str, pool_id: str, shard: int, wall: Callable[[], float] = time.time
    ) -> None:
        self.files = files
        self.owner = Owner(pool_id, shard)
        self.path = shard_path(path, pool, shard)
        check_id(pool_id)
        self._lock = None
        files.make_folder(self.path)
        lock = files.lock(join(self.path, LOCK_NAME), owner=f"process {os.getpid()} on {socket.gethostname()}")
        try:
            self.is_new = FORMAT_NAME not in files.names(self.path)
            if self.is_new:
                self.created = wall()
                self._make(path, pool)
            else:
                self.created = self._check()
            self.journal, self.snapshots = (join(self.path, name) for name in (JOURNAL, SNAPSHOTS))
            for folder in (self.journal, self.snapshots):
                files.make_folder(folder)
        except BaseException:
            lock.release()
            raise
        self._lock = lock

    def __enter__(self) -> "ShardFolder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Unlock it. Idempotent."""
        if self._lock is not None:
            self._lock.release()

    def _make(self, path: str, pool: str) -> None:
        if strange := sorted({JOURNAL, SNAPSHOTS} & set(self.files.names(self.path))):
            raise DataLoss(
                f"{join(self.path, FORMAT_NAME)} is missing, which says whose {' and '.join(strange)} beside it is. "
                "Restore that file from a copy, or set another path (shard.storage.path, or mempool.local's). "
                "Nothing was changed."
            )
        said = {
            "version": VERSION,
            "pool_id": self.owner.pool_id,
            "shard": self.owner.shard,
            "created": self.created,
        }
        name = join(self.path, FORMAT_NAME)
        with closing(self.files.open(name + NEW, new=True)) as file:
            file.write([json.dumps(said, indent=2).encode() + b"\n"], 0)
            file.sync()
        self.files.rename(name + NEW, name)
        # Whoever made the folders above may have died before they were durable.
        for folder in (self.path, join(path, pool), path):
            self.files.sync_folder(folder)

    def _check(self) -> float:
        name = join(self.path, FORMAT_NAME)
        with closing(self.files.open(name)) as file:
            data = file.read(0, _MOST_FORMAT_BYTES)
        try:
            said = json.loads(data)
            version, pool_id, shard, created = said["version"], said["pool_id"], said["shard"], float(said["created"])
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, KeyError) and isinstance(said.get("version"), int):
                check_version(said["version"], name)
            raise DataLoss(
                f"{name} is damaged ({type(error).__name__}: {error}): it says whose this folder is. "
                "Restore it from a copy, or give another path (shard.storage.path, or mempool.local's). "
                "Nothing was changed."
            ) from None
        check_version(version, name)
        if (pool_id, shard) != (self.owner.pool_id, self.owner.shard):
            raise ConfigError(
                f"{name} says that this is shard {shard!r} of the pool with id {pool_id!r}, and shard "
                f"{self.owner.shard} of the pool with id {self.owner.pool_id!r} is to use it. Give this pool another "
                "name, or another path (shard.storage.path, or mempool.local's). Nothing was changed."
            )
        return created


def shard_path(path: str, pool: str, shard: int) -> str:
    """Where a shard's folder is.

    Raises:
        ConfigError: The names cannot be a folder's.
    """
    if not path or "\0" in path:
        raise ConfigError(f"shard.storage.path = {path!r} is no path")
    if not NAME.fullmatch(pool):
        raise ConfigError(
            f"a pool called {pool!r} cannot have storage: its folder is called so. Take a letter, and then at most 62 "
            "letters, digits and _ . -"
        )
    if shard < 0:
        raise ConfigError(f"there is no shard {shard}")
    return join(path, pool, f"shard-{shard}")


def check_id(pool_id: str) -> None:
    """Raises ConfigError where it is no pool's id."""
    if not 0 < len(pool_id) <= 256:
        raise ConfigError(f"a pool's id has 1 to 256 characters, and not {len(pool_id)}")
