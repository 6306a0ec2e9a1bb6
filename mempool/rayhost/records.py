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


def state_folder() -> Path:
    """Where records and logs of this user are; made if missing. Raises ConfigError where that cannot be."""
    path = _folder()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot make {path} ({error.strerror}), where `mempool up` writes down what it started; set "
            "XDG_STATE_HOME to a folder of yours"
        ) from None
    return path


def write_record(record: PoolRecord) -> None:
    """Write a record down in one step, over an older one of the same pool. Raises ConfigError."""
    path = state_folder() / record_path(record.name).name
    fields = {
        "name": record.name,
        "address": record.address,
        "ray_address": record.ray_address,
        "ray_pid": record.ray_pid,
        "config": record.config.model_dump(mode="json"),
    }
    aside = path.with_suffix(f".{os.getpid()}")
    aside.write_text(json.dumps(fields, indent=2) + "\n")
    aside.replace(path)


def read_record(pool: str) -> PoolRecord | None:
    """The record of a pool; None where there is none that can be read."""
    path = record_path(pool)
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
    names = sorted(path.stem for path in _folder().glob("*.json"))
    return [record for name in names if (record := read_record(name)) is not None]


def forget_record(pool: str) -> None:
    """Remove a record; none is no error."""
    record_path(pool).unlink(missing_ok=True)


def hand_over_ray(record: PoolRecord, heir: str) -> bool:
    """Let another pool's `down` end the Ray that was started for this one. Returns whether that pool has a record."""
    other = read_record(heir)
    if other is None:
        return False
    write_record(replace(other, ray_pid=record.ray_pid))
    return True


def record_path(pool: str) -> Path:
    """Where the record of a pool is, or would be."""
    return _folder() / f"{pool}.json"


def _folder() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "mempool"
