"""What a user says of a table (``TableConfig``) and the whole schema it stands for (``resolve``).

Leaves to others: which shard owns which page (``mempool.placement``).
"""

import math
from dataclasses import replace
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from mempool.config.model import ConfigModel, FieldProblem, Flag, Loc, Number, WholeNumber, within
from mempool.config.optimizers import Adagrad, Optimizer, whole_rows
from mempool.types import FlatKeySpec, ProductKeySpec, Rounding, StorageDtype, TableSchema, default_rounding
from mempool.types.schema_checks import (
    KEY_RANGES,
    MAX_PAGE_SLOTS,
    MAX_PAGES,
    NAME,
    RANGES,
    odd_problem,
    power_of_two_problem,
    schema_problems,
)
from mempool.types.sizes import row_page_bytes

Name = Annotated[str, Field(pattern=f"^{NAME.pattern}$")]

_PAGE_BYTES = 64 * 2**20

# Fields of a schema that follow from the others where nothing is said of them.
_DERIVED = ("block_dim", "page_slots", "layout", "rounding", "init_std")
"""Pages are at most so large unless asked for: as much as one round of a move carries."""

_LOCS: dict[tuple[str, ...], Loc] = {
    ("optimizer", "beta1"): ("optimizer", "betas", 0),
    ("optimizer", "beta2"): ("optimizer", "betas", 1),
}
"""Where a field of the schema stands in a configuration, where that is not the same."""


class ProductKeys(ConfigModel):
    """Product keys kept in the pool: per head two codebooks of n half-keys, n * n = num_slots.

    Args:
        heads: Number of heads, each with codebooks of its own.
        key_dim: Width of a query of one head, even; a half-key is key_dim / 2 wide.
        deterministic: Scores are summed in a fixed order: a query has the same bits alone and in any batch. False takes
            whatever order is fastest; results then agree to rounding.
    """

    type: Literal["product"] = "product"
    heads: Annotated[WholeNumber, within(KEY_RANGES["heads"])]
    key_dim: Annotated[WholeNumber, within(KEY_RANGES["key_dim"])]
    deterministic: Flag = True

    @field_validator("key_dim")
    @classmethod
    def _even(cls, key_dim: int) -> int:
        text = odd_problem(key_dim)
        if text is not None:
            raise ValueError(text)
        return key_dim


class FlatKeys(ConfigModel):
    """One key per slot, kept beside its value.

    Args:
        key_dim: Width of a key and of a query.
        deterministic: As in ProductKeys, and for any number of shards.
    """

    type: Literal["flat"] = "flat"
    key_dim: Annotated[WholeNumber, within(KEY_RANGES["key_dim"])]
    deterministic: Flag = True


class TableConfig(ConfigModel):
    """A table as its user describes it; what is left None is derived by ``resolve``.

    Args:
        name: Letters, digits, ``_ . -``, a letter first, at most 63 in all.
        num_slots: Number of slots; n * n with product keys, in the pool or in the model.
        value_dim: Width of a value, in elements.
        dtype: How values are stored: "float32", "bfloat16", or one byte an element with a float32 scale per slot and
            column block, "float8_e4m3fn" or "int8". Sums are float32 in any case.
        rounding: How a step's results are rounded to dtype: "stochastic", which loses nothing on average and gives the
            same bits on any shards and again in a replay, or "nearest", which loses steps that are small beside the
            value. By default stochastic where dtype is not float32 and there is no master.
        master: Keep float32 values beside the stored ones and train those; look-ups read the stored ones.
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
    seed: Annotated[WholeNumber, within(RANGES["seed"])] = 0
    layout: Literal["auto", "columns", "rows", "grid"] = "auto"
    keys: Annotated[ProductKeys | FlatKeys, Field(discriminator="type")] | None = None
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
    flat = isinstance(keys, FlatKeys)
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
        keys=_key_spec(keys),
        rounding=config.rounding or default_rounding(config.dtype, master=config.master),
        master=config.master,
    )
    return schema if config.page_slots else replace(schema, page_slots=_default_page_slots(schema))


def _key_spec(keys: ProductKeys | FlatKeys | None) -> ProductKeySpec | FlatKeySpec | None:
    if isinstance(keys, ProductKeys):
        return ProductKeySpec(heads=keys.heads, key_dim=keys.key_dim, deterministic=keys.deterministic)
    return None if keys is None else FlatKeySpec(key_dim=keys.key_dim, deterministic=keys.deterministic)


def _default_block_dim(value_dim: int) -> int:
    """An eighth of the value, in steps of 64, at least 64, and never wider than the value."""
    eighth = -(-value_dim // 8)
    return min(value_dim, max(64, -(-eighth // 64) * 64))


def _default_page_slots(schema: TableSchema) -> int:
    """About 64 pages for small tables, so that they spread; large pages for large ones, so that they are few.

    Smaller where rows are wide, so that a page moves soon; larger where there would be too many. schema: Of pages of
    one slot.
    """
    next_power = 1 << (-(-schema.num_slots // 64) - 1).bit_length()
    page_slots = min(4096, max(16, next_power))
    while page_slots > 1 and page_slots * row_page_bytes(schema) > _PAGE_BYTES:
        page_slots //= 2
    while -(-schema.num_slots // page_slots) * schema.num_blocks > MAX_PAGES and page_slots < MAX_PAGE_SLOTS:
        page_slots *= 2
    return page_slots


def unsaid(config: TableConfig) -> tuple[str, ...]:
    """Fields of the schema that follow from the others, as the config says nothing of them."""
    said = {name for name in config.model_fields_set if getattr(config, name) is not None}
    return tuple(name for name in _DERIVED if name not in said)
