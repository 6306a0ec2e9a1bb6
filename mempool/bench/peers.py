"""Other libraries that do the same work: which are installed, and how each is called on our tensors without a copy."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mempool.kernels import OptimizerStep

#: Packages of peers beside torch, by device, with how to get them.
PACKAGES = {"cpu": ("fbgemm_gpu", "faiss"), "cuda": ()}
INSTALL = "`make bench`, or pip install 'mempool[bench]' with the versions of constraints.txt"

_FBGEMM_OPTIMIZERS = {
    "sgd": "EXACT_SGD",
    "adagrad": "EXACT_ADAGRAD",
    "rowwise_adagrad": "EXACT_ROWWISE_ADAGRAD",
}


def installed(package: str) -> bool:
    """Whether a peer's package can be imported."""
    if importlib.util.find_spec(package) is None:
        return False
    try:
        with warnings.catch_warnings():  # of what a CPU build leaves out
            warnings.simplefilter("ignore")
            importlib.import_module(package)
    except (ImportError, OSError):  # built for another torch
        return False
    return True


def missing(device: torch.device | str) -> list[str]:
    """Peers' packages of a device that are not here."""
    return [package for package in PACKAGES.get(torch.device(device).type, ()) if not installed(package)]


def fbgemm_has(algorithm: str) -> bool:
    """Whether FBGEMM's CPU build is here and knows an optimizer of ours."""
    return algorithm in _FBGEMM_OPTIMIZERS and installed("fbgemm_gpu")


def fbgemm(rows: Tensor, state: Tensor | None, step: OptimizerStep) -> Any:
    """FBGEMM's table-batched embedding with a fused optimizer, on the CPU, working in our memory.

    Its bounds check is off: it would only make FBGEMM slower.

    Args:
        rows: [R, W] float32: its weights are this memory.
        state: The Adagrad sum [R, W], or [R, 1] row-wise, likewise shared; None for SGD.
        step: Optimizer and numbers.

    Returns:
        The module: called with ids, offsets [B + 1] and weights it returns [B, W] float32.
    """
    common: Any = importlib.import_module("fbgemm_gpu.split_table_batched_embeddings_ops_common")
    training: Any = importlib.import_module("fbgemm_gpu.split_table_batched_embeddings_ops_training")
    config: Any = importlib.import_module("fbgemm_gpu.split_embedding_configs")
    place = (common.EmbeddingLocation.HOST, training.ComputeDevice.CPU)
    bags = training.SplitTableBatchedEmbeddingBagsCodegen(
        [(rows.shape[0], rows.shape[1], *place)],
        optimizer=config.EmbOptimType[_FBGEMM_OPTIMIZERS[step.algorithm]],
        learning_rate=step.lr,
        eps=step.eps,
        weights_precision=config.SparseType.FP32,
        output_dtype=config.SparseType.FP32,
        pooling_mode=common.PoolingMode.SUM,
        stochastic_rounding=False,
        bounds_check_mode=common.BoundsCheckMode.NONE,
    )
    bags.weights_host.data = rows.view(-1)
    if state is not None:
        bags.momentum1_host.data = state.view(-1)
    return bags


@dataclass(frozen=True)
class TorchUpdate:
    """torch's own sparse training of a table: an EmbeddingBag with sparse gradients and an optimizer for them.

    Works in our memory: values and the optimizer's state are shared.
    """

    bag: torch.nn.EmbeddingBag
    optimizer: torch.optim.Optimizer


def torch_has(algorithm: str) -> bool:
    """Whether torch has the optimizer for sparse gradients."""
    return algorithm in ("sgd", "adagrad", "adam")


def torch_update(rows: Tensor, state: dict[str, Tensor], step: OptimizerStep) -> TorchUpdate:
    """Make torch's counterpart of a step, its step counters at ``step.step - 1``.

    Args:
        rows: [R, W] float32.
        state: As kernels take it.
        step: One of the algorithms that torch has.
    """
    bag = torch.nn.EmbeddingBag.from_pretrained(rows, freeze=False, sparse=True, mode="sum", include_last_offset=True)
    parameters = [bag.weight]
    # As torch does it unless asked; said aloud, it gives no warning at each step.
    torch.sparse.check_sparse_tensor_invariants.disable()  # type: ignore[no-untyped-call]
    optimizer: torch.optim.Optimizer
    if step.algorithm == "sgd":
        optimizer = torch.optim.SGD(parameters, lr=step.lr)
    elif step.algorithm == "adagrad":
        # Made over one number, lest it fill a table of zeros that is thrown away at once.
        optimizer = torch.optim.Adagrad([torch.nn.Parameter(torch.zeros(1))], lr=step.lr, eps=step.eps)
        optimizer.param_groups[0]["params"] = parameters
        optimizer.state.clear()
        optimizer.state[bag.weight] = {"step": torch.tensor(float(step.step - 1)), "sum": state["sum"]}
    else:
        optimizer = torch.optim.SparseAdam(parameters, lr=step.lr, betas=(step.beta1, step.beta2), eps=step.eps)
        optimizer.state[bag.weight] = {
            "step": step.step - 1,
            "exp_avg": state["exp_avg"],
            "exp_avg_sq": state["exp_avg_sq"],
        }
    return TorchUpdate(bag, optimizer)


def faiss_index(keys: Tensor) -> Any:
    """A faiss IndexFlatIP over a copy of float32 keys [N, D]; searches on as many threads as torch uses."""
    faiss: Any = importlib.import_module("faiss")
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(keys.shape[1])
    index.add(keys.numpy())
    return index
