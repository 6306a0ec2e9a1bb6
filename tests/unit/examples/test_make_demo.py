"""`make demo` as a whole: who ends make ends what it started."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
BOUND_S = 30.0
# Stands for all of the environment: what `make demo` runs at last says who it is, and waits.
PYTHON = """#!/bin/sh
case "$*" in
*compile_kernels.py*) echo $$ > compiling.new && mv compiling.new compiling && exec sleep 60 ;;
*demo.py*) echo $$ > training.new && mv training.new training && exec sleep 60 ;;
esac
"""


def until(true: Callable[[], bool]) -> bool:
    end_s = time.monotonic() + BOUND_S
    while not true() and time.monotonic() < end_s:
        time.sleep(0.02)
    return true()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def making(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    shutil.copy(ROOT / "Makefile", tmp_path)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)
    for number, name in enumerate(("pyproject.toml", "constraints.txt", ".venv/.kernels-ready", ".venv/.demo-ready")):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (number, number))  # all is installed
    names = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    process = subprocess.Popen(
        ["make", "demo"],
        cwd=tmp_path,
        env=names,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which whoever runs in the background ignores
    )
    yield process
    if process.poll() is None:
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_it_started_ends_with_make(
    making: subprocess.Popen[bytes], tmp_path: Path, number: signal.Signals
) -> None:
    assert until(lambda: (tmp_path / "compiling").exists() and (tmp_path / "training").exists())
    started = [int((tmp_path / name).read_text()) for name in ("compiling", "training")]
    try:
        if number == signal.SIGINT:  # as a terminal does, to all but make's shells, which ignore it
            for pid in started:
                os.kill(pid, number)
        making.send_signal(number)
        assert until(lambda: not any(is_alive(pid) for pid in started))
        assert making.wait(BOUND_S) != 0
    finally:
        for pid in started:
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)
