"""Keys in groups: a query picks groups by their keys, and slots of those groups by their own.

Shape legend: B bags, H heads, K top-k, D key dim, G groups, N slots, g groups of a query ("probes"), M = B * H.
"""

from typing import Any

import torch
from torch import Tensor, nn

from mempool.errors import InvalidRequest
from mempool.nn.keys.dots import dots, dots_gradient
from mempool.nn.keys.product import alias, best_keys, one_page, some_of
from mempool.nn.scoring import unit_rms
from mempool.types.keys import Grouping, group_count, groups_problem, probe_count, topk_problem

_CHUNK_SLOTS = 1 << 18


class HierarchicalKeys(nn.Module):
    """One key a slot and one a group, which all heads share. With q the query of a token's head::

        score(slot) = <q, group_keys[group of slot]> + <q, slot_keys[slot]>

    The search is greedy: the ``probes`` best groups, the best slots in those. The score of its group is in a slot's, so
    that whatever trains the scores trains the choice of groups. Of equal scores the lowest id is chosen.

    Attributes:
        group_keys: Parameter [groups, key_dim].
        slot_keys: Parameter [slots, key_dim]; slots ``g * group_size`` to ``(g + 1) * group_size`` are of group g. Its
            gradient is dense: memory for it is as much again.
        group_size: Slots of a group; the last one may have fewer.
        probes: Groups that a query looks into.

    Args:
        num_slots, key_dim: Sizes.
        groups: None: as many as cost as much to score as the slots of ``probes`` groups, sqrt(probes * slots).
        probes: None: 8, or as many groups as there are.
        topk: Slots that will be asked for.
        qk_norm: Normalise all keys to a root mean square of 1.
        made: device and dtype of the parameters.

    Raises:
        InvalidRequest: Sizes that do not fit each other.
    """

    def __init__(
        self,
        num_slots: int,
        key_dim: int,
        *,
        groups: int | None,
        probes: int | None,
        topk: int,
        qk_norm: bool,
        made: dict[str, Any],
    ) -> None:
        super().__init__()
        num_groups = group_count(num_slots, groups, probes)
        if text := groups_problem(num_slots, num_groups):
            raise InvalidRequest(f"groups = {num_groups:_} {text}")
        grouping = Grouping(num_slots, num_groups)
        self.group_size = grouping.size
        self.probes = probe_count(num_groups, probes)
        if self.probes > num_groups:
            raise InvalidRequest(f"probes = {probes}, and there are {num_groups} groups: give at most that")
        if text := topk_problem(grouping, self.probes, topk):
            raise InvalidRequest(f"topk = {topk}, {text}")
        self.qk_norm = qk_norm
        self.group_keys = nn.Parameter(torch.empty(num_groups, key_dim, **made))
        self.slot_keys = nn.Parameter(torch.empty(num_slots, key_dim, **made))

    def draw(self, std: float) -> None:
        """New keys, N(0, std^2)."""
        for keys in self.parameters():
            nn.init.normal_(keys, std=std)

    def scored_keys(self) -> tuple[Tensor, Tensor]:
        """Keys of groups and of slots as they are scored, float32."""
        group_keys, slot_keys = self.group_keys.float(), self.slot_keys.float()
        return (unit_rms(group_keys), unit_rms(slot_keys)) if self.qk_norm else (group_keys, slot_keys)

    def flat(self) -> Tensor:
        """The key of each slot with its group's added, [slots, key_dim] float32: flat keys with the same scores."""
        group_keys, slot_keys = self.scored_keys()
        return slot_keys + group_keys.repeat_interleave(self.group_size, dim=0)[: slot_keys.shape[0]]

    def forward(self, queries_BHD: Tensor, topk: int, *, deterministic: bool = True) -> tuple[Tensor, Tensor]:
        """Scores [B, H, topk] float32, differentiable in queries and all keys, and slot ids int64; best first."""
        group_keys, slot_keys = self.scored_keys()
        scores, ids = torch.ops.mempool.hierarchical_topk(
            queries_BHD.flatten(0, 1), group_keys, slot_keys, self.group_size, self.probes, topk, deterministic
        )
        shape = (*queries_BHD.shape[:2], topk)
        return scores.view(shape), ids.view(shape)

    def scores_of(self, queries_BHD: Tensor, ids_BHK: Tensor) -> Tensor:
        """Scores [B, H, K] float32 of any slots, differentiable in queries and all keys."""
        group_keys, slot_keys = self.scored_keys()
        queries, ids = queries_BHD.flatten(0, 1), ids_BHK.flatten(0, 1)
        found = dots(queries, slot_keys, ids) + dots(queries, group_keys, ids // self.group_size)
        return found.view(ids_BHK.shape)

    @torch.no_grad()
    def exact(self, queries_BHD: Tensor, topk: int) -> Tensor:
        """Ids [B, H, topk] of the best of all slots, each of them scored; best first."""
        from mempool.kernels import select_topk

        group_keys, slot_keys = self.scored_keys()
        queries = queries_BHD.flatten(0, 1)
        scores = queries.new_empty(queries.shape[0], 0)
        ids = scores.to(torch.int64)
        chunk = max(1, _CHUNK_SLOTS // self.group_size) * self.group_size
        for first in range(0, slot_keys.shape[0], chunk):
            some = slot_keys[first : first + chunk]
            groups = (
                torch.arange(first, first + some.shape[0], dtype=torch.int64, device=some.device) // self.group_size
            )
            found, own = best_keys(queries, some + group_keys[groups], min(topk, some.shape[0]), deterministic=True)
            scores, ids = torch.cat([scores, found], dim=1), torch.cat([ids, some_of(own) + first], dim=1)
            scores, places = select_topk(scores, min(topk, scores.shape[1]))
            ids = ids.gather(1, places)
        return ids.view(*queries_BHD.shape[:2], topk)

    def extra_repr(self) -> str:
        return f"{self.group_keys.shape[0]} groups x {self.group_size} slots, probes={self.probes}"


def _choice(
    queries: Tensor, group_keys: Tensor, slot_keys: Tensor, group_size: int, probes: int, topk: int, deterministic: bool
) -> tuple[Tensor, Tensor]:
    """Scores and ids [M, topk]; ties go by id."""
    from mempool.kernels import grouped_topk

    scores, picked = best_keys(queries, group_keys, probes, deterministic=deterministic)
    picked, order = some_of(picked).sort(dim=1)
    best, ids = grouped_topk(
        queries.contiguous(),
        one_page(slot_keys),
        picked,
        scores.gather(1, order),
        topk,
        num_slots=slot_keys.shape[0],
        group_size=group_size,
        deterministic=deterministic,
    )
    return best.masked_fill(ids < 0, torch.nan), some_of(ids)


@torch.library.custom_op("mempool::hierarchical_topk", mutates_args=())
def _topk_op(
    queries: Tensor, group_keys: Tensor, slot_keys: Tensor, group_size: int, probes: int, topk: int, deterministic: bool
) -> tuple[Tensor, Tensor]:
    with torch.autocast(queries.device.type, enabled=False):
        return _choice(queries, alias(group_keys), alias(slot_keys), group_size, probes, topk, deterministic)


@_topk_op.register_fake
def _(
    queries: Tensor,
    group_keys: Tensor,  # noqa: ARG001
    slot_keys: Tensor,  # noqa: ARG001
    group_size: int,  # noqa: ARG001
    probes: int,  # noqa: ARG001
    topk: int,
    deterministic: bool,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    shape = (queries.shape[0], topk)
    return queries.new_empty(shape), queries.new_empty(shape, dtype=torch.int64)


def _set_up(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:3], output[1])
    ctx.group_size = inputs[3]
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grads: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    queries, group_keys, slot_keys, ids = ctx.saved_tensors
    with torch.autocast(grads.device.type, enabled=False):
        of_slots, slot_grads = dots_gradient(queries, slot_keys, ids, grads)
        of_groups, group_grads = dots_gradient(queries, group_keys, ids // ctx.group_size, grads)
    return of_slots + of_groups, group_grads, slot_grads, None, None, None, None


_topk_op.register_autograd(_backward, setup_context=_set_up)
