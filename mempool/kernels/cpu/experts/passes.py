"""Sums of experts and their gradients on the CPU: of a bag's pairs first u, some hundred rows at a time, then v of the
same rows, which are prefetched meanwhile. Rows are neither copied nor read again.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mempool.kernels.arguments import Paged
from mempool.kernels.checking import check_offsets
from mempool.kernels.cpu.admission import ascends
from mempool.kernels.cpu.bags import (
    PIECE,
    READS_PER_STEP,
    TASKS_PER_THREAD,
    ZERO,
    Arena,
    arena_of,
    dot_listed,
    end_in,
    first_bag_of_part,
    list_pairs,
    new_list,
    sum_listed,
)
from mempool.kernels.cpu.runtime import (
    Array,
    borrowed,
    inlined,
    keep,
    kernel,
    optional_weights,
    serial,
    several_tasks,
    spread,
    use_threads,
    view,
)

_GELU, _RELU, _SILU = 0, 1, 2
_ACTS = {"gelu": _GELU, "relu": _RELU, "silu": _SILU}
_ROOT_HALF, _DENSITY = math.sqrt(0.5), 1 / math.sqrt(2 * math.pi)


@inlined
def _activated(product: Any, act: int) -> Any:
    # act of a product and its derivative there, made in float64, float32.
    if act == _RELU:
        slope = np.float32(1) if product > 0 else np.float32(0)
        return (product if product > 0 or product != product else np.float32(0)), slope
    wide = np.float64(product)
    if act == _SILU:
        share = 1.0 / (1.0 + math.exp(-wide))
        return np.float32(wide * share), np.float32(share * (1.0 + wide * (1.0 - share)))
    share = 0.5 * (1.0 + math.erf(wide * _ROOT_HALF))
    return np.float32(wide * share), np.float32(share + wide * _DENSITY * math.exp(-0.5 * wide * wide))


@serial
def _sum_task(
    task: int,
    arena: Arena,
    ids: Array,
    gates: Array,
    offsets: Array,
    inputs: Array,
    act: int,
    num_tasks: int,
    out: Array,
) -> None:
    bag, end_bag = first_bag_of_part(offsets, task, num_tasks), first_bag_of_part(offsets, task + 1, num_tasks)
    input_dim, width = inputs.shape[1], out.shape[1]
    own, own_results = new_list(), np.empty(PIECE, dtype=np.float32)
    listed, results = borrowed(own), borrowed(own_results)
    first_pair, last_pair = offsets[bag], offsets[end_bag]
    while bag < end_bag:
        end_pair = min(last_pair, first_pair + PIECE)
        all_here = list_pairs(arena, ids, gates, first_pair, end_pair, last_pair, listed)
        own_gates = all_here and gates.shape[0] > 0
        given = gates[first_pair:end_pair] if own_gates else listed.weights
        first = ZERO
        while bag < end_bag:
            end = end_in(listed, all_here, min(offsets[bag + 1], end_pair) - first_pair)
            count, fresh = end - first, offsets[bag] >= first_pair
            dot_listed(arena, listed.rows, first, count, ZERO, input_dim, inputs[bag], results, input_dim, count)
            for place in range(first, end):
                answer, _ = _activated(results[place], act)
                results[place] = given[place] * answer
            sum_listed(arena, listed.rows, first, count, input_dim, width, results, fresh, out[bag], ZERO)
            first = end
            if offsets[bag + 1] > end_pair:  # goes on in the next piece
                break
            bag += 1
        first_pair = end_pair
    keep(own)
    keep(own_results)


@kernel
def _expert_sums(
    arena: Arena,
    ids: Array,
    gates: Array,
    offsets: Array,
    inputs: Array,
    act: int,
    num_tasks: int,
    out: Array,
) -> bool:
    if not ascends(offsets, ids.shape[0]):
        return False
    spread(num_tasks, _sum_task, (arena, ids, gates, offsets, inputs, act, num_tasks, out))
    return True


def expert_sums(paged: Paged, ids: Tensor, gates: Tensor | None, offsets: Tensor, inputs: Tensor, act: str) -> Tensor:
    """See mempool.kernels.expert_sums."""
    # Of whole rows: the columns of u stay as they are, unwritten, and are left out of the answer.
    out = torch.empty(inputs.shape[0], paged.width, dtype=torch.float32, device="cpu")
    num_tasks = several_tasks(use_threads(ids.numel() * paged.width // READS_PER_STEP), TASKS_PER_THREAD)
    given = view(ids), optional_weights(gates), view(offsets), view(inputs)
    if not _expert_sums(arena_of(paged), *given, _ACTS[act], num_tasks, view(out)):
        check_offsets(offsets, ids.numel())
    return out[:, inputs.shape[1] :].contiguous()


@serial
def _gradient_task(
    task: int,
    arena: Arena,
    ids: Array,
    gates: Array,
    offsets: Array,
    grads: Array,
    act: int,
    num_tasks: int,
    input_grad: Array,
    of_pairs: Array,
) -> None:
    bag, end_bag = first_bag_of_part(offsets, task, num_tasks), first_bag_of_part(offsets, task + 1, num_tasks)
    input_dim, width = input_grad.shape[1], grads.shape[1]
    own, own_results = new_list(), np.empty((4, PIECE), dtype=np.float32)
    listed, kept = borrowed(own), borrowed(own_results)
    of_u, of_v, of_gates, along = kept[0], kept[1], kept[2], kept[3]
    first_pair, last_pair = offsets[bag], offsets[end_bag]
    while bag < end_bag:
        end_pair = min(last_pair, first_pair + PIECE)
        all_here = list_pairs(arena, ids, gates, first_pair, end_pair, last_pair, listed)
        own_gates = all_here and gates.shape[0] > 0
        given = gates[first_pair:end_pair] if own_gates else listed.weights
        first = ZERO
        while bag < end_bag:
            end = end_in(listed, all_here, min(offsets[bag + 1], end_pair) - first_pair)
            count, fresh, grad = end - first, offsets[bag] >= first_pair, grads[bag]
            dot_listed(arena, listed.rows, first, count, ZERO, input_dim, grad, of_u, input_dim, count)
            dot_listed(arena, listed.rows, first, count, input_dim, width, grad, along, ZERO, count)
            for place in range(first, end):
                answer, slope = _activated(of_u[place], act)
                of_gates[place] = answer * along[place]
                of_u[place] = given[place] * slope * along[place]
                of_v[place] = given[place] * answer
            sum_listed(arena, listed.rows, first, count, ZERO, input_dim, of_u, fresh, input_grad[bag], ZERO)
            first = end
            if offsets[bag + 1] > end_pair:
                break
            bag += 1
        for pair in range(end_pair - first_pair):
            place = end_in(listed, all_here, pair)
            is_here = end_in(listed, all_here, pair + 1) > place
            for kind in range(3):
                of_pairs[kind, first_pair + pair] = kept[kind, place] if is_here else np.float32(0)
        first_pair = end_pair
    keep(own)
    keep(own_results)


@kernel
def _expert_gradients(
    arena: Arena,
    ids: Array,
    gates: Array,
    offsets: Array,
    grads: Array,
    act: int,
    num_tasks: int,
    input_grad: Array,
    of_pairs: Array,
) -> bool:
    if not ascends(offsets, ids.shape[0]):
        return False
    spread(num_tasks, _gradient_task, (arena, ids, gates, offsets, grads, act, num_tasks, input_grad, of_pairs))
    return True


def expert_gradients(
    paged: Paged, ids: Tensor, gates: Tensor | None, offsets: Tensor, grads: Tensor, input_dim: int, act: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See mempool.kernels.expert_gradients."""
    input_grad = torch.empty(grads.shape[0], input_dim, dtype=torch.float32, device="cpu")
    of_pairs = torch.empty(3, ids.numel(), dtype=torch.float32, device="cpu")
    num_tasks = several_tasks(use_threads(2 * ids.numel() * paged.width // READS_PER_STEP), TASKS_PER_THREAD)
    given = view(ids), optional_weights(gates), view(offsets), view(grads)
    if not _expert_gradients(arena_of(paged), *given, _ACTS[act], num_tasks, view(input_grad), view(of_pairs)):
        check_offsets(offsets, ids.numel())
    of_u, of_v, of_gates = of_pairs
    return input_grad, of_gates, of_u, of_v
