"""Training that began in torch goes on in a pool, from values, optimizer state and step: as if torch had gone on."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from mempool.optim import SGD, Adagrad, Adam, AdamW

from .conftest import Pools
from .reference import all_rows, relative_error

SLOTS, DIM = 96, 28

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
CASES: dict[str, tuple[Any, Make]] = {
    "SGD": (
        SGD(0.1, momentum=0.9, dampening=0.2, weight_decay=0.01),
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, dampening=0.2, weight_decay=0.01),
    ),
    "Adagrad": (
        Adagrad(0.1, lr_decay=0.02, weight_decay=0.01),
        lambda parameters: torch.optim.Adagrad(parameters, lr=0.1, lr_decay=0.02, weight_decay=0.01),
    ),
    "Adam": (
        Adam(0.01, eps=1e-3, corrected_eps=True, weight_decay=0.01),
        lambda parameters: torch.optim.Adam(parameters, lr=0.01, eps=1e-3, weight_decay=0.01),
    ),
    "dense AdamW": (
        AdamW(0.01, weight_decay=0.1, dense=True),
        lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_of_torch_is_continued_as_torch_continues_it(pools: Pools, name: str) -> None:
    """Every slot has a gradient in every step: torch moves all of them, and counts one step for all."""
    ours, torchs = CASES[name]
    generator = torch.Generator().manual_seed(11)
    bag = nn.EmbeddingBag(SLOTS, DIM, mode="sum")
    optimizer = torchs(list(bag.parameters()))

    def backward(pooled: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., None]:
        def run(ids: torch.Tensor, target: torch.Tensor) -> None:
            ((pooled(ids) - target).square().sum() / 2).backward()

        return run

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.randperm(SLOTS, generator=generator).view(8, 12)
        return ids, torch.randn(8, DIM, generator=generator)

    train_torch = backward(bag)
    for _ in range(20):
        optimizer.zero_grad()
        train_torch(*batch())
        optimizer.step()

    table = pools.table(shards=3, optimizer=ours, num_slots=SLOTS, value_dim=DIM, block_dim=8, page_slots=16)
    everything = torch.arange(SLOTS)
    checkpoint = optimizer.state_dict()["state"][0]
    table.write(everything, bag.weight.detach())
    table.write_state(
        everything,
        {f"values.{key}": state for key, state in checkpoint.items() if state is not None and state.dim() == 2},
    )
    if "step" in checkpoint:
        table.set_step(int(checkpoint["step"]))

    train_pool = backward(table.gather)
    for _ in range(20):
        ids, target = batch()
        optimizer.zero_grad()
        train_torch(ids, target)
        optimizer.step()
        train_pool(ids, target)
        table.commit()
    assert relative_error(all_rows(table), bag.weight) < 1e-5
    later = optimizer.state_dict()["state"][0]
    for key, state in table.state(everything).items():
        assert relative_error(state, later[key.removeprefix("values.")]) < 1e-5
    if "step" in later:
        assert table.step_count() == int(later["step"]) == 40
