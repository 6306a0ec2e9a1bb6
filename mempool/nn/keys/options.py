"""What a memory layer was asked for in the way of keys, checked before anything is made."""

from typing import Any, Literal, NamedTuple

from torch import nn

from mempool.client import Table
from mempool.errors import InvalidRequest
from mempool.nn.keys.hierarchical import HierarchicalKeys
from mempool.nn.keys.tucker import TuckerKeys
from mempool.nn.sizes import checked_int, checked_key_dim, checked_pool_keys, codebook_size

Keys = Literal["model", "product", "hierarchical", "pool"]
Score = Literal["sum", "tucker"]


class KeyOptions(NamedTuple):
    """Keys of a layer.

    Attributes:
        kind: "product", "tucker", "hierarchical", or "pool", of whatever kind these are.
        heads: Queries of a token.
        key_dim: Width of a query.
        ways: Parts that it is cut into; 1 where it is not.
        codebook_size: Half-keys of a part; 0 where there are none.
        rank: Parts of a half, of Tucker scores.
        groups, probes: As the layer was given them.
    """

    kind: Literal["product", "tucker", "hierarchical", "pool"]
    heads: int
    key_dim: int
    ways: int
    codebook_size: int
    rank: int
    groups: int | None
    probes: int | None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of half-keys."""
        return self.heads, self.ways, self.codebook_size, self.key_dim // self.ways

    def module(self, num_slots: int, *, topk: int, qk_norm: bool, made: dict[str, Any]) -> nn.Module | None:
        """What has keys and a search of its own; None of plain product keys and those of the pool."""
        own: dict[str, Any] = {"probes": self.probes, "topk": topk, "qk_norm": qk_norm, "made": made}
        if self.kind == "hierarchical":
            return HierarchicalKeys(num_slots, self.key_dim, groups=self.groups, **own)
        return TuckerKeys(num_slots, self.shape, rank=self.rank, **own) if self.kind == "tucker" else None


def key_options(
    table: Table,
    keys: Keys,
    *,
    heads: int | None,
    key_dim: int | None,
    ways: int | None,
    score: Score,
    rank: int | None,
    groups: int | None,
    probes: int | None,
    **of_model: object,
) -> KeyOptions:
    """Check what a layer was given.

    Args:
        of_model: By name what else is of keys in the model alone; None and False where it was not given.

    Raises:
        InvalidRequest: Options that make no sense, that are of other keys, or that do not fit the table.
    """
    kind = _kind(keys, score)
    name, num_slots = table.schema.name, table.schema.num_slots
    if kind == "pool":
        of_model |= {"rank": rank, "groups": groups, "probes": probes}
        there = checked_pool_keys(table, heads, key_dim, ways, **of_model)
        ways = there.ways if there.product else 1
        size = codebook_size(name, num_slots, ways) if there.product else 0
        heads = checked_int("heads", 4 if heads is None else heads) if there.groups else there.heads
        return KeyOptions(kind, heads, checked_key_dim(there.key_dim, parts=ways), ways, size, 1, None, None)
    allowed = {"product": ("ways",), "tucker": ("rank", "probes"), "hierarchical": ("groups", "probes")}[kind]
    counts: dict[str, int | None] = {}
    for option, given in (("ways", ways), ("rank", rank), ("groups", groups), ("probes", probes)):
        if given is not None and option not in allowed and (option, given, kind) != ("ways", 2, "tucker"):
            raise InvalidRequest(f"{option} = {given!r} is not of {_SAID[kind]}, which take {', '.join(allowed)}")
        counts[option] = None if given is None else checked_int(option, given, at_least=1 + (option == "ways"))
    heads = checked_int("heads", 4 if heads is None else heads)
    rank = (counts["rank"] or 2) if kind == "tucker" else 1
    ways = 1 if kind == "hierarchical" else counts["ways"] or 2
    size = 0 if kind == "hierarchical" else codebook_size(name, num_slots, ways)
    key_dim = checked_key_dim(key_dim, parts=ways * rank)
    return KeyOptions(kind, heads, key_dim, ways, size, rank, counts["groups"], counts["probes"])


_SAID = {
    "product": 'product keys with score="sum"',
    "tucker": 'Tucker scores (score="tucker")',
    "hierarchical": 'keys="hierarchical"',
}


def _kind(keys: object, score: object) -> Literal["product", "tucker", "hierarchical", "pool"]:
    if keys not in ("model", "product", "hierarchical", "pool"):
        raise InvalidRequest(
            f'keys = {keys!r}: must be "product" (or "model") or "hierarchical", parameters of the layer, or "pool",'
            " the table's own"
        )
    if score not in ("sum", "tucker"):
        raise InvalidRequest(f'score = {score!r}: must be "sum", of the scores of a query\'s parts, or "tucker"')
    if score == "tucker":
        if keys in ("hierarchical", "pool"):
            raise InvalidRequest(
                f'score = "tucker" is of product keys in the model (keys="product"), got keys = {keys!r}'
            )
        return "tucker"
    return "product" if keys in ("model", "product") else keys  # type: ignore[return-value]
