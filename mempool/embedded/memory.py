"""Where an embedded pool lies on a disk: ``<path>/<pool>/pool.json``, locked while a process uses it."""

from __future__ import annotations

import json
import os
import re
import socket
import uuid
from contextlib import closing
from typing import TYPE_CHECKING

from mempool.errors import ConfigError, DataLoss, StorageFailed

if TYPE_CHECKING:
    from mempool.journal import Files
    from mempool.shard.durable.store import Store

_VERSION = 1
_NAME = "pool.json"
_FORMAT = "format.json"
_NEW = ".new"
_MOST_BYTES = 65_536
_SHARD = re.compile(r"shard-(\d{1,6})")
_GONE = ".gone"
"""What a shard kept that is needed no more, on its way to be removed: of such a folder nothing is read any more."""


class PoolFolder:
    """The folder of a pool: what it is called, and how many shards it is meant to have.

    Attributes:
        is_new: There was no pool.
        pool_id: What tells it from another one of the same name.
        wanted: How many shards it is meant to have; 0 for a new one.

    Args:
        path: Where pools lie; made where it is missing.
        pool: The pool's name.

    Raises:
        ConfigError: The name cannot be a folder's, it is of a newer format, or the path is within a pool's folder.
            Nothing was changed.
        DataLoss: What says which pool it is is damaged, or missing. Nothing was changed.
        StorageFailed: It is no folder, cannot be written, or another process, which is named, uses it.
    """

    def __init__(self, path: str, pool: str, *, files: Files | None = None) -> None:
        from mempool.journal import DiskFiles
        from mempool.journal.folder import shard_path

        self.path, self.pool = path, pool
        self._files = files = DiskFiles() if files is None else files
        self._folder = os.path.dirname(shard_path(path, pool, 0))
        _require_outside(path, files)
        files.make_folder(self._folder)
        owner = f"process {os.getpid()} on {socket.gethostname()}"
        self._lock = files.lock(os.path.join(self._folder, "LOCK"), owner=owner)
        try:
            names = files.names(self._folder)
            self.is_new = _NAME not in names
            if self.is_new and (left := next((name for name in names if _SHARD.fullmatch(name)), None)):
                raise DataLoss(
                    f"{os.path.join(self._folder, _NAME)} is missing, which says whose {left} beside it is, and how "
                    "many shards there are. Restore that file from a copy (its pool_id stands in each shard's "
                    "format.json), or give another path. Nothing was changed."
                )
            self.pool_id, self.wanted = (uuid.uuid4().hex, 0) if self.is_new else self._read()
            for name in files.names(self._folder):
                if name.endswith(_GONE):
                    self._clear(os.path.join(self._folder, name))
        except BaseException:
            self._lock.release()
            raise

    @property
    def kept(self) -> tuple[int, ...]:
        """The shards that have a folder here, ascending."""
        found = (_SHARD.fullmatch(name) for name in self._files.names(self._folder))
        return tuple(sorted(int(match[1]) for match in found if match))

    @property
    def shards(self) -> tuple[int, ...]:
        """Those that have a folder here, or are meant to be, ascending."""
        return tuple(sorted({*self.kept, *range(self.wanted)}))

    def keep_wanted(self, shards: int) -> None:
        """How many shards the pool is meant to have, durably."""
        said = {"version": _VERSION, "pool_id": self.pool_id, "shards": shards}
        name = os.path.join(self._folder, _NAME)
        with closing(self._files.open(name + _NEW, new=True)) as file:
            file.write([json.dumps(said, indent=2).encode() + b"\n"], 0)
            file.sync()
        self._files.rename(name + _NEW, name)
        self._files.sync_folder(self._folder)
        self.wanted = shards

    def store(self, shard: int, *, fresh: bool = False) -> Store:
        """Open what a shard keeps; fresh: what one of that number kept is removed before. Raises as ``Store`` does."""
        from mempool.shard.durable.store import Store

        if fresh and f"shard-{shard}" in self._files.names(self._folder):
            self.remove(shard)
        return Store(self.path, pool=self.pool, pool_id=self.pool_id, shard=shard, files=self._files)

    def remove(self, shard: int) -> None:
        """Remove what a shard kept, which is closed and owns nothing. Later lives see all of it, or nothing."""
        folder = os.path.join(self._folder, f"shard-{shard}")
        self._clear(folder + _GONE)  # what a removal that failed has left
        self._files.rename(folder, folder + _GONE)
        self._files.sync_folder(self._folder)
        self._clear(folder + _GONE)

    def _clear(self, folder: str) -> None:
        from mempool.journal.files import storage_failed

        for inner in ("snapshots", "journal", ""):
            place = os.path.join(folder, inner)
            if not os.path.isdir(place):  # a process died at this
                continue
            for name in self._files.names(place):
                if not os.path.isdir(os.path.join(place, name)):
                    self._files.remove(os.path.join(place, name))
            try:
                os.rmdir(place)
            except OSError as error:
                raise storage_failed(error, place, "remove") from error
        self._files.sync_folder(self._folder)

    def close(self) -> None:
        """Let it go. Idempotent."""
        self._lock.release()

    def _read(self) -> tuple[str, int]:
        name = os.path.join(self._folder, _NAME)
        with closing(self._files.open(name)) as file:
            data = file.read(0, _MOST_BYTES)
        try:
            said = json.loads(data)
            version = int(said["version"])
            if version <= _VERSION:
                return str(said["pool_id"]), int(said["shards"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataLoss(
                f"{name} is damaged ({type(error).__name__}: {error}): it says which pool this is. Its pool_id stands "
                "in shard-0/format.json, too. Nothing was changed."
            ) from None
        raise ConfigError(
            f"{name} is of format {version}, and this version of mempool reads those up to {_VERSION}: take a later "
            "one. Nothing was changed."
        )


def _require_outside(path: str, files: Files) -> None:
    """Raises ConfigError where a path is a pool's own folder, or a shard's in it: a new pool would begin there."""
    try:
        names = files.names(path)
    except StorageFailed:
        return  # what is wrong with it is said where the folder is made
    above = os.path.dirname(os.path.abspath(path))
    if _FORMAT in names:
        raise ConfigError(f"{path} is what one shard of a pool keeps: give {os.path.dirname(above)}")
    if _NAME in names:
        raise ConfigError(f"{path} is the folder of a pool, and is found by the one it lies in: give {above}")
