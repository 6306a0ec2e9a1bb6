"""Values of the ``PoolApi`` protocol: views of tables, status, progress."""

from dataclasses import dataclass, replace

from mempool.types.schema import Placement, TableSchema

MAX_SHARDS = 4096
"""Shards of a pool: every one of them is asked for its status, told every placement, and named in every view."""
MAX_TABLES = 4096
MAX_PLACED_PAGES = 2**22
"""Pages of all tables: each costs four bytes in whatever tells of all tables, as a status does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardInfo:
    """Where a shard is. Each start of a shard has a new, higher incarnation. address: "host:port", "" if embedded."""

    shard: int
    address: str
    incarnation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedTable:
    """A table in a checkpoint.

    Attributes:
        url: The place.
        checkpoint: The checkpoint's name there.
        table: The table's name in it.
        version: The table version that it has there.
        taken: When the pool learned of it, in milliseconds since 1970.
    """

    url: str
    checkpoint: str
    table: str
    version: int
    taken: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TableView:
    """All a client needs to plan requests: the schema, the placement, and where its shards are.

    Attributes:
        controller: "host:port" of the pool's controller, as whoever answers knows it; "" if embedded, or not known.
        saved: The newest checkpoint of the table that the pool has taken, or that it was restored from.
    """

    schema: TableSchema
    placement: Placement
    shards: tuple[ShardInfo, ...]
    controller: str = ""
    saved: SavedTable | None = None

    def shard_info(self, shard: int) -> ShardInfo:
        """The info of one shard. Raises KeyError for a shard the view does not name."""
        for info in self.shards:
            if info.shard == shard:
                return info
        raise KeyError(shard)


def newest_saved(first: SavedTable | None, second: SavedTable | None) -> SavedTable | None:
    """The newer one of what is known to be saved of one table."""
    if first is None or second is None:
        return first or second
    return max(first, second, key=lambda saved: (saved.version, saved.taken))


def merged(known: TableView, view: TableView) -> TableView:
    """``view``, whose epoch is not older, with what it leaves out and is known: of one table. Of one epoch it may be
    late: starts of shards that are known by now it knows nothing of."""
    saved = newest_saved(known.saved, view.saved)
    starts = {info.shard: info for info in known.shards}
    shards = tuple(max(info, starts.get(info.shard, info), key=_incarnation) for info in view.shards)
    if saved == view.saved and (view.controller or not known.controller) and shards == view.shards:
        return view
    return replace(view, controller=view.controller or known.controller, saved=saved, shards=shards)


def _incarnation(info: ShardInfo) -> int:
    return info.incarnation


def lost_remedy(name: str, saved: SavedTable | None) -> str:
    """What to do about a table that has lost pages, in words: its newest checkpoint, as far as is known."""
    drop = f"drop the table (pool.drop_table({name!r})), make it again and write back what you saved of it"
    if saved is None:
        return (
            "No checkpoint of it is known here. Restore one in its place if you have one (mempool restore PLACE "
            f"--table {name} --replace, or pool.restore(place, tables=[{name!r}], replace=True)), or {drop}"
        )
    called = ("", "") if saved.table == name else (f" --as {name}", f", name={name!r}")
    return (
        f"Its newest checkpoint is {saved.checkpoint} in {saved.url}, at version {saved.version:,}. Restore it in its "
        f"place: mempool restore {saved.url} --checkpoint {saved.checkpoint} --table {saved.table}{called[0]} "
        f"--replace, or pool.restore({saved.url!r}, checkpoint={saved.checkpoint!r}, tables=[{saved.table!r}]"
        f"{called[1]}, replace=True). Or {drop}"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTime:
    """Time spent in one stage of calls since the process started.

    Attributes:
        count: How many times it was passed; total_s: seconds, all times together.
        p50_s, p99_s: What half, and 99 of 100, took at most: known to a factor of two, and interpolated.
        max_s: The longest.
    """

    stage: str
    count: int
    total_s: float
    p50_s: float = 0.0
    p99_s: float = 0.0
    max_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PinStatus:
    """A version of a table that is kept, for so many readers (``pins``), or under a snapshot's name."""

    version: int
    name: str
    pins: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TableStatus:
    """One table as one shard sees it. pages and lost_pages count (row page, block)s and key pages.

    bytes_to_fill: Bytes of initial values that are still to be written here; 0 once the table answers.
    preparing: What is done before they are written, in words; "" for nothing.
    pending: It is being made, and answers no client: not all shards are known to have it.
    round: Token of the round of a move that holds it frozen; "" where none does.
    load: How many numbers of its values look-ups and updates read and wrote here: of a sample, halved every minute.
    pins: Versions of it that are kept, ascending.
    shared_bytes: Of num_bytes, what is another table's memory still: a fork's, where neither was written to.
    """

    table_id: int
    name: str
    epoch: int
    version: int
    pages: int
    lost_pages: int
    num_bytes: int
    updates_held: int
    updates_applied: int
    lookups: int
    frozen: bool
    bytes_to_fill: int = 0
    preparing: str = ""
    pending: bool = False
    round: str = ""
    load: float = 0.0
    pins: tuple[PinStatus, ...] = ()
    shared_bytes: int = 0

    @property
    def is_needed(self) -> bool:
        """Whether what the shard has of it may be nowhere else: its pages, or those that a round of a move has brought,
        which may be decided before this shard hears so."""
        return bool(self.pages + self.lost_pages or self.round)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardStatus:
    """One shard. state: "ready", "starting" or "unreachable" (the rest is then of no meaning but ``info`` and
    ``storage_refuses``).

    Attributes:
        num_bytes: Of its pages; it may have ``page_limit_bytes`` of them (0: as much as the device has).
        context_bytes, held_bytes, queued_bytes: What clients make it hold: lookups remembered for their gradients,
            updates that are not committed, calls that wait or are answered. Of ``client_limit_bytes`` together.
        queued_calls: Calls that wait or are answered.
        kept_bytes: Sums that prepared steps keep for their commit.
        dropped: Ids of tables that it was told to drop, the newest of them.
        storage: Where it keeps what it has; "" where it keeps nothing: all is gone with it.
        journal_bytes: Of its journal there.
        storage_refuses: What that refuses, for people: nothing can be changed until it takes it; of a shard that is not
            ready: why it cannot start, as what it has kept is damaged, say. "" for nothing.
        copied_bytes: Of rows that are kept as they were, for a checkpoint that is being written; beside
            ``page_limit_bytes``.
        version_bytes: Of rows that are kept as they were, for readers of versions, within ``page_limit_bytes``; they
            may take ``version_limit_bytes``, where pages leave it.
        near_clients: Processes of its host whose calls go through memory that both have.
        tcp_line_clients: Processes whose calls come by lines over TCP; all others come by gRPC.
    """

    info: ShardInfo
    state: str
    device: str = ""
    num_bytes: int = 0
    context_bytes: int = 0
    held_bytes: int = 0
    queued_bytes: int = 0
    queued_calls: int = 0
    kept_bytes: int = 0
    client_limit_bytes: int = 0
    page_limit_bytes: int = 0
    uptime_s: float = 0.0
    tables: tuple[TableStatus, ...] = ()
    stages: tuple[StageTime, ...] = ()
    dropped: tuple[int, ...] = ()
    storage: str = ""
    journal_bytes: int = 0
    storage_refuses: str = ""
    copied_bytes: int = 0
    version_bytes: int = 0
    version_limit_bytes: int = 0
    near_clients: int = 0
    tcp_line_clients: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DropTable:
    """Asks for a table's end. table_id: 0 for whichever has that name, now or when the request comes late."""

    name: str
    table_id: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TakeCheckpoint:
    """Asks for a checkpoint of a pool.

    Attributes:
        url: The place: an absolute path that is the same on all nodes, or a URL that fsspec knows.
        tables: Names; none: all tables there are.
        incremental: Let pages that did not change be read from the newest checkpoint's files.
        keep: Remove all but so many of the newest once it is whole; 0: none.
        extra: The user's own, a JSON object as text; "": nothing.
        aside: It is for once: shards go on knowing what changed since the checkpoint before.
    """

    url: str
    tables: tuple[str, ...] = ()
    incremental: bool = True
    keep: int = 0
    extra: str = ""
    aside: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TableVersion:
    """A table and the version that it has in a checkpoint."""

    table: str
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointProgress:
    """Where a checkpoint stands; the last message has ``done``.

    Attributes:
        url: The place.
        name: The checkpoint's, in the place; "" until it has one.
        bytes_done, bytes_total: Of pages to write, all shards together; 0 until the moment is taken.
        tables: The tables and their versions, once the moment is taken.
        held_s: How long writers were held off for that moment, seconds.
        doing: What it is at, for people.
        done: It is whole; no message follows.
    """

    url: str
    name: str
    bytes_done: int
    bytes_total: int
    tables: tuple[TableVersion, ...]
    held_s: float
    doing: str
    done: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ForkTable:
    """Asks for a table that is another one as it is now.

    Attributes:
        table, table_id: The one that there is: another may have that name by the time this comes.
        name: What the new one shall be called.
        replace, newest_id: As in ``RestoreTables``.
    """

    table: str
    table_id: int
    name: str
    replace: bool = False
    newest_id: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreTables:
    """Asks for tables as a checkpoint has them, or for one table as a file has it.

    Attributes:
        url: The place, as in ``TakeCheckpoint``.
        checkpoint: The checkpoint's name; "" for the newest.
        tables: Their names in it; none: all.
        name: What the one table that is asked for shall be called; "": as it is there.
        replace: Take the place of a table of that name, once the pages are all there.
        layout: How pages are spread over the shards; "": as they were.
        schema: Where the url is a file with one table's rows: the table's; else None.
        values, keys: Names of its tensors in that file; "": as they are found.
        newest_id: The highest id of the pool's tables as whoever asks knows them: a later one is not replaced, so that
            a copy of this that comes late undoes nothing. 0: whatever there is is replaced.
    """

    url: str
    checkpoint: str = ""
    tables: tuple[str, ...] = ()
    name: str = ""
    replace: bool = False
    layout: str = ""
    schema: TableSchema | None = None
    values: str = ""
    keys: str = ""
    newest_id: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardFill:
    """How many bytes of a table that is being made have their initial values on one shard, and of how many."""

    shard: int
    bytes_done: int
    bytes_total: int


WAITS_FOR_CHANGE = "the change of the pool that is under way"
WAITS_FOR_SHARDS = "shards that have not said yet what tables there are"
"""What a table that is to be made waits for. The second is no sign of life: a silent shard may never say it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TableCreation:
    """A table that is being made: its name, and how far each of its owners is.

    Attributes:
        waiting_for: What has to end before it begins, or goes on, for people; "" once it is being filled.
        spent_s: Seconds since it was asked for.
        shards: Its owners; none until it is placed.
    """

    table: str
    table_id: int
    waiting_for: str
    spent_s: float
    shards: tuple[ShardFill, ...]

    @property
    def bytes_done(self) -> int:
        return sum(fill.bytes_done for fill in self.shards)

    @property
    def bytes_total(self) -> int:
        return sum(fill.bytes_total for fill in self.shards)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PoolStatus:
    """The pool at a glance.

    Attributes:
        rescaling: Whether the pool is on its way to another number of shards.
        wanted_shards: The number of shards it was last asked for: more or fewer than ``shards`` while it is on its way,
            and where it did not get there. 0: not known (a shard answers, while the controller is away).
        waiting_for: What the rescale waits for, for people; "" if for nothing.
        unfinished: Why a rescale stopped half way and what to do, for people; "" if none did.
        creating: Tables that are being made.
        checkpoint: The checkpoint that is being taken and what it is at, for people; "" if none is.
    """

    name: str
    shards: tuple[ShardStatus, ...]
    tables: tuple[TableView, ...]
    rescaling: bool
    wanted_shards: int = 0
    waiting_for: str = ""
    unfinished: str = ""
    creating: tuple[TableCreation, ...] = ()
    checkpoint: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardLoad:
    """A shard's part of the pool's load, 0 to 1, before pages move and after; of shards that come or go too."""

    shard: int
    before: float
    after: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RescaleProgress:
    """Where a rescale, or a rebalancing, stands; the last message has ``done``.

    Attributes:
        pages_moved, pages_total, bytes_moved, bytes_total: So far, and in all.
        table: The one whose pages move, "" between tables.
        loads: What the plan makes of the shards' load, by shard; none until there is a plan, or where too little was
            read and written lately to tell.
    """

    shards_before: int
    shards_after: int
    pages_moved: int
    pages_total: int
    bytes_moved: int
    bytes_total: int
    table: str
    done: bool
    loads: tuple[ShardLoad, ...] = ()
