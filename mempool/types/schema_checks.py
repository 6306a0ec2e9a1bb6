"""What a table's schema may be: one check for every door (Python, file, wire, shard), as tables of rules.

Pure, of types and errors alone. A door names the field in its own words: by the path a problem has.
"""

import math
import re
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields

from mempool.errors import InvalidRequest
from mempool.types.keys import grouping_of, groups_problem, key_table, key_table_name
from mempool.types.schema import (
    Algorithm,
    FlatKeySpec,
    OptimizerSpec,
    OwnKeySpec,
    ProductKeySpec,
    TableSchema,
    TrainedKeySpec,
    default_rounding,
)
from mempool.types.sizes import MAX_PAGE_SLOTS, MAX_PAGES, key_page_bytes, row_page_bytes

MAX_BLOCKS = 256
"""Column blocks: a shard works on every block of every row by itself, and plans are made of (shard, block) pairs."""
MAX_PAGE_BYTES = 128 * 2**20
"""A row page, and the keys of a head, move in one message, which has at most 256 MiB."""

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,62}", re.ASCII)
NAME_TEXT = "must begin with a letter and go on with letters, digits, _ . or -, at most 63 in all"

_MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """Numbers a field may have: ``low`` to ``high``, both allowed unless ``below`` leaves ``high`` out."""

    low: float
    high: float
    below: bool = False

    def problem(self, value: float) -> str | None:
        """What is wrong with a value, to follow "field = value "; None where nothing is."""
        if value < self.low:
            return f"must be at least {shown(self.low)}"
        if value > self.high or (self.below and value == self.high):
            return f"must be {'less than' if self.below else 'at most'} {shown(self.high)}"
        return None if math.isfinite(value) else "must be finite"


@dataclass(frozen=True, slots=True, kw_only=True)
class HyperParameter:
    """A number of an optimizer: its range, and which algorithms take it."""

    range: Range
    of: frozenset[Algorithm]


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemaProblem:
    """One thing wrong with a schema.

    Attributes:
        path: The field: ("num_slots",), ("keys", "heads"), ("optimizer", "eps").
        text: What is wrong and what to do, to follow "field = value ".
    """

    path: tuple[str, ...]
    value: object
    text: str


RANGES: Mapping[str, Range] = {
    "num_slots": Range(low=1, high=2**40),
    "value_dim": Range(low=1, high=2**20),
    "block_dim": Range(low=1, high=2**20),
    "page_slots": Range(low=1, high=MAX_PAGE_SLOTS),
    "seed": Range(low=0, high=2**63 - 1),
    "init_std": Range(low=0, high=1e6),
}
KEY_RANGES: Mapping[str, Range] = {
    "heads": Range(low=1, high=4096),
    "key_dim": Range(low=1, high=2**20),
    "ways": Range(low=2, high=8),
}
GROUP_RANGES: Mapping[str, Range] = {"groups": Range(low=1, high=2**40), "probes": Range(low=1, high=4096)}
"""Of hierarchical keys; others have 0 of both."""

_LARGE = Range(low=0, high=1e30)  # float32 holds it, and its product with a gradient
_EPS = Range(low=1e-37, high=1e30)  # float32 holds it: with less, 0 / 0
_DECAY = Range(low=0, high=1, below=True)
_ADAMS: frozenset[Algorithm] = frozenset({"adam", "adamw", "rowwise_adam"})
_ADAGRADS: frozenset[Algorithm] = frozenset({"adagrad", "rowwise_adagrad"})

HYPER_PARAMETERS: Mapping[str, HyperParameter] = {
    "lr": HyperParameter(range=_LARGE, of=_ADAMS | _ADAGRADS | {"sgd"}),
    "eps": HyperParameter(range=_EPS, of=_ADAMS | _ADAGRADS),
    "beta1": HyperParameter(range=_DECAY, of=_ADAMS),
    "beta2": HyperParameter(range=_DECAY, of=_ADAMS),
    "lr_decay": HyperParameter(range=_LARGE, of=frozenset({"adagrad"})),
    "initial_accumulator_value": HyperParameter(range=_LARGE, of=frozenset({"adagrad"})),
    "weight_decay": HyperParameter(range=_LARGE, of=_ADAMS | _ADAGRADS | {"sgd"}),
    "momentum": HyperParameter(range=_DECAY, of=frozenset({"sgd"})),
    "dampening": HyperParameter(range=_DECAY, of=frozenset({"sgd"})),
    "max_norm": HyperParameter(range=Range(low=1e-37, high=1e30), of=_ADAMS | _ADAGRADS | {"sgd"}),
}
"""Every number of an ``OptimizerSpec``; one that an algorithm does not take must be left at its default."""
FLAGS: Mapping[str, frozenset[Algorithm]] = {
    "dense": frozenset({"adamw"}),
    "nesterov": frozenset({"sgd"}),
    "decoupled_weight_decay": _ADAGRADS | {"sgd", "adam", "rowwise_adam"},
    "corrected_eps": frozenset({"adam", "rowwise_adam"}),
}
"""What can be asked of which algorithms."""

_DEFAULTS = {field.name: field.default for field in fields(OptimizerSpec)}


def check_schema(schema: TableSchema) -> None:
    """Raises InvalidRequest that names the first field which is wrong, its value, the limit and what to do."""
    for problem in schema_problems(schema):
        path = ".".join(("TableSchema", *problem.path))
        raise InvalidRequest(f"{path} = {shown(problem.value)} {problem.text}")


def schema_problems(schema: TableSchema) -> Iterator[SchemaProblem]:
    """All that is wrong with a schema: fields by themselves, and if those are right, fields together."""
    found = False
    for problem in (*_field_problems(schema), *_key_problems(schema), *optimizer_problems(schema.optimizer)):
        found = True
        yield problem
    if not found:
        yield from _shape_problems(schema)
        yield from _rounding_problems(schema)
        yield from _norm_problems(schema)
        yield from _key_table_problems(schema)


def optimizer_problems(optimizer: OptimizerSpec) -> Iterator[SchemaProblem]:
    """What is wrong with an optimizer's numbers, whatever the table."""
    algorithm = optimizer.algorithm
    for name, parameter in HYPER_PARAMETERS.items():
        value = getattr(optimizer, name)
        if value is None:
            continue
        text = parameter.range.problem(value)
        if text is None and algorithm not in parameter.of and value != _DEFAULTS[name]:
            text = f"means nothing to {algorithm}; leave it out. It is of {', '.join(sorted(parameter.of))}"
        if text is not None:
            yield SchemaProblem(path=("optimizer", name), value=value, text=text)
    for name, of in FLAGS.items():
        if getattr(optimizer, name) and algorithm not in of:
            text = f"means nothing to {algorithm}; leave it out. It is of {', '.join(sorted(of))}"
            yield SchemaProblem(path=("optimizer", name), value=True, text=text)
    yield from _momentum_problems(optimizer)


def _momentum_problems(optimizer: OptimizerSpec) -> Iterator[SchemaProblem]:
    if optimizer.nesterov and (optimizer.momentum == 0.0 or optimizer.dampening != 0.0):
        text = "needs a momentum above 0 and no dampening, as in torch.optim.SGD"
        yield SchemaProblem(path=("optimizer", "nesterov"), value=True, text=text)
    if optimizer.dampening != 0.0 and optimizer.momentum == 0.0:
        text = "dampens a momentum, which is 0; leave it out, or give a momentum"
        yield SchemaProblem(path=("optimizer", "dampening"), value=optimizer.dampening, text=text)


def power_of_two_problem(page_slots: int) -> str | None:
    """What is wrong with a number of slots of a page within its range."""
    if not page_slots & (page_slots - 1):
        return None
    below = 1 << (page_slots.bit_length() - 1)
    return f"is not a power of two. Nearest: {_nearest(below, below * 2, high=MAX_PAGE_SLOTS)}."


def uneven_problem(key_dim: int, ways: int) -> str | None:
    """What is wrong with the width of a product key within its range."""
    if not key_dim % ways:
        return None
    below = key_dim - key_dim % ways
    near = _nearest(below, below + ways, high=KEY_RANGES["key_dim"].high)
    if ways == 2:
        return f"is odd; a query is cut into two halves. Nearest: {near}."
    return f"is no multiple of {ways}; a query is cut into as many parts. Nearest: {near}."


def shown(value: object) -> str:
    """A value as messages show it: whole numbers with underscores, text in quotes, long things cut."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:_}" if abs(value) < 10**40 else "a number of more than 40 digits"
    return _SHORT.repr(value)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


def _nearest(*numbers: int, high: float) -> str:
    return " or ".join(shown(number) for number in numbers if 1 <= number <= high)


def _field_problems(schema: TableSchema) -> Iterator[SchemaProblem]:
    if NAME.fullmatch(_owner(schema)) is None:
        yield SchemaProblem(path=("name",), value=schema.name, text=NAME_TEXT)
    for name, allowed in RANGES.items():
        value = getattr(schema, name)
        text = allowed.problem(value)
        if text is None and name == "page_slots":
            text = power_of_two_problem(value)
        if text is not None:
            yield SchemaProblem(path=(name,), value=value, text=text)


def _owner(schema: TableSchema) -> str:
    """The name that its user gave it, or gave the table whose keys it has; "" where that is not in its name."""
    if not isinstance(schema.keys, OwnKeySpec):
        return schema.name
    owner, suffix = schema.name[: -len(key_table_name(""))], schema.name[-len(key_table_name("")) :]
    return owner if suffix == key_table_name("") else ""


def _ways(schema: TableSchema) -> int:
    """Parts of product keys, if they may have so many; 1 without."""
    keys = schema.keys
    if isinstance(keys, TrainedKeySpec) and keys.product and KEY_RANGES["ways"].problem(keys.ways) is None:
        return keys.ways
    return 2 if isinstance(keys, ProductKeySpec) else 1


def _key_problems(schema: TableSchema) -> Iterator[SchemaProblem]:
    keys = schema.keys
    ways = _ways(schema)
    for name, allowed in KEY_RANGES.items():
        value = getattr(keys, name, None)
        if value is None:
            continue
        text = allowed.problem(value)
        if text is None and name == "key_dim":
            text = uneven_problem(value, ways)
        if text is not None:
            yield SchemaProblem(path=("keys", name), value=value, text=text)
    if isinstance(keys, TrainedKeySpec):
        if not keys.product and keys.heads != 1:
            text = "must be 1: keys that are no product keys have one head"
            yield SchemaProblem(path=("keys", "heads"), value=keys.heads, text=text)
        if not keys.product and keys.ways != 2:
            yield SchemaProblem(path=("keys", "ways"), value=keys.ways, text="is of product keys; leave it out")
        yield from _group_problems(keys)
        for problem in optimizer_problems(keys.optimizer):
            yield SchemaProblem(path=("keys", *problem.path), value=problem.value, text=problem.text)


def _group_problems(keys: TrainedKeySpec) -> Iterator[SchemaProblem]:
    """Of hierarchical keys, whatever the table."""
    for name, allowed in GROUP_RANGES.items():
        value = getattr(keys, name)
        text = allowed.problem(value) if keys.groups or keys.probes else None
        if keys.product and value:
            text = "is of hierarchical keys; leave it out"
        elif name == "probes" and text is None and value > keys.groups:
            text = f"is more than there are groups, {keys.groups:_}: give at most that"
        if text is not None:
            yield SchemaProblem(path=("keys", name), value=value, text=text)


def _key_table_problems(schema: TableSchema) -> Iterator[SchemaProblem]:
    """Of the table that its keys are in, or, where it is one, of how that is cut."""
    keys = schema.keys
    grouping = grouping_of(keys, schema.num_slots)
    if isinstance(keys, TrainedKeySpec) and grouping is not None:
        text = groups_problem(grouping.num_slots, grouping.groups)
        if text is not None:
            yield SchemaProblem(path=("keys", "groups"), value=keys.groups, text=text)
            return
    if isinstance(keys, OwnKeySpec):
        section = schema.num_slots // max(1, keys.sections)
        whole = keys.sections * section == schema.num_slots and 1 <= keys.rows <= section
        paged = keys.sections == 1 or section % schema.page_slots == 0
        whole = whole and (keys.sections == 1 or keys.sections % max(1, keys.ways) == 0)
        if grouping is not None:
            grouped = 2 * keys.groups <= schema.num_slots and groups_problem(grouping.num_slots, keys.groups) is None
            whole = whole and keys.sections == 1 and keys.rows == schema.num_slots and grouped
        if not (keys.sections >= 1 and whole and paged and schema.num_blocks == 1 and schema.dtype == "float32"):
            text = "cuts no table of keys: float32 values in one column block, in sections of as many whole pages"
            yield SchemaProblem(path=("keys",), value=keys, text=text)
        return
    made = key_table(schema)
    for problem in () if made is None else schema_problems(made):
        of_keys = ("keys", *problem.path) if problem.path[0] == "optimizer" else ("keys", "key_dim")
        text = f"makes a table of keys whose {problem.path[-1]}, {shown(problem.value)}, {problem.text}"
        yield SchemaProblem(path=of_keys, value=_key_dim(schema), text=text)


def _shape_problems(schema: TableSchema) -> Iterator[SchemaProblem]:
    """Of fields that are right by themselves."""
    root = math.isqrt(schema.num_slots)
    square = root * root == schema.num_slots
    ways = _ways(schema)
    # Keys that are trained take any number of slots: the last products are none.
    if isinstance(schema.keys, ProductKeySpec) and not square:
        near = " or ".join(f"{n**2:_} ({n}^2)" for n in (root, root + 1))
        text = f"is not a square; product keys need n * n. Nearest: {near}."
        yield SchemaProblem(path=("num_slots",), value=schema.num_slots, text=text)
    elif ways > 2 and schema.num_slots < 2**ways:
        text = f"must be at least {2**ways} (2^{ways}): two half-keys in each codebook of product keys of {ways} parts"
        yield SchemaProblem(path=("num_slots",), value=schema.num_slots, text=text)
    elif schema.stride != (root if square else 0):
        text = f"must be {root}, as num_slots is {root}^2" if square else "must be 0, as num_slots is not a square"
        yield SchemaProblem(path=("stride",), value=schema.stride, text=text)
    if schema.block_dim > schema.value_dim:
        text = f"is wider than a value; give at most value_dim, {schema.value_dim:_}"
        yield SchemaProblem(path=("block_dim",), value=schema.block_dim, text=text)
    elif schema.num_blocks > MAX_BLOCKS:
        least = -(-schema.value_dim // MAX_BLOCKS)
        yield SchemaProblem(
            path=("block_dim",),
            value=schema.block_dim,
            text=f"makes {schema.num_blocks:_} column blocks of {schema.value_dim:_} columns; a table may have "
            f"{MAX_BLOCKS}. Give at least {least:_}",
        )
    yield from _page_problems(schema)


def _page_problems(schema: TableSchema) -> Iterator[SchemaProblem]:
    """Pages are few, so that all can know where they are, and small, so that each can move."""
    pages = schema.num_row_pages * schema.num_blocks
    if schema.num_blocks <= MAX_BLOCKS and pages > MAX_PAGES:
        yield SchemaProblem(
            path=("num_slots",),
            value=schema.num_slots,
            text=f"makes {pages:_} pages of {schema.page_slots} slots x {schema.block_dim} columns; a table may have "
            f"{MAX_PAGES:_}. Give a larger page_slots (at most {MAX_PAGE_SLOTS:_}) or block_dim.",
        )
    num_bytes = row_page_bytes(schema)
    if num_bytes > MAX_PAGE_BYTES:
        per_slot = num_bytes // schema.page_slots
        fitting = 1 << max(0, (MAX_PAGE_BYTES // per_slot).bit_length() - 1)
        least = f"Give at most {fitting:_}." if fitting * per_slot <= MAX_PAGE_BYTES else "Make the rows narrower."
        yield SchemaProblem(
            path=("page_slots",),
            value=schema.page_slots,
            text=f"makes pages of {num_bytes / _MIB:,.1f} MiB ({per_slot:_} bytes a slot, optimizer's state and flat "
            f"keys with it); a page moves in one message and may have {MAX_PAGE_BYTES // _MIB} MiB. {least}",
        )
    num_bytes = key_page_bytes(schema)
    if num_bytes > MAX_PAGE_BYTES and schema.stride <= schema.num_slots:  # a wrong stride says nothing of the keys
        yield SchemaProblem(
            path=("keys", "key_dim"),
            value=_key_dim(schema),
            text=f"makes keys of {num_bytes / _MIB:,.1f} MiB a head; they move in one message and may have "
            f"{MAX_PAGE_BYTES // _MIB} MiB. Give at most {MAX_PAGE_BYTES // (8 * max(1, schema.stride)) * 2:_}",
        )


def _rounding_problems(schema: TableSchema) -> Iterator[SchemaProblem]:
    if schema.master and schema.dtype == "float32":
        text = "has nothing to add: values of dtype float32 are their own."
        yield SchemaProblem(path=("master",), value=True, text=text)
    elif schema.rounding == "stochastic" and default_rounding(schema.dtype, master=schema.master) == "nearest":
        kept = "a master of float32" if schema.master else "dtype float32"
        text = f"has nothing to round with {kept}; leave it out."
        yield SchemaProblem(path=("rounding",), value=schema.rounding, text=text)
    if schema.optimizer.dense and schema.dtype != "float32" and not schema.master:
        yield SchemaProblem(
            path=("optimizer", "dense"),
            value=True,
            text=f"needs float32 values, and dtype is {schema.dtype!r}: a slot's missed steps are too small for it. "
            "Give master=True, or dtype float32, or dense=False.",
        )


def _norm_problems(schema: TableSchema) -> Iterator[SchemaProblem]:
    max_norm = schema.optimizer.max_norm
    if max_norm is None:
        return
    if schema.optimizer.dense:
        text = "bounds slots when they have a gradient, and a dense optimizer moves them without; leave one out"
        yield SchemaProblem(path=("optimizer", "max_norm"), value=max_norm, text=text)
    elif schema.num_blocks > 1:
        yield SchemaProblem(
            path=("optimizer", "max_norm"),
            value=max_norm,
            text=f"bounds whole values, which no shard has of {schema.num_blocks} column blocks; give block_dim = "
            f"value_dim, {schema.value_dim:_}",
        )


def _key_dim(schema: TableSchema) -> int:
    return schema.keys.key_dim if isinstance(schema.keys, ProductKeySpec | FlatKeySpec | TrainedKeySpec) else 0
