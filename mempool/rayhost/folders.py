"""Folders that `up` writes to: the user's state (records, logs) and what a Ray of ours needs as it runs.

Leaves to others what is in them.
"""

import os
import stat
import tempfile
from pathlib import Path

from mempool.errors import ConfigError

STATE_VARIABLE = "MEMPOOL_STATE"
RAY_FOLDER_VARIABLE = "RAY_TMPDIR"  # Ray's own

# Ray makes sockets some 65 characters below its folder, and the system takes 107 for one.
_MAX_FOLDER_LENGTH = 40


def state_place() -> Path | None:
    """Where records and logs of this user would be; None where the system knows no home of theirs."""
    if own := os.environ.get(STATE_VARIABLE):
        return Path(own)
    if state := os.environ.get("XDG_STATE_HOME"):
        return Path(state) / "mempool"
    home = home_folder()
    return None if home is None else home / ".local" / "state" / "mempool"


def state_folder() -> Path:
    """Where records and logs of this user are; made if missing. Raises ConfigError where that cannot be."""
    path = state_place()
    advice = f"set {STATE_VARIABLE} or XDG_STATE_HOME to a folder of yours"
    if path is None:
        raise ConfigError(
            f"user {os.getuid()} has no home (no HOME), and `mempool up` has to write down what it started; {advice}"
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
        reason = None if os.access(path, os.W_OK | os.X_OK) else "no right to write there"
    except OSError as error:
        reason = error.strerror
    if reason is not None:
        raise ConfigError(
            f"cannot use {path} ({reason}), where `mempool up` writes down what it started; {advice}"
        ) from None
    return path


def home_folder() -> Path | None:
    """The user's home; None where there is none, as for a container's user without a passwd entry."""
    try:
        home = Path.home()
    except RuntimeError:
        return None
    return home if home.is_absolute() else None


def ray_place() -> Path:
    """Where a Ray that is started here keeps sockets and logs: RAY_TMPDIR, or a folder of this user's alone.

    Ray's own default belongs to the first user of the host who ran it.
    """
    if own := os.environ.get(RAY_FOLDER_VARIABLE):
        return Path(own)
    own = f"mempool-{os.getuid()}"
    path = Path(tempfile.gettempdir()) / own / "ray"
    return path if len(str(path)) <= _MAX_FOLDER_LENGTH else Path("/tmp") / own / "ray"


def ray_folder() -> Path:
    """``ray_place``, made if missing, and nobody else's. Raises ConfigError where that cannot be."""
    path = ray_place()
    advice = f"set {RAY_FOLDER_VARIABLE} to a folder of yours, with a short name"
    # Ray opens its folder to everybody, so what keeps others out is the one above; and in a folder that all may write
    # to, anybody could have put that there.
    above = None if os.environ.get(RAY_FOLDER_VARIABLE) else path.parent
    try:
        if above is not None:
            above.mkdir(mode=0o700, exist_ok=True)
            found = above.lstat()
            own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
            if not own:
                raise ConfigError(f"{above} is not this user's own folder, and Ray would run what lies there; {advice}")
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot use {path} ({error.strerror}), which Ray needs; {advice}") from None
    return path


def room_problem(folder: Path, needed_bytes: int) -> str | None:
    """What is wrong with the disk under a folder; None where it has room."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return None
    free = found.f_bavail * found.f_frsize
    if free < needed_bytes:
        return f"no space left on device: {folder} has {free:,} bytes free, and {needed_bytes:,} are needed"
    if found.f_files and not found.f_favail:
        return f"no space left on device: {folder} can hold no more files"
    return None


def require_room(folder: Path, needed_bytes: int) -> None:
    """Raises ConfigError where a disk is full: much fails then, and little of it says why."""
    problem = room_problem(folder, needed_bytes)
    if problem is not None:
        raise ConfigError(f"{problem}. Make room there, or set {STATE_VARIABLE} and {RAY_FOLDER_VARIABLE} elsewhere")
