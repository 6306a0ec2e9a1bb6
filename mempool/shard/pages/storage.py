"""One table's storage on one shard: which pages are here, in which arenas, and what is asked of them by slot id.

Requests are checked in ``validate``, updates are held and reduced in ``held``, pages come and go in ``staging``, and
new ones are filled in ``filling``.
Legend: B bags, L pairs, M rows asked for, W columns of the blocks owned, H heads, K top-k, D key dim, P row pages.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mempool import kernels
from mempool.observe import Heat
from mempool.shard.pages.arena import Arena
from mempool.shard.pages.filling import filled, filled_head_keys
from mempool.shard.pages.masks import Mask, by_blocks
from mempool.shard.pages.named_arrays import (
    MASTER,
    VALUE_DTYPES,
    VALUES,
    Blocks,
    NamedArray,
    half_keys,
    head_keys_shape,
    key_dim,
    named_arrays,
    packed_sums,
    row_bytes,
)
from mempool.shard.pages.scoring import Picked, scored
from mempool.shard.reading.keeper import Keeper
from mempool.shard.reading.moments import Moments
from mempool.shard.steps.optimizers import dense_schedule, id_dtype, step_names
from mempool.types import OwnKeySpec, PageHeat, Placement, ProductKeySpec, TableSchema
from mempool.types.bags import Bags
from mempool.types.running import Clock
from mempool.types.sizes import PAGE_TABLE_BYTES, owned_bytes

_CAUGHT_UP_AT_ONCE = 2**16
"""Slots, where all of them are."""


@dataclass(frozen=True, slots=True)
class Lane:
    """An arena and where its columns stand among those of all blocks owned; columns None: it has them all."""

    arena: Arena
    columns: Tensor | None

    def of(self, grads_BW: Tensor) -> Tensor:
        """The columns of the arena."""
        return grads_BW if self.columns is None else grads_BW[:, self.columns].contiguous()

    def has_all(self, array: NamedArray) -> bool:
        """Whether the rows of an array that the arena has are as wide as those of all blocks owned."""
        return self.columns is None or array.per == "slot"


class Storage:
    """The pages of one table on one shard.

    Attributes:
        owned: [P, num_blocks], what the placement gives this shard; ``lost`` of it is not there.
        key_owned, key_lost: [num_key_pages], the same for product keys.
        arenas: One per distinct set of owned blocks; arenas of pages that are still being staged are among them.
        id_dtype: In which slot ids of bags are kept.
        blocks: All blocks this shard owns any page of, ascending; width: their columns.
        num_lost: (row page, block)s and key pages that are owned and not there.
        num_pages: Those that are here.
        heads, head_keys: The heads whose product keys are here, ascending, and [H, 2, n, key_dim / 2] float32.
        shared_head_keys: Somebody keeps them as they are: they are copied before they are written to.
        head_key_writes: How often they were written to; keys_mark: a checkpoint that counts, and that at its moment.
        on_change: Called before pages come or go, with the reason, in words.
        moments: Versions of it that are read.
        crowded: Whether so much is copied for a checkpoint that no further step may be begun for now.
        step_names: The arrays that a step of the optimizer changes besides the values.
        schedule: The steps that slots without a gradient have missed, of a dense optimizer; else None. Rows are brought
            up to its last step, the table's version, before anybody reads or changes them.
        all_caught_up_to: The step up to which all slots here have no missed step; None: it is not known.
        tell_caught_up: Told which slots were, for a reader, and whether a step of them is to follow: several steps at
            once round otherwise than one by one, so whoever makes the table again does the same at the same version.
            None: nobody does.

        heat: How much its row pages are read and written here; whoever answers a look-up or an update tells it.

    Args:
        version: The table's version.
        clock: Seconds, monotonic: heat is forgotten by it.
        keeper: Says what versions of it that are read may take.

    Raises:
        InvalidRequest: The schema asks for an optimizer that there is not.
    """

    def __init__(
        self,
        schema: TableSchema,
        *,
        shard: int,
        device: torch.device,
        version: int = 0,
        clock: Clock = time.monotonic,
        keeper: Keeper | None = None,
    ) -> None:
        self.schema = schema
        self.shard = shard
        self.device = device
        self.id_dtype = id_dtype(schema)
        self.heat = Heat(schema.num_row_pages, schema.page_shift, seed=schema.table_id * 1009 + shard, clock=clock)
        self.arrays = {array.name: array for array in named_arrays(schema)}
        self.owned: Mask = np.zeros((schema.num_row_pages, schema.num_blocks), dtype=np.bool_)
        self.lost: Mask = np.zeros_like(self.owned)
        self.key_owned: Mask = np.zeros(schema.num_key_pages, dtype=np.bool_)
        self.key_lost: Mask = np.zeros_like(self.key_owned)
        self.arenas: dict[Blocks, Arena] = {}
        self.blocks: Blocks = ()
        self.width = 0
        self.packed_sums: kernels.PackedLayout | None = None
        self.heads: tuple[int, ...] = ()
        self.head_keys = torch.empty((0, *head_keys_shape(schema)), dtype=torch.float32, device=device)
        self.step_names = step_names(schema)
        self.schedule = dense_schedule(schema, version=version, device=device)
        self.tell_caught_up: Callable[[Tensor, bool], None] | None = None
        self.num_lost = 0
        self.num_pages = 0
        self._lanes: tuple[Lane, ...] = ()
        self.shared_head_keys = False
        self.head_key_writes = 0
        self.keys_mark: tuple[str, int] | None = None
        self.on_change: Callable[[str], None] = lambda _: None
        self.crowded: Callable[[], bool] = lambda: False
        self.all_caught_up_to: int | None = None
        self.moments = Moments(self, keeper)

    # Ownership

    def own(self, placement: Placement) -> None:
        """Take over what a placement says. The arenas must fit it already, but for what is lost."""
        self.on_change("its pages move")
        self.all_caught_up_to = None
        self.moments.end("its pages have moved; what was pinned before does not go with them")
        self.owned = placement.owners == self.shard
        self.key_owned = placement.key_owners == self.shard
        self.lost &= self.owned
        self.key_lost &= self.key_owned
        self.blocks = tuple(np.flatnonzero(self.owned.any(axis=0)).tolist())
        self.width = self.schema.width(self.blocks)
        self.packed_sums = packed_sums(self.schema, self.blocks)
        self._lanes = tuple(
            Lane(arena=arena, columns=None if blocks == self.blocks else self._places(self.arrays[VALUES], blocks))
            for blocks, arena in sorted(self.arenas.items())
            if (arena.page_of >= 0).any()
        )
        self._count()

    def lose_all(self) -> None:
        """Everything owned is gone, its storage too."""
        self.on_change("its pages were lost")
        self.moments.end("its pages were lost")
        self.lost, self.key_lost = self.owned.copy(), self.key_owned.copy()
        self.close()
        self.arenas.clear()
        self._lanes = ()
        self.heads, self.head_keys = (), self.head_keys[:0].clone()
        self._count()

    def _count(self) -> None:
        # Every request asks whether anything is lost, and a mask has as many cells as the table has pages.
        self.num_lost = int(self.lost.sum()) + int(self.key_lost.sum())
        self.num_pages = int(self.owned.sum()) + int(self.key_owned.sum()) - self.num_lost

    @property
    def num_bytes(self) -> int:
        return sum(arena.num_bytes for arena in self.arenas.values()) + self.head_keys.nbytes

    @property
    def shared_bytes(self) -> int:
        """Of a fork: bytes that are another's memory still; any thread may ask."""
        return sum(arena.shared_bytes for arena in list(self.arenas.values()))

    @property
    def load(self) -> float:
        """How many numbers of its values were read and written within a minute or so; any thread may ask."""
        return self.heat.pairs() * self.width

    def page_heat(self) -> PageHeat:
        """As ``PageHost.read_heat``; any thread may ask."""
        return PageHeat(heat=self.heat.now().astype(np.float32), seen=self.heat.seen())

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
                num_bytes += self.page_bytes(blocks) * count + PAGE_TABLE_BYTES * self.schema.num_row_pages
        return num_bytes

    def initial_bytes(self, placement: Placement) -> int:
        """Bytes that what a placement gives this shard takes, where nothing of the table is here yet."""
        row_pages = {
            blocks: len(pages) for blocks, pages in by_blocks(placement.owners == self.shard).items() if blocks
        }
        return owned_bytes(self.schema, row_pages, heads=int((placement.key_owners == self.shard).sum()))

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
        for arena in self.arenas.values():
            if not arena.num_taken:
                arena.close()
        self.arenas = {blocks: arena for blocks, arena in self.arenas.items() if arena.num_taken}

    def close(self) -> None:
        """Nobody asks for it any more; forks of it go on. Repeatable."""
        for arena in self.arenas.values():
            arena.close()

    def shrink_arenas(self) -> None:
        """Shrink arenas that are mostly empty. Rows move: not while a prepared step knows where they lie."""
        for arena in self.arenas.values():
            arena.shrink()

    # Initial values

    def initialise(self, placement: Placement) -> Iterator[int]:
        """Own and fill what the placement gives this shard, a piece at a time: each ``next`` answers its bytes.

        Raises:
            InvalidRequest: There is not so much memory.
        """
        filling = []
        for blocks, row_pages in by_blocks(placement.owners == self.shard).items():
            if blocks:
                arena = self.arena(blocks)
                arena.publish(row_pages, arena.take(len(row_pages)))
                filling.append((arena, row_pages))
        heads = tuple(np.flatnonzero(placement.key_owners == self.shard).tolist())
        head_keys = torch.empty((len(heads), *head_keys_shape(self.schema)), dtype=torch.float32, device=self.device)
        last_step = 0 if self.schedule is None else self.schedule.last_step
        yield from filled(filling, self.schema, last_step=last_step, device=self.device)
        yield from filled_head_keys(head_keys, heads, self.schema)
        self.set_head_keys(heads, head_keys)
        self.own(placement)

    def set_head_keys(self, heads: tuple[int, ...], head_keys: Tensor) -> None:
        """These heads' product keys are here from now on, and no others: ascending, [H, 2, n, key_dim / 2]."""
        self.heads, self.head_keys, self.shared_head_keys = heads, head_keys, False
        self.head_key_writes += 1

    # By slot id

    def begin_at(self, version: int) -> None:
        """Nothing of the table is here but pages on their way, which come with this version."""
        self.schedule = dense_schedule(self.schema, version=version, device=self.device)
        self.all_caught_up_to = None

    def catch_up(self, ids: Tensor, *, for_step: bool = False) -> None:
        """Do what these slots [M] have missed of a dense optimizer's steps. for_step: a step of them is to follow."""
        if self.schedule is None:
            return
        told = []
        for lane in self._lanes:
            here, rows = lane.arena.locate(ids)
            late = lane.arena.catch_up(rows, self.schedule, self.step_names)
            if self.tell_caught_up is not None:
                told.append(ids[here][late])
        if self.tell_caught_up is not None and any(slots.numel() for slots in told):
            self.tell_caught_up(torch.unique(torch.cat(told)).to(torch.int64), for_step)

    def catch_up_pages(self, row_pages: npt.NDArray[np.int64]) -> None:
        """Do what all slots of these row pages have missed of a dense optimizer's steps."""
        page_slots = torch.arange(self.schema.page_slots, device=self.device)
        for row_page in row_pages.tolist() if self.schedule is not None else ():
            self.catch_up(row_page * self.schema.page_slots + page_slots)

    def catch_up_all(self) -> None:
        """Do what all slots here have missed of a dense optimizer's steps; once, where no step comes between."""
        if self.schedule is not None and self.all_caught_up_to != self.schedule.last_step:
            pages = torch.from_numpy(np.flatnonzero((self.owned & ~self.lost).any(axis=1))).to(self.device)
            slots = torch.arange(self.schema.page_slots, device=self.device)
            for some in torch.split(pages, max(1, _CAUGHT_UP_AT_ONCE >> self.schema.page_shift)):
                self.catch_up(((some[:, None] << self.schema.page_shift) + slots).view(-1))
            self.all_caught_up_to = self.schedule.last_step

    def pooled(
        self, bags: Bags, dtype: torch.dtype = torch.float32, *, for_step: bool = False, out: Tensor | None = None
    ) -> Tensor:
        """[B, W] in ``dtype``: weighted sums of the rows that are here, made in float32 and rounded once.

        out: [B, W] in ``dtype``, contiguous, on the device: where they are written. None: new memory.
        """
        if self.schedule is not None:
            self.catch_up(bags.ids, for_step=for_step)
        lanes = self._lanes
        if len(lanes) == 1 and lanes[0].columns is None:
            paged = lanes[0].arena.paged()
            return kernels.weighted_sum(paged, bags.ids, bags.weights, bags.offsets, dtype=dtype, out=out, checked=True)
        values_BW = torch.zeros(bags.num_bags, self.width, dtype=torch.float32, device=self.device)
        for lane in self._lanes:
            sums = kernels.weighted_sum(lane.arena.paged(), bags.ids, bags.weights, bags.offsets)
            if lane.columns is None:
                values_BW += sums
            else:
                values_BW[:, lane.columns] += sums
        return values_BW.to(dtype) if out is None else out.copy_(values_BW)

    @property
    def array_rows(self) -> kernels.Paged | None:
        """What ``kernels.array_sums`` may sum; None where the rows lie elsewhere, or have to be brought up to date."""
        return self._lanes[0].arena.paged() if self.has_array_rows else None

    @property
    def has_array_rows(self) -> bool:
        """Whether there is something. For any thread: unlike ``array_rows`` it makes nothing that is kept."""
        lanes = self._lanes  # another thread may put others there
        if len(lanes) != 1 or self.schedule is not None or self.device.type != "cpu":
            return False
        return lanes[0].columns is None and self.id_dtype == torch.int32

    def weight_grad(self, bags: Bags, grads_BW: Tensor, *, out: Tensor | None = None) -> Tensor:
        """[L] float32: <grads[bag], V[id]> over the columns that are here.

        out: [L] float32, contiguous, on the device: where they are written. None: new memory.
        """
        self.catch_up(bags.ids, for_step=True)
        if not self._lanes:
            zeros_L = torch.zeros(bags.ids.shape[0], dtype=torch.float32, device=self.device)
            return zeros_L if out is None else out.copy_(zeros_L)
        first, *others = self._lanes
        weight_grad_L = kernels.weight_gradient(
            first.arena.paged(), bags.ids, bags.offsets, first.of(grads_BW), out=out
        )
        for lane in others:
            weight_grad_L.add_(kernels.weight_gradient(lane.arena.paged(), bags.ids, bags.offsets, lane.of(grads_BW)))
        return weight_grad_L

    @property
    def scored_heads(self) -> tuple[int, ...]:
        """The heads that ``score`` answers."""
        keys = self.schema.keys
        if isinstance(keys, ProductKeySpec):
            return self.heads
        return tuple(range(keys.sections)) if isinstance(keys, OwnKeySpec) else (0,)

    def score(
        self, queries_BHD: Tensor, topk: int, *, picked: Picked | None = None
    ) -> tuple[tuple[int, ...], Tensor, Tensor]:
        """Heads answered, scores [B, H, K] float32 and ids [B, H, K] int64, best first.

        picked: With hierarchical keys the groups whose slots are scored; None: groups are.
        """
        return self.scored_heads, *scored(self, queries_BHD, topk, picked=picked)

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
        lanes = [lane for lane in self._lanes if lane.arena.has(name)]
        if len(lanes) == 1 and lanes[0].has_all(array):
            return self._read_all(lanes[0].arena, name, ids_M)
        dtype = VALUE_DTYPES[self.schema.dtype] if name == VALUES else array.dtype
        rows_MW = torch.zeros(ids_M.shape[0], self.row_width(name), dtype=dtype, device=self.device)
        for lane in lanes:
            here, rows = lane.arena.locate(ids_M)
            at = here.nonzero()[:, 0]
            found = (
                kernels.gather_rows(lane.arena.paged(), ids_M[at]) if name == VALUES else lane.arena.rows(name)[rows]
            )
            # Copied, not added: a sum with zero would lose the sign of -0.0.
            for to, out_of in self._copies(array, lane.arena.blocks):
                rows_MW[at, to] = found[:, out_of]
        return rows_MW

    def _read_all(self, arena: Arena, name: str, ids_M: Tensor) -> Tensor:
        """Rows of an array of which one arena has all columns: they are written once."""
        if name == VALUES:
            return kernels.gather_rows(arena.paged(), ids_M)
        here, rows = arena.locate(ids_M)
        found = arena.rows(name)[rows]
        if found.shape[0] == ids_M.shape[0]:
            return found
        rows_MW = torch.zeros(ids_M.shape[0], found.shape[1], dtype=found.dtype, device=self.device)
        rows_MW[here] = found
        return rows_MW

    def write(self, name: str, ids_M: Tensor, rows_MW: Tensor) -> None:
        """Overwrite rows that are here, in place; others are skipped. Values and their master are written together."""
        if name not in self.arrays:
            self._write_heads(ids_M, rows_MW)
            return
        self.catch_up(ids_M)
        array = self.arrays[name]
        together = name in (VALUES, MASTER) and self.schema.master
        for lane in self._lanes:
            arena = lane.arena
            if not arena.has(name):
                continue
            rows = rows_MW if lane.has_all(array) else rows_MW[:, self._places(array, arena.blocks)]
            with arena.writing(arena.locate(ids_M)[1]):
                for written in (VALUES, MASTER) if together else (name,):
                    paged = arena.paged(written)
                    kernels.scatter_rows(paged, ids_M, rows.to(paged.value_dtype).contiguous())

    def _read_heads(self, ids_M: Tensor) -> Tensor:
        rows_MW = torch.zeros(ids_M.shape[0], *self.head_keys.shape[1:], dtype=torch.float32, device=self.device)
        places_M = self._head_places(ids_M)
        here = places_M >= 0
        rows_MW[here] = self.head_keys[places_M[here]]
        return rows_MW.flatten(1)

    def _write_heads(self, ids_M: Tensor, rows_MW: Tensor) -> None:
        """The last row of a head counts, as it would one by one: index_put of repeated places has no order."""
        places_M = self._head_places(ids_M)
        last = torch.full((len(self.heads) + 1,), -1, dtype=torch.int64, device=self.device)
        numbers_M = torch.arange(ids_M.shape[0], device=self.device)
        last.scatter_reduce_(0, places_M + 1, numbers_M, "amax")
        written = (last[1:] >= 0).nonzero()[:, 0]
        rows = rows_MW[last[1:][written]].to(self.head_keys.dtype)
        if self.shared_head_keys:
            self.moments.keep_heads()
            self.head_keys, self.shared_head_keys = self.head_keys.clone(), False
        self.head_key_writes += 1
        self.head_keys[written] = rows.view(-1, *self.head_keys.shape[1:])

    def _head_places(self, ids_M: Tensor) -> Tensor:
        """Where the keys of heads lie, -1 for those that are not here: [M] int64. One look for all of them."""
        places = torch.full((self.schema.num_key_pages,), -1, dtype=torch.int64, device=self.device)
        heads = torch.tensor(self.heads, dtype=torch.int64, device=self.device)
        places[heads] = torch.arange(len(self.heads), device=self.device)
        return places[ids_M]

    def _places(self, array: NamedArray, blocks: Blocks) -> Tensor:
        """Where the columns of ``blocks`` stand in a row of all blocks owned: [W of blocks] int64."""
        return torch.from_numpy(array.places(blocks, self.row_blocks(array.name))).to(self.device)

    def _copies(self, array: NamedArray, blocks: Blocks) -> list[tuple[slice, slice]]:
        """Ranges of a row of all blocks owned, and those of a row of ``blocks`` that belong there."""
        return array.copies(blocks, into=self.row_blocks(array.name), out_of=blocks)
