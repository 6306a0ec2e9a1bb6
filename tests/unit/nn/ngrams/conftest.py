"""Tensors here are tiny: torch's threads would only wait for each other."""

from collections.abc import Iterator

import pytest
import torch

import mempool
from mempool.client import Pool


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    with mempool.local(shards=2, device="cpu") as pool:
        yield pool
