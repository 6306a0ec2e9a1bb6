from collections.abc import Iterator

import pytest
import torch

from mempool import kernels
from mempool.bench import machine, peers
from mempool.bench.cases import Workload
from mempool.kernels.dispatch import bags, experts, topk, updates


@pytest.fixture(autouse=True)
def quick_to_start(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels that nothing compiles, on one thread: these tests are about the benchmark."""
    for module in (bags, experts, topk, updates, machine):
        monkeypatch.setattr(module, "implementation_for", lambda _: kernels.implementation("torch"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny() -> Workload:
    """Sizes at which a whole run takes seconds; some tables take more than a case may."""
    return Workload(
        num_slots=(256, 64),
        value_dims=(16, 8, 128),
        bag_sizes=(4, 2),
        forward_bytes=1 << 12,
        most_bytes=96 << 10,
        product_queries=4,
        product_keys=(8,),
        half_dim=4,
        flat=((64, 8, 3),),
        copy_bytes=1 << 12,
        product_size=8,
        topk=4,
        heads=2,
        expert_dim=8,
    )


@pytest.fixture
def no_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where only torch is installed beside mempool."""
    monkeypatch.setattr(peers, "installed", lambda _: False)
