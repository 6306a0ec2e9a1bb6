"""In what tables differ, for people, and which may be asked for, and take the place of which."""

from collections.abc import Collection

from mempool.errors import AlreadyExists, InvalidRequest
from mempool.types import KeySpec, TableSchema, TableSource
from mempool.types.keys import key_table_name
from mempool.types.schema_checks import shown
from mempool.types.schema_differences import schema_differences

_OF_PAGES = ("layout", "block_dim", "page_slots", "seed", "init_std")
_OF_RATES = ("lr", "eps", "beta1", "beta2", "lr_decay", "initial_accumulator_value", "weight_decay", "max_norm")
_MAY_DIFFER = ("table_id", *_OF_PAGES, *_OF_RATES)
"""A table may take the place of one that differs in these: who uses it finds what it knows."""


def require_no_key_table(name: str, what: str) -> None:
    """Raises InvalidRequest for the name of a table of keys, which has no life of its own. what: "made", "saved"."""
    if name.endswith(key_table_name("")):
        owner = name.removesuffix(key_table_name(""))
        raise InvalidRequest(
            f"table {shown(name)} has the keys of table {shown(owner)}, and is {what} with it: name that one. Nothing "
            "was changed."
        )


def require_alike(present: TableSchema, schema: TableSchema, source: TableSource) -> None:
    """Raises AlreadyExists where a table is not to take the place of another one: who uses that would find what they do
    not know."""
    if found := differences(present, schema, aside=_MAY_DIFFER):
        of = f" of checkpoint {source.checkpoint!r}" if source.checkpoint else ""
        what = f"table {source.table!r}{of} in {source.url}"
        raise AlreadyExists(
            f"{what} is another one than table {schema.name!r} of the pool: {'; '.join(found)}. Restore it under "
            f"another name (name=, or --as), or drop the pool's first (pool.drop_table({schema.name!r})). Nothing was "
            "changed."
        )


def differences(present: TableSchema, asked: TableSchema, *, aside: Collection[str] = ("table_id",)) -> list[str]:
    """Fields in which two schemas differ: "optimizer.lr is 0.1, not 0.2". aside: Fields that may."""
    return [
        f"{found.path} is {_shown(found.first)}, not {_shown(found.second)}"
        for found in schema_differences(present, asked, aside=aside)
    ]


def _shown(value: object) -> str:
    return repr(value) if isinstance(value, KeySpec) else shown(value)
