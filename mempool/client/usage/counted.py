"""What of a ``Table`` is about how its slots are used.

Legend: M slots.
"""

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from mempool.client.counts import as_count
from mempool.client.gathers.untraced import untraced
from mempool.client.keys.keyed import Keyed
from mempool.client.keys.layout import KeyLayout
from mempool.client.rows import checked_rows, distinct_rows
from mempool.client.usage.asking import ask_usage
from mempool.client.usage.reinit import (
    USES,
    Reinitialised,
    checked_noise,
    checked_pairs,
    checked_seed,
    copied,
    drawn,
    require_dead,
    require_free,
)
from mempool.errors import InvalidRequest, StepConflict
from mempool.types import FlatKeySpec, TrainedKeySpec
from mempool.types.usage import SlotUsage, Usage

LAST_USE = "values.last_use"
_MOST_VERSIONS = 2**53 - 1


class Counted(Keyed):
    """A part of ``Table``."""

    @property
    def pending(self) -> int:
        """Updates that are not committed."""
        raise NotImplementedError

    @overload
    def usage(self, slots: None = None, *, older_than: int = 0) -> Usage: ...

    @overload
    def usage(self, slots: "Tensor | Sequence[int]") -> SlotUsage: ...

    @untraced
    def usage(self, slots: "Tensor | Sequence[int] | None" = None, *, older_than: int = 0) -> Usage | SlotUsage:
        """How often the slots were used, of a table with ``usage=True``.

        A use is a pair of a look-up whose gradient is part of a committed step: each is counted once, with the step,
        whatever is retried, moved, replayed or restored; look-ups without a gradient, of a frozen table, and of steps
        that were dropped are not. Shards count, and answer sums and a histogram. Where others commit meanwhile, some
        slots are counted before a step and some behind it.

        Args:
            slots: [M] int64 ids, or a list of int: asks for the counts themselves, of these slots, in their order.
            older_than: Slots that were used, and by none of the last so many versions, count as outdated. 0: none do.
                Not beside ``slots``.

        Raises:
            InvalidRequest: The table counts nothing, or wrong ids or numbers; nothing was sent.
            ShardUnavailable: A shard did not answer within the pool's timeout_s.
            DataLoss: Pages of the table are gone.
        """
        self._require_counts("Its usage cannot be told")
        if slots is not None:
            if older_than != 0:
                raise InvalidRequest(
                    f"table {self.schema.name!r}: older_than = {older_than!r} is of all slots together; of those in "
                    "slots last_use says it: leave one of the two out."
                )
            ids = checked_rows(slots, num_slots=self.schema.num_slots, table=self.schema.name)
            found = self._rows.read_arrays((USES, LAST_USE), ids)
            return SlotUsage(slots=ids, uses=found[USES][:, 0], last_use=found[LAST_USE][:, 0])
        versions = as_count(older_than)
        if versions is None or not 0 <= versions <= _MOST_VERSIONS:
            raise InvalidRequest(
                f"table {self.schema.name!r}: older_than = {older_than!r} must be a number of versions, 0 to "
                f"{_MOST_VERSIONS}."
            )
        return self._run(
            self._router.call(self.schema.table_id, lambda attempt: ask_usage(attempt.fanout, older_than=versions))
        )

    @untraced
    def reinit(
        self,
        slots: "Tensor | Sequence[int] | None" = None,
        *,
        from_: "Tensor | Sequence[int] | None" = None,
        noise: float = 0.0,
        seed: int = 0,
        force: bool = False,
    ) -> Reinitialised:
        """Let slots that were never used begin anew, from used ones: with their values and keys, plus noise.

        Optimizer state and counts of use of the slots are as of new ones then; the version stays. One process does it
        for all, between two steps: while nobody has anything pending, so in a group one rank, the others waiting for
        it. Each slot's values are written at once on a shard; where this is cut off some slots have begun anew, and the
        same call does the same again. Product keys, and those of groups, are no slot's own, and stay.

        Args:
            slots: [M] int64 distinct ids, or a list of int; None: all that were never used.
            from_: [M] ids whose rows they take, in their order; None: drawn from the slots that were used, each with
                the probability of its uses.
            noise: Standard deviation of normal noise that is added to values and keys.
            seed: Of all that is drawn: the same table, arguments and seed give the same slots the same bits.
            force: Also slots that were used.

        Returns:
            Which slots have begun anew, and from which.

        Raises:
            InvalidRequest: The table counts nothing (and is not forced to what it is told), a slot was used, or is not
                there, from_ has not one for each, or nothing was used yet; nothing was changed.
            StepConflict: Something is pending, here or of another rank, or somebody commits meanwhile.
            ShardUnavailable: A shard did not answer within the pool's timeout_s; some slots may have begun anew.
        """
        schema, table = self.schema, self.schema.name
        if not (force and slots is not None and from_ is not None):
            self._require_counts("Which slots are dead, and which are used, is not known")
        own = None if slots is None else distinct_rows(slots, num_slots=schema.num_slots, table=table)
        given = None if from_ is None else checked_rows(from_, num_slots=schema.num_slots, table=table)
        checked_pairs(own, given, table=table)
        std, number = checked_noise(noise, table=table), checked_seed(seed, table=table)
        if self.pending or (self.trains_keys and self.keys.pending):
            raise StepConflict(
                f"table {table!r}: {self.pending:,} updates are pending here, of the values that slots have now; "
                "commit or discard them first. Nothing was changed."
            )
        if own is not None and not force:
            require_dead(self._rows, own, table=table)
        generator = torch.Generator(device="cpu").manual_seed(number)
        if own is None or given is None:
            chosen = drawn(self._rows, self.usage(), table=table, slots=own, from_=given, generator=generator)
        else:
            chosen = Reinitialised(slots=own, from_=given)
        if not chosen.slots.numel():
            return chosen
        keys = self.keys if isinstance(schema.keys, TrainedKeySpec) and not schema.keys.product else None
        for part in (self, keys):
            if part is not None:
                require_free(part._rows, part.schema.value_dim)
        with self._link.prefetched.writing():
            copied(self._rows, "values", schema.value_dim, chosen, noise=std, generator=generator)
            if isinstance(schema.keys, FlatKeySpec):
                copied(self._rows, "keys", schema.keys.key_dim, chosen, noise=std, generator=generator)
        layout = KeyLayout.of(schema)
        if keys is not None and layout is not None:
            rows = Reinitialised(slots=layout.slot_rows(chosen.slots), from_=layout.slot_rows(chosen.from_))
            with keys._link.prefetched.writing():
                copied(keys._rows, "values", keys.schema.value_dim, rows, noise=std, generator=generator)
        return chosen

    def _require_counts(self, why: str) -> None:
        if not self.schema.usage:
            raise InvalidRequest(
                f"table {self.schema.name!r} does not count how often its slots are used: {why}. Make it with "
                "usage=True. Nothing was changed."
            )
