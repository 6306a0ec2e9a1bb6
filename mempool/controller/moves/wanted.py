"""What of a pool is not as it was asked to be: its shards, and where pages lie. Pure; slow where pages are many."""

from collections.abc import Iterable, Sequence

from mempool.placement import assignment_of, moves, plan_table
from mempool.types import TableView


def unfinished(views: Iterable[TableView], shards: Sequence[int], wanted: int) -> str:
    """What is not where ``wanted`` shards would have it, for people, and the command that ends it; "" if nothing.

    Args:
        views: The pool's tables.
        shards: Its shards.
        wanted: How many it was asked for; 0: as many as there are.
    """
    wanted = wanted or len(shards)
    command = f"ask again with mempool scale --shards {wanted}, or mempool apply"
    if len(shards) != wanted:
        return f"the pool has {_counted(len(shards))} and was asked for {wanted}: {command}"
    lies = _lying(views, shards)
    return f"{lies}: {command}" if lies else ""


def _lying(views: Iterable[TableView], shards: Sequence[int]) -> str:
    for view in views:
        schema, placement = view.schema, view.placement
        missing = sorted(set(placement.shards).difference(shards))
        if missing:
            return f"table {schema.name!r} has pages on shard {missing[0]}, which is not among the pool's shards"
        present = assignment_of(placement)
        target = plan_table(schema, present, shards)
        lying = moves(present, target).num_pages
        if lying:
            pages = placement.owners.size + placement.key_owners.size
            table = f"{lying:,} of {pages:,} pages of table {schema.name!r}"
            return f"{table} are still to be moved for {_counted(len(shards))}"
    return ""


def _counted(shards: int) -> str:
    return f"{shards} shard" if shards == 1 else f"{shards} shards"
