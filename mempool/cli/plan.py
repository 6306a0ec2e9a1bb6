"""``mempool plan``: what a memory takes, before there is one. What it says is ``mempool.sizing``'s."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mempool.cli.outcome import UsageError, reported

if TYPE_CHECKING:
    from mempool.config import TableConfig
    from mempool.sizing import Machine, Option, Plan
    from mempool.sizing.split import Split

_FLAGS = {"true": True, "false": False}
_NAME = "memory"
_DEFAULT_LR = 0.1

_Machine = Annotated[
    Path | None,
    typer.Option("--machine", metavar="FILE", help="A result of mempool bench plan: its constants predict times."),
]


def add_to(app: typer.Typer) -> None:
    """The command `mempool plan`."""
    app.command()(plan)


def plan(
    width: Annotated[int, typer.Option("--width", metavar="N", help="Width of the model, and of values.")],
    slots: Annotated[int, typer.Option("--slots", metavar="N", help="Slots of a table.")],
    value_dim: Annotated[
        int | None, typer.Option("--value-dim", metavar="N", help="Columns, where they are not as many as the width.")
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", metavar="DTYPE", help="Of stored values: float32, bfloat16, float8_e4m3fn, int8.")
    ] = "float32",
    master: Annotated[bool, typer.Option("--master", help="Keep float32 values beside them.")] = False,
    optimizer: Annotated[
        str,
        typer.Option("--optimizer", metavar="NAME[,FIELD=VALUE]", help="Such as adam, or sgd,momentum=0.9."),
    ] = "adagrad",
    keys: Annotated[
        str | None,
        typer.Option("--keys", metavar="KIND", help="Keys that train in the pool: product, flat, hierarchical."),
    ] = None,
    key_dim: Annotated[int, typer.Option("--key-dim", metavar="N", help="Width of such a key, and of a query.")] = 128,
    key_optimizer: Annotated[
        str, typer.Option("--key-optimizer", metavar="NAME[,FIELD=VALUE]", help="That trains them.")
    ] = "adamw,dense=true",
    ways: Annotated[int, typer.Option("--ways", metavar="N", help="Parts of such product keys.")] = 2,
    layout: Annotated[
        str, typer.Option("--layout", metavar="LAYOUT", help="columns, rows or grid; auto looks at all of them.")
    ] = "auto",
    block_dim: Annotated[
        int | None, typer.Option("--block-dim", metavar="N", help="Width of a column block; looked for if not given.")
    ] = None,
    page_slots: Annotated[int | None, typer.Option("--page-slots", metavar="N", help="Slots of a page.")] = None,
    heads: Annotated[int, typer.Option("--heads", metavar="N", help="Queries of a token in a layer.")] = 4,
    topk: Annotated[int, typer.Option("--topk", metavar="N", help="Slots that each of them takes.")] = 32,
    layers: Annotated[int, typer.Option("--layers", metavar="N", help="Memory layers of the model.")] = 1,
    shared: Annotated[
        bool, typer.Option("--shared/--no-shared", help="Whether layers share one table, or have one each.")
    ] = True,
    tokens: Annotated[int, typer.Option("--tokens", metavar="N", help="Of a step, of each trainer.")] = 1024,
    trainers: Annotated[int, typer.Option("--trainers", metavar="N", help="That train together.")] = 1,
    tokens_per_s: Annotated[
        float | None, typer.Option("--tokens-per-s", metavar="N", help="What all of them shall reach.")
    ] = None,
    wire_dtype: Annotated[
        str,
        typer.Option("--wire-dtype", metavar="DTYPE", help="Of values on the wire: float32, bfloat16, float8_e4m3fn."),
    ] = "float32",
    shards: Annotated[
        int | None, typer.Option("--shards", metavar="N", help="Plan with so many; else with the fewest that do.")
    ] = None,
    shards_per_host: Annotated[
        int | None, typer.Option("--shards-per-host", metavar="N", help="One a GPU, or 8 on the CPU, if not given.")
    ] = None,
    host_memory: Annotated[
        str, typer.Option("--host-memory", metavar="SIZE", help="What the pool may have of a host's memory.")
    ] = "512GiB",
    host_cores: Annotated[int, typer.Option("--host-cores", metavar="N", help="Cores of a host of shards.")] = 64,
    host_gb_per_s: Annotated[
        float | None, typer.Option("--host-gb-per-s", metavar="N", help="Its memory's bandwidth, GB/s.")
    ] = None,
    gpus: Annotated[int, typer.Option("--gpus", metavar="N", help="GPUs of a host of shards; 0: on the CPU.")] = 0,
    gpu_memory: Annotated[
        str, typer.Option("--gpu-memory", metavar="SIZE", help="What the pool may have of each.")
    ] = "64GiB",
    gpu_gb_per_s: Annotated[
        float | None, typer.Option("--gpu-gb-per-s", metavar="N", help="Its memory's bandwidth, GB/s.")
    ] = None,
    nic: Annotated[float, typer.Option("--nic", metavar="GBIT", help="Network of each host, Gbit/s.")] = 100.0,
    latency_us: Annotated[float, typer.Option("--latency-us", metavar="US", help="Of the network, one way.")] = 20.0,
    trainers_per_host: Annotated[
        int, typer.Option("--trainers-per-host", metavar="N", help="That share a host's network.")
    ] = 1,
    machine: _Machine = None,
    path: Annotated[
        str | None, typer.Option("--path", metavar="NAME", help="Way to shards, as in that file; gRPC if not given.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document, with stable keys, and nothing else.")
    ] = False,
) -> None:
    """Say what a memory takes: shards, memory, traffic, time of a step, and the best split."""
    with reported():
        from mempool.sizing import Hosts, Model, make_plan

        table = _config(
            num_slots=slots, value_dim=width if value_dim is None else value_dim, dtype=dtype, master=master,
            optimizer=_optimizer(optimizer, "--optimizer"), layout=layout, block_dim=block_dim, page_slots=page_slots,
            keys=_keys(keys, heads, key_dim, ways, key_optimizer),
        )  # fmt: skip
        model = Model.model_validate(
            {
                "heads": heads,
                "topk": topk,
                "layers": layers,
                "shared": shared,
                "tokens": tokens,
                "trainers": trainers,
                "wire_dtype": wire_dtype,
                "tokens_per_s": tokens_per_s,
            }
        )
        hosts = Hosts.model_validate(
            {
                "memory": host_memory,
                "cores": host_cores,
                "memory_gb_per_s": host_gb_per_s,
                "gpus": gpus,
                "gpu_memory": gpu_memory,
                "gpu_gb_per_s": gpu_gb_per_s,
                "shards": shards_per_host,
                "nic_gbit_per_s": nic,
                "latency_us": latency_us,
                "trainers": trainers_per_host,
            }
        )
        constants = None if machine is None else read_machine(machine)
        found = make_plan(table, model, hosts, shards=shards, machine=constants, path=path)
        if as_json:
            print(json.dumps(document(found), indent=2))
        else:
            from mempool.cli import show

            for line in lines(found):
                show.say(line)


def read_machine(file: Path) -> "Machine":
    """The constants in a result file of `mempool bench plan`. Raises ConfigError, or OSError."""
    from mempool.errors import ConfigError
    from mempool.sizing import Machine

    try:
        held = json.loads(file.read_text())
    except ValueError as error:
        raise ConfigError(f"{file} is no JSON ({error}): make it with mempool bench plan --out DIR") from None
    return Machine.of(held, where=str(file))


def _config(**fields: Any) -> "TableConfig":
    from mempool.config import TableConfig

    return TableConfig.model_validate({"name": _NAME, **fields})


def _keys(kind: str | None, heads: int, key_dim: int, ways: int, optimizer: str) -> dict[str, Any] | None:
    """Keys that train in the pool, as a file has them; None: they are the model's."""
    if kind is None:
        return None
    of_heads = {} if kind in ("flat", "hierarchical") else {"heads": heads, "ways": ways}
    return {"type": kind, "key_dim": key_dim, "optimizer": _optimizer(optimizer, "--key-optimizer"), **of_heads}


def _optimizer(text: str, option: str) -> dict[str, Any]:
    """ "sgd,momentum=0.9" as a file has it. Raises UsageError; what names and values may be is the config's matter."""
    name, *rest = text.split(",")
    fields: dict[str, Any] = {"type": name, "lr": _DEFAULT_LR}
    for part in rest:
        field, equals, value = part.partition("=")
        if not (field and equals and value):
            raise UsageError(f"{option} {text!r}: {part!r} is no FIELD=VALUE; write for example sgd,momentum=0.9")
        fields[field] = _value(value)
    return fields


def _value(text: str) -> bool | float | str:
    if text.lower() in _FLAGS:
        return _FLAGS[text.lower()]
    try:
        return float(text)
    except ValueError:
        return text


def document(plan: "Plan") -> dict[str, Any]:
    """The document of `mempool plan --json`: sizes in bytes, times in seconds, null where no machine is given.

    Keys: ``table``, ``keys`` (those that train in the pool; null: none), ``memory``, ``shards_needed``, ``shards``,
    ``hosts``, ``splits`` (the best first), ``growth`` (the best of more and more shards; empty where their number was
    given, or no machine), ``client`` (one trainer), ``host`` (one of shards; both of the best split), ``machine``,
    ``path``, ``warnings``. Bytes of a token are of all layers; ``to_shards`` and ``from_shards`` are between one
    trainer and all shards.
    """
    best, model = plan.best, plan.model
    schema, split, time = best.split.schema, best.split, best.time
    return {
        "table": {
            "num_slots": schema.num_slots,
            "value_dim": schema.value_dim,
            "dtype": schema.dtype,
            "optimizer": schema.optimizer.algorithm,
            "layout": schema.layout,
            "block_dim": schema.block_dim,
            "page_slots": schema.page_slots,
            "tables": model.tables,
            "parameters": model.tables * schema.num_slots * schema.value_dim,
        },
        "keys": None if split.keys is None else _keys_document(split.keys, model.tables),
        "memory": {
            "total_bytes": model.tables * split.total_bytes,
            "largest_shard_bytes": model.tables * split.largest_bytes,
            "shard_memory": plan.shard.memory,
            "shard_page_bytes": plan.shard.page_bytes,
        },
        "shards_needed": plan.shards_needed,
        "shards": plan.shards,
        "hosts": plan.num_hosts,
        "splits": [_split_document(option, plan) for option in plan.options],
        "growth": [
            {
                "shards": option.split.shards,
                "hosts": plan.hosts_of(option.split.shards),
                **_split_document(option, plan),
            }
            for option in plan.growth
        ],
        "client": {
            "view_bytes": model.tables * plan.view_bytes,
            "bytes_a_step": plan.client_bytes,
            "cpu_a_step": None if time is None else time.client,
            "calls_a_step": plan.client_calls,
        },
        "host": {
            "page_bytes": plan.host_page_bytes,
            "bytes_a_step": plan.host_bytes,
            "cpu_a_step": plan.host_cpu_s,
            "calls_a_step": plan.host_calls,
        },
        "machine": plan.machine,
        "path": plan.path,
        "warnings": list(plan.warnings),
    }


def _keys_document(keys: "Split", tables: int) -> dict[str, Any]:
    schema = keys.schema
    return {
        "keys": tables * keys.num_keys,
        "width": schema.value_dim,
        "optimizer": schema.optimizer.algorithm,
        "page_slots": schema.page_slots,
        "total_bytes": tables * keys.total_bytes,
        "largest_shard_bytes": tables * keys.largest_bytes,
        "shards_asked": keys.asked,
    }


def _split_document(option: "Option", plan: "Plan") -> dict[str, Any]:
    split, moved, model = option.split, option.traffic, plan.model
    each = model.layers / model.tokens
    return {
        "kind": split.kind,
        "layout": split.schema.layout,
        "block_dim": split.schema.block_dim,
        "shards_asked": split.asked,
        "largest_shard_bytes": model.tables * split.largest_bytes,
        "bytes_a_token": {
            "to_shards": round(moved.out * each),
            "from_shards": round(moved.back * each),
            "to_a_shard": round(option.busiest.out * each),
            "from_a_shard": round(option.busiest.back * each),
        },
        "step": None
        if option.time is None
        else {**asdict(option.time), "total": option.time.total, "limit": option.time.limit},
        "tokens_per_s": None if option.time is None else option.time.tokens_per_s(model),
    }


def lines(plan: "Plan") -> list[str]:
    """The plan for people."""
    found = document(plan)
    table, memory, model, hosts = found["table"], found["memory"], plan.model, plan.hosts
    several = f"{table['tables']} tables of " if table["tables"] > 1 else ""
    device = f"{hosts.gpus} GPUs" if hosts.gpus else f"{hosts.cores} cores"
    out = [
        f"{several}{table['num_slots']:,} slots x {table['value_dim']:,} {table['dtype']}, {table['optimizer']}: "
        f"{table['parameters'] / 1e9:,.1f} billion parameters in {_size(memory['total_bytes'])}",
        *_keys_line(found["keys"]),
        f"at least {_counted(plan.shards_needed, 'shard')} of {_size(memory['shard_memory'])}; planned: "
        f"{plan.shards:,} on {_counted(plan.num_hosts, 'host')} of {device}, "
        f"{_size(memory['largest_shard_bytes'])} of pages on the fullest shard",
        f"best: layout {table['layout']}, block_dim {table['block_dim']}, page_slots {table['page_slots']}",
        "",
        *_rows(found["splits"], timed=plan.machine is not None),
        "",
        *([*_grown(found["growth"]), ""] if len(plan.growth) > 1 else []),
        f"{_counted(model.trainers, 'trainer')} x {_counted(model.tokens, 'token')} x "
        f"{_counted(model.layers, 'layer')} x {_counted(model.heads, 'head')} x top-{model.topk}; "
        "bytes of a token: of all layers, one trainer's",
        f"a trainer, a step: {_size(found['client']['bytes_a_step'])} in {found['client']['calls_a_step']:,} calls"
        f"{_cpu(found['client'])}; {_size(found['client']['view_bytes'])} to know where pages are",
        f"a host of shards: {_size(found['host']['page_bytes'])} of pages; a step: "
        f"{_size(found['host']['bytes_a_step'])} in {found['host']['calls_a_step']:,} calls{_cpu(found['host'])}",
    ]
    if plan.machine is not None:
        out.append(f"times by the constants of {plan.machine} over {plan.path}; nothing overlaps in them")
    return out + [f"note: {warning}" for warning in plan.warnings]


def _keys_line(keys: dict[str, Any] | None) -> list[str]:
    if keys is None:
        return []
    return [
        f"of that {_size(keys['total_bytes'])} of keys that train in the pool: {keys['keys']:,} x {keys['width']:,} "
        f"float32, {keys['optimizer']}; {_size(keys['largest_shard_bytes'])} of them on a shard at most, "
        f"{_counted(keys['shards_asked'], 'shard')} asked for scores"
    ]


_HEADER = ("split", "block", "asked", "shard has", "B/token out", "back", "to a shard", "back")
_TIMED = ("step ms", "client", "waits", "wire", "calls", "gather", "update", "limit", "tokens/s")


def _rows(splits: list[dict[str, Any]], *, timed: bool) -> list[str]:
    rows = []
    for split in splits:
        moved, step = split["bytes_a_token"], split["step"]
        row = [
            split["kind"], str(split["block_dim"]), f"{split['shards_asked']:,}", _size(split["largest_shard_bytes"]),
            *(f"{moved[way]:,}" for way in ("to_shards", "from_shards", "to_a_shard", "from_a_shard")),
        ]  # fmt: skip
        if timed:
            parts = ("total", "client", "waits", "wire", "calls", "gather", "update")
            row += [*(f"{1e3 * step[part]:,.1f}" for part in parts), step["limit"], f"{split['tokens_per_s']:,.0f}"]
        rows.append(row)
    header = (*_HEADER, *_TIMED) if timed else _HEADER
    return _table_of(header, rows)


def _table_of(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    ]


def _grown(growth: list[dict[str, Any]]) -> list[str]:
    rows = [
        [
            f"{option['shards']:,}", f"{option['hosts']:,}", option["kind"], str(option["block_dim"]),
            _size(option["largest_shard_bytes"]), f"{1e3 * option['step']['total']:,.1f}",
            f"{1e3 * option['step']['client']:,.1f}", option["step"]["limit"], f"{option['tokens_per_s']:,.0f}",
        ]
        for option in growth
    ]  # fmt: skip
    return _table_of(("shards", "hosts", "split", "block", "shard has", "step ms", "client", "limit", "tokens/s"), rows)


def _cpu(spent: dict[str, Any]) -> str:
    return "" if spent["cpu_a_step"] is None else f", {spent['cpu_a_step'] * 1e3:,.1f} ms of CPU beside kernels"


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:,.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:,.1f} TiB"
