"""How a command ends: one message, and a code that scripts can go by."""

import pytest
import typer

from mempool.cli.outcome import FAILED, UNREACHABLE, USAGE, UsageError, reported
from mempool.errors import ConfigError, MempoolError, Overloaded, PoolUnreachable, ShardUnavailable


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (PoolUnreachable("no pool answers"), UNREACHABLE),
        (ShardUnavailable("Ray has no room for 398 more shards"), FAILED),  # the pool is there: nothing to try again
        (Overloaded("too much"), FAILED),
        (ConfigError("shards is missing"), FAILED),
        (UsageError("which pool?"), USAGE),
    ],
)
def test_a_code_says_whose_turn_it_is(error: MempoolError, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as ended, reported():
        raise error
    assert ended.value.exit_code == code
    assert capsys.readouterr().err == f"mempool: {error.message}\n"
