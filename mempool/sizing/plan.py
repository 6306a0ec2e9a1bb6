"""The plan itself: how many shards a memory needs, which splits there are, and which of them is best."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from mempool.config import HierarchicalKeys, ShardConfig, TableConfig, format_bytes, resolve
from mempool.config.optimizers import whole_rows
from mempool.errors import ConfigError
from mempool.sizing.demands import Hosts, Model
from mempool.sizing.machine import Machine
from mempool.sizing.split import Split, split, values_bytes
from mempool.sizing.times import StepTime, step_time
from mempool.sizing.traffic import Traffic, keys_traffic, keys_traffic_of, traffic, traffic_of
from mempool.sizing.warnings import warnings_of
from mempool.types import MAX_SHARDS, TableSchema
from mempool.types.schema import Layout
from mempool.types.schema_checks import MAX_BLOCKS, schema_problems
from mempool.types.sizes import owned_bytes

_LAYOUTS: tuple[Layout, ...] = ("columns", "rows", "grid")
_LEAST_BLOCK = 8
#: Of the owner of a page, in a placement.
PLACEMENT_BYTES = 4
_MOST_GROWN = 1024
_USUAL_PATH = "gRPC"
_CALLS_OF_KEYS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One split of the memory, and what it takes.

    Attributes:
        split: Of each table.
        traffic: Of one trainer's look-up and update in one layer, with all shards; with that of keys in the pool.
        busiest: The same with the shard that has most.
        time: Of a step of all layers and trainers, without keys in the pool; None without a machine's constants.
    """

    split: Split
    traffic: Traffic
    busiest: Traffic
    time: StepTime | None

    @property
    def rank(self) -> tuple[float, int]:
        """The smaller the better: by time where it is known, else by bytes."""
        moved = self.traffic.moved
        return (moved if self.time is None else self.time.total, moved)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a memory takes.

    Attributes:
        model, hosts: For which, and on which.
        shard: A shard's part of a cluster file.
        shards_needed: The fewest that can hold it.
        shards: How many were planned with.
        options: The best split of each kind, the best first.
        growth: The best split of more and more shards, twice as many each time, where their number was not given but a
            machine is.
        machine: By whose constants times are predicted; path: and which way to shards.
        warnings: What else is to be known.
    """

    model: Model
    hosts: Hosts
    shard: ShardConfig
    shards_needed: int
    shards: int
    options: tuple[Option, ...]
    growth: tuple[Option, ...]
    machine: str | None
    path: str | None
    warnings: tuple[str, ...]

    @property
    def best(self) -> Option:
        return self.options[0]

    @property
    def num_hosts(self) -> int:
        """Hosts of shards."""
        return self.hosts_of(self.shards)

    def hosts_of(self, shards: int) -> int:
        """Hosts that so many shards need."""
        return -(-shards // self.hosts.shards_each)

    @property
    def view_bytes(self) -> int:
        """Of one table and its keys: what each client, and each shard, is told of where pages are."""
        return PLACEMENT_BYTES * self.best.split.num_pages

    @property
    def client_bytes(self) -> int:
        """What a trainer sends and gets in a step."""
        return self.model.layers * self.best.traffic.moved

    @property
    def client_calls(self) -> int:
        """Calls of a trainer in a step: a look-up and an update of each layer, and, of all tables together, Prepare
        and Commit. Of keys in the pool three more of each layer: their scores (twice of hierarchical ones), sums of
        them, and their update."""
        split = self.best.split
        agreed = 2 * split.owners if split.owners > 1 else 1
        of_keys = 0 if split.keys is None else _calls_of_keys(split) * split.keys.asked
        return self.model.layers * (2 * split.asked + of_keys) + agreed

    @property
    def host_shards(self) -> int:
        """Shards of the fullest host."""
        return min(self.hosts.shards_each, self.shards)

    @property
    def host_page_bytes(self) -> int:
        """Pages of that host."""
        return self.host_shards * self.model.tables * self.best.split.largest_bytes

    @property
    def host_bytes(self) -> int:
        """What such a host gets and sends in a step of all trainers."""
        return self.host_shards * self.model.trainers * self.model.layers * self.best.busiest.moved

    @property
    def host_calls(self) -> int:
        """Calls that its shards answer in a step of all trainers."""
        agreed = 2 if self.best.split.owners > 1 else 1
        of_layer = 2 if self.best.split.keys is None else 2 + _calls_of_keys(self.best.split)
        return self.host_shards * self.model.trainers * (of_layer * self.model.layers + agreed)

    @property
    def host_cpu_s(self) -> float | None:
        """CPU that they spend on them, beside their kernels; None without a machine's constants."""
        time = self.best.time
        return None if time is None else self.host_shards * time.calls / self.hosts.core_crowding


def make_plan(
    table: TableConfig,
    model: Model,
    hosts: Hosts,
    *,
    shards: int | None = None,
    machine: Machine | None = None,
    path: str | None = None,
) -> Plan:
    """Plan a memory.

    Args:
        table: Its table, or each of them. Where it says no layout, or no block_dim, all are looked at.
        model: What looks it up.
        hosts: Where shards run.
        shards: How many; if not given, the fewest that can hold it, and of those that are looked at the fewest that
            reach ``model.tokens_per_s``, or those that come nearest to it.
        machine: Whose constants predict times; None: bytes only.
        path: Of the machine's; gRPC, or else its first, if not given.

    Raises:
        ConfigError: It does not fit, not even one page of it, or there is no such layout on so many shards, or no such
            path, or keys that it trains are of other heads; with the numbers, and what to do.
    """
    if shards is not None and not 1 <= shards <= MAX_SHARDS:
        raise ConfigError(f"{shards} shards: a pool has 1 to {MAX_SHARDS}")
    if model.topk > table.num_slots:
        raise ConfigError(f"topk = {model.topk} slots of a table of num_slots = {table.num_slots}: give fewer, or more")
    _require_heads(table, model)
    chosen = _path(machine, path)
    shard = hosts.shard()
    room = shard.page_bytes // model.tables
    schemas = list(_schemas(table))
    _require_pages_fit(schemas, shard, room, model)
    needed, lacking = _needed(schemas, room, hosts)
    if needed is None:
        raise ConfigError(f"{lacking} Give shards more memory, or the table fewer slots or columns, or a smaller dtype")
    if shards is not None and shards < needed:
        raise ConfigError(
            f"{shards} shards are too few: each may have {format_bytes(shard.page_bytes)} of pages (shard.memory = "
            f"{format_bytes(shard.memory)}, less what clients and commits get), so {needed} at least must share "
            f"{_amount(model.tables * min(map(values_bytes, schemas)))}. Give more shards, or more memory"
        )

    def options_of(count: int) -> tuple[Option, ...]:
        fit = [found for found in _splits(schemas, count) if found.largest_bytes <= room]
        return _best_of_kinds([_option(found, model, hosts, machine, chosen) for found in fit])

    grown: list[tuple[Option, ...]] = []
    if shards is None:
        counts = [needed] if machine is None else _doubled(needed, hosts)
        grown = [found for count in counts if (found := options_of(count))]
        options = _wanted(grown, model)
        shards = options[0].split.shards
    else:
        options = options_of(shards)
    if not options:
        widest = max(schema.num_blocks for schema in schemas)
        raise ConfigError(
            f"layout = {table.layout!r} spreads {widest} blocks of columns over {widest} shards at most, and "
            f"{shards} are wanted: give a smaller block_dim, or layout 'grid'"
        )
    return Plan(
        model=model,
        hosts=hosts,
        shard=shard,
        shards_needed=needed,
        shards=shards,
        options=options,
        growth=tuple(found[0] for found in grown) if machine is not None else (),
        machine=None if machine is None else machine.name,
        path=chosen,
        warnings=tuple(warnings_of(options[0].split, options[0].time, model, hosts, shard, machine)),
    )


def _require_heads(table: TableConfig, model: Model) -> None:
    """Raises ConfigError where keys of the pool are asked by more or fewer heads than they have."""
    keys = table.keys
    if keys is None or keys.optimizer is None or isinstance(keys, HierarchicalKeys):
        return  # all heads share those
    if (heads := getattr(keys, "heads", 1)) != model.heads:
        raise ConfigError(
            f"heads = {model.heads}, and the keys in the pool are of {heads}: give as many (flat keys are of one)"
        )


def _calls_of_keys(split: Split) -> int:
    return _CALLS_OF_KEYS + bool(split.probes)


def _path(machine: Machine | None, path: str | None) -> str | None:
    if machine is None:
        if path is not None:
            raise ConfigError(f"path {path!r} is one of a machine's, and no machine's constants are given")
        return None
    if path is None:
        return _USUAL_PATH if _USUAL_PATH in machine.paths else next(iter(machine.paths))
    if path not in machine.paths:
        raise ConfigError(f"path {path!r} was not measured on {machine.name}; known: {', '.join(machine.paths)}")
    return path


def _schemas(table: TableConfig) -> Iterator[TableSchema]:
    """The table by all layouts and widths of blocks that it leaves open."""
    layouts = _LAYOUTS if table.layout == "auto" else (table.layout,)
    for block_dim in _block_dims(table):
        for layout in layouts:
            schema = resolve(table.model_copy(update={"layout": layout, "block_dim": block_dim}))
            if not any(True for _ in schema_problems(schema)):
                yield schema


def _block_dims(table: TableConfig) -> list[int]:
    usual = resolve(table).block_dim
    if table.block_dim is not None or whole_rows(table.optimizer) is not None:
        return [usual]
    widths = {usual, table.value_dim}
    width = _LEAST_BLOCK
    while width < table.value_dim:
        if table.value_dim % width == 0 and table.value_dim // width <= MAX_BLOCKS:
            widths.add(width)
        width *= 2
    return sorted(widths, reverse=True)


def _require_pages_fit(schemas: list[TableSchema], shard: ShardConfig, room: int, model: Model) -> None:
    """Raises ConfigError where a shard cannot have a page of any schema."""
    smallest = min(
        owned_bytes(schema, {tuple(range(schema.num_blocks)) if schema.layout == "rows" else (0,): 1}, heads=0)
        for schema in schemas
    )
    if smallest > room:
        of = f"each of {model.tables} tables" if model.tables > 1 else "the table"
        raise ConfigError(
            f"one page of {of} takes {format_bytes(smallest)}, and a shard has {format_bytes(room)} for it ("
            f"shard.memory = {format_bytes(shard.memory)}, less what clients and commits get): give shards more "
            "memory, or the table smaller page_slots"
        )


def _needed(schemas: list[TableSchema], room: int, hosts: Hosts) -> tuple[int | None, str]:
    """The fewest shards that can hold one of the schemas; or None, and what they would need."""
    least = min(map(values_bytes, schemas))
    lacking = f"{_amount(least)} do not fit on {MAX_SHARDS} shards of {_amount(room)} of pages each."
    for count in _counts(-(-least // room), hosts):
        for schema in schemas:
            if values_bytes(schema) > room * count or _impossible(schema, count):
                continue
            if split(schema, count).largest_bytes <= room:
                return count, ""
    blocks = max(schema.num_blocks for schema in schemas)
    if all(schema.layout == "columns" for schema in schemas) and least > room * blocks:
        lacking = (
            f"{_amount(least)} in columns of {blocks} blocks lie on {blocks} shards at most, of {_amount(room)} of "
            "pages each: give a smaller block_dim, or layout 'grid'."
        )
    return None, lacking


def _counts(least: int, hosts: Hosts) -> Iterator[int]:
    """Numbers of shards: those of a part of one host, then of whole hosts."""
    yield from range(max(1, least), hosts.shards_each)
    first = max(1, math.ceil(least / hosts.shards_each)) * hosts.shards_each
    yield from range(first, MAX_SHARDS + 1, hosts.shards_each)


def _doubled(least: int, hosts: Hosts) -> Iterator[int]:
    """So many shards, and then more and more, on whole hosts where they are more than one has."""
    count = least
    while count <= max(least, _MOST_GROWN):
        yield count
        count = 2 * count if 2 * count < hosts.shards_each else -(-2 * count // hosts.shards_each) * hosts.shards_each


def _wanted(grown: list[tuple[Option, ...]], model: Model) -> tuple[Option, ...]:
    """The first that is fast enough; the fastest, where none is; the first, where nobody says what is enough."""
    if model.tokens_per_s is None:
        return grown[0]
    rates = [0.0 if found[0].time is None else found[0].time.tokens_per_s(model) for found in grown]
    enough = [rate >= model.tokens_per_s for rate in rates]
    return grown[enough.index(True) if any(enough) else rates.index(max(rates))]


def _impossible(schema: TableSchema, shards: int) -> bool:
    """Whether some shards would be left without any page: columns know no way to use them."""
    return schema.layout == "columns" and shards > schema.num_blocks


def _splits(schemas: list[TableSchema], shards: int) -> Iterator[Split]:
    for schema in schemas:
        if not _impossible(schema, shards):
            yield split(schema, shards)


def _option(found: Split, model: Model, hosts: Hosts, machine: Machine | None, path: str | None) -> Option:
    moved = traffic(found, bags=model.tokens, pairs=model.pairs, wire_dtype=model.wire_dtype)
    moved += keys_traffic(found, bags=model.tokens, topk=model.topk, heads=model.heads)
    one = traffic_of(found.busiest, found, bags=model.tokens, pairs=model.pairs, wire_dtype=model.wire_dtype)
    if (keys := found.keys) is not None:
        one += keys_traffic_of(
            keys.busiest, keys, bags=model.tokens, topk=model.topk, heads=model.heads, probes=found.probes
        )
    time = None if machine is None or path is None else step_time(machine, path, found, model, hosts)
    return Option(split=found, traffic=moved, busiest=one, time=time)


def _best_of_kinds(options: list[Option]) -> tuple[Option, ...]:
    """Of each kind the best, of equals the one with the fewest blocks; the best first."""
    kinds: dict[str, Option] = {}
    for option in options:
        kept = kinds.get(option.split.kind)
        if kept is None or option.rank < kept.rank:
            kinds[option.split.kind] = option
    return tuple(sorted(kinds.values(), key=lambda option: option.rank))


def _amount(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.1f} MiB"
