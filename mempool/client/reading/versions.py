"""What of a ``Table`` is about its versions."""

from typing import TYPE_CHECKING, cast

from mempool.client.counts import as_count
from mempool.client.opening.forking import Forks
from mempool.client.reading.pinning import Pinned, pin_kept, pin_newest, pin_version
from mempool.client.training.session import Session
from mempool.client.usage.counted import Counted
from mempool.errors import InvalidRequest

if TYPE_CHECKING:
    from mempool.client.reading.table_at import TableAt
    from mempool.client.table import Table

LATEST = "latest"
MAX_NAME_BYTES = 64


class Versions(Counted):
    """A part of ``Table``."""

    _session: Session
    forks: Forks | None = None
    """For ``Pool``: makes tables that are as this one is."""

    @property
    def staleness(self) -> int:
        """How many versions the table has gone on since the last look-up here, as far as this client has heard: replies
        to look-ups and commits say. What is pushed now is a gradient of values so much older."""
        looked_up = self._link.looked_up
        return 0 if looked_up is None else max(0, (self._link.known_version or 0) - looked_up)

    def at(self, version: int | str = LATEST) -> "TableAt":
        """The table as it is at one version, for reading: for evaluation while training goes on.

        Nobody waits for it, and nothing is copied: from now on shards keep what training overwrites, until it is
        closed. Keep it as long as you read, and no longer: what is kept is bounded, and the oldest goes first.

        Args:
            version: "latest": the newest one, with every commit that was acknowledged before. A number: that very
                version, while it is the newest one or somebody has it pinned. Another text: what ``pool.snapshot`` has
                kept under that name.

        The keys that it trains are read as they are at that version, too. Of a version that is given as a number they
        may be gone, where whoever has it pinned has not pinned them with it: reading them raises VersionGone then.

        Raises:
            VersionGone: There is no such snapshot, or the version is over and kept by nobody.
            InvalidRequest: The version is still to come.
            Overloaded: Others commit so often that no moment between two commits was found, for values and keys.
            ShardUnavailable: A shard did not answer within the pool's timeout_s.
        """
        router, keys = self._router, self.keys if self.trains_keys else None
        ids = [self.schema.table_id, *(() if keys is None else (keys.schema.table_id,))]
        if version == LATEST:
            pinned = self._run(pin_newest(router, ids, keys_of=dict.fromkeys(ids[1:], ids[0])))
        elif isinstance(version, str):
            pinned = self._run(pin_kept(router, ids, name=checked_name(version)))
        else:
            wanted = as_count(version)
            if wanted is None or wanted < 0:
                raise InvalidRequest(
                    f"table {self.schema.name!r}: version = {version!r} must be a version's number, a snapshot's name, "
                    f"or {LATEST!r}"
                )
            pinned = self._run(pin_version(router, ids, wanted))
        has_keys = keys is not None and keys.schema.table_id in pinned.versions
        return self._at(pinned, keys._at(pinned) if keys is not None and has_keys else None)

    def _at(self, pinned: Pinned, keys: "TableAt | None" = None) -> "TableAt":
        from mempool.client.reading.table_at import TableAt  # it is a table

        return TableAt(
            self.schema,
            router=self._router,
            session=self._session,
            run=self._run,
            begin=self._begin,
            pin=pinned.pin,
            version=pinned.versions[self.schema.table_id],
            keys=keys,
        )

    def fork(self, name: str) -> "Table":
        """A table of its own that is as this one is now: values, keys, optimizer state, step count and version, bit for
        bit, at one version over all shards, with every commit that was acknowledged before.

        They share memory until either is written to, the system's page by page, and go their own ways. Who trains waits
        a moment. Random rounding goes by the name. The fork counts as if all of it were its own where memory is limited
        (shard.memory). Has no deadline: the first fork of a table moves its memory, a second a GiB or so.

        Args:
            name: Of the new table.

        Raises:
            AlreadyExists: There is a table of that name.
            NotFound: This table is not there any more.
            InvalidRequest: The name is none; or there is no room.
            DataLoss: Pages of this table are lost.
            PoolUnreachable: The controller does not answer; the pool may go on with it: see ``status``.
        """
        assert self.forks is not None, "a version that is read refuses it"
        return self.forks.fork(cast("Table", self), name)

    def reset(self, to: "Table | str") -> None:
        """Become what another table is now, a fork of this one say: values, keys, optimizer state, step count and
        version, bit for bit.

        It is a new table in the place of this one, as ``Pool.restore(replace=True)`` makes one: what is pending is
        dropped, backward passes of earlier look-ups are refused, and this ``Table``, and what uses it, goes on with
        the new one. Other clients are told so when they next ask, and go on by ``Pool.reopen``. Until it is there, the
        old one stays: there must be room for both.

        Args:
            to: A table of this pool with as many slots and columns, the same dtype, keys, pages and optimizer; or its
                name.

        Raises:
            NotFound: There is no such table; this one stays as it is.
            AlreadyExists: It is another kind of table; the message says in what.
            InvalidRequest: It is this table; or there is no room.
            PoolUnreachable: The controller does not answer; the pool may go on with it: see ``status``.
        """
        assert self.forks is not None, "a version that is read refuses it"
        self.forks.reset(cast("Table", self), to)


def checked_name(name: object) -> str:
    """A snapshot's name. Raises InvalidRequest for what is none."""
    if not isinstance(name, str) or not 0 < len(name.encode("utf-8", "surrogatepass")) <= MAX_NAME_BYTES:
        raise InvalidRequest(f"a snapshot's name is a text of 1 to {MAX_NAME_BYTES} bytes, not {name!r:.80}")
    if name == LATEST:
        raise InvalidRequest(f"{LATEST!r} is the newest version, and no snapshot's name: take another one")
    return name
