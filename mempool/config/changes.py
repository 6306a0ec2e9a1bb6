"""What an edited cluster file asks of a living pool: a pure comparison. ``mempool.rayhost`` carries it out."""

from collections.abc import Iterable
from dataclasses import dataclass

from mempool.config.cluster import ClusterConfig
from mempool.config.model import ConfigModel, value_text
from mempool.config.table import TableConfig, resolve, unsaid
from mempool.errors import ConfigError
from mempool.types import TableSchema
from mempool.types.keys import is_key_table
from mempool.types.schema_differences import schema_differences


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldChange:
    """One field that differs. ``field`` is its path; a table is named: "tables[facts].value_dim"."""

    field: str
    before: object
    after: object

    def __str__(self) -> str:
        return f"{self.field}: {value_text(self.before)} -> {value_text(self.after)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What ``mempool apply`` would do, and what it cannot do.

    Attributes:
        shards_before, shards_after: Number of shards now and wanted.
        create: Tables to create.
        kept: Names of tables the pool has and the file does not; nothing happens to them: apply never drops data.
        refused: Changes no living pool can follow; apply must do nothing at all while there are any.
        restart: Changes that take effect only when the pool is started again; apply leaves them aside.
        unfinished: What is not where that number of shards would have it, though their number is right.
    """

    shards_before: int
    shards_after: int
    create: tuple[TableConfig, ...] = ()
    kept: tuple[str, ...] = ()
    refused: tuple[FieldChange, ...] = ()
    restart: tuple[FieldChange, ...] = ()
    unfinished: str = ""

    @property
    def rescale(self) -> bool:
        """Whether shards are to be started or stopped, or pages to be moved."""
        return self.shards_before != self.shards_after or bool(self.unfinished)

    @property
    def nothing(self) -> bool:
        """Whether apply has nothing to do."""
        return not (self.rescale or self.create or self.refused)

    def check(self) -> None:
        """Stop here where the pool cannot follow.

        Raises:
            ConfigError: There are refused changes; the message lists them and says what to do instead.
        """
        if self.refused:
            listed = "\n".join(f"  {change}" for change in self.refused)
            raise ConfigError(
                f"These fields cannot change while the pool lives; nothing was applied:\n{listed}\n"
                "Put the old values back; for another table give it a new name, for another pool run `mempool up`."
            )

    def lines(self) -> list[str]:
        """Each thing in a line, for people; empty if there is nothing to say."""
        said = []
        if self.shards_before != self.shards_after:
            said.append(f"shards: {self.shards_before} -> {self.shards_after}, moving pages while the pool works")
        if self.unfinished:
            said.append(f"finish the move to {self.shards_after} shards: {self.unfinished}")
        said += [f"create table {t.name}: {t.num_slots:,} x {t.value_dim} {t.dtype}" for t in self.create]
        said += [f"keep table {name}: it is not in the file, and apply never drops data" for name in self.kept]
        said += [f"refuse {change}: it cannot change while the pool lives" for change in self.refused]
        said += [f"leave aside {change}: it takes effect when the pool is started again" for change in self.restart]
        return said


def diff(
    old: ClusterConfig,
    new: ClusterConfig,
    *,
    live_tables: Iterable[TableSchema] | None = None,
    live_shards: int | None = None,
    unfinished: str = "",
) -> Changes:
    """Compare two configurations.

    Args:
        old: The configuration the pool was last given.
        new: The one it shall follow.
        live_tables: The tables the pool has now, clients' own among them; by default those of ``old``.
        live_shards: The shards the pool has now; by default those of ``old``.
        unfinished: What is not where it should be, though the number of shards may be right.
    """
    if live_tables is None:
        live_tables = map(resolve, old.tables)
    live = {schema.name: schema for schema in live_tables if not is_key_table(schema)}
    wanted = {table.name: table for table in new.tables}
    refused = [FieldChange(field="pool.name", before=old.pool.name, after=new.pool.name)]
    for name, table in wanted.items():
        if name in live:
            differences = list(schema_differences(live[name], resolve(table)))
            # What only follows from a field that was changed would hide it.
            asked = [found for found in differences if found.path not in unsaid(table)]
            refused += [
                FieldChange(field=f"tables[{name}].{found.path}", before=found.first, after=found.second)
                for found in asked or differences
            ]
    restart = [
        change
        for section in ("pool", "shard", "ray")
        for change in _model_changes(section, getattr(old, section), getattr(new, section))
        if change.field not in ("pool.name", "pool.shards")
    ]
    return Changes(
        shards_before=old.pool.shards if live_shards is None else live_shards,
        shards_after=new.pool.shards,
        create=tuple(table for name, table in wanted.items() if name not in live),
        kept=tuple(name for name in live if name not in wanted),
        refused=tuple(change for change in refused if change.before != change.after),
        restart=tuple(restart),
        unfinished=unfinished,
    )


def _model_changes(prefix: str, old: ConfigModel, new: ConfigModel) -> list[FieldChange]:
    return [
        FieldChange(field=f"{prefix}.{name}", before=before, after=after)
        for name in type(old).model_fields
        if (before := getattr(old, name)) != (after := getattr(new, name))
    ]
