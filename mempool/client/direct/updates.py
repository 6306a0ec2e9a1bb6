"""Gradients of weights on the caller's own thread, as ``gathers`` has it for look-ups."""

from functools import partial

from torch import Tensor

from mempool.client.direct.asking import NARROW_END, Asking, Wait
from mempool.client.routing.attempt import LookupRecord, remembers, update_request
from mempool.client.routing.fanout import envelope_of
from mempool.client.routing.plan import Part, TablePlan, merge_weight_grads, pick_grads
from mempool.types import AtOnceShard, StepId, UpdateReply


def update_directly(
    asking: Asking, table_id: int, record: LookupRecord, grads: Tensor, *, step_id: StepId, sequence: int, hold: bool
) -> tuple[Tensor, TablePlan] | None:
    """d_weights [L] float32, and the plan under which every shard holds the update, if it is to.

    None where the router is to be asked: perhaps some hold it by then.
    """
    router = asking.router
    plan = router.plan_now(table_id)
    if plan is None or not asking.possible:
        return None
    parts = record.sorted.take(plan, record.bags)
    begin = partial(_begin, asking, plan, record, grads, step_id, sequence, hold, len(parts) == 1)
    answers = asking.each([(part.route.info, partial(begin, part)) for part in parts])
    found: list[tuple[Part, Tensor]] = []
    for part, reply in zip(parts, answers, strict=True):
        if reply is not None:
            router.versions.saw(table_id, reply.stamp.table_version)
            if reply.weight_grad is not None:
                router.traffic.add(received=reply.weight_grad.nbytes)
                found.append((part, reply.weight_grad))
    if len(found) < len(parts):
        return None
    return merge_weight_grads(found, num_pairs=record.bags.num_pairs), plan


def _begin(
    asking: Asking,
    plan: TablePlan,
    record: LookupRecord,
    grads: Tensor,
    step_id: StepId,
    sequence: int,
    hold: bool,
    alone: bool,
    part: Part,
    shard: AtOnceShard,
) -> Wait[UpdateReply] | None:
    bags, part_grads = part.bags, pick_grads(plan, part, grads)
    known = remembers(plan, part.route, record)
    request = update_request(
        part.route,
        envelope_of(plan, part.route.info, asking.router.versions),
        record,
        part_grads,
        bags=None if known else bags,
        step_id=step_id,
        sequence=sequence,
        hold=hold,
        want_weight_grad=True,
    )
    narrow = plan.schema.num_slots <= NARROW_END
    wait = shard.begin_update(request, timeout_s=asking.patience_s, narrow_ids=narrow, alone=alone)
    if wait is not None:
        asking.router.traffic.add(sent=part_grads.nbytes + (0 if known else bags.num_bytes))
    return wait
