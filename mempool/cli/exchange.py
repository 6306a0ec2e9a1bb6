"""Commands that write a table as one file, and make one of a file: what they do is ``mempool.client``'s.

Help loads no torch.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mempool.cli.checkpoints import TIMEOUT_S, Address, File, Json, Name, PoolName, bar, print_document
from mempool.cli.outcome import UsageError, reported

if TYPE_CHECKING:
    from mempool.client.exchange import ExportProgress
    from mempool.config import TableConfig

_KEPT_DTYPES = ("float32", "bfloat16")

TableName = Annotated[str, typer.Argument(metavar="TABLE", help="A table of the pool, or of the checkpoint.")]
TableFile = Annotated[str, typer.Argument(metavar="FILE", help="A safetensors file, or its URL.")]


def add_to(app: typer.Typer) -> None:
    """Make these commands ``app``'s."""
    app.command("export")(export)
    app.command("import")(import_)


def export(
    table: TableName,
    target: TableFile,
    file: File = None,
    pool: PoolName = None,
    address: Address = None,
    place: Annotated[
        str | None, typer.Option("--from", metavar="PLACE", help="Of a checkpoint there, which needs no pool.")
    ] = None,
    name: Name = None,
    via: Annotated[
        str | None, typer.Option("--via", metavar="PLACE", help="Where the pool may write aside; else beside FILE.")
    ] = None,
    state: Annotated[bool, typer.Option("--state", help="The optimizer's state too.")] = False,
    as_json: Json = False,
) -> None:
    """Write a table as one safetensors file, as it is at one version, while it trains and serves on."""
    with reported():
        from mempool.cli import show

        if place is None and name is not None:
            raise UsageError("--checkpoint names a checkpoint of --from PLACE; give both, or neither")
        if place is not None and (via is not None or (file, pool, address) != (None, None, None)):
            raise UsageError(
                "--from PLACE reads a checkpoint and needs no pool; leave out --via, -f, --pool, --address"
            )
        if place is not None:
            version = _from_checkpoint(table, target, place, name, state=state, as_json=as_json)
        else:
            from mempool.cli.target import connected, find_target

            found = find_target(file, pool, address)
            with connected(found, timeout_s=TIMEOUT_S) as client, bar(as_json, "writing") as moved:

                def report(now: ExportProgress) -> None:
                    moved(now.bytes_done, now.bytes_total, now.doing or "written")

                version = client.export_table(table, target, state=state, via=via, progress=report).version
        if as_json:
            print_document({"table": table, "file": target, "version": version})
        else:
            show.say(f"table {table} at version {version} is in {target}")


def import_(
    source: TableFile,
    file: File = None,
    pool: PoolName = None,
    address: Address = None,
    called: Annotated[str | None, typer.Option("--as", metavar="NAME", help="What the table shall be called.")] = None,
    said: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="FIELD=VALUE",
            help="Of its configuration, as in a cluster file: --set dtype=bfloat16 --set 'optimizer={type: adam, "
            "lr: 0.001}'; may be repeated. Without it, as mempool wrote it in FILE.",
        ),
    ] = None,
    values: Annotated[str | None, typer.Option("--values", metavar="NAME", help="The tensor with its values.")] = None,
    keys: Annotated[str | None, typer.Option("--keys", metavar="NAME", help="The tensor with its keys.")] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Take the place of a table of that name, once all pages are there.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make a table of a file's: one that was exported, a memory layer's or an embedding's."""
    with reported():
        from mempool.cli import show
        from mempool.cli.target import connected, find_target

        found = find_target(file, pool, address)
        config = _config(source, called, said or [], values)
        with connected(found, timeout_s=TIMEOUT_S) as client, bar(as_json, "reading") as moved:
            table = client.import_table(
                source,
                config,
                name=called,
                replace=replace,
                values=values,
                keys=keys,
                progress=lambda now: moved(now.bytes_done, now.bytes_total, f"reading {now.table}"),
            )
        made = {"name": table.name, "num_slots": table.num_slots, "value_dim": table.value_dim}
        if as_json:
            print_document({"file": source, "table": made})
        else:
            show.say(f"table {table.name}, {table.num_slots:,} x {table.value_dim}, has the values of {source}")


def _from_checkpoint(table: str, target: str, place: str, name: str | None, *, state: bool, as_json: bool) -> int:
    from mempool.checkpoint.exchange.table_file import export_table
    from mempool.checkpoint.reader import Checkpoint
    from mempool.checkpoint.stores import open_store
    from mempool.checkpoint.stores.places import absolute

    stored = Checkpoint(open_store(absolute(place)), name).table(table)
    with bar(as_json, "writing") as moved:
        export_table(
            stored, absolute(target), state=state, progress=lambda done, total: moved(done, total, "writing the file")
        )
    return stored.state.version


def _config(source: str, called: str | None, said: list[str], values: str | None) -> TableConfig | None:
    """The table's configuration, with what the file says; None where mempool wrote it there."""
    from mempool.checkpoint.exchange.table_source import TableSource
    from mempool.checkpoint.stores.places import absolute
    from mempool.config import TableConfig

    fields = dict(_field(text) for text in said)
    found = TableSource(absolute(source), values=values)
    if not fields and found.schema is not None:
        return None
    if called is None and "name" not in fields:
        raise UsageError(f"{source} does not say what the table is called: give --as NAME")
    dtype = found.layout.values.dtype
    known = {"num_slots": found.num_slots, "value_dim": found.value_dim, "name": called}
    kept = {"dtype": dtype} if dtype in _KEPT_DTYPES else {}
    return TableConfig(**(kept | known | fields))


def _field(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not (name and separator):
        raise UsageError(f"--set {text}: write FIELD=VALUE")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        pass
    if value.strip().startswith(("{", "[")):  # as a YAML file has it
        import yaml

        try:
            return name, yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UsageError(f"--set {text}: it is neither JSON nor YAML ({' '.join(str(error).split())})") from None
    return name, value  # text, as a YAML file has it without quotes
