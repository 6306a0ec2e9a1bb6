"""What whoever reads a plan should know besides its figures: what it assumes, and what will not do."""

import math
from collections.abc import Iterator

from mempool.config import ShardConfig
from mempool.sizing.demands import Hosts, Model
from mempool.sizing.machine import Machine
from mempool.sizing.split import Holding, Split
from mempool.sizing.times import StepTime
from mempool.sizing.traffic import bags_sent, columns_sent
from mempool.types import OwnKeySpec
from mempool.types.pool import MAX_PLACED_PAGES

_FULL = 0.95
_WIDE = 4


def warnings_of(
    split: Split,
    time: StepTime | None,
    model: Model,
    hosts: Hosts,
    shard: ShardConfig,
    machine: Machine | None,
) -> Iterator[str]:
    """A sentence each."""
    schema, busiest = split.schema, split.busiest
    pages = model.tables * split.num_pages
    if pages > MAX_PLACED_PAGES:
        yield (
            f"{pages:,} pages of {model.tables} tables are more than the {MAX_PLACED_PAGES:,} that a pool takes: give "
            "a larger page_slots or block_dim, or let layers share a table"
        )
    if model.tables * split.largest_bytes > _FULL * shard.page_bytes:
        yield (
            f"the fullest shard has {model.tables * split.largest_bytes / shard.page_bytes:.0%} of its room: a rescale "
            "to fewer, a second table or restoring a checkpoint beside it will not fit"
        )
    held = (
        model.trainers * model.layers * (_held_bytes(busiest, model.tokens, model.pairs) + _held_of_keys(split, model))
    )
    if held > shard.client_bytes:
        yield (
            f"a step makes a shard hold {held / 2**20:,.0f} MiB of updates and remembered look-ups, and clients may "
            f"make it hold {shard.client_bytes / 2**20:,.0f} MiB: set shard.client_memory, or give fewer tokens a step"
        )
    whole_rows = columns_sent(split, bags=model.tokens, pairs=model.pairs) / (model.tokens * schema.value_dim)
    if split.kind == "rows" and whole_rows > _WIDE:
        yield (
            f"each bag is answered by {whole_rows:.0f} whole rows, a partial sum of each shard:"
            " a grid of more blocks makes that fewer"
        )
    if split.asked < split.shards:
        yield f"{split.shards - split.asked} of {split.shards} shards own no row page"
    if machine is None:
        yield "no times: they need a machine's constants (mempool bench plan --out DIR, then --machine FILE)"
    elif hosts.device not in machine.kernels:
        yield (
            f"kernels on {hosts.device} were not measured on {machine.name}: they are taken to have the same share of "
            "memory bandwidth as on its CPU"
            + ("" if hosts.gpu_gb_per_s else ", and as no bandwidth of a GPU is given, its CPU's speed")
        )
    if time is not None and split.keys is not None:
        yield "times are of the values alone: what keys in the pool take beside them is not predicted"
    if time is not None and model.tokens_per_s is not None:
        reached = time.tokens_per_s(model)
        if reached < model.tokens_per_s:
            yield f"{reached:,.0f} tokens/s at most, not {model.tokens_per_s:,.0f}: {time.limit} takes most of a step"


def _held_bytes(held: Holding, bags: int, pairs: int, *, sections: int = 1, runs: int | None = None) -> float:
    """That a look-up and its update have a shard hold until the commit. sections, runs: As of ``traffic_of``."""
    named = bags_sent(held, bags=bags, pairs=pairs if runs is None else runs, sections=sections)
    return 4 * named * held.width + 12 * math.ceil(held.share * pairs)


def _held_of_keys(split: Split, model: Model) -> float:
    if split.keys is None:
        return 0.0
    keys = split.keys
    assert isinstance(keys.schema.keys, OwnKeySpec), "it is a table of keys"
    if split.probes:
        queries = model.tokens * model.heads
        groups = queries * min(model.topk, split.probes)
        return _held_bytes(keys.busiest, queries, queries * model.topk + groups, runs=groups)
    queries = model.tokens * keys.schema.keys.sections
    return _held_bytes(keys.busiest, queries, queries * model.topk, sections=keys.schema.keys.sections)
