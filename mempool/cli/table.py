"""`mempool table NAME`: what one table of a pool is, where its pages are, and how its slots are used."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mempool.cli.checkpoints import TIMEOUT_S, Address, File, Json, PoolName, print_document
from mempool.cli.outcome import reported

if TYPE_CHECKING:
    from rich.console import Console

    from mempool.types import OptimizerSpec, TableSchema
    from mempool.types.usage import Usage

_BAR = 40


def add_to(app: typer.Typer) -> None:
    """Make the command ``app``'s."""
    app.command()(table)


def table(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The table's name.")],
    file: File = None,
    pool: PoolName = None,
    address: Address = None,
    older_than: Annotated[
        int,
        typer.Option(
            "--older-than", metavar="N", min=0, help="Count used slots as outdated that the last N steps did not use."
        ),
    ] = 1000,
    as_json: Json = False,
) -> None:
    """Show one table: its schema, where its pages are, and how its slots are used, with a histogram."""
    with reported():
        from mempool.checkpoint.format.schema_json import schema_json
        from mempool.cli import documents
        from mempool.cli.target import connected, find_target
        from mempool.errors import DataLoss, NotFound

        target = find_target(file, pool, address)
        now = target.status()
        view = next((view for view in now.tables if view.schema.name == name), None)
        if view is None:
            listed = ", ".join(view.schema.name for view in now.tables) or "none"
            raise NotFound(f"pool {now.name!r} at {target.address} has no table {name!r}; it has {listed}")
        usage: Usage | None = None
        unknown = "it is not counted how its slots are used: a table that is made with usage: true does that"
        if view.schema.usage:
            try:
                with connected(target, timeout_s=TIMEOUT_S) as client:
                    usage = client.table(name).usage(older_than=older_than)
            except DataLoss as error:  # which of its pages are gone is shown all the same
                unknown = f"it cannot be told how its slots were used: {error}"
        document = documents.table(view, now)
        if as_json:
            schema = schema_json(view.schema)
            print_document({**document, "schema": schema, "usage": None if usage is None else asdict(usage)})
        else:
            _show(
                view.schema, document, unknown if usage is None else usage, where=f"pool {now.name} at {target.address}"
            )


def _show(schema: TableSchema, document: dict[str, Any], usage: Usage | str, *, where: str) -> None:
    """usage: Or why it is not known."""
    from mempool.cli.show import counted, grid, screen, size

    console = screen()
    console.print(f"table {schema.name} of {where}")
    lost = f", {document['lost_pages']:,} lost" if document["lost_pages"] else ""
    pages = f"{counted(document['pages'], 'page')}{lost}, {size(document['num_bytes'])}"
    lines = [
        *_schema_lines(schema),
        ("version", f"{document['version']:,}, {counted(document['updates_applied'], 'update')} applied"),
        ("placement", f"{document['placement']}, {pages}"),
    ]
    for what, said in lines:
        console.print(f"  {what:<10} {said}")
    shards = grid(console, "shard", "pages", "share", "column blocks", "memory")
    for shard in document["shards"]:
        memory = "-" if shard["num_bytes"] is None else size(shard["num_bytes"])
        row = (f"{shard['pages']:,}", f"{shard['share']:.1%}", shard["blocks"], memory)
        shards.add_row(str(shard["shard"]), *row, style="red" if shard["lost_pages"] else None)
    console.print(shards)
    if isinstance(usage, str):
        console.print(usage)
    else:
        _show_usage(console, usage)


def _schema_lines(schema: TableSchema) -> list[tuple[str, str]]:
    beside = ", with float32 masters" if schema.master else ""
    lines = [
        ("slots", f"{schema.num_slots:,} in pages of {schema.page_slots:,}"),
        ("values", f"{schema.value_dim:,} columns of {schema.dtype}{beside}, in blocks of {schema.block_dim:,}"),
        ("optimizer", _optimizer_line(schema.optimizer)),
        ("rounding", schema.rounding),
        ("layout", schema.layout),
        ("seed", f"{schema.seed}, initial values of standard deviation {schema.init_std:g}"),
    ]
    if schema.keys is not None:
        keys = asdict(schema.keys)
        optimizer = keys.pop("optimizer", None)
        kind = type(schema.keys).__name__.removesuffix("KeySpec").lower()
        said = ", ".join(f"{name} {value}" for name, value in keys.items())
        lines.append(("keys", f"{kind}, {said}" + (f", by {optimizer['algorithm']}" if optimizer else "")))
    return lines


def _optimizer_line(optimizer: OptimizerSpec) -> str:
    """What is not as it is by default."""
    plain = type(optimizer)(algorithm=optimizer.algorithm, lr=optimizer.lr)
    said = [f"lr {optimizer.lr:g}"]
    for name, value in asdict(optimizer).items():
        if value != getattr(plain, name):
            said.append(name if value is True else f"{name} {value:g}")
    return f"{optimizer.algorithm}, {', '.join(said)}"


def _show_usage(console: Console, usage: Usage) -> None:
    console.print(
        f"usage: {usage.used:,} of {usage.num_slots:,} slots ({usage.coverage:.1%}), {usage.uses:,} uses, "
        f"{usage.most:,} of one slot; {usage.dead:,} never used"
        + (f", {usage.outdated:,} not by the last {usage.older_than:,} steps" if usage.older_than else "")
    )
    if usage.kl_uniform is not None:
        fitted = "" if usage.zipf is None else f"; about rank ** -{usage.zipf:.2f}"
        console.print(f"KL to uniform {usage.kl_uniform:.3f} nats{fitted}")
    most = max(each.slots for each in usage.histogram)
    console.print(f"{'uses':>25}  {'slots':>15}")
    for each in usage.histogram:
        low, high = f"{each.low:,}", f"{each.high:,}"
        bar = "#" * max(each.slots > 0, round(_BAR * each.slots / most))
        console.print(f"{low if each.low == each.high else f'{low} - {high}':>25}  {each.slots:>15,}  {bar}".rstrip())
