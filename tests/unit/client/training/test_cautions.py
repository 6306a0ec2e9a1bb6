"""What is said once about a table: ranks that do not step together, and updates that nobody commits."""

import warnings
from collections.abc import Iterator

import pytest
import torch.distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

from mempool.client.training.cautions import Cautions


@pytest.fixture
def four_ranks() -> Iterator[None]:
    torch.distributed.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    yield
    torch.distributed.destroy_process_group()


def test_a_lone_process_is_told_nothing() -> None:
    Cautions("facts").before_update(grouped=False)


@pytest.mark.usefixtures("four_ranks")
def test_ranks_without_a_group_are_told_once() -> None:
    cautions = Cautions("facts")
    with pytest.warns(UserWarning, match=r"'facts' is trained by a process group of 4 ranks.*4 optimizer steps a step"):
        cautions.before_update(grouped=False)
    cautions.before_update(grouped=False)
    Cautions("facts").before_update(grouped=True)


@pytest.mark.parametrize(("pending", "pending_bytes"), [(1_000, 0), (1, 2**30)])
def test_updates_that_nobody_commits_are_told_of_once(pending: int, pending_bytes: int) -> None:
    cautions = Cautions("facts")
    cautions.after_update(pending=999, pending_bytes=2**30 - 1)
    with pytest.warns(UserWarning, match=r"updates of table 'facts' .* wait for a commit.*PoolOptimizer"):
        cautions.after_update(pending=pending, pending_bytes=pending_bytes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cautions.after_update(pending=pending, pending_bytes=pending_bytes)
