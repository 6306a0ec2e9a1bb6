"""What a pool keeps elsewhere, and takes from there: checkpoints of it, and files of one table."""

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, overload

from mempool.client.checkpoints import CheckpointHandle, Restoring, asked_checkpoint, asked_restore
from mempool.client.exchange import Export, ExportProgress, asked_import
from mempool.client.following import Following
from mempool.client.opened import OpenTables
from mempool.client.opening.creation import CreateProgress
from mempool.client.table import Table
from mempool.config import TableConfig
from mempool.types import CheckpointProgress, PoolApi, TableView
from mempool.types.keys import is_key_table
from mempool.wire.channels import loop


class Keeping:
    """These calls of a ``Pool``."""

    _api: PoolApi
    _following: Following
    _open: OpenTables

    @overload
    def checkpoint(
        self,
        url: str | os.PathLike[str],
        *,
        tables: Iterable[str] | None = ...,
        incremental: bool = ...,
        keep: int | None = ...,
        extra: Mapping[str, Any] | None = ...,
        wait: Literal[True] = ...,
        progress: Callable[[CheckpointProgress], None] | None = ...,
    ) -> CheckpointProgress: ...

    @overload
    def checkpoint(
        self,
        url: str | os.PathLike[str],
        *,
        tables: Iterable[str] | None = ...,
        incremental: bool = ...,
        keep: int | None = ...,
        extra: Mapping[str, Any] | None = ...,
        wait: Literal[False],
    ) -> CheckpointHandle: ...

    def checkpoint(
        self,
        url: str | os.PathLike[str],
        *,
        tables: Iterable[str] | None = None,
        incremental: bool = True,
        keep: int | None = None,
        extra: Mapping[str, Any] | None = None,
        wait: bool = True,
        progress: Callable[[CheckpointProgress], None] | None = None,
    ) -> CheckpointProgress | CheckpointHandle:
        """Write the pool's tables to a place, as they are at one moment, while training and lookups go on.

        All tables are of one step boundary; steps that are acknowledged before this is called are in it. Has no
        deadline once begun. A checkpoint is there whole, or not at all.

        Args:
            url: A folder that all of the pool's processes have under this path, or a URL that fsspec knows
                ("s3://bucket/run-7"). It has checkpoints of one pool.
            tables: Names; None: all tables.
            incremental: Write only pages that changed since the newest checkpoint there, and name those for the rest.
            keep: Remove all but so many of the newest, once this one is whole; None: none.
            extra: Your own, JSON: kept with it.
            wait: False: answer a handle at once, once it has begun.
            progress: Called on this thread with each report, where it is waited for; an exception of it ends the
                watching, not the checkpoint.

        Returns:
            The last report: the checkpoint's name, the tables' versions; or the handle.

        Raises:
            InvalidRequest: The place is wrong, or another pool's; or another checkpoint is being taken.
            NotFound: There is no such table.
            StorageFailed: The place does not take it.
            PoolUnreachable: The controller does not answer; once begun, it may go on by itself: list the place.
        """
        request = asked_checkpoint(url, tables, incremental=incremental, keep=keep, extra=extra)
        if wait:
            return self._following.checkpoint(request, progress)
        reports, first = self._following.begun(request)
        handle = CheckpointHandle(first)
        loop.start(handle.follow(reports))
        return handle

    def restore(
        self,
        url: str | os.PathLike[str],
        *,
        checkpoint: str | None = None,
        tables: Iterable[str] | None = None,
        name: str | None = None,
        replace: bool = False,
        layout: str | None = None,
        progress: Callable[[CreateProgress], None] | None = None,
    ) -> tuple[Table, ...]:
        """Make tables of a checkpoint's, whatever number of shards and layout it was taken with: bit for bit.

        Each is there whole, or not at all; one that it replaces stays until then, and there must be room for both. A
        ``Table`` of this client that is replaced (or was dropped), and what uses it, goes on with the restored one, if
        that has as many slots and columns and the same keys: what was pending is dropped. Other clients are told so
        when they next ask, and go on by ``reopen``.

        Args:
            url: The place, as in ``checkpoint``.
            checkpoint: The name of the checkpoint; None: the newest.
            tables: Names in the checkpoint; None: all.
            name: What the table is to be called, where it is one alone. Random rounding goes by the name.
            replace: Take the place of tables of these names.
            layout: As in ``TableConfig``; None: as it was.
            progress: Called on this thread with each report, about once a second.

        Raises:
            NotFound: There is no such checkpoint, or it has no such table.
            AlreadyExists: There is a table of that name.
            DataLoss: The checkpoint is damaged; the message names file and bytes.
            InvalidRequest: The place is wrong, or the checkpoint is of a newer mempool.
            PoolUnreachable: The controller does not answer; the pool may go on with it: see ``status``.
        """
        request = asked_restore(url, tables, checkpoint=checkpoint, name=name, replace=replace, layout=layout)
        restoring = Restoring(self._api, request)
        self._following.follow(restoring.reports(), progress)
        return self._opened(restoring.views, replace=replace)

    def export_table(
        self,
        name: str,
        file: str | os.PathLike[str],
        *,
        state: bool = False,
        via: str | os.PathLike[str] | None = None,
        progress: Callable[[ExportProgress], None] | None = None,
    ) -> ExportProgress:
        """Write a table as one safetensors file: ``values`` [num_slots, value_dim] in the table's dtype, and its keys.

        All of it is of one version of the table, while training goes on: a checkpoint of the table is taken aside and
        removed again, so there must be room for it, and the pool's processes and this one must see it. Some megabytes
        are in memory at a time. The file is there whole, or not at all.

        Args:
            name: The table's.
            file: A path, or a URL that fsspec knows.
            state: The optimizer's state too, as ``values.<state>``; not that of keys which are trained.
            via: Where the checkpoint is taken; None: beside the file.
            progress: Called on this thread with each report.

        Returns:
            The last report, with the table's version.

        Raises:
            NotFound: There is no such table.
            StorageFailed: The file, or what is written aside, is not taken.
            MempoolError: As ``checkpoint``.
        """
        export = Export(name, file, state=bool(state), via=via, progress=progress)
        try:
            self._following.checkpoint(export.request, export.heard)
            return export.write()
        except KeyboardInterrupt as interrupt:
            interrupt.add_note(f"The pool may go on writing to {export.request.url}: remove what is left there.")
            raise
        finally:
            export.clear()

    def import_table(
        self,
        file: str | os.PathLike[str],
        config: TableConfig | None = None,
        *,
        name: str | None = None,
        replace: bool = False,
        values: str | None = None,
        keys: str | None = None,
        progress: Callable[[CreateProgress], None] | None = None,
    ) -> Table:
        """Make a table whose values, and keys where it has any, are a file's; optimizer state and steps begin anew.

        The shards read it themselves, each its own pages, some megabytes at a time. The table is there whole, or not at
        all; one that it replaces stays until then, as in ``restore``.

        Args:
            file: A safetensors file that this process and the pool's see under this path, or a URL that fsspec knows;
                or a file of torch.save, tensors alone. Exported by mempool, or a memory layer's ("[...]values.weight"
                and "[...]keys") or an embedding's ("[...]weight").
            config: The table; None: as the file says, where mempool wrote it.
            name: What it is to be called; None: as the config, or the file, says.
            replace: Take the place of a table of that name.
            values, keys: Names of their tensors; None: as they are found.
            progress: Called on this thread with each report, about once a second.

        Raises:
            NotFound: There is no such file.
            AlreadyExists: There is a table of that name.
            InvalidRequest: The file's tensors are not such a table's; with what was found.
            DataLoss: The file is damaged.
            PoolUnreachable: The controller does not answer; the pool may go on with it: see ``status``.
        """
        request = asked_import(file, config, name=name, replace_table=replace, values=values, keys=keys)
        restoring = Restoring(self._api, request)
        self._following.follow(restoring.reports(), progress)
        (table,) = self._opened(restoring.views, replace=replace)
        return table

    def _opened(self, views: Iterable[TableView], *, replace: bool) -> tuple[Table, ...]:
        """The tables that were made, in whose place their keys' are opened too, if they replace others."""
        opened = self._open.taken_over if replace else self._open.opened
        made = [opened(view) for view in self._open.adopted(views)]
        return tuple(table for table in made if not is_key_table(table.schema))
