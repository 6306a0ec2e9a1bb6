"""A pin: a reader has a version of a table kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mempool.types.messages import Envelope, Stamp

PinAction = Literal["arm", "settle", "attach", "renew", "release"]
"""Of one pin, in this order, at every owner of a table: "arm", it keeps each version that it comes to from now on;
"settle", that version alone, the highest that owners were armed at; "attach", in place of both, what is kept already,
as a snapshot or for another reader; "renew", its reader lives; "release", it is over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PinRequest:
    """A pin keeps one version of a table for a reader, at a shard.

    Attributes:
        pin: The reader's token of it, a random one; of "release" "" where a snapshot is named.
        version: Of "settle": at which; of "attach": which, where no name is given.
        name: Of a snapshot, which has no lease once it is settled; "": it is a reader's.
        lease_s: A pin that is not renewed for so long is over.
        beside: Of the table of a table's keys, a version of that table: of "settle": whose keys these are; of "attach",
            in place of ``version``: what was settled so.
    """

    envelope: Envelope
    do: PinAction
    pin: str
    version: int = 0
    name: str = ""
    lease_s: float = 0.0
    beside: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PinReply:
    """version: That is pinned here, or at which it was armed; 0 for "release"."""

    stamp: Stamp
    version: int
