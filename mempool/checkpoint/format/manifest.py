"""The manifest of a checkpoint, and what one shard wrote of it (a part): values, as sealed JSON and back, strictly."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mempool.checkpoint.format.json_values import Fields, JsonObject, Unfit, each
from mempool.checkpoint.format.layout import places
from mempool.checkpoint.format.pages import Batch, PageArray, Pages, StoredFile
from mempool.checkpoint.format.pages_json import (
    array_json,
    batch_json,
    check_arrays,
    file_json,
    pages_json,
    parse_array,
    parse_batch,
    parse_file,
    parse_pages,
)
from mempool.checkpoint.format.schema_json import parse_schema, schema_json
from mempool.checkpoint.format.sealed import sealed, unsealed
from mempool.checkpoint.stores import check_path
from mempool.errors import DataLoss
from mempool.types import TableSchema

MANIFEST = "manifest.json"
_CHECKPOINT = "mempool.checkpoint"
_PART = "mempool.checkpoint-part"


@dataclass(frozen=True, slots=True, kw_only=True)
class TableState:
    """A table at one version.

    Attributes:
        version: Table version: the steps that are in its pages, all of them and no other.
        step_count: As the optimizer counts.
        ledger: What was applied of whom: JSON of the pool's own, kept as it is.
        arrays: Of its pages, in the order of every batch.
        batches: Where its pages lie; of a page that several have, the last one counts.
    """

    schema: TableSchema
    version: int
    step_count: int
    ledger: Any
    arrays: tuple[PageArray, ...]
    batches: tuple[Batch, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A whole checkpoint.

    Attributes:
        name: Its folder.
        number: Higher than that of every checkpoint that was in the place before.
        created: UTC, ISO 8601.
        extra: The user's own.
        files: Every file that pages are read from, those of older checkpoints too: path -> what it is.
    """

    name: str
    number: int
    pool: str
    created: str
    written_by: str
    extra: JsonObject
    files: Mapping[str, StoredFile]
    tables: Mapping[str, TableState]

    @property
    def bases(self) -> tuple[str, ...]:
        """The older checkpoints whose files it reads."""
        return tuple(sorted({path.partition("/")[0] for path in self.files} - {self.name}))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Part:
    """What one writer wrote of one table.

    Attributes:
        writer: Who: "shard-3".
        owned: The pages that it answers for, written or not.
        since: The checkpoint since which no other of them changed than were written; None: all of them were.
        since_version: The table's version there.
        table: With the pages that were written alone; all of them have its version.
    """

    checkpoint: str
    writer: str
    owned: Pages
    since: str | None
    since_version: int
    files: Mapping[str, StoredFile]
    table: TableState


def manifest_path(name: str) -> str:
    return f"{name}/{MANIFEST}"


def manifest_bytes(manifest: Manifest) -> bytes:
    """The manifest's file. Raises ValueError or TypeError where ``extra`` or a ledger is no JSON."""
    order = {path: index for index, path in enumerate(manifest.files)}
    return sealed(
        _CHECKPOINT,
        {
            "name": manifest.name,
            "number": manifest.number,
            "pool": manifest.pool,
            "created": manifest.created,
            "written_by": manifest.written_by,
            "extra": manifest.extra,
            "files": _files_json(manifest.files),
            "tables": {name: _table_json(table, order) for name, table in manifest.tables.items()},
        },
    )


def parse_manifest(data: bytes, where: str) -> Manifest:
    """The manifest of a file. where: How messages name it.

    Raises:
        DataLoss: It is damaged.
        InvalidRequest: It is of a newer format.
    """
    given = Fields(unsealed(data, _CHECKPOINT, where), "")
    try:
        files = _files(given)
        manifest = Manifest(
            name=given.text("name"),
            number=given.integer("number"),
            pool=given.text("pool"),
            created=given.text("created"),
            written_by=given.text("written_by"),
            extra={name: value for name, _, value in given.members("extra")},
            files=files,
            tables={name: _whole(_table(value, path, files), path) for name, path, value in given.members("tables")},
        )
        given.done()
        return manifest
    except Unfit as error:
        raise DataLoss(f"{where}: {error}. Use the mempool that wrote it, or another checkpoint") from None


def part_bytes(part: Part) -> bytes:
    """The part, to be sent to whoever commits."""
    order = {path: index for index, path in enumerate(part.files)}
    return sealed(
        _PART,
        {
            "checkpoint": part.checkpoint,
            "writer": part.writer,
            "since": part.since,
            "since_version": part.since_version,
            "files": _files_json(part.files),
            "table": _table_json(part.table, order),
            "owned": pages_json(part.owned),
        },
    )


def parse_part(data: bytes, where: str = "a part of a checkpoint") -> Part:
    """What ``part_bytes`` made. Raises DataLoss or InvalidRequest, as ``parse_manifest``."""
    given = Fields(unsealed(data, _PART, where), "")
    try:
        files = _files(given)
        table = _table(given.take("table"), "table", files)
        part = Part(
            checkpoint=given.text("checkpoint"),
            writer=given.text("writer"),
            since=given.text_or_none("since"),
            since_version=given.integer("since_version"),
            files=files,
            table=table,
            owned=parse_pages(given.take("owned"), "owned", table.schema),
        )
        given.done()
        return part
    except Unfit as error:
        raise DataLoss(f"{where}: {error}") from None


def _whole(table: TableState, path: str) -> TableState:
    where = places(table.schema, table.batches)
    lacking = int((where.batch < 0).sum()) + int((where.key_batch < 0).sum())
    if lacking:
        raise Unfit(f"{path} lacks {lacking} pages")
    return table


def _files_json(files: Mapping[str, StoredFile]) -> list[dict[str, Any]]:
    return [{"path": path, **file_json(file)} for path, file in files.items()]


def _files(given: Fields) -> dict[str, StoredFile]:
    found: dict[str, StoredFile] = {}
    for path, value in given.items("files"):
        file = Fields(value, path)
        name = check_path(file.text("path"))
        found[name] = parse_file(file)
    return found


def _table_json(table: TableState, order: Mapping[str, int]) -> dict[str, Any]:
    return {
        "schema": schema_json(table.schema),
        "version": table.version,
        "step_count": table.step_count,
        "base": None,  # room for a table that has changed pages only, and another version's for the rest
        "ledger": table.ledger,
        "arrays": [array_json(array) for array in table.arrays],
        "batches": [batch_json(batch, order) for batch in table.batches],
    }


def _table(value: object, path: str, files: Mapping[str, StoredFile]) -> TableState:
    given = Fields(value, path)
    schema = parse_schema(given.take("schema"), given.path("schema"))
    if given.take("base") is not None:
        raise Unfit(f"{given.path('base')} is set: this table stands on another, which a newer mempool reads")
    arrays = each(parse_array, given.items("arrays"))
    check_arrays(schema, arrays, given.path("arrays"))
    paths = tuple(files)
    table = TableState(
        schema=schema,
        version=given.integer("version"),
        step_count=given.integer("step_count"),
        ledger=given.take("ledger"),
        arrays=arrays,
        batches=tuple(
            parse_batch(Fields(batch, where), schema, arrays, paths, files) for where, batch in given.items("batches")
        ),
    )
    given.done()
    return table
