"""Small tables of every optimizer and dtype, drawn by a seed: many pages and blocks, few slots.

Slots below ``TRAINED`` are trained, the others are written to: so what a write makes of them is known whenever it was.
"""

from dataclasses import replace
from random import Random
from typing import Any, cast

import torch
from torch import Tensor

from mempool.errors import InvalidRequest
from mempool.types import OptimizerSpec, ProductKeySpec, TableSchema
from mempool.types.schema import default_rounding
from mempool.types.schema_checks import check_schema

NUM_SLOTS = 64
TRAINED = 48
WIDTH = 8

ALGORITHMS = ("sgd", "adagrad", "rowwise_adagrad", "adam", "adamw", "rowwise_adam")
DTYPES = ("float32", "bfloat16", "float8_e4m3fn", "int8")


def draw_schema(random: Random, name: str) -> TableSchema:
    """A schema that a pool accepts."""
    while True:
        schema = _any_schema(random, name)
        if not is_exact(schema) and schema.dtype != "float32":
            continue  # a last bit, rounded, is no last bit any more
        try:
            check_schema(schema)
        except InvalidRequest:
            continue
        return schema


def _any_schema(random: Random, name: str) -> TableSchema:
    algorithm: Any = random.choice(ALGORITHMS)
    dtype: Any = random.choice(DTYPES)
    master = random.random() < 0.2
    optimizer = OptimizerSpec(algorithm=algorithm, lr=0.1)
    if random.random() < 0.3:
        optimizer = replace(optimizer, weight_decay=0.01)
    if random.random() < 0.3:
        optimizer = replace(optimizer, dense=True)
    if random.random() < 0.3:
        optimizer = replace(optimizer, momentum=0.9)
    if random.random() < 0.2:
        optimizer = replace(optimizer, max_norm=1.0)
    if random.random() < 0.2:
        optimizer = replace(optimizer, corrected_eps=True)
    block_dim, seed = random.choice((4, 4, 4, 8)), random.getrandbits(32)
    return TableSchema(
        table_id=0,
        name=name,
        num_slots=NUM_SLOTS,
        value_dim=WIDTH,
        block_dim=block_dim,
        page_slots=8,
        dtype=dtype,
        seed=seed,
        init_std=0.5,
        stride=8,
        layout=cast(Any, random.choice(("auto", "columns", "rows", "grid"))),
        optimizer=optimizer,
        keys=ProductKeySpec(heads=3, key_dim=4) if random.random() < 0.3 else None,
        rounding=random.choice(("nearest", default_rounding(dtype, master=master))),
        master=master,
        usage=seed % 2 == 1,  # of what is drawn, so that all that follows is drawn as without it
    )


def is_exact(schema: TableSchema) -> bool:
    """Whether it is one value bit for bit that a slot has at a version: how often a row of a dense AdamW was read shows
    in its last bits, by the decay of the steps that it missed (docs/decisions.md)."""
    return not (schema.optimizer.dense and schema.optimizer.weight_decay)


def may_be_written(schema: TableSchema) -> bool:
    """Whether slots that are not trained stay as they were written."""
    return not schema.optimizer.dense


def draw_bags(random: Random, *, lowest: int = 0, end: int = TRAINED) -> "tuple[Tensor, Tensor | None, Tensor]":
    """ids [L] int64, weights [L] float32 or None, offsets [B + 1]: a few bags, some empty, some with repeated ids."""
    lengths = [random.choice((0, 1, 1, 2, 4)) for _ in range(random.randint(1, 4))]
    ids = [random.randrange(lowest, end) for _ in range(sum(lengths))]
    if len(ids) > 2 and random.random() < 0.3:
        ids[-1] = ids[0]
    weights = None if random.random() < 0.2 else torch.tensor([numbers(random) for _ in ids], dtype=torch.float32)
    offsets = [sum(lengths[:count]) for count in range(len(lengths) + 1)]
    return torch.tensor(ids, dtype=torch.int64), weights, torch.tensor(offsets, dtype=torch.int64)


def draw_row(random: Random, number: int) -> Tensor:
    """[V] float32: what a write makes of a slot, the ``number``th of it. Of eight in a row no two are the same in any
    block. All are +3 or -3: the same in every dtype, with every scale."""
    sign = random.choice((-1.0, 1.0))
    return torch.tensor([3.0, *(-3.0 if number >> bit & 1 else 3.0 for bit in range(3))] * (WIDTH // 4)) * sign


def draw_grads(random: Random, num_bags: int) -> Tensor:
    """[B, V] float32."""
    rows = [[numbers(random) for _ in range(WIDTH)] for _ in range(num_bags)]
    return torch.tensor(rows, dtype=torch.float32).reshape(num_bags, WIDTH)


def numbers(random: Random) -> float:
    return random.uniform(-1.0, 1.0)
