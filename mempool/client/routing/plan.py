"""How a call on a table is cut up for its shards and put together again: pure functions of a view. Sends nothing.

Legend: B bags, b bags of one part, L pairs of all bags together, l pairs of one part, M rows, V value dim, W columns of
one shard's blocks, H heads, K top-k, C candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mempool import kernels
from mempool.agreement.step_events import Owners
from mempool.client.sorting import Sorting, sort_pairs, sortings_of
from mempool.errors import Internal
from mempool.kernels import PackedLayout
from mempool.placement import Route, assignment_of, routes
from mempool.types import ShardInfo, TableSchema, TableView
from mempool.types.bags import Bags


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Neighbouring columns that are neighbours in a shard's reply too. sole: no other shard adds to them."""

    reply: slice
    table: slice
    sole: bool


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ShardRoute:
    """What one shard answers of a table.

    Attributes:
        blocks: Its blocks, ascending, as in its replies.
        width: Columns of those blocks together.
        whole: Its reply is the table's answer: every column, from nobody else.
        row_mask: [row pages] bool, those of which it owns anything; None where that is all.
        partial: Any of its columns are only a part of the sum.
    """

    info: ShardInfo
    blocks: tuple[int, ...]
    width: int
    spans: tuple[Span, ...]
    whole: bool
    row_mask: Tensor | None
    partial: bool

    @property
    def shard(self) -> int:
        return self.info.shard


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TablePlan:
    """A view, prepared for planning.

    Attributes:
        table_id, epoch: As the view has them.
        routes: Shards that own row pages, ascending.
        owners: Shards that own anything, ascending: those that every commit is sent to.
        head_owners: Per shard that owns key pages, ascending: (shard, its heads).
        page_owners: [row pages, blocks] int32, the placement's owners as a tensor.
        agreeing: Those whom a step is agreed on with.
        sortings, places: How pairs are told apart for the routes that lack row pages, as of ``sortings_of``.
        side_by_side: The numbers of the routes by the columns that they answer, where each has one range of them, to
            itself, and all ranges together are every column; else empty.
        alone: The route, where there is one only and it is whole: nothing is cut up, nor put together.
    """

    view: TableView
    table_id: int
    epoch: int
    routes: tuple[ShardRoute, ...]
    owners: tuple[ShardInfo, ...]
    head_owners: tuple[tuple[ShardInfo, tuple[int, ...]], ...]
    page_owners: Tensor
    agreeing: Owners
    sortings: tuple[Sorting, ...]
    places: tuple[tuple[int, int] | None, ...]
    side_by_side: tuple[int, ...]
    alone: ShardRoute | None

    @property
    def schema(self) -> TableSchema:
        return self.view.schema


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Part:
    """The pairs of a call that one shard needs.

    Attributes:
        named: [b] int64, the numbers of its bags among all, ascending; None where it has all bags. Where few have pairs
            there it has those alone: others would cost an offset, a sum and a gradient each, all of nothing.
        kept: [l] int64, its pairs' positions among all; None where all.
    """

    route: ShardRoute
    bags: Bags
    named: Tensor | None = None
    kept: Tensor | None = None


def make_plan(view: TableView) -> TablePlan:
    """Prepare a view.

    Raises:
        Internal: The placement names a shard that the view does not.
    """
    placement, schema = view.placement, view.schema
    infos = {info.shard: info for info in view.shards}
    unknown = [shard for shard in placement.shards if shard not in infos]
    if unknown:
        raise Internal(
            f"the view of table {schema.name!r}, epoch {placement.epoch}, names no address of shards {unknown}."
        )
    assignment = assignment_of(placement)
    heads: dict[int, list[int]] = {}
    for head, shard in enumerate(placement.key_owners.tolist()):
        heads.setdefault(shard, []).append(head)
    shard_routes = tuple(
        _shard_route(infos[shard], route, schema) for shard, route in sorted(routes(assignment).items())
    )
    owners = tuple(infos[shard] for shard in placement.shards)
    sortings, places = sortings_of([route.row_mask for route in shard_routes])
    return TablePlan(
        view=view,
        table_id=schema.table_id,
        epoch=placement.epoch,
        routes=shard_routes,
        owners=owners,
        agreeing=Owners(
            table_id=schema.table_id,
            shards=tuple(info.shard for info in owners),
            holders=frozenset(route.shard for route in shard_routes),
            view=(placement.epoch, tuple((info.shard, info.incarnation) for info in owners)),
        ),
        head_owners=tuple((infos[shard], tuple(heads[shard])) for shard in sorted(heads)),
        page_owners=torch.tensor(placement.owners, dtype=torch.int32, device="cpu"),
        sortings=sortings,
        places=places,
        side_by_side=_side_by_side(shard_routes, schema.value_dim),
        alone=shard_routes[0] if len(shard_routes) == 1 and shard_routes[0].whole and not sortings else None,
    )


def newer_view(old: TableView, new: TableView) -> TableView:
    """What is known after ``new`` was heard: ``old`` itself where it says nothing new.

    Views come from the controller and, while it is away, from shards, which may lag behind: a lower epoch is no news of
    where pages are, and whatever the epoch, a lower incarnation of a shard is no news of where that shard is.
    """
    placed, other = (new, old) if new.placement.epoch > old.placement.epoch else (old, new)
    if new.placement.epoch == old.placement.epoch:
        placed, other = new, old
    known = {info.shard: info for info in other.shards}
    merged = tuple(
        heard if (heard := known.get(info.shard)) is not None and heard.incarnation > info.incarnation else info
        for info in placed.shards
    )
    if placed.placement.epoch == old.placement.epoch and set(merged) == set(old.shards):
        return old
    return replace(placed, shards=merged)


def split(plan: TablePlan, bags: Bags) -> tuple[Part, ...]:
    """The part of each route, in its order. A shard that lacks whole row pages gets no pairs of those."""
    if not plan.sortings:
        return tuple(Part(route=route, bags=bags) for route in plan.routes)
    found = [sort_pairs(sorting, bags, page_shift=plan.schema.page_shift) for sorting in plan.sortings]
    parts = []
    for route, place in zip(plan.routes, plan.places, strict=True):
        if place is None:
            parts.append(Part(route=route, bags=bags))
        else:
            mine = found[place[0]][place[1]]
            parts.append(Part(route=route, bags=mine.bags, named=mine.named, kept=mine.kept))
    return tuple(parts)


def packed_sums(schema: TableSchema, width: int | None = None) -> PackedLayout:
    """How sums of so many columns, or all of a table's, lie in packed rows, whatever its values are stored as."""
    width = schema.value_dim if width is None else width
    return PackedLayout("float8_e4m3fn", width=width, block_dim=schema.block_dim)


def pick_grads(plan: TablePlan, part: Part, grads: Tensor) -> Tensor:
    """What a part's shard gets of a gradient [B, V] or packed rows: of its bags and columns, [b, W] or packed rows."""
    route = part.route
    if part.named is not None:
        grads = grads.index_select(0, part.named)
    if grads.dtype != torch.uint8:
        return pick_columns(route, grads)
    return kernels.pick_blocks(packed_sums(plan.schema), grads, packed_sums(plan.schema, route.width), route.blocks)


def pick_columns(route: ShardRoute, matrix: Tensor) -> Tensor:
    """The columns of a route, [.., W] contiguous, of a matrix [.., V] in the table's order."""
    if route.width == matrix.shape[-1]:
        return matrix
    picked = [matrix[..., span.table] for span in route.spans]
    return picked[0].contiguous() if len(picked) == 1 else torch.cat(picked, dim=-1)


def merge_values(plan: TablePlan, replies: Sequence[tuple[Part, Tensor]], *, num_bags: int) -> Tensor:
    """Pooled values [B, V] float32 from shards' replies [b, W] or packed rows, which come in the order of the routes.

    Sole columns are copied, others added up in ascending shard order. A shard left out adds nothing.
    """
    if len(replies) == 1 and replies[0][0].route.whole:
        return whole_values(plan, replies[0][0].route, replies[0][1])
    replies = [(part, _unpacked(plan, part.route, reply)) for part, reply in replies]
    if plan.side_by_side and len(replies) == len(plan.side_by_side):
        return torch.cat([replies[number][1] for number in plan.side_by_side], dim=1).to(torch.float32)
    width = plan.schema.value_dim
    if len(replies) > 1 and all(part.named is None and part.route.width == width for part, _ in replies):
        (_, first), (_, second), *others = replies  # all of parts of the rows: none has a column to itself
        values = first + second
        for _, reply in others:
            values += reply
        return values
    partial = any(route.partial for route in plan.routes)
    make = torch.zeros if partial else torch.empty
    values = make(num_bags, width, dtype=torch.float32, device="cpu")
    for part, reply in replies:
        if part.named is not None and part.route.width == width:
            values.index_add_(0, part.named, reply)  # its bags are distinct: each sum grows in the order of the shards
            continue
        for span in part.route.spans:
            if span.sole:  # the shard lacks no row page then: it has all bags
                values[:, span.table] = reply[:, span.reply]
            elif part.named is None:
                values[:, span.table] += reply[:, span.reply]
            else:
                columns = values.numpy()[:, span.table]  # to some of the columns torch adds one row after the other
                columns[part.named.numpy()] += reply.numpy()[:, span.reply]
    return values


def whole_values(plan: TablePlan, route: ShardRoute, reply: Tensor) -> Tensor:
    """The same where one shard answers all."""
    return reply if reply.dtype == torch.float32 else _unpacked(plan, route, reply).to(torch.float32)


def _unpacked(plan: TablePlan, route: ShardRoute, reply: Tensor) -> Tensor:
    if reply.dtype != torch.uint8:
        return reply
    layout = packed_sums(plan.schema, route.width)
    if reply.shape[1] != layout.row_bytes:
        raise Internal(
            f"shard {route.shard} answered rows of {reply.shape[1]} bytes; {route.width} columns take "
            f"{layout.row_bytes}"
        )
    return kernels.unpack_rows(layout, reply)


def merge_weight_grads(grads: Sequence[tuple[Part, Tensor]], *, num_pairs: int) -> Tensor:
    """d_weights [L] float32 from shards' [l], added up in ascending shard order."""
    if len(grads) == 1 and grads[0][0].kept is None:
        return grads[0][1]
    total = torch.zeros(num_pairs, dtype=torch.float32, device="cpu")
    for part, grad in grads:
        if part.kept is None:
            total += grad
        else:
            total.index_add_(0, part.kept, grad)  # positions are distinct
    return total


def rows_of(route: ShardRoute, ids: Tensor, *, schema: TableSchema) -> Tensor | None:
    """Positions [m] int64 of the ids [M] of which a route's shard owns anything; None where that is all."""
    if route.row_mask is None:
        return None
    return torch.nonzero(route.row_mask[ids >> schema.page_shift]).reshape(-1)


def place_rows(
    plan: TablePlan, out: Tensor, ids: Tensor, *, route: ShardRoute, kept: Tensor | None, rows: Tensor, per_block: bool
) -> None:
    """Write one shard's rows into ``out``.

    Args:
        out: [M, V], or [M, blocks] where ``per_block``; changed in place.
        ids: [M] int64, all ids asked for.
        kept: Positions of those that were sent to this shard; None where all were.
        rows: [m, W], or [m, blocks of the route] where ``per_block``.
    """
    pages = (ids if kept is None else ids[kept]) >> plan.schema.page_shift
    begin = 0
    for block in route.blocks:
        start, stop = (block, block + 1) if per_block else plan.schema.block_columns(block)
        end = begin + stop - start
        mine = torch.nonzero(plan.page_owners[pages, block] == route.shard).reshape(-1)
        # Copied, not added to zeros: -0.0 stays -0.0.
        out[mine if kept is None else kept[mine], start:stop] = rows[mine, begin:end]
        begin = end


def merge_candidates(scores: Sequence[Tensor], ids: Sequence[Tensor], *, topk: int) -> tuple[Tensor, Tensor]:
    """The best ``topk`` of several lists by (score descending, id ascending).

    Args:
        scores: Each [B, H, C] float32, -inf where there was no candidate.
        ids: Each [B, H, C] int64, -1 where there was no candidate.

    Returns:
        scores [B, H, K], ids [B, H, K].
    """
    all_scores, all_ids = torch.cat(list(scores), dim=-1), torch.cat(list(ids), dim=-1)
    # No candidate comes after a real one even where that one's score is -inf.
    ranks = torch.where(all_ids < 0, torch.iinfo(torch.int64).max, all_ids)
    by_id = ranks.argsort(dim=-1, stable=True)
    by_score = all_scores.gather(-1, by_id).argsort(dim=-1, descending=True, stable=True)
    best = by_id.gather(-1, by_score)[..., :topk]
    return all_scores.gather(-1, best), all_ids.gather(-1, best)


def _side_by_side(shard_routes: Sequence[ShardRoute], value_dim: int) -> tuple[int, ...]:
    if any(len(route.spans) != 1 or route.partial or route.row_mask is not None for route in shard_routes):
        return ()
    in_order = sorted(range(len(shard_routes)), key=lambda number: shard_routes[number].spans[0].table.start)
    whole = sum(route.width for route in shard_routes) == value_dim  # sole columns do not overlap
    return tuple(in_order) if whole else ()


def _shard_route(info: ShardInfo, route: Route, schema: TableSchema) -> ShardRoute:
    spans: list[Span] = []
    begin = 0
    for block in route.blocks:
        start, stop = schema.block_columns(block)
        end = begin + stop - start
        sole = block in route.sole
        if spans and spans[-1].sole == sole and spans[-1].table.stop == start:
            last = spans.pop()
            spans.append(Span(reply=slice(last.reply.start, end), table=slice(last.table.start, stop), sole=sole))
        else:
            spans.append(Span(reply=slice(begin, end), table=slice(start, stop), sole=sole))
        begin = end
    return ShardRoute(
        info=info,
        blocks=route.blocks,
        width=begin,
        spans=tuple(spans),
        whole=len(route.sole) == schema.num_blocks,
        row_mask=None if route.row_mask is None else torch.tensor(route.row_mask, dtype=torch.bool, device="cpu"),
        partial=not all(span.sole for span in spans),
    )
