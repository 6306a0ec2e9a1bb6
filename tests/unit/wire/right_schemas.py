"""Random schemas that every door takes, with optimizers of every kind."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from mempool import types
from mempool.types.schema_checks import FLAGS, HYPER_PARAMETERS, NAME

U64 = st.one_of(st.integers(0, 300), st.integers(0, 2**64 - 1))
RATE = st.floats(0.0, 1e30)
NUMBERS: Mapping[str, st.SearchStrategy[float]] = {
    "lr": RATE,
    "eps": st.floats(1e-37, 1e30),
    "beta1": st.floats(0.0, 1.0, exclude_max=True),
    "beta2": st.floats(0.0, 1.0, exclude_max=True),
    "lr_decay": RATE,
    "initial_accumulator_value": RATE,
    "weight_decay": RATE,
    "momentum": st.floats(0.0, 1.0, exclude_max=True),
    "dampening": st.floats(0.0, 1.0, exclude_max=True),
    "max_norm": st.floats(1e-37, 1e30),
}


KEY_OPTIMIZERS = st.builds(
    types.OptimizerSpec,
    algorithm=st.sampled_from(["adamw"]),
    lr=NUMBERS["lr"],
    beta1=NUMBERS["beta1"],
    dense=st.booleans(),
)


@st.composite
def schemas(draw: st.DrawFn) -> types.TableSchema:
    """Any that ``check_schema`` takes; with other numbers nothing of the kind travels."""
    algorithm = draw(st.sampled_from(["sgd", "adagrad", "rowwise_adagrad", "adam", "adamw", "rowwise_adam"]))
    given: dict[str, Any] = {
        name: draw(NUMBERS[name]) for name, taken in HYPER_PARAMETERS.items() if algorithm in taken.of
    }
    given |= {name: draw(st.booleans()) for name, of in FLAGS.items() if algorithm in of}
    dtype, master = draw(st.sampled_from(["float32", "bfloat16", "float8_e4m3fn", "int8"])), draw(st.booleans())
    master = master and dtype != "float32"
    fine = dtype == "float32" or master
    keys = draw(
        st.one_of(
            st.none(),
            st.builds(types.FlatKeySpec, key_dim=st.integers(1, 4096), deterministic=st.booleans()),
            st.builds(
                types.ProductKeySpec,
                heads=st.integers(1, 4),
                key_dim=st.integers(1, 2048).map(lambda half: 2 * half),
                deterministic=st.booleans(),
            ),
            st.builds(
                types.TrainedKeySpec,
                key_dim=st.integers(1, 4).map(lambda part: 840 * part),
                heads=st.integers(1, 4),
                product=st.just(True),
                optimizer=KEY_OPTIMIZERS,
                ways=st.integers(2, 8),
            ),
            st.builds(types.TrainedKeySpec, key_dim=st.integers(1, 1024), optimizer=KEY_OPTIMIZERS),
        )
    )
    ways = getattr(keys, "ways", 2)
    root = draw(st.integers(1, 10) if ways == 2 else st.integers(2, 3))
    product = isinstance(keys, types.ProductKeySpec) or getattr(keys, "product", False)
    num_slots = root**ways if product else draw(st.integers(1, 100))
    if isinstance(keys, types.TrainedKeySpec) and not product and draw(st.booleans()):
        groups = -(-num_slots // draw(st.integers(1, num_slots)))
        keys = replace(keys, groups=groups, probes=draw(st.integers(1, groups)))
    value_dim = draw(st.integers(1, 100))
    block_dim = draw(st.integers(1, value_dim))
    given["dense"] = given.get("dense", False) and fine
    if block_dim < value_dim or given["dense"] or draw(st.booleans()):
        given["max_norm"] = None
    if given.get("nesterov") or not given.get("momentum"):
        given["dampening"] = 0.0
        given["nesterov"] = bool(given.get("nesterov") and given["momentum"])
    return types.TableSchema(
        table_id=draw(U64),
        name=draw(st.from_regex(NAME, fullmatch=True)),
        num_slots=num_slots,
        value_dim=value_dim,
        block_dim=block_dim,
        page_slots=draw(st.sampled_from([1, 8, 16, 64])),
        dtype=dtype,  # type: ignore[arg-type]
        seed=draw(st.integers(0, 2**63 - 1)),
        init_std=draw(st.floats(0.0, 1e6)),
        stride=math.isqrt(num_slots) if math.isqrt(num_slots) ** 2 == num_slots else 0,
        layout=draw(st.sampled_from(["auto", "columns", "rows", "grid"])),  # type: ignore[arg-type]
        optimizer=types.OptimizerSpec(
            algorithm=algorithm,  # type: ignore[arg-type]
            **given,
        ),
        keys=keys,
        rounding="nearest" if fine else draw(st.sampled_from(["stochastic", "nearest"])),  # type: ignore[arg-type]
        master=master,
        usage=draw(st.booleans()),
    )
