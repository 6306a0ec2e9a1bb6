"""One check for every door: what Python refuses the wire refuses, and what they take a pool survives."""

import contextlib
import itertools
import math
import time
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from mempool.config import FlatKeys, HierarchicalKeys, ProductKeys, TableConfig, resolve
from mempool.controller import Controller
from mempool.errors import ConfigError, InvalidRequest
from mempool.optim import SGD
from mempool.shard import Engine
from mempool.types import (
    FlatKeySpec,
    OptimizerSpec,
    OwnKeySpec,
    ProductKeySpec,
    ShardHost,
    ShardInfo,
    TableSchema,
    TrainedKeySpec,
)
from mempool.types.keys import key_table
from mempool.types.schema_checks import (
    FLAGS,
    GROUP_RANGES,
    HYPER_PARAMETERS,
    KEY_RANGES,
    MAX_BLOCKS,
    RANGES,
    check_schema,
    schema_problems,
)
from mempool.types.sizes import MAX_PAGES
from mempool.wire.channels.loop import run
from mempool.wire.codecs import tables

from .schemas import PLAIN, schemas

PRODUCT = replace(PLAIN, keys=ProductKeySpec(heads=2, key_dim=8))
TRAINED = TrainedKeySpec(key_dim=12, optimizer=OptimizerSpec(algorithm="sgd", lr=0.5))
NARROW = replace(PLAIN, dtype="int8", rounding="stochastic")


def test_what_is_plain_is_right() -> None:
    for schema in (PLAIN, PRODUCT, NARROW, replace(NARROW, master=True, rounding="nearest")):
        check_schema(schema)


@pytest.mark.parametrize(
    ("root", "ways"), [*itertools.product([1, 7, 64, 1000], [1, 2]), (2, 3), (10, 3), (101, 3), (2, 6), (12, 6)]
)
def test_the_table_of_keys_that_are_trained_is_right_too(root: int, ways: int) -> None:
    keys = TRAINED
    if ways > 1:
        keys = replace(keys, product=True, heads=3, ways=ways)
    num_slots = root ** max(2, ways)
    square = math.isqrt(num_slots)
    schema = replace(PLAIN, num_slots=num_slots, stride=square if square**2 == num_slots else 0, keys=keys)
    check_schema(schema)
    made = key_table(schema)
    assert made is not None
    check_schema(made)
    assert (made.name, made.optimizer, made.num_blocks) == ("facts:keys", keys.optimizer, 1)
    assert isinstance(made.keys, OwnKeySpec)
    assert made.keys.rows * made.keys.sections <= made.num_slots <= 1.3 * made.keys.rows * made.keys.sections
    assert key_table(made) is None
    for wrong in (
        replace(made, name="facts"),
        replace(made, name="9:keys"),
        replace(made, block_dim=1),
        replace(made, dtype="bfloat16"),
        replace(made, keys=OwnKeySpec(sections=made.keys.sections, rows=made.num_slots + 1)),
        replace(made, keys=OwnKeySpec(sections=0, rows=1)),
        replace(schema, name="facts:keys"),
        replace(schema, keys=replace(keys, heads=2 if ways == 1 else 0)),
        replace(schema, keys=replace(keys, optimizer=OptimizerSpec(algorithm="sgd", lr=-1.0))),
    ):
        with pytest.raises(InvalidRequest):
            check_schema(wrong)


GROUPED = replace(PLAIN, keys=replace(TRAINED, groups=20, probes=4))  # of 5 slots


def test_the_table_of_keys_in_groups_is_right_too() -> None:
    check_schema(GROUPED)
    made = key_table(GROUPED)
    assert made is not None
    check_schema(made)
    assert (made.num_slots, made.keys) == (120, OwnKeySpec(sections=1, rows=120, groups=20))
    for wrong in ({"groups": 61}, {"groups": 121}, {"groups": 19}, {"rows": 119}, {"sections": 2, "rows": 60}):
        with pytest.raises(InvalidRequest, match="cuts no table of keys"):
            check_schema(replace(made, keys=replace(made.keys, **wrong)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"groups": 51},
            r"keys\.groups = 51 of equally many of 100 slots leaves groups empty: give 50 \(of 2\) or 100",
        ),
        ({"groups": 101}, r"keys\.groups = 101 of equally many of 100 slots leaves groups empty: give 100 \(of 1\)"),
        ({"probes": 21}, r"keys\.probes = 21 is more than there are groups, 20: give at most that"),
        ({"probes": 0}, r"keys\.probes = 0 must be at least 1"),
        ({"groups": 0}, r"keys\.groups = 0 must be at least 1"),
        ({"product": True}, r"keys\.groups = 20 is of hierarchical keys; leave it out"),
        ({"heads": 2}, r"keys\.heads = 2 must be 1: keys that are no product keys have one head"),
    ],
)
def test_groups_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        check_schema(replace(GROUPED, keys=replace(GROUPED.keys, **changes)))


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (replace(PLAIN, page_slots=3), r"page_slots = 3 is not a power of two\. Nearest: 2 or 4\."),
        (replace(PLAIN, page_slots=1000), r"page_slots = 1_000 is not a power of two\. Nearest: 512 or 1_024\."),
        (replace(PLAIN, page_slots=2**21), r"page_slots = 2_097_152 must be at most 1_048_576"),
        (replace(PLAIN, num_slots=2**62, value_dim=2**31 - 1), r"num_slots = .* must be at most 1_099_511_627_776"),
        (replace(PLAIN, num_slots=2**64 - 1), r"num_slots = 18_446_744_073_709_551_615 must be at most"),
        (
            replace(PLAIN, num_slots=5 * 10**7, page_slots=1, stride=0),
            r"num_slots = 50_000_000 makes 100_000_000 pages .* may have 1_048_576",
        ),
        (replace(PLAIN, value_dim=2**20, block_dim=1), r"block_dim = 1 makes 1_048_576 column blocks.* have 256"),
        (
            replace(PLAIN, value_dim=2**20, block_dim=2**20, page_slots=2**20),
            r"page_slots = .* MiB.* Give at most 16\.",
        ),
        (
            replace(PLAIN, optimizer=OptimizerSpec(algorithm="sgd", lr=0.1, max_norm=1.0)),
            r"optimizer\.max_norm = 1\.0 bounds whole values, .* of 2 column blocks; give block_dim = value_dim, 20",
        ),
        (replace(PLAIN, block_dim=21), r"block_dim = 21 is wider than a value; give at most value_dim, 20"),
        (replace(PRODUCT, keys=ProductKeySpec(heads=2, key_dim=0)), r"keys\.key_dim = 0 must be at least 1"),
        (replace(PRODUCT, keys=ProductKeySpec(heads=2, key_dim=7)), r"keys\.key_dim = 7 is odd;.* Nearest: 6 or 8\."),
        (replace(PRODUCT, keys=ProductKeySpec(heads=2, key_dim=2**32 - 2)), r"keys\.key_dim = .* at most 1_048_576"),
        (replace(PRODUCT, keys=ProductKeySpec(heads=0, key_dim=2)), r"keys\.heads = 0 must be at least 1"),
        (
            replace(PRODUCT, keys=ProductKeySpec(heads=10**6, key_dim=2)),
            r"keys\.heads = 1_000_000 must be at most 4_096",
        ),
        (
            replace(PLAIN, num_slots=2**20, stride=2**10, keys=ProductKeySpec(heads=1, key_dim=2**20)),
            r"keys\.key_dim = .* makes keys of 4,096\.0 MiB a head.* Give at most 32_768",
        ),
        (replace(PLAIN, keys=replace(TRAINED, ways=3)), r"keys\.ways = 3 is of product keys; leave it out"),
        (replace(PLAIN, keys=replace(TRAINED, product=True, ways=9)), r"keys\.ways = 9 must be at most 8"),
        (
            replace(PLAIN, num_slots=125, stride=0, keys=replace(TRAINED, product=True, ways=3, key_dim=8)),
            r"keys\.key_dim = 8 is no multiple of 3; .* Nearest: 6 or 9\.",
        ),
        (
            replace(PLAIN, num_slots=7, stride=0, keys=replace(TRAINED, product=True, ways=3)),
            r"num_slots = 7 must be at least 8 \(2\^3\): two half-keys in each codebook of product keys of 3 parts",
        ),
        (
            replace(PRODUCT, num_slots=101, stride=0),
            r"num_slots = 101 is not a square.* 100 \(10\^2\) or 121 \(11\^2\)",
        ),
        (replace(PRODUCT, stride=0), r"stride = 0 must be 10, as num_slots is 10\^2"),
        (replace(PRODUCT, stride=5), r"stride = 5 must be 10"),
        (replace(PLAIN, num_slots=101), r"stride = 10 must be 0, as num_slots is not a square"),
        (replace(PLAIN, keys=FlatKeySpec(key_dim=0)), r"keys\.key_dim = 0 must be at least 1"),
        (replace(PLAIN, init_std=float("nan")), r"init_std = nan must be finite"),
        (replace(PLAIN, init_std=-1.0), r"init_std = -1\.0 must be at least 0"),
        (replace(PLAIN, init_std=1e300), r"init_std = 1e\+300 must be at most"),
        (replace(PLAIN, name=""), r"name = '' must begin with a letter"),
        (replace(PLAIN, name="a\nb"), r"name = 'a\\nb' must begin with a letter"),
        (replace(PLAIN, name="a" * 200), r"name = 'a+\.\.\.a+' must begin with a letter .* at most 63"),
        (replace(PLAIN, seed=2**63), r"seed = .* must be at most"),
        (replace(PLAIN, master=True), r"master = True has nothing to add"),
        (replace(PLAIN, rounding="stochastic"), r"rounding = 'stochastic' has nothing to round"),
        (
            replace(NARROW, optimizer=OptimizerSpec(algorithm="adamw", lr=0.1, dense=True)),
            r"optimizer\.dense = True needs float32 values, and dtype is 'int8'",
        ),
        (
            replace(PLAIN, optimizer=OptimizerSpec(algorithm="adagrad", lr=0.1, momentum=0.1)),
            r"optimizer\.momentum = 0\.1 means nothing to adagrad; leave it out\. It is of sgd",
        ),
        (
            replace(PLAIN, optimizer=OptimizerSpec(algorithm="adam", lr=0.1, dense=True)),
            r"optimizer\.dense = True means nothing to adam",
        ),
    ],
)
def test_a_wrong_schema_is_refused_by_field_value_and_limit(schema: TableSchema, message: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"^TableSchema\.{message}") as caught:
        check_schema(schema)
    assert len(str(caught.value)) < 500
    with pytest.raises(InvalidRequest, match=message):
        tables.CREATE_TABLE_REQUEST.decode(tables.CREATE_TABLE_REQUEST.encode(schema))


def test_every_number_has_its_rule() -> None:
    assert {field.name for field in fields(OptimizerSpec)} == {"algorithm", *HYPER_PARAMETERS, *FLAGS}
    assert {"num_slots", "value_dim", "block_dim", "page_slots", "seed", "init_std"} == set(RANGES)
    of_keys = {field.name for spec in (ProductKeySpec, FlatKeySpec, TrainedKeySpec) for field in fields(spec)}
    assert of_keys - {"deterministic", "optimizer", "product"} == set(KEY_RANGES) | set(GROUP_RANGES)


def config_of(schema: TableSchema) -> TableConfig:
    """A configuration that says all of a schema aloud. Raises ConfigError."""
    optimizer = schema.optimizer
    given: dict[str, Any] = {"type": optimizer.algorithm}
    given |= {
        name: getattr(optimizer, name) for name, taken in HYPER_PARAMETERS.items() if optimizer.algorithm in taken.of
    }
    if "beta1" in given:
        given["betas"] = (given.pop("beta1"), given.pop("beta2"))
    given |= {name: getattr(optimizer, name) for name, of in FLAGS.items() if optimizer.algorithm in of}
    keys: ProductKeys | FlatKeys | HierarchicalKeys | None = None
    if isinstance(schema.keys, ProductKeySpec):
        keys = ProductKeys(heads=schema.keys.heads, key_dim=schema.keys.key_dim)
    elif isinstance(schema.keys, TrainedKeySpec):
        optimizer, key_dim = SGD(schema.keys.optimizer.lr), schema.keys.key_dim
        if schema.keys.product:
            keys = ProductKeys(heads=schema.keys.heads, key_dim=key_dim, ways=schema.keys.ways, optimizer=optimizer)
        elif schema.keys.groups or schema.keys.probes:
            groups, probes = schema.keys.groups, schema.keys.probes
            keys = HierarchicalKeys(key_dim=key_dim, groups=groups, probes=probes, optimizer=optimizer)
        else:
            keys = FlatKeys(key_dim=key_dim, optimizer=optimizer)
    elif isinstance(schema.keys, FlatKeySpec):
        keys = FlatKeys(key_dim=schema.keys.key_dim)
    same = (
        "name",
        "num_slots",
        "value_dim",
        "dtype",
        "rounding",
        "master",
        "usage",
        "seed",
        "layout",
        "block_dim",
        "page_slots",
    )
    return TableConfig(
        **{name: getattr(schema, name) for name in same}, init_std=schema.init_std, keys=keys, optimizer=given
    )


@given(schema=schemas())
@settings(max_examples=400, deadline=None)
def test_the_wire_and_the_configuration_take_the_same(schema: TableSchema) -> None:
    frame = tables.CREATE_TABLE_REQUEST.encode(schema)
    started = time.process_time()
    try:
        taken = tables.CREATE_TABLE_REQUEST.decode(frame)
    except InvalidRequest:
        taken = None
    assert time.process_time() - started < 1.0
    if taken is not None:
        assert taken == schema
        by_rows = isinstance(schema.keys, FlatKeySpec) or schema.optimizer.max_norm is not None
        layout = "rows" if by_rows and schema.layout == "auto" else schema.layout
        assert resolve(config_of(schema)) == replace(schema, layout=layout)
        assert schema.num_row_pages * schema.num_blocks <= MAX_PAGES
        assert schema.num_blocks <= MAX_BLOCKS
        return
    paths = {problem.path for problem in schema_problems(schema)}
    if isinstance(schema.keys, OwnKeySpec):  # which no configuration says
        return
    if isinstance(schema.keys, TrainedKeySpec) and not schema.keys.product:
        paths -= {("keys", "heads"), ("keys", "ways")}
    if isinstance(schema.keys, TrainedKeySpec) and schema.keys.product:
        paths -= {("keys", "groups"), ("keys", "probes")}
    # A configuration has no stride, and an optimizer's class only what it takes.
    unsaid = {
        ("optimizer", name) for name, rule in HYPER_PARAMETERS.items() if schema.optimizer.algorithm not in rule.of
    }
    unsaid |= {("optimizer", name) for name, of in FLAGS.items() if schema.optimizer.algorithm not in of}
    if paths and not paths <= {("stride",)} | unsaid:
        with pytest.raises(ConfigError):
            config_of(schema)


@given(schema=schemas(most=4))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
def test_a_small_pool_survives_whatever_is_taken(schema: TableSchema) -> None:
    with contextlib.suppress(InvalidRequest):
        check_schema(schema)
        run(_create(schema), timeout_s=60)


async def _create(schema: TableSchema) -> None:
    """On two shards of 4 MiB each: made, or refused as too large; then the pool answers and makes another."""
    engines: dict[int, Engine] = {}

    class Launcher:
        async def start(self, shard: int, *, fresh: bool = False) -> ShardInfo:  # noqa: ARG002
            info = ShardInfo(shard=shard, address="", incarnation=1)
            engines[shard] = Engine(info, memory_bytes=4 * 2**20)
            return info

        async def require_room(self, shards: int) -> None: ...

        async def keep_wanted(self, shards: int) -> None: ...

        async def starting(self) -> str:
            return ""

        async def stop(self, info: ShardInfo) -> None:
            await engines.pop(info.shard).close()

    def dial(info: ShardInfo) -> ShardHost:
        return engines[info.shard]

    controller = Controller("tiny", launcher=Launcher(), dial=dial)
    await controller.open(2)
    try:
        with contextlib.suppress(InvalidRequest):
            await controller.create_table(schema)
        made = await controller.create_table(replace(PLAIN, name="another"))
        status = await controller.status()
        assert {shard.state for shard in status.shards} == {"ready"}
        assert made.schema.name in {view.schema.name for view in status.tables}
    finally:
        await controller.close()
