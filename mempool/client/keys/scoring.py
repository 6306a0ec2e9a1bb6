"""Top-k of keys that are trained in the pool: scored where they are, section by section; of hierarchical keys groups
first, and then their slots. Runs on the IO loop."""

import asyncio
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mempool.client.keys.asked import SCORED_BYTES
from mempool.client.keys.layout import Chosen, KeyLayout
from mempool.client.routing.attempt import Attempt, Seen
from mempool.errors import InvalidRequest, NotFound
from mempool.types import TableSchema
from mempool.types.keys import key_table_name

if TYPE_CHECKING:
    from mempool.client.routing.router import Router


Scoring = Coroutine[Any, Any, tuple[Tensor, Tensor, Seen]]

_WHOLE_BYTES = 16 * 2**20
"""Of the keys that a shard found, where all of some queries are asked for: about so much is here at once."""
_MOST_LOOKS = 8
"""At keys that are committed to between the two calls of a look; then the answer is what the last one saw."""


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
        loop = asyncio.get_running_loop()
        end_s = loop.time() + timeout_s
        parts = layout.section_queries(queries).contiguous()
        table_id = self._ids.get(schema.table_id)
        try:
            if table_id is None:
                table_id = await self._opened(router, schema, timeout_s)
            if layout.keys.groups:
                scores, ids, seen = await self._in_groups(router, table_id, layout, parts, topk, timeout_s)
                shape = (*queries.shape[:2], topk)
                return scores.view(shape), ids.view(shape), seen
            count = layout.candidates(topk)
            chosen, seen = await self._chosen(router, table_id, layout, parts, topk, count, timeout_s)
            most = max(1, _WHOLE_BYTES // (layout.sections * layout.rows * SCORED_BYTES))
            for some in () if chosen.left_open is None else torch.split(chosen.left_open, most):
                left_s = end_s - loop.time()
                whole, also = await self._chosen(router, table_id, layout, parts[some], topk, layout.rows, left_s)
                chosen.scores[some], chosen.ids[some] = whole.scores, whole.ids
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
        _require_found(layout, rows)
        return layout.chosen(scores, rows, topk), seen

    async def _in_groups(
        self, router: "Router", table_id: int, layout: KeyLayout, queries: Tensor, topk: int, timeout_s: float
    ) -> tuple[Tensor, Tensor, Seen]:
        """Scores and slots [M, 1, K] of queries [M, 1, D]: both parts of a score are of one version of the keys, if
        commits leave any look the time for it."""
        loop = asyncio.get_running_loop()
        end_s = loop.time() + timeout_s
        for looks_left in reversed(range(_MOST_LOOKS)):
            scores, picked, first = await router.call(
                table_id,
                lambda attempt: attempt.score(queries, topk=layout.keys.probes),
                timeout_s=end_s - loop.time(),
            )
            _require_found(layout, picked)
            groups, order = picked[:, 0].sort(dim=1)
            added = scores[:, 0].gather(1, order)

            def ask(attempt: Attempt, groups: Tensor = groups, added: Tensor = added) -> Scoring:
                return attempt.score(queries, topk=topk, groups=groups, group_scores=added)

            sums, slots, second = await router.call(table_id, ask, timeout_s=end_s - loop.time())
            _require_found(layout, slots)
            seen = _both(first, second)
            if seen.oldest_version == seen.newest_version or not looks_left:
                break
        return sums, slots, seen

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


def _require_found(layout: KeyLayout, ids: Tensor) -> None:
    """Raises InvalidRequest where fewer were found than asked for."""
    if bool((ids < 0).any()):
        raise InvalidRequest(
            f"table {layout.name!r} has fewer than {ids.shape[-1]} keys that give a score for every query: others hold "
            "NaN or inf. Write them anew (write_keys), or restore a checkpoint"
        )


def _both(first: Seen, second: Seen) -> Seen:
    """What the answers of two calls come from."""
    return Seen(
        epoch=max(first.epoch, second.epoch),
        oldest_version=min(first.oldest_version, second.oldest_version),
        newest_version=max(first.newest_version, second.newest_version),
    )
