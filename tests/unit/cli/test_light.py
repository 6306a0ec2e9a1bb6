"""What a command loads: help, reading commands and what is wrong with a file need neither torch nor Ray."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from mempool.wire.channels.loop import run
from tests.support.serving import ServedPool

from .conftest import Command

# Runs commands, one after the other, in a process of its own; says on stdout how each ended, what it wrote to stderr,
# and what heavy things are loaded by then.
PROGRAM = """
import contextlib, io, json, sys
from mempool.cli import main
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["mempool", *arguments]
    code, said = 0, io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
    heavy = sorted({"torch", "numba", "llvmlite", "triton", "ray"} & set(sys.modules))
    print(json.dumps([code, said.getvalue(), heavy]))
"""


def loaded(*commands: Sequence[object], expect: int = 0) -> list[str]:
    """What each has said on stderr, having ended so and loaded nothing heavy."""
    asked = json.dumps([[str(argument) for argument in command] for command in commands])
    command = [sys.executable, "-c", PROGRAM, asked]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    ended = [json.loads(line) for line in done.stdout.splitlines()]
    for arguments, (code, said, heavy) in zip(commands, ended, strict=True):
        assert (code, heavy) == (expect, []), (arguments, said)
    return [said for _, said, _ in ended]


def test_help() -> None:
    loaded(["--help"], ["status", "--help"], ["bench", "kernels", "--help"], ["--version"])


def test_what_is_wrong_with_a_file(tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text("pool: {name: wrong, shards: 2}\ntables:\n  - {name: t, num_slots: 5, value_dim: 8, layout: x}\n")
    commands = [[name, "-f", file] for name in ("up", "status", "apply", "down")]
    for said in loaded(*commands, ["scale", "-f", file, "--shards", "3"], expect=1):
        assert "tables[0].layout" in said


@pytest.mark.usefixtures("command")  # a state folder of its own
def test_reading_commands(served: ServedPool, file: Path) -> None:
    run(served.controller.tables(), timeout_s=10)
    loaded(
        ["status", "-f", file],
        ["status", "--address", served.address, "--json"],
        ["apply", "-f", file, "--dry-run"],
    )


def test_nobody_there(command: Command) -> None:
    del command  # a state folder of its own
    (said,) = loaded(["status", "--address", "127.0.0.1:1"], expect=3)
    assert "no pool answers at" in said
