"""Commands and options are part of the public face: a change of them is a change of this file."""

from collections.abc import Iterator
from typing import Any

import typer

from mempool.cli.app import app

COMMANDS = {
    "": ["--version"],
    "up": ["--file", "--timeout", "-f"],
    "status": ["--address", "--file", "--json", "--pool", "--stages", "-f"],
    "apply": ["--address", "--dry-run", "--file", "--json", "--pool", "-f"],
    "scale": ["--address", "--file", "--pool", "--shards", "-f", "count"],
    "down": ["--address", "--drop", "--file", "--pool", "--yes", "-f", "-y"],
    "checkpoint": ["--address", "--extra", "--file", "--full", "--json", "--keep", "--pool", "--table", "-f", "place"],
    "restore": [
        *("--address", "--as", "--checkpoint", "--file", "--json", "--layout", "--pool", "--replace", "--table", "-f"),
        "place",
    ],
    "export": [
        *("--address", "--checkpoint", "--file", "--from", "--json", "--pool", "--state", "--via", "-f"),
        *("table", "target"),
    ],
    "import": [
        *("--address", "--as", "--file", "--json", "--keys", "--pool", "--replace", "--set", "--values", "-f"),
        "source",
    ],
    "rebalance": ["--address", "--dry-run", "--file", "--json", "--pool", "-f"],
    "table": ["--address", "--file", "--json", "--older-than", "--pool", "-f", "name"],
    "checkpoints": ["--json", "--keep", "--remove", "place"],
    "inspect": ["--checkpoint", "--json", "place"],
    "verify": ["--checkpoint", "--json", "place"],
    "plan": [
        *("--block-dim", "--dtype", "--gpu-gb-per-s", "--gpu-memory", "--gpus", "--heads", "--host-cores"),
        *(
            "--host-gb-per-s",
            "--host-memory",
            "--json",
            "--key-dim",
            "--key-optimizer",
            "--keys",
            "--latency-us",
            "--layers",
            "--layout",
            "--machine",
            "--master",
        ),
        *("--nic", "--optimizer", "--page-slots", "--path", "--shards", "--shards-per-host", "--shared", "--slots"),
        *(
            "--tokens",
            "--tokens-per-s",
            "--topk",
            "--trainers",
            "--trainers-per-host",
            "--value-dim",
            "--ways",
            "--width",
        ),
        "--wire-dtype",
    ],
    "bench": [],
    "bench kernels": ["--device", "--json", "--only", "--out", "--plot", "--quick", "--rounds"],
    "bench train": ["--json", "--only", "--out", "--plot", "--quick", "--rounds"],
    "bench plan": ["--json", "--machine", "--only", "--out", "--quick", "--rounds"],
    "bench serve": ["--json", "--only", "--out", "--plot", "--quick", "--ray", "--rounds"],
}


def test_commands_and_options() -> None:
    group: Any = typer.main.get_command(app)
    found = {"": _options(group)} | {name: _options(command) for name, command in _commands(group)}
    assert found == COMMANDS


def test_every_command_and_option_says_what_it_is() -> None:
    group: Any = typer.main.get_command(app)
    for name, command in _commands(group):
        assert command.help, name
        for parameter in command.params:
            assert getattr(parameter, "help", None), f"{name} {parameter.name}"


def _commands(group: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        yield above + name, command
        if hasattr(command, "commands"):
            yield from _commands(command, f"{above}{name} ")


def _options(command: Any) -> list[str]:
    return sorted(option for parameter in command.params for option in parameter.opts)
