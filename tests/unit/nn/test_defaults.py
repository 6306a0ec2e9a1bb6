"""Everything that is made inside names its device and dtype: other defaults change nothing."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from mempool.nn import MemoryLayer, PoolOptimizer

from .stand_in import local_table, session_of


@pytest.fixture(params=[torch.bfloat16, torch.float64, torch.float16])
def default_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


@pytest.fixture
def meta_by_default() -> Iterator[None]:
    """Stands for "cuda" on a machine without a GPU: what lands there by default cannot be read."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def train(layer: MemoryLayer, x: torch.Tensor) -> None:
    table, optimizer = layer.table, PoolOptimizer(layer, max_norm=1.0)
    for sums in (
        lambda: layer(x),
        lambda: table.gather(torch.ones(2, 3, dtype=torch.int64, device="cpu")),
        lambda: table.gather(
            torch.ones(3, dtype=torch.int64, device="cpu"), offsets=torch.tensor([0, 0, 3], device="cpu")
        ),
        lambda: table.gather(
            torch.zeros(2, 0, dtype=torch.int64, device="cpu"),
            torch.zeros(2, 0, dtype=torch.float32, device="cpu", requires_grad=True),
        ),
    ):
        y = sums()
        assert y.device.type == "cpu"
        y.float().square().sum().backward()
        layer.zero_grad()
        sums().float().square().sum().backward()
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    with torch.no_grad():
        layer(x)
    assert session_of(table).values.dtype == torch.float32


def test_under_another_default_dtype(default_dtype: torch.dtype) -> None:
    table = local_table()
    layer = MemoryLayer(12, table=table, heads=1, topk=3, key_dim=6, mem_gated=True)
    assert {parameter.dtype for parameter in layer.parameters()} == {default_dtype}
    train(layer, torch.randn(4, 12))
    layer = MemoryLayer(12, table=table, heads=1, topk=3, key_dim=6, dtype=torch.float32)
    y = layer(torch.randn(4, 12, dtype=torch.float32))
    assert y.dtype == torch.float32
    assert table.gather(torch.tensor([[1]])).dtype == torch.float32


@pytest.mark.usefixtures("meta_by_default")
def test_under_another_default_device() -> None:
    table = local_table()
    layer = MemoryLayer(12, table=table, heads=1, topk=3, key_dim=6, device="cpu")
    train(layer, torch.randn(4, 12, device="cpu"))
    # A model that is made on meta first, and gets its memory later.
    late = MemoryLayer(12, table=table, heads=1, topk=3, key_dim=6)
    late.to_empty(device="cpu")
    for module in late.modules():
        if isinstance(module, (nn.Linear, MemoryLayer)):
            module.reset_parameters()
    train(late, torch.randn(4, 12, device="cpu"))
