"""Gathers and updates of experts, once they are fenced: checked, sized, done. What waits, and what is held, is left to
the shard's other answers.

An update is held as one of values is: its pairs twice, first those that train u, of weight g act'(h) <v, dY> and with
the gradient [x, 0], then those that train v, of weight g act(h) and with [0, dY]. So optimizers, moves, journals and
checkpoints know of no experts.
Legend: B bags, L pairs, W columns of a row, I of them of u.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mempool import kernels
from mempool.errors import InvalidRequest
from mempool.observe import Stages
from mempool.shard import validate
from mempool.shard.bounds import check_reply, shown
from mempool.shard.hosted import HostedTable
from mempool.shard.pages.storage import Storage
from mempool.shard.reading.pinned import PinnedTable
from mempool.shard.steps.held import HeldUpdate
from mempool.types import GatherRequest, UpdateRequest
from mempool.types.bags import ACTS, Bags

_FLOATS = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, slots=True, eq=False)
class AskedExperts:
    """A gather of experts that is checked: its bags, their inputs [B, I] float32, and the dtype of its answer."""

    bags: Bags
    inputs: Tensor
    dtype: torch.dtype


class ExpertAnswers:
    """The arithmetic of experts for ``Answers``. Not thread-safe: used by the engine's thread.

    Args:
        stages: Where time is counted.
        reply_bytes: What sums may have; None: as much as there is.
        message_bytes: What any answer may have.
        reserve: Told the bytes of an answer before it is made; may refuse.
    """

    def __init__(
        self,
        *,
        stages: Stages,
        reply_bytes: int | None,
        message_bytes: int | None,
        reserve: Callable[[int], None],
    ) -> None:
        self._stages = stages
        self._reply_bytes = reply_bytes
        self._message_bytes = message_bytes
        self._reserve = reserve

    def checked_gather(self, table: HostedTable | PinnedTable, request: GatherRequest) -> AskedExperts:
        """What is to be summed.

        Raises:
            InvalidRequest: Wrong bags or inputs, an unknown act, a table whose slots are cut, or a version that is
                pinned.
            RequestTooLarge: The answer would be larger than a message may be.
        """
        storage = table.storage
        if isinstance(table, PinnedTable):
            raise InvalidRequest(
                f"table {storage.schema.name!r} answers experts at its newest version alone: leave out the pin"
            )
        with self._stages.measure("copy in"):
            bags, dtype = validate.check_gather(storage, request, reply_bytes=self._reply_bytes)
            if dtype == torch.float8_e4m3fn:
                raise InvalidRequest("sums of experts are answered as float32 or bfloat16, not in packed rows")
            inputs = _checked_inputs(storage, request, bags)
        self._reserve(4 * bags.num_bags * (storage.schema.value_dim - inputs.shape[1]))
        return AskedExperts(bags, inputs, dtype)

    def sums(self, storage: Storage, asked: AskedExperts, request: GatherRequest) -> Tensor:
        """[B, W - I] in the dtype asked for, on the CPU."""
        bags, inputs = asked.bags, asked.inputs
        with self._stages.measure("kernel"):
            storage.catch_up(bags.ids, for_step=request.remember)
            paged = _rows(storage)
            if paged is None:
                shape = bags.num_bags, storage.schema.value_dim - inputs.shape[1]
                sums = torch.zeros(shape, dtype=torch.float32, device=storage.device)
            else:
                sums = kernels.expert_sums(paged, bags.ids, bags.weights, bags.offsets, inputs, act=request.act)
        return sums.to(device="cpu", dtype=asked.dtype)

    def checked_update(
        self, table: HostedTable, request: UpdateRequest, remembered: Bags | None
    ) -> tuple[Bags, Tensor]:
        """The update's bags, and their inputs and gradients side by side, [B, W] float32.

        Raises:
            InvalidRequest: As of a gather, or a gradient of another shape.
            RequestTooLarge, ContextMissing: As of an update of values.
        """
        storage, input_dim = table.storage, request.input_dim
        _check_experts(storage, request.act, input_dim)
        with self._stages.measure("copy in"):
            bags, grads = validate.check_update(storage, request, remembered, reply_bytes=self._message_bytes)
        answer_bytes = 4 * (bags.num_pairs + bags.num_bags * input_dim)
        if request.want_weight_grad:
            check_reply(answer_bytes, self._message_bytes, f"the gradients of {bags.num_bags:,} bags of experts")
        self._reserve(2 * answer_bytes)
        return bags, grads

    def gradients(self, storage: Storage, bags: Bags, grads: Tensor, request: UpdateRequest) -> kernels.ExpertGradients:
        """Of bags, by the rows as they are now."""
        with self._stages.measure("kernel"):
            storage.catch_up(bags.ids, for_step=True)
            paged = _rows(storage)
            if paged is None:
                of_nothing = torch.zeros(bags.num_pairs, dtype=torch.float32, device=storage.device)
                input_grad = of_nothing.new_zeros(bags.num_bags, request.input_dim)
                return kernels.ExpertGradients(input_grad, of_nothing, of_nothing, of_nothing)
            return kernels.expert_gradients(
                paged, bags.ids, bags.weights, bags.offsets, grads, request.input_dim, act=request.act
            )

    def again(self, table: HostedTable, request: UpdateRequest, held: HeldUpdate) -> Tensor:
        """What is answered of an update that is held. Raises InvalidRequest where it is none of such experts."""
        storage, input_dim, act = table.storage, request.input_dim, request.act
        _check_experts(storage, act, input_dim)
        if held.input_dim != input_dim or held.bags.weights is None:
            raise InvalidRequest(
                f"update {request.sequence} is held, and is "
                + (f"of experts of {held.input_dim} inputs, not {input_dim}" if held.input_dim else "none of experts")
                + ". Nothing was changed."
            )
        num_bags, num_pairs = held.bags.num_bags // 2, held.bags.num_pairs // 2
        of_u = held.bags.some(0, num_bags)
        grads = torch.cat([held.grads[:num_bags, :input_dim], held.grads[num_bags:, input_dim:]], dim=1)
        self._reserve(8 * (num_pairs + num_bags * input_dim))
        paged = _rows(storage)
        if paged is None:
            return torch.zeros(num_pairs + num_bags * input_dim, dtype=torch.float32)
        storage.catch_up(of_u.ids, for_step=True)
        found = kernels.expert_gradients(paged, of_u.ids, None, of_u.offsets, grads, input_dim, act=act)
        sums = kernels.weighted_sum(paged, of_u.ids, of_u.weights, of_u.offsets)
        return answer_of(found._replace(inputs=sums[:, :input_dim]))


def answer_of(found: kernels.ExpertGradients) -> Tensor:
    """d_weights [L] and d_inputs [B * I], one behind the other, float32 on the CPU."""
    return torch.cat([found.gates, found.inputs.reshape(-1)]).cpu()


def joined_gradients(parts: Sequence[kernels.ExpertGradients]) -> kernels.ExpertGradients:
    """Those of bags, one after the other."""
    return kernels.ExpertGradients(*(torch.cat(each) for each in zip(*parts, strict=True)))


def held_twice(bags: Bags, grads: Tensor, input_dim: int, found: kernels.ExpertGradients) -> HeldUpdate:
    """The pairs that train u, then those that train v, and the gradient [2 B, W] of their bags."""
    twice = Bags(
        ids=torch.cat([bags.ids, bags.ids]),
        weights=torch.cat([found.of_u, found.of_v]),
        offsets=torch.cat([bags.offsets, bags.offsets[1:] + bags.num_pairs]),
    )
    num_bags = bags.num_bags
    of_both = grads.new_zeros(2 * num_bags, grads.shape[1])
    of_both[:num_bags, :input_dim] = grads[:, :input_dim]
    of_both[num_bags:, input_dim:] = grads[:, input_dim:]
    return HeldUpdate(twice, of_both, input_dim=input_dim)


def _checked_inputs(storage: Storage, request: GatherRequest, bags: Bags) -> Tensor:
    inputs = request.inputs
    shape = None if inputs is None else tuple(inputs.shape)
    if inputs is None or shape is None or len(shape) != 2 or shape[0] != bags.num_bags or inputs.dtype not in _FLOATS:
        given = "absent" if inputs is None else f"{shape} {inputs.dtype}"
        raise InvalidRequest(
            f"inputs of experts must be [{bags.num_bags}, I] float32 or bfloat16, one for each bag, not {given}. "
            "Nothing was changed."
        )
    _check_experts(storage, request.act, inputs.shape[1])
    return validate.admit(inputs, device=storage.device, dtype=torch.float32)


def _check_experts(storage: Storage, act: str, input_dim: int) -> None:
    """Raises InvalidRequest where rows of the table are no experts of that many inputs, whole on this shard."""
    schema = storage.schema
    if act not in ACTS:
        raise InvalidRequest(f"act = {shown(act)} must be one of {', '.join(ACTS)}. Nothing was changed.")
    if not 1 <= input_dim < schema.value_dim:
        raise InvalidRequest(
            f"experts of {input_dim} inputs: a row of table {schema.name!r} has {schema.value_dim} columns, of which "
            f"1 to {schema.value_dim - 1} can be u. Nothing was changed."
        )
    if schema.layout != "rows":
        raise InvalidRequest(
            f"table {schema.name!r} is laid out by {schema.layout!r}, which may cut an expert in two: make it with "
            'layout="rows". Nothing was changed.'
        )
    if storage.width not in (0, schema.value_dim) or any(lane.columns is not None for lane in storage.lanes):
        raise InvalidRequest(
            f"slots of table {schema.name!r} are cut on shard {storage.shard}, as those of a table are that it was "
            "forked from: its layout holds from the next rescale on. Nothing was changed."
        )


def _rows(storage: Storage) -> kernels.Paged | None:
    """The rows that are here; None: none are. Of a table laid out by rows one arena has them all."""
    lanes = storage.lanes
    if not lanes:
        return None
    (lane,) = lanes  # one that lacks no columns, as is checked before
    return lane.arena.paged()
