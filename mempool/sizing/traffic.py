"""Bytes that a look-up and its update move, by the split alone; and what a path's constants are multiplied with."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mempool.sizing.split import Holding, Split
from mempool.types import OwnKeySpec
from mempool.types.messages import ReplyDtype
from mempool.types.schema import ELEMENT_BYTES

#: A pair is sent as an id of four bytes, or eight where ids may not fit, and a float32 weight; of every bag its offset.
_WEIGHT_BYTES = 4
_OFFSET_BYTES = 8
#: Of a key that a shard found: its score and its row.
_SCORED_BYTES = 12
_NARROW_SLOTS = 2**32


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Bytes of tensors, by direction; messages' own headers, some tens of bytes each, are left out.

    Attributes:
        request: Ids, weights and offsets, out.
        reply: Sums, back.
        grads: Gradients of the sums, out.
        weight_grads: Gradients of the weights, back.
    """

    request: int
    reply: int
    grads: int
    weight_grads: int

    @property
    def out(self) -> int:
        return self.request + self.grads

    @property
    def back(self) -> int:
        return self.reply + self.weight_grads

    @property
    def moved(self) -> int:
        """Both ways."""
        return self.out + self.back

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(
            request=self.request + other.request,
            reply=self.reply + other.reply,
            grads=self.grads + other.grads,
            weight_grads=self.weight_grads + other.weight_grads,
        )


def traffic_of(
    held: Holding,
    split: Split,
    *,
    bags: int,
    pairs: int,
    wire_dtype: ReplyDtype,
    sections: int = 1,
    runs: int | None = None,
) -> Traffic:
    """Between one trainer and one shard, of one look-up with its update; without that of the keys.

    Args:
        held: What the shard owns.
        split: Of the table.
        bags: Of the look-up.
        pairs: Of all its bags together.
        wire_dtype: Of sums and their gradients.
        sections: As of ``bags_sent``.
        runs: Of all pairs, so many runs are of ids side by side; None: as many as pairs.
    """
    id_bytes = 4 if split.schema.num_slots <= _NARROW_SLOTS else 8
    sent = math.ceil(held.share * pairs)
    bags = math.ceil(bags_sent(held, bags=bags, pairs=pairs if runs is None else runs, sections=sections))
    values = bags * _sums_bytes(held.width, split.schema.block_dim, wire_dtype)
    # Where others have slots of the same columns, sums are added up, and come as float32.
    alone = held.area * split.schema.value_dim > held.width - 0.5 / split.schema.num_row_pages
    sums = values if alone else bags * held.width * ELEMENT_BYTES["float32"]
    return Traffic(
        request=sent * (id_bytes + _WEIGHT_BYTES) + _OFFSET_BYTES * (bags + 1),
        reply=sums,
        grads=values,
        weight_grads=4 * sent,
    )


def bags_sent(held: Holding, *, bags: int, pairs: int, sections: int = 1) -> float:
    """Of a look-up's bags, those that a shard is sent, of ids drawn uniformly: those with pairs there where that is
    less than three quarters of all (``kernels.few_bags``), else all.

    sections: Of product keys: a bag's ids are of one of so many equal runs of slots, each of which has as many bags.
    """
    rest, whole = math.modf(held.share * sections)
    named = bags / sections * (whole + 1.0 - (1.0 - rest) ** (pairs / max(1, bags)))
    return named if 4 * named < 3 * bags else bags


def _sums_bytes(width: int, block_dim: int, wire_dtype: ReplyDtype) -> int:
    """Of one bag. A byte for each number goes with a float32 scale for each block, and fills up 16 bytes."""
    if wire_dtype != "float8_e4m3fn":
        return width * ELEMENT_BYTES[wire_dtype]
    return -(-(-(-width // 4) * 4 + 4 * -(-width // block_dim)) // 16) * 16


def traffic(split: Split, *, bags: int, pairs: int, wire_dtype: ReplyDtype) -> Traffic:
    """Between one trainer and all shards; arguments as above."""
    parts = [
        (held.shards, traffic_of(held, split, bags=bags, pairs=pairs, wire_dtype=wire_dtype)) for held in split.holdings
    ]
    return _summed(parts)


def _summed(parts: Sequence[tuple[int, Traffic]]) -> Traffic:
    """Of so many of each."""
    return Traffic(
        request=sum(count * part.request for count, part in parts),
        reply=sum(count * part.reply for count, part in parts),
        grads=sum(count * part.grads for count, part in parts),
        weight_grads=sum(count * part.weight_grads for count, part in parts),
    )


def keys_traffic_of(held: Holding, keys: Split, *, bags: int, topk: int, heads: int = 1, probes: int = 0) -> Traffic:
    """Between one trainer and one shard, of the scores of one look-up, and of what their gradient takes: sums of keys
    for that of the queries, and the queries for that of the keys.

    Args:
        held: What the shard owns of the table of keys.
        keys: Of that table.
        bags: Of the look-up.
        topk: Slots of each head.
        heads: Queries of a bag, of hierarchical keys, which have no heads of their own.
        probes: Groups that each looks into.
    """
    spec = keys.schema.keys
    assert isinstance(spec, OwnKeySpec), "it is one"
    if spec.groups:
        return _grouped_traffic_of(held, keys, queries=bags * heads, topk=topk, probes=probes)
    queries = bags * spec.sections
    found = traffic_of(held, keys, bags=queries, pairs=queries * topk, wire_dtype="float32", sections=spec.sections)
    return Traffic(
        request=found.request + queries * keys.schema.value_dim * ELEMENT_BYTES["float32"],
        reply=found.reply + queries * min(topk, spec.rows) * _SCORED_BYTES,
        grads=found.grads,
        weight_grads=0,
    )


def _grouped_traffic_of(held: Holding, keys: Split, *, queries: int, topk: int, probes: int) -> Traffic:
    """As ``keys_traffic_of``, of hierarchical keys: queries go out for groups, and again with those for their slots. A
    bag of the gradient names a slot's key for each slot, and a group's for each group that is theirs, at most all."""
    groups = queries * min(topk, probes)
    sums = traffic_of(held, keys, bags=queries, pairs=queries * topk + groups, wire_dtype="float32", runs=groups)
    asked = 2 * keys.schema.value_dim * ELEMENT_BYTES["float32"] + probes * _SCORED_BYTES
    return Traffic(
        request=sums.request + queries * asked,
        reply=sums.reply + queries * (probes + topk) * _SCORED_BYTES,
        grads=sums.grads,
        weight_grads=0,
    )


def keys_traffic(split: Split, *, bags: int, topk: int, heads: int = 1) -> Traffic:
    """Between one trainer and all shards; arguments as above. Nothing where it trains no keys."""
    keys = split.keys
    if keys is None:
        return _summed([])
    return _summed(
        [
            (each.shards, keys_traffic_of(each, keys, bags=bags, topk=topk, heads=heads, probes=split.probes))
            for each in keys.holdings
        ]
    )


#: What a call costs beside the kernels, by terms, each in seconds for one of:
#:   call    the call itself
#:   shard   a further shard that is asked
#:   pair    a pair sent, once for each shard that it is sent to
#:   sort    a pair that is sent to its owner alone (rows)
#:   filter  a pair looked at for each shard that is sent a part (rows)
#:   column  an element of an answer
#:   sharing a second of kernels that others' kernels have gone on beside, on the same machine: 0 where shards are in
#:           nobody's way, 1 where they might as well take turns
TERMS = ("call", "shard", "pair", "sort", "filter", "column", "sharing")

Amounts = Mapping[str, float]


def client_amounts(split: Split, *, bags: int, pairs: int) -> Amounts:
    """How much of each term a client has to do with one look-up."""
    return {
        "call": 1,
        "shard": split.asked - 1,
        "pair": split.times_sent * pairs,
        "sort": pairs if split.filtered else 0,
        "filter": split.filtered * pairs,
        "column": columns_sent(split, bags=bags, pairs=pairs),
    }


def columns_sent(split: Split, *, bags: int, pairs: int) -> float:
    """Elements of all shards' answers to one look-up."""
    return sum(held.shards * held.width * bags_sent(held, bags=bags, pairs=pairs) for held in split.holdings)


def shard_amounts(held: Holding, *, bags: int, pairs: int) -> Amounts:
    """How much one shard has to do with it, beside its kernels."""
    return {"call": 1, "pair": held.share * pairs, "column": bags_sent(held, bags=bags, pairs=pairs) * held.width}


def gather_amounts(held: Holding, split: Split, *, pairs: int) -> Amounts:
    """Rows that a shard's kernel reads for a look-up, and their bytes."""
    rows = held.share * pairs
    width = held.area / held.share * split.schema.value_dim
    return {"row": rows, "byte": rows * width * ELEMENT_BYTES[split.schema.dtype]}


def update_amounts(held: Holding, split: Split, *, pairs: int) -> Amounts:
    """Pairs of an update and its commit, and bytes: rows read again for the weights' gradient, and each row that is
    touched read and written with its state. Of ids drawn uniformly: others touch fewer rows."""
    read = gather_amounts(held, split, pairs=pairs)
    slots = held.share * split.schema.num_slots
    touched = slots * -math.expm1(-read["row"] / slots)
    return {"row": read["row"], "byte": read["byte"] + 2 * touched * held.row_bytes}
