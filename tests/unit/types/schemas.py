"""Random schemas for tests: right ones, and wrong ones, near the limits and far from them."""

import math
from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from mempool.types import (
    FlatKeySpec,
    OptimizerSpec,
    OwnKeySpec,
    ProductKeySpec,
    TableSchema,
    TrainedKeySpec,
    default_rounding,
)

PLAIN = TableSchema(
    table_id=0,
    name="facts",
    num_slots=100,
    value_dim=20,
    block_dim=10,
    page_slots=16,
    dtype="float32",
    seed=0,
    init_std=0.1,
    stride=10,
    layout="auto",
    optimizer=OptimizerSpec(algorithm="adagrad", lr=0.1),
)

SIZES = st.one_of(st.integers(0, 70), st.integers(0, 2**21), st.integers(0, 2**42), st.sampled_from([2**31, 2**32 - 1]))
U32 = SIZES.map(lambda size: min(size, 2**32 - 1))
NUMBERS = st.one_of(
    st.sampled_from([0.0, 0.1, 1.0, 1e-300, -1.0, 1e30, 1e300, float("inf"), float("nan")]), st.floats(0.0, 2.0)
)
ALGORITHMS = st.sampled_from(["sgd", "adagrad", "rowwise_adagrad", "adam", "adamw", "rowwise_adam"])
DTYPES = st.sampled_from(["float32", "bfloat16", "float8_e4m3fn", "int8"])
NAMES = st.one_of(st.just("facts"), st.sampled_from(["", "9", "a\n", "a" * 63, "a" * 64, "a b", "b" * 10**5]))

STRANGE: dict[str, st.SearchStrategy[Any]] = {
    "name": NAMES,
    "num_slots": SIZES,
    "value_dim": U32,
    "block_dim": U32,
    "page_slots": st.one_of(U32, st.integers(0, 31).map(lambda shift: 1 << shift)),
    "dtype": DTYPES,
    "seed": st.one_of(st.integers(0, 9), st.sampled_from([2**63 - 1, 2**63, 2**64 - 1])),
    "init_std": NUMBERS,
    "stride": st.one_of(st.just(10), SIZES),
    "layout": st.sampled_from(["auto", "columns", "rows", "grid"]),
    "keys": st.one_of(
        st.none(),
        st.builds(FlatKeySpec, key_dim=U32),
        st.builds(ProductKeySpec, heads=U32, key_dim=U32),
        st.builds(
            TrainedKeySpec,
            key_dim=U32,
            heads=st.one_of(st.just(1), U32),
            product=st.booleans(),
            ways=st.one_of(st.just(2), st.integers(1, 10)),
            groups=st.one_of(st.just(0), st.integers(1, 30), SIZES),
            probes=st.one_of(st.just(0), st.integers(1, 5), U32),
            optimizer=st.builds(OptimizerSpec, algorithm=st.just("sgd"), lr=NUMBERS),
        ),
        st.builds(OwnKeySpec, sections=U32, rows=SIZES, groups=st.one_of(st.just(0), SIZES)),
    ),
    "rounding": st.sampled_from(["nearest", "stochastic"]),
    "master": st.booleans(),
    "usage": st.booleans(),
    "optimizer": st.builds(
        OptimizerSpec,
        algorithm=ALGORITHMS,
        lr=NUMBERS,
        eps=NUMBERS,
        beta1=st.one_of(st.just(0.9), NUMBERS),
        weight_decay=st.one_of(st.just(0.0), NUMBERS),
        dense=st.booleans(),
        momentum=st.one_of(st.just(0.0), NUMBERS),
        dampening=st.one_of(st.just(0.0), NUMBERS),
        nesterov=st.booleans(),
        decoupled_weight_decay=st.booleans(),
        corrected_eps=st.booleans(),
        max_norm=st.one_of(st.none(), NUMBERS),
    ),
}


@st.composite
def schemas(draw: st.DrawFn, *, most: int = 3) -> TableSchema:
    """A plain schema of which up to ``most`` fields are anything; stride and rounding mostly follow."""
    changed = draw(st.lists(st.sampled_from(sorted(STRANGE)), max_size=most, unique=True))
    schema = replace(PLAIN, **{name: draw(STRANGE[name]) for name in changed})
    if "stride" not in changed:
        root = math.isqrt(schema.num_slots)
        schema = replace(schema, stride=root if root * root == schema.num_slots else 0)
    if "rounding" not in changed:
        schema = replace(schema, rounding=default_rounding(schema.dtype, master=schema.master))
    return schema
