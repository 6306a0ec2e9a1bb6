"""What a user says of a table (``TableConfig``) and the whole schema it stands for (``resolve``).

Leaves to others: which shard owns which page (``mempool.placement``).
"""

import math
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from mempool.config.model import ConfigModel, FieldProblem, Flag, Number, WholeNumber
from mempool.config.optimizers import Adagrad, AdamW, Optimizer
from mempool.types import FlatKeySpec, ProductKeySpec, Rounding, StorageDtype, TableSchema, default_rounding

Name = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_.-]{0,62}$")]

# Placement keeps four bytes for each page in the controller and in every client.
_MAX_PAGES = 2**24
_MAX_PAGE_SLOTS = 2**20


class ProductKeys(ConfigModel):
    """Product keys kept in the pool: per head two codebooks of n half-keys, n * n = num_slots.

    Args:
        heads: Number of heads, each with codebooks of its own.
        key_dim: Width of a query of one head, even; a half-key is key_dim / 2 wide.
        deterministic: Scores are summed in a fixed order: a query has the same bits alone and in any batch. False takes
            whatever order is fastest; results then agree to rounding.
    """

    type: Literal["product"] = "product"
    heads: WholeNumber = Field(gt=0, le=4096)
    key_dim: WholeNumber = Field(gt=0, le=2**20)
    deterministic: Flag = True

    @field_validator("key_dim")
    @classmethod
    def _even(cls, key_dim: int) -> int:
        if key_dim % 2:
            raise ValueError(
                f"is odd; a query is cut into two halves. Nearest: {_pair_text(key_dim - 1, key_dim + 1)}."
            )
        return key_dim


class FlatKeys(ConfigModel):
    """One key per slot, kept beside its value.

    Args:
        key_dim: Width of a key and of a query.
        deterministic: As in ProductKeys, and for any number of shards.
    """

    type: Literal["flat"] = "flat"
    key_dim: WholeNumber = Field(gt=0, le=2**20)
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
        block_dim: Width of a column block; by default an eighth of value_dim, in steps of 64.
        page_slots: Slots of a page, a power of two; by default about a 64th of the table, 16 to 4096.
        init_std: Standard deviation of initial values; by default 1 / sqrt(value_dim).

    Raises:
        ConfigError: A value is out of range; the message says which and what to give instead.

    Example:
        >>> table = TableConfig(name="facts", num_slots=512**2, value_dim=256, optimizer=Adagrad(lr=0.1))
        >>> resolve(table).block_dim
        64
    """

    name: Name
    num_slots: WholeNumber = Field(gt=0, le=2**63 - 1)
    value_dim: WholeNumber = Field(gt=0, le=2**20)
    dtype: StorageDtype = "float32"
    rounding: Rounding | None = None
    master: Flag = False
    seed: WholeNumber = Field(default=0, ge=0, le=2**63 - 1)
    layout: Literal["auto", "columns", "rows", "grid"] = "auto"
    keys: Annotated[ProductKeys | FlatKeys, Field(discriminator="type")] | None = None
    optimizer: Optimizer = Adagrad(lr=0.1)
    block_dim: WholeNumber | None = Field(default=None, gt=0, le=2**20)
    page_slots: WholeNumber | None = Field(default=None, gt=0, le=_MAX_PAGE_SLOTS)
    init_std: Number | None = Field(default=None, ge=0)

    @field_validator("page_slots")
    @classmethod
    def _power_of_two(cls, page_slots: int | None) -> int | None:
        if page_slots is not None and page_slots & (page_slots - 1):
            below = 1 << (page_slots.bit_length() - 1)
            above = below * 2 if below * 2 <= _MAX_PAGE_SLOTS else None
            raise ValueError(f"is not a power of two. Nearest: {_pair_text(below, above)}.")
        return page_slots

    @model_validator(mode="after")
    def _rounding_and_master(self) -> Self:
        if self.master and self.dtype == "float32":
            raise FieldProblem(("master",), self.master, "has nothing to add: values of dtype float32 are their own.")
        if self.rounding == "stochastic" and default_rounding(self.dtype, master=self.master) == "nearest":
            kept = "a master of float32" if self.master else "dtype float32"
            raise FieldProblem(("rounding",), self.rounding, f"has nothing to round with {kept}; leave it out.")
        if isinstance(self.optimizer, AdamW) and self.optimizer.dense and self.dtype != "float32" and not self.master:
            raise FieldProblem(
                ("optimizer", "dense"),
                True,
                f"needs float32 values, and dtype is {self.dtype!r}: a slot's missed steps are too small for it. "
                "Give master=True, or dtype float32, or dense=False.",
            )
        return self

    @model_validator(mode="after")
    def _squares_and_pages(self) -> Self:
        root = math.isqrt(self.num_slots)
        if isinstance(self.keys, ProductKeys) and root * root != self.num_slots:
            raise FieldProblem(
                ("num_slots",),
                self.num_slots,
                "is not a square; product keys need n * n. "
                f"Nearest: {root**2:_} ({root}^2) or {(root + 1) ** 2:_} ({root + 1}^2).",
            )
        schema = resolve(self)
        pages = schema.num_row_pages * schema.num_blocks
        if pages > _MAX_PAGES:
            raise FieldProblem(
                ("num_slots",),
                self.num_slots,
                f"makes {pages:_} pages of {schema.page_slots} slots x {schema.block_dim} columns; a table may have "
                f"{_MAX_PAGES:_}. Give a larger page_slots (at most {_MAX_PAGE_SLOTS:_}) or block_dim.",
            )
        return self


def resolve(config: TableConfig) -> TableSchema:
    """The schema a table of this configuration has, with ``table_id`` 0: the pool gives the id."""
    keys = config.keys
    root = math.isqrt(config.num_slots)
    flat = isinstance(keys, FlatKeys)
    return TableSchema(
        table_id=0,
        name=config.name,
        num_slots=config.num_slots,
        value_dim=config.value_dim,
        block_dim=config.block_dim or _default_block_dim(config.value_dim),
        page_slots=config.page_slots or _default_page_slots(config.num_slots),
        dtype=config.dtype,
        seed=config.seed,
        init_std=1 / math.sqrt(config.value_dim) if config.init_std is None else config.init_std,
        stride=root if root * root == config.num_slots else 0,
        # Flat keys lie beside block 0: only rows let every shard score slots of its own.
        layout="rows" if flat and config.layout == "auto" else config.layout,
        optimizer=config.optimizer.spec(),
        keys=_key_spec(keys),
        rounding=config.rounding or default_rounding(config.dtype, master=config.master),
        master=config.master,
    )


def _key_spec(keys: ProductKeys | FlatKeys | None) -> ProductKeySpec | FlatKeySpec | None:
    if isinstance(keys, ProductKeys):
        return ProductKeySpec(heads=keys.heads, key_dim=keys.key_dim, deterministic=keys.deterministic)
    return None if keys is None else FlatKeySpec(key_dim=keys.key_dim, deterministic=keys.deterministic)


def _default_block_dim(value_dim: int) -> int:
    """An eighth of the value, in steps of 64, at least 64, and never wider than the value."""
    eighth = -(-value_dim // 8)
    return min(value_dim, max(64, -(-eighth // 64) * 64))


def _default_page_slots(num_slots: int) -> int:
    """About 64 pages for small tables, so that they spread; large pages for large ones, so that they are few."""
    next_power = 1 << (-(-num_slots // 64) - 1).bit_length()
    return min(4096, max(16, next_power))


def _pair_text(below: int, above: int | None) -> str:
    return " or ".join(f"{n:_}" for n in (below, above) if n)
