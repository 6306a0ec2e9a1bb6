"""What `up` writes down about a pool for later commands of this user: one JSON file a pool, in the user's state folder.

Leaves to others what is true by now: a record may outlive its pool.
"""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

from mempool.config import ClusterConfig
from mempool.config.cluster import RECORDED
from mempool.errors import ConfigError
from mempool.rayhost.folders import require_room, state_folder, state_place

_RECORD_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolRecord:
    """A pool that was started here.

    Attributes:
        address: Where clients attach.
        ray_address: The Ray it runs on.
        ray_pid: The Ray that `up` started for it; None where it joined one.
        config: What it was last given.
    """

    name: str
    address: str
    ray_address: str
    ray_pid: int | None
    config: ClusterConfig


def write_record(record: PoolRecord) -> None:
    """Write a record down in one step, over an older one of the same pool. Raises ConfigError."""
    folder = state_folder()
    fields = {
        "name": record.name,
        "address": record.address,
        "ray_address": record.ray_address,
        "ray_pid": record.ray_pid,
        "config": record.config.model_dump(mode="json"),
    }
    aside = folder / f"{record.name}.{os.getpid()}"
    try:
        with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(json.dumps(fields, indent=2) + "\n")
        aside.replace(folder / f"{record.name}.json")
    except OSError as error:
        aside.unlink(missing_ok=True)
        require_room(folder, _RECORD_BYTES)
        raise ConfigError(f"cannot write the record of pool {record.name!r} in {folder}: {error.strerror}") from None


def read_record(pool: str) -> PoolRecord | None:
    """The record of a pool; None where there is none that can be read."""
    path = record_path(pool)
    if path is None:
        return None
    try:
        fields = json.loads(path.read_text())
        config = ClusterConfig.model_validate(fields["config"], context={RECORDED: True})
        return PoolRecord(**{**fields, "config": config})
    except OSError:
        return None
    except (ValueError, KeyError, TypeError):  # of another version of mempool: as good as none
        return None


def read_records() -> list[PoolRecord]:
    """Every record, by name."""
    folder = state_place()
    if folder is None:
        return []
    try:
        names = sorted(path.stem for path in folder.glob("*.json"))
    except OSError:
        return []
    return [record for name in names if (record := read_record(name)) is not None]


def forget_record(pool: str) -> None:
    """Remove a record; none is no error. Raises ConfigError."""
    path = record_path(pool)
    try:
        if path is not None:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot delete {path}, the record of pool {pool!r}: {error.strerror}") from None


def hand_over_ray(record: PoolRecord, heir: str) -> bool:
    """Let another pool's `down` end the Ray that was started for this one. Returns whether that pool has a record."""
    other = read_record(heir)
    if other is None:
        return False
    write_record(replace(other, ray_pid=record.ray_pid))
    return True


def record_path(pool: str) -> Path | None:
    """Where the record of a pool is, or would be; None where this user has no place for one."""
    folder = state_place()
    return None if folder is None else folder / f"{pool}.json"
