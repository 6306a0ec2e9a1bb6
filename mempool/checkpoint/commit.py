"""The begin and the end of a checkpoint: a name that nothing else has, and the manifest, written last.

Parts come from writers, wherever they run; what is missing between them is refused here, before anything counts.
"""

import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from mempool.checkpoint.format.json_values import JsonObject
from mempool.checkpoint.format.layout import live_batches, live_bytes, places
from mempool.checkpoint.format.manifest import (
    Manifest,
    Part,
    TableState,
    manifest_bytes,
    manifest_path,
    parse_manifest,
)
from mempool.checkpoint.format.pages import Batch, Pages, StoredFile
from mempool.checkpoint.stores import Store
from mempool.checkpoint.stores.store import place_of
from mempool.errors import DataLoss, InvalidRequest, NotFound
from mempool.types import TableSchema
from mempool.types.schema_differences import schema_differences

_NAME = re.compile(r"(\d{6,18})-[0-9a-f]{8}", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """A checkpoint in the making.

    Attributes:
        name: Its folder.
        base: The checkpoint that unchanged pages are read from; None: everything is written.
    """

    name: str
    number: int
    pool: str
    base: Manifest | None


def number_of(folder: str) -> int | None:
    """The number in a checkpoint's name; None for folders that are none of ours."""
    found = _NAME.fullmatch(folder)
    return int(found[1]) if found else None


def names(listed: Iterable[str]) -> list[str]:
    """The checkpoints that have a manifest, oldest first. listed: Paths of the place."""
    found = {path.partition("/")[0] for path in listed}
    listed = set(listed)
    whole = [name for name in found if number_of(name) is not None and manifest_path(name) in listed]
    return sorted(whole, key=lambda name: (number_of(name), name))


def read_manifest(store: Store, name: str | None = None) -> Manifest:
    """A checkpoint's manifest. name: None for the newest.

    Raises:
        NotFound: There is no such checkpoint.
        DataLoss: The manifest is damaged.
        InvalidRequest: It is of a newer format.
    """
    if name is None:
        listed = store.list()
        there = names(listed)
        if not there:
            raise NotFound(f"{store.url} has no checkpoint. {_half(store, listed) or 'Is the place right?'}")
        name = there[-1]
    if number_of(name) is None:
        raise NotFound(f"{name!r} is no name of a checkpoint; those of {store.url}: {_listed(store)}")
    path = manifest_path(name)
    try:
        data = store.read(path)
    except NotFound:
        half = _half(store, store.list(name))
        text = f"{store.url} has no checkpoint {name!r}; it has: {_listed(store)}"
        raise NotFound(f"{text}. {half}" if half else text) from None
    manifest = parse_manifest(data, place_of(store.url, path))
    if manifest.name != name:
        raise DataLoss(f"{place_of(store.url, path)} is the manifest of {manifest.name!r}: it was moved. Move it back")
    return manifest


def begin(store: Store, *, pool: str, incremental: bool = True) -> Begun:
    """Begin a checkpoint. Nothing is written yet; one place has one pool, and one checkpoint in the making.

    Args:
        store: The place.
        pool: The pool's name.
        incremental: Let pages that did not change be read from the newest checkpoint's files: unless its manifest is
            damaged, or more than half of its files' bytes are of pages that were written anew since.

    Raises:
        InvalidRequest: The place has checkpoints of another pool, or of a newer format.
    """
    listed = store.list()
    numbers = [number for path in listed if (number := number_of(path.partition("/")[0])) is not None]
    newest: Manifest | None = None
    base: Manifest | None = None
    for name in reversed(names(listed)):
        try:
            newest = read_manifest(store, name)
        except DataLoss:  # no reason to take no checkpoint, which may be the one that is whole
            incremental = False
            continue
        base = newest if incremental and not _is_worn(newest) else None
        break
    if newest is not None and newest.pool != pool:
        raise InvalidRequest(
            f"{store.url} has checkpoints of pool {newest.pool!r}, and this is pool {pool!r}: give another place"
        )
    number = max(numbers, default=0) + 1
    return Begun(
        name=f"{number:06d}-{secrets.token_hex(4)}",
        number=number,
        pool=pool,
        base=base,
    )


def commit(
    store: Store,
    begun: Begun,
    parts: Sequence[Part],
    *,
    ledgers: Mapping[str, Any] | None = None,
    extra: JsonObject | None = None,
    written_by: str = "mempool",
    now: datetime | None = None,
) -> Manifest:
    """End a checkpoint: once its manifest is written it counts, whole. It can be repeated.

    Args:
        store: The place.
        begun: From ``begin``.
        parts: Of all writers, of all tables.
        ledgers: Table -> its ledger, JSON of the pool's own.
        extra: The user's own, JSON.
        written_by: The program and its version.
        now: When it was taken; None for now.

    Raises:
        InvalidRequest: Parts of a table are of different versions or schemas, pages are missing or twice, a part
            stands on another checkpoint, ``extra`` is no JSON, or another one was taken here meanwhile. Nothing counts
            then.
        DataLoss: A file that is needed is missing or short.
    """
    tables = _by_table(begun, parts)
    ledgers = ledgers or {}
    unknown = sorted(set(ledgers) - set(tables))
    if unknown:
        raise InvalidRequest(f"there are ledgers of tables {unknown}, and no parts of them")
    states = {name: replace(_joined(begun, tables[name]), ledger=ledgers.get(name)) for name in sorted(tables)}
    moment = now or datetime.now(UTC)
    manifest = Manifest(
        name=begun.name,
        number=begun.number,
        pool=begun.pool,
        created=moment.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        written_by=written_by,
        extra=dict(extra or {}),
        files=_files(begun, parts, states),
        tables=states,
    )
    try:
        data = manifest_bytes(manifest)
    except (ValueError, TypeError, RecursionError) as error:
        raise InvalidRequest(f"extra={extra!r:.80} cannot be kept: it must be JSON ({error})") from None
    problems = missing_files(store, manifest)
    if problems:
        raise DataLoss(f"checkpoint {begun.name!r} is not whole: {'; '.join(problems[:3])}. Take it again")
    _check_newest(store, begun)
    store.put(manifest_path(begun.name), data)
    return manifest


def _by_table(begun: Begun, parts: Sequence[Part]) -> dict[str, list[Part]]:
    tables: dict[str, list[Part]] = {}
    for part in parts:
        if part.checkpoint != begun.name:
            raise InvalidRequest(f"part {part.writer!r} is of checkpoint {part.checkpoint!r}, not of {begun.name!r}")
        if not all(path.startswith(f"{begun.name}/") for path in part.files):
            raise InvalidRequest(f"part {part.writer!r} names files outside of checkpoint {begun.name!r}")
        tables.setdefault(part.table.schema.name, []).append(part)
    return tables


def _check_newest(store: Store, begun: Begun) -> None:
    # Its own is there where this is the second try, and nobody heard of the first.
    there = set(names(store.list())) - {begun.name}
    later = sorted(name for name in there if (number_of(name) or 0) >= begun.number)
    if later:
        raise InvalidRequest(
            f"checkpoint {later[-1]!r} was taken in {store.url} meanwhile, by another pool or another controller of "
            f"this one: give each a place of its own"
        )


def missing_files(store: Store, manifest: Manifest) -> list[str]:
    """What is wrong with a checkpoint's files, by their sizes alone."""
    sizes: dict[str, int] = {}
    for folder in {path.partition("/")[0] for path in manifest.files}:
        sizes |= store.list(folder)
    found: list[str] = []
    for path, file in manifest.files.items():
        size = sizes.get(path)
        if size is None:
            found.append(f"{place_of(store.url, path)} is missing")
        elif size != file.size:
            found.append(f"{place_of(store.url, path)} has {size:_} bytes, and should have {file.size:_}")
    return found


def _is_worn(manifest: Manifest) -> bool:
    """Whether most of what it keeps was written anew since."""
    live = sum(live_bytes(table.schema, table.arrays) for table in manifest.tables.values())
    return sum(file.size - file.header_bytes for file in manifest.files.values()) > 2 * live


def _joined(begun: Begun, parts: Sequence[Part]) -> TableState:
    """One table of its parts, and of the base where they are of changes."""
    first = parts[0].table
    name = first.schema.name
    writers = [part.writer for part in parts]
    if len(set(writers)) != len(writers):
        raise InvalidRequest(f"table {name!r} has two parts of one writer: {sorted(writers)}")
    for part in parts:
        table = part.table
        if (table.version, table.step_count) != (first.version, first.step_count):
            raise InvalidRequest(
                f"the parts of table {name!r} are of different moments: {parts[0].writer!r} wrote version "
                f"{first.version} (step {first.step_count}), {part.writer!r} {table.version} (step "
                f"{table.step_count}). Write them at one version"
            )
        if table.schema != first.schema or table.arrays != first.arrays:
            raise InvalidRequest(
                f"parts {parts[0].writer!r} and {part.writer!r} of table {name!r} differ in what the table is: "
                f"{_difference(first.schema, table.schema)}"
            )
    _check_owned(name, first.schema, parts)
    batches = [*_base(begun, parts), *(batch for part in parts for batch in part.table.batches)]
    return replace(first, batches=live_batches(first.schema, batches))


def _base(begun: Begun, parts: Sequence[Part]) -> tuple[Batch, ...]:
    """The base's batches of this table, where a part stands on it."""
    standing = [part for part in parts if part.since is not None]
    if not standing:
        return ()
    schema = standing[0].table.schema
    base = begun.base
    table = None if base is None else base.tables.get(schema.name)
    for part in standing:
        if base is None or table is None or (part.since, part.since_version) != (base.name, table.version):
            stood = "no checkpoint" if base is None else f"{base.name!r}"
            version = "" if table is None else f" (version {table.version})"
            raise InvalidRequest(
                f"part {part.writer!r} of table {schema.name!r} has what changed since {part.since!r} (version "
                f"{part.since_version}), and this checkpoint stands on {stood}{version}. Write all of its pages"
            )
    assert table is not None
    if table.schema != schema or table.arrays != standing[0].table.arrays:
        raise InvalidRequest(
            f"table {schema.name!r} is another one than in {standing[0].since!r}: "
            f"{_difference(table.schema, schema)}. Write all of its pages"
        )
    return table.batches


def _check_owned(name: str, schema: TableSchema, parts: Sequence[Part]) -> None:
    """Every page is one writer's, who wrote it, or says that it did not change."""
    owners = Pages.none(schema)
    rows, heads = owners.row_pages.astype(np.int32), owners.key_pages.astype(np.int32)
    for part in parts:
        rows += part.owned.row_pages
        heads += part.owned.key_pages
        where = places(schema, part.table.batches)
        written = Pages(where.batch >= 0, where.key_batch >= 0)
        if _beyond(written, part.owned) or (part.since is None and _beyond(part.owned, written)):
            raise InvalidRequest(
                f"part {part.writer!r} of table {name!r} has other pages than it should: {len(part.owned)} are its "
                f"own, and {len(written)} were written"
            )
    writers = ", ".join(sorted(part.writer for part in parts))
    lacking = int((rows == 0).sum()) + int((heads == 0).sum())
    if lacking:
        raise InvalidRequest(
            f"{lacking} pages of table {name!r} are in no part, among those of {writers}: every owner writes its own"
        )
    twice = int((rows > 1).sum()) + int((heads > 1).sum())
    if twice:
        raise InvalidRequest(f"{twice} pages of table {name!r} are in two parts of {writers}: a page has one owner")


def _beyond(pages: Pages, others: Pages) -> bool:
    return bool((pages.row_pages & ~others.row_pages).any() or (pages.key_pages & ~others.key_pages).any())


def _files(begun: Begun, parts: Sequence[Part], states: Mapping[str, TableState]) -> dict[str, StoredFile]:
    """The files that the tables read, oldest first."""
    known: dict[str, StoredFile] = dict(begun.base.files) if begun.base is not None else {}
    for part in parts:
        known |= part.files
    named = {batch.file for state in states.values() for batch in state.batches}
    return {path: known[path] for path in sorted(named)}


def _difference(first: TableSchema, second: TableSchema) -> str:
    found = next(iter(schema_differences(first, second, aside=())), None)
    return "its arrays differ" if found is None else f"{found.path} is {found.first!r} and {found.second!r}"


def _listed(store: Store) -> str:
    there = names(store.list())
    return ", ".join(there[-5:]) if there else "none"


def _half(store: Store, listed: Iterable[str]) -> str:
    """What is to be said of a checkpoint's files without their manifest; "" where there are none."""
    found = {path.partition("/")[0] for path in listed}
    name = max((each for each in found if number_of(each) is not None), default="")
    if not name:
        return ""
    return (
        f"{place_of(store.url, manifest_path(name))} is missing: that checkpoint was never finished, or was copied in "
        "part, so its files count for nothing. Copy it again from where it is whole, or take another"
    )
