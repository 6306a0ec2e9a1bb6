"""Tables in and out as single files: what is asked of the pool, and what is written and removed here."""

import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from mempool.checkpoint.exchange.table_file import export_table
from mempool.checkpoint.exchange.table_source import TableSource
from mempool.checkpoint.reader import Checkpoint
from mempool.checkpoint.stores import Store, open_store
from mempool.checkpoint.stores.local import LocalStore
from mempool.checkpoint.stores.places import absolute
from mempool.config import TableConfig, resolve
from mempool.errors import InvalidRequest, MempoolError
from mempool.types import CheckpointProgress, RestoreTables, TakeCheckpoint
from mempool.types.keys import key_table

_ASIDE = "mempool-export-"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportProgress:
    """How far the export of a table is; the last report is what became of it.

    Attributes:
        file: Where it goes.
        version: The table's, of everything in the file; 0 until its moment is taken.
        bytes_done, bytes_total: Of what is done just now.
        doing: What that is, for people; "" at the end.
    """

    table: str
    file: str
    version: int
    bytes_done: int
    bytes_total: int
    doing: str


def asked_import(
    file: object,
    config: TableConfig | None,
    *,
    name: str | None,
    replace_table: bool,
    values: str | None,
    keys: str | None,
) -> RestoreTables:
    """What is sent to the pool. Looks into the file here. Raises as ``Pool.import_table``."""
    for what, text in (("name", name), ("values", values), ("keys", keys)):
        if text is not None and not (isinstance(text, str) and text):
            raise InvalidRequest(f"{what}={text!r:.80}: give a name, or leave it out")
    if config is not None and not isinstance(config, TableConfig):
        raise InvalidRequest(
            f"config={config!r:.80}: give a mempool.TableConfig, or leave it out for a file that mempool wrote"
        )
    url = absolute(file)  # type: ignore[arg-type]  # which refuses what is no path
    source = TableSource(url, values=values, keys=keys)
    schema = source.schema if config is None else resolve(config)
    if schema is None:
        raise InvalidRequest(
            f"{url} does not say what table its rows are of, as mempool did not write it. Say so: config=TableConfig("
            f"name=..., num_slots={source.num_slots}, value_dim={source.value_dim}, ...)"
        )
    schema = replace(schema, table_id=0, name=name or schema.name)
    source.check(schema)
    return RestoreTables(
        url=url, name=schema.name, replace=bool(replace_table), schema=schema, values=values or "", keys=keys or ""
    )


class Export:
    """One call of ``export_table``: a checkpoint of the table aside, the file from that, and the checkpoint away again.

    Args:
        table: Its name.
        file: Where it goes.
        state: The optimizer's state too.
        via: A place for what is written aside; None: beside the file.
        progress: Told how far it is.

    Attributes:
        request: The checkpoint that is to be taken first.
    """

    def __init__(
        self,
        table: object,
        file: object,
        *,
        state: bool,
        via: object | None,
        progress: Callable[[ExportProgress], None] | None,
    ) -> None:
        if not (isinstance(table, str) and table):
            raise InvalidRequest(f"table {table!r:.80}: give the name of a table")
        url = absolute(file)  # type: ignore[arg-type]
        token = f"{_ASIDE}{secrets.token_hex(4)}"
        place = f"{url}.{token}" if via is None else f"{absolute(via).rstrip('/')}/{token}"  # type: ignore[arg-type]
        self.request = TakeCheckpoint(url=absolute(place), tables=(table,), incremental=False, aside=True)
        self._progress = progress
        self._state = state
        self._last = ExportProgress(table=table, file=url, version=0, bytes_done=0, bytes_total=0, doing="waiting")

    def heard(self, report: CheckpointProgress) -> None:
        """A report of the checkpoint."""
        version = report.tables[0].version if report.tables else 0  # the first is the one that was named
        self._say(
            replace(
                self._last,
                version=version,
                bytes_done=report.bytes_done,
                bytes_total=report.bytes_total,
                doing=report.doing or "written aside",
            )
        )

    def write(self) -> ExportProgress:
        """The checkpoint is there: write the file."""

        def written(done: int, total: int) -> None:
            self._say(replace(self._last, bytes_done=done, bytes_total=total, doing="writing the file"))

        checkpoint = Checkpoint(open_store(self.request.url))
        stored = checkpoint.table(self._last.table)
        trained = key_table(stored.state.schema)
        keys = None if trained is None else checkpoint.table(trained.name)
        export_table(stored, self._last.file, keys=keys, state=self._state, progress=written)
        return self._say(replace(self._last, version=stored.state.version, doing=""))

    def clear(self) -> None:
        """Remove what was written aside, all of which is this export's."""
        with suppress(MempoolError):  # what came of the export is said; a leftover is named as one
            _clear(open_store(self.request.url))

    def _say(self, now: ExportProgress) -> ExportProgress:
        self._last = now
        if self._progress is not None:
            self._progress(now)
        return now


def _clear(store: Store) -> None:
    for path in store.list():
        store.remove(path)
    if isinstance(store, LocalStore):
        with suppress(OSError):
            os.rmdir(Path(store.root))
