"""A served pool of this process, a cluster file that names it, and the command line run on it."""

from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mempool.cli.app import app
from mempool.wire.channels.loop import run
from tests.support.serving import ServedPool, served_pool

Command = Callable[..., Any]


@pytest.fixture
def served() -> Iterator[ServedPool]:
    stack = AsyncExitStack()
    yield run(stack.enter_async_context(served_pool(2)), timeout_s=30)
    run(stack.aclose(), timeout_s=30)


@pytest.fixture
def file(served: ServedPool, tmp_path: Path) -> Path:
    port = served.address.rpartition(":")[2]
    path = tmp_path / "served.yaml"
    path.write_text(f"pool: {{name: served, shards: 2, port: {port}}}  # a comment\ntables: []\n")
    return path


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """Runs `mempool ...` and checks its exit code; stdout and stderr are of the result."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for variable in ("MEMPOOL_TOKEN", "MEMPOOL_ADDRESS"):
        monkeypatch.delenv(variable, raising=False)

    def invoke(*arguments: object, expect: int = 0) -> Any:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == expect, result.output
        return result

    return invoke
