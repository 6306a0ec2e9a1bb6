"""From what a user asks to be restored to the tables that are to be made, and where their pages come from.

Reads a manifest, and no page.
"""

from dataclasses import replace
from typing import cast, get_args

from mempool.checkpoint.commit import read_manifest
from mempool.checkpoint.format.json_values import Unfit
from mempool.checkpoint.format.ledger_json import parse_ledger
from mempool.checkpoint.format.manifest import Manifest
from mempool.checkpoint.stores import open_store
from mempool.checkpoint.stores.places import check_place
from mempool.controller.saving.alike import require_no_key_table
from mempool.controller.saving.making import Origin
from mempool.errors import DataLoss, InvalidRequest, MempoolError, NotFound, StorageFailed
from mempool.types import Ledger, RestoreTables, TableSchema, TableSource
from mempool.types.keys import is_key_table, key_table, key_table_name
from mempool.types.schema import Layout
from mempool.types.schema_checks import check_schema, shown


def origins_of(request: RestoreTables) -> list[tuple[TableSchema, Origin]]:
    """The schemas of the tables, and their origins.

    Raises:
        NotFound: There is no such checkpoint, or table in it.
        DataLoss: The manifest is damaged.
        InvalidRequest: The place, the name or the layout is wrong, or the checkpoint is of a newer format.
        StorageFailed: The place cannot be read.
    """
    check_place(request.url)
    if request.layout and request.layout not in get_args(Layout):
        raise InvalidRequest(
            f"layout={shown(request.layout)} is none that there is: give one of {', '.join(get_args(Layout))}, or "
            "leave it out. Nothing was changed."
        )
    for name in (*request.tables, request.name, "" if request.schema is None else request.schema.name):
        require_no_key_table(name, "restored")
    try:
        if request.schema is not None:
            schemas = [request.schema, key_table(request.schema)]
            return [_of_file(request, schema) for schema in schemas if schema is not None]
        manifest = read_manifest(open_store(request.url), request.checkpoint or None)
    except MempoolError:
        raise
    except Exception as error:  # of the user's fsspec package, say
        raise StorageFailed(f"{request.url} cannot be read ({type(error).__name__}: {error})") from error
    own = (name for name, state in manifest.tables.items() if not is_key_table(state.schema))
    tables = tuple(dict.fromkeys(request.tables or own))
    if request.name and len(tables) != 1:
        raise InvalidRequest(
            f"name={shown(request.name)} is for one table, and {len(tables)} are asked for ({', '.join(tables[:4])}); "
            "name the one that is to be called so. Nothing was changed."
        )
    found = [_origin(request, manifest, table, request.name or table) for table in tables]
    return [*found, *(keys for each in zip(tables, found, strict=True) for keys in _keys_of(request, manifest, *each))]


def _keys_of(
    request: RestoreTables, manifest: Manifest, table: str, restored: tuple[TableSchema, Origin]
) -> list[tuple[TableSchema, Origin]]:
    """The table of the keys that a table trains: it comes with it, by its new name."""
    schema, _ = restored
    wanted = key_table(schema)
    if wanted is None:
        return []
    name = key_table_name(table)
    if name not in manifest.tables:
        raise DataLoss(f"checkpoint {manifest.name!r} of {request.url} has table {table!r} without its keys ({name!r})")
    return [_origin(replace(request, layout=""), manifest, name, wanted.name)]


def _of_file(request: RestoreTables, schema: TableSchema) -> tuple[TableSchema, Origin]:
    """What the file holds is looked at by who reads it: each owner, before it takes anything."""
    schema = replace(schema, table_id=0)
    check_schema(schema)
    source = TableSource(url=request.url, checkpoint="", table=request.values, keys=request.keys)
    return schema, Origin(source=source, ledger=Ledger(), replace=request.replace)


def _origin(request: RestoreTables, manifest: Manifest, table: str, name: str) -> tuple[TableSchema, Origin]:
    state = manifest.tables.get(table)
    if state is None:
        raise NotFound(
            f"checkpoint {manifest.name!r} of {request.url} has no table {shown(table)}; it has: "
            f"{', '.join(manifest.tables)}"
        )
    layout = cast("Layout", request.layout or state.schema.layout)
    schema = replace(state.schema, table_id=0, name=name, layout=layout)
    check_schema(schema)
    try:
        updates = 0 if state.ledger is None else parse_ledger(state.ledger).updates_applied
    except Unfit as error:
        raise DataLoss(f"table {table!r} of checkpoint {manifest.name!r} has no ledger: {error}") from None
    # Whose steps they were does not go along: the table is a new one, to which no step of the old one can come late.
    ledger = Ledger(version=state.version, updates_applied=updates, step_offset=state.step_count - state.version)
    source = TableSource(url=request.url, checkpoint=manifest.name, table=table)
    return schema, Origin(source=source, ledger=ledger, replace=request.replace, newest_id=request.newest_id)
