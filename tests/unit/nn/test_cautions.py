"""A loop that never steps, and ranks that each step by themselves, are warned through the layer, once."""

import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

from .stand_in import local_table


@pytest.fixture
def two_ranks() -> Iterator[None]:
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    torch.distributed.destroy_process_group()


def test_backward_passes_without_a_step() -> None:
    table = local_table(value_dim=1)
    ids = torch.tensor([[1]])
    told: list[int] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for count in range(1, 1_003):
            table.gather(ids).sum().backward()
            if len(caught) > len(told):
                told.append(count)
    assert told == [1_000]
    assert "1,000 updates of table 'facts'" in str(caught[0].message)


@pytest.mark.usefixtures("two_ranks")
def test_ranks_that_train_one_table() -> None:
    table = local_table()
    ids = torch.tensor([[1]])
    table.gather(ids)
    with pytest.warns(UserWarning, match="process group of 2 ranks"):
        table.gather(ids).sum().backward()
    table.gather(ids).sum().backward()
    frozen = local_table().requires_grad_(False)
    frozen.gather(ids, torch.ones(1, 1, requires_grad=True)).sum().backward()
