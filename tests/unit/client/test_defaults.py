"""torch's default device and dtype are the user's: nothing that a client does follows them."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import mempool
from mempool.client import Table

PACKAGE = Path(mempool.__file__).parent
SOURCES = [
    *sorted(path for room in ("client", "embedded", "nn") for path in (PACKAGE / room).rglob("*.py")),
    PACKAGE / "kernels" / "warming.py",  # a trainer's first scoring runs it
]
MAKERS = {"arange", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "tensor", "zeros"}


@pytest.fixture(scope="module")
def table() -> Iterator[Table]:
    keys = mempool.ProductKeys(heads=2, key_dim=8)
    optimizer = mempool.optim.RowWiseAdagrad(lr=0.1)
    with mempool.local(shards=2, timeout_s=60) as pool:
        config = mempool.TableConfig(name="facts", num_slots=64, value_dim=16, block_dim=8, keys=keys, layout="grid")
        yield pool.create_table(config.model_copy(update={"optimizer": optimizer}))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_tensor_names_its_device_and_dtype(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MAKERS):
            continue
        if isinstance(node.func.value, ast.Name) and node.func.value.id == "torch":
            named = {keyword.arg for keyword in node.keywords}
            assert {"device", "dtype"} <= named or None in named, (
                f"{path.name}:{node.lineno} names {sorted(map(str, named))}"
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_whole_step_is_the_same_under_other_defaults(table: Table, dtype: torch.dtype) -> None:
    ids, weights = torch.tensor([[1, 2, 63], [0, 2, 2]]), torch.rand(2, 3, requires_grad=True)
    offsets, queries, rows = torch.tensor([0, 4, 6]), torch.randn(3, 2, 8), torch.randn(2, 16)
    slots, heads = torch.tensor([5, 9]), torch.tensor([1])

    def step() -> list[torch.Tensor]:
        table.write(slots, rows)
        table.write_keys(table.read_keys(heads), heads)
        pooled = table.gather(ids, weights)
        (weight_grad,) = torch.autograd.grad(pooled.square().sum(), weights)
        bags = table.gather(ids.reshape(-1), offsets=offsets, padding_idx=2)
        empty = table.gather(ids[:, :0], weights[:, :0])
        found = table.lookup(queries, topk=3)
        return [pooled, weight_grad, bags, empty, *found, table.rows(slots), table.read_keys()]

    expected = step()
    torch.set_default_device("meta")  # stands for "cuda" on a machine without a GPU
    torch.set_default_dtype(dtype)
    try:
        got = step()
        table.gather(ids, weights).sum().backward()
        assert table.prepare() is not None
        assert table.commit(lr=0.0) == 1
        assert table.gather(ids).sum().requires_grad
    finally:
        torch.set_default_device("cpu")
        torch.set_default_dtype(torch.float32)
    for before, after in zip(expected, got, strict=True):
        assert after.dtype == before.dtype
        assert torch.equal(after, before)
