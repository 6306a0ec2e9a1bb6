"""What a ``kill -9`` of the process that uses a folder would leave of it, while that process lives and writes."""

import filecmp
import shutil
import time
from pathlib import Path

BOUND_S = 20.0


def left_by_a_kill(folder: Path, to: Path) -> Path:
    """Copies a folder as it was at one moment; answers ``to``, which is replaced.

    A copy reads one file after the other, so that a later file may name what an earlier one lacked when it was read: a
    folder that no kill leaves. A copy counts once every file was found unchanged after the last was copied: between the
    two all were as they were copied.
    """
    end_s = time.monotonic() + BOUND_S
    while True:
        shutil.rmtree(to, ignore_errors=True)
        try:
            shutil.copytree(folder, to, symlinks=True)
            if _same(folder, to):
                return to
        except (shutil.Error, FileNotFoundError):  # a file that went while it was read
            pass
        assert time.monotonic() < end_s, f"{folder} never stood still for long enough to be copied"


def _same(folder: Path, other: Path) -> bool:
    filecmp.clear_cache()  # it takes files of one size and time for the same
    names = [sorted(path.relative_to(of) for path in of.rglob("*")) for of in (folder, other)]
    files = [name for name in names[0] if (folder / name).is_file()]
    return names[0] == names[1] and all(filecmp.cmp(folder / name, other / name, shallow=False) for name in files)
