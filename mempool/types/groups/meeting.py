"""What the ranks of a group say to each other, by way of the group's home: a shard that they all know.

What is decided of it is ``mempool.agreement.groups``; what a sync group commits is its leader's, rank 0.
"""

from dataclasses import dataclass
from typing import Literal

Consistency = Literal["sync", "async", "bounded"]
Reduction = Literal["mean", "sum"]
RankState = Literal["here", "lost", "left", "awaited"]
MeetKind = Literal["join", "beat", "arrive", "leave"]
MeetPhase = Literal["prepare", "commit"]
MeetAnswer = Literal["heard", "wait", "occupied", "changed", "lost", "arrived", "word"]
WordKind = Literal["prepared", "done", "earlier", "again", "undone", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What all ranks of a group must say alike.

    Attributes:
        world_size: How many ranks it has.
        consistency: When their steps are applied.
        staleness: Of "bounded": how many steps a rank may be ahead of the slowest.
        reduction: What becomes of the ranks' gradients in a sync step.
        elastic: The group may go on with another number of ranks.
    """

    world_size: int
    consistency: Consistency = "sync"
    staleness: int = 0
    reduction: Reduction = "mean"
    elastic: bool = False

    @property
    def words(self) -> str:
        """For messages."""
        parts = [f"{self.world_size} ranks", f"consistency={self.consistency!r}"]
        if self.consistency == "bounded":
            parts.append(f"staleness={self.staleness}")
        if self.consistency == "sync":
            parts.append(f"reduction={self.reduction!r}")
        if self.elastic:
            parts.append("elastic")
        return ", ".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class OfferedPart:
    """One table in what a rank commits.

    Attributes:
        step: The step, as the rank counts the group's on this table.
        sequences: The rank's updates, ascending; none where it has nothing pending.
    """

    table_id: int
    step: int
    sequences: tuple[int, ...]
    lr: float = 0.0
    grad_scale: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WordPart:
    """One table in the leader's word.

    Attributes:
        step: The step that its updates are to be sent under ("again"), or the next one of the group ("done").
        sequences: Of "again": updates that shards miss, of whichever rank.
        version: Of "done", of a commit: the version that it makes; 0 where nothing was pending.
        squared_norm, finite, norm: Of "done", of a prepare: as of ``PreparedPart``, over all shards, reduced.
        updates: How many updates the step has, of all ranks.
    """

    table_id: int
    step: int = 0
    sequences: tuple[int, ...] = ()
    version: int = 0
    squared_norm: float = 0.0
    finite: bool = True
    norm: float = 0.0
    updates: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Word:
    """What the leader says to the others of a meeting, once it has carried it out.

    Attributes:
        kind: "prepared": its parts say what a commit would have. "done": the step is committed. "earlier": a step
            that was in doubt is committed; come again with what is pending. "again": send updates again, and come
            again. "undone": nothing was decided. "failed": whether it was is not known yet.
        message, code: Of the last two: why, and what kind of error that is.
    """

    meeting: int
    kind: WordKind
    parts: tuple[WordPart, ...] = ()
    message: str = ""
    code: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class MeetRequest:
    """A rank to its group's home. Complete in itself: a home that knows nothing goes on from it; can be repeated.

    Attributes:
        nonce: The member: drawn at random when it joins.
        host: Where it runs, for people.
        restart: How often its launcher has restarted it: a higher one replaces a lower one of that launcher at once.
        launcher: What has started it, and starts it again.
        generation: Of the group, as the rank knows it; 0: not at all yet.
        meeting: Of "arrive": which, counted from 1 in a generation. Of others: the last one that it arrived at.
        step: How many steps the rank has seen the group commit, or is told that it starts with.
        phase, parts, want_norm, norm_order: Of "arrive": what is to be done with which updates. want_norm, of a commit:
            the rank has prepared the step before.
        word: Of the leader: its last one.
        ticket: With which it has joined; 0 before.
        number: Of "arrive": ascending in the life of the process, the same in a repeat. A lower one comes late. Of
            "beat": not 0: what it has arrived with up to that one is taken back. Of "join": the ticket it was given.
    """

    group: str
    rank: int
    nonce: int
    host: str
    terms: Terms
    kind: MeetKind
    restart: int = 0
    launcher: str = ""
    generation: int = 0
    meeting: int = 0
    step: int = 0
    phase: MeetPhase = "commit"
    parts: tuple[OfferedPart, ...] = ()
    want_norm: bool = False
    norm_order: float = 0.0
    word: Word | None = None
    number: int = 0
    ticket: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """What one rank arrived with."""

    rank: int
    host: str
    phase: MeetPhase
    parts: tuple[OfferedPart, ...]
    want_norm: bool = False
    norm_order: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A rank as the home knows it.

    Attributes:
        host: "" where it never came.
        state: "here", "lost" (silent for its lease), "left", or "awaited" (never came, or not since the group began
            anew).
        silent_s: Since when nothing was heard of it.
        meeting: At which it is.
    """

    rank: int
    host: str
    state: RankState
    silent_s: float
    meeting: int
    step: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Undecided:
    """A step that ranks of an earlier generation had arrived to commit, and of which nobody has said what became of it.

    Attributes:
        generation: In which it was.
        step: How many steps the group has committed if it is decided.
        parts: Its tables, each with the step as its ranks counted; without sequences.
    """

    generation: int
    step: int
    parts: tuple[OfferedPart, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class MeetReply:
    """The home to a rank.

    Attributes:
        answer: "heard": it joined, or is known to live. "wait": nothing yet, ask again; to one that takes back what it
            has arrived with: all are there, and it may be committed. "occupied": another process is this rank
            (``others`` has it). "changed": the group has begun generation ``generation``: go on in that. "lost": ranks
            in ``others`` are lost. "arrived": all are there (to the leader; to a rank that is bounded: go on). "word":
            the leader's.
        step: Steps that the group has committed, as far as is known.
        lease_s: Silence after which a rank is taken for dead.
        arrivals: Of "arrived" to the leader: of all ranks, ascending.
        others: Ranks that are waited for, or lost.
        undecided: Of "heard", to one that joins: what it asks for before anything else.
        ticket: Of "wait", to one that joins without one, or with an old one: it is to ask again with this.
        home: The incarnation of the shard that answers: one with another has not heard what this one was told.
    """

    answer: MeetAnswer
    generation: int = 0
    step: int = 0
    lease_s: float = 0.0
    arrivals: tuple[Arrival, ...] = ()
    word: Word | None = None
    others: tuple[Seen, ...] = ()
    undecided: Undecided | None = None
    ticket: int = 0
    home: int = 0
