"""What a user says of a table (``TableConfig``) and the whole schema it stands for (``resolve``).

Leaves to others: which shard owns which page (``mempool.placement``).
"""

import math
from dataclasses import replace
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from mempool.config.model import ConfigModel, FieldProblem, Flag, Loc, Number, WholeNumber, within
from mempool.config.optimizers import Adagrad, Optimizer, whole_rows
from mempool.types import (
    FlatKeySpec,
    KeySpec,
    ProductKeySpec,
    Rounding,
    StorageDtype,
    TableSchema,
    TrainedKeySpec,
    default_rounding,
)
from mempool.types.keys import group_count, probe_count
from mempool.types.schema_checks import (
    GROUP_RANGES,
    KEY_RANGES,
    NAME,
    RANGES,
    power_of_two_problem,
    schema_problems,
    uneven_problem,
)
from mempool.types.sizes import default_page_slots

Name = Annotated[str, Field(pattern=f"^{NAME.pattern}$")]

# Fields of a schema that follow from the others where nothing is said of them.
_DERIVED = ("block_dim", "page_slots", "layout", "rounding", "init_std")

_LOCS: dict[tuple[str, ...], Loc] = {
    ("optimizer", "beta1"): ("optimizer", "betas", 0),
    ("optimizer", "beta2"): ("optimizer", "betas", 1),
    ("keys", "optimizer", "beta1"): ("keys", "optimizer", "betas", 0),
    ("keys", "optimizer", "beta2"): ("keys", "optimizer", "betas", 1),
}
"""Where a field of the schema stands in a configuration, where that is not the same."""


class _Keys(ConfigModel):
    """What product keys and flat keys have in common."""

    deterministic: Flag = True
    optimizer: Optimizer | None = None

    @model_validator(mode="after")
    def _scored_in_order(self) -> Self:
        if self.optimizer is not None and not self.deterministic:
            text = (
                "is of keys that nobody trains here; those with an optimizer are scored in a fixed order. Leave it out"
            )
            raise FieldProblem(("deterministic",), False, text)
        return self


class ProductKeys(_Keys):
    """Product keys kept in the pool: per head two codebooks of n half-keys, n * n = num_slots. Where they are trained,
    n is the least with n ** ways >= num_slots, and the products beyond the last slot are never chosen.

    Args:
        heads: Number of heads, each with codebooks of its own.
        key_dim: Width of a query of one head, a multiple of ways; a half-key is key_dim / ways wide.
        ways: Codebooks of a head: more than 2 of keys that are trained, and num_slots at least 2 ** ways. Slot
            ``(i1 * n + i2) * n + ...`` has half-keys i1, i2, ...
        deterministic: Scores are summed in a fixed order: a query has the same bits alone and in any batch. False takes
            whatever order is fastest; results then agree to rounding.
        optimizer: What the shards run on the keys at each commit, if they are trained (``Table.score``); None: they
            are what is written to them.
    """

    type: Literal["product"] = "product"
    heads: Annotated[WholeNumber, within(KEY_RANGES["heads"])]
    key_dim: Annotated[WholeNumber, within(KEY_RANGES["key_dim"])]
    ways: Annotated[WholeNumber, within(KEY_RANGES["ways"])] = 2

    @model_validator(mode="after")
    def _parts(self) -> Self:
        text = uneven_problem(self.key_dim, self.ways)
        if text is not None:
            raise FieldProblem(("key_dim",), self.key_dim, text)
        if self.ways != 2 and self.optimizer is None:
            text = "is of keys that are trained in the pool: give them an optimizer, or leave it out"
            raise FieldProblem(("ways",), self.ways, text)
        return self


class FlatKeys(_Keys):
    """One key per slot, kept beside its value; where they are trained, in a table beside this one.

    Args:
        key_dim: Width of a key and of a query.
        deterministic: As in ProductKeys, and for any number of shards.
        optimizer: As in ProductKeys.
    """

    type: Literal["flat"] = "flat"
    key_dim: Annotated[WholeNumber, within(KEY_RANGES["key_dim"])]


class HierarchicalKeys(ConfigModel):
    """Keys in groups, trained in the pool: one key a slot and one a group, which all heads share.

    A query q picks the ``probes`` best groups, and the best slots in those; the score of a slot is
    ``<q, key of its group> + <q, its own key>``, so that the choice of groups is trained too. The search is greedy:
    ``MemoryLayer.recall`` says what it misses.

    Args:
        key_dim: Width of a key and of a query of one head.
        groups: Groups, of equally many slots but for the last one. None: so many that scoring their keys takes about
            as long as scoring the slots of ``probes`` groups, sqrt(probes * num_slots).
        probes: Groups that a query looks into. None: 8, or as many as there are.
        optimizer: What the shards run on the keys at each commit.
    """

    type: Literal["hierarchical"] = "hierarchical"
    key_dim: Annotated[WholeNumber, within(KEY_RANGES["key_dim"])]
    groups: Annotated[WholeNumber, within(GROUP_RANGES["groups"])] | None = None
    probes: Annotated[WholeNumber, within(GROUP_RANGES["probes"])] | None = None
    optimizer: Optimizer


Keys = ProductKeys | FlatKeys | HierarchicalKeys


class TableConfig(ConfigModel):
    """A table as its user describes it; what is left None is derived by ``resolve``.

    Args:
        name: Letters, digits, ``_ . -``, a letter first, at most 63 in all.
        num_slots: Number of slots; n * n with product keys in the pool that are not trained.
        value_dim: Width of a value, in elements.
        dtype: How values are stored: "float32", "bfloat16", or one byte an element with a float32 scale per slot and
            column block, "float8_e4m3fn" or "int8". Sums are float32 in any case.
        rounding: How a step's results are rounded to dtype: "stochastic", which loses nothing on average and gives the
            same bits on any shards and again in a replay, or "nearest", which loses steps that are small beside the
            value. By default stochastic where dtype is not float32 and there is no master.
        master: Keep float32 values beside the stored ones and train those; look-ups read the stored ones.
        usage: Count how often each slot is trained, and keep when last, 16 bytes a slot: ``Table.usage``.
        seed: Of the initial values, 0 to 2^63 - 1.
        layout: How pages spread over shards: "columns", "rows", "grid", or "auto".
        keys: Keys kept in the pool, or None where the model has them or ids come from the caller.
        optimizer: What the shards run at each commit.
        block_dim: Width of a column block; by default an eighth of value_dim, in steps of 64, or all of it where the
            optimizer needs whole rows (``rowwise="row"``, ``max_norm``).
        page_slots: Slots of a page, a power of two; by default about a 64th of the table, 16 to 4096, but fewer where
            a page would have more than 64 MiB, and more where there would be more than 2^20 pages.
        init_std: Standard deviation of initial values; by default 1 / sqrt(value_dim).

    Raises:
        ConfigError: A value is out of range; the message says which and what to give instead.

    Example:
        >>> table = TableConfig(name="facts", num_slots=512**2, value_dim=256, optimizer=Adagrad(lr=0.1))
        >>> resolve(table).block_dim
        64
    """

    name: Name
    num_slots: Annotated[WholeNumber, within(RANGES["num_slots"])]
    value_dim: Annotated[WholeNumber, within(RANGES["value_dim"])]
    dtype: StorageDtype = "float32"
    rounding: Rounding | None = None
    master: Flag = False
    usage: Flag = False
    seed: Annotated[WholeNumber, within(RANGES["seed"])] = 0
    layout: Literal["auto", "columns", "rows", "grid"] = "auto"
    keys: Annotated[Keys, Field(discriminator="type")] | None = None
    optimizer: Optimizer = Adagrad(lr=0.1)
    block_dim: Annotated[WholeNumber, within(RANGES["block_dim"])] | None = None
    page_slots: Annotated[WholeNumber, within(RANGES["page_slots"])] | None = None
    init_std: Annotated[Number, within(RANGES["init_std"])] | None = None

    @field_validator("page_slots")
    @classmethod
    def _power_of_two(cls, page_slots: int | None) -> int | None:
        text = None if page_slots is None else power_of_two_problem(page_slots)
        if text is not None:
            raise ValueError(text)
        return page_slots

    @model_validator(mode="after")
    def _schema(self) -> Self:
        """What every door of the pool checks, and that an optimizer of whole rows has them."""
        reason = whole_rows(self.optimizer)
        if reason is not None and self.block_dim is not None and self.block_dim < self.value_dim:
            text = f"cuts slots in several blocks, and {reason} of the optimizer needs them whole; leave it out."
            raise FieldProblem(("block_dim",), self.block_dim, text)
        for problem in schema_problems(resolve(self)):
            raise FieldProblem(_LOCS.get(problem.path, problem.path), problem.value, problem.text)
        return self


def resolve(config: TableConfig) -> TableSchema:
    """The schema a table of this configuration has, with ``table_id`` 0: the pool gives the id."""
    keys = config.keys
    root = math.isqrt(config.num_slots)
    flat = isinstance(keys, FlatKeys) and keys.optimizer is None
    whole = whole_rows(config.optimizer) is not None
    schema = TableSchema(
        table_id=0,
        name=config.name,
        num_slots=config.num_slots,
        value_dim=config.value_dim,
        block_dim=config.block_dim or (config.value_dim if whole else _default_block_dim(config.value_dim)),
        page_slots=config.page_slots or 1,
        dtype=config.dtype,
        seed=config.seed,
        init_std=1 / math.sqrt(config.value_dim) if config.init_std is None else config.init_std,
        stride=root if root * root == config.num_slots else 0,
        # Flat keys lie beside block 0: only rows let every shard score slots of its own. One block has but rows to cut.
        layout="rows" if (flat or whole) and config.layout == "auto" else config.layout,
        optimizer=config.optimizer.spec(),
        keys=_key_spec(keys, config.num_slots),
        rounding=config.rounding or default_rounding(config.dtype, master=config.master),
        master=config.master,
        usage=config.usage,
    )
    return schema if config.page_slots else replace(schema, page_slots=default_page_slots(schema))


def _key_spec(keys: Keys | None, num_slots: int) -> KeySpec | None:
    if keys is not None and keys.optimizer is not None:
        made = TrainedKeySpec(key_dim=keys.key_dim, optimizer=keys.optimizer.spec())
        if isinstance(keys, ProductKeys):
            return replace(made, product=True, heads=keys.heads, ways=keys.ways)
        if isinstance(keys, HierarchicalKeys):
            groups = group_count(num_slots, keys.groups, keys.probes)
            return replace(made, groups=groups, probes=probe_count(groups, keys.probes))
        return made
    if isinstance(keys, ProductKeys):
        return ProductKeySpec(heads=keys.heads, key_dim=keys.key_dim, deterministic=keys.deterministic)
    return (
        None if not isinstance(keys, FlatKeys) else FlatKeySpec(key_dim=keys.key_dim, deterministic=keys.deterministic)
    )


def _default_block_dim(value_dim: int) -> int:
    """An eighth of the value, in steps of 64, at least 64, and never wider than the value."""
    eighth = -(-value_dim // 8)
    return min(value_dim, max(64, -(-eighth // 64) * 64))


def unsaid(config: TableConfig) -> tuple[str, ...]:
    """Fields of the schema that follow from the others, as the config says nothing of them."""
    said = {name for name in config.model_fields_set if getattr(config, name) is not None}
    return tuple(name for name in _DERIVED if name not in said)
