"""What a command loads: help, reading commands and what is wrong with a file need neither torch nor Ray."""

import subprocess
import sys
from pathlib import Path

import pytest

from mempool.wire.channels.loop import run
from tests.support.serving import ServedPool

from .conftest import Command

# Runs a command in a process of its own and says on the last line of stderr what heavy things it loaded.
PROGRAM = """
import sys
from mempool.cli import main
sys.argv = ["mempool", *sys.argv[1:]]
try:
    main()
finally:
    heavy = {"torch", "numba", "llvmlite", "triton", "ray"} & set(sys.modules)
    print("loaded:", *sorted(heavy), file=sys.stderr)
"""


def loaded(*arguments: object, expect: int = 0) -> "subprocess.CompletedProcess[str]":
    """A command that has ended, having loaded nothing heavy."""
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == expect, done.stderr
    assert done.stderr.splitlines()[-1] == "loaded:"
    return done


@pytest.mark.parametrize("arguments", [["--help"], ["status", "--help"], ["bench", "kernels", "--help"], ["--version"]])
def test_help(arguments: list[str]) -> None:
    loaded(*arguments)


@pytest.mark.parametrize("command", ["up", "status", "apply", "scale", "down"])
def test_what_is_wrong_with_a_file(command: str, tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text("pool: {name: wrong, shards: 2}\ntables:\n  - {name: t, num_slots: 5, value_dim: 8, layout: x}\n")
    options = ["--shards", "3"] if command == "scale" else []
    assert "tables[0].layout" in loaded(command, "-f", file, *options, expect=1).stderr


@pytest.mark.usefixtures("command")  # a state folder of its own
def test_reading_commands(served: ServedPool, file: Path) -> None:
    run(served.controller.tables(), timeout_s=10)
    loaded("status", "-f", file)
    loaded("status", "--address", served.address, "--json")
    loaded("apply", "-f", file, "--dry-run")


def test_nobody_there(command: Command) -> None:
    del command  # a state folder of its own
    assert "no pool answers at" in loaded("status", "--address", "127.0.0.1:1", expect=3).stderr
