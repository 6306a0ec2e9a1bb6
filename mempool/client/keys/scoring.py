"""Top-k of keys that are trained in the pool: scored where they are, section by section. Runs on the IO loop."""

from typing import TYPE_CHECKING

from torch import Tensor

from mempool.client.keys.layout import Chosen, KeyLayout
from mempool.client.routing.attempt import Seen
from mempool.errors import InvalidRequest, NotFound
from mempool.types import TableSchema
from mempool.types.keys import key_table_name

if TYPE_CHECKING:
    from mempool.client.routing.router import Router


class KeyTables:
    """Finds the tables of keys, by the tables whose keys they have."""

    def __init__(self) -> None:
        self._ids: dict[int, int] = {}

    async def score(
        self, router: "Router", schema: TableSchema, layout: KeyLayout, queries: Tensor, *, topk: int, timeout_s: float
    ) -> tuple[Tensor, Tensor, Seen]:
        """Scores and slot ids [B, H, K] (float32, int64), and the state of the table of keys that was seen.

        Args:
            router: By which the keys are read.
            schema: The table whose keys they are.
            queries: [B, H, D] float32, checked.
        """
        parts, count = layout.section_queries(queries).contiguous(), layout.candidates(topk)
        table_id = self._ids.get(schema.table_id)
        try:
            if table_id is None:
                table_id = await self._opened(router, schema, timeout_s)
            chosen, seen = await self._chosen(router, table_id, layout, parts, topk, count, timeout_s)
            if chosen.left_open is not None:
                some = parts[chosen.left_open]
                whole, also = await self._chosen(router, table_id, layout, some, topk, layout.rows, timeout_s)
                chosen.scores[chosen.left_open], chosen.ids[chosen.left_open] = whole.scores, whole.ids
                seen = _both(seen, also)
        except NotFound:
            known = self._ids.pop(schema.table_id, None)
            if known is None or await self._opened(router, schema, timeout_s) == known:
                raise
            return await self.score(router, schema, layout, queries, topk=topk, timeout_s=timeout_s)
        return chosen.scores, chosen.ids, seen

    async def _chosen(
        self, router: "Router", table_id: int, layout: KeyLayout, parts: Tensor, topk: int, count: int, timeout_s: float
    ) -> tuple[Chosen, Seen]:
        """What is chosen by so many candidates of each section."""
        scores, rows, seen = await router.call(
            table_id, lambda attempt: attempt.score(parts, topk=count), timeout_s=timeout_s
        )
        if bool((rows < 0).any()):
            raise InvalidRequest(
                f"table {layout.name!r} has fewer than {count} keys that give a score for every query: others hold NaN "
                "or inf. Write them anew (write_keys), or restore a checkpoint"
            )
        return layout.chosen(scores, rows, topk), seen

    async def _opened(self, router: "Router", schema: TableSchema, timeout_s: float) -> int:
        """The id of the table of its keys. Raises NotFound where there is another table of its name by now, whose the
        keys of that name are: a table takes the place of another one together with its keys."""
        keys = await router.open(key_table_name(schema.name), timeout_s=timeout_s)
        owner = await router.open(schema.name, timeout_s=timeout_s)  # after its keys: they are no later one's than this
        if owner.schema.table_id != schema.table_id:
            raise NotFound(
                f"table {schema.name!r} is another one by now (id {owner.schema.table_id}, not {schema.table_id}): it "
                f"was dropped, or replaced, and its keys with it. Open it anew (pool.reopen({schema.name!r}))"
            )
        self._ids[schema.table_id] = keys.schema.table_id
        return keys.schema.table_id


def _both(first: Seen, second: Seen) -> Seen:
    """What the answers of two calls come from."""
    return Seen(
        epoch=max(first.epoch, second.epoch),
        oldest_version=min(first.oldest_version, second.oldest_version),
        newest_version=max(first.newest_version, second.newest_version),
    )
