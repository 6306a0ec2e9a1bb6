"""PoolState: a pool's tables as a part of a training job's checkpoint, beside the model and its optimizers.

Pages and their moment are the pool's (``Pool.checkpoint``, ``Pool.restore``); this decides which rank asks, and what
is kept of it beside the model.
"""

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any, TypeVar

import torch.distributed as dist

from mempool.client import Pool, Table
from mempool.errors import InvalidRequest, MempoolError, NotFound
from mempool.types.keys import key_table_name

T = TypeVar("T")

_KEYS = ("place", "checkpoint", "tables")
_LOADER = "torch.distributed.checkpoint.state_dict_loader"


class PoolState:
    """A ``Stateful`` for ``torch.distributed.checkpoint``: model, optimizers and tables go back to one step together.

    ``state_dict`` takes a checkpoint of the pool at its place, and answers its name: that is what lies beside the
    model. ``load_state_dict`` restores the tables from exactly that checkpoint; every ``Table`` of theirs, and layers
    and optimizers that use it, go on with the restored ones. They are restored whatever version they have: a version
    counts steps, and two tables at one version need not be the same.

    With a process group every rank calls both, as ``torch.distributed.checkpoint`` does: the first asks the pool once
    all have come, the others wait for its answer, or its error. So a checkpoint, and a restore, must take less than the
    group's timeout. A step that a rank has committed before it calls ``state_dict`` is in the checkpoint.

    The pool's checkpoint is whole before the model's is written: a job that dies in between has the one before, and one
    of the pool that no model names. So at least two are kept, and the first ``state_dict`` of a process removes none.

    Args:
        pool: The pool; with several ranks, one that they share.
        place: Where its checkpoints lie, as in ``Pool.checkpoint``: a folder that all of the pool's processes have
            under this path, or a URL. ``load_state_dict`` looks here too, wherever it was when the state was saved.
        tables: Names, or tables; None: all tables of the pool.
        keep: Remove all but so many of the newest, at least 2; None: none.
        process_group: The ranks; None: all, where ``torch.distributed`` is initialized.

    Raises:
        InvalidRequest: keep is below 2, or tables are none.

    Example:
        >>> pool_state = mempool.nn.PoolState(pool, "/shared/run-7/pool")
        >>> state = {"model": model, "memory": memory_optimizer, "pool": pool_state}
        >>> torch.distributed.checkpoint.save(state, checkpoint_id="/shared/run-7/120")
        >>> torch.distributed.checkpoint.load(state, checkpoint_id="/shared/run-7/120")
    """

    def __init__(
        self,
        pool: Pool,
        place: str | os.PathLike[str],
        *,
        tables: Iterable[str | Table] | None = None,
        keep: int | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if keep is not None and keep < 2:
            raise InvalidRequest(
                f"keep={keep}: a PoolState keeps 2 checkpoints at least, as the newest counts only once the model that "
                "names it is written"
            )
        if not isinstance(pool, Pool):
            raise InvalidRequest(f"PoolState({type(pool).__name__}, ...): its first argument is the pool")
        if isinstance(tables, (str, Table)):
            tables = [tables]
        self._pool = pool
        self._place = place
        self._tables = None if tables is None else [t.name if isinstance(t, Table) else t for t in tables]
        if self._tables == []:
            raise InvalidRequest("tables=[]: name at least one table, or leave it out for all of the pool's")
        self._keep = keep
        self._group = process_group
        self._saved_before = False

    def state_dict(self) -> dict[str, Any]:
        """Take a checkpoint of the pool, while nothing trains on it here; answers once it is whole.

        Returns:
            "place" and "checkpoint": where it is, and its name. "tables": their versions by name, as JSON. (While
            ``torch.distributed.checkpoint.load`` asks for the keys that it is to read: these keys, and no checkpoint.)

        Raises:
            InvalidRequest: The place is wrong, or another pool's; or another checkpoint is being taken.
            StorageFailed: The place does not take it.
            MempoolError: As ``Pool.checkpoint``.
        """
        if _only_keys_are_wanted():
            return dict.fromkeys(_KEYS, "")
        return self._first_rank(self._take)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the tables from the checkpoint that the state names, in the place of those that there are.

        Raises:
            InvalidRequest: It is no such state; nothing was changed.
            NotFound: The checkpoint is not at the place (any more); nothing was changed.
            MempoolError: As ``Pool.restore``; a table is the restored one, or as it was.
        """
        name, tables, saved_at = _checked(state_dict)
        for table in self._first_rank(lambda: self._restore(name, tables, saved_at)):
            self._pool.reopen(table)

    def _take(self) -> dict[str, Any]:
        keep = self._keep if self._saved_before else None
        taken = self._pool.checkpoint(self._place, tables=self._tables, keep=keep)
        self._saved_before = True
        versions = {each.table: each.version for each in taken.tables if not each.table.endswith(key_table_name(""))}
        return {"place": taken.url, "checkpoint": taken.name, "tables": json.dumps(versions)}

    def _restore(self, name: str, tables: list[str], saved_at: str) -> list[str]:
        try:
            self._pool.restore(self._place, checkpoint=name, tables=tables, replace=True)
        except NotFound as error:
            raise NotFound(
                f"{error.message.rstrip('.')}. The model's state goes with checkpoint {name}, which was taken at "
                f"{saved_at}; this PoolState looks for it at {os.fspath(self._place)}. Give PoolState the place where "
                "it is by now, or load another state"
            ) from error
        return tables

    def _first_rank(self, act: Callable[[], T]) -> T:
        """What ``act`` answers on the first rank, on every rank; or its error."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(self._group) == 1:
            return act()
        if self._pool.router.tries.where.embedded:
            raise InvalidRequest(
                f"pool {self._pool.name!r} is embedded in this rank's process, and there are "
                f"{dist.get_world_size(self._group)} ranks: let them share a pool (mempool.connect), or give PoolState "
                "a process_group of this rank alone and a place of its own"
            )
        # A broadcast lets the first rank go on before the others have come, whose last commits shall be in it.
        dist.all_gather_object([None] * dist.get_world_size(self._group), None, group=self._group)
        if dist.get_rank(self._group) != 0:
            outcome: list[Any] = [None, None]
            dist.broadcast_object_list(outcome, group=self._group, group_src=0)
            if outcome[1] is not None:
                raise outcome[1]
            return outcome[0]  # type: ignore[no-any-return]
        answer: T | None = None
        told: MempoolError | None = None
        try:
            answer = act()
            return answer
        except MempoolError as error:
            told = error
            raise
        except BaseException as error:
            told = MempoolError(f"the first rank failed: {error!r}")
            raise
        finally:  # whatever came of it, the others wait for it
            dist.broadcast_object_list([answer, told], group=self._group, group_src=0)


def _only_keys_are_wanted() -> bool:
    """Whether ``torch.distributed.checkpoint.load`` asks: it takes a state_dict first, to know what to read, and a
    checkpoint there would be one of tables that are about to be replaced. Nothing but who calls tells that from a
    save. Should torch's module get another name, there is one checkpoint too many, and a test fails."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == _LOADER:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _checked(state: Mapping[str, Any]) -> tuple[str, list[str], str]:
    """The checkpoint's name, its tables, and where it was taken."""
    try:
        place, name, versions = (state[key] for key in _KEYS)
        tables = list(json.loads(versions))
        if not (name and tables and isinstance(name, str) and all(isinstance(table, str) for table in tables)):
            raise ValueError("names no checkpoint")
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidRequest(
            f"this is no state of a PoolState, which has {', '.join(_KEYS)} ({type(error).__name__}: {error}); it is "
            f"{_in_short(state)}. Nothing was changed"
        ) from None
    return name, tables, str(place)


def _in_short(state: object) -> str:
    """What it is, without tensors."""
    if not isinstance(state, Mapping):
        return f"a {type(state).__name__}"
    keys = ", ".join(map(str, islice(state, 5)))
    return f"a {type(state).__name__} of {len(state)} keys" + (f": {keys}" if keys else "")
