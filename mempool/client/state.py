"""A table's optimizer state by slot id, and its step count: what is read from and written for checkpoints of elsewhere.

Leaves messages to ``rows`` and the router. Legend: M rows.
"""

import operator
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from mempool.client.rows import checked_matrix
from mempool.errors import InvalidRequest
from mempool.types import TableSchema
from mempool.types.sizes import state_names

_MOST_STEPS = 2**53 - 1  # every client's language can hold them


def writable_names(schema: TableSchema) -> tuple[str, ...]:
    """The arrays beside the values that can be written: "values.exp_avg" and such, and "values.master" where kept."""
    states = state_names(schema.optimizer)
    return tuple(f"values.{name}" for name in (*(("master",) if schema.master else ()), *states))


def readable_names(schema: TableSchema) -> tuple[str, ...]:
    """Those that can be written, and those that follow from what else is written."""
    scales = ("values.scales",) if schema.packed else ()
    last_step = ("values.last_step",) if schema.optimizer.dense else ()
    return (*writable_names(schema), *scales, *last_step)


def names_to_read(schema: TableSchema, names: Iterable[str] | None) -> tuple[str, ...]:
    """The names asked for; those that can be written where None.

    Raises:
        InvalidRequest: An array that the table has not.
    """
    if names is None:
        return writable_names(schema)
    if isinstance(names, str):
        raise InvalidRequest(f"table {schema.name!r}: names is a text, {names!r}; give a list of names, [{names!r}].")
    asked = tuple(names)
    _require_known(schema, asked, readable_names(schema))
    return asked


def checked_state(schema: TableSchema, state: Mapping[str, Tensor], num_rows: int) -> dict[str, Tensor]:
    """State to write, by name, each [M, ..] float32 on the CPU.

    Raises:
        InvalidRequest: An array that the table has not or that cannot be written, another shape, or no numbers.
    """
    if not isinstance(state, Mapping):
        raise InvalidRequest(
            f"table {schema.name!r}: state must be a dict of name and tensor, not {type(state).__name__}; its names "
            f"are {', '.join(writable_names(schema)) or 'none'}."
        )
    _require_known(schema, state, writable_names(schema))
    return {
        name: checked_matrix(name, matrix, [num_rows, _columns(schema, name)], torch.float32, table=schema.name)
        for name, matrix in state.items()
    }


def checked_step(schema: TableSchema, step: int) -> int:
    """A step count.

    Raises:
        InvalidRequest: No whole number, or out of range.
    """
    try:
        number = operator.index(step)
    except TypeError:
        number = -1
    if isinstance(step, bool) or not 0 <= number <= _MOST_STEPS:
        raise InvalidRequest(
            f"table {schema.name!r}: step = {step!r} must be the number of steps that are done, 0 to {_MOST_STEPS}."
        )
    return number


def _columns(schema: TableSchema, name: str) -> int:
    return schema.num_blocks if name.startswith("values.row_") else schema.value_dim


def _require_known(schema: TableSchema, names: Iterable[str], known: tuple[str, ...]) -> None:
    for name in names:
        if name not in known:
            raise InvalidRequest(
                f"table {schema.name!r} with optimizer {schema.optimizer.algorithm!r} has no state {name!r} here; it "
                f"has {', '.join(known) or 'none'}."
            )
