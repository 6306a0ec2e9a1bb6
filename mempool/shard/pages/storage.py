"""One table's storage on one shard: which pages are here, in which arenas, and what is asked of them by slot id.

Requests are checked in ``validate``, updates are held and reduced in ``held``, pages come and go in ``staging``.
Legend: B bags, L pairs, M rows asked for, W columns of the blocks owned, H heads, K top-k, D key dim, P row pages.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mempool import kernels
from mempool.shard.pages.arena import (
    KEYS,
    LAST_STEP,
    MASTER,
    SCALES,
    VALUE_DTYPES,
    VALUES,
    Arena,
    Blocks,
    NamedArray,
    half_keys,
    initial_head_keys,
    initial_rows,
    key_dim,
    named_arrays,
    pieces,
    row_bytes,
)
from mempool.shard.steps.optimizers import dense_schedule, step_names
from mempool.types import Placement, ProductKeySpec, TableSchema
from mempool.types.bags import Bags

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Lane:
    """An arena and where its columns stand among those of all blocks owned; columns None: it has them all."""

    arena: Arena
    columns: Tensor | None

    def of(self, grads_BW: Tensor) -> Tensor:
        """The columns of the arena."""
        return grads_BW if self.columns is None else grads_BW[:, self.columns].contiguous()


class Storage:
    """The pages of one table on one shard.

    Attributes:
        owned: [P, num_blocks], what the placement gives this shard; ``lost`` of it is not there.
        key_owned, key_lost: [num_key_pages], the same for product keys.
        arenas: One per distinct set of owned blocks; arenas of pages that are still being staged are among them.
        blocks: All blocks this shard owns any page of, ascending.
        heads, head_keys: The heads whose product keys are here, ascending, and [H, 2, n, key_dim / 2] float32.
        step_names: The arrays that a step of the optimizer changes besides the values.
        schedule: The steps that slots without a gradient have missed, of a dense optimizer; else None. Rows are brought
            up to its last step, the table's version, before anybody reads or changes them.

    Args:
        version: The table's version.

    Raises:
        InvalidRequest: The schema asks for an optimizer that there is not.
    """

    def __init__(self, schema: TableSchema, *, shard: int, device: torch.device, version: int = 0) -> None:
        self.schema = schema
        self.shard = shard
        self.device = device
        self.arrays = {array.name: array for array in named_arrays(schema)}
        self.owned: Mask = np.zeros((schema.num_row_pages, schema.num_blocks), dtype=np.bool_)
        self.lost: Mask = np.zeros_like(self.owned)
        self.key_owned: Mask = np.zeros(schema.num_key_pages, dtype=np.bool_)
        self.key_lost: Mask = np.zeros_like(self.key_owned)
        self.arenas: dict[Blocks, Arena] = {}
        self.blocks: Blocks = ()
        self.heads: tuple[int, ...] = ()
        half_keys_shape = (2, half_keys(schema), key_dim(schema) // 2) if schema.num_key_pages else (2, 0, 0)
        self.head_keys = torch.empty((0, *half_keys_shape), dtype=torch.float32, device=device)
        self.step_names = step_names(schema)
        self.schedule = dense_schedule(schema, version=version, device=device)
        self._lanes: tuple[Lane, ...] = ()

    # Ownership

    def own(self, placement: Placement) -> None:
        """Take over what a placement says. The arenas must fit it already, but for what is lost."""
        self.owned = placement.owners == self.shard
        self.key_owned = placement.key_owners == self.shard
        self.lost &= self.owned
        self.key_lost &= self.key_owned
        self.blocks = tuple(int(block) for block in np.flatnonzero(self.owned.any(axis=0)))
        self._lanes = tuple(
            Lane(arena=arena, columns=None if blocks == self.blocks else self._places(self.arrays[VALUES], blocks))
            for blocks, arena in sorted(self.arenas.items())
            if (arena.page_of >= 0).any()
        )

    def lose_all(self) -> None:
        """Everything owned is gone, its storage too."""
        self.lost, self.key_lost = self.owned.copy(), self.key_owned.copy()
        self.arenas.clear()
        self._lanes = ()
        self.heads, self.head_keys = (), self.head_keys[:0].clone()

    @property
    def num_lost(self) -> int:
        """(row page, block)s and key pages that are owned and not there."""
        return int(self.lost.sum()) + int(self.key_lost.sum())

    @property
    def num_pages(self) -> int:
        """(row page, block)s and key pages that are here."""
        return int(self.owned.sum()) + int(self.key_owned.sum()) - self.num_lost

    @property
    def num_bytes(self) -> int:
        return sum(arena.num_bytes for arena in self.arenas.values()) + self.head_keys.nbytes

    def page_bytes(self, blocks: Blocks) -> int:
        """Bytes of one row page of these blocks, in all arrays."""
        return row_bytes(self.schema, blocks) * self.schema.page_slots

    @property
    def head_bytes(self) -> int:
        """Bytes of the product keys of one head; 0 without."""
        return 4 * half_keys(self.schema) * key_dim(self.schema) if self.schema.num_key_pages else 0

    def new_bytes(self, row_pages: Mapping[Blocks, int], *, heads: int) -> int:
        """Bytes that so many more row pages, by their blocks, and keys of so many more heads would take here."""
        num_bytes = heads * self.head_bytes
        for blocks, count in row_pages.items():
            if blocks in self.arenas:
                num_bytes += self.arenas[blocks].growth_bytes(count)
            else:
                num_bytes += self.page_bytes(blocks) * count + 4 * self.schema.num_row_pages  # and the page table
        return num_bytes

    def initial_bytes(self, placement: Placement) -> int:
        """Bytes that what a placement gives this shard takes, where nothing of the table is here yet."""
        row_pages = {blocks: len(pages) for blocks, pages in by_blocks(placement.owners == self.shard).items()}
        return self.new_bytes(row_pages, heads=int((placement.key_owners == self.shard).sum()))

    @property
    def lanes(self) -> tuple[Lane, ...]:
        """The arenas with pages that answer, in a fixed order."""
        return self._lanes

    def arena(self, blocks: Blocks) -> Arena:
        """The arena of this set of blocks; an empty one is made where there is none."""
        if blocks not in self.arenas:
            arrays = tuple(self.arrays.values())
            self.arenas[blocks] = Arena(schema=self.schema, blocks=blocks, arrays=arrays, device=self.device)
        return self.arenas[blocks]

    def drop_idle_arenas(self) -> None:
        """Free arenas that no page lies in, staged or owned."""
        self.arenas = {blocks: arena for blocks, arena in self.arenas.items() if arena.num_taken}

    def shrink_arenas(self) -> None:
        """Shrink arenas that are mostly empty. Rows move: not while a prepared step knows where they lie."""
        for arena in self.arenas.values():
            arena.shrink()

    # Initial values

    def initialise(self, placement: Placement) -> Iterator[int]:
        """Own and fill what the placement gives this shard, a piece at a time: each ``next`` answers its bytes."""
        owned = placement.owners == self.shard
        filling: list[tuple[Arena, npt.NDArray[np.int64]]] = []
        for blocks, row_pages in by_blocks(owned).items():
            arena = self.arena(blocks)
            arena.publish(row_pages, arena.take(len(row_pages)))
            filling.append((arena, row_pages))
        for arena, row_pages in filling:
            for run in _runs(row_pages):
                # Packed values are encoded from float32.
                for piece in pieces(len(run), arena.page_bytes * (4 if self.schema.packed else 1)):
                    self._fill(arena, run[piece])
                    yield len(run[piece]) * arena.page_bytes
        heads = tuple(int(head) for head in np.flatnonzero(placement.key_owners == self.shard))
        self.set_head_keys({head: initial_head_keys(self.schema, head) for head in heads})
        self.own(placement)

    def _fill(self, arena: Arena, run: npt.NDArray[np.int64]) -> None:
        """Initial values of consecutive row pages, which lie one after another in a new arena."""
        page_slots = self.schema.page_slots
        first = int(run[0]) * page_slots
        slots = range(first, min(first + len(run) * page_slots, self.schema.num_slots))
        start = int(arena.page_of[run[0]]) * page_slots
        for array in arena.arrays:
            rows = arena.rows(array.name)[start : start + len(run) * page_slots]
            rows[len(slots) :] = 0  # slots of the last page that do not exist
            if self.schema.packed and array.name in (VALUES, SCALES):
                continue
            if self.schedule is not None and array.name == LAST_STEP:
                rows[:] = self.schedule.last_step
                continue
            self._fill_array(array, arena.blocks, slots, rows[: len(slots)])
        if self.schema.packed:
            values = torch.empty(len(slots), self.schema.width(arena.blocks), dtype=torch.float32, device=self.device)
            self._fill_array(self.arrays[VALUES], arena.blocks, slots, values)
            ids = torch.arange(slots.start, slots.stop, device=self.device)
            kernels.scatter_rows(arena.paged(), ids, values)

    def _fill_array(self, array: NamedArray, blocks: Blocks, slots: range, rows: Tensor) -> None:
        for block in blocks:
            if array.width((block,)):
                initial = torch.as_tensor(initial_rows(array, slots, block), device=self.device)
                rows[:, array.columns(blocks, block)] = initial

    def set_head_keys(self, keys: dict[int, Tensor]) -> None:
        """These heads' product keys are here from now on, and no others."""
        self.heads = tuple(sorted(keys))
        if keys:
            self.head_keys = torch.stack([keys[head].to(self.device) for head in self.heads])
        else:
            self.head_keys = self.head_keys[:0].clone()

    # By slot id

    def begin_at(self, version: int) -> None:
        """Nothing of the table is here but pages on their way, which come with this version."""
        self.schedule = dense_schedule(self.schema, version=version, device=self.device)

    def catch_up(self, ids: Tensor) -> None:
        """Do what these slots [M] have missed of a dense optimizer's steps."""
        if self.schedule is None:
            return
        for lane in self._lanes:
            lane.arena.catch_up(lane.arena.locate(ids)[1], self.schedule, self.step_names)

    def catch_up_pages(self, row_pages: npt.NDArray[np.int64]) -> None:
        """Do what all slots of these row pages have missed of a dense optimizer's steps."""
        page_slots = torch.arange(self.schema.page_slots, device=self.device)
        for row_page in row_pages.tolist() if self.schedule is not None else ():
            self.catch_up(row_page * self.schema.page_slots + page_slots)

    def pooled(self, bags: Bags, dtype: torch.dtype = torch.float32) -> Tensor:
        """[B, W] in ``dtype``: weighted sums of the rows that are here, made in float32 and rounded once."""
        self.catch_up(bags.ids)
        if len(self._lanes) == 1 and self._lanes[0].columns is None:
            paged = self._lanes[0].arena.paged()
            return kernels.weighted_sum(paged, bags.ids, bags.weights, bags.offsets, dtype=dtype)
        values_BW = torch.zeros(bags.num_bags, self.schema.width(self.blocks), dtype=torch.float32, device=self.device)
        for lane in self._lanes:
            sums = kernels.weighted_sum(lane.arena.paged(), bags.ids, bags.weights, bags.offsets)
            if lane.columns is None:
                values_BW += sums
            else:
                values_BW[:, lane.columns] += sums
        return values_BW.to(dtype)

    def weight_grad(self, bags: Bags, grads_BW: Tensor) -> Tensor:
        """[L] float32: <grads[bag], V[id]> over the columns that are here."""
        self.catch_up(bags.ids)
        weight_grad_L = torch.zeros(bags.ids.shape[0], dtype=torch.float32, device=self.device)
        for lane in self._lanes:
            weight_grad_L += kernels.weight_gradient(lane.arena.paged(), bags.ids, bags.offsets, lane.of(grads_BW))
        return weight_grad_L

    def score(self, queries_BHD: Tensor, topk: int) -> tuple[tuple[int, ...], Tensor, Tensor]:
        """Heads answered, scores [B, H, K] float32 and ids [B, H, K] int64, best first."""
        deterministic = self.schema.keys is None or self.schema.keys.deterministic
        if isinstance(self.schema.keys, ProductKeySpec):
            if not self.heads:
                return (), *_no_candidates((queries_BHD.shape[0], 0, topk), self.device)
            queries = queries_BHD[:, list(self.heads)].contiguous()
            scores, ids = kernels.product_topk(
                queries, self.head_keys, topk, self.schema.stride, deterministic=deterministic
            )
            return self.heads, scores, ids
        scores, ids = _no_candidates((queries_BHD.shape[0], 0), self.device)
        for lane in self._lanes:
            if lane.arena.has(KEYS):
                keys = lane.arena.paged(KEYS)
                queries = queries_BHD[:, 0].contiguous()
                found = kernels.flat_topk(queries, keys, topk, self.schema.num_slots, deterministic=deterministic)
                scores, ids = best(torch.cat((scores, found[0]), 1), torch.cat((ids, found[1]), 1), topk)
        lacking = topk - scores.shape[1]
        if lacking > 0:
            none = _no_candidates((queries_BHD.shape[0], lacking), self.device)
            scores, ids = torch.cat((scores, none[0]), 1), torch.cat((ids, none[1]), 1)
        return (0,), scores.unsqueeze(1), ids.unsqueeze(1)

    def row_blocks(self, name: str) -> Blocks:
        """The blocks whose columns rows of this array have here."""
        if name in self.arrays:
            return (0,) if self.arrays[name].per == "slot" else self.blocks
        return ()

    def row_width(self, name: str) -> int:
        """Columns of a row of this array here."""
        if name in self.arrays:
            return self.arrays[name].width(self.row_blocks(name))
        return half_keys(self.schema) * key_dim(self.schema)

    def read(self, name: str, ids_M: Tensor) -> Tensor:
        """[M, W]: rows by slot id, or heads of product keys; zeros where not here. In the array's dtype, but values of
        one byte an element are float32."""
        if name not in self.arrays:
            return self._read_heads(ids_M)
        self.catch_up(ids_M)
        array = self.arrays[name]
        dtype = VALUE_DTYPES[self.schema.dtype] if name == VALUES else array.dtype
        rows_MW = torch.zeros(ids_M.shape[0], self.row_width(name), dtype=dtype, device=self.device)
        for lane in self._lanes:
            if not lane.arena.has(name):
                continue
            here, rows = lane.arena.locate(ids_M)
            at = here.nonzero()[:, 0]
            places = self._places(array, lane.arena.blocks)
            values = name == VALUES
            found = kernels.gather_rows(lane.arena.paged(), ids_M[at]) if values else lane.arena.rows(name)[rows]
            # Copied, not added: a sum with zero would lose the sign of -0.0.
            rows_MW[at[:, None], places[None, :]] = found
        return rows_MW

    def write(self, name: str, ids_M: Tensor, rows_MW: Tensor) -> None:
        """Overwrite rows that are here, in place; others are skipped. Values and their master are written together."""
        if name not in self.arrays:
            for head, row in zip(ids_M.tolist(), rows_MW, strict=True):
                if head in self.heads:
                    self.head_keys[self.heads.index(head)] = row.view(self.head_keys.shape[1:])
            return
        self.catch_up(ids_M)
        array = self.arrays[name]
        together = name in (VALUES, MASTER) and self.schema.master
        for lane in self._lanes:
            if not lane.arena.has(name):
                continue
            rows = rows_MW[:, self._places(array, lane.arena.blocks)]
            for written in (VALUES, MASTER) if together else (name,):
                paged = lane.arena.paged(written)
                kernels.scatter_rows(paged, ids_M, rows.to(paged.value_dtype).contiguous())

    def _read_heads(self, ids_M: Tensor) -> Tensor:
        rows_MW = torch.zeros(ids_M.shape[0], *self.head_keys.shape[1:], dtype=torch.float32, device=self.device)
        for place, head in enumerate(ids_M.tolist()):
            if head in self.heads:
                rows_MW[place] = self.head_keys[self.heads.index(head)]
        return rows_MW.flatten(1)

    def _places(self, array: NamedArray, blocks: Blocks) -> Tensor:
        """Where the columns of ``blocks`` stand in a row of all blocks owned: [W of blocks] int64."""
        all_blocks = self.row_blocks(array.name)
        spans = [array.columns(all_blocks, block) for block in blocks if block in all_blocks]
        return torch.cat([torch.arange(span.start, span.stop) for span in spans]).to(self.device)


def by_blocks(owned: Mask) -> dict[Blocks, npt.NDArray[np.int64]]:
    """Row pages by the set of blocks owned of them; pages of which nothing is owned are left out."""
    if not owned.any():
        return {}
    patterns, group = np.unique(owned, axis=0, return_inverse=True)
    return {
        tuple(int(block) for block in np.flatnonzero(pattern)): np.flatnonzero(group.reshape(-1) == number)
        for number, pattern in enumerate(patterns)
        if pattern.any()
    }


def best(scores_BK: Tensor, ids_BK: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """The best ``topk`` candidates by (score descending, id ascending)."""
    by_id = ids_BK.argsort(dim=1, stable=True)
    order = by_id.gather(1, scores_BK.gather(1, by_id).argsort(dim=1, descending=True, stable=True))[:, :topk]
    return scores_BK.gather(1, order), ids_BK.gather(1, order)


def _no_candidates(shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    scores = torch.full(shape, float("-inf"), dtype=torch.float32, device=device)
    return scores, torch.full(shape, -1, dtype=torch.int64, device=device)


def _runs(row_pages: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
    return np.split(row_pages, np.flatnonzero(np.diff(row_pages) != 1) + 1)
