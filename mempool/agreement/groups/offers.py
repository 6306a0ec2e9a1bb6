"""What the ranks of a sync group arrive with, as one step: whether they agree, and whose updates it has. Pure."""

import math
from collections.abc import Callable, Sequence

from mempool.errors import InvalidRequest, RankLost
from mempool.types.groups.meeting import Arrival, OfferedPart

NameOf = Callable[[int], str]

_SAME_SCALE = 1e-5
"""Relative: clipping makes grad_scale of norms of which ranks may have other last bits, on GPUs of several kinds, say.
The leader's is what counts."""


def sequences_of(arrivals: Sequence[Arrival]) -> dict[int, tuple[int, ...]]:
    """Updates by table, in the canonical order: by rank, then sequence."""
    found: dict[int, list[int]] = {}
    for arrival in sorted(arrivals, key=lambda each: each.rank):
        for part in arrival.parts:
            found.setdefault(part.table_id, []).extend(part.sequences)
    return {table_id: tuple(sequences) for table_id, sequences in found.items()}


def check_offers(group: str, arrivals: Sequence[Arrival], name_of: NameOf) -> None:
    """Raises InvalidRequest where ranks are about different things; the message names both sides. RankLost, where some
    were told of one that is back by now, and begin the step anew, and others have not heard of it."""
    if len({each.phase for each in arrivals}) > 1 and all(each.want_norm for each in arrivals):
        raise RankLost(f"group {group!r} prepares its step anew, as ranks were silent meanwhile: the same call goes on")
    first = arrivals[0]
    mine = {part.table_id: part for part in first.parts}
    for other in arrivals[1:]:
        theirs = {part.table_id: part for part in other.parts}
        said, says = "", ""
        if other.phase != first.phase:
            said, says = _doing(first), _doing(other)
        elif mine.keys() != theirs.keys():
            said, says = (f"commits {_tables(each.parts, name_of)}" for each in (first, other))
        elif first.phase == "prepare" and (first.want_norm, first.norm_order) != (other.want_norm, other.norm_order):
            said, says = (f"asks for {_norm(each)}" for each in (first, other))
        else:
            for table_id, part in mine.items():
                said, says = _numbers(part, theirs[table_id], name_of(table_id), first.phase)
                if said:
                    break
        if said:
            raise InvalidRequest(
                f"the ranks of group {group!r} step together, but rank {first.rank} ({first.host}) {said}, and rank "
                f"{other.rank} ({other.host}) {says}: let all do the same, in the same order. Nothing was applied."
            )


def _doing(arrival: Arrival) -> str:
    return "asks for the norm of its gradient" if arrival.phase == "prepare" else "commits a step"


def _tables(parts: Sequence[OfferedPart], name_of: NameOf) -> str:
    names = ", ".join(repr(name_of(part.table_id)) for part in parts)
    return f"{'tables' if len(parts) != 1 else 'table'} {names or 'none'}"


def _norm(arrival: Arrival) -> str:
    if not arrival.want_norm:
        return "no norm"
    return f"the norm of order {arrival.norm_order}" if arrival.norm_order else "the squared norm"


def _numbers(mine: OfferedPart, theirs: OfferedPart, name: str, phase: str) -> tuple[str, str]:
    if phase != "commit":
        return "", ""
    if mine.lr != theirs.lr:
        return f"commits table {name!r} with lr = {mine.lr!r}", f"with lr = {theirs.lr!r}"
    if not math.isclose(mine.grad_scale, theirs.grad_scale, rel_tol=_SAME_SCALE):
        return (
            f"commits table {name!r} with grad_scale = {mine.grad_scale!r}",
            f"with grad_scale = {theirs.grad_scale!r}",
        )
    return "", ""
