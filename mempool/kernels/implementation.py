"""Which implementation of the kernels runs: Triton on CUDA, Numba on the CPU, torch's own operations elsewhere.

Numba and Triton are imported at the first use, never with this module.
"""

from __future__ import annotations

import functools
import importlib
import logging
from typing import Literal, Protocol, cast

import torch
from torch import Tensor

from mempool.kernels.arguments import Dealt, Paged, SortedPairs
from mempool.kernels.steps import DenseSchedule, OptimizerStep

logger = logging.getLogger(__name__)

Name = Literal["numba", "triton", "torch"]


class Implementation(Protocol):
    """The functions every implementation offers; mempool.kernels documents them."""

    def weighted_sum(
        self,
        paged: Paged,
        ids: Tensor,
        weights: Tensor | None,
        offsets: Tensor,
        dtype: torch.dtype,
        out: Tensor | None = None,
    ) -> Tensor: ...
    def admit_bags(
        self, ids: Tensor, offsets: Tensor, num_slots: int, dtype: torch.dtype, own: bool
    ) -> tuple[Tensor, Tensor] | None: ...
    def deal_pairs(
        self,
        ids: Tensor,
        weights: Tensor | None,
        offsets: Tensor,
        group_of_page: Tensor,
        num_groups: int,
        page_shift: int,
    ) -> Dealt: ...
    def gather_rows(self, paged: Paged, ids: Tensor, dtype: torch.dtype) -> Tensor: ...
    def scatter_rows(self, paged: Paged, ids: Tensor, values: Tensor) -> None: ...
    def weight_gradient(
        self, paged: Paged, ids: Tensor, offsets: Tensor, grads: Tensor, out: Tensor | None = None
    ) -> Tensor: ...
    def expert_sums(
        self, paged: Paged, ids: Tensor, gates: Tensor | None, offsets: Tensor, inputs: Tensor, act: str
    ) -> Tensor: ...
    def expert_gradients(
        self,
        paged: Paged,
        ids: Tensor,
        gates: Tensor | None,
        offsets: Tensor,
        grads: Tensor,
        input_dim: int,
        act: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
    def sort_pairs(self, paged: Paged, ids: Tensor) -> SortedPairs: ...
    def segment_sum(self, pairs: SortedPairs, weights: Tensor | None, bags: Tensor, grads: Tensor) -> Tensor: ...
    def segment_sum_and_norm(
        self, pairs: SortedPairs, weights: Tensor | None, bags: Tensor, grads: Tensor
    ) -> tuple[Tensor, float, bool]: ...
    def add_segments(
        self, sums: Tensor, places: Tensor, pairs: SortedPairs, weights: Tensor | None, bags: Tensor, grads: Tensor
    ) -> None: ...
    def optimizer_step(
        self, paged: Paged, state: dict[str, Tensor], pairs: SortedPairs, sums: Tensor, step: OptimizerStep
    ) -> None: ...
    def fused_step(
        self,
        paged: Paged,
        state: dict[str, Tensor],
        pairs: SortedPairs,
        weights: Tensor | None,
        bags: Tensor,
        grads: Tensor,
        step: OptimizerStep,
    ) -> None: ...
    def catch_up(
        self,
        paged: Paged,
        state: dict[str, Tensor],
        rows: Tensor,
        schedule: DenseSchedule,
        to: int,
        block_dim: int,
    ) -> None: ...
    def squared_norm(self, sums: Tensor) -> tuple[float, bool]: ...
    def select_topk(self, scores: Tensor, k: int) -> tuple[Tensor, Tensor]: ...
    def product_select(self, scores1: Tensor, scores2: Tensor, k: int, stride: int) -> tuple[Tensor, Tensor]: ...
    def product_topk(
        self, queries: Tensor, keys: Tensor, k: int, deterministic: bool
    ) -> tuple[Tensor, Tensor, Tensor]: ...
    def parts_topk(
        self, queries: Tensor, keys: Tensor, k: int, ranges: tuple[tuple[int, int], ...]
    ) -> tuple[Tensor, Tensor] | None: ...
    def product_gradient(
        self, queries: Tensor, keys: Tensor, index1: Tensor, index2: Tensor, grads: Tensor
    ) -> tuple[Tensor, Tensor]: ...
    def flat_topk(
        self, queries: Tensor, keys: Paged, k: int, num_slots: int, deterministic: bool
    ) -> tuple[Tensor, Tensor]: ...
    def initial_values(
        self, seed: int, *, slots_start: int, num_slots: int, column_start: int, num_columns: int, std: float
    ) -> Tensor: ...


@functools.cache
def implementation(name: Name) -> Implementation:
    """One implementation by name, whatever the device; tests and benchmarks use it.

    Args:
        name: "numba" (CPU tensors), "triton" (CUDA tensors, or any under TRITON_INTERPRET=1) or "torch" (any).

    Raises:
        ImportError: The library is not installed, or Numba has no threading layer safe for several threads, or was told
            not to compile.
        ValueError: No implementation has this name.
    """
    if name == "torch":
        module = importlib.import_module("mempool.kernels.torch_ops")
    elif name == "numba":
        if importlib.import_module("numba").config.DISABLE_JIT:
            raise ImportError("NUMBA_DISABLE_JIT is set, and Numba's kernels run compiled only; unset it")
        module = importlib.import_module("mempool.kernels.cpu")
        module.choose_threading_layer()
    elif name == "triton":
        module = importlib.import_module("mempool.kernels.gpu")
    else:
        raise ValueError(f"unknown implementation {name!r}; known: numba, triton, torch")
    return cast(Implementation, module)


@functools.cache
def _best(device_type: str) -> Implementation:
    preferred: dict[str, Name] = {"cpu": "numba", "cuda": "triton"}
    name = preferred.get(device_type, "torch")
    try:
        return implementation(name)
    except ImportError as error:
        logger.warning("kernels on %s run in torch's own operations, slower: %s", device_type, error)
        return implementation("torch")


def implementation_for(device: torch.device) -> Implementation:
    """The implementation that runs on tensors of a device."""
    return _best(device.type)
